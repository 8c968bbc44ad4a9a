"""Compile for TPUs on a machine without one: libtpu compiles for a described topology, no chip needed.

    python -m kernels_pallas.aot            every kernel x TPU x shape: compiles or why not, memory, cycles
    python -m kernels_pallas.aot --help

`compile_for_tpu(function, *shapes, tpu="v5e")` does it for any jax function. Needs libtpu (the extra `tpu-aot`).
"""

import argparse
import functools
import math
import os
import time
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import topologies

from kernels_pallas import patterns, schedule
from kernels_pallas.tpu import (
    banded_covariance,
    banded_flash,
    banded_flash_backward,
    cached_flash,
    chunked_linear,
    linear_step,
)

# The smallest topology of each TPU generation that libtpu describes.
TOPOLOGIES = {"v5e": "v5e:2x2", "v5p": "v5p:2x2x1", "v6e": "v6e:2x2", "tpu7x": "tpu7x:2x2x1"}


@functools.cache
def topology_devices(tpu: str) -> tuple[Any, ...]:
    """Devices to compile for, of a TPU generation in TOPOLOGIES. They run nothing."""
    # libtpu reads both when it loads: ask no metadata server, and share the machine with other such processes.
    os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")
    os.environ.setdefault("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")
    return tuple(topologies.get_topology_desc(platform="tpu", topology_name=TOPOLOGIES[tpu]).devices)


def compile_for_tpu(function: Callable[..., Any], *args: Any, tpu: str) -> jax.stages.Compiled:
    """jax.jit(function) compiled for one device of this TPU generation. args: pytrees of shape structs."""
    sharding = jax.sharding.SingleDeviceSharding(topology_devices(tpu)[0])
    placed = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding), args)
    return jax.jit(function).lower(*placed).compile()


class Shape(NamedTuple):
    """A causal sliding window in a known model's proportions."""

    length: int
    window: int
    heads: int
    key_heads: int
    head_dim: int
    dtype: Any = jnp.bfloat16

    def arrays(self) -> list[jax.ShapeDtypeStruct]:
        """query, key and value of one sequence, [1, T, N, H] and [1, T, K, H]."""
        return [self.array(heads, self.head_dim) for heads in (self.heads, self.key_heads, self.key_heads)]

    def array(self, *axes: int, dtype: Any = None) -> jax.ShapeDtypeStruct:
        """[1, T, *axes]"""
        return jax.ShapeDtypeStruct((1, self.length, *axes), dtype or self.dtype)

    def pattern(self, blocks: tuple[int, int]) -> patterns.Pattern:
        position = np.arange(self.length)
        starts, ends = np.maximum(position - self.window + 1, 0), position + 1
        return patterns.intervals(starts, ends, self.length, block_q=blocks[0], block_k=blocks[1])


SHAPES = {
    "llama-like 8k": Shape(length=8192, window=1024, heads=32, key_heads=8, head_dim=128),
    "gemma-like 8k": Shape(length=8192, window=1024, heads=16, key_heads=8, head_dim=256),
    "small model 2k": Shape(length=2048, window=256, heads=12, key_heads=12, head_dim=64),
    "ragged float32": Shape(length=1000, window=130, heads=4, key_heads=2, head_dim=80, dtype=jnp.float32),
}


class Grid(NamedTuple):
    """How often the parts of a kernel run: its steps, each region of its schedule, and the tiles that it computes."""

    steps: int
    runs: tuple[int, ...]
    tiles: int


class Row(NamedTuple):
    """A function to compile, shape structs for it, the kernels' own model of VMEM in bytes, their grids by name."""

    function: Callable[..., Any]
    arrays: list[Any]
    vmem: int | None
    grids: Mapping[str, Grid]


def _grid(visits: patterns.Visits, rows: int) -> Grid:
    """Of a kernel that goes through the pairs of tiles for each of `rows`: first, full, partly seen, last."""
    first, last, active, full = (int(np.count_nonzero(visits.flags & 2**bit)) for bit in range(4))
    # A body that no step runs is compiled away where it is known; here flags are data, and both are there.
    runs = (first, full, active - full, last)
    return Grid(rows * visits.rows.size, tuple(rows * n for n in runs), rows * active)


def _banded_flash(shape: Shape) -> Row:
    arrays = shape.arrays()
    blocks = banded_flash.default_blocks(*arrays)
    pattern = shape.pattern(blocks)

    def attend(query: Any, key: Any, value: Any) -> Any:
        return banded_flash.banded_flash_attention(query, key, value, pattern=pattern, scale=shape.head_dim**-0.5)

    vmem = banded_flash.vmem_bytes(*blocks, shape.head_dim, shape.head_dim, shape.dtype)
    return Row(attend, arrays, vmem, {"banded_flash_attention": _grid(pattern.by_query, shape.heads)})


