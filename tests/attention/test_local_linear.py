"""Local linear attention: the published vectors, the regression it is, its solver, decoding."""

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
    local_linear_step,
)

VECTORS = Path(__file__).parents[1] / "vectors" / "local_linear"
FORMS = ("reference", "xla")
every_form = pytest.mark.parametrize("form", slow_but(["xla"], FORMS))
STATIC = ("is_causal", "window", "tolerance", "max_iterations", "return_residuals", "implementation")
attend = jax.jit(local_linear_attention, static_argnames=STATIC)
# Iterations until float64 has no more to give.
EXACT = {"tolerance": 1e-12, "max_iterations": 100}


def arrays(length=21, heads=4, key_heads=2, batch=2, seed=0, dtype=np.float32):
    rng = np.random.default_rng(seed)
    shapes = ((batch, length, heads, 8), (batch, length, key_heads, 8), (batch, length, key_heads, 6))
    return tuple(rng.normal(size=shape).astype(dtype) for shape in shapes)


@pytest.mark.parametrize("name", slow_but(["small_ridge", "not_causal"], ["large_ridge", "small_ridge", "not_causal"]))
@every_form
@pytest.mark.parametrize(("wide", "tolerance"), [(True, 1e-9), pytest.param(False, 2e-4, marks=pytest.mark.slow)])
def test_vectors(name, form, wide, tolerance):
    with jax.enable_x64(wide):
        data = np.load(VECTORS / f"{name}.npz")
        *inputs, upstream = (jnp.asarray(data[x], jnp.float64 if wide else jnp.float32) for x in ("q", "k", "v", "do"))
        exact = EXACT if wide else {}

        def run(*arguments):
            *inputs, ridge = arguments
            return local_linear_attention(
                *inputs,
                ridge=ridge,
                is_causal=bool(data["is_causal"]),
                return_residuals=True,
                implementation=form,
                **exact,
            )

        def loss(*arguments):
            out, residuals = run(*arguments)
            return jnp.sum(out * upstream), (out, residuals.rho)

        ridge = jnp.asarray(data["ridge"], inputs[0].dtype)
        gradients, (out, rho) = jax.jit(jax.grad(loss, (0, 1, 2, 3), has_aux=True))(*inputs, ridge)
        for got, want in zip((out, rho, *gradients), ("o", "rho", "dq", "dk", "dv", "dridge")):
            largest = max(1.0, np.abs(data[want]).max())
            np.testing.assert_allclose(got, data[want], atol=tolerance * largest, err_msg=want)


SHAPES = st.fixed_dictionaries(
    {
        "length": st.sampled_from([1, 9, 33]),
        "key_heads": st.sampled_from([1, 2, 4]),
        "is_causal": st.booleans(),
        "window": st.sampled_from([None, 1, 7]),
        "per_query": st.booleans(),
        "seed": st.integers(0, 99),
    }
)


@settings(deadline=None, max_examples=2)
@given(shape=SHAPES)
@pytest.mark.slow
def test_forms_agree_in_values_gradients_and_tangents(shape):
    """In float64, where the solver is as exact as the dense solve; derivatives of the ridge too."""
    length = shape["length"]
    window = None if shape["window"] is None else min(shape["window"], length)
    with jax.enable_x64(True):
        inputs = arrays(length, key_heads=shape["key_heads"], seed=shape["seed"], dtype=np.float64)
        ridge = np.random.default_rng(1).uniform(0.2, 3, size=(2, length, 4) if shape["per_query"] else ())

        def derivatives(form):
            def loss(*arguments):
                *inputs, ridge = arguments
                out = local_linear_attention(
                    *inputs, ridge=ridge, is_causal=shape["is_causal"], window=window, implementation=form, **EXACT
                )
                return jnp.sum(jnp.sin(out)), out

            arguments = (*inputs, ridge)

            def run(*arguments):
                gradients, out = jax.grad(loss, (0, 1, 2, 3), has_aux=True)(*arguments)
                return out, gradients, jax.jvp(lambda *x: loss(*x)[1], arguments, arguments)[1]

            return jax.jit(run)(*arguments)

        for got, want in zip(
            jax.tree.leaves(derivatives("xla")), jax.tree.leaves(derivatives("reference")), strict=True
        ):
            np.testing.assert_allclose(got, want, atol=1e-8 * max(1.0, np.abs(want).max()))


