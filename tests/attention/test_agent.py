"""Agent attention: the published vectors, the two softmaxes written out, and the causal form against its definition."""

import functools
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from marks import slow_but

from attnlab import (
    AgentState,
    agent_attention,
    agent_bias,
    agent_step,
    causal_agent_attention,
    explain,
    init_agent_cache,
    pool_agents,
)

VECTORS = Path(__file__).parents[1] / "vectors" / "agent"
FORMS = ("reference", "xla")
every_form = pytest.mark.parametrize("form", slow_but(["xla"], FORMS))
TABLES = ("an", "ah", "aw", "na", "ha", "wa")

attend = jax.jit(agent_attention, static_argnames=("scale", "implementation"))
step = jax.jit(agent_step, static_argnames="scale")


@functools.partial(jax.jit, static_argnames=("scale", "chunk_size", "implementation"))
def causal(*arrays, **options):
    return causal_agent_attention(*arrays, return_state=True, **options)


def arrays(length=11, keys=None, agents=3, heads=4, key_heads=2, dtype=jnp.float32, seed=0):
    rng = np.random.default_rng(seed)
    shapes = (
        (2, length, heads, 5),
        (2, keys or length, key_heads, 5),
        (2, keys or length, key_heads, 6),
        (2, agents, heads, 5),
    )
    return tuple(jnp.asarray(rng.standard_normal(shape), dtype) for shape in shapes)


# --- Published code ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("wide", "tolerance"), [(True, 1e-10), pytest.param(False, 2e-5, marks=pytest.mark.slow)])
@pytest.mark.parametrize("case", ["pooled", "biased"])
@pytest.mark.long
def test_agrees_with_published_code(case, wide, tolerance, assert_close):
    with jax.enable_x64(wide):
        data = np.load(VECTORS / f"{case}.npz")
        dtype, heads, (rows, columns) = jnp.float64 if wide else jnp.float32, int(data["num_heads"]), data["grid_hw"]
        grids = [jnp.asarray(data[name], dtype).reshape(2, rows, columns, heads, -1) for name in "qkv"]
        side = int(data["agents"].shape[1] ** 0.5)

        agents = pool_agents(grids[0], (side, side))
        assert_close(agents.reshape(data["agents"].shape), data["agents"], tolerance)
        biases = agent_bias(*(jnp.asarray(data[f"{name}_bias"], dtype) for name in TABLES))
        assert_close(biases, (data["agent_bias1"], data["agent_bias2"]), tolerance)
        for form in FORMS:
            for inputs in (grids, [x.reshape(2, rows * columns, heads, -1) for x in grids]):
                out = attend(*inputs, agents, gather_bias=biases[0], broadcast_bias=biases[1], implementation=form)
                assert out.shape == inputs[0].shape
                np.testing.assert_allclose(out.reshape(data["out"].shape), data["out_no_dwc"], atol=tolerance)


# --- Pooling and biases -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("space", "grid"), [((6, 9), (3, 3)), ((7, 5), (3, 2)), ((2, 5), (3, 5)), ((1, 4), (1, 1))])
def test_agents_are_means_of_bins_that_overlap_where_they_must(space, grid):
    query = np.random.default_rng(0).standard_normal((2, *space, 3, 4)).astype(np.float32)

    def bins(length, count):
        return [slice(int(np.floor(i * length / count)), int(np.ceil((i + 1) * length / count))) for i in range(count)]

    want = [query[:, y, x].mean((1, 2)) for y in bins(space[0], grid[0]) for x in bins(space[1], grid[1])]
    np.testing.assert_allclose(pool_agents(jnp.asarray(query), grid), np.stack(want, 1), atol=1e-6)


def bilinear(table, rows, columns):
    """Half-pixel centres, edges clamped, no antialiasing, one axis after the other, in numpy."""

    def along(table, axis, size):
        old = table.shape[axis]
        at = np.clip((np.arange(size) + 0.5) * old / size - 0.5, 0, old - 1)
        low = np.floor(at).astype(int)
        part = (at - low).reshape([-1 if a == axis else 1 for a in range(table.ndim)])
        high = np.minimum(low + 1, old - 1)
        return np.take(table, low, axis) * (1 - part) + np.take(table, high, axis) * part

    return along(along(table, 2, rows), 3, columns)


