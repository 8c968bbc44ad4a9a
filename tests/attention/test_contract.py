"""What every mechanism promises, in every form: one table over mechanisms and implementations."""

import functools
import inspect
import warnings

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from marks import slow_but

from attnlab.catalog import MECHANISMS

# What is expected comes from the reference in float64, so that in float32 it is more of the same.
every_form = pytest.mark.parametrize("form", slow_but(["xla"], ["reference", "xla"]))
# Forms of a mechanism that share most of their code with another one in the table.
_VARIANTS = {
    "dot_product",
    "dot_product, softcap and learned sinks",
    "local, softcap and learned sinks",
    "pointwise",
    "path",
    "path, forget gates",
    "landmark, softmax",
    "block-sparse",
    "dynamic-mask",
    "ema-sinks",
    "ema-sinks, causal",
    "pyramid",
    "pyramid, causal",
    "agent",
    "linear, not causal",
    "linear, taylor2",
    "linear, decay per channel",
    "linear, delta rule",
    "routing, global",
    "local-linear, window",
}
# One of each kind of blocked form, for what takes seconds per row.
_KINDS = {"local, causal", "linear, gated delta rule", "routing, strict", "inline"}
every_kind = pytest.mark.parametrize("name", slow_but(_KINDS, MECHANISMS))
every_mechanism_variants_slowly = pytest.mark.parametrize("name", slow_but(set(MECHANISMS) - _VARIANTS, MECHANISMS))
_SEQUENTIAL = [name for name, mechanism in MECHANISMS.items() if not mechanism.grid]
_CAUSAL = [name for name, mechanism in MECHANISMS.items() if mechanism.is_causal]
every_sequential_variants_slowly = pytest.mark.parametrize("name", slow_but(set(_SEQUENTIAL) - _VARIANTS, _SEQUENTIAL))


def loss_of(name, form):
    def loss(arrays, weights):
        return jnp.sum(MECHANISMS[name](arrays, form).astype(jnp.float32) * weights)

    return loss


@functools.cache
def program(name, form):
    """(arrays, weights) -> output and gradients, compiled once per shape."""

    def run(arrays, weights):
        return MECHANISMS[name](arrays, form), jax.grad(loss_of(name, form))(arrays, weights)

    return jax.jit(run)


@functools.cache
def program_in_float64(name):
    def run(arrays, weights):
        def loss(arrays):
            return jnp.sum(MECHANISMS[name](arrays, "reference") * weights)

        return MECHANISMS[name](arrays, "reference"), jax.grad(loss)(arrays)

    return jax.jit(run)


def reference_in_float64(name, arrays, weights):
    """Output and gradients of the reference in float64."""
    with jax.enable_x64(True):
        wide = jax.tree.map(lambda x: np.asarray(x, np.float64), (arrays, weights))
        out, gradients = jax.tree.map(np.asarray, program_in_float64(name)(*wide))
    assert out.dtype == np.float64
    return out, gradients


@functools.cache
def expected(name):
    """The table's inputs, weights of the loss, and what the reference gives for them in float64."""
    arrays = MECHANISMS[name].inputs()
    shape = jax.eval_shape(lambda arrays: MECHANISMS[name](arrays, "reference"), arrays).shape
    weights = np.random.default_rng(9).normal(size=shape).astype(np.float32)
    return arrays, weights, *reference_in_float64(name, arrays, weights)


def assert_close(got, want, tolerance=2e-5):
    """Within a share of each array's largest number, as cancellation leaves no more of the small ones."""
    for leaf, other in zip(jax.tree.leaves(want), jax.tree.leaves(got), strict=True):
        leaf = np.asarray(leaf, np.float64)
        np.testing.assert_allclose(other, leaf, rtol=0, atol=tolerance * max(1.0, np.abs(leaf).max()))


def at(tree, index):
    return jax.tree.map(lambda leaf: leaf[index], tree)


