"""Landmark attention: SOFT's formula, the kernel of all pairs as its limit, and positions that devices share."""

import functools
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from marks import slow_but
from parts import WHOLE, Case, assert_equals_by_exchanges, assert_equals_one_device, normal, qkv, with_gradients

from attnlab import landmark_attention

VECTORS = pathlib.Path(__file__).parents[1] / "vectors" / "landmark"
FORMS = ("reference", "xla")
every_form = pytest.mark.parametrize("form", slow_but(["xla"], FORMS))
OPTIONS = {"case1": {}, "case3": {"inverse": "newton", "symmetric": True}}


def arrays(space=(13,), landmarks=4, dtype=np.float64):
    rng = np.random.default_rng(0)
    shapes = {"query": (*space, 4, 5), "key": (*space, 2, 5), "value": (*space, 2, 3), "landmarks": (landmarks, 4, 5)}
    return {name: rng.normal(size=(2, *shape)).astype(dtype) for name, shape in shapes.items()}


@pytest.mark.parametrize("case", OPTIONS)
@every_form
def test_vectors(form, case):
    """Key = query, scaled already."""
    with jax.enable_x64(True):
        data = np.load(VECTORS / f"{case}.npz")
        names = ("query", "value", "landmarks")
        options = {**OPTIONS[case], "ridge": float(data["opt_ridge"]) if "opt_ridge" in data else 0.0}

        def call(query, value, landmarks):
            return landmark_attention(query, query, value, landmarks, scale=1.0, implementation=form, **options)

        out, gradients = jax.jit(lambda cot, *a: (call(*a), jax.vjp(call, *a)[1](cot)))(
            data["cot"], *(data[name] for name in names)
        )
        np.testing.assert_allclose(out, data["out"], rtol=0, atol=1e-12)
        for got, name in zip(gradients, names, strict=True):
            np.testing.assert_allclose(got, data[f"d_{name}"], rtol=0, atol=1e-9)


@every_form
def test_queries_as_landmarks_give_the_kernel_of_all_pairs(form):
    with jax.enable_x64(True):
        inputs = arrays(space=(9,))
        x, value = 2 * inputs["query"], np.repeat(inputs["value"], 2, axis=2)  # far apart: well conditioned
        out = landmark_attention(x, x, value, x, scale=1.0, implementation=form)
        squares = ((x[:, :, None] - x[:, None]) ** 2).sum(-1)
        want = np.einsum("BTSN,BSNV->BTNV", np.exp(-squares / 2), value)
        np.testing.assert_allclose(out, want, rtol=0, atol=1e-11)


@every_form
def test_the_softmax_kernel_is_nystromformer_s(form):
    """Its rows sum to 1, and those of its inverse, so that values that are alike stay as they are."""
    with jax.enable_x64(True):
        inputs = arrays()
        options = {"kernel": "softmax", "scale": 0.3, "implementation": form}

        def softmax(x, y):
            logits = 0.3 * np.einsum("BXNH,BYNH->BNXY", x, y)
            weights = np.exp(logits)
            return weights / weights.sum(-1, keepdims=True)

        key, value = (np.repeat(inputs[name], 2, axis=2) for name in ("key", "value"))
        query, landmarks = inputs["query"], inputs["landmarks"]
        gathered = softmax(landmarks, key) @ np.moveaxis(value, 2, 1)
        want = softmax(query, landmarks) @ np.linalg.pinv(softmax(landmarks, landmarks)) @ gathered
        np.testing.assert_allclose(landmark_attention(**inputs, **options), np.moveaxis(want, 1, 2), rtol=0, atol=1e-11)
        ones = landmark_attention(**inputs | {"value": np.ones((2, 13, 2, 1))}, **options)
        np.testing.assert_allclose(ones, 1, rtol=0, atol=1e-12)


@pytest.mark.parametrize("kernel", slow_but(["gaussian"], ["gaussian", "softmax"]))
def test_newton_s_steps_arrive_at_the_inverse(kernel):
    """Of each example by itself: another one in the batch changes nothing."""
    with jax.enable_x64(True):
        inputs = arrays(landmarks=3)
        call = functools.partial(landmark_attention, kernel=kernel, scale=1.0, symmetric=True)
        exact, newton = (call(**inputs, inverse=inverse) for inverse in ("exact", "newton"))
        np.testing.assert_allclose(newton, exact, rtol=0, atol=1e-8)
        other = inputs | {"landmarks": inputs["landmarks"] * np.array([1, 0.1])[:, None, None, None]}
        alone = call(**other, inverse="newton")
        np.testing.assert_allclose(alone[0], newton[0], rtol=0, atol=1e-14)
        assert np.abs(alone[1] - newton[1]).max() > 1e-3


