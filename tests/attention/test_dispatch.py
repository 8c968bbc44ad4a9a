"""Which implementation runs, what refuses and why, and the linear call behind the kernels' derivatives."""

import functools
import time

import jax
import jax.experimental.pallas
import jax.numpy as jnp
import numpy as np
import pytest
from jax import export
from marks import slow_but

import attnlab
from attnlab import dilated_attention, dot_product_attention, explain, local_attention
from attnlab.attention import masks
from attnlab.attention._dispatch import choice
from attnlab.attention._dispatch.choice import dispatch
from attnlab.attention._dispatch.deferred import tangent_call
from attnlab.catalog import MECHANISMS
from kernels_pallas.gpu import target

LINE = jax.ShapeDtypeStruct((1, 40, 2, 8), jnp.float32)
IMAGE = jax.ShapeDtypeStruct((1, 6, 6, 2, 8), jnp.float64)


def test_explain_gives_the_choice_by_platform():
    (chosen,) = explain(local_attention, LINE, LINE, LINE, window=4)
    assert dict(chosen.by_platform) == {"tpu": "pallas_tpu", "elsewhere": "xla"}
    assert chosen.refused == {}
    assert str(chosen).splitlines() == [
        "local_attention: pallas_tpu on tpu, xla elsewhere",
        f"  pallas_gpu is not a default: bench --device gpu has not checked it on a card with jax {jax.__version__}",
    ]
    (chosen,) = explain(dot_product_attention, LINE, LINE, LINE, mask=jax.ShapeDtypeStruct((1, 1, 1, 40), jnp.bool))
    assert dict(chosen.by_platform) == {"every platform": "xla"}
    assert "has no mask that is an array" in chosen.refused["pallas_tpu"]
    assert "pallas_tpu cannot serve" in str(chosen)
    (chosen,) = explain(local_attention, LINE, LINE, LINE, window=4, implementation="reference")
    assert str(chosen) == "local_attention: reference on every platform"


def test_an_unknown_name_is_refused_with_the_allowed_ones():
    with pytest.raises(ValueError, match=r"'palas_tpu'.*one of \['reference', 'xla', 'pallas_tpu', 'pallas_gpu'\]"):
        jax.eval_shape(functools.partial(local_attention, window=4, implementation="palas_tpu"), LINE, LINE, LINE)
    with pytest.raises(ValueError, match=r"'pallas_gpu' \(sum has no such form\); need None or one of \['xla'\]"):
        dispatch("sum", {"xla": jnp.sum}, "pallas_gpu", jnp.ones(3))


@pytest.mark.long
def test_a_gpu_kernel_is_chosen_only_where_a_card_has_checked_it(monkeypatch):
    half = jax.ShapeDtypeStruct(LINE.shape, jnp.bfloat16)
    attend = functools.partial(local_attention, window=4)

    def lowered(implementation):
        function = functools.partial(attend, implementation=implementation)
        return export.export(jax.jit(function), platforms=["cuda"])(half, half, half).mlir_module_serialized

    assert b"mosaic_gpu" in lowered("pallas_gpu")
    assert b"mosaic_gpu" not in lowered(None)
    monkeypatch.setattr(choice, "_CHECKED_ON_A_CARD", {("local_attention", jax.__version__)})
    (chosen,) = explain(attend, half, half, half)
    assert dict(chosen.by_platform) == {"tpu": "pallas_tpu", "cuda": "pallas_gpu", "elsewhere": "xla"}
    jax.clear_caches()
    assert b"mosaic_gpu" in lowered(None)
    jax.clear_caches()
    (chosen,) = explain(dot_product_attention, half, half, half)
    assert "cuda" not in chosen.by_platform


def test_calls_without_a_mask_that_a_card_has_checked_are_no_word_for_those_with_one(monkeypatch):
    half = jax.ShapeDtypeStruct(LINE.shape, jnp.bfloat16)
    monkeypatch.setattr(choice, "_CHECKED_ON_A_CARD", {("dot_product_attention", jax.__version__)})
    (chosen,) = explain(dot_product_attention, half, half, half)
    assert chosen.by_platform["cuda"] == "pallas_gpu"
    (chosen,) = explain(dot_product_attention, half, half, half, mask=masks.causal())
    assert dict(chosen.by_platform) == {"tpu": "pallas_tpu", "elsewhere": "xla"}
    assert "pallas_gpu" in chosen.no_default


