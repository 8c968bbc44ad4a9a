"""The softmax over visible keys, safe where none is visible, and attention with all of its logits in one array."""

from typing import Any

import jax
import jax.numpy as jnp

from attnlab.attention._shared.checks import accumulator_dtype
from attnlab.attention._shared.heads import repeat_key_heads

Array = jax.Array


def softmax_parts(logits: Array, visible: Any = True) -> tuple[Array, Array, Array]:
    """Numerators [..., S], denominator [..., 1] and lse [...] of a softmax over the last axis where `visible`.

    Where no key is visible the numerators are 0, the denominator 1 and lse -inf, all with zero gradients. The maximum
    is subtracted for range alone and carries no gradient.
    """
    logits = jnp.where(visible, logits, -jnp.inf)
    largest = jax.lax.stop_gradient(jnp.max(logits, axis=-1, keepdims=True))
    largest = jnp.where(largest == -jnp.inf, 0, largest)
    numerators = jnp.exp(logits - largest)
    total = jnp.sum(numerators, axis=-1, keepdims=True)
    denominator = jnp.where(total > 0, total, 1)
    lse = jnp.where(total > 0, largest + jnp.log(denominator), -jnp.inf)
    return numerators, denominator, lse[..., 0]


def dense_attention(
    query: Array, key: Array, value: Array, *, visible: Any = True, bias: Array | None = None, scale: Any
) -> tuple[Array, Array]:
    """Attention with all logits in one array: (out [B,T,N,V], lse [B,T,N]). visible, bias: broadcast to [B,N,T,S]."""
    dtype = accumulator_dtype(query, key, value)
    key, value = (repeat_key_heads(x.astype(dtype), query.shape[2]) for x in (key, value))
    logits = jnp.asarray(scale, dtype) * jnp.einsum(
        "BTNH,BSNH->BNTS", query.astype(dtype), key, preferred_element_type=dtype
    )
    if bias is not None:
        logits = logits + bias.astype(dtype)
    numerators, denominator, lse = softmax_parts(logits, visible)
    out = jnp.einsum("BNTS,BSNV->BTNV", numerators / denominator, value, preferred_element_type=dtype)
    return out.astype(query.dtype), jnp.swapaxes(lse, 1, 2)
