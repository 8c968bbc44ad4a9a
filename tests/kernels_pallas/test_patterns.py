"""Patterns: their lists of pairs of tiles, and how many there are, by brute force."""

import ast
import functools
import itertools
import math
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from attnlab.attention import masks
from kernels_pallas import patterns
from kernels_pallas.patterns import (
    ACTIVE,
    BANK_BIT,
    FIRST,
    FULL,
    LAST,
    AllPairs,
    BlockLists,
    Boxes,
    Intervals,
    SortedIntervals,
)


def intervals(starts, ends, num_keys, sinks=0):
    return Intervals(lambda query: (starts[query], ends[query]), len(starts), num_keys, sinks)


def listed(visits, rows):
    """{pair that is looked at: whether it is full}; every row is there, begins once and ends once."""
    first, last, active, full = ((visits.flags[0] & bit) != 0 for bit in (FIRST, LAST, ACTIVE, FULL))
    assert np.all(np.diff(visits.rows[0], prepend=-1) == first)
    assert np.all(np.diff(visits.rows[0], append=rows) == last)
    assert np.all(active | first & last)
    pairs = zip(visits.rows[0].tolist(), visits.columns[0].tolist(), strict=True)
    return {pair: bool(whole) for pair, looked, whole in zip(pairs, active, full, strict=True) if looked}