@pytest.mark.parametrize("class_token", [False, True])
def test_biases_of_grids_that_shrink_and_differ(class_token, assert_close):
    heads, m, (rows, columns), (key_rows, key_columns) = 2, 4, (9, 5), (6, 3)
    shapes = {
        "an": (heads, m, 7, 7),
        "ah": (1, heads, m, key_rows, 1),
        "aw": (1, heads, m, 1, key_columns),
        "na": (heads, m, 7, 7),
        "ha": (1, heads, rows, 1, m),
        "wa": (1, heads, 1, columns, m),
    }
    if class_token:
        shapes |= {"ac": (1, heads, m, 1), "ca": (1, heads, 1, m)}
    rng = np.random.default_rng(0)
    t = {name: rng.standard_normal(shape) for name, shape in shapes.items()}
    gather = bilinear(t["an"], key_rows, key_columns) + t["ah"][0] + t["aw"][0]
    gather = gather.reshape(heads, m, -1)
    broadcast = bilinear(t["na"], rows, columns).transpose(0, 2, 3, 1) + t["ha"][0] + t["wa"][0]
    broadcast = broadcast.reshape(heads, -1, m)
    if class_token:
        gather = np.concatenate([t["ac"][0], gather], axis=2)
        broadcast = np.concatenate([t["ca"][0], broadcast], axis=1)
    with jax.enable_x64(True):
        assert_close(agent_bias(**{name: jnp.asarray(x) for name, x in t.items()}), (gather, broadcast), 1e-12)


# --- The two steps ----------------------------------------------------------------------------------------------------


@settings(max_examples=2, deadline=None)
@example(lengths=(9, 300), agents=3, key_heads=2, extras=True)
@given(
    lengths=st.sampled_from([(1, 1), (9, 300), (200, 5)]),
    agents=st.sampled_from([1, 3, 130]),
    key_heads=st.sampled_from([1, 2, 4]),
    extras=st.booleans(),
)
@pytest.mark.long
def test_both_forms_equal_two_softmaxes_in_float64(lengths, agents, key_heads, extras, assert_close, attention_oracle):
    inputs = arrays(*lengths, agents, key_heads=key_heads)
    query, key, value, agent = inputs
    rng, options, sees, bias = np.random.default_rng(1), {}, np.ones((1, 1, 1, 1), bool), (None, None)
    if extras:
        bias = [rng.standard_normal(shape) for shape in ((4, agents, lengths[1]), (1, 1, lengths[0], agents))]
        mask = rng.random((2, lengths[1])) < 0.6
        mask[:, 0] = True
        sees = mask[:, None, None]
        options = {
            "gather_bias": jnp.asarray(bias[0], jnp.float32),
            "broadcast_bias": jnp.asarray(bias[1], jnp.float32),
        }
        options["key_mask"] = jnp.asarray(mask)
    gathered, _ = attention_oracle(agent, key, value, sees, scale=0.7, bias=bias[0])
    want, _ = attention_oracle(query, agent, gathered, np.ones((1, 1, 1, 1), bool), scale=0.7, bias=bias[1])
    for form in FORMS:
        assert_close(attend(*inputs, scale=0.7, implementation=form, **options), want, 2e-5)


@every_form
def test_a_constant_value_comes_out_and_one_agent_gives_equal_rows(form, assert_close):
    query, key, value, agents = arrays()
    constant = jnp.broadcast_to(value[:, :1], value.shape)
    out = attend(query, key, constant, agents, implementation=form)
    assert_close(out, jnp.repeat(constant, 2, axis=2), 1e-6)
    out = attend(query, key, value, agents[:, :1], implementation=form)
    assert_close(out, jnp.broadcast_to(out[:, :1], out.shape), 1e-6)


@every_form
def test_the_mixing_matrix_is_row_stochastic_of_rank_at_most_m(form):
    query, key, _, agents = arrays(length=8, key_heads=4)
    identity = jnp.broadcast_to(jnp.eye(8)[None, :, None], (2, 8, 4, 8))
    weights = np.moveaxis(np.asarray(attend(query, key, identity, agents, implementation=form), np.float64), 2, 1)
    assert weights.min() >= 0
    np.testing.assert_allclose(weights.sum(-1), 1, atol=1e-6)
    singular = np.linalg.svd(weights, compute_uv=False)
    assert singular[..., 3:].max() < 1e-6 < singular[..., 2].min()


