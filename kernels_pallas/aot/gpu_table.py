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
from kernels_pallas.gpu import banded_flash
from kernels_pallas.gpu.common import SMEM_BUDGET
from kernels_pallas.shapes import SHAPES, Shape


class Row(NamedTuple):
    """A function to compile, shape structs for it, and the kernels' own model of shared memory in bytes, or None."""

    function: Callable[..., Any]
    arrays: Sequence[Any]
    smem: int | None


def _banded_flash(shape: Shape) -> Row:
    pattern, widths = shape.pattern(), (shape.head_dim, shape.head_dim)

    def attend(query: Any, key: Any, value: Any) -> Any:
        return banded_flash.banded_flash_attention(query, key, value, pattern=pattern, scale=shape.head_dim**-0.5)

    return Row(attend, shape.arrays(), banded_flash.smem_bytes(*widths))


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

    def gradients(query: Any, key: Any, value: Any) -> Any:
        return jax.grad(lambda *x: attend(*x).astype(jnp.float32).sum(), (0, 1, 2))(query, key, value)

    return Row(gradients if backward else attend, arrays, None)


KERNELS: dict[str, Callable[[Shape], Row]] = {"banded flash": _banded_flash}
OTHERS: dict[str, Callable[[Shape], Row]] = {
    "jax attention_mgpu, all tokens": _jax_flash,
    "jax attention_mgpu gradients, all tokens": functools.partial(_jax_flash, backward=True),
}
ROWS = {**KERNELS, **OTHERS}
# Lines of the compilers that none of our kernels may cause: setmaxnreg ignored, no launch bounds, products one by one.
FORBIDDEN = ("C7504", "C7508", "wgmma.mma_async instructions are serialized")
HELP = """
With --gpu: registers per thread and bytes spilled by ptxas (jax 0.10, 0.11) and by nvJitLink (jax 0.12, where it is);
of each loop that multiplies matrices, cycles of the tensor cores, stalls, and the share of its time in which they are
busy, at most (kernels_pallas/aot/machine_code.py). Nothing runs. Needs the extra gpu-aot.
"""


def print_table(gpus: Sequence[str], shapes: Sequence[str], kernels: Sequence[str]) -> None:
    """Compiles these rows and prints a line of markdown for each kernel inside."""
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
            for gpu in gpus:
                for cells in measure(ROWS[kernel], SHAPES[shape], gpu):
                    print(f"| {' | '.join([kernel, shape, gpu, *cells])} |", flush=True)


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
    found = [(name[1], module[: module.rindex("\n}") + 3]) for name, module in named if name is not None]
    if not found:
        raise ValueError("no Mosaic kernel was compiled")
    return found


@contextlib.contextmanager
def _printed() -> Iterator[list[str]]:
    """What the compiler prints: the PTX of the kernels, which it hands out in no other way."""
    printed: list[str] = []
    libc = ctypes.CDLL(None)
    os.environ["MOSAIC_GPU_DUMP_PTX"] = "1"
    with tempfile.TemporaryFile() as file:
        kept = [(stream, os.dup(stream)) for stream in (1, 2)]
        try:
            for stream, _ in kept:
                os.dup2(file.fileno(), stream)
            yield printed
        finally:
            libc.fflush(None)
            for stream, copy in kept:
                os.dup2(copy, stream)
                os.close(copy)
            del os.environ["MOSAIC_GPU_DUMP_PTX"]
            file.seek(0)
            printed.append(file.read().decode(errors="replace"))
