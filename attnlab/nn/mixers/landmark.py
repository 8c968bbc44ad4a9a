"""Kernels between all positions by way of a few landmarks."""

import math
from typing import Any

import jax

import attnlab.attention as attention
from attnlab.attention._shared.checks import check_bool, check_choice, check_float, check_ints
from attnlab.attention.landmark import INVERSES, KERNELS, STEPS
from attnlab.nn.mixers.base import Attention

Array = jax.Array


class LandmarkAttention(Attention):
    """Every position of an image sees every other by way of landmarks, pooled queries: attention.landmark_attention.

    SOFT's layer also takes its queries as keys and has a convolution, which is `residual_convolution` here.

    Args:
      landmarks: (p, r) pools them from the queries on a grid of p x r.
      kernel: "gaussian" (SOFT) or "softmax" (Nystromformer).
      inverse, ridge, symmetric: of the kernel between landmarks, as in landmark_attention.
    """

    has_causal_form = False
    segments_refusal = "has landmarks that gather from all positions, so packed documents cannot be kept apart"

    def __init__(
        self,
        features: int,
        *,
        landmarks: tuple[int, int],
        kernel: str = "gaussian",
        inverse: str = "newton",
        ridge: float = 0.0,
        symmetric: bool = False,
        **shared: Any,
    ):
        super().__init__(features, **shared)
        rows, columns = check_ints("landmarks", landmarks, layout=("rows", "columns"))
        self.landmarks = (rows, columns)
        self.kernel = check_choice("kernel", kernel, KERNELS)
        self.inverse = check_choice("inverse", inverse, INVERSES)
        self.ridge = check_float("ridge", ridge, least=0)
        self.symmetric = check_bool("symmetric", symmetric)

    def mix(self, query: Array, key: Array, value: Array, x: Array, segment_ids: Array | None) -> Array:
        if query.ndim != 5:
            raise ValueError(
                f"landmarks: got the grid {self.landmarks} for {query.ndim - 3} space axes; pooling needs 2"
            )
        return attention.landmark_attention(
            query,
            key,
            value,
            attention.pool_agents(query, self.landmarks),
            kernel=self.kernel,
            inverse=self.inverse,
            ridge=self.ridge,
            symmetric=self.symmetric,
            implementation=self.implementation,
        )

    def mechanism_flops(self, space: tuple[int, ...]) -> int:
        positions, count = math.prod(space), math.prod(self.landmarks)
        pairs = positions * count
        # Between landmarks: the kernel, its inverse, and that times what they have gathered.
        steps = 2 * STEPS if self.inverse == "newton" else 1
        between = 2 * count**2 * (self.head_dim + self.value_dim + steps * count)
        return self.pair_flops(2 * pairs) + self.num_heads * between
