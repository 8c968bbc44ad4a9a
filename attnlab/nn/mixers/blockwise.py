"""What sees a sequence by its blocks: the last token of each."""

import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

import attnlab.attention as attention
from attnlab.attention import masks
from attnlab.attention._shared.checks import check_int
from attnlab.attention._shared.heads import repeat_key_heads
from attnlab.nn.mixers.base import Attention

Array = jax.Array


class CheckpointCache(NamedTuple):
    """checkpoints: the keys and values of the last tokens of full segments. position: int32 [] or [B], the next
    token's."""

    checkpoints: attention.DotProductCache
    position: Array


class CheckpointAttention(Attention):
    """A token sees itself and the last token of every segment before it (SCOUT, Jafari et al. 2025): softmax over
    s = t, and s < t with s + 1 a multiple of `segment`. Causal; after a layer that mixes a segment's tokens, such as a
    window, so that its last token speaks for it.

    attention.dot_product_attention over every segment-th key, merged with the token itself: O(T^2 / segment) time, and
    a cache of T / segment keys and values.
    """

    segments_refusal = "counts its segments from the whole input's start"

    def __init__(self, features: int, *, segment: int, **shared: Any):
        super().__init__(features, **shared)
        if not self.is_causal:
            raise ValueError("is_causal: got False; need True, as a token sees the segments before it")
        self.segment = check_int("segment", segment, least=1)

    def _last_tokens(self, x: Array) -> Array:
        """[B, T, ...] -> [B, T // segment, ...]."""
        return x[:, self.segment - 1 :: self.segment]

    def mix(self, query: Array, key: Array, value: Array, x: Array, segment_ids: Array | None) -> Array:
        segment = self.segment
        before = attention.dot_product_attention(
            query,
            self._last_tokens(key),
            self._last_tokens(value),
            mask=masks.Mask(lambda query, key: (key[0] + 1) * segment <= query[0]),
            return_lse=True,
            implementation=self.implementation,
        )
        key, value = (repeat_key_heads(heads, self.num_heads) for heads in (key, value))
        own = jnp.einsum("BTNH,BTNH->BTN", query, key, preferred_element_type=before[1].dtype)
        return attention.merge_attention(*zip(before, (value, own * self.head_dim**-0.5)))[0]

    def init_mechanism_cache(self, batch: int, max_length: int) -> CheckpointCache:
        # One more, for the token itself.
        checkpoints = attention.init_dot_product_cache(
            batch,
            max_length // self.segment + 1,
            self.num_key_heads,
            self.head_dim,
            value_dim=self.value_dim,
            dtype=self.dtype,
        )
        return CheckpointCache(checkpoints, jnp.zeros((), jnp.int32))

    def mechanism_prefill(
        self, cache: CheckpointCache, query: Array, key: Array, value: Array, x: Array, lengths: Array | None
    ) -> tuple[Array, CheckpointCache]:
        batch, length = query.shape[:2]
        position = jnp.asarray(length, jnp.int32) if lengths is None else lengths
        count = position // self.segment
        to_full = ((0, 0), (0, -length % self.segment), (0, 0), (0, 0))
        last = (self._last_tokens(jnp.pad(heads, to_full)) for heads in (key, value))
        filled = attention.prefill_dot_product_cache(
            cache.checkpoints, *last, lengths=jnp.broadcast_to(count, (batch,))
        )
        return self.mix(query, key, value, x, None), CheckpointCache(filled._replace(length=count), position)

    def mechanism_step(
        self, cache: CheckpointCache, query: Array, key: Array, value: Array, x: Array
    ) -> tuple[Array, CheckpointCache]:
        out, after = attention.dot_product_step(cache.checkpoints, query, key, value)
        position = cache.position + 1
        is_last = position % self.segment == 0

        def kept(new: Array, old: Array) -> Array:
            return jnp.where(is_last.reshape(is_last.shape + (1,) * (new.ndim - 1) * is_last.ndim), new, old)

        return out, CheckpointCache(jax.tree.map(kept, after, cache.checkpoints), position)

    def mechanism_flops(self, space: tuple[int, ...]) -> int:
        full, rest = divmod(math.prod(space), self.segment)
        return self.pair_flops(self.segment * full * (full - 1) // 2 + rest * full + math.prod(space))