def test_queries_as_agents_equal_full_attention_in_the_sharp_limit_alone(attention_oracle):
    _, key, value, _ = arrays(key_heads=4)
    key = key / jnp.linalg.norm(key, axis=-1, keepdims=True)  # so that each token is nearest to itself
    for scale, equal in ((1.0, False), (1e4, True)):
        out = attend(key, key, value, key, scale=scale)
        full, _ = attention_oracle(key, key, value, np.ones((1, 1, 1, 1), bool), scale=scale)
        assert (np.abs(out - full).max() < 1e-5) == equal


@every_form
@pytest.mark.long
def test_the_mask_hides_keys_and_what_no_agent_sees_is_zero(form, assert_close):
    query, key, value, agents = arrays()
    mask = jnp.ones((2, 11), bool).at[0, 4:].set(False).at[1].set(False)

    def run(key, value):
        return agent_attention(query, key, value, agents, key_mask=mask, implementation=form)

    out, pullback = jax.jit(lambda *a: jax.vjp(run, *a))(key, value)
    assert_close(out[:1], attend(query[:1], key[:1, :4], value[:1, :4], agents[:1]), 1e-6)
    np.testing.assert_array_equal(out[1], 0)
    for gradient in pullback(jnp.ones_like(out)):
        np.testing.assert_array_equal(gradient[0, 4:], 0)
        np.testing.assert_array_equal(gradient[1], 0)
        assert np.any(gradient[0, :4] != 0)


@every_form
def test_an_agent_that_sees_no_key_is_seen_by_no_query(form, assert_close):
    query, key, value, agents = arrays()
    bias = jnp.zeros((1, 1, 3, 11)).at[:, :, 1].set(-jnp.inf)
    out = attend(query, key, value, agents, gather_bias=bias, implementation=form)
    assert_close(out, attend(query, key, value, agents[:, jnp.array([0, 2])]), 1e-6)


# --- Transformations, of both mechanisms ------------------------------------------------------------------------------

MECHANISMS = {
    "agent": agent_attention,
    "causal": functools.partial(causal_agent_attention, chunk_size=4),
}


@pytest.mark.parametrize("name", slow_but(["causal"], MECHANISMS))
@pytest.mark.long
def test_forms_agree_in_gradients_and_tangents(name, assert_close):
    """What vmap, scan and remat make of them: test_contract.py."""
    inputs = arrays()

    @functools.partial(jax.jit, static_argnames="form")
    def run(inputs, form):
        function = functools.partial(MECHANISMS[name], implementation=form)
        gradient = jax.grad(lambda *a: jnp.sum(jnp.sin(function(*a))), (0, 1, 2, 3))(*inputs)
        return jax.jvp(function, inputs, inputs), gradient

    assert_close(run(inputs, "xla"), run(inputs, "reference"), 2e-5)


@every_form
@pytest.mark.parametrize("name", MECHANISMS)
def test_bfloat16_in_and_out_with_sums_in_float32(name, form, assert_close):
    inputs = arrays(length=300, dtype=jnp.bfloat16)
    wide = [x.astype(jnp.float32) for x in inputs]
    run = jax.jit(functools.partial(MECHANISMS[name], implementation=form))
    out = run(*inputs)
    assert out.dtype == jnp.bfloat16
    # One rounding of the result, 2^-9, is all that float32 sums leave.
    assert_close(out, run(*wide), 2**-8)


@pytest.mark.parametrize("name", slow_but(["causal"], MECHANISMS))
@pytest.mark.slow
def test_agents_without_batch_are_those_of_every_batch(name):
    *tokens, agents = arrays()
    run = jax.jit(MECHANISMS[name])
    np.testing.assert_array_equal(run(*tokens, agents[0])[0], run(*tokens, agents)[0])
    same = jnp.broadcast_to(agents[0], agents.shape)
    np.testing.assert_array_equal(run(*tokens, agents[0]), run(*tokens, same))


