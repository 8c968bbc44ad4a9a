"""What the banded kernels for TPU share: sizes and tables of a call, its grid over pairs of tiles, the element mask."""

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

from kernels_pallas.patterns import ACTIVE, FIRST, FULL, HEAD_BIT, LAST, BlockLists, Pattern, Tiling, for_every_head
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
    default_blocks: Callable[..., tuple[int, int]],
    footprint: Callable[..., int],
) -> str | None:
    """Why a banded kernel cannot serve these arguments (arrays may be shape structs), or None if it can.

    default_blocks, footprint: the kernel's table of blocks and its VMEM model.
    """
    if isinstance(pattern, BlockLists):
        return "serves no lists of tiles"
    dtype = jnp.dtype(query.dtype)
    if dtype not in (jnp.bfloat16, jnp.float32) or not dtype == key.dtype == value.dtype:
        return f"needs query, key and value all bfloat16 or all float32, got {dtype}, {key.dtype} and {value.dtype}"
    if segment_ids is not None and any(jnp.dtype(ids.dtype).itemsize > 4 for ids in segment_ids):
        return f"needs segment ids of at most 32 bits, got {segment_ids[0].dtype} and {segment_ids[1].dtype}"
    if 0 in query.shape or 0 in key.shape:
        return f"needs arrays that are not empty, got query {query.shape} and key {key.shape}"
    block_q, block_k = pattern.blocks(default_blocks(query, key, value))
    for name, block in (("block_q", block_q), ("block_k", block_k)):
        if block < 1 or block % LANES:
            return f"needs {name} a positive multiple of {LANES}, got {block}"
    widths = padded_width(query.shape[-1]), padded_width(value.shape[-1])
    tables = 1 + (pattern.has_coordinates or segment_ids is not None)
    needed = footprint(block_q, block_k, *widths, dtype, tables=tables)
    if needed > VMEM_BUDGET:
        return (
            f"a tile of {block_q} queries x {block_k} keys at head dims {query.shape[-1]} and {value.shape[-1]} takes "
            f"{needed / 2**20:.1f} MiB of VMEM, more than {VMEM_BUDGET / 2**20:.0f} MiB"
        )
    # The gradients of keys go through the pairs once for every query head of a key head.
    pairs = pattern.num_pairs(block_q, block_k) * (query.shape[2] // key.shape[2])
    if 3 * 4 * pairs > SMEM_BUDGET:
        return (
            f"the list of {pairs} pairs of tiles takes {12 * pairs / 2**10:.0f} KiB of scalar memory, more than "
            f"{SMEM_BUDGET / 2**10:.0f} KiB"
        )
    return None


class Tokens(NamedTuple):
    """An array as the kernels read it, heads first, of whole tiles and padded in head dim: of queries, [B, N, T', H'],
    or of keys, [B, K, S', H']."""

    array: Array
    of_keys: bool


class Band:
    """A call's sizes, padded to whole tiles, and the tables of its queries and keys, int32 [1 or B, 8, tokens]."""

    def __init__(
        self, query: Array, key: Array, value: Array, tiling: Tiling, segment_ids: tuple[Array, Array] | None = None
    ):
        self.batch, self.num_queries, self.heads, head_dim = query.shape
        self.num_keys, self.key_heads, value_dim = value.shape[1:]
        self.group = self.heads // self.key_heads
        self.tiling, self.segments = tiling, segment_ids is not None
        self.block_q, self.block_k, self.itemsize = tiling.block_q, tiling.block_k, query.dtype.itemsize
        self.key_width, self.value_width = padded_width(head_dim), padded_width(value_dim)
        self.padded_queries = round_up(self.num_queries, self.block_q)
        self.padded_keys = round_up(self.num_keys, self.block_k)
        self.axes = tiling.starts.shape[1]
        # The table's rows that the kernels read.
        self.rows = [*range(0 if tiling.diagonals else 2 * self.axes), *([_SEGMENT] if self.segments else [])]
        # Queries in the padding copy the last one's interval, so that they do not spoil a full tile; keys in it have
        # a coordinate that nobody sees.
        starts = tiling.starts - (tiling.starts - tiling.ends).clip(0)  # an empty interval begins where it ends
        bounds = [x[:, axis] ^ _SIGN for axis in range(self.axes) for x in (starts, tiling.ends - starts)]
        query_ids, key_ids = segment_ids or (None, None)
        self.query_table = self._table(bounds, query_ids, self.padded_queries - self.num_queries, mode="edge")
        self.key_table = None
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

    def numbers(self, rows: dict[int, Array]) -> Array:
        """[B, T, N] by row -> float32 [B, N, 8, T']."""
        table = jnp.zeros((self.batch, self.heads, SUBLANES, self.padded_queries), jnp.float32)
        for row, x in rows.items():
            table = table.at[:, :, row, : x.shape[1]].set(jnp.swapaxes(x, 1, 2).astype(jnp.float32))
        return table

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


class Step(NamedTuple):
    """Inside a kernel: the pair of tiles of a grid step, what to do with it, and the tables' blocks.

    by_key: as in Call. Tiles of logits are [queries, keys], by key [keys, queries].
    """

    query_tile: Array
    key_tile: Array
    flags: Array
    query_table: Any
    key_table: Any
    by_key: bool


class Call:
    """A kernel over a list of pairs of tiles, in a grid (batch, heads, steps).

    By query, the list's rows are query tiles, and the grid has the query heads. By key, rows are key tiles, and the
    grid has the key heads: a row goes over all query heads of its key head, as the flags mark.
    """

    def __init__(self, band: Band, *, by_key: bool):
        self.band, self.by_key = band, by_key
        self.visits = for_every_head(band.tiling.by_key, band.group) if by_key else band.tiling.by_query
        self.grid = (band.batch, band.key_heads if by_key else band.heads, self.visits.rows.shape[1])

    def _index(self, b: Any, s: Any) -> Any:
        """A step's index in the lists, which lie behind each other."""
        lists, steps = self.visits.rows.shape
        return s if lists == 1 else b * np.int32(steps) + s

    def _query(self, b: Any, n: Any, s: Any, rows: Any, columns: Any, flags: Any) -> tuple[Any, Any, Any]:
        """(batch, head, tile) of a step's queries."""
        index = self._index(b, s)
        if not self.by_key:
            return b, n, rows[index]
        head = lax.shift_right_logical(flags[index], HEAD_BIT)
        return b, n * np.int32(self.band.group) + head, columns[index]

    def _key(self, b: Any, n: Any, s: Any, rows: Any, columns: Any, flags: Any) -> tuple[Any, Any, Any]:
        """(batch, head, tile) of a step's keys."""
        index = self._index(b, s)
        if self.by_key:
            return b, n, rows[index]
        tile = columns[index]
        return b, lax.div(n, np.int32(self.band.group)), tile

    def _of_tokens(self, width: int, *, of_keys: bool) -> Any:
        """Block of an array [B, N, T', width] or [B, K, S', width]."""
        tile_of, block = (self._key, self.band.block_k) if of_keys else (self._query, self.band.block_q)
        return pl.BlockSpec((None, None, block, width), lambda *step: (*tile_of(*step), zero()))

    def _of_numbers(self, rows: int) -> Any:
        """Block of an array [B, N, rows, T']."""

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

    def run(
        self,
        kernel: Callable[..., None],
        name: str,
        *,
        scale: float | Array,
        numbers: Array | None = None,
        tokens: Sequence[Tokens],
        out: Sequence[tuple[int, Any]],
        lse: bool = False,
        scratch: Sequence[Any],
        products: Sequence[int],
    ) -> list[Array]:
        """The kernel's results, heads first and padded.

        Args:
          kernel: (step, scale, numbers if given, *tokens, *out, lse if asked for, *scratch), all but the step (a Step)
            references.
          scale: []. numbers: as Band.numbers gives them. tokens: as Band.queries and Band.keys do.
          out: (head dim, dtype) of each result, for the tokens of the rows. lse: one more, float32 [B, N, 1, T'].
          products: the head dim of each product of a step's tiles.
        """
        band = self.band
        batch, heads, _ = self.grid
        scalar = pl.BlockSpec((1, 1), lambda *_: (zero(), zero()), memory_space=pltpu.SMEM)
        given = [(jnp.asarray(scale, jnp.float32).reshape(1, 1), scalar)]
        given.append((band.query_table, self._of_table(band.query_table, band.block_q, self._query)))
        if band.key_table is not None:
            given.append((band.key_table, self._of_table(band.key_table, band.block_k, self._key)))
        if numbers is not None:
            given.append((numbers, self._of_numbers(SUBLANES)))
        given += [(x, self._of_tokens(x.shape[-1], of_keys=of_keys)) for x, of_keys in tokens]
        arrays, in_specs = zip(*given)

        length = band.padded_keys if self.by_key else band.padded_queries
        shapes: list[Any] = [((batch, heads, length, width), dtype) for width, dtype in out]
        out_specs = [self._of_tokens(width, of_keys=self.by_key) for width, _ in out]
        if lse:
            shapes.append(((batch, heads, 1, length), jnp.float32))
            out_specs.append(self._of_numbers(1))
        over = varying(*arrays)

        def body(rows: Any, columns: Any, flags: Any, scale: Any, query_table: Any, *refs: Any) -> None:
            index = self._index(pl.program_id(0), pl.program_id(2))
            row, column = rows[index], columns[index]
            query_tile, key_tile = (column, row) if self.by_key else (row, column)
            key_table, *refs = refs if band.key_table is not None else (None, *refs)  # type: ignore[assignment]
            kernel(Step(query_tile, key_tile, flags[index], query_table, key_table, self.by_key), scale, *refs)

        tile, both = band.block_q * band.block_k, band.key_width + band.value_width
        all_steps = math.prod(self.grid)
        moved = all_steps * band.block_k + batch * band.heads * band.padded_queries
        return pl.pallas_call(
            body,
            grid_spec=pltpu.PrefetchScalarGridSpec(
                num_scalar_prefetch=3,
                grid=self.grid,
                in_specs=in_specs,
                out_specs=out_specs,
                scratch_shapes=scratch,
            ),
            out_shape=[jax.ShapeDtypeStruct(*shape, manual_axis_type=over) for shape in shapes],
            compiler_params=pltpu.CompilerParams(
                dimension_semantics=("parallel", "parallel", "arbitrary"), vmem_limit_bytes=VMEM_BUDGET
            ),
            cost_estimate=pl.CostEstimate(
                flops=2 * all_steps * tile * sum(products),
                transcendentals=all_steps * tile,
                bytes_accessed=moved * both * band.itemsize,
            ),
            name=name,
        )(*(jnp.asarray(x, jnp.int32).ravel() for x in self.visits), *arrays)


# --- Inside a kernel --------------------------------------------------------------------------------------------------


def has(flags: Array, flag: np.int32) -> Array:
    return lax.bitwise_and(flags, flag) != 0


def is_first(step: Step) -> Array:
    return has(step.flags, FIRST)


def is_last(step: Step) -> Array:
    return has(step.flags, LAST)


def visit(band: Band, step: Step, accumulate: Callable[[bool], None]) -> None:
    """Runs accumulate(masked) if the pair is looked at; without the element mask where every query sees every key."""
    active, full = has(step.flags, ACTIVE), has(step.flags, FULL)
    if band.segments:
        pl.when(active)(lambda: accumulate(True))
        return
    pl.when(active & full)(lambda: accumulate(False))
    pl.when(active & ~full)(lambda: accumulate(True))


def visible(band: Band, step: Step, queries: Sequence[Array]) -> Array:
    """bool, where a query sees a key, of a tile of logits.

    queries: band.rows of the queries' table; each broadcasts against the result.
    """
    tiling = band.tiling
    axis = 0 if step.by_key else 1  # along which the keys lie
    keys = None if step.key_table is None else step.key_table[...]
    if keys is not None and step.by_key:
        keys = jnp.transpose(keys)

    def positions(tile: Array, block: int, axis: int, shift: int = 0) -> Array:
        shape = (1, block) if axis == 1 else (block, 1)
        return tile * np.int32(block) + np.int32(shift) + lax.broadcasted_iota(jnp.int32, shape, axis)

    def of_key(row: int) -> Array:
        assert keys is not None
        return keys[row : row + 1, :] if axis == 1 else keys[:, row : row + 1]

    parts = []
    for number in range(band.axes):
        if tiling.diagonals:
            start = positions(step.query_tile, band.block_q, 1 - axis, tiling.diagonals[0]) ^ _SIGN
            width: Any = np.int32(tiling.diagonals[1]) ^ _SIGN
        else:
            start, width = queries[2 * number : 2 * number + 2]
        is_numbered = tiling.coordinates is None
        coordinate = positions(step.key_tile, band.block_k, axis) if is_numbered else of_key(number)
        inside = coordinate - start < width
        if tiling.sinks:
            inside |= coordinate < jnp.minimum(np.int32(tiling.sinks), start + width)
        parts.append(inside)
    if band.segments:
        parts.append(queries[-1] == of_key(_SEGMENT))
    return functools.reduce(jnp.logical_and, parts)


def save_bounds(band: Band, step: Step, scratch: Sequence[Any]) -> None:
    """Fills Band.bounds_scratch from the tile's table."""
    for row, ref in zip(band.rows, scratch, strict=True):
        ref[...] = spread(step.query_table[row : row + 1, :])


def bounds_along_lanes(band: Band, step: Step) -> list[Array]:
    """[1, queries] each of band.rows."""
    return [step.query_table[row : row + 1, :] for row in band.rows]


def spread(row: Array) -> Array:
    """[1, rows] -> [rows, 128], equal over the lanes; a transposition costs less than a broadcast over lanes."""
    return jnp.transpose(jnp.broadcast_to(row, (LANES, row.shape[1])))


def over_lanes(x: Array, width: int) -> Array:
    """x [rows, 128], equal over the lanes, as [rows, width]."""
    return x[:, :width] if width < LANES else jnp.tile(x, (1, width // LANES))
