"""Generation: what is drawn against numpy's account of it, and a row of a batch against the row alone."""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec
from marks import slow_but
from mixers import DECODING, MIXERS

from attnlab import nn, train
from attnlab.models import LanguageModel, generate, generation, stream
from attnlab.train.mesh import batch_sharding, state_shardings

VOCABULARY, BATCH = 13, 3
LENGTHS = np.array([5, 1, 3])


@functools.cache
def model_of(*names):
    mixers = [MIXERS[name] for name in names]
    model = LanguageModel(vocabulary=VOCABULARY, mixers=mixers, depth=len(mixers), features=16)
    values = nn.initialize(model, jax.random.key(0))
    values["embedding"] = 8 * values["embedding"]  # so that the logits differ
    return model, values


@functools.cache
def compiled(names, **options):
    """generate as a program of prompts, lengths and a key."""
    model, values = model_of(*names)

    @jax.jit
    def run(values, prompt, lengths, key):
        return generate(nn.bind(model, values), prompt, lengths=lengths, key=key, **options)

    return functools.partial(run, values)


ONE = ("softmax_convolved",)
PROMPT = np.random.default_rng(0).integers(VOCABULARY, size=(BATCH, 5)).astype(np.int32)


def likeliest(prompt, length):
    """By the whole call for every token."""
    model, values = model_of(*ONE)
    call = jax.jit(lambda values, tokens: nn.bind(model, values)(tokens))
    tokens = np.zeros((1, 5 + length), np.int32)  # later ones change nothing before them
    tokens[0, : len(prompt)] = prompt
    for last in range(len(prompt) - 1, len(prompt) + length - 1):
        tokens[0, last + 1] = np.argmax(call(values, tokens)[0, last])
    return tokens[0, : len(prompt) + length]


@pytest.mark.long
def test_ragged_prompts_are_continued_as_each_alone_and_padded():
    tokens = compiled(ONE, length=6, temperature=0)(PROMPT, LENGTHS, jax.random.key(0))
    assert tokens.dtype == jnp.int32
    for row, length in enumerate(LENGTHS):
        np.testing.assert_array_equal(tokens[row, : length + 6], likeliest(PROMPT[row, :length], 6))
        np.testing.assert_array_equal(tokens[row, length + 6 :], -1)


@pytest.mark.parametrize("row", slow_but([1], range(BATCH)))
@pytest.mark.long
def test_a_row_s_draws_do_not_depend_on_the_others(row):
    """Of other prompts, lengths and padding."""
    run = compiled(ONE, length=6, temperature=2.0, top_k=7, top_p=0.9)
    tokens = run(PROMPT, LENGTHS, jax.random.key(3))
    others = np.roll(PROMPT, 1, axis=0)
    others[row] = PROMPT[row]
    lengths = np.where(np.arange(BATCH) == row, LENGTHS, 6 - LENGTHS)
    others[row, lengths[row] :] = 1
    np.testing.assert_array_equal(run(others, lengths, jax.random.key(3))[row], tokens[row])
    assert np.any(run(PROMPT, LENGTHS, jax.random.key(4))[row] != tokens[row])


STOPPED = {"length": 6, "temperature": 0, "stop": (12, 4)}


@pytest.mark.long
def test_a_stop_token_ends_a_row():
    plain = np.asarray(compiled(ONE, length=6, temperature=0)(PROMPT, LENGTHS, jax.random.key(0)))
    tokens = compiled(ONE, **STOPPED)(PROMPT, LENGTHS, jax.random.key(0))
    counts = []
    for row, length in enumerate(LENGTHS):
        drawn = plain[row, length : length + 6]
        ends = np.flatnonzero(np.isin(drawn, STOPPED["stop"]))
        kept = drawn[: ends[0] + 1] if len(ends) else drawn
        want = np.full(11, -1)
        want[: length + len(kept)] = [*PROMPT[row, :length], *kept]
        np.testing.assert_array_equal(tokens[row], want)
        counts.append(len(kept))
    assert min(counts) < max(counts) == 6


