"""A bias in banded flash attention: values and the gradients of all that goes in, in TPU interpret mode against the
reference in float64."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from marks import slow_but

from attnlab import agent_attention, axial_attention, dot_product_attention
from attnlab.attention import masks
from kernels_pallas.patterns import BlockLists, Intervals, SortedIntervals
from kernels_pallas.tpu import banded_flash, banded_flash_backward

BATCH, QUERIES, KEYS, HEADS, KEY_HEADS = 2, 140, 200, 4, 2
TOLERANCE = {jnp.float32: 1e-5, jnp.bfloat16: 2e-2}
near = masks.Mask(lambda query, key: abs(query[0] - key[0]) < 40)
IDS = tuple(np.sort(np.random.default_rng(1).integers(0, 3, (BATCH, n)), axis=1).astype(np.int32) for n in (140, 200))
CASES = {  # shape of the bias, options, dtype of query, key and value, dtype of the bias
    "each pair": ((1, 1, QUERIES, KEYS), {}, jnp.float32, jnp.float32),
    "each pair of each head": ((1, HEADS, QUERIES, KEYS), {"is_causal": True}, jnp.bfloat16, jnp.bfloat16),
    "each pair of each row": ((BATCH, 1, QUERIES, KEYS), {"mask": near}, jnp.float32, jnp.bfloat16),
    "each pair of all": ((BATCH, HEADS, QUERIES, KEYS), {"segment_ids": IDS}, jnp.bfloat16, jnp.float32),
    "each pair, softcap": ((1, HEADS, QUERIES, KEYS), {"softcap": 1.5}, jnp.float32, jnp.float32),
    "keys": ((1, 1, 1, KEYS), {"is_causal": True}, jnp.float32, jnp.float32),
    "keys, softcap": ((1, 1, 1, KEYS), {"softcap": 1.5, "is_causal": True}, jnp.bfloat16, jnp.float32),
    "keys of each head": ((1, HEADS, 1, KEYS), {"segment_ids": IDS}, jnp.bfloat16, jnp.bfloat16),
    "keys of each row": ((BATCH, 1, 1, KEYS), {}, jnp.bfloat16, jnp.float16),
    "queries": ((1, HEADS, QUERIES, 1), {}, jnp.float32, jnp.float32),
    "one number": ((1, 1, 1, 1), {"is_causal": True}, jnp.bfloat16, jnp.float32),
}


@pytest.fixture(autouse=True)
def _small_tiles(monkeypatch):
    set_tiles(monkeypatch, 128)


def set_tiles(monkeypatch, size):
    for module in (banded_flash, banded_flash_backward):
        monkeypatch.setattr(module, "_BLOCKS", {})
        monkeypatch.setattr(module, "_DEFAULT_BLOCKS", (size, size))


def draw(bias_shape, dtype=jnp.float32, bias_dtype=jnp.float32, *, queries=QUERIES, keys=KEYS, hidden=0.2):
    """query, key, value, bias with this share of -inf, and the scale."""
    rng = np.random.default_rng(0)
    shapes = ((BATCH, queries, HEADS, 16), (BATCH, keys, KEY_HEADS, 16), (BATCH, keys, KEY_HEADS, 24))
    tokens = (jnp.asarray(rng.normal(size=shape), dtype) for shape in shapes)
    bias = np.where(rng.random(bias_shape) < hidden, -np.inf, 2 * rng.normal(size=bias_shape))
    return (*tokens, jnp.asarray(bias, bias_dtype), jnp.float32(0.3))


def with_gradients(attend, arrays):
    """(out, lse), and the gradients of a weighted sum of them."""
    shape = jax.eval_shape(attend, *arrays)[0].shape
    weights = np.random.default_rng(2).normal(size=shape)

    def loss(*arrays):
        out, lse = attend(*arrays)
        return (out * weights).sum() + jnp.sin(jnp.where(lse == -jnp.inf, 0, lse)).sum(), (out, lse)

    return jax.grad(loss, range(len(arrays)), has_aux=True)(*arrays)


def assert_equals(got, arrays, attend, tolerance):
    """Within this share of the largest number of each array, of float64, or what its dtype resolves."""
    with jax.enable_x64(True):
        wanted = jax.jit(functools.partial(with_gradients, attend))([jnp.asarray(x, jnp.float64) for x in arrays])
    for gradient, x in zip(got[0], arrays, strict=True):
        assert gradient.dtype == x.dtype
    for x, want in zip(jax.tree.leaves(got), jax.tree.leaves(wanted), strict=True):
        resolution, x, want = float(jnp.finfo(x.dtype).eps), np.asarray(x, np.float64), np.asarray(want)
        np.testing.assert_array_equal(np.isinf(x), np.isinf(want))
        size = max(1, np.abs(want[np.isfinite(want)]).max(initial=0))
        np.testing.assert_allclose(x, want, rtol=0, atol=max(tolerance, resolution) * size)


@pytest.mark.parametrize("case", slow_but(["keys of each head"], CASES))
@pytest.mark.long
def test_equals_the_reference(case, interpreted):
    shape, options, dtype, bias_dtype = CASES[case]
    arrays = draw(shape, dtype, bias_dtype)

    def attend(query, key, value, bias, scale, implementation="reference"):
        settings = {"bias": bias, "scale": scale, "return_lse": True, **options}
        return dot_product_attention(query, key, value, implementation=implementation, **settings)

    got = interpreted(with_gradients, functools.partial(attend, implementation="pallas_tpu"), arrays)
    assert_equals(got, arrays, attend, TOLERANCE[dtype])


@pytest.mark.slow
@pytest.mark.parametrize("rows", [1, QUERIES])
def test_keys_of_the_least_finite_bias_are_seen_where_there_are_no_others(rows, interpreted):
    """Alone they are averaged, as elsewhere; beside others they have no weight; -inf hides them."""
    query, key, value, _, scale = draw((1, 1, 1, 1))
    bias = jnp.full((1, 1, rows, KEYS), jnp.finfo(jnp.float32).min).at[..., ::2].set(-jnp.inf)
    for given in (bias, bias.at[:, :, -1, 5].set(0), jnp.full_like(bias, -jnp.inf)):
        want = dot_product_attention(query, key, value, bias=given, scale=scale, implementation="reference")
        options = {"bias": given, "scale": scale, "implementation": "pallas_tpu"}
        got = interpreted(functools.partial(dot_product_attention, **options), query, key, value)
        np.testing.assert_allclose(got, want, rtol=0, atol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("rows", [1, 600])
def test_a_window_in_quarters_equals_the_reference_and_what_is_not_read_may_be_nan(rows, interpreted, monkeypatch):
    """Pairs of tiles that no query sees have gradients of 0, and their keys, values and biases hold NaN here."""
    set_tiles(monkeypatch, 256)
    unread = slice(0, 256)  # the last queries alone see keys, those after
    starts, ends = np.maximum(np.arange(600) - 90, 300), np.where(np.arange(600) < 300, 0, np.arange(600) + 1)
    pattern = Intervals(lambda query: (starts[query], ends[query]), 600, 600)
    sees = (starts[:, None] <= np.arange(600)) & (np.arange(600) < ends[:, None])
    query, key, value, bias, scale = draw((1, HEADS, rows, 600), queries=600, keys=600)

    def kernel(query, key, value, bias, scale):
        options = {"pattern": pattern, "bias": bias, "scale": scale}
        out, lse = banded_flash.banded_flash_attention(query, key, value, **options)
        cotangents = jnp.cos(out), jnp.where(lse == -jnp.inf, 0, 1.0)
        found = banded_flash_backward.banded_flash_gradients(query, key, value, out, lse, *cotangents, **options)
        return out, lse, *found

    def reference(query, key, value, bias, scale):
        settings = {"mask": sees[None, None], "return_lse": True, "implementation": "reference"}
        out, lse = dot_product_attention(query, key, value, bias=bias, scale=scale, **settings)
        return jnp.sin(out).sum() + jnp.where(lse == -jnp.inf, 0, lse).sum(), (out, lse)

    spoilt = (query, *(x.at[:, unread].set(jnp.nan) for x in (key, value)), bias.at[..., unread].set(jnp.nan), scale)
    first, again = interpreted(kernel, *spoilt), interpreted(jax.jit(kernel), *spoilt)
    for a, b in zip(first, again, strict=True):
        np.testing.assert_array_equal(a, b)
    with jax.enable_x64(True):
        wide = [jnp.asarray(x, jnp.float64) for x in (query, key, value, bias, scale)]
        (of_query, of_key, of_value, of_bias, of_scale), results = jax.grad(reference, range(5), has_aux=True)(*wide)
    wanted = *results, of_query, of_key, of_value, of_scale, of_bias
    for got, want in zip(first, map(np.asarray, wanted), strict=True):
        size = max(1, np.abs(want[np.isfinite(want)]).max(initial=0))
        np.testing.assert_allclose(got, want, rtol=0, atol=1e-5 * size)


@pytest.mark.slow
@pytest.mark.parametrize("heads", [1, HEADS])
def test_axial_attention_equals_the_reference(heads, interpreted):
    rng = np.random.default_rng(3)
    tokens = [jnp.asarray(rng.normal(size=(1, 3, 130, n, 16)), jnp.float32) for n in (HEADS, KEY_HEADS, KEY_HEADS)]
    arrays = (*tokens, jnp.asarray(rng.normal(size=(heads, 130, 130)), jnp.float32))

    def attend(query, key, value, bias, implementation="reference"):
        settings = {"axis": 1, "bias": bias, "return_lse": True, "implementation": implementation}
        return axial_attention(query, key, value, **settings)

    got = interpreted(with_gradients, functools.partial(attend, implementation="pallas_tpu"), arrays)
    assert_equals(got, arrays, attend, 1e-5)


@pytest.mark.slow
def test_agents_that_see_no_key_are_seen_by_no_query(interpreted):
    """Biases of -inf, of all of an agent's keys."""
    query, key, value, *_ = draw((1, 1, 1, 1))
    rng = np.random.default_rng(4)
    agents = jnp.asarray(rng.normal(size=(7, HEADS, 16)), jnp.float32)
    gather = jnp.asarray(rng.normal(size=(HEADS, 7, KEYS)), jnp.float32).at[:, 2].set(-jnp.inf)
    broadcast = jnp.asarray(rng.normal(size=(1, QUERIES, 7)), jnp.float32)
    hidden = jnp.arange(KEYS)[None].repeat(BATCH, 0) % 3 > 0

    def attend(query, key, value, agents, gather, broadcast, implementation="reference"):
        biases = {"gather_bias": gather, "broadcast_bias": broadcast}
        out = agent_attention(query, key, value, agents, **biases, key_mask=hidden, implementation=implementation)
        return out, jnp.zeros(())

    arrays = query, key, value, agents, gather, broadcast
    got = interpreted(with_gradients, functools.partial(attend, implementation="pallas_tpu"), arrays)
    assert_equals(got, arrays, attend, 1e-5)


