"""Softmax attention in tiles of queries and keys, with derivatives of its own.

A tile's logits are computed where they are needed, so that no buffer of T x S is held in either direction:

    forward    the online softmax over a row of tiles (Milakov & Gimelshein 2018; Rabe & Staats 2021; FlashAttention,
               Dao et al. 2022): maximum m, sum l and unnormalised output o of what has been seen,
               m' = max(m, max_s logits)   l' = exp(m - m') l + sum_s p_s   o' = exp(m - m') o + sum_s p_s v_s
               where p_s = exp(logits_s - m');   out = o / l   lse = m + log l
    tangent    p = exp(logits - lse)   w = p dlogits   dlse = sum_s w_s   dout = sum_s (w_s v_s + p_s dv_s) - dlse out
    transpose  w = p (dout . v - dout . out + dlse)   dq = w k   dk = w^T q   dv = p^T dout

Most tiles of a long sequence are full: each of their queries sees each of their keys, so nothing is masked. Tiles at an
edge, on the diagonal or in the padding, have a loop of their own, as have all tiles under a mask, a bias or segments.
With a softcap the logits before the bias are its softcap tanh(q k / softcap), of which the slopes are multiplied by
1 - tanh^2. Derivatives of the tangent and of the transpose are those of `_by_rows`, in plain JAX.
"""

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.custom_derivatives import SymbolicZero

from attnlab.attention._dispatch.deferred import tangent_call
from attnlab.attention._shared.finite import finite_or_zero, is_spoilt
from attnlab.attention._shared.softmax import softcap_slope, softcapped, softmax_parts

Array = jax.Array

_TILE = 512  # queries or keys of a tile, at most
_ROWS = 128  # queries of one of _by_rows' blocks, at most


class Inputs(NamedTuple):
    """Query [B, K, G, T, H], scaled; key [B, K, S, H]; value [B, K, S, V]; bias [B|1, K|1, G|1, T|1, S|1] or None. All
    of one dtype, in which all is computed."""

    query: Array
    key: Array
    value: Array
    bias: Array | None


@jax.tree_util.register_static
@dataclasses.dataclass(frozen=True)
class Predicate:
    """A mask by the numbers of queries and keys: a part of a pytree, without arrays."""

    sees: Callable[[Array, Array], Any]


class Sees(NamedTuple):
    """What hides keys, or None: mask [B|1, K|1, G|1, T|1, S|1], True = attend; segment ids [B, T] and [B, S]."""

    mask: Array | None
    query_ids: Array | None
    key_ids: Array | None
    predicate: Predicate | None = None


def tiled_attention(
    inputs: Inputs, sees: Sees, *, is_causal: bool, softcap: float | None = None
) -> tuple[Array, Array]:
    """(out [B, K, G, T, V], lse [B, K, G, T]), differentiable in both modes and to any order.

    A query that sees no key gives 0 and lse = -inf, with zero gradients. Inside shard_map all arrays vary alike.

    Complexity: O(T S) time, O(T + S) memory.
    """

    @jax.custom_jvp
    def attend(inputs: Inputs, sees: Sees) -> tuple[Array, Array]:
        return _forward(inputs, sees, is_causal, softcap)

    @functools.partial(attend.defjvp, symbolic_zeros=True)
    def _(primals: Any, tangents: Any) -> Any:
        results = attend(*primals)
        along = {name: t for name, t in tangents[0]._asdict().items() if not (t is None or isinstance(t, SymbolicZero))}
        names = tuple(along)  # what the rules close over lives longer than the tangents

        def split(inputs: Inputs, sees: Sees) -> Any:
            """The form in plain JAX as a function of what has a tangent, and that."""

            def plain(*arrays: Array) -> tuple[Array, Array]:
                return _by_rows(inputs._replace(**dict(zip(names, arrays))), sees, is_causal, softcap)

            return plain, [getattr(inputs, name) for name in names]

        def plain_tangent(residuals: Any, tangents: Any) -> Any:
            plain, arrays = split(*residuals[:2])
            return jax.jvp(plain, arrays, [tangents[name] for name in names])[1]

        def plain_transpose(residuals: Any, cotangents: Any) -> Any:
            plain, arrays = split(*residuals[:2])
            return dict(zip(names, jax.vjp(plain, *arrays)[1](cotangents)))

        def tangent(residuals: Any, tangents: Any) -> Any:
            inputs, sees, results = residuals
            return _tangent(inputs, sees, results, Inputs(*map(tangents.get, Inputs._fields)), is_causal, softcap)

        def transpose(residuals: Any, cotangents: Any) -> Any:
            inputs, sees, results = residuals
            gradients = _transpose(inputs, sees, results, cotangents, is_causal, softcap, "bias" in names)
            return {name: getattr(gradients, name) for name in names}

        return results, tangent_call(
            _with_derivatives_of(plain_tangent, tangent),
            _with_derivatives_of(plain_transpose, transpose),
            results,
            (*primals, results),
            along,
        )

    return attend(inputs, sees)