def test_a_stream_gives_the_tokens_of_generate():
    model, values = model_of(*ONE)
    tokens = compiled(ONE, **STOPPED)(PROMPT, LENGTHS, jax.random.key(5))
    drawn = stream(nn.bind(model, values), PROMPT, lengths=LENGTHS, key=jax.random.key(5), **STOPPED)
    rows = np.stack(list(drawn), axis=1)
    for row, length in enumerate(LENGTHS):
        np.testing.assert_array_equal(rows[row], tokens[row, length : length + 6])


@pytest.mark.slow
def test_the_loop_ends_when_all_rows_have():
    tokens = compiled(ONE, length=6, stop=tuple(range(VOCABULARY)))(PROMPT, None, jax.random.key(0))
    np.testing.assert_array_equal(tokens[:, 6:], -1)
    assert np.all(tokens[:, 5] >= 0)


def test_no_length_gives_the_prompt():
    model, values = model_of(*ONE)
    tokens = generate(nn.bind(model, values), PROMPT, length=0, lengths=LENGTHS, key=jax.random.key(0))
    np.testing.assert_array_equal(tokens, np.where(np.arange(5) < LENGTHS[:, None], PROMPT, -1))
    assert list(stream(nn.bind(model, values), PROMPT, length=0, key=jax.random.key(0))) == []


# --- One draw ---------------------------------------------------------------------------------------------------------


def probabilities(logits, *, temperature=1.0, top_k=None, top_p=None):
    """By sorting and adding up in float64; of equals the lower token first."""
    scaled = np.asarray(logits, np.float64) / temperature
    order = np.argsort(-scaled, kind="stable")[:top_k]
    share = np.exp(scaled[order] - scaled.max())
    share /= share.sum()
    if top_p is not None:
        count = 1
        while count < len(share) and share[:count].sum() < top_p:
            count += 1
        order, share = order[:count], share[:count] / share[:count].sum()
    result = np.zeros(len(scaled))
    result[order] = share
    return result


LOGITS = np.array([0.3, 2.0, -1.0, 2.0, 0.5, 1.1, -np.inf, 2.0], np.float32)
UNIFORM = np.zeros(8, np.float32)
DRAWS = {
    "all": (LOGITS, {}),
    "hot": (LOGITS, {"temperature": 3.0}),
    "coldest": (LOGITS[:3], {"temperature": 1e-38}),
    "top k": (LOGITS, {"top_k": 4}),
    "top k among equals": (LOGITS, {"top_k": 2}),
    "top k of more than there are": (LOGITS, {"top_k": 99}),
    "top 1": (LOGITS, {"top_k": 1}),
    "top p": (LOGITS, {"top_p": 0.85}),
    "top p among equals": (UNIFORM, {"top_p": 0.5}),
    "top p just above a sum": (UNIFORM, {"top_p": 0.501}),
    "a small top p": (LOGITS, {"top_p": 1e-6}),
    "top p of all": (LOGITS, {"top_p": 1.0}),
    "top p after top k and temperature": (LOGITS, {"temperature": 0.7, "top_k": 5, "top_p": 0.8}),
}
MANY = 2000


@pytest.mark.parametrize("case", DRAWS)
def test_tokens_are_drawn_with_their_probabilities(case):
    logits, options = DRAWS[case]
    draws = generation.Draws(
        **{"temperature": 1.0, "top_k": None, "top_p": None, **options}, stop=(), tokens=len(logits)
    )
    rows = jnp.broadcast_to(logits, (MANY, len(logits)))
    tokens = jax.jit(lambda rows, key: generation.draw_token(rows, jnp.int32(0), key, draws))(rows, jax.random.key(1))
    want = probabilities(logits, **options)
    got = np.bincount(tokens, minlength=len(logits)) / MANY
    assert np.all(got[want == 0] == 0)
    np.testing.assert_allclose(got, want, atol=4 * 0.5 / MANY**0.5)


def test_what_is_left_out_does_not_change_the_other_draws():
    rows = jnp.asarray(np.random.default_rng(0).normal(size=(64, 9)), jnp.float32)

    def drawn(**options):
        draws = generation.Draws(**{"top_k": None, "top_p": None, **options}, temperature=1.0, stop=(), tokens=9)
        return np.asarray(generation.draw_token(rows, jnp.int32(0), jax.random.key(0), draws))

    every = drawn()
    np.testing.assert_array_equal(drawn(top_k=9, top_p=1.0), every)
    kept = np.argsort(np.argsort(-rows, axis=1), axis=1)[np.arange(64), every] < 4
    np.testing.assert_array_equal(drawn(top_k=4)[kept], every[kept])


