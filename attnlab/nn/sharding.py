"""Modules on meshes: where activations lie, calls under Explicit axes, and fresh arrays inside jax.shard_map."""

import functools
from collections.abc import Callable
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import AbstractMesh, AxisType, NamedSharding, PartitionSpec

from attnlab.attention._dispatch.mesh import BATCH_AXES, HEAD_AXES, MESH_AXES, POSITION_AXES, automatic_axes, dividing
from attnlab.nn.parameters import absorb, as_function

Call = TypeVar("Call", bound=Callable[..., Any])


_AXES = {"B": BATCH_AXES, "T": POSITION_AXES, "N": HEAD_AXES, "V": HEAD_AXES}


def laid(x: jax.Array, layout: str) -> jax.Array:
    """x, which XLA is told how to share by the names of the Auto axes of the mesh in context.

    layout: a letter per axis: B data and fsdp, T context, N and V tensor, a dot for what every device has whole. XLA
    chooses for an axis that the mesh's do not divide, and where no name is known.
    """
    sizes = {name: size for name, size in automatic_axes().items() if name in MESH_AXES}
    if not sizes:
        return x

    def entry(letter: str, size: int) -> Any:
        return None if letter == "." else dividing(_AXES[letter], sizes, [size]) or PartitionSpec.UNCONSTRAINED

    spec = (entry(letter, size) for letter, size in zip(layout, x.shape, strict=True))
    return jax.lax.with_sharding_constraint(x, PartitionSpec(*spec))


def spec_of(x: Any, axes: int | None = None) -> PartitionSpec:
    """How an array lies on Explicit axes, all of its axes or the first ones."""
    return PartitionSpec(*jax.typeof(x).sharding.spec[:axes])


def specs_of(tree: Any) -> Any:
    return jax.tree.map(spec_of, tree)


def under_auto_axes(results: Callable[..., Any]) -> Callable[[Call], Call]:
    """Decorates what calls a module: under Explicit axes (jax.make_mesh's default) XLA shards it, as under Auto axes.

    results: from the arguments of the call to the PartitionSpecs of its results, or of whole subtrees of them.
    """

    def decorate(call: Call) -> Call:
        @functools.wraps(call)
        def wrapped(module: nnx.Module, *arguments: Any, **options: Any) -> Any:
            mesh = jax.sharding.get_abstract_mesh()
            if not mesh.empty and AxisType.Explicit not in mesh.axis_types:
                return call(module, *arguments, **options)
            leaves, structure = jax.tree.flatten((arguments, options))
            arrays = {number: leaf for number, leaf in enumerate(leaves) if isinstance(leaf, jax.Array)}

            def on_arrays(module: nnx.Module, arrays: dict[int, jax.Array]) -> Any:
                given = [arrays.get(number, leaf) for number, leaf in enumerate(leaves)]
                arguments, options = jax.tree.unflatten(structure, given)
                return call(module, *arguments, **options)

            function, state = as_function(on_arrays, module)
            if mesh.empty:  # the arrays may still lie on one
                mesh = _mesh_of((state, arrays))
            explicit = tuple(name for name, kind in zip(mesh.axis_names, mesh.axis_types) if kind == AxisType.Explicit)
            if not explicit or any(isinstance(leaf, jax.ShapeDtypeStruct) for leaf in jax.tree.leaves(state)):
                return call(module, *arguments, **options)
            specs = results(module, *arguments, **options), PartitionSpec()
            shardings = jax.tree.map(lambda spec: NamedSharding(mesh, spec), specs)
            out, learned = jax.sharding.auto_axes(function, axes=explicit, out_sharding=shardings)(state, arrays)
            absorb(module, learned)
            return out

        return wrapped  # type: ignore[return-value]

    return decorate


def _mesh_of(tree: Any) -> AbstractMesh:
    meshes = (jax.typeof(x).sharding.mesh for x in jax.tree.leaves(tree) if isinstance(x, jax.Array))
    return next((mesh for mesh in meshes if not mesh.empty), jax.sharding.get_abstract_mesh())


def varying_as(tree: Any, like: Any) -> Any:
    """The tree's arrays, where jax.shard_map tells apart what varies over its axes: as varying as those of `like`.

    Carries of loops that start as constants need it.
    """
    mesh = jax.sharding.get_abstract_mesh()
    if AxisType.Manual not in mesh.axis_types:
        return tree
    is_key = [jnp.issubdtype(x.dtype, jax.dtypes.prng_key) for x in jax.tree.leaves(like)]
    sources = [jax.random.key_data(x) if key else x for key, x in zip(is_key, jax.tree.leaves(like))]

    def follow(x: jax.Array) -> jax.Array:
        return sum((jnp.zeros_like(source, dtype=x.dtype, shape=()) for source in sources), x)

    return jax.tree.map(follow, tree)
