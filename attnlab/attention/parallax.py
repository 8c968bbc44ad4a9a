"""Parallax: local linear attention whose regression is replaced by a learned direction, the probe r.

    p_ts = softmax_s(scale q_t . k_s)       a_ts = r_t . k_s       abar_t = sum_s p_ts a_ts
    out_t = sum_s p_ts (1 + abar_t - a_ts) v_s    =    vbar_t - Cov_p(v, k) r_t

Weights sum to 1 and can be negative; r = 0 is softmax attention, and r = -x of local_linear.py is local linear
attention. As there, the covariance is a forward derivative of softmax attention, so that one pass over the keys gives
both terms. Released as Parallax in flash-linear-attention (2026), after Local Linear Attention (Zuo et al. 2025).
"""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from attnlab.attention import dot_product, local, masks
from attnlab.attention._dispatch.choice import Implementations, dispatch
from attnlab.attention._dispatch.exchange import Parts, over_positions
from attnlab.attention._dispatch.primitive import primitive
from attnlab.attention._kernels import covariance
from attnlab.attention._shared.checks import (
    accumulator_dtype,
    check_array,
    check_bool,
    check_cached_step,
    check_floating,
    check_query_key_value,
    check_type,
    default_scale,
)
from attnlab.attention._shared.finite import finite_or_zero, is_spoilt, spoil, spoilt_by_weights
from attnlab.attention._shared.heads import repeat_key_heads
from attnlab.attention._shared.softmax_weights import SoftmaxWeights, check_window, dense_weights
from attnlab.attention.dot_product import DotProductCache
from attnlab.attention.local_linear import append, blocked_weights, cached_weights

Array = jax.Array


@primitive("B*N.")
def parallax_attention(
    query: Array,
    probe: Array,
    key: Array,
    value: Array,
    *,
    is_causal: bool = True,
    window: int | None = None,
    scale: float | None = None,
    implementation: str | None = None,
) -> Array:
    """Parallax attention.

    Args:
      query: [B, T, N, H], floating. probe: the same shape; not scaled.
      key: [B, T, K, H], value: [B, T, K, V]; K divides N.
      is_causal: a query sees itself and earlier keys.
      window: it sees this many keys at most, as in local_attention. None: all.
      scale: factor on the logits; None means H ** -0.5.
      implementation: None, "reference", "xla", "pallas_tpu" (bfloat16 or float32), or "pallas_gpu" (bfloat16 or
        float16, head dims up to 128).

    Returns:
      [B, T, N, V] in query's dtype.

    Raises:
      ValueError, TypeError: at trace time, naming the argument.

    Complexity of "xla", with S keys seen (T, or the window): O(T S (H + V)) time, O(T) memory.
    """
    check_query_key_value(query, key, value)
    _check_probe(probe, query)
    is_causal, window = check_bool("is_causal", is_causal), check_window(window, query.shape[1])
    settings: dict[str, Any] = {
        "is_causal": is_causal,
        "window": window,
        "scale": default_scale(scale, query.shape[-1]),
    }
    attend = functools.partial(dispatch, "parallax_attention", IMPLEMENTATIONS, implementation, **settings)

    def parted(parts: Parts, query: Array, key: Array, value: Array, probe: Array) -> Array:
        if window is None:
            return _in_ring(parts, query, key, value, probe, is_causal, settings["scale"], implementation)
        axis = masks.AxisWindow(parts.many * query.shape[1], window, is_causal=is_causal)

        def in_stretch(query: Array, probe: Array, key: Array, value: Array) -> Array:
            return attend(query, key, value, probe)

        return local.in_stretches(in_stretch, axis, parts, (query, probe), (key, value))

    layouts = ("B*N.", "B*K.", "B*K.", "B*N.")
    return over_positions(attend, parted, layouts, "B*N.", query, key, value, probe)


def _check_probe(probe: Array, query: Array) -> None:
    check_array("probe", probe, query.shape, "query's shape")
    check_floating("probe", probe)


