"""Dilated local attention: a window of every d-th token.

    out_t = sum_{s in window(t), s = t mod d} softmax_s(scale q_t . k_s) v_s

On every axis the tokens fall into d residue groups; each is a sequence (image, video) of its own, in which the windows
of local attention apply, with their strides and causality. Paper: Dilated Neighborhood Attention (Hassani & Shi 2022).
"""

from typing import Any

import jax

from attnlab.attention import masks
from attnlab.attention.local import windowed_attention

Array = jax.Array


def dilated_attention(
    query: Array,
    key: Array,
    value: Array,
    *,
    window: int | tuple[int, ...],
    dilation: int | tuple[int, ...],
    stride: int | tuple[int, ...] = 1,
    is_causal: bool | tuple[bool, ...] = False,
    edge: masks.Edge = "shift",
    scale: float | None = None,
    segment_ids: Array | None = None,
    return_lse: bool = False,
    implementation: str | None = None,
) -> Any:
    """Local attention within residue groups. As local_attention, but for:

    Args:
      dilation: a query sees keys whose coordinate equals its own modulo this, along each axis; one value or one per
        axis. window * dilation may not exceed the axis' length.
      window, stride: counted in tokens of the residue group.

    The rest, what is returned and raised, and the complexity: see local_attention.
    """
    out, lse = windowed_attention(
        "dilated_attention",
        query,
        key,
        value,
        segment_ids,
        window=window,
        stride=stride,
        dilation=dilation,
        is_causal=is_causal,
        edge=edge,
        sinks=0,
        scale=scale,
        implementation=implementation,
    )
    return (out, lse) if return_lse else out
