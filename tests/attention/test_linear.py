"""Linear attention: its forms agree with the published code's vectors, with each other, and over cuts in time."""

import functools
import itertools
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from marks import slow_but

import attnlab
from attnlab import LinearState, init_linear_cache, linear_attention, linear_step, local_attention, merge_attention

VECTORS = pathlib.Path(__file__).parent.parent / "vectors" / "linear"
IMPLEMENTATIONS = ("reference", "xla")
every_implementation = pytest.mark.parametrize("implementation", slow_but(["xla"], IMPLEMENTATIONS))

# What makes each published mechanism: options, and which gates it has.
FORMS = {
    "plain": ({}, ()),
    "constant": ({}, ("constant",)),
    "token": ({}, ("token",)),
    "channel": ({}, ("channel",)),
    "delta": ({}, ("beta",)),
    "gated delta": ({}, ("token", "beta")),
    "channel-gated delta": ({}, ("channel", "beta")),
    "erase": ({}, ("erase",)),
    "channel-gated erase": ({}, ("channel", "erase")),
    "elu": ({"feature_map": "elu", "normalize": True}, ()),
    "relu, constant": ({"feature_map": "relu", "normalize": True}, ("constant",)),
    "taylor2": ({"feature_map": "taylor2", "normalize": True}, ()),
    "function, token": ({"feature_map": jax.nn.softplus, "normalize": True, "scale": 0.3}, ("token",)),
}
EITHER_WAY = ("plain", "elu", "taylor2")


def rms_error(got, want):
    want = np.asarray(want, np.float64)
    return np.sqrt(np.mean((np.asarray(got, np.float64) - want) ** 2)) / np.sqrt(np.mean(want**2))


def inputs(form, length, *, heads=(2, 2), head_dim=5, value_dim=3, batch=2, state=False, dtype=np.float32, seed=0):
    """The arrays of a call by argument name, and its options."""
    options, gates = FORMS[form]
    rng = np.random.default_rng(seed)
    (n, k), normal = heads, rng.standard_normal
    arrays = {
        "query": normal((batch, length, n, head_dim)),
        "key": normal((batch, length, k, head_dim)),
        "value": normal((batch, length, k, value_dim)),
    }
    if "beta" in gates:
        arrays["key"] /= np.linalg.norm(arrays["key"], axis=-1, keepdims=True)
        arrays["beta"] = rng.uniform(0, 1, (batch, length, n))
    if "erase" in gates:
        read = normal((batch, length, n, head_dim))
        read /= np.linalg.norm(read, axis=-1, keepdims=True)
        arrays["erase"] = (read, rng.uniform(0, 1, read.shape) * read)
    for gate, shape in (
        ("constant", (n,)),
        ("token", (batch, length, n)),
        ("channel", (batch, length, n, head_dim)),
    ):
        if gate in gates:
            arrays["log_decay"] = -rng.uniform(0, 0.5, shape)
    arrays = jax.tree.map(lambda x: jnp.asarray(x, dtype), arrays)
    if state:
        empty = init_linear_cache(
            batch, n, head_dim, value_dim, feature_map=options.get("feature_map"), normalize="normalize" in options
        )
        arrays["initial_state"] = jax.tree.map(
            lambda leaf: jnp.asarray(np.abs(normal(leaf.shape)), jnp.promote_types(dtype, jnp.float32)), empty
        )
    return arrays, options


@functools.partial(
    jax.jit, static_argnames=("is_causal", "feature_map", "normalize", "scale", "chunk_size", "implementation")
)
def attend(arrays, **options):
    return linear_attention(**arrays, return_state=True, **options)


@functools.partial(jax.jit, static_argnames=("feature_map", "normalize", "scale"))
def step(state, arrays, **options):
    return linear_step(state, **arrays, **options)


def cut(arrays, start, stop):
    """The arrays of tokens start to stop: of all but a constant decay."""
    return jax.tree.map(lambda x: x if x.ndim == 1 else x[:, start:stop], arrays)


# --- Published code ---------------------------------------------------------------------------------------------------

