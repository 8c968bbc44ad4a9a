"""Axial attention: softmax attention along one axis of an image or video, the other axes apart.

    out[.., t, ..] = sum_s softmax_s(scale q[.., t, ..] . k[.., s, ..]) v[.., s, ..]        s along `axis` alone

A layer along every axis in turn lets each position reach every other at a cost of n^((D+1)/D) for D axes of equal
length in place of n^2. Paper: Axial Attention in Multidimensional Transformers (Ho et al. 2019).
"""

import math
from typing import Any

import jax
import jax.numpy as jnp

from attnlab.attention._dispatch.primitive import primitive
from attnlab.attention._shared.checks import check_bool, check_int, check_query_key_value, require, shape_text
from attnlab.attention.dot_product import dot_product_attention

Array = jax.Array


@primitive("B*N.", "B*N")
def axial_attention(
    query: Array,
    key: Array,
    value: Array,
    *,
    axis: int,
    is_causal: bool = False,
    scale: float | None = None,
    return_lse: bool = False,
    implementation: str | None = None,
) -> Any:
    """Attention along one space axis; every other axis is batch.

    Args:
      query: [B, *space, N, H], floating, with at least one space axis.
      key: [B, *space, K, H]; K divides N. value: [B, *space, K, V].
      axis: counted among the space axes: of images [B, Y, X, N, H], 0 is Y (a position sees its column) and 1 is X
        (its row). Negative counts from the last space axis, -1.
      is_causal: a position sees itself and those before it along the axis.
      scale: factor on the logits; None means H ** -0.5.
      return_lse: return (out, lse).
      implementation: as in dot_product_attention, which runs along the axis.

    Returns:
      out [B, *space, N, V] in query's dtype; with return_lse also lse [B, *space, N], float32 (float64 for float64
      inputs), differentiable.

    Raises:
      ValueError, TypeError: at trace time, naming the argument.

    Complexity, with n positions and length L of the axis: O(n L) time; memory O(n) for "xla", O(n L) for "reference".
    To decode along the axis, use dot_product_step with the other axes as batch.
    """
    rank = getattr(query, "ndim", 4) - 3
    check_query_key_value(query, key, value, space_ranks=range(1, max(rank, 1) + 1))
    axis, return_lse = check_int("axis", axis), check_bool("return_lse", return_lse)
    require(-rank <= axis < rank, "axis", axis, f"query {shape_text(query)} has space axes {-rank} to {rank - 1}")
    array_axis = axis % rank + 1

    def along(x: Array) -> Array:
        """[B, *space, N, H] -> [B x other axes, L, N, H]."""
        x = jnp.moveaxis(x, array_axis, -3)
        return x.reshape(math.prod(x.shape[:-3]), *x.shape[-3:])

    out, lse = dot_product_attention(
        *(along(x) for x in (query, key, value)),
        is_causal=is_causal,
        scale=scale,
        return_lse=True,
        implementation=implementation,
    )
    others = jnp.moveaxis(query, array_axis, -3).shape[:-3]
    out = jnp.moveaxis(out.reshape(*others, *out.shape[1:]), -3, array_axis)
    lse = jnp.moveaxis(lse.reshape(*others, *lse.shape[1:]), -2, array_axis)
    return (out, lse) if return_lse else out
