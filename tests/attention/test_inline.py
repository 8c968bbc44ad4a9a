"""InLine attention against the published vectors, its formula in float64, and itself."""

import functools
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from marks import slow_but

from attnlab import init_linear_cache, inline_attention, linear_attention

FORMS = ("reference", "xla")
every_form = pytest.mark.parametrize("form", slow_but(["xla"], FORMS))
VECTORS = Path(__file__).parents[1] / "vectors" / "linear"
attend = jax.jit(inline_attention, static_argnames=("scale", "implementation"))


def arrays(keys=9, dtype=jnp.float32):
    rng = np.random.default_rng(0)
    shapes = ((2, 7, 4, 8), (2, keys, 2, 8), (2, keys, 2, 5))
    return tuple(jnp.asarray(rng.standard_normal(shape), dtype) for shape in shapes)


@every_form
@pytest.mark.parametrize(("wide", "tolerance"), [(True, 1e-12), pytest.param(False, 2e-5, marks=pytest.mark.slow)])
def test_vectors(form, wide, tolerance):
    with jax.enable_x64(wide):
        data = np.load(VECTORS / "inline.npz")
        dtype = jnp.float64 if wide else jnp.float32
        inputs = [jnp.asarray(data[name], dtype) for name in "qkv"]
        out, pullback = jax.vjp(lambda *a: inline_attention(*a, implementation=form), *inputs)
        np.testing.assert_allclose(out, data["o"], atol=tolerance)
        for got, name in zip(pullback(jnp.asarray(data["up_o"], dtype)), ("dq", "dk", "dv")):
            np.testing.assert_allclose(got, data[name], atol=tolerance * 10)


@pytest.mark.parametrize(("wide", "tolerance"), [(True, 1e-9), pytest.param(False, 2e-5, marks=pytest.mark.slow)])
@pytest.mark.long
def test_l2vit_is_linear_attention_with_a_divisor_of_its_own(wide, tolerance):
    """relu features, and the sum of weights, which the state has, clamped from below before it divides."""
    with jax.enable_x64(wide):
        dtype = jnp.float64 if wide else jnp.float32
        data = {name: jnp.asarray(x, dtype) for name, x in np.load(VECTORS / "l2vit.npz").items()}
        names = ("x", "temperature", "qkv_weight", "qkv_bias", "proj_weight", "proj_bias")

        def layer(x, temperature, qkv_weight, qkv_bias, proj_weight, proj_bias):
            query, key, value = jnp.moveaxis((x @ qkv_weight.T + qkv_bias).reshape(2, 49, 3, 2, 16), 2, 0)
            out, state = linear_attention(
                query,
                key,
                value,
                is_causal=False,
                feature_map="relu",
                scale=1.0,
                initial_state=init_linear_cache(2, 2, 16, normalize=True),
                return_state=True,
            )
            total = jnp.einsum("BTNH,BNH->BTN", jax.nn.relu(query), state.k_sum)
            out = temperature[:, 0] * out / jnp.maximum(total, 100)[..., None]
            return out.reshape(x.shape) @ proj_weight.T + proj_bias

        out, pullback = jax.jit(lambda *a: jax.vjp(layer, *a))(*(data[name] for name in names))
        np.testing.assert_allclose(out, data["o"], atol=tolerance)
        for got, name in zip(pullback(data["up_o"]), names):
            np.testing.assert_allclose(got, data[f"d{name}"], atol=10 * tolerance, rtol=tolerance)


def test_a_grid_is_its_places_in_a_row():
    inputs = arrays(keys=7)
    grids = [jnp.stack([x, 2 * x], axis=2) for x in inputs]
    rows = [x.reshape(2, 14, *x.shape[-2:]) for x in grids]
    out = attend(*grids)
    assert out.shape == (2, 7, 2, 4, 5)
    np.testing.assert_array_equal(out.reshape(2, 14, 4, 5), attend(*rows))


def test_forms_agree_in_values_gradients_and_tangents():
    @functools.partial(jax.jit, static_argnames="form")
    def both(inputs, form):
        def function(*a):
            return inline_attention(*a, scale=0.3, implementation=form)

        gradient = jax.grad(lambda *a: jnp.sum(jnp.sin(function(*a))), (0, 1, 2))(*inputs)
        return jax.jvp(function, inputs, inputs), gradient, jax.vmap(function)(*(x[None] for x in inputs))

    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=2e-5), *(both(arrays(), form) for form in FORMS))


@every_form
def test_weights_sum_to_one(form):
    query, key, value = arrays()
    constant = jnp.broadcast_to(value[:, :1], value.shape)
    out = attend(query, key, constant, implementation=form)
    np.testing.assert_allclose(out, jnp.repeat(constant[:, :1], 2, axis=2).repeat(7, axis=1), atol=1e-5)


@every_form
def test_a_shift_of_all_keys_changes_nothing(form):
    query, key, value = arrays()
    want = attend(query, key, value, implementation=form)
    np.testing.assert_allclose(attend(query, key + 100, value, implementation=form), want, atol=2e-3)


@every_form
def test_one_key_and_bfloat16(form):
    query, key, value = arrays(keys=1, dtype=jnp.bfloat16)
    out = attend(query, key, value, implementation=form)
    assert out.dtype == jnp.bfloat16
    np.testing.assert_array_equal(out, jnp.repeat(value, 2, axis=2).repeat(7, axis=1))


def test_memory_is_linear_in_length():
    def temporary_bytes(length):
        struct = jax.ShapeDtypeStruct((1, length, 2, 16), jnp.float32)
        function = jax.grad(lambda *a: jnp.sum(inline_attention(*a) ** 2), (0, 1, 2))
        return jax.jit(function).lower(struct, struct, struct).compile().memory_analysis().temp_size_in_bytes

    assert temporary_bytes(8192) < 4.5 * temporary_bytes(2048)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda q, k, v: (q[0], k, v), "query: "),
        (lambda q, k, v: (q, k[:, :, :, :4], v), "key: .*head_dim"),
        (lambda q, k, v: (q, k, v[:, :3]), "value: "),
        (lambda q, k, v: (q[:, :, :3], k, v), "key: .*must divide"),
        (lambda q, k, v: (q, k[:, :0], v[:, :0]), "key: .*at least one key"),
    ],
)
def test_wrong_shapes_are_named(change, message):
    with pytest.raises(ValueError, match=message):
        inline_attention(*change(*arrays()))
