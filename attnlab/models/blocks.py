"""The residual block that every model stacks, and mixers by layer."""

import math
from collections.abc import Sequence
from typing import Any

import jax
from flax import nnx

from attnlab.nn.layers import GatedMLP, RMSNorm, dropout
from attnlab.nn.mixers import MixerCache, MixerFactory


class Block(nnx.Module):
    """x += mixer(norm x); x += mlp(norm x). Dropout on both branches."""

    def __init__(
        self, features: int, mixer: MixerFactory, *, is_causal: bool, mlp_hidden: int, dropout_rate: float, dtype: Any
    ):
        self.mixer_norm = RMSNorm(features)
        self.mixer = mixer(features, is_causal=is_causal, dtype=dtype)
        self.mlp_norm = RMSNorm(features)
        self.mlp = GatedMLP(features, mlp_hidden, dtype=dtype)
        self.features, self.mlp_hidden, self.dropout_rate = features, mlp_hidden, dropout_rate

    def __call__(self, x: jax.Array, *, segment_ids: jax.Array | None, key: jax.Array | None) -> jax.Array:
        mixer_key, mlp_key = (None, None) if key is None else jax.random.split(key)
        mixed = self.mixer(self.mixer_norm(x), segment_ids=segment_ids, is_training=key is not None)
        x = x + dropout(mixed, self.dropout_rate, mixer_key)
        return x + dropout(self.mlp(self.mlp_norm(x)), self.dropout_rate, mlp_key)

    def step(self, cache: MixerCache, x: jax.Array) -> tuple[jax.Array, MixerCache]:
        mixed, cache = self.mixer.step(cache, self.mixer_norm(x))
        x = x + mixed
        return x + self.mlp(self.mlp_norm(x)), cache

    def flops(self, space: tuple[int, ...]) -> int:
        return self.mixer.flops(space) + 6 * math.prod(space) * self.features * self.mlp_hidden


def stack(
    mixers: Sequence[MixerFactory],
    *,
    depth: int,
    features: int,
    is_causal: bool,
    mlp_hidden: int | None,
    dropout_rate: float,
    dtype: Any,
) -> nnx.List:
    """`depth` blocks; layer i has mixers[i mod len(mixers)]. mlp_hidden None: 8/3 of features, in multiples of 8."""
    if not mixers:
        raise ValueError("mixers: got an empty list; need at least one mixer, repeated over the layers")
    if depth < 1:
        raise ValueError(f"depth: got {depth}; need at least 1")
    hidden = -(-features * 8 // 24) * 8 if mlp_hidden is None else mlp_hidden
    return nnx.List(
        Block(
            features,
            mixers[layer % len(mixers)],
            is_causal=is_causal,
            mlp_hidden=hidden,
            dropout_rate=dropout_rate,
            dtype=dtype,
        )
        for layer in range(depth)
    )


def run(
    blocks: nnx.List, x: jax.Array, *, segment_ids: jax.Array | None, key: jax.Array | None, remat: bool
) -> jax.Array:
    """Applies the blocks in turn. remat: keep only each block's input for the backward and compute the rest again."""

    def apply(block: Block, x: jax.Array, key: jax.Array | None) -> jax.Array:
        return block(x, segment_ids=segment_ids, key=key)

    for layer, block in enumerate(blocks):
        block_key = None if key is None else jax.random.fold_in(key, layer)
        # nnx's remat, for what a block's buffers learn comes out beside x.
        x = (nnx.remat(apply) if remat else apply)(block, x, block_key)
    return x
