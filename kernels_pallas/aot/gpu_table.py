"""The table of kernels compiled for Hopper GPUs: rows ours and others, and what their machine code says."""

import contextlib
import ctypes
import functools
import os
import re
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from kernels_pallas.aot import machine_code
from kernels_pallas.aot.compile import compile_for_gpu
from kernels_pallas.gpu import (
    banded_covariance,
    banded_flash,
    banded_flash_backward,
    banded_parallax,
    cached_flash,
    chunked_linear,
    chunked_linear_backward,
    linear_step,
)
from kernels_pallas.gpu.common import SMEM_BUDGET
from kernels_pallas.shapes import SHAPES, Shape


class Row(NamedTuple):
    """A function to compile, shape structs for it, and the kernels' own model of shared memory in bytes, or None."""

    function: Callable[..., Any]
    arrays: Sequence[Any]
    smem: int | None


def _banded_flash(shape: Shape, *, backward: bool = False, lists: bool = False) -> Row:
    module: Any = banded_flash_backward if backward else banded_flash
    run: Any = module.banded_flash_gradients if backward else module.banded_flash_attention
    query, *_ = arrays = shape.arrays()
    lse = shape.array(shape.heads, dtype=jnp.float32)
    arrays = [*arrays, query, lse, query, lse] if backward else arrays
    settings: Any = {"pattern": shape.lists() if lists else shape.pattern(), "scale": shape.head_dim**-0.5}
    return Row(functools.partial(run, **settings), arrays, module.smem_bytes(shape.head_dim, shape.head_dim))


def _covariance(shape: Shape, *, backward: bool = False) -> Row:
    run: Any = banded_covariance.banded_covariance_gradients if backward else banded_covariance.banded_covariance
    wide, lse = shape.array(shape.heads, shape.head_dim, dtype=jnp.float32), shape.array(shape.heads, dtype=jnp.float32)
    arrays = [*shape.arrays(), wide, lse, wide, *([wide] * 3 if backward else [])]
    settings: Any = {"pattern": shape.pattern(), "scale": shape.head_dim**-0.5}
    smem = banded_covariance.smem_bytes(shape.head_dim, shape.head_dim)
    return Row(functools.partial(run, **settings), arrays, smem)


def _parallax(shape: Shape, *, backward: bool = False) -> Row:
    run: Any = banded_parallax.banded_parallax_gradients if backward else banded_parallax.banded_parallax
    query, *_ = arrays = shape.arrays()
    number = shape.array(shape.heads, dtype=jnp.float32)
    arrays = [*arrays, query, *([query, number, number, query, query] if backward else [])]
    settings: Any = {"pattern": shape.pattern(), "scale": shape.head_dim**-0.5}
    return Row(functools.partial(run, **settings), arrays, banded_parallax.smem_bytes(shape.head_dim, shape.head_dim))


def _chunked_linear(shape: Shape, *, decay: str | None, delta: bool, heads: int | None = None, backward: bool) -> Row:
    if heads is not None:
        shape = shape._replace(heads=heads, key_heads=heads)
    query, key, value = shape.arrays()
    gates = {"token": shape.array(shape.heads, dtype=jnp.float32)}
    gates["channel"] = shape.array(shape.heads, shape.head_dim, dtype=jnp.float32)
    log_decay, beta = gates.get(decay or ""), gates["token"] if delta else None
    state = jax.ShapeDtypeStruct((1, shape.heads, shape.head_dim, shape.head_dim), jnp.float32)
    smem = chunked_linear.smem_bytes(shape.head_dim, shape.head_dim, decay=decay, delta=delta)
    if not backward:
        return Row(chunked_linear.chunked_linear_attention, [query, key, value, log_decay, beta, state], smem)
    kept = chunked_linear.kept_shapes(query, value, log_decay, beta)
    arrays = [query, key, value, log_decay, beta, kept, query, state]
    return Row(chunked_linear_backward.chunked_linear_gradients, arrays, smem)


def _cached_flash(shape: Shape) -> Row:
    """A step with a full cache of the window."""
    cache = [jax.ShapeDtypeStruct((1, shape.window, shape.key_heads, shape.head_dim), shape.dtype)] * 2
    query = jax.ShapeDtypeStruct((1, 1, shape.heads, shape.head_dim), shape.dtype)
    visible, used = jax.ShapeDtypeStruct((1, 1, shape.window), jnp.bool), jax.ShapeDtypeStruct((1,), jnp.int32)
    run = functools.partial(cached_flash.cached_flash_attention, scale=shape.head_dim**-0.5)
    return Row(run, [query, *cache, visible, used], cached_flash.smem_bytes(shape.head_dim, shape.head_dim))