CASES = {
    "plain": {},
    "normalized": {"normalize": True},
    "elu_normalized": {"normalize": True, "feature_map": "elu"},
    "retention": {},
    "scalar_gated": {},
    "channel_gated": {},
    "delta": {},
    "gated_delta": {},
    "taylor2": {"normalize": True, "feature_map": "taylor2"},
}


@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(np.float64, 1e-12), pytest.param(np.float32, 2e-6, marks=pytest.mark.slow)]
)
@every_implementation
@pytest.mark.parametrize("case", slow_but(["gated_delta", "channel_gated"], CASES))
@pytest.mark.long
def test_agrees_with_published_code(case, implementation, dtype, tolerance):
    vectors = dict(np.load(VECTORS / f"{case}.npz"))
    names = {"q": "query", "k": "key", "v": "value", "g": "log_decay", "beta": "beta", "h0": "initial_state"}
    wanted = [name.removeprefix("up_") for name in vectors if name.startswith("up_")]

    @jax.jit
    def run(primals, cotangents):
        def call(primals):
            arrays = {names[name]: x for name, x in primals.items()}
            if "h0" in primals:
                arrays["initial_state"] = LinearState(primals["h0"])
            if "g_gamma" in vectors:
                arrays["log_decay"] = jnp.asarray(vectors["g_gamma"], primals["q"].dtype)
            out, state = linear_attention(**arrays, return_state=True, implementation=implementation, **CASES[case])
            results = {"o": out, "ht": state.kv}
            if state.k_sum is not None:
                results["zt"] = state.k_sum[:, None]
            return {name: results[name] for name in wanted}

        out, transpose = jax.vjp(call, primals)
        return out, transpose(cotangents)[0]

    with jax.enable_x64(True):
        primals = {name: jnp.asarray(vectors[name], dtype) for name in names if name in vectors}
        out, gradients = run(primals, {name: jnp.asarray(vectors[f"up_{name}"], dtype) for name in wanted})
        errors = {name: rms_error(x, vectors[name]) for name, x in out.items()}
        errors |= {f"d{name}": rms_error(x, vectors[f"d{name}"]) for name, x in gradients.items()}
        assert max(errors.values()) < tolerance, errors


def _rwkv7(query, key, value, log_decay, removal, rate, **options):
    """It reads the state before its decay."""
    erase = removal * jnp.exp(-log_decay), rate * removal
    return linear_attention(query, key, value, log_decay=log_decay, erase=erase, scale=1.0, **options)


def _window_and_state(query, key, value, implementation):
    """A softmax over the last two tokens and a state of all older ones, under one denominator."""

    def older(x):
        return jnp.pad(x, ((0, 0), (2, 0), (0, 0), (0, 0)))[:, : x.shape[1]]

    state = linear_attention(
        jax.nn.elu(query) + 1,
        older(jax.nn.elu(key) + 1),
        older(value),
        normalize=True,
        scale=0.7,
        return_lse=True,
        implementation=implementation,
        chunk_size=4,
    )
    window = local_attention(query, key, value, window=2, is_causal=True, scale=0.7, return_lse=True)
    return merge_attention(*zip(window, state, strict=True))[0]


def _kda(query, key, value, log_decay, beta, **options):
    return linear_attention(query, key, value, log_decay=log_decay, beta=beta, **options)


ORACLES = {
    "rwkv7": functools.partial(_rwkv7, chunk_size=3),
    "kda": functools.partial(_kda, chunk_size=4),
    "window_softmax_state": _window_and_state,
}


@every_implementation
@pytest.mark.parametrize("case", slow_but(["rwkv7", "window_softmax_state"], ORACLES))
@pytest.mark.long
def test_agrees_with_its_formula_s_vectors(case, implementation, assert_close):
    vectors = dict(np.load(VECTORS / f"{case}.npz"))
    arrays = {name.removeprefix("d_"): vectors[name.removeprefix("d_")] for name in vectors if name.startswith("d_")}

    def loss(arrays):
        out = ORACLES[case](**arrays, implementation=implementation)
        return jnp.sum(out * vectors["cot"]), out

    with jax.enable_x64(True):
        gradients, out = jax.jit(jax.grad(loss, has_aux=True))(arrays)
        assert_close(out, vectors["out"], 1e-9)
        assert_close(gradients, {name: vectors[f"d_{name}"] for name in arrays}, 1e-9)


