"""Axial attention against the published vectors and against full attention."""

import functools
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from marks import slow_but

from attnlab import axial_attention, dot_product_attention, dot_product_step, init_dot_product_cache

VECTORS = Path(__file__).parents[1] / "vectors" / "axial"
FORMS = ("reference", "xla")
every_form = pytest.mark.parametrize("form", slow_but(["xla"], FORMS))
attend = jax.jit(axial_attention, static_argnames=("axis", "is_causal", "return_lse", "implementation"))


def arrays(space, heads=4, key_heads=2, dtype=jnp.float32):
    rng = np.random.default_rng(0)
    shapes = ((2, *space, heads, 8), (2, *space, key_heads, 8), (2, *space, key_heads, 6))
    return tuple(jnp.asarray(rng.standard_normal(shape), dtype) for shape in shapes)


@every_form
@pytest.mark.parametrize(("wide", "tolerance"), [(True, 1e-9), pytest.param(False, 5e-5, marks=pytest.mark.slow)])
def test_vectors(form, wide, tolerance):
    with jax.enable_x64(wide):
        data = np.load(VECTORS / "unmasked.npz")
        inputs = [jnp.asarray(data[name], jnp.float64 if wide else jnp.float32) for name in "qkv"]
        for axis in (1, 2):
            out = attend(*inputs, axis=axis - 1, implementation=form)
            np.testing.assert_allclose(out, data[f"out_axis{axis}"], atol=tolerance)


def test_vectors_of_summed_and_stacked_layers():
    """A published layer around the primitive: axes summed, and one after the other."""
    with jax.enable_x64(True):
        data = np.load(VECTORS / "layer.npz")

        def layer(x, number):
            weight = {name: data[f"param:axial_attentions.{number}.fn.{name}"] for name in WEIGHTS}
            heads = int(data["num_heads"])
            query = x @ weight["to_q.weight"].T
            key, value = jnp.split(x @ weight["to_kv.weight"].T, 2, axis=-1)
            query, key, value = (y.reshape(*y.shape[:-1], heads, -1) for y in (query, key, value))
            out = attend(query, key, value, axis=number)
            return out.reshape(x.shape) @ weight["to_out.weight"].T + weight["to_out.bias"]

        x = jnp.asarray(data["x"], jnp.float64)
        np.testing.assert_allclose(layer(x, 0), data["out_axis1"], atol=1e-9)
        np.testing.assert_allclose(layer(x, 0) + layer(x, 1), data["out_sum"], atol=1e-9)
        np.testing.assert_allclose(layer(layer(x, 0), 1), data["out_sequential"], atol=1e-9)


WEIGHTS = ("to_q.weight", "to_kv.weight", "to_out.weight", "to_out.bias")


@pytest.mark.parametrize("axis", [0, 1, 2, -1, -3])
@pytest.mark.parametrize("is_causal", slow_but([True], [False, True]))
def test_equals_full_attention_of_every_line(axis, is_causal):
    inputs = arrays((3, 4, 5))
    out, lse = attend(*inputs, axis=axis, is_causal=is_causal, return_lse=True)
    axis = range(1, 4)[axis]  # of the array
    lines = [jnp.moveaxis(x, axis, 3).reshape(-1, x.shape[axis], *x.shape[-2:]) for x in inputs]
    want, want_lse = dot_product_attention(*lines, is_causal=is_causal, return_lse=True, implementation="reference")
    np.testing.assert_allclose(jnp.moveaxis(out, axis, 3).reshape(want.shape), want, atol=1e-5)
    np.testing.assert_allclose(jnp.moveaxis(lse, axis, 3).reshape(want_lse.shape), want_lse, atol=1e-5)


@pytest.mark.parametrize(("shape", "axis"), [((4, 3, 3), 0), ((1, 5, 5), 1), ((4, 1, 5), -1), ((1, 3, 1), 0)])
@every_form
def test_a_bias_is_added_to_the_logits_of_every_line(shape, axis, form):
    inputs, bias = arrays((3, 5)), np.random.default_rng(1).standard_normal(shape).astype(np.float32)
    out, lse = attend(*inputs, axis=axis, bias=bias, return_lse=True, implementation=form)
    lines = [x if axis else jnp.swapaxes(x, 1, 2) for x in inputs]
    query, key, value = (np.asarray(x, np.float64) for x in lines)
    key, value = (x.repeat(2, axis=3) for x in (key, value))
    logits = np.einsum("BYtNH,BYsNH->BYNts", query, key) * 8**-0.5 + bias
    want_lse = np.log(np.exp(logits).sum(-1))
    want = np.einsum("BYNts,BYsNV->BYtNV", np.exp(logits - want_lse[..., None]), value)
    want_lse = np.swapaxes(want_lse, 2, 3)
    if not axis:
        want, want_lse = np.swapaxes(want, 1, 2), np.swapaxes(want_lse, 1, 2)
    np.testing.assert_allclose(out, want, atol=1e-5)
    np.testing.assert_allclose(lse, want_lse, atol=1e-5)


