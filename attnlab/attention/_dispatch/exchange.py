"""A sequence over devices: what the part of each one needs of the others.

A mechanism over parts of its positions goes one of six ways:

    halo       keys just before and after the part: `with_halo` (local, dilated; depthwise convolutions)
    carry      the state before the part, from all states that parts leave: `states_before` (linear, causal agent)
    in turn    the state before the part, for which it waits: `in_turn` (memories, of which two parts are not joined)
    ring       the keys of every other part in turn: `around` (dot product, local linear, Parallax, pointwise)
    re-shard   whole sequences of some heads or lines for parts of all: `swapped` (routing, axial, PaTH)
    sums       totals over the parts, by lax.psum (agent, InLine, landmark, linear attention that is not causal)

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

from attnlab.attention._dispatch.deferred import vary_alike
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

    Raises ValueError: it is no axis of the jax.shard_map around the block.
    """
    manual = jax.sharding.get_abstract_mesh().manual_axes
    if name not in manual:
        allowed = f"need one of {', '.join(manual)}" if manual else "no jax.shard_map is around it"
        raise ValueError(f"name: got {name!r}; {allowed}")
    if isinstance(space_axis, bool) or not isinstance(space_axis, int) or not 0 <= space_axis < 3:
        raise ValueError(f"space_axis: got {space_axis!r}; need 0, 1 or 2")
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
      heads, K its key heads, dots for other axes; + for space axes of other lengths than the query's: where the devices
      do not divide the one that is shared, each has all of it. The first array is the query. results: of what is
      returned.
    """
    if (given := _given.get()) is not None:
        name, axis = given
        rank = arrays[0].ndim - 3
        if axis >= rank:
            raise ValueError(f"space_axis: got {axis} in positions_over; the query has {rank} space axes")
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
            own = jax.tree.map(functools.partial(_of_own_lengths, parts), tuple(layouts), arrays)
            spelled = _spelled((results, *own), len(space), axis)
            return shared(functools.partial(parted, parts), place, spelled, *arrays)
    return whole(*arrays)


def whole_space(space: Sequence[int], parts: Parts | None = None) -> tuple[int, ...]:
    """The lengths of the space axes of the whole, of which `space` is a part: of these parts, or of those that
    `positions_over` names."""
    given = _given.get()
    if parts is not None:
        many, axis = parts.many, parts.axis
    elif given is not None:
        many, axis = lax.axis_size(given[0]), given[1]
    else:
        return tuple(space)
    return tuple(length * many if number == axis else length for number, length in enumerate(space))


def positions_below(lengths: Array, count: int) -> Array:
    """bool [B, count]: which of the positions here, of a part or the whole, are among the first lengths [B] of all."""
    given = _given.get()
    first = 0 if given is None or given[1] != 0 else lax.axis_index(given[0]) * count
    return first + jnp.arange(count)[None] < lengths[:, None]


def _of_own_lengths(parts: Parts, layout: str, x: Any) -> str:
    """A layout with * for +, or dots where each device has all."""
    if "+" not in layout or x is None:
        return layout
    start, rank = layout.index("+"), x.ndim - len(layout) + 1
    length = x.shape[start + parts.axis]
    is_shared = not jax.export.is_symbolic_dim(length) and length % parts.many == 0
    return layout.replace("+", "*" if is_shared else rank * ".")


def _spelled(layouts: Any, rank: int, axis: int) -> Any:
    """With a letter per space axis: T for the one that is shared."""
    letters = "".join("T" if number == axis else "." for number in range(rank))
    return jax.tree.map(lambda layout: layout.replace("*", letters), layouts)


def as_one(function: Callable[[Array], Array], tree: Any, axes: int = 2) -> Any:
    """function of arrays as one message per dtype, which they make along what follows their first axes.

    function: may put axes in front of the first ones, and change their lengths.
    """
    leaves, structure = jax.tree.flatten(tree)
    results = list(leaves)
    for dtype in dict.fromkeys(x.dtype for x in leaves):
        chosen = [number for number, x in enumerate(leaves) if x.dtype == dtype]
        shapes = [leaves[number].shape[axes:] for number in chosen]
        flat = [leaves[number].reshape(*leaves[number].shape[:axes], -1) for number in chosen]
        cuts = np.cumsum([x.shape[-1] for x in flat])[:-1]
        for number, shape, x in zip(chosen, shapes, jnp.split(function(jnp.concatenate(flat, -1)), cuts, axis=-1)):
            results[number] = x.reshape(*x.shape[:-1], *shape)
    return jax.tree.unflatten(structure, results)


# --- Halo -------------------------------------------------------------------------------------------------------------


def moved(x: Array, by: int, parts: Parts) -> Array:
    """What the device `by` parts before this one has; zeros where there is none."""
    pairs = [(source, source + by) for source in range(parts.many) if 0 <= source + by < parts.many]
    return lax.ppermute(x, parts.names, pairs)


def with_halo(tree: Any, before: int, after: int, parts: Parts, axis: int) -> Any:
    """Arrays with so many positions of the parts before and after this one along an axis; zeros past the ends.

    A permute per part that it reaches into, and per dtype.
    """

    def extended(x: Array) -> Array:
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

    return as_one(extended, tree, axis + 1)


def first_positions(tree: Any, length: int, parts: Parts, axis: int) -> Any:
    """The first positions of the whole sequence, on every device: an all-gather of so many of each part."""

    def gathered(x: Array) -> Array:
        own = lax.slice_in_dim(x, 0, min(length, x.shape[axis]), axis=axis)
        return lax.slice_in_dim(lax.all_gather(own, parts.names, axis=axis, tiled=True), 0, length, axis=axis)

    if length == 0:
        return jax.tree.map(lambda x: lax.slice_in_dim(x, 0, 0, axis=axis), tree)
    return as_one(gathered, tree, axis + 1)


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


def _choose(condition: Any, one: Any, other: Any) -> Any:
    return jax.tree.map(lambda x, y: jnp.where(condition, x, y), one, other)


def states_before(join: Callable[[Any, Any], Any], start: Any, own: Any, parts: Parts) -> tuple[Any, Callable[[], Any]]:
    """What comes before this part, and a function for what comes after the last one, on every device.

    join(earlier, later): associative, on pytrees of arrays [B, N, ...] of one dtype. start: what comes before the first
    part. own: this part's. An all-gather of `own`, or log2(parts) + 1 permutes.
    """
    number = parts.number()

    if parts.many <= _MOST_GATHERED:
        every = as_one(lambda x: lax.all_gather(x, parts.names), own)
        so_far = [start]
        for part in range(parts.many):
            so_far.append(join(so_far[-1], jax.tree.map(operator.itemgetter(part), every)))
        before = jax.tree.map(lambda *xs: lax.dynamic_index_in_dim(jnp.stack(xs), number, keepdims=False), *so_far[:-1])
        return before, lambda: alike(so_far[-1], parts)
    own = _choose(number == 0, join(start, own), own)
    before, reach = as_one(functools.partial(moved, by=1, parts=parts), own), 1
    while reach < parts.many - 1:
        earlier = as_one(functools.partial(moved, by=reach, parts=parts), before)
        before = _choose(number > reach, join(earlier, before), before)
        reach *= 2
    before = _choose(number == 0, start, before)

    def after() -> Any:
        end = _choose(number == 0, own, join(before, own))
        return _of_last_part(end, parts)

    return before, after


def in_turn(passed_on: Callable[[Any], Any], start: Any, parts: Parts) -> tuple[Any, Any]:
    """What comes before this part, and on every device what comes after the last one, where two parts cannot be joined.

    passed_on(before) -> after: pytrees of arrays [B, N, ...], by this part's tokens; it exchanges nothing. start: what
    comes before the first part. Each device waits for the one before it: a permute per part, one after the other.
    """
    number = parts.number()

    @jax.checkpoint
    def turn(carry: tuple[Any, Any], now: Array) -> tuple[tuple[Any, Any], None]:
        before, after = carry
        came = _choose(number == 0, start, as_one(functools.partial(moved, by=1, parts=parts), after))
        after = lax.cond(number == now, passed_on, lambda x: x, came)
        return (_choose(number == now, came, before), after), None

    leaves, tree = jax.tree.flatten(start)
    *leaves, _ = vary_alike([*leaves, number])
    start = jax.tree.unflatten(tree, leaves)
    (before, after), _ = lax.scan(turn, (start, start), jnp.arange(parts.many))
    return before, _of_last_part(after, parts)


def alike(tree: Any, parts: Parts) -> Any:
    """What all devices have alike already, arrays [B, N, ...]; where shard_map checks that they do, a sum shows it."""
    is_checked = bool(jax.typeof(parts.number()).manual_axis_type.varying)
    return _of_last_part(tree, parts) if is_checked else tree


def _of_last_part(tree: Any, parts: Parts) -> Any:
    """What the last part has, on every device."""
    is_last = parts.number() == parts.many - 1
    return as_one(lambda x: lax.psum(jnp.where(is_last, x, 0), parts.names), tree)


# --- Ring -------------------------------------------------------------------------------------------------------------

# (turn, own, passed, fixed) -> (means under the softmax weights, a pytree of [B, T, N, ...]; lse [B, T, N]) of this
# device's queries over the keys of the part `turn` before its own. fixed: (what stays, what is passed) of other dtypes.
Turn = Callable[[int, Any, Any, Any], tuple[Any, Array]]


def softmax_ring(turn: Turn, parts: Parts, own: Any, passed: Any, fixed: tuple[Any, Any]) -> tuple[Any, Array]:
    """The means and lse of `turn` over the keys of all parts: (pytree of [B, T, N, ...], [B, T, N]), float32 or wider.

    own, fixed[0]: pytrees that stay on their device. passed, fixed[1]: those that go to each in turn, [B, S, ...].

    A part is attended to once the one before is, so that the memory of one serves all; what is sent waits for neither.

    Differentiable in own and passed, in both modes and to any order. Derivatives go over the parts once more, each from
    the device that has it, so that only arrays of a part's size are kept:

        mean = sum_j w_j mean_j    w_j = exp(lse_j - lse)
        dlse = sum_j w_j dlse_j    dmean = sum_j (w_j dmean_j + w_j mean_j dlse_j) - mean dlse
    """

    def at(number: int, own: Any, passed: Any, fixed: tuple[Any, Any]) -> tuple[Any, Array]:
        came, came_fixed = (around(tree, number, parts) for tree in (passed, fixed[1]))
        means, lse = turn(number, own, came, (fixed[0], came_fixed))
        return jax.tree.map(lambda x: x.astype(lse.dtype), means), lse

    @jax.custom_jvp
    def ring(own: Any, passed: Any, fixed: tuple[Any, Any]) -> tuple[Any, Array]:
        means, lse = at(0, own, passed, fixed)
        for number in range(1, parts.many):
            own, means, lse = lax.optimization_barrier((own, means, lse))
            means, lse = _merged(means, lse, *at(number, own, passed, fixed))
        return means, lse

    @ring.defjvp
    def _(primals: Any, tangents: Any) -> Any:
        means, lse = ring(*primals)
        fixed = primals[2]
        reference = jnp.where(jnp.isfinite(lse), lse, jnp.inf)  # of what sees nothing, or what is not finite

        def change(number: int, arrays: Any, tangents: Any, fixed: Any, reference: Array) -> Any:
            def weighed(own: Any, passed: Any) -> Any:
                means, lse = at(number, own, passed, fixed)
                counts = jnp.isfinite(lse) & jnp.isfinite(reference)
                weight = jnp.exp(jnp.where(counts, lse - reference, -jnp.inf))

                def product(mean: Array) -> Array:
                    return _along(weight, mean) * jnp.where(_along(counts, mean), mean, 0)

                return jax.tree.map(product, means), weight

            return jax.jvp(weighed, arrays, tangents)[1]

        total: Any = None
        of_own, of_passed, _ = tangents
        for number in range(parts.many):
            if total is not None:
                of_own, total = lax.optimization_barrier((of_own, total))
            step = jax.checkpoint(functools.partial(change, number))
            more = step(primals[:2], (of_own, of_passed), fixed, reference)
            total = more if total is None else jax.tree.map(jnp.add, total, more)
        of_means, of_lse = total

        def tangent(mean: Array, change: Array) -> Array:
            return change - jnp.where(jnp.isfinite(mean), mean, 0) * _along(of_lse, mean)

        return (means, lse), (jax.tree.map(tangent, means, of_means), of_lse)

    return ring(own, passed, fixed)


def _along(x: Array, mean: Array) -> Array:
    """[B, T, N] with axes of 1 for those that a mean has besides."""
    return x[(..., *[None] * (mean.ndim - x.ndim))]


def any_device(flag: Array) -> Array:
    """Whether a flag is True on any device that runs this program: loops that exchange have to end alike on all."""
    manual = jax.sharding.get_abstract_mesh().manual_axes
    varying = jax.typeof(flag).manual_axis_type.varying  # of nothing where shard_map does not keep count
    return lax.pmax(flag.astype(jnp.int32), tuple(sorted(varying)) or manual) > 0


def around(tree: Any, by: int, parts: Parts) -> Any:
    """Arrays [B, S, ...] of the part `by` before this one, or counted on from the last one: a permute per dtype."""
    if by == 0:
        return tree
    pairs = [(source, (source + by) % parts.many) for source in range(parts.many)]
    return as_one(lambda x: lax.ppermute(x, parts.names, pairs), tree)


def _merged(means: Any, lse: Array, more: Any, more_lse: Array) -> tuple[Any, Array]:
    """Over the keys of both."""
    largest = jnp.maximum(lse, more_lse)
    reference = jnp.where(largest == -jnp.inf, 0, largest)
    weights = jnp.exp(lse - reference), jnp.exp(more_lse - reference)
    total = weights[0] + weights[1]
    divisor = jnp.where(total == 0, 1, total)

    def merge(mean: Array, other: Array) -> Array:
        one, two = (_along(weight, mean) for weight in weights)
        return (one * mean + two * other) / _along(divisor, mean)

    return jax.tree.map(merge, means, more), jnp.where(total == 0, -jnp.inf, reference + jnp.log(divisor))


# --- Re-shard ---------------------------------------------------------------------------------------------------------


def whole_positions(x: Array, parts: Parts) -> Array:
    """[U, part of T, C] -> [ceil(U / parts), T, C]: all positions of a share of U independent sequences, those past
    the last one zeros. An all-to-all."""
    padded = jnp.pad(x, ((0, -x.shape[0] % parts.many), (0, 0), (0, 0)))
    return lax.all_to_all(padded, parts.names, split_axis=0, concat_axis=1, tiled=True)


def own_positions(x: Array, count: int, parts: Parts) -> Array:
    """[ceil(U / parts), T, C] -> [U, part of T, C], with U = count: what `whole_positions` did, undone."""
    return lax.all_to_all(x, parts.names, split_axis=1, concat_axis=0, tiled=True)[:count]


def in_whole_sequences(function: Callable[..., Array], arrays: Sequence[Array], key_heads: int, parts: Parts) -> Array:
    """function of whole sequences, of which each device has a share of the batch and the key heads.

    arrays: [B, part of T, K G, H], key heads with the query heads that read them, which the function gets as
      [share, T, G, H]. It gives [share, T, G, V], of which [B, part of T, K G, V] comes back. An all-to-all per dtype
      there and one back.
    """
    sent = as_one(functools.partial(whole_positions, parts=parts), [rows_of_heads(x, key_heads) for x in arrays])
    out = function(*(x.reshape(*x.shape[:2], -1, of.shape[-1]) for x, of in zip(sent, arrays)))
    return own_heads(out, len(arrays[0]), key_heads, parts)


def rows_of_heads(x: Array, key_heads: int) -> Array:
    """[B, part of T, K G, H] -> [B K, part of T, G H], as `whole_positions` takes them."""
    batch, own = x.shape[:2]
    return jnp.moveaxis(x.reshape(batch, own, key_heads, -1), 2, 1).reshape(batch * key_heads, own, -1)


def own_heads(x: Array, batch: int, key_heads: int, parts: Parts) -> Array:
    """[share of B K, T, G, V] -> [B, part of T, K G, V]: `whole_positions` of `rows_of_heads` undone."""
    width = x.shape[-1]
    x = own_positions(x.reshape(*x.shape[:2], -1), batch * key_heads, parts)
    x = x.reshape(batch, key_heads, x.shape[1], -1)
    return jnp.moveaxis(x, 1, 2).reshape(batch, x.shape[2], -1, width)


def swapped(x: Array, parts: Parts, *, whole: int, split: int) -> Array:
    """x, of which each device has a part along axis `whole`, with that axis whole and of axis `split` a part.

    An all-to-all; the number of parts divides the axis that is split.
    """
    return lax.all_to_all(x, parts.names, split_axis=split, concat_axis=whole, tiled=True)
