"""dot_product_attention: every implementation against a float64 oracle, each other, and jax.nn's conventions."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from attnlab import dot_product_attention, dot_product_step, init_dot_product_cache
from attnlab.attention._shared import tiled_softmax

IMPLEMENTATIONS = ["reference", "xla"]


@pytest.fixture(autouse=True)
def _small_tiles(monkeypatch):
    """Several tiles, the last ones incomplete, at lengths of a test."""
    monkeypatch.setattr(tiled_softmax, "_TILE", 8)
    monkeypatch.setattr(tiled_softmax, "_ROWS", 8)


def draw_arrays(seed, batch, queries, keys, heads, key_heads, head_dim=4, value_dim=3, dtype=jnp.float32):
    rng = np.random.default_rng(seed)
    shapes = [
        (batch, queries, heads, head_dim),
        (batch, keys, key_heads, head_dim),
        (batch, keys, key_heads, value_dim),
    ]
    return tuple(jnp.asarray(rng.normal(size=shape), dtype) for shape in shapes)


def draw_options(seed, names, batch, queries, keys, heads):
    """Options by name, with the visibility [B,N,T,S] and bias that they stand for."""
    rng = np.random.default_rng(seed)
    options, sees, bias = {}, np.ones((1, 1, queries, keys), bool), None
    if "is_causal" in names:
        options["is_causal"] = True
        sees = sees & np.tri(queries, keys, dtype=bool)
    if "mask" in names:
        mask = rng.random((batch, heads, queries, keys)) < 0.6
        options["mask"], sees = jnp.asarray(mask), sees & mask
    if "key_mask" in names:
        mask = rng.random((batch, 1, 1, keys)) < 0.6
        options["mask"], sees = jnp.asarray(mask), sees & mask
    if "bias" in names:
        bias = rng.normal(size=(1, heads, queries, keys)).astype(np.float32)
        options["bias"] = jnp.asarray(bias)
    if "key_bias" in names:
        bias = rng.normal(size=(batch, 1, 1, keys)).astype(np.float32)
        options["bias"] = jnp.asarray(bias)
    if "segment_ids" in names:
        ids = rng.integers(0, 3, (batch, queries)), rng.integers(0, 3, (batch, keys))
        options["segment_ids"] = tuple(map(jnp.asarray, ids))
        sees = sees & (ids[0][:, None, :, None] == ids[1][:, None, None, :])
    return options, sees, bias


OPTIONS = [
    (),
    ("is_causal",),
    ("mask",),
    ("bias",),
    ("segment_ids",),
    ("is_causal", "key_mask", "key_bias"),
    ("is_causal", "mask", "bias", "segment_ids"),
]


@pytest.mark.parametrize("names", OPTIONS, ids="-".join)
@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_equals_the_float64_oracle(implementation, names, attention_oracle):
    batch, queries, keys, heads = 2, 13, 37, 4
    arrays = draw_arrays(0, batch, queries, keys, heads, 2)
    options, sees, bias = draw_options(1, names, batch, queries, keys, heads)
    expected = attention_oracle(*arrays, sees, bias=bias)
    got = jax.jit(lambda *a: dot_product_attention(*a, **options, return_lse=True, implementation=implementation))(
        *arrays
    )
    for x, y in zip(got, expected):
        np.testing.assert_allclose(x, y, rtol=2e-5, atol=2e-6)


@settings(max_examples=6, deadline=None)
@given(
    lengths=st.sampled_from([(1, 1), (1, 20), (8, 16), (17, 17), (21, 40), (30, 5)]),
    heads=st.sampled_from([(1, 1), (4, 2), (3, 3), (4, 1)]),
    dtype=st.sampled_from([jnp.float32, jnp.bfloat16]),
    names=st.sampled_from(OPTIONS),
    seed=st.integers(0, 3),
)
def test_xla_equals_reference_in_values_gradients_and_tangents(lengths, heads, dtype, names, seed):
    arrays = draw_arrays(seed, 2, *lengths, *heads, dtype=dtype)
    options, _, _ = draw_options(seed, names, 2, *lengths, heads[0])
    bias = options.pop("bias", None)
    inputs = (*arrays, *(() if bias is None else (bias,)))
    rng = np.random.default_rng(seed)
    tangents = tuple(jnp.asarray(rng.normal(size=x.shape), x.dtype) for x in inputs)

    def everything(implementation):
        def attend(query, key, value, bias=None):
            out, lse = dot_product_attention(
                query, key, value, bias=bias, **options, return_lse=True, implementation=implementation
            )
            return out, jnp.where(jnp.isfinite(lse), lse, 0)  # so that the comparison has no infinities

        def run(*inputs):
            primal, tangent = jax.jvp(attend, inputs, tangents)
            out, pullback = jax.vjp(attend, *inputs)
            upstream = jax.tree.map(lambda x: jnp.cos(jnp.arange(x.size)).reshape(x.shape).astype(x.dtype), out)
            return primal, tangent, pullback(upstream)

        return jax.jit(run)(*inputs)

    tolerance = 1e-4 if dtype == jnp.float32 else 6e-2
    for got, expected in zip(jax.tree.leaves(everything("xla")), jax.tree.leaves(everything("reference"))):
        assert got.dtype == expected.dtype
        np.testing.assert_allclose(np.float32(got), np.float32(expected), rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_vmap_equals_a_loop(implementation):
    arrays = [jnp.stack([a, 2 * a, -a]) for a in draw_arrays(0, 1, 9, 19, 2, 1)]

    @jax.jit
    def attend(*arrays):
        return dot_product_attention(*arrays, is_causal=True, implementation=implementation)

    expected = np.stack([attend(*(a[i] for a in arrays)) for i in range(3)])
    np.testing.assert_allclose(jax.vmap(attend)(*arrays), expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_float64_in_float64_out(implementation, attention_oracle):
    with jax.enable_x64(True):
        arrays = draw_arrays(0, 1, 11, 21, 2, 1, dtype=jnp.float64)
        out, lse = jax.jit(lambda *a: dot_product_attention(*a, return_lse=True, implementation=implementation))(
            *arrays
        )
        expected = attention_oracle(*arrays, True)
        np.testing.assert_allclose(out, expected[0], rtol=1e-12, atol=1e-13)
        np.testing.assert_allclose(lse, expected[1], rtol=1e-12)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_query_without_visible_key_gives_zero_and_zero_gradients(implementation):
    arrays = draw_arrays(0, 1, 5, 21, 2, 2)
    mask = jnp.ones((1, 1, 5, 21), bool).at[:, :, 2].set(False)

    @jax.jit
    def attend(*arrays):
        return dot_product_attention(*arrays, mask=mask, return_lse=True, implementation=implementation)

    (out, lse), pullback = jax.vjp(attend, *arrays)
    gradients = pullback((jnp.zeros_like(out).at[:, 2].set(1), jnp.zeros_like(lse).at[:, 2].set(1)))
    assert (out[:, 2] == 0).all()
    assert (lse[:, 2] == -jnp.inf).all()
    assert all((g == 0).all() for g in gradients)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("options", [{}, {"is_causal": True}, {"scale": 0.3}], ids=str)
def test_convention_of_jax_nn(implementation, options):
    """Also where lengths differ: causal alignment at the first token; query head n reads key head n // (N / K)."""
    query, key, value = draw_arrays(0, 2, 9, 20, 4, 2, value_dim=4)
    rng = np.random.default_rng(0)
    mask = rng.random((2, 1, 9, 20)) < 0.8
    mask[..., 0] = True  # jax.nn gives no zeros where no key is visible
    options = dict(mask=jnp.asarray(mask), bias=jnp.asarray(rng.normal(size=(1, 4, 9, 20)), jnp.float32), **options)
    expected = jax.jit(lambda *a: jax.nn.dot_product_attention(*a, **options))(query, key, value)
    got = jax.jit(lambda *a: dot_product_attention(*a, implementation=implementation, **options))(query, key, value)
    np.testing.assert_allclose(got, expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_causal_output_ignores_the_future(implementation):
    query, key, value = draw_arrays(0, 1, 24, 24, 2, 2)

    @jax.jit
    def attend(key, value):
        return dot_product_attention(query, key, value, is_causal=True, implementation=implementation)

    before, after = attend(key, value), attend(key.at[:, 15:].add(3), value.at[:, 15:].add(3))
    np.testing.assert_array_equal(before[:, :15], after[:, :15])
    assert (before[:, 15:] != after[:, 15:]).any(-1).all()


def test_decoding_equals_the_causal_form():
    query, key, value = draw_arrays(0, 2, 11, 11, 4, 2)
    expected = jax.jit(lambda *a: dot_product_attention(*a, is_causal=True, scale=0.7))(query, key, value)
    cache = init_dot_product_cache(2, 11, 2, 4, value_dim=3)
    step = jax.jit(lambda cache, *token: dot_product_step(cache, *token, scale=0.7))
    for t in range(11):
        out, cache = step(cache, *(x[:, t : t + 1] for x in (query, key, value)))
        np.testing.assert_allclose(out[:, 0], expected[:, t], rtol=1e-5, atol=1e-6)
    overflow, _ = step(cache, query[:, :1], key[:, :1], value[:, :1])
    assert jnp.isnan(overflow).all()


@pytest.mark.parametrize("differentiate", [False, True])
def test_memory_is_linear_in_length(differentiate):
    def temporary_bytes(length):
        def attend(*arrays):
            return dot_product_attention(*arrays, is_causal=True, implementation="xla").sum()

        arrays = [jax.ShapeDtypeStruct((1, length, 1, 8), jnp.float32)] * 3
        function = jax.grad(attend, argnums=(0, 1, 2)) if differentiate else attend
        return jax.jit(function).lower(*arrays).compile().memory_analysis().temp_size_in_bytes

    short, long = temporary_bytes(1024), temporary_bytes(4096)
    assert long <= 4.5 * short
    assert long < 4096 * 4096  # a quarter of a float32 per pair


GOOD = dict(zip(("query", "key", "value"), draw_arrays(0, 2, 6, 8, 4, 2)))


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"query": GOOD["query"][0]}, ValueError, "query: got float32.6,4,4.; need rank 4"),
        ({"query": GOOD["query"][:, :, :3]}, ValueError, "key: .*heads must divide query's 3"),
        ({"key": GOOD["key"][..., :2]}, ValueError, "key: .*head_dim"),
        ({"value": GOOD["value"][:, :5]}, ValueError, "value: .*must agree with key"),
        ({"query": jnp.zeros((2, 6, 4, 4), jnp.int32)}, TypeError, "query: got dtype int32"),
        ({"mask": jnp.zeros((2, 1, 6, 8))}, TypeError, "mask: got dtype float32; need a bool mask"),
        ({"bias": jnp.zeros((2, 1, 6, 8), bool)}, TypeError, "bias: got dtype bool"),
        ({"mask": jnp.zeros((6, 8), bool)}, ValueError, "mask: "),
        ({"mask": jnp.zeros((2, 2, 6, 8), bool)}, ValueError, "mask: .*heads.1"),
        ({"segment_ids": jnp.zeros((2, 6), int)}, ValueError, "segment_ids: .*batch, S"),
        ({"segment_ids": jnp.zeros((2, 6))}, TypeError, "segment_ids: got dtype float32"),
        ({"is_causal": 1}, TypeError, "is_causal: got 1"),
        ({"implementation": "pallas_gpu"}, ValueError, "implementation: got 'pallas_gpu'"),
    ],
)
def test_wrong_calls_name_the_argument(change, error, message):
    with pytest.raises(error, match=message):
        jax.eval_shape(lambda: dot_product_attention(**{**GOOD, **change}))
