"""Softmax attention whose weights are scaled and shifted."""

import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

import attnlab.attention as attention
from attnlab.attention._shared.checks import check_float
from attnlab.attention._shared.heads import repeat_key_heads
from attnlab.nn.layers import Linear
from attnlab.nn.mixers.base import Attention
from attnlab.nn.parameters import normal

Array = jax.Array


class AffineScaledCache(NamedTuple):
    """tokens: keys and values. total: [B, K, V], the sum of the values. average: [B, N], of alpha at the next token."""

    tokens: attention.DotProductCache
    total: Array
    average: Array


class AffineScaledAttention(Attention):
    """Weights alpha_t (p_ts - 1 / n_t) + m_t / n_t over the n_t keys that token t sees, p being softmax attention's
    (Bae et al. 2026):

        out_t = alpha_t sum_s p_ts v_s + (m_t - alpha_t) mean_{s <= t} v_s
        alpha_t = 2 sigmoid(w . x_t)        m_t = decay m_{t-1} + (1 - decay) alpha_{t-1},  m_0 = 1

    so that a token may take nothing of the keys, or differences between them. m averages the tokens before, per head.
    Causal. Decoding keeps the sum of the values beside the keys.

    Args:
      decay: of the average, 0 to 1.
    """

    segments_refusal = "averages its scales over all documents"

    def __init__(self, features: int, *, decay: float = 0.99, **shared: Any):
        super().__init__(features, **shared)
        if not self.is_causal:
            raise ValueError("is_causal: got False; need True, as the scales are averaged over earlier tokens")
        self.decay = check_float("decay", decay, least=0, most=1)
        self.scales = Linear(features, self.num_heads, initializer=normal(0.02))

    def _scales(self, x: Array) -> Array:
        """alpha, [B, T, N]."""
        return 2 * jax.nn.sigmoid(self.scales(x.astype(jnp.float32)))

    def _averages(self, alpha: Array) -> Array:
        """m at every token and after the last, [B, T + 1, N]."""

        def both(first: tuple[Array, Array], second: tuple[Array, Array]) -> tuple[Array, Array]:
            return first[0] * second[0], second[0] * first[1] + second[1]

        first = jnp.ones_like(alpha[:, :1])
        added = jnp.concatenate([first, (1 - self.decay) * alpha], axis=1)
        kept = jnp.full_like(added, self.decay)
        return jax.lax.associative_scan(both, (kept, added), axis=1)[1]

    def _combined(self, attended: Array, mean: Array, alpha: Array, average: Array) -> Array:
        """attended, mean [B, T, N, V]; alpha, average [B, T, N]."""
        return (alpha[..., None] * attended + (average - alpha)[..., None] * mean).astype(attended.dtype)

    def _attend(self, query: Array, key: Array, value: Array, alpha: Array, average: Array) -> Array:
        attended = attention.dot_product_attention(
            query, key, value, is_causal=True, implementation=self.implementation
        )
        wide = repeat_key_heads(value, self.num_heads).astype(alpha.dtype)
        count = jnp.arange(1, value.shape[1] + 1, dtype=alpha.dtype)[None, :, None, None]
        return self._combined(attended, jnp.cumsum(wide, axis=1) / count, alpha, average)

    def mix(self, query: Array, key: Array, value: Array, x: Array, segment_ids: Array | None) -> Array:
        alpha = self._scales(x)
        return self._attend(query, key, value, alpha, self._averages(alpha)[:, :-1])

    def init_mechanism_cache(self, batch: int, max_length: int) -> AffineScaledCache:
        tokens = attention.init_dot_product_cache(
            batch, max_length, self.num_key_heads, self.head_dim, value_dim=self.value_dim, dtype=self.dtype
        )
        dtype = jnp.promote_types(self.dtype, jnp.float32)
        total = jnp.zeros((batch, self.num_key_heads, self.value_dim), dtype)
        return AffineScaledCache(tokens, total, jnp.ones((batch, self.num_heads), jnp.float32))

    def mechanism_prefill(
        self, cache: AffineScaledCache, query: Array, key: Array, value: Array, x: Array, lengths: Array | None
    ) -> tuple[Array, AffineScaledCache]:
        alpha = self._scales(x)
        averages = self._averages(alpha)
        out = self._attend(query, key, value, alpha, averages[:, :-1])
        count = jnp.full(x.shape[0], x.shape[1]) if lengths is None else lengths
        is_token = (jnp.arange(x.shape[1])[None] < count[:, None])[..., None, None]
        total = jnp.sum(jnp.where(is_token, value, 0).astype(cache.total.dtype), axis=1)
        average = jnp.take_along_axis(averages, count[:, None, None], axis=1)[:, 0]
        tokens = attention.prefill_dot_product_cache(cache.tokens, key, value, lengths=lengths)
        return out, AffineScaledCache(tokens, total, average)

    def mechanism_step(
        self, cache: AffineScaledCache, query: Array, key: Array, value: Array, x: Array
    ) -> tuple[Array, AffineScaledCache]:
        attended, tokens = attention.dot_product_step(cache.tokens, query, key, value)
        alpha, total = self._scales(x), cache.total + value[:, 0].astype(cache.total.dtype)
        mean = repeat_key_heads(total, self.num_heads) / tokens.length.reshape(-1, 1, 1)
        out = self._combined(attended, mean[:, None], alpha, cache.average[:, None])
        average = self.decay * cache.average + (1 - self.decay) * alpha[:, 0]
        return out, AffineScaledCache(tokens, total, average)

    def mechanism_flops(self, space: tuple[int, ...]) -> int:
        length = math.prod(space)
        return self.pair_flops(length * (length + 1) // 2)
