"""Softmax attention over every position."""

import math
from typing import Any

import jax

import attnlab.attention as attention
from attnlab.attention import masks
from attnlab.nn.mixers.base import Attention, flat

Array = jax.Array


class SoftmaxAttention(Attention):
    """Every position sees every other (or every earlier one): attention.dot_product_attention."""

    def mix(self, query: Array, key: Array, value: Array, x: Array, segment_ids: Array | None) -> Array:
        return self._attend(query, key, value, is_causal=self.is_causal, segment_ids=segment_ids)

    def mix_masked(self, query: Array, key: Array, value: Array, mask: masks.Mask) -> Array:
        return self._attend(query, key, value, mask=mask)

    def _attend(self, query: Array, key: Array, value: Array, **visible: Any) -> Array:
        out = attention.dot_product_attention(
            flat(query), flat(key), flat(value), **visible, implementation=self.implementation
        )
        return out.reshape(*query.shape[:-1], value.shape[-1])

    def init_mechanism_cache(self, batch: int, max_length: int) -> Any:
        return attention.init_dot_product_cache(
            batch, max_length, self.num_key_heads, self.head_dim, value_dim=self.value_dim, dtype=self.dtype
        )

    def mechanism_prefill(
        self, cache: Any, query: Array, key: Array, value: Array, x: Array, lengths: Array | None
    ) -> tuple[Array, Any]:
        cache = attention.prefill_dot_product_cache(cache, key, value, lengths=lengths)
        return self.mix(query, key, value, x, None), cache

    def mechanism_step(self, cache: Any, query: Array, key: Array, value: Array, x: Array) -> tuple[Array, Any]:
        return attention.dot_product_step(cache, query, key, value)

    def mechanism_flops(self, space: tuple[int, ...]) -> int:
        length = math.prod(space)
        return self.pair_flops(length * (length + 1) // 2 if self.is_causal else length * length)
