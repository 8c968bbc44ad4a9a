"""Softmax attention whose positions are transitions computed from the input."""

import math
from typing import Any

import jax
import jax.numpy as jnp

import attnlab.attention as attention
from attnlab.attention._shared.checks import check_bool
from attnlab.attention._shared.chunks import segment_starts
from attnlab.nn.layers import Linear, unit_length
from attnlab.nn.mixers.base import Attention
from attnlab.nn.parameters import normal

Array = jax.Array

_RANK = 32  # of the two matrices that compute transitions, as published
_CHUNK = 64  # attention.path_attention's


class PathAttention(Attention):
    """Softmax attention through Householder-like transitions in place of rotary positions: attention.path_attention.

    Transitions are unit vectors W W' x, W' of 32 rows, of strength beta = 2 sigmoid(w x). The published layer has a
    short convolution between the two matrices and the norm, which this one has not.

    Args:
      forget: with a forget gate per token and head, log gate = logsigmoid(w x + b) (PaTH-FoX).
    """

    def __init__(self, features: int, *, forget: bool = False, rotary: bool = False, **shared: Any):
        super().__init__(features, rotary=rotary, **shared)
        if not self.is_causal:
            raise ValueError("is_causal: got False; PathAttention is causal")
        self.transition_down = Linear(features, _RANK)
        self.transition = Linear(_RANK, (self.num_heads, self.head_dim))
        self.strength = Linear(features, self.num_heads, initializer=normal(0.02))
        has_gate = check_bool("forget", forget)
        self.gate = Linear(features, self.num_heads, use_bias=True, initializer=normal(0.02)) if has_gate else None

    def _transitions(self, x: Array, segment_ids: Array | None = None) -> dict[str, Any]:
        """What the call, the prompt and the step pass on, for x [B, T, D]."""
        x = x.astype(jnp.float32)
        transition = unit_length(self.transition(self.transition_down(x)))
        log_forget = None if self.gate is None else jax.nn.log_sigmoid(self.gate(x))
        beta = 2 * jax.nn.sigmoid(self.strength(x))
        if segment_ids is not None:  # a document forgets those before it
            log_forget = jnp.zeros_like(beta) if log_forget is None else log_forget
            log_forget = jnp.where(segment_starts(segment_ids)[..., None], -jnp.inf, log_forget)
        return {"transition": transition, "beta": beta, "log_forget": log_forget}

    def mix(self, query: Array, key: Array, value: Array, x: Array, segment_ids: Array | None) -> Array:
        given = self._transitions(x, segment_ids)
        return attention.path_attention(
            query, key, value, **given, chunk_size=_CHUNK, implementation=self.implementation
        )

    def init_mechanism_cache(self, batch: int, max_length: int) -> Any:
        return attention.init_path_cache(
            batch,
            max_length,
            self.num_heads,
            self.num_key_heads,
            self.head_dim,
            value_dim=self.value_dim,
            dtype=jnp.promote_types(self.dtype, jnp.float32),
        )

    def mechanism_prefill(
        self, cache: Any, query: Array, key: Array, value: Array, x: Array, lengths: Array | None
    ) -> tuple[Array, Any]:
        cache = attention.prefill_path_cache(cache, key, value, **self._transitions(x), lengths=lengths)
        return self.mix(query, key, value, x, None), cache

    def mechanism_step(self, cache: Any, query: Array, key: Array, value: Array, x: Array) -> tuple[Array, Any]:
        return attention.path_step(cache, query, key, value, **self._transitions(x))

    def mechanism_flops(self, space: tuple[int, ...]) -> int:
        length = math.prod(space)
        chunks = -(-length // _CHUNK)
        # Queries of each chunk go back over those before it.
        carried = chunks * (chunks - 1) // 2 * _CHUNK * self.num_heads * self.head_dim**2
        transitions = length * _RANK * (self.features + self.num_heads * self.head_dim)
        return self.pair_flops(length * (length + 1) // 2) + 2 * (carried + transitions)
