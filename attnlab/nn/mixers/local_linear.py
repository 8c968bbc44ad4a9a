"""Regressions around every query: local linear attention, and Parallax, whose regression is a learned probe."""

import math
from typing import Any

import jax
import jax.numpy as jnp

import attnlab.attention as attention
from attnlab.attention._shared.checks import check_float, check_int
from attnlab.nn.layers import Linear, RMSNorm, rotary_embedding
from attnlab.nn.mixers.base import Attention, flat

Array = jax.Array


class _KeyValueMixer(Attention):
    """What the two share: all keys, or a window of them, and a cache of keys and values."""

    segments_refusal = "regresses on every key of its window, so packed documents cannot be kept apart"

    def __init__(self, features: int, *, window: int | None = None, normalize_qk: bool = True, **shared: Any):
        super().__init__(features, normalize_qk=normalize_qk, **shared)
        self.window = None if window is None else check_int("window", window, least=1)

    def _within(self, length: int) -> int | None:
        return None if self.window is None else min(self.window, length)

    def _pairs(self, length: int) -> int:
        """Pairs of a query and a key that it sees."""
        window = length if self.window is None else min(self.window, length)
        if not self.is_causal:
            return length * window
        return length * window - window * (window - 1) // 2

    def init_mechanism_cache(self, batch: int, max_length: int) -> Any:
        return attention.init_local_linear_cache(
            batch,
            max_length,
            self.num_key_heads,
            self.head_dim,
            window=self._within(max_length),
            value_dim=self.value_dim,
            dtype=self.dtype,
        )

    def _prefilled(
        self, cache: Any, query: Array, key: Array, value: Array, x: Array, lengths: Array | None
    ) -> tuple[Array, Any]:
        window = self._cached_window(cache)
        cache = attention.prefill_local_linear_cache(cache, key, value, window=window, lengths=lengths)
        return self.mix(query, key, value, x, None), cache

    def mechanism_capacity(self, cache: Any) -> int | None:
        slots = cache.key.shape[1]
        return slots if self.window is None or slots < self.window else None

    def _cached_window(self, cache: Any) -> int | None:
        return None if self.window is None else cache.key.shape[1]


class LocalLinearAttention(_KeyValueMixer):
    """A weighted ridge regression of values on keys around every query: attention.local_linear_attention.

    A window longer than the input is cut to it. FLOPs are counted for max_iterations, or H where that is less.

    Args:
      ridge: its strength; 0.01 to 10 in the paper, where a large one is nearly softmax attention.
      window: keys that a query sees; None: all.
      max_iterations: of the solver.
    """

    def __init__(self, features: int, *, ridge: float = 1.0, max_iterations: int = 32, **shared: Any):
        super().__init__(features, **shared)
        self.ridge = check_float("ridge", ridge, above=0)
        self.max_iterations = check_int("max_iterations", max_iterations, least=1, most=2**31 - 1)

    def mix(self, query: Array, key: Array, value: Array, x: Array, segment_ids: Array | None) -> Array:
        out = attention.local_linear_attention(
            flat(query),
            flat(key),
            flat(value),
            ridge=self.ridge,
            is_causal=self.is_causal,
            window=self._within(math.prod(x.shape[1:-1])),
            max_iterations=self.max_iterations,
            implementation=self.implementation,
        )
        return out.reshape(*query.shape[:-1], value.shape[-1])

    mechanism_prefill = _KeyValueMixer._prefilled

    def mechanism_step(self, cache: Any, query: Array, key: Array, value: Array, x: Array) -> tuple[Array, Any]:
        return attention.local_linear_step(
            cache,
            query,
            key,
            value,
            ridge=self.ridge,
            window=self._cached_window(cache),
            max_iterations=self.max_iterations,
        )

    def mechanism_flops(self, space: tuple[int, ...]) -> int:
        pairs = self._pairs(math.prod(space)) * self.num_heads
        # A pass has two scores and two weighted sums per pair. Passes: one for kbar, one per iteration, one for values.
        passes = 1 + min(self.max_iterations, self.head_dim)
        return pairs * (8 * self.head_dim * passes + 4 * (self.head_dim + self.value_dim))


class ParallaxAttention(_KeyValueMixer):
    """Local linear attention with a learned probe in place of its regression: attention.parallax_attention.

    Args:
      window: keys that a query sees; None: all. A window longer than the input is cut to it.
    """

    def __init__(self, features: int, **shared: Any):
        super().__init__(features, **shared)
        self.probe = Linear(features, (self.num_heads, self.head_dim), dtype=self.dtype)
        self.probe_norm = RMSNorm(self.head_dim) if self.query_norm is not None else None

    def _heads(self, x: Array, positions: Array, *rest: Any) -> tuple[Array, Array, Array, Array | float]:
        """The probe is made as the query is, and follows it as further heads."""
        query, key, value, added = super()._heads(x, positions, *rest)
        probe = self.probe(x)
        probe = probe if self.probe_norm is None else self.probe_norm(probe)
        probe = rotary_embedding(probe, positions) if self.rotary else probe
        return jnp.concatenate([query, probe], axis=-2), key, value, added

    def mix(self, query: Array, key: Array, value: Array, x: Array, segment_ids: Array | None) -> Array:
        query, probe = jnp.split(query, 2, axis=-2)
        out = attention.parallax_attention(
            flat(query),
            flat(probe),
            flat(key),
            flat(value),
            is_causal=self.is_causal,
            window=self._within(math.prod(x.shape[1:-1])),
            implementation=self.implementation,
        )
        return out.reshape(*query.shape[:-1], value.shape[-1])

    mechanism_prefill = _KeyValueMixer._prefilled

    def mechanism_step(self, cache: Any, query: Array, key: Array, value: Array, x: Array) -> tuple[Array, Any]:
        query, probe = jnp.split(query, 2, axis=-2)
        return attention.parallax_step(cache, query, probe, key, value, window=self._cached_window(cache))

    def mechanism_flops(self, space: tuple[int, ...]) -> int:
        length = math.prod(space)
        # Two scores per pair and two weighted sums; the probe's projection.
        return 2 * self.pair_flops(self._pairs(length)) + 2 * length * self.features * self.num_heads * self.head_dim
