"""Which keys the queries see, and the lists of pairs of tiles that kernels go through. On the host; of no backend."""

import dataclasses
import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

Array = jax.Array

# What a step does, as bits.
FIRST, LAST, ACTIVE, FULL = (np.int32(2**bit) for bit in range(4))
HEAD_BIT = np.int32(4)  # and above it the query head, among those of its key head


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
        flags = jnp.where(real & (counts[row] > 0), ACTIVE, 0)
        flags |= jnp.where(real & (place == 0), FIRST, 0) | jnp.where(step == end[row] - 1, LAST, 0)
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
    flags = ACTIVE * visited[rows, columns] + FULL * full[rows, columns]
    flags += FIRST * (np.diff(rows, prepend=-1) != 0) + LAST * (np.diff(rows, append=-1) != 0)
    return Visits(*(x.astype(np.int32)[None] for x in (rows, columns, flags)))


def for_every_head(visits: Visits, group: int) -> Visits:
    """A list's rows, each gone through once for every query head of a key head."""
    if group == 1:
        return visits
    (rows, columns, flags) = (np.asarray(x) for x in visits)
    first, last = (flags & flag != 0 for flag in (FIRST, LAST))
    parts: list[list[np.ndarray]] = []
    for numbers in zip(rows, columns, flags, first, last, strict=True):
        row, column, flag, begins, ends = numbers
        order, heads = [], []
        for a, b in zip(np.flatnonzero(begins), np.flatnonzero(ends), strict=True):
            order.append(np.tile(np.arange(a, b + 1), group))
            heads.append(np.repeat(np.arange(group), b + 1 - a))
        steps, head = np.concatenate(order), np.concatenate(heads)
        bits = flag[steps] & ~(FIRST | LAST)
        bits |= np.where(begins[steps] & (head == 0), FIRST, 0)
        bits |= np.where(ends[steps] & (head == group - 1), LAST, 0)
        parts.append([row[steps], column[steps], bits | head << HEAD_BIT])
    return Visits(*(np.stack(part).astype(np.int32) for part in zip(*parts, strict=True)))
