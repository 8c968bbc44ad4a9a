"""What the banded GPU kernels share: lists of tiles, tables of queries and keys, the element mask, a call's arrays.

Queries and keys are cut into tiles of TILE. Of every row of tiles there is a list of the tiles that it visits, those
that every query sees in full before those that are partly seen, which alone are masked. A kernel walks a list by steps
of `step` keys (or queries), a part of a tile each.
"""

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.experimental import pallas as pl

from kernels_pallas.gpu.common import COLUMN, ROW, ROWS, SMEM_BUDGET, WARPGROUPS, by_column, by_row, iota, load
from kernels_pallas.patterns import ACTIVE, BANK_BIT, FIRST, FULL, BlockLists, Pattern, Tiling, Visits

Array = jax.Array

TILE = ROWS * WARPGROUPS  # queries and keys in a tile
MASKED = np.float32(-1e30)  # stands for -inf in logits: a difference of two is not NaN
# An extent of 0 would mask nothing; scales nearer to 0 are taken for the least, larger ones for the most.
_LEAST_SCALE, _MOST_SCALE = np.float32(1e-30), np.float32(1e8)
_LOG2_E = np.float32(math.log2(math.e))
# Widths that tiles in shared memory have; others are padded to the next one.
_WIDTHS = (64, 128, 192, 256)


class Lists(NamedTuple):
    """Which tiles the rows visit, for every row of the batch or for all alike.

    columns: int32 [lists, rows, most]. counts: int32 [lists, rows, 3], of those seen in full, of all, 1 at least, and
    of those that are looked at: a row without such lists one that is not. seen: like columns, tiles of the bank.
    """

    columns: Any
    counts: Any
    seen: Any


def lists_of(visits: Visits, rows: int, tiles: int) -> Lists:
    """visits: known, or traced; of so many rows, and tiles that each may visit."""
    if any(isinstance(x, jax.core.Tracer) for x in visits):
        return jax.vmap(lambda *visits: _traced_lists(Visits(*visits), rows, tiles))(*visits)
    columns: list[np.ndarray] = []
    counts: list[np.ndarray] = []
    seen: list[np.ndarray] = []
    for row, column, flags in zip(*(np.asarray(x) for x in visits), strict=True):
        listed = flags & (ACTIVE | FIRST) != 0  # the others fill up a list that was made with the arrays
        row, column, flags = row[listed], column[listed], flags[listed]
        full = flags & FULL != 0
        order = np.lexsort((column, ~full, row))  # by row, full ones first
        number = np.bincount(row, minlength=rows)
        place = np.arange(len(row)) - np.repeat(np.cumsum(number) - number, number)
        for tables, numbers in ((columns, column), (seen, flags >> BANK_BIT)):
            table = np.zeros((rows, number.max()), np.int32)
            table[row[order], place] = numbers[order]
            tables.append(table)
        active = flags & ACTIVE != 0
        each = [np.bincount(row[full], minlength=rows), number, np.bincount(row[active], minlength=rows)]
        counts.append(np.stack(each, axis=1).astype(np.int32))
    width = max(table.shape[1] for table in columns)

    def stacked(tables: list[np.ndarray]) -> np.ndarray:
        return np.stack([np.pad(table, ((0, 0), (0, width - table.shape[1]))) for table in tables])

    return Lists(stacked(columns), np.stack(counts), stacked(seen))


def _all_partly(lists: Lists) -> Lists:
    """The same tiles, none of which is seen in full."""
    return lists._replace(counts=lists.counts * np.array([0, 1, 1], np.int32))


def _traced_lists(visits: Visits, rows: int, tiles: int) -> Lists:
    """Of one list of steps, in their order. A row lists as many tiles as there are steps of it."""
    row, column, flags = visits
    step = jnp.arange(len(row))
    listed = (flags & (ACTIVE | FIRST)) != 0
    place = step - lax.cummax(jnp.where(flags & FIRST != 0, step, 0))
    most = min(tiles, max(1, len(row) - rows + 1))
    where = row, jnp.where(listed, place, most)
    columns, seen = (
        jnp.zeros((rows, most), jnp.int32).at[where].set(x, mode="drop") for x in (column, flags >> BANK_BIT)
    )
    each = (flags & FULL != 0, listed, flags & ACTIVE != 0)
    counts = [jnp.zeros(rows, jnp.int32).at[row].add(x.astype(jnp.int32)) for x in each]
    return Lists(columns, jnp.stack(counts, axis=1), seen)


