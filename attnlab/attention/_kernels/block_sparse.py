"""Block-sparse attention as banded flash attention on GPUs: where blocks are whole tiles, lists are the kernel's."""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from attnlab.attention import masks
from attnlab.attention._dispatch.choice import Kernel
from attnlab.attention._kernels.backends import gpu_refusal, on_gpu
from attnlab.attention._kernels.banded import banded_attention, banded_refusal
from attnlab.attention._kernels.dot_product import mask_lists, mask_refusal

Array = jax.Array
_UNSEEN, _FULL = -2, -1


def _call(
    xla: Callable[..., Any],
    query: Array,
    key: Array,
    value: Array,
    blocks: Array,
    block_bias: None,
    segments: Any,
    *,
    sizes: Any,
    is_causal: bool,
    mask: masks.Mask | None,
    scale: Any,
) -> tuple[Array, Array]:
    def blocked(query: Array, key: Array, value: Array, segments: Any, scale: Any, blocks: Array) -> Any:
        return xla(query, key, value, blocks, None, segments, sizes=sizes, is_causal=is_causal, mask=mask, scale=scale)

    pattern = functools.partial(_pattern, query.shape[1], key.shape[1], sizes, is_causal, mask)
    return banded_attention(
        blocked, query, key, value, segments, scale=scale, pattern=pattern, lists=blocks, backend="gpu"
    )


def _pattern(queries: int, keys: int, sizes: Any, is_causal: bool, mask: masks.Mask | None, blocks: Array) -> Any:
    """The kernel's lists of tiles: each block's tiles, and of each tile which of its pairs are seen."""
    from kernels_pallas.gpu.band import TILE
    from kernels_pallas.patterns import BlockLists

    table, bank = _seen_of_tiles(queries, keys, is_causal, mask)
    row_tiles, column_tiles = -(-sizes.query // TILE), -(-sizes.key // TILE)
    is_block = (blocks >= 0) & (blocks < -(-keys // sizes.key))
    tiles = blocks[..., None] * column_tiles + lax.broadcasted_iota(jnp.int32, (1, 1, 1, 1, column_tiles), 4)
    tiles = jnp.where(is_block[..., None] & (tiles < table.shape[1]), tiles, -1).reshape(*blocks.shape[:-1], -1)
    tiles = jnp.repeat(tiles, row_tiles, axis=2)[:, :, : table.shape[0]]
    rows = jnp.arange(table.shape[0])[None, None, :, None]
    partly = jnp.where(tiles < 0, _UNSEEN, jnp.asarray(table)[rows, tiles])
    return BlockLists(jnp.where(partly == _UNSEEN, -1, tiles), partly, bank, queries, keys)


def _seen_of_tiles(queries: int, keys: int, is_causal: bool, mask: masks.Mask | None) -> tuple[Any, Any]:
    """int32 [tiles of queries, tiles of keys]: nothing seen, all, or the number of a tile of the bank; and the bank."""
    from kernels_pallas.gpu.band import TILE

    table = np.full((-(-queries // TILE), -(-keys // TILE)), _FULL, np.int32)
    if mask is not None:
        lists = mask_lists(queries, keys, is_causal, mask)
        table[:] = _UNSEEN
        rows, places = np.nonzero(lists.columns[0, 0] >= 0)
        table[rows, lists.columns[0, 0, rows, places]] = lists.partly[0, 0, rows, places]
        return table, lists.bank
    if not is_causal:
        return table, np.zeros((0, TILE, TILE), np.int8)
    row, column = np.indices(table.shape)
    table[column > row] = _UNSEEN
    table[column == row] = 0
    return table, np.tri(TILE, dtype=np.int8)[None]


def _refusal(
    query: Array,
    key: Array,
    value: Array,
    blocks: Array,
    block_bias: Array | None,
    segments: Any,
    *,
    sizes: Any,
    is_causal: bool,
    mask: masks.Mask | None,
    scale: Any,
) -> str | None:
    from kernels_pallas.gpu.band import TILE

    if (reason := gpu_refusal()) is not None:
        return reason
    if block_bias is not None:
        return "has no block_bias"
    queries, keys = query.shape[1], key.shape[1]
    if (sizes.query % TILE and sizes.query < queries) or (sizes.key % TILE and sizes.key < keys):
        return f"serves blocks of multiples of {TILE} tokens, got {sizes.query} and {sizes.key}"
    if blocks.shape[1] not in (1, key.shape[2]):
        return f"serves lists of key heads, {key.shape[2]}, got lists of {blocks.shape[1]} heads"
    if mask is not None and (reason := mask_refusal(queries, keys, is_causal, mask)) is not None:
        return reason
    one_place = jnp.zeros((*blocks.shape[:3], 1), jnp.int32)
    pattern = _pattern(queries, keys, sizes, is_causal, mask, one_place)
    return banded_refusal(query, key, value, segments, pattern, "gpu")


KERNELS: dict[str, Kernel] = {"pallas_gpu": on_gpu(_call, _refusal)}
