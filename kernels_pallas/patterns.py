"""Which keys the queries see, as data; kernels cut it into tiles by their own blocks and get lists of pairs of tiles.

    Intervals          an interval of keys per query, by a function of the query's number; the first `sinks` keys too
    Boxes              a box of space per query, an interval along every axis
    SortedIntervals    an interval of keys per query, computed with the arrays, for each row of the batch
    AllPairs           an interval of coordinates per query, computed with the arrays: every pair of tiles is looked at
    BlockLists         the tiles of keys that a tile of queries visits, for each row of the batch and key head, each in
                       full or as a bank of tiles says

All have

    has_coordinates              whether a key brings its coordinates; otherwise it has its number
    blocks(default)              (block_q, block_k): the kernel's own, or those that the pattern needs
    num_pairs(block_q, block_k)  the steps of the list by query, over all lists, at most; O(query tiles) time and memory
    tiled(block_q, block_k)      the Tiling, with the lists; O(T)

Lists are made on the host (those of traced bounds, in the program); nothing here belongs to one backend.
"""

import dataclasses
import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

Array = jax.Array
# Numbers of queries, int [n] -> (starts, ends), int [n]: the keys starts <= s < ends. Both grow with the query.
Bounds = Callable[[np.ndarray], tuple[np.ndarray, np.ndarray]]
# Numbers of queries [n, 1] and of keys [1, m] -> bool [n, m], or what broadcasts to it: the query sees the key.
Sees = Callable[[np.ndarray, np.ndarray], Any]

# What a step does, as bits.
FIRST, LAST, ACTIVE, FULL = (np.int32(2**bit) for bit in range(4))
BANK_BIT = np.int32(4)  # and above it, of a pattern with a bank, the bank's tile; else these bits are a kernel's own


class Visits(NamedTuple):
    """Pairs of tiles, one per grid step; all pairs of a row follow each other. int32 [lists, steps].

    There is one list, or one for every row of the batch (BlockLists: or key head). flags: the first and the last step
    of a row, whether the pair is looked at (a row without pairs has one step that is not), and whether every query sees
    every key. Of lists that were made with the arrays, the first step of a row is looked at if any is, and full pairs
    come before the others.
    """

    rows: Any
    columns: Any
    flags: Any


@dataclasses.dataclass(frozen=True, eq=False)
class Tiling:
    """A pattern cut into tiles: what a kernel reads.

    starts, ends: int32 [lists, axes, T]. coordinates: int32 [lists, axes, S], or None: the key's number.
    by_query: pairs (query tile, key tile); by_key: the same pairs as (key tile, query tile).
    diagonals: (offset, width) where query t sees the keys t + offset <= s < t + offset + width that there are, and the
    sinks: then the kernels read no bounds.
    bank: int8 [tiles, block_q, block_k], not 0 where a query sees a key; a step's tile is in its flags. No bounds then.
    heads: how many lists there are for a row of the batch, one or as many as key heads; they follow each other.
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
    bank: Any = None
    heads: int = 1


@dataclasses.dataclass(frozen=True, eq=False)
class Intervals:
    """Queries that see the keys starts <= s < ends and s < min(sinks, ends), of this many queries and keys."""

    bounds: Bounds
    queries: int
    keys: int
    sinks: int = 0
    has_coordinates = False

    def blocks(self, default: tuple[int, int]) -> tuple[int, int]:
        return default

    def num_pairs(self, block_q: int, block_k: int) -> int:
        """Exact where the intervals of a tile's queries leave out no key tile between them."""
        return int(_count_pairs(self.bounds, self.queries, self.keys, self.sinks, block_q, block_k).sum())

    def tiled(self, block_q: int, block_k: int) -> Tiling:
        """Exact: a pair is listed iff some query sees some key. O(T + query tiles x key tiles) time and memory."""
        starts, ends = _cut(*self.bounds(np.arange(self.queries)), self.keys)
        diagonals = _diagonals(starts, ends, self.keys, block_k)
        starts = np.where(starts <= self.sinks, 0, starts)  # an interval that touches the sinks begins with them
        lists = lists_of(*_visited(starts, ends, self.keys, self.sinks, block_q, block_k))
        first, end = (x.astype(np.int32)[None, None] for x in (starts, ends))
        return Tiling(first, end, None, *lists, block_q, block_k, self.sinks, diagonals)


