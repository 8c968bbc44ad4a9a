"""Rows of JAX's own kernels, for comparison."""

import functools
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental.pallas.ops.tpu import flash_attention as jax_flash
from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel as kernel
from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_mask as mask

from kernels_pallas.aot.compile import Grid, Row
from kernels_pallas.patterns import ACTIVE
from kernels_pallas.shapes import Shape
from kernels_pallas.tpu import banded_flash, banded_flash_backward

_FLASH_TILE = 512


def splash_call(shape: Shape, *, backward: bool) -> tuple[Callable[..., Any], list[jax.ShapeDtypeStruct]]:
    """JAX's own kernel for the same window, with the tiles that ours take, and its arrays, [N, T, H]; its mask counts
    keys before."""
    block_q, block_k = _tiles(shape, backward=backward)
    sizes: Any = {"block_q": block_q, "block_kv": block_k, "block_kv_compute": block_k}
    if backward:
        ours = {"block_q_dkv": block_q, "block_kv_dkv": block_k, "block_kv_dkv_compute": block_k}
        sizes |= ours | {"block_q_dq": block_q, "block_kv_dq": block_k}
    causal_window = mask.LocalMask((shape.length, shape.length), window_size=(shape.window - 1, 0), offset=0)
    make = kernel.make_splash_mqa_single_device if shape.key_heads == 1 else kernel.make_splash_mha_single_device
    attend = make(mask.MultiHeadMask([causal_window] * shape.heads), block_sizes=kernel.BlockSizes(**sizes))
    return attend, [jax.ShapeDtypeStruct((x.shape[2], x.shape[1], x.shape[3]), x.dtype) for x in shape.arrays()]


def _tiles(shape: Shape, *, backward: bool) -> tuple[int, int]:
    module: Any = banded_flash_backward if backward else banded_flash
    return module.default_blocks(*shape.arrays())


def _splash(shape: Shape, *, backward: bool = False) -> Row:
    attend, arrays = splash_call(shape, backward=backward)
    block_q, block_k = _tiles(shape, backward=backward)
    tiling = shape.pattern().tiled(block_q, block_k)
    tiles = shape.heads * int(np.count_nonzero(tiling.by_query.flags & ACTIVE))
    query_tiles = shape.heads * math.ceil(shape.length / block_q)
    key_tiles = math.ceil(shape.length / block_k)
    if not backward:
        # Its grid repeats the longest list of a query tile for all; its regions are those of ours without a mask.
        longest = int(np.bincount(tiling.by_query.rows[0]).max())
        grid = Grid(query_tiles * longest, (query_tiles, tiles, query_tiles), tiles)
        return Row(attend, arrays, None, {"splash_mha_fwd_no_residuals": grid})

    def gradients(query: Any, key: Any, value: Any) -> Any:
        return jax.grad(lambda *x: attend(*x).astype(jnp.float32).sum(), (0, 1, 2))(query, key, value)

    longest, widest = (int(np.bincount(visits.rows[0]).max()) for visits in (tiling.by_query, tiling.by_key))
    grids = {
        "splash_mha_dq_no_residuals": Grid(query_tiles * longest, (query_tiles, tiles, query_tiles), tiles),
        "splash_mha_dkv_no_residuals": Grid(
            shape.heads * key_tiles * widest, (shape.key_heads * key_tiles, tiles, shape.key_heads * key_tiles), tiles
        ),
    }
    return Row(gradients, arrays, None, grids)


def flash_call(shape: Shape) -> tuple[Callable[..., Any], list[jax.ShapeDtypeStruct]]:
    """JAX's flash attention, causal, and its arrays, [1, N, T, H]. It knows no window and no groups:
    it sees all earlier tokens, and gets the keys of every head."""
    block = min(_FLASH_TILE, shape.length)
    names = [f"block_{what}" for what in ("q", "k_major", "k", "k_major_dq", "k_dq", "q_dq")]
    names += [f"block_{what}_dkv" for what in ("q_major", "k_major", "k", "q")]
    sizes = jax_flash.BlockSizes(block_b=1, **dict.fromkeys(names, block))

    def attend(query: Any, key: Any, value: Any) -> Any:
        return jax_flash.flash_attention(query, key, value, causal=True, block_sizes=sizes)

    return attend, [jax.ShapeDtypeStruct((1, shape.heads, shape.length, shape.head_dim), shape.dtype)] * 3


def _flash(shape: Shape, *, backward: bool = False) -> Row:
    attend, arrays = flash_call(shape)
    block = min(_FLASH_TILE, shape.length)
    side = math.ceil(shape.length / block)
    lines, tiles = shape.heads * side, shape.heads * side * (side + 1) // 2
    grid = Grid(lines * side, (lines, tiles, lines), tiles)

    def gradients(query: Any, key: Any, value: Any) -> Any:
        return jax.grad(lambda *x: attend(*x).astype(jnp.float32).sum(), (0, 1, 2))(query, key, value)

    if not backward:
        return Row(attend, arrays, None, {"flash_attention": grid})
    tile = f"block_k_major_{block}_block_k_{block}"
    of_keys = f"flash_mha_bwd_dkv_block_q_major_{block}_block_q_{block}_{tile}"
    of_queries = f"flash_mha_bwd_dq_block_q_major_{block}_{tile}"
    return Row(gradients, arrays, None, dict.fromkeys((of_queries, of_keys), grid))


OTHERS: dict[str, Callable[[Shape], Row]] = {
    "jax splash": _splash,
    "jax splash gradients": functools.partial(_splash, backward=True),
    "jax flash, all earlier": _flash,
    "jax flash gradients, all earlier": functools.partial(_flash, backward=True),
}
