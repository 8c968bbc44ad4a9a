"""What the banded kernels for TPU share: sizes and tables of a call, its grid over pairs of tiles, the element mask."""

import functools
import itertools
import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from kernels_pallas.patterns import (
    ACTIVE,
    BANK_BIT,
    FIRST,
    FULL,
    LAST,
    BlockLists,
    Boxes,
    Intervals,
    Pattern,
    Tiling,
    Visits,
)
from kernels_pallas.tpu.common import (
    LANES,
    SMEM_BUDGET,
    SUBLANES,
    VMEM_BUDGET,
    heads_first,
    padded_width,
    round_up,
    varying,
    zero,
)

Array = jax.Array

# Stands for -inf in masked logits and in the maximum of no logits: finite, so that a difference of two is not NaN.
MASKED = np.float32(-0.7 * np.finfo(np.float32).max)
# Scales nearer to 0 are taken for this, so that MASKED times a scale stays far below all other logits.
_LEAST_SCALE = np.float32(1e-30)
_LEAST_BIAS = np.float32(-1e38)  # of those that are finite
_LOG_2, _LOG_2_E = np.float32(np.log(2)), np.float32(1 / np.log(2))
# Query heads of a step at most, by bytes of an element: one head's softmax is a chain in which the matrix unit waits,
# and beside independent ones the compiler fills it. In float32 six passes fill it anyway, and code is long.
_MOST_HEADS = {2: 4, 4: 2}
# Rows of the tables of queries and of keys: START and WIDTH (queries) or COORDINATE (keys) of each axis, then SEGMENT.
# START and WIDTH have their sign bit flipped: as int32, coordinate - START < WIDTH then is true iff the key is in the
# interval, because below the interval the unsigned difference wraps to a large number.
_SEGMENT = SUBLANES - 1
# Of a cell of a piece: no query sees a key, some may, all see all.
_HIDDEN, _PARTLY, _FULL = range(3)
# Where a step's flags have the number of its pair's body, and how many there are at most.
_BODY_BIT, _MOST_BODIES = np.int32(4), 4
# Of SumsVisits: the last step of a query tile, and where its sums are.
_LAST_OF_QUERIES, _SLOT_BIT = np.int32(2**6), np.int32(7)
_SIGN = np.int32(-(2**31))


def blocks_of(
    table: dict[tuple[int, int], tuple[int, int]], default: tuple[int, int], query: Any, key: Any, value: Any
) -> tuple[int, int]:
    """A table's blocks for these arrays, cut to their lengths."""
    width = max(padded_width(query.shape[-1]), padded_width(value.shape[-1]))
    block_q, block_k = table.get((jnp.dtype(query.dtype).itemsize, width), default)
    return min(block_q, round_up(query.shape[1], LANES)), min(block_k, round_up(key.shape[1], LANES))