@every_form
@every_mechanism_variants_slowly
def test_values_and_gradients_are_those_in_float64(name, form):
    arrays, weights, want, gradients = expected(name)
    out, got = program(name, form)(arrays, weights)
    assert out.dtype == jnp.float32
    assert_close(out, want)
    assert_close(got, gradients)


@every_form
@every_kind
def test_vmap_scan_and_remat_are_a_loop(name, form):
    """All three around the loss in one program, four inputs as [2 scanned, 2 mapped]: outputs and gradients."""
    several = [MECHANISMS[name].inputs(seed=seed) for seed in range(4)]
    weights = expected(name)[1]
    stacked = jax.tree.map(lambda *leaves: np.stack(leaves).reshape(2, 2, *leaves[0].shape), *several)

    @jax.checkpoint
    def loss(arrays):
        out = MECHANISMS[name](arrays, form)
        return jnp.sum(out * weights), out

    def scanned(stacked):
        def step(total, arrays):
            losses, outs = jax.vmap(loss)(arrays)
            return total + jnp.sum(losses), outs

        return jax.lax.scan(step, 0.0, stacked)

    gradients, outs = jax.jit(jax.grad(scanned, has_aux=True))(stacked)
    for number, arrays in enumerate(several):
        assert_close(at((outs, gradients), divmod(number, 2)), program(name, form)(arrays, weights))


@every_form
@every_kind
def test_bfloat16_goes_in_and_out_and_is_accumulated_in_float32(name, form):
    arrays, weights, *_ = expected(name)
    rounded = jax.tree.map(lambda x: jnp.asarray(x, jnp.bfloat16), arrays)
    want, _ = reference_in_float64(name, rounded, weights)
    out = jax.jit(lambda arrays: MECHANISMS[name](arrays, form))(rounded)
    assert out.dtype == jnp.bfloat16
    # RMS, as a single number may be the small difference of large ones. Rounding the output alone costs 0.0017 of it.
    error = np.asarray(out, np.float64) - want
    assert np.sqrt(np.mean(error**2)) < 0.005 * np.sqrt(np.mean(want**2))


@every_form
@every_kind
def test_grouped_heads_are_repeated_heads(name, form):
    mechanism = MECHANISMS[name]
    grouped = mechanism.inputs(heads=4, key_heads=2)
    heads = grouped["query"].ndim - 2
    of_key_heads = {"key", "value", "key_bias"} & set(grouped)
    repeated = {**grouped, **{x: np.repeat(grouped[x], 2, axis=heads) for x in of_key_heads}}
    run = jax.jit(lambda arrays: mechanism(arrays, form))
    assert_close(run(grouped), run(repeated))


@every_form
@every_sequential_variants_slowly
def test_one_token_is_served(name, form):
    mechanism = MECHANISMS[name]
    ones = {option: 1 for option in ("window", "dilation") if option in mechanism.options}
    out = jax.jit(lambda arrays: mechanism(arrays, form, **ones))(mechanism.inputs(1))
    assert out.shape[1] == 1
    assert np.all(np.isfinite(out))


@every_kind
def test_a_long_input_is_what_the_reference_gives(name):
    """Many chunks, the last one not full."""
    mechanism = MECHANISMS[name]
    arrays = mechanism.inputs(36 * 37, batch=1)
    got, want = (jax.jit(functools.partial(mechanism, implementation=form))(arrays) for form in ("xla", "reference"))
    assert_close(got, want, tolerance=1e-4)


@every_kind
def test_memory_does_not_grow_with_length_squared(name):
    """Temporary memory of the compiled gradient, at 1024 and at 4096 tokens: less than n^1.5's eight times. With the
    options of such inputs: what is given for blocks of two tokens, such as levels, has itself T x S / 4 numbers."""
    mechanism = MECHANISMS[name]

    def temporary(side):
        arrays = mechanism.inputs(side * side, batch=1)
        shapes = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), arrays)
        given = 8 * sum(leaf.size for leaf in jax.tree.leaves(shapes))  # their own bytes, and those of their gradients

        def loss(arrays):
            return jnp.sum(mechanism(arrays, "xla", **mechanism.large(side * side)) ** 2)

        return jax.jit(jax.grad(loss)).lower(shapes).compile().memory_analysis().temp_size_in_bytes, given

    large, given = temporary(64)
    assert large < 8 * given or large < 8 * temporary(32)[0]