def seen_tiles(sees, block_q, block_k):
    """{pair of tiles in which a query sees a key: whether all see all}, of the dense mask."""
    rows, columns = (range(0, side, block) for side, block in zip(sees.shape, (block_q, block_k)))
    cut = {
        (i // block_q, j // block_k): sees[i : i + block_q, j : j + block_k]
        for i, j in itertools.product(rows, columns)
    }
    # The padding beyond the last key is not to be seen.
    return {pair: bool(tile.all() and tile.shape[1] == block_k) for pair, tile in cut.items() if tile.any()}


def tiles_of(count, block):
    return -(-count // block)


BLOCKS = st.tuples(st.sampled_from([1, 4, 7]), st.sampled_from([1, 3, 8]))


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_visits_are_exact(data):
    """Against the dense mask: a tile is visited iff a query sees a key of it, and called full iff all see all."""
    num_queries, num_keys = data.draw(st.integers(1, 30)), data.draw(st.integers(1, 30))
    block_q, block_k = data.draw(BLOCKS)
    sinks = data.draw(st.integers(0, 12))
    interval = st.tuples(st.integers(-3, num_keys + 3), st.integers(-3, num_keys + 3))
    starts, ends = np.array(data.draw(st.lists(interval, min_size=num_queries, max_size=num_queries))).T
    keys = np.arange(num_keys)
    sees = (keys < ends[:, None]) & ((keys >= starts[:, None]) | (keys < sinks))

    tiling = intervals(starts, ends, num_keys, sinks).tiled(block_q, block_k)
    expected = seen_tiles(sees, block_q, block_k)
    assert listed(tiling.by_query, tiles_of(num_queries, block_q)) == expected
    assert listed(tiling.by_key, tiles_of(num_keys, block_k)) == {(j, i): full for (i, j), full in expected.items()}


@settings(max_examples=100, deadline=None)
@given(st.data())
def test_no_list_is_longer_than_num_pairs(data):
    """Which is exact where the windows of queries touch each other; queries may see nothing, and whole tiles too."""
    num_queries, num_keys = data.draw(st.integers(1, 30)), data.draw(st.integers(1, 30))
    block_q, block_k = data.draw(BLOCKS)
    sinks = data.draw(st.integers(0, 12))
    bound = st.lists(st.integers(-3, num_keys + 3), min_size=num_queries, max_size=num_queries)
    starts, ends = (np.sort(data.draw(bound)) for _ in range(2))
    if touching := data.draw(st.booleans()):
        ends = ends.clip(1, num_keys)
        starts = np.minimum(starts, np.minimum(ends - 1, np.concatenate([ends[:1], ends[:-1]])))
    pattern = intervals(starts, ends, num_keys, sinks)
    steps = pattern.tiled(block_q, block_k).by_query.rows.size
    most = pattern.num_pairs(block_q, block_k)
    assert steps == most if touching else steps <= most


def test_tiles_that_see_nothing_take_a_step_each():
    none = np.zeros(20, int)
    pattern = intervals(none, none, 30)
    assert pattern.num_pairs(4, 8) == pattern.tiled(4, 8).by_query.rows.size == 5


def test_num_pairs_asks_for_the_bounds_of_two_queries_of_a_tile():
    asked = []

    def bounds(query):
        asked.append(query.size)
        return query - 1023, query + 1

    assert Intervals(bounds, 2**22, 2**22).num_pairs(512, 512) == 3 * 2**13 - 3
    assert asked == [2**13, 2**13]


def test_visits_grow_with_the_window_not_the_length():
    pattern = Intervals(lambda query: (query - 1023, query + 1), 2**16, 2**16)
    assert pattern.blocks((512, 512)) == (512, 512)
    assert pattern.tiled(512, 512).by_query.rows.shape == (1, 3 * 128 - 3)


@given(
    lengths=st.tuples(st.integers(1, 300), st.integers(1, 300)),
    offset=st.integers(-320, 320),
    width=st.integers(1, 320),
    shifted=st.none() | st.integers(0, 299),
)
def test_a_band_is_recognised_and_nothing_else(lengths, offset, width, shifted):
    queries, keys = lengths
    starts = np.maximum(np.arange(queries) + offset, 0)
    ends = np.minimum(np.arange(queries) + offset + width, keys)
    if shifted is not None:
        starts[shifted % queries] += 1
    found = intervals(starts, ends, keys).tiled(128, 128).diagonals
    tiled = np.arange(-(-keys // 128) * 128)  # the kernel's keys, with padding
    sees = (starts[:, None] <= tiled) & (tiled < ends[:, None])
    if found is None:
        past_the_end = keys % 128 != 0 and queries - 1 + offset + width > keys
        assert shifted is not None or past_the_end or not sees.any() or (ends <= starts).any()
    else:
        first = (np.arange(queries) + found[0])[:, None]
        assert np.array_equal(sees, (first <= tiled) & (tiled < first + found[1]))


def box_axis(side, before, after):
    return lambda query: (np.maximum(query - before, 0), np.minimum(query + after, side)), side


@pytest.mark.parametrize(
    ("sides", "tile", "reach"), [((8, 6), (4, 2), (2, 3)), ((4, 6, 4), (2, 3, 4), (1, 2)), ((9,), (3,), (0, 0))]
)
def test_boxes_are_products_of_intervals(sides, tile, reach):
    """Tokens ordered tile by tile: the pairs of tiles of a space are those of its axes, each with each."""
    pattern = Boxes([box_axis(side, *reach) for side in sides], tile)
    block, tokens = int(np.prod(tile)), int(np.prod(sides))
    assert pattern.blocks((512, 512)) == (block, block)
    tiling = pattern.tiled(block, block)
    assert (tiling.block_q, tiling.block_k) == (block, block)
    positions = tiling.coordinates[0]
    grid = [side // step for side, step in zip(sides, tile)]
    tile_of = [position // step for position, step in zip(positions, tile)]
    assert np.array_equal(np.ravel_multi_index(tile_of, grid), np.arange(tokens) // block)
    assert len({tuple(position) for position in positions.T.tolist()}) == tokens
    sees = np.ones((tokens, tokens), bool)
    for position, starts, ends in zip(positions, tiling.starts[0], tiling.ends[0]):
        assert np.array_equal(starts, np.maximum(position - reach[0], 0))
        sees &= (position >= starts[:, None]) & (position < ends[:, None])
    assert listed(tiling.by_query, tokens // block) == seen_tiles(sees, block, block)
    assert tiling.by_query.rows.size == pattern.num_pairs(block, block)


@pytest.mark.parametrize(
    ("queries", "keys", "reach", "block"),
    [(30, 30, 5, 4), (9, 40, 3, 8), pytest.param(50, 20, 20, 8, marks=pytest.mark.slow)],
)
@pytest.mark.long
def test_lists_of_sorted_intervals_have_all_that_is_seen(queries, keys, reach, block):
    rng = np.random.default_rng(queries)
    starts = np.sort(rng.integers(0, keys, (3, queries)), axis=1)
    ends = np.minimum(np.maximum.accumulate(starts + rng.integers(0, reach + 1, starts.shape), axis=1), keys)
    ends = np.minimum(ends, starts + reach)
    ends[2] = starts[2]  # a row that sees nothing
    pattern = SortedIntervals(jnp.asarray(starts), jnp.asarray(ends), keys, reach=reach, block=block)
    assert pattern.blocks((512, 512)) == (block, block)
    tiling = jax.jit(lambda: pattern.tiled(block, block).by_query)(), pattern.tiled(block, block).by_key
    counts = tiles_of(queries, block), tiles_of(keys, block)
    for visits, rows, is_transposed in zip(tiling, counts, (False, True)):
        assert visits.rows.size == pattern.num_pairs(block, block)
        for batch in range(3):
            one = patterns.Visits(*(np.asarray(x)[batch] for x in visits))
            first, last, active = ((one.flags & bit) != 0 for bit in (FIRST, LAST, ACTIVE))
            assert one.rows[first].tolist() == one.rows[last].tolist() == list(range(rows))
            assert np.all(np.flatnonzero(first) <= np.flatnonzero(last))
            assert not np.any(active[np.flatnonzero(last)[-1] + 1 :])  # what is left of the list does nothing
            assert np.all(np.diff(one.rows) >= 0)
            pairs = set(zip(one.rows[active].tolist(), one.columns[active].tolist(), strict=True))
            key = np.arange(keys)
            sees = (starts[batch][:, None] <= key) & (key < ends[batch][:, None])
            assert pairs >= set(seen_tiles(sees.T if is_transposed else sees, block, block))


def test_num_pairs_of_computed_bounds_reads_shapes_alone():
    numbers = jax.ShapeDtypeStruct((3, 300), jnp.int32)
    assert SortedIntervals(numbers, numbers, 300, reach=40, block=128).num_pairs(128, 128) == 3 * (2 * 3 + 3 * 3)
    assert AllPairs(numbers, numbers, numbers, block=128).num_pairs(128, 128) == 9


def test_all_pairs_are_looked_at():
    numbers = jnp.zeros((2, 300), int)
    pattern = AllPairs(numbers, numbers, jnp.zeros((2, 200), int), block=128)
    tiling = pattern.tiled(*pattern.blocks((512, 512)))
    assert listed(tiling.by_query, 3) == dict.fromkeys(itertools.product(range(3), range(2)), False)
    assert tiling.by_query.rows.size == pattern.num_pairs(128, 128)
    assert pattern.has_coordinates
    assert tiling.coordinates.shape == (2, 1, 200)


def draw_lists(data, rows, heads):
    """(sizes, columns, partly, bank) with places of no tile and tiles that are listed twice."""
    queries, keys = data.draw(st.integers(1, 30)), data.draw(st.integers(1, 30))
    block_q, block_k = data.draw(BLOCKS)
    tiles, key_tiles = tiles_of(queries, block_q), tiles_of(keys, block_k)
    rng = np.random.default_rng(data.draw(st.integers(0, 99)))
    shape, count = (rows, heads, tiles, data.draw(st.integers(1, 5))), data.draw(st.integers(0, 3))
    columns, partly = rng.integers(-2, key_tiles + 2, shape), rng.integers(-1, count, shape)
    return (queries, keys, block_q, block_k), columns, partly, rng.random((count, block_q, block_k)) < 0.5


def seen_by_lists(sizes, columns, partly, bank):
    """bool [whole tiles of queries, whole tiles of keys] of one row and head, by the definition."""
    queries, keys, block_q, block_k = sizes
    sees = np.zeros((tiles_of(queries, block_q) * block_q, tiles_of(keys, block_k) * block_k), bool)
    for tile in range(len(columns)):
        for column in set(range(tiles_of(keys, block_k))) & set(columns[tile].tolist()):
            number = partly[tile, columns[tile].tolist().index(column)]
            part = slice(block_q * tile, block_q * (tile + 1)), slice(block_k * column, block_k * (column + 1))
            sees[part] = number < 0 or bank[number]
    sees[:, keys:] = False
    return sees


@pytest.mark.parametrize("is_traced", [False, pytest.param(True, marks=pytest.mark.slow)])
@settings(max_examples=30, deadline=None)
@given(st.data())
def test_lists_of_tiles_hold_what_is_given(is_traced, data):
    """Each pair once, full ones first in a row, and no more than what it sees of the bank."""
    sizes, columns, partly, bank = draw_lists(data, 2, 3)
    queries, keys, block_q, block_k = sizes

    def build(*arrays):
        tiling = BlockLists(*arrays, queries, keys).tiled(block_q, block_k)
        return tiling.by_query, tiling.by_key, tiling.bank

    by_query, by_key, tiles = jax.tree.map(np.asarray, (jax.jit(build) if is_traced else build)(columns, partly, bank))
    assert tiles.dtype == np.int8
    for number, place in enumerate(np.ndindex(2, 3)):
        sees = seen_by_lists(sizes, columns[place], partly[place], bank)
        of_keys = sees.T.reshape(-1, block_k, sees.shape[0]), tiles.swapaxes(1, 2)
        of_queries = sees.reshape(-1, block_q, sees.shape[1]), tiles
        for visits, (rows, seen) in ((by_query, of_queries), (by_key, of_keys)):
            row, column, flags = (x[number] for x in visits)
            first, last, active, full = ((flags & bit) != 0 for bit in (FIRST, LAST, ACTIVE, FULL))
            assert row[first].tolist() == row[last].tolist() == list(range(len(rows)))
            assert np.all(active[first] | (np.bincount(row[active], minlength=len(rows)) == 0))
            assert np.all(np.diff(row[active] * 2 + ~full[active]) >= 0)
            assert len({*zip(row[active].tolist(), column[active].tolist())}) == active.sum()
            got = np.zeros_like(rows)
            width = seen.shape[2]
            for i, j, flag in zip(row[active], column[active], flags[active]):
                got[i, :, width * j : width * (j + 1)] = seen[flag >> BANK_BIT]
                assert got[i, :, width * j : width * (j + 1)].all() or not flag & FULL
            assert np.array_equal(got, rows)


@settings(max_examples=20, deadline=None)
@given(st.data())
@pytest.mark.long
def test_a_predicate_s_lists_are_its_pairs(data):
    queries, keys = data.draw(st.integers(1, 30)), data.draw(st.integers(1, 30))
    block_q, block_k = data.draw(st.sampled_from([(4, 3), (7, 8)]))
    mask = data.draw(st.sampled_from([masks.causal(), masks.blocks(6, shift=1), masks.power_blocks(3)]))
    pattern = BlockLists.of(lambda query, key: mask.sees((query,), (key,)), queries, keys, block_q, block_k)
    assert pattern.blocks((512, 512)) == (block_q, block_k)
    sees = np.asarray(masks.dense_mask(mask, (queries,), (keys,)))
    [columns], [partly] = pattern.columns[0], pattern.partly[0]
    given = seen_by_lists((queries, keys, block_q, block_k), columns, partly, pattern.bank)[:queries]
    assert np.array_equal(given[:, :keys], sees)
    visited = {(i, j) for i, row in enumerate(columns.tolist()) for j in row if j >= 0}
    assert visited == set(seen_tiles(sees, block_q, block_k))
    assert len({tile.tobytes() for tile in pattern.bank}) == len(pattern.bank)


def test_a_long_band_has_a_small_bank_and_is_asked_for_tile_by_tile():
    asked = set()

    def sees(query, key):
        asked.add((query.size, key.size))
        return (key <= query) & (key > query - 300)

    pattern = BlockLists.of(sees, 4096, 4096, 128, 128)
    assert asked == {(128, 128)}
    assert pattern.columns.shape == (1, 1, 32, 4)
    assert pattern.bank.shape == (3, 128, 128)
    assert pattern.tiled(128, 128).by_query.rows.shape == (1, pattern.num_pairs(128, 128))


def test_patterns_belong_to_no_backend():
    tree = ast.parse(Path(patterns.__file__).read_text())
    names = {alias.name for node in ast.walk(tree) if isinstance(node, ast.Import) for alias in node.names}
    modules = {node.module for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)}
    assert names == {"dataclasses", "math", "jax", "jax.numpy", "numpy"}
    assert modules == {"collections.abc", "typing"}


@pytest.mark.parametrize(
    ("shape", "window", "stride", "tile", "mean", "bound"),
    [
        ((32768,), (2048,), (1,), (128,), 16.94, 15.1),
        ((32768,), (2048,), (256,), (128,), 16, 16),
        ((256, 256), (80, 80), (1, 1), (16, 8), 68.1, 7.5),
        ((256, 256), (80, 80), (16, 16), (16, 8), 50, 10.24),
        ((30, 48, 80), (18, 24, 24), (1, 1, 1), (2, 8, 8), None, 5.4),
        ((30, 48, 80), (18, 24, 24), (16, 8, 8), (2, 8, 8), None, 11.1),
    ],
)
def test_windows_visit_the_tiles_of_generalized_neighborhood_attention(shape, window, stride, tile, mean, bound):
    """Key tiles per query tile, and how many times fewer than all that is (Hassani et al. 2025)."""
    axes = [
        (functools.partial(masks.window_bounds, length=length, window=k, stride=s), length)
        for length, k, s in zip(shape, window, stride, strict=True)
    ]
    block = math.prod(tile)
    pairs = len(Boxes(axes, tile).tiled(block, block).by_query.rows[0])
    tiles = math.prod(shape) // block
    assert tiles**2 / pairs == pytest.approx(bound, abs=0.06)
    if mean is not None:
        assert pairs / tiles == pytest.approx(mean, abs=0.06)