def refusal(
    query: Any,
    key: Any,
    value: Any,
    *,
    pattern: Pattern,
    segment_ids: tuple[Any, Any] | None = None,
    bias: Any = None,
    default_blocks: Callable[..., tuple[int, int]],
    footprint: Callable[..., int],
) -> str | None:
    """Why a banded kernel cannot serve these arguments (arrays may be shape structs), or None if it can.

    default_blocks, footprint: the kernel's table of blocks and its VMEM model.
    """
    dtype = jnp.dtype(query.dtype)
    if dtype not in (jnp.bfloat16, jnp.float32) or not dtype == key.dtype == value.dtype:
        return f"needs query, key and value all bfloat16 or all float32, got {dtype}, {key.dtype} and {value.dtype}"
    if segment_ids is not None and any(jnp.dtype(ids.dtype).itemsize > 4 for ids in segment_ids):
        return f"needs segment ids of at most 32 bits, got {segment_ids[0].dtype} and {segment_ids[1].dtype}"
    if 0 in query.shape or 0 in key.shape:
        return f"needs arrays that are not empty, got query {query.shape} and key {key.shape}"
    if bias is not None and not _has_one_list(pattern):
        return "has no bias with lists of tiles that are computed, or differ between rows of the batch or heads"
    block_q, block_k = pattern.blocks(default_blocks(query, key, value))
    for name, block in (("block_q", block_q), ("block_k", block_k)):
        if block < 1 or block % LANES:
            return f"needs {name} a positive multiple of {LANES}, got {block}"
    if isinstance(pattern, BlockLists):
        reason = pattern.misfit(query.shape[0], key.shape[2], -(-query.shape[1] // block_q))
        if reason is not None:
            return reason
    widths = padded_width(query.shape[-1]), padded_width(value.shape[-1])
    tables = 1 + (pattern.has_coordinates or segment_ids is not None)
    of_bias = {} if bias is None else {"bias": bias_block(bias, block_q, block_k, heads=1)}
    needed = footprint(block_q, block_k, *widths, dtype, tables=tables, **of_bias) + _bank_bytes(pattern)
    if needed > VMEM_BUDGET:
        return (
            f"a tile of {block_q} queries x {block_k} keys at head dims {query.shape[-1]} and {value.shape[-1]} takes "
            f"{needed / 2**20:.1f} MiB of VMEM, more than {VMEM_BUDGET / 2**20:.0f} MiB"
        )
    pairs = pattern.num_pairs(block_q, block_k)
    if isinstance(pattern, BlockLists):  # of one list, as several calls can share them; by key each row has one more
        pairs = math.prod(pattern.columns.shape[2:]) + -(-key.shape[1] // block_k)
    if 3 * 4 * pairs > SMEM_BUDGET:
        return (
            f"the list of {pairs} pairs of tiles takes {12 * pairs / 2**10:.0f} KiB of scalar memory, more than "
            f"{SMEM_BUDGET / 2**10:.0f} KiB"
        )
    return None


def _has_one_list(pattern: Pattern) -> bool:
    """Whether all rows of the batch and heads visit the same pairs of tiles, which are known as the call is traced."""
    if isinstance(pattern, BlockLists):
        return isinstance(pattern.columns, np.ndarray) and pattern.columns.shape[:2] == (1, 1)
    return isinstance(pattern, Intervals | Boxes)


def bias_block(bias: Any, block_q: int, block_k: int, heads: int) -> jax.ShapeDtypeStruct:
    """Of a bias [B|1, N|1, T|1, S], what a step with this many query heads reads: [heads|1, block_q|1, block_k]."""
    rows, dtype = (1, jnp.float32) if bias.shape[2] == 1 else (block_q, bias.dtype)
    return jax.ShapeDtypeStruct((1 if bias.shape[1] == 1 else heads, rows, block_k), dtype)


def block_bytes(block: Any, dtype: Any = None) -> int:
    """VMEM for a bias_block, or one of another dtype; for None nothing."""
    if block is None:
        return 0
    heads, rows, keys = block.shape
    return int(heads * round_up(rows, SUBLANES) * keys * jnp.dtype(dtype or block.dtype).itemsize)


def _bank_bytes(pattern: Pattern) -> int:
    """VMEM for a tile of a pattern's bank: two buffers, and what is read of them."""
    return (2 + 4) * math.prod(pattern.blocks((0, 0))) if isinstance(pattern, BlockLists) else 0


def heads_of_a_step(
    query: Any,
    key: Any,
    value: Any,
    *,
    pattern: Pattern,
    segment_ids: tuple[Any, Any] | None = None,
    bias: Any = None,
    default_blocks: Callable[..., tuple[int, int]],
    footprint: Callable[..., int],
) -> int:
    """How many query heads a step takes: some of one key head's or all of several key heads', as many as VMEM holds.

    The arguments are refusal's.
    """
    blocks = pattern.blocks(default_blocks(query, key, value))
    widths = padded_width(query.shape[-1]), padded_width(value.shape[-1])
    tables = 1 + (pattern.has_coordinates or segment_ids is not None)
    heads, group = query.shape[2], query.shape[2] // key.shape[2]
    has_own_lists = isinstance(pattern, BlockLists) and pattern.columns.shape[1] > 1  # those of a step share a list
    for some in range(_MOST_HEADS[jnp.dtype(query.dtype).itemsize], 1, -1):
        divides = heads % some == 0 and (some % group == 0 or group % some == 0)
        of_step: dict[str, Any] = {"heads": some, "key_heads": max(1, some // group)}
        if bias is not None:
            of_step["bias"] = bias_block(bias, *blocks, some)
        if not divides or (has_own_lists and some > group):
            continue
        if footprint(*blocks, *widths, query.dtype, tables=tables, **of_step) + _bank_bytes(pattern) <= VMEM_BUDGET:
            return some
    return 1


def slots_of(
    query: Any,
    key: Any,
    value: Any,
    *,
    pattern: Pattern,
    segment_ids: tuple[Any, Any] | None = None,
    bias: Any = None,
    default_blocks: Callable[..., tuple[int, int]],
    footprint: Callable[..., int],
    budget: int = VMEM_BUDGET,
) -> int:
    """Of how many query tiles the kernel of a SumsCall holds the sums; 0 where VMEM does not hold them.

    The arguments are refusal's; footprint takes slots too.
    """
    settings: Any = {"pattern": pattern, "segment_ids": segment_ids, "bias": bias}
    heads = heads_of_a_step(query, key, value, **settings, default_blocks=default_blocks, footprint=footprint)
    group = query.shape[2] // key.shape[2]
    if heads % group:
        return 0
    blocks = pattern.blocks(default_blocks(query, key, value))
    slots = query_slots(pattern.tiled(*blocks), -(-query.shape[1] // blocks[0]))
    of_step: dict[str, Any] = {"heads": heads, "key_heads": heads // group, "slots": slots}
    if bias is not None:
        of_step["bias"] = bias_block(bias, *blocks, heads)
    widths = padded_width(query.shape[-1]), padded_width(value.shape[-1])
    tables = 1 + (pattern.has_coordinates or segment_ids is not None)
    return slots if footprint(*blocks, *widths, query.dtype, tables=tables, **of_step) <= budget else 0


def in_base_2(query: Array, scale: float | Array) -> tuple[Array, Array]:
    """The query, and the scale of its products for exponents of 2, above 0: a running maximum is that of q.k, and the
    scale goes into the exponent's own factor."""
    scale = jnp.asarray(scale, jnp.float32)
    query = query * jnp.where(scale < 0, -1, 1).astype(query.dtype)
    return query, jnp.maximum(jnp.abs(scale), _LEAST_SCALE) / _LOG_2


def capped_in_base_2(softcap: float) -> np.float32:
    """The factor of tanh(scale / softcap q.k), for exponents of 2."""
    return np.float32(max(softcap, float(_LEAST_SCALE))) / _LOG_2


class Tokens(NamedTuple):
    """An array as the kernels read it, heads first, of whole tiles and padded in head dim: of queries, [B, N, T', H'],
    or of keys, [B, K, S', H']."""

    array: Array
    of_keys: bool


class Band:
    """A call's sizes, padded to whole tiles, and the tables of its queries and keys, int32 [1 or B, 8, tokens]."""

    def __init__(
        self,
        query: Array,
        key: Array,
        value: Array,
        tiling: Tiling,
        segment_ids: tuple[Array, Array] | None = None,
        bias: Array | None = None,
    ):
        self.batch, self.num_queries, self.heads, head_dim = query.shape
        self.num_keys, self.key_heads, value_dim = value.shape[1:]
        self.group = self.heads // self.key_heads
        self.tiling, self.segments = tiling, segment_ids is not None
        self.block_q, self.block_k = tiling.block_q, tiling.block_k
        self.key_width, self.value_width = padded_width(head_dim), padded_width(value_dim)
        self.padded_queries = round_up(self.num_queries, self.block_q)
        self.padded_keys = round_up(self.num_keys, self.block_k)
        self.bank = tiling.bank
        self.bias = None if bias is None else self._padded(bias.astype(jnp.float32) if bias.shape[2] == 1 else bias)
        self.axes = 0 if self.bank is not None else tiling.starts.shape[1]
        self.bodies, self.by_query, self.by_key = bodies_of(tiling, segments=self.segments)
        # The table's rows that the kernels read.
        self.rows = [*range(0 if tiling.diagonals else 2 * self.axes), *([_SEGMENT] if self.segments else [])]
        # Queries in the padding copy the last one's interval, so that they do not spoil a full tile; keys in it have
        # a coordinate that nobody sees.
        bounds: list[Any] = []
        if self.bank is None:
            starts = tiling.starts - (tiling.starts - tiling.ends).clip(0)  # an empty interval begins where it ends
            bounds = [x[:, axis] ^ _SIGN for axis in range(self.axes) for x in (starts, tiling.ends - starts)]
        query_ids, key_ids = segment_ids or (None, None)
        self.query_table, self.key_table = None, None
        if self.rows:
            past = self.padded_queries - self.num_queries
            self.query_table = self._table(bounds, query_ids, past, mode="edge")
        if tiling.coordinates is not None or self.segments:
            coordinates = tiling.coordinates
            rows = [] if coordinates is None else [coordinates[:, axis] for axis in range(self.axes)]
            past = self.padded_keys - self.num_keys
            self.key_table = self._table(rows, key_ids, past, mode="constant", constant_values=-1)

    def queries(self, x: Array) -> Tokens:
        """Of x [B, T, N, H]."""
        return Tokens(heads_first(x, self.padded_queries, padded_width(x.shape[-1])), of_keys=False)

    def keys(self, x: Array) -> Tokens:
        """Of x [B, S, K, H]."""
        return Tokens(heads_first(x, self.padded_keys, padded_width(x.shape[-1])), of_keys=True)

    def _padded(self, bias: Array) -> Array:
        """[B|1, N|1, T|1, S] -> [B|1, N|1, T'|1, S']."""
        past_queries = 0 if bias.shape[2] == 1 else self.padded_queries - self.num_queries
        return jnp.pad(bias, ((0, 0), (0, 0), (0, past_queries), (0, self.padded_keys - self.num_keys)))

    def numbers(self, rows: Sequence[Array], heads: int, *, past: Any = 0) -> Array:
        """[B, T, N] each -> float32 [B, N / heads, rows x heads, T']: of every row, the heads of a step. past: what
        queries in the padding have."""
        table = jnp.stack([x.astype(jnp.float32) for x in rows], axis=1)
        table = table.reshape(self.batch, len(rows), self.num_queries, self.heads // heads, heads)
        table = jnp.transpose(table, (0, 3, 1, 4, 2)).reshape(self.batch, self.heads // heads, -1, self.num_queries)
        padding = ((0, 0),) * 3 + ((0, self.padded_queries - self.num_queries),)
        return jnp.pad(table, padding, constant_values=past)

    def bounds_scratch(self) -> list[Any]:
        """Scratch for the rows of the table of queries: one number per query and row, repeated over the lanes."""
        return [pltpu.VMEM((self.block_q, LANES), jnp.int32)] * len(self.rows)

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


class Piece(NamedTuple):
    """A part of a pair of tiles that is computed at once.

    cells: of each LANES of its queries and LANES of its keys, what is seen: _HIDDEN, _PARTLY or _FULL.
    """

    queries: slice
    keys: slice
    cells: tuple[tuple[int, ...], ...]


# What is computed of a pair of tiles.
Body = tuple[Piece, ...]


def bodies_of(tiling: Tiling, *, segments: bool = False) -> tuple[list[Body], Visits, Visits]:
    """The bodies that a tiling's pairs have, and its lists, in the order of the steps, with the number of each pair's
    body at _BODY_BIT.

    segments: whether a query sees keys of its own segment only.
    """
    bodies = [_whole(tiling, _PARTLY if segments else _FULL), _whole(tiling, _PARTLY)]
    if tiling.bank is not None:  # whose tiles the flags have
        return bodies, tiling.by_query, tiling.by_key
    lists = one_after_other(tiling.by_query), one_after_other(tiling.by_key)
    numbers: list[Any] = [(x.flags & FULL == 0).astype(np.int32) for x in lists]
    has_halves = tiling.block_q // 2 % LANES == tiling.block_k // 2 % LANES == 0
    is_known = isinstance(tiling.by_query.flags, np.ndarray) and tiling.coordinates is None
    if has_halves and is_known and (is_listed := lists[0].flags[0] & ACTIVE != 0).any():
        pairs = [(lists[0].rows[0], lists[0].columns[0]), (lists[1].columns[0], lists[1].rows[0])]
        kind_of = [_parts(tiling, *pair, (2, 2), segments=segments).reshape(-1, 4) for pair in pairs]
        kinds, counts = np.unique(kind_of[0][is_listed], axis=0, return_counts=True)
        frequent = kinds[np.argsort(-counts, kind="stable")[: _MOST_BODIES - (len(kinds) > _MOST_BODIES)]]
        others = bodies[1:] if len(kinds) > _MOST_BODIES else []
        bodies = []
        for kind in frequent:
            of_kind = is_listed & (kind_of[0] == kind).all(axis=1)
            of_queries, of_keys = (tiles[of_kind] for tiles in pairs[0])
            bodies.append(_body(tiling, kind, of_queries, of_keys, segments=segments))
        bodies += others
        for index, kind in enumerate(kind_of):
            is_kind = (kind[:, None] == frequent).all(axis=2)
            number = np.where(is_kind.any(axis=1), is_kind.argmax(axis=1), len(frequent))
            numbers[index] = number.astype(np.int32)[None]
    by_query, by_key = (x._replace(flags=x.flags | number << _BODY_BIT) for x, number in zip(lists, numbers))
    return bodies, by_query, by_key


def one_after_other(lists: Visits) -> Visits:
    """The same pairs, of which those of a row begin with the column that the row before ended with, if it has it: whose
    block is not read again. Lists that are computed with the arrays stay as they are."""
    if not isinstance(lists.flags, np.ndarray) or len(lists.flags) > 1:
        return lists
    columns, flags = lists.columns[0], lists.flags[0]
    order = np.arange(len(flags))
    last = -1
    for start, end in zip(np.flatnonzero(flags & FIRST), np.flatnonzero(flags & LAST) + 1):
        again = start + np.flatnonzero(columns[start:end] == last)
        order[start:end] = np.concatenate([again, np.setdiff1d(order[start:end], again)])
        last = columns[order[end - 1]]
    edges = np.int32(FIRST | LAST)
    return Visits(lists.rows, columns[order][None], (flags[order] & ~edges | flags & edges)[None])


def _parts(
    tiling: Tiling, query_tiles: np.ndarray, key_tiles: np.ndarray, parts: tuple[int, int], *, segments: bool
) -> np.ndarray:
    """int8 [pairs, *parts]: of each pair of tiles, cut into so many parts along the queries and along the keys, what is
    seen: _HIDDEN, _PARTLY or _FULL."""
    side_q, side_k = tiling.block_q // parts[0], tiling.block_k // parts[1]
    past = -tiling.starts.shape[2] % tiling.block_q
    bounds = (np.pad(x[0, 0], (0, past), mode="edge") for x in (tiling.starts, tiling.ends))
    start, end = (x.reshape(-1, parts[0], 1, side_q)[query_tiles] for x in bounds)
    first = (key_tiles[:, None] * tiling.block_k + np.arange(parts[1]) * side_k)[:, None, :, None]
    last = first + side_k
    seen = (np.maximum(start, first) < np.minimum(end, last)) | (first < np.minimum(tiling.sinks, end))
    full = ((start <= first) | (last <= tiling.sinks)) & (last <= end) & (not segments)
    return np.where(full.all(axis=3), _FULL, np.where(seen.any(axis=3), _PARTLY, _HIDDEN)).astype(np.int8)


def _whole(tiling: Tiling, seen: int) -> Body:
    queries, keys = slice(0, tiling.block_q), slice(0, tiling.block_k)
    return (Piece(queries, keys, ((seen,) * (tiling.block_k // LANES),) * (tiling.block_q // LANES)),)


def _body(tiling: Tiling, kind: np.ndarray, query_tiles: np.ndarray, key_tiles: np.ndarray, *, segments: bool) -> Body:
    """Of pairs of tiles whose quarters are of this kind, int [4]: two of the first half of the queries and two of the
    last."""
    if (kind == _FULL).all():
        return _whole(tiling, _FULL)
    parts = tiling.block_q // LANES, tiling.block_k // LANES
    cells = _parts(tiling, query_tiles, key_tiles, parts, segments=segments)
    lowest, highest = cells.min(axis=0), cells.max(axis=0)
    cell = np.where(lowest == highest, lowest, _PARTLY)  # where the pairs differ
    half_q, half_k = tiling.block_q // 2, tiling.block_k // 2
    pieces = []
    for half, quarters in enumerate(kind.reshape(2, 2)):
        if (seen := np.flatnonzero(quarters != _HIDDEN)).size:
            queries = slice(half_q * half, half_q * (half + 1))
            keys = slice(half_k * int(seen[0]), half_k * (int(seen[-1]) + 1))
            of_piece = cell[tuple(slice(x.start // LANES, x.stop // LANES) for x in (queries, keys))]
            pieces.append(Piece(queries, keys, tuple(map(tuple, of_piece.tolist()))))
    return tuple(pieces)


class Step(NamedTuple):
    """Inside a kernel: the pair of tiles of a grid step, what to do with it, and the tables' blocks.

    is_start: whether no step of these heads came before it. by_key: as in Call. Tiles of logits are [queries, keys], by
    key [keys, queries]. bias: as bias_block.
    """

    query_tile: Array
    key_tile: Array
    flags: Array
    is_start: Array
    query_table: Any
    key_table: Any
    bank: Any
    bias: Any
    by_key: bool


class Call:
    """A kernel over lists of pairs of tiles, in a grid (batch, heads, steps); where key heads have lists of their own,
    (batch x key heads, heads of one, steps).

    A step has `heads` query heads, some of one key head's or all of several key heads'.

    By query, the list's rows are query tiles, and the grid goes over the query heads. By key, rows are key tiles, and
    the grid goes over the key heads: each pair has a step for every part of its key head's query heads.

    Lists that scalar memory does not hold at once are read by one call after the other.
    """

    # Whether every pair has results of its own, which are 0 for those that no list has.
    _starts_at_0 = False

    def __init__(self, band: Band, *, by_key: bool, heads: int):
        self.band, self.by_key = band, by_key
        self.heads, self.key_heads = heads, max(1, heads // band.group)
        # How many steps it takes to go over the query heads of a key head.
        self.parts = max(1, band.group // heads)
        self.turns = self.parts if by_key else 1
        self.visits = band.by_key if by_key else band.by_query
        self.list_heads = band.tiling.heads
        steps_of_heads = band.key_heads // self.key_heads if by_key else band.heads // heads
        lists, steps = self.visits.rows.shape
        self.rows = band.batch * self.list_heads
        self.grid = (self.rows, steps_of_heads // self.list_heads, steps * self.turns)
        # Lists of a call: all, or as many as scalar memory holds.
        self.lists = lists
        if lists > 1 and 3 * 4 * lists * steps > SMEM_BUDGET:
            held = max(1, SMEM_BUDGET // (3 * 4 * steps))
            self.lists = next(some for some in range(min(held, self.rows), 0, -1) if self.rows % some == 0)

    @property
    def _is_cut(self) -> bool:
        return self.lists < self.visits.rows.shape[0]

    def _place(self, r: Any, n: Any, s: Any, lists: Sequence[Any]) -> tuple[Any, Any, Any, Any]:
        """A step's row of the batch, block of heads, index in the lists, and part of the query heads."""
        steps = self.visits.rows.shape[1]
        b = r + lists[3][0] if self._is_cut else r
        if self.list_heads > 1:
            b, of_row = (each(b, np.int32(self.list_heads)) for each in (lax.div, lax.rem))
            n += of_row * np.int32(self.grid[1])
            r = of_row if not self._is_cut and self.lists < self.rows else r
        s, part = (s, zero()) if self.turns == 1 else (each(s, np.int32(self.turns)) for each in (lax.div, lax.rem))
        return b, n, s if self.visits.rows.shape[0] == 1 else r * np.int32(steps) + s, part

    def _query(self, r: Any, n: Any, s: Any, *lists: Any) -> tuple[Any, Any, Any]:
        """(batch, block of heads, tile) of a step's queries."""
        b, n, index, part = self._place(r, n, s, lists)
        rows, columns, *_ = lists
        if not self.by_key:
            return b, n, rows[index]
        return b, n * np.int32(self.parts) + part, columns[index]

    def _key(self, r: Any, n: Any, s: Any, *lists: Any) -> tuple[Any, Any, Any]:
        """(batch, block of heads, tile) of a step's keys."""
        b, n, index, _ = self._place(r, n, s, lists)
        rows, columns, *_ = lists
        if self.by_key:
            return b, n, rows[index]
        return b, lax.div(n, np.int32(self.parts)), columns[index]

    def _of_bank(self) -> Any:
        """Block of a bank [tiles, rows, columns]."""

        def index(r: Any, n: Any, s: Any, *lists: Any) -> tuple[Any, ...]:
            _, _, at, _ = self._place(r, n, s, lists)
            return lax.shift_right_logical(lists[2][at], BANK_BIT), zero(), zero()

        sides = (self.band.block_k, self.band.block_q) if self.by_key else (self.band.block_q, self.band.block_k)
        return pl.BlockSpec((None, *sides), index)

    def _of_bias(self) -> Any:
        """Block of the band's bias, or of what is like it."""
        bias: Any = self.band.bias
        block = bias_block(bias, self.band.block_q, self.band.block_k, self.heads).shape

        def index(*step: Any) -> tuple[Any, ...]:
            *_, key_tile = self._key(*step)
            places = self._query(*step)
            return *(zero() if size == 1 else place for size, place in zip(bias.shape, places)), key_tile

        return pl.BlockSpec((None, *block), index)

    def _of_tokens(self, width: int, *, of_keys: bool) -> Any:
        """Block of an array [B, N, T', width] or [B, K, S', width]."""
        tile_of, heads, block = (
            (self._key, self.key_heads, self.band.block_k) if of_keys else (self._query, self.heads, self.band.block_q)
        )
        return pl.BlockSpec((None, heads, block, width), lambda *step: (*tile_of(*step), zero()))

    def _read(self, tokens: Tokens) -> int:
        """Bytes that a call reads of an array: what belongs to rows once, else a block in every step, but for those
        that are the last step's."""
        array, of_keys = tokens
        if of_keys == self.by_key:
            return int(array.nbytes)
        of_step = self.key_heads * self.band.block_k if of_keys else self.heads * self.band.block_q
        blocks, columns = self.grid[2], self.visits.columns
        if self.turns == 1 and isinstance(columns, np.ndarray) and len(columns) == 1:
            blocks = 1 + np.count_nonzero(np.diff(columns[0]))
        return int(math.prod(self.grid[:2]) * blocks * of_step * array.shape[-1] * array.dtype.itemsize)

    def _of_all_steps(self, dtype: Any) -> int:
        """Bytes of the blocks that all steps have of the band's bias, in this dtype."""
        block = bias_block(self.band.bias, self.band.block_q, self.band.block_k, self.heads)
        return int(math.prod(self.grid) * block.size * jnp.dtype(dtype).itemsize)

    def _written(self, shapes: Sequence[Any]) -> int:
        """Bytes that a call writes of its results."""
        return sum(math.prod(shape) * jnp.dtype(dtype).itemsize for shape, dtype in shapes)

    def _of_numbers(self, rows: int) -> Any:
        """Block of an array [B, N / heads, rows, T']."""

        def index(*step: Any) -> tuple[Any, ...]:
            batch, head, tile = self._query(*step)
            return batch, head, zero(), tile

        return pl.BlockSpec((None, None, rows, self.band.block_q), index)

    def _of_table(self, table: Array, block: int, tile_of: Callable[..., Any]) -> Any:
        """Block of a table [1 or B, 8, tokens]; tile_of: _query or _key."""

        def index(*step: Any) -> tuple[Any, ...]:
            batch, _, tile = tile_of(*step)
            return zero() if table.shape[0] == 1 else batch, zero(), tile

        return pl.BlockSpec((None, SUBLANES, block), index)

    def _results(self, out: Sequence[tuple[int, Any]], rows: int) -> tuple[list[Any], list[Any]]:
        """(shape, dtype) and block of each of run's results."""
        band, of_step = self.band, self.heads
        heads, length = (band.key_heads, band.padded_keys) if self.by_key else (band.heads, band.padded_queries)
        shapes: list[Any] = [((band.batch, heads, length, width), dtype) for width, dtype in out]
        blocks = [self._of_tokens(width, of_keys=self.by_key) for width, _ in out]
        shapes += [((band.batch, heads // of_step, of_step, length), jnp.float32)] * rows
        return shapes, blocks + [self._of_numbers(of_step)] * rows

    def run(
        self,
        kernel: Callable[..., None],
        name: str,
        *,
        scale: float | Array,
        numbers: Array | None = None,
        tokens: Sequence[Tokens],
        out: Sequence[tuple[int, Any]],
        rows: int = 0,
        scratch: Sequence[Any],
        products: Sequence[int],
        vmem: int = VMEM_BUDGET,
    ) -> list[Array]:
        """The kernel's results, heads first and padded.

        Args:
          kernel: (step, scale, numbers if given, *tokens, *out, *rows, *scratch), all but the step (a Step) references.
          scale: []. numbers: as Band.numbers gives them. tokens: as Band.queries and Band.keys do.
          out: (head dim, dtype) of each result, for the tokens of the rows.
          rows: how many more there are, a number of each query: float32 [B, N / heads, heads, T'].
          products: the head dim of each product of a step's tiles.
          vmem: bytes that the kernel may take.
        """
        band = self.band
        scalar = pl.BlockSpec((1, 1), lambda *_: (zero(), zero()), memory_space=pltpu.SMEM)
        given = [(jnp.asarray(scale, jnp.float32).reshape(1, 1), scalar)]
        if band.query_table is not None:
            given.append((band.query_table, self._of_table(band.query_table, band.block_q, self._query)))
        if band.key_table is not None:
            given.append((band.key_table, self._of_table(band.key_table, band.block_k, self._key)))
        if band.bank is not None:
            bank = jnp.asarray(band.bank.swapaxes(1, 2) if self.by_key else band.bank)
            given.append((bank, self._of_bank()))
        if band.bias is not None:
            given.append((band.bias, self._of_bias()))
        if numbers is not None:
            given.append((numbers, self._of_numbers(numbers.shape[2])))
        given += [(x, self._of_tokens(x.shape[-1], of_keys=of_keys)) for x, of_keys in tokens]
        arrays, in_specs = zip(*given)

        shapes, out_specs = self._results(out, rows)
        visits = [jnp.asarray(x, jnp.int32) for x in self.visits]
        prefetched = len(visits) + self._is_cut
        over = varying(*visits, *arrays)
        # Of several calls each writes its rows of the results of the one before; and some pairs no call may write.
        so_far = [pl.BlockSpec(memory_space=pl.ANY)] * (len(shapes) if self._is_cut or self._starts_at_0 else 0)

        def body(*refs: Any) -> None:
            lists, (scale, *refs) = refs[:prefetched], refs[prefetched:]  # type: ignore[assignment]
            rows_of, columns, flags, *_ = lists
            r, n, s = map(pl.program_id, range(3))
            _, _, index, part = self._place(r, n, s, lists)
            query_tile, key_tile, marks = rows_of[index], columns[index], flags[index]
            if self.by_key:
                query_tile, key_tile = key_tile, query_tile
            if self._starts_at_0:  # every pair has a result of its own
                marks |= FIRST | LAST
            if self.turns > 1:
                marks = jnp.where(part == 0, marks, marks & ~FIRST)
                marks = jnp.where(part == self.turns - 1, marks, marks & ~LAST)
            given, rest = list(refs[: len(arrays) - 1]), refs[len(arrays) - 1 + len(so_far) :]
            tables = (band.query_table, band.key_table, band.bank, band.bias)
            query_table, key_table, bank, bias = (None if table is None else given.pop(0) for table in tables)
            step = Step(query_tile, key_tile, marks, s == 0, query_table, key_table, bank, bias, self.by_key)
            kernel(step, scale, *given, *rest)

        pairs = math.prod(self.grid) * self.heads * band.block_q * band.block_k
        written = self._written(shapes)
        of_bias = 0 if band.bias is None else self._of_all_steps(band.bias.dtype)
        calls = self.rows // self.lists if self._is_cut else 1
        call = pl.pallas_call(
            body,
            grid_spec=pltpu.PrefetchScalarGridSpec(
                num_scalar_prefetch=prefetched,
                grid=(self.grid[0] // calls, *self.grid[1:]),
                in_specs=[*in_specs, *so_far],
                out_specs=out_specs,
                scratch_shapes=scratch,
            ),
            out_shape=[jax.ShapeDtypeStruct(*shape, manual_axis_type=over) for shape in shapes],
            input_output_aliases={prefetched + len(arrays) + number: number for number in range(len(so_far))},
            compiler_params=pltpu.CompilerParams(
                dimension_semantics=("parallel", "parallel", "arbitrary"), vmem_limit_bytes=vmem
            ),
            cost_estimate=pl.CostEstimate(
                flops=2 * pairs * sum(products) // calls,
                transcendentals=pairs // calls,
                bytes_accessed=(sum(map(self._read, tokens)) + of_bias + written) // calls,
            ),
            name=name,
        )
        results: list[Array] = []
        if so_far:
            # Inside shard_map what a scan carries must vary over the mesh axes that its inputs vary over.
            nothing: Any = sum(jnp.zeros_like(x, shape=(), dtype=jnp.float32) for x in (*visits, *arrays))
            results = [jnp.broadcast_to(nothing.astype(dtype), shape) for shape, dtype in shapes]
        if not self._is_cut:
            return call(*(x.ravel() for x in visits), *arrays, *results)
        if len(visits[0]) < self.rows:  # the same for all rows of the batch
            visits = [jnp.tile(x, (band.batch, 1)) for x in visits]

        def rows_of_a_call(results: Any, now: Any) -> tuple[Any, None]:
            first, *lists = now
            return list(call(*lists, first, *arrays, *results)), None

        first = self.lists * jnp.arange(calls, dtype=jnp.int32)[:, None]
        results, _ = lax.scan(rows_of_a_call, results, (first, *(x.reshape(calls, -1) for x in visits)))
        return results


class BiasCall(Call):
    """A call by key with one result, like the band's bias: of T' queries and S' keys a block for each pair of tiles;
    of one row of S', a block for each key tile. Sums are float32.

    What the bias has not, rows of the batch or heads, is gone through for each pair before the next one, so that its
    block holds their sum.
    """

    def __init__(self, band: Band, *, heads: int):
        super().__init__(band, by_key=True, heads=heads)
        rows, bias_heads, queries, _ = band.bias.shape  # type: ignore[union-attr]
        blocks = band.heads // heads
        outer = rows, 1 if bias_heads == 1 else blocks
        self._summed_heads = blocks // outer[1]
        self.turns = band.batch // rows * self._summed_heads
        self._starts_at_0 = queries > 1
        if self._starts_at_0:  # pairs that are not looked at stay 0; of none at all one writes it
            is_listed = self.visits.flags[0] & ACTIVE != 0
            is_listed[0] |= not is_listed.any()
            self.visits = Visits(*(x[:, is_listed] for x in self.visits))
        self._is_sum = queries == 1 or self.turns > 1 or bias_heads < heads
        self.grid = (*outer, self.visits.rows.size * self.turns)

    def _place(self, r: Any, n: Any, s: Any, lists: Sequence[Any]) -> tuple[Any, Any, Any, Any]:
        if self.turns == 1:
            return r, n, s, zero()
        index, part = (each(s, np.int32(self.turns)) for each in (lax.div, lax.rem))
        row, block = (each(part, np.int32(self._summed_heads)) for each in (lax.div, lax.rem))
        return r + row, n + block, index, part

    def _query(self, r: Any, n: Any, s: Any, *lists: Any) -> tuple[Any, Any, Any]:
        b, n, index, _ = self._place(r, n, s, lists)
        return b, n, lists[1][index]

    def _key(self, r: Any, n: Any, s: Any, *lists: Any) -> tuple[Any, Any, Any]:
        b, n, index, _ = self._place(r, n, s, lists)
        return b, lax.div(n, np.int32(self.parts)), lists[0][index]

    def _results(self, out: Sequence[tuple[int, Any]], rows: int) -> tuple[list[Any], list[Any]]:
        bias: Any = self.band.bias
        return [(bias.shape, jnp.float32 if self._is_sum else bias.dtype)], [self._of_bias()]

    def _written(self, shapes: Sequence[Any]) -> int:
        ((_, dtype),) = shapes
        return self._of_all_steps(dtype) // self.turns if self._starts_at_0 else super()._written(shapes)


class SumsVisits(NamedTuple):
    """Visits by key, and for each step the query tile whose sums are whole next, int32 [1, steps] each. flags have the
    last step of a query tile, too, and where its sums are (slot_of)."""

    rows: Any
    columns: Any
    flags: Any
    written: Any


def query_slots(tiling: Tiling, query_tiles: int) -> int:
    """Of how many query tiles sums are not yet whole, at most, where each step by key adds to them; 0 where some are
    never looked at, lists have a bank or depend on traced arrays, or scalar memory does not hold one more."""
    if tiling.bank is not None or not isinstance(tiling.by_key.flags, np.ndarray) or len(tiling.by_key.flags) > 1:
        return 0  # where there is a bank, flags have its tiles
    lists = one_after_other(tiling.by_key)
    if len(SumsVisits._fields) * 4 * lists.flags.size > SMEM_BUDGET:
        return 0
    steps = np.flatnonzero(lists.flags[0] & ACTIVE)
    if len(np.unique(lists.columns[0, steps])) < query_tiles:
        return 0
    return max(slot for slot, *_ in _query_steps(lists)) + 1


def _query_steps(lists: Visits) -> list[tuple[int, bool]]:
    """Of each step that looks at its pair of tiles: where the sums of its query tile are, and whether it is the last
    one of them."""
    tiles = lists.columns[0, np.flatnonzero(lists.flags[0] & ACTIVE)]
    last = dict(zip(tiles, range(len(tiles))))
    free = list(range(len(last)))[::-1]
    slots: dict[int, int] = {}
    found = []
    for step, tile in enumerate(tiles):
        if tile not in slots:
            slots[tile] = free.pop()
        if last[tile] == step:
            free.append(slots[tile])
        found.append((slots[tile], last[tile] == step))
    return found


class SumsCall(Call):
    """A call by key with two results for the keys, and after them those for the queries: its kernel holds sums of query
    tiles, in query_slots() places, and writes a tile's in the last step that looks at it."""

    def __init__(self, band: Band, *, heads: int):
        super().__init__(band, by_key=True, heads=heads)
        lists = self.visits
        steps = np.flatnonzero(lists.flags[0] & ACTIVE)
        slot, is_last = np.array(_query_steps(lists), np.int32).T
        flags = lists.flags.copy()
        flags[0, steps] |= _LAST_OF_QUERIES * is_last + (slot << _SLOT_BIT)
        ends = steps[is_last != 0]
        following = np.searchsorted(ends, np.arange(flags.size)).clip(max=len(ends) - 1)
        self.visits: Any = SumsVisits(lists.rows, lists.columns, flags, lists.columns[:, ends[following]])

    def _results(self, out: Sequence[tuple[int, Any]], rows: int) -> tuple[list[Any], list[Any]]:
        band = self.band
        shapes, blocks = super()._results(out[:2], rows)  # the keys' and the values'

        def index(r: Any, n: Any, s: Any, *lists: Any) -> tuple[Any, ...]:
            batch, head, _ = self._query(r, n, s, *lists)
            return batch, head, lists[3][s], zero()

        for width, dtype in out[2:]:
            shapes.append(((band.batch, band.heads, band.padded_queries, width), dtype))
            blocks.append(pl.BlockSpec((None, self.heads, band.block_q, width), index))
        return shapes, blocks


# --- Inside a kernel --------------------------------------------------------------------------------------------------


def finite(lse: Array) -> Array:
    """A query that sees no key has no visible pair, whose weight would be exp(-inf + inf)."""
    return jnp.where(lse == -jnp.inf, 0, lse)


def has(flags: Array, flag: np.int32) -> Array:
    return lax.bitwise_and(flags, flag) != 0


def body_of(flags: Any, *, has_bank: bool = False) -> Any:
    """The number of the body of a step with these flags."""
    if has_bank:
        return (flags & FULL == 0).astype(np.int32)
    return flags >> _BODY_BIT & np.int32(_MOST_BODIES - 1)


def is_first(step: Step) -> Array:
    return has(step.flags, FIRST)


def is_last(step: Step) -> Array:
    return has(step.flags, LAST)


def is_last_of_queries(step: Step) -> Array:
    return has(step.flags, _LAST_OF_QUERIES)


def slot_of(step: Step) -> Array:
    return lax.shift_right_logical(step.flags, _SLOT_BIT)


def visit(band: Band, step: Step, accumulate: Callable[[Body], None]) -> None:
    """Runs accumulate(body) with what is to be computed of the pair, if it is looked at."""
    for number, body in enumerate(band.bodies):
        pl.when(_is_case(band, step, number, ACTIVE, ACTIVE))(functools.partial(accumulate, body))


def visit_anew(
    band: Band, step: Step, start: Callable[[slice], None], accumulate: Callable[[Body, bool], None]
) -> None:
    """visit, by query, with accumulate(body, is_new): whether nothing was kept of the body's queries before. What a
    row's first step leaves out, start(queries) begins with."""
    edge, flags = ACTIVE | FIRST, band.by_query.flags
    for is_new in (True, False):
        numbers: Any = range(len(band.bodies))
        marks = edge if is_new else ACTIVE
        if isinstance(flags, np.ndarray):  # those that there are
            numbers = np.unique(body_of(flags[flags & edge == marks], has_bank=band.bank is not None))
        for number in numbers:
            body = band.bodies[number]

            @pl.when(_is_case(band, step, int(number), marks, edge))
            def _(body: Body = body, is_new: bool = is_new) -> None:
                accumulate(body, is_new)
                for queries in _without(body, band.block_q) if is_new else ():
                    start(queries)

    if not isinstance(flags, np.ndarray) or (flags & edge == FIRST).any():  # rows without a pair
        pl.when(step.flags & edge == FIRST)(functools.partial(start, slice(0, band.block_q)))


def _is_case(band: Band, step: Step, body: int, marks: np.int32, among: np.int32) -> Array:
    """Whether a step has this body, and among these flags these."""
    if band.bank is not None:
        return step.flags & (among | FULL) == (marks | FULL if body == 0 else marks)
    bits = np.int32(_MOST_BODIES - 1) << _BODY_BIT
    return step.flags & (among | bits) == marks | np.int32(body) << _BODY_BIT


def _without(body: Body, block_q: int) -> list[slice]:
    """The queries of which a body has no piece."""
    edges = [0, *(edge for piece in body for edge in (piece.queries.start, piece.queries.stop)), block_q]
    return [slice(start, stop) for start, stop in zip(edges[::2], edges[1::2]) if start < stop]


def one_ahead(
    heads: int, body: Body, product: Callable[[int, Piece], Any], use: Callable[[int, Piece, Any], None]
) -> None:
    """use(head, piece, product(head, piece)) for all heads of a step and pieces of a body, the next product or two
    written before the use of this one: so the compiler fills the matrix unit while the vector units are at an
    exponential."""
    parts = [(head, piece) for piece in body for head in range(heads)]
    far = 2 if len(body) > 1 else 1  # smaller products leave the matrix unit idle sooner
    ahead = [product(*part) for part in parts[:far]]
    for number, (head, piece) in enumerate(parts):
        now = ahead.pop(0)
        ahead += [product(*part) for part in parts[number + far : number + far + 1]]
        use(head, piece, now)


def biased(step: Step, head: int, piece: Piece, logits: Array) -> Array:
    """A head's logits of a piece, for exponents of 2, with the bias if there is one: [queries, keys], by key [keys,
    queries]."""
    if step.bias is None:
        return logits
    of_heads, rows, _ = step.bias.shape
    tile = step.bias[0 if of_heads == 1 else head, slice(0, 1) if rows == 1 else piece.queries, piece.keys]
    if step.by_key:
        tile = over_lanes(spread(tile), logits.shape[1]) if rows == 1 else jnp.transpose(tile)
    tile = tile.astype(jnp.float32)
    # Above MASKED, so that a row of the least finite numbers is an average, and -inf is not.
    return logits + _LOG_2_E * jnp.where(tile == -np.inf, tile, jnp.maximum(tile, _LEAST_BIAS))


def hide(band: Band, step: Step, piece: Piece, logits: Array, bounds: Sequence[Any] = ()) -> Array:
    """A piece's logits, [queries, keys], by key [keys, queries], MASKED where a query does not see a key.

    bounds: Band.bounds_scratch, by key nothing.
    """
    if {cell for row in piece.cells for cell in row} == {_FULL}:
        return logits
    of_queries, of_keys = (1, 0) if step.by_key else (0, 1)  # the axes

    def place(x: slice, whole: slice) -> slice:
        return slice(x.start - whole.start, x.stop - whole.start)

    def hidden(queries: slice, keys: slice, seen: int) -> Array:
        places = place(queries, piece.queries), place(keys, piece.keys)
        part = logits[places[::-1] if step.by_key else places]
        if seen == _FULL:
            return part
        if seen == _HIDDEN:
            return jnp.full_like(part, MASKED)
        if step.by_key:
            numbers = [step.query_table[row : row + 1, queries] for row in band.rows]
        else:
            numbers = [over_lanes(ref[queries], keys.stop - keys.start) for ref in bounds]
        return jnp.where(_visible(band, step, queries, keys, numbers), part, MASKED)

    strips = []
    for queries, row in _runs(piece.cells, piece.queries.start):
        parts = [hidden(queries, keys, seen) for keys, seen in _runs(row, piece.keys.start)]
        strips.append(jnp.concatenate(parts, of_keys))
    return jnp.concatenate(strips, of_queries)


def _runs(cells: Sequence[Any], start: int) -> Iterator[tuple[slice, Any]]:
    """Tokens from the first of these cells on, and what all of them have."""
    for value, equal in itertools.groupby(cells):
        stop = start + LANES * len(list(equal))
        yield slice(start, stop), value
        start = stop


def _visible(band: Band, step: Step, queries: slice, keys: slice, of_queries: Sequence[Array]) -> Array:
    """bool, where a query sees a key, of these queries and keys of the step's tiles.

    of_queries: band.rows of the queries' table; each broadcasts against the result.
    """
    tiling = band.tiling
    axis = 0 if step.by_key else 1
    of_keys = None if step.key_table is None else step.key_table[:, keys]
    if of_keys is not None and step.by_key:
        of_keys = jnp.transpose(of_keys)

    def positions(tile: Array, block: int, part: slice, axis: int, shift: int = 0) -> Array:
        size = part.stop - part.start
        shape = (1, size) if axis == 1 else (size, 1)
        return tile * np.int32(block) + np.int32(part.start + shift) + lax.broadcasted_iota(jnp.int32, shape, axis)

    def of_key(row: int) -> Array:
        assert of_keys is not None
        return of_keys[row : row + 1, :] if axis == 1 else of_keys[:, row : row + 1]

    parts = []
    for number in range(band.axes):
        if tiling.diagonals:
            start = positions(step.query_tile, band.block_q, queries, 1 - axis, tiling.diagonals[0]) ^ _SIGN
            width: Any = np.int32(tiling.diagonals[1]) ^ _SIGN
        else:
            start, width = of_queries[2 * number : 2 * number + 2]
        is_numbered = tiling.coordinates is None
        coordinate = positions(step.key_tile, band.block_k, keys, axis) if is_numbered else of_key(number)
        inside = coordinate - start < width
        if tiling.sinks:
            inside |= coordinate < jnp.minimum(np.int32(tiling.sinks), start + width)
        parts.append(inside)
    if band.bank is not None:
        tile = step.bank[(keys, queries) if step.by_key else (queries, keys)]
        parts.append(tile.astype(jnp.int32) != 0)
    if band.segments:
        parts.append(of_queries[-1] == of_key(_SEGMENT))
    return functools.reduce(jnp.logical_and, parts)


def save_bounds(band: Band, step: Step, scratch: Sequence[Any]) -> None:
    """Fills Band.bounds_scratch from the tile's table, in a row's first step."""
    if scratch:

        @pl.when(is_first(step))
        def _() -> None:
            for row, ref in zip(band.rows, scratch, strict=True):
                ref[...] = spread(step.query_table[row : row + 1, :])


def save_numbers(step: Step, numbers: Any, columns: Any) -> None:
    """Fills columns, [rows, queries, LANES], from numbers, [rows, queries], in a row's first step."""

    @pl.when(is_first(step))
    def _() -> None:
        for row in range(numbers.shape[0]):
            columns[row] = spread(numbers[row : row + 1, :])


def spread(row: Array) -> Array:
    """[1, rows] -> [rows, 128], equal over the lanes; a transposition costs less than a broadcast over lanes."""
    return jnp.transpose(jnp.broadcast_to(row, (LANES, row.shape[1])))


def lse_of(scale: Array | np.float32, maxima: Array, totals: Array) -> Array:
    """Of a softmax with in_base_2's scale, or capped_in_base_2's factor: the maxima of what it multiplies, and the sums
    of the weights beside them."""
    lse = scale * _LOG_2 * maxima + jnp.log(totals)
    return jnp.where(maxima <= MASKED, np.float32(-np.inf), lse)


def add_by_lane(x: Array) -> Array:
    """[rows, width] -> [rows, 128], the sum of each lane's."""
    return functools.reduce(jnp.add, [x[:, lane : lane + LANES] for lane in range(0, x.shape[1], LANES)])


def over_lanes(x: Array, width: int) -> Array:
    """x [rows, 128], equal over the lanes, as [rows, width]."""
    return x[:, :width] if width < LANES else jnp.tile(x, (1, width // LANES))
