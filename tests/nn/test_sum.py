"""Sums of mixers: what each gives, times its gate; caches, weights and costs of all."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from attnlab import models, nn

FEATURES, LENGTH = 16, 7
NEAR = functools.partial(nn.LocalAttention, window=3)
FAR = functools.partial(nn.SoftmaxAttention, num_heads=2)


@functools.cache
def gated():
    """A gated sum, its mixers alone with the same values, an input and the gates that belong to it."""
    mixer = nn.Sum(FEATURES, is_causal=True, mixers=[NEAR, FAR], gate=True)
    values = nn.initialize(mixer, jax.random.key(0))
    parts = [
        nn.bind(make(FEATURES, is_causal=True), values["mixers"][number]) for number, make in (("0", NEAR), ("1", FAR))
    ]
    x = jax.random.normal(jax.random.key(1), (2, LENGTH, FEATURES))
    gates = 1 / (1 + np.exp(-np.asarray(x) @ np.asarray(values["gate"]["kernel"])))
    return nn.bind(mixer, values), parts, x, gates, values


def test_each_mixer_gives_what_it_gives_alone_times_its_gate():
    bound, parts, x, gates, values = gated()
    plain = nn.bind(nn.Sum(FEATURES, is_causal=True, mixers=[NEAR, FAR]), values)
    y, of_plain, near, far = jax.jit(lambda x: [module(x) for module in (bound, plain, *parts)])(x)
    np.testing.assert_allclose(y, gates[..., :1] * near + gates[..., 1:] * far, rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(of_plain, near + far, rtol=1e-5, atol=1e-5)


@pytest.mark.long
def test_prompts_and_steps_give_what_the_call_gives():
    bound, _, x, *_ = gated()
    lengths = np.array([4, 2])

    @jax.jit
    def run(x, lengths):
        y, cache = bound.prefill(bound.init_cache(2, LENGTH), x[:, :4], lengths)
        following, after = bound.step(cache, jnp.take_along_axis(x, lengths[:, None, None], axis=1))
        return bound(x), y, following[:, 0], cache.position, after.position

    want, y, following, *positions = run(x, lengths)
    np.testing.assert_allclose(y[0], want[0, :4], rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(y[1, :2], want[1, :2], rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(following, want[np.arange(2), lengths], rtol=1e-5, atol=1e-5)
    np.testing.assert_array_equal(positions, [lengths, lengths + 1])


def test_weights_are_those_of_all_heads_times_the_gates_and_costs_are_sums():
    bound, parts, x, gates, _ = gated()
    weights, near, far = jax.jit(lambda x: [module.attention_weights(x) for module in (bound, *parts)])(x)
    assert weights.shape == (2, 4 + 2, LENGTH, LENGTH)
    by_query = np.moveaxis(gates, -1, 0)[:, :, None, :, None]
    want = np.concatenate([by_query[0] * near, by_query[1] * far], axis=1)
    np.testing.assert_allclose(weights, want, rtol=1e-5, atol=1e-6)
    of_gates = 2 * LENGTH * FEATURES * 2
    assert bound.flops((LENGTH,)) == sum(part.flops((LENGTH,)) for part in parts) + of_gates
    assert bound.state_size(LENGTH) == sum(part.state_size(LENGTH) for part in parts)


def test_it_refuses_what_one_of_its_mixers_refuses():
    silent = functools.partial(nn.RoutingAttention, clusters=2, window=2, membership="global")
    memory = functools.partial(nn.MemoryAttention, memory="linear", chunk_size=1)
    mixer = nn.Sum(FEATURES, is_causal=True, mixers=[NEAR, memory, silent])
    assert mixer.decoding_refusal == "membership: got 'global'; only \"strict\" decodes"
    assert mixer.state_size(3) is None
    with pytest.raises(ValueError, match='only "strict" decodes'):
        mixer.init_cache(1, 3)
    assert mixer.segments_refusal == nn.MemoryAttention.segments_refusal
    with pytest.raises(ValueError, match="mixers: got an empty list; need at least one mixer, to be added"):
        nn.Sum(FEATURES, is_causal=True, mixers=[])
    with pytest.raises(TypeError, match="mixers: got what makes None; need subclasses"):
        nn.Sum(FEATURES, is_causal=True, mixers=[lambda *_, **__: None])
    with pytest.raises(TypeError, match=r"^Sum has no option 'num_heads'"):
        nn.Sum(FEATURES, is_causal=True, mixers=[NEAR], num_heads=2)
    with pytest.raises(ValueError, match="is_causal: got True; InlineAttention has no causal form"):
        nn.Sum(FEATURES, is_causal=True, mixers=[nn.InlineAttention])


@pytest.mark.slow
def test_what_its_mixers_learn_in_training_is_kept():
    """Routing's centroids and its loss, from inside a sum in a model."""
    routing = functools.partial(nn.RoutingAttention, num_heads=2, clusters=2, window=2)
    model = models.LanguageModel(
        vocabulary=8, mixers=[functools.partial(nn.Sum, mixers=[NEAR, routing])], depth=1, features=FEATURES
    )
    values = nn.initialize(model, jax.random.key(0))

    @jax.jit
    def train(values, tokens):
        bound = nn.bind(model, values)
        bound(tokens, key=jax.random.key(2))
        return nn.learned(bound)

    buffers, loss = train(values, jax.random.randint(jax.random.key(1), (2, LENGTH), 0, 8))
    assert loss > 0
    assert buffers["layers"]["0"]["mixer"]["mixers"]["1"]["batches"] == 1
