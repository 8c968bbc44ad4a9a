"""A model of sequences of vectors, for regression in context."""

from typing import Any

import jax
import jax.numpy as jnp

from attnlab.attention._shared.checks import check_int
from attnlab.models.blocks import Stack
from attnlab.nn.layers import Linear
from attnlab.nn.parameters import normal
from attnlab.nn.sharding import spec_of, under_auto_axes


class SequenceRegressor(Stack):
    """A stack between two projections: vectors [B, T, channels] -> one number per position, [B, T].

    Args:
      channels: numbers in an input vector.
      stack: mixers and further options, as in attnlab.models.blocks.Stack.
    """

    def __init__(self, *, channels: int, **stack: Any):
        super().__init__(**stack)
        self.channels = channels = check_int("channels", channels, least=1)
        self.embedding = Linear(channels, self.features, use_bias=True, dtype=self.dtype)
        self.head = Linear(self.features, 1, use_bias=True, initializer=normal(0.02))

    @under_auto_axes(lambda self, vectors, **_: spec_of(vectors, 2))
    def __call__(self, vectors: jax.Array, *, key: jax.Array | None = None) -> jax.Array:
        """vectors: float [B, T, channels] -> float32 [B, T], each from its position and those before.

        key: for dropout.
        """
        if vectors.ndim != 3 or vectors.shape[-1] != self.channels:
            raise ValueError(f"vectors: got {list(vectors.shape)}; need [batch, length, {self.channels}]")
        x = self.run(self.embedding(vectors), key=key)
        return self.head(self.norm(x).astype(jnp.float32))[..., 0]

    def flops(self, length: int) -> int:
        """Floating-point operations of matrix products (2 per multiply-add) for one sequence, forward."""
        return self.stack_flops((length,)) + 2 * length * self.features * (self.channels + 1)
