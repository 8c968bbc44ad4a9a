"""Banded flash attention for GPUs and the mechanisms on it: values and gradients in interpret mode against float64,
transformations, the lowering for CUDA, and what is refused."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import export
from marks import slow_but

from attnlab import (
    agent_attention,
    dilated_attention,
    dot_product_attention,
    init_routing,
    local_attention,
    routing_attention,
)
from attnlab.attention import masks
from kernels_pallas import patterns
from kernels_pallas.gpu import banded_covariance, banded_flash, banded_flash_backward, banded_parallax
from kernels_pallas.gpu.band import lists_of
from kernels_pallas.gpu.banded_flash import banded_flash_attention
from kernels_pallas.gpu.banded_flash_backward import banded_flash_gradients
from kernels_pallas.patterns import BlockLists, Boxes, Intervals, SortedIntervals
from kernels_pallas.tpu import banded_covariance as tpu_banded_covariance
from kernels_pallas.tpu import banded_flash as tpu_banded_flash

# The spacing of the operands' dtype: that of weights, of slopes and of what is written.
EPSILON = {jnp.bfloat16: 2.0**-8, jnp.float16: 2.0**-11}


def draw_arrays(space, *, batch=1, heads=2, key_heads=1, head_dim=64, value_dim=64, dtype=jnp.bfloat16):
    rng = np.random.default_rng(space)
    shapes = [(heads, head_dim), (key_heads, head_dim), (key_heads, value_dim)]
    return [jnp.asarray(rng.normal(size=(batch, *np.atleast_1d(space), *shape)), dtype) for shape in shapes]


CASES = {  # length, options of local_attention, options of draw_arrays
    "one token": (1, {"window": 1}, {}),
    "causal": (140, {"window": 100, "is_causal": True}, {"heads": 1}),
    "grouped heads": (300, {"window": 140, "is_causal": True}, {"heads": 4, "key_heads": 2}),
    "full tiles": (384, {"window": 384, "is_causal": True}, {"dtype": jnp.float16}),
    "all keys": (200, {"window": 200}, {"batch": 2, "head_dim": 80, "value_dim": 130}),
    "negative scale": (200, {"window": 70, "is_causal": True, "scale": -0.2}, {}),
    "head dim 128": (384, {"window": 50}, {"head_dim": 128, "value_dim": 128}),
    "head dim 192": (260, {"window": 150}, {"head_dim": 192, "value_dim": 192, "dtype": jnp.float16}),
    "head dim 256, clipped": (290, {"window": 31, "edge": "clip"}, {"head_dim": 256, "value_dim": 256}),
    "head dim 256, causal": (384, {"window": 384, "is_causal": True}, {"head_dim": 256, "value_dim": 256, "heads": 1}),
    "wide keys": (200, {"window": 101}, {"head_dim": 256, "value_dim": 128}),
    "wide values": (200, {"window": 101}, {"head_dim": 128, "value_dim": 256}),
    "blocks": (300, {"window": 64, "stride": 64}, {}),
    "strided causal": (260, {"window": 9, "stride": 4, "is_causal": True}, {"heads": 3, "key_heads": 3}),
    "sinks": (400, {"window": 20, "is_causal": True, "sinks": 3}, {}),
    "segments": (300, {"window": 101}, {"batch": 2, "segments": True}),
    "segments in full tiles": (300, {"window": 300}, {"segments": True, "heads": 1}),
    "segments, sinks": (290, {"window": 40, "is_causal": True, "sinks": 5}, {"segments": True, "dtype": jnp.float16}),
    "dilated": (300, {"window": 20, "dilation": 7, "is_causal": True}, {"heads": 2}),
    "grid": ((20, 33), {"window": (5, 8), "is_causal": (True, False)}, {"heads": 1}),
    "grid, dilated": ((34, 18), {"window": 3, "dilation": (2, 3)}, {"segments": True, "heads": 1}),
    "volume": ((9, 5, 6), {"window": (3, 5, 4), "stride": (1, 2, 1)}, {"heads": 1, "dtype": jnp.float16}),
    "volume, head dim 256": ((5, 5, 9), {"window": 3}, {"head_dim": 256, "value_dim": 256, "segments": True}),
}


def draw_case(case):
    """(function of query, key, value and scale, with more options; the arrays)."""
    space, options, arrays = CASES[case]
    arrays = dict(arrays)
    if arrays.pop("segments", False):
        shape = (arrays.get("batch", 1), *np.atleast_1d(space))
        ids = np.sort(np.random.default_rng(0).integers(0, 4, shape), axis=1)
        options = options | {"segment_ids": jnp.asarray(ids, jnp.int32)}
    attend = functools.partial(dilated_attention if "dilation" in options else local_attention, return_lse=True)
    scale = options.get("scale", 0.2)
    others = {name: value for name, value in options.items() if name != "scale"}

    def of_arrays(query, key, value, scale, implementation):
        return attend(query, key, value, scale=scale, implementation=implementation, **others)

    return of_arrays, (*draw_arrays(space, **arrays), jnp.float32(scale))


def in_float64(tree):
    return jax.tree.map(lambda x: jnp.asarray(x, jnp.float64), tree)


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES)
def test_values_and_gradients_equal_the_reference_s(case, on_gpu):
    attend, arrays = draw_case(case)
    epsilon = EPSILON[arrays[0].dtype.type]
    rng = np.random.default_rng(1)

    def run(arrays, cotangents, implementation):
        results, transpose = jax.vjp(functools.partial(attend, implementation=implementation), *arrays)
        return results, transpose(cotangents)

    shapes = jax.eval_shape(functools.partial(attend, implementation="reference"), *arrays)
    cotangents = tuple(jnp.asarray(rng.normal(size=x.shape), x.dtype) for x in shapes)
    got = on_gpu(run, arrays, cotangents, "pallas_gpu")
    with jax.enable_x64(True):
        expected = run(in_float64(arrays), in_float64(cotangents), "reference")
    assert_near(got, expected, arrays, epsilon)


@functools.partial(jax.jit, static_argnums=0)
def exact(attend, arrays, cotangents):
    """Values and gradients in float64."""
    results, transpose = jax.vjp(attend, *in_float64(arrays))
    return results, transpose(in_float64(cotangents))


def assert_near(got, expected, arrays, epsilon):
    """(out, lse), (gradients of query, key, value, scale), of arrays' dtype, beside the same in float64."""
    ((out, lse), gradients), ((want, want_lse), right) = got, expected
    assert (out.dtype, lse.dtype) == (arrays[0].dtype, jnp.float32)
    # Weights are rounded, which sum to 1, and so is the output.
    largest = np.abs(np.asarray(arrays[2], np.float64)).max()
    np.testing.assert_allclose(np.asarray(out, np.float64), want, rtol=0, atol=epsilon * largest)
    np.testing.assert_allclose(lse, want_lse, rtol=1e-5, atol=1e-5)
    # A gradient's terms are rounded once or twice, and D_t comes of a rounded output.
    for x, y in zip(gradients[:3], right[:3], strict=True):
        assert x.dtype == arrays[0].dtype
        atol = 4 * epsilon * max(np.abs(y).max(), 1e-6)
        np.testing.assert_allclose(np.asarray(x, np.float64), y, rtol=0, atol=atol)
    if len(arrays) == 3:  # a scale that is no argument
        return
    by_query = np.abs(np.einsum("...h,...h->...", np.asarray(arrays[0], np.float64), right[0]))
    atol = 4 * epsilon * by_query.sum() / abs(float(arrays[3])) + 1e-5
    np.testing.assert_allclose(gradients[3], right[3], rtol=0, atol=atol)