def _linear_step(shape: Shape) -> Row:
    state = jax.ShapeDtypeStruct((1, shape.heads, shape.head_dim, shape.head_dim), jnp.float32)
    row = jax.ShapeDtypeStruct(state.shape[:3], jnp.float32)
    beta = jax.ShapeDtypeStruct(state.shape[:2], jnp.float32)
    smem = linear_step.smem_bytes(shape.head_dim, shape.head_dim)
    return Row(linear_step.linear_step, [state, row, row, row, row, beta], smem)


def _jax_flash(shape: Shape, *, backward: bool = False) -> Row:
    """JAX's own kernel. It is float16 alone, sees all tokens without gradients, and pads nothing."""
    from jax.experimental.pallas.ops.gpu import attention_mgpu

    arrays = [jax.ShapeDtypeStruct(x.shape, jnp.float16) for x in shape.arrays()]
    block = 128 if shape.head_dim <= 128 else 64
    sizes: Any = {"block_q": 64, "block_kv": block, "max_concurrent_steps": 2}
    if backward:
        sizes |= dict.fromkeys(("block_q_dkv", "block_kv_dkv", "block_q_dq", "block_kv_dq"), 64)
    config = attention_mgpu.TuningConfig(**sizes)

    def attend(query: Any, key: Any, value: Any) -> Any:
        return attention_mgpu.attention(query, key, value, config)

    return Row(_gradients(attend) if backward else attend, arrays, None)


def _tokamax_flash(shape: Shape, *, backward: bool = False) -> Row:
    """tokamax's kernel, where it is installed, over all earlier tokens. What it asks of a GPU, it is told here."""
    from tokamax._src import gpu_utils
    from tokamax._src.ops.attention.pallas_mosaic_gpu import PallasMosaicGpuFlashAttention

    answers = {"has_mosaic_gpu_support": True, "is_sm80": False, "is_sm90": True, "is_sm100": False}
    for name, answer in answers.items():
        setattr(gpu_utils, name, functools.partial(lambda answer, *_: answer, answer))
    attend = functools.partial(PallasMosaicGpuFlashAttention(), is_causal=True)
    return Row(_gradients(attend) if backward else attend, shape.arrays(), None)


def _gradients(attend: Callable[..., Any]) -> Callable[..., Any]:
    return jax.grad(lambda *arrays: attend(*arrays).astype(jnp.float32).sum(), (0, 1, 2))


_LINEAR: dict[str, dict[str, Any]] = {
    "linear": {"decay": None, "delta": False},
    "linear, decay": {"decay": "token", "delta": False},
    "linear, channels": {"decay": "channel", "delta": False},
    "linear, delta": {"decay": None, "delta": True},
    "linear, gated delta": {"decay": "token", "delta": True},
    "linear, gated delta by channel": {"decay": "channel", "delta": True},
    # 8192 tokens in stretches side by side.
    "linear, gated delta, 4 heads": {"decay": "token", "delta": True, "heads": 4},
}
_BOTH: dict[str, Callable[..., Row]] = {
    "banded flash": _banded_flash,
    "banded flash, lists": functools.partial(_banded_flash, lists=True),
    **{name: functools.partial(_chunked_linear, **options) for name, options in _LINEAR.items()},
    "covariance": _covariance,
    "parallax": _parallax,
}
KERNELS: dict[str, Callable[[Shape], Row]] = {
    f"{name}{' gradients' * backward}": functools.partial(build, backward=backward)
    for name, build in _BOTH.items()
    for backward in (False, True)
} | {"decode, cache": _cached_flash, "decode, linear": _linear_step}
OTHERS: dict[str, Callable[[Shape], Row]] = {
    "jax attention_mgpu, all tokens": _jax_flash,
    "jax attention_mgpu gradients, all tokens": functools.partial(_jax_flash, backward=True),
    "tokamax, earlier tokens": _tokamax_flash,
    "tokamax gradients, earlier tokens": functools.partial(_tokamax_flash, backward=True),
}
ROWS = {**KERNELS, **OTHERS}
# Lines of the compilers that none of our kernels may cause: setmaxnreg ignored, no launch bounds, products one by one.
FORBIDDEN = ("C7504", "C7508", "wgmma.mma_async instructions are serialized")
# Sums in an order that depends on the moment: two runs would give different bits.
ATOMIC = re.compile(r"^\s*(?:@!?%\w+\s+)?((?:atom|red|cp\.reduce)\.[\w.:]+)", re.MULTILINE)


