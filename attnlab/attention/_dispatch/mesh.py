"""How a call lies on a mesh: which mesh axes share its batch, and which its heads.

Where the mesh in context has Explicit axes, arrays say themselves how they lie. Where it has Auto axes they do not, and
XLA places what is plain JAX; but it cannot partition a Pallas kernel, so a kernel follows the names of the axes:

    data, fsdp      the batch
    tensor          the heads
    context         the positions, of the first space axis (exchange.py)

(custom_partitioning, which would see how arrays really lie, does not compile for a TPU that is only described.)
"""

import contextvars
import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from attnlab.attention._dispatch.deferred import deferred_call

BATCH_AXES, HEAD_AXES, POSITION_AXES = ("data", "fsdp"), ("tensor",), ("context",)
MESH_AXES = BATCH_AXES + HEAD_AXES + POSITION_AXES


class Placement(NamedTuple):
    """The mesh axes that share the batch, the heads, and each of the first space axes, as far as these divide."""

    batch: tuple[str, ...]
    heads: tuple[str, ...]
    positions: tuple[tuple[str, ...], ...]


_given: contextvars.ContextVar[Placement | None] = contextvars.ContextVar("attnlab_placement", default=None)


def placement() -> Placement:
    """As arrays on Explicit axes around this call have it, else by the axes' names."""
    return _given.get() or Placement(BATCH_AXES, HEAD_AXES, (POSITION_AXES,))


def unknown_axes() -> list[str]:
    """The mesh's Auto axes of several devices whose names say nothing."""
    return [] if _given.get() else [name for name in automatic_axes() if name not in MESH_AXES]


def automatic_axes() -> dict[str, int]:
    """The sizes above 1 of the Auto axes of the mesh in context. Inside shard_map its own axes are Manual."""
    return {name: size for name, size in _auto_sizes().items() if size > 1}


def _auto_sizes() -> dict[str, int]:
    mesh = jax.sharding.get_abstract_mesh()
    kinds = zip(mesh.axis_names, mesh.axis_sizes, mesh.axis_types)
    return {name: size for name, size, kind in kinds if kind == AxisType.Auto}


