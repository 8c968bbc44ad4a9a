"""What the TPU's banded kernels share: which parts of a pair of tiles are computed, by brute force."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kernels_pallas.patterns import ACTIVE, FIRST, FULL, LAST, AllPairs, Boxes, Intervals
from kernels_pallas.tpu import banded_flash, banded_flash_backward
from kernels_pallas.tpu.band import Band, SumsCall, bodies_of, body_of, one_after_other, query_slots

BLOCK = 256


def window(length, before, after=0, sinks=0):
    return Intervals(lambda query: (query - before, query + 1 + after), length, length, sinks)


def drawn(seed):
    """Bounds that grow, some intervals empty, more keys than queries, neither whole tiles."""
    rng = np.random.default_rng(seed)
    starts, lengths = np.sort(rng.integers(0, 900, 900)), rng.integers(-100, 500, 900)
    ends = np.maximum.accumulate(starts + lengths)
    return Intervals(lambda query: (starts[query], ends[query]), 900, 1100, sinks=seed)


def dense(pattern):
    query, key = np.arange(pattern.queries), np.arange(pattern.keys)
    starts, ends = (x[:, None] for x in pattern.bounds(query))
    return (starts <= key) & (key < ends) | (key < np.minimum(pattern.sinks, ends))


@pytest.mark.parametrize("segments", [False, True])
@pytest.mark.parametrize(
    "pattern",
    [window(1024, 255), window(1000, 511), window(1100, 299, 77), window(900, 900), window(1300, 400, sinks=5)]
    + [drawn(seed) for seed in range(4)],
)
def test_pieces_have_all_that_is_seen_and_hide_all_that_is_not(pattern, segments):
    bodies, by_query, by_key = bodies_of(pattern.tiled(BLOCK, BLOCK), segments=segments)
    sees = dense(pattern)
    computed = np.zeros_like(sees)
    numbers = {}
    for row, column, flags in zip(*(x[0].tolist() for x in by_query), strict=True):
        if flags & ACTIVE:
            numbers[row, column] = number = int(body_of(flags))
            for queries, keys, cells in bodies[number]:
                tile = (slice(row * BLOCK, (row + 1) * BLOCK), slice(column * BLOCK, (column + 1) * BLOCK))
                part, of_sees = computed[tile][queries, keys], sees[tile][queries, keys]
                assert not part.any()
                part[...] = True
                cell = np.repeat(
                    np.repeat(cells, 128, 0), 128, 1
                )  # 0: no query sees a key, 1: some may, 2: all see all
                assert not (segments and (cell == 2).any())
                of_cells = cell[tuple(map(slice, of_sees.shape))]
                assert of_sees[of_cells == 2].all()
                assert not of_sees[of_cells == 0].any()
                assert not (cell[:, of_sees.shape[1] :] == 2).any()  # the padding is hidden
    assert computed[sees].all()
    pairs = zip(*(x[0].tolist() for x in by_key), strict=True)
    assert {(row, column): int(body_of(flags)) for column, row, flags in pairs if flags & ACTIVE} == numbers


def test_cells_are_masked_where_a_window_begins_and_ends_alone():
    bodies, *_ = bodies_of(window(4096, 4 * BLOCK - 1).tiled(2 * BLOCK, 2 * BLOCK))
    counts = [np.bincount(np.concatenate([np.ravel(piece.cells) for piece in body])).tolist() for body in bodies]
    # Of the 16 cells of a tile at an edge 4 are in quarters that are left out, and 2 more are hidden.
    assert sorted(counts) == [[0, 0, 16], [2, 4, 6], [2, 4, 6]]


@pytest.mark.parametrize("pattern", [window(1500, 511), window(1100, 299, 77), window(900, 900), drawn(1)])
def test_a_row_begins_with_the_column_that_the_row_before_ended_with(pattern):
    tiling = pattern.tiled(BLOCK, BLOCK)
    for lists in (tiling.by_query, tiling.by_key):
        edges = int(FIRST | LAST)
        before, after = (
            [list(map(int, step)) for step in zip(*(x[0] for x in v))] for v in (lists, one_after_other(lists))
        )
        same = (sorted((row, column, flags & ~edges) for row, column, flags in steps) for steps in (before, after))
        assert next(same) == next(same)
        last = None
        for _, steps in itertools.groupby(after, lambda step: step[0]):
            _, columns, flags = zip(*steps)
            assert last not in columns[1:]
            assert [bool(x & FIRST) for x in flags] == [True] + [False] * (len(flags) - 1)
            assert [bool(x & LAST) for x in flags] == [False] * (len(flags) - 1) + [True]
            last = columns[-1]


def test_a_causal_window_of_whole_tiles_computes_three_quarters_of_its_edges():
    bodies, by_query, _ = bodies_of(window(4096, 2 * BLOCK - 1).tiled(BLOCK, BLOCK))
    runs = np.bincount(body_of(by_query.flags[0]))
    areas = [sum((q.stop - q.start) * (k.stop - k.start) for q, k, _ in body) / BLOCK**2 for body in bodies]
    assert sorted(zip(runs.tolist(), areas)) == [(14, 0.75), (15, 1), (16, 0.75)]


@pytest.mark.parametrize(
    "pattern",
    [
        AllPairs(*[np.zeros((1, 600), int)] * 2, np.zeros((1, 600), int), block=BLOCK),
        Boxes([(lambda query: (query - 12, query + 13), 32)] * 2, (16, 16)),
    ],
)
def test_pairs_of_keys_with_coordinates_are_computed_whole(pattern):
    bodies, *lists = bodies_of(pattern.tiled(*pattern.blocks((0, 0))))
    whole = slice(0, BLOCK)
    assert bodies == [((whole, whole, ((seen,) * 2,) * 2),) for seen in (2, 1)]
    for visits in lists:
        assert np.array_equal(body_of(visits.flags) == 0, visits.flags & FULL != 0)


@pytest.mark.parametrize("module", [banded_flash, banded_flash_backward])
@pytest.mark.parametrize(
    ("heads", "key_heads", "expected"),
    [(1, 1, 1), (3, 3, 3), (4, 1, 4), (8, 1, 4), (6, 2, 3), (6, 3, 2), (5, 5, 1), (32, 8, 4), (12, 4, 3)],
)
def test_a_step_has_heads_of_one_key_head_or_all_of_several(module, heads, key_heads, expected):
    query, key = (jax.ShapeDtypeStruct((1, 256, n, 64), jnp.bfloat16) for n in (heads, key_heads))
    assert module.heads_of_a_step(query, key, key, pattern=window(256, 9)) == expected


def test_a_step_has_fewer_heads_where_vmem_does_not_hold_more():
    query = jax.ShapeDtypeStruct((1, 4096, 8, 512), jnp.float32)
    for module in (banded_flash, banded_flash_backward):
        heads = module.heads_of_a_step(query, query, query, pattern=window(4096, 99))
        assert heads < 4
        sizes = module.default_blocks(query, query, query), (512, 512)
        more = {"heads": 2 * heads, "key_heads": 2 * heads}
        fits = [module.vmem_bytes(*sizes[0], *sizes[1], jnp.float32, **n) <= 2**24 for n in ({}, more)]
        assert fits == [True, False]


@pytest.mark.parametrize(
    "pattern", [window(1024, 255), window(1100, 299, 77), window(900, 900), window(1300, 400, sinks=5)]
)
def test_sums_of_queries_have_a_place_of_their_own_until_they_are_written(pattern):
    tiling = pattern.tiled(BLOCK, BLOCK)
    tiles = -(-pattern.queries // BLOCK)
    arrays = [jax.ShapeDtypeStruct((1, pattern.queries, 2, 8), jnp.float32)] * 3
    visits = SumsCall(Band(*arrays, tiling), heads=2).visits
    held, done = {}, []
    for column, flags, written in zip(*(x[0].tolist() for x in visits[1:]), strict=True):
        if not flags & ACTIVE:
            continue
        slot = flags >> 7
        assert held.setdefault(slot, column) == column
        assert slot < query_slots(tiling, tiles)
        if flags & 64:
            assert written == held.pop(slot)
            done.append(column)
    assert sorted(done) == list(range(tiles))
    assert not held
    # A block of the result is in VMEM once, until its tile is whole.
    assert [tile for tile, _ in itertools.groupby(visits.written[0])] == done


def test_without_a_key_for_some_queries_there_is_no_place():
    nobody = Intervals(lambda query: (query, query + (query < 500)), 1024, 1024)
    assert query_slots(nobody.tiled(BLOCK, BLOCK), 4) == 0
    assert [query_slots(window(1024, before).tiled(BLOCK, BLOCK), 4) for before in (0, 255, 511, 1023)] == [1, 1, 2, 3]