@every_form
@pytest.mark.parametrize("name", MECHANISMS)
@pytest.mark.long
def test_huge_logits_leave_values_and_gradients_finite(name, form):
    inputs = [100 * x for x in arrays()]

    @jax.jit
    def run(*inputs):
        return jax.value_and_grad(
            lambda *a: jnp.sum(MECHANISMS[name](*a, scale=10.0, implementation=form) ** 2), (0, 1, 2, 3)
        )(*inputs)

    assert all(jnp.all(jnp.isfinite(x)) for x in jax.tree.leaves(run(*inputs)))


@pytest.mark.slow  # the fast tests hold it to n^1.5, in test_contract.py
@pytest.mark.parametrize("name", MECHANISMS)
def test_memory_is_linear_in_length(name):
    def temporary_bytes(length):
        token = jax.ShapeDtypeStruct((1, length, 2, 16), jnp.float32)
        function = jax.grad(lambda *a: jnp.sum(MECHANISMS[name](*a) ** 2), (0, 1, 2, 3))
        compiled = jax.jit(function).lower(token, token, token, jax.ShapeDtypeStruct((8, 2, 16), jnp.float32)).compile()
        return compiled.memory_analysis().temp_size_in_bytes

    assert temporary_bytes(4096) < 4.5 * temporary_bytes(1024)


@pytest.mark.parametrize("function", MECHANISMS.values(), ids=MECHANISMS)
def test_explain_names_the_form(function):
    first, *_ = explain(function, *arrays())
    assert "agent_attention: pallas_tpu on tpu, xla elsewhere" in str(first)


# --- Causal -----------------------------------------------------------------------------------------------------------


def causal_oracle(attention_oracle, query, key, value, agents, scale):
    """Row t of the definition: both steps over the tokens up to t alone."""
    every = np.ones((1, 1, 1, 1), bool)
    rows = []
    for t in range(query.shape[1]):
        gathered, _ = attention_oracle(agents, key[:, : t + 1], value[:, : t + 1], every, scale=scale)
        rows.append(attention_oracle(query[:, t : t + 1], agents, gathered, every, scale=scale)[0])
    return np.concatenate(rows, axis=1)


@settings(max_examples=2, deadline=None)
@example(length=16, chunk_size=3, agents=3, key_heads=1, scale=30.0)
@given(
    length=st.sampled_from([1, 7, 16]),
    chunk_size=st.sampled_from([1, 3, 8, 64]),
    agents=st.sampled_from([1, 3]),
    key_heads=st.sampled_from([1, 4]),
    scale=st.sampled_from([0.5, 30.0]),
)
@pytest.mark.slow
def test_causal_equals_its_definition(length, chunk_size, agents, key_heads, scale, assert_close, attention_oracle):
    inputs = arrays(length, None, agents, key_heads=key_heads)
    want = causal_oracle(attention_oracle, *inputs, scale)
    for form in FORMS:
        out, _ = causal(*inputs, scale=scale, chunk_size=chunk_size, implementation=form)
        # A logit of 30 * 10 has a rounding error of 2e-5.
        assert_close(out, want, 2e-5 if scale < 1 else 2e-4)


@pytest.mark.slow  # the fast tests hold it in float32, above
def test_causal_equals_its_definition_in_float64(assert_close, attention_oracle):
    with jax.enable_x64(True):
        inputs = arrays(dtype=jnp.float64)
        want = causal_oracle(attention_oracle, *inputs, 5**-0.5)
        for form in FORMS:
            assert_close(causal(*inputs, chunk_size=4, implementation=form)[0], want, 1e-12)


@every_form
@pytest.mark.parametrize("size", [1.0, 1e3])
def test_a_token_sees_no_later_one_and_all_earlier_ones(form, size):
    """Also a later key so large that a maximum over the chunk would make the earlier weights vanish."""
    query, key, value, agents = arrays()
    before, _ = causal(query, key, value, agents, chunk_size=4, implementation=form)
    for t in (0, 5, 10):
        changed = (query.at[:, t].add(size), key.at[:, t].add(size), value.at[:, t].add(size))
        after, _ = causal(*changed, agents, chunk_size=4, implementation=form)
        np.testing.assert_array_equal(before[:, :t], after[:, :t])
    after, _ = causal(query, key, value.at[:, 0].add(1), agents, chunk_size=4, implementation=form)
    assert np.all(np.any(before != after, axis=-1))