def partitioned(
    function: Callable[..., Any],
    place: Placement,
    layouts: Any,
    results: Any,
    *arguments: Any,
    defer: bool,
) -> Any:
    """function(*arguments), each device of the mesh in context with its part of the batch and of the heads.

    Args:
      function: independent along batch and heads.
      layouts: of (results, *arguments), pytrees of their structure with a string per array: B its batch, N its heads, K
        its key heads, dots for other axes. A result without B, or without N and K, is a sum over the batch, or over the
        heads.
      results: arrays or shape structs like what function returns.
      defer: trace function where the call is lowered.
    """

    def run(results: Any, *arguments: Any) -> Any:
        return deferred_call(function, results, *arguments) if defer else function(*arguments)

    sizes = automatic_axes()
    if not sizes:
        return run(results, *arguments)

    axes = _axes(place, sizes, layouts, (results, *arguments))

    def part_of(layout: str, x: Any) -> jax.ShapeDtypeStruct:
        parts = (math.prod(sizes[name] for name in axes.get(letter, ())) for letter in layout)
        return jax.ShapeDtypeStruct([size // n for size, n in zip(x.shape, parts, strict=True)], x.dtype)

    def total(layout: str, x: Any) -> Any:
        over = (axes["B"] if "B" not in layout else ()) + (axes["N"] if not {"N", "K"} & set(layout) else ())
        return jax.lax.psum(x, over) if over else x

    def own_part(*arguments: Any) -> Any:
        return _by_leaf(total, layouts[0], run(_by_leaf(part_of, layouts[0], results), *arguments))

    return _spread(own_part, axes, layouts, arguments)


def shared(function: Callable[..., Any], place: Placement, layouts: Any, *arguments: Any) -> Any:
    """function(*arguments), each device of the mesh in context with its part of batch, heads and positions.

    layouts: as for `partitioned`, and T for the positions. A result has B, N and T wherever its parts differ.
    """
    return _spread(function, _axes(place, automatic_axes(), layouts[1:], arguments), layouts, arguments)


def _axes(place: Placement, sizes: dict[str, int], layouts: Any, arrays: Any) -> dict[str, tuple[str, ...]]:
    """The mesh axes of each letter."""

    def lengths(letters: str) -> list[int]:
        def of_leaf(layout: str, x: Any) -> list[int]:
            return [size for letter, size in zip(layout, x.shape) if letter in letters]

        return jax.tree.leaves(_by_leaf(of_leaf, layouts, arrays))

    heads = dividing(place.heads, sizes, lengths("NK"))
    batch = dividing(place.batch, sizes, lengths("B"))
    return {"B": batch, "N": heads, "K": heads, "T": place.positions[0] if place.positions else ()}


def _by_leaf(function: Callable[[str, Any], Any], layouts: Any, tree: Any) -> Any:
    return jax.tree.map(lambda layout, x: None if x is None else function(layout, x), layouts, tree)


def _spread(
    function: Callable[..., Any], axes: dict[str, tuple[str, ...]], layouts: Any, arguments: tuple[Any, ...]
) -> Any:
    # Cotangents are summed over the axes that their spec does not name: those of one device need not be.
    single = tuple(name for name, size in _auto_sizes().items() if size == 1)

    def spec(layout: str) -> PartitionSpec:
        named = [axes.get(letter, ()) for letter in layout]
        return PartitionSpec(*(names + single * (axis == 0) or None for axis, names in enumerate(named)))

    def spec_of(layout: str, _: Any) -> PartitionSpec:
        return spec(layout)

    return jax.shard_map(
        function,
        in_specs=tuple(_by_leaf(spec_of, *pair) for pair in zip(layouts[1:], arguments)),
        out_specs=jax.tree.map(spec, layouts[0]),
        axis_names=set(_auto_sizes()),  # Mosaic asks for all of them, those of one device too
        check_vma=False,
    )(*arguments)


def dividing(names: Sequence[str], sizes: dict[str, int], counts: Sequence[int]) -> tuple[str, ...]:
    """Of these mesh axes, those that share all counts alike: as many of the first as divide them."""
    taken: tuple[str, ...] = ()
    for name in names:
        if name in sizes and all(count % math.prod(sizes[n] for n in (*taken, name)) == 0 for count in counts):
            taken = (*taken, name)
    return taken


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
    inside = mesh.update_axis_types(
        {name: AxisType.Auto for name, kind in zip(mesh.axis_names, mesh.axis_types) if kind == AxisType.Explicit}
    )
    batch, *space, heads, _ = (None,) * 4 if query is None else _spec(query)
    entries = {"B": [batch], "*": space, "N": [heads], ".": [None]}
    specs = [PartitionSpec(*(entry for letter in layout for entry in entries[letter])) for layout in layouts]
    specs += [_spec(leaf) for leaf in jax.tree.leaves(like)]
    token = _given.set(Placement(_names(batch), _names(heads), tuple(map(_names, space))))
    try:
        with jax.sharding.use_abstract_mesh(inside):
            whole = (NamedSharding(inside, PartitionSpec(*[None] * x.ndim)) for x in arrays)
            out = function(*map(jax.reshard, arrays, whole))
    finally:
        _given.reset(token)
    leaves, tree = jax.tree.flatten(out)
    specs += specs[-1:] * (len(leaves) - len(specs))
    return jax.tree.unflatten(tree, [jax.reshard(x, NamedSharding(mesh, spec)) for x, spec in zip(leaves, specs)])


def _spec(x: Any) -> PartitionSpec:
    return PartitionSpec(*jax.typeof(x).sharding.spec)


def _names(entry: Any) -> tuple[str, ...]:
    return () if entry is None else (entry,) if isinstance(entry, str) else tuple(entry)
