"""Grouped heads: N query heads share K key heads, and query head n reads key head n // (N / K)."""

import jax
import jax.numpy as jnp


def repeat_key_heads(x: jax.Array, heads: int) -> jax.Array:
    """Keys or values [..., K, H] -> [..., N, H], each key head once per query head that reads it."""
    return jnp.repeat(x, heads // x.shape[-2], axis=-2)
