"""A sequence over devices: what the part of each one needs of the others.

A mechanism over parts of its positions goes one of five ways:

    halo       keys just before and after the part: `with_halo` (local, dilated; depthwise convolutions)
    carry      the state before the part, from all states that parts leave: `states_before` (linear, causal agent)
    ring       the keys of every other part in turn: `around` (dot product, local linear, Parallax)
    re-shard   whole sequences of some heads or lines for parts of all: `swapped` (routing, axial)
    sums       totals over the parts, by lax.psum (agent, InLine, linear attention that is not causal)

`over_positions` decides whether a call goes it: where the mesh in context shares the first space axis (or, of Explicit
axes, the one that the query says), or inside jax.shard_map where `positions_over` names the axis.
"""

import contextlib
import contextvars
import functools
import math
import operator
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from attnlab.attention._dispatch.mesh import automatic_axes, dividing, placement, shared

Array = jax.Array


class Parts(NamedTuple):
    """How devices share positions. names: the mesh axes. many: how many parts. axis: which space axis they share."""

    names: tuple[str, ...]
    many: int
    axis: int

    def number(self) -> Array:
        """This device's part, from 0."""
        return lax.axis_index(self.names)


_given: contextvars.ContextVar[tuple[str, int] | None] = contextvars.ContextVar("attnlab_positions", default=None)


@contextlib.contextmanager
def positions_over(name: str, *, space_axis: int = 0) -> Iterator[None]:
    """Inside jax.shard_map: calls in the block take parts of sequences that the devices of a mesh axis share.

    Each device gives query, key, value and whatever else has positions of the same size, its part of them in the order
    of the axis, and gets its part of the output: what the call would give of the whole, with the same options. A window
    may be longer than a part.

        with attnlab.positions_over("context"):
            out = attnlab.local_attention(query, key, value, window=128, is_causal=True)

    Args:
      name: the mesh axis.
      space_axis: which of the query's space axes it shares.
    """
    token = _given.set((name, space_axis))
    try:
        yield
    finally:
        _given.reset(token)


def given_positions() -> tuple[str, int] | None:
    """What `positions_over` says around this call: part of what a call is."""
    return _given.get()


def over_positions(
    whole: Callable[..., Any],
    parted: Callable[..., Any],
    layouts: Sequence[Any],
    results: Any,
    *arrays: Any,
) -> Any:
    """whole(*arrays), or where devices share the positions, parted(parts, *arrays) on the part of each.

    layouts: of the arrays, pytrees of their structure with a string per array: B its batch, * the space axes, N its
      heads, K its key heads, dots for other axes. The first array is the query. results: of what is returned.
    """
    if (given := _given.get()) is not None:
        name, axis = given
        token = _given.set(None)  # what it is made of are calls of their own
        try:
            return parted(Parts((name,), lax.axis_size(name), axis), *arrays)
        finally:
            _given.reset(token)
    place, sizes = placement(), automatic_axes()
    space = arrays[0].shape[1:-2]
    for axis, (length, names) in enumerate(zip(space, place.positions)):
        names = () if jax.export.is_symbolic_dim(length) else dividing(names, sizes, [length])
        if names:
            parts = Parts(names, math.prod(sizes[name] for name in names), axis)
            place = place._replace(positions=(names,))
            spelled = _spelled((results, *layouts), len(space), axis)
            return shared(functools.partial(parted, parts), place, spelled, *arrays)
    return whole(*arrays)


def _spelled(layouts: Any, rank: int, axis: int) -> Any:
    """With a letter per space axis: T for the one that is shared."""
    letters = "".join("T" if number == axis else "." for number in range(rank))
    return jax.tree.map(lambda layout: layout.replace("*", letters), layouts)


# --- Halo -------------------------------------------------------------------------------------------------------------


def moved(x: Array, by: int, parts: Parts) -> Array:
    """What the device `by` parts before this one has; zeros where there is none."""
    pairs = [(source, source + by) for source in range(parts.many) if 0 <= source + by < parts.many]
    return lax.ppermute(x, parts.names, pairs)