@every_form
@every_sequential_variants_slowly
def test_causal_means_that_no_later_position_matters(name, form):
    """Other tokens from position 8 on: causal outputs before it stay what they are, those of other mechanisms do not.
    Of cancellations in float32, which depend on all tokens of a chunk, a few bits are left."""
    mechanism = MECHANISMS[name]
    arrays, weights, *_ = expected(name)
    other = mechanism.inputs(seed=1)
    changed = {
        argument: np.concatenate([array[:, :8], other[argument][:, 8:]], axis=1)
        if isinstance(array, np.ndarray) and array.shape[:2] == arrays["query"].shape[:2]  # per token
        else array
        for argument, array in arrays.items()
    }
    before, after = (np.asarray(program(name, form)(inputs, weights)[0])[:, :8] for inputs in (arrays, changed))
    moved = np.abs(after - before).max()
    assert moved < 1e-5 if mechanism.is_causal else moved > 1e-3


@every_form
@pytest.mark.parametrize("name", slow_but(set(_CAUSAL) - _VARIANTS, _CAUSAL))
@pytest.mark.long
def test_the_first_tokens_alone_give_their_part_of_the_whole(name, form):
    """Causal outputs are those of any prefix, which ends within blocks and chunks."""
    mechanism = MECHANISMS[name]
    arrays = mechanism.inputs(key_heads=2)
    batch, length = arrays["query"].shape[:2]
    run = jax.jit(lambda arrays: mechanism(arrays, form))
    with jax.enable_x64(True):
        wide = jax.tree.map(lambda x: np.asarray(x, np.float64), arrays)
        whole = np.asarray(run(wide))
        for count in (7, 10):
            leaves, tree = jax.tree.flatten(wide)
            first = [x[:, :count] if x.shape[:2] == (batch, length) else x for x in leaves]
            np.testing.assert_allclose(run(tree.unflatten(first)), whole[:, :count], rtol=0, atol=1e-12)


EDGES = {
    "huge logits": lambda arrays: {**arrays, "query": 1e4 * arrays["query"]},
    "huge keys": lambda arrays: {**arrays, "key": 1e4 * arrays["key"]},
    "identical tokens": lambda arrays: {
        **arrays,
        **{x: np.ones_like(arrays[x]) * arrays[x][:, :1] for x in ("query", "key", "value")},
    },
    "all zeros": lambda arrays: jax.tree.map(np.zeros_like, arrays),
    "strong decays": lambda arrays: {name: x * 1000 if name == "log_decay" else x for name, x in arrays.items()},
}


@every_form
@every_mechanism_variants_slowly
def test_values_and_gradients_are_finite_at_the_edges(name, form):
    arrays, weights, *_ = expected(name)
    for edge, change in EDGES.items():
        if edge == "huge keys" and {"beta", "rate"} & set(arrays):
            continue  # delta rules and memories are unstable by definition when beta |k|^2 is above 2
        for leaf in jax.tree.leaves(program(name, form)(change(arrays), weights)):
            assert np.all(np.isfinite(leaf)), edge


