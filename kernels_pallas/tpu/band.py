"""What the banded kernels for TPU share: sizes and tables of a call, its grid over pairs of tiles, the element mask."""

import functools
import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from kernels_pallas.patterns import ACTIVE, FIRST, FULL, HEAD_BIT, LAST, Pattern, Visits
from kernels_pallas.tpu.common import (
    LANES,
    SMEM_BUDGET,
    SUBLANES,
    VMEM_BUDGET,
    padded_width,
    round_up,
    zero,
)

Array = jax.Array

# Stands for -inf in masked logits and in the maximum of no logits: finite, so that a difference of two is not NaN.
MASKED = np.float32(-0.7 * np.finfo(np.float32).max)
# Rows of the tables of queries and of keys: START and WIDTH (queries) or COORDINATE (keys) of each axis, then SEGMENT.
# START and WIDTH have their sign bit flipped: as int32, coordinate - START < WIDTH then is true iff the key is in the
# interval, because below the interval the unsigned difference wraps to a large number.
_SEGMENT = SUBLANES - 1
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
    footprint: Callable[..., int],
) -> str | None:
    """Why a banded kernel cannot serve these arguments (arrays may be shape structs), or None if it can.

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
            head = lax.shift_right_logical(flags[self.step(b, n, s)], HEAD_BIT)
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
    return has(flags, FIRST)


def is_last(flags: Array) -> Array:
    return has(flags, LAST)


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
    active, full = has(flags, ACTIVE), has(flags, FULL)
    if segments:
        pl.when(active)(lambda: accumulate(True))
        return
    pl.when(active & full)(lambda: accumulate(False))
    pl.when(active & ~full)(lambda: accumulate(True))


def spread(row: Array) -> Array:
    """[1, rows] -> [rows, 128], equal over the lanes; a transposition costs less than a broadcast over lanes."""
    return jnp.transpose(jnp.broadcast_to(row, (LANES, row.shape[1])))


def over_lanes(x: Array, width: int) -> Array:
    """x [rows, 128], equal over the lanes, as [rows, width]."""
    return x[:, :width] if width < LANES else jnp.tile(x, (1, width // LANES))