def with_halo(x: Array, before: int, after: int, parts: Parts, axis: int) -> Array:
    """x with so many positions of the parts before and after this one along an axis; zeros past the ends.

    A permute per part that it reaches into.
    """
    size = x.shape[axis]
    earlier = [
        moved(lax.slice_in_dim(x, size - min(before - hop * size, size), size, axis=axis), hop + 1, parts)
        for hop in range(-(-before // size))
    ]
    later = [
        moved(lax.slice_in_dim(x, 0, min(after - hop * size, size), axis=axis), -hop - 1, parts)
        for hop in range(-(-after // size))
    ]
    return jnp.concatenate([*earlier[::-1], x, *later], axis=axis) if earlier or later else x


def first_positions(x: Array, length: int, parts: Parts, axis: int) -> Array:
    """The first positions of the whole sequence, on every device: an all-gather of so many of each part."""
    own = lax.slice_in_dim(x, 0, min(length, x.shape[axis]), axis=axis)
    return lax.slice_in_dim(lax.all_gather(own, parts.names, axis=axis, tiled=True), 0, length, axis=axis)


def by_device(kinds: Sequence[Any], function: Callable[..., Any], parts: Parts, *arrays: Any) -> Any:
    """function(kind, *arrays) of this device's kind, with kinds[number] that of part `number`; hashable, and sorted.

    A program holds the function once per kind, of which a device runs one. It exchanges nothing.
    """
    different = sorted(set(kinds))
    branches = [functools.partial(function, kind) for kind in different]
    if len(branches) == 1:
        return branches[0](*arrays)
    table = np.array([different.index(kind) for kind in kinds], np.int32)
    return lax.switch(jnp.asarray(table)[parts.number()], branches, *arrays)


# --- Carry ------------------------------------------------------------------------------------------------------------

_MOST_GATHERED = 8  # parts whose passages are gathered at once; more are joined in log2 rounds


def states_before(join: Callable[[Any, Any], Any], start: Any, own: Any, parts: Parts) -> tuple[Any, Callable[[], Any]]:
    """What comes before this part, and a function for what comes after the last one, on every device.

    join(earlier, later): associative, on pytrees of arrays [B, N, ...] of one dtype. start: what comes before the first
    part. own: this part's. An all-gather of `own`, or log2(parts) + 1 permutes.
    """
    number = parts.number()

    def choose(condition: Any, one: Any, other: Any) -> Any:
        return jax.tree.map(lambda x, y: jnp.where(condition, x, y), one, other)

    if parts.many <= _MOST_GATHERED:
        every = as_one(lambda x: lax.all_gather(x, parts.names), own)
        so_far = [start]
        for part in range(parts.many):
            so_far.append(join(so_far[-1], jax.tree.map(operator.itemgetter(part), every)))
        before = jax.tree.map(lambda *xs: lax.dynamic_index_in_dim(jnp.stack(xs), number, keepdims=False), *so_far[:-1])
        return before, lambda: so_far[-1]
    own = choose(number == 0, join(start, own), own)
    before, reach = as_one(functools.partial(moved, by=1, parts=parts), own), 1
    while reach < parts.many - 1:
        earlier = as_one(functools.partial(moved, by=reach, parts=parts), before)
        before = choose(number > reach, join(earlier, before), before)
        reach *= 2
    before = choose(number == 0, start, before)

    def after() -> Any:
        end = choose(number == 0, own, join(before, own))
        is_last = number == parts.many - 1
        return as_one(lambda x: lax.psum(jnp.where(is_last, x, 0), parts.names), end)

    return before, after


def as_one(function: Callable[[Array], Array], tree: Any) -> Any:
    """function of all leaves [B, N, ...] as one array, whose result may have axes before these."""
    leaves, structure = jax.tree.flatten(tree)
    sizes = [math.prod(x.shape[2:]) for x in leaves]
    flat = jnp.concatenate([x.reshape(*x.shape[:2], -1) for x in leaves], axis=-1)
    results = jnp.split(function(flat), np.cumsum(sizes)[:-1], axis=-1)
    shaped = [x.reshape(*x.shape[:-1], *leaf.shape[2:]) for x, leaf in zip(results, leaves)]
    return jax.tree.unflatten(structure, shaped)
