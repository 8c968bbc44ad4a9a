"""Shapes of known models, for tables and tests of kernels."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from kernels_pallas.patterns import BlockLists, Intervals


class Shape(NamedTuple):
    """A causal sliding window in a known model's proportions."""

    length: int
    window: int
    heads: int
    key_heads: int
    head_dim: int
    dtype: Any = jnp.bfloat16

    def arrays(self) -> list[jax.ShapeDtypeStruct]:
        """query, key and value of one sequence, [1, T, N, H] and [1, T, K, H]."""
        return [self.array(heads, self.head_dim) for heads in (self.heads, self.key_heads, self.key_heads)]

    def array(self, *axes: int, dtype: Any = None) -> jax.ShapeDtypeStruct:
        """[1, T, *axes]"""
        return jax.ShapeDtypeStruct((1, self.length, *axes), dtype or self.dtype)

    def pattern(self) -> Intervals:
        return Intervals(lambda query: (query - self.window + 1, query + 1), self.length, self.length)

    def lists(self) -> BlockLists:
        """The same by lists of tiles of 128."""
        return BlockLists.of(
            lambda query, key: (key > query - self.window) & (key <= query), self.length, self.length, 128, 128
        )


SHAPES = {
    "llama-like 8k": Shape(length=8192, window=1024, heads=32, key_heads=8, head_dim=128),
    "gemma-like 8k": Shape(length=8192, window=1024, heads=16, key_heads=8, head_dim=256),
    "small model 2k": Shape(length=2048, window=256, heads=12, key_heads=12, head_dim=64),
    "ragged float32": Shape(length=1000, window=130, heads=4, key_heads=2, head_dim=80, dtype=jnp.float32),
}
