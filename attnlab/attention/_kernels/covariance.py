"""Local linear attention and Parallax: sums under the softmax weights, by banded flash attention and covariances."""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from attnlab.attention._dispatch.choice import Kernel
from attnlab.attention._dispatch.deferred import vary_alike
from attnlab.attention._dispatch.kernel_call import kernel_call, like
from attnlab.attention._kernels.backends import first_refusal, kernel_module, on_backends
from attnlab.attention._kernels.banded import banded_attention, banded_refusal, window_pattern
from attnlab.attention._shared.softmax_weights import SoftmaxWeights

Array = jax.Array
WeightsOf = Callable[..., SoftmaxWeights]


def kernels(by_weights: Callable[..., Any], blocked_weights: WeightsOf) -> dict[str, Kernel]:
    """by_weights(weights of (query, key, value, *, scale, is_causal, window), query, key, value, ...): a mechanism.
    blocked_weights: these in plain JAX."""

    def call(backend: str, xla: Any, *arrays: Any, **options: Any) -> Any:
        return by_weights(functools.partial(_weights, blocked_weights, backend), *arrays, **options)

    return on_backends(call, _refusal)


def parallax_kernels() -> dict[str, Kernel]:
    """Parallax's, of one pass over the keys."""
    return on_backends(_parallax, _parallax_refusal)


def _parallax(
    backend: str,
    xla: Callable[..., Array],
    query: Array,
    key: Array,
    value: Array,
    probe: Array,
    *,
    is_causal: bool,
    window: int | None,
    scale: Any,
) -> Array:
    module = kernel_module(backend, "banded_parallax")
    pattern = window_pattern(query.shape[1], query.shape[1], is_causal=is_causal, window=window)

    def kernel(arrays: Any, fixed: Any, keep: bool) -> tuple[Any, Any]:
        *tokens, scale = arrays
        results = module.banded_parallax(*tokens, pattern=pattern, scale=scale)
        return results[0], results

    def gradients(arrays: Any, fixed: Any, kept: Any, cotangent: Any) -> Any:
        *tokens, scale = arrays
        run: Any = module.banded_parallax_gradients
        return run(*tokens, *kept, cotangent, pattern=pattern, scale=scale)

    def plain(arrays: Any, _: Any) -> Array:
        *tokens, scale = arrays
        return xla(*tokens, is_causal=is_causal, window=window, scale=scale)

    arrays = (query, key, value, probe, jnp.asarray(scale, jnp.float32))
    out, number = like(query, width=value.shape[-1]), jax.ShapeDtypeStruct(query.shape[:3], jnp.float32)
    layouts = (("B.N.", "B.K.", "B.K.", "B.N.", ""), None, "B.N.", ("B.N.", "B.N", "B.N", "B.N."))
    kept = (out, number, number, out)
    return kernel_call(kernel, gradients, plain, arrays, results=out, kept=kept, layouts=layouts)