@pytest.mark.slow
@pytest.mark.parametrize("inverse", ["exact", "newton"])
@pytest.mark.parametrize("kernel", ["gaussian", "softmax"])
def test_gradients_are_the_reference_s_and_those_of_finite_differences(kernel, inverse):
    with jax.enable_x64(True):
        inputs = arrays(space=(3, 4))
        along = jax.tree.map(np.cos, inputs)

        def loss_of(form):
            options = {"kernel": kernel, "inverse": inverse, "ridge": 0.1, "symmetric": True}

            def loss(inputs):
                return jnp.sum(jnp.sin(landmark_attention(**inputs, **options, implementation=form)))

            return jax.jit(loss)

        got, want = (jax.jit(jax.grad(loss_of(form)))(inputs) for form in ("xla", "reference"))
        jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=0, atol=1e-11), got, want)
        step = 1e-5
        ahead, behind = (
            loss_of("xla")(jax.tree.map(lambda x, y, sign=sign: x + sign * step * y, inputs, along)) for sign in (1, -1)
        )
        slope = sum(np.vdot(x, along[name]) for name, x in got.items())
        np.testing.assert_allclose((ahead - behind) / (2 * step), slope, rtol=1e-7, atol=1e-8)


@every_form
def test_what_is_not_finite_spoils_its_head_or_its_query_alone(form):
    inputs = arrays(dtype=np.float32)
    want = landmark_attention(**inputs, ridge=0.1, implementation=form)
    inputs["key"][0, 3, 1] = np.nan  # of heads 2 and 3
    inputs["landmarks"][1, 2, 0] = np.inf
    inputs["query"][1, 5, 3] = np.nan
    out = landmark_attention(**inputs, ridge=0.1, implementation=form)
    spoilt = np.zeros((2, 13, 4), bool)
    spoilt[0, :, 2:] = spoilt[1, :, 0] = spoilt[1, 5, 3] = True
    np.testing.assert_array_equal(np.isnan(out).any(-1), spoilt)
    np.testing.assert_allclose(out[~spoilt], want[~spoilt], rtol=0, atol=1e-5)


def _case(exchanged, spoilt=False, **options):
    return Case(
        functools.partial(landmark_attention, ridge=0.1, **options),
        qkv(48, spoilt=spoilt) | {"landmarks": normal(2, 5, 4, 8)},
        exchanged,
        {"landmarks": WHOLE},
    )


CASES = {
    "gaussian": _case({"all-reduce": 1}, symmetric=True),
    "newton, not finite": _case({"all-reduce": 1}, spoilt=True, inverse="newton"),
    "softmax": _case({"all-reduce": 2}, kernel="softmax"),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", CASES)
def test_devices_add_up_what_landmarks_gather(name):
    assert_equals_one_device(CASES[name])


@pytest.mark.slow
def test_keys_that_the_devices_do_not_divide_are_whole():
    case = CASES["gaussian"]
    arrays = case.arrays | qkv(48, keys=(27,))
    case = case._replace(arrays=arrays, specs=dict.fromkeys(("key", "value", "landmarks"), WHOLE), exchanged={})
    assert_equals_by_exchanges(case, jax.jit(with_gradients(case.call))(case.arrays))


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"landmarks": np.zeros((2, 4, 2, 5), np.float32)}, ValueError, "landmarks: "),
        ({"landmarks": np.zeros((2, 0, 4, 5), np.float32)}, ValueError, "landmarks: .*at least one"),
        ({"kernel": "linear"}, ValueError, "kernel: .*gaussian, softmax"),
        ({"inverse": "pinv"}, ValueError, "inverse: .*exact, newton"),
        ({"ridge": -1.0}, ValueError, "ridge: "),
        ({"symmetric": 1}, TypeError, "symmetric: "),
        ({"implementation": "pallas_gpu"}, ValueError, "implementation: .*landmark_attention has no such form"),
    ],
)
def test_wrong_calls_are_named(change, error, message):
    with pytest.raises(error, match=message):
        landmark_attention(**arrays(dtype=np.float32) | change)