def wrong_calls(name):
    """Hundreds of calls with one thing wrong: (what, arrays, options)."""
    mechanism = MECHANISMS[name]
    arrays = mechanism.inputs()
    for argument, array in arrays.items():
        if not isinstance(array, np.ndarray):
            yield f"{argument} None", {**arrays, argument: None}, {}
            leaves, tree = jax.tree.flatten(array)
            for number, leaf in enumerate(leaves):
                short = tree.unflatten([x[:-1] if i == number else x for i, x in enumerate(leaves)])
                yield f"{argument} with a short leaf {leaf.shape}, {number}", {**arrays, argument: short}, {}
            continue
        yield f"{argument} without its last axis", {**arrays, argument: array[..., 0]}, {}
        yield f"{argument} of integers", {**arrays, argument: array.astype(np.int32)}, {}
        yield f"{argument} complex", {**arrays, argument: array.astype(np.complex64)}, {}
        yield f"{argument} a list", {**arrays, argument: array.tolist()}, {}
        yield f"{argument} a string", {**arrays, argument: "x"}, {}
        for axis in range(array.ndim):
            if argument in ("query", "key", "value"):
                yield f"{argument} with axis {axis} empty", {**arrays, argument: array.take([], axis=axis)}, {}
            for length in {1, 2, 3, array.shape[axis] + 1, 2 * array.shape[axis]} - {array.shape[axis]}:
                changed = array.take(np.arange(length) % array.shape[axis], axis=axis)
                yield f"{argument} with {length} along axis {axis}", {**arrays, argument: changed}, {}
    for argument in ("query", "key", "value"):
        yield f"{argument} None", {**arrays, argument: None}, {}
        yield f"{argument} with an axis more", {**arrays, argument: np.stack([arrays[argument]] * 2)}, {}
    values = (None, 0, -1, 10**6, 2.5, "x", True, (), (1, 2, 3, 4), [None], float("nan"), object())
    for option in options_of(name):
        for value in values:
            yield f"{option}={value!r}", arrays, {option: value}


def options_of(name):
    """All that a call takes besides arrays of the row, but for what changes the result's structure."""
    mechanism = MECHANISMS[name]
    options = set(inspect.signature(mechanism.function).parameters) - set(mechanism.inputs())
    return sorted(option for option in options if not option.startswith("return_"))


@pytest.mark.parametrize("name", slow_but({"local, causal"}, MECHANISMS))
def test_a_wrong_call_raises_a_value_or_type_error_that_names_an_argument(name):
    """What is served after all (a value wider than before, say) must give the output that its shapes promise."""
    mechanism = MECHANISMS[name]
    outcomes = {what: outcome_of(mechanism, arrays, options) for what, arrays, options in wrong_calls(name)}
    arguments = [*mechanism.inputs(), *options_of(name)]
    query, value = (mechanism.inputs()[argument] for argument in ("query", "value"))
    wrong, refused = {}, 0
    for what, outcome in outcomes.items():
        if isinstance(outcome, ValueError | TypeError):
            refused += 1
            if not any(argument in str(outcome) for argument in arguments):
                wrong[what] = outcome
        elif isinstance(outcome, Exception) or (
            not what.startswith(("query ", "key ", "value ")) and outcome.shape != (*query.shape[:-1], value.shape[-1])
        ):
            wrong[what] = outcome
    assert not wrong, "\n".join(f"{what}: {type(outcome).__name__}: {outcome}"[:300] for what, outcome in wrong.items())
    assert refused >= 80


def outcome_of(mechanism, arrays, options):
    """The shape of the result, or the exception. Arrays are traced, the rest is static."""
    traced = {argument: x for argument, x in arrays.items() if isinstance(x, np.ndarray | tuple)}
    static = {argument: x for argument, x in arrays.items() if argument not in traced}

    def call(traced):
        return mechanism.result(mechanism.function(**{**mechanism.options, **traced, **static, **options}))

    with warnings.catch_warnings(action="error", category=DeprecationWarning):
        try:
            return jax.eval_shape(call, traced)
        except Exception as error:
            return error


@pytest.mark.parametrize("name", MECHANISMS)
def test_numpy_s_integers_are_options(name):
    mechanism = MECHANISMS[name]
    arrays = mechanism.inputs()

    def as_numpy(option):
        if isinstance(option, tuple):
            return tuple(map(as_numpy, option))
        return np.int64(option) if isinstance(option, int) and not isinstance(option, bool) else option

    options = {name: as_numpy(option) for name, option in mechanism.options.items()}
    function = functools.partial(mechanism.function, **options, implementation="xla")
    jax.eval_shape(lambda arrays: mechanism.result(function(**arrays)), arrays)
