"""States of fixed size, one per power of two of the distance."""

import math
from typing import Any

import jax
import jax.numpy as jnp

import attnlab.attention as attention
from attnlab.attention._shared.checks import check_int
from attnlab.nn.layers import Linear, RMSNorm, along
from attnlab.nn.mixers.base import Attention
from attnlab.nn.mixers.linear import gate_bias, softplus_decay
from attnlab.nn.parameters import normal, parameter, zeros

Array = jax.Array


class LogLinearAttention(Attention):
    """A state per power of two of the distance, read by scales computed from the input: attention.log_linear_attention.

    Tokens have a gate each as in Mamba-2, log decay = -exp(a) softplus(w x + b); level scales are softplus(W x + c),
    1 to begin with; heads' outputs are RMS-normalised.

    Args:
      levels: L, for 2^(L-1) tokens: that of the longest training sequence, and more to decode further than it.
    """

    segments_refusal = "counts levels from the row's first token, so packed documents cannot be kept apart"

    def __init__(self, features: int, *, levels: int = 16, rotary: bool = False, **shared: Any):
        super().__init__(features, rotary=rotary, **shared)
        if not self.is_causal:
            raise ValueError("is_causal: got False; LogLinearAttention is causal")
        self.levels = check_int("levels", levels, least=1, most=32)
        self.gate = Linear(features, self.num_heads, initializer=normal(0.02))
        self.gate_bias = parameter((self.num_heads,), gate_bias)
        self.log_rate = parameter((self.num_heads,), zeros)
        self.scales = Linear(features, (self.num_heads, self.levels), initializer=normal(0.02))
        self.scales_bias = parameter((self.num_heads, self.levels), _of_one)
        self.output_norm = RMSNorm(self.value_dim)

    def _gates(self, x: Array) -> dict[str, Any]:
        """What both the call and the step pass on, for x [B, T, D]."""
        x = x.astype(jnp.float32)
        _, log_decay = softplus_decay(self.gate(x), self.gate_bias[...], self.log_rate[...])
        scales = self.scales(x)
        scales = jax.nn.softplus(scales + along(self.scales_bias[...], scales))
        return {"log_decay": log_decay, "level_scales": scales}

    def mix(self, query: Array, key: Array, value: Array, x: Array, segment_ids: Array | None) -> Array:
        return attention.log_linear_attention(query, key, value, implementation=self.implementation, **self._gates(x))

    def finish(self, out: Array, value: Array, x: Array) -> Array:
        return self.output_norm(out)

    def init_mechanism_cache(self, batch: int, max_length: int) -> Any:
        dtype = jnp.promote_types(self.dtype, jnp.float32)
        return attention.init_log_linear_cache(
            batch, self.num_heads, self.levels, self.head_dim, self.value_dim, dtype=dtype
        )

    def mechanism_prefill(
        self, cache: Any, query: Array, key: Array, value: Array, x: Array, lengths: Array | None
    ) -> tuple[Array, Any]:
        return attention.log_linear_attention(
            query,
            key,
            value,
            initial_state=cache,
            return_state=True,
            lengths=lengths,
            implementation=self.implementation,
            **self._gates(x),
        )

    def mechanism_step(self, cache: Any, query: Array, key: Array, value: Array, x: Array) -> tuple[Array, Any]:
        return attention.log_linear_step(cache, query, key, value, **self._gates(x))

    def mechanism_flops(self, space: tuple[int, ...]) -> int:
        # A token writes k v^T into one level, and reads q^T S from all.
        return 2 * (1 + self.levels) * math.prod(space) * self.num_heads * self.head_dim * self.value_dim


def _of_one(key: Array, shape: tuple[int, ...], dtype: Any) -> Array:
    """softplus^-1 of 1."""
    return jnp.full(shape, math.log(math.e - 1), dtype)
