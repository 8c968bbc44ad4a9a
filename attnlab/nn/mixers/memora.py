"""A memory of distributions that learns as it reads."""

import math
from typing import Any

import jax
import jax.numpy as jnp

import attnlab.attention as attention
from attnlab.attention._shared.checks import check_float
from attnlab.nn.layers import Linear, RMSNorm, along
from attnlab.nn.mixers.base import Attention
from attnlab.nn.mixers.memory import slow_decay, unit_silu
from attnlab.nn.parameters import normal, parameter

Array = jax.Array


class MemoraAttention(Attention):
    """A linear memory per head whose weights are distributions and learn at every token: attention.memora_attention.
    Causal.

    Queries and keys are of unit length after a silu, and the heads' outputs are RMS-normalised. The weights that each
    sequence starts from are learned; the log decay is -softplus(w x + b), b being -4 at first.

    Args:
      rate: the largest step: a token's beta is rate sigmoid(w x).
    """

    segments_refusal = "keeps what earlier documents wrote, so packed ones cannot be kept apart"

    def __init__(self, features: int, *, rate: float = 4.0, rotary: bool = False, **shared: Any):
        super().__init__(features, rotary=rotary, **shared)
        if not self.is_causal:
            raise ValueError("is_causal: got False; a memory reads what the tokens before have written")
        self.rate = check_float("rate", rate, above=0)
        self.start = parameter((self.num_heads, self.head_dim, self.value_dim), normal(1.0))
        self.strength = Linear(features, self.num_heads, initializer=normal(0.02))
        self.gate = Linear(features, self.num_heads, initializer=normal(0.02))
        self.gate_bias = parameter((self.num_heads,), slow_decay)
        self.output_norm = RMSNorm(self.value_dim)

    def _recurrence(self, query: Array, key: Array, value: Array, x: Array) -> dict[str, Any]:
        """What the call, the prompt and the step pass on, for x [B, T, D]."""
        x = x.astype(jnp.float32)
        steps = self.gate(x)
        return {
            "query": unit_silu(query),
            "key": unit_silu(key),
            "value": value,
            "beta": self.rate * jax.nn.sigmoid(self.strength(x)),
            "log_decay": -jax.nn.softplus(steps + along(self.gate_bias[...], steps)),
        }

    def _started(self, state: attention.MemoraState) -> attention.MemoraState:
        """With the learned weights where no token has come."""
        batch, dtype = state.log_weights.shape[0], state.log_weights.dtype
        start = jax.nn.log_softmax(self.start[...].astype(dtype), axis=1)[None]
        is_first = jnp.broadcast_to(state.position == 0, (batch,))[:, None, None, None]
        return state._replace(log_weights=jnp.where(is_first, start, state.log_weights))

    def mix(self, query: Array, key: Array, value: Array, x: Array, segment_ids: Array | None) -> Array:
        return attention.memora_attention(
            **self._recurrence(query, key, value, x),
            initial_state=self._started(self.init_mechanism_cache(x.shape[0], x.shape[1])),
            implementation=self.implementation,
        )

    def finish(self, out: Array, value: Array, x: Array) -> Array:
        return self.output_norm(out)

    def init_mechanism_cache(self, batch: int, max_length: int) -> attention.MemoraState:
        dtype = jnp.promote_types(self.dtype, jnp.float32)
        return attention.init_memora_cache(batch, self.num_heads, self.head_dim, self.value_dim, dtype=dtype)

    def mechanism_prefill(
        self, cache: Any, query: Array, key: Array, value: Array, x: Array, lengths: Array | None
    ) -> tuple[Array, Any]:
        return attention.memora_attention(
            **self._recurrence(query, key, value, x),
            initial_state=self._started(cache),
            return_state=True,
            lengths=lengths,
            implementation=self.implementation,
        )

    def mechanism_step(self, cache: Any, query: Array, key: Array, value: Array, x: Array) -> tuple[Array, Any]:
        return attention.memora_step(self._started(cache), **self._recurrence(query, key, value, x))

    def mechanism_flops(self, space: tuple[int, ...]) -> int:
        # The key's product, the write and the read.
        return 6 * math.prod(space) * self.num_heads * self.head_dim * self.value_dim