def _with_derivatives_of(plain: Callable[..., Any], function: Callable[..., Any]) -> Callable[..., Any]:
    """function, which equals plain but for rounding, with plain's derivatives."""
    wrapped = jax.custom_jvp(function)

    def rule(primals: Any, tangents: Any) -> Any:
        leaves, tree = jax.tree.flatten(primals)
        given = {at: t for at, t in enumerate(jax.tree.leaves(tangents)) if not isinstance(t, SymbolicZero)}

        def of_given(*arrays: Any) -> Any:
            filled = dict(enumerate(leaves)) | dict(zip(given, arrays))
            return plain(*jax.tree.unflatten(tree, list(filled.values())))

        return wrapped(*primals), jax.jvp(of_given, [leaves[at] for at in given], list(given.values()))[1]

    wrapped.defjvp(rule, symbolic_zeros=True)
    return wrapped


# --- Tiles ------------------------------------------------------------------------------------------------------------


class _Cut(NamedTuple):
    """An axis of this length in parts of equal size, of which the last one is padded."""

    length: int
    size: int
    parts: int


def _cut(length: int, most: int) -> _Cut:
    parts = max(-(-length // most), 1)
    size = max(-(-length // parts), 1)
    return _Cut(length, size if parts == 1 else min(-(-size // 16) * 16, most), parts)


class _Grid(NamedTuple):
    """Tiles by rows (parts of queries) and columns (of keys). edge, full: bool [rows, columns], False in both for tiles
    of which nothing is seen."""

    rows: _Cut
    columns: _Cut
    is_causal: bool
    edge: np.ndarray
    full: np.ndarray


def _grid(inputs: Inputs, sees: Sees, is_causal: bool) -> _Grid:
    rows, columns = _cut(inputs.query.shape[3], _TILE), _cut(inputs.key.shape[2], _TILE)
    first_query = np.arange(rows.parts)[:, None] * rows.size
    last_query = np.minimum(first_query + rows.size, rows.length) - 1
    first_key = np.arange(columns.parts) * columns.size
    last_key = first_key + columns.size - 1
    seen = (first_key <= last_query) | (not is_causal)
    full = (last_key < columns.length) & ((last_key <= first_query) | (not is_causal))
    if inputs.bias is not None or any(x is not None for x in sees):
        full = np.zeros_like(full)
    return _Grid(rows, columns, is_causal, seen & ~full, full)


def _pad(x: Any, axis: int, cut: _Cut, fill: Any = 0) -> Any:
    """x with the axis' last part filled up. An axis that broadcasts is left alone, and None."""
    if x is None or x.shape[axis] != cut.length or cut.parts * cut.size == cut.length:
        return x
    widths = [(0, 0)] * x.ndim
    widths[axis] = (0, cut.parts * cut.size - cut.length)
    return jnp.pad(x, widths, constant_values=fill)


def _padded(grid: _Grid, inputs: Inputs, sees: Sees) -> tuple[Inputs, Sees]:
    rows, columns = grid.rows, grid.columns

    def both(x: Any) -> Any:
        return _pad(_pad(x, 3, rows), 4, columns)

    query, key, value, bias = inputs
    mask, query_ids, key_ids, predicate = sees
    return (
        Inputs(_pad(query, 3, rows), _pad(key, 2, columns), _pad(value, 2, columns), both(bias)),
        Sees(both(mask), _pad(query_ids, 1, rows), _pad(key_ids, 1, columns), predicate),
    )


def _take(x: Array, axis: int, cut: _Cut, at: Any) -> Array:
    """Part `at` of a padded axis; all of one that broadcasts."""
    if cut.parts == 1 or x.shape[axis] != cut.parts * cut.size:
        return x
    return lax.dynamic_slice_in_dim(x, at * cut.size, cut.size, axis)


def _put(x: Array, part: Array, axis: int, cut: _Cut, at: Any) -> Array:
    if cut.parts == 1 or x.shape[axis] != cut.parts * cut.size:
        return part
    return lax.dynamic_update_slice_in_dim(x, part, at * cut.size, axis)


def _each(part: Callable[[Any], Any], axes: Sequence[int], cut: _Cut) -> Any:
    """The arrays that part(at) gives for every part, joined on these axes."""
    if cut.parts == 1:
        return part(0)
    parts = lax.map(part, jnp.arange(cut.parts, dtype=jnp.int32))
    return tuple(_join(x, axis, cut) for x, axis in zip(parts, axes, strict=True))


def _join(parts: Array, axis: int, cut: _Cut) -> Array:
    """[parts, ...] -> the axis without its padding."""
    moved = jnp.moveaxis(parts, 0, axis)
    joined = moved.reshape(*moved.shape[:axis], -1, *moved.shape[axis + 2 :])
    return lax.slice_in_dim(joined, 0, cut.length, axis=axis)


def _visit(
    tiles: np.ndarray, line: Any, body: Callable[[Any, Any], Any], state: Any, empty: Callable[[Any], Any]
) -> Any:
    """state = body(at, state) for the tiles of this line, True in bool [lines, at], which lie side by side in each.

    empty: gives a loop the state to begin with, where body takes None for what it has not seen yet.
    """
    counts = tiles.sum(1)
    if not counts.any():
        return state
    start = tiles.argmax(1).astype(np.int32)
    if (counts == 1).all():
        return body(_look_up(start, line), state)
    end = start + counts.astype(np.int32)
    return lax.fori_loop(_look_up(start, line), _look_up(end, line), body, empty(state))


def _look_up(table: np.ndarray, at: Any) -> Any:
    if (table == table[0]).all():
        return table[0]
    return jnp.asarray(table)[at]


def _rows(x: Array, grid: _Grid, i: Any) -> Array:
    """Row i of tiles of [B, K, G, T, ...]: [B, K, R, ...], with the queries of G heads one after the other."""
    part = _take(x, 3, grid.rows, i)
    return part.reshape(*part.shape[:2], -1, *part.shape[4:])


def _by_head(x: Array, grid: _Grid) -> Array:
    """[B, K, R, ...] -> [B, K, G, t, ...]."""
    return x.reshape(*x.shape[:2], -1, grid.rows.size, *x.shape[3:])


def _of_tile(x: Array, grid: _Grid, group: int, i: Any, j: Any) -> Array:
    """A tile of [B|1, K|1, G|1, T|1, S|1]: [B|1, K|1, R|1, s|1]."""
    part = _take(_take(x, 3, grid.rows, i), 4, grid.columns, j)
    if part.shape[2:4] != (1, 1):
        part = jnp.broadcast_to(part, (*part.shape[:2], group, grid.rows.size, part.shape[4]))
    return part.reshape(*part.shape[:2], -1, part.shape[4])


def _bias_and_visible(
    grid: _Grid, inputs: Inputs, sees: Sees, i: Any, j: Any, is_edge: bool
) -> tuple[Array | None, Array | None]:
    """A tile's bias and which of its keys its queries see, [B|1, K|1, R|1, s|1], or None."""
    if not is_edge:
        return None, None
    rows, columns, group = grid.rows, grid.columns, inputs.query.shape[2]
    bias, visible = None, []
    if inputs.bias is not None:
        bias = _of_tile(inputs.bias, grid, group, i, j)
        visible.append(bias != -jnp.inf)  # where a key may then be NaN
    key_index = j * columns.size + lax.broadcasted_iota(jnp.int32, (1, 1, 1, columns.size), 3)
    if grid.is_causal or sees.predicate is not None:
        query_index = lax.broadcasted_iota(jnp.int32, (1, 1, group * rows.size, 1), 2)
        query_index = i * rows.size + (query_index if group == 1 else query_index % rows.size)
        if grid.is_causal:
            visible.append(key_index <= query_index)
        if sees.predicate is not None:
            visible.append(sees.predicate.sees(query_index, key_index))
    if columns.parts * columns.size != columns.length:
        visible.append(key_index < columns.length)
    if sees.mask is not None:
        visible.append(_of_tile(sees.mask, grid, group, i, j))
    if sees.query_ids is not None and sees.key_ids is not None:
        of_queries, of_keys = _take(sees.query_ids, 1, rows, i), _take(sees.key_ids, 1, columns, j)
        of_queries = jnp.concatenate([of_queries] * group, axis=1)
        visible.append(of_queries[:, None, :, None] == of_keys[:, None, None, :])
    return bias, functools.reduce(jnp.logical_and, visible) if visible else None


def _where(visible: Array | None, x: Array, hidden: Any) -> Array:
    return x if visible is None else jnp.where(visible, x, hidden)


def _product(equation: str, weights: Array, x: Array, is_edge: bool) -> Array:
    """einsum(equation, weights, x), which sums over the last axis of weights. At an edge a weight of 0 counts for
    nothing, also where x is NaN or infinite, and any other makes NaN of all channels.

    Without a branch for finite x: one for all examples would have the devices that share them wait for each other.
    """
    if not is_edge:
        return jnp.einsum(equation, weights, x)
    reached = jnp.abs(weights) @ is_spoilt(x).astype(x.dtype)[..., None] > 0
    return jnp.where(reached, jnp.nan, jnp.einsum(equation, weights, finite_or_zero(x)))


# --- Values -----------------------------------------------------------------------------------------------------------


class _Running(NamedTuple):
    """The softmax over the keys so far: [B, K, R, 1], the same, and [B, K, R, V]."""

    largest: Array
    total: Array
    out: Array


def _forward(inputs: Inputs, sees: Sees, is_causal: bool, softcap: float | None) -> tuple[Array, Array]:
    grid = _grid(inputs, sees, is_causal)
    inputs, sees = _padded(grid, inputs, sees)

    def row(i: Any) -> tuple[Array, Array]:
        query = _rows(inputs.query, grid, i)

        def empty(running: _Running | None) -> _Running:
            shape, width = query.shape[:-1], inputs.value.shape[-1]
            start = (jnp.full_like(query, fill, shape=(*shape, n)) for fill, n in ((-jnp.inf, 1), (0, 1), (0, width)))
            return running or _Running(*start)

        def tile(is_edge: bool, j: Any, running: _Running | None) -> _Running:
            key, value = (_take(x, 2, grid.columns, j) for x in (inputs.key, inputs.value))
            bias, visible = _bias_and_visible(grid, inputs, sees, i, j, is_edge)
            logits = softcapped(jnp.einsum("BKRH,BKSH->BKRS", query, key), softcap)
            logits = _where(visible, logits if bias is None else logits + bias, -jnp.inf)
            largest = logits.max(-1, keepdims=True)
            if running is not None:
                largest = jnp.maximum(running.largest, largest)
            reference = jnp.where(largest == -jnp.inf, 0, largest)
            numerators = jnp.exp(logits - reference)
            total = numerators.sum(-1, keepdims=True)
            out = _product("BKRS,BKSV->BKRV", numerators, value, is_edge)
            if running is not None:
                rescale = jnp.exp(running.largest - reference)
                total, out = rescale * running.total + total, rescale * running.out + out
            return _Running(largest, total, out)

        # The edge first: where it is one tile in each row, that tile is the state that the full ones begin with.
        running = _visit(grid.edge, i, functools.partial(tile, True), None, empty)
        running = _visit(grid.full, i, functools.partial(tile, False), running, empty)
        largest, total, out = empty(running)
        denominator = jnp.where(total == 0, 1, total)
        lse = jnp.where(total == 0, -jnp.inf, largest + jnp.log(denominator))
        return _by_head(out / denominator, grid), _by_head(lse[..., 0], grid)

    return _each(row, (3, 3), grid.rows)


# --- Derivatives ------------------------------------------------------------------------------------------------------


def _tangent(
    inputs: Inputs,
    sees: Sees,
    results: tuple[Array, Array],
    tangents: Inputs,
    is_causal: bool,
    softcap: float | None,
) -> tuple[Array, Array]:
    grid = _grid(inputs, sees, is_causal)
    out, lse = results
    reference = _pad(jnp.where(lse == -jnp.inf, jnp.inf, lse), 3, grid.rows, jnp.inf)
    inputs, sees = _padded(grid, inputs, sees)
    tangents, _ = _padded(grid, tangents, sees)

    def row(i: Any) -> tuple[Array, Array]:
        query, lse = (_rows(x, grid, i) for x in (inputs.query, reference))

        def empty(sums: Any) -> Any:
            shape, width = query.shape[:-1], inputs.value.shape[-1]
            return sums or tuple(jnp.zeros_like(query, shape=(*shape, n)) for n in (1, width))

        def tile(is_edge: bool, j: Any, sums: Any) -> Any:
            key, value = (_take(x, 2, grid.columns, j) for x in (inputs.key, inputs.value))
            bias, visible = _bias_and_visible(grid, inputs, sees, i, j, is_edge)
            logits = softcapped(jnp.einsum("BKRH,BKSH->BKRS", query, key), softcap)
            weights = jnp.exp((logits if bias is None else logits + bias) - lse[..., None])
            changes = jnp.zeros_like(weights)  # of the logits
            if tangents.query is not None:
                changes += jnp.einsum("BKRH,BKSH->BKRS", _rows(tangents.query, grid, i), key)
            if tangents.key is not None:
                changes += jnp.einsum("BKRH,BKSH->BKRS", query, _take(tangents.key, 2, grid.columns, j))
            if softcap is not None:
                changes *= softcap_slope(logits, softcap)
            if tangents.bias is not None:
                changes += _of_tile(tangents.bias, grid, inputs.query.shape[2], i, j)
            weights, shifts = _where(visible, weights, 0), _where(visible, weights * changes, 0)
            total = shifts.sum(-1, keepdims=True)
            change = _product("BKRS,BKSV->BKRV", shifts, value, is_edge)
            if tangents.value is not None:
                value_tangent = _take(tangents.value, 2, grid.columns, j)
                change += _product("BKRS,BKSV->BKRV", weights, value_tangent, is_edge)
            return (total, change) if sums is None else (sums[0] + total, sums[1] + change)

        sums = _visit(grid.edge, i, functools.partial(tile, True), None, empty)
        sums = _visit(grid.full, i, functools.partial(tile, False), sums, empty)
        total, change = empty(sums)
        change -= total * _rows(padded_out, grid, i)
        return _by_head(change, grid), _by_head(total[..., 0], grid)

    padded_out = _pad(out, 3, grid.rows)
    return _each(row, (3, 3), grid.rows)


class _Gradients(NamedTuple):
    """Of the inputs: query and bias whole, of the columns so far; key and value of a column, of the rows so far."""

    query: Any
    key: Any
    value: Any
    bias: Any


def _transpose(
    inputs: Inputs,
    sees: Sees,
    results: tuple[Array, Array],
    cotangents: tuple[Array, Array],
    is_causal: bool,
    softcap: float | None,
    of_bias: bool,
) -> Inputs:
    grid = _grid(inputs, sees, is_causal)
    rows, columns = grid.rows, grid.columns
    # Of a sum they are constants, which XLA would look through one by one while it compiles: seconds, for long inputs.
    out_cotangent, lse_cotangent = lax.optimization_barrier(cotangents)
    out, lse = results
    # What is not finite comes by lse and the cotangents, from queries that see it. Those without a cotangent, or
    # without a key, are left out.
    live = ((out_cotangent != 0).any(-1) | (lse_cotangent != 0)) & (lse != -jnp.inf)
    reference = _pad(jnp.where(live, lse, jnp.inf), 3, rows, jnp.inf)
    offset = _pad(jnp.where(live, (out_cotangent * out).sum(-1) - lse_cotangent, 0), 3, rows)
    query, key, value = map(finite_or_zero, inputs[:3])
    inputs, sees = _padded(grid, Inputs(query, key, value, inputs.bias), sees)
    upstream = _pad(out_cotangent, 3, rows)

    def column(carry: Any, j: Any) -> tuple[Any, Any]:
        key, value = (_take(x, 2, columns, j) for x in (inputs.key, inputs.value))

        def empty(sums: _Gradients) -> _Gradients:
            if sums.key is not None:
                return sums
            return sums._replace(key=jnp.zeros_like(key), value=jnp.zeros_like(value))

        def tile(is_edge: bool, i: Any, sums: _Gradients) -> _Gradients:
            query, dout, lse, shift = (_rows(x, grid, i) for x in (inputs.query, upstream, reference, offset))
            bias, visible = _bias_and_visible(grid, inputs, sees, i, j, is_edge)
            bias, visible = (None if x is None else jnp.swapaxes(x, 2, 3) for x in (bias, visible))
            # Keys by queries, as the products for the keys' gradients read them.
            logits = softcapped(jnp.einsum("BKSH,BKRH->BKSR", key, query), softcap)
            weights = jnp.exp((logits if bias is None else logits + bias) - lse[:, :, None])
            changes = weights * (jnp.einsum("BKSV,BKRV->BKSR", value, dout) - shift[:, :, None])
            weights, changes = _where(visible, weights, 0), _where(visible, changes, 0)
            slopes = changes if softcap is None else changes * softcap_slope(logits, softcap)
            of_key = jnp.einsum("BKSR,BKRH->BKSH", slopes, query)
            of_value = _product("BKSR,BKRV->BKSV", weights, dout, is_edge)
            of_query = _by_head(jnp.einsum("BKSR,BKSH->BKRH", slopes, key), grid)
            if sums.query is not None:
                of_query = _put(sums.query, _take(sums.query, 3, rows, i) + of_query, 3, rows, i)
            if sums.key is not None:
                of_key, of_value = sums.key + of_key, sums.value + of_value
            of_bias = sums.bias
            if of_bias is not None:
                row = _take(of_bias, 3, rows, i)
                old = _take(row, 4, columns, j)
                summed = [axis for axis, n in enumerate(old.shape) if n == 1]
                by_query = _by_head(jnp.swapaxes(changes, 2, 3), grid)
                row = _put(row, old + by_query.sum(summed, keepdims=True), 4, columns, j)
                of_bias = _put(of_bias, row, 3, rows, i)
            return _Gradients(of_query, of_key, of_value, of_bias)

        sums = _Gradients(carry[0], None, None, carry[1])
        sums = _visit(grid.edge.T, j, functools.partial(tile, True), sums, empty)
        sums = _visit(grid.full.T, j, functools.partial(tile, False), sums, empty)
        return (sums.query, sums.bias), (sums.key, sums.value)

    of_bias_so_far = jnp.zeros_like(inputs.bias) if of_bias and inputs.bias is not None else None
    if rows.parts == columns.parts == 1:
        (of_query, bias), (of_key, of_value) = column((None, of_bias_so_far), 0)
    else:
        carry = (jnp.zeros_like(inputs.query), of_bias_so_far)
        (of_query, bias), parts = lax.scan(column, carry, jnp.arange(columns.parts, dtype=jnp.int32))
        of_key, of_value = (_join(x, 2, columns) for x in parts)
    return Inputs(
        lax.slice_in_dim(of_query, 0, rows.length, axis=3),
        lax.slice_in_dim(of_key, 0, columns.length, axis=2),
        lax.slice_in_dim(of_value, 0, columns.length, axis=2),
        None if bias is None else bias[:, :, :, : rows.length, : columns.length],
    )


def _by_rows(inputs: Inputs, sees: Sees, is_causal: bool, softcap: float | None) -> tuple[Array, Array]:
    """The same in plain JAX, a block of queries at a time: what is differentiated twice.

    Of finite numbers: NaN came with the first results, and times a zero cotangent would reach the keys of others.
    """
    query, key, value = map(finite_or_zero, inputs[:3])
    bias = inputs.bias
    mask, query_ids, key_ids, predicate = sees
    queries, keys = query.shape[3], key.shape[2]
    # Of causal attention, each part of the queries leaves out the keys after its last one.
    size = -(-queries // min(4, -(-queries // _ROWS))) if is_causal else queries
    outs, lses = [], []
    for start in range(0, queries, size):
        end = min(start + size, queries)
        seen = min(end, keys) if is_causal else keys
        part = Inputs(query[:, :, :, start:end], key[:, :, :seen], value[:, :, :seen], _part(bias, start, end, seen))
        ids = [x if x is None else x[:, first:last] for x, first, last in ((query_ids, start, end), (key_ids, 0, seen))]
        hides = Sees(_part(mask, start, end, seen), ids[0], ids[1], predicate)
        out, lse = _some_rows(part, hides, start if is_causal else None, softcap)
        outs.append(out)
        lses.append(lse)
    return jnp.concatenate(outs, axis=3), jnp.concatenate(lses, axis=3)


def _part(x: Array | None, start: int, end: int, keys: int) -> Array | None:
    """Queries start to end and the first keys of [B|1, K|1, G|1, T|1, S|1]."""
    if x is None:
        return None
    x = x if x.shape[3] == 1 else x[:, :, :, start:end]
    return x if x.shape[4] == 1 else x[..., :keys]


def _some_rows(inputs: Inputs, sees: Sees, start: int | None, softcap: float | None) -> tuple[Array, Array]:
    """start: the number of the first query, if they see earlier keys alone."""
    query, key, value, bias = inputs
    rows = _cut(query.shape[3], _ROWS)
    query, bias, mask = (_pad(x, 3, rows) for x in (query, bias, sees.mask))
    query_ids = _pad(sees.query_ids, 1, rows)
    key_index = jnp.arange(key.shape[2], dtype=jnp.int32)

    @functools.partial(jax.checkpoint, prevent_cse=False)
    def row(i: Any) -> tuple[Array, Array]:
        logits = softcapped(jnp.einsum("BKGTH,BKSH->BKGTS", _take(query, 3, rows, i), key), softcap)
        visible = jnp.ones_like(logits, bool)
        if bias is not None:
            logits = logits + _take(bias, 3, rows, i)
        query_index = (start or 0) + i * rows.size + jnp.arange(rows.size, dtype=jnp.int32)
        if start is not None:
            visible &= (key_index[None, :] <= query_index[:, None])[None, None, None]
        if sees.predicate is not None:
            visible &= sees.predicate.sees(query_index[:, None], key_index[None])
        if mask is not None:
            visible &= _take(mask, 3, rows, i)
        if query_ids is not None and sees.key_ids is not None:
            own = _take(query_ids, 1, rows, i)
            visible &= own[:, None, None, :, None] == sees.key_ids[:, None, None, None, :]
        numerators, denominator, lse = softmax_parts(logits, visible)
        return jnp.einsum("BKGTS,BKSV->BKGTV", numerators / denominator, value), lse

    return _each(row, (3, 3), rows)