def _weights(
    blocked_weights: WeightsOf,
    backend: str,
    query: Array,
    key: Array,
    value: Array,
    *,
    scale: Any,
    is_causal: bool,
    window: int | None,
) -> SoftmaxWeights:
    module = kernel_module(backend, "banded_covariance")
    pattern = window_pattern(query.shape[1], query.shape[1], is_causal=is_causal, window=window)
    settings: Any = {"is_causal": is_causal, "window": window}
    # Before a solver's loop closes over it: inside, JAX could not make it vary over a mesh as the query does.
    _, scale = vary_alike((query, jnp.asarray(scale, jnp.float32)))

    def attend_blocked(query: Array, key: Array, values: Array, _: None, scale: Any) -> Any:
        out = blocked_weights(query, key, values, scale=scale, **settings).value_mean().astype(query.dtype)
        return out, jnp.zeros(query.shape[:3], jnp.float32)  # the lse's derivative is not asked for

    attend = functools.partial(
        banded_attention, attend_blocked, query, key, scale=scale, pattern=pattern, backend=backend
    )
    key_mean, lse = attend(key, None)
    value_mean, _ = attend(value, None)
    # The GPU's kernel takes the values' mean too, and makes up for the rounding of key_mean by it.
    num_fixed = 3 if backend == "gpu" else 2
    # Constants below: that they depend on query, key and value is part of the covariance's own gradients.
    fixed_lse, fixed_key_mean = lax.stop_gradient((lse, key_mean))

    def kernel(arrays: Any, fixed: Any, keep: bool) -> tuple[Any, Any]:
        *tokens, scale = arrays
        out = module.banded_covariance(*tokens, *fixed[:num_fixed], pattern=pattern, scale=scale)
        return out, out

    def gradients(arrays: Any, fixed: Any, kept: Any, cotangent: Any) -> Any:
        *tokens, scale = arrays
        run = module.banded_covariance_gradients
        return run(*tokens, *fixed, kept, cotangent, pattern=pattern, scale=scale)

    def blocked(arrays: Any, _: Any) -> Any:
        query, key, values, x, scale = arrays
        return blocked_weights(query, key, values, scale=scale, **settings).value_covariance(x)

    def covariance(values: Array, mean: Array, x: Array) -> Array:
        arrays = (query, key, values, x.astype(jnp.float32), scale)
        fixed = (fixed_lse, fixed_key_mean, lax.stop_gradient(mean))
        results = like(query, width=values.shape[-1], dtype=jnp.float32)
        layouts = (("B.N.", "B.K.", "B.K.", "B.N.", ""), ("B.N", "B.N.", "B.N."), "B.N.", "B.N.")
        return kernel_call(kernel, gradients, blocked, arrays, fixed, results=results, kept=results, layouts=layouts)

    def solve(solver: Callable[..., Any], offset: Array, ridge: Array, **limits: Any) -> Any:
        """By a kernel that iterates."""

        def kernel(arrays: Any, fixed: Any, keep: bool) -> tuple[Any, Any]:
            *tokens, scale = arrays
            module = kernel_module(backend, "covariance_solve")
            return module.covariance_solve(*tokens, *fixed, pattern=pattern, scale=scale, **limits), ()

        def blocked(arrays: Any, _: Any) -> Any:
            query, key, offset, ridge, scale = arrays
            covariance = blocked_weights(query, key, key, scale=scale, **settings).key_covariance
            x, (steps, residual) = solver(lambda x: covariance(x) + ridge[..., None] * x, offset)
            return x, steps.astype(jnp.float32), residual

        arrays = (query, key, offset, ridge[..., 0], scale)
        results = (offset, *[jax.ShapeDtypeStruct(offset.shape[:3], jnp.float32)] * 2)
        layouts = (("B.N.", "B.K.", "B.N.", "B.N", ""), ("B.N",), ("B.N.", "B.N", "B.N"), ())
        x, steps, residual = kernel_call(
            kernel, None, blocked, arrays, (fixed_lse,), results=jax.tree.map(like, results), layouts=layouts
        )
        return x, (steps.astype(jnp.int32), residual)

    iterates = backend == "tpu" and not first_refusal(backend, ["covariance_solve"], query, key, pattern=pattern)
    return SoftmaxWeights(
        lambda: key_mean.astype(jnp.float32),
        lambda: value_mean.astype(jnp.float32),
        functools.partial(covariance, key, key_mean),
        functools.partial(covariance, value, value_mean),
        solve if iterates else None,
    )


def _step(
    xla: Callable[..., Array],
    query: Array,
    key: Array,
    value: Array,
    ridge: Array,
    used: Array,
    scale: Array,
    **limits: Any,
) -> Array:
    def kernel(arrays: Any, fixed: Any, _: bool) -> tuple[Array, Any]:
        *tokens, scale = arrays
        run = kernel_module("tpu", "local_linear_step").local_linear_step
        return run(*tokens, *fixed, scale=scale, **limits), ()

    def plain(arrays: Any, fixed: Any) -> Array:
        *tokens, scale = arrays
        return xla(*tokens, *fixed, scale, **limits)

    results = like(query, width=value.shape[-1])
    layouts = (("B.N.", "B.K.", "B.K.", "B.N", ""), ("B",), "B.N.", ())
    return kernel_call(
        kernel, None, plain, (query, key, value, ridge, scale), (used,), results=results, layouts=layouts
    )


def _step_refusal(query: Any, key: Any, value: Any, *_: Any, **__: Any) -> str | None:
    return first_refusal("tpu", ["local_linear_step"], query, key, value)


STEP_KERNELS = {"pallas_tpu": Kernel(_step, _step_refusal)}


def _refusal(
    backend: str, query: Array, key: Array, value: Array, *_: Any, is_causal: bool, window: int | None, **__: Any
) -> str | None:
    pattern = window_pattern(query.shape[1], query.shape[1], is_causal=is_causal, window=window)
    for values in (key, value):
        reason = banded_refusal(query, key, values, None, pattern, backend)
        reason = reason or first_refusal(backend, ["banded_covariance"], query, key, values, pattern=pattern)
        if reason is not None:
            return reason
    return None


def _parallax_refusal(
    backend: str, query: Array, key: Array, value: Array, *_: Any, is_causal: bool, window: int | None, **__: Any
) -> str | None:
    pattern = window_pattern(query.shape[1], query.shape[1], is_causal=is_causal, window=window)
    return first_refusal(backend, ["banded_parallax"], query, key, value, pattern=pattern)
