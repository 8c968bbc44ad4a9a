"""Local and dilated attention: against vectors, a float64 oracle, each other, other libraries' conventions."""

import functools
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import parts
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from marks import slow_but

from attnlab import (
    dilated_attention,
    dilated_step,
    dot_product_attention,
    init_dilated_cache,
    init_local_cache,
    local_attention,
    local_step,
)
from attnlab.attention import local, masks

IMPLEMENTATIONS = ["reference", "xla"]
every_implementation = pytest.mark.parametrize("implementation", slow_but(["xla"], IMPLEMENTATIONS))
VECTORS = pathlib.Path(__file__).parents[1] / "vectors" / "neighborhood"


@pytest.fixture(autouse=True)
def _small_tiles(monkeypatch):
    """Several tiles in several groups, the last ones incomplete, at lengths of a test."""
    monkeypatch.setattr(local, "_TILE_RANGE", {1: (4, 8), 2: (2, 4), 3: (2, 4)})
    monkeypatch.setattr(local, "_GROUP_BYTES", 4096)


def draw_arrays(seed, space, *, batch=2, heads=2, key_heads=1, head_dim=4, value_dim=3, dtype=jnp.float32):
    rng = np.random.default_rng(seed)
    shapes = [(batch, *space, heads, head_dim), (batch, *space, key_heads, head_dim)]
    shapes.append((*shapes[1][:-1], value_dim))
    return tuple(jnp.asarray(rng.normal(size=shape), dtype) for shape in shapes)


def run(function, *arrays, **options):
    return jax.jit(lambda *arrays: function(*arrays, **options))(*arrays)


@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(np.float64, 1e-12), pytest.param(np.float32, 1e-5, marks=pytest.mark.slow)]
)
@every_implementation
@pytest.mark.parametrize("name", ["1d", "1d_causal_dilated_strided", "2d_dilated"])
def test_equals_the_vectors(name, implementation, dtype, tolerance):
    case = dict(np.load(VECTORS / f"{name}.npz"))
    options = {n: tuple(case[n].tolist()) for n in ("window", "dilation", "stride", "is_causal")}
    options |= {"scale": float(case["scale"]), "return_lse": True, "implementation": implementation}

    def run(query, key, value, upstream):
        (out, lse), pullback = jax.vjp(lambda *a: dilated_attention(*a, **options), query, key, value)
        return out, lse, *pullback((upstream, jnp.zeros_like(lse)))

    with jax.enable_x64(dtype == np.float64):
        results = jax.jit(run)(*(case[n].astype(dtype) for n in ("q", "k", "v", "do")))
        for got, expected in zip(results, ("o", "lse", "dq", "dk", "dv")):
            assert got.dtype == dtype
            np.testing.assert_allclose(got, case[expected], rtol=tolerance, atol=tolerance, err_msg=expected)


SPACES = [  # space, and settings that fit it; lengths that tiles do not divide
    ((1,), {"window": 1}),
    ((13,), {"window": 13}),
    ((13,), {"window": 9, "stride": 2}),
    ((29,), {"window": 5}),
    ((29,), {"window": 6, "stride": 6, "edge": "clip"}),
    ((29,), {"window": 4, "stride": 3, "is_causal": True}),
    ((29,), {"window": 3, "is_causal": True, "sinks": 2}),
    ((9,), {"window": 2, "stride": 2, "is_causal": True, "sinks": 20}),
    ((7, 10), {"window": (5, 3)}),
    ((7, 10), {"window": 4, "stride": (3, 1), "is_causal": (True, False)}),
    ((5, 1), {"window": (2, 1), "edge": "clip"}),
    ((7, 10), {"window": (2, 3), "is_causal": (True, False), "sinks": 2}),
    ((4, 7), {"window": 2, "stride": (1, 2), "is_causal": True, "sinks": 1}),
    ((5, 6), {"window": (3, 2), "is_causal": (False, True), "edge": "clip", "sinks": 9}),
    ((3, 5, 6), {"window": (2, 3, 5), "stride": (1, 2, 1), "is_causal": (True, False, False)}),
    ((4, 4, 5), {"window": 3}),
]


def case_id(case):
    return str(case).replace(" ", "") if isinstance(case, dict) else "x".join(map(str, case))


