"""Kernels inside a jit over several devices: each device runs the kernel on its part of the batch.

XLA cannot partition a Pallas kernel by itself, so the call goes into a shard_map over the mesh in context
(jax.set_mesh): the batch over its axes "data" and "fsdp", all else whole on every device. (custom_partitioning, which
would see how arrays really lie, does not compile for a TPU that is only described.)
"""

import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from attnlab.attention._dispatch.deferred import deferred_call

BATCH_AXES = ("data", "fsdp")


def by_batch(function: Callable[..., Any], results: Any, *arguments: Any, defer: bool) -> Any:
    """function(*arguments), each device of the mesh in context with its part of the batch.

    function: independent along the batch. arguments: pytrees of arrays; the first axis of all is the batch, but for
      scalars. results: arrays or shape structs like what it returns, with the batch first too; scalars are sums over
      the batch. defer: trace function where the call is lowered.
    """

    def run(results: Any, *arguments: Any) -> Any:
        return deferred_call(function, results, *arguments) if defer else function(*arguments)

    mesh = jax.sharding.get_abstract_mesh()
    automatic = [name for name, kind in zip(mesh.axis_names, mesh.axis_types) if kind == AxisType.Auto]
    batched = [x for x in jax.tree.leaves((arguments, results)) if x.ndim]
    batch = batched[0].shape[0]
    is_batched = all(x.shape[0] == batch for x in batched)
    if len(automatic) < len(mesh.axis_names) or math.prod(mesh.axis_sizes) == 1 or not is_batched:
        return run(results, *arguments)  # one device, inside shard_map already, or not by batch
    axes = tuple(name for name in BATCH_AXES if name in automatic)
    parts = math.prod(mesh.shape[name] for name in axes)
    if batch % parts:
        axes, parts = (), 1

    def spec(x: Any) -> PartitionSpec:
        return PartitionSpec(axes) if x.ndim and axes else PartitionSpec()

    def part_of(x: Any) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct((x.shape[0] // parts, *x.shape[1:]) if x.ndim else (), x.dtype)

    def own_part(*arguments: Any) -> Any:
        out = run(jax.tree.map(part_of, results), *arguments)
        return jax.tree.map(lambda x: x if x.ndim or not axes else jax.lax.psum(x, axes), out)

    in_specs, out_specs = jax.tree.map(spec, arguments), jax.tree.map(spec, results)
    return jax.shard_map(own_part, in_specs=in_specs, out_specs=out_specs, check_vma=False)(*arguments)


def over_explicit_axes(
    function: Callable[..., Any], arrays: Sequence[Any], query: Any, layouts: Sequence[str], like: Any
) -> Any:
    """function(*arrays), where mesh axes are Explicit with XLA placing what is inside, as where they are Auto.

    layouts: of the results, by the axes of query, see `primitive`. like: a pytree that further results are like.
    """
    meshes = (jax.typeof(x).sharding.mesh for x in arrays)
    mesh = next((mesh for mesh in meshes if AxisType.Explicit in mesh.axis_types), None)
    if mesh is None:
        return function(*arrays)
    explicit = {name for name, kind in zip(mesh.axis_names, mesh.axis_types) if kind == AxisType.Explicit}
    specs = [*(_spec_by_axes(layout, query) for layout in layouts), *(_spec(leaf) for leaf in jax.tree.leaves(like))]
    inside = mesh.update_axis_types(dict.fromkeys(explicit, AxisType.Auto))
    with jax.sharding.use_abstract_mesh(inside):
        out = function(*(jax.reshard(x, NamedSharding(inside, PartitionSpec(*[None] * x.ndim))) for x in arrays))
    leaves, tree = jax.tree.flatten(out)
    placed = [jax.reshard(x, NamedSharding(mesh, spec)) for x, spec in zip(leaves, specs)]
    return jax.tree.unflatten(tree, placed)


def _spec(x: Any) -> PartitionSpec:
    return PartitionSpec(*jax.typeof(x).sharding.spec)


def _spec_by_axes(layout: str, query: Any) -> PartitionSpec:
    """Of a result with this layout, sharded as query [B, *space, N, H] is."""
    batch, *space, heads, _ = (None,) * 4 if query is None else _spec(query)
    axes = {"B": [batch], "*": space, "N": [heads], ".": [None]}
    return PartitionSpec(*(entry for letter in layout for entry in axes[letter]))
