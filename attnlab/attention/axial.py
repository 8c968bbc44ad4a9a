"""Axial attention: softmax attention along one axis of an image or video, the other axes apart.

    out[.., t, ..] = sum_s softmax_s(scale q[.., t, ..] . k[.., s, ..] + bias_ts) v[.., s, ..]    s along `axis` alone

A layer along every axis in turn lets each position reach every other at a cost of n^((D+1)/D) for D axes of equal
length in place of n^2. Paper: Axial Attention in Multidimensional Transformers (Ho et al. 2019).
"""

import functools
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from attnlab.attention._dispatch.exchange import (
    Parts,
    as_one,
    over_positions,
    own_positions,
    whole_positions,
    whole_space,
)
from attnlab.attention._dispatch.primitive import primitive
from attnlab.attention._shared.checks import (
    check_array,
    check_bool,
    check_floating,
    check_int,
    check_query_key_value,
    require,
    shape_text,
)
from attnlab.attention.dot_product import dot_product_attention

Array = jax.Array


@primitive("B*N.", "B*N")
def axial_attention(
    query: Array,
    key: Array,
    value: Array,
    *,
    axis: int,
    bias: Array | None = None,
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
      bias: floating [N|1, L|1, L|1] with L the length of the axis, added to the scaled logits of every line, such as
        one of relative positions t - s. Whole where devices share the axis.
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
    if bias is not None:
        length = whole_space(query.shape[1:-2])[axis]
        check_array("bias", bias, (None,) * 3, "[heads|1, L|1, L|1]")
        check_floating("bias", bias)
        sizes = query.shape[-2], length, length
        fits = all(got in (1, want) for got, want in zip(bias.shape, sizes))
        require(fits, "bias", shape_text(bias), f"need [heads|1, L|1, L|1] of {list(sizes)} along axis {axis}")

    attend = functools.partial(
        dot_product_attention, is_causal=is_causal, scale=scale, return_lse=True, implementation=implementation
    )
    results = ("B*N.", "B*N") if return_lse else ("B*N.",)
    whole, parted = (functools.partial(form, attend, array_axis, len(results)) for form in (_whole, _parted))
    of_bias = None if bias is None else ("." if len(bias) == 1 else "N") + ".."
    out, *lse = over_positions(whole, parted, ("B*N.", "B*K.", "B*K.", of_bias), results, query, key, value, bias)
    return (out, *lse) if return_lse else out


# (query [B, L, N, H], key, value, bias=[1, N|1, L|1, L|1] or None) -> (out [B, L, N, V], lse [B, L, N])
_Attend = Callable[..., tuple[Array, Array]]


def _whole(
    attend: _Attend, axis: int, count: int, query: Array, key: Array, value: Array, bias: Array | None
) -> tuple[Array, ...]:
    """The first `count` of (out, lse) along an axis of the arrays."""

    def along(x: Array) -> Array:
        """[B, *space, N, H] -> [B x other axes, L, N, H]."""
        x = jnp.moveaxis(x, axis, -3)
        return x.reshape(math.prod(x.shape[:-3]), *x.shape[-3:])

    out, lse = attend(along(query), along(key), along(value), bias=None if bias is None else bias[None])
    others = jnp.moveaxis(query, axis, -3).shape[:-3]
    out = jnp.moveaxis(out.reshape(*others, *out.shape[1:]), -3, axis)
    lse = jnp.moveaxis(lse.reshape(*others, *lse.shape[1:]), -2, axis)
    return (out, lse)[:count]


def _parted(
    attend: _Attend, axis: int, count: int, parts: Parts, query: Array, key: Array, value: Array, bias: Array | None
) -> tuple[Array, ...]:
    """Along the axis that is shared, each device attends in whole lines, of its share of other axes and key heads; with
    a bias that heads differ in, of other axes alone."""
    if axis != parts.axis + 1:
        return _whole(attend, axis, count, query, key, value, bias)
    heads, apart = query.shape[-2], key.shape[-2] if bias is None or len(bias) == 1 else 1
    *others, own, _, _ = jnp.moveaxis(query, axis, -3).shape
    lines = math.prod(others) * apart

    def along(x: Array) -> Array:
        """[B, *space, N, H] -> [B x other axes x groups of heads, own part of L, heads of one x H]."""
        x = jnp.moveaxis(x, axis, -3)
        x = jnp.moveaxis(x.reshape(*others, own, apart, -1), -2, -3)
        return x.reshape(lines, own, x.shape[-1])

    def back(x: Array) -> Array:
        """[share of lines, L, heads of a group, V] -> [B, *space, N, V]."""
        x = own_positions(x.reshape(*x.shape[:2], -1), lines, parts)
        x = jnp.moveaxis(x.reshape(*others, apart, own, -1), -3, -2)
        return jnp.moveaxis(x.reshape(*others, own, heads, -1), -3, axis)

    arrays = as_one(functools.partial(whole_positions, parts=parts), [along(x) for x in (query, key, value)])
    per_head = (query.shape[-1], key.shape[-1], value.shape[-1])
    rows = (x.reshape(*x.shape[:2], -1, width) for x, width in zip(arrays, per_head))
    out, lse = attend(*rows, bias=None if bias is None else bias[None])
    if count == 1:
        return (back(out),)
    if out.dtype != lse.dtype:
        return back(out), back(lse[..., None])[..., 0]
    both = back(jnp.concatenate([out, lse[..., None]], axis=-1))
    return both[..., :-1], both[..., -1]