def test_steps_equal_the_parallel_form(assert_close):
    query, key, value, agents = arrays()
    want, want_state = causal(query, key, value, agents, chunk_size=4)
    state, outs = init_agent_cache(2, 4, 3, 6), []
    for t in range(query.shape[1]):
        out, state = step(state, *(x[:, t : t + 1] for x in (query, key, value)), agents)
        outs.append(out)
    assert_close(jnp.concatenate(outs, axis=1), want, 1e-5)
    assert_close(state, want_state, 1e-5)
    sizes = sum(leaf[0, 0].size for leaf in state)
    assert sizes == 3 * (6 + 2)


@every_form
@pytest.mark.slow
def test_a_state_carries_values_and_gradients_over_a_cut(form, assert_close):
    query, key, value, agents = arrays()

    def whole(*inputs):
        return causal_agent_attention(*inputs, return_state=True, chunk_size=4, implementation=form)

    def in_two(query, key, value, agents):
        state, outs = None, []
        for part in (slice(0, 5), slice(5, None)):
            out, state = causal_agent_attention(
                *(x[:, part] for x in (query, key, value)),
                agents,
                initial_state=state,
                return_state=True,
                chunk_size=4,
                implementation=form,
            )
            outs.append(out)
        return jnp.concatenate(outs, axis=1), state

    def with_gradients(function):
        def loss(*inputs):
            out, state = function(*inputs)
            read = state.numerator / state.denominator[..., None]
            lse = state.largest + jnp.log(state.denominator)
            return jnp.sum(jnp.sin(out)) + jnp.sum(jnp.cos(read)) + jnp.sum(jnp.sin(lse))

        def run(*inputs):
            return function(*inputs), jax.grad(loss, (0, 1, 2, 3))(*inputs)

        return jax.jit(run)(query, key, value, agents)

    assert_close(with_gradients(in_two), with_gradients(whole), 2e-5)


@pytest.mark.parametrize("scale", slow_but([100.0], [1.0, 100.0]))
@pytest.mark.long
def test_blocked_gradients_equal_the_reference_where_logits_jump(scale, assert_close):
    """By scale 100, logits of one chunk lie further apart than one unit of their sums holds."""
    with jax.enable_x64(True):
        inputs = arrays(dtype=jnp.float64)

        @functools.partial(jax.jit, static_argnums=0)
        def gradients(form):
            def loss(*inputs):
                return jnp.sum(jnp.sin(causal(*inputs, scale=scale, chunk_size=4, implementation=form)[0]))

            return jax.grad(loss, (0, 1, 2, 3))(*inputs)

        assert_close(gradients("xla"), gradients("reference"), 1e-9)


@pytest.mark.slow
def test_blocked_gradients_lose_nothing_in_float32_where_logits_differ_widely(assert_close):
    """A chunk sums exponentials up to e^_FAR, and its gradients divide by the square of that."""
    query, key, value, agents = arrays(64, agents=3)

    @functools.partial(jax.jit, static_argnums=0)
    def gradients(form):
        def loss(*inputs):
            return jnp.sum(jnp.sin(causal(*inputs, chunk_size=16, implementation=form)[0]))

        return jax.grad(loss, (0, 1, 2, 3))(query, 100 * key, value, agents)

    assert_close(gradients("xla"), gradients("reference"), 1e-3)


