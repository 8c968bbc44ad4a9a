"""RWKV-7's time mixing, from linear attention that erases."""

import math
from typing import Any

import jax
import jax.numpy as jnp

import attnlab.attention as attention
from attnlab.attention._shared.heads import repeat_key_heads
from attnlab.nn.layers import Linear, RMSNorm, along, unit_length
from attnlab.nn.mixers.base import Attention, flat
from attnlab.nn.parameters import ones, parameter, zeros

Array = jax.Array

_SLOWEST = math.exp(-0.5)  # A channel's log decay is above minus this, so e^-g is at most 1.83.


class RWKV7Attention(Attention):
    """The generalised delta rule of RWKV-7 (Peng et al. 2025), without its token shift and its value residual.

        S_t = diag(e^{g_t}) S_{t-1} - (a_t * kappa_t) (kappa_t^T S_{t-1}) + k~_t v_t^T        o_t = r_t^T S_t

    with r, k, v as projected, g = -e^{-1/2} sigmoid(W tanh(W' x) + b), a = sigmoid(W W' x + b), kappa = k * c of unit
    length, k~ = k * (1 + (a - 1) * d), all per head and channel, c, d and u below learned. The removal reads the state
    before its decay: linear_attention(erase=(kappa e^{-g}, a * kappa)). The heads' outputs are RMS-normalised; then the
    bonus (r . (k~ * u)) v of the token itself is added, with r and k as the matrices give them, and all is multiplied
    by a gate W sigmoid(W' x). The inner matrices W' have head_dim rows. Causal.
    """

    def __init__(self, features: int, *, rotary: bool = False, **shared: Any):
        super().__init__(features, rotary=rotary, **shared)
        if not self.is_causal:
            raise ValueError("is_causal: got False; RWKV7Attention takes tokens in their order")
        heads, rank = (self.num_heads, self.head_dim), self.head_dim
        self.decay_down, self.decay_up = Linear(features, rank), Linear(rank, heads)
        self.decay_bias = parameter(heads, _decay_bias)
        self.rate_down, self.rate_up = Linear(features, rank), Linear(rank, heads)
        self.rate_bias = parameter(heads, zeros)
        self.removal_gain = parameter(heads, ones)
        self.key_gain = parameter(heads, ones)
        self.bonus = parameter(heads, zeros)
        self.output_norm = RMSNorm(self.value_dim)
        self.gate_down = Linear(features, rank, dtype=self.dtype)
        self.gate_up = Linear(rank, (self.num_heads, self.value_dim), dtype=self.dtype)

    def _rate(self, x: Array) -> Array:
        rate = self.rate_up(self.rate_down(x.astype(jnp.float32)))
        return jax.nn.sigmoid(rate + along(self.rate_bias[...], rate))

    def _written(self, key: Array, rate: Array) -> Array:
        """k~, of keys [..., N, H]."""
        gain = along(self.key_gain[...], rate)
        return (key.astype(jnp.float32) * (1 + (rate - 1) * gain)).astype(key.dtype)

    def _recurrence(self, key: Array, value: Array, x: Array) -> dict[str, Any]:
        """What both the call and the step pass on, for x [B, T, D]."""
        decay = self.decay_up(jnp.tanh(self.decay_down(x.astype(jnp.float32))))
        log_decay = -_SLOWEST * jax.nn.sigmoid(decay + along(self.decay_bias[...], decay))
        rate = self._rate(x)
        key, value = (repeat_key_heads(heads, self.num_heads) for heads in (key, value))
        removal = unit_length(key.astype(jnp.float32) * along(self.removal_gain[...], key))
        return {
            "key": self._written(key, rate),
            "value": value,
            "log_decay": log_decay,
            "erase": (removal * jnp.exp(-log_decay), rate * removal),
            "scale": 1.0,
        }

    def mix(self, query: Array, key: Array, value: Array, x: Array, segment_ids: Array | None) -> Array:
        recurrence = self._recurrence(flat(key), flat(value), x.reshape(x.shape[0], -1, x.shape[-1]))
        out = attention.linear_attention(
            flat(query), **recurrence, segment_ids=segment_ids, implementation=self.implementation
        )
        return out.reshape(*query.shape[:-1], value.shape[-1])

    def finish(self, out: Array, value: Array, x: Array) -> Array:
        # The projections are the call's own, which XLA computes once.
        query, key = self.query(x), repeat_key_heads(self.key(x), self.num_heads)
        weights = query.astype(jnp.float32) * self._written(key, self._rate(x)).astype(jnp.float32)
        weights = jnp.sum(weights * along(self.bonus[...], weights), axis=-1, keepdims=True)
        own = (weights * repeat_key_heads(value, self.num_heads)).astype(out.dtype)
        return (self.output_norm(out) + own) * self.gate_up(jax.nn.sigmoid(self.gate_down(x)))

    def init_mechanism_cache(self, batch: int, max_length: int) -> Any:
        dtype = jnp.promote_types(self.dtype, jnp.float32)
        return attention.init_linear_cache(batch, self.num_heads, self.head_dim, self.value_dim, dtype=dtype)

    def mechanism_prefill(
        self, cache: Any, query: Array, key: Array, value: Array, x: Array, lengths: Array | None
    ) -> tuple[Array, Any]:
        return attention.linear_attention(
            query,
            **self._recurrence(key, value, x),
            initial_state=cache,
            return_state=True,
            lengths=lengths,
            implementation=self.implementation,
        )

    def mechanism_step(self, cache: Any, query: Array, key: Array, value: Array, x: Array) -> tuple[Array, Any]:
        return attention.linear_step(cache, query, **self._recurrence(key, value, x))

    def mechanism_flops(self, space: tuple[int, ...]) -> int:
        # A token reads the state, erases, writes, and reads again.
        return 8 * math.prod(space) * self.num_heads * self.head_dim * self.value_dim


def _decay_bias(key: Array, shape: tuple[int, ...], dtype: Any) -> Array:
    """A head's channels remember for about 1000 tokens, the first, down to about 10, as published."""
    return jnp.broadcast_to(jnp.linspace(-6.5, -1.5, shape[-1], dtype=dtype), shape)
