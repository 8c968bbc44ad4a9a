"""Parallax in one pass: values and gradients, simulated or on a card, against float64."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import export
from marks import slow_but

from kernels_pallas.gpu.banded_parallax import banded_parallax, banded_parallax_gradients, refusal, smem_bytes
from kernels_pallas.gpu.common import SMEM_BUDGET
from kernels_pallas.patterns import Intervals

# Of the largest number of an array: weights are rounded to 16 bits, and so are results.
TOLERANCE = {jnp.bfloat16: 2e-2, jnp.float16: 2.5e-3}


def causal(length, window):
    return Intervals(lambda query: (query - window + 1, query + 1), length, length)


def everything(length):
    return Intervals(lambda query: (0 * query, 0 * query + length), length, length)


def draw(length, *, heads=1, key_heads=1, dims=(64, 64), dtype=jnp.bfloat16, offset=0.0, size=1.0, batch=1):
    """query, key, value, probe, gradient of the output. offset: the mean of keys. size: of the probe."""
    rng = np.random.default_rng(length)

    def array(many, dim, mean=0.0, size=1.0):
        return jnp.asarray(size * rng.normal(mean, size=(batch, length, many, dim)), dtype)

    tokens = array(heads, dims[0]), array(key_heads, dims[0], offset), array(key_heads, dims[1])
    return *tokens, array(heads, dims[0], size=size), array(heads, dims[1])


def reference(arrays, *, pattern, scale):
    """In float64: out, lse, the means of r . k and of values; gradients; the root of the sum of the squares of what the
    scale's gradient sums up."""
    query, key, value, probe, g = (np.asarray(x, np.float64) for x in arrays)
    group = query.shape[2] // key.shape[2]
    key, value = (np.repeat(x, group, axis=2) for x in (key, value))
    starts, ends = pattern.bounds(np.arange(pattern.queries))
    sees = (starts[:, None] <= np.arange(pattern.keys)) & (np.arange(pattern.keys) < ends[:, None])
    logits = np.where(sees, np.einsum("btnh,bsnh->bnts", scale * query, key), -1e300)
    weights = np.exp(logits - logits.max(-1, keepdims=True)) * sees
    total = weights.sum(-1, keepdims=True)
    weights = weights / np.where(total > 0, total, 1)
    with np.errstate(divide="ignore"):
        lse = np.where(total > 0, logits.max(-1, keepdims=True) + np.log(total), -np.inf)
    slopes = np.einsum("btnh,bsnh->bnts", probe, key)
    slope = (weights * slopes).sum(-1, keepdims=True)
    factors = 1 + slope - slopes
    out = np.einsum("bnts,bsnv->btnv", weights * factors, value)
    mean = np.einsum("bnts,bsnv->btnv", weights, value)
    gains = np.einsum("btnv,bsnv->bnts", g, value)
    gains = gains - (weights * gains).sum(-1, keepdims=True)
    # d out = sum of (d p) factors v + p (d abar - d a) v, where d abar = sum of p d a + (d p) a.
    of_out = (weights * factors * gains).sum(-1, keepdims=True)
    of_logits = weights * (gains * factors - of_out)
    to_query = np.einsum("bnts,bsnh->btnh", of_logits, key)
    to_key = np.einsum("bnts,btnh->bsnh", scale * of_logits, query)
    to_key -= np.einsum("bnts,btnh->bsnh", weights * gains, probe)
    to_value = np.einsum("bnts,btnv->bsnv", weights * factors, g)
    to_key, to_value = (x.reshape(*x.shape[:2], -1, group, x.shape[-1]).sum(3) for x in (to_key, to_value))
    to_probe = -np.einsum("bnts,bsnh->btnh", weights * gains, key)
    of_scale = query * to_query
    lse, slope = (np.moveaxis(x[..., 0], 1, 2) for x in (lse, slope))
    gradients = scale * to_query, to_key, to_value, to_probe, of_scale.sum()
    return (out, lse, slope, mean), gradients, np.sqrt((of_scale**2).sum())


def assert_near(got, want, share, largest=None):
    largest = np.abs(want).max() if largest is None else largest
    np.testing.assert_allclose(np.asarray(got, np.float64), want, rtol=0, atol=share * largest)


HALF, WIDE = {"dtype": jnp.float16}, {"dims": (128, 128)}
CASES = {  # pattern, options of draw
    "one tile": (causal(100, 60), {}),
    "causal": (causal(140, 140), {}),
    "window": (causal(300, 100), HALF),
    "causal, grouped": (causal(250, 130), {"heads": 4, "key_heads": 2, "batch": 2}),
    "everything, ragged": (everything(150), {"heads": 2}),
    "wide": (causal(256, 200), WIDE),
    "wide, float16": (everything(256), WIDE | HALF),
    "other widths": (causal(200, 70), {"dims": (80, 40)}),
    "values apart": (causal(200, 200), {"dims": (64, 128), "heads": 2}),
    "keys far from 0": (causal(200, 150), {"offset": 3.0}),
    "keys far from 0, float16": (causal(200, 150), {"offset": 3.0} | HALF),
    "large probes, float16": (causal(140, 140), {"size": 300.0} | HALF),
    "small probes, float16": (causal(140, 140), {"size": 1e-3} | HALF),
    "no probes": (causal(140, 140), {"size": 0.0} | HALF),
    "negative scale": (causal(140, 50), {}),
}
SCALE = {"negative scale": -0.2}
QUICK = ("one tile",)


