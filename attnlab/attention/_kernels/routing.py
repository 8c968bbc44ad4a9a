"""Routing as banded flash attention: "strict" over sorted keys, its lists of tiles computed with the clusters; "global"
within each cluster, with positions as coordinates."""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from attnlab.attention._dispatch.choice import Kernel
from attnlab.attention._dispatch.kernel_call import kernel_call, like
from attnlab.attention._kernels.backends import first_refusal, kernel_module, on_backends
from attnlab.attention._shared.clusters import members_of_both, strict_ranges, taken_once
from attnlab.attention._shared.finite import spoil_if_any

Array = jax.Array


class _Routes(NamedTuple):
    """What decides who sees whom: similarities [B, T, N, c] and clusters [B, T, N] of queries and keys, mask [B, T]."""

    similarity: tuple[Array, Array]
    cluster: tuple[Array, Array]
    key_mask: Array | None


class _Options(NamedTuple):
    """Of the mechanism, those that decide who sees whom."""

    num_clusters: int
    window: int
    is_causal: bool
    self_is_last: bool
    share_qk: bool


class _Rows(NamedTuple):
    """Routing as banded attention: one row of a batch per head of a sequence (strict), or per cluster of one (global).

    pattern: the kernels'. cut: query, key, value [B, N, T, H] -> [rows, tokens, 1, H]. join: [rows, tokens, V] ->
    [B, N, T, V], sums over the clusters. times_taken: float32 [B, T, N], by how many clusters the query was.
    """

    pattern: Any
    cut: Callable[..., tuple[Array, ...]]
    join: Callable[[Array], Array]
    times_taken: Array


_MODULES = ("banded_flash", "banded_flash_backward")
_MOST_IN_A_BLOCK = {"tpu": 256, "gpu": 128}


def _row_block(backend: str, tokens: int, window: int) -> int:
    return min(_MOST_IN_A_BLOCK[backend], 256 if min(tokens, window) >= 256 else 128)


def _strict_pattern(backend: str, first: Any, end: Any, window: int) -> Any:
    from kernels_pallas.patterns import SortedIntervals

    length = first.shape[-1]
    return SortedIntervals(first, end, length, reach=window, block=_row_block(backend, length, window))


def _strict_rows(backend: str, routes: _Routes, options: _Options) -> _Rows:
    batch, length, heads = routes.cluster[0].shape
    ranges_of: Any = functools.partial(
        strict_ranges,
        num_clusters=options.num_clusters,
        window=options.window,
        is_causal=options.is_causal,
    )
    mask_axis = None if routes.key_mask is None else 0
    over_heads = jax.vmap(ranges_of, in_axes=(1, 1, None))
    ranges = jax.vmap(over_heads, in_axes=(0, 0, mask_axis))(*routes.cluster, routes.key_mask)
    end = ranges.end
    if options.self_is_last:  # causal: a query's own key is the last of its range, and counts if it is the only one
        end = jnp.where(end - 1 > ranges.first, end - 1, end)
    first, end = (
        jnp.take_along_axis(x, ranges.order_q, axis=2).reshape(batch * heads, length) for x in (ranges.first, end)
    )
    back = jnp.argsort(ranges.order_q, axis=2)

    def ordered(x: Array, order: Array) -> Array:
        return jnp.take_along_axis(x, order[..., None], axis=2)

    def cut(*arrays: Array) -> tuple[Array, ...]:
        orders = (ranges.order_q, ranges.order_k, ranges.order_k)
        return tuple(ordered(x, order).reshape(batch * heads, length, 1, -1) for x, order in zip(arrays, orders))

    def join(out: Array) -> Array:
        return ordered(out.reshape(batch, heads, length, -1), back)

    taken = taken_once(routes.cluster[0][..., None], routes.key_mask)
    return _Rows(_strict_pattern(backend, first, end, options.window), cut, join, taken.astype(jnp.float32))


def _global_pattern(backend: str, starts: Any, ends: Any, coordinates: Any, window: int) -> Any:
    from kernels_pallas.patterns import AllPairs

    return AllPairs(starts, ends, coordinates, block=_row_block(backend, window, window))