@dataclasses.dataclass(frozen=True, eq=False)
class Boxes:
    """Queries of an N-D space that see the box of keys with starts <= coordinate < ends along every axis.

    axes: per axis (bounds, length), lengths multiples of `tile`. tile: per axis the side of a tile, the same for
    queries and keys. The tokens come tile by tile, row-major in space and within a tile.
    """

    axes: Sequence[tuple[Bounds, int]]
    tile: Sequence[int]
    has_coordinates = True

    def blocks(self, default: tuple[int, int]) -> tuple[int, int]:
        return math.prod(self.tile), math.prod(self.tile)

    def num_pairs(self, block_q: int, block_k: int) -> int:
        """Exact where those of every axis are."""
        along = ((bounds, side, side, 0, step, step) for (bounds, side), step in zip(self.axes, self.tile))
        return math.prod(int(_count_pairs(*axis).sum()) for axis in along)

    def tiled(self, block_q: int, block_k: int) -> Tiling:
        sides = [side for _, side in self.axes]
        tables = [(*_cut(*bounds(np.arange(side)), side), np.arange(side)) for bounds, side in self.axes]
        rows: list[Any] = []
        for field in range(3):
            grids = np.meshgrid(*(table[field] for table in tables), indexing="ij")
            rows.append(np.stack([_by_tile(grid, self.tile) for grid in grids])[None].astype(np.int32))
        visited, full = np.ones((1, 1), bool), np.ones((1, 1), bool)
        for (starts, ends, _), side, step in zip(tables, sides, self.tile):
            along = _visited(starts, ends, side, 0, step, step)
            visited, full = np.kron(visited, along[0]), np.kron(full, along[1])
        starts, ends, coordinates = rows
        return Tiling(starts, ends, coordinates, *lists_of(visited, full), block_q, block_k)