@every_implementation
@pytest.mark.long
def test_the_delta_rule_erases_what_it_finds_under_its_key(implementation, assert_close):
    with jax.enable_x64(True):
        arrays, _ = inputs("channel-gated delta", 21, state=True, dtype=np.float64)
        run = functools.partial(attend, implementation=implementation, chunk_size=8)
        want = run(arrays)
        beta = arrays.pop("beta")[..., None]
        key = arrays["key"]
        got = run(arrays | {"erase": (key, beta * key), "value": beta * arrays["value"]})
        assert_close(got, want, 1e-12)


@pytest.mark.parametrize("case", slow_but(["gated_delta"], ["scalar_gated", "gated_delta"]))
def test_state_partway_is_published_code_s(case):
    vectors = dict(np.load(VECTORS / f"{case}.npz"))
    names = {"q": "query", "k": "key", "v": "value", "g": "log_decay", "beta": "beta"}
    arrays = {long: jnp.asarray(vectors[short][:, :37]) for short, long in names.items() if short in vectors}
    _, state = attend(arrays | {"initial_state": LinearState(jnp.asarray(vectors["h0"]))})
    assert rms_error(state.kv, vectors["h_at_37"]) < 2e-6


def test_named_decays():
    np.testing.assert_allclose(
        jnp.exp(attnlab.retention_log_decay(4)), [1 - 1 / 32, 1 - 1 / 64, 1 - 1 / 128, 1 - 1 / 256], rtol=1e-6
    )
    decay = functools.partial(attnlab.lightning_log_decay, 4, layer=1, num_layers=5)
    np.testing.assert_allclose(decay(form="code"), -np.array([1 / 4, 1 / 16, 1 / 64, 1 / 256]) * 0.75001, rtol=1e-6)
    np.testing.assert_allclose(decay(form="paper"), -np.array([0, 2, 4, 6]) * 0.8, rtol=1e-6)


def test_taylor2_weighs_by_the_second_order_exponential():
    rng = np.random.default_rng(0)
    query, key, value = (jnp.asarray(rng.standard_normal((1, 9, 1, 16)), jnp.float32) for _ in range(3))
    out, state = attend({"query": query, "key": key, "value": value}, feature_map="taylor2", normalize=True)
    logits = np.einsum("bthd,bshd->bts", query, key) / 4
    weights = np.tril(1 + logits + logits**2 / 2)[0]
    want = weights / (weights.sum(-1, keepdims=True) + 1e-6) @ np.asarray(value[0, :, 0])
    np.testing.assert_allclose(out[0, :, 0], want, rtol=1e-4, atol=1e-5)
    assert state.kv.shape == (1, 1, 153, 16)


# --- The forms agree --------------------------------------------------------------------------------------------------


def everything(arrays, tangents, cotangents, *, segment_ids, options):
    """Output and state, their tangents, and the gradients of every array."""

    def call(arrays):
        return linear_attention(**arrays, segment_ids=segment_ids, return_state=True, **options)

    out, transpose = jax.vjp(call, arrays)
    return out, jax.jvp(call, (arrays,), (tangents,))[1], transpose(cotangents)[0]


