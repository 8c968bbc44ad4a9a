"""The softmax over visible keys, safe where none is visible."""

from typing import Any

import jax
import jax.numpy as jnp

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