def test_swapping_axes_swaps_the_output():
    inputs = arrays((3, 5))
    swapped = attend(*(jnp.swapaxes(x, 1, 2) for x in inputs), axis=1)
    np.testing.assert_allclose(jnp.swapaxes(swapped, 1, 2), attend(*inputs, axis=0), atol=1e-6)


def test_causal_by_perturbation():
    query, key, value = arrays((4, 6))
    before = attend(query, key, value, axis=1, is_causal=True)
    changed = attend(query, key.at[:, :, 3].add(1), value.at[:, :, 3].add(1), axis=1, is_causal=True)
    np.testing.assert_array_equal(before[:, :, :3], changed[:, :, :3])
    assert np.all(np.any(before[:, :, 3:] != changed[:, :, 3:], axis=-1))


def test_decodes_along_the_axis_with_dot_product_step():
    query, key, value = arrays((3, 5))
    want = attend(query, key, value, axis=1, is_causal=True)
    rows = [x.reshape(6, 5, *x.shape[-2:]) for x in (query, key, value)]
    cache, step, outs = init_dot_product_cache(6, 5, 2, 8, value_dim=6), jax.jit(dot_product_step), []
    for t in range(5):
        out, cache = step(cache, *(x[:, t : t + 1] for x in rows))
        outs.append(out)
    np.testing.assert_allclose(jnp.concatenate(outs, 1).reshape(want.shape), want, atol=1e-5)


@every_form
def test_an_axis_of_length_one_copies_the_value_in_its_dtype(form):
    query, key, value = arrays((1, 4), dtype=jnp.bfloat16)
    out = attend(query, key, value, axis=0, implementation=form)
    assert out.dtype == jnp.bfloat16
    np.testing.assert_array_equal(out, jnp.repeat(value, 2, axis=-2))


def test_memory_is_linear_in_the_length_of_the_axis():
    def temporary_bytes(length):
        struct = jax.ShapeDtypeStruct((1, 2, length, 2, 8), jnp.float32)
        function = jax.grad(lambda *a: jnp.sum(axial_attention(*a, axis=1) ** 2), (0, 1, 2))
        return jax.jit(function).lower(struct, struct, struct).compile().memory_analysis().temp_size_in_bytes

    assert temporary_bytes(4096) < 4.5 * temporary_bytes(1024)


@pytest.mark.parametrize("transform", ["grad", "jvp", "vmap"])
def test_forms_agree_under(transform):
    @functools.partial(jax.jit, static_argnames="form")
    def run(inputs, form):
        def function(*a):
            return axial_attention(*a, axis=0, is_causal=True, implementation=form)

        if transform == "grad":
            return jax.grad(lambda *a: jnp.sum(function(*a) ** 2), (0, 1, 2))(*inputs)
        return (
            jax.jvp(function, inputs, inputs) if transform == "jvp" else jax.vmap(function)(*(x[None] for x in inputs))
        )

    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5), *(run(arrays((3, 4)), form) for form in FORMS)
    )


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"axis": 2}, ValueError, r"axis: got 2; query float32\[2,3,4,4,8\] has space axes -2 to 1"),
        ({"axis": -3}, ValueError, "axis: got -3"),
        ({"axis": True}, TypeError, "axis: got True; need an int"),
        ({"axis": 1.0}, TypeError, "axis: got 1.0; need an int"),
        ({"axis": 1, "implementation": "xlaa"}, ValueError, "implementation: got 'xlaa'"),
        ({"axis": 1, "bias": np.zeros((4, 3, 4))}, ValueError, r"bias: .*need \[heads\|1, L\|1, L\|1\] of \[4, 4, 4\]"),
        ({"axis": 1, "bias": np.zeros((1, 4, 4, 4))}, ValueError, "bias: "),
        ({"axis": 1, "bias": np.zeros((4, 4, 4), int)}, TypeError, "bias: "),
    ],
)
def test_wrong_options_are_named(options, error, message):
    with pytest.raises(error, match=message):
        axial_attention(*arrays((3, 4)), **options)


def test_wrong_rank_is_named():
    with pytest.raises(ValueError, match="query: "):
        axial_attention(*(x[:, 0, 0] for x in arrays((3, 4))), axis=1)