def _global_rows(backend: str, routes: _Routes, options: _Options) -> _Rows:
    window = options.window
    batch, heads, _, length = routes.similarity[0].shape
    taken_q, taken_k = members_of_both(routes.similarity, routes.key_mask, window, options.share_qk)
    rows = batch * heads * options.num_clusters
    position_q, position_k = (x.reshape(rows, window) for x in (taken_q, taken_k))
    real_q, real_k = position_q < length, position_k < length
    end = position_q + 1 if options.is_causal else jnp.full_like(position_q, length)
    if options.self_is_last:  # causal: others are those before
        earliest = jnp.min(jnp.where(real_k, position_k, length), axis=1, keepdims=True)
        end = jnp.where(position_q > earliest, position_q, end)
    ends, coordinates = jnp.where(real_q, end, 0), jnp.where(real_k, position_k, -1)
    pattern = _global_pattern(backend, jnp.zeros_like(position_q), ends, coordinates, window)

    def over_heads(function: Callable[..., Array]) -> Callable[..., Array]:
        return jax.vmap(jax.vmap(function))

    def cut(*arrays: Array) -> tuple[Array, ...]:
        gather = over_heads(lambda x, positions: x.at[positions].get(mode="fill", fill_value=0))
        taken = (taken_q, taken_k, taken_k)
        return tuple(gather(x, positions).reshape(rows, window, 1, -1) for x, positions in zip(arrays, taken))

    def join(out: Array) -> Array:
        nothing = jnp.zeros((batch, heads, length, out.shape[-1]), out.dtype)
        scatter = over_heads(lambda total, positions, x: total.at[positions].add(x, mode="drop"))
        return scatter(nothing, taken_q, out.reshape(*taken_q.shape, -1))

    return _Rows(pattern, cut, join, jnp.moveaxis(join(jnp.ones((rows, window, 1)))[..., 0], 1, 2))


