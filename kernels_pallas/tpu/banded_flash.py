"""Banded flash attention for TPU: every query sees a box of keys, in 1, 2 or 3 axes, and the first `sinks` keys.

    out_t = sum_{s visible to t} softmax_s(scale q_t . k_s) v_s        visible: starts[t] <= s < ends[t], or
    lse_t = log sum_{s visible to t} exp(scale q_t . k_s)                       s < min(sinks, ends[t])

Queries and keys are cut into tiles. A list, made before the kernel runs, has the pairs of a query tile and a key tile
in which some query sees some key, and no other key tile is read from memory. The grid is (batch, heads, pairs): one
step adds one key tile to the running softmax of one query tile (FlashAttention, Dao et al. 2022; the running maximum:
Milakov & Gimelshein 2018).

                  key tiles
                0 1 2 3 4 5
    query     0 # .                  pairs: 00 01, 10 11 12, 21 22 23       #: full, no element mask
    tiles     1 . # .                                                       .: partly seen
              2   . # .

The list comes by scalar prefetch, so that the pipeline knows the next tiles early. Query heads that share a key head
read it in place. With several axes the caller orders the tokens so that a box of space is one tile (boxes below), and
every key brings its coordinates.

Numerics: products of bfloat16 operands are accumulated in float32; float32 operands are multiplied at full float32
precision (Precision.HIGHEST, six passes of the matrix unit: a float32 call is about as accurate as XLA's at that
setting, and several times slower than a bfloat16 one). The running maximum, sum and output are float32. Weights are
rounded to the values' dtype before they multiply them. Two runs give the same bits. Gradients are in
banded_flash_backward.py.
"""

import dataclasses
import functools
import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from kernels_pallas.tpu.common import (
    LANES,
    SMEM_BUDGET,
    SUBLANES,
    VMEM_BUDGET,
    dot,
    heads_first,
    padded_width,
    round_up,
    varying,
    zero,
)

Array = jax.Array

# (queries in a tile, keys in a tile), by bytes of an element and padded head dim. Of tiles that fit, 512 x 512 takes
# the fewest cycles for a window of 1024 (kernels_pallas.aot): smaller ones issue more steps, larger ones see less.
_BLOCKS = {
    (2, 64): (512, 512),
    (2, 128): (512, 512),
    (2, 256): (512, 512),
    (4, 64): (512, 512),
    (4, 128): (512, 512),
    (4, 256): (256, 512),
}
_DEFAULT_BLOCKS = (256, 256)  # at other widths
# Stands for -inf in masked logits and in the maximum of no logits: finite, so that a difference of two is not NaN.
MASKED = np.float32(-0.7 * np.finfo(np.float32).max)
# Scales nearer to 0 are taken for this, so that MASKED times a scale stays far below all other logits.
_LEAST_SCALE = np.float32(1e-30)
_LOG_2 = np.float32(np.log(2))
# Constants in the kernel have dtypes: a Python float would be a float64 under jax_enable_x64.
_ONE = np.float32(1)
# Rows of the tables of queries and of keys: START and WIDTH (queries) or COORDINATE (keys) of each axis, then SEGMENT.
# START and WIDTH have their sign bit flipped: as int32, coordinate - START < WIDTH then is true iff the key is in the
# interval, because below the interval the unsigned difference wraps to a large number.
_SEGMENT = SUBLANES - 1
_SIGN = np.int32(-(2**31))
# What a step does, as bits.
_FIRST, _LAST, _ACTIVE, _FULL = (np.int32(2**bit) for bit in range(4))
_HEAD_BIT = np.int32(4)  # and above it the query head, among those of its key head


class Visits(NamedTuple):
    """Pairs of tiles, one a grid step; all pairs of a row follow each other. int32 [lists, steps].

    There is one list, or one for every row of the batch. flags: the first and the last step of a row, whether
    the pair is looked at (a row without pairs has one step that is not), and whether every query sees every key.
    """

    rows: Any
    columns: Any
    flags: Any


@dataclasses.dataclass(frozen=True, eq=False)
class Pattern:
    """Which keys the queries see, and in which tiles.

    starts, ends: int32 [lists, axes, T]. coordinates: int32 [lists, axes, S], of one axis None: the key's number.
    by_query: pairs (query tile, key tile); by_key: the same pairs as (key tile, query tile).
    diagonals: (offset, width) where query t sees the keys t + offset <= s < t + offset + width that there are, and the
    sinks: then the kernels read no bounds.
    """

    starts: Any
    ends: Any
    coordinates: Any
    by_query: Visits
    by_key: Visits
    block_q: int
    block_k: int
    sinks: int = 0
    diagonals: tuple[int, int] | None = None


