"""Compile for TPUs on a machine without one: libtpu compiles for a described topology, no chip needed.

`compile_for_tpu(function, *shapes, tpu="v5e")` does it for any jax function.
"""

import functools
import os
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
from jax.experimental import topologies

# The smallest topology of each TPU generation that libtpu describes.
TOPOLOGIES = {"v5e": "v5e:2x2", "v5p": "v5p:2x2x1", "v6e": "v6e:2x2", "tpu7x": "tpu7x:2x2x1"}

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