def print_table(gpus: Sequence[str], shapes: Sequence[str], kernels: Sequence[str]) -> None:
    """Compiles these rows and prints a line of markdown for each kernel inside.

    The GPUs are of one architecture, for which Mosaic compiles a kernel once.
    """
    jax.config.update("jax_platforms", "cpu")  # look for no device
    # Mosaic looks for ptxas on the PATH, and not among the wheels.
    os.environ["PATH"] = f"{os.path.dirname(machine_code.tool('ptxas'))}{os.pathsep}{os.environ['PATH']}"
    columns = [
        "row",
        "shape",
        "GPU",
        "kernel",
        "SMEM KiB",
        "registers",
        "spilled",
        "tensor + stalls, share",
        "s",
    ]
    print(f"| {' | '.join(columns)} |\n|{'---|' * 4}{'---:|' * 5}", flush=True)
    for kernel in kernels:
        for shape in shapes:
            for cells in measure(ROWS[kernel], SHAPES[shape], gpus[0]):
                print(f"| {' | '.join([kernel, shape, ' '.join(gpus), *cells])} |", flush=True)


def measure(build: Callable[[Shape], Row], shape: Shape, gpu: str) -> Iterator[list[str]]:
    """Cells of each kernel that a row compiles to, or of what went wrong."""
    started = time.perf_counter()
    try:
        row = build(shape)
        kernels = compiled_kernels(row, gpu)
    except Exception as error:  # the table's purpose is to show what fails, whatever it is
        yield [f"{type(error).__name__}: {str(error).strip().splitlines()[0][:160]}", *[""] * 5]
        return
    seconds = f"{time.perf_counter() - started:.1f}"
    smem = "" if row.smem is None else f"{row.smem / 2**10:.0f}"
    for name, ptx in kernels:
        codes = [machine_code.assemble(ptx, linked=linked) for linked in (False, True)]
        forbidden = [line for line in FORBIDDEN if any(line in code.said for code in codes)]
        forbidden += sorted(set(ATOMIC.findall(ptx)))
        loops = [f"{loop.tensor} + {loop.stalls}, {loop.share:.0%}" for loop in codes[0].loops]
        yield [
            name + "".join(f" ({line})" for line in forbidden),
            smem,
            " / ".join(str(code.registers) for code in codes),
            " / ".join(str(code.spilled) for code in codes),
            "; ".join(loops),
            seconds,
        ]


def compiled_kernels(row: Row, gpu: str) -> list[tuple[str, str]]:
    """(name, PTX) of each Mosaic kernel inside a row's function.

    Raises:
      ValueError: there is none, or a row takes more shared memory than there is.
    """
    if row.smem is not None and row.smem > SMEM_BUDGET:
        raise ValueError(f"takes {row.smem} bytes of shared memory")
    with _printed() as printed:
        compile_for_gpu(row.function, *row.arrays, gpu=gpu)
    modules = [f".version{part}" for part in printed[0].split(".version")[1:]]
    named = [(re.search(r"\.entry (\w+?)(?:_mosaic_gpu_kernel)?\(", module), module) for module in modules]
    found = [(name[1], module) for name, module in named if name is not None]
    if not found:
        raise ValueError("no Mosaic kernel was compiled")
    return found


@contextlib.contextmanager
def _printed() -> Iterator[list[str]]:
    """What the compiler prints: the PTX of the kernels, which it hands out in no other way. Its log is left out."""
    printed: list[str] = []
    libc = ctypes.CDLL(None)
    os.environ["MOSAIC_GPU_DUMP_PTX"] = "1"
    with tempfile.TemporaryFile() as output, tempfile.TemporaryFile() as log:
        kept = [(stream, os.dup(stream)) for stream in (1, 2)]
        try:
            for (stream, _), file in zip(kept, (output, log)):
                os.dup2(file.fileno(), stream)
            yield printed
        finally:
            libc.fflush(None)
            for stream, copy in kept:
                os.dup2(copy, stream)
                os.close(copy)
            del os.environ["MOSAIC_GPU_DUMP_PTX"]
            output.seek(0)
            printed.append(output.read().decode(errors="replace"))
