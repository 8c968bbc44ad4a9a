"""Softmax attention to blocks of keys, the less they matter the more of them seen as one."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np

import attnlab.attention as attention
from attnlab.attention import block_selection
from attnlab.attention._shared.checks import check_dividing_blocks, check_fractions, check_group_sizes, check_int
from attnlab.nn.mixers.base import Attention, flat

Array = jax.Array


class PyramidAttention(Attention):
    """Blocks of queries attend to blocks of keys, those with the best mean keys token by token and others by means of
    more and more tokens: attention.pyramid_attention with the levels of attention.block_selection.pooled_levels.

    Causal, a block's first query ranks the blocks that end before it, and the block's own are seen token by token. Not
    causal, a block's mean query ranks all, of images in raster order.

    Args:
      query_block, key_block: positions in a block; one of them divides the other.
      sizes: how many positions are seen as one, 1 first; each divides key_block.
      fractions: one per size, growing: the share of blocks that get this size or a smaller one.
      first: how many of the sequence's first blocks are seen token by token.
    """

    segments_refusal = "ranks the blocks of all documents"

    def __init__(
        self,
        features: int,
        *,
        query_block: int = 1,
        key_block: int,
        fractions: Sequence[float],
        sizes: Sequence[int] = (1, 2, 4, 8),
        first: int = 1,
        **attention: Any,
    ):
        super().__init__(features, **attention)
        self.query_block = check_int("query_block", query_block, least=1)
        self.key_block, self.first = check_int("key_block", key_block, least=1), check_int("first", first, least=0)
        self.sizes = check_group_sizes(sizes, self.key_block)
        self.fractions = check_fractions(fractions, len(self.sizes))
        if self.is_causal:
            check_dividing_blocks(self.query_block, self.key_block)

    @classmethod
    def is_for_grids(cls, options: Mapping[str, Any]) -> bool:
        return super().is_for_grids({name: x for name, x in options.items() if name not in ("sizes", "fractions")})

    @property
    def _rule(self) -> dict[str, Any]:
        return {
            "query_block": self.query_block,
            "sizes": self.sizes,
            "fractions": self.fractions,
            "first": self.first,
        }

    def _places(self, key_blocks: int) -> tuple[int, ...]:
        own = max(1, self.query_block // self.key_block) if self.is_causal else 0
        return block_selection.pyramid_places(key_blocks, fractions=self.fractions, listed=self.first + own)

    def mix(self, query: Array, key: Array, value: Array, x: Array, segment_ids: Array | None) -> Array:
        shape, (query, key, value) = query.shape, (flat(heads) for heads in (query, key, value))
        options: dict[str, Any] = {"key_block": self.key_block, "is_causal": self.is_causal}
        levels = block_selection.pooled_levels(query, key, **self._rule, **options)
        out = attention.pyramid_attention(
            query,
            key,
            value,
            levels,
            query_block=self.query_block,
            sizes=self.sizes,
            places=self._places(levels.shape[-1]),
            **options,
            implementation=self.implementation,
        )
        return out.reshape(*shape[:-1], value.shape[-1])

    def init_mechanism_cache(self, batch: int, max_length: int) -> Any:
        return attention.init_pyramid_cache(
            batch,
            max_length,
            self.num_key_heads,
            self.head_dim,
            key_block=self.key_block,
            sizes=self.sizes,
            value_dim=self.value_dim,
            dtype=self.dtype,
        )

    def mechanism_prefill(
        self, cache: Any, query: Array, key: Array, value: Array, x: Array, lengths: Array | None
    ) -> tuple[Array, Any]:
        cache = attention.prefill_pyramid_cache(cache, query, key, value, **self._rule, lengths=lengths)
        return self.mix(query, key, value, x, None), cache

    def mechanism_step(self, cache: Any, query: Array, key: Array, value: Array, x: Array) -> tuple[Array, Any]:
        return attention.pyramid_step(cache, query, key, value, **self._rule)

    def mechanism_flops(self, space: tuple[int, ...]) -> int:
        """With the products of the blocks' queries and keys, by which they are ranked."""
        length = math.prod(space)
        starts = np.arange(0, length, self.query_block)
        ends = np.minimum(starts + self.query_block, length)
        key_blocks = -(-length // self.key_block)
        complete = starts // self.key_block if self.is_causal else np.full_like(starts, key_blocks)
        first = np.minimum(self.first, complete)
        ranks = np.ceil((complete - first)[:, None] * np.asarray(self.fractions)[None] - 1e-9)
        coarse = np.diff(ranks, axis=1, prepend=0) @ (self.key_block / np.asarray(self.sizes))
        seen = first * self.key_block + coarse
        if self.is_causal:
            within = (ends * (ends + 1) - starts * (starts + 1)) // 2 - complete * self.key_block * (ends - starts)
            pairs = seen * (ends - starts) + within
        else:
            pairs = np.minimum(seen, length) * (ends - starts)
        choosing = 2 * len(starts) * key_blocks * self.num_key_heads * self.head_dim
        return self.pair_flops(int(pairs.sum())) + choosing