@pytest.mark.parametrize("form", slow_but([], FORMS))
@settings(max_examples=2, deadline=None)
@given(
    length=st.sampled_from([1, 16, 21]),
    heads=st.sampled_from([(2, 2), (4, 2), (3, 1)]),
    state=st.booleans(),
    segments=st.booleans(),
    either_way=st.booleans(),
    seed=st.integers(0, 99),
)
def test_chunks_agree_with_the_reference(form, length, heads, state, segments, either_way, seed, assert_close):
    with jax.enable_x64(True):
        arrays, options = inputs(form, length, heads=heads, state=state, dtype=np.float64, seed=seed)
        options = {**options, "chunk_size": 8}
        if form in EITHER_WAY:
            options["is_causal"] = not either_way
        ids = jnp.cumsum(jnp.arange(length)[None] % jnp.array([[5], [13]]) == 3, axis=-1) if segments else None
        rng = np.random.default_rng(seed)
        results = []
        out = jax.eval_shape(functools.partial(linear_attention, **options, return_state=True), **arrays)
        draw = functools.partial(jax.tree.map, lambda x: jnp.asarray(rng.standard_normal(x.shape)))
        tangents, cotangents = draw(arrays), draw(out)
        for implementation in IMPLEMENTATIONS:
            run = functools.partial(everything, options={**options, "implementation": implementation})
            results.append(jax.jit(run)(arrays, tangents, cotangents, segment_ids=ids))
        assert_close(results[1], results[0], 1e-9)


@pytest.mark.parametrize("form", slow_but(["gated delta"], ["token", "gated delta", "taylor2"]))
def test_bfloat16_inputs_keep_float32_states(form):
    arrays, options = inputs(form, 37, head_dim=8, dtype=jnp.bfloat16)
    out, state = attend(arrays, chunk_size=16, **options)
    exact = jax.tree.map(lambda x: x.astype(jnp.float32), arrays)
    want, want_state = attend(exact, implementation="reference", **options)
    assert out.dtype == jnp.bfloat16
    assert state.kv.dtype == jnp.float32
    assert rms_error(out, want) < 3e-3  # bfloat16 rounds the output, 2^-9 at most
    assert rms_error(state.kv, want_state.kv) < 1e-5


@every_implementation
def test_vmap_is_a_loop(implementation, assert_close):
    options = {**FORMS["function, token"][0], "implementation": implementation, "chunk_size": 8}
    two = [inputs("function, token", 12, state=True, seed=seed)[0] for seed in (0, 1)]
    mapped = jax.vmap(functools.partial(attend, **options))(jax.tree.map(lambda *x: jnp.stack(x), *two))
    looped = jax.tree.map(lambda *x: jnp.stack(x), *(attend(arrays, **options) for arrays in two))
    assert_close(mapped, looped, 1e-5)


