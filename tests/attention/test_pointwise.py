"""Pointwise attention: its formula, softmax as a quotient of two, decoding, and positions that devices share."""

import functools
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P
from marks import slow_but
from parts import WHOLE, Case, assert_equals_by_exchanges, assert_equals_one_device, normal, qkv, with_gradients

from attnlab import (
    dot_product_attention,
    init_dot_product_cache,
    pointwise_attention,
    pointwise_step,
    prefill_dot_product_cache,
)
from attnlab.attention import pointwise

VECTORS = pathlib.Path(__file__).parents[1] / "vectors" / "pointwise"
FORMS = ("reference", "xla")
every_form = pytest.mark.parametrize("form", slow_but(["xla"], FORMS))


@pytest.fixture(autouse=True)
def _small_tiles(monkeypatch):
    """Several tiles, the last ones incomplete, at lengths of a test."""
    monkeypatch.setattr(pointwise, "_QUERIES", 4)
    monkeypatch.setattr(pointwise, "_KEYS", 5)


def arrays(queries=13, keys=17, dtype=np.float64):
    rng = np.random.default_rng(0)
    shapes = {"query": (2, queries, 4, 5), "key": (2, keys, 2, 5), "value": (2, keys, 2, 3)}
    return {name: rng.normal(size=shape).astype(dtype) for name, shape in shapes.items()}


@pytest.mark.parametrize("form", FORMS)
def test_vectors(form):
    with jax.enable_x64(True):
        data = np.load(VECTORS / "case1.npz")
        names = ("query", "key", "value", "bias")

        def call(query, key, value, bias):
            return pointwise_attention(
                query,
                key,
                value,
                activation=str(data["opt_activation"]),
                bias=bias,
                is_causal=bool(data["opt_is_causal"]),
                scale=float(data["opt_scale"]),
                implementation=form,
            )

        out, gradients = jax.jit(lambda cot, *a: (call(*a), jax.vjp(call, *a)[1](cot)))(
            data["cot"], *(data[name] for name in names)
        )
        np.testing.assert_allclose(out, data["out"], rtol=0, atol=1e-12)
        for got, name in zip(gradients, names, strict=True):
            np.testing.assert_allclose(got, data[f"d_{name}"], rtol=0, atol=1e-9)


def weights_of(logits, activation):
    return {"sigmoid": 1 / (1 + np.exp(-logits)), "relu": np.maximum(logits, 0), "exp": np.exp(logits)}[activation]


@every_form
@pytest.mark.parametrize("activation", slow_but(["relu"], ["sigmoid", "relu", "exp"]))
def test_equals_numpy_under_a_mask_a_bias_and_causality(activation, form):
    """A key is hidden by any of the three, and is then none of those that are divided by."""
    with jax.enable_x64(True):
        rng, inputs = np.random.default_rng(1), arrays()
        bias, mask = rng.normal(size=(1, 4, 13, 17)), rng.random((2, 1, 1, 17)) < 0.6
        bias[0, 1, 2:6, 2] = -np.inf
        sees = mask & np.tri(13, 17, dtype=bool) & (bias != -np.inf)
        key, value = (np.repeat(inputs[name], 2, axis=2) for name in ("key", "value"))
        logits = 0.3 * np.einsum("BTNH,BSNH->BNTS", inputs["query"], key) + bias
        weights = np.where(sees, weights_of(logits, activation), 0)
        want = np.einsum("BNTS,BSNV->BTNV", weights, value)
        counts = np.maximum(np.swapaxes(sees.sum(-1), 1, 2), 1)[..., None]
        options = {"activation": activation, "scale": 0.3, "is_causal": True, "implementation": form}
        for divide, expected in ((False, want), (True, want / counts)):
            out = pointwise_attention(**inputs, bias=bias, mask=mask, divide=divide, **options)
            np.testing.assert_allclose(out, expected, rtol=0, atol=1e-11)


@pytest.mark.slow
@pytest.mark.parametrize("shapes", [((2, 4, 13, 17), (1, 1, 13, 1)), ((1, 1, 1, 17), (2, 4, 1, 1))])
@pytest.mark.parametrize("is_causal", [False, True])
def test_gradients_of_tiles_are_those_of_all_weights_at_once(is_causal, shapes):
    """And tangents, for biases and masks that broadcast along any axis."""
    with jax.enable_x64(True):
        rng, inputs = np.random.default_rng(2), arrays()
        inputs |= {"bias": rng.normal(size=shapes[0])}
        mask = rng.random(shapes[1]) < 0.7

        def everything(form):
            def call(inputs):
                return pointwise_attention(**inputs, mask=mask, is_causal=is_causal, divide=True, implementation=form)

            tangents = jax.tree.map(np.cos, inputs)
            out, pull = jax.vjp(call, inputs)
            return pull(jnp.sin(out)), jax.jvp(call, (inputs,), (tangents,))

        got, want = (jax.jit(functools.partial(everything, form))() for form in ("xla", "reference"))
        jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=0, atol=1e-12), got, want)