def _banded_flash_gradients(shape: Shape) -> Row:
    arrays = shape.arrays()
    lse = shape.array(shape.heads, dtype=jnp.float32)
    blocks = banded_flash_backward.default_blocks(*arrays)
    pattern = shape.pattern(blocks)

    def gradients(*arrays: Any) -> Any:
        return banded_flash_backward.banded_flash_gradients(*arrays, pattern=pattern, scale=shape.head_dim**-0.5)

    vmem = banded_flash_backward.vmem_bytes(*blocks, shape.head_dim, shape.head_dim, shape.dtype)
    group = shape.heads // shape.key_heads
    grids = {
        "banded_flash_query_gradient": _grid(pattern.by_query, shape.heads),
        "banded_flash_key_value_gradients": _grid(patterns.for_every_head(pattern.by_key, group), shape.key_heads),
    }
    return Row(gradients, [*arrays, arrays[0], lse, arrays[0], lse], vmem, grids)


def _banded_covariance(shape: Shape) -> Row:
    arrays = shape.arrays()
    blocks = banded_covariance.default_blocks(*arrays)
    pattern = shape.pattern(blocks)
    wide = shape.array(shape.heads, shape.head_dim, dtype=jnp.float32)
    lse = shape.array(shape.heads, dtype=jnp.float32)

    def covariance(*arrays: Any) -> Any:
        run: Any = functools.partial(banded_covariance.banded_covariance, pattern=pattern)
        return run(*arrays, scale=shape.head_dim**-0.5)

    vmem = banded_covariance.vmem_bytes(*blocks, shape.head_dim, shape.head_dim, shape.dtype)
    grids = {"banded_covariance": _grid(pattern.by_query, shape.heads)}
    return Row(covariance, [*arrays, wide, lse, wide], vmem, grids)


