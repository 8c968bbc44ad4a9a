"""The window arithmetic against its definition by brute force; masks, block maps and pictures from one definition."""

import itertools
import os
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from attnlab.attention import masks

SETTINGS = [
    {"length": length, "window": window, "stride": stride, "dilation": dilation, "is_causal": is_causal, "edge": edge}
    for length in range(1, 14)
    for dilation in (1, 2, 3)
    for window in range(1, length // dilation + 1)
    for stride in range(1, window + 1)
    for is_causal in (False, True)
    for edge in ("shift", "clip")
]


def keys_seen(length, **settings):
    mask = masks.neighborhood((length,), **settings)
    return [sorted(np.flatnonzero(row)) for row in np.asarray(masks.dense_mask(mask, (length,)))]


def test_window_equals_its_definition_on_every_small_setting(window_by_definition):
    for settings in SETTINGS:
        axis = masks.AxisWindow(**settings)
        token = np.arange(axis.length)
        sees = axis.sees(token[:, None], token[None, :])
        for query in range(axis.length):
            assert set(np.flatnonzero(sees[query])) == window_by_definition(query, **settings), (settings, query)


def test_every_query_sees_itself_and_if_not_causal_exactly_the_window():
    for settings in SETTINGS:
        axis = masks.AxisWindow(**settings)
        token = np.arange(axis.length)
        sees = axis.sees(token[:, None], token[None, :])
        assert sees.diagonal().all(), settings
        if settings["edge"] == "shift" and not settings["is_causal"]:
            assert (sees.sum(1) == settings["window"]).all(), settings


def test_bounds_grow_with_the_query():
    for settings in SETTINGS:
        if settings["dilation"] > 1:
            continue  # it works inside a residue group
        length = settings["length"]
        options = {name: settings[name] for name in ("window", "stride", "is_causal", "edge")}
        token = np.arange(length)
        start, end = masks.window_bounds(token, length, **options)
        assert (np.diff(start) >= 0).all(), settings
        assert (np.diff(end) >= 0).all(), settings


def test_bounds_of_traced_indices_equal_those_of_python_integers():
    axis = masks.AxisWindow(length=23, window=6, stride=4, dilation=2)
    traced = jax.jit(jax.vmap(axis.bounds))(jnp.arange(23))
    assert [(int(start), int(end)) for start, end in zip(*traced)] == [axis.bounds(query) for query in range(23)]


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({"length": 10, "window": 5, "stride": 2}, [(0, 4)] * 2 + [(1, 5)] * 2 + [(3, 7)] * 2 + [(5, 9)] * 4),
        ({"length": 11, "window": 4, "stride": 4}, [(0, 3)] * 4 + [(4, 7)] * 4 + [(7, 10)] * 3),
        (
            {"length": 10, "window": 4, "stride": 3, "is_causal": True},
            [(0, 0), (0, 1), (0, 2), (2, 3), (2, 4), (2, 5), (5, 6), (5, 7), (5, 8), (6, 9)],
        ),
    ],
    ids=["strided", "blocks", "causal"],
)
def test_worked_windows(settings, expected):
    assert [(seen[0], seen[-1]) for seen in keys_seen(**settings)] == expected


@pytest.mark.long
def test_stride_equal_to_the_window_is_attention_in_blocks():
    block = np.arange(12) // 4
    mask = masks.dense_mask(masks.neighborhood((12,), 4, stride=4), (12,))
    np.testing.assert_array_equal(mask, block[:, None] == block)


def test_clipped_blocks_with_halo_are_halonet():
    """Block b sees its own tokens and `halo` more on either side, cut off at the border."""
    block, halo, length = 4, 2, 14
    mask = masks.dense_mask(masks.neighborhood((length,), block + 2 * halo, stride=block, edge="clip"), (length,))
    first = np.arange(length) // block * block
    key = np.arange(length)
    np.testing.assert_array_equal(mask, (key >= first[:, None] - halo) & (key < first[:, None] + block + halo))


@pytest.mark.long
def test_axes_combine_by_and():
    settings = {"stride": (1, 2), "is_causal": (True, False)}
    mask = masks.dense_mask(masks.neighborhood((5, 6), (3, 4), **settings), (5, 6))
    rows = masks.dense_mask(masks.neighborhood((5,), 3, is_causal=True), (5,))
    columns = masks.dense_mask(masks.neighborhood((6,), 4, stride=2), (6,))
    np.testing.assert_array_equal(mask, np.kron(rows, columns).astype(bool))


