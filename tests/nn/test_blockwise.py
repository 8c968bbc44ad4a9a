"""Checkpoints of segments, and blocks beside a state: the vectors, and decoding. The mixers' suite has the rest."""

from pathlib import Path

import jax
import jax.numpy as jnp
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


@pytest.mark.long
def test_a_sequence_shorter_than_a_segment_sees_only_itself():
    mixer = nn.CheckpointAttention(16, is_causal=True, segment=4, num_heads=2)
    heads = jax.random.normal(jax.random.key(0), (3, 1, 3, 2, 8))
    np.testing.assert_array_equal(mixer.mix(*heads, heads[0], None), heads[2])
    with pytest.raises(ValueError, match="is_causal: got False; need True"):
        nn.CheckpointAttention(16, is_causal=False, segment=4)


def test_vectors_of_blocks_beside_a_state(wide):
    data = vectors("block_hybrid")
    mixer = nn.BlockHybrid(6, is_causal=False, num_heads=2, block=data["opt_block"], rotary=False, dtype=np.float64)
    names = ("query", "key", "value", "log_decay")

    @jax.jit
    def attended(*arrays):
        factor = data["opt_scale"] * data["query"].shape[-1] ** 0.5  # on the mixer's own scale
        out, pullback = jax.vjp(lambda query, *rest: mixer._attend(factor * query, *rest)[0], *arrays)
        return out, pullback(data["cot"])

    out, gradients = attended(*(data[name] for name in names))
    np.testing.assert_allclose(out, data["out"], atol=1e-12)
    for name, gradient in zip(names, gradients):
        np.testing.assert_allclose(gradient, data[f"d_{name}"], atol=1e-9)


@pytest.mark.long
def test_blocks_decode_one_by_one_and_see_nothing_later():
    mixer = nn.BlockHybrid(16, is_causal=False, num_heads=2, num_key_heads=1, block=4)
    bound = nn.bind(mixer, nn.initialize(mixer, jax.random.key(0)))
    x, other = jax.random.normal(jax.random.key(1), (2, 2, 12, 16))

    @jax.jit
    def run(x):
        cache, outputs = bound.init_block_cache(2), []
        for block in jnp.split(x, 3, axis=1):
            y, cache = bound.block_step(cache, block)
            outputs.append(y)
        return bound(x), jnp.concatenate(outputs, axis=1)

    whole, decoded = run(x)
    np.testing.assert_allclose(decoded, whole, atol=1e-5)
    for token in (7, 8):  # the last of a block, and the first of the next
        changed, _ = run(jnp.concatenate([x[:, :token], other[:, token:]], axis=1))
        start = token // 4 * 4
        np.testing.assert_array_equal(changed[:, :start], whole[:, :start])
        assert np.all(np.any(changed[:, start:] != whole[:, start:], axis=-1))  # all of its own block


def test_blocks_refuse_to_decode_by_token():
    mixer = nn.BlockHybrid(16, is_causal=False, block=4)
    with pytest.raises(ValueError, match="BlockHybrid: a token's output depends on its whole block; decode by block_"):
        mixer.init_cache(1, 8)
    with pytest.raises(ValueError, match="is_causal: got True; BlockHybrid has no causal form"):
        nn.BlockHybrid(16, is_causal=True, block=4)
    with pytest.raises(ValueError, match=r"x: got float32\[1,3,16\]; need \[batch, block, features\]"):
        mixer.block_step(mixer.init_block_cache(1), jnp.zeros((1, 3, 16)))
    convolved = nn.BlockHybrid(16, is_causal=False, block=4, residual_convolution=3)
    with pytest.raises(ValueError, match="residual_convolution: got some; must be 0 to decode"):
        convolved.block_step(convolved.init_block_cache(1), jnp.zeros((1, 4, 16)))
