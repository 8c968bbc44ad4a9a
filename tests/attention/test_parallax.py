"""Parallax: the published vectors, and what it has in common with softmax and local linear attention."""

import functools
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from marks import slow_but

from attnlab import (
    dot_product_attention,
    init_local_linear_cache,
    local_linear_attention,
    parallax_attention,
    parallax_step,
)

VECTORS = Path(__file__).parents[1] / "vectors" / "local_linear"
FORMS = ("reference", "xla")
every_form = pytest.mark.parametrize("form", slow_but(["xla"], FORMS))
attend = jax.jit(parallax_attention, static_argnames=("is_causal", "window", "implementation"))


def arrays(length=21, key_heads=2, seed=0):
    rng = np.random.default_rng(seed)
    shapes = ((2, length, 4, 8), (2, length, 4, 8), (2, length, key_heads, 8), (2, length, key_heads, 6))
    return tuple(rng.normal(size=shape).astype(np.float32) for shape in shapes)


@every_form
@pytest.mark.parametrize(("wide", "tolerance"), [(True, 1e-9), pytest.param(False, 2e-4, marks=pytest.mark.slow)])
def test_vectors(form, wide, tolerance):
    with jax.enable_x64(wide):
        data = np.load(VECTORS / "parallax.npz")
        dtype = jnp.float64 if wide else jnp.float32
        inputs = [jnp.asarray(data[name], dtype) for name in ("q", "r", "k", "v")]
        out, pull = jax.vjp(jax.jit(functools.partial(parallax_attention, implementation=form)), *inputs)
        np.testing.assert_allclose(out, data["o"], atol=tolerance)
        for got, name in zip(pull(jnp.asarray(data["do"], dtype)), ("dq", "dr", "dk", "dv")):
            np.testing.assert_allclose(got, data[name], atol=tolerance * max(1, np.abs(data[name]).max()), err_msg=name)


@pytest.mark.slow  # the contract has values and gradients, local linear attention's tests the same tangents
@settings(deadline=None, max_examples=5)
@given(
    length=st.sampled_from([1, 9, 33]),
    key_heads=st.sampled_from([1, 2, 4]),
    is_causal=st.booleans(),
    window=st.sampled_from([None, 1, 7]),
)
def test_forms_agree_in_values_gradients_and_tangents(length, key_heads, is_causal, window):
    inputs = arrays(length, key_heads)
    window = None if window is None else min(window, length)

    def derivatives(form):
        def loss(*inputs):
            out = parallax_attention(*inputs, is_causal=is_causal, window=window, implementation=form)
            return jnp.sum(jnp.sin(out)), out

        def run(*inputs):
            gradients, out = jax.grad(loss, (0, 1, 2, 3), has_aux=True)(*inputs)
            return out, gradients, jax.jvp(lambda *x: loss(*x)[1], inputs, inputs)[1]

        return jax.jit(run)(*inputs)

    for got, want in zip(jax.tree.leaves(derivatives("xla")), jax.tree.leaves(derivatives("reference")), strict=True):
        np.testing.assert_allclose(got, want, atol=3e-5 * max(1.0, np.abs(want).max()))


@every_form
def test_no_probe_is_softmax_attention(form):
    query, probe, key, value = arrays()
    out = attend(query, np.zeros_like(probe), key, value, implementation=form)
    np.testing.assert_allclose(out, dot_product_attention(query, key, value, is_causal=True), atol=1e-5)


@every_form
def test_the_regressions_solution_as_a_probe_is_local_linear_attention(form):
    query, _, key, value = arrays()
    want, residuals = local_linear_attention(query, key, value, ridge=0.7, return_residuals=True)
    out = attend(query, -residuals.solution, key, value, implementation=form)
    np.testing.assert_allclose(out, want, atol=2e-5)


@every_form
def test_weights_add_to_one_and_the_first_token_gives_its_value(form):
    query, probe, key, value = arrays(key_heads=4)
    np.testing.assert_allclose(attend(query, probe, key, np.ones_like(value), implementation=form), 1, atol=1e-5)
    out = attend(query, probe, key, value, implementation=form)
    np.testing.assert_allclose(out[:, 0], value[:, 0], atol=1e-5)


@pytest.mark.parametrize("window", [None, 5])
@every_form
def test_a_later_token_changes_nothing_before_it(form, window):
    inputs = arrays()
    changed = [x.copy() for x in inputs]
    for x in changed:
        x[:, 12:] *= -3
    before, after = (attend(*x, window=window, implementation=form) for x in (inputs, changed))
    np.testing.assert_array_equal(before[:, :12], after[:, :12])
    assert np.all(np.any(before[:, 12:] != after[:, 12:], axis=-1))


@pytest.mark.parametrize("window", [None, 5])
def test_decoding_equals_the_parallel_form(window):
    inputs = arrays(17)
    want = attend(*inputs, window=window)

    @jax.jit
    def decode(*inputs):
        def step(cache, token):
            out, cache = parallax_step(cache, *(x[:, None] for x in token), window=window)
            return cache, out[:, 0]

        cache = init_local_linear_cache(2, 17, 2, 8, window=window, value_dim=6)
        return jax.lax.scan(step, cache, tuple(jnp.swapaxes(x, 0, 1) for x in inputs))[1]

    np.testing.assert_allclose(jnp.swapaxes(decode(*inputs), 0, 1), want, atol=2e-5)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"probe": np.ones((2, 21, 2, 8), np.float32)}, "probe: got"),
        ({"probe": np.ones((2, 21, 4, 8), np.int32)}, "probe: got dtype int32"),
        ({"window": 22}, "window: got 22"),
        ({"window": True}, "window: got True"),
    ],
)
def test_bad_arguments_are_named(change, message):
    query, probe, key, value = arrays()
    with pytest.raises((ValueError, TypeError), match=message):
        parallax_attention(query, change.pop("probe", probe), key, value, **change)