@pytest.mark.slow  # the fast tests hold it in test_transformations.py
def test_runs_inside_shard_map(assert_close):
    mesh = jax.make_mesh((1,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    arrays, options = inputs("gated delta", 12)
    spec = jax.sharding.PartitionSpec("data")

    def call(arrays):
        return linear_attention(**arrays, return_state=True, **options)

    sharded = jax.shard_map(call, mesh=mesh, in_specs=spec, out_specs=spec)
    assert_close(jax.jit(sharded)(arrays), attend(arrays, **options), 1e-6)


@every_implementation
@pytest.mark.parametrize("is_causal", [True, False])
@pytest.mark.long
def test_the_sum_of_weights_joins_calls_over_other_keys(implementation, is_causal, assert_close):
    """Every other key in a call of its own; the others are zeros, of which "relu" makes zeros."""
    with jax.enable_x64(True):
        arrays, _ = inputs("elu", 13, dtype=np.float64)
        options = {"feature_map": "relu", "normalize": True, "is_causal": is_causal, "chunk_size": 4}
        run = functools.partial(linear_attention, **options, implementation=implementation)
        arrays = {name: jnp.abs(x) for name, x in arrays.items()}
        even = (jnp.arange(13) % 2 == 0)[None, :, None, None]
        parts = [
            run(**arrays | {"key": jnp.where(own, arrays["key"], 0)}, return_lse=True, return_state=True)
            for own in (even, ~even)
        ]
        out, state = run(**arrays, return_state=True)
        assert_close(merge_attention(*list(zip(*parts))[:2])[0], out, 1e-9)
        assert_close(jax.tree.map(jnp.add, parts[0][2], parts[1][2]), state, 1e-12)
        if is_causal:
            assert np.all(parts[1][1][:, 0] == -np.inf)
        assert np.all(np.isfinite(parts[0][1]))


def test_the_sum_of_weights_is_not_rounded_to_16_bits():
    arrays, options = inputs("elu", 40, dtype=jnp.bfloat16)
    out, lse = linear_attention(**arrays, **options, return_lse=True)
    exact = jax.tree.map(lambda x: x.astype(jnp.float32), arrays)
    want = linear_attention(**exact, **options, return_lse=True)[1]
    assert out.dtype == jnp.bfloat16
    np.testing.assert_allclose(lse, want, rtol=0, atol=2e-6)


def test_a_token_that_is_not_finite_makes_nan_of_the_sums_of_weights_that_have_it():
    arrays, options = inputs("elu", 9)
    arrays["value"] = arrays["value"].at[0, 4, 0].set(jnp.inf)
    _, lse = linear_attention(**arrays, **options, return_lse=True)
    np.testing.assert_array_equal(np.isnan(lse[0, :, 0]), np.arange(9) >= 4)
    assert np.all(np.isfinite(lse[:, :, 1]))


# --- Time: the past alone, in pieces, by token, by segment ------------------------------------------------------------


@pytest.mark.slow  # the fast tests hold it in test_contract.py
@pytest.mark.parametrize("form", FORMS)
def test_the_future_has_no_influence(form):
    arrays, options = inputs(form, 21)
    other = inputs(form, 21, seed=1)[0]
    changed = jax.tree.map(
        lambda x, y: x if x.ndim == 1 else jnp.concatenate([x[:, :13], y[:, 13:]], axis=1), arrays, other
    )
    out, _ = attend(arrays, chunk_size=8, **options)
    out_changed, _ = attend(changed, chunk_size=8, **options)
    np.testing.assert_array_equal(out[:, :13], out_changed[:, :13])
    assert jnp.all(jnp.any(out[:, 13:] != out_changed[:, 13:], axis=-1))


@pytest.mark.parametrize("form", slow_but(["gated delta"], FORMS))
@pytest.mark.long
def test_resuming_equals_one_pass_and_decoding_equals_both(form, assert_close):
    arrays, options = inputs(form, 21, heads=(4, 2))
    whole, final = attend(arrays, chunk_size=8, **options)

    first, state = attend(cut(arrays, 0, 13), chunk_size=8, **options)
    rest, resumed = attend(cut(arrays, 13, 21) | {"initial_state": state}, chunk_size=8, **options)
    assert_close((jnp.concatenate([first, rest], axis=1), resumed), (whole, final), 2e-5)

    for token in range(13, 21):
        out, state = step(state, cut(arrays, token, token + 1), **options)
        assert_close(out, whole[:, token : token + 1], 2e-5)
    assert_close(state, final, 2e-5)


def test_decoding_starts_from_the_empty_cache(assert_close):
    arrays, options = inputs("taylor2", 3, heads=(4, 2))
    whole, final = attend(arrays, **options)
    state = init_linear_cache(2, 4, 5, 3, **options)
    for token in range(3):
        out, state = step(state, cut(arrays, token, token + 1), **options)
        assert_close(out, whole[:, token : token + 1], 1e-5)
    assert_close(state, final, 1e-5)


@pytest.mark.parametrize("is_causal", [True, False])
@every_implementation
@pytest.mark.long
def test_segments_are_calls_of_their_own(implementation, is_causal, assert_close):
    form = "function, token" if is_causal else "elu"
    arrays, options = inputs(form, 21, batch=1, state=True)
    options = {**options, "implementation": implementation, "is_causal": is_causal, "chunk_size": 8}
    start, borders = arrays.pop("initial_state"), (0, 6, 16, 21)
    ids = jnp.repeat(jnp.array([7, 3, 4]), jnp.diff(jnp.array(borders)), total_repeat_length=21)[None]
    packed, final = attend(arrays | {"initial_state": start, "segment_ids": ids}, **options)
    apart = []
    for number, (begin, end) in enumerate(itertools.pairwise(borders)):
        first = {"initial_state": start} if number == 0 else {}
        out, state = attend(cut(arrays, begin, end) | first, **options)
        apart.append(out)
    assert_close((packed, final), (jnp.concatenate(apart, axis=1), state), 2e-5)


@pytest.mark.parametrize("form", ["gated delta", "channel-gated erase", "elu"])
@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_no_tokens_leave_the_state_alone(implementation, form, assert_close):
    arrays, options = inputs(form, 0, state=True)
    out, state = attend(arrays, implementation=implementation, **options)
    assert out.shape == (2, 0, 2, 3)
    assert_close(state, arrays["initial_state"], 0)


# --- Numbers at the edge, and memory ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "form",
    slow_but(
        ["gated delta"], ["constant", "token", "channel", "gated delta", "channel-gated delta", "channel-gated erase"]
    ),
)
@pytest.mark.long
def test_strong_decays_are_exact_and_finite(form, assert_close):
    """Log decays that add up to -10^4 in a chunk, and -inf, with mild ones between that must not drown in the sum."""
    arrays, options = inputs(form, 48, head_dim=4, seed=2)
    rng = np.random.default_rng(0)
    strong = rng.choice(
        [-1e-3, -0.1, -30.0, -4e3, -np.inf], p=[0.4, 0.3, 0.1, 0.1, 0.1], size=arrays["log_decay"].shape
    )
    arrays["log_decay"] = jnp.asarray(strong, jnp.float32)

    def results(arrays, implementation):
        def loss(arrays):
            out, state = linear_attention(**arrays, return_state=True, implementation=implementation, **options)
            return jnp.sum(jnp.sin(out)) + jnp.sum(jnp.cos(state.kv)), out

        return jax.jit(jax.value_and_grad(loss, has_aux=True))(arrays)

    got = results(arrays, "xla")
    with jax.enable_x64(True):
        want = results(jax.tree.map(lambda x: x.astype(jnp.float64), arrays), "reference")
    assert_close(got, want, 2e-5)


def test_a_query_that_nothing_matches_gives_zero():
    arrays, _ = inputs("plain", 9)
    arrays["query"] = arrays["query"].at[:, 4].set(-1.0)

    def total(arrays):
        out = linear_attention(**arrays, feature_map="relu", normalize=True)
        return jnp.sum(out), out

    gradients, out = jax.jit(jax.grad(total, has_aux=True))(arrays)
    assert jnp.all(out[:, 4] == 0)
    assert jnp.all(gradients["query"][:, 4] == 0)
    assert all(jnp.all(jnp.isfinite(x)) for x in jax.tree.leaves(gradients))


@pytest.mark.parametrize("form", slow_but(["plain"], ["plain", "gated delta", "channel"]))
def test_memory_is_linear_in_length(form):
    def temporary_bytes(length):
        arrays, options = inputs(form, length, batch=1, head_dim=16, value_dim=16)
        loss = jax.grad(lambda arrays: jnp.sum(linear_attention(**arrays, implementation="xla", **options)))
        return jax.jit(loss).lower(arrays).compile().memory_analysis().temp_size_in_bytes

    short, long = temporary_bytes(1024), temporary_bytes(4096)
    assert long < 4.2 * short
    assert long < 4096**2  # bytes: one boolean per pair would be more


# --- Wrong calls ------------------------------------------------------------------------------------------------------


_READ = jnp.zeros((2, 8, 4, 5))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"query": jnp.zeros((2, 8, 5))}, r"query: got float32\[2,8,5\]; need rank 4"),
        ({"key": jnp.zeros((2, 8, 3, 5)), "value": jnp.zeros((2, 8, 3, 4))}, "key: .* must divide query's 4 heads"),
        ({"key": jnp.zeros((2, 7, 2, 5)), "value": jnp.zeros((2, 7, 2, 4))}, "key: .* must have query's space axes"),
        ({"log_decay": jnp.zeros((2, 8))}, r"log_decay: got float32\[2,8\]; need \[N\] = \(4,\), \[B, T, N\]"),
        ({"log_decay": jnp.zeros(2)}, r"log_decay: got float32\[2\]"),
        ({"log_decay": jnp.zeros((2, 8, 4, 5)), "feature_map": "taylor2"}, r"F\] = \(2, 8, 4, 21\)"),
        ({"log_decay": jnp.zeros(4), "is_causal": False}, "log_decay: .* must be None with is_causal=False"),
        ({"beta": jnp.zeros((2, 8, 4)), "is_causal": False}, "beta: .* must be None with is_causal=False"),
        ({"beta": jnp.zeros((2, 8, 2))}, r"beta: got float32\[2,8,2\]; need \[B, T, N\]"),
        ({"beta": jnp.zeros((2, 8, 4)), "normalize": True}, "normalize: got True; must be False with beta"),
        ({"erase": (_READ, _READ), "is_causal": False}, "erase: .* must be None with is_causal=False"),
        ({"erase": (_READ, _READ), "beta": jnp.zeros((2, 8, 4))}, "beta: got an array; must be None with erase"),
        ({"erase": (_READ, _READ), "normalize": True}, "normalize: got True; must be False with erase"),
        (
            {"erase": (_READ, _READ[..., :4])},
            r"erase, write: got float32\[2,8,4,4\]; need \[B, T, N, F\] = \[2,8,4,5\]",
        ),
        ({"erase": (_READ, _READ), "implementation": "pallas_tpu"}, "serves no erase"),
        (
            {
                "erase": (_READ, _READ),
                "initial_state": LinearState(jnp.zeros((2, 4, 5, 4)), jnp.zeros((2, 4, 5))),
            },
            "initial_state.k_sum: got an array; must be None with erase",
        ),
        ({"return_lse": True}, "return_lse: got True; needs normalize=True"),
        ({"feature_map": "exp"}, "feature_map: got 'exp'; need a function or one of"),
        ({"segment_ids": jnp.zeros((2, 7), jnp.int32)}, r"segment_ids: got int32\[2,7\]"),
        ({"initial_state": LinearState(jnp.zeros((2, 2, 5, 4)))}, r"initial_state.kv: got float32\[2,2,5,4\]"),
        ({"initial_state": LinearState(jnp.zeros((2, 4, 5, 4))), "normalize": True}, "initial_state.k_sum: got None"),
        ({"chunk_size": 0}, "chunk_size: got 0; need at least 1"),
        ({"implementation": "pallas"}, "implementation: got 'pallas'"),
    ],
)
def test_wrong_calls_say_what_is_allowed(change, message):
    call = {"query": jnp.zeros((2, 8, 4, 5)), "key": jnp.zeros((2, 8, 2, 5)), "value": jnp.zeros((2, 8, 2, 4))}
    with pytest.raises(ValueError, match=message):
        linear_attention(**{**call, **change})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"value": jnp.zeros((2, 8, 2, 4), jnp.int32)}, "value: got dtype int32"),
        ({"erase": _READ}, r"erase: got .*; need a pair of arrays, \(read, write\)"),
        ({"log_decay": -0.1}, "log_decay: got float; need an array"),
        ({"segment_ids": jnp.zeros((2, 8))}, "segment_ids: got dtype float32; need an integer dtype"),
        ({"initial_state": jnp.zeros((2, 4, 5, 4))}, "initial_state: got .*; need a LinearState"),
    ],
)
def test_wrong_types_say_what_is_needed(change, message):
    call = {"query": jnp.zeros((2, 8, 4, 5)), "key": jnp.zeros((2, 8, 2, 5)), "value": jnp.zeros((2, 8, 2, 4))}
    with pytest.raises(TypeError, match=message):
        linear_attention(**{**call, **change})


def test_wrong_steps_say_what_is_allowed():
    token = {"query": jnp.zeros((2, 1, 4, 5)), "key": jnp.zeros((2, 1, 2, 5)), "value": jnp.zeros((2, 1, 2, 4))}
    with pytest.raises(ValueError, match=r"query: .*; a step takes one token"):
        linear_step(init_linear_cache(2, 4, 5, 4), **jax.tree.map(lambda x: jnp.repeat(x, 2, 1), token))
    with pytest.raises(ValueError, match=r"state.kv: got float32\[2,4,5,5\]"):
        linear_step(init_linear_cache(2, 4, 5), **token)
