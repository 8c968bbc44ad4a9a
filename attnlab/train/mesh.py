"""How devices share a run: a mesh of them, and what of the state and of a batch each one holds.

    data      examples; every device has all of the parameters
    fsdp      examples, and of each parameter a part, which is gathered where it is used (Zhao et al. 2023)
    tensor    heads, hidden units and the vocabulary (Shoeybi et al. 2019)
    context   positions

What a run computes does not depend on its mesh, up to the order in which numbers are added.
"""

import contextlib
import contextvars
import dataclasses
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import jax
from jax.experimental import mesh_utils
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from attnlab.attention._dispatch.mesh import BATCH_AXES, MESH_AXES
from attnlab.attention._shared.checks import check_int, keep, require
from attnlab.errors import UserError

# The end of a parameter's path, and the mesh axis that shares each of its axes. The first that fits counts. An axis
# that the mesh's does not divide stays whole.
_PLACES: tuple[tuple[str, tuple[str | None, ...]], ...] = (
    ("embedding", ("tensor", "fsdp")),
    ("(query|key|value|probe)/kernel", ("fsdp", "tensor", None)),
    ("output/kernel", ("tensor", None, "fsdp")),
    ("(gate|up)/kernel", ("fsdp", "tensor")),
    ("down/kernel", ("tensor", "fsdp")),
)

_described: contextvars.ContextVar[tuple[jax.Device, ...]] = contextvars.ContextVar("attnlab_described", default=())
_own: contextvars.ContextVar[tuple[jax.Device, ...]] = contextvars.ContextVar("attnlab_own", default=())


@contextlib.contextmanager
def _set(variable: contextvars.ContextVar[tuple[jax.Device, ...]], devices: Sequence[jax.Device]) -> Iterator[None]:
    token = variable.set(tuple(devices))
    try:
        yield
    finally:
        variable.reset(token)


def described(devices: Sequence[jax.Device]) -> contextlib.AbstractContextManager[None]:
    """In the block, runs are built for these devices, which are only described, in place of those that are there."""
    return _set(_described, devices)


def on_devices(devices: Sequence[jax.Device]) -> contextlib.AbstractContextManager[None]:
    """In the block, and in this thread alone, runs have these devices, and leave the others to other runs."""
    return _set(_own, devices)


def is_described() -> bool:
    """Whether the devices of runs are only described: nothing can run on them."""
    return bool(_described.get())


def devices_of_runs() -> Sequence[jax.Device]:
    """The devices that runs are built for."""
    return _described.get() or _own.get() or jax.devices()


