"""dot_product_attention: every implementation against a float64 oracle, each other, and jax.nn's conventions."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from jax.sharding import AxisType, PartitionSpec
from marks import slow_but

from attnlab import dot_product_attention, dot_product_step, init_dot_product_cache
from attnlab.attention import masks
from attnlab.attention._shared import tiled_softmax

IMPLEMENTATIONS = ["reference", "xla"]
every_implementation = pytest.mark.parametrize("implementation", slow_but(["xla"], IMPLEMENTATIONS))


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
    """Options by name, with the visibility [B,N,T,S] that they stand for, and what changes the logits."""
    rng = np.random.default_rng(seed)
    options, sees = {}, np.ones((1, 1, queries, keys), bool)
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
        options["bias"] = jnp.asarray(rng.normal(size=(1, heads, queries, keys)), jnp.float32)
    if "key_bias" in names:
        options["bias"] = jnp.asarray(rng.normal(size=(batch, 1, 1, keys)), jnp.float32)
    if "segment_ids" in names:
        ids = rng.integers(0, 3, (batch, queries)), rng.integers(0, 3, (batch, keys))
        options["segment_ids"] = tuple(map(jnp.asarray, ids))
        sees = sees & (ids[0][:, None, :, None] == ids[1][:, None, None, :])
    if "softcap" in names:
        options["softcap"] = 0.8
    if "sink_logits" in names:
        options["sink_logits"] = jnp.asarray(rng.normal(size=heads), jnp.float32)
    on_logits = {name: x for name, x in options.items() if name in ("bias", "softcap", "sink_logits")}
    return options, sees, on_logits


OPTIONS = [
    (),
    ("is_causal",),
    ("mask",),
    ("bias",),
    ("segment_ids",),
    ("is_causal", "key_mask", "key_bias"),
    ("is_causal", "mask", "bias", "segment_ids"),
    ("is_causal", "softcap"),
    ("mask", "sink_logits"),
    ("is_causal", "key_bias", "segment_ids", "softcap", "sink_logits"),
]


@pytest.mark.parametrize("names", OPTIONS, ids="-".join)
@every_implementation
def test_equals_the_float64_oracle(implementation, names, attention_oracle):
    batch, queries, keys, heads = 2, 13, 37, 4
    arrays = draw_arrays(0, batch, queries, keys, heads, 2)
    options, sees, on_logits = draw_options(1, names, batch, queries, keys, heads)
    expected = attention_oracle(*arrays, sees, **on_logits)
    got = jax.jit(lambda *a: dot_product_attention(*a, **options, return_lse=True, implementation=implementation))(
        *arrays
    )
    for x, y in zip(got, expected):
        np.testing.assert_allclose(x, y, rtol=2e-5, atol=2e-6)


@settings(max_examples=2, deadline=None)
@example(lengths=(21, 40), heads=(4, 2), dtype=jnp.float32, names=OPTIONS[6], seed=0)
@example(lengths=(21, 40), heads=(4, 2), dtype=jnp.float32, names=OPTIONS[-1], seed=0)
@given(
    lengths=st.sampled_from([(1, 1), (1, 20), (8, 16), (17, 17), (21, 40), (30, 5)]),
    heads=st.sampled_from([(1, 1), (4, 2), (3, 3), (4, 1)]),
    dtype=st.sampled_from([jnp.float32, jnp.bfloat16]),
    names=st.sampled_from(OPTIONS),
    seed=st.integers(0, 3),
)
@pytest.mark.slow
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


@every_implementation
def test_vmap_equals_a_loop(implementation):
    arrays = [jnp.stack([a, 2 * a, -a]) for a in draw_arrays(0, 1, 9, 19, 2, 1)]

    @jax.jit
    def attend(*arrays):
        return dot_product_attention(*arrays, is_causal=True, implementation=implementation)

    expected = np.stack([attend(*(a[i] for a in arrays)) for i in range(3)])
    np.testing.assert_allclose(jax.vmap(attend)(*arrays), expected, rtol=1e-5, atol=1e-6)


@every_implementation
def test_float64_in_float64_out(implementation, attention_oracle):
    with jax.enable_x64(True):
        arrays = draw_arrays(0, 1, 11, 21, 2, 1, dtype=jnp.float64)
        out, lse = jax.jit(lambda *a: dot_product_attention(*a, return_lse=True, implementation=implementation))(
            *arrays
        )
        expected = attention_oracle(*arrays, True)
        np.testing.assert_allclose(out, expected[0], rtol=1e-12, atol=1e-13)
        np.testing.assert_allclose(lse, expected[1], rtol=1e-12)


@every_implementation
@pytest.mark.long
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


@pytest.mark.parametrize("implementation", ["reference", "xla"])
def test_of_no_keys_none_is_seen(implementation):
    query, key, value = draw_arrays(0, 2, 6, 0, 4, 2)
    out, lse = dot_product_attention(query, key, value, return_lse=True, implementation=implementation)
    np.testing.assert_array_equal(out, np.zeros((2, 6, 4, 3)))
    np.testing.assert_array_equal(lse, np.full((2, 6, 4), -np.inf))


@every_implementation
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


@every_implementation
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


@pytest.mark.parametrize("differentiate", slow_but([True], [False, True]))
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


# --- Tiles under what JAX does to functions: the short sequences of the catalog are attended to at once --------------


TILED = ((), ("is_causal",), ("is_causal", "mask", "bias", "segment_ids"), ("is_causal", "softcap", "sink_logits"))
every_tiling = pytest.mark.parametrize("names", slow_but(TILED[1:2], TILED), ids="-".join)


def tiled(names):
    """(query, key, value) -> gradients, and (out, lse), over 3 x 3 tiles of which the last ones are incomplete."""
    options, _, _ = draw_options(1, names, 2, 21, 21, 4)

    def loss(*arrays):
        out, lse = dot_product_attention(*arrays, **options, return_lse=True, implementation="xla")
        shown = jnp.where(jnp.isfinite(lse), lse, 0)
        return jnp.sum(jnp.sin(out)) + jnp.sum(shown**2), (out, shown)

    return jax.grad(loss, argnums=(0, 1, 2), has_aux=True), draw_arrays(0, 2, 21, 21, 4, 2)


def assert_close(got, expected, tolerance=1e-5):
    for x, y in zip(jax.tree.leaves(got), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(x, y, rtol=tolerance, atol=tolerance)


@every_tiling
def test_tiles_in_shard_map_are_those_outside(names):
    function, arrays = tiled(names)
    if "mask" in names:
        pytest.skip("its mask and ids have the whole batch")
    mesh = jax.make_mesh((2,), ("data",), axis_types=(AxisType.Auto,))
    sharded = jax.shard_map(function, mesh=mesh, in_specs=PartitionSpec("data"), out_specs=PartitionSpec("data"))
    assert_close(jax.jit(sharded)(*arrays), jax.jit(function)(*arrays))


@every_tiling
@pytest.mark.long
def test_tiles_promote_no_rank_leak_no_tracer_and_make_no_nan(names):
    function, arrays = tiled(names)
    with jax.numpy_rank_promotion("raise"), jax.checking_leaks(), jax.debug_nans(True):
        jax.block_until_ready(jax.jit(function)(*arrays))


def test_one_exported_program_of_tiles_serves_any_batch():
    function, arrays = tiled(("is_causal",))
    (batch,) = jax.export.symbolic_shape("b")
    structs = [jax.ShapeDtypeStruct((batch, *x.shape[1:]), x.dtype) for x in arrays]
    assert_close(jax.export.export(jax.jit(function))(*structs).call(*arrays), jax.jit(function)(*arrays))


@pytest.mark.parametrize("names", slow_but([], TILED), ids="-".join)
def test_second_derivatives_equal_the_reference(names):
    """Forward over reverse, and reverse over forward, as local linear attention has it."""
    arrays = draw_arrays(0, 1, 19, 19, 2, 1)
    options, _, _ = draw_options(1, names, 1, 19, 19, 2)
    tangents = tuple(jnp.cos(3 * x) for x in arrays)

    @functools.partial(jax.jit, static_argnums=0)
    def both(form):
        def loss(*arrays):
            out, lse = dot_product_attention(*arrays, **options, return_lse=True, implementation=form)
            return jnp.sum(jnp.sin(out)) + jnp.sum(jnp.where(jnp.isfinite(lse), lse, 0) ** 2)

        gradient = jax.grad(loss, argnums=(0, 1, 2))
        forward = jax.jvp(gradient, arrays, tangents)[1]
        return forward, jax.grad(lambda *a: jax.jvp(loss, a, tangents)[1], argnums=(0, 1, 2))(*arrays)

    assert_close(both("xla"), both("reference"), 2e-4)


@pytest.mark.parametrize(
    "names", slow_but([("is_causal",), ("segment_ids",)], [*OPTIONS[1:3], ("segment_ids",)]), ids="-".join
)
@pytest.mark.parametrize("number", [np.nan, np.inf])
def test_tiles_keep_what_is_not_finite_to_who_sees_it(names, number):
    """Tokens 11 to 20, later than all others or hidden from them: also in their own gradients nothing is NaN."""
    hidden = np.arange(21) > 10
    options = {
        "is_causal": {"is_causal": True},
        "mask": {"mask": jnp.asarray(~hidden[None, None, None])},
        "segment_ids": {"segment_ids": jnp.asarray(np.tile(hidden.astype(np.int32), (2, 1)))},
    }[names[0]]
    arrays = draw_arrays(0, 2, 21, 21, 4, 2)

    def shown(out):
        return jnp.where(hidden[None, :, None, None], 0, out)

    @jax.jit
    def run(*arrays):
        def attend(*arrays):
            return shown(dot_product_attention(*arrays, **options, implementation="xla"))

        gradients = jax.grad(lambda *a: jnp.sum(jnp.sin(attend(*a))), argnums=(0, 1, 2))(*arrays)
        return attend(*arrays), jax.jvp(attend, arrays, tuple(map(jnp.ones_like, arrays)))[1], gradients

    spoilt = (jnp.where(hidden[None, :, None, None], number, x) for x in arrays)
    for x, y in zip(jax.tree.leaves(run(*spoilt)), jax.tree.leaves(run(*arrays)), strict=True):
        assert np.isfinite(x).all()
        np.testing.assert_allclose(x[:, ~hidden], y[:, ~hidden], rtol=1e-5, atol=1e-6)


@every_implementation
def test_a_bias_of_the_smallest_number_is_uniform_and_one_of_minus_infinity_hides(implementation):
    """As in jax.nn, where finfo.min for a whole row leaves the mean of the values."""
    arrays = draw_arrays(0, 1, 5, 21, 2, 2)

    def attend(smallest, *arrays):
        bias = jnp.zeros((1, 1, 5, 21)).at[:, :, 2].set(smallest)
        return dot_product_attention(*arrays, bias=bias, return_lse=True, implementation=implementation)

    (out, _), pullback = jax.vjp(jax.jit(functools.partial(attend, jnp.finfo(jnp.float32).min)), *arrays)
    np.testing.assert_allclose(out[0, 2], arrays[2][0].mean(0), rtol=1e-5, atol=1e-6)
    assert all(np.isfinite(x).all() for x in pullback((out, jnp.ones((1, 5, 2)))))
    (out, lse), pullback = jax.vjp(jax.jit(functools.partial(attend, -jnp.inf)), *arrays)
    assert (out[:, 2] == 0).all()
    assert (lse[:, 2] == -jnp.inf).all()
    gradients = pullback((jnp.zeros_like(out).at[:, 2].set(1), jnp.zeros_like(lse)))
    assert all((g == 0).all() for g in gradients)


MASK = (masks.blocks(9, shift=2) | masks.power_blocks(3)) & masks.Mask(lambda query, key: query[0] != 5)


@pytest.mark.parametrize("is_causal", [True, pytest.param(False, marks=pytest.mark.slow)])
@every_implementation
@pytest.mark.long
def test_a_mask_of_numbers_equals_its_pairs(implementation, is_causal):
    """Values, gradients, and a derivative of theirs."""
    arrays = draw_arrays(3, 2, 21, 30, 4, 2)
    pairs = masks.dense_mask(MASK, (21,), (30,))[None, None]

    def everything(mask, implementation):
        def loss(*arrays):
            out, lse = dot_product_attention(
                *arrays, mask=mask, is_causal=is_causal, return_lse=True, implementation=implementation
            )
            return jnp.sum(jnp.sin(out)) + jnp.sum(jnp.where(lse == -jnp.inf, 0, lse) ** 2), (out, lse)

        def slope(query):
            gradients = jax.grad(lambda *x: loss(*x)[0], (0, 1, 2))(query, *arrays[1:])
            return sum(jnp.sum(jnp.cos(x)) for x in gradients)

        return loss(*arrays), jax.grad(lambda *x: loss(*x)[0], (0, 1, 2))(*arrays), jax.grad(slope)(arrays[0])

    got = jax.jit(everything, static_argnums=(0, 1))(MASK, implementation)
    want = jax.jit(everything, static_argnums=1)(pairs, "reference")
    for x, y in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        np.testing.assert_allclose(x, y, rtol=2e-4, atol=2e-4)


# --- Softcap and learned sinks ----------------------------------------------------------------------------------------


@pytest.mark.long
def test_gradients_of_the_scale_and_of_sinks_beside_a_softcap_equal_the_reference():
    arrays = (*draw_arrays(0, 2, 21, 21, 4, 2), jnp.float32(1.5), jnp.array([-1.0, 0.0, 2.0, -jnp.inf]))
    bias = jnp.asarray(np.random.default_rng(1).normal(size=(1, 4, 21, 21)), jnp.float32)

    @functools.partial(jax.jit, static_argnums=0)
    def gradients(form):
        def loss(query, key, value, scale, sinks, bias):
            options = {"scale": scale, "sink_logits": sinks, "bias": bias, "softcap": 0.8, "is_causal": True}
            out, lse = dot_product_attention(query, key, value, **options, return_lse=True, implementation=form)
            return jnp.sum(jnp.sin(out)) + jnp.sum(lse**2)

        return jax.grad(loss, argnums=range(6))(*arrays, bias)

    got, want = gradients("xla"), gradients("reference")
    assert_close(got, want, 1e-4)
    assert (got[4] != 0).tolist() == [True, True, True, False]


@every_implementation
def test_a_query_without_visible_key_has_its_sinks(implementation):
    """It gives 0 and the sink's logit, whose gradient is that of lse; -inf is no sink."""
    arrays = draw_arrays(0, 1, 5, 21, 2, 2)
    mask = jnp.ones((1, 1, 5, 21), bool).at[:, :, 2].set(False)

    def attend(sinks, *arrays):
        return dot_product_attention(
            *arrays, mask=mask, sink_logits=sinks, return_lse=True, implementation=implementation
        )

    (out, lse), pullback = jax.vjp(jax.jit(attend), jnp.array([0.5, -jnp.inf]), *arrays)
    assert (out[:, 2] == 0).all()
    assert lse[0, 2].tolist() == [0.5, -np.inf]
    ones = jnp.zeros_like(out).at[:, 2].set(1), jnp.zeros_like(lse).at[:, 2].set(1)
    of_sinks, *others = pullback(ones)
    assert of_sinks.tolist() == [1, 0]
    assert all((g == 0).all() for g in others)


