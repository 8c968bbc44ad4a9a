"""A small language model trains with the kernels inside, simulated or on a card."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from attnlab import nn
from attnlab.models import LanguageModel

LENGTH, STEPS = 128, 3
MIXERS = {
    "softmax": nn.SoftmaxAttention,
    "local": functools.partial(nn.LocalAttention, window=40),
    "retention": functools.partial(nn.LinearAttention, decay="retention"),
    "gated delta": functools.partial(nn.LinearAttention, beta=1.0, decay="data"),
    "agent": functools.partial(nn.AgentAttention, agents=16),
    "parallax": nn.ParallaxAttention,
}


def losses(mixer, implementation):
    mixers = [functools.partial(mixer, num_heads=1, implementation=implementation, dtype=jnp.bfloat16)]
    model = LanguageModel(vocabulary=16, mixers=mixers, depth=1, features=64, dtype=jnp.bfloat16)
    tokens = jnp.asarray(np.random.default_rng(0).integers(0, 16, (1, LENGTH + 1)))
    optimizer = optax.sgd(0.2)

    def loss_of(values):
        logits = nn.bind(model, values)(tokens[:, :-1])
        return optax.softmax_cross_entropy_with_integer_labels(logits, tokens[:, 1:]).mean()

    @jax.jit
    def step(values, state):
        loss, gradients = jax.value_and_grad(loss_of)(values)
        updates, state = optimizer.update(gradients, state)
        return optax.apply_updates(values, updates), state, loss

    values = nn.initialize(model, jax.random.key(0))
    state, found = optimizer.init(values), []
    for _ in range(STEPS):
        values, state, loss = step(values, state)
        found.append(float(loss))
    return found


@pytest.mark.slow
@pytest.mark.parametrize("mixer", MIXERS)
def test_losses_are_those_of_xla_s_form(mixer, on_gpu):
    got, want = on_gpu(losses, MIXERS[mixer], "pallas_gpu"), losses(MIXERS[mixer], "xla")
    assert got[2] < got[1] < got[0]
    np.testing.assert_allclose(got, want, rtol=2e-3)
