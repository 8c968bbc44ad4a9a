"""Softmax attention to the keys of the largest bias, which is computed from their values."""

import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from einops import rearrange

import attnlab.attention as attention
from attnlab.attention._shared.checks import check_int
from attnlab.nn.layers import Linear, along
from attnlab.nn.mixers.base import Attention
from attnlab.nn.parameters import normal, ones, parameter

Array = jax.Array


class DynamicMaskAttention(Attention):
    """Every key head has the keys of its largest biases, which are added to their logits: DMA (Shi et al. 2025),
    attention.dynamic_mask_attention. It keeps as many keys to decode as a query sees.

    The bias of a token is exp(a softplus(W v)), of the values v of all key heads, before a convolution. The gain a of a
    key head begins at 1; in released code at 0, where all biases are equal and the first tokens stay for ever.

    Args:
      width: how many keys a query sees.
    """

    segments_refusal = "has the largest biases of all documents"

    def __init__(self, features: int, *, width: int, **shared: Any):
        super().__init__(features, **shared)
        if not self.is_causal:
            raise ValueError("is_causal: got False; DynamicMaskAttention is causal")
        self.width = check_int("width", width, least=1)
        values = self.num_key_heads * self.value_dim
        self.bias = Linear(values, self.num_key_heads, initializer=normal(0.02))  # else a few keys take all at first
        self.gain = parameter((self.num_key_heads,), ones)

    def _key_bias(self, x: Array) -> Array:
        """Of inputs [B, T, D], [B, T, K] in float32."""
        values = rearrange(self.value(x).astype(jnp.float32), "B T K V -> B T (K V)")
        gates = jax.nn.softplus(self.bias(values))
        return jnp.exp(along(self.gain[...], gates) * gates)

    def mix(self, query: Array, key: Array, value: Array, x: Array, segment_ids: Array | None) -> Array:
        return attention.dynamic_mask_attention(
            query, key, value, self._key_bias(x), width=self.width, implementation=self.implementation
        )

    def init_mechanism_cache(self, batch: int, max_length: int) -> Any:
        return attention.init_dynamic_mask_cache(
            batch,
            self.num_key_heads,
            self.head_dim,
            width=min(self.width, max_length),
            value_dim=self.value_dim,
            dtype=self.dtype,
        )

    def mechanism_capacity(self, cache: Any) -> int | None:
        slots = cache.key.shape[1]
        return slots if slots < self.width else None

    def mechanism_prefill(
        self, cache: Any, query: Array, key: Array, value: Array, x: Array, lengths: Array | None
    ) -> tuple[Array, Any]:
        cache = attention.prefill_dynamic_mask_cache(cache, key, value, self._key_bias(x), lengths=lengths)
        return self.mix(query, key, value, x, None), cache

    def mechanism_step(self, cache: Any, query: Array, key: Array, value: Array, x: Array) -> tuple[Array, Any]:
        return attention.dynamic_mask_step(cache, query, key, value, self._key_bias(x))

    def mechanism_flops(self, space: tuple[int, ...]) -> int:
        length = math.prod(space)
        pairs = np.minimum(np.arange(length) + 1, self.width).sum()
        return self.pair_flops(int(pairs)) + 2 * length * self.num_key_heads**2 * self.value_dim