def intervals(starts: Any, ends: Any, num_keys: int, *, sinks: int = 0, block_q: int, block_k: int) -> Pattern:
    """Queries that see the keys starts <= s < ends and s < min(sinks, ends). starts, ends: int [T].

    Exact: a pair is listed iff some query sees some key. O(T + query tiles x key tiles) time and memory.
    """
    starts, ends = np.maximum(np.asarray(starts), 0), np.minimum(np.asarray(ends), num_keys)
    diagonals = _diagonals(starts, ends, num_keys, block_k)
    starts = np.where(starts <= sinks, 0, starts)  # an interval that touches the sinks begins with them
    visited, full = _pairs(starts, ends, num_keys, sinks, block_q, block_k)
    first, end = (x.astype(np.int32)[None, None] for x in (starts, ends))
    return Pattern(first, end, None, *_both_ways(visited, full), block_q, block_k, sinks, diagonals)


def _diagonals(starts: np.ndarray, ends: np.ndarray, num_keys: int, block_k: int) -> tuple[int, int] | None:
    """Pattern.diagonals of these intervals, or None if they are no band."""
    query = np.arange(len(starts))
    cut_starts, cut_ends = starts == 0, ends == num_keys
    offset = -len(starts) if cut_starts.all() else int((starts - query)[~cut_starts][0])
    end = num_keys if cut_ends.all() else int((ends - query)[~cut_ends][0])
    seen_past_the_end = num_keys % block_k and query[-1] + end > num_keys
    is_band = np.array_equal(starts, np.maximum(query + offset, 0)) and np.array_equal(
        ends, np.minimum(query + end, num_keys)
    )
    return (offset, end - offset) if is_band and end > offset and not seen_past_the_end else None


def boxes(bounds: Sequence[tuple[np.ndarray, np.ndarray]], tile: Sequence[int]) -> Pattern:
    """Queries of an N-D space that see the box of keys with starts <= coordinate < ends along every axis.

    bounds: per axis (starts, ends), int [length], lengths multiples of `tile`. The tokens come tile by tile, row-major
    in space and within a tile; one number of `tile` per axis, their product a tile's tokens.
    """
    sides = [len(starts) for starts, _ in bounds]
    tables = [(*axis, np.arange(side)) for axis, side in zip(bounds, sides)]
    rows = []
    for field in range(3):
        grids = np.meshgrid(*(table[field] for table in tables), indexing="ij")
        rows.append(np.stack([_tiled(grid, tile) for grid in grids])[None].astype(np.int32))
    visited, full = np.ones((1, 1), bool), np.ones((1, 1), bool)
    for (starts, ends), side, step in zip(bounds, sides, tile):
        along = _pairs(starts, ends, side, 0, step, step)
        visited, full = np.kron(visited, along[0]), np.kron(full, along[1])
    tokens = math.prod(tile)
    return Pattern(rows[0], rows[1], rows[2], *_both_ways(visited, full), tokens, tokens)


