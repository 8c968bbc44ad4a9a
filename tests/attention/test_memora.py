"""Memora: the formula in NumPy, its limits, decoding, and cuts anywhere in time."""

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

from attnlab import MemoraState, init_memora_cache, memora_attention, memora_step

VECTORS = pathlib.Path(__file__).parents[1] / "vectors" / "memory"
every_form = pytest.mark.parametrize("form", slow_but(["xla"], ("reference", "xla")))
attend = jax.jit(memora_attention, static_argnames=("scale", "return_state", "implementation"))


def arrays(length=40, dtype=np.float64):
    rng = np.random.default_rng(0)
    drawn = {
        "query": rng.normal(size=(2, length, 4, 5)),
        "key": rng.normal(size=(2, length, 2, 5)) / 5**0.5,
        "value": rng.normal(size=(2, length, 2, 3)),
        "beta": rng.uniform(size=(2, length, 4)),
        "log_decay": -rng.uniform(size=(2, length, 4)),
    }
    return {name: x.astype(dtype) for name, x in drawn.items()}


def part(inputs, start, stop):
    return {name: x[:, start:stop] for name, x in inputs.items()}


def by_loops(query, key, value, beta, log_decay, scale):
    """One row and one head, [T, H] and [T, V]."""
    weights, outs = np.full((key.shape[1], value.shape[1]), 1 / key.shape[1]), []
    for q, k, v, step, decay in zip(query, key, value, beta, np.exp(log_decay)):
        moved = weights**decay * np.exp(-step * np.outer(k, scale * k @ weights - v))
        weights = moved / moved.sum(0)
        outs.append(scale * q @ weights)
    return np.stack(outs), np.log(weights)


