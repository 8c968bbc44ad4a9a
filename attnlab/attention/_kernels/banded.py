"""Banded flash attention's kernels: values, gradients, and what they refuse."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from attnlab.attention import masks
from attnlab.attention._dispatch.kernel_call import kernel_call, like
from attnlab.attention._kernels.backends import first_refusal, kernel_module
from attnlab.attention._shared.finite import infinite_as_nan

Array = jax.Array
# The kernels' tables of so many tokens are made where a call is lowered, and no more.
MOST_TOKENS = 2**22
_MODULES = ("banded_flash", "banded_flash_backward")


def banded_attention(
    blocked: Callable[..., tuple[Array, Array]],
    query: Array,
    key: Array,
    value: Array,
    segment_ids: Any,
    *,
    scale: Any,
    softcap: float | None = None,
    pattern: Any,
    lists: Array | None = None,
    bias: Array | None = None,
    backend: str = "tpu",
) -> tuple[Array, Array]:
    """(out, lse) of query [B, T, N, H], key, value and a pair of segment ids, or None, on a "tpu" or "gpu".

    blocked: (query, key, value, segment_ids, scale) -> the same in plain JAX. pattern: one of kernels_pallas.patterns;
    of lists [B|1, K|1, ...] a function of these, which then are what blocked takes last. bias: [B|1, N|1, T|1, S],
    which, if given, blocked takes last.
    """
    banded_flash, banded_flash_backward = (kernel_module(backend, name) for name in _MODULES)
    of_softcap = {} if softcap is None else {"softcap": softcap}
    if softcap is not None:
        query, key = infinite_as_nan(query), infinite_as_nan(key)

    def options_of(fixed: Any) -> dict[str, Any]:
        segment_ids, *lists = fixed
        return {"pattern": pattern(*lists) if lists else pattern, "segment_ids": segment_ids, **of_softcap}

    def of_bias(bias: Array | None) -> dict[str, Any]:
        return {} if bias is None else {"bias": bias}

    def kernel(arrays: Any, fixed: Any, keep: bool) -> tuple[Any, Any]:
        *tokens, scale, bias = arrays
        results = banded_flash.banded_flash_attention(*tokens, **options_of(fixed), **of_bias(bias), scale=scale)
        return results, results

    def gradients(arrays: Any, fixed: Any, kept: Any, cotangents: Any) -> Any:
        *tokens, scale, bias = arrays
        found = banded_flash_backward.banded_flash_gradients(
            *tokens, *kept, *cotangents, **options_of(fixed), **of_bias(bias), scale=scale
        )
        return found if bias is not None else (*found, None)

    def in_plain_jax(arrays: Any, fixed: Any) -> Any:
        *tokens, scale, bias = arrays
        segment_ids, *lists = fixed
        return blocked(*tokens, segment_ids, scale, *lists, *of_bias(bias).values())

    bias = None if bias is None else bias.astype(_bias_dtype(bias))
    arrays = (query, key, value, jnp.asarray(scale, jnp.float32), bias)
    results = (like(query, width=value.shape[-1]), jax.ShapeDtypeStruct(query.shape[:3], jnp.float32))
    ids = None if segment_ids is None else ("B.", "B.")
    fixed: tuple[Any, ...] = (segment_ids,)
    of_fixed: tuple[Any, ...] = (ids,)
    if lists is not None:
        rows = "".join("." if size == 1 else letter for size, letter in zip(lists.shape, "BK"))
        fixed, of_fixed = (*fixed, lists), (*of_fixed, rows + "." * (lists.ndim - 2))
    of_bias_axes = None if bias is None else "".join("." if n == 1 else x for n, x in zip(bias.shape, "BN")) + ".."
    layouts = (("B.N.", "B.K.", "B.K.", "", of_bias_axes), of_fixed, ("B.N.", "B.N"), ("B.N.", "B.N"))
    return kernel_call(kernel, gradients, in_plain_jax, arrays, fixed, results=results, kept=results, layouts=layouts)


def _bias_dtype(bias: Any) -> Any:
    """In which the kernels read a bias."""
    return bias.dtype if bias.dtype in (jnp.bfloat16, jnp.float32) else jnp.float32


def banded_refusal(
    query: Any,
    key: Any,
    value: Any,
    segment_ids: Any,
    pattern: Any,
    backend: str = "tpu",
    *,
    softcap: float | None = None,
    bias: Any = None,
) -> str | None:
    """Why banded_attention cannot serve arrays of these shapes, or None if it can."""
    if backend == "gpu" and softcap is not None:
        return "has no softcap"
    if 0 in query.shape or 0 in key.shape:
        return f"needs arrays that are not empty, got query {query.shape} and key {key.shape}"
    tokens = max(query.shape[1], key.shape[1])
    if tokens > MOST_TOKENS:
        return f"serves up to {MOST_TOKENS} tokens, got {tokens}"
    options: Any = {"pattern": pattern, "segment_ids": segment_ids}
    if bias is not None:
        options["bias"] = jax.ShapeDtypeStruct(bias.shape, _bias_dtype(bias))
    return first_refusal(backend, _MODULES, query, key, value, **options)


def window_pattern(queries: int, keys: int, *, is_causal: bool, window: int | None = None) -> Any:
    """Queries that see every key, or those at or before them; with a window, that many of them at most."""
    from kernels_pallas.patterns import Intervals

    def bounds(query: Any) -> tuple[Any, Any]:
        if window is not None:
            return masks.window_bounds(query, keys, window=window, is_causal=is_causal)
        return np.zeros_like(query), np.minimum(query + 1, keys) if is_causal else np.full_like(query, keys)

    return Intervals(bounds, queries, keys)
