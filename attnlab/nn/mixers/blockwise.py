"""What sees a sequence by its blocks: the last token of each, or its own whole and the others in a state."""

import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

import attnlab.attention as attention
from attnlab.attention import masks
from attnlab.attention._shared.checks import check_array, check_int, check_type, require
from attnlab.attention._shared.heads import repeat_key_heads
from attnlab.nn.layers import Linear, along
from attnlab.nn.mixers.base import Attention, flat
from attnlab.nn.mixers.memory import slow_decay
from attnlab.nn.parameters import normal, parameter
from attnlab.nn.sharding import spec_of, specs_of, under_auto_axes

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


class BlockHybrid(Attention):
    """Softmax attention within each block of tokens, both ways, and a state of the blocks before (ARFlow, Hui et al.
    2025), of images in raster order:

        out_t = sum_{s in t's block} softmax_s(scale q_t . k_s) v_s + scale q_t^T S_c
        S_c = e^{g_c} S_{c-1} + sum_{s in the block before c} k_s v_s^T

    attention.local_attention with window = stride = block, and attention.memory_attention per chunk. The log decay g of
    a block is the mean of -softplus(w . x + b) over the tokens of the one before, b being -4 at first. A token sees all
    of its block and nothing of later ones: not causal by token, so it decodes block by block, by `block_step`.

    Args:
      block: tokens in a block, such as a row of an image.
    """

    has_causal_form = False
    segments_refusal = "counts its blocks from the whole input's start"

    def __init__(self, features: int, *, block: int, **shared: Any):
        super().__init__(features, **shared)
        self.block = check_int("block", block, least=1)
        self.gate = Linear(features, self.num_heads, initializer=normal(0.02))
        self.gate_bias = parameter((self.num_heads,), slow_decay)

    def _log_decay(self, x: Array) -> Array:
        """[B, T, D] -> [B, ceil(T / block), N]; a block that is not full has one that is not used."""
        gate = self.gate(x.astype(jnp.float32))
        log_decay = -jax.nn.softplus(gate + along(self.gate_bias[...], gate))
        log_decay = jnp.pad(log_decay, ((0, 0), (0, -x.shape[1] % self.block), (0, 0)))
        return log_decay.reshape(x.shape[0], -1, self.block, self.num_heads).mean(2)

    def _attend(self, query: Array, key: Array, value: Array, log_decay: Array, **options: Any) -> tuple[Array, Any]:
        """Heads [B, T, N|K, H] -> (out [B, T, N, V], the state after them)."""
        block = min(self.block, query.shape[1])
        near = attention.local_attention(
            query, key, value, window=block, stride=block, edge="clip", implementation=self.implementation
        )
        dtype = log_decay.dtype
        far, state = attention.memory_attention(
            query * self.head_dim**-0.5,
            key,
            value,
            {"w": jnp.zeros((self.num_heads, self.head_dim, value.shape[-1]), dtype)},
            rate=jnp.ones(query.shape[:3], dtype),
            objective="dot",
            log_decay=log_decay,
            per="chunk",
            chunk_size=self.block,
            return_state=True,
            **options,
        )
        return near + far, state

    def mix(self, query: Array, key: Array, value: Array, x: Array, segment_ids: Array | None) -> Array:
        log_decay = self._log_decay(x.reshape(x.shape[0], -1, x.shape[-1]))
        out, _ = self._attend(flat(query), flat(key), flat(value), log_decay)
        return out.reshape(*query.shape[:-1], value.shape[-1])

    @property
    def decoding_refusal(self) -> str:
        return "BlockHybrid: a token's output depends on its whole block; decode by block_step, a block at a time"

    def init_block_cache(self, batch: int) -> attention.MemoryState:
        """The state before the first block."""
        dtype = jnp.promote_types(self.dtype, jnp.float32)
        nothing = {"w": jnp.zeros((self.num_heads, self.head_dim, self.value_dim), dtype)}
        return attention.init_memory_cache(batch, nothing, per="chunk", chunk_size=self.block, dtype=dtype)

    @under_auto_axes(lambda self, cache, x: (spec_of(x), specs_of(cache)))
    def block_step(self, cache: attention.MemoryState, x: Array) -> tuple[Array, attention.MemoryState]:
        """The next block of a sequence x [B, block, D] -> (y [B, block, D], cache), as the call gives it there."""
        check_type("cache", cache, attention.MemoryState, "init_block_cache")
        check_array("x", x, (None, self.block, self.features), "[batch, block, features]")
        given = "some" if self.residual_convolution is not None else ""
        require(not given, "residual_convolution", given, "must be 0 to decode, as it reaches into the next block")
        positions = cache.position.reshape(-1, 1, 1) + jnp.arange(self.block, dtype=jnp.int32)[None, :, None]
        query, key, value, _ = self._heads(x, positions, None)
        out, cache = self._attend(query, key, value, self._log_decay(x), initial_state=cache)
        return self.output(out), cache

    def mechanism_flops(self, space: tuple[int, ...]) -> int:
        full, rest = divmod(math.prod(space), self.block)
        of_state = 4 * math.prod(space) * self.num_heads * self.head_dim * self.value_dim
        return self.pair_flops(full * self.block**2 + rest**2) + of_state