class Gpu:
    """A device that programs are lowered for."""

    device_kind = "NVIDIA A100"
    compute_capability = "8.0"


@pytest.mark.parametrize("call", [local_attention, attnlab.linear_attention])
def test_gpu_kernels_are_refused_where_they_cannot_be_compiled(call, monkeypatch):
    options = {"window": 4} if call is local_attention else {}
    half = jax.ShapeDtypeStruct(LINE.shape, jnp.bfloat16)

    def refused():
        with pytest.raises(ValueError, match=f"'pallas_gpu' cannot serve this {call.__name__} call: ") as caught:
            jax.eval_shape(functools.partial(call, implementation="pallas_gpu", **options), half, half, half)
        return str(caught.value).partition("call: ")[2]

    monkeypatch.setattr(target, "_target", Gpu)
    assert refused() == "needs a GPU of compute capability 9.0 (Hopper), and NVIDIA A100 has 8.0"
    monkeypatch.setattr(Gpu, "compute_capability", "9.0")
    monkeypatch.setattr(target, "_has_compiler", lambda: False)
    assert refused() == "needs ptxas, or nvJitLink with jax 0.12, and finds neither"
    monkeypatch.setattr(target.importlib.util, "find_spec", lambda name: None)
    monkeypatch.setattr(target.jax, "__version_info__", (0, 10, 2))
    assert refused().startswith("needs absl-py, which jax 0.")


@pytest.mark.parametrize(
    ("attend", "array", "reason"),
    [
        (functools.partial(dilated_attention, window=3, dilation=2), IMAGE, "float64"),
        (functools.partial(local_attention, window=3), jax.ShapeDtypeStruct(LINE.shape, jnp.float16), "float16"),
        (functools.partial(local_attention, window=3), jax.ShapeDtypeStruct((1, 8, 2, 8192), jnp.float32), "VMEM"),
    ],
)
def test_a_name_that_cannot_serve_is_refused_with_the_reason(attend, array, reason):
    with jax.enable_x64(True):
        with pytest.raises(ValueError, match=f"'pallas_tpu' cannot serve this .* call: .*{reason}"):
            jax.eval_shape(functools.partial(attend, implementation="pallas_tpu"), array, array, array)
        jax.eval_shape(attend, array, array, array)  # None falls back