# --- Wrong values -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"prompt": PROMPT[0]}, r"prompt: got int32\[5\]; need integers \[batch, length\]"),
        ({"prompt": [[1, 2]]}, r"prompt: got \[\[1, 2\]\]; need integers"),
        ({"prompt": PROMPT[:, :0]}, "prompt: got .*; need at least one token"),
        ({"length": -1}, "length: got -1; need at least 0"),
        ({"length": 1.0}, "length: got 1.0; need an int"),
        ({"key": 3}, "key: got 3; need one key"),
        ({"key": jax.random.split(jax.random.key(0))}, "key: got .*; need one key"),
        ({"temperature": -0.5}, "temperature: got -0.5; need a finite number, at least 0"),
        ({"temperature": float("nan")}, "temperature: got nan"),
        ({"top_k": 0}, "top_k: got 0; need at least 1"),
        ({"top_p": 0}, "top_p: got 0; need a finite number, above 0 and at most 1"),
        ({"top_p": 1.5}, "top_p: got 1.5"),
        ({"stop": VOCABULARY}, "stop: got 13; need 0 to 12"),
        ({"stop": ["x"]}, "stop: got 'x'; need an int"),
        ({"lengths": LENGTHS[:2]}, r"lengths: got int64\[2\]; need \[batch\] = \[3\]"),
        ({"lengths": np.array([0, 1, 2])}, "lengths: got 0; need 1 to 5"),
        ({"lengths": jnp.array([6, 1, 2])}, "lengths: got 6; need 1 to 5"),
        ({"lengths": np.ones(3)}, "lengths: got dtype float64; need an integer dtype"),
        ({"lengths": 5}, r"lengths: got int; need an array \[batch\]"),
        ({"below": 0}, "below: got 0; need at least 1"),
    ],
)
def test_wrong_values_are_named(options, message):
    model, values = model_of(*ONE)
    given = {"prompt": PROMPT, "length": 2, "key": jax.random.key(0), **options}
    for call in (generate, stream):
        with pytest.raises((ValueError, TypeError), match=f"^{message}") as error:
            call(nn.bind(model, values), given["prompt"], **{k: v for k, v in given.items() if k != "prompt"})
        assert "\n" not in str(error.value).split("\n---")[0]


def test_a_model_with_positions_refuses_what_goes_past_them():
    model = LanguageModel(vocabulary=VOCABULARY, mixers=[nn.SoftmaxAttention], depth=1, features=16, max_length=7)
    bound = nn.bind(model, nn.initialize(model, jax.random.key(0)))
    jax.eval_shape(lambda: generate(bound, PROMPT, length=3, key=jax.random.key(0)))
    with pytest.raises(ValueError, match="max_length: got 8; the model has positions for 7 tokens"):
        generate(bound, PROMPT, length=4, key=jax.random.key(0))
    with pytest.raises(ValueError, match="max_length: got 4; need at least the prompt's 5 tokens"):
        bound.prefill(PROMPT, max_length=4)

    @jax.jit
    def read_and_go_past():
        logits, cache = bound.prefill(PROMPT, max_length=5)
        return logits, bound.step(cache, PROMPT[:, 0])[0]

    logits, past = read_and_go_past()
    assert np.all(np.isfinite(logits))
    assert np.all(np.isnan(past))


def test_a_compiled_program_that_is_given_no_length_gives_no_number():
    model, values = model_of(*ONE)
    read = jax.jit(lambda lengths: nn.bind(model, values).prefill(PROMPT, lengths, max_length=9)[0])
    assert [bool(np.all(np.isnan(row))) for row in read(np.array([0, 5, 6]))] == [True, False, True]


# --- Over devices -----------------------------------------------------------------------------------------------------

SHARED = {name: (name,) for name in DECODING} | {"hybrid": ("local_sinks", "gated_delta", "softmax_convolved")}
MESHES = {
    "data, tensor": train.Mesh(data=2, tensor=2),
    "data, context": train.Mesh(data=2, context=2),
    "fsdp, tensor, context": train.Mesh(fsdp=2, tensor=2, context=2),
}
SHARED_PROMPT = np.random.default_rng(1).integers(VOCABULARY, size=(4, 8)).astype(np.int32)
SHARED_LENGTHS = np.array([8, 1, 5, 4], np.int32)


