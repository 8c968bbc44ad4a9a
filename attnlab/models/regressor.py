"""A model of sequences of vectors, for regression in context."""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from attnlab.models import blocks
from attnlab.nn.layers import Linear, RMSNorm
from attnlab.nn.mixers import MixerFactory
from attnlab.nn.parameters import normal


class SequenceRegressor(nnx.Module):
    """The stack of a language model between two projections: vectors [B, T, channels] -> a number a place, [B, T].

    Args:
      channels: numbers in an input vector.
      mixers, depth, features, mlp_hidden, dropout_rate, remat, dtype: as in LanguageModel.
    """

    def __init__(
        self,
        *,
        channels: int,
        mixers: Sequence[MixerFactory],
        depth: int = 4,
        features: int = 128,
        mlp_hidden: int | None = None,
        dropout_rate: float = 0.0,
        remat: bool = False,
        dtype: Any = jnp.float32,
    ):
        self.channels, self.features, self.remat = channels, features, remat
        self.embedding = Linear(channels, features, use_bias=True, dtype=dtype)
        self.layers = blocks.stack(
            mixers,
            depth=depth,
            features=features,
            is_causal=True,
            mlp_hidden=mlp_hidden,
            dropout_rate=dropout_rate,
            dtype=dtype,
        )
        self.norm = RMSNorm(features)
        self.head = Linear(features, 1, use_bias=True, initializer=normal(0.02))

    def __call__(self, vectors: jax.Array, *, key: jax.Array | None = None) -> jax.Array:
        """vectors: float [B, T, channels] -> float32 [B, T], each from its place and those before. key: for dropout."""
        if vectors.ndim != 3 or vectors.shape[-1] != self.channels:
            raise ValueError(f"vectors: got {list(vectors.shape)}; need [batch, length, {self.channels}]")
        x = blocks.run(self.layers, self.embedding(vectors), segment_ids=None, key=key, remat=self.remat)
        return self.head(self.norm(x).astype(jnp.float32))[..., 0]

    def flops(self, length: int) -> int:
        """Floating-point operations of matrix products (2 a multiply-add) for one sequence, forward."""
        return sum(block.flops((length,)) for block in self.layers) + 2 * length * self.features * (self.channels + 1)

    def state_size(self, length: int) -> int:
        """Numbers kept per sequence to answer the place after `length` places."""
        return sum(block.mixer.state_size(length) for block in self.layers)