# --- Wrong calls ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"query": jnp.zeros((2, 4, 5))}, ValueError, r"query: got float32\[2,4,5\]; need rank 4 or 5 or 6"),
        ({"key": jnp.zeros((2, 7, 3, 5)), "value": jnp.zeros((2, 7, 3, 6))}, ValueError, "key: .* must divide query's"),
        ({"value": jnp.zeros((2, 6, 2, 6))}, ValueError, "value: .* must agree with key"),
        ({"agents": jnp.zeros((2, 3, 2, 5))}, ValueError, r"agents: got float32\[2,3,2,5\]; .*\[2,\*,4,5\]"),
        ({"agents": jnp.zeros((1, 3, 4, 5))}, ValueError, r"agents: got float32\[1,3,4,5\]"),
        ({"agents": jnp.zeros((2, 0, 4, 5))}, ValueError, "agents: .* at least one agent"),
        ({"agents": jnp.zeros((3, 4, 5), jnp.int32)}, TypeError, "agents: got dtype int32"),
        ({"agents": 3}, TypeError, "agents: got int"),
        ({"gather_bias": jnp.zeros((4, 3, 6))}, ValueError, r"gather_bias: got float32\[1,4,3,6\]; .*\[2, 4, 3, 7\]"),
        ({"gather_bias": jnp.zeros((3, 7))}, ValueError, r"gather_bias: got float32\[3,7\]"),
        ({"broadcast_bias": jnp.zeros((4, 3, 6))}, ValueError, r"broadcast_bias: .*\[2, 4, 6, 3\]"),
        ({"broadcast_bias": jnp.zeros((4, 6, 3), bool)}, TypeError, "broadcast_bias: got dtype bool"),
        ({"key_mask": jnp.ones((2, 6), bool)}, ValueError, r"key_mask: got bool\[2,6\]"),
        ({"key_mask": jnp.ones((2, 7))}, TypeError, "key_mask: got dtype float32; need a bool mask"),
        (
            {"implementation": "pallas_gpu"},
            ValueError,
            "implementation: 'pallas_gpu' cannot serve this .* call: needs ",
        ),
    ],
)
def test_wrong_calls_say_what_is_allowed(change, error, message):
    call = dict(zip(("query", "key", "value", "agents"), arrays(6, 7)))
    with pytest.raises(error, match=message):
        agent_attention(**{**call, **change})


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"query": jnp.zeros((2, 3, 3, 4, 5))}, ValueError, "query: .* need rank 4"),
        ({"key": jnp.zeros((2, 7, 2, 5)), "value": jnp.zeros((2, 7, 2, 6))}, ValueError, "key: .* query's space axes"),
        ({"agents": jnp.zeros((3, 4, 6))}, ValueError, r"agents: got float32\[3,4,6\]"),
        ({"chunk_size": 0}, ValueError, "chunk_size: got 0; need at least 1"),
        ({"initial_state": init_agent_cache(2, 4, 2, 6)}, ValueError, r"initial_state.largest: got float32\[2,4,2\]"),
        ({"initial_state": init_agent_cache(2, 4, 3, 5)}, ValueError, r"initial_state.numerator: .* \[2,4,3,6\]"),
        ({"initial_state": (1, 2, 3)}, TypeError, "initial_state: got tuple; need an AgentState"),
    ],
)
def test_wrong_causal_calls_say_what_is_allowed(change, error, message):
    call = dict(zip(("query", "key", "value", "agents"), arrays(6)))
    with pytest.raises(error, match=message):
        causal_agent_attention(**{**call, **change})


def test_wrong_steps_grids_and_tables_say_what_is_allowed():
    with pytest.raises(ValueError, match=r"query: .* a step takes one token"):
        agent_step(init_agent_cache(2, 4, 3, 6), *arrays(2))
    with pytest.raises(ValueError, match=r"state\.numerator: "):
        agent_step(init_agent_cache(2, 4, 3, 5), *arrays(1))
    with pytest.raises(TypeError, match="state: got NoneType; need an AgentState"):
        agent_step(None, *arrays(1))
    image = jnp.zeros((2, 4, 4, 3, 5))
    with pytest.raises(ValueError, match=r"grid: got \(0, 2\)"):
        pool_agents(image, (0, 2))
    with pytest.raises(ValueError, match=r"grid: got \(2,\)"):
        pool_agents(image, (2,))
    with pytest.raises(TypeError, match="grid: got 2; need two ints"):
        pool_agents(image, 2)
    with pytest.raises(ValueError, match=r"query: got float32\[4,4,3,5\]"):
        pool_agents(image[0], (2, 2))
    tables = [jnp.zeros(shape) for shape in ((2, 4, 7, 7), (1, 2, 4, 6, 1), (1, 2, 4, 1, 5))]
    with pytest.raises(ValueError, match="na: "):
        agent_bias(*tables, jnp.zeros((2, 3, 7, 7)), jnp.zeros((1, 2, 6, 1, 4)), jnp.zeros((1, 2, 1, 5, 4)))


def test_the_state_is_a_named_tuple_of_float32():
    _, state = causal(*arrays(dtype=jnp.bfloat16))
    assert isinstance(state, AgentState)
    assert {leaf.dtype for leaf in state} == {jnp.dtype(jnp.float32)}
