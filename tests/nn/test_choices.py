"""Gates of heads, a choice with the mixture's gradient, additive scores: the vectors, and what they promise."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from test_blockwise import vectors

from attnlab import nn


@pytest.fixture(autouse=True, scope="module")
def _wide():
    with jax.enable_x64(True):
        yield


def test_vectors_of_gates_of_heads():
    data = vectors("head_gates")
    names = ("x", "weight_routed", "weight_shared", "weight_mix")
    options = {"count": data["count"], "code_factors": data["code_factors"]}

    @jax.jit
    def loss(*arrays):
        gates, balance = nn.head_gates(*arrays, **options)
        return jnp.sum(data["cotangent_gates"] * gates) + balance, (gates, balance)

    given = [data[name] for name in names]
    (_, (gates, balance)), gradients = jax.value_and_grad(loss, (0, 1, 2, 3), has_aux=True)(*given)
    np.testing.assert_allclose(gates, data["gates"], atol=1e-12)
    np.testing.assert_allclose(balance, data["balance"], atol=1e-12)
    for name, gradient in zip(names, gradients):
        np.testing.assert_allclose(gradient, data[f"grad_{name}"], atol=1e-11)


def test_gates_as_printed_are_shares_of_all_heads():
    data = vectors("head_gates")
    x, routed, shared, mixing = (data[name] for name in ("x", "weight_routed", "weight_shared", "weight_mix"))
    every, _ = nn.head_gates(x, routed, shared, mixing, count=4)
    np.testing.assert_allclose(every.sum(-1), 1, atol=1e-12)
    some, _ = nn.head_gates(x, routed, shared, mixing, count=2)
    np.testing.assert_array_equal((some[..., 2:] > 0).sum(-1), 2)
    np.testing.assert_allclose(np.where(some > 0, every, 0), some, atol=1e-12)
    assert (np.where(some == 0, every, 0).max(-1) <= np.where(some > 0, every, 1)[..., 2:].min(-1)).all()


def test_balance_is_1_where_heads_are_taken_alike_and_more_where_one_is_preferred():
    x, none = jnp.eye(4), jnp.zeros((4, 1))
    mixing = jnp.zeros((4, 2))
    _, even = nn.head_gates(x, 9 * jnp.eye(4), none, mixing, count=1)
    _, one = nn.head_gates(x, 9 * jnp.ones((4, 1)) * jnp.eye(4)[:1], none, mixing, count=1)
    np.testing.assert_allclose(even, 1, atol=1e-12)
    assert one > 3.9


def test_a_choice_is_one_branch_with_the_gradient_of_the_mixture():
    data = vectors("straight_through")

    @jax.jit
    def run(logits, full, sparse):
        def mixed(logits, full, sparse, hard=True):
            choice = nn.straight_through_choice(logits, data["gumbel"], data["temperature"])
            if not hard:
                choice = jax.nn.softmax((logits + data["gumbel"]) / data["temperature"])
            first, second = (choice[:, number, None, None, None] for number in range(2))
            return first * full + second * sparse

        out, pullback = jax.vjp(mixed, logits, full, sparse)
        _, of_soft = jax.vjp(lambda logits: mixed(logits, full, sparse, hard=False), logits)
        return out, pullback(data["cotangent_out"]), of_soft(data["cotangent_out"])

    out, gradients, (of_soft,) = run(data["logits"], data["full"], data["sparse"])
    np.testing.assert_array_equal(out, data["out"])
    for name, gradient in zip(("logits", "full", "sparse"), gradients):
        np.testing.assert_allclose(gradient, data[f"grad_{name}"], atol=1e-12)
    np.testing.assert_allclose(gradients[0], of_soft, atol=1e-12)


def test_vectors_of_a_pointer():
    data = vectors("pointer")
    names = ("query", "key", "weight")

    @jax.jit
    def loss(*arrays):
        logits = nn.additive_logits(*arrays)
        logs = jax.nn.log_softmax(jnp.where(data["visible"], logits, -jnp.inf))
        return -jnp.mean(jnp.take_along_axis(logs, data["targets"][..., None], -1)), logits

    given = [data[name] for name in names]
    (nll, logits), gradients = jax.value_and_grad(loss, (0, 1, 2), has_aux=True)(*given)
    np.testing.assert_allclose(logits, data["logits"], atol=1e-12)
    np.testing.assert_allclose(nll, data["nll"], atol=1e-12)
    for name, gradient in zip(names, gradients):
        np.testing.assert_allclose(gradient, data[f"grad_{name}"], atol=1e-12)


def test_wrong_arguments_are_named():
    x, weights = jnp.zeros((3, 4)), jnp.zeros((4, 2))
    with pytest.raises(ValueError, match="count: got 3; need 1 to 2"):
        nn.head_gates(x, weights, weights, weights, count=3)
    with pytest.raises(ValueError, match="mixing: got float64"):
        nn.head_gates(x, weights, weights, jnp.zeros((4, 3)), count=1)
    with pytest.raises(ValueError, match="temperature: got 0"):
        nn.straight_through_choice(x, x, 0.0)
    with pytest.raises(ValueError, match="key: got float64"):
        nn.additive_logits(jnp.zeros((1, 2, 3, 4)), jnp.zeros((1, 2, 2, 4)), jnp.zeros((3, 4)))
