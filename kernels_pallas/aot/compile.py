"""Compile for TPUs and GPUs on a machine without one: the compilers take a description, no chip is needed.

`compile_for_tpu(function, *shapes, tpu="v5e")` does it for any jax function, with libtpu;
`compile_for_gpu(function, *shapes, gpu="h100")` with JAX's CUDA plugin.
"""

import contextlib
import functools
import os
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple
from unittest import mock

import jax
import numpy as np
from jax.experimental import topologies

# The smallest topology of each TPU generation that libtpu describes.
TOPOLOGIES = {"v5e": "v5e:2x2", "v5p": "v5p:2x2x1", "v6e": "v6e:2x2", "tpu7x": "tpu7x:2x2x1"}


class Chip(NamedTuple):
    """Memory in bytes per second, as Google publishes it; cores; and a core's clock in Hz. That of v5e and v5p follows
    from the published flops and four matrix units of 128 x 128; v6e and tpu7x are taken to have v5p's."""

    memory: float
    cores: int
    clock: float

    def times(self, cycles: int, moved: float) -> tuple[float, float]:
        """Seconds of computing, with this many cycles of one core for all cores to share, and of moving these bytes."""
        return cycles / (self.cores * self.clock), moved / self.memory


CHIPS = {
    "v5e": Chip(819e9, 1, 1.5e9),
    "v5p": Chip(2765e9, 2, 1.75e9),
    "v6e": Chip(1640e9, 1, 1.75e9),
    "tpu7x": Chip(7380e9, 2, 1.75e9),
}

# What libtpu reads when it loads: ask no metadata server, share the machine with other such processes, and say nothing
# of the hardware that it does not find.
_ENVIRONMENT = {
    "TPU_SKIP_MDS_QUERY": "1",
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
    "TPU_WORKER_HOSTNAMES": "localhost",
    "TPU_ACCELERATOR_TYPE": "v5p-8",
    "TPU_STDERR_LOG_LEVEL": "3",
}


@functools.cache
def topology_devices(tpu: str) -> tuple[Any, ...]:
    """Devices to compile for. They run nothing.

    tpu: a topology, "v5p:4x4x8", or a generation in TOPOLOGIES for its smallest one.
    """
    for name, value in _ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    return tuple(topologies.get_topology_desc(platform="tpu", topology_name=TOPOLOGIES.get(tpu, tpu)).devices)


def compile_for_tpu(function: Callable[..., Any], *args: Any, tpu: str) -> jax.stages.Compiled:
    """jax.jit(function) compiled for one device of this TPU generation. args: pytrees of shape structs."""
    sharding = jax.sharding.SingleDeviceSharding(topology_devices(tpu)[0])
    placed = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding), args)
    return jax.jit(function).lower(*placed).compile()


@contextlib.contextmanager
def as_on(tpu: str) -> Iterator[None]:
    """Libraries that ask which device they run on are answered this TPU, by Mosaic too; jax itself keeps to the CPU."""
    chip = jax.sharding.Mesh(np.array(topology_devices(tpu)[:1]), ("chip",)).abstract_mesh.abstract_device
    mesh = jax.sharding.AbstractMesh((), (), abstract_device=chip)
    with jax.sharding.use_abstract_mesh(mesh), mock.patch.object(jax, "default_backend", return_value="tpu"):
        yield


# Memory in bytes per second and in bytes.
GPUS = {"h100": (3352 * 10**9, 85 * 10**9), "h200": (4800 * 10**9, 150_754_820_096)}
# What XLA's CUDA compiler asks of a device; of the two, all but the memory is alike.
_GPU = """
gpu_device_info {{
  threads_per_block_limit: 1024 threads_per_warp: 32 threads_per_core_limit: 2048
  shared_memory_per_block: 49152 shared_memory_per_block_optin: 232448 shared_memory_per_core: 233472
  registers_per_block_limit: 65536 registers_per_core_limit: 65536
  core_count: 132 fpus_per_core: 128 clock_rate_ghz: 1.98 l2_cache_size: 52428800
  block_dim_limit_x: 2147483647 block_dim_limit_y: 65535 block_dim_limit_z: 65535
  memory_bandwidth: {bandwidth} device_memory_size: {memory}
  cuda_compute_capability {{ major: 9 minor: 0 feature_extension: ACCELERATED_FEATURES }}
}}
platform_name: "CUDA"
dnn_version_info {{ major: 9 minor: 28 patch: 0 }}
device_description_str: "NVIDIA {name}"
"""


@functools.cache
def gpu_device(gpu: str) -> Any:
    """A device to compile for, in GPUS. It runs nothing. Needs JAX's CUDA plugin, and JAX_PLATFORMS=cpu."""
    bandwidth, memory = GPUS[gpu]
    target = _GPU.format(bandwidth=bandwidth, memory=memory, name=gpu.upper())
    described = topologies.get_topology_desc(gpu, platform="cuda", target_config=target, topology="1x1x1")
    return described.devices[0]


def compile_for_gpu(function: Callable[..., Any], *args: Any, gpu: str) -> jax.stages.Compiled:
    """jax.jit(function) compiled for one GPU. args: pytrees of shape structs, one array at least."""
    device = gpu_device(gpu)
    sharding = jax.sharding.SingleDeviceSharding(device)
    placed = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding), args)
    with jax.default_device(device):  # whose architecture kernels are lowered for
        return jax.jit(function).lower(*placed).compile()


class Grid(NamedTuple):
    """How often the parts of a kernel run: its steps, each region of its schedule, and the tiles that it computes.

    products: which regions multiply matrices, where the sizes of others may mislead. loops, holders: how often its own
    loops, and regions that have regions in them, run beside once in each run of what is around them.
    """

    steps: int
    runs: tuple[int, ...]
    tiles: int
    products: tuple[int, ...] = ()
    loops: tuple[int, ...] = ()
    holders: tuple[int, ...] = ()


class Row(NamedTuple):
    """A function to compile, shape structs for it, the kernels' own model of VMEM in bytes, their grids by name."""

    function: Callable[..., Any]
    arrays: list[Any]
    vmem: int | None
    grids: Mapping[str, Grid]
