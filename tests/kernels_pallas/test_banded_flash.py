"""Banded flash attention: its values and gradients in TPU interpret mode, and what it refuses."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from marks import slow_but

from attnlab import dilated_attention, local_attention
from kernels_pallas.patterns import Intervals, SortedIntervals
from kernels_pallas.tpu import banded_covariance, banded_flash, banded_flash_backward
from kernels_pallas.tpu.banded_flash import banded_flash_attention, refusal, vmem_bytes

TOLERANCE = {jnp.float32: 1e-5, jnp.bfloat16: 2e-2}  # bfloat16: weights are rounded to it, and so is the output


def draw_arrays(space, *, batch=1, heads=2, key_heads=1, head_dim=64, value_dim=64, dtype=jnp.float32):
    rng = np.random.default_rng(space)
    shapes = [(heads, head_dim), (key_heads, head_dim), (key_heads, value_dim)]
    return [jnp.asarray(rng.normal(size=(batch, *np.atleast_1d(space), *shape)), dtype) for shape in shapes]


def draw_case(case):
    """(function of query, key, value and options of local_attention, the arrays, tolerance)."""
    space, options, arrays = CASES[case]
    arrays = dict(arrays)
    if arrays.pop("segments", False):
        shape = (arrays.get("batch", 1), *np.atleast_1d(space))
        ids = np.sort(np.random.default_rng(0).integers(0, 4, shape), axis=1)
        options = options | {"segment_ids": jnp.asarray(ids, jnp.int32)}
    attend = dilated_attention if "dilation" in options else local_attention
    return (
        functools.partial(attend, return_lse=True, **options),
        draw_arrays(space, **arrays),
        TOLERANCE[arrays.get("dtype", jnp.float32)],
    )


def set_tiles(monkeypatch, block_q, block_k):
    for module in (banded_flash, banded_flash_backward):
        monkeypatch.setattr(module, "_BLOCKS", {})
        monkeypatch.setattr(module, "_DEFAULT_BLOCKS", (block_q, block_k))


@pytest.fixture
def small_tiles(monkeypatch):
    set_tiles(monkeypatch, 128, 128)


CASES = {  # length, options of local_attention, options of draw_arrays; tiles of 128, in several axes the pattern's
    "one token": (1, {"window": 1}, {}),
    "causal": (300, {"window": 140, "is_causal": True}, {"heads": 4, "key_heads": 2}),
    "causal bfloat16": (257, {"window": 30, "is_causal": True}, {"dtype": jnp.bfloat16, "value_dim": 40}),
    "all keys": (200, {"window": 200}, {"batch": 2, "head_dim": 24, "value_dim": 130}),
    "even window": (384, {"window": 50}, {"dtype": jnp.bfloat16, "head_dim": 128, "value_dim": 128}),
    "clipped": (290, {"window": 31, "edge": "clip"}, {"head_dim": 200, "value_dim": 256}),
    "blocks": (300, {"window": 64, "stride": 64}, {}),
    "strided causal": (260, {"window": 9, "stride": 4, "is_causal": True}, {"heads": 3, "key_heads": 3}),
    "sinks": (400, {"window": 20, "is_causal": True, "sinks": 3}, {}),
    "segments": (300, {"window": 101}, {"batch": 2, "segments": True}),
    "dilated": (300, {"window": 20, "dilation": 7, "is_causal": True}, {"heads": 4, "key_heads": 2}),
    "grid": ((20, 33), {"window": (5, 8), "is_causal": (True, False)}, {"heads": 2, "key_heads": 2}),
    "grid, dilated": ((40, 18), {"window": 3, "dilation": (2, 3)}, {"segments": True, "dtype": jnp.bfloat16}),
    "volume": ((9, 5, 6), {"window": (3, 5, 4), "stride": (1, 2, 1)}, {}),
    "softcap": (300, {"window": 140, "is_causal": True, "softcap": 0.7}, {"heads": 4, "key_heads": 2}),
    "segments, sinks": (290, {"window": 40, "is_causal": True, "sinks": 5}, {"segments": True, "dtype": jnp.bfloat16}),
}


NARROW = {"head_dim": 16, "value_dim": 16}
HALF = {"dtype": jnp.bfloat16, "value_dim": 130}
IN_QUARTERS = {  # the same at tiles of 256, whose quarters are empty, full or in between; with more heads in a step
    "causal in quarters": (513, {"window": 256, "is_causal": True}, {"heads": 8, "key_heads": 2} | NARROW),
    "quarters of many kinds": (700, {"window": 280, "is_causal": True, "sinks": 3}, {"key_heads": 2} | NARROW),
    "bidirectional in quarters": (600, {"window": 401}, {"heads": 8, "dtype": jnp.bfloat16}),
    "softcap in quarters": (513, {"window": 256, "is_causal": True, "softcap": 1.5}, {"heads": 4} | HALF),
    "segments in quarters": (520, {"window": 300}, {"heads": 4, "key_heads": 2, "segments": True} | HALF),
}
CASES |= IN_QUARTERS
# Cases whose values, and whose gradients too, are looked at in every run of the tests.
QUICK_VALUES = ("causal bfloat16", "sinks", "causal in quarters")


@pytest.mark.usefixtures("small_tiles")
@pytest.mark.parametrize("case", slow_but(QUICK_VALUES, CASES))
@pytest.mark.long
def test_equals_the_reference(case, interpreted, monkeypatch):
    if case in IN_QUARTERS:
        set_tiles(monkeypatch, 256, 256)
    attend, arrays, tolerance = draw_case(case)
    out, lse = interpreted(attend, *arrays, implementation="pallas_tpu")
    expected, expected_lse = attend(*arrays, implementation="reference")
    assert out.dtype == arrays[0].dtype
    assert lse.dtype == jnp.float32
    np.testing.assert_allclose(out.astype(jnp.float32), expected.astype(jnp.float32), rtol=tolerance, atol=tolerance)
    np.testing.assert_allclose(lse, expected_lse, rtol=1e-5, atol=1e-5)


@pytest.mark.usefixtures("small_tiles")
@pytest.mark.long
def test_a_query_without_keys_gives_zero_and_other_tiles_are_never_read(interpreted):
    """Intervals may leave out queries, whole query tiles and keys; key tiles that nobody sees hold NaN here."""
    starts, ends = np.zeros(384, int), np.zeros(384, int)
    starts[130:140], ends[130:140] = 256, 300  # the second query tile sees a part of the third key tile; others nothing
    query, key, value = draw_arrays(384)
    unseen = (jnp.arange(384) < 256)[:, None, None]
    out, lse = interpreted(
        banded_flash_attention,
        query,
        jnp.where(unseen, jnp.nan, key),
        jnp.where(unseen, jnp.nan, value),
        pattern=Intervals(lambda query: (starts[query], ends[query]), 384, 384),
        scale=0.125,
    )
    sees = np.zeros(384, bool)
    sees[130:140] = True
    assert np.all(out[:, ~sees] == 0)
    assert np.all(lse[:, ~sees] == -np.inf)
    logits = 0.125 * jnp.einsum("btnh,bsh->btns", query[:, 130:140], key[:, 256:300, 0], precision="highest")
    expected = jnp.einsum("btns,bsv->btnv", jax.nn.softmax(logits), value[:, 256:300, 0], precision="highest")
    np.testing.assert_allclose(out[:, 130:140], expected, rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(lse[:, 130:140], jax.nn.logsumexp(logits, axis=-1), rtol=1e-5, atol=1e-5)


@pytest.mark.long
def test_sinks_are_seen_before_the_end_of_an_empty_interval_too(interpreted):
    starts, ends = np.array([9, 9, 3, 0] * 32), np.array([2, 0, 12, 0] * 32)
    query, key, value = draw_arrays(128)
    pattern = Intervals(lambda query: (starts[query], ends[query]), 128, 128, sinks=5)
    _, lse = interpreted(banded_flash_attention, query, key, jnp.ones_like(value), pattern=pattern, scale=0.125)
    keys = np.arange(128)
    sees = (starts[:, None] <= keys) & (keys < ends[:, None]) | (keys < np.minimum(5, ends[:, None]))
    logits = 0.125 * jnp.einsum("btnh,bsh->btns", query, key[:, :, 0], precision="highest")
    expected = jax.nn.logsumexp(jnp.where(sees[:, None], logits, -jnp.inf), axis=-1)
    np.testing.assert_allclose(lse, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.slow  # the fast tests hold it of gradients, below
def test_runs_give_the_same_bits_under_jit_and_not(interpreted):
    arrays = draw_arrays(260, dtype=jnp.bfloat16)
    attend = functools.partial(local_attention, window=33, return_lse=True, implementation="pallas_tpu")
    first, again = interpreted(attend, *arrays), interpreted(jax.jit(attend), *arrays)
    for a, b in zip(first, again, strict=True):
        assert np.array_equal(a, b)


@pytest.mark.slow  # the fast tests hold it of the catalog's rows, in test_mechanisms.py
@pytest.mark.usefixtures("small_tiles")
@pytest.mark.parametrize("case", CASES)
def test_gradients_equal_the_reference_s(case, interpreted, monkeypatch):
    if case in IN_QUARTERS:
        set_tiles(monkeypatch, 256, 256)
    attend, (query, key, value), tolerance = draw_case(case)
    weights = jnp.asarray(np.random.default_rng(1).normal(size=(*query.shape[:-1], value.shape[-1])), jnp.float32)

    def loss(query, key, value, scale, implementation):
        out, lse = attend(query, key, value, scale=scale, implementation=implementation)
        return jnp.sum(out.astype(jnp.float32) * weights) + jnp.sum(jnp.sin(lse))

    def gradients(implementation):
        return jax.grad(loss, (0, 1, 2, 3))(query, key, value, jnp.float32(0.2), implementation)

    got, want = interpreted(gradients, "pallas_tpu"), gradients("reference")
    # The scale's gradient is the sum of query * (query's gradient) / scale: terms of both signs, rounded one by one.
    terms = np.asarray(query, np.float64) * np.asarray(want[0], np.float64) / 0.2
    sizes = [np.abs(np.asarray(x, np.float64)).max() for x in want[:3]] + [np.sqrt((terms**2).sum())]
    for a, b, size in zip(got, want, sizes, strict=True):
        assert a.dtype == b.dtype
        a, b = (np.asarray(x, np.float64) for x in (a, b))
        np.testing.assert_allclose(a, b, rtol=0, atol=tolerance * max(1, size))


@pytest.mark.usefixtures("small_tiles")
@pytest.mark.slow
def test_gradients_are_the_same_bits_again_and_unread_tiles_may_be_nan(interpreted):
    starts, ends = np.zeros(384, int), np.zeros(384, int)
    starts[130:140], ends[130:140] = 256, 300
    query, key, value = draw_arrays(384)
    unseen = (jnp.arange(384) < 256)[:, None, None]
    key, value = (jnp.where(unseen, jnp.nan, x) for x in (key, value))
    options = {"pattern": Intervals(lambda query: (starts[query], ends[query]), 384, 384), "scale": 0.125}

    def gradients(query, key, value):
        out, lse = banded_flash_attention(query, key, value, **options)
        ones = jnp.ones_like(out), jnp.where(lse == -jnp.inf, 0, 1.0)
        return banded_flash_backward.banded_flash_gradients(query, key, value, out, lse, *ones, **options)

    first, again = (interpreted(run, query, key, value) for run in (gradients, jax.jit(gradients)))
    for a, b in zip(first, again, strict=True):
        np.testing.assert_array_equal(a, b)
    by_query, by_key, by_value, _ = first
    assert np.all(by_query[:, :130] == 0)
    assert np.all(by_query[:, 140:] == 0)
    for gradient in (by_key, by_value):
        assert np.all(gradient[:, :256] == 0)
        assert np.all(np.any(gradient[:, 256:300] != 0, axis=(0, 2, 3)))
        assert np.all(gradient[:, 300:] == 0)


@pytest.mark.slow  # compiles for 20 s
def test_derivatives_in_both_modes_and_of_gradients(interpreted):
    """Gradients are the kernels', tangents and what is beyond first order the blocked form's. (vmap: test_aot compiles
    it; JAX's interpret mode does not run a batched kernel that states which grid axes are parallel.)"""
    arrays = (*draw_arrays(140, head_dim=8, value_dim=8), jnp.float32(0.3))

    def loss(query, key, value, scale, implementation):
        out, lse = local_attention(
            query, key, value, window=9, scale=scale, return_lse=True, implementation=implementation
        )
        return (out**2).sum() + jnp.sin(lse).sum()

    def derivatives(implementation):
        forward = functools.partial(loss, implementation=implementation)
        gradient = jax.grad(forward, argnums=(0, 1, 2, 3))
        return gradient(*arrays), jax.jvp(forward, arrays, arrays), jax.jvp(gradient, arrays, arrays)[1]

    got, expected = interpreted(derivatives, "pallas_tpu"), derivatives("xla")
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(a, b, rtol=2e-4, atol=2e-4)


def shapes(length=256, head_dim=64, value_dim=64, dtype=jnp.bfloat16):
    structs = [jax.ShapeDtypeStruct((1, length, 2, width), dtype) for width in (head_dim, head_dim, value_dim)]
    return structs, Intervals(lambda query: (np.zeros_like(query), np.full_like(query, length)), length, length)


@pytest.mark.parametrize(
    ("arguments", "blocks", "reason"),
    [
        ({"dtype": jnp.float16}, None, "all bfloat16 or all float32, got float16"),
        ({"dtype": jnp.float64}, None, "all bfloat16 or all float32, got float64"),
        ({"length": 0}, None, "arrays that are not empty"),
        ({"length": 4096}, (1024, 2048), "of VMEM, more than 16 MiB"),
        ({"head_dim": 8192}, None, "head dims 8192 and 64 takes"),
        ({"length": 2**15}, (128, 128), "list of 65536 pairs of tiles takes 768 KiB of scalar memory"),
    ],
)
def test_refuses_with_the_reason(arguments, blocks, reason, monkeypatch):
    if blocks is not None:
        monkeypatch.setattr(banded_flash, "_BLOCKS", {(2, 64): blocks})
    with jax.enable_x64(True):
        arrays, pattern = shapes(**arguments)
        assert refusal(*arrays, pattern=pattern) is not None
        with pytest.raises(ValueError, match=reason):
            jax.eval_shape(functools.partial(banded_flash_attention, scale=1.0, pattern=pattern), *arrays)


def test_refuses_tiles_that_are_no_multiple_of_the_lanes():
    arrays, _ = shapes()
    bounds = jax.ShapeDtypeStruct((1, 256), jnp.int32)
    pattern = SortedIntervals(bounds, bounds, 256, reach=9, block=100)
    assert refusal(*arrays, pattern=pattern) == "needs block_q a positive multiple of 128, got 100"


def test_a_refusal_makes_no_list(monkeypatch):
    monkeypatch.setattr(Intervals, "tiled", None)
    arrays, pattern = shapes(2**15)
    for module in (banded_flash, banded_flash_backward, banded_covariance):
        assert module.refusal(*arrays, pattern=pattern) is None


def test_serves_what_it_should():
    for head_dim in (1, 64, 80, 128, 256, 512):
        for dtype in (jnp.bfloat16, jnp.float32):
            arrays, pattern = shapes(4096, head_dim, head_dim, dtype)
            assert refusal(*arrays, pattern=pattern) is None
    assert vmem_bytes(512, 1024, 128, 128, jnp.bfloat16) < vmem_bytes(512, 1024, 256, 128, jnp.bfloat16)


@pytest.mark.parametrize("scale", [1, 4])
@pytest.mark.slow
def test_errors_in_bfloat16_are_no_larger_than_flywheel_s(scale, interpreted):
    """Against float64, in shares of the largest output, of queries that are this much longer; -s prints them."""
    library = pytest.importorskip("flywheel_tpu", reason="flywheel_tpu is not installed")
    query, *rest = draw_arrays(2048, head_dim=128, value_dim=128, dtype=jnp.bfloat16)
    arrays = [scale * query, *rest]
    attend = functools.partial(local_attention, window=600, is_causal=True)
    with jax.enable_x64(True):
        exact = (np.asarray(x, np.float64) for x in arrays)
        want = np.asarray(attend(*exact, implementation="reference"))
    heads_first = [jnp.swapaxes(x, 1, 2) for x in arrays]
    theirs = interpreted(library.flash_attn_func, *heads_first, causal=True, window_size=(599, 0))
    found = interpreted(attend, *arrays, implementation="pallas_tpu"), jnp.swapaxes(theirs, 1, 2)
    errors = [np.abs(np.asarray(x, np.float64) - want).max() / np.abs(want).max() for x in found]
    print(f"\n| {scale} | {errors[0]:.0e} | {errors[1]:.0e} |")
    assert errors[0] <= errors[1] < 2e-2