def test_masks_combine_by_and_and_or():
    mask = masks.dense_mask(masks.neighborhood((9,), 3, is_causal=True) | (masks.causal() & masks.first_keys(2)), (9,))
    for query, key in itertools.product(range(9), range(9)):
        assert bool(mask[query, key]) == (query - 3 < key <= query or (key < 2 and key <= query))


@pytest.mark.parametrize(
    ("shape", "tile", "settings"),
    [
        ((37,), (8,), {"window": 9}),
        ((37,), (8,), {"window": 16, "stride": 8}),
        ((37,), (5,), {"window": 7, "dilation": 2}),
        ((9, 10), (2, 4), {"window": (4, 5), "is_causal": (True, False)}),
    ],
)
def test_block_map_equals_the_dense_mask_cut_into_tiles(shape, tile, settings):
    mask = masks.neighborhood(shape, **settings)
    blocks = masks.block_map(mask, shape, tile, tile)
    sees = np.asarray(masks.dense_mask(mask, shape))
    token = np.stack(np.unravel_index(np.arange(np.prod(shape)), shape), axis=-1)
    tile_of_token = token // np.array(tile)
    tiles = list(np.ndindex(*(-(-n // size) for n, size in zip(shape, tile))))
    for i, j in itertools.product(range(len(tiles)), repeat=2):
        pairs = sees[(tile_of_token == tiles[i]).all(1)][:, (tile_of_token == tiles[j]).all(1)]
        assert blocks.visited[i, j] == pairs.any()
        assert blocks.full[i, j] == pairs.all()


@pytest.mark.parametrize(
    ("lengths", "windows", "strides", "tiles", "published"),
    [
        ((256, 256), (80, 80), (1, 1), (16, 8), 512 / 68.1),
        ((256, 256), (80, 80), (16, 16), (16, 8), 512 / 50),
        ((30, 48, 80), (18, 24, 24), (1, 1, 1), (2, 8, 8), 5.4),
        ((30, 48, 80), (18, 24, 24), (16, 8, 8), (2, 8, 8), 11.1),
    ],
)
def test_visited_tiles_bound_the_speed_up_as_published(lengths, windows, strides, tiles, published):
    """Key tiles in full attention / key tiles visited, by the mean over query tiles; the axes multiply."""
    bound = 1.0
    for length, window, stride, tile in zip(lengths, windows, strides, tiles):
        mask = masks.neighborhood((length,), window, stride=stride)
        visited = masks.block_map(mask, (length,), (tile,), (tile,)).visited
        bound *= visited.shape[1] / visited.sum(1).mean()
    assert bound == pytest.approx(published, rel=0.01)


def test_drawing_shows_the_same_mask():
    matplotlib = pytest.importorskip("matplotlib", reason="drawing needs the extra 'experiments'")
    matplotlib.use("Agg")
    mask = masks.neighborhood((6, 7), 3)
    sees = np.asarray(masks.dense_mask(mask, (6, 7)))
    everything, one = masks.draw(mask, (6, 7)), masks.draw(mask, (6, 7), query=(5, 0))
    np.testing.assert_array_equal(everything.images[0].get_array(), sees)
    np.testing.assert_array_equal(one.images[0].get_array(), sees[5 * 7].reshape(6, 7))


def test_shifted_blocks_are_swins_windows():
    """As the published model makes them: roll, cut into blocks, and part what the roll joined."""
    length, size, shift = 16, 4, 2
    rolled = np.roll(np.arange(length), -shift).reshape(-1, size)
    want = np.zeros((length, length), bool)
    for block in rolled:
        for query, key in itertools.product(block, block):
            want[query, key] = abs(query - key) < size
    np.testing.assert_array_equal(masks.dense_mask(masks.blocks(size, shift=shift), (length,)), want)
    both = masks.dense_mask(masks.blocks(size, shift=1, axis=0) & masks.blocks(3, shift=2, axis=1), (9, 8))
    rows = masks.dense_mask(masks.blocks(size, shift=1), (9,))
    columns = masks.dense_mask(masks.blocks(3, shift=2), (8,))
    np.testing.assert_array_equal(both, np.kron(rows, columns).astype(bool))


def test_unshifted_blocks_are_a_stride_of_the_whole_window():
    local = masks.dense_mask(masks.neighborhood((6, 8), (3, 4), stride=(3, 4)), (6, 8))
    np.testing.assert_array_equal(masks.dense_mask(masks.blocks(3, axis=0) & masks.blocks(4, axis=1), (6, 8)), local)


def test_power_blocks_lie_a_power_of_two_back():
    mask = masks.dense_mask(masks.power_blocks(3), (40,))
    for query, key in itertools.product(range(40), range(40)):
        assert bool(mask[query, key]) == (query // 3 - key // 3 in (0, 1, 2, 4, 8)), (query, key)


@pytest.mark.parametrize("factor", [1.0, 0.5, 3.0])
def test_radial_attention_equals_its_definition(factor):
    tokens, frames, block = 40, 24, 8
    mask = np.asarray(masks.dense_mask(masks.radial(tokens, decay_factor=factor, block=block), (tokens * frames,)))
    seen = mask.reshape(frames, tokens, frames, tokens)
    distance = np.abs(np.arange(tokens)[:, None] - np.arange(tokens))
    for i, j in itertools.product(range(frames), range(frames)):
        apart = abs(i - j)
        decay = 2.0 ** (tokens.bit_length() - apart.bit_length())
        want = distance <= max(decay * factor, block)
        if decay < block and apart % int(block / decay):
            want = np.zeros_like(want)
        if apart <= 1 or j == 0:
            want = np.ones_like(want)
        np.testing.assert_array_equal(seen[i, :, j], want, err_msg=f"frames {i} and {j}")
    assert 0.1 < mask.mean() < 0.9


def test_a_large_block_map_is_compiled_and_what_numpy_gives(monkeypatch):
    table = np.tri(96, dtype=bool)
    patterns = {
        "window": (masks.causal() & masks.window(7, 0) | masks.first_keys(3), (96,), (10,), (7,)),
        "radial": (masks.radial(10, block=4), (96,), (16,), (16,)),
        "power_blocks": (masks.power_blocks(5), (96,), (16,), (10,)),
        "grid": (masks.neighborhood((8, 12), (3, 5), dilation=(2, 1)), (8, 12), (4, 5), (3, 4)),
        "numpy's table": (masks.Mask(lambda query, key: table[query[0], key[0]]), (96,), (16,), (16,)),
    }
    for name, pattern in patterns.items():
        want = masks.block_map(*pattern)
        with monkeypatch.context() as patch:
            patch.setattr(masks, "_MOST_IN_NUMPY", 0)
            got = masks.block_map(*pattern)
        for x, y in zip(got, want):
            np.testing.assert_array_equal(x, y, err_msg=name)


_LARGE = """
import time
from attnlab.attention import masks
pattern = masks.causal() & (masks.power_blocks(256) | masks.window(256, 0) | masks.first_keys(4))
start = time.process_time()
visited, full = masks.block_map(pattern, (65536,), (128,), (128,))
print(time.process_time() - start, visited.shape, full.sum() < visited.sum() < visited.size // 4)
"""


@pytest.mark.slow
def test_a_block_map_of_65536_tokens_takes_seconds():
    """In a process with XLA's own flags; those of the tests compile slower programs."""
    environment = {name: value for name, value in os.environ.items() if name != "XLA_FLAGS"}
    run = subprocess.run([sys.executable, "-c", _LARGE], env=environment, capture_output=True, text=True, check=True)
    seconds, rest = run.stdout.strip().split(maxsplit=1)
    assert rest == "(512, 512) True"
    assert float(seconds) < 5


def test_masks_are_negated_and_joined():
    shape, pairs = (13,), (np.arange(13)[:, None], np.arange(13)[None])
    query, key = pairs
    for mask, want in {
        ~masks.causal(): key > query,
        ~~masks.window(3, 1): (query - key <= 3) & (query - key >= -1),
        masks.window(4, 0): masks.dense_mask(masks.neighborhood(shape, 5, is_causal=True), shape),
        masks.block_causal(4): (key <= query) | (key // 4 == query // 4),
        masks.kinds(np.arange(13) % 3, {0: masks.causal(), 2: masks.window(2, 0)}): (key % 3 != 1)
        & (key <= query)
        & ((key % 3 == 0) | (query - key <= 2)),
    }.items():
        np.testing.assert_array_equal(masks.dense_mask(mask, shape), np.broadcast_to(want, (13, 13)))
        assert bool(mask.sees((5,), (3,))) == bool(np.broadcast_to(want, (13, 13))[5, 3])  # Python's numbers too


def test_a_condition_is_seen_at_its_place():
    """Image tokens see the image and the condition around their own place, condition tokens the condition there."""
    height, width, tokens = 3, 4, 12
    mask = (masks.first_keys(tokens) & masks.blocks(tokens)) | masks.aligned((height, width), 1, offset=tokens)
    got = np.asarray(masks.dense_mask(mask, (2 * tokens,)))
    y, x = np.divmod(np.arange(tokens), width)
    near = (abs(y[:, None] - y[None]) <= 1) & (abs(x[:, None] - x[None]) <= 1)
    np.testing.assert_array_equal(got, np.block([[np.ones_like(near), near], [np.zeros_like(near), near]]))