def sees_by_definition(window_by_definition, space, *, sinks=0, segment_ids=None, **options):
    """bool [B|1, 1, T, T] from the definition of the window."""
    each = {
        name: value if isinstance(value, tuple) else (value,) * len(space)
        for name, value in options.items()
        if name != "edge"
    }
    sees = np.ones((1, 1), bool)
    for axis, length in enumerate(space):
        settings = {name: values[axis] for name, values in each.items()} | {"edge": options.get("edge", "shift")}
        rows = [np.isin(np.arange(length), list(window_by_definition(q, length, **settings))) for q in range(length)]
        sees = np.kron(sees, np.stack(rows)).astype(bool)
    if sinks:
        causal = each["is_causal"]
        at = np.stack(np.unravel_index(np.arange(np.prod(space)), space), axis=-1)
        before = (at[None] <= at[:, None])[..., list(causal)].all(-1)
        sees = sees | (before & (at[None, :, causal.index(True)] < sinks))
    if segment_ids is not None:
        ids = np.asarray(segment_ids).reshape(len(segment_ids), -1)
        return (sees & (ids[:, :, None] == ids[:, None, :]))[:, None]
    return sees[None, None]


@pytest.mark.parametrize(("space", "options"), SPACES, ids=case_id)
@every_implementation
def test_equals_the_float64_oracle(implementation, space, options, attention_oracle, window_by_definition):
    assert_is_the_oracle_s(implementation, space, options, attention_oracle, window_by_definition)


@pytest.mark.parametrize(("space", "options"), [SPACES[6], SPACES[9]], ids=case_id)
@every_implementation
def test_with_softcap_and_sink_logits_too(implementation, space, options, attention_oracle, window_by_definition):
    on_logits = {"softcap": 0.8, "sink_logits": jnp.array([1.0, -0.5])}
    assert_is_the_oracle_s(implementation, space, options, attention_oracle, window_by_definition, on_logits)


def assert_is_the_oracle_s(
    implementation,
    space,
    options,
    attention_oracle,
    window_by_definition,
    on_logits={},  # noqa: B006
):
    arrays = draw_arrays(0, space)
    ids = jnp.asarray(np.random.default_rng(1).integers(0, 2, (2, *space)))
    sees = sees_by_definition(window_by_definition, space, **options, segment_ids=ids)
    flat = [np.asarray(x).reshape(2, -1, *x.shape[-2:]) for x in arrays]
    out, lse = attention_oracle(*flat, sees, **on_logits)
    options = dict(segment_ids=ids, return_lse=True, implementation=implementation, **options, **on_logits)
    got = run(local_attention, *arrays, **options)
    np.testing.assert_allclose(got[0], out.reshape(got[0].shape), rtol=2e-5, atol=2e-6)
    np.testing.assert_allclose(got[1], lse.reshape(got[1].shape), rtol=2e-5, atol=2e-6)


@settings(max_examples=2, deadline=None)
@example(case=SPACES[9], heads=(4, 2), dtype=jnp.float32, has_segments=True, seed=0)
@given(
    case=st.sampled_from(SPACES),
    heads=st.sampled_from([(2, 1), (4, 2), (3, 3)]),
    dtype=st.sampled_from([jnp.float32, jnp.bfloat16]),
    has_segments=st.booleans(),
    seed=st.integers(0, 3),
)
@pytest.mark.slow
def test_xla_equals_reference_in_values_gradients_and_tangents(case, heads, dtype, has_segments, seed):
    space, options = case
    arrays = draw_arrays(seed, space, heads=heads[0], key_heads=heads[1], dtype=dtype)
    rng = np.random.default_rng(seed)
    tangents = tuple(jnp.asarray(rng.normal(size=x.shape), x.dtype) for x in arrays)
    ids = jnp.asarray(rng.integers(0, 3, (2, *space))) if has_segments else None

    def everything(implementation):
        def attend(*arrays):
            return local_attention(*arrays, **options, segment_ids=ids, return_lse=True, implementation=implementation)

        def run(arrays):
            primal, tangent = jax.jvp(attend, arrays, tangents)
            out, pullback = jax.vjp(attend, *arrays)
            upstream = jax.tree.map(lambda x: jnp.cos(jnp.arange(x.size)).reshape(x.shape).astype(x.dtype), out)
            return primal, tangent, pullback(upstream)

        return jax.jit(run)(arrays)

    tolerance = 1e-4 if dtype == jnp.float32 else 6e-2
    for got, expected in zip(jax.tree.leaves(everything("xla")), jax.tree.leaves(everything("reference"))):
        assert got.dtype == expected.dtype
        np.testing.assert_allclose(np.float32(got), np.float32(expected), rtol=tolerance, atol=tolerance)