def regression_by_loops(query, key, value, ridge, scale):
    """One query at a time: weighted ridge regression of v on (1, k - q), the intercept not penalised."""
    out = np.zeros((*query.shape[:3], value.shape[-1]))
    for b, t, n in np.ndindex(*query.shape[:3]):
        k, v = key[b, : t + 1, n], value[b, : t + 1, n]
        logits = scale * k @ query[b, t, n]
        weights = np.exp(logits - logits.max())
        weights /= weights.sum()
        design = np.concatenate([np.ones((t + 1, 1)), k - query[b, t, n]], axis=1)
        penalty = ridge * np.diag([0.0] + [1.0] * k.shape[1])
        out[b, t, n] = np.linalg.solve(design.T * weights @ design + penalty, design.T * weights @ v)[0]
    return out


@every_form
def test_it_is_a_weighted_ridge_regression_around_the_query(form):
    with jax.enable_x64(True):
        inputs = arrays(12, key_heads=4, dtype=np.float64)
        out = attend(*inputs, ridge=0.3, implementation=form, **EXACT)
        np.testing.assert_allclose(out, regression_by_loops(*inputs, 0.3, 8**-0.5), atol=1e-9)


@every_form
def test_a_huge_ridge_is_softmax_attention(form):
    inputs = arrays()
    np.testing.assert_allclose(
        attend(*inputs, ridge=1e7, implementation=form), dot_product_attention(*inputs, is_causal=True), atol=2e-5
    )


@every_form
def test_affine_values_are_reproduced_once_the_keys_span_the_space(form):
    with jax.enable_x64(True):
        query, key, _ = arrays(30, key_heads=4, dtype=np.float64)
        matrix, shift = np.random.default_rng(5).normal(size=(8, 6)), np.arange(6.0)
        value, want = key @ matrix + shift, query @ matrix + shift
        out = attend(query, key, value, ridge=1e-10, implementation=form, tolerance=1e-14, max_iterations=300)
        np.testing.assert_allclose(out[:, 15:], want[:, 15:], atol=1e-5)
        softmax = dot_product_attention(query, key, value, is_causal=True)
        assert np.abs(softmax[:, 15:] - want[:, 15:]).max() > 0.5


@every_form
def test_weights_add_to_one(form):
    """Ones give ones, and a constant added to the values is added to the output; some weights are negative."""
    with jax.enable_x64(True):
        query, key, value = arrays(dtype=np.float64)
        kwargs = {"ridge": 0.2, "implementation": form, **EXACT}
        np.testing.assert_allclose(attend(query, key, np.ones_like(value), **kwargs), 1, atol=1e-9)
        moved = attend(query, key, value + 3, **kwargs)
        np.testing.assert_allclose(moved, attend(query, key, value, **kwargs) + 3, atol=1e-9)
        assert np.any(attend(query, key, np.abs(value), **kwargs) < 0)


@pytest.mark.parametrize("window", [None, 5])
@every_form
def test_a_later_token_changes_nothing_before_it(form, window):
    query, key, value = arrays()
    changed = [x.copy() for x in (query, key, value)]
    for x in changed:
        x[:, 12:] *= -3
    before, after = (attend(*x, ridge=0.5, window=window, implementation=form) for x in ((query, key, value), changed))
    np.testing.assert_allclose(before[:, :12], after[:, :12], atol=1e-6)
    assert np.all(np.any(before[:, 12:] != after[:, 12:], axis=-1))


def test_the_first_token_gives_its_value_and_no_gradient_to_its_query():
    with jax.enable_x64(True):
        query, key, value = arrays(key_heads=4, dtype=np.float64)

        def first(query):
            out = local_linear_attention(query, key, value, ridge=0.5)
            return jnp.sum(out[:, 0] ** 2), out

        gradient, out = jax.jit(jax.grad(first, has_aux=True))(query)
        np.testing.assert_allclose(out[:, 0], value[:, 0], atol=1e-12)
        np.testing.assert_allclose(gradient[:, 0], 0, atol=1e-12)


@pytest.mark.parametrize("ridge", [0.1, 1.0, 10.0])
@pytest.mark.long
def test_float32_is_within_1e_4_of_a_dense_solve_in_float64(ridge):
    rng = np.random.default_rng(0)
    query, key, value = (rng.normal(size=(1, 256, 1, 64)).astype(np.float32) for _ in range(3))
    out, residuals = attend(query, key, value, ridge=ridge, return_residuals=True)
    with jax.enable_x64(True):
        want = attend(*(x.astype(np.float64) for x in (query, key, value)), ridge=ridge, implementation="reference")
    want = np.asarray(want)
    assert np.sqrt(np.mean((out - want) ** 2)) < 1e-4 * np.sqrt(np.mean(want**2))
    assert np.all((residuals.residual <= 1e-6) | (residuals.iterations == 32))


