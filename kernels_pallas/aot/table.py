"""The table of kernels compiled for TPUs: rows of our kernels, and the command that measures and prints them."""

import argparse
import functools
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from kernels_pallas.aot import schedule
from kernels_pallas.aot.compile import CHIPS, GPUS, TOPOLOGIES, Grid, Row, as_on, compile_for_tpu
from kernels_pallas.aot.peers import OTHERS
from kernels_pallas.patterns import ACTIVE, FIRST
from kernels_pallas.shapes import SHAPES, Shape
from kernels_pallas.tpu import (
    banded_covariance,
    banded_flash,
    banded_flash_backward,
    banded_parallax,
    cached_flash,
    chunked_linear,
    covariance_solve,
    global_linear,
    linear_step,
    local_linear_step,
    routing_step,
)
from kernels_pallas.tpu.band import bias_block, bodies_of, body_of
from kernels_pallas.tpu.chunk import CHUNK
from kernels_pallas.tpu.chunk_call import plan_of

_ITERATIONS = 8  # of conjugate gradients
_SOFTCAP = 50.0  # Gemma 2's


def _grid(
    shape: Shape,
    blocks: tuple[int, int],
    heads: int,
    *,
    by_key: bool = False,
    first: bool = False,
    sums: bool = False,
    anew: bool = False,
) -> Grid:
    """Of a kernel that goes through the pairs of tiles with this many query heads in a step: start, bodies, last.
    first: with something for a row's first pair. sums: by key, with something for a query tile's last one. anew:
    bodies of rows' first pairs and of the others, without a start."""
    _, of_queries, of_keys = bodies_of(shape.pattern().tiled(*blocks))
    group = shape.heads // shape.key_heads
    visits, parts = (of_keys, max(1, group // heads)) if by_key else (of_queries, 1)
    steps = shape.key_heads // max(1, heads // group) if by_key else shape.heads // heads
    rows, active = np.count_nonzero(visits.flags & FIRST), visits.flags[visits.flags & ACTIVE != 0]
    cases = [active[active & FIRST != 0], active[active & FIRST == 0]] if anew else [active]
    of_bodies = np.concatenate([np.unique(body_of(case), return_counts=True)[1] for case in cases])
    of_queries_last = [-(-shape.length // blocks[0])] * sums
    runs = (*[1] * (not anew), *[rows] * first, *(parts * of_bodies), rows, *of_queries_last)
    tiles = shape.heads * int(np.count_nonzero(of_queries.flags & ACTIVE))
    return Grid(steps * parts * visits.flags.size, tuple(steps * int(n) for n in runs), tiles)


def _vmem(module: Any, shape: Shape, blocks: tuple[int, int], heads: int, bias: Any = None, **options: int) -> int:
    """By the model of a kernel with this many query heads in a step."""
    key_heads = max(1, heads * shape.key_heads // shape.heads)
    widths = shape.head_dim, shape.head_dim
    of_bias = {} if bias is None else {"bias": bias_block(bias, *blocks, heads)}
    return int(module.vmem_bytes(*blocks, *widths, shape.dtype, heads=heads, key_heads=key_heads, **of_bias, **options))


def _bias(shape: Shape) -> jax.ShapeDtypeStruct:
    """A number of each head's for every query and key."""
    return jax.ShapeDtypeStruct((1, shape.heads, shape.length, shape.length), shape.dtype)


def _banded_flash(shape: Shape, *, softcap: float | None = None, has_bias: bool = False) -> Row:
    arrays, pattern = shape.arrays(), shape.pattern()
    bias = _bias(shape) if has_bias else None

    def attend(query: Any, key: Any, value: Any, bias: Any = None) -> Any:
        options: Any = {"pattern": pattern, "bias": bias, "scale": shape.head_dim**-0.5, "softcap": softcap}
        return banded_flash.banded_flash_attention(query, key, value, **options)

    blocks = banded_flash.default_blocks(*arrays)
    heads = banded_flash.heads_of_a_step(*arrays, pattern=pattern, bias=bias)
    vmem = _vmem(banded_flash, shape, blocks, heads, bias)
    return Row(
        attend, [*arrays, *[bias] * has_bias], vmem, {"banded_flash_attention": _grid(shape, blocks, heads, anew=True)}
    )


def _banded_flash_gradients(shape: Shape, *, softcap: float | None = None, has_bias: bool = False) -> Row:
    arrays, pattern = shape.arrays(), shape.pattern()
    lse = shape.array(shape.heads, dtype=jnp.float32)
    bias = _bias(shape) if has_bias else None

    def gradients(*arrays: Any) -> Any:
        bias = arrays[7] if has_bias else None
        options: Any = {"pattern": pattern, "bias": bias, "scale": shape.head_dim**-0.5, "softcap": softcap}
        found = banded_flash_backward.banded_flash_gradients(*arrays[:7], **options)
        return found[:3] + found[4:]  # a scale that is a number has none

    blocks = banded_flash_backward.default_blocks(*arrays)
    heads = banded_flash_backward.heads_of_a_step(*arrays, pattern=pattern, bias=bias)
    slots = banded_flash_backward.slots_of(*arrays, pattern=pattern, bias=bias)
    if slots:
        grids = {"banded_flash_gradients": _grid(shape, blocks, heads, by_key=True, sums=True)}
    else:
        grids = {
            "banded_flash_query_gradient": _grid(shape, blocks, heads, first=True),
            "banded_flash_key_value_gradients": _grid(shape, blocks, heads, by_key=True),
        }
    if has_bias:
        grid = _grid(shape, blocks, heads, by_key=True)  # every pair is the first of its result
        grids["banded_flash_bias_gradient"] = grid._replace(runs=(grid.steps, *grid.runs[1:-1]))
    vmem = _vmem(banded_flash_backward, shape, blocks, heads, bias, slots=slots)
    return Row(gradients, [*arrays, arrays[0], lse, arrays[0], lse, *[bias] * has_bias], vmem, grids)


def _banded_covariance(shape: Shape) -> Row:
    arrays, pattern = shape.arrays(), shape.pattern()
    blocks = banded_covariance.default_blocks(*arrays)
    heads = banded_covariance.heads_of_a_step(*arrays, pattern=pattern)
    wide = shape.array(shape.heads, shape.head_dim, dtype=jnp.float32)
    lse = shape.array(shape.heads, dtype=jnp.float32)

    def covariance(*arrays: Any) -> Any:
        run: Any = functools.partial(banded_covariance.banded_covariance, pattern=pattern)
        return run(*arrays, scale=shape.head_dim**-0.5)

    grids = {"banded_covariance": _grid(shape, blocks, heads, first=True)}
    return Row(covariance, [*arrays, wide, lse, wide], _vmem(banded_covariance, shape, blocks, heads), grids)


def _banded_covariance_gradients(shape: Shape) -> Row:
    row, pattern = _banded_covariance(shape), shape.pattern()
    blocks = banded_covariance.default_blocks(*row.arrays[:3])
    heads = banded_covariance.heads_of_a_step(*row.arrays[:3], pattern=pattern)
    slots = banded_covariance.slots_of(*row.arrays[:3], pattern=pattern)
    wide = row.arrays[3]

    def gradients(*arrays: Any) -> Any:
        run: Any = functools.partial(banded_covariance.banded_covariance_gradients, pattern=pattern)
        return run(*arrays, scale=shape.head_dim**-0.5)[:-1]

    if slots:
        grids = {"banded_covariance_gradients": _grid(shape, blocks, heads, by_key=True, sums=True)}
    else:
        grids = {
            "banded_covariance_query_gradients": _grid(shape, blocks, heads, first=True),
            "banded_covariance_key_value_gradients": _grid(shape, blocks, heads, by_key=True),
        }
    vmem = _vmem(banded_covariance, shape, blocks, heads, slots=slots)
    return Row(gradients, [*row.arrays, wide, wide, wide], vmem, grids)


def _covariance_solve(shape: Shape) -> Row:
    """Of _ITERATIONS in every tile of queries."""
    query, key, _ = shape.arrays()
    pattern: Any = shape.pattern()
    wide = shape.array(shape.heads, shape.head_dim, dtype=jnp.float32)
    number = shape.array(shape.heads, dtype=jnp.float32)

    def solve(*arrays: Any) -> Any:
        run: Any = functools.partial(covariance_solve.covariance_solve, pattern=pattern, tolerance=1e-6)
        return run(*arrays, scale=shape.head_dim**-0.5, max_iterations=_ITERATIONS)

    sizes = covariance_solve.sizes_of(query, key, pattern)
    first, last = covariance_solve.tiles_seen(pattern, sizes.block_q)
    count, blocks = last - first, shape.heads // sizes.heads
    steps, tiles = blocks * len(first), blocks * int(count.sum())
    in_pairs = blocks * int((count // 2).sum()), blocks * int((count % 2).sum())
    loops = (tiles - steps, _ITERATIONS * steps - steps, *(_ITERATIONS * each - steps for each in in_pairs))
    vmem = covariance_solve.vmem_bytes(sizes, shape.head_dim, shape.dtype)
    return Row(
        solve,
        [query, key, wide, number, number],
        vmem,
        {"covariance_solve": Grid(steps, (), sizes.heads * tiles, loops=loops)},
    )


def _banded_parallax(shape: Shape) -> Row:
    arrays, pattern = shape.arrays(), shape.pattern()

    def attend(*arrays: Any) -> Any:
        return banded_parallax.banded_parallax(*arrays, pattern=pattern, scale=shape.head_dim**-0.5)

    blocks = banded_parallax.default_blocks(*arrays)
    heads = banded_parallax.heads_of_a_step(*arrays, pattern=pattern)
    vmem = _vmem(banded_parallax, shape, blocks, heads)
    return Row(
        attend, [*arrays, arrays[0]], vmem, {"banded_parallax": _grid(shape, blocks, heads, first=True, anew=True)}
    )


def _banded_parallax_gradients(shape: Shape) -> Row:
    arrays, pattern = shape.arrays(), shape.pattern()
    number, out = shape.array(shape.heads, dtype=jnp.float32), shape.array(shape.heads, shape.head_dim)

    def gradients(*arrays: Any) -> Any:
        return banded_parallax.banded_parallax_gradients(*arrays, pattern=pattern, scale=shape.head_dim**-0.5)[:-1]

    row = _banded_covariance_gradients(shape)
    return Row(gradients, [*arrays, arrays[0], out, number, number, out, out], row.vmem, row.grids)


def _chunked_linear(shape: Shape, *, decay: str | None, delta: bool, backward: bool) -> Row:
    query, key, value = shape.arrays()
    heads, head_dim = shape.heads, shape.head_dim
    gates = {None: None, "token": shape.array(heads, dtype=jnp.float32)}
    log_decay = gates.get(decay, shape.array(heads, head_dim, dtype=jnp.float32))
    beta = shape.array(heads, dtype=jnp.float32) if delta else None
    state = jax.ShapeDtypeStruct((1, heads, head_dim, head_dim), jnp.float32)
    plan, vmem = plan_of(query, key, value, log_decay, beta, backwards=backward)
    chunks, blocks = math.ceil(shape.length / CHUNK), heads // plan.block
    steps = plan.block // plan.heads
    lines = blocks * chunks
    bodies = (lines * steps, 0) if decay == "channel" else ()  # for decays that are mild, and for others
    runs = (blocks * steps, lines, *bodies, lines, blocks * steps)
    grid = Grid(lines * steps, runs, heads * chunks, products=(2, 3) if bodies else ())
    if backward:
        kept = chunked_linear.kept_shapes(query, value, log_decay, beta)
        arrays = [query, key, value, log_decay, beta, kept, query, state]
        return Row(chunked_linear.chunked_linear_gradients, arrays, vmem, {"chunked_linear_gradients": grid})
    arrays = [query, key, value, log_decay, beta, state]
    return Row(chunked_linear.chunked_linear_attention, arrays, vmem, {"chunked_linear_attention": grid})


def _global_linear(shape: Shape, *, has_offset: bool, backward: bool) -> Row:
    """Both products; has_offset: with the values' mean, as InLine has it."""
    query, key, value = shape.arrays()
    group, head_dim = shape.heads // shape.key_heads, shape.head_dim
    state = jax.ShapeDtypeStruct((1, shape.heads, head_dim, head_dim), jnp.float32)
    of_keys, of_queries = (global_linear.plan_of(x, head_dim) for x in (key, query))
    tiles = shape.heads * math.ceil(shape.length / of_queries[0].tile)

    def attend(query: Any, key: Any, value: Any) -> Any:
        sums = jax.tree.map(
            lambda x: jnp.repeat(x, group, axis=1), global_linear.token_sums(key, value, sums=has_offset)
        )
        return global_linear.times_state(query, *sums)

    def gradients(query: Any, key: Any, value: Any, state: Any, cotangent: Any) -> Any:
        of_state = jax.tree.map(
            lambda x: x.reshape(1, shape.key_heads, group, *x.shape[2:]).sum(2),
            global_linear.token_sums(query, cotangent, sums=has_offset),
        )
        to_query = global_linear.times_state(cotangent, state.mT)
        return to_query, global_linear.times_state(value, of_state[0].mT), global_linear.times_state(key, *of_state)

    def steps(heads: int, plan: Any) -> tuple[int, int]:
        blocks = heads // plan.heads
        return blocks, blocks * math.ceil(shape.length / plan.tile)

    keys, queries = steps(shape.key_heads, of_keys[0]), steps(shape.heads, of_queries[0])
    (blocks, of_sums), tile = (queries, of_queries[0].tile) if backward else (keys, of_keys[0].tile)
    runs = (blocks, of_sums - blocks, blocks) if shape.length % tile else (blocks,)
    grids = {"token_sums_and_sum" if has_offset else "token_sums": Grid(of_sums, runs, tiles)}
    plain, plus_offset = (queries[1] + keys[1], keys[1]) if backward else (0, queries[1])
    if not has_offset:
        plain, plus_offset = plain + plus_offset, 0
    products = {"times_state": plain, "times_state_plus_offset": plus_offset}
    grids |= {name: Grid(count, (), tiles) for name, count in products.items() if count}
    vmem = max(of_keys[1], of_queries[1])
    if backward:
        return Row(gradients, [query, key, value, state, query], vmem, grids)
    return Row(attend, [query, key, value], vmem, grids)


def _cached_flash(shape: Shape) -> Row:
    """A step with a full cache of the window."""
    cache = [jax.ShapeDtypeStruct((1, shape.window, shape.key_heads, shape.head_dim), shape.dtype)] * 2
    query = jax.ShapeDtypeStruct((1, 1, shape.heads, shape.head_dim), shape.dtype)
    visible, used = jax.ShapeDtypeStruct((1, 1, shape.window), jnp.bool), jax.ShapeDtypeStruct((1,), jnp.int32)
    vmem = cached_flash.vmem_bytes(
        shape.window, shape.heads, shape.key_heads, shape.head_dim, shape.head_dim, shape.dtype
    )
    blocks = cached_flash.num_blocks(shape.window, shape.key_heads)
    attend = functools.partial(cached_flash.cached_flash_attention, scale=shape.head_dim**-0.5)
    return Row(
        attend, [query, *cache, visible, used], vmem, {"cached_flash_attention": Grid(blocks, (1, blocks, 1), blocks)}
    )


def _local_linear_step(shape: Shape) -> Row:
    """A step with a full cache of the window, of _ITERATIONS."""
    cache = [jax.ShapeDtypeStruct((1, shape.window, shape.key_heads, shape.head_dim), shape.dtype)] * 2
    query = jax.ShapeDtypeStruct((1, 1, shape.heads, shape.head_dim), shape.dtype)
    ridge, used = jax.ShapeDtypeStruct((1, 1, shape.heads), jnp.float32), jax.ShapeDtypeStruct((1,), jnp.int32)
    vmem = local_linear_step.vmem_bytes(
        shape.window, shape.heads, shape.key_heads, shape.head_dim, shape.head_dim, shape.dtype
    )
    blocks, _ = local_linear_step.blocks_of(shape.window, shape.key_heads)
    run: Any = functools.partial(local_linear_step.local_linear_step, tolerance=1e-6, max_iterations=_ITERATIONS)
    step = functools.partial(run, scale=shape.head_dim**-0.5)
    # Means, the iterations, the keys in each by pairs and one that is left, and the output.
    of_keys = (_ITERATIONS * each - 1 for each in (blocks // 2, blocks % 2))
    loops = (blocks - 1, _ITERATIONS - 1, *of_keys, blocks - 1)
    grid = Grid(blocks, (1, blocks, 1), blocks, loops=loops)
    return Row(step, [query, *cache, ridge, used], vmem, {"local_linear_step": grid})


def _routing_step(shape: Shape) -> Row:
    """A step with full rings of the window, of 8 clusters."""
    rings = [jax.ShapeDtypeStruct((1, shape.heads, 8, shape.window, shape.head_dim), shape.dtype)] * 2
    query = jax.ShapeDtypeStruct((1, shape.heads, shape.head_dim), jnp.float32)
    numbers = [jax.ShapeDtypeStruct((1, shape.heads), jnp.int32)] * 3
    vmem = routing_step.vmem_bytes(shape.window, shape.head_dim, shape.head_dim, shape.dtype)
    grids = {"routing_step": Grid(shape.heads, (), shape.heads)}
    return Row(routing_step.routing_step, [query, *rings, *numbers], vmem, grids)


def _linear_step(shape: Shape) -> Row:
    state = jax.ShapeDtypeStruct((1, shape.heads, shape.head_dim, shape.head_dim), jnp.float32)
    token = jax.ShapeDtypeStruct((1, shape.heads, shape.head_dim), jnp.float32)
    beta = jax.ShapeDtypeStruct((1, shape.heads), jnp.float32)
    steps = shape.heads // linear_step.block_heads(shape.heads, shape.head_dim, shape.head_dim)
    vmem = linear_step.vmem_bytes(shape.heads, shape.head_dim, shape.head_dim)
    grids = {"linear_step": Grid(steps, (steps,), steps)}
    return Row(linear_step.linear_step, [state, token, token, token, token, beta], vmem, grids)


_LINEAR: dict[str, dict[str, Any]] = {
    "linear": {"decay": None, "delta": False},
    "linear, decay": {"decay": "token", "delta": False},
    "linear, channels": {"decay": "channel", "delta": False},
    "linear, delta": {"decay": None, "delta": True},
    "linear, gated delta": {"decay": "token", "delta": True},
    "linear, gated delta by channel": {"decay": "channel", "delta": True},
}
KERNELS: dict[str, Callable[[Shape], Row]] = {
    "banded flash": _banded_flash,
    "banded flash gradients": _banded_flash_gradients,
    "banded flash, softcap": functools.partial(_banded_flash, softcap=_SOFTCAP),
    "banded flash, softcap gradients": functools.partial(_banded_flash_gradients, softcap=_SOFTCAP),
    "banded flash, bias": functools.partial(_banded_flash, has_bias=True),
    "banded flash, bias gradients": functools.partial(_banded_flash_gradients, has_bias=True),
    **{name: functools.partial(_chunked_linear, **options, backward=False) for name, options in _LINEAR.items()},
    **{
        f"{name} gradients": functools.partial(_chunked_linear, **options, backward=True)
        for name, options in _LINEAR.items()
    },
    "linear, not causal": functools.partial(_global_linear, has_offset=False, backward=False),
    "linear, not causal gradients": functools.partial(_global_linear, has_offset=False, backward=True),
    "inline": functools.partial(_global_linear, has_offset=True, backward=False),
    "inline gradients": functools.partial(_global_linear, has_offset=True, backward=True),
    "covariance": _banded_covariance,
    "covariance gradients": _banded_covariance_gradients,
    "covariance solve": _covariance_solve,
    "parallax": _banded_parallax,
    "parallax gradients": _banded_parallax_gradients,
    "decode, cache": _cached_flash,
    "decode, linear": _linear_step,
    "decode, routing": _routing_step,
    "decode, local linear": _local_linear_step,
}
_HELP = """
VMEM is the kernels' own model, by which a call is refused before it is compiled. HBM is what the compiled program
reads and writes. Bundles per tile, cycles and the share of bundles that issue a matrix product come from the
compiler's schedule (one bundle per cycle, in order, on one core), of solves with 8 iterations: nothing runs, and
waiting for memory is not in them. With delays: with the waits between instructions that the compiler expects.
Computing is the time of these cycles, shared by the chip's cores, and memory that of what HBM moves; the longer one
is the bound, and what the kernel takes at least (kernels_pallas/aot/compile.py has the rates).

With --gpu: registers per thread and bytes spilled by ptxas (jax 0.10, 0.11) and by nvJitLink (jax 0.12, where it is);
of each loop that multiplies matrices, cycles of the tensor cores, stalls, and the share of its time in which they are
busy, at most (kernels_pallas/aot/machine_code.py). Nothing runs. Needs the extra gpu-aot.
"""


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m kernels_pallas.aot",
        description="Compile every kernel for TPUs or GPUs, without one, at shapes of known models, and print a table.",
        epilog=_HELP,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    rows: dict[str, Callable[[Shape], Any]] = {**KERNELS, **OTHERS}
    backend = parser.add_mutually_exclusive_group()
    backend.add_argument("--tpu", nargs="+", choices=TOPOLOGIES, default=list(TOPOLOGIES), help="generations (all)")
    backend.add_argument("--gpu", nargs="+", choices=GPUS, help="instead, GPUs; needs the extra gpu-aot")
    parser.add_argument("--shape", nargs="+", choices=SHAPES, default=list(SHAPES), help="named shapes (all)")
    parser.add_argument("--kernel", nargs="+", metavar="NAME", help="rows of the table (all)")
    options = parser.parse_args()
    if options.gpu:
        from kernels_pallas.aot import gpu_table

        rows = gpu_table.ROWS
    chosen = options.kernel or list(rows)
    if unknown := [name for name in chosen if name not in rows]:
        parser.error(f"--kernel: no row {unknown[0]!r}; need some of {', '.join(rows)}")
    if options.gpu:
        try:
            gpu_table.print_table(options.gpu, options.shape, chosen)
        except FileNotFoundError as error:
            parser.exit(1, f"{parser.prog}: {error}\n")
        return
    jax.config.update("jax_platforms", "cpu")  # look for no device

    columns = ["kernel", "shape", "TPU", "compiled", *_MEASURED]
    print(f"| {' | '.join(columns)} |\n|{'---|' * 4}{'---:|' * (len(_MEASURED) - 1)}---|", flush=True)
    with schedule.dumping() as collect:
        for kernel in chosen:
            for shape in options.shape:
                for tpu in options.tpu:
                    cells = _measure(rows[kernel], SHAPES[shape], tpu, collect)
                    print(f"| {' | '.join([kernel, shape, tpu, *cells])} |", flush=True)


_MEASURED = ["VMEM MiB", "HBM MiB", "bundles per tile", "cycles", "with delays"]
_MEASURED += ["matmul", "computing", "memory", "bound"]


def _measure(build: Callable[[Shape], Row], shape: Shape, tpu: str, collect: Callable[..., Any]) -> list[str]:
    empty = [""] * len(_MEASURED)
    try:
        with as_on(tpu):
            row = build(shape)
            compiled = compile_for_tpu(row.function, *row.arrays, tpu=tpu)
    except ModuleNotFoundError as error:
        return [f"missing: {error.name}", *empty]
    except Exception as error:  # the table's purpose is to show what fails, whatever it is
        collect(())
        return [f"{type(error).__name__}: {str(error).strip().splitlines()[0][:160]}", *empty]
    cost: Any = compiled.cost_analysis()
    moved = cost.get("bytes accessed", math.nan)
    moves = not math.isnan(moved)  # unknown of kernels that copy all by themselves and do not say how much
    sizes = ["" if row.vmem is None else f"{row.vmem / 2**20:.1f}", f"{moved / 2**20:.0f}" if moves else ""]
    found = collect(row.grids)
    try:
        (cycles, matmuls), (delayed, _) = (
            map(
                sum,
                zip(
                    *(
                        found[name][which].cycles(grid.steps, grid.runs, grid.products, grid.loops, grid.holders)
                        for name, grid in row.grids.items()
                    )
                ),
            )
            for which in ("final", "delays")
        )
    except (KeyError, ValueError) as error:
        return ["yes", *sizes, f"unknown: {error}"[:60], *empty[3:]]
    (tiles,) = {grid.tiles for grid in row.grids.values()}
    computing, memory = CHIPS[tpu].times(cycles, moved)
    counts = [f"{cycles / tiles:.0f}", f"{cycles:,}", f"{delayed:,}", f"{matmuls / cycles:.0%}"]
    times = [f"{1e6 * computing:.0f} us", f"{1e6 * memory:.0f} us", "computing" if computing > memory else "memory"]
    return ["yes", *sizes, *counts, *(times if moves else [times[0], "", ""])]
