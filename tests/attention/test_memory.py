"""Memories: vectors from the papers' formulas, mechanisms that they equal in limits, decoding, and shared positions."""

import functools
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import parts
import prompts
import pytest
from marks import slow_but

import attnlab as A

VECTORS = Path(__file__).parents[1] / "vectors" / "memory"
FORMS = ("reference", "xla")
every_form = pytest.mark.parametrize("form", slow_but(["xla"], FORMS))


@pytest.fixture
def float64():
    with jax.enable_x64(True):
        yield


def assert_equal(got, want, tolerance=1e-12):
    for x, y in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        np.testing.assert_allclose(x, y, rtol=0, atol=tolerance * max(1, np.abs(y).max()))


# --- The papers' formulas ---------------------------------------------------------------------------------------------


def norm(x):
    centred = x - x.mean(-1, keepdims=True)
    return centred / jnp.sqrt((centred**2).mean(-1, keepdims=True) + 1e-6)


def memory_of(case, inputs):
    if case == "lact":
        return "swiglu"
    if "gain" not in inputs:
        return "linear"
    gain, bias = (inputs[name][None, None] for name in ("gain", "bias"))
    if case == "ttt":
        return lambda linear, x: x + gain * norm(linear("w", x) + linear("b", jnp.ones_like(x[..., :1]))) + bias
    return lambda linear, x: x + gain * norm(linear("w2", jax.nn.gelu(linear("w1", x)))) + bias


def called(case, data, inputs, form):
    """The call that a vector is of, of the arrays that have gradients there."""
    own = {name[4:]: data[name].item() for name in data if name.startswith("opt_")}
    weights = {name[7:]: x if x.ndim == 3 else x[:, None] for name, x in inputs.items() if name.startswith("weight_")}
    options = {name: inputs.get(name) for name in ("rate", "momentum", "log_decay", "threshold")}
    options |= {
        "chunk_size": own["chunk"],
        "per": own.get("per", "chunk"),
        "decay_first": own.get("decay_first", False),
    }
    options["objective"] = ("lp", own["p"]) if "p" in own else own.get("objective", "dot")
    if case == "moneta":
        options["project"] = ("lq", own["q"])
    if case == "lact":
        weights = {name: inputs[name] for name in ("gate", "up", "down")}
        rates = {name: inputs["rates"][..., n] for n, name in enumerate(("gate", "down", "up"))}
        options |= {"rate": rates, "project": "norm"}
    if speed := {name[15:]: x for name, x in inputs.items() if name.startswith("momentum_state_")}:
        start = A.init_memory_cache(
            1, weights, momentum=True, per=own["per"], chunk_size=own["chunk"], dtype=jnp.float64
        )
        options["initial_state"] = start._replace(momentum=speed)
    tokens = (inputs[name] for name in ("query", "key", "value"))
    memory = memory_of(case, inputs)
    return A.memory_attention(*tokens, weights, memory=memory, **options, return_state=True, implementation=form)


_CASES = sorted(path.stem for path in VECTORS.glob("*.npz"))


@every_form
@pytest.mark.parametrize("case", slow_but({"linear", "lact"}, _CASES))
@pytest.mark.long
def test_agrees_with_the_papers_formulas(case, form, float64):
    data = dict(np.load(VECTORS / f"{case}.npz"))
    inputs = {name[2:]: data[name[2:]] for name in data if name.startswith("d_")}

    def loss(inputs):
        out, state = called(case, data, inputs, form)
        return jnp.sum(out * data["cot"]), (out, state)

    gradients, (out, state) = jax.jit(jax.grad(loss, has_aux=True))(inputs)
    assert_equal(out, data["out"])
    for name, x in gradients.items():
        want = data[f"d_{name}"]
        np.testing.assert_allclose(
            x, want, rtol=0, atol=(1e-7 if case == "mlp_per_chunk" else 1e-9) * np.abs(want).max()
        )
    assert state.position == out.shape[1]
    for name in data:
        if name.startswith("final_"):
            _, field, weight = name.split("_")
            arrays = getattr(state, {"weight": "weights"}.get(field, field))
            if arrays is not None:  # without momentum no S is kept
                assert_equal(arrays[weight].reshape(data[name].shape), data[name])


# --- What it equals ---------------------------------------------------------------------------------------------------

B, T, N, H, V = 2, 11, 2, 4, 3
_rng = np.random.default_rng(0)


def normal(*shape):
    return _rng.normal(size=shape)


