"""Layers: norms, rotary positions, dropout, depthwise convolutions."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from attnlab import nn
from attnlab.nn.layers import LayerNorm, depthwise_convolution, grid_positions, product


@pytest.mark.parametrize(
    ("inputs", "outputs"), [(3, 5), (5, 3), (4, (2, 3)), ((2, 4), 3)], ids=["widens", "narrows", "heads", "of heads"]
)
def test_a_linear_layer_has_the_derivatives_of_its_product(inputs, outputs):
    """In both modes, of the second order, and per example; the kernel's gradient has a rule of its own."""
    layer = nn.Linear(inputs, outputs)
    kernel = nn.initialize(layer, jax.random.key(0))["kernel"]
    x = jax.random.normal(jax.random.key(1), (2, 7, *np.atleast_1d(inputs)))

    def ours(x, kernel):
        return jnp.sin(nn.bind(layer, {"kernel": kernel})(x)).sum()

    def plain(x, kernel):
        return jnp.sin(jnp.tensordot(x, kernel, axes=x.ndim - 2)).sum()

    along = (jnp.cos(x), jnp.cos(kernel))
    for transform in (
        lambda f: f,
        lambda f: jax.grad(f, (0, 1)),
        lambda f: jax.grad(f, 1),
        lambda f: lambda *at: jax.jvp(f, at, along)[1],
        lambda f: lambda *at: jax.jvp(jax.grad(f, (0, 1)), at, along)[1],
        lambda f: lambda x, kernel: jax.vmap(jax.grad(f, (0, 1)), (0, None))(x[:, None], kernel),
    ):
        expected = jax.jit(transform(plain))(x, kernel)
        jax.tree.map(
            lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5), jax.jit(transform(ours))(x, kernel), expected
        )


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
@pytest.mark.parametrize(("inputs", "outputs"), [(8, 24), (24, 8)])
@pytest.mark.parametrize("turned", [False, True])
def test_a_cpu_has_the_gradient_of_a_product_in_16_bits(inputs, outputs, turned, dtype):
    """Where the kernel lies the other way round, as tied embeddings do, XLA would merge that with the product."""
    x, kernel = jnp.ones((2, 5, inputs), dtype), jnp.ones((outputs, inputs) if turned else (inputs, outputs))

    def loss(kernel):
        return product(x, kernel.T if turned else kernel, jnp.float32).sum()

    np.testing.assert_array_equal(jax.jit(jax.grad(loss))(kernel), np.full(kernel.shape, 10))


def test_gradients_of_a_bfloat16_layer_are_sums_in_float32():
    layer = nn.Linear(8, 8, dtype=jnp.bfloat16)
    kernel = nn.initialize(layer, jax.random.key(0))["kernel"]
    x = jax.random.normal(jax.random.key(1), (50, 8), jnp.bfloat16)

    def loss(kernel):
        return nn.bind(layer, {"kernel": kernel})(x).astype(jnp.float32).sum()

    exact = np.broadcast_to(np.asarray(x, np.float64).sum(0)[:, None], (8, 8))
    np.testing.assert_allclose(jax.jit(jax.grad(loss))(kernel), exact, rtol=1e-6)


def test_rotary_scores_depend_on_distance_alone():
    query, key = jax.random.normal(jax.random.key(0), (2, 1, 1, 2, 16))

    def score(query_position, key_position):
        q = nn.rotary_embedding(query[:, None], jnp.array([[query_position]]))
        k = nn.rotary_embedding(key[:, None], jnp.array([[key_position]]))
        return jnp.sum(q * k, axis=-1)

    np.testing.assert_allclose(score(7, 3), score(104, 100), rtol=1e-4)
    assert not np.allclose(score(7, 3), score(7, 4), rtol=1e-3)


def test_rotary_on_a_grid_turns_each_axis_by_its_own_channels():
    x = jax.random.normal(jax.random.key(0), (1, 3, 4, 2, 8))
    y = nn.rotary_embedding(x, grid_positions((3, 4)))
    np.testing.assert_allclose(jnp.linalg.norm(y, axis=-1), jnp.linalg.norm(x, axis=-1), rtol=1e-5)
    np.testing.assert_allclose(y[:, 0, 0], x[:, 0, 0], rtol=1e-6)
    moved_in_x = jnp.any(jnp.abs(y - x)[0, 0, 1] > 1e-6, axis=0)
    moved_in_y = jnp.any(jnp.abs(y - x)[0, 1, 0] > 1e-6, axis=0)
    assert not np.any(moved_in_x & moved_in_y)


