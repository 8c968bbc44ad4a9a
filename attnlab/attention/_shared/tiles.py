"""Space cut into tiles: tokens reordered by residue group and tile by tile, and back."""

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

Array = jax.Array


class Tiles(NamedTuple):
    """How one axis is tiled. Arrays int32 [number of tiles], in the coordinates of the tile's residue group."""

    size: int  # queries in a tile
    box: int  # keys in a tile's box
    groups: int  # residue groups
    group_length: int  # of the longest group; on the reordered axis every group takes this much
    length: np.ndarray  # length of the tile's group
    residue: np.ndarray  # the tile's group
    query: np.ndarray  # the tile's first query
    key: np.ndarray  # the box's first key


def group_residues(x: Array, tiles: list[Tiles], first: int) -> Array:
    """Reorders space axes, which begin at `first`, by residue group: [L] -> [groups * group_length], padded with 0."""
    for axis, t in enumerate(tiles, first):
        if t.groups == 1:
            continue
        x = _pad(x, axis, t.groups * t.group_length)
        split = x.reshape(*x.shape[:axis], t.group_length, t.groups, *x.shape[axis + 1 :])
        x = jnp.swapaxes(split, axis, axis + 1).reshape(x.shape)
    return x


def _pad(x: Array, axis: int, length: int) -> Array:
    widths = [(0, 0)] * x.ndim
    widths[axis] = (0, length - x.shape[axis])
    return jnp.pad(x, widths)


def cut_tiles(x: Array, tiles: list[Tiles]) -> Array:
    """[B, *space, ...] -> [tiles, B, tile, ...], tiles and the tokens in them in row-major order, padded with 0."""
    batch, rest = x.shape[0], x.shape[1 + len(tiles) :]
    x = group_residues(x, tiles, first=1)
    for i, t in enumerate(tiles):
        axis = 1 + 2 * i  # the axes before have become (tiles, tile)
        count = len(t.query) // t.groups
        x = x.reshape(*x.shape[:axis], t.groups, t.group_length, *x.shape[axis + 1 :])
        x = _pad(x, axis + 1, count * t.size)
        x = x.reshape(*x.shape[:axis], t.groups * count, t.size, *x.shape[axis + 2 :])
    counts, sizes = range(1, 2 * len(tiles), 2), range(2, 2 * len(tiles) + 1, 2)
    x = x.transpose(*counts, 0, *sizes, *range(1 + 2 * len(tiles), x.ndim))
    return x.reshape(-1, batch, math.prod(t.size for t in tiles), *rest)


def join_tiles(x: Array, tiles: list[Tiles], space: list[int]) -> Array:
    """The inverse of cut_tiles: [tiles, B, tile, ...] -> [B, *space, ...]."""
    rank, rest = len(tiles), x.shape[3:]
    x = x.reshape(*(len(t.query) for t in tiles), x.shape[1], *(t.size for t in tiles), *rest)
    pairs = [axis for i in range(rank) for axis in (i, rank + 1 + i)]
    x = x.transpose(rank, *pairs, *range(2 * rank + 1, x.ndim))
    for axis, (t, length) in enumerate(zip(tiles, space, strict=True), 1):
        # [.., groups * count, size, ..] -> [.., groups, group_length, ..] -> [.., length, ..]
        x = x.reshape(*x.shape[:axis], t.groups, -1, *x.shape[axis + 2 :])
        x = lax.slice_in_dim(x, 0, t.group_length, axis=axis + 1)
        x = jnp.swapaxes(x, axis, axis + 1).reshape(*x.shape[:axis], -1, *x.shape[axis + 2 :])
        x = lax.slice_in_dim(x, 0, length, axis=axis)
    return x
