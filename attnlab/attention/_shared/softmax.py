"""The softmax over visible keys, safe where none is visible, and attention with all of its logits in one array."""

from typing import Any

import jax
import jax.numpy as jnp

from attnlab.attention._shared.checks import accumulator_dtype
from attnlab.attention._shared.finite import finite_or_zero, is_spoilt, spoil, spoilt_tokens
from attnlab.attention._shared.heads import repeat_key_heads

Array = jax.Array


def softmax_parts(logits: Array, visible: Any = True) -> tuple[Array, Array, Array]:
    """Numerators [..., S], denominator [..., 1] and lse [...] of a softmax over the last axis where `visible`.

    Where no key is visible the numerators are 0, the denominator 1 and lse -inf, all with zero gradients. The maximum
    is subtracted for range alone and carries no gradient.
    """
    logits = jnp.where(visible, logits, -jnp.inf)
    largest = jax.lax.stop_gradient(jnp.max(logits, axis=-1, keepdims=True, initial=-jnp.inf))
    largest = jnp.where(largest == -jnp.inf, 0, largest)
    numerators = jnp.exp(logits - largest)
    total = jnp.sum(numerators, axis=-1, keepdims=True)
    empty = total == 0  # False for NaN
    denominator = jnp.where(empty, 1, total)
    lse = jnp.where(empty, -jnp.inf, largest + jnp.log(denominator))
    return numerators, denominator, lse[..., 0]


def softcapped(logits: Array, softcap: float | None) -> Array:
    """softcap tanh(logits / softcap), or the logits where there is none."""
    return logits if softcap is None else softcap * jnp.tanh(logits / softcap)


def softcap_slope(capped: Array, softcap: float) -> Array:
    """The derivative of softcapped logits, from these."""
    return 1 - (capped / softcap) ** 2


def with_sink_logits(out: Array, lse: Array, sink_logits: Array | None) -> tuple[Array, Array]:
    """(out [B, *T, N, V], lse [B, *T, N]) with one key more for each head, of this logit [N] and no value.

        out' = out exp(lse - lse')        lse' = log(exp(lse) + exp(sink))

    A query that sees no key has 0 and lse' = sink; a sink of -inf changes nothing.
    """
    if sink_logits is None:
        return out, lse
    # Queries that see what is not finite count as 0, and are NaN afterwards: the sinks' gradient is a sum over all, in
    # which 0 times NaN is NaN.
    spoilt = is_spoilt(out) | ~(lse < jnp.inf)
    out, lse = jnp.where(spoilt[..., None], 0, out), jnp.where(spoilt, 0, lse)
    logits = jnp.stack([lse, jnp.broadcast_to(sink_logits.astype(lse.dtype), lse.shape)], axis=-1)
    numerators, denominator, lse = softmax_parts(logits)
    out = (numerators[..., :1] / denominator * out).astype(out.dtype)
    return spoil(out, spoilt), spoil(lse, spoilt)


def scaled_for_logits(query: Array, key: Array, scale: Any, dtype: Any) -> tuple[Array, Array]:
    """(scale query, key) in dtype, for logits q . k from which a maximum is subtracted.

    Were it the product that is scaled, XLA would contract scale * (q . k) - max into one multiply-add, and what it
    leaves of the largest logit, which should be 0, is the product's rounding error: where logits are huge, exp takes it
    to 0 or infinity. So would it the product of a single channel, which therefore gets another one, of zeros.
    """
    query, key = jnp.asarray(scale, dtype) * query.astype(dtype), key.astype(dtype)
    if query.shape[-1] == 1:
        query, key = (jnp.pad(x, [(0, 0)] * (x.ndim - 1) + [(0, 1)]) for x in (query, key))
    return query, key


def dense_attention(
    query: Array,
    key: Array,
    value: Array,
    *,
    visible: Any = True,
    bias: Array | None = None,
    scale: Any,
    softcap: float | None = None,
    sink_logits: Array | None = None,
) -> tuple[Array, Array]:
    """Attention with all logits in one array: (out [B,T,N,V], lse [B,T,N]). visible, bias: broadcast to [B,N,T,S]."""
    dtype = accumulator_dtype(query, key, value)
    query_dtype = query.dtype
    query, key = scaled_for_logits(query, key, scale, dtype)
    key, value = (repeat_key_heads(x, query.shape[2]) for x in (key, value.astype(dtype)))
    logits = softcapped(jnp.einsum("BTNH,BSNH->BNTS", query, key, preferred_element_type=dtype), softcap)
    if bias is not None:
        logits = logits + bias.astype(dtype)
    if sink_logits is not None:  # a column more, of which no value is summed
        column = jnp.broadcast_to(sink_logits.astype(dtype)[None, :, None, None], (*logits.shape[:3], 1))
        logits, visible = jnp.concatenate([jnp.where(visible, logits, -jnp.inf), column], axis=3), True
    numerators, denominator, lse = softmax_parts(logits, visible)
    weights = numerators[..., : key.shape[1]] / denominator
    out = jnp.einsum("BNTS,BSNV->BTNV", weights, value, preferred_element_type=dtype)
    return out.astype(query_dtype), jnp.swapaxes(lse, 1, 2)


def reference_attention(
    query: Array,
    key: Array,
    value: Array,
    *,
    visible: Any = True,
    bias: Array | None = None,
    **options: Any,
) -> tuple[Array, Array]:
    """dense_attention in which NaN and infinities reach the queries that see them, or hold them, and nothing else."""
    out, lse = dense_attention(*map(finite_or_zero, (query, key, value)), visible=visible, bias=bias, **options)
    of_keys = jnp.swapaxes(spoilt_tokens(key, value, query.shape[2]), 1, 2)[:, :, None]
    sees = visible if bias is None else visible & (bias != -jnp.inf)
    spoilt = (sees & of_keys).any(-1)
    spoilt = jnp.swapaxes(spoilt, 1, 2) | is_spoilt(query)
    return jnp.where(spoilt[..., None], jnp.nan, out), jnp.where(spoilt, jnp.nan, lse)
