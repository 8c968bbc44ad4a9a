"""InLine attention: linear attention over all positions, with weights that sum to 1 and differ between queries.

    w_ts  = (1/S) (scale q_t . (k_s - kbar) + 1)        kbar the mean key; sum_s w_ts = 1, weights may be negative
    out_t = sum_s w_ts v_s = (scale / S) q_t (K^T V) + (1 - scale q_t . kbar) vbar

Not causal. The published layer adds a 3x3 depthwise convolution of v, which is not part of this function. Paper:
Bridging the Divide: Reconsidering Softmax and Linear Attention (Han et al. 2024).
"""

import functools
from collections.abc import Callable
from typing import Any

import einops
import jax
import jax.numpy as jnp
from jax import lax

from attnlab.attention._dispatch.choice import Implementations, dispatch
from attnlab.attention._dispatch.exchange import Parts, as_one, over_positions
from attnlab.attention._dispatch.primitive import primitive
from attnlab.attention._kernels import global_linear
from attnlab.attention._shared.checks import (
    accumulator_dtype,
    check_query_key_value,
    default_scale,
    require,
    shape_text,
)
from attnlab.attention._shared.finite import finite_or_zero, is_spoilt, spoil
from attnlab.attention._shared.heads import repeat_key_heads

Array = jax.Array


@primitive("B*N.")
def inline_attention(
    query: Array, key: Array, value: Array, *, scale: float | None = None, implementation: str | None = None
) -> Array:
    """Injective linear attention, not causal.

    Args:
      query: [B, *space, N, H], floating, with 1 to 3 space axes of T positions together. key: [B, *space, K, H] and
        value: [B, *space, K, V], of S >= 1 positions, which may differ from the query's; K divides N.
      scale: factor on q.k; None means H ** -0.5.
      implementation: "reference" (all weights, O(T S)), "xla" (sums over keys, O(T + S)), "pallas_tpu" (the same by
        kernels; bfloat16 or float32) or None to choose by platform.

    Returns:
      [B, *space, N, V] in query's dtype; sums are float32 (float64 for float64 inputs).

    Raises:
      ValueError, TypeError: at trace time, naming the argument.

    Complexity of "xla": O((T + S) H V) time per head, O(T + S) memory.
    """
    check_query_key_value(query, key, value, space_ranks=(1, 2, 3), same_space=False)
    require(0 not in key.shape[1:-2], "key", shape_text(key), "need at least one key")
    factor = default_scale(scale, query.shape[-1])

    def attend(parts: Parts | None, query: Array, key: Array, value: Array) -> Array:
        flat = (einops.rearrange(x, "B ... N H -> B (...) N H") for x in (query, key, value))
        out = dispatch("inline_attention", IMPLEMENTATIONS, implementation, *flat, scale=factor, parts=parts)
        return out.reshape(*query.shape[:-1], value.shape[-1])

    whole = functools.partial(attend, None)
    return over_positions(whole, attend, ("B*N.", "B+K.", "B+K."), "B*N.", query, key, value)


def _reference(query: Array, key: Array, value: Array, *, scale: Any, parts: Parts | None) -> Array:
    if parts is not None:
        return _xla(query, key, value, scale=scale, parts=parts)
    dtype = accumulator_dtype(query, key, value)
    q, k, v = (finite_or_zero(x).astype(dtype) for x in (query, key, value))
    k, v = (repeat_key_heads(x, query.shape[2]) for x in (k, v))
    centred = k - jnp.mean(k, axis=1, keepdims=True)
    weights = (scale * jnp.einsum("BTNH,BSNH->BNTS", q, centred) + 1) / k.shape[1]
    out = jnp.einsum("BNTS,BSNV->BTNV", weights, v).astype(query.dtype)
    return _spoil(out, query, (is_spoilt(key) | is_spoilt(value)).any(1))


def _by_sums(
    token_sums: Callable[[Array, Array], tuple[Array, Array]],
    times_state: Callable[[Array, Array, Array], Array],
    query: Array,
    key: Array,
    value: Array,
    *,
    scale: Any,
    parts: Parts | None,
) -> Array:
    """Of all keys, or of parts of the queries from sums over the keys of all: the same where all devices have all keys.

    token_sums: (keys [B, S, K, H], values [B, S, K, V]) -> the sums over S of k v^T and of v. times_state: (query,
      state [B, K, H, V], offset [B, K, V]) -> [B, T, N, V].
    """
    dtype = accumulator_dtype(query, key, value)

    def total(x: Array) -> Array:
        return x if parts is None else lax.psum(x, parts.names)

    count = key.shape[1] * (1 if parts is None else parts.many)
    spoilt = (is_spoilt(key) | is_spoilt(value)).any(1)
    finite, k, v = (finite_or_zero(x) for x in (query, key, value))
    k = k.astype(dtype)
    # Centred before the product: k^T v of keys with a large common part would lose their differences.
    sums = token_sums(k - total(jnp.sum(k, axis=1, keepdims=True)) / count, v)
    product, values, spoilt_parts = as_one(total, (*sums, spoilt.astype(dtype)))
    out = times_state(finite, scale * product / count, values / count)
    return _spoil(out, query, spoilt_parts > 0)


def _token_sums(key: Array, value: Array) -> tuple[Array, Array]:
    value = value.astype(key.dtype)
    return jnp.einsum("BSKH,BSKV->BKHV", key, value), jnp.sum(value, axis=1)


def _times_state(query: Array, state: Array, offset: Array) -> Array:
    batch, length, heads, head_dim = query.shape
    # Query heads that share a key head are a group, G.
    q = query.astype(state.dtype).reshape(batch, length, state.shape[1], -1, head_dim)
    out = jnp.einsum("BTKGH,BKHV->BTKGV", q, state) + offset[:, None, :, None]
    return out.reshape(batch, length, heads, -1).astype(query.dtype)


def _spoil(out: Array, query: Array, key_heads: Array) -> Array:
    """out, NaN where the query is not finite or its key head, bool [B, K], is not: no NaN to another one's gradient."""
    heads = repeat_key_heads(key_heads[:, None, :, None], query.shape[2])[..., 0]
    return spoil(out, heads | is_spoilt(query))


_xla = functools.partial(_by_sums, _token_sums, _times_state)
IMPLEMENTATIONS: Implementations = {"reference": _reference, "xla": _xla, **global_linear.kernels(_by_sums)}