def _banded_covariance_gradients(shape: Shape) -> Row:
    row = _banded_covariance(shape)
    blocks = banded_covariance.default_blocks(*row.arrays[:3])
    pattern = shape.pattern(blocks)
    wide = row.arrays[3]

    def gradients(*arrays: Any) -> Any:
        run: Any = functools.partial(banded_covariance.banded_covariance_gradients, pattern=pattern)
        return run(*arrays, scale=shape.head_dim**-0.5)

    grids = {
        "banded_covariance_query_gradients": _grid(pattern.by_query, shape.heads),
        "banded_covariance_key_value_gradients": _grid(
            patterns.for_every_head(pattern.by_key, shape.heads // shape.key_heads), shape.key_heads
        ),
    }
    return Row(gradients, [*row.arrays, wide, wide, wide], row.vmem, grids)


def _chunked_linear(shape: Shape, *, decay: str | None, delta: bool, backward: bool) -> Row:
    query, key, value = shape.arrays()
    heads, head_dim = shape.heads, shape.head_dim
    gates = {None: None, "token": shape.array(heads, dtype=jnp.float32)}
    log_decay = gates.get(decay, shape.array(heads, head_dim, dtype=jnp.float32))
    beta = shape.array(heads, dtype=jnp.float32) if delta else None
    state = jax.ShapeDtypeStruct((1, heads, head_dim, head_dim), jnp.float32)
    chunks = math.ceil(shape.length / chunked_linear.CHUNK)
    vmem = chunked_linear.vmem_bytes(head_dim, head_dim, shape.dtype, decay=decay, delta=delta)
    width = chunked_linear.common.padded_width(head_dim)
    states = jax.ShapeDtypeStruct((1, heads, chunks, width, width), jnp.float32)
    steps = heads * chunks
    grid = Grid(steps, (heads, heads), steps)
    if backward:
        arrays = [query, key, value, log_decay, beta, states, query, state]
        return Row(chunked_linear.chunked_linear_gradients, arrays, vmem, {"chunked_linear_gradients": grid})
    arrays = [query, key, value, log_decay, beta, state]
    return Row(chunked_linear.chunked_linear_attention, arrays, vmem, {"chunked_linear_attention": grid})


def _cached_flash(shape: Shape) -> Row:
    """A step with a full cache of the window."""
    cache = [jax.ShapeDtypeStruct((1, shape.window, shape.key_heads, shape.head_dim), shape.dtype)] * 2
    query = jax.ShapeDtypeStruct((1, 1, shape.heads, shape.head_dim), shape.dtype)
    visible, used = jax.ShapeDtypeStruct((1, shape.window), jnp.bool), jax.ShapeDtypeStruct((), jnp.int32)
    vmem = cached_flash.vmem_bytes(
        shape.window, shape.heads, shape.key_heads, shape.head_dim, shape.head_dim, shape.dtype
    )
    blocks = cached_flash.num_blocks(shape.window, shape.key_heads)
    attend = functools.partial(cached_flash.cached_flash_attention, scale=shape.head_dim**-0.5)
    return Row(
        attend, [query, *cache, visible, used], vmem, {"cached_flash_attention": Grid(blocks, (1, blocks, 1), blocks)}
    )


def _linear_step(shape: Shape) -> Row:
    state = jax.ShapeDtypeStruct((1, shape.heads, shape.head_dim, shape.head_dim), jnp.float32)
    token = jax.ShapeDtypeStruct((1, shape.heads, shape.head_dim), jnp.float32)
    beta = jax.ShapeDtypeStruct((1, shape.heads), jnp.float32)
    steps = shape.heads // linear_step.block_heads(shape.heads, shape.head_dim, shape.head_dim)
    vmem = linear_step.vmem_bytes(shape.heads, shape.head_dim, shape.head_dim)
    grids = {"linear_step": Grid(steps, (steps,), steps)}
    return Row(linear_step.linear_step, [state, token, token, token, token, beta], vmem, grids)


def _splash(shape: Shape, *, backward: bool = False) -> Row:
    """JAX's own kernel for the same window at the same tiles, for comparison. Its layout is [N, T, H]; its mask counts
    keys before."""
    from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel as kernel
    from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_mask as mask

    module: Any = banded_flash_backward if backward else banded_flash
    block_q, block_k = module.default_blocks(*shape.arrays())
    sizes = {"block_q": block_q, "block_kv": block_k, "block_kv_compute": block_k}
    if backward:
        ours = {"block_q_dkv": block_q, "block_kv_dkv": block_k, "block_kv_dkv_compute": block_k}
        sizes |= ours | {"block_q_dq": block_q, "block_kv_dq": block_k}
    causal_window = mask.LocalMask((shape.length, shape.length), window_size=(shape.window - 1, 0), offset=0)
    make = kernel.make_splash_mqa_single_device if shape.key_heads == 1 else kernel.make_splash_mha_single_device
    attend = make(mask.MultiHeadMask([causal_window] * shape.heads), block_sizes=kernel.BlockSizes(**sizes))
    arrays = [jax.ShapeDtypeStruct((x.shape[2], x.shape[1], x.shape[3]), x.dtype) for x in shape.arrays()]
    tiles = shape.heads * int(np.count_nonzero(shape.pattern((block_q, block_k)).by_query.flags & 4))
    query_tiles = shape.heads * math.ceil(shape.length / block_q)
    key_tiles = math.ceil(shape.length / block_k)
    if not backward:
        # Its grid repeats the longest list of a query tile for all; its regions are those of ours without a mask.
        longest = np.bincount(shape.pattern((block_q, block_k)).by_query.rows[0]).max()
        grid = Grid(query_tiles * int(longest), (query_tiles, tiles, query_tiles), tiles)
        return Row(attend, arrays, None, {"splash_mha_fwd_no_residuals": grid})

    def gradients(query: Any, key: Any, value: Any) -> Any:
        return jax.grad(lambda *x: attend(*x).astype(jnp.float32).sum(), (0, 1, 2))(query, key, value)

    by_key = shape.pattern((block_q, block_k))
    longest, widest = (int(np.bincount(visits.rows[0]).max()) for visits in (by_key.by_query, by_key.by_key))
    grids = {
        "splash_mha_dq_no_residuals": Grid(query_tiles * longest, (query_tiles, tiles, query_tiles), tiles),
        "splash_mha_dkv_no_residuals": Grid(
            shape.heads * key_tiles * widest, (shape.key_heads * key_tiles, tiles, shape.key_heads * key_tiles), tiles
        ),
    }
    return Row(gradients, arrays, None, grids)


def _flash(shape: Shape, *, backward: bool = False) -> Row:
    """JAX's flash attention, causal at tiles of 512. It knows no window and no groups: it sees all earlier tokens, and
    gets the keys of every head."""
    from jax.experimental.pallas.ops.tpu import flash_attention as jax_flash

    block = min(512, shape.length)
    names = [f"block_{what}" for what in ("q", "k_major", "k", "k_major_dq", "k_dq", "q_dq")]
    names += [f"block_{what}_dkv" for what in ("q_major", "k_major", "k", "q")]
    sizes = jax_flash.BlockSizes(block_b=1, **dict.fromkeys(names, block))
    array = jax.ShapeDtypeStruct((1, shape.heads, shape.length, shape.head_dim), shape.dtype)
    side = math.ceil(shape.length / block)
    lines, tiles = shape.heads * side, shape.heads * side * (side + 1) // 2
    grid = Grid(lines * side, (lines, tiles, lines), tiles)

    def attend(query: Any, key: Any, value: Any) -> Any:
        return jax_flash.flash_attention(query, key, value, causal=True, block_sizes=sizes)

    def gradients(query: Any, key: Any, value: Any) -> Any:
        return jax.grad(lambda *x: attend(*x).astype(jnp.float32).sum(), (0, 1, 2))(query, key, value)

    if not backward:
        return Row(attend, [array] * 3, None, {"flash_attention": grid})
    tile = f"block_k_major_{block}_block_k_{block}"
    of_keys = f"flash_mha_bwd_dkv_block_q_major_{block}_block_q_{block}_{tile}"
    of_queries = f"flash_mha_bwd_dq_block_q_major_{block}_{tile}"
    return Row(gradients, [array] * 3, None, dict.fromkeys((of_queries, of_keys), grid))


_LINEAR: dict[str, dict[str, Any]] = {
    "linear": {"decay": None, "delta": False},
    "linear, decay": {"decay": "token", "delta": False},
    "linear, channels": {"decay": "channel", "delta": False},
    "linear, delta": {"decay": None, "delta": True},
    "linear, gated delta": {"decay": "token", "delta": True},
}
KERNELS: dict[str, Callable[[Shape], Row]] = {
    "banded flash": _banded_flash,
    "banded flash gradients": _banded_flash_gradients,
    **{name: functools.partial(_chunked_linear, **options, backward=False) for name, options in _LINEAR.items()},
    **{
        f"{name} gradients": functools.partial(_chunked_linear, **options, backward=True)
        for name, options in _LINEAR.items()
    },
    "covariance": _banded_covariance,
    "covariance gradients": _banded_covariance_gradients,
    "decode, cache": _cached_flash,
    "decode, linear": _linear_step,
}
# For comparison, JAX's.
OTHERS: dict[str, Callable[[Shape], Row]] = {
    "jax splash": _splash,
    "jax splash gradients": functools.partial(_splash, backward=True),
    "jax flash, all earlier": _flash,
    "jax flash gradients, all earlier": functools.partial(_flash, backward=True),
}
_HELP = """
VMEM is the kernels' own model, by which a call is refused before it is compiled. HBM is what the compiled program reads
and writes. Bundles a tile, cycles and the share of bundles that issue a matrix product come from the compiler's
schedule (one bundle a cycle, in order, on one core): nothing runs, and waiting for memory is not in them.
"""


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m kernels_pallas.aot",
        description="Compile every kernel for TPUs, without one, at shapes of known models, and print a table.",
        epilog=_HELP,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    rows = {**KERNELS, **OTHERS}
    parser.add_argument("--tpu", nargs="+", choices=TOPOLOGIES, default=list(TOPOLOGIES), help="generations (all)")
    parser.add_argument("--shape", nargs="+", choices=SHAPES, default=list(SHAPES), help="named shapes (all)")
    parser.add_argument("--kernel", nargs="+", choices=rows, default=list(rows), help="rows of the table (all)")
    options = parser.parse_args()
    jax.config.update("jax_platforms", "cpu")  # look for no device

    columns = ["kernel", "shape", "TPU", "compiled", "VMEM MiB", "HBM MiB", "bundles a tile", "cycles", "matmul", "s"]
    print(f"| {' | '.join(columns)} |\n|{'---|' * 4}{'---:|' * 6}", flush=True)
    with schedule.dumping() as collect:
        for kernel in options.kernel:
            for shape in options.shape:
                for tpu in options.tpu:
                    cells = _measure(rows[kernel], SHAPES[shape], tpu, collect)
                    print(f"| {' | '.join([kernel, shape, tpu, *cells])} |", flush=True)


def _measure(build: Callable[[Shape], Row], shape: Shape, tpu: str, collect: Callable[..., Any]) -> list[str]:
    started = time.perf_counter()
    try:
        row = build(shape)
        compiled = compile_for_tpu(row.function, *row.arrays, tpu=tpu)
    except Exception as error:  # the table's purpose is to show what fails, whatever it is
        collect(())
        return [f"{type(error).__name__}: {str(error).strip().splitlines()[0][:160]}", *[""] * 6]
    cost: Any = compiled.cost_analysis()
    moved = f"{cost.get('bytes accessed', math.nan) / 2**20:.0f}"
    vmem = "" if row.vmem is None else f"{row.vmem / 2**20:.1f}"
    found = collect(row.grids)
    seconds = f"{time.perf_counter() - started:.1f}"
    try:
        counts = [found[name].cycles(grid.steps, grid.runs) for name, grid in row.grids.items()]
    except (KeyError, ValueError) as error:
        return ["yes", vmem, moved, "", f"unknown: {error}"[:60], "", seconds]
    cycles, matmuls = (sum(part) for part in zip(*counts))
    (tiles,) = {grid.tiles for grid in row.grids.values()}
    return ["yes", vmem, moved, f"{cycles / tiles:.0f}", f"{cycles:,}", f"{matmuls / cycles:.0%}", seconds]


if __name__ == "__main__":
    main()
