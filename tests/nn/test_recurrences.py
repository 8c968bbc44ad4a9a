"""Mixers that say more than their primitive does: DeltaProduct, Mamba-3 and RWKV-7 are their papers' recurrences."""

import functools
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from marks import slow_but

from attnlab import init_linear_cache, linear_attention, nn
from attnlab.nn.mixers.linear import write_in_turn
from attnlab.nn.mixers.mamba3 import Gates, Mamba3Cache, trapezoid_attention, trapezoid_step

VECTORS = pathlib.Path(__file__).parents[1] / "vectors" / "linear"
FEATURES, LENGTH = 8, 7


def assert_close(got, want, tolerance):
    jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=tolerance, atol=tolerance), got, want)


def _delta_product(query, key, value, beta, log_decay, **options):
    key, value = (x.reshape(*x.shape[:2], -1, x.shape[-1]) for x in (key, value))
    return write_in_turn(linear_attention, 2, query, key, value, beta=beta, log_decay=log_decay, **options)


def _mamba3(query, key, value, step, log_decay, trapezoid, angle, **options):
    return trapezoid_attention(query, key, value, Gates(step, log_decay, trapezoid, angle), **options)[0]


def vectors_of(case):
    vectors = dict(np.load(VECTORS / f"{case}.npz"))
    names = [name.removeprefix("d_") for name in vectors if name.startswith("d_")]
    return vectors, {name: vectors[name] for name in names}


@pytest.mark.parametrize("implementation", slow_but(["xla"], ["reference", "xla"]))
@pytest.mark.parametrize(("case", "call"), [("delta_product", _delta_product), ("mamba3", _mamba3)])
def test_agrees_with_its_formula_s_vectors(case, call, implementation):
    vectors, arrays = vectors_of(case)

    def loss(arrays):
        out = call(**arrays, implementation=implementation)
        return jnp.sum(out * vectors["cot"]), out

    with jax.enable_x64(True):
        gradients, out = jax.jit(jax.grad(loss, has_aux=True))(arrays)
        assert_close(out, vectors["out"], 1e-10)
        assert_close(gradients, {name: vectors[f"d_{name}"] for name in arrays}, 1e-10)


def test_steps_of_mamba3_give_its_formula_s_vectors():
    vectors, arrays = vectors_of("mamba3")
    with jax.enable_x64(True):
        state = init_linear_cache(2, 2, 4, 3, dtype=np.float64)
        cache = Mamba3Cache(state, *(jnp.zeros((2, 2, width)) for width in (4, 3, 1)))

        def token(cache, now):
            query, key, value, *gates = (now[name][:, None] for name in ("query", "key", "value", *Gates._fields))
            out, cache = trapezoid_step(cache, query, key, value, Gates(*gates))
            return cache, out[:, 0]

        _, out = jax.jit(functools.partial(jax.lax.scan, token))(
            cache, {name: jnp.moveaxis(jnp.asarray(x), 1, 0) for name, x in arrays.items()}
        )
        assert_close(jnp.moveaxis(out, 0, 1), vectors["out"], 1e-12)


def mixer_of(kind, **options):
    """A mixer with two heads, its parameters drawn so that none is 0, and an input."""
    mixer = kind(FEATURES, is_causal=True, num_heads=2, **options)
    values = nn.initialize(mixer, jax.random.key(0))
    leaves, tree = jax.tree.flatten(values)
    keys = jax.random.split(jax.random.key(2), len(leaves))
    values = tree.unflatten([x + 0.3 * jax.random.normal(key, x.shape) for key, x in zip(keys, leaves, strict=True)])
    return nn.bind(mixer, values), values, np.asarray(jax.random.normal(jax.random.key(1), (LENGTH, FEATURES)))


def _sigmoid(x):
    return 1 / (1 + np.exp(-x))


