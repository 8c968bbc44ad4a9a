"""Regressions solved inside a TPU kernel, in interpret mode, against a solver of each query's matrix in float64."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from marks import slow_but

from attnlab.attention._kernels.banded import window_pattern
from attnlab.attention._shared.softmax_weights import dense_weights
from kernels_pallas.tpu.covariance_solve import covariance_solve, refusal

# Tokens, heads, key heads, head dim, dtype, what a query sees.
CASES = {
    "causal": (300, 2, 1, 8, jnp.float32, {"is_causal": True}),
    "causal window": (300, 2, 2, 16, jnp.bfloat16, {"is_causal": True, "window": 40}),
    "window at the edges": (300, 1, 1, 16, jnp.float32, {"is_causal": False, "window": 70}),
    "all keys": (140, 2, 1, 8, jnp.float32, {"is_causal": False}),
    "several tiles of keys": (700, 2, 1, 8, jnp.float32, {"is_causal": True, "window": 300}),
    "wide heads": (130, 1, 1, 200, jnp.bfloat16, {"is_causal": True}),
}


def problem(tokens, heads, key_heads, head_dim, dtype, sees):
    """Arrays of the call, and the solution."""
    draw = np.random.default_rng(0)
    query = jnp.asarray(draw.normal(size=(1, tokens, heads, head_dim)), dtype)
    key = jnp.asarray(draw.normal(size=(1, tokens, key_heads, head_dim)) + 1, dtype)
    offset = jnp.asarray(draw.normal(size=query.shape), jnp.float32)
    ridge = jnp.asarray(draw.uniform(0.5, 2, size=query.shape[:3]), jnp.float32)
    with jax.enable_x64(True):
        q, k = (np.asarray(x, np.float64) for x in (query, jnp.repeat(key, heads // key_heads, axis=2)))
        weights = np.asarray(dense_weights(q, k, scale=0.3, **{"window": None, **sees}))
    logits = 0.3 * np.einsum("BTNH,BSNH->BNTS", q, k)
    lse = np.log(np.sum(np.where(weights > 0, np.exp(logits), 0), axis=-1)).swapaxes(1, 2)
    centred = k[:, None] - np.einsum("BNTS,BSNH->BTNH", weights, k)[:, :, None]
    matrix = np.einsum("BNTS,BTSNH,BTSNI->BTNHI", weights, centred, centred)
    matrix += np.asarray(ridge, np.float64)[..., None, None] * np.eye(head_dim)
    solution = np.linalg.solve(matrix, np.asarray(offset, np.float64)[..., None])[..., 0]
    return (query, key, offset, ridge, jnp.asarray(lse, jnp.float32)), solution


def solver(case, **options):
    sees = CASES[case][-1]
    pattern = window_pattern(CASES[case][0], CASES[case][0], **sees)
    limits = {"tolerance": 1e-6, "max_iterations": 64, **options}
    return jax.jit(functools.partial(covariance_solve, pattern=pattern, scale=0.3, **limits))


@pytest.mark.parametrize("case", slow_but({"causal window"}, CASES))
@pytest.mark.long
def test_the_solution_is_each_query_s_own(case, interpreted):
    arrays, want = problem(*CASES[case])
    x, iterations, residual = interpreted(solver(case), *arrays)
    error = np.abs(np.asarray(x) - want).max() / np.abs(want).max()
    assert error < (1e-4 if CASES[case][4] == jnp.bfloat16 else 5e-6)
    assert np.all(residual <= 1e-6)
    # A query that sees one key has a covariance of 0 but for rounding: ridge x = b.
    if case == "causal":
        assert np.all(iterations[:, 0] <= 2)
    assert np.all(iterations >= 1)
    assert iterations.max() > 4


@pytest.mark.slow
def test_it_is_the_same_twice_and_ends_after_max_iterations(interpreted):
    arrays, _ = problem(*CASES["causal window"])
    first, again = (interpreted(solver("causal window", max_iterations=3), *arrays) for _ in range(2))
    for x, y in zip(first, again):
        np.testing.assert_array_equal(x, y)
    x, iterations, residual = first
    assert iterations.max() == 3
    assert np.all((residual <= 1e-6) | (iterations == 3))


@pytest.mark.parametrize(
    ("case", "tokens", "message"),
    [
        ("causal", 2**20, "keys of 8 channels take"),
        ("all keys", 0, "not empty"),
    ],
)
def test_what_it_cannot_hold_is_refused_with_the_reason(case, tokens, message):
    _, heads, key_heads, head_dim, dtype, sees = CASES[case]
    query, key = (jax.ShapeDtypeStruct((1, tokens, n, head_dim), dtype) for n in (heads, key_heads))
    assert message in refusal(query, key, pattern=window_pattern(tokens, tokens, **sees))