@dataclasses.dataclass(frozen=True, eq=False)
class SortedIntervals:
    """Queries that see the keys starts <= s < ends, of bounds that are computed with the arrays, a list for each row.

    starts, ends: int [B, T], maybe traced; shape structs will do for num_pairs. keys: how many there are. Both bounds
    must grow along the queries, and every start must be at least the end before it minus `reach`. block: of queries
    and of keys.
    """

    starts: Any
    ends: Any
    keys: int
    reach: int
    block: int
    has_coordinates = False

    def blocks(self, default: tuple[int, int]) -> tuple[int, int]:
        return self.block, self.block

    def num_pairs(self, block_q: int, block_k: int) -> int:
        """The ranges of tiles grow, and each begins `reach` before the last one's end at the earliest. One more for
        every tile that sees, or is seen by, none."""
        return self.starts.shape[0] * self._steps(block_q, block_k)

    def _steps(self, block_q: int, block_k: int) -> int:
        """Of one list."""
        tiles, key_tiles = -(-self.starts.shape[1] // block_q), -(-self.keys // block_k)
        return 2 * key_tiles + tiles * (-(-(self.reach - 1) // block_k) + 2)

    def tiled(self, block_q: int, block_k: int) -> Tiling:
        batch, queries = self.starts.shape
        tiles, key_tiles = -(-queries // block_q), -(-self.keys // block_k)
        past = tiles * block_q - queries
        by_tile = [
            jnp.pad(x, ((0, 0), (0, past)), mode="edge").reshape(batch, tiles, block_q)
            for x in (self.starts, self.ends)
        ]
        start, end = by_tile[0].min(-1), by_tile[1].max(-1)
        first, last = start // block_k, jnp.maximum(end - 1, 0) // block_k  # key tiles; they grow with the tile
        key_tile = jnp.arange(key_tiles)
        seen_first = jax.vmap(lambda last: jnp.searchsorted(last, key_tile, side="left"))(last)
        seen_last = jax.vmap(lambda first: jnp.searchsorted(first, key_tile, side="right"))(first) - 1
        steps = self._steps(block_q, block_k)
        by_query = _list_ranges(first, jnp.where(end > start, last - first + 1, 0), steps)
        by_key = _list_ranges(jnp.minimum(seen_first, tiles - 1), jnp.maximum(seen_last - seen_first + 1, 0), steps)
        first_key, end_key = (x.astype(jnp.int32)[:, None] for x in (self.starts, self.ends))
        return Tiling(first_key, end_key, None, by_query, by_key, block_q, block_k)


@dataclasses.dataclass(frozen=True, eq=False)
class AllPairs:
    """Queries that see the keys with starts <= coordinate < ends: every pair of tiles is looked at.

    starts, ends: int [B, T]; coordinates: int [B, S]; all maybe traced. block: of queries and of keys.
    """

    starts: Any
    ends: Any
    coordinates: Any
    block: int
    has_coordinates = True

    def blocks(self, default: tuple[int, int]) -> tuple[int, int]:
        return self.block, self.block

    def num_pairs(self, block_q: int, block_k: int) -> int:
        return math.prod(self._tiles(block_q, block_k))

    def _tiles(self, block_q: int, block_k: int) -> tuple[int, int]:
        return -(-self.starts.shape[1] // block_q), -(-self.coordinates.shape[1] // block_k)

    def tiled(self, block_q: int, block_k: int) -> Tiling:
        visited = np.ones(self._tiles(block_q, block_k), bool)
        starts, ends, coordinates = (x.astype(jnp.int32)[:, None] for x in (self.starts, self.ends, self.coordinates))
        return Tiling(starts, ends, coordinates, *lists_of(visited, ~visited), block_q, block_k)


_MOST_BANK = 2**26  # bytes of the tiles that are partly seen


class LargeBank(ValueError):
    """A predicate with more than that."""


@dataclasses.dataclass(frozen=True, eq=False)
class BlockLists:
    """Queries that see the keys of the tiles that their own tile lists, all of them or as a tile of the bank says.

    columns: int [B|1, K|1, query tiles, M], key tiles in any order. Others than there are, such as -1, stand for none;
      of a tile that is listed twice the first place counts.
    partly: int, like columns: the bank's tile for a key tile that is partly seen, -1 where all see all.
    bank: bool or int8 [tiles, block_q, block_k], not 0 where the query sees the key. It may have no tile.
    queries, keys: how many there are; keys past the last one are not seen, whatever the lists say.

    All arrays may be traced.
    """

    columns: Any
    partly: Any
    bank: Any
    queries: int
    keys: int
    has_coordinates = False

    @classmethod
    def of(cls, sees: Sees, queries: int, keys: int, block_q: int, block_k: int) -> "BlockLists":
        """Of a predicate, the same for all rows and heads; it is asked tile by tile, and equal tiles are stored once.

        Raises:
          LargeBank: where tiles that are partly seen differ too much.

        Complexity: O(queries x keys) time, O(visited tiles) memory beside the bank.
        """
        numbers: dict[bytes, int] = {}  # of the bank's tiles
        listed: list[list[tuple[int, int]]] = []
        for first in range(0, queries, block_q):
            query = np.arange(first, min(first + block_q, queries), dtype=np.int32)[:, None]
            row: list[tuple[int, int]] = []
            for column, start in enumerate(range(0, keys, block_k)):
                key = np.arange(start, min(start + block_k, keys), dtype=np.int32)[None]
                seen = np.broadcast_to(np.asarray(sees(query, key), bool), (query.size, key.size))
                if seen.all():
                    row.append((column, -1))
                elif seen.any():
                    tile = np.zeros((block_q, block_k), bool)
                    tile[: query.size, : key.size] = seen
                    row.append((column, numbers.setdefault(np.packbits(tile).tobytes(), len(numbers))))
                    if len(numbers) * block_q * block_k > _MOST_BANK:
                        raise LargeBank(
                            f"serves masks whose different tiles take up to {_MOST_BANK >> 20} MiB, a byte a pair, and "
                            f"this one's take more"
                        )
            listed.append(row)
        tables = np.full((2, 1, 1, len(listed), max(1, *map(len, listed))), -1, np.int32)
        for number, row in enumerate(listed):
            tables[:, 0, 0, number, : len(row)] = np.array(row, np.int32).reshape(-1, 2).T
        size = block_q * block_k
        packed = np.frombuffer(b"".join(numbers), np.uint8).reshape(len(numbers), -(-size // 8))
        bank = np.unpackbits(packed, axis=1, count=size).reshape(-1, block_q, block_k).astype(np.int8)
        return cls(tables[0], tables[1], bank, queries, keys)

    def blocks(self, default: tuple[int, int]) -> tuple[int, int]:
        return self.bank.shape[1], self.bank.shape[2]

    def num_pairs(self, block_q: int, block_k: int) -> int:
        return math.prod(self.columns.shape)

    def misfit(self, batch: int, key_heads: int, tiles: int) -> str | None:
        """What lists of a call with so many rows, key heads and tiles of queries need to be, if they are not."""
        lists = self.columns.shape
        if lists[0] in (1, batch) and lists[1] in (1, key_heads) and lists[2] == tiles:
            return None
        return f"needs lists [1 or {batch}, 1 or {key_heads}, {tiles}, places], got {list(lists)}"

    def tiled(self, block_q: int, block_k: int) -> Tiling:
        """O(places log places) time and O(places) memory, of the places of all lists, and twice the bank."""
        is_traced = any(isinstance(x, jax.core.Tracer) for x in (self.columns, self.partly, self.bank))
        xp: Any = jnp if is_traced else np
        given = [xp.asarray(x).astype(xp.int32) for x in (self.columns, self.partly)]
        columns, partly = (x.reshape(-1, *x.shape[2:]) for x in given)
        tiles, key_tiles = columns.shape[1], -(-self.keys // block_k)
        # Of the bank: nothing, all, what was given; where the last keys are padding, all and the given without those.
        seen = xp.asarray(self.bank).astype(xp.int8)
        seen = xp.concatenate([xp.ones((1, block_q, block_k), xp.int8), seen])
        count, past = len(seen), key_tiles * block_k - self.keys
        cut = [seen * (np.arange(block_k) < block_k - past)] if past else []
        bank = xp.concatenate([xp.zeros_like(seen[:1]), seen, *cut]).astype(xp.int8)

        def order(key: Any, *arrays: Any) -> list[Any]:
            by_key = xp.argsort(key, axis=-1, stable=True)
            return [xp.take_along_axis(x, by_key, -1) for x in arrays]

        is_tile = (columns >= 0) & (columns < key_tiles)
        column, code = xp.where(is_tile, columns, key_tiles), 2 + xp.clip(partly, -1, count - 2)
        column, code = order(column, column, code)
        is_new = xp.concatenate([xp.ones_like(is_tile[..., :1]), column[..., 1:] != column[..., :-1]], -1)
        is_tile = (column < key_tiles) & is_new
        is_cut = (column == key_tiles - 1) & (past > 0)
        is_full = is_tile & (code == 1) & ~is_cut
        code = xp.where(is_tile, code + count * is_cut, 0)
        row = xp.broadcast_to(xp.arange(tiles)[:, None], code.shape)

        # Full ones first; what is no tile comes last, and in a row of its own one that is not looked at.
        by_column = xp.where(is_tile, column + key_tiles * ~is_full, 2 * key_tiles)
        listed = order(by_column, row, xp.where(is_tile, column, 0), code, is_full)
        by_query = _flagged(xp, *(x.reshape(len(x), -1) for x in listed))
        by_row = xp.where(is_tile, 2 * column + ~is_full, 2 * key_tiles)
        flat = [x.reshape(len(x), -1) for x in (row, by_row, code, is_full)]
        nothing = xp.zeros((len(code), key_tiles), xp.int32)
        more = [nothing, nothing + 2 * xp.arange(key_tiles) + 1, nothing, nothing > 0]
        row, by_row, code, is_full = (xp.concatenate(pair, -1) for pair in zip(flat, more))
        row, by_row, code, is_full = order(by_row, row, by_row, code, is_full)
        by_key = _flagged(xp, xp.minimum(by_row // 2, key_tiles - 1), row, code, is_full)
        heads = self.columns.shape[1]
        return Tiling(None, None, None, by_query, by_key, block_q, block_k, bank=bank, heads=heads)


Pattern = Intervals | Boxes | SortedIntervals | AllPairs | BlockLists


def lists_of(visited: np.ndarray, full: np.ndarray) -> tuple[Visits, Visits]:
    """bool [query tiles, key tiles], in which some query sees some key, and all see all -> (by_query, by_key)."""
    return _list_visits(visited, full), _list_visits(visited.T, full.T)


def _list_visits(visited: np.ndarray, full: np.ndarray) -> Visits:
    """bool [rows, columns], twice -> the pairs of visited row by row."""
    listed = visited.copy()
    listed[~visited.any(axis=1), 0] = True
    rows, columns = np.nonzero(listed)
    flags = ACTIVE * visited[rows, columns] + FULL * full[rows, columns]
    flags += FIRST * (np.diff(rows, prepend=-1) != 0) + LAST * (np.diff(rows, append=-1) != 0)
    return Visits(*(x.astype(np.int32)[None] for x in (rows, columns, flags)))


def _flagged(xp: Any, rows: Any, columns: Any, tiles: Any, is_full: Any) -> Visits:
    """Pairs row by row, [lists, steps], with what is seen of each: a tile of the bank, of which 0 is not looked at."""
    edge, change = xp.ones_like(rows[:, :1], dtype=bool), rows[:, 1:] != rows[:, :-1]
    first, last = xp.concatenate([edge, change], 1), xp.concatenate([change, edge], 1)
    flags = FIRST * first + LAST * last + ACTIVE * (tiles > 0) + FULL * is_full + (tiles << BANK_BIT)
    return Visits(*(x.astype(xp.int32) for x in (rows, columns, flags)))


def _list_ranges(first: Array, counts: Array, steps: int) -> Visits:
    """The pairs of each row with `counts` columns from `first` on; int [B, rows] -> lists of this many steps."""

    def one(first: Array, counts: Array) -> tuple[Array, Array, Array]:
        taken = jnp.maximum(counts, 1)
        end = jnp.cumsum(taken)
        step = jnp.arange(steps)
        row = jnp.minimum(jnp.searchsorted(end, step, side="right"), len(end) - 1)
        index = jnp.minimum(step, end[-1] - 1) - (end[row] - taken[row])
        real = step < end[-1]
        flags = jnp.where(real & (counts[row] > 0), ACTIVE, 0)
        flags |= jnp.where(real & (index == 0), FIRST, 0) | jnp.where(step == end[row] - 1, LAST, 0)
        return row, first[row] + index, flags

    return Visits(*(x.astype(jnp.int32) for x in jax.vmap(one)(first, counts)))


def _cut(starts: Any, ends: Any, keys: int) -> tuple[np.ndarray, np.ndarray]:
    """Bounds of keys that there are."""
    return np.maximum(np.asarray(starts), 0), np.minimum(np.asarray(ends), keys)


def _count_pairs(bounds: Bounds, queries: int, keys: int, sinks: int, block_q: int, block_k: int) -> np.ndarray:
    """Steps of each query tile, int [query tiles]: of the key tiles from its first query's start to its last one's end,
    and of those of the sinks before them."""
    first_query = np.arange(0, queries, block_q)
    last_query = np.minimum(first_query + block_q, queries) - 1
    start, end = _cut(bounds(first_query)[0], bounds(last_query)[1], keys)
    sees = start < end
    first = start // block_k
    window = np.where(sees, -(-end // block_k) - first, 0)
    # The sinks end no later than the window.
    sink = -(-np.clip(end, 0, sinks) // block_k)
    return np.maximum(window + np.where(sees, np.minimum(sink, first), sink), 1)


def _visited(
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


def _diagonals(starts: np.ndarray, ends: np.ndarray, num_keys: int, block_k: int) -> tuple[int, int] | None:
    """Tiling.diagonals of these intervals, or None if they are no band."""
    query = np.arange(len(starts))
    cut_starts, cut_ends = starts == 0, ends == num_keys
    offset = -len(starts) if cut_starts.all() else int((starts - query)[~cut_starts][0])
    end = num_keys if cut_ends.all() else int((ends - query)[~cut_ends][0])
    seen_past_the_end = num_keys % block_k and query[-1] + end > num_keys
    is_band = np.array_equal(starts, np.maximum(query + offset, 0)) and np.array_equal(
        ends, np.minimum(query + end, num_keys)
    )
    return (offset, end - offset) if is_band and end > offset and not seen_past_the_end else None


def _by_tile(x: np.ndarray, tile: Sequence[int]) -> np.ndarray:
    """[*space] -> [tokens], tile by tile."""
    split = x.reshape([n for side, step in zip(x.shape, tile) for n in (side // step, step)])
    return split.transpose(*range(0, split.ndim, 2), *range(1, split.ndim, 2)).ravel()