@every_form
def test_keys_far_from_zero_and_close_together_are_told_apart(form):
    rng = np.random.default_rng(0)
    inputs = [(rng.normal(size=(1, 64, 2, 8)) + offset).astype(np.float32) for offset in (50, 50, 0)]
    options = {"ridge": 0.3, "scale": 0.02}
    with jax.enable_x64(True):
        want = attend(*(x.astype(np.float64) for x in inputs), implementation="reference", **options)
    got = attend(*inputs, implementation=form, **options)
    np.testing.assert_allclose(got, want, rtol=0, atol=5e-4 * np.abs(want).max())


@pytest.mark.slow
def test_each_query_stops_on_its_own_and_a_larger_ridge_stops_sooner():
    inputs = arrays(60)
    few, many = (attend(*inputs, ridge=ridge, return_residuals=True)[1].iterations for ridge in (10.0, 0.1))
    assert few.max() < many.max() <= 32
    assert len(np.unique(many)) > 3
    assert np.all(many[:, 0] <= 1)  # one key: the covariance is 0
    capped = attend(*inputs, ridge=0.1, max_iterations=3, return_residuals=True)[1]
    assert capped.iterations.max() == 3
    assert np.any(capped.residual > 1e-6)


@pytest.mark.parametrize("window", [None, 5])
def test_decoding_equals_the_parallel_form(window):
    query, key, value = arrays(17)
    want = attend(query, key, value, ridge=0.5, window=window)

    @jax.jit
    def decode(query, key, value):
        def step(cache, token):
            out, cache = local_linear_step(cache, *(x[:, None] for x in token), ridge=0.5, window=window)
            return cache, out[:, 0]

        cache = init_local_linear_cache(2, 15, 2, 8, window=window, value_dim=6)
        return jax.lax.scan(step, cache, tuple(jnp.swapaxes(x, 0, 1) for x in (query, key, value)))[1]

    out = jnp.swapaxes(decode(query, key, value), 0, 1)
    fits = 17 if window else 15
    np.testing.assert_allclose(out[:, :fits], want[:, :fits], atol=5e-5)
    assert np.all(np.isnan(out[:, fits:]))


@pytest.mark.slow  # the fast tests hold it to n^1.5, in test_contract.py
def test_memory_grows_with_length_alone():
    def temporary(length, window):
        shape = jax.ShapeDtypeStruct((1, length, 1, 16), jnp.float32)

        def loss(query, key, value):
            return jnp.sum(local_linear_attention(query, key, value, ridge=1.0, window=window) ** 2)

        compiled = jax.jit(jax.grad(loss, (0, 1, 2))).lower(shape, shape, shape).compile()
        return compiled.memory_analysis().temp_size_in_bytes

    for window in (None, 64):
        # Many blocks of 128 queries, so that those of one do not count.
        assert temporary(16384, window) < 5 * temporary(4096, window)
        assert temporary(16384, window) < 16384**2 * 4 / 8  # a buffer of length squared


@every_form
@pytest.mark.parametrize("edge", ["repeated keys", "huge logits", "tiny ridge"])
def test_values_and_gradients_are_finite_at_the_edges(form, edge):
    query, key, value = arrays()
    ridge = 1e-4 if edge == "tiny ridge" else 0.1
    if edge == "repeated keys":
        key = np.broadcast_to(key[:, :1], key.shape)
    if edge == "huge logits":
        query = 1e3 * query

    @jax.jit
    def run(query, key, value, ridge):
        def loss(*arguments):
            return jnp.sum(local_linear_attention(*arguments[:3], ridge=arguments[3], implementation=form) ** 2)

        return jax.value_and_grad(loss, (0, 1, 2, 3))(query, key, value, ridge)

    for leaf in jax.tree.leaves(run(query, key, value, ridge)):
        assert np.all(np.isfinite(leaf))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"ridge": 0.0}, "ridge: got 0.0; need a number above 0"),
        ({"ridge": "much"}, "ridge: got str"),
        ({"ridge": jnp.ones((21, 4))}, "ridge: got"),
        ({"window": 0}, "window: got 0"),
        ({"window": 22}, "window: got 22; need 1 to the length, 21"),
        ({"tolerance": 0}, "tolerance: got 0"),
        ({"max_iterations": 0}, "max_iterations: got 0"),
        ({"is_causal": 1}, "is_causal: got 1"),
    ],
)
def test_bad_arguments_are_named(change, message):
    with pytest.raises((ValueError, TypeError), match=message):
        local_linear_attention(*arrays(), **{"ridge": 1.0, **change})