@every_implementation
def test_vmap_equals_a_loop(implementation):
    arrays = [jnp.stack([a, 2 * a, -a]) for a in draw_arrays(0, (21,))]
    attend = jax.jit(lambda *a: local_attention(*a, window=5, is_causal=True, sinks=1, implementation=implementation))
    expected = np.stack([attend(*(a[i] for a in arrays)) for i in range(3)])
    np.testing.assert_allclose(jax.vmap(attend)(*arrays), expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(("space", "dilation"), [pytest.param((13,), 3, marks=pytest.mark.slow), ((4, 8), (2, 3))])
@pytest.mark.long
def test_dilation_is_attention_within_each_residue_group(space, dilation):
    arrays = draw_arrays(0, space)
    got = run(dilated_attention, *arrays, window=2, dilation=dilation, implementation="xla")
    each = dilation if isinstance(dilation, tuple) else (dilation,)
    expected = np.zeros(got.shape)
    arrays = [np.asarray(a) for a in arrays]
    for residue in np.ndindex(each):
        group = (slice(None), *(slice(r, None, d) for r, d in zip(residue, each)))
        expected[group] = run(local_attention, *(a[group] for a in arrays), window=2)
    np.testing.assert_allclose(got, expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("space", [(11,), (4, 5)])
def test_window_of_the_whole_axis_is_full_attention(space):
    arrays = draw_arrays(0, space)
    flat = [x.reshape(2, -1, *x.shape[-2:]) for x in arrays]
    got = run(local_attention, *arrays, window=space, implementation="xla")
    expected = run(dot_product_attention, *flat, implementation="reference").reshape(got.shape)
    np.testing.assert_allclose(got, expected, rtol=1e-5, atol=1e-6)


def test_flipping_an_axis_flips_the_output_when_window_and_stride_are_odd():
    arrays = draw_arrays(0, (9, 15))

    def attend(*arrays):
        return run(local_attention, *arrays, window=(3, 5), stride=(1, 3), implementation="xla")

    for axis in (1, 2):
        flipped = attend(*(jnp.flip(a, axis) for a in arrays))
        np.testing.assert_allclose(jnp.flip(flipped, axis), attend(*arrays), rtol=1e-5, atol=1e-6)


@every_implementation
@pytest.mark.parametrize(("is_causal", "window"), [(True, 4), (False, 7), (False, 6)])
def test_convention_of_jax_nn_local_window_size(implementation, is_causal, window):
    """jax counts the keys on either side without the query; window counts all keys seen, the query's own included."""
    query, key, value = draw_arrays(0, (23,), value_dim=4)
    size = (window - 1, 0) if is_causal else (window // 2, (window - 1) // 2)
    expected = run(jax.nn.dot_product_attention, query, key, value, local_window_size=size)
    options = {"window": window, "is_causal": is_causal, "edge": "clip", "implementation": implementation}
    got = run(local_attention, query, key, value, **options)
    np.testing.assert_allclose(got, expected, rtol=1e-5, atol=1e-6)


@every_implementation
def test_changing_a_token_changes_just_the_queries_whose_window_holds_it(implementation):
    query, key, value = draw_arrays(0, (30,))

    @jax.jit
    def attend(key, value):
        options = {"window": 5, "is_causal": True, "sinks": 2, "implementation": implementation}
        return local_attention(query, key, value, **options)

    for token, affected in ((1, range(1, 30)), (17, range(17, 22)), (29, range(29, 30))):
        change = attend(key.at[:, token].add(2), value.at[:, token].add(2)) != attend(key, value)
        assert set(np.flatnonzero(change.any((0, 2, 3)))) == set(affected)


@pytest.mark.parametrize(
    ("length", "options"),
    [
        pytest.param(3, {"window": 3}, marks=pytest.mark.slow),
        (17, {"window": 4, "sinks": 2}),
        (16, {"window": 5, "stride": 4}),
        pytest.param(9, {"window": 1, "sinks": 1}, marks=pytest.mark.slow),
    ],
    ids=str,
)
def test_decoding_equals_the_causal_form(length, options):
    query, key, value = draw_arrays(0, (length,), heads=4, key_heads=2)
    expected = run(local_attention, query, key, value, is_causal=True, scale=0.7, implementation="reference", **options)
    sinks = options.get("sinks", 0)
    cache = init_local_cache(2, 2, 4, window=options["window"], sinks=sinks, value_dim=3)

    def step(cache, token):
        out, cache = local_step(cache, *(x[:, None] for x in token), scale=0.7, **options)
        return cache, out[:, 0]

    _, got = jax.lax.scan(step, cache, tuple(jnp.moveaxis(x, 1, 0) for x in (query, key, value)))
    np.testing.assert_allclose(jnp.moveaxis(got, 0, 1), expected, rtol=1e-5, atol=1e-6)
    assert cache.key.shape[1] == options["window"] + sinks  # whatever the length


def test_decoding_with_a_stride_equals_clipped_windows_at_any_length():
    query, key, value = draw_arrays(0, (14,))
    expected = run(local_attention, query, key, value, window=5, stride=4, is_causal=True, edge="clip")
    cache = init_local_cache(2, 1, 4, window=5, value_dim=3)
    step = jax.jit(lambda cache, *token: local_step(cache, *token, window=5, stride=4))
    for t in range(14):
        out, cache = step(cache, *(x[:, t : t + 1] for x in (query, key, value)))
        np.testing.assert_allclose(out[:, 0], expected[:, t], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    ("window", "dilation", "stride"),
    [(5, 2, 3), *(pytest.param(*case, marks=pytest.mark.slow) for case in ((3, 4, 1), (1, 3, 1), (4, 1, 1)))],
)
def test_dilated_decoding_equals_the_causal_form(window, dilation, stride):
    query, key, value = draw_arrays(0, (21,), heads=4, key_heads=2)
    options = {"window": window, "dilation": dilation, "stride": stride}
    expected = run(dilated_attention, query, key, value, is_causal=True, edge="clip", **options)
    cache = init_dilated_cache(2, 2, 4, window=window, dilation=dilation, value_dim=3)

    def step(cache, token):
        out, cache = dilated_step(cache, *(x[:, None] for x in token), **options)
        return cache, out[:, 0]

    _, got = jax.lax.scan(step, cache, tuple(jnp.moveaxis(x, 1, 0) for x in (query, key, value)))
    np.testing.assert_allclose(jnp.moveaxis(got, 0, 1), expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("differentiate", [False, True])
@pytest.mark.parametrize(
    ("short", "long", "options"),
    [
        ((2048,), (8192,), {"window": 64, "is_causal": True, "sinks": 4}),
        ((32, 32), (64, 64), {"window": 7}),
    ],
    ids=["1d", "2d"],
)
def test_memory_is_linear_in_the_number_of_positions(monkeypatch, short, long, options, differentiate):
    monkeypatch.undo()  # tiles of the size used in practice

    def temporary_bytes(space):
        def attend(*arrays):
            return local_attention(*arrays, implementation="xla", **options).sum()

        arrays = [jax.ShapeDtypeStruct((1, *space, 1, 8), jnp.float32)] * 3
        function = jax.grad(attend, argnums=(0, 1, 2)) if differentiate else attend
        return jax.jit(function).lower(*arrays).compile().memory_analysis().temp_size_in_bytes

    # 4 times the positions.
    at_long = temporary_bytes(long)
    assert at_long <= 4.5 * temporary_bytes(short)
    assert at_long < np.prod(long) ** 2  # a quarter of a float32 per pair


GOOD = dict(zip(("query", "key", "value"), draw_arrays(0, (7, 20)))) | {"window": 5}
LINE = dict(zip(("query", "key", "value"), draw_arrays(0, (20,)))) | {"window": 5}


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (GOOD | {"window": 9}, ValueError, r"window: got 9; at most 7 fits on axis 0 of the space \(7, 20\)"),
        (GOOD | {"window": 0}, ValueError, "window: got 0; must be at least 1"),
        (GOOD | {"window": (3, 3, 3)}, ValueError, "window: got .*one value or 2"),
        (GOOD | {"window": 3.0}, TypeError, "window: got 3.0; need int"),
        (GOOD | {"stride": 6}, ValueError, "stride: got 6; must be from 1 to the window, 5"),
        (GOOD | {"stride": 0}, ValueError, "stride: got 0"),
        (GOOD | {"is_causal": 1}, TypeError, "is_causal: got 1; need bool"),
        (GOOD | {"edge": "shfit"}, ValueError, "edge: got 'shfit'; need 'shift' or 'clip'"),
        (GOOD | {"sinks": 2}, ValueError, "sinks: got 2; needs a causal axis; else must be 0"),
        (GOOD | {"is_causal": True, "sinks": 2, "implementation": "pallas_tpu"}, ValueError, "has no sinks on 2 axes"),
        (LINE | {"sinks": -1, "is_causal": True}, ValueError, "sinks: got -1"),
        (LINE | {"segment_ids": jnp.zeros((2, 19), int)}, ValueError, "segment_ids: got"),
        (LINE | {"key": LINE["key"][:, :19], "value": LINE["value"][:, :19]}, ValueError, "key: .*space axes"),
        (LINE | {"query": LINE["query"][0]}, ValueError, "query: got .* need rank 4 or 5 or 6"),
        (LINE | {"implementation": "fast"}, ValueError, "implementation: got 'fast'"),
    ],
)
def test_wrong_calls_name_the_argument(call, error, message):
    with pytest.raises(error, match=message):
        jax.eval_shape(lambda: local_attention(**call))


def test_dilated_window_that_does_not_fit_is_refused_with_what_does():
    query, key, value = draw_arrays(0, (20,))
    with pytest.raises(ValueError, match=r"window: got 7; at most 6 = 20 // 3 \(dilation\) fits on axis 0"):
        dilated_attention(query, key, value, window=7, dilation=3)
    with pytest.raises(ValueError, match="dilation: got 0; must be at least 1"):
        dilated_attention(query, key, value, window=7, dilation=0)


def test_step_checks_its_cache():
    query, key, value = draw_arrays(0, (1,))
    cache = init_local_cache(2, 1, 4, window=6, sinks=1, value_dim=3)
    with pytest.raises(ValueError, match=r"window: got 5 \+ 1 sinks; the cache was made for 7 together"):
        local_step(cache, query, key, value, window=5, sinks=1)
    with pytest.raises(ValueError, match=r"query: .*at least one token"):
        local_step(cache, *draw_arrays(0, (0,)), window=6, sinks=1)
    query, key, value = draw_arrays(0, (2,))
    with pytest.raises(ValueError, match=r"key: .*cache's layout, float32\[2,7,1,4\], 2 tokens"):
        local_step(cache, query, key.repeat(2, axis=2), value.repeat(2, axis=2), window=6, sinks=1)


@pytest.mark.parametrize("form", slow_but(["xla"], ["reference", "xla"]))
@pytest.mark.parametrize("sides", slow_but([(5, 2)], [(0, 0), (5, 2), (0, 3), (40, 1), (3, 10**9)]), ids=str)
def test_a_pair_is_so_many_keys_before_and_after(form, sides):
    rng = np.random.default_rng(0)
    query, key, value = (rng.normal(size=(2, 37, n, 8)).astype(np.float32) for n in (4, 2, 2))

    def loss(form, arrays):
        out = local_attention(*arrays, window=(sides,), edge="clip", implementation=form)
        return jnp.sum(jnp.sin(out)), out

    def masked(arrays):
        mask = masks.dense_mask(masks.window(*(min(side, 99) for side in sides)), (37,))
        out = dot_product_attention(*arrays, mask=mask[None, None], implementation="reference")
        return jnp.sum(jnp.sin(out)), out

    arrays = (query, key, value)
    got = jax.jit(jax.grad(functools.partial(loss, form), has_aux=True))(arrays)
    want = jax.jit(jax.grad(masked, has_aux=True))(arrays)
    for x, y in zip(jax.tree.leaves(got), jax.tree.leaves(want)):
        np.testing.assert_allclose(x, y, atol=3e-6)


@pytest.mark.parametrize(
    "options",
    [
        {"window": ((3, 2),)},
        {"window": ((3, 2),), "edge": "clip", "is_causal": True},
        {"window": ((3, 2),), "edge": "clip", "stride": 2},
        {"window": ((3, 2, 1),), "edge": "clip"},
        {"window": ((-1, 2),), "edge": "clip"},
        {"window": ((3, 2), (3, 2)), "edge": "clip"},
    ],
    ids=str,
)
def test_a_pair_that_cannot_be_is_refused(options):
    x = np.zeros((1, 9, 2, 4), np.float32)
    with pytest.raises((ValueError, TypeError), match="window: got"):
        local_attention(x, x, x, **options)


def test_devices_that_share_another_axis_than_the_sinks_are_refused():
    arrays = parts.qkv(16, 6)
    case = parts.Case(functools.partial(local_attention, window=3, is_causal=(False, True), sinks=1), arrays, {})
    mesh = parts.mesh_of(8)
    with jax.set_mesh(mesh), pytest.raises(ValueError, match="sinks: got 1; must be 0 where devices share axis 0"):
        jax.eval_shape(lambda arrays: case.call(**arrays), parts.placed(case, mesh))
