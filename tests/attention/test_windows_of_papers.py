"""Papers that are a call with other axes, beside loops over explicit keys: FreeSwim, HiDiffusion, windows of depth."""

from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import attnlab as A

MASKS = np.load(Path(__file__).parents[1] / "vectors" / "block_sparse" / "masks.npz")  # of the papers' own code
HEADS, KEY_HEADS = 4, 2
_rng = np.random.default_rng(0)


@pytest.fixture(autouse=True, scope="module")
def _wide():
    with jax.enable_x64(True):
        yield


def tokens(*space, batch=2):
    shapes = (HEADS, 8), (KEY_HEADS, 8), (KEY_HEADS, 5)
    return [_rng.normal(size=(batch, *space, *shape)) for shape in shapes]


def by_loops(query, key, value, seen):
    """seen: bool [T, T], of the space's places in raster order."""
    shape = (*query.shape[:-1], value.shape[-1])
    query, key, value = (x.reshape(x.shape[0], -1, *x.shape[-2:]) for x in (query, key, value))
    out = np.zeros((*query.shape[:-1], value.shape[-1]))
    for row, t, head in np.ndindex(*query.shape[:3]):
        keys, of = np.flatnonzero(seen[t]), head // (HEADS // KEY_HEADS)
        weights = np.exp(key[row, keys, of] @ query[row, t, head] * 8**-0.5)
        out[row, t, head] = weights / weights.sum() @ value[row, keys, of]
    return out.reshape(shape)


def inward(space, radii):
    """FreeSwim: in all frames the place within these radii of the query's, whose window is moved inwards at borders."""
    _, rows, columns = space
    seen = np.zeros((np.prod(space),) * 2, bool)
    for t, s in np.ndindex(*seen.shape):
        (_, *query), (_, *key) = np.unravel_index(t, space), np.unravel_index(s, space)
        centres = [
            np.clip(place, radius, size - 1 - radius) for place, radius, size in zip(query, radii, (rows, columns))
        ]
        seen[t, s] = all(abs(place - centre) <= radius for place, centre, radius in zip(key, centres, radii))
    return seen


@pytest.mark.long
def test_freeswim_is_a_window_that_stays_inside_over_all_frames():
    space = (3, 5, 6)
    seen = inward(space, (1, 2))
    np.testing.assert_array_equal(seen, MASKS["inward_3x5x6_radius1_2"])
    arrays = tokens(*space, batch=1)
    out = A.local_attention(*arrays, window=(3, 2 * 1 + 1, 2 * 2 + 1), edge="shift")
    np.testing.assert_allclose(out, by_loops(*arrays, seen), atol=1e-12)
    clipped = A.local_attention(*arrays, window=(3, 3, 5), edge="clip")
    assert np.abs(clipped - out)[:, 1].max() > 0.01  # at borders alone
    np.testing.assert_allclose(clipped[:, 1, 1:-1, 2:-2], out[:, 1, 1:-1, 2:-2], atol=1e-12)


@pytest.mark.long
def test_hidiffusion_is_windows_of_a_rolled_image():
    """Windows over the border hold both its sides, which those of a Swin layer keep apart."""
    height, width, window, shift = 8, 12, (4, 6), (1, 3)
    seen = np.zeros((height * width,) * 2, bool)
    for t, s in np.ndindex(*seen.shape):
        places = (divmod(x, width) for x in (t, s))
        of_query, of_key = (
            tuple((place - by) % length // size for place, by, length, size in zip(at, shift, (height, width), window))
            for at in places
        )
        seen[t, s] = of_query == of_key
    np.testing.assert_array_equal(seen, MASKS["cyclic_windows_8x12_window4x6_shift1x3"])
    arrays = tokens(height, width, batch=1)
    rolled = (jnp.roll(x, (-1, -3), (1, 2)) for x in arrays)
    out = jnp.roll(A.local_attention(*rolled, window=window, stride=window), shift, (1, 2))
    np.testing.assert_allclose(out, by_loops(*arrays, seen), atol=1e-12)
    masks = [A.masks.blocks(size, shift=by, axis=axis) for axis, (size, by) in enumerate(zip(window, shift))]
    swin = np.asarray(A.masks.dense_mask(masks[0] & masks[1], (height, width))).reshape(seen.shape)
    assert (swin.sum(), seen.sum()) == (1404, 2304)
    assert (seen | ~swin).all()


def test_a_window_of_depth_has_layers_as_positions():
    """Residual Stream Duality: of every token, a layer attends to the last ones below it, and to no other token."""
    batch, length, layers, window = 2, 3, 7, 3
    arrays = tokens(length, layers, batch=batch)
    by_token = (x.reshape(batch * length, layers, *x.shape[3:]) for x in arrays)
    out = A.local_attention(*by_token, window=window, is_causal=True).reshape(batch, length, layers, HEADS, -1)
    token, layer = np.divmod(np.arange(length * layers), layers)
    below = layer[:, None] - layer[None]
    seen = (token[:, None] == token[None]) & (below >= 0) & (below < window)
    np.testing.assert_allclose(out, by_loops(*arrays, seen), atol=1e-12)