def _packed(bank: Any) -> Any:
    """[tiles, TILE, TILE], not 0 where a row's token and a column's see each other -> int32 [tiles, words, TILE]: a row
    has a bit for each column, 32 in a word."""
    xp: Any = jnp if isinstance(bank, jax.core.Tracer) else np
    bits = (bank != 0).reshape(len(bank), TILE, TILE // 32, 32).astype(xp.uint32)
    words = (bits << np.arange(32, dtype=np.uint32)).sum(-1, dtype=xp.uint32)
    return xp.swapaxes(words, 1, 2).astype(xp.int32)


def padded_width(width: int) -> int:
    return next((each for each in _WIDTHS if width <= each), width)


def refusal(
    query: Any,
    key: Any,
    value: Any,
    *,
    pattern: Pattern,
    segment_ids: tuple[Any, Any] | None = None,
    footprint: Callable[[int, int], int],
) -> str | None:
    """Why a banded kernel cannot serve these arguments (arrays may be shape structs), or None if it can.

    footprint: bytes of shared memory at these padded widths of keys and values.
    """
    dtype = jnp.dtype(query.dtype)
    if dtype not in (jnp.bfloat16, jnp.float16) or not dtype == key.dtype == value.dtype:
        return f"needs query, key and value all bfloat16 or all float16, got {dtype}, {key.dtype} and {value.dtype}"
    if segment_ids is not None and any(jnp.dtype(ids.dtype).itemsize > 4 for ids in segment_ids):
        return f"needs segment ids of at most 32 bits, got {segment_ids[0].dtype} and {segment_ids[1].dtype}"
    if 0 in query.shape or 0 in key.shape:
        return f"needs arrays that are not empty, got query {query.shape} and key {key.shape}"
    if max(query.shape[-1], value.shape[-1]) > _WIDTHS[-1]:
        return f"serves head dims up to {_WIDTHS[-1]}, got {query.shape[-1]} and {value.shape[-1]}"
    if isinstance(pattern, BlockLists):
        reason = pattern.misfit(query.shape[0], key.shape[2], -(-query.shape[1] // TILE))
        if reason is not None:
            return reason
    if pattern.blocks((TILE, TILE)) != (TILE, TILE):
        return f"needs tiles of {TILE} queries and keys, got {pattern.blocks((TILE, TILE))}"
    needed = footprint(padded_width(query.shape[-1]), padded_width(value.shape[-1]))
    if needed > SMEM_BUDGET:
        return f"takes {-(-needed // 2**10)} KiB of shared memory, more than {SMEM_BUDGET / 2**10:.0f} KiB"
    return None


class Band:
    """A call's sizes, padded to whole tiles, and what its kernels read beside the tokens."""

    def __init__(
        self, query: Array, key: Array, value: Array, tiling: Tiling, segment_ids: tuple[Array, Array] | None = None
    ):
        self.batch, self.num_queries, self.heads, head_dim = query.shape
        self.num_keys, self.key_heads, value_dim = value.shape[1:]
        self.group, self.dtype = self.heads // self.key_heads, query.dtype
        self.key_width, self.value_width = padded_width(head_dim), padded_width(value_dim)
        self.query_tiles, self.key_tiles = -(-self.num_queries // TILE), -(-self.num_keys // TILE)
        by_query = lists_of(tiling.by_query, self.query_tiles, self.key_tiles)
        by_key = lists_of(tiling.by_key, self.key_tiles, self.query_tiles)
        # Segments cut tiles that are seen in full but for them.
        self.by_query, self.by_key = (_all_partly(x) if segment_ids else x for x in (by_query, by_key))
        self.bank, self.list_heads = tiling.bank, tiling.heads
        self.has_bank = self.bank is not None
        self.diagonals, self.sinks = tiling.diagonals, tiling.sinks
        self.axes = 0 if self.has_bank else tiling.starts.shape[1]
        self.has_segments = segment_ids is not None
        query_ids, key_ids = segment_ids or (None, None)
        self.has_coordinates = tiling.coordinates is not None
        bounds: list[tuple[Any, int]] = []
        if not (self.diagonals or self.has_bank):
            starts = tiling.starts - (tiling.starts - tiling.ends).clip(0)  # an empty interval begins where it ends
            bounds = [(x[:, axis], 0) for axis in range(self.axes) for x in (starts, tiling.ends - starts)]
        coordinates = [(tiling.coordinates[:, axis], -1) for axis in range(self.axes)] if self.has_coordinates else []
        # Queries in the padding see nothing, and nobody sees a key in it: its number is that of no key.
        self.query_table: Any = _table(bounds, query_ids, self.query_tiles)
        self.key_table: Any = _table(coordinates, key_ids, self.key_tiles)

    def queries(self, x: Array) -> Array:
        """[B, T, N, H] -> of whole tiles, padded in width."""
        return _padded(x, self.query_tiles * TILE)

    def keys(self, x: Array) -> Array:
        return _padded(x, self.key_tiles * TILE)

    def lists(self, *, by_key: bool) -> list[Array]:
        """What the kernels read of them: columns, counts, and with a bank what is seen of a tile, and the bank."""
        lists = self.by_key if by_key else self.by_query
        if not self.has_bank:
            return [jnp.asarray(x) for x in lists[:2]]
        bank = self.bank.swapaxes(1, 2) if by_key else self.bank
        return [jnp.asarray(x) for x in (*lists, _packed(bank))]

    def list_of(self, lists: int, batch: Array, key_head: Array) -> Any:
        """Which of so many lists a block reads."""
        of_row = batch if lists > self.list_heads else np.int32(0)
        return of_row if self.list_heads == 1 else of_row * np.int32(self.list_heads) + key_head

    def visible(self, queries: "Side", keys: "Side", shape: tuple[int, int], words: Sequence[Array] = ()) -> Array:
        """bool of this shape, keys along the side that is `keys`. words: of the bank, see words_of."""
        rows, coordinates = iter(queries.numbers), iter(keys.numbers)
        total: Any = _bits(words, shape) if self.has_bank else None
        for _ in range(self.axes):
            if self.diagonals:
                start: Any = queries.own(shape) + np.int32(self.diagonals[0])
                width: Any = np.int32(self.diagonals[1])
            else:
                start, width = (queries.spread(next(rows), shape) for _ in range(2))
            key = keys.spread(next(coordinates), shape) if self.has_coordinates else keys.own(shape)
            # Below the interval the difference wraps to a large number.
            inside = (key - start).astype(jnp.uint32) < width.astype(jnp.uint32)
            if self.sinks:
                inside |= (key < np.int32(self.sinks)) & (key < start + width)
            total = inside if total is None else total & inside
        if self.has_segments:
            total &= queries.spread(next(rows), shape) == keys.spread(next(coordinates), shape)
        return total


def words_of(seen_ref: Any, bank_ref: Any, place: tuple[Any, Any], number: Array, step: int) -> list[Array]:
    """What this warpgroup's rows see of a step's columns, a bit each, in a number per row and 32 columns.

    seen_ref, bank_ref: of Band.lists. place: of a row of tiles. number: of the step.
    """
    parts, words = np.int32(TILE // step), step // 32
    tile, first = seen_ref[(*place, lax.div(number, parts))], lax.rem(number, parts) * np.int32(words)
    rows = pl.ds(lax.axis_index("warpgroup") * np.int32(ROWS), ROWS)
    return [load(bank_ref.at[tile, first + np.int32(word), rows], ROW) for word in range(words)]


def _bits(words: Sequence[Array], shape: tuple[int, int]) -> Array:
    column = iota(shape, 1)
    word = by_row(words[-1], shape)
    for number in reversed(range(len(words) - 1)):
        word = jnp.where(column < np.int32(32 * (number + 1)), by_row(words[number], shape), word)
    # Bits 1 and 2 of a column say whose thread it is, the others which of the thread's: a word is shifted once, and the
    # compiler knows what is tested of it.
    shifted = lax.shift_right_logical(word, column & np.int32(6))
    return shifted & lax.shift_left(np.int32(1), column & np.int32(25)) != 0


class Side(NamedTuple):
    """Queries or keys of a step, along the rows or the columns of its logits.

    axis: 0 where they are rows. first: the number of the first one. numbers: rows of their table, one number each,
    which are read one after the other. counted: their own numbers, where they are read rather than computed (which a
    compiler would do before a loop, and keep them).
    """

    axis: int
    first: Any
    numbers: Iterable[Array]
    counted: Any = None

    def own(self, shape: tuple[int, int]) -> Array:
        """Their numbers, over the matrix."""
        if self.counted is not None:
            return self.spread(self.counted, shape)
        return iota(shape, self.axis) + self.first

    def spread(self, x: Array, shape: tuple[int, int]) -> Array:
        if x.ndim == 2:
            return x
        return by_row(x, shape) if self.axis == 0 else by_column(x, shape)


def numbers_of(ref: Any, axis: int) -> list[Array]:
    """A table's rows in registers. ref: int32 [rows, tokens]."""
    return list(numbers_in_turn(ref, axis))


def numbers_in_turn(ref: Any, axis: int) -> Iterator[Array]:
    """The same, each when it is asked for: where they would take too many registers at once."""
    return (load(ref.at[row], ROW if axis == 0 else COLUMN) for row in range(ref.shape[0]))


def _table(numbers: list[tuple[Any, int]], ids: Array | None, tiles: int) -> Array | None:
    """int32 [lists, rows, tokens], or None without rows. numbers: [lists, tokens], and what stands in the padding."""
    rows = [*numbers, *([] if ids is None else [(ids, -1)])]
    if not rows:
        return None
    lists = max(row.shape[0] for row, _ in rows)
    padded = [
        jnp.pad(
            jnp.asarray(row, jnp.int32), ((0, 0), (0, tiles * TILE - row.shape[1])), constant_values=np.int32(padding)
        )
        for row, padding in rows
    ]
    return jnp.stack([jnp.broadcast_to(row, (lists, tiles * TILE)) for row in padded], axis=1)


def _padded(x: Array, length: int) -> Array:
    width = padded_width(x.shape[-1])
    return jnp.pad(x, ((0, 0), (0, length - x.shape[1]), (0, 0), (0, width - x.shape[-1])))


def factor_of(scale: float | Array) -> tuple[Array, Array]:
    """(the scale's sign, its size times log2(e), float32 [1]): kernels take the maximum of logits of a scale > 0."""
    scale = jnp.asarray(scale, jnp.float32)
    size = jnp.clip(jnp.abs(scale), _LEAST_SCALE, _MOST_SCALE) * _LOG2_E
    return jnp.where(scale < 0, -1, 1), size.reshape(1)
