"""Compile for TPUs on a machine without one: libtpu compiles for a described topology, no chip needed.

    python -m kernels_pallas.aot            every kernel x TPU x shape: compiles or why not, VMEM, seconds
    python -m kernels_pallas.aot --help

`compile_for_tpu(function, *shapes, tpu="v5e")` does it for any jax function. Needs libtpu (the extra `tpu-aot`).
"""

import argparse
import functools
import os
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import topologies

from kernels_pallas.tpu import banded_flash, banded_flash_backward

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
        return [
            jax.ShapeDtypeStruct((1, self.length, heads, self.head_dim), self.dtype)
            for heads in (self.heads, self.key_heads, self.key_heads)
        ]

    def pattern(self, blocks: tuple[int, int]) -> banded_flash.Pattern:
        position = np.arange(self.length)
        starts, ends = np.maximum(position - self.window + 1, 0), position + 1
        return banded_flash.intervals(starts, ends, self.length, block_q=blocks[0], block_k=blocks[1])


SHAPES = {
    "llama-like 8k": Shape(length=8192, window=1024, heads=32, key_heads=8, head_dim=128),
    "gemma-like 8k": Shape(length=8192, window=1024, heads=16, key_heads=8, head_dim=256),
    "small model 2k": Shape(length=2048, window=256, heads=12, key_heads=12, head_dim=64),
    "ragged float32": Shape(length=1000, window=130, heads=4, key_heads=2, head_dim=80, dtype=jnp.float32),
}


def _banded_flash(shape: Shape) -> tuple[Callable[..., Any], list[jax.ShapeDtypeStruct], int]:
    arrays = shape.arrays()
    blocks = banded_flash.default_blocks(*arrays)
    pattern = shape.pattern(blocks)

    def attend(query: Any, key: Any, value: Any) -> Any:
        return banded_flash.banded_flash_attention(query, key, value, pattern=pattern, scale=shape.head_dim**-0.5)

    return attend, arrays, banded_flash.vmem_bytes(*blocks, shape.head_dim, shape.head_dim, shape.dtype)


def _banded_flash_gradients(shape: Shape) -> tuple[Callable[..., Any], list[jax.ShapeDtypeStruct], int]:
    arrays = shape.arrays()
    out, lse = arrays[0], jax.ShapeDtypeStruct(arrays[0].shape[:-1], jnp.float32)
    blocks = banded_flash_backward.default_blocks(*arrays)
    pattern = shape.pattern(blocks)

    def gradients(*arrays: Any) -> Any:
        return banded_flash_backward.banded_flash_gradients(*arrays, pattern=pattern, scale=shape.head_dim**-0.5)

    vmem = banded_flash_backward.vmem_bytes(*blocks, shape.head_dim, shape.head_dim, shape.dtype)
    return gradients, [*arrays, out, lse, out, lse], vmem


def _splash(shape: Shape) -> tuple[Callable[..., Any], list[jax.ShapeDtypeStruct], None]:
    """JAX's own kernel for the same window, for comparison. Its layout is [N, T, H]; its mask counts keys before."""
    from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel as kernel
    from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_mask as mask

    causal_window = mask.LocalMask((shape.length, shape.length), window_size=(shape.window - 1, 0), offset=0)
    make = kernel.make_splash_mqa_single_device if shape.key_heads == 1 else kernel.make_splash_mha_single_device
    attend = make(mask.MultiHeadMask([causal_window] * shape.heads))
    return attend, [jax.ShapeDtypeStruct((x.shape[2], x.shape[1], x.shape[3]), x.dtype) for x in shape.arrays()], None


KERNELS: dict[str, Callable[[Shape], tuple[Callable[..., Any], list[jax.ShapeDtypeStruct], int | None]]] = {
    "banded_flash": _banded_flash,
    "banded_flash gradients": _banded_flash_gradients,
    "jax splash (to compare)": _splash,
}


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m kernels_pallas.aot",
        description="Compile every kernel for TPUs, without one, at shapes of known models, and print a table.",
        epilog="Nothing runs: the table says what compiles, not how fast it is.",
    )
    parser.add_argument("--tpu", nargs="+", choices=TOPOLOGIES, default=list(TOPOLOGIES), help="generations (all)")
    parser.add_argument("--shape", nargs="+", choices=SHAPES, default=list(SHAPES), help="named shapes (all)")
    options = parser.parse_args()
    jax.config.update("jax_platforms", "cpu")  # look for no device

    print(f"| {'kernel':<23} | {'shape':<14} | TPU   | compiled | VMEM estimate | seconds |")
    print(f"|{'-' * 25}|{'-' * 16}|-------|----------|---------------|---------|")
    for kernel, build in KERNELS.items():
        for shape in options.shape:
            for tpu in options.tpu:
                started = time.perf_counter()
                try:
                    function, arrays, vmem = build(SHAPES[shape])
                    compile_for_tpu(function, *arrays, tpu=tpu)
                    result = "yes"
                except Exception as error:  # the table's purpose is to show what fails, whatever it is
                    result, vmem = f"{type(error).__name__}: {str(error).strip().splitlines()[0][:200]}", None
                seconds = time.perf_counter() - started
                estimate = "" if vmem is None else f"{vmem / 2**20:.1f} MiB"
                print(f"| {kernel:<23} | {shape:<14} | {tpu:<5} | {result:<8} | {estimate:>13} | {seconds:7.1f} |")


if __name__ == "__main__":
    main()