def shapes(bias, dtype=jnp.bfloat16, length=4096, head_dim=128):
    tokens = [jax.ShapeDtypeStruct((1, length, n, head_dim), dtype) for n in (8, 2, 2)]
    pattern = Intervals(lambda query: (np.zeros_like(query), query + 1), length, length)
    return tokens, {"pattern": pattern, "bias": jax.ShapeDtypeStruct(bias, jnp.float32)}


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float32])
@pytest.mark.parametrize("head_dim", [64, 128, 256, 512])
@pytest.mark.parametrize("rows", [1, 4096])
def test_vmem_holds_it_at_usual_sizes(rows, head_dim, dtype, monkeypatch):
    monkeypatch.undo()  # the kernels' own tiles
    tokens, options = shapes((1, 8, rows, 4096), dtype, head_dim=head_dim)
    for module in (banded_flash, banded_flash_backward):
        assert module.refusal(*tokens, **options) is None
        assert module.heads_of_a_step(*tokens, **options) <= module.heads_of_a_step(*tokens, pattern=options["pattern"])


def test_refuses_lists_that_are_computed_or_differ():
    tokens, options = shapes((1, 1, 256, 256), length=256)
    bounds, lists = (jax.ShapeDtypeStruct(shape, jnp.int32) for shape in ((1, 256), (1, 2, 2, 2)))
    bank = np.zeros((0, 128, 128), np.int8)
    for pattern in (SortedIntervals(bounds, bounds, 256, reach=9, block=128), BlockLists(lists, lists, bank, 256, 256)):
        for module in (banded_flash, banded_flash_backward):
            reason = module.refusal(*tokens, **options | {"pattern": pattern})
            assert reason == (
                "has no bias with lists of tiles that are computed, or differ between rows of the batch or heads"
            )