def unit(x):
    return x / np.linalg.norm(x, axis=-1, keepdims=True)


TOKENS = (normal(B, T, N, H), unit(normal(B, T, N, H)), normal(B, T, N, V))
QUERY, KEY, VALUE = TOKENS
WEIGHTS = {"w": normal(N, H, V)}
RATE, SPEED = _rng.uniform(size=(2, B, T, N))
DECAY = -np.abs(normal(B, T, N))
SWIGLU = {"gate": normal(N, H, 5), "up": normal(N, H, 5), "down": normal(N, 5, V)}


def remember(*tokens, weights=WEIGHTS, **options):
    return A.memory_attention(*tokens, weights, **{"rate": RATE, **options})


def linear(value, **options):
    state = A.LinearState(jnp.broadcast_to(WEIGHTS["w"], (B, N, H, V)))
    return A.linear_attention(QUERY, KEY, value, scale=1.0, initial_state=state, **options)


@every_form
@pytest.mark.long
def test_linear_l2_token_by_token_is_the_delta_rule(form, float64):
    assert_equal(remember(*TOKENS, chunk_size=1, implementation=form), linear(VALUE, beta=RATE))
    gated = functools.partial(remember, *TOKENS, chunk_size=1, log_decay=DECAY, implementation=form)
    want = linear(VALUE, beta=RATE, log_decay=DECAY)
    assert_equal(gated(decay_first=True), want)
    # Titans takes the gradient at the memory before its decay: another rule.
    assert np.abs(gated() - want).max() > 0.05 * np.abs(want).max()


@every_form
@pytest.mark.parametrize("chunk_size", [1, 4, 64])
def test_linear_dot_is_linear_attention_of_any_chunk(chunk_size, form, float64):
    out = remember(*TOKENS, objective="dot", log_decay=DECAY, chunk_size=chunk_size, implementation=form)
    assert_equal(out, linear(RATE[..., None] * VALUE, log_decay=DECAY))


@every_form
def test_one_chunk_of_l2_is_linear_attention_of_errors(form, float64):
    errors = VALUE - np.einsum("BTNH,NHV->BTNV", KEY, WEIGHTS["w"])
    out = remember(*TOKENS, log_decay=DECAY, chunk_size=T + 2, implementation=form)
    assert_equal(out, linear(RATE[..., None] * errors, log_decay=DECAY))


