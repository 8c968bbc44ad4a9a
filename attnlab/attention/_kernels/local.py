"""Local and dilated attention as banded flash attention: one axis as it lies, several cut into tiles of space."""

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from attnlab.attention import masks
from attnlab.attention._kernels.backends import on_backends
from attnlab.attention._kernels.banded import MOST_TOKENS, banded_attention, banded_refusal
from attnlab.attention._shared.softmax import with_sink_logits
from attnlab.attention._shared.tiles import Tiles, cut_tiles, join_tiles

Array = jax.Array

# Positions along each side of the kernels' tiles in several axes.
_KERNEL_TILE = {
    "tpu": {2: (16, 16), 3: (8, 8, 4)},
    "gpu": {2: (16, 8), 3: (4, 4, 8)},
}


@dataclasses.dataclass(frozen=True)
class _Layout:
    """How the kernels see the positions: residue groups behind each other, each padded to whole tiles, all in one axis.

    tiles: per axis, without boxes of keys. axes: the windows.
    """

    axes: tuple[masks.AxisWindow, ...]
    tiles: list[Tiles]

    def cut(self, x: Array) -> Array:
        """[B, *space, ...] -> [B, tokens, ...], 0 in the padding."""
        x = jnp.moveaxis(cut_tiles(x, self.tiles), 0, 1)
        return x.reshape(x.shape[0], -1, *x.shape[3:])

    def join(self, x: Array) -> Array:
        """The inverse of cut."""
        size = math.prod(t.size for t in self.tiles)
        by_tile = jnp.moveaxis(x.reshape(x.shape[0], -1, size, *x.shape[2:]), 1, 0)
        return join_tiles(by_tile, self.tiles, [axis.length for axis in self.axes])

    def pattern(self, sinks: int) -> Any:
        from kernels_pallas.patterns import Boxes, Intervals

        lengths = [len(t.query) * t.size for t in self.tiles]
        bounds = [functools.partial(_bounds, *pair) for pair in zip(self.axes, self.tiles, strict=True)]
        if len(self.axes) == 1:
            return Intervals(bounds[0], lengths[0], lengths[0], sinks)
        return Boxes(tuple(zip(bounds, lengths, strict=True)), tuple(t.size for t in self.tiles))


def _bounds(axis: masks.AxisWindow, tiles: Tiles, position: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The positions start <= s < end that each one sees, on the reordered axis."""
    padded = len(tiles.query) // tiles.groups * tiles.size
    residue, index = position // padded, position % padded
    length = axis.group_length(residue)
    starts, ends = axis.group_bounds(np.minimum(index, length - 1), length)  # padding copies a group's last position
    return starts + residue * padded, ends + residue * padded


def _layout(backend: str, space: Any, **settings: Any) -> _Layout:
    axes = masks.axis_windows(space, **settings)
    tiles = []
    for axis, side in zip(axes, _KERNEL_TILE[backend].get(len(axes), (None,)), strict=True):
        group_length = axis.group_length(0)
        size = side or group_length  # intervals need no alignment
        in_group = np.arange(-(-group_length // size)) * size
        residue, first = np.repeat(np.arange(axis.dilation), len(in_group)), np.tile(in_group, axis.dilation)
        tiles.append(Tiles(size, 0, axis.dilation, group_length, axis.group_length(residue), residue, first, first))
    return _Layout(axes, tiles)


def _call(
    backend: str,
    xla: Callable[..., Any],
    query: Array,
    key: Array,
    value: Array,
    segment_ids: Array | None,
    sink_logits: Array | None = None,
    *,
    scale: Any,
    softcap: float | None,
    sinks: int,
    **settings: Any,
) -> tuple[Array, Array]:
    layout = _layout(backend, query.shape[1:-2], **settings)

    options: Any = {"softcap": softcap, "sinks": sinks, **settings}

    def blocked(query: Array, key: Array, value: Array, pair: Any, scale: Any) -> Any:
        query, key, value = map(layout.join, (query, key, value))
        ids = None if pair is None else layout.join(pair[0])
        return tuple(map(layout.cut, xla(query, key, value, ids, scale=scale, **options)))

    ids = None if segment_ids is None else (layout.cut(segment_ids),) * 2
    query, key, value = map(layout.cut, (query, key, value))
    of_call: Any = {"scale": scale, "softcap": softcap, "pattern": layout.pattern(sinks), "backend": backend}
    out, lse = banded_attention(blocked, query, key, value, ids, **of_call)
    return with_sink_logits(layout.join(out), layout.join(lse), sink_logits)


def _refusal(
    backend: str,
    query: Array,
    key: Array,
    value: Array,
    segment_ids: Array | None,
    sink_logits: Array | None = None,
    *,
    scale: Any,
    softcap: float | None,
    sinks: int,
    **settings: Any,
) -> str | None:
    if sinks and query.ndim > 4:
        return f"has no sinks on {query.ndim - 3} axes"
    positions = math.prod(query.shape[1:-2])
    if positions > MOST_TOKENS:
        return f"serves up to {MOST_TOKENS} tokens, got {positions}"
    layout = _layout(backend, query.shape[1:-2], **settings)
    query, key, value = jax.eval_shape(lambda *x: tuple(map(layout.cut, x)), query, key, value)
    ids = None if segment_ids is None else (jax.eval_shape(layout.cut, segment_ids),) * 2
    return banded_refusal(query, key, value, ids, layout.pattern(sinks), backend, softcap=softcap)


KERNELS = on_backends(_call, _refusal)