@pytest.mark.long
def test_layer_norm_has_mean_bias_and_deviation_scale():
    layer = nn.bind(norm := LayerNorm(64), nn.initialize(norm, jax.random.key(0)))
    layer.scale[...], layer.bias[...] = jnp.full(64, 3.0), jnp.full(64, 2.0)
    y = layer(100 + 5 * jax.random.normal(jax.random.key(1), (4, 64)))
    np.testing.assert_allclose(jnp.mean(y, axis=-1), 2, rtol=1e-5)
    np.testing.assert_allclose(jnp.std(y, axis=-1), 3, rtol=1e-5)
    np.testing.assert_array_equal(layer(jnp.full((1, 64), 7.0)), 2)  # epsilon keeps what does not vary finite


def test_rms_norm_in_bfloat16_computes_in_float32():
    norm = nn.bind(layer := nn.RMSNorm(256), nn.initialize(layer, jax.random.key(0)))
    x = jax.random.normal(jax.random.key(1), (4, 256))
    got = norm(x.astype(jnp.bfloat16))
    assert got.dtype == jnp.bfloat16
    want = x / jnp.sqrt(jnp.mean(x**2, axis=-1, keepdims=True))
    np.testing.assert_allclose(got.astype(jnp.float32), want, atol=2e-2, rtol=2e-2)


@pytest.mark.parametrize("rate", [0.25, 0.5])
def test_dropout_keeps_the_mean_and_is_off_without_a_key(rate):
    x = jnp.ones((200, 500))
    dropped = nn.dropout(x, rate, jax.random.key(0))
    np.testing.assert_allclose(jnp.mean(dropped), 1, atol=0.01)
    np.testing.assert_allclose(jnp.mean(dropped == 0), rate, atol=0.01)
    assert nn.dropout(x, rate, None) is x


@pytest.mark.parametrize(
    ("space", "widths", "is_causal"), [((9,), (3,), False), ((9,), (4,), True), ((5, 6), (3, 5), False)]
)
def test_depthwise_convolution_equals_the_library_one(space, widths, is_causal):
    x = jax.random.normal(jax.random.key(0), (2, *space, 3))
    kernel = jax.random.normal(jax.random.key(1), (*widths, 3))
    padding = [(w - 1, 0) if is_causal else (w // 2, w - 1 - w // 2) for w in widths]
    axes = "YX"[: len(space)]
    want = jax.lax.conv_general_dilated(
        x,
        kernel[..., None, :],
        (1,) * len(space),
        padding,
        dimension_numbers=(f"N{axes}C", f"{axes}IO", f"N{axes}C"),
        feature_group_count=3,
    )
    np.testing.assert_allclose(depthwise_convolution(x, kernel, is_causal=is_causal), want, atol=1e-5)
    each = depthwise_convolution(x, jnp.stack([kernel, 2 * kernel]), is_causal=is_causal)
    np.testing.assert_allclose(each, want * jnp.array([1, 2]).reshape(2, *(1,) * (x.ndim - 1)), atol=1e-5)


def test_a_convolution_of_packed_sequences_is_that_of_each():
    x = jax.random.normal(jax.random.key(0), (1, 9, 3))
    kernel = jax.random.normal(jax.random.key(1), (4, 3))
    ids = jnp.array([[5, 5, 5, 5, 6, 6, 6, 6, 6]])
    packed = depthwise_convolution(x, kernel, is_causal=True, segment_ids=ids)
    apart = [depthwise_convolution(part, kernel, is_causal=True) for part in (x[:, :4], x[:, 4:])]
    np.testing.assert_allclose(packed, jnp.concatenate(apart, axis=1), atol=1e-6)


@pytest.mark.parametrize("rate", [-0.1, 1.1, float("nan"), "half", True])
def test_dropout_refuses_what_is_no_share(rate):
    with pytest.raises((ValueError, TypeError), match="rate: got "):
        nn.dropout(jnp.ones(3), rate, jax.random.key(0))


def test_dropout_of_everything_gives_zeros_with_zero_gradients():
    out, gradient = jax.value_and_grad(lambda x: jnp.sum(nn.dropout(x, 1.0, jax.random.key(0))))(jnp.ones(3))
    assert out == 0
    np.testing.assert_array_equal(gradient, 0)
