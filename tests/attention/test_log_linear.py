"""Log-linear attention: the paper's formula, linear attention as its limit, decoding, and cuts anywhere in time."""

import functools
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P
from marks import slow_but
from parts import SHARED, WHOLE, Case, assert_equals_one_device, normal, qkv
from prompts import ARRAYS, BATCH, HEAD_DIM, HEADS, TOKENS, VALUE_DIM, assert_leaves_what_steps_leave

from attnlab import (
    LogLinearState,
    init_log_linear_cache,
    linear_attention,
    log_linear_attention,
    log_linear_step,
)

VECTORS = pathlib.Path(__file__).parents[1] / "vectors" / "log_linear"
FORMS = ("reference", "xla")
every_form = pytest.mark.parametrize("form", slow_but(["xla"], FORMS))
attend = jax.jit(log_linear_attention, static_argnames=("return_state", "chunk_size", "implementation"))
LEVELS = 5


def arrays(length=13, levels=LEVELS, dtype=np.float32):
    rng = np.random.default_rng(0)
    normal = rng.standard_normal
    return {
        "query": normal((2, length, 4, 5)).astype(dtype),
        "key": normal((2, length, 2, 5)).astype(dtype),
        "value": normal((2, length, 2, 3)).astype(dtype),
        "level_scales": rng.uniform(size=(2, length, 4, levels)).astype(dtype),
        "log_decay": -rng.uniform(size=(2, length, 4)).astype(dtype),
    }


def part(inputs, start, stop):
    return {name: x[:, start:stop] for name, x in inputs.items()}


@pytest.mark.parametrize(
    "case", slow_but([("xla", 4)], [("reference", 64), *(("xla", size) for size in (1, 3, 4, 64))])
)
@pytest.mark.long
def test_vectors(case):
    form, chunk_size = case
    with jax.enable_x64(True):
        data = np.load(VECTORS / "case1.npz")
        names = ("query", "key", "value", "level_scales", "log_decay")

        def call(query, key, value, level_scales, log_decay):
            return log_linear_attention(
                query,
                key,
                value,
                level_scales,
                log_decay=log_decay,
                scale=float(data["opt_scale"]),
                chunk_size=chunk_size,
                implementation=form,
            )

        out, gradients = jax.jit(lambda cot, *a: (call(*a), jax.vjp(call, *a)[1](cot)))(
            data["cot"], *(data[name] for name in names)
        )
        np.testing.assert_allclose(out, data["out"], rtol=0, atol=1e-12)
        for got, name in zip(gradients, names, strict=True):
            np.testing.assert_allclose(got, data[f"d_{name}"], rtol=0, atol=1e-10)


@every_form
def test_scales_of_one_are_linear_attention(form):
    with jax.enable_x64(True):
        inputs = arrays(dtype=np.float64)
        inputs["level_scales"] = np.ones_like(inputs["level_scales"])
        out, state = attend(**inputs, return_state=True, chunk_size=4, implementation=form)
        del inputs["level_scales"]
        want, of_linear = linear_attention(**inputs, return_state=True)
        np.testing.assert_allclose(out, want, rtol=0, atol=1e-13)
        np.testing.assert_allclose(state.levels.sum(2), of_linear.kv, rtol=0, atol=1e-13)


def test_a_level_holds_the_tokens_of_one_run():
    """Token 12 = 0b1100 sees itself, none at a distance of 1 or 2 bits, tokens 8 to 11 at 3 bits, 0 to 7 at 4."""
    inputs = arrays(length=13)
    runs = {0: [12], 1: [], 2: [], 3: [8, 9, 10, 11], 4: list(range(8))}
    del inputs["log_decay"]
    _, state = attend(**inputs, return_state=True, chunk_size=5)
    outer = np.einsum("BSKH,BSKV->BSKHV", inputs["key"], inputs["value"]).repeat(2, axis=2)
    for level, tokens in runs.items():
        np.testing.assert_allclose(state.levels[:, :, level], outer[:, tokens].sum(1), rtol=0, atol=1e-5)


