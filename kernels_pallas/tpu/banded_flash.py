"""Banded flash attention for TPU: every query sees one interval of keys, and the first `sinks` keys.

    out_t = sum_{s visible to t} softmax_s(scale q_t . k_s) v_s        visible: starts[t] <= s < ends[t], or
    lse_t = log sum_{s visible to t} exp(scale q_t . k_s)                       s < min(sinks, ends[t])

The intervals are known at trace time. Queries are cut into tiles; each has a list of the key tiles that any of its
queries sees, and no other key tile is read from memory. The grid is (batch, heads, query tiles, visits), visits
innermost: one step adds one key tile to the running softmax of one query tile (FlashAttention, Dao et al. 2022; the
running maximum: Milakov & Gimelshein 2018).

                  key tiles
                0 1 2 3 4 5        visits    counts
    query     0 # .                0 1 1     2         #: full, no element mask
    tiles     1 . # .              0 1 2     3         .: partly seen
              2   . # .            1 2 3     3

Lists come by scalar prefetch, so that the pipeline knows the next tile early. A list shorter than the longest repeats
its last tile, which is then not fetched again, and the step does nothing. Query heads that share a key head read it in
place.

Numerics: products of bfloat16 operands are accumulated in float32; float32 operands are multiplied at full float32
precision (Precision.HIGHEST, six passes of the matrix unit: a float32 call is about as accurate as XLA's at that
setting, and several times slower than a bfloat16 one). The running maximum, sum and output are float32. Weights are
rounded to the values' dtype before they multiply them. Two runs give the same bits. Gradients are in
banded_flash_backward.py.
"""

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import Any

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

# (queries in a tile, keys in a tile), by bytes of an element and padded head dim: the largest that leave half of
# VMEM_BUDGET to the compiler, keys first, since a larger key tile spares rescalings of the running output.
_BLOCKS = {
    (2, 64): (512, 1024),
    (2, 128): (512, 1024),
    (2, 256): (512, 512),
    (4, 64): (512, 512),
    (4, 128): (512, 512),
    (4, 256): (256, 512),
}
_DEFAULT_BLOCKS = (256, 256)  # at other widths
# Stands for -inf in masked logits and in the maximum of no logits: finite, so that a difference of two is not NaN.
MASKED = np.float32(-0.7 * np.finfo(np.float32).max)
# Constants in the kernel have dtypes: a Python float would be a float64 under jax_enable_x64.
_ONE = np.float32(1)
# Rows of the table of queries.
_START, _END, _SEGMENT = range(3)


@dataclasses.dataclass(frozen=True, eq=False)
class Visits:
    """Which key tiles each query tile visits. int32 arrays.

    key_tiles: [query tiles, longest list], ascending; past the list's end the last visited tile again.
    counts: [query tiles], lengths of the lists.
    latest_start, earliest_end: [query tiles], over the tile's queries: a key tile that lies between them is full.
    """

    key_tiles: np.ndarray
    counts: np.ndarray
    latest_start: np.ndarray
    earliest_end: np.ndarray

    def by_key_tile(self, num_key_tiles: int) -> tuple[np.ndarray, np.ndarray]:
        """The lists the other way round: (query tiles that visit each key tile, padded alike; lengths of the lists)."""
        visited = np.zeros((num_key_tiles, len(self.counts)), bool)
        for row, count in enumerate(self.counts):
            visited[self.key_tiles[row, :count], row] = True
        return _lists(visited)


