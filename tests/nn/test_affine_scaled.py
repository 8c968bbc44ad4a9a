"""Affine-scaled attention: the vectors, its weights' sums, and an average that only earlier tokens enter."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from test_blockwise import vectors

from attnlab import nn


def test_vectors_of_affine_scales():
    data = vectors("affine_scaled")
    assert np.array_equal(data["visible"], np.broadcast_to(np.tri(9, dtype=bool), data["visible"].shape))
    names = ("query", "key", "value", "alpha", "alpha_mean")
    with jax.enable_x64(True):
        mixer = nn.AffineScaledAttention(24, is_causal=True, num_key_heads=2, dtype=np.float64)

        @jax.jit
        def attended(*arrays):
            out, pullback = jax.vjp(mixer._attend, *arrays)
            return out, pullback(data["cotangent_out"])

        out, gradients = attended(*(data[name] for name in names))
    np.testing.assert_allclose(out, data["out"], atol=1e-12)
    for name, gradient in zip(names, gradients):
        np.testing.assert_allclose(gradient, data[f"grad_{name}"], atol=1e-11)


def test_weights_sum_to_the_average_of_the_scales_before():
    mixer = nn.AffineScaledAttention(16, is_causal=True, num_heads=2, decay=0.5)
    values = nn.initialize(mixer, jax.random.key(0))
    values["scales"]["kernel"] = 2 * jax.random.normal(jax.random.key(2), (16, 2))
    x = jax.random.normal(jax.random.key(1), (1, 6, 16))
    weights = jax.jit(lambda x: nn.bind(mixer, values).attention_weights(x))(x)
    alpha = 2 / (1 + np.exp(-np.asarray(x[0]) @ np.asarray(values["scales"]["kernel"])))
    average = [np.ones(2)]
    for now in alpha:
        average.append(0.5 * average[-1] + 0.5 * now)
    np.testing.assert_allclose(weights[0].sum(-1).T, average[:-1], rtol=1e-4)
    assert np.any(weights < 0)


def test_it_is_causal_and_for_one_document():
    with pytest.raises(ValueError, match="is_causal: got False; need True, as the scales are averaged"):
        nn.AffineScaledAttention(16, is_causal=False)
    mixer = nn.AffineScaledAttention(16, is_causal=True)
    bound = nn.bind(mixer, nn.initialize(mixer, jax.random.key(0)))
    with pytest.raises(ValueError, match="segment_ids: got some; AffineScaledAttention averages its scales"):
        bound(jnp.zeros((1, 4, 16)), segment_ids=jnp.zeros((1, 4), int))
