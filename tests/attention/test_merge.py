"""merge_attention: attention over parts of the keys, put together, equals attention over all of them."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from test_dot_product import draw_arrays

from attnlab import dot_product_attention, local_attention, merge_attention

ARRAYS = draw_arrays(0, 2, 7, 12, 4, 2)
CUTS = [(0, 5), (5, 6), (6, 12)]


def whole(query, key, value, mask):
    return dot_product_attention(query, key, value, mask=mask, return_lse=True, implementation="reference")


def merged(query, key, value, mask):
    parts = [whole(query, key[:, a:b], value[:, a:b], mask[..., a:b]) for a, b in CUTS]
    return merge_attention(*zip(*parts))


@pytest.mark.parametrize("hidden", ["nothing", "a part", "everything"])
def test_merging_parts_equals_the_whole_in_values_and_gradients(hidden):
    """Gradients pass through out and lse, and through lse to the parts' outputs; hidden parts have lse = -inf."""
    mask = jnp.ones((1, 1, 7, 12), bool)
    if hidden != "nothing":
        mask = mask.at[:, :, 3, : 6 if hidden == "a part" else 12].set(False)

    @functools.partial(jax.jit, static_argnums=0)
    def everything(attend):
        (out, lse), pullback = jax.vjp(lambda *arrays: attend(*arrays, mask), *ARRAYS)
        cotangents = [jnp.cos(jnp.arange(x.size, dtype=x.dtype)).reshape(x.shape) for x in (out, lse)]
        return out, lse, *pullback(tuple(cotangents))

    for got, expected in zip(everything(merged), everything(whole)):
        assert not jnp.isnan(got).any()
        np.testing.assert_allclose(got, expected, rtol=1e-5, atol=1e-5)


def test_extra_tokens_beside_an_image():
    """Neighbourhood attention over an image and full attention to text tokens, merged."""
    rng = np.random.default_rng(0)
    image = jnp.asarray(rng.normal(size=(1, 4, 5, 2, 4)), jnp.float32)
    text = jnp.asarray(rng.normal(size=(1, 3, 2, 4)), jnp.float32)

    @jax.jit
    def both(image, text):
        near = local_attention(image, image, image, window=(4, 5), return_lse=True)
        flat = image.reshape(1, 20, 2, 4)
        far = dot_product_attention(flat, text, text, return_lse=True)
        tokens = jnp.concatenate([flat, text], axis=1)
        expected = dot_product_attention(flat, tokens, tokens, return_lse=True)
        return merge_attention(*zip(near, [x.reshape(y.shape) for x, y in zip(far, near)])), expected

    (out, lse), expected = both(image, text)
    np.testing.assert_allclose(out.reshape(expected[0].shape), expected[0], rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(lse.reshape(expected[1].shape), expected[1], rtol=1e-5)


def test_wrong_calls_name_the_argument():
    out, lse = jnp.zeros((1, 5, 2, 3)), jnp.zeros((1, 5, 2))
    with pytest.raises(ValueError, match="outputs: got no parts"):
        merge_attention([], [])
    with pytest.raises(ValueError, match="lses: got 1 parts; need one for each of 2"):
        merge_attention([out, out], [lse])
    with pytest.raises(ValueError, match=r"outputs\[1\]: got float32\[1,4,2,3\]"):
        merge_attention([out, out[:, 1:]], [lse, lse])
    with pytest.raises(ValueError, match=r"lses\[0\]: got float32\[1,2,5\]"):
        merge_attention([out], [jnp.swapaxes(lse, 1, 2)])