def _call(
    backend: str,
    xla: Callable[..., Any],
    query: Array,
    key: Array,
    value: Array,
    similarity: tuple[Array, Array],
    cluster: tuple[Array, Array],
    key_mask: Array | None,
    spoilt: Array,
    *,
    membership: str,
    scale: Any,
    epsilon: float,
    operands: Any,
    **others: Any,
) -> tuple[Array, Array]:
    banded_flash, banded_flash_backward = (kernel_module(backend, name) for name in _MODULES)
    options, is_strict, dtype = _Options(**others), membership == "strict", query.dtype

    def prepare(routes: _Routes) -> tuple[_Rows, Callable[..., Any], Callable[..., Any]]:
        rows = (_strict_rows if is_strict else _global_rows)(backend, routes, options)

        def cut(arrays: Any) -> Any:
            return rows.cut(*(jnp.moveaxis(x.astype(operands), 2, 1) for x in arrays))

        def join(out: Array) -> Array:
            return jnp.moveaxis(rows.join(out[:, :, 0].astype(dtype)), 1, 2)

        return rows, cut, join

    def kernel(arrays: Any, routes: _Routes, keep: bool) -> tuple[Any, Any]:
        *tokens, scale = arrays
        rows, cut, join = prepare(routes)
        out, lse = banded_flash.banded_flash_attention(*cut(tokens), pattern=rows.pattern, scale=scale)
        # Kept with the batch in front again, by which a call is spread over devices.
        return (join(out), rows.times_taken), tuple(x.reshape(arrays[0].shape[0], -1, *x.shape[1:]) for x in (out, lse))

    def gradients(arrays: Any, routes: _Routes, kept: Any, cotangents: Any) -> Any:
        *tokens, scale = arrays
        rows, cut, join = prepare(routes)
        kept = [x.reshape(-1, *x.shape[2:]) for x in kept]
        parts, back = jax.vjp(cut, tokens)
        (to_out,) = jax.linear_transpose(join, kept[0])(cotangents[0])
        *to_parts, to_scale = banded_flash_backward.banded_flash_gradients(
            *parts, *kept, to_out, jnp.zeros_like(kept[1]), pattern=rows.pattern, scale=scale
        )
        return (*back(tuple(to_parts))[0], to_scale)

    run: Any = functools.partial(xla, membership=membership, epsilon=epsilon, operands=operands, **others)

    def blocked(arrays: Any, routes: _Routes) -> Any:
        *tokens, scale = arrays
        out, count = run(*tokens, *routes, jnp.zeros_like(tokens[2][..., :1], bool), scale=scale)
        out = out if is_strict else out * (count + epsilon)[..., None].astype(out.dtype)
        return out, count.astype(jnp.float32)

    arrays = (query, key, value, jnp.asarray(scale, jnp.float32))
    batch, length, heads, _ = query.shape
    rows, tokens = _rows_of(query, membership, options)
    results = (like(value), jax.ShapeDtypeStruct((batch, length, heads), jnp.float32))
    kept = (
        jax.ShapeDtypeStruct((batch, rows // batch, tokens, 1, value.shape[-1]), operands),
        jax.ShapeDtypeStruct((batch, rows // batch, tokens, 1), jnp.float32),
    )
    routes = _Routes(similarity, cluster, key_mask)
    of_routes = _Routes._make((("BN..",) * 2, ("B.N",) * 2, None if key_mask is None else "B."))
    layouts = (("B.N.", "B.N.", "B.N.", ""), of_routes, ("B.N.", "B.N"), ("BN...", "BN.."))
    out, count = kernel_call(kernel, gradients, blocked, arrays, routes, results=results, kept=kept, layouts=layouts)
    if not is_strict:
        out = out / (count + epsilon)[..., None].astype(out.dtype)

    def seen() -> Array:
        tokens = (jnp.zeros_like(query), jnp.zeros_like(key), jnp.zeros_like(value[..., :1]))
        return jnp.isnan(run(*tokens, *routes, spoilt, scale=1.0)[0][..., 0])

    return spoil_if_any(out, spoilt, seen), count.astype(jnp.int32)


def _rows_of(query: Any, membership: str, options: _Options) -> tuple[int, int]:
    """(rows, tokens of a row) of the kernels' arrays."""
    batch, length, heads, _ = query.shape
    if membership == "strict":
        return batch * heads, length
    return batch * heads * options.num_clusters, options.window


def _refusal(
    backend: str,
    query: Array,
    key: Array,
    value: Array,
    similarity: Any,
    cluster: Any,
    key_mask: Any,
    spoilt: Any,
    *,
    membership: str,
    scale: Any,
    epsilon: float,
    operands: Any,
    **others: Any,
) -> str | None:
    options = _Options(**others)
    if options.self_is_last and not options.is_causal:
        return "serves share_qk where it is causal: else a token's own key lies among those that it sees"
    rows, tokens = _rows_of(query, membership, options)
    bound = jax.ShapeDtypeStruct((rows, tokens), jnp.int32)
    pattern = (
        _strict_pattern(backend, bound, bound, options.window)
        if membership == "strict"
        else _global_pattern(backend, bound, bound, bound, options.window)
    )
    arrays = [jax.ShapeDtypeStruct((rows, tokens, 1, x.shape[-1]), operands) for x in (query, key, value)]
    return first_refusal(backend, _MODULES, *arrays, pattern=pattern)


KERNELS = on_backends(_call, _refusal)


def _step(
    xla: Callable[..., Array], query: Array, key: Array, value: Array, cluster: Array, used: Array, hidden: Array
) -> Array:
    def kernel(arrays: Any, fixed: Any, keep: bool) -> tuple[Array, Any]:
        return kernel_module("tpu", "routing_step").routing_step(*arrays, *fixed), ()

    def plain(arrays: Any, fixed: Any) -> Array:
        return xla(*arrays, *fixed)

    arrays, fixed = (query, key, value), (cluster, used, hidden)
    layouts = (("BN.", "BN...", "BN..."), ("BN",) * 3, "BN.", ())
    results = like(query, width=value.shape[-1])
    return kernel_call(kernel, None, plain, arrays, fixed, results=results, layouts=layouts)


def _step_refusal(query: Any, key: Any, value: Any, *_: Any) -> str | None:
    return first_refusal("tpu", ["routing_step"], key, value)


STEP_KERNELS = {"pallas_tpu": Kernel(_step, _step_refusal)}