@every_form
def test_the_formula(form):
    with jax.enable_x64(True):
        inputs = arrays()
        out, state = attend(**inputs, scale=1.5, return_state=True, implementation=form)
        for row, head in np.ndindex(2, 4):
            of_head = (inputs[name][row, :, head if inputs[name].shape[2] == 4 else head // 2] for name in inputs)
            want, log_weights = by_loops(*of_head, 1.5)
            np.testing.assert_allclose(out[row, :, head], want, rtol=0, atol=1e-12)
            np.testing.assert_allclose(state.log_weights[row, head], log_weights, rtol=0, atol=1e-12)


@every_form
def test_vectors(form):
    """The paper's rate is beta, its alpha e^g, and its weights are the scale's multiple."""
    with jax.enable_x64(True):
        data = np.load(VECTORS / "memora.npz")
        scale, names = float(data["opt_c"]), ("query", "key", "value", "rate", "alpha", "weight_w")

        def call(query, key, value, rate, alpha, weight):
            state = MemoraState(jnp.int32(0), jnp.log(weight / scale)[None])
            gates = {"beta": rate, "log_decay": jnp.log(alpha)}
            return memora_attention(query, key, value, **gates, scale=scale, initial_state=state, implementation=form)

        out, gradients = jax.jit(lambda cot, *a: (call(*a), jax.vjp(call, *a)[1](cot)))(
            data["cot"], *(data[name] for name in names)
        )
        np.testing.assert_allclose(out, data["out"], rtol=0, atol=1e-12)
        for got, name in zip(gradients, names, strict=True):
            np.testing.assert_allclose(got, data[f"d_{name}"], rtol=0, atol=1e-10)


@every_form
@pytest.mark.parametrize("cut", slow_but([33], [1, 32, 33, 39]))
def test_a_cut_in_time_changes_nothing(form, cut):
    with jax.enable_x64(True):
        inputs, options = arrays(), {"implementation": form, "return_state": True}
        want, at_end = attend(**inputs, **options)
        first, state = attend(**part(inputs, 0, cut), **options)
        second, state = attend(**part(inputs, cut, None), initial_state=state, **options)
        np.testing.assert_allclose(np.concatenate([first, second], 1), want, rtol=0, atol=1e-13)
        np.testing.assert_allclose(state.log_weights, at_end.log_weights, rtol=0, atol=1e-13)
        assert state.position == at_end.position == 40


@every_form
def test_steps_that_are_small_are_those_of_the_delta_rule_s_gradient(form):
    """d log W = -beta k e^T, to first order, so d W = W (d log W - its mean under W)."""
    with jax.enable_x64(True):
        inputs = arrays(length=1) | {"beta": np.full((2, 1, 4), 1e-6), "log_decay": np.zeros((2, 1, 4))}
        _, state = attend(**inputs, scale=2.0, return_state=True, implementation=form)
        key, value = (np.repeat(inputs[name][:, 0], 2, axis=1) for name in ("key", "value"))
        slope = key[..., None] * (2.0 * key.mean(-1)[..., None] - value)[:, :, None]
        moved = (np.exp(state.log_weights) - 0.2) / 1e-6
        np.testing.assert_allclose(moved, -0.2 * (slope - slope.mean(2, keepdims=True)), rtol=0, atol=1e-5)


def test_outputs_stay_within_what_weights_that_sum_to_the_scale_allow():
    inputs = arrays(dtype=np.float32)
    inputs["beta"] = 1e6 * inputs["beta"]
    out, state = attend(**inputs, scale=1.5, return_state=True)
    np.testing.assert_allclose(np.exp(state.log_weights).sum(2), 1, rtol=1e-5)
    least, most = (1.5 * edge(inputs["query"], axis=-1)[..., None] for edge in (np.min, np.max))
    assert np.all((out > least - 1e-5) & (out < most + 1e-5))


@pytest.mark.slow
def test_a_prompt_leaves_what_steps_leave():
    with jax.enable_x64(True):
        rng = np.random.default_rng(1)
        gates = {
            "beta": rng.uniform(size=(BATCH, TOKENS, HEADS)),
            "log_decay": -rng.uniform(size=(BATCH, TOKENS, HEADS)),
        }
        cache = init_memora_cache(BATCH, HEADS, HEAD_DIM, VALUE_DIM, dtype=jnp.float64)
        cache = cache._replace(position=jnp.zeros(BATCH, jnp.int32))

        def fill(state, lengths, **arrays):
            return memora_attention(**arrays, initial_state=state, lengths=lengths, return_state=True)

        assert_leaves_what_steps_leave(cache, fill, memora_step, ARRAYS | gates)


CASES = {
    "state": Case(
        functools.partial(memora_attention, return_state=True),
        qkv(48) | {"beta": np.abs(normal(2, 48, 4)) / 8, "log_decay": -0.1 * np.abs(normal(2, 48, 4))},
        {"collective-permute": 1, "all-reduce": 1},
        results=(SHARED, MemoraState(WHOLE, P())),
    ),
    "not finite": Case(
        functools.partial(memora_attention, scale=0.5),
        qkv(48, spoilt=True) | {"beta": np.abs(normal(2, 48, 4)) / 8},
        {"collective-permute": 1},
    ),
}


@pytest.mark.parametrize("name", slow_but([], CASES))
def test_devices_share_positions_in_turn(name):
    assert_equals_one_device(CASES[name])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"beta": np.ones((2, 40, 2), np.float32)}, "beta: "),
        ({"log_decay": np.zeros(4, np.float32)}, "log_decay: "),
        ({"initial_state": MemoraState(np.int32(0), np.zeros((2, 4, 5, 4)))}, "initial_state.log_weights: "),
        ({"initial_state": MemoraState(np.zeros(3, np.int32), np.zeros((2, 4, 5, 3)))}, "initial_state.position"),
    ],
)
def test_wrong_shapes_are_named(change, message):
    with pytest.raises(ValueError, match=message):
        memora_attention(**arrays(dtype=np.float32) | change)


def test_a_state_of_another_kind_is_named():
    with pytest.raises(TypeError, match=r"initial_state: got .*; need a MemoraState"):
        memora_attention(**arrays(dtype=np.float32), initial_state=np.zeros(3))