@every_form
@pytest.mark.parametrize("cut", slow_but([6], [1, 6, 8, 12]))
def test_a_cut_in_time_changes_nothing(form, cut):
    """Wherever it falls beside chunks and powers of two."""
    with jax.enable_x64(True):
        inputs = arrays(dtype=np.float64)
        options = {"chunk_size": 4, "implementation": form, "return_state": True}
        want, at_end = attend(**inputs, **options)
        first, state = attend(**part(inputs, 0, cut), **options)
        second, state = attend(**part(inputs, cut, None), initial_state=state, **options)
        np.testing.assert_allclose(np.concatenate([first, second], 1), want, rtol=0, atol=1e-13)
        np.testing.assert_allclose(state.levels, at_end.levels, rtol=0, atol=1e-13)
        assert state.position == at_end.position == 13


@pytest.mark.slow
def test_a_prompt_leaves_what_steps_leave():
    with jax.enable_x64(True):
        rng = np.random.default_rng(1)
        gates = {
            "level_scales": rng.uniform(size=(BATCH, TOKENS, HEADS, LEVELS)),
            "log_decay": -rng.uniform(size=(BATCH, TOKENS, HEADS)),
        }
        cache = init_log_linear_cache(BATCH, HEADS, LEVELS, HEAD_DIM, VALUE_DIM, dtype=jnp.float64)
        cache = cache._replace(position=jnp.zeros(BATCH, jnp.int32))

        def fill(state, lengths, **arrays):
            return log_linear_attention(**arrays, initial_state=state, lengths=lengths, return_state=True, chunk_size=4)

        assert_leaves_what_steps_leave(cache, fill, log_linear_step, ARRAYS | gates)


def test_tokens_that_have_too_few_levels_are_nan():
    """Two levels are for two tokens."""
    state = init_log_linear_cache(2, 4, 2, 5, 3)
    inputs = arrays(levels=2)
    outs = []
    for t in range(3):
        out, state = log_linear_step(state, **part(inputs, t, t + 1))
        outs.append(np.isnan(out))
    assert not outs[0].any()
    assert not outs[1].any()
    assert outs[2].all()


def test_scales_that_are_not_finite_are_their_own_token_s_alone():
    inputs = arrays()
    want = attend(**inputs)
    inputs["level_scales"][:, 4, :, 0] = np.nan
    out = attend(**inputs)
    assert np.isnan(out[:, 4]).all()
    kept = np.arange(13) != 4
    np.testing.assert_array_equal(out[:, kept], want[:, kept])


@pytest.mark.slow
def test_a_decay_to_nothing_drops_the_state_and_what_is_not_finite_in_it():
    inputs = arrays()
    inputs["value"][:, 3] = np.nan
    inputs["log_decay"][:, 7] = -np.inf
    out = attend(**inputs, chunk_size=4)
    assert np.isnan(out).all((0, 2, 3)).tolist() == [False] * 3 + [True] * 4 + [False] * 6


CASES = {
    "state": Case(
        functools.partial(log_linear_attention, chunk_size=4, return_state=True),
        qkv(48) | {"level_scales": np.abs(normal(2, 48, 4, 8)), "log_decay": -0.1 * np.abs(normal(2, 48, 4))},
        {"all-gather": 2},
        results=(SHARED, LogLinearState(WHOLE, P())),
    ),
    "not finite": Case(
        functools.partial(log_linear_attention, chunk_size=4),
        qkv(48, spoilt=True) | {"level_scales": np.abs(normal(2, 48, 4, 8))},
        {"all-gather": 2},
    ),
}


@pytest.mark.parametrize("name", slow_but([], CASES))
def test_devices_share_positions_by_a_gather_of_levels_and_of_ends(name):
    """Of parts of 6 tokens, which are not a power of two."""
    assert_equals_one_device(CASES[name])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"level_scales": np.ones((2, 13, 4, 4), np.float32)}, "level_scales: .*at least 5 levels for 13 tokens"),
        ({"level_scales": np.ones((2, 13, 2, 5), np.float32)}, "level_scales: "),
        ({"log_decay": np.zeros(4, np.float32)}, "log_decay: "),
        ({"initial_state": LogLinearState(np.zeros((2, 4, 4, 5, 3)), np.int32(0))}, "initial_state.levels: "),
        ({"initial_state": LogLinearState(np.zeros((2, 4, 5, 5, 3)), np.zeros(3, np.int32))}, "initial_state.position"),
    ],
)
def test_wrong_shapes_are_named(change, message):
    with pytest.raises(ValueError, match=message):
        log_linear_attention(**arrays() | change)


def test_a_state_of_another_kind_is_named():
    with pytest.raises(TypeError, match=r"initial_state: got .*; need a LogLinearState"):
        log_linear_attention(**arrays(), initial_state=np.zeros(3))
