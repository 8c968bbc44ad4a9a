"""Attention along one axis at a time."""

import math
from typing import Any

import jax

import attnlab.attention as attention
from attnlab.attention._shared.checks import check_int
from attnlab.nn.mixers.base import Attention

Array = jax.Array


class AxialAttention(Attention):
    """Every position sees its own line along one space axis: attention.axial_attention. Layers take the axes in turn.

    Args:
      axis: of an image's, 0 is Y (a position sees its column), 1 or -1 is X (its row).
    """

    has_causal_form = False
    segments_refusal = "is for grids, and packed documents are sequences"

    def __init__(self, features: int, *, axis: int, **shared: Any):
        super().__init__(features, **shared)
        self.axis = check_int("axis", axis, least=-3, most=2)

    def mix(self, query: Array, key: Array, value: Array, x: Array, segment_ids: Array | None) -> Array:
        return attention.axial_attention(query, key, value, axis=self.axis, implementation=self.implementation)

    def mechanism_flops(self, space: tuple[int, ...]) -> int:
        return self.pair_flops(math.prod(space) * space[self.axis])
