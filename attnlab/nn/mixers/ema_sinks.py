"""Softmax attention to a window of chunks and to a sink that averages what leaves it."""

import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import attnlab.attention as attention
from attnlab.attention._shared.checks import check_float, check_int
from attnlab.nn.mixers.base import Attention, flat

Array = jax.Array


class EmaSinksAttention(Attention):
    """The newest chunks of positions are seen, and the moving average of those before them:
    attention.ema_sinks_attention.

    Not causal, a chunk is seen whole by its own positions and by none before it, of images in raster order.

    Args:
      chunk: positions in a chunk.
      chunks_kept: chunks that are seen, the sink and the own one among them; at least 2.
      decay: 0 to 1, what stays of the sink when a chunk goes into it.
    """

    segments_refusal = "has one sink, of all documents"

    def __init__(self, features: int, *, chunk: int = 1, chunks_kept: int, decay: float, **attention: Any):
        super().__init__(features, **attention)
        self.chunk, self.chunks_kept = (
            check_int("chunk", chunk, least=1),
            check_int("chunks_kept", chunks_kept, least=2),
        )
        self.decay = check_float("decay", decay, least=0, most=1)

    def mix(self, query: Array, key: Array, value: Array, x: Array, segment_ids: Array | None) -> Array:
        shape, (query, key, value) = query.shape, (flat(heads) for heads in (query, key, value))
        out = attention.ema_sinks_attention(
            query,
            key,
            value,
            chunk=self.chunk,
            chunks_kept=self.chunks_kept,
            decay=self.decay,
            is_causal=self.is_causal,
            implementation=self.implementation,
        )
        return out.reshape(*shape[:-1], value.shape[-1])

    def init_mechanism_cache(self, batch: int, max_length: int) -> Any:
        return attention.init_ema_sinks_cache(
            batch,
            self.num_key_heads,
            self.head_dim,
            chunk=self.chunk,
            chunks_kept=min(self.chunks_kept, max(-(-max_length // self.chunk), 2)),
            value_dim=self.value_dim,
            dtype=jnp.promote_types(jnp.float32, self.dtype),  # of an average
        )

    def mechanism_capacity(self, cache: Any) -> int | None:
        slots = cache.key.shape[1]
        return slots if slots < self.chunk * self.chunks_kept else None

    def _cached(self, cache: Any) -> dict[str, Any]:
        return {"chunk": self.chunk, "chunks_kept": cache.key.shape[1] // self.chunk, "decay": self.decay}

    def mechanism_prefill(
        self, cache: Any, query: Array, key: Array, value: Array, x: Array, lengths: Array | None
    ) -> tuple[Array, Any]:
        cache = attention.prefill_ema_sinks_cache(cache, key, value, **self._cached(cache), lengths=lengths)
        return self.mix(query, key, value, x, None), cache

    def mechanism_step(self, cache: Any, query: Array, key: Array, value: Array, x: Array) -> tuple[Array, Any]:
        return attention.ema_sinks_step(cache, query, key, value, **self._cached(cache))

    def mechanism_flops(self, space: tuple[int, ...]) -> int:
        length = math.prod(space)
        position = np.arange(length)
        number = position // self.chunk
        last = position + 1 if self.is_causal else np.minimum((number + 1) * self.chunk, length)
        own = last - number * self.chunk
        earlier = np.minimum(number, self.chunks_kept - 1)  # the sink among them
        return self.pair_flops(int((own + earlier * self.chunk).sum()))
