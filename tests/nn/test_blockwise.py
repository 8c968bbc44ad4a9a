"""Checkpoints of segments: the vectors, and what the cache keeps. The mixers' suite has the rest."""

from pathlib import Path

import jax
import numpy as np
import pytest

from attnlab import nn

VECTORS = Path(__file__).parents[1] / "vectors" / "compositions"


@pytest.fixture
def wide():
    with jax.enable_x64(True):
        yield


def vectors(name):
    return {key: x if x.ndim else x.item() for key, x in np.load(VECTORS / f"{name}.npz").items()}


def test_vectors_of_checkpoints(wide):
    data = vectors("checkpoints")
    mixer = nn.CheckpointAttention(
        6, is_causal=True, num_heads=2, segment=data["opt_segment"], rotary=False, dtype=np.float64
    )
    names = ("query", "key", "value")

    @jax.jit
    def mixed(query, key, value):
        factor = data["opt_scale"] * query.shape[-1] ** 0.5  # on the mixer's own scale
        out, pullback = jax.vjp(lambda q, k, v: mixer.mix(factor * q, k, v, q, None), query, key, value)
        return out, pullback(data["cot"])

    out, gradients = mixed(*(data[name] for name in names))
    np.testing.assert_allclose(out, data["out"], atol=1e-12)
    for name, gradient in zip(names, gradients):
        np.testing.assert_allclose(gradient, data[f"d_{name}"], atol=1e-9)


def test_a_cache_has_a_place_for_each_segment_and_one_for_the_token_itself():
    mixer = nn.CheckpointAttention(16, is_causal=True, segment=4)
    assert [mixer.state_size(length) for length in (3, 4, 15, 16)] == [32 * count for count in (1, 2, 4, 5)]


def test_a_sequence_shorter_than_a_segment_sees_only_itself():
    mixer = nn.CheckpointAttention(16, is_causal=True, segment=4, num_heads=2)
    heads = jax.random.normal(jax.random.key(0), (3, 1, 3, 2, 8))
    np.testing.assert_array_equal(mixer.mix(*heads, heads[0], None), heads[2])
    with pytest.raises(ValueError, match="is_causal: got False; need True"):
        nn.CheckpointAttention(16, is_causal=False, segment=4)
