"""Rows of others' kernels, for comparison: JAX's own, and those of libraries that may be installed."""

import functools
import math
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental.pallas.ops.tpu import flash_attention as jax_flash
from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel as kernel
from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_mask as mask

from kernels_pallas.aot.compile import Grid, Row
from kernels_pallas.patterns import ACTIVE, FULL
from kernels_pallas.shapes import Shape
from kernels_pallas.tpu import banded_flash, banded_flash_backward
from kernels_pallas.tpu.chunk import CHUNK

_FLASH_TILE = 512
_FLYWHEEL_BLOCK = 2048
_TOKAMAX_CHUNK = 64


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


def _tokamax_splash(shape: Shape) -> Row:
    """tokamax's forward, grown out of JAX's, with the same mask and tiles. Its grid is the list of tiles."""
    from tokamax._src.ops.experimental.tpu.splash_attention import splash_attention_kernel as library
    from tokamax._src.ops.experimental.tpu.splash_attention import splash_attention_mask as masks

    block_q, block_k = _tiles(shape, backward=False)
    sizes = {"block_q": block_q, "block_kv": block_k, "block_kv_compute": block_k}
    causal_window = masks.LocalMask((shape.length, shape.length), window_size=(shape.window - 1, 0), offset=0)
    config = library.SplashConfig(**sizes, use_experimental_scheduler=True)  # as tokamax sets it by itself
    attend = library.make_splash_mha_single_device(causal_window, config=config)
    _, arrays = splash_call(shape, backward=False)
    flags = shape.pattern().tiled(block_q, block_k).by_query.flags
    active = shape.heads * int(np.count_nonzero(flags & ACTIVE))
    full = shape.heads * int(np.count_nonzero((flags & ACTIVE != 0) & (flags & FULL != 0)))
    query_tiles = shape.heads * math.ceil(shape.length / block_q)
    grid = Grid(active, (query_tiles, full, active - full, query_tiles), active)
    return Row(attend, arrays, None, {"splash_mha_fwd_no_residuals": grid})


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


def _kernel_steps(function: Callable[..., Any], arrays: list[Any], named: str) -> dict[str, int]:
    """How many steps the grids of the Pallas kernels in it have, by what they are compiled as: a kernel with a name by
    that, as `named` has it, another by that of the jit around it."""
    found: dict[str, int] = {}

    def visit(jaxpr: Any, around: str) -> None:
        for equation in jaxpr.eqns:
            name = equation.params.get("name")
            if equation.primitive.name == "pallas_call":
                found[named.format(name) if name else around] = math.prod(equation.params["grid_mapping"].grid)
                continue
            for inner in (getattr(value, "jaxpr", value) for value in equation.params.values()):
                if hasattr(inner, "eqns"):
                    visit(inner, name or around)

    visit(jax.make_jaxpr(function)(*arrays).jaxpr, "")
    return found


