"""Weights that are a function of one logit each."""

import math
from typing import Any

import jax

import attnlab.attention as attention
from attnlab.attention._shared.checks import check_bool, check_choice
from attnlab.attention.pointwise import ACTIVATIONS
from attnlab.nn.mixers.base import Attention, flat

Array = jax.Array


class PointwiseAttention(Attention):
    """Every position adds up every other's (or every earlier one's) value by a weight of its own:
    attention.pointwise_attention.

    Args:
      activation: of the logits, "sigmoid", "relu" or "exp".
      divide: by the number of positions seen; without it outputs grow with the length.
    """

    segments_refusal = "has no form that keeps packed documents apart"

    def __init__(self, features: int, *, activation: str = "sigmoid", divide: bool = True, **shared: Any):
        super().__init__(features, **shared)
        self.activation = check_choice("activation", activation, tuple(ACTIVATIONS))
        self.divide = check_bool("divide", divide)

    def mix(self, query: Array, key: Array, value: Array, x: Array, segment_ids: Array | None) -> Array:
        out = attention.pointwise_attention(
            flat(query),
            flat(key),
            flat(value),
            activation=self.activation,
            is_causal=self.is_causal,
            divide=self.divide,
            implementation=self.implementation,
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
        return attention.pointwise_step(cache, query, key, value, activation=self.activation, divide=self.divide)

    def mechanism_flops(self, space: tuple[int, ...]) -> int:
        length = math.prod(space)
        return self.pair_flops(length * (length + 1) // 2 if self.is_causal else length * length)
