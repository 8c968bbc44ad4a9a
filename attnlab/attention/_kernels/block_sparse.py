"""Block-sparse attention as banded flash attention: where blocks are whole tiles, lists are the kernel's."""

import functools
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from attnlab.attention import masks
from attnlab.attention._kernels.backends import gpu_refusal, on_backends
from attnlab.attention._kernels.banded import banded_attention, banded_refusal
from attnlab.attention._kernels.dot_product import mask_lists, mask_refusal

Array = jax.Array
_UNSEEN, _FULL = -2, -1
_LANES = 128  # of a TPU: its tiles are multiples
_MOST_OF_A_TILE = 512  # queries or keys, on a TPU


def _call(
    backend: str,
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

    pattern = functools.partial(_pattern, query.shape[1], key.shape[1], sizes, is_causal, mask, backend)
    return banded_attention(
        blocked, query, key, value, segments, scale=scale, pattern=pattern, lists=blocks, backend=backend
    )


def _tile(backend: str, sizes: Any) -> tuple[int, int]:
    """Queries and keys of a tile; blocks that are no multiples are the only ones."""
    if backend == "tpu":
        of_block = (math.gcd(_MOST_OF_A_TILE, size) if size % _LANES == 0 else _LANES for size in sizes)
        return tuple(of_block)  # type: ignore[return-value]
    from kernels_pallas.gpu.band import TILE

    return TILE, TILE


def _pattern(
    queries: int, keys: int, sizes: Any, is_causal: bool, mask: masks.Mask | None, backend: str, blocks: Array
) -> Any:
    """The kernel's lists of tiles: each block's tiles, and of each tile which of its pairs are seen."""
    from kernels_pallas.patterns import BlockLists

    tile = _tile(backend, sizes)
    table, bank = _seen_of_tiles(queries, keys, is_causal, mask, tile)
    row_tiles, column_tiles = (-(-size // of_tile) for size, of_tile in zip(sizes, tile))
    is_block = (blocks >= 0) & (blocks < -(-keys // sizes.key))
    tiles = blocks[..., None] * column_tiles + lax.broadcasted_iota(jnp.int32, (1, 1, 1, 1, column_tiles), 4)
    tiles = jnp.where(is_block[..., None] & (tiles < table.shape[1]), tiles, -1).reshape(*blocks.shape[:-1], -1)
    tiles = jnp.repeat(tiles, row_tiles, axis=2)[:, :, : table.shape[0]]
    rows = jnp.arange(table.shape[0])[None, None, :, None]
    partly = jnp.where(tiles < 0, _UNSEEN, jnp.asarray(table)[rows, tiles])
    return BlockLists(jnp.where(partly == _UNSEEN, -1, tiles), partly, bank, queries, keys)


def _seen_of_tiles(
    queries: int, keys: int, is_causal: bool, mask: masks.Mask | None, tile: tuple[int, int]
) -> tuple[Any, Any]:
    """int32 [tiles of queries, tiles of keys]: nothing seen, all, or the number of a tile of the bank; and the bank."""
    table = np.full((-(-queries // tile[0]), -(-keys // tile[1])), _FULL, np.int32)
    if mask is not None:
        lists = mask_lists(queries, keys, is_causal, mask, tile)
        table[:] = _UNSEEN
        rows, places = np.nonzero(lists.columns[0, 0] >= 0)
        table[rows, lists.columns[0, 0, rows, places]] = lists.partly[0, 0, rows, places]
        return table, lists.bank
    if not is_causal:
        return table, np.zeros((0, *tile), np.int8)
    first_query, first_key = (index * size for index, size in zip(np.indices(table.shape), tile))
    table[first_key >= first_query + tile[0]] = _UNSEEN
    is_edge = (table == _FULL) & (first_key + tile[1] - 1 > first_query)
    offsets, table[is_edge] = np.unique((first_query - first_key)[is_edge], return_inverse=True)
    return table, np.stack([np.tri(*tile, offset, np.int8) for offset in offsets])


def _refusal(
    backend: str,
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
    if backend == "gpu" and (reason := gpu_refusal()) is not None:
        return reason
    if block_bias is not None:
        return "has no block_bias"
    if blocks.shape[-1] == 0:
        return "needs lists that are not empty"
    queries, keys = query.shape[1], key.shape[1]
    if (sizes.query % _LANES and sizes.query < queries) or (sizes.key % _LANES and sizes.key < keys):
        return f"serves blocks of multiples of {_LANES} tokens, got {sizes.query} and {sizes.key}"
    if blocks.shape[1] not in (1, key.shape[2]):
        return f"serves lists of key heads, {key.shape[2]}, got lists of {blocks.shape[1]} heads"
    from kernels_pallas.patterns import BlockLists

    tile = _tile(backend, sizes)
    if mask is not None and (reason := mask_refusal(queries, keys, is_causal, mask, tile)) is not None:
        return reason
    _, bank = _seen_of_tiles(queries, keys, is_causal, mask, tile)
    places = blocks.shape[-1] * -(-sizes.key // tile[1])
    columns = jax.ShapeDtypeStruct((*blocks.shape[:2], -(-queries // tile[0]), places), jnp.int32)
    pattern = BlockLists(columns, columns, bank, queries, keys)
    return banded_refusal(query, key, value, segments, pattern, backend)


KERNELS = on_backends(_call, _refusal)
