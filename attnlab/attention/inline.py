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
      implementation: None, "reference" (all weights, O(T S)) or "xla" (sums over keys, O(T + S)).

    Returns:
      [B, *space, N, V] in query's dtype; sums are float32 (float64 for float64 inputs).

    Raises:
      ValueError, TypeError: at trace time, naming the argument.

    Complexity of "xla": O((T + S) H V) time per head, O(T + S) memory.
    """
    check_query_key_value(query, key, value, space_ranks=(1, 2, 3), same_space=False)
    require(0 not in key.shape[1:-2], "key", shape_text(key), "need at least one key")
    factor = default_scale(scale, query.shape[-1])

    def attend(forms: Implementations, query: Array, key: Array, value: Array) -> Array:
        flat = (einops.rearrange(x, "B ... N H -> B (...) N H") for x in (query, key, value))
        out = dispatch("inline_attention", forms, implementation, *flat, scale=factor)
        return out.reshape(*query.shape[:-1], value.shape[-1])

    def parted(parts: Parts, *arrays: Array) -> Array:
        return attend(dict.fromkeys(IMPLEMENTATIONS, functools.partial(_over_parts, parts)), *arrays)

    whole = functools.partial(attend, IMPLEMENTATIONS)
    return over_positions(whole, parted, ("B*N.", "B+K.", "B+K."), "B*N.", query, key, value)


def _reference(query: Array, key: Array, value: Array, *, scale: Any) -> Array:
    dtype = accumulator_dtype(query, key, value)
    q, k, v = query.astype(dtype), *(repeat_key_heads(x.astype(dtype), query.shape[2]) for x in (key, value))
    centred = k - jnp.mean(k, axis=1, keepdims=True)
    weights = (scale * jnp.einsum("BTNH,BSNH->BNTS", q, centred) + 1) / k.shape[1]
    return jnp.einsum("BNTS,BSNV->BTNV", weights, v).astype(query.dtype)


def _xla(query: Array, key: Array, value: Array, *, scale: Any) -> Array:
    dtype = accumulator_dtype(query, key, value)
    k, v = key.astype(dtype), value.astype(dtype)
    # Centred before the product: k^T v of keys with a large common part would lose their differences.
    product = jnp.einsum("BSKH,BSKV->BKHV", k - jnp.mean(k, axis=1, keepdims=True), v) / k.shape[1]
    return _read(query, product, jnp.mean(v, axis=1), scale)


def _read(query: Array, product: Array, mean_value: Array, scale: Any) -> Array:
    """The output from the keys' means: of centred k^T v, [B, K, H, V], and of v, [B, K, V]."""
    batch, length, heads, head_dim = query.shape
    # Query heads that share a key head are a group, G.
    q = scale * query.astype(product.dtype).reshape(batch, length, product.shape[1], -1, head_dim)
    out = jnp.einsum("BTKGH,BKHV->BTKGV", q, product) + mean_value[:, None, :, None]
    return out.reshape(batch, length, heads, -1).astype(query.dtype)


def _over_parts(parts: Parts, query: Array, key: Array, value: Array, *, scale: Any) -> Array:
    """Each device's part of the queries, from sums over the keys of all. The same where all devices have all keys."""
    dtype, count = accumulator_dtype(query, key, value), parts.many * key.shape[1]
    total = functools.partial(lax.psum, axis_name=parts.names)
    spoilt = (is_spoilt(key) | is_spoilt(value)).any(1)
    finite, k, v = (finite_or_zero(query), *(finite_or_zero(x).astype(dtype) for x in (key, value)))
    centred = k - total(jnp.sum(k, axis=1, keepdims=True)) / count
    sums = jnp.einsum("BSKH,BSKV->BKHV", centred, v), jnp.sum(v, axis=1), spoilt.astype(dtype)
    product, values, spoilt_parts = as_one(total, sums)
    out = _read(finite, product / count, values / count, scale)
    return _spoil(out, query, spoilt_parts > 0)


def _spoiling(form: Callable[..., Array]) -> Callable[..., Array]:
    """The form in which a head whose keys or values are not finite gives NaN, and no NaN to another one's gradient."""

    @functools.wraps(form)
    def call(query: Array, key: Array, value: Array, *, scale: Any) -> Array:
        out = form(*map(finite_or_zero, (query, key, value)), scale=scale)
        return _spoil(out, query, (is_spoilt(key) | is_spoilt(value)).any(1))

    return call


def _spoil(out: Array, query: Array, key_heads: Array) -> Array:
    """out, NaN where the query is not finite or its key head, bool [B, K], is not."""
    heads = repeat_key_heads(key_heads[:, None, :, None], query.shape[2])[..., 0]
    return spoil(out, heads | is_spoilt(query))


IMPLEMENTATIONS: Implementations = {"reference": _spoiling(_reference), "xla": _spoiling(_xla)}