@pytest.mark.long
def test_rwkv7_is_its_paper_s_recurrence():
    bound, values, x = mixer_of(nn.RWKV7Attention)
    p = jax.tree.map(lambda leaf: np.asarray(leaf, np.float64), values)

    def heads(name, x):
        return np.einsum("ti,inh->tnh", x, p[name]["kernel"])

    r, k, v = (heads(name, x) for name in ("query", "key", "value"))
    decay = np.exp(
        -np.exp(-0.5) * _sigmoid(heads("decay_up", np.tanh(x @ p["decay_down"]["kernel"])) + p["decay_bias"])
    )
    a = _sigmoid(heads("rate_up", x @ p["rate_down"]["kernel"]) + p["rate_bias"])
    kappa = k * p["removal_gain"]
    kappa /= np.linalg.norm(kappa, axis=-1, keepdims=True)
    written = k * (1 + (a - 1) * p["key_gain"])
    state, out = np.zeros((2, 4, 4)), []
    for t in range(LENGTH):
        removed = np.einsum("nh,nhv->nv", kappa[t], state)
        state = decay[t][..., None] * state - np.einsum("nh,nv->nhv", a[t] * kappa[t], removed)
        state = state + np.einsum("nh,nv->nhv", written[t], v[t])
        out.append(np.einsum("nh,nhv->nv", r[t], state))
    out = np.stack(out)
    out = out / np.sqrt(np.mean(out**2, -1, keepdims=True) + 1e-6) * p["output_norm"]["scale"]
    out = out + np.sum(r * written * p["bonus"], -1, keepdims=True) * v
    out = out * heads("gate_up", _sigmoid(x @ p["gate_down"]["kernel"]))
    want = np.einsum("tnv,nvd->td", out, p["output"]["kernel"])
    np.testing.assert_allclose(jax.jit(bound)(x[None])[0], want, rtol=0, atol=2e-4 * np.abs(want).max())


@pytest.mark.long
def test_kimi_delta_attention_s_gates():
    bound, values, x = mixer_of(nn.LinearAttention, beta=1.0, decay="softplus_channel", output_gate="sigmoid")
    got = bound._recurrence(jnp.asarray(x)[None])["log_decay"][0]
    p = jax.tree.map(lambda leaf: np.asarray(leaf, np.float64), values)
    steps = np.einsum("ti,inh->tnh", x @ p["gate_down"]["kernel"], p["gate"]["kernel"]) + p["gate_bias"]
    np.testing.assert_allclose(got, -np.exp(p["log_rate"])[:, None] * np.log1p(np.exp(steps)), rtol=1e-4)
    ones, zeros = jnp.ones((1, LENGTH, 2, 4)), jnp.zeros((1, LENGTH, 2, 4))
    gate = _sigmoid(np.einsum("ti,inv->tnv", x, p["output_gate"]["kernel"]))
    np.testing.assert_allclose(
        bound.finish(ones, zeros, jnp.asarray(x)[None])[0], gate * p["output_norm"]["scale"], rtol=1e-4
    )


@pytest.mark.long
def test_one_delta_rule_is_a_delta_product_whose_other_strength_is_0():
    rng = np.random.default_rng(0)
    query, key, value = (jnp.asarray(rng.normal(size=(2, 6, 2, 4)), jnp.float32) for _ in range(3))
    beta = jnp.asarray(rng.uniform(size=(2, 6, 2)) / 4, jnp.float32)
    decay = jnp.asarray([-0.1, -0.5])
    lengths = jnp.asarray([6, 3])
    want = linear_attention(query, key, value, beta=beta, log_decay=decay, lengths=lengths, return_state=True)
    got = write_in_turn(
        linear_attention,
        2,
        query,
        jnp.concatenate([key + 1, key], axis=2),
        jnp.concatenate([value + 1, value], axis=2),
        beta=jnp.stack([0 * beta, beta], axis=2),
        log_decay=decay,
        lengths=lengths,
        return_state=True,
    )
    assert_close(got[1], want[1], 1e-6)
    assert_close(got[0][0], want[0][0], 1e-6)