@every_form
def test_per_chunk_dot_reads_the_state_of_the_chunks_before(form, float64):
    out = remember(*TOKENS, objective="dot", per="chunk", chunk_size=4, implementation=form)
    before = np.zeros((T, T))
    for t in range(T):
        before[t, : t // 4 * 4] = 1
    scores = np.einsum("BTNH,BSNH,BSN,TS->BNTS", QUERY, KEY, RATE, before)
    want = np.einsum("BNTS,BSNV->BTNV", scores, VALUE) + np.einsum("BTNH,NHV->BTNV", QUERY, WEIGHTS["w"])
    assert_equal(out, want)


def _half(prediction, value):
    return jnp.sum((prediction - value) ** 2, -1) / 2


FAR = 1e3 * np.ones((B, T, N))
SAME_AS_L2 = {
    "lp of 2": {"objective": ("lp", 2)},
    "a function": {"objective": _half},
    "huber": {"objective": "huber", "threshold": FAR},
    "huber of the norm": {"objective": "huber_norm", "threshold": FAR},
    "no momentum": {"momentum": 0 * SPEED},
    "no decay": {"log_decay": 0 * DECAY},
    "rates by weight": {"rate": {"w": RATE}},
    "a function of the memory": {"memory": lambda linear, x: linear("w", x)},
}


@every_form
@pytest.mark.parametrize("name", slow_but({"huber of the norm"}, SAME_AS_L2))
def test_these_are_l2(name, form, float64):
    options = {"chunk_size": 4, "implementation": form}
    assert_equal(remember(*TOKENS, **options, **SAME_AS_L2[name]), remember(*TOKENS, **options))


@every_form
def test_a_small_threshold_bounds_what_a_token_writes(form, float64):
    """Above the threshold each coordinate, or the norm, of the gradient is the threshold: continuous in the error."""
    small = 1e-3 * np.ones((B, 1, N))
    one = [x[:, :1] for x in TOKENS]
    errors = np.einsum("BTNH,NHV->BTNV", KEY[:, :1], WEIGHTS["w"]) - VALUE[:, :1]
    directions = {"huber": np.sign(errors), "huber_norm": unit(errors)}
    for objective, direction in directions.items():
        call = functools.partial(remember, *one, rate=np.ones((B, 1, N)), threshold=small, return_state=True)
        _, state = call(objective=objective, chunk_size=1, implementation=form)
        written = state.weights["w"] - WEIGHTS["w"][None]
        assert_equal(written, -1e-3 * np.einsum("BTNH,BTNV->BNHV", KEY[:, :1], direction))


@every_form
@pytest.mark.long
def test_projections(form, float64):
    def identity(weight, start):
        assert weight.shape == (B, N, H, V)
        assert start.shape == (1, N, H, V)
        return weight

    per_chunk = functools.partial(remember, *TOKENS, per="chunk", chunk_size=4, implementation=form)
    for same in (identity, ("lq", 2)):
        assert_equal(per_chunk(project=same), per_chunk())
    _, state = per_chunk(project="norm", return_state=True)
    lengths = [np.linalg.norm(x, axis=-2) for x in (state.weights["w"], WEIGHTS["w"][None])]
    assert np.abs(lengths[0] - lengths[1]).max() > 0.1  # the sums are kept as they are
    assert_equal(per_chunk(project="norm")[:, :4], per_chunk()[:, :4])
    twice = remember(*TOKENS, weights={"w": 2 * WEIGHTS["w"]}, rate=0 * RATE, chunk_size=1, project=("lq", 4))
    assert_equal(twice, 2 * remember(*TOKENS, rate=0 * RATE, chunk_size=1, project=("lq", 4)))  # of degree 1


@every_form
def test_both_pers_read_one_token_apart(form, float64):
    options = {"chunk_size": 1, "momentum": SPEED, "log_decay": DECAY, "implementation": form}
    out = remember(*TOKENS, **options)
    before = remember(np.roll(QUERY, -1, axis=1), KEY, VALUE, per="token", **options)
    later = remember(*TOKENS, per="chunk", **options)
    assert_equal(later[:, 1:], remember(np.roll(QUERY, -1, 1), KEY, VALUE, **options)[:, :-1])
    assert_equal(later[:, 0], np.einsum("BNH,NHV->BNV", QUERY[:, 0], WEIGHTS["w"]))
    assert np.abs(before - out).max() > 0.1


@pytest.mark.long
def test_gates_of_zero_have_their_derivatives(float64):
    """A momentum of 0 at one token, and a decay of -inf: no log of either is divided by."""
    zero = SPEED.copy()
    zero[:, 2] = 0
    drop = DECAY.copy()
    drop[:, 6] = -np.inf

    def loss(momentum, form):
        out = remember(*TOKENS, momentum=momentum, log_decay=drop, chunk_size=8, implementation=form)
        return jnp.sum(out**2)

    got, want = (jax.grad(loss)(zero, form) for form in FORMS[::-1])
    assert_equal(got, want)
    assert np.abs(want[:, 2]).max() > 1e-3


# --- Chunks, decoding and prompts -------------------------------------------------------------------------------------

GATES = {"rate": RATE, "momentum": SPEED, "log_decay": DECAY}
OPTIONS = {
    "token by token": ({"chunk_size": 1}, WEIGHTS),
    "decay first, projected": ({"chunk_size": 1, "decay_first": True, "project": ("lq", 3)}, WEIGHTS),
    "chunks": ({"chunk_size": 4}, WEIGHTS),
    "per chunk": ({"chunk_size": 4, "per": "chunk"}, WEIGHTS),
    "swiglu": ({"chunk_size": 3, "memory": "swiglu"}, SWIGLU),
    "swiglu per chunk": ({"chunk_size": 3, "memory": "swiglu", "per": "chunk", "project": "norm"}, SWIGLU),
    "longer than the sequence": ({"chunk_size": 64}, WEIGHTS),
}


def gates(options, of_tokens=GATES):
    """Per chunk, those of the chunk."""
    size = options["chunk_size"]
    if options.get("per") != "chunk":
        return of_tokens
    return {name: x if name == "rate" else x[:, : -(-x.shape[1] // size)] for name, x in of_tokens.items()}


@pytest.mark.parametrize("name", slow_but({"per chunk"}, OPTIONS))
@pytest.mark.long
def test_forms_agree_in_all_gradients(name, float64):
    options, weights = OPTIONS[name]

    @functools.partial(jax.jit, static_argnames="form")
    def run(arrays, form):
        def loss(arrays):
            tokens, weights, gates = arrays
            out, state = remember(*tokens, weights=weights, **gates, **options, return_state=True, implementation=form)
            results = (out, state._replace(position=None))
            return sum(jnp.sum(jnp.sin(x)) for x in jax.tree.leaves(results)), (out, state)

        return jax.grad(loss, has_aux=True)(arrays)

    # Small rates, as those of a memory of three weights let rounding grow.
    arrays = (TOKENS, weights, gates(options, GATES | {"rate": 0.1 * RATE}))
    assert_equal(run(arrays, "xla"), run(arrays, "reference"), 1e-10)


@pytest.mark.parametrize("name", slow_but({"per chunk"}, OPTIONS))
@pytest.mark.long
def test_a_prompt_leaves_what_steps_leave(name, float64):
    options, _ = OPTIONS[name]
    size, heads, width = options["chunk_size"], prompts.HEADS, prompts.HEAD_DIM
    shapes = {"w": (width, prompts.VALUE_DIM)}
    if "memory" in options:
        shapes = {"gate": (width, 5), "up": (width, 5), "down": (5, prompts.VALUE_DIM)}
    weights = {key: normal(heads, *shape) for key, shape in shapes.items()}
    of_tokens = {key: x[:1, :, :1].repeat(prompts.BATCH, 0).repeat(heads, 2) for key, x in GATES.items()}
    per_chunk = options.get("per") == "chunk"
    if per_chunk:  # a step of a chunk's last token has its gates
        of_tokens |= {key: of_tokens[key][:, np.arange(T) // size] for key in ("momentum", "log_decay")}
    of_call = {key: x[:, ::size] for key, x in of_tokens.items()} if per_chunk else of_tokens
    cache = A.init_memory_cache(
        prompts.BATCH, weights, momentum=True, per=options.get("per", "token"), chunk_size=size, dtype=np.float64
    )

    def fill(cache, lengths, **arrays):
        tokens = [arrays[key] for key in ("query", "key", "value")]
        given = {key: of_call[key] if per_chunk and key != "rate" else arrays[key] for key in GATES}
        return A.memory_attention(
            *tokens, weights, **given, **options, initial_state=cache, return_state=True, lengths=lengths
        )

    step = functools.partial(A.memory_step, weights=weights, **options)
    tokens = {key: unit(x) if key == "key" else x for key, x in prompts.ARRAYS.items()}
    prompts.assert_leaves_what_steps_leave(cache, fill, step, tokens | of_tokens)


def test_a_prefix_s_outputs_do_not_change_with_what_follows():
    options, weights = OPTIONS["swiglu per chunk"]
    tokens, own = jax.tree.map(jnp.float32, (TOKENS, gates(options)))
    run = jax.jit(lambda query, key, value, gates: remember(query, key, value, weights=weights, **gates, **options))
    whole = run(*tokens, own)
    changed = [x.at[:, 7:].set(3.0) for x in tokens]
    np.testing.assert_array_equal(run(*changed, own)[:, :7], whole[:, :7])


def test_a_state_within_a_chunk_is_no_start_of_a_call():
    """Row by row: what its gradients are to be taken at would be another chunk's."""
    start = A.init_memory_cache(B, WEIGHTS, chunk_size=4)._replace(position=np.array([8, 6], np.int32))
    out, state = remember(*map(jnp.float32, TOKENS), initial_state=start, chunk_size=4, return_state=True)
    assert np.isfinite(out[0]).all()
    assert np.isnan(out[1]).all()
    assert np.isnan(state.weights["w"][1]).all()
    np.testing.assert_array_equal(state.position, [8 + T, 6 + T])


def test_what_sees_nan_is_nan():
    tokens = [jnp.float32(x) for x in TOKENS]
    spoilt = tokens[1].at[0, 5, 1, 2].set(jnp.nan)
    for per, first in (("token", 5), ("chunk", 8)):
        for form in FORMS:
            out, state = remember(
                tokens[0], spoilt, tokens[2], per=per, chunk_size=4, return_state=True, implementation=form
            )
            assert np.isnan(out[0, :, 1]).all(-1).tolist() == [t >= first for t in range(T)]
            assert np.isfinite(out[0, :, 0]).all()
            assert np.isfinite(out[1]).all()
            assert np.isnan(state.weights["w"][0, 1]).all()


# --- Shared positions -------------------------------------------------------------------------------------------------


def of_parts(**more):
    arrays = parts.qkv(64)
    arrays |= {name: unit(arrays[name]) for name in ("query", "key")}
    gates = {name: parts.normal(2, 64, 4, seed=seed) for seed, name in enumerate(GATES, 5)}
    gates = {name: 1 / (1 + np.exp(x)) for name, x in gates.items()} | {"log_decay": -np.abs(gates["log_decay"])}
    return arrays | gates | more


def _count_and_weight(state):
    return state.position, state.weights["w"]


IN_TURN = {"collective-permute": 1}  # in a loop
W = {"w": 0.3 * parts.normal(4, 8, 6)}
CASES = {
    "chunks": parts.Case(functools.partial(A.memory_attention, weights=W, chunk_size=4), of_parts(), IN_TURN),
    "state, not finite": parts.Case(
        lambda **arrays: _count_and_weight(A.memory_attention(**arrays, chunk_size=8, return_state=True)[1]),
        of_parts(weights=W, key=parts.qkv(64, spoilt=True)["key"] / 3),
        IN_TURN | {"all-reduce": 1},
        {"weights": parts.WHOLE},
        parts.WHOLE,
    ),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", CASES)
def test_devices_that_share_positions_take_their_turns(name):
    parts.assert_equals_one_device(CASES[name])


def test_a_part_holds_whole_chunks():
    case = CASES["chunks"]._replace(call=functools.partial(A.memory_attention, weights=W, chunk_size=3))
    mesh = parts.mesh_of(8)
    with jax.set_mesh(mesh), pytest.raises(ValueError, match="chunk_size: got 3; must divide the 8 tokens"):
        jax.eval_shape(lambda arrays: case.call(**arrays), parts.placed(case, mesh))


# --- Wrong calls ------------------------------------------------------------------------------------------------------

WRONG = {
    "weights: got list; need a dict": {"weights": [WEIGHTS["w"]]},
    "weights: got an empty dict": {"weights": {}},
    r"weights\['w'\]: got .*; need \[N, in, out\]": {"weights": {"w": WEIGHTS["w"][0]}},
    "weights: got the names v; the memory uses 'w'": {"weights": {"v": WEIGHTS["w"]}},
    "weights: got v too; which the memory does not use": {"weights": {**WEIGHTS, "v": WEIGHTS["w"]}},
    "memory: got one that uses 'w' twice": {"memory": lambda linear, x: linear("w", x) + linear("w", x)},
    "memory: got one that gives others": {"memory": lambda linear, x: linear("w", x)[..., :1]},
    r"memory: x of linear\('w', x\): got": {"memory": lambda linear, x: linear("w", x[..., :2])},
    "memory: got 'deep'; need a function or one of": {"memory": "deep"},
    "memory: got a function that raises": {"memory": lambda linear, x: x @ x},
    "value: got 3 channels with 'mlp'; need key's, 4": {"memory": "mlp"},
    "objective: got 'l1'; need one of": {"objective": "l1"},
    "objective: got 0; need a finite number, at least 1": {"objective": ("lp", 0)},
    "objective: got one that gives": {"objective": lambda prediction, value: prediction},
    "threshold: got None; need": {"objective": "huber"},
    "threshold: got an array; must be None": {"threshold": RATE},
    "rate: got a dict of .*; need": {"rate": {"v": RATE}},
    "per: got 'row'; need one of": {"per": "row"},
    "momentum: got .*; need .*ceil": {"per": "chunk", "momentum": SPEED},
    "project: got 'norm'; need per='chunk' or chunk_size=1": {"project": "norm"},
    "project: got 1; need a finite number, at least 2": {"project": ("lq", 1), "chunk_size": 1},
    "decay_first: got True; needs per='token'": {"decay_first": True, "log_decay": DECAY},
    "log_decay: got None; need an array with decay_first": {"decay_first": True, "chunk_size": 1},
    "initial_state.momentum: got dict; need None": {
        "initial_state": A.init_memory_cache(B, WEIGHTS, momentum=True, chunk_size=16)
    },
    "initial_state.start: got NoneType; need a dict": {"initial_state": A.init_memory_cache(B, WEIGHTS, chunk_size=1)},
    r"initial_state.weights\['w'\]: got": {"initial_state": A.init_memory_cache(3, WEIGHTS)},
}


@pytest.mark.parametrize("message", WRONG)
def test_wrong_options_are_named(message):
    options = {"weights": WEIGHTS, "rate": RATE, **WRONG[message]}
    with pytest.raises((ValueError, TypeError), match=f"^{message}"):
        jax.eval_shape(lambda: A.memory_attention(*TOKENS, **options))
