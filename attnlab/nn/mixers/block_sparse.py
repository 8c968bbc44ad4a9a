"""Softmax attention to the blocks of keys that a block of queries chooses."""

import math
from abc import abstractmethod
from typing import Any

import jax
import numpy as np
from einops import rearrange

import attnlab.attention as attention
from attnlab.attention import block_selection
from attnlab.attention._shared.checks import check_dividing_blocks, check_int, check_ints, per_axis, require
from attnlab.attention._shared.heads import repeat_key_heads
from attnlab.nn.mixers.base import Attention, flat

Array = jax.Array


class ChosenBlocks(Attention):
    """Blocks of queries attend to the blocks of keys that `lists` gives: attention.block_sparse_attention.

    A subclass calls `choose_blocks` when it is made. Causal, queries of lists see no later key than themselves.
    """

    segments_refusal = "chooses among the blocks of all documents"

    def choose_blocks(self, query_block: int, key_block: int, count: int) -> None:
        """Sets, after checks, the positions in a block, and how many blocks are chosen."""
        self.query_block = check_int("query_block", query_block, least=1)
        self.key_block = check_int("key_block", key_block, least=1)
        self.count = check_int("count", count, least=1)
        if self.is_causal:
            check_dividing_blocks(self.query_block, self.key_block)

    def queries_of_blocks(self, query: Array) -> Array:
        """[B, query blocks, N, H], what chooses for a block: causal its first query, not causal the mean one."""
        return block_selection.pool_blocks(query, self.query_block, "first" if self.is_causal else "mean")

    @abstractmethod
    def lists(self, query: Array, key: Array, space: tuple[int, ...]) -> Array:
        """int32 [B, N | K, query blocks, M], the key blocks that query blocks see, of heads [B, T, N|K, H].

        space: of the T tokens, in raster order.
        """

    @abstractmethod
    def choosing_flops(self, query_blocks: int, key_blocks: int) -> int:
        """Floating-point operations of `lists`, for one example."""

    def mix(self, query: Array, key: Array, value: Array, x: Array, segment_ids: Array | None) -> Array:
        shape, (query, key, value) = query.shape, (flat(heads) for heads in (query, key, value))
        out = attention.block_sparse_attention(
            query,
            key,
            value,
            self.lists(query, key, shape[1:-2]),
            query_block=self.query_block,
            key_block=self.key_block,
            is_causal=self.is_causal,
            implementation=self.implementation,
        )
        return out.reshape(*shape[:-1], value.shape[-1])

    def mechanism_flops(self, space: tuple[int, ...]) -> int:
        """With what choosing takes."""
        length = math.prod(space)
        starts = np.arange(0, length, self.query_block)
        ends = np.minimum(starts + self.query_block, length)
        key_blocks = -(-length // self.key_block)
        if self.is_causal:
            complete = starts // self.key_block
            within = (ends * (ends + 1) - starts * (starts + 1)) // 2 - complete * self.key_block * (ends - starts)
            pairs = np.minimum(self.count, complete) * self.key_block * (ends - starts) + within
        else:
            pairs = min(self.count * self.key_block, length) * (ends - starts)
        return self.pair_flops(int(pairs.sum())) + self.choosing_flops(len(starts), key_blocks)


class StrictBlocks(ChosenBlocks):
    """ChosenBlocks that decode, by attention.block_sparse_step."""

    @abstractmethod
    def rule(self) -> dict[str, Any]:
        """How a query block's first query chooses: the options of attention.block_sparse_step."""

    def cache_sizes(self) -> dict[str, int]:
        """What attention.init_block_sparse_cache has to know of the rule."""
        return {}

    def init_mechanism_cache(self, batch: int, max_length: int) -> Any:
        return attention.init_block_sparse_cache(
            batch,
            max_length,
            self.num_key_heads,
            self.head_dim,
            key_block=self.key_block,
            count=self.count,
            **self.cache_sizes(),
            value_dim=self.value_dim,
            dtype=self.dtype,
        )

    def mechanism_prefill(
        self, cache: Any, query: Array, key: Array, value: Array, x: Array, lengths: Array | None
    ) -> tuple[Array, Any]:
        options = {"query_block": self.query_block, **self.rule()}
        cache = attention.prefill_block_sparse_cache(cache, query, key, value, **options, lengths=lengths)
        return self.mix(query, key, value, x, None), cache

    def mechanism_step(self, cache: Any, query: Array, key: Array, value: Array, x: Array) -> tuple[Array, Any]:
        return attention.block_sparse_step(cache, query, key, value, query_block=self.query_block, **self.rule())


class BlockSparseAttention(StrictBlocks):
    """Blocks of queries attend to the blocks of keys with the best mean keys, chosen for every key head:
    attention.block_sparse_attention with the lists of attention.block_selection.pooled_blocks.

    Causal, a block's first query chooses among the blocks that end before it, and the block's own are seen besides. Not
    causal, a block's mean query chooses among all, of images in raster order.

    Args:
      query_block, key_block: positions in a block; one of them divides the other.
      count: blocks that are chosen, of causal ones besides the own.
      first: how many of them are the sequence's first.
    """

    def __init__(
        self, features: int, *, query_block: int = 1, key_block: int, count: int, first: int = 1, **attention: Any
    ):
        super().__init__(features, **attention)
        self.choose_blocks(query_block, key_block, count)
        self.first = check_int("first", first, least=0)

    def lists(self, query: Array, key: Array, space: tuple[int, ...]) -> Array:
        return block_selection.pooled_blocks(
            query,
            key,
            query_block=self.query_block,
            key_block=self.key_block,
            count=self.count,
            first=self.first,
            is_causal=self.is_causal,
        )

    def choosing_flops(self, query_blocks: int, key_blocks: int) -> int:
        return 2 * query_blocks * key_blocks * self.num_key_heads * self.head_dim

    def rule(self) -> dict[str, Any]:
        return {"rule": "mean", "first": self.first}


class RegionAttention(Attention):
    """Every region of an image attends to the regions whose mean keys fit its mean query best, chosen for all heads
    together: BiFormer's bi-level routing (Zhu et al. 2023), attention.block_sparse_attention with a block per region.

    The released model adds a 5 x 5 convolution of the values (residual_convolution=(5, 5)), and its scale on the logits
    is (num_heads head_dim)^-1/2; here it is head_dim^-1/2.

    Args:
      regions: how many along each axis of the image; they divide it.
      count: regions that each attends to, itself among them only if it fits.
    """

    has_causal_form = False
    segments_refusal = "has regions of the whole input"

    def __init__(self, features: int, *, regions: int | tuple[int, ...], count: int, **shared: Any):
        super().__init__(features, **shared)
        self.regions, self.count = check_ints("regions", regions), check_int("count", count, least=1)

    def _split(self, space: tuple[int, ...]) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """Regions along each axis, and the positions of one."""
        regions = per_axis("regions", self.regions, len(space))
        fits = all(length % many == 0 for length, many in zip(space, regions))
        require(fits, "regions", self.regions, f"must divide the space {space}")
        return regions, tuple(length // many for length, many in zip(space, regions))

    def mix(self, query: Array, key: Array, value: Array, x: Array, segment_ids: Array | None) -> Array:
        regions, sides = self._split(query.shape[1:-2])
        names = [f"r{axis}" for axis in range(len(regions))], [f"s{axis}" for axis in range(len(sides))]
        grid = " ".join(f"({many} {side})" for many, side in zip(*names))
        pattern = f"B {grid} N H", f"B ({' '.join(names[0] + names[1])}) N H"
        sizes = dict(zip(names[0], regions)) | dict(zip(names[1], sides))
        query, key, value = (rearrange(heads, " -> ".join(pattern), **sizes) for heads in (query, key, value))
        size = math.prod(sides)
        together = (x.reshape(*x.shape[:2], 1, -1) for x in (query, repeat_key_heads(key, self.num_heads)))
        lists = block_selection.pooled_blocks(
            *together, query_block=size, key_block=size, count=self.count, first=0, is_causal=False
        )
        out = attention.block_sparse_attention(
            query, key, value, lists, query_block=size, key_block=size, implementation=self.implementation
        )
        return rearrange(out, " -> ".join(pattern[::-1]), **sizes)

    def mechanism_flops(self, space: tuple[int, ...]) -> int:
        """With the products of the regions' queries and keys."""
        regions, sides = self._split(space)
        many, size = math.prod(regions), math.prod(sides)
        choosing = 2 * many**2 * self.num_heads * self.head_dim
        return self.pair_flops(math.prod(space) * min(self.count, many) * size) + choosing