@pytest.mark.parametrize("case", slow_but(QUICK, CASES))
@pytest.mark.long
def test_values_and_gradients_equal_float64(case, on_gpu):
    pattern, options = CASES[case]
    arrays, scale = draw(pattern.queries, **options), SCALE.get(case, 0.125)
    *tokens, gradient = arrays
    dtype = gradient.dtype.type
    wants, of_wants, of_scale = reference(arrays, pattern=pattern, scale=scale)

    @jax.jit
    def run(*arrays, scale):
        *tokens, gradient = arrays
        results = banded_parallax(*tokens, pattern=pattern, scale=scale)
        if case in QUICK:  # gradients' kernels are those of test_banded_covariance.py
            return results, ()
        return results, banded_parallax_gradients(*tokens, *results, gradient, pattern=pattern, scale=scale)

    results, gradients = on_gpu(run, *arrays, scale=jnp.float32(scale))
    if case not in QUICK:  # the same bits again
        again = on_gpu(run, *arrays, scale=jnp.float32(scale))
        for a, b in zip(jax.tree.leaves((results, gradients)), jax.tree.leaves(again), strict=True):
            np.testing.assert_array_equal(a, b)
    out, lse, slope, mean = results
    assert out.dtype == mean.dtype == dtype
    assert_near(out, wants[0], TOLERANCE[dtype])
    assert_near(mean, wants[3], TOLERANCE[dtype])
    np.testing.assert_allclose(lse, wants[1], rtol=1e-5, atol=1e-5)
    # a is of 16-bit numbers, multiplied exactly.
    sizes = np.linalg.norm(np.asarray(tokens[3], np.float64), axis=-1) * np.abs(np.asarray(tokens[1], float)).max()
    np.testing.assert_allclose(slope, wants[2], rtol=1e-5, atol=1e-5 * max(sizes.max(), 1e-30))
    for number, got in enumerate(gradients):
        want, x = of_wants[number], [*tokens, jnp.float32(0)][number]
        assert got.dtype == x.dtype
        if dtype != jnp.float16 or np.abs(want).max() < 6e4:
            assert_near(got, want, TOLERANCE[dtype], of_scale if number == 4 else None)


@pytest.mark.slow
def test_a_query_without_keys_gives_zero(on_gpu):
    starts, ends = np.zeros(256, int), np.zeros(256, int)
    starts[130:140], ends[130:140] = 20, 100
    pattern = Intervals(lambda query: (starts[query], ends[query]), 256, 256)
    arrays = draw(256)
    *tokens, gradient = arrays
    wants, of_wants, _ = reference(arrays, pattern=pattern, scale=0.125)
    results = on_gpu(banded_parallax, *tokens, pattern=pattern, scale=0.125)
    sees = ends > 0
    assert np.all(results[0][:, ~sees] == 0)
    assert np.all(results[1][:, ~sees] == -np.inf)
    assert_near(results[0], wants[0], TOLERANCE[jnp.bfloat16])
    got = on_gpu(banded_parallax_gradients, *tokens, *results, gradient, pattern=pattern, scale=0.125)
    for a, b in zip(got[:4], of_wants[:4], strict=True):
        assert_near(a, b, TOLERANCE[jnp.bfloat16])


LOWERED = [
    (dtype, dims, length)
    for dtype in (jnp.bfloat16, jnp.float16)
    for dims in ((64, 64), (128, 128), (80, 80), (64, 128), (128, 64))
    for length in (512, 500)
    if (dtype, dims) != (jnp.bfloat16, (80, 80))  # padded to 128, outside of the kernel
]


def both(*arrays):
    """Values and gradients."""
    *tokens, gradient = arrays
    length = tokens[0].shape[1]
    pattern = causal(length, 200) if length % 128 == 0 else everything(length)
    results = jax.checkpoint(functools.partial(banded_parallax, pattern=pattern, scale=0.1))(*tokens)
    return banded_parallax_gradients(*tokens, *results, gradient, pattern=pattern, scale=0.1)


def lower(function, *arrays):
    return export.export(jax.jit(function), platforms=["cuda"])(*arrays).mlir_module_serialized


# CI lowers the slow ones too.
QUICK_LOWERED = [case for case in LOWERED if case[:2] == (jnp.bfloat16, (128, 128))][:1]


@pytest.mark.parametrize("call", slow_but(QUICK_LOWERED, LOWERED))
@pytest.mark.long
def test_is_lowered_for_a_gpu(call):
    dtype, dims, length = call
    with jax.enable_x64(dtype == jnp.float16):
        assert b"mosaic_gpu" in lower(both, *draw(length, heads=4, key_heads=2, dims=dims, dtype=dtype))


@pytest.mark.slow
def test_is_lowered_for_a_gpu_under_vmap_scan_and_remat():
    arrays = [jnp.stack([x, x]) for x in draw(500, heads=4, key_heads=2)]
    for run in (lambda *args: jax.lax.scan(lambda _, x: (0, both(*x)), 0, args), jax.vmap(both)):
        assert b"mosaic_gpu" in lower(run, *arrays)


def test_refuses_with_the_reason():
    *tokens, _ = draw(8, dims=(136, 64))
    pattern, reason = causal(8, 4), "serves head dims up to 128, got 136 and 64"
    assert refusal(*tokens[:3], pattern=pattern) == reason
    with pytest.raises(ValueError, match=reason):
        banded_parallax(*tokens, pattern=pattern, scale=1.0)
    assert all(smem_bytes(*each) <= SMEM_BUDGET for each in ((64, 64), (64, 128), (128, 64), (128, 128)))
