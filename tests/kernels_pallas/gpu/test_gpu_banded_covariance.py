"""Covariances under the weights of banded flash attention: values and gradients, simulated or on a card, against
float64."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import export
from marks import slow_but

from kernels_pallas.gpu.banded_covariance import banded_covariance, banded_covariance_gradients, refusal, smem_bytes
from kernels_pallas.gpu.common import SMEM_BUDGET
from kernels_pallas.gpu.tilted import stages_of
from kernels_pallas.patterns import Boxes, Intervals

# Of the largest number of an array: of sums of two 16-bit numbers, and of 16-bit ones, in bfloat16 and float16.
EXACT = {jnp.bfloat16: 2.0**-14, jnp.float16: 2.0**-17}
ROUNDED = {jnp.bfloat16: 2e-2, jnp.float16: 2.5e-3}


def causal(length, window):
    return Intervals(lambda query: (query - window + 1, query + 1), length, length)


def everything(length):
    return Intervals(lambda query: (0 * query, 0 * query + length), length, length)


def draw(length, *, heads=1, key_heads=1, dims=(64, 64), dtype=jnp.bfloat16, offset=0.0, spread=0.0, batch=1):
    """query, key, value, direction, gradient. offset: the mean of keys and values. spread: of the sizes of the rows of
    direction and gradient, as powers of ten."""
    rng = np.random.default_rng(length)
    shapes = [(heads, dims[0], 0), (key_heads, dims[0], offset), (key_heads, dims[1], offset)]
    tokens = [jnp.asarray(rng.normal(mean, size=(batch, length, *shape)), dtype) for *shape, mean in shapes]
    rows = 10.0 ** rng.uniform(-spread, spread, size=(2, batch, length, heads, 1))
    vectors = [rng.normal(size=(batch, length, heads, dim)) * size for dim, size in zip(dims, rows, strict=True)]
    return *tokens, *(jnp.asarray(x, jnp.float32) for x in vectors)


def sees_of(pattern):
    starts, ends = pattern.bounds(np.arange(pattern.queries))
    keys = np.arange(pattern.keys)
    return (starts[:, None] <= keys) & (keys < ends[:, None])


def reference(query, key, value, direction, gradient, *, sees, scale):
    """In float64: (lse, mean of keys, mean of values), Cov_p(v, k) x, its gradients, and a bound of the scale's: the
    root of the sum of the squares of what it sums up."""
    query, key, value, x, g = (np.asarray(array, np.float64) for array in (query, key, value, direction, gradient))
    group = query.shape[2] // key.shape[2]
    key, value = (np.repeat(array, group, axis=2) for array in (key, value))
    logits = np.where(sees, np.einsum("btnh,bsnh->bnts", scale * query, key), -1e300)
    weights = np.exp(logits - logits.max(-1, keepdims=True)) * sees
    total = weights.sum(-1, keepdims=True)
    weights = weights / np.where(total > 0, total, 1)
    with np.errstate(divide="ignore"):
        lse = np.where(total > 0, logits.max(-1, keepdims=True) + np.log(total), -np.inf)
    means = [np.einsum("bnts,bsnh->btnh", weights, array) for array in (key, value)]
    slopes, gains = np.einsum("btnh,bsnh->bnts", x, key), np.einsum("btnh,bsnh->bnts", g, value)
    slopes, gains = (a - (weights * a).sum(-1, keepdims=True) for a in (slopes, gains))
    out = np.einsum("bnts,bsnv->btnv", weights * slopes, value)
    of_logits = weights * (slopes * gains - np.moveaxis((g * out).sum(-1), 1, 2)[..., None])
    to_query = np.einsum("bnts,bsnh->btnh", of_logits, key)
    to_key = np.einsum("bnts,btnh->bsnh", scale * of_logits, query)
    to_key += np.einsum("bnts,btnh->bsnh", weights * gains, x)
    to_value = np.einsum("bnts,btnv->bsnv", weights * slopes, g)
    to_key, to_value = (a.reshape(*a.shape[:2], -1, group, a.shape[-1]).sum(3) for a in (to_key, to_value))
    to_direction = np.einsum("bnts,bsnh->btnh", weights * gains, key)
    of_scale = query * to_query
    gradients = scale * to_query, to_key, to_value, to_direction, of_scale.sum()
    return (np.moveaxis(lse[..., 0], 1, 2), *means), out, gradients, np.sqrt((of_scale**2).sum())


def kept_of(means, dtype):
    """lse and the means as attention gives them."""
    lse, *means = means
    return jnp.asarray(lse, jnp.float32), *(jnp.asarray(mean, dtype) for mean in means)


def assert_near(got, want, share, largest=None):
    largest = np.abs(want).max() if largest is None else largest
    np.testing.assert_allclose(np.asarray(got, np.float64), want, rtol=0, atol=share * largest)


HALF, WIDE = {"dtype": jnp.float16}, {"dims": (128, 128)}
CASES = {  # pattern, options of draw
    "one tile": (causal(100, 60), {}),
    "causal": (causal(140, 140), {}),
    "window": (causal(300, 100), {}),
    "causal, grouped": (causal(250, 130), {"heads": 4, "key_heads": 2, "batch": 2}),
    "everything, ragged": (everything(150), {"heads": 2}),
    "wide": (causal(256, 200), WIDE),
    "wide, float16": (everything(256), WIDE | HALF),
    "other widths": (causal(200, 70), {"dims": (80, 40)}),
    "values apart": (causal(200, 200), {"dims": (64, 128), "heads": 2}),
    "float16": (causal(140, 140), HALF),
    "keys far from 0": (causal(200, 150), {"offset": 3.0}),
    "keys far from 0, float16": (causal(200, 150), {"offset": 3.0} | HALF),
    "negative scale": (causal(140, 50), {}),
}
SCALE = {"negative scale": -0.2}
QUICK = ("one tile",)


@pytest.mark.parametrize("case", slow_but(QUICK, CASES))
@pytest.mark.long
def test_equals_float64(case, on_gpu):
    pattern, options = CASES[case]
    arrays, scale = draw(pattern.queries, **options), SCALE.get(case, 0.125)
    *tokens, _ = arrays
    means, want, _, _ = reference(*arrays, sees=sees_of(pattern), scale=scale)
    dtype = tokens[0].dtype.type
    got = on_gpu(banded_covariance, *tokens, *kept_of(means, dtype), pattern=pattern, scale=scale)
    assert got.dtype == jnp.float32
    assert_near(got, want, EXACT[dtype])


QUICK_GRADIENTS = ("one tile",)


@pytest.mark.parametrize("case", slow_but(QUICK_GRADIENTS, [case for case in CASES if "far from 0" not in case]))
@pytest.mark.long
def test_gradients_equal_float64(case, on_gpu):
    pattern, options = CASES[case]
    arrays, scale = draw(pattern.queries, **options), SCALE.get(case, 0.125)
    *tokens, gradient = arrays
    means, out, wants, of_scale = reference(*arrays, sees=sees_of(pattern), scale=scale)
    dtype = tokens[0].dtype.type
    kept = *kept_of(means, dtype), jnp.asarray(out, jnp.float32)
    run = jax.jit(functools.partial(banded_covariance_gradients, pattern=pattern))
    got = on_gpu(run, *tokens, *kept, gradient, scale=jnp.float32(scale))
    if case not in QUICK_GRADIENTS:  # the same bits again
        again = on_gpu(run, *tokens, *kept, gradient, scale=jnp.float32(scale))
        for a, b in zip(got, again, strict=True):
            np.testing.assert_array_equal(a, b)
    shares = [ROUNDED[dtype]] * 3 + [EXACT[dtype]] + [ROUNDED[dtype]]
    largest = [None] * 4 + [of_scale]
    for a, b, share, most, x in zip(got, wants, shares, largest, [*tokens, jnp.float32(0)], strict=True):
        assert a.dtype == x.dtype
        assert_near(a, b, share, most)


@pytest.mark.slow
def test_rows_of_very_different_sizes_keep_their_digits_in_float16(on_gpu):
    """Directions of conjugate gradients, of which some have converged."""
    pattern = causal(200, 150)
    arrays = draw(200, spread=6.0, heads=2, dtype=jnp.float16)
    *tokens, gradient = arrays
    means, want, wants, _ = reference(*arrays, sees=sees_of(pattern), scale=0.125)
    kept = kept_of(means, jnp.float16)
    got = on_gpu(banded_covariance, *tokens, *kept, pattern=pattern, scale=0.125)
    sizes = np.linalg.norm(tokens[3], axis=-1, keepdims=True)
    assert_near(got / sizes, want / sizes, EXACT[jnp.float16])
    kept = *kept, jnp.asarray(want, jnp.float32)
    run = functools.partial(banded_covariance_gradients, pattern=pattern, scale=0.125)
    to_direction = on_gpu(run, *tokens, *kept, gradient)[3]
    sizes = np.linalg.norm(gradient, axis=-1, keepdims=True)
    assert_near(to_direction / sizes, wants[3] / sizes, EXACT[jnp.float16])


@pytest.mark.slow
def test_queries_without_keys_and_key_tiles_that_nobody_sees(on_gpu):
    """Those hold NaN here: they are not read. (The first one stands in the lists of queries that see none.)"""
    starts, ends = np.zeros(384, int), np.zeros(384, int)
    starts[130:140], ends[130:140] = 256, 300  # the second query tile sees a part of the third key tile; others nothing
    pattern = Intervals(lambda query: (starts[query], ends[query]), 384, 384)
    arrays = draw(384)
    means, out, wants, _ = reference(*arrays, sees=sees_of(pattern), scale=0.125)
    query, key, value, direction, gradient = arrays
    unseen = (jnp.arange(384) // 128 == 1)[:, None, None]
    key, value = (jnp.where(unseen, jnp.nan, x) for x in (key, value))
    kept = kept_of(means, jnp.bfloat16)
    got = on_gpu(banded_covariance, query, key, value, direction, *kept, pattern=pattern, scale=0.125)
    sees = (np.arange(384) >= 130) & (np.arange(384) < 140)
    assert np.all(got[:, ~sees] == 0)
    assert_near(got, out, EXACT[jnp.bfloat16])
    run = functools.partial(banded_covariance_gradients, pattern=pattern, scale=0.125)
    gradients = on_gpu(run, query, key, value, direction, *kept, got, gradient)
    for number in (0, 3):
        assert np.all(gradients[number][:, ~sees] == 0)
        assert_near(gradients[number], wants[number], ROUNDED[jnp.bfloat16])
    for number in (1, 2):
        got, want = (np.asarray(x, np.float64)[:, ~unseen[:, 0, 0]] for x in (gradients[number], wants[number]))
        assert np.all(got[:, :128] == 0)
        assert_near(got, want, ROUNDED[jnp.bfloat16])


@pytest.mark.slow
def test_boxes(on_gpu):
    along = lambda query: (query - 3, query + 4)  # noqa: E731
    pattern = Boxes([(along, 16), (along, 16)], (16, 8))
    arrays = draw(256, heads=2)
    *tokens, gradient = arrays
    tiling = pattern.tiled(128, 128)
    inside = [
        (tiling.starts[0, axis][:, None] <= tiling.coordinates[0, axis])
        & (tiling.coordinates[0, axis] < tiling.ends[0, axis][:, None])
        for axis in range(2)
    ]
    means, want, wants, _ = reference(*arrays, sees=inside[0] & inside[1], scale=0.125)
    kept = kept_of(means, jnp.bfloat16)
    assert_near(on_gpu(banded_covariance, *tokens, *kept, pattern=pattern, scale=0.125), want, EXACT[jnp.bfloat16])
    kept = *kept, jnp.asarray(want, jnp.float32)
    got = on_gpu(banded_covariance_gradients, *tokens, *kept, gradient, pattern=pattern, scale=0.125)
    for a, b in list(zip(got, wants, strict=True))[:4]:
        assert_near(a, b, ROUNDED[jnp.bfloat16])


@pytest.mark.slow
def test_under_vmap_scan_and_remat(on_gpu):
    pattern = causal(130, 100)
    *tokens, _ = arrays = draw(130)
    means, *_ = reference(*arrays, sees=sees_of(pattern), scale=0.125)
    arguments = *tokens, *kept_of(means, jnp.bfloat16)
    run = functools.partial(banded_covariance, pattern=pattern, scale=0.125)
    want = on_gpu(run, *arguments)
    batched = [jnp.stack([x, x]) for x in arguments]
    many = on_gpu(jax.vmap(run), *batched)
    scanned = on_gpu(lambda *args: jax.lax.scan(lambda _, x: (0, jax.checkpoint(run)(*x)), 0, args)[1], *batched)
    for each in (*many, *scanned):  # on a card, what XLA prepares for the kernel is rounded in another order
        np.testing.assert_allclose(each, want, rtol=0, atol=1e-5 * np.abs(want).max())


def structs(dtype, dims, pattern, heads=4, key_heads=2):
    def struct(many, dim, dtype=dtype):
        return jax.ShapeDtypeStruct((1, pattern.queries, many, dim), dtype)

    tokens = struct(heads, dims[0]), struct(key_heads, dims[0]), struct(key_heads, dims[1])
    lse = jax.ShapeDtypeStruct((1, pattern.queries, heads), jnp.float32)
    means = struct(heads, dims[0]), struct(heads, dims[1])
    vectors = (struct(heads, dim, jnp.float32) for dim in (dims[0], dims[1], dims[1]))
    direction, out, gradient = vectors
    return [*tokens, direction, lse, *means], [out, gradient]


PATTERNS = {"causal": causal(512, 200), "everything, ragged": everything(500)}
LOWERED = [
    (dtype, dims, pattern)
    for dtype in (jnp.bfloat16, jnp.float16)
    for dims in ((64, 64), (128, 128), (80, 80), (64, 128), (128, 64))
    for pattern in PATTERNS
    if (dtype, dims) != (jnp.bfloat16, (80, 80))  # padded to 128, outside of the kernel
]
# CI lowers the slow ones too.
QUICK_LOWERED = [case for case in LOWERED if case[:2] == (jnp.bfloat16, (128, 128))][:1]


@pytest.mark.parametrize("call", slow_but(QUICK_LOWERED, LOWERED))
@pytest.mark.long
def test_is_lowered_for_a_gpu(call):
    dtype, dims, pattern = call
    options = {"pattern": PATTERNS[pattern], "scale": 0.1}
    with jax.enable_x64(dtype == jnp.float16):
        arrays, more = structs(dtype, dims, PATTERNS[pattern])
        gradients = jax.vmap(functools.partial(banded_covariance_gradients, **options))
        calls = [(functools.partial(banded_covariance, **options), arrays)]
        calls += [(gradients, [jax.ShapeDtypeStruct((2, *x.shape), x.dtype) for x in (*arrays, *more)])]
        for run, arguments in calls:
            exported = export.export(jax.jit(run), platforms=["cuda"])(*arguments)
            assert b"mosaic_gpu" in exported.mlir_module_serialized


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        (
            {"dtype": jnp.float32},
            "needs query, key and value all bfloat16 or all float16, got float32, float32 and float32",
        ),
        ({"dims": (129, 64)}, "serves head dims up to 128, got 129 and 64"),
    ],
)
def test_refuses_with_the_reason(options, reason):
    query, key, value, direction, _ = draw(8, **options)
    pattern = causal(8, 4)
    assert refusal(query, key, value, pattern=pattern) == reason
    lse, mean = jnp.zeros(query.shape[:3]), jnp.zeros(query.shape)
    with pytest.raises(ValueError, match=reason):
        banded_covariance(query, key, value, direction, lse, mean, pattern=pattern, scale=1.0)


def test_blocks_fit_into_shared_memory_with_two_slots_at_least():
    widths = [(keys, values) for keys in (64, 128) for values in (64, 128)]
    assert all(smem_bytes(*each) <= SMEM_BUDGET for each in widths)
    assert stages_of([128, 256], [128, 128]) == 3
    assert stages_of([64, 64], [64, 64]) == 4
