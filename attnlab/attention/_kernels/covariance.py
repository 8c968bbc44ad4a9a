"""Local linear attention and Parallax: sums under the softmax weights, by banded flash attention and covariances."""

import functools
import importlib
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from attnlab.attention._dispatch.choice import Kernel
from attnlab.attention._dispatch.deferred import vary_alike
from attnlab.attention._dispatch.kernel_call import kernel_call, like
from attnlab.attention._kernels.banded import banded_attention, banded_refusal, window_pattern
from attnlab.attention._shared.softmax_weights import SoftmaxWeights

Array = jax.Array
WeightsOf = Callable[..., SoftmaxWeights]


def kernels(by_weights: Callable[..., Any], blocked_weights: WeightsOf, *, is_exact: bool = True) -> dict[str, Kernel]:
    """by_weights(weights of (query, key, value, *, scale, is_causal, window), query, key, value, ...): a mechanism.
    blocked_weights: these in plain JAX. is_exact: whether it needs covariances of more than 16-bit precision."""

    def kernel(backend: str) -> Kernel:
        weights = functools.partial(_weights, blocked_weights, backend, is_exact)

        def call(xla: Any, *arrays: Any, **options: Any) -> Any:
            return by_weights(weights, *arrays, **options)

        return Kernel(call, functools.partial(_refusal, backend))

    return {"pallas_tpu": kernel("tpu"), "pallas_gpu": kernel("gpu")}


def _module(backend: str) -> Any:
    return importlib.import_module(f"kernels_pallas.{backend}.banded_covariance")


def _weights(
    blocked_weights: WeightsOf,
    backend: str,
    is_exact: bool,
    query: Array,
    key: Array,
    value: Array,
    *,
    scale: Any,
    is_causal: bool,
    window: int | None,
) -> SoftmaxWeights:
    module = _module(backend)
    pattern = window_pattern(query.shape[1], query.shape[1], is_causal=is_causal, window=window)
    settings: Any = {"is_causal": is_causal, "window": window}
    # Before a solver's loop closes over it: inside, JAX could not make it vary over a mesh as the query does.
    _, scale = vary_alike((query, jnp.asarray(scale, jnp.float32)))

    def attend_blocked(query: Array, key: Array, values: Array, _: None, scale: Any) -> Any:
        out = blocked_weights(query, key, values, scale=scale, **settings).value_mean().astype(query.dtype)
        return out, jnp.zeros(query.shape[:3], jnp.float32)  # the lse's derivative is not asked for

    of_call = {"scale": scale, "pattern": pattern, "backend": backend}
    attend = functools.partial(banded_attention, attend_blocked, query, key, **of_call)
    key_mean, lse = attend(key, None)
    value_mean, _ = attend(value, None)
    # The GPU's kernels make up for the rounding of key_mean by the values' mean, and can do with fewer digits.
    of_kernels: Any = {"pattern": pattern} | ({"is_exact": is_exact} if backend == "gpu" else {})
    num_means = 3 if backend == "gpu" else 2
    # Constants below: that they depend on query, key and value is part of the covariance's own gradients.
    fixed_lse, fixed_key_mean = lax.stop_gradient((lse, key_mean))

    def kernel(arrays: Any, fixed: Any, keep: bool) -> tuple[Any, Any]:
        *tokens, scale = arrays
        out = module.banded_covariance(*tokens, *fixed[:num_means], scale=scale, **of_kernels)
        return out, out

    def gradients(arrays: Any, fixed: Any, kept: Any, cotangent: Any) -> Any:
        *tokens, scale = arrays
        return module.banded_covariance_gradients(*tokens, *fixed, kept, cotangent, scale=scale, **of_kernels)

    def blocked(arrays: Any, _: Any) -> Any:
        query, key, values, x, scale = arrays
        return blocked_weights(query, key, values, scale=scale, **settings).value_covariance(x)

    def covariance(values: Array, mean: Array, x: Array) -> Array:
        arrays = (query, key, values, x.astype(jnp.float32), scale)
        fixed = (fixed_lse, fixed_key_mean, lax.stop_gradient(mean))
        results = like(query, width=values.shape[-1], dtype=jnp.float32)
        layouts = (("B.N.", "B.K.", "B.K.", "B.N.", ""), ("B.N", "B.N.", "B.N."), "B.N.", "B.N.")
        return kernel_call(kernel, gradients, blocked, arrays, fixed, results=results, kept=results, layouts=layouts)

    return SoftmaxWeights(
        lambda: key_mean.astype(jnp.float32),
        lambda: value_mean.astype(jnp.float32),
        functools.partial(covariance, key, key_mean),
        functools.partial(covariance, value, value_mean),
    )


def _refusal(
    backend: str, query: Array, key: Array, value: Array, *_: Any, is_causal: bool, window: int | None, **__: Any
) -> str | None:
    pattern = window_pattern(query.shape[1], query.shape[1], is_causal=is_causal, window=window)
    for values in (key, value):
        reason = banded_refusal(query, key, values, None, pattern, backend=backend)
        reason = reason or _module(backend).refusal(query, key, values, pattern=pattern)
        if reason is not None:
            return reason
    return None