@pytest.mark.long
def test_a_full_tile_and_an_edge_equal_the_dense_form(on_gpu):
    """128 queries that see 128 keys and the earlier ones of 128 more, by a negative scale and with jax_enable_x64."""
    query, (_, key, value) = draw_arrays(128, heads=1)[0], draw_arrays(256)
    rng = np.random.default_rng(3)
    cotangents = tuple(jnp.asarray(rng.normal(size=shape), query.dtype) for shape in (query.shape, (1, 128, 1)))
    sees = np.arange(256) <= 128 + np.arange(128)[:, None]
    pattern = Intervals(lambda query: (0 * query, 128 + query + 1), 128, 256)

    def run(query, key, value, scale):
        out, lse = banded_flash_attention(query, key, value, pattern=pattern, scale=scale)
        of_loss = cotangents[0], cotangents[1].astype(jnp.float32)
        arrays = query, key, value, out, lse, *of_loss
        return (out, lse), banded_flash_gradients(*arrays, pattern=pattern, scale=scale)

    def dense(query, key, value, scale):
        logits = jnp.where(sees, jnp.einsum("btnh,bsnh->bnts", query, key) * scale, -jnp.inf)
        lse = jax.nn.logsumexp(logits, axis=-1)
        return jnp.einsum("bnts,bsnh->btnh", jnp.exp(logits - lse[..., None]), value), jnp.moveaxis(lse, 1, 2)

    arrays = query, key, value, jnp.float32(-0.2)
    with jax.enable_x64(True):
        got = on_gpu(jax.jit(run), *arrays)
        assert_near(got, exact(dense, arrays, cotangents), arrays, EPSILON[jnp.bfloat16])