@every_implementation
def test_a_huge_softcap_and_sinks_of_minus_infinity_are_none(implementation):
    arrays = draw_arrays(0, 2, 21, 21, 4, 2)
    attend = jax.jit(functools.partial(dot_product_attention, return_lse=True, implementation=implementation))
    unlimited = functools.partial(attend, sink_logits=jnp.full(4, -jnp.inf))
    assert_close(unlimited(*arrays), attend(*arrays))
    capped = functools.partial(dot_product_attention, softcap=1e6, return_lse=True, implementation=implementation)
    assert_close(jax.jit(capped)(*arrays), attend(*arrays))


def test_a_softcap_hides_no_infinity():
    """The tanh of an infinite product is 1."""
    query, key, value = draw_arrays(0, 1, 21, 21, 1, 1)
    out = dot_product_attention(
        query, key.at[0, 9, 0, 1].set(np.inf), value, is_causal=True, softcap=2.0, implementation="xla"
    )
    assert np.isnan(out).any((0, 2, 3)).tolist() == [False] * 9 + [True] * 12


@pytest.mark.parametrize("tokens", [1, 3])
def test_decoding_with_softcap_and_sinks_equals_the_causal_form(tokens):
    arrays = draw_arrays(0, 2, 9, 9, 4, 2)
    options = {"softcap": 0.8, "sink_logits": jnp.array([-1.0, 0.0, 2.0, -jnp.inf])}
    expected = jax.jit(functools.partial(dot_product_attention, is_causal=True, **options))(*arrays)
    cache = init_dot_product_cache(2, 9, 2, 4, value_dim=3)
    step = jax.jit(functools.partial(dot_product_step, **options))
    for t in range(0, 9, tokens):
        out, cache = step(cache, *(x[:, t : t + tokens] for x in arrays))
        np.testing.assert_allclose(out, expected[:, t : t + tokens], rtol=1e-5, atol=1e-6)


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
        ({"softcap": 0}, ValueError, "softcap: got 0; need a finite number, above 0"),
        ({"softcap": jnp.ones(())}, TypeError, "softcap: got .*; need a number"),
        ({"sink_logits": jnp.zeros(2)}, ValueError, "sink_logits: .*heads. = .4."),
        ({"sink_logits": jnp.zeros(4, int)}, TypeError, "sink_logits: got dtype int32"),
        (
            {"implementation": "pallas_gpu"},
            ValueError,
            "implementation: 'pallas_gpu' cannot serve this .* call: needs ",
        ),
    ],
)
def test_wrong_calls_name_the_argument(change, error, message):
    with pytest.raises(error, match=message):
        jax.eval_shape(lambda: dot_product_attention(**{**GOOD, **change}))
