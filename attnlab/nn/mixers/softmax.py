"""Softmax attention over every position."""

import math
from typing import Any

import jax

import attnlab.attention as attention
from attnlab.attention import masks
from attnlab.attention._shared.checks import check_softcap
from attnlab.nn.mixers.base import Attention, flat, on_logits, sink_logits

Array = jax.Array


class SoftmaxAttention(Attention):
    """Every position sees every other (or every earlier one): attention.dot_product_attention.

    softcap: of the logits. learned_sinks: whether each head has a key more, of a learned logit and no value.
    """

    def __init__(self, features: int, *, softcap: float | None = None, learned_sinks: bool = False, **shared: Any):
        super().__init__(features, **shared)
        self.softcap = check_softcap(softcap)
        self.sink_logits = sink_logits(learned_sinks, self.num_heads)

    def mix(self, query: Array, key: Array, value: Array, x: Array, segment_ids: Array | None) -> Array:
        return self._attend(query, key, value, is_causal=self.is_causal, segment_ids=segment_ids)

    def mix_masked(self, query: Array, key: Array, value: Array, mask: masks.Mask) -> Array:
        return self._attend(query, key, value, mask=mask)

    def _attend(self, query: Array, key: Array, value: Array, **visible: Any) -> Array:
        options = {**visible, **on_logits(self), "implementation": self.implementation}
        out = attention.dot_product_attention(flat(query), flat(key), flat(value), **options)
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
        return attention.dot_product_step(cache, query, key, value, **on_logits(self))

    def mechanism_flops(self, space: tuple[int, ...]) -> int:
        length = math.prod(space)
        return self.pair_flops(length * (length + 1) // 2 if self.is_causal else length * length)