def traced_intervals(starts: Any, ends: Any, num_keys: int, *, reach: int, block_q: int, block_k: int) -> Pattern:
    """As intervals, for bounds that are computed with the arrays: int [B, T], a list for each row of the batch.

    Both must grow along the queries, and every start must be at least the end before it minus `reach`; the lists are
    then as long as num_pairs says.
    """
    batch, queries = starts.shape
    tiles, key_tiles = -(-queries // block_q), -(-num_keys // block_k)
    past = tiles * block_q - queries
    by_tile = [jnp.pad(x, ((0, 0), (0, past)), mode="edge").reshape(batch, tiles, block_q) for x in (starts, ends)]
    start, end = by_tile[0].min(-1), by_tile[1].max(-1)
    first, last = start // block_k, jnp.maximum(end - 1, 0) // block_k  # of the key tiles; they grow along the tiles
    key_tile = jnp.arange(key_tiles)
    seen_first = jax.vmap(lambda last: jnp.searchsorted(last, key_tile, side="left"))(last)
    seen_last = jax.vmap(lambda first: jnp.searchsorted(first, key_tile, side="right"))(first) - 1
    pairs = num_pairs(queries, num_keys, reach=reach, block_q=block_q, block_k=block_k)
    by_query = _list_ranges(first, jnp.where(end > start, last - first + 1, 0), pairs)
    by_key = _list_ranges(jnp.minimum(seen_first, tiles - 1), jnp.maximum(seen_last - seen_first + 1, 0), pairs)
    first_key, end_key = (x.astype(jnp.int32)[:, None] for x in (starts, ends))
    return Pattern(first_key, end_key, None, by_query, by_key, block_q, block_k)


def num_pairs(queries: int, keys: int, *, reach: int, block_q: int, block_k: int) -> int:
    """Steps in a list of traced_intervals, at most: the ranges of tiles grow, and each begins `reach` before the last
    one's end at the earliest. One more for every tile that sees, or is seen by, none."""
    tiles, key_tiles = -(-queries // block_q), -(-keys // block_k)
    return 2 * key_tiles + tiles * (-(-(reach - 1) // block_k) + 2)


def _list_ranges(first: Array, counts: Array, steps: int) -> Visits:
    """The pairs of each row with `counts` columns from `first` on; int [B, rows] -> lists of this many steps."""

    def one(first: Array, counts: Array) -> tuple[Array, Array, Array]:
        taken = jnp.maximum(counts, 1)
        end = jnp.cumsum(taken)
        step = jnp.arange(steps)
        row = jnp.minimum(jnp.searchsorted(end, step, side="right"), len(end) - 1)
        place = jnp.minimum(step, end[-1] - 1) - (end[row] - taken[row])
        real = step < end[-1]
        flags = jnp.where(real & (counts[row] > 0), _ACTIVE, 0)
        flags |= jnp.where(real & (place == 0), _FIRST, 0) | jnp.where(step == end[row] - 1, _LAST, 0)
        return row, first[row] + place, flags

    return Visits(*(x.astype(jnp.int32) for x in jax.vmap(one)(first, counts)))


def all_pairs(starts: Any, ends: Any, coordinates: Any, *, block_q: int, block_k: int) -> Pattern:
    """Queries [B, T] that see the keys [B, S] with starts <= coordinate < ends, all int and maybe traced: every pair of
    tiles is looked at."""
    tiles = np.ones([-(-x.shape[1] // block) for x, block in ((starts, block_q), (coordinates, block_k))], bool)
    first, end, place = (x.astype(jnp.int32)[:, None] for x in (starts, ends, coordinates))
    return Pattern(first, end, place, *_both_ways(tiles, ~tiles), block_q, block_k)


def _tiled(x: np.ndarray, tile: Sequence[int]) -> np.ndarray:
    """[*space] -> [tokens], tile by tile."""
    split = x.reshape([n for side, step in zip(x.shape, tile) for n in (side // step, step)])
    return split.transpose(*range(0, split.ndim, 2), *range(1, split.ndim, 2)).ravel()


def _pairs(
    starts: np.ndarray, ends: np.ndarray, num_keys: int, sinks: int, block_q: int, block_k: int
) -> tuple[np.ndarray, np.ndarray]:
    """bool [query tiles, key tiles]: pairs in which some query sees some key, and in which all queries see all keys."""
    num_tiles = math.ceil(len(starts) / block_q)
    tile = np.arange(len(starts)) // block_q
    # Intervals of key tiles, as +1 where one begins and -1 after it ends.
    edges = np.zeros((num_tiles, math.ceil(num_keys / block_k) + 1), np.int64)
    for first, last in ((starts, ends), (np.zeros_like(ends), np.minimum(ends, sinks))):
        sees = first < last
        np.add.at(edges, (tile[sees], first[sees] // block_k), 1)
        np.add.at(edges, (tile[sees], (last[sees] - 1) // block_k + 1), -1)
    visited = np.cumsum(edges, axis=1)[:, :-1] > 0
    first_queries = np.arange(num_tiles) * block_q
    latest_start, earliest_end = np.maximum.reduceat(starts, first_queries), np.minimum.reduceat(ends, first_queries)
    first = np.arange(visited.shape[1]) * block_k
    after_start = (first >= latest_start[:, None]) | (first + block_k <= sinks)
    return visited, visited & after_start & (first + block_k <= earliest_end[:, None])


def _both_ways(visited: np.ndarray, full: np.ndarray) -> tuple[Visits, Visits]:
    return list_visits(visited, full), list_visits(visited.T, full.T)


def list_visits(visited: np.ndarray, full: np.ndarray) -> Visits:
    """bool [rows, columns], twice -> the pairs of visited row by row."""
    listed = visited.copy()
    listed[~visited.any(axis=1), 0] = True
    rows, columns = np.nonzero(listed)
    flags = _ACTIVE * visited[rows, columns] + _FULL * full[rows, columns]
    flags += _FIRST * (np.diff(rows, prepend=-1) != 0) + _LAST * (np.diff(rows, append=-1) != 0)
    return Visits(*(x.astype(np.int32)[None] for x in (rows, columns, flags)))


def default_blocks(query: Any, key: Any, value: Any) -> tuple[int, int]:
    """(block_q, block_k) for arrays of these shapes and dtype, from a frozen table."""
    return blocks_of(_BLOCKS, _DEFAULT_BLOCKS, query, key, value)


def blocks_of(
    table: dict[tuple[int, int], tuple[int, int]], default: tuple[int, int], query: Any, key: Any, value: Any
) -> tuple[int, int]:
    """A table's blocks for these arrays, cut to their lengths."""
    width = max(padded_width(query.shape[-1]), padded_width(value.shape[-1]))
    block_q, block_k = table.get((jnp.dtype(query.dtype).itemsize, width), default)
    return min(block_q, round_up(query.shape[1], LANES)), min(block_k, round_up(key.shape[1], LANES))


def vmem_bytes(block_q: int, block_k: int, head_dim: int, value_dim: int, dtype: Any, *, tables: int = 1) -> int:
    """VMEM that the kernel takes at most: two buffers for every block, the running state, and a step's temporaries.

    tables: 2 with a table of keys beside that of queries.
    """
    size = jnp.dtype(dtype).itemsize
    key_lanes, value_lanes = (round_up(width, LANES) for width in (head_dim, value_dim))
    blocks = size * (block_q * (key_lanes + value_lanes) + block_k * (key_lanes + value_lanes))
    rows = 4 * SUBLANES * (2 * block_q + (block_k if tables > 1 else 0))  # table of queries, lse; table of keys
    state = 4 * block_q * (2 * LANES + value_lanes)
    logits = (4 + 4 + size) * block_q * block_k  # logits, weights, weights in the values' dtype
    columns = 4 * block_q * LANES * 8  # what tells a query's keys, one query a sublane
    product = 4 * block_q * value_lanes  # of weights and values, before it is added to the output
    # At full precision the operands of the logits are split into bfloat16 parts and remainders.
    splits = 2 * size * (block_q + block_k) * key_lanes if size == 4 else 0
    return 2 * (blocks + rows) + state + logits + columns + product + splits


def refusal(
    query: Any,
    key: Any,
    value: Any,
    *,
    pattern: Pattern,
    segment_ids: tuple[Any, Any] | None = None,
    footprint: Callable[..., int] = vmem_bytes,
) -> str | None:
    """Why banded_flash_attention cannot serve these arguments (arrays may be shape structs), or None if it can.

    footprint: the kernel's VMEM model.
    """
    dtype = jnp.dtype(query.dtype)
    if dtype not in (jnp.bfloat16, jnp.float32) or not dtype == key.dtype == value.dtype:
        return f"needs query, key and value all bfloat16 or all float32, got {dtype}, {key.dtype} and {value.dtype}"
    if segment_ids is not None and any(jnp.dtype(ids.dtype).itemsize > 4 for ids in segment_ids):
        return f"needs segment ids of at most 32 bits, got {segment_ids[0].dtype} and {segment_ids[1].dtype}"
    if 0 in query.shape or 0 in key.shape:
        return f"needs arrays that are not empty, got query {query.shape} and key {key.shape}"
    block_q, block_k = pattern.block_q, pattern.block_k
    for name, block in (("block_q", block_q), ("block_k", block_k)):
        if block < 1 or block % LANES:
            return f"needs {name} a positive multiple of {LANES}, got {block}"
    widths = padded_width(query.shape[-1]), padded_width(value.shape[-1])
    tables = 1 + (pattern.coordinates is not None or segment_ids is not None)
    needed = footprint(block_q, block_k, *widths, dtype, tables=tables)
    if needed > VMEM_BUDGET:
        return (
            f"a tile of {block_q} queries x {block_k} keys at head dims {query.shape[-1]} and {value.shape[-1]} takes "
            f"{needed / 2**20:.1f} MiB of VMEM, more than {VMEM_BUDGET / 2**20:.0f} MiB"
        )
    # The gradients of keys go through the pairs once for every query head of a key head.
    pairs = math.prod(pattern.by_query.rows.shape) * (query.shape[2] // key.shape[2])
    if 3 * 4 * pairs > SMEM_BUDGET:
        return (
            f"the list of {pairs} pairs of tiles takes {12 * pairs / 2**10:.0f} KiB of scalar memory, more than "
            f"{SMEM_BUDGET / 2**10:.0f} KiB"
        )
    return None


def banded_flash_attention(
    query: Array,
    key: Array,
    value: Array,
    *,
    pattern: Pattern,
    segment_ids: tuple[Array, Array] | None = None,
    scale: float | Array,
) -> tuple[Array, Array]:
    """Attention of every query to the keys that the pattern says.

    Args:
      query: [B, T, N, H], bfloat16 or float32.
      key: [B, S, K, H] of the same dtype. K divides N: query head n reads key head n // (N / K).
      value: [B, S, K, V] of the same dtype.
      pattern: `intervals` or `boxes` of T queries and S keys.
      segment_ids: integers ([B, T], [B, S]); a query sees keys of its own segment only.
      scale: factor on the logits, may be traced.

    Returns:
      out [B, T, N, V] in query's dtype, lse [B, T, N] float32. A query that sees no key: 0 and -inf.

    Raises:
      ValueError: with refusal()'s reason.

    Complexity: O(B N H x pairs x block_q x block_k) time. Memory beside the arguments: copies of them with heads
    first, padded to whole tiles, and to 64 or a multiple of 128 in head dim.
    """
    reason = refusal(query, key, value, pattern=pattern, segment_ids=segment_ids)
    if reason is not None:
        raise ValueError(f"banded_flash_attention: {reason}")
    band = Band(query, key, value, pattern, segment_ids)
    call = Call(band, pattern.by_query, band.heads)
    rows = (band.batch, band.heads)
    over = varying(query, key, value, jnp.asarray(scale), *(segment_ids or ()))
    # The running maximum is that of q.k, which takes a scale above 0; the scale goes into the exponent's own factor.
    scale = jnp.asarray(scale, jnp.float32)
    query = query * jnp.where(scale < 0, -1, 1).astype(query.dtype)
    factor = jnp.maximum(jnp.abs(scale), _LEAST_SCALE) / _LOG_2

    def lse_block(*indices: Any) -> tuple[Any, ...]:
        batch, head, tile = call.row(*indices)
        return batch, head, zero(), tile

    out, lse = call.run(
        functools.partial(_kernel, band=band),
        in_specs=[
            call.scale,
            call.table("query", call.row),
            *([call.table("key", call.column)] if band.key_table is not None else []),
            call.block(band.block_q, band.key_width, call.row),
            call.block(band.block_k, band.key_width, call.key_head(call.column)),
            call.block(band.block_k, band.value_width, call.key_head(call.column)),
        ],
        out_specs=[
            call.block(band.block_q, band.value_width, call.row),
            pl.BlockSpec((None, None, 1, band.block_q), lse_block),
        ],
        scratch_shapes=[
            pltpu.VMEM((band.block_q, LANES), jnp.float32),
            pltpu.VMEM((band.block_q, LANES), jnp.float32),
            pltpu.VMEM((band.block_q, band.value_width), jnp.float32),
            *band.query_numbers(),
        ],
        out_shape=[
            jax.ShapeDtypeStruct((*rows, band.padded_queries, band.value_width), query.dtype, manual_axis_type=over),
            jax.ShapeDtypeStruct((*rows, 1, band.padded_queries), jnp.float32, manual_axis_type=over),
        ],
        products=(band.key_width, band.value_width),
        name="banded_flash_attention",
        arrays=[
            factor.reshape(1, 1),
            *band.tables,
            heads_first(query, band.padded_queries, band.key_width),
            heads_first(key, band.padded_keys, band.key_width),
            heads_first(value, band.padded_keys, band.value_width),
        ],
    )
    out, lse = out[:, :, : query.shape[1], : value.shape[-1]], lse[:, :, 0, : query.shape[1]]
    return jnp.swapaxes(out, 1, 2), jnp.swapaxes(lse, 1, 2)


class Band:
    """A call's sizes, padded to whole tiles, and the tables of its queries and keys, int32 [1 or B, 8, tokens]."""

    def __init__(
        self, query: Array, key: Array, value: Array, pattern: Pattern, segment_ids: tuple[Array, Array] | None
    ):
        self.batch, num_queries, self.heads, head_dim = query.shape
        num_keys, self.key_heads, value_dim = value.shape[1:]
        self.group = self.heads // self.key_heads
        self.sinks, self.segments = pattern.sinks, segment_ids is not None
        self.block_q, self.block_k, self.itemsize = pattern.block_q, pattern.block_k, query.dtype.itemsize
        self.key_width, self.value_width = padded_width(head_dim), padded_width(value_dim)
        self.padded_queries, self.padded_keys = round_up(num_queries, self.block_q), round_up(num_keys, self.block_k)
        self.axes, self.diagonals = pattern.starts.shape[1], pattern.diagonals
        # The table's rows that the kernels read.
        self.rows = [*range(0 if self.diagonals else 2 * self.axes), *([_SEGMENT] if self.segments else [])]
        self.has_coordinates = pattern.coordinates is not None
        # Queries in the padding copy the last one's interval, so that they do not spoil a full tile; keys in it have
        # a coordinate that nobody sees.
        starts = pattern.starts - (pattern.starts - pattern.ends).clip(0)  # an empty interval begins where it ends
        bounds = [x[:, axis] ^ _SIGN for axis in range(self.axes) for x in (starts, pattern.ends - starts)]
        query_ids, key_ids = segment_ids or (None, None)
        self.query_table = self._table(bounds, query_ids, self.padded_queries - num_queries, mode="edge")
        self.key_table = None
        if self.has_coordinates or self.segments:
            places = [pattern.coordinates[:, axis] for axis in range(self.axes)] if self.has_coordinates else []
            past = self.padded_keys - num_keys
            self.key_table = self._table(places, key_ids, past, mode="constant", constant_values=-1)

    def query_numbers(self) -> list[Any]:
        """Scratch for what tells a query's keys: a number a row, repeated over the lanes."""
        return [pltpu.VMEM((self.block_q, LANES), jnp.int32)] * len(self.rows)

    def read_queries(self, table: Any, numbers: Any) -> None:
        """Fills the scratch from the tile's table."""
        for row, ref in zip(self.rows, numbers, strict=True):
            ref[...] = spread(table[row : row + 1, :])

    def rows_of(self, table: Any) -> list[Array]:
        """The same, a number a lane."""
        return [table[row : row + 1, :] for row in self.rows]

    def numbers(self, rows: dict[int, Array]) -> Array:
        """[B, T, N] by row -> float32 [B, N, 8, T']."""
        table = jnp.zeros((self.batch, self.heads, SUBLANES, self.padded_queries), jnp.float32)
        for row, x in rows.items():
            table = table.at[:, :, row, : x.shape[1]].set(jnp.swapaxes(x, 1, 2).astype(jnp.float32))
        return table

    @property
    def tables(self) -> list[Array]:
        return [self.query_table] if self.key_table is None else [self.query_table, self.key_table]

    def _table(self, rows: list[Any], segment_ids: Array | None, past: int, **padding: Any) -> Array:
        """Rows int32 [lists, tokens] and segment ids [B, tokens] -> [lists, 8, tokens + past]."""
        tokens = rows[0].shape[1] if rows else segment_ids.shape[1]  # type: ignore[union-attr]
        lists = rows[0].shape[0] if rows else 1
        blank = [np.zeros((lists, tokens), np.int32)] * (SUBLANES - len(rows))
        xp = np if all(isinstance(row, np.ndarray) for row in rows) else jnp
        table = jnp.asarray(xp.pad(xp.stack([*rows, *blank], axis=1), ((0, 0), (0, 0), (0, past)), **padding))
        if segment_ids is None:
            return table
        ids = jnp.pad(segment_ids.astype(jnp.int32), ((0, 0), (0, past)))
        return jnp.broadcast_to(table, (self.batch, *table.shape[1:])).at[:, _SEGMENT].set(ids)


class Call:
    """A kernel over one list of pairs of tiles: its grid (batch, heads, steps), and where a step's blocks are.

    heads: of the grid; the query's, or the key's, and then a step's flags say which query head of it.
    """

    def __init__(self, band: Band, visits: Visits, heads: int):
        self.band, self.visits, self.heads = band, visits, heads
        self.lists, self.steps = visits.rows.shape
        self.scale = pl.BlockSpec((1, 1), lambda *_: (zero(), zero()), memory_space=pltpu.SMEM)

    def step(self, b: Any, n: Any, s: Any) -> Any:
        """A step's place in the tables."""
        return s if self.lists == 1 else b * np.int32(self.steps) + s

    def row(self, b: Any, n: Any, s: Any, rows: Any, columns: Any, flags: Any) -> tuple[Any, Any, Any]:
        return b, n, rows[self.step(b, n, s)]

    def column(self, b: Any, n: Any, s: Any, rows: Any, columns: Any, flags: Any) -> tuple[Any, Any, Any]:
        return b, n, columns[self.step(b, n, s)]

    def query_head(self, place: Callable[..., Any]) -> Callable[..., Any]:
        """Of a grid over key heads."""

        def placed(b: Any, n: Any, s: Any, rows: Any, columns: Any, flags: Any) -> tuple[Any, Any, Any]:
            head = lax.shift_right_logical(flags[self.step(b, n, s)], _HEAD_BIT)
            return b, n * np.int32(self.band.group) + head, place(b, n, s, rows, columns, flags)[2]

        return placed

    def key_head(self, place: Callable[..., Any]) -> Callable[..., Any]:
        """Of a grid over query heads."""

        def placed(*indices: Any) -> tuple[Any, Any, Any]:
            b, n, tile = place(*indices)
            return b, lax.div(n, np.int32(self.band.group)), tile

        return placed

    def block(self, rows: int, width: int, place: Callable[..., Any]) -> Any:
        return pl.BlockSpec((None, None, rows, width), lambda *indices: (*place(*indices), zero()))

    def of_pair(self, query_of: Callable[..., Any], key_of: Callable[..., Any]) -> list[Any]:
        """The scale, the tables of queries and keys, and a table of numbers [B, N, 8, T'] that belong to queries."""

        def numbers(*indices: Any) -> tuple[Any, ...]:
            batch, head, tile = query_of(*indices)
            return batch, head, zero(), tile

        tables = [self.table("query", query_of)]
        if self.band.key_table is not None:
            tables.append(self.table("key", key_of))
        return [self.scale, *tables, pl.BlockSpec((None, None, SUBLANES, self.band.block_q), numbers)]

    def table(self, which: str, place: Callable[..., Any]) -> Any:
        table, block = {
            "query": (self.band.query_table, self.band.block_q),
            "key": (self.band.key_table, self.band.block_k),
        }[which]
        lists = table.shape[0]  # type: ignore[union-attr]

        def index(*indices: Any) -> tuple[Any, ...]:
            b, _, tile = place(*indices)
            return zero() if lists == 1 else b, zero(), tile

        return pl.BlockSpec((None, SUBLANES, block), index)

    def run(
        self,
        kernel: Callable[..., None],
        *,
        in_specs: list[Any],
        out_specs: Any,
        scratch_shapes: list[Any],
        out_shape: Any,
        products: tuple[int, ...],
        name: str,
        arrays: list[Array],
    ) -> Any:
        """products: the head dim of each product of a step's tiles."""
        band = self.band
        steps = band.batch * self.heads * self.steps
        tile = band.block_q * band.block_k
        both = band.key_width + band.value_width
        moved = steps * band.block_k + band.batch * band.heads * band.padded_queries

        def body(rows: Any, columns: Any, flags: Any, *refs: Any) -> None:
            place = self.step(*(pl.program_id(axis) for axis in range(3)))
            kernel(rows[place], columns[place], flags[place], *refs)

        return pl.pallas_call(
            body,
            grid_spec=pltpu.PrefetchScalarGridSpec(
                num_scalar_prefetch=3,
                grid=(band.batch, self.heads, self.steps),
                in_specs=in_specs,
                out_specs=out_specs,
                scratch_shapes=scratch_shapes,
            ),
            out_shape=out_shape,
            compiler_params=pltpu.CompilerParams(
                dimension_semantics=("parallel", "parallel", "arbitrary"), vmem_limit_bytes=VMEM_BUDGET
            ),
            cost_estimate=pl.CostEstimate(
                flops=2 * steps * tile * sum(products),
                transcendentals=steps * tile,
                bytes_accessed=moved * both * band.itemsize,
            ),
            name=name,
        )(*(jnp.asarray(x, jnp.int32).ravel() for x in self.visits), *arrays)


def has(flags: Array, flag: np.int32) -> Array:
    return lax.bitwise_and(flags, flag) != 0


def is_first(flags: Array) -> Array:
    return has(flags, _FIRST)


def is_last(flags: Array) -> Array:
    return has(flags, _LAST)


def visible(
    band: Band, query_tile: Array, key_tile: Array, queries: Sequence[Array], keys: Array | None, axis: int
) -> Array:
    """bool, where a query sees a key; the keys lie along `axis` of the result, the queries along the other.

    queries: the numbers of band.rows; each broadcasts against the result. keys: their table, a number a row where axis
    is 1, a number a column where it is 0.
    """

    def places(tile: Array, block: int, axis: int, shift: int = 0) -> Array:
        shape = (1, block) if axis == 1 else (block, 1)
        return tile * np.int32(block) + np.int32(shift) + lax.broadcasted_iota(jnp.int32, shape, axis)

    def of_key(row: int) -> Array:
        assert keys is not None
        return keys[row : row + 1, :] if axis == 1 else keys[:, row : row + 1]

    parts = []
    for number in range(band.axes):
        if band.diagonals:
            start = places(query_tile, band.block_q, 1 - axis, band.diagonals[0]) ^ _SIGN
            width: Any = np.int32(band.diagonals[1]) ^ _SIGN
        else:
            start, width = queries[2 * number : 2 * number + 2]
        place = of_key(number) if band.has_coordinates else places(key_tile, band.block_k, axis)
        inside = place - start < width
        parts.append(inside | (place < jnp.minimum(np.int32(band.sinks), start + width)) if band.sinks else inside)
    if band.segments:
        parts.append(queries[-1] == of_key(_SEGMENT))
    return functools.reduce(jnp.logical_and, parts)


def visit(accumulate: Callable[[bool], None], flags: Array, segments: bool) -> None:
    """Runs accumulate(masked) if the pair is looked at; without the element mask where every query sees every key."""
    active, full = has(flags, _ACTIVE), has(flags, _FULL)
    if segments:
        pl.when(active)(lambda: accumulate(True))
        return
    pl.when(active & full)(lambda: accumulate(False))
    pl.when(active & ~full)(lambda: accumulate(True))


def _kernel(row: Array, column: Array, flags: Array, *refs: Any, band: Band) -> None:
    """One visit of a query tile to a key tile. The maximum and sum of a query are repeated over the lanes."""
    scale_ref, queries_ref, *refs = refs  # type: ignore[assignment]
    keys_ref, *refs = refs if band.key_table is not None else (None, *refs)  # type: ignore[assignment]
    query_ref, key_ref, value_ref, out_ref, lse_ref, maximum_ref, sum_ref, acc_ref, *numbers = refs

    @pl.when(is_first(flags))
    def _() -> None:
        maximum_ref[...] = jnp.full_like(maximum_ref, MASKED)
        sum_ref[...] = jnp.zeros_like(sum_ref)
        acc_ref[...] = jnp.zeros_like(acc_ref)
        band.read_queries(queries_ref, numbers)

    def accumulate(masked: bool) -> None:
        products = dot(query_ref[...], key_ref[...], contract=(1, 1))
        if masked:
            queries = [over_lanes(ref[...], band.block_k) for ref in numbers]
            keys = None if keys_ref is None else keys_ref[...]
            sees = visible(band, row, column, queries, keys, axis=1)
            products = jnp.where(sees, products, MASKED)
        old_maximum = maximum_ref[...]
        maximum = jnp.maximum(old_maximum, jnp.max(products, axis=1, keepdims=True))
        # Where a query has seen no key yet the maximum is MASKED and the weights are 1, not 0; the first key that it
        # does see multiplies what they gave by `decay` = 0.
        weights = jnp.exp2(scale_ref[0, 0] * (products - over_lanes(maximum, band.block_k)))
        decay = jnp.exp2(scale_ref[0, 0] * (old_maximum - maximum))
        maximum_ref[...] = maximum
        sum_ref[...] = decay * sum_ref[...] + jnp.sum(weights, axis=1, keepdims=True)
        values = value_ref[...]
        acc_ref[...] = over_lanes(decay, acc_ref.shape[1]) * acc_ref[...] + dot(
            weights.astype(values.dtype), values, contract=(1, 0)
        )

    visit(accumulate, flags, band.segments)

    @pl.when(is_last(flags))
    def _() -> None:
        maximum, total = maximum_ref[...], sum_ref[...]
        empty = maximum <= MASKED
        total = jnp.where(empty, _ONE, total)
        inverse = jnp.where(empty, np.float32(0), _ONE / total)
        out_ref[...] = (acc_ref[...] * over_lanes(inverse, acc_ref.shape[1])).astype(out_ref.dtype)
        # Both in one transposition, of which a row each is read.
        lanes = lax.broadcasted_iota(jnp.int32, maximum.shape, 1)
        both = jnp.transpose(jnp.where(lanes == 0, maximum, total))
        maximum, total = both[:1], both[1:2]
        lse = scale_ref[0, 0] * _LOG_2 * maximum + jnp.log(total)
        lse_ref[...] = jnp.where(maximum <= MASKED, np.float32(-np.inf), lse)


def spread(row: Array) -> Array:
    """[1, rows] -> [rows, 128], equal over the lanes; a transposition costs less than a broadcast over lanes."""
    return jnp.transpose(jnp.broadcast_to(row, (LANES, row.shape[1])))


def over_lanes(x: Array, width: int) -> Array:
    """x [rows, 128], equal over the lanes, as [rows, width]."""
    return x[:, :width] if width < LANES else jnp.tile(x, (1, width // LANES))