LISTS = {  # lengths of queries and keys; rows and heads of the lists; options of draw_arrays; with segments
    "one key tile": (128, 100, (2, 1), {"batch": 2, "heads": 1}, False),
    "by row": (128, 200, (2, 1), {"batch": 2, "heads": 1}, False),
    "by row and head": (200, 300, (2, 2), {"batch": 2, "heads": 4, "key_heads": 2, "value_dim": 130}, False),
    "by head": (140, 256, (1, 3), {"heads": 3, "key_heads": 3, "head_dim": 128, "value_dim": 128}, False),
    "segments": (260, 390, (1, 1), {"batch": 2, "dtype": jnp.float16}, True),
    "wide": (256, 130, (1, 1), {"heads": 1, "head_dim": 256, "value_dim": 256}, False),
}


def draw_lists(queries, keys, rows, heads):
    """(the pattern, what is seen as bool [rows, heads, T, S]): four places for every tile, of which the third is the
    second one again. In the first list, the first tile lists a key tile in full and then in part, the next one none."""
    rng = np.random.default_rng(queries)
    tiles, key_tiles = -(-queries // 128), -(-keys // 128)
    columns = rng.integers(-1, key_tiles, (rows, heads, tiles, 4))
    columns[..., 2] = columns[..., 1]
    bank = rng.random((3, 128, 128)) < 0.4
    bank[0, 5:70] = False  # these queries see nothing of it
    partly = rng.integers(-1, 3, columns.shape)
    columns[0, 0, 1:2] = -1
    columns[0, 0, 0], partly[0, 0, 0] = [-1, 0, 0, key_tiles - 1], [-1, -1, 0, 0]
    columns[-1, -1, -1], partly[-1, -1, -1] = [key_tiles - 1, -1, -1, key_tiles], 0
    sees = np.zeros((rows, heads, tiles * 128, key_tiles * 128), bool)
    for *place, tile, last in np.ndindex(columns.shape):
        column, number = (x[(*place, tile, 3 - last)] for x in (columns, partly))  # the first place is written last
        if 0 <= column < key_tiles:
            part = (*place, slice(128 * tile, 128 * tile + 128), slice(128 * column, 128 * column + 128))
            sees[part] = number < 0 or bank[number]
    pattern = BlockLists(columns, partly, bank.astype(np.int8), queries, keys)
    return pattern, sees[:, :, :queries, :keys]


@pytest.mark.parametrize("case", slow_but(("one key tile",), LISTS))
@pytest.mark.parametrize("known", slow_but((False,), (True, False)))
@pytest.mark.long
def test_lists_of_tiles_equal_the_dense_form(case, known, on_gpu):
    """Known when the call is traced, or arrays of the program."""
    queries, keys, (rows, heads), options, has_segments = LISTS[case]
    query, (_, key, value) = draw_arrays(queries, **options)[0], draw_arrays(keys, **options)
    pattern, sees = draw_lists(queries, keys, rows, heads)
    rng = np.random.default_rng(4)
    ids = (
        [jnp.asarray(rng.integers(0, 2, (len(query), n)), jnp.int32) for n in (queries, keys)] if has_segments else None
    )
    if has_segments:
        sees = sees & (np.asarray(ids[0])[:, None, :, None] == np.asarray(ids[1])[:, None, None])
    assert not sees.any(-1).all()
    sees = np.repeat(
        np.broadcast_to(sees, (*sees.shape[:1], key.shape[2], *sees.shape[2:])), query.shape[2] // key.shape[2], 1
    )
    out_shape = (*query.shape[:-1], value.shape[-1])
    cotangents = tuple(jnp.asarray(rng.normal(size=shape), query.dtype) for shape in (out_shape, query.shape[:-1]))

    def run(lists, query, key, value, scale):
        given = dataclasses.replace(pattern, columns=lists[0], partly=lists[1], bank=lists[2])
        settings = {"pattern": pattern if known else given, "segment_ids": ids, "scale": scale}
        out, lse = banded_flash_attention(query, key, value, **settings)
        of_loss = cotangents[0], cotangents[1].astype(jnp.float32)
        return (out, lse), banded_flash_gradients(query, key, value, out, lse, *of_loss, **settings)

    def dense(query, key, value, scale):
        group = query.shape[2] // key.shape[2]
        key, value = (jnp.repeat(x, group, axis=2) for x in (key, value))
        logits = jnp.where(sees, jnp.einsum("btnh,bsnh->bnts", query, key) * scale, -jnp.inf)
        most = jnp.where(sees.any(-1, keepdims=True), logits.max(-1, keepdims=True), 0)
        terms = jnp.where(sees, jnp.exp(jnp.where(sees, logits - most, 0)), 0)
        total = terms.sum(-1, keepdims=True)
        lse = jnp.where(total > 0, most + jnp.log(jnp.where(total > 0, total, 1)), -jnp.inf)
        out = jnp.einsum("bnts,bsnh->btnh", terms / jnp.where(total > 0, total, 1), value)
        return out, jnp.moveaxis(lse[..., 0], 1, 2)

    arrays = query, key, value, jnp.float32(0.2)
    lists = [jnp.asarray(x) for x in (pattern.columns, pattern.partly, pattern.bank)]
    got = on_gpu(jax.jit(run), lists, *arrays)
    with jax.enable_x64(True):
        assert_near(got, exact(dense, arrays, cotangents), arrays, EPSILON[query.dtype.type])
    unseen = ~np.moveaxis(sees.any(-1), 1, 2) & np.ones(query.shape[:3], bool)
    (out, lse), (to_query, *_) = got
    assert np.all(np.asarray(lse)[unseen] == -np.inf)
    assert np.all(np.asarray(out)[unseen] == 0)
    assert np.all(np.asarray(to_query)[unseen] == 0)


def routed(window, **options):
    def attend(query, key, value, **more):
        state = init_routing(jax.random.key(0), query.shape[2], 2, query.shape[3])
        return routing_attention(query, key, value, state, window=window, **options, **more)[0]

    return attend


HIDDEN = jnp.arange(200)[None] % 3 > 0
MECHANISMS = {  # function of query, key and value, lengths of queries and keys
    "softmax": (dot_product_attention, 150, 200),
    "softmax, causal": (functools.partial(dot_product_attention, is_causal=True), 140, 270),
    "softmax, segments": (
        functools.partial(
            dot_product_attention, segment_ids=(jnp.arange(150)[None] // 70, jnp.arange(200)[None] // 140)
        ),
        150,
        200,
    ),
    "agent": (functools.partial(agent_attention, agents=draw_arrays(9)[0]), 150, 200),
    "agent, keys hidden": (functools.partial(agent_attention, agents=draw_arrays(9)[0], key_mask=HIDDEN), 150, 200),
    "routing": (routed(40, is_causal=True), 150, 150),
    "routing, global": (routed(70, membership="global", normalize="layer"), 150, 150),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", MECHANISMS)
def test_mechanisms_equal_the_reference(name, on_gpu):
    """Of the same dtype: what routing takes in depends on how it is rounded."""
    attend, queries, keys = MECHANISMS[name]
    query, key, value = draw_arrays(queries)[0], *draw_arrays(keys, key_heads=2 if "routing" in name else 1)[1:]
    weights = jnp.asarray(np.random.default_rng(1).normal(size=query.shape), jnp.float32)

    def run(arrays, implementation):
        def loss(arrays):
            out = attend(*arrays, implementation=implementation)
            return jnp.sum(out.astype(jnp.float32) * weights), out

        return jax.grad(loss, has_aux=True)(arrays)

    got = on_gpu(run, (query, key, value), "pallas_gpu")
    want = jax.jit(run, static_argnums=1)((query, key, value), "reference")
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        assert a.dtype == b.dtype
        a, b = np.asarray(a, np.float32), np.asarray(b, np.float32)
        np.testing.assert_allclose(a, b, rtol=0, atol=2e-2 * max(1, np.abs(b).max()))


def some_queries_pattern():
    """The second tile of queries sees a part of the third of keys; others nothing."""
    starts, ends = np.zeros(384, int), np.zeros(384, int)
    starts[130:140], ends[130:140] = 256, 300
    return Intervals(lambda query: (starts[query], ends[query]), 384, 384)


@pytest.mark.slow
def test_queries_without_keys_give_zeros_and_unread_tiles_may_be_nan(on_gpu):
    query, key, value = draw_arrays(384, heads=1)
    unseen = ((jnp.arange(384) >= 128) & (jnp.arange(384) < 256))[:, None, None]
    key, value = (jnp.where(unseen, jnp.nan, x) for x in (key, value))
    options = {"pattern": some_queries_pattern(), "scale": 0.125}

    def run(query, key, value):
        out, lse = banded_flash_attention(query, key, value, **options)
        ones = jnp.ones_like(out), jnp.ones_like(lse)
        return out, lse, *banded_flash_gradients(query, key, value, out, lse, *ones, **options)

    (first, again) = (on_gpu(form, query, key, value) for form in (run, jax.jit(run)))
    for a, b in zip(first, again, strict=True):
        np.testing.assert_array_equal(np.asarray(a, np.float32), np.asarray(b, np.float32))
    out, lse, by_query, by_key, by_value, by_scale = first
    sees = np.zeros(384, bool)
    sees[130:140] = True
    assert np.all(out[:, ~sees] == 0)
    assert np.all(lse[:, ~sees] == -np.inf)
    assert np.all(np.isfinite(lse[:, sees]))
    assert np.all(by_query[:, ~sees] == 0)
    assert np.isfinite(by_scale)
    for gradient in (by_key, by_value):
        assert np.all(gradient[:, :256] == 0)
        assert np.all(np.any(gradient[:, 256:300] != 0, axis=(0, 2, 3)))
        assert np.all(gradient[:, 300:] == 0)


@pytest.mark.slow
def test_slopes_in_float16_neither_overflow_nor_vanish(on_gpu):
    """dout . v is up to 60 x 1000 x 64, and in a second run 2^-13 times as large."""
    query, key, value = draw_arrays(128, heads=1, dtype=jnp.float16)
    value = (value * 250).astype(jnp.float16)
    cotangent = jnp.asarray(np.random.default_rng(2).normal(size=value.shape), jnp.float16)
    pattern = Intervals(lambda query: (0 * query, query + 1), 128, 128)

    def run(query, key, value, cotangent):
        out, lse = banded_flash_attention(query, key, value, pattern=pattern, scale=2.0**-12)
        no_lse = jnp.zeros_like(lse)
        return banded_flash_gradients(query, key, value, out, lse, cotangent, no_lse, pattern=pattern, scale=2.0**-12)

    for factor in (2.0**4, 2.0**-9):
        arrays = query, key, value, (cotangent * factor).astype(jnp.float16)
        got = on_gpu(run, *arrays)
        q, k, v, d = (np.asarray(x[0, :, 0], np.float64) for x in arrays)
        logits = np.where(np.tri(128, dtype=bool), q @ k.T * 2.0**-12, -np.inf)
        weights = np.exp(logits) / np.exp(logits).sum(1, keepdims=True)
        slopes = weights * (d @ v.T - (d * (weights @ v)).sum(1, keepdims=True))
        for x, right in zip(got[:2], (slopes @ k, slopes.T @ q), strict=True):
            right = right * 2.0**-12
            x = np.asarray(x[0, :, 0], np.float64)
            # D_t comes of an output that is rounded: to 2^-11 of 250 sqrt(64) |dout_t| or so.
            np.testing.assert_allclose(x, right, rtol=0, atol=2.0**-7 * np.abs(right).max() + 2.0**-24)


def shapes(length=256, heads=2, key_heads=1, head_dim=64, value_dim=None, dtype=jnp.bfloat16, keys=None):
    sizes = [(length, heads, head_dim), (keys or length, key_heads, head_dim)]
    sizes.append((keys or length, key_heads, value_dim or head_dim))
    return [jax.ShapeDtypeStruct((1, *size), dtype) for size in sizes]


def both(query, key, value, ids=None, *, pattern, scale=0.1):
    """Values and gradients."""
    segments = None if ids is None else (ids, ids)
    out, lse = banded_flash_attention(query, key, value, pattern=pattern, scale=scale, segment_ids=segments)
    gradients = banded_flash_gradients(
        query, key, value, out, lse, out, lse, pattern=pattern, scale=scale, segment_ids=segments
    )
    return out, lse, *gradients


def lower(function, *arguments):
    return export.export(jax.jit(function), platforms=["cuda"])(*arguments).mlir_module_serialized


PATTERNS = {
    "causal": Intervals(lambda query: (0 * query, query + 1), 512, 512),
    "sinks": Intervals(lambda query: (query - 99, query + 1), 512, 512, sinks=4),
    "bounds": Intervals(lambda query: (query // 100 * 90, query + 1), 512, 512),
    "plane": Boxes(((lambda x: (x - 3, x + 4), 32), (lambda x: (x - 3, x + 4), 16)), (16, 8)),
    "volume": Boxes(tuple((lambda x: (x - 2, x + 2), 8) for _ in range(3)), (4, 4, 8)),
    "lists": BlockLists.of(lambda query, key: (key <= query) & (key % 5 > 0), 512, 512, 128, 128),
}
SEGMENTED = ((jnp.bfloat16, (64, 64)), (jnp.float16, (256, 256)), (jnp.bfloat16, (256, 192)))
LOWERED = {
    f"{pattern}, {np.dtype(dtype)}, {widths}{', segments' * segments}": (pattern, dtype, widths, segments)
    for pattern in PATTERNS
    for dtype in (jnp.bfloat16, jnp.float16)
    for widths in ((64, 64), (80, 80), (128, 128), (192, 192), (256, 256), (256, 192), (64, 256))
    for segments in (False, True)
    if (not segments and (dtype, widths) != (jnp.float16, (80, 80))) or (dtype, widths) in SEGMENTED
}


# Every pattern, dtype and width. CI lowers the slow ones too.
QUICK_LOWERED = {
    case
    for case, (pattern, dtype, widths, _) in LOWERED.items()
    if (pattern, dtype, widths)
    in (
        ("causal", jnp.bfloat16, (128, 128)),
        ("lists", jnp.float16, (64, 64)),
        ("sinks", jnp.float16, (256, 256)),
    )
}


@pytest.mark.parametrize("case", slow_but(QUICK_LOWERED, LOWERED))
@pytest.mark.long
def test_lowers_for_cuda(case):
    pattern, dtype, (head_dim, value_dim), segments = LOWERED[case]
    arrays = shapes(512, head_dim=head_dim, value_dim=value_dim, dtype=dtype)
    ids = [jax.ShapeDtypeStruct((1, 512), jnp.int32)] if segments else []
    run = functools.partial(both, pattern=PATTERNS[pattern])
    with jax.enable_x64(True):
        if (head_dim, value_dim) == (256, 192) and pattern in ("plane", "volume")[not segments :]:
            with pytest.raises(ValueError, match="takes 228 KiB of shared memory, more than 227 KiB"):
                lower(run, *arrays, *ids)
        else:
            assert b"mosaic_gpu" in lower(run, *arrays, *ids)


OF_FRAMES = masks.radial(48, block=16) | masks.power_blocks(16)


@pytest.mark.slow
@pytest.mark.parametrize(("lengths", "is_causal"), [((100, 120), False), ((300, 300), True)])
def test_a_mask_of_numbers_equals_its_pairs(lengths, is_causal, on_gpu):
    query, (_, key, value) = draw_arrays(lengths[0], heads=1)[0], draw_arrays(lengths[1])
    rng = np.random.default_rng(5)
    cotangents = tuple(jnp.asarray(rng.normal(size=shape), query.dtype) for shape in (query.shape, query.shape[:-1]))
    pairs = masks.dense_mask(OF_FRAMES, lengths[:1], lengths[1:])[None, None]

    def run(arrays, cotangents, mask, implementation):
        def attend(query, key, value):
            options = {"is_causal": is_causal, "return_lse": True, "implementation": implementation}
            return dot_product_attention(query, key, value, mask=mask, scale=0.2, **options)

        results, transpose = jax.vjp(attend, *arrays)
        return results, transpose((cotangents[0], cotangents[1].astype(results[1].dtype)))

    arrays = query, key, value
    got = on_gpu(run, arrays, cotangents, OF_FRAMES, "pallas_gpu")
    with jax.enable_x64(True):
        want = run(in_float64(arrays), in_float64(cotangents), pairs, "reference")
    assert_near(got, want, arrays, EPSILON[jnp.bfloat16])


@pytest.mark.parametrize(
    ("mask", "lengths", "reason"),
    [
        (jnp.ones((1, 1, 256, 256), bool), (256, 256), "has no mask that is an array"),
        (masks.causal(), (2**17, 2**16), "serves masks of up to 4294967296 pairs of a query and a key, got 8589934592"),
        (None, (256, 256), "needs a mask that reads no arrays of the program"),
    ],
)
def test_refuses_masks_with_the_reason(mask, lengths, reason):
    def attend(query, key, value):
        first = query[0, 0, 0, 0] > 0
        given = masks.Mask(lambda query, key: (key[0] > 3) & first) if mask is None else mask
        return dot_product_attention(query, key, value, mask=given, implementation="pallas_gpu")

    with pytest.raises(ValueError, match=reason):
        jax.eval_shape(attend, *shapes(lengths[0], keys=lengths[1]))


def test_refuses_a_mask_of_too_many_different_tiles(monkeypatch):
    monkeypatch.setattr(patterns, "_MOST_BANK", 3 * 128 * 128)
    irregular = masks.Mask(lambda query, key: (query[0] * query[0] + 7 * key[0] * key[0]) % 11 > 4)
    attend = functools.partial(dot_product_attention, mask=irregular, implementation="pallas_gpu")
    with pytest.raises(ValueError, match="serves masks whose different tiles take up to"):
        jax.eval_shape(attend, *shapes(256, keys=256))
    monkeypatch.undo()
    jax.eval_shape(attend, *shapes(256, keys=256))


def loss(query, key, value, implementation="pallas_gpu"):
    out, lse = local_attention(
        query, key, value, window=100, is_causal=True, return_lse=True, implementation=implementation
    )
    return jnp.sum(out.astype(jnp.float32) ** 2) + jnp.sum(jnp.sin(lse))


def scanned(query, key, value):
    def step(total, scale):
        return total + loss(query * scale.astype(query.dtype), key, value), None

    return jax.lax.scan(step, jnp.float32(0), jnp.arange(1, 3, dtype=jnp.float32))[0]


def sharded(query, key, value):
    mesh = jax.make_mesh((1,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    by_batch, alike = jax.sharding.PartitionSpec("data"), jax.sharding.PartitionSpec()

    def total(*arrays):
        return jax.lax.psum(loss(*arrays), "data")

    return jax.shard_map(total, mesh=mesh, in_specs=(by_batch,) * 3, out_specs=alike)(query, key, value)


def over_batch(query, key, value):
    return jnp.sum(jax.vmap(loss)(*(jnp.stack([x, x + x]) for x in (query, key, value))))


TRANSFORMED = {"vmap": over_batch, "remat": jax.checkpoint(loss), "scan": scanned, "shard_map": sharded}


@pytest.mark.parametrize("name", slow_but({"shard_map"}, TRANSFORMED))
@pytest.mark.long
def test_gradients_of_transformed_calls_lower(name):
    """Interpret mode has no rules for the effects that kernels have in it under these."""
    gradient = jax.grad(TRANSFORMED[name], argnums=(0, 1, 2))
    assert b"mosaic_gpu" in lower(gradient, *shapes(140, heads=1))


@pytest.mark.long
def test_lists_of_known_and_of_traced_arrays_are_the_same():
    end = jnp.arange(1, 301)[None].repeat(2, axis=0)
    start = jnp.maximum(end - jnp.asarray([[40], [200]]), 0)

    def lists(start, end):
        tiling = SortedIntervals(start, end, 300, reach=200, block=128).tiled(128, 128)
        return [lists_of(visits, 3, 3) for visits in (tiling.by_query, tiling.by_key)]

    for known, traced in zip(lists(start, end), jax.jit(lists)(start, end), strict=True):
        np.testing.assert_array_equal(known.counts, traced.counts)
        most = known.columns.shape[2]
        for place in np.ndindex(known.counts.shape[:2]):
            listed = np.arange(most) < known.counts[place][1]
            np.testing.assert_array_equal(known.columns[place][listed], traced.columns[place][:most][listed])


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        ({"dtype": jnp.float32}, "all bfloat16 or all float16, got float32"),
        ({"length": 0}, "arrays that are not empty"),
        ({"head_dim": 257}, "serves head dims up to 256, got 257"),
    ],
)
def test_refuses_with_the_reason(arguments, reason):
    arrays, pattern = shapes(**arguments), PATTERNS["causal"]
    for module in (banded_flash, banded_flash_backward):
        assert reason in module.refusal(*arrays, pattern=pattern)
    with pytest.raises(ValueError, match=reason):
        jax.eval_shape(functools.partial(banded_flash_attention, scale=1.0, pattern=pattern), *arrays)


def test_refuses_other_tiles():
    bounds = jax.ShapeDtypeStruct((1, 256), jnp.int32)
    pattern = SortedIntervals(bounds, bounds, 256, reach=9, block=256)
    assert banded_flash.refusal(*shapes(), pattern=pattern) == "needs tiles of 128 queries and keys, got (256, 256)"


def test_refuses_lists_of_other_rows_and_heads():
    lists = np.zeros((3, 2, 2, 1), np.int32)
    pattern = BlockLists(lists, lists, np.zeros((0, 128, 128), np.int8), 256, 256)
    reason = "needs lists [1 or 1, 1 or 1, 2, places], got [3, 2, 2, 1]"
    for module in (banded_flash, banded_flash_backward, tpu_banded_flash):
        assert module.refusal(*shapes(), pattern=pattern) == reason
    for module in (banded_covariance, banded_parallax, tpu_banded_covariance):
        assert module.refusal(*shapes(), pattern=pattern) == "serves no lists of tiles"


def test_serves_every_width_within_shared_memory():
    widths = (64, 128, 192, 256)
    for key_width in widths:
        for value_width in widths:
            arrays = shapes(512, head_dim=key_width, value_dim=value_width)
            for module in (banded_flash, banded_flash_backward):
                assert module.refusal(*arrays, pattern=PATTERNS["causal"]) is None