@pytest.mark.long
def test_none_runs_the_xla_form_on_a_cpu():
    arrays = [jnp.asarray(np.random.default_rng(n).normal(size=(3, 1, 40, 2, 8)), jnp.float32) for n in range(3)]
    ids = jnp.asarray(np.arange(40) // 15, jnp.int32)[None]

    def derivatives(implementation):
        def loss(*arrays):
            out, lse = local_attention(
                *arrays, window=7, segment_ids=ids, return_lse=True, implementation=implementation
            )
            return (out**2).sum() + jnp.sin(lse).sum()

        def one(*arrays):
            gradient = jax.grad(loss, argnums=(0, 1, 2))
            return jax.value_and_grad(loss)(*arrays), *jax.jvp(gradient, arrays, arrays)

        return jax.jit(jax.vmap(one))(*arrays)

    for got, expected in zip(jax.tree.leaves(derivatives(None)), jax.tree.leaves(derivatives("xla")), strict=True):
        np.testing.assert_allclose(got, expected, rtol=1e-5, atol=1e-5)


def gradient_of(name, implementation):
    mechanism = MECHANISMS[name]

    def gradient(arrays):
        return jax.grad(lambda arrays: jnp.sum(mechanism(arrays, implementation) ** 2))(arrays)

    return gradient


# One row per family of kernels; the others are more of the same.
FAMILIES = {"dot_product, causal", "local, grid", "linear, gated delta rule", "routing, strict", "parallax"}


@pytest.mark.parametrize("name", slow_but(FAMILIES, MECHANISMS))
def test_a_program_for_a_cpu_traces_no_kernel(name, monkeypatch):
    """Values and gradients traced and lowered for the CPU while every kernel fails."""

    def kernel(*args, **options):
        raise AssertionError("a kernel was traced")

    monkeypatch.setattr(jax.experimental.pallas, "pallas_call", kernel)
    jax.jit(gradient_of(name, None)).lower(MECHANISMS[name].inputs())


@pytest.mark.slow
def test_tracing_millions_of_tokens_costs_what_the_xla_form_costs():
    arrays = {name: jax.ShapeDtypeStruct((1, 2**22, 1, 64), jnp.float32) for name in ("query", "key", "value")}

    def seconds(implementation):
        def loss(arrays):
            return jnp.sum(local_attention(**arrays, window=1024, is_causal=True, implementation=implementation))

        def once():
            start = time.perf_counter()
            jax.jit(jax.grad(loss)).trace(arrays)
            jax.clear_caches()
            return time.perf_counter() - start

        return min(once() for _ in range(5))

    assert seconds(None) < 3 * seconds("xla")


def plain(weight, x):
    return {"a": jnp.tanh(weight @ x), "b": (x**3).sum()}


@jax.custom_jvp
def wrapped(weight, x):
    return plain(weight, x)


@wrapped.defjvp
def _(primals, tangents):
    def tangent(residuals, tangents):
        return jax.jvp(plain, residuals, tangents)[1]

    def transpose(residuals, cotangents):
        return jax.vjp(plain, *residuals)[1](cotangents)

    out = wrapped(*primals)
    return out, tangent_call(tangent, transpose, out, primals, tangents)


def scalar(function):
    def loss(weight, x):
        out = function(weight, x)
        return jnp.sin(out["a"]).sum() * out["b"]

    return loss


def over_scan(function):
    def loss(weight, x):
        def step(x, _):
            return function(weight, x)["a"], None

        return jax.lax.scan(step, x, None, length=3)[0].sum()

    return loss


TRANSFORMS = {
    "grad": lambda f: jax.grad(scalar(f), argnums=(0, 1)),
    "grad of one": lambda f: jax.grad(scalar(f), argnums=1),
    "jvp": lambda f: lambda *args: jax.jvp(f, args, args),
    "vmap of grad": lambda f: jax.vmap(jax.grad(scalar(f), argnums=(0, 1)), in_axes=(None, 1)),
    "grad of vmap": lambda f: jax.grad(lambda w, x: jax.vmap(scalar(f), in_axes=(None, 1))(w, x).sum(), argnums=(0, 1)),
    "remat": lambda f: jax.grad(jax.checkpoint(scalar(f)), argnums=(0, 1)),
    "scan": lambda f: jax.grad(over_scan(f), argnums=(0, 1)),
    "hessian": lambda f: jax.hessian(scalar(f), argnums=(0, 1)),
    "reverse over reverse": lambda f: jax.jacrev(jax.jacrev(scalar(f))),
    "forward over reverse of scan": lambda f: jax.jacfwd(jax.grad(over_scan(f), argnums=1), argnums=1),
    "linearize": lambda f: lambda *args: jax.linearize(f, *args)[1](*args),
}


@pytest.mark.parametrize("jit", [pytest.param(False, marks=pytest.mark.slow), True], ids=["eager", "jit"])
@pytest.mark.parametrize("name", slow_but(set(TRANSFORMS) - {"hessian"}, TRANSFORMS))
def test_tangent_call_obeys(name, jit):
    weight = jnp.asarray(np.random.default_rng(0).normal(size=(3, 3)), jnp.float32)
    x = jnp.asarray(np.random.default_rng(1).normal(size=(3, 3) if "vmap" in name else (3,)), jnp.float32)
    transform = TRANSFORMS[name]
    got = (jax.jit if jit else lambda f: f)(transform(wrapped))(weight, x)
    expected = transform(plain)(weight, x)
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5)