def shared(name, placed):
    """Tokens of ragged prompts, and logits after prompts of one length. placed: (values, array) -> where they lie."""
    model, values = model_of(*SHARED[name])

    @jax.jit
    def run(values, prompt, lengths):
        bound = nn.bind(model, values)
        tokens = generate(bound, prompt, lengths=lengths, length=5, key=jax.random.key(1), temperature=1.5, stop=2)
        return tokens, bound.prefill(prompt, max_length=9)[0]

    return jax.tree.map(np.asarray, run(*placed(values, SHARED_PROMPT, SHARED_LENGTHS)))


@functools.cache
def on_one_device(name):
    return shared(name, lambda *arrays: arrays)


def assert_as_on_one_device(name, got):
    tokens, logits = on_one_device(name)
    np.testing.assert_array_equal(got[0], tokens)
    np.testing.assert_allclose(got[1], logits, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("case", slow_but([], list(itertools.product(SHARED, MESHES))), ids=": ".join)
def test_tokens_over_a_mesh_are_those_of_one_device(case):
    name, of_mesh = case
    mesh = MESHES[of_mesh].build()

    def placed(values, *arrays):
        return jax.device_put(values, state_shardings(mesh, values)), *jax.device_put(arrays, batch_sharding(mesh))

    with jax.set_mesh(mesh):
        assert_as_on_one_device(name, shared(name, placed))


@pytest.mark.slow  # the fast tests hold it of one model, in test_model_transformations.py
@pytest.mark.parametrize("name", SHARED)
def test_tokens_on_explicit_axes_are_those_of_one_device(name):
    mesh = jax.make_mesh((2, 2), ("data", "context"), axis_types=(AxisType.Explicit,) * 2)

    def placed(values, prompt, lengths):
        by_rows = (NamedSharding(mesh, PartitionSpec(*axes)) for axes in (("data", "context"), ("data",)))
        return values, *map(jax.device_put, (prompt, lengths), by_rows)

    with jax.set_mesh(mesh):
        assert_as_on_one_device(name, shared(name, placed))


# --- Mixers of one's own ----------------------------------------------------------------------------------------------


class Summing(nn.Attention):
    """The mean of the values so far, with a cache and a step and nothing for prompts."""

    def mix(self, query, key, value, x, segment_ids):
        return jnp.cumsum(value, axis=1) / (1 + jnp.arange(value.shape[1])[None, :, None, None])

    def mechanism_flops(self, space):
        return 0

    def init_mechanism_cache(self, batch, max_length):
        return jnp.zeros((batch, self.num_heads, self.value_dim)), jnp.zeros((), jnp.int32)

    def mechanism_step(self, cache, query, key, value, x):
        total, count = cache[0] + value[:, 0], cache[1] + 1
        return (total / count)[:, None], (total, count)


class Doubled(nn.SoftmaxAttention):
    """Of a class that has a prefill, with steps of its own, which that one does not know."""

    def mix(self, query, key, value, x, segment_ids):
        return super().mix(query, 2 * key, value, x, segment_ids)

    def mechanism_step(self, cache, query, key, value, x):
        return super().mechanism_step(cache, query, 2 * key, value, x)


@pytest.mark.parametrize("mixer", [Summing, Doubled])
def test_a_mixer_of_ones_own_without_a_prefill_reads_prompts_by_its_steps(mixer):
    model = LanguageModel(vocabulary=VOCABULARY, mixers=[mixer], depth=1, features=16)
    bound = nn.bind(model, nn.initialize(model, jax.random.key(0)))

    @jax.jit
    def read():
        logits, cache = bound.prefill(PROMPT[:, :4], max_length=5)
        return logits, bound.step(cache, PROMPT[:, 4])[0], bound(PROMPT)

    logits, after, want = read()
    np.testing.assert_allclose(logits, want[:, 3], atol=1e-5)
    np.testing.assert_allclose(after, want[:, 4], atol=1e-5)
    with pytest.raises(ValueError, match=f"^lengths: got some; {mixer.__name__} has no mechanism_prefill"):
        generate(bound, PROMPT, lengths=LENGTHS, length=2, key=jax.random.key(0))