def _reference(
    query: Array, key: Array, value: Array, probe: Array, *, is_causal: bool, window: int | None, scale: Any
) -> Array:
    dtype = accumulator_dtype(query, probe, key, value)
    q, r = (finite_or_zero(x).astype(dtype) for x in (query, probe))
    k, v = (finite_or_zero(repeat_key_heads(x, query.shape[2])).astype(dtype) for x in (key, value))
    p = dense_weights(q, k, scale=scale, is_causal=is_causal, window=window)
    a = jnp.einsum("BTNH,BSNH->BNTS", r, k)
    weights = p * (1 + jnp.sum(p * a, axis=-1, keepdims=True) - a)
    out = jnp.einsum("BNTS,BSNV->BTNV", weights, v).astype(query.dtype)
    seen = dense_weights(jnp.zeros_like(q), jnp.zeros_like(k), scale=scale, is_causal=is_causal, window=window)
    return spoil(out, spoilt_by_weights(seen, query, key, value) | is_spoilt(probe))


def _by_weights(
    weights: Callable[..., SoftmaxWeights],
    query: Array,
    key: Array,
    value: Array,
    probe: Array,
    *,
    is_causal: bool,
    window: int | None,
    scale: Any,
) -> Array:
    """From the sums under the softmax weights: blocked_weights, or those of kernels or of a ring."""
    attention = weights(query, key, value, scale=scale, is_causal=is_causal, window=window)
    probe = probe.astype(accumulator_dtype(query, key))
    return (attention.value_mean() - attention.value_covariance(probe)).astype(query.dtype)


def _in_ring(
    parts: Parts,
    query: Array,
    key: Array,
    value: Array,
    probe: Array,
    is_causal: bool,
    scale: Any,
    implementation: str | None,
) -> Array:
    """Each device's queries over the keys of all parts: means and, as their derivative, covariances, in one pass."""
    each = functools.partial(dispatch, "dot_product_attention", dot_product.IMPLEMENTATIONS, implementation)
    dtype = accumulator_dtype(query, key)

    def mean(query: Array) -> Array:
        return dot_product.in_ring(each, is_causal, 1.0, parts, query, key, value)[0]

    means, covariances = jax.jvp(mean, (scale * query.astype(dtype),), (probe.astype(dtype),))
    return (means - covariances).astype(query.dtype)


IMPLEMENTATIONS: Implementations = {
    "reference": _reference,
    "xla": functools.partial(_by_weights, blocked_weights),
    **covariance.parallax_kernels(),
}


@primitive("B*N.", like="cache")
def parallax_step(
    cache: DotProductCache,
    query: Array,
    probe: Array,
    key: Array,
    value: Array,
    *,
    window: int | None = None,
    scale: float | None = None,
) -> tuple[Array, DotProductCache]:
    """One more token of parallax_attention(..., is_causal=True), in O(S (H + V)) with S keys cached.

    Args:
      cache: from init_local_linear_cache with the same window, or an earlier step.
      query, probe: [B, 1, N, H]. key: [B, 1, K, H]. value: [B, 1, K, V].

    Returns:
      ([B, 1, N, V] in query's dtype, the cache with the token added). Without a window, out is NaN past max_length.
    """
    check_type("cache", cache, DotProductCache, "init_local_linear_cache")
    check_cached_step(query, key, value, cache.key, cache.value)
    _check_probe(probe, query)
    dtype = accumulator_dtype(query, probe, key, value)
    scaled = default_scale(scale, query.shape[-1]) * query.astype(dtype)
    cache, used, fits = append(cache, key, value, window)
    attention = cached_weights(scaled, cache.key, cache.value, used)
    probe = probe.astype(dtype).reshape(probe.shape[0], key.shape[2], -1, probe.shape[-1])
    out = attention.value_mean() - attention.value_covariance(probe)
    return jnp.where(fits, out.reshape(*query.shape[:3], -1), jnp.nan).astype(query.dtype), cache
