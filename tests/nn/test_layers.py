"""Layers: norms, rotary positions, dropout."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from attnlab import nn
from attnlab.nn.layers import grid_positions


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
