"""Kernels inside a jit over several devices: each device runs the kernel on its part of the batch.

XLA cannot partition a Pallas kernel by itself, so the call goes into a shard_map over the mesh in context
(jax.set_mesh): the batch over its axes "data" and "fsdp", all else whole on every device. (custom_partitioning, which
would see how arrays really lie, does not compile for a TPU that is only described.)
"""

import math
from collections.abc import Callable
from typing import Any

import jax
from jax.sharding import AxisType, PartitionSpec

BATCH_AXES = ("data", "fsdp")


def by_batch(function: Callable[..., Any], batch: int, *arguments: Any) -> Any:
    """function(*arguments), each device of the mesh in context with its part of the first axis of arrays.

    function: independent along the batch. arguments: pytrees of arrays; the first axis of all is the batch, but for
      scalars, and scalar results are sums over the batch.
    """
    mesh = jax.sharding.get_abstract_mesh()
    automatic = [name for name, kind in zip(mesh.axis_names, mesh.axis_types) if kind == AxisType.Auto]
    leaves, results = jax.tree.leaves(arguments), jax.tree.leaves(jax.eval_shape(function, *arguments))
    is_batched = all(x.ndim == 0 or x.shape[0] == batch for x in (*leaves, *results))
    if len(automatic) < len(mesh.axis_names) or math.prod(mesh.axis_sizes) == 1 or not is_batched:
        return function(*arguments)  # one device, inside shard_map already, or not by batch
    axes = tuple(name for name in BATCH_AXES if name in automatic)
    if batch % math.prod(mesh.shape[name] for name in axes):
        axes = ()

    def spec(x: Any) -> PartitionSpec:
        return PartitionSpec(axes) if x.ndim and axes else PartitionSpec()

    def own_part(*arguments: Any) -> Any:
        out = function(*arguments)
        return jax.tree.map(lambda x: x if x.ndim or not axes else jax.lax.psum(x, axes), out)

    out_specs = jax.tree.map(spec, jax.eval_shape(function, *arguments))
    in_specs = jax.tree.map(spec, arguments)
    return jax.shard_map(own_part, in_specs=in_specs, out_specs=out_specs, check_vma=False)(*arguments)