@dataclasses.dataclass(frozen=True)
class Mesh:
    """Devices along each axis; their product is the number of devices that a run uses.

    Args:
      data, fsdp, tensor, context: what each shares is said at the top of attnlab/train/mesh.py. One of them may be -1:
        as many as the rest leaves of the devices that there are.

    On a CPU JAX has one device, or as many as the environment's JAX_NUM_CPU_DEVICES says.
    """

    data: int = 1
    fsdp: int = 1
    tensor: int = 1
    context: int = 1

    def __post_init__(self) -> None:
        for axis in MESH_AXES:
            size = check_int(axis, getattr(self, axis), least=-1)
            require(size != 0, axis, size, "need at least 1, or -1 for what the rest leaves")
            keep(self, **{axis: size})
        filling = [axis for axis in MESH_AXES if getattr(self, axis) == -1]
        require(len(filling) < 2, filling[-1] if filling else "", -1, f"{filling[0] if filling else ''} is -1 already")

    def sizes(self, devices: int) -> dict[str, int]:
        """Devices along each axis, of so many. Raises UserError: there are too few, or -1 does not come out even."""
        given = {axis: getattr(self, axis) for axis in MESH_AXES}
        named = math.prod(size for size in given.values() if size > 0)
        if named > devices or (-1 in given.values() and devices % named):
            is_cpu = devices_of_runs()[0].platform == "cpu"
            hint = "; on a CPU the environment's JAX_NUM_CPU_DEVICES makes more" * is_cpu
            raise UserError(f"mesh: got {shown_sizes(given)}, and there are {devices} devices{hint}")
        return {axis: devices // named if size == -1 else size for axis, size in given.items()}

    def __str__(self) -> str:
        return shown_sizes(self.sizes(len(devices_of_runs())))

    def build(self, devices: Sequence[jax.Device] | None = None) -> jax.sharding.Mesh:
        """The mesh over the first of these devices (None: those of runs), along whose axes XLA shards by itself."""
        devices = devices_of_runs() if devices is None else devices
        sizes = self.sizes(len(devices))
        # Unlike jax.make_mesh, two of our axes may share one of a TPU's torus.
        laid_out = mesh_utils.create_device_mesh(
            tuple(sizes.values()), list(devices[: math.prod(sizes.values())]), allow_split_physical_axes=True
        )
        return jax.sharding.Mesh(laid_out, MESH_AXES, axis_types=(AxisType.Auto,) * len(MESH_AXES))


def shown_sizes(sizes: Mapping[str, int]) -> str:
    """A mesh for people, "data 2 x fsdp 4": the axes that have more than one device."""
    return " x ".join(f"{axis} {size}" for axis, size in sizes.items() if size != 1) or "one device"


def without_mesh(options: Mapping[str, str]) -> dict[str, str]:
    """Of a run's options by name those that decide its numbers, up to rounding."""
    return {
        name: value
        for name, value in options.items()
        if "Mesh" not in re.split("[/.]", name)[:-1] and not name.endswith("Experiment.mesh")
    }


def state_shardings(mesh: jax.sharding.Mesh, state: Any) -> Any:
    """Where each array of a state lies: a parameter by its path, its gradient's moments beside it, the rest everywhere.

    state: arrays or shape structs.
    """
    return jax.tree.map_with_path(lambda path, leaf: NamedSharding(mesh, _spec(mesh, path, leaf.shape)), state)


def _spec(mesh: jax.sharding.Mesh, path: tuple[Any, ...], shape: tuple[int, ...]) -> PartitionSpec:
    named = "/".join(str(getattr(key, "key", getattr(key, "name", getattr(key, "idx", "")))) for key in path)
    for end, axes in _PLACES:
        if len(axes) == len(shape) and re.search(f"(^|/){end}$", named):
            break
    else:
        longest = max(range(len(shape)), key=shape.__getitem__, default=0)
        axes = tuple("fsdp" if axis == longest and len(shape) > 1 else None for axis in range(len(shape)))
    shared = (axis if axis and size % mesh.shape[axis] == 0 else None for axis, size in zip(axes, shape))
    return PartitionSpec(*shared)


def batch_sharding(mesh: jax.sharding.Mesh) -> NamedSharding:
    """Where the examples of a batch lie."""
    return NamedSharding(mesh, PartitionSpec(BATCH_AXES))


def own_rows(mesh: jax.sharding.Mesh, batch_size: int) -> list[int] | None:
    """Which examples of a batch this process's devices hold, ascending; None where there is no other process."""
    if jax.process_count() == 1:
        return None
    parts = batch_sharding(mesh).addressable_devices_indices_map((batch_size,)).values()
    return sorted({row for part in parts if part for row in range(*part[0].indices(batch_size))})


def placed(batch: Any, mesh: jax.sharding.Mesh) -> Any:
    """A batch of NumPy arrays, on the devices; of several processes each gives its `own_rows`."""
    return jax.make_array_from_process_local_data(batch_sharding(mesh), batch)


def check_processes(mesh: Mesh) -> None:
    """Raises UserError where one of several processes would have no device in the mesh."""
    processes, devices = jax.process_count(), jax.device_count()
    if processes > 1 and math.prod(mesh.sizes(devices).values()) != devices:
        where = f"{devices} devices in {processes} processes"
        raise UserError(f"mesh: got {mesh}, and there are {where}; need all of them, as of experiments/meshes/data.gin")


def check_batch_size(mesh: Mesh, batch_size: int, accumulation: int) -> None:
    """Raises ValueError where devices would have parts of examples, or accumulated parts differ in size."""
    sizes = mesh.sizes(len(devices_of_runs()))
    parts = {**{axis: sizes[axis] for axis in BATCH_AXES}, "accumulation": accumulation}
    count = math.prod(parts.values())
    allowed = f"need a multiple of {count}, {' x '.join(f'{name} {n}' for name, n in parts.items() if n > 1)}"
    require(batch_size % count == 0, "batch_size", batch_size, allowed)