def _library_row(
    attend: Callable[..., Any], arrays: list[Any], tiles: int, lines: Mapping[str, int], *, backward: bool
) -> Row:
    """Of a library's call, by the steps of its own grids. Its gradients are those alone, from what the forward keeps.

    lines: of kernels that do more at the first and at the last step of a line, how many steps a line has. All that is
    in others counts in every step.
    """
    function = attend
    if backward:
        results, back = jax.eval_shape(functools.partial(jax.vjp, attend), *arrays)
        function, arrays = (lambda back, results: back(results)), [back, results]
    kernels = _kernel_steps(function, arrays, "transpose_jvp_{}__" if backward else "{}")
    grids = {
        name: Grid(steps, (steps // lines[name],) * 2 if name in lines else (), tiles)
        for name, steps in kernels.items()
    }
    return Row(function, arrays, None, grids)


def _deltanet(shape: Shape, *, by_channel: bool, backward: bool = False) -> Row:
    """deltanet-tpu's. Its queries have as many heads as its keys: it gets the keys and values of every head."""
    import deltanet_tpu as library

    rule = library.chunk_kda if by_channel else library.chunk_gdn

    def attend(*arrays: Any) -> Any:
        return rule(*arrays[:-1], initial_state=arrays[-1], output_final_state=True)

    wide, gate = shape.array(shape.heads, shape.head_dim), shape.array(shape.heads, dtype=jnp.float32)
    decay = shape.array(shape.heads, shape.head_dim, dtype=jnp.float32) if by_channel else gate
    state = jax.ShapeDtypeStruct((1, shape.heads, shape.head_dim, shape.head_dim), jnp.float32)
    chunks = shape.heads * math.ceil(shape.length / CHUNK)
    return _library_row(attend, [wide, wide, wide, decay, gate, state], chunks, {}, backward=backward)


def _flywheel(shape: Shape) -> Row:
    """flywheel-tpu's forward, heads first; of a window it has no gradients. It has no grid: loops over heads, blocks of
    queries and of keys, all of _FLYWHEEL_BLOCK. A block of keys has a body for where it stands, of the fragments of 256
    x 256 that the window meets there, and in each a second one for an overflow, which does not run."""
    import flywheel_tpu as library

    def attend(query: Any, key: Any, value: Any) -> Any:
        return library.flash_attn_func(query, key, value, causal=True, window_size=(shape.window - 1, 0))

    arrays = [jax.ShapeDtypeStruct((1, x.shape[2], x.shape[1], x.shape[3]), x.dtype) for x in shape.arrays()]
    lines = shape.heads * math.ceil(shape.length / _FLYWHEEL_BLOCK)
    earlier = lines - shape.heads  # blocks of keys before those of the queries
    steps, blocks = shape.heads, lines + earlier
    # Scaling of queries; all seen, earlier and own keys on an overflow; the output.
    regions, bodies = (lines, 0, 0, 0, lines), (0, earlier, lines)
    beside = blocks - steps  # these runs of all of the innermost loop are counted with it
    grid = Grid(
        steps,
        tuple(n - beside for n in regions),
        shape.heads * int(np.count_nonzero(shape.pattern().tiled(512, 512).by_query.flags & ACTIVE)),
        loops=(lines - steps, beside),
        holders=tuple(n - blocks for n in bodies),
    )
    return Row(attend, arrays, None, {"flash_attn_mha_static_t1_guarded_fwd": grid})


def _tokamax_kda(shape: Shape, *, backward: bool = False) -> Row:
    """tokamax's, heads first; it gets the keys and values of every head."""
    from tokamax._src.ops.kda import pallas_mosaic_tpu as library

    rule = library.PallasMosaicTpuKimiDeltaAttention(bypass_device_check=True)  # it takes v5p for too old

    def attend(*arrays: Any) -> Any:
        scale = shape.head_dim**-0.5
        return rule(*arrays[:-1], scale=scale, initial_state=arrays[-1], output_final_state=True)

    wide = jax.ShapeDtypeStruct((shape.heads, 1, shape.length, shape.head_dim), shape.dtype)
    gate = wide.update(dtype=jnp.float32)
    state = jax.ShapeDtypeStruct((1, 1, shape.heads, shape.head_dim, shape.head_dim), jnp.float32)
    arrays = [wide, wide, wide, gate, gate.update(shape=gate.shape[:3]), state]
    kernels = "chunk_kda_fwd_h_o_varlen", "_fused_dhu_wy_intra_cumsum_pallas_jit"
    lines = dict.fromkeys(kernels, shape.length // _TOKAMAX_CHUNK)
    chunks = shape.heads * math.ceil(shape.length / CHUNK)
    return _library_row(attend, arrays, chunks, lines, backward=backward)


OTHERS: dict[str, Callable[[Shape], Row]] = {
    "jax splash": _splash,
    "jax splash gradients": functools.partial(_splash, backward=True),
    "jax flash, all earlier": _flash,
    "jax flash gradients, all earlier": functools.partial(_flash, backward=True),
    "tokamax splash": _tokamax_splash,
    "flywheel-tpu": _flywheel,
    "tokamax, by channel": _tokamax_kda,
    "tokamax, by channel gradients": functools.partial(_tokamax_kda, backward=True),
    "deltanet-tpu, gated delta": functools.partial(_deltanet, by_channel=False),
    "deltanet-tpu, gated delta gradients": functools.partial(_deltanet, by_channel=False, backward=True),
    "deltanet-tpu, by channel": functools.partial(_deltanet, by_channel=True),
    "deltanet-tpu, by channel gradients": functools.partial(_deltanet, by_channel=True, backward=True),
}