@pytest.mark.slow
@pytest.mark.parametrize("form", FORMS)
def test_softmax_attention_is_exp_over_the_same_of_ones(form):
    with jax.enable_x64(True):
        inputs, options = arrays(), {"activation": "exp", "implementation": form}
        total = pointwise_attention(**inputs | {"value": np.ones((2, 17, 2, 1))}, **options)
        out = pointwise_attention(**inputs, **options) / total
        np.testing.assert_allclose(out, dot_product_attention(**inputs), rtol=0, atol=1e-12)


@pytest.mark.slow
@pytest.mark.parametrize("divide", [False, True])
def test_steps_after_a_prompt_are_the_parallel_form(divide):
    with jax.enable_x64(True):
        inputs = arrays(keys=13)
        bias = np.random.default_rng(3).normal(size=(1, 4, 13, 13))
        want = pointwise_attention(**inputs, bias=bias, is_causal=True, divide=divide)
        cache = init_dot_product_cache(2, 13, 2, 5, value_dim=3, dtype=jnp.float64)
        cache = prefill_dot_product_cache(cache, inputs["key"][:, :9], inputs["value"][:, :9])
        step = jax.jit(functools.partial(pointwise_step, divide=divide))
        for t in range(9, 14):
            now = {name: x[:, min(t, 12)][:, None] for name, x in inputs.items()}
            out, cache = step(cache, **now, bias=bias[:, :, min(t, 12)][:, :, None])
            if t < 13:
                np.testing.assert_allclose(out, want[:, t : t + 1], rtol=0, atol=1e-13)
        assert np.isnan(out).all()  # past what the cache is for


def test_a_weight_of_zero_hides_no_key_that_is_not_finite():
    """A key that relu leaves nothing of is seen all the same; one behind the mask is not."""
    inputs = arrays(dtype=np.float32)
    inputs["query"][:, :, :, 0] = -np.abs(inputs["query"][:, :, :, 0])
    inputs["value"][1, 6] = np.nan
    inputs["key"][1, 6] = [1e3, 0, 0, 0, 0]
    mask = np.arange(13)[:, None] != 7
    out = pointwise_attention(**inputs, activation="relu", is_causal=True, mask=mask[None, None])
    spoilt = np.isnan(out).all((2, 3))
    assert spoilt[0].sum() == 0
    assert spoilt[1].tolist() == [t >= 6 and t != 7 for t in range(13)]


RING = {"collective-permute": 7}
attend = functools.partial(pointwise_attention, divide=True)
CASES = {
    "all": Case(attend, qkv(48), RING),
    "causal": Case(functools.partial(attend, is_causal=True), qkv(48, spoilt=True), RING),
    "bias and mask": Case(
        functools.partial(attend, activation="relu", is_causal=True),
        qkv(32, keys=(48,)) | {"bias": normal(2, 4, 32, 48), "mask": normal(1, 1, 32, 48) > -1},
        RING,
        {"bias": P(None, None, "context"), "mask": P(None, None, "context")},
    ),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", CASES)
def test_devices_share_positions_in_a_ring(name):
    assert_equals_one_device(CASES[name])


@pytest.mark.slow
def test_keys_that_the_devices_do_not_divide_are_whole():
    case = Case(functools.partial(attend, is_causal=True), qkv(32, keys=(27,)), {}, {"key": WHOLE, "value": WHOLE})
    assert_equals_by_exchanges(case, jax.jit(with_gradients(case.call))(case.arrays))


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"activation": "gelu"}, ValueError, "activation: .*sigmoid, relu, exp"),
        ({"bias": np.zeros((2, 4, 13, 5), np.float32)}, ValueError, "bias: "),
        ({"mask": np.zeros((1, 1, 1, 17), np.float32)}, TypeError, "mask: .*bool"),
        ({"divide": 1}, TypeError, "divide: "),
        ({"implementation": "pallas_tpu"}, ValueError, "implementation: .*pointwise_attention has no such form"),
    ],
)
def test_wrong_calls_are_named(change, error, message):
    with pytest.raises(error, match=message):
        pointwise_attention(**arrays(dtype=np.float32) | change)