def _lists(visited: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """bool [rows, tiles] -> the True ones of each row int32 [rows, longest], ascending, and how many they are."""
    counts = visited.sum(1)
    tiles = np.zeros((len(visited), max(1, counts.max())), np.int32)
    last_tile = 0
    for row, (seen, count) in enumerate(zip(visited, counts, strict=True)):
        tiles[row, :count] = np.flatnonzero(seen)
        last_tile = tiles[row, count - 1] if count else last_tile
        tiles[row, count:] = last_tile
    return tiles, counts.astype(np.int32)


def list_visits(
    starts: np.ndarray, ends: np.ndarray, num_keys: int, *, sinks: int = 0, block_q: int, block_k: int
) -> Visits:
    """The lists for queries that see the keys starts <= s < ends and s < min(sinks, ends). starts, ends: int [T].

    Exact: a tile is listed iff some query sees one of its keys. O(T + query tiles x key tiles) time and memory.
    """
    starts, ends = _without_sinks(starts, ends, num_keys, sinks)
    num_tiles = math.ceil(len(starts) / block_q)
    tile = np.arange(len(starts)) // block_q
    # Intervals of key tiles, as +1 where one begins and -1 after it ends.
    edges = np.zeros((num_tiles, math.ceil(num_keys / block_k) + 1), np.int64)
    for first, last in ((starts, ends), (np.zeros_like(ends), np.minimum(ends, sinks))):
        sees = first < last
        np.add.at(edges, (tile[sees], first[sees] // block_k), 1)
        np.add.at(edges, (tile[sees], (last[sees] - 1) // block_k + 1), -1)
    key_tiles, counts = _lists(np.cumsum(edges, axis=1)[:, :-1] > 0)
    first_queries = np.arange(num_tiles) * block_q
    return Visits(
        key_tiles,
        counts,
        np.maximum.reduceat(starts, first_queries).astype(np.int32),
        np.minimum.reduceat(ends, first_queries).astype(np.int32),
    )


def _without_sinks(starts: Any, ends: Any, num_keys: int, sinks: int) -> tuple[np.ndarray, np.ndarray]:
    """The intervals cut to the keys there are; one that touches the sinks begins at 0."""
    starts, ends = np.maximum(np.asarray(starts), 0), np.minimum(np.asarray(ends), num_keys)
    return np.where(starts <= sinks, 0, starts), ends


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


def vmem_bytes(block_q: int, block_k: int, head_dim: int, value_dim: int, dtype: Any, *, segments: bool = False) -> int:
    """VMEM that the kernel takes at most: two buffers for every block, the running state, and a step's temporaries."""
    size = jnp.dtype(dtype).itemsize
    key_lanes, value_lanes = (round_up(width, LANES) for width in (head_dim, value_dim))
    blocks = size * (block_q * (key_lanes + value_lanes) + block_k * (key_lanes + value_lanes))
    rows = 4 * SUBLANES * (2 * block_q + (block_k if segments else 0))  # table of queries, lse; segments of keys
    state = 4 * block_q * (2 * LANES + value_lanes)
    logits = (4 + 4 + size) * block_q * block_k  # logits, weights, weights in the values' dtype
    columns = 4 * block_q * LANES * (3 if segments else 2)  # the table of queries, one query a sublane
    product = 4 * block_q * value_lanes  # of weights and values, before it is added to the output
    # At full precision the operands of the logits are split into bfloat16 parts and remainders.
    splits = 2 * size * (block_q + block_k) * key_lanes if size == 4 else 0
    return 2 * (blocks + rows) + state + logits + columns + product + splits


def refusal(
    query: Any,
    key: Any,
    value: Any,
    *,
    starts: np.ndarray,
    ends: np.ndarray,
    sinks: int = 0,
    segment_ids: tuple[Any, Any] | None = None,
    block_q: int | None = None,
    block_k: int | None = None,
    default: Callable[..., tuple[int, int]] = default_blocks,
    footprint: Callable[..., int] = vmem_bytes,
) -> str | None:
    """Why banded_flash_attention cannot serve these arguments (arrays may be shape structs), or None if it can.

    default, footprint: the kernel's blocks and VMEM model.
    """
    dtype = jnp.dtype(query.dtype)
    if dtype not in (jnp.bfloat16, jnp.float32) or not dtype == key.dtype == value.dtype:
        return f"needs query, key and value all bfloat16 or all float32, got {dtype}, {key.dtype} and {value.dtype}"
    if segment_ids is not None and any(jnp.dtype(ids.dtype).itemsize > 4 for ids in segment_ids):
        return f"needs segment ids of at most 32 bits, got {segment_ids[0].dtype} and {segment_ids[1].dtype}"
    if 0 in query.shape or 0 in key.shape:
        return f"needs arrays that are not empty, got query {query.shape} and key {key.shape}"
    default_q, default_k = default(query, key, value)
    block_q, block_k = block_q or default_q, block_k or default_k
    for name, block in (("block_q", block_q), ("block_k", block_k)):
        if block < 1 or block % LANES:
            return f"needs {name} a positive multiple of {LANES}, got {block}"
    widths = padded_width(query.shape[-1]), padded_width(value.shape[-1])
    needed = footprint(block_q, block_k, *widths, dtype, segments=segment_ids is not None)
    if needed > VMEM_BUDGET:
        return (
            f"a tile of {block_q} queries x {block_k} keys at head dims {query.shape[-1]} and {value.shape[-1]} takes "
            f"{needed / 2**20:.1f} MiB of VMEM, more than {VMEM_BUDGET / 2**20:.0f} MiB"
        )
    visits = list_visits(starts, ends, key.shape[1], sinks=sinks, block_q=block_q, block_k=block_k)
    tables = sum(table.nbytes for table in dataclasses.astuple(visits))
    if tables > SMEM_BUDGET:
        return (
            f"the lists of visited tiles, {' x '.join(map(str, visits.key_tiles.shape))}, take {tables / 2**10:.0f} "
            f"KiB of scalar memory, more than {SMEM_BUDGET / 2**10:.0f} KiB"
        )
    return None


def banded_flash_attention(
    query: Array,
    key: Array,
    value: Array,
    *,
    starts: np.ndarray,
    ends: np.ndarray,
    sinks: int = 0,
    segment_ids: tuple[Array, Array] | None = None,
    scale: float | Array,
    block_q: int | None = None,
    block_k: int | None = None,
) -> tuple[Array, Array]:
    """Attention of every query to the keys starts <= s < ends and s < min(sinks, ends).

    Args:
      query: [B, T, N, H], bfloat16 or float32.
      key: [B, S, K, H] of the same dtype. K divides N: query head n reads key head n // (N / K).
      value: [B, S, K, V] of the same dtype.
      starts, ends: int [T], known at trace time.
      sinks: the first keys, visible to every query that ends after them.
      segment_ids: integers ([B, T], [B, S]); a query sees keys of its own segment only.
      scale: factor on the logits, may be traced.
      block_q, block_k: queries and keys in a tile, multiples of 128; None takes the frozen table's.

    Returns:
      out [B, T, N, V] in query's dtype, lse [B, T, N] float32. A query that sees no key: 0 and -inf.

    Raises:
      ValueError: with refusal()'s reason.

    Complexity: O(B N H x visited tiles x block_q x block_k) time. Memory beside the arguments: copies of them with
    heads first, padded to whole tiles, and to 64 or a multiple of 128 in head dim.
    """
    reason = refusal(
        query,
        key,
        value,
        starts=starts,
        ends=ends,
        sinks=sinks,
        segment_ids=segment_ids,
        block_q=block_q,
        block_k=block_k,
    )
    if reason is not None:
        raise ValueError(f"banded_flash_attention: {reason}")
    default_q, default_k = default_blocks(query, key, value)
    block_q, block_k = block_q or default_q, block_k or default_k
    band = Band(
        query,
        key,
        value,
        starts=starts,
        ends=ends,
        sinks=sinks,
        segment_ids=segment_ids,
        block_q=block_q,
        block_k=block_k,
    )
    visits, segments = band.visits, band.segments
    query_tiles, longest = visits.key_tiles.shape

    def key_tile(i: Any, j: Any, key_tiles: Any) -> Any:
        return key_tiles[i * np.int32(longest) + j]

    def of_query(b: Any, n: Any, i: Any, j: Any, *_: Any) -> tuple[Any, ...]:
        return b, n, i, zero()

    def of_key(b: Any, n: Any, i: Any, j: Any, key_tiles: Any, *_: Any) -> tuple[Any, ...]:
        return b, lax.div(n, np.int32(band.group)), key_tile(i, j, key_tiles), zero()

    in_specs = [
        pl.BlockSpec((1, 1), lambda *_: (zero(), zero()), memory_space=pltpu.SMEM),
        pl.BlockSpec((None, SUBLANES, block_q), lambda b, n, i, j, *_: (b if segments else zero(), zero(), i)),
        pl.BlockSpec((None, None, block_q, band.key_width), of_query),
        pl.BlockSpec((None, None, block_k, band.key_width), of_key),
        pl.BlockSpec((None, None, block_k, band.value_width), of_key),
    ]
    if segments:
        in_specs.append(
            pl.BlockSpec((None, 1, block_k), lambda b, n, i, j, tiles, *_: (b, zero(), key_tile(i, j, tiles)))
        )
    scalars = (visits.key_tiles.ravel(), visits.counts, visits.latest_start, visits.earliest_end)
    over = varying(query, key, value, jnp.asarray(scale), *(segment_ids or ()))
    rows = (band.batch, band.heads)
    out, lse = pl.pallas_call(
        functools.partial(_kernel, sinks=sinks, longest=longest, segments=segments),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=len(scalars),
            grid=(*rows, query_tiles, longest),
            in_specs=in_specs,
            out_specs=[
                pl.BlockSpec((None, None, block_q, band.value_width), of_query),
                pl.BlockSpec((None, None, 1, block_q), lambda b, n, i, j, *_: (b, n, zero(), i)),
            ],
            scratch_shapes=[
                pltpu.VMEM((block_q, LANES), jnp.float32),
                pltpu.VMEM((block_q, LANES), jnp.float32),
                pltpu.VMEM((block_q, band.value_width), jnp.float32),
            ],
        ),
        out_shape=[
            jax.ShapeDtypeStruct((*rows, band.padded_queries, band.value_width), query.dtype, manual_axis_type=over),
            jax.ShapeDtypeStruct((*rows, 1, band.padded_queries), jnp.float32, manual_axis_type=over),
        ],
        compiler_params=compiler_params(),
        cost_estimate=band.cost(math.prod(rows) * int(visits.counts.sum()), (band.key_width, band.value_width)),
        name="banded_flash_attention",
    )(
        *(jnp.asarray(scalar) for scalar in scalars),
        jnp.asarray(scale, jnp.float32).reshape(1, 1),
        band.table,
        heads_first(query, band.padded_queries, band.key_width),
        heads_first(key, band.padded_keys, band.key_width),
        heads_first(value, band.padded_keys, band.value_width),
        *band.key_segments,
    )
    out, lse = out[:, :, : query.shape[1], : value.shape[-1]], lse[:, :, 0, : query.shape[1]]
    return jnp.swapaxes(out, 1, 2), jnp.swapaxes(lse, 1, 2)


class Band:
    """A call's arrays as the kernels take them: heads first, padded to whole tiles, with the tables beside them.

    table: int32 [1 or B, 8, padded queries]; rows START and END, the keys that a query sees, and SEGMENT.
    key_segments: with segments, one array int32 [B, 1, padded keys].
    """

    def __init__(
        self,
        query: Array,
        key: Array,
        value: Array,
        *,
        starts: np.ndarray,
        ends: np.ndarray,
        sinks: int,
        segment_ids: tuple[Array, Array] | None,
        block_q: int,
        block_k: int,
    ):
        self.batch, num_queries, self.heads, head_dim = query.shape
        num_keys, key_heads, value_dim = value.shape[1:]
        self.group = self.heads // key_heads
        self.sinks, self.segments = sinks, segment_ids is not None
        self.block_q, self.block_k, self.itemsize = block_q, block_k, query.dtype.itemsize
        self.key_width, self.value_width = padded_width(head_dim), padded_width(value_dim)
        self.padded_queries, self.padded_keys = round_up(num_queries, block_q), round_up(num_keys, block_k)
        self.visits = list_visits(starts, ends, num_keys, sinks=sinks, block_q=block_q, block_k=block_k)
        # Queries in the padding copy the last one's interval, so that they do not spoil a full tile.
        past = self.padded_queries - num_queries
        bounds = np.zeros((1, SUBLANES, self.padded_queries), np.int32)
        bounds[0, :2] = np.pad(np.stack(_without_sinks(starts, ends, num_keys, sinks)), ((0, 0), (0, past)), "edge")
        self.table: Array = jnp.asarray(bounds)
        self.key_segments: list[Array] = []
        if segment_ids is not None:
            query_ids, key_ids = (ids.astype(jnp.int32) for ids in segment_ids)
            query_ids = jnp.pad(query_ids, ((0, 0), (0, past)))
            self.table = jnp.broadcast_to(self.table, (self.batch, *self.table.shape[1:]))
            self.table = self.table.at[:, _SEGMENT].set(query_ids)
            self.key_segments = [jnp.pad(key_ids, ((0, 0), (0, self.padded_keys - num_keys)))[:, None]]

    def cost(self, steps: int, products: tuple[int, ...]) -> pl.CostEstimate:
        """Of a kernel of this many visits. products: the head dim of each product of a visit's tiles."""
        both = self.key_width + self.value_width
        rows = steps * self.block_k + self.batch * self.heads * self.padded_queries
        return pl.CostEstimate(
            flops=2 * steps * self.block_q * self.block_k * sum(products),
            transcendentals=steps * self.block_q * self.block_k,
            bytes_accessed=rows * both * self.itemsize,
        )


def compiler_params() -> Any:
    """Of grids whose last axis alone is a sum, held to VMEM_BUDGET."""
    return pltpu.CompilerParams(
        dimension_semantics=("parallel", "parallel", "parallel", "arbitrary"), vmem_limit_bytes=VMEM_BUDGET
    )


def visible(index: Array, start: Array, end: Array, segment: Array, *, sinks: int, key_segment: Any) -> Array:
    """bool, where a query of these numbers sees the key of this index; all broadcast. key_segment None: no segments."""
    sees = index >= start
    if sinks:
        sees |= index < sinks
    sees &= index < end
    if key_segment is not None:
        sees &= segment == key_segment
    return sees


def visit(
    accumulate: Callable[[bool], None],
    *,
    active: Array,
    first_key: Array,
    end_key: Array,
    latest_start: Array,
    earliest_end: Array,
    sinks: int,
    segments: bool,
) -> None:
    """Runs accumulate(masked) if the visit is one; without the element mask where every query sees every key."""
    if segments:
        pl.when(active)(lambda: accumulate(True))
        return
    after_start = (first_key >= latest_start) | (end_key <= sinks)
    full = after_start & (end_key <= earliest_end)
    pl.when(active & full)(lambda: accumulate(False))
    pl.when(active & ~full)(lambda: accumulate(True))


def _kernel(
    key_tiles_ref: Any,
    counts_ref: Any,
    latest_start_ref: Any,
    earliest_end_ref: Any,
    scale_ref: Any,
    table_ref: Any,
    query_ref: Any,
    key_ref: Any,
    value_ref: Any,
    *refs: Any,
    sinks: int,
    longest: int,
    segments: bool,
) -> None:
    """One visit of a query tile to a key tile. The maximum and sum of a query are repeated over the lanes."""
    *key_segments_ref, out_ref, lse_ref, maximum_ref, sum_ref, acc_ref = refs  # the first is there with segments
    block_q, block_k = query_ref.shape[0], key_ref.shape[0]
    tile, step = pl.program_id(2), pl.program_id(3)
    first_key = key_tiles_ref[tile * np.int32(longest) + step] * np.int32(block_k)

    @pl.when(step == 0)
    def _() -> None:
        maximum_ref[...] = jnp.full_like(maximum_ref, MASKED)
        sum_ref[...] = jnp.zeros_like(sum_ref)
        acc_ref[...] = jnp.zeros_like(acc_ref)

    def accumulate(masked: bool) -> None:
        logits = scale_ref[0, 0] * dot(query_ref[...], key_ref[...], contract=(1, 1))
        if masked:
            table = jnp.transpose(table_ref[...])  # one query a sublane
            rows = (table[:, row : row + 1] for row in range(3))
            segment = key_segments_ref[0][...] if segments else None
            index = first_key + lax.broadcasted_iota(jnp.int32, (block_q, block_k), 1)
            logits = jnp.where(visible(index, *rows, sinks=sinks, key_segment=segment), logits, MASKED)
        old_maximum = maximum_ref[...]
        maximum = jnp.maximum(old_maximum, jnp.max(logits, axis=1, keepdims=True))
        # Where a query has seen no key yet the maximum is MASKED and the weights are 1, not 0; the first key that it
        # does see multiplies what they gave by `decay` = 0.
        weights = jnp.exp(logits - _lanes(maximum, block_k))
        decay = jnp.exp(old_maximum - maximum)
        maximum_ref[...] = maximum
        sum_ref[...] = decay * sum_ref[...] + jnp.sum(weights, axis=1, keepdims=True)
        values = value_ref[...]
        acc_ref[...] = _lanes(decay, acc_ref.shape[1]) * acc_ref[...] + dot(
            weights.astype(values.dtype), values, contract=(1, 0)
        )

    visit(
        accumulate,
        active=step < counts_ref[tile],
        first_key=first_key,
        end_key=first_key + np.int32(block_k),
        latest_start=latest_start_ref[tile],
        earliest_end=earliest_end_ref[tile],
        sinks=sinks,
        segments=segments,
    )

    @pl.when(step == longest - 1)
    def _() -> None:
        maximum, total = maximum_ref[...], sum_ref[...]
        empty = maximum <= MASKED
        total = jnp.where(empty, _ONE, total)
        inverse = jnp.where(empty, np.float32(0), _ONE / total)
        out_ref[...] = (acc_ref[...] * _lanes(inverse, acc_ref.shape[1])).astype(out_ref.dtype)
        lse = jnp.where(empty, np.float32(-np.inf), maximum + jnp.log(total))
        lse_ref[...] = jnp.transpose(lse)[:1]


def _lanes(x: Array, width: int) -> Array:
    """x [rows, 128], equal over the lanes, as [rows, width]."""
    return x[:, :width] if width < LANES else jnp.tile(x, (1, width // LANES))
