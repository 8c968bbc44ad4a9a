"""Pointwise attention: a weight per query and key that no other key changes.

    out_t = sum_s f(scale q_t . k_s + bias_ts) v_s          over the keys s that t may see
    out_t = the same / how many keys t may see              with divide

f is "sigmoid" (sigmoid attention: Ramapuram et al. 2024), "relu" (divided: Wortsman et al. 2023; with random queries
and keys: Fu et al. 2023) or "exp" (softmax attention without its normaliser). Weights need not sum to 1. As nothing
normalises over keys, the sums over chunks of keys, and over the keys of other devices, add up.
"""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from attnlab.attention._cached import by_row, put
from attnlab.attention._dispatch.choice import Implementations, dispatch
from attnlab.attention._dispatch.deferred import vary_alike
from attnlab.attention._dispatch.exchange import Parts, around, given_positions, over_positions, whole_space
from attnlab.attention._dispatch.primitive import primitive
from attnlab.attention._shared.checks import (
    accumulator_dtype,
    check_bool,
    check_cached_step,
    check_choice,
    check_over_logits,
    check_position,
    check_query_key_value,
    check_type,
    default_scale,
    require,
    shape_text,
)
from attnlab.attention._shared.finite import finite_or_zero, spoil, where_spoilt
from attnlab.attention._shared.heads import repeat_key_heads
from attnlab.attention.dot_product import DotProductCache, layout_over_logits

Array = jax.Array

ACTIVATIONS: dict[str, Callable[[Array], Array]] = {"sigmoid": jax.nn.sigmoid, "relu": jax.nn.relu, "exp": jnp.exp}
_QUERIES, _KEYS = 128, 512  # of a tile, at most


@primitive("B*N.")
def pointwise_attention(
    query: Array,
    key: Array,
    value: Array,
    *,
    activation: str = "sigmoid",
    bias: Array | None = None,
    mask: Array | None = None,
    is_causal: bool = False,
    scale: float | None = None,
    divide: bool = False,
    implementation: str | None = None,
) -> Array:
    """Attention by weights that are a function of one logit each; the module's docstring has the formula.

    Args:
      query: [B, T, N, H], floating.
      key: [B, S, K, H], value: [B, S, K, V], S >= 1, which may differ from T; K divides N.
      activation: f, "sigmoid", "relu" or "exp", which overflows where logits are large.
      bias: floating [B|1, N|1, T|1, S|1], added to the scaled logits. -inf hides a key, as a mask does.
      mask: bool [B|1, N|1, T|1, S|1], True = attend.
      is_causal: query t sees keys s <= t. Aligned at the first token (top left) when T != S.
      scale: factor on q.k; None means H ** -0.5.
      divide: by the number of keys that the query may see.
      implementation: None, "reference" (all weights at once) or "xla" (tiles of queries and keys).

    Returns:
      [B, T, N, V] in query's dtype; sums are float32 (float64 for float64 inputs). A query that sees no key gives 0.

    Raises:
      ValueError, TypeError: at trace time, naming the argument.

    Complexity of "xla": O(T S (H + V)) time per head, causal tiles above the diagonal left out; O(T + S) memory.
    """
    check_query_key_value(query, key, value, same_space=False)
    batch, queries, heads, _ = query.shape
    keys = key.shape[1]
    require(keys != 0, "key", shape_text(key), "need at least one key")
    # All keys, also where devices share positions.
    check_over_logits(bias, mask, (batch, heads, queries, *whole_space((keys,))))
    weigh = ACTIVATIONS[check_choice("activation", activation, tuple(ACTIVATIONS))]
    is_causal, divide = check_bool("is_causal", is_causal), check_bool("divide", divide)
    attend = functools.partial(
        dispatch,
        "pointwise_attention",
        IMPLEMENTATIONS,
        implementation,
        weigh=weigh,
        scale=default_scale(scale, query.shape[-1]),
    )
    are_given_parts = given_positions() is not None

    finished = functools.partial(_finished, dtype=query.dtype, divide=divide)

    def whole(*arrays: Any) -> Array:
        return finished(attend(*arrays, jnp.zeros((), jnp.int32) if is_causal else None))

    def parted(parts: Parts, *arrays: Any) -> Array:
        if arrays[1].shape[1] == keys and not are_given_parts:  # keys that the devices do not divide are whole
            offset = parts.number() * arrays[0].shape[1] if is_causal else None
            return finished(attend(*arrays, offset))
        return finished(_in_ring(attend, is_causal, parts, *arrays))

    over_logits = (layout_over_logits(x, (batch, heads, queries)) for x in (bias, mask))
    layouts = ("B*N.", "B+K.", "B+K.", *over_logits)
    return over_positions(whole, parted, layouts, "B*N.", query, key, value, bias, mask)


def _finished(sums: tuple[Array, Array], dtype: Any, divide: bool) -> Array:
    total, counts = sums
    return ((total / jnp.maximum(counts, 1)[..., None]) if divide else total).astype(dtype)


def _in_ring(
    attend: Callable[..., tuple[Array, Array]],
    is_causal: bool,
    parts: Parts,
    query: Array,
    key: Array,
    value: Array,
    bias: Array | None,
    mask: Array | None,
) -> tuple[Array, Array]:
    """Sums and counts of each device's queries over the keys of all parts, which it gets one after the other."""
    queries, keys = query.shape[1], key.shape[1]

    def turn(
        number: int, query: Array, key: Array, value: Array, bias: Array | None, mask: Array | None
    ) -> tuple[Array, Array]:
        key, value = around((key, value), number, parts)
        first = (parts.number() - number) % parts.many * keys

        def columns(x: Array | None) -> Array | None:
            return x if x is None or x.shape[-1] == 1 else lax.dynamic_slice_in_dim(x, first, keys, axis=3)

        offset = parts.number() * queries - first if is_causal else None
        return attend(query, key, value, columns(bias), columns(mask), offset)

    # What came from others is passed on anew for the gradient, so that only a part's arrays are kept.
    turns = (jax.checkpoint(functools.partial(turn, number)) for number in range(parts.many))
    sums, counts = next(turns)(query, key, value, bias, mask)
    for each in turns:
        more, others = each(query, key, value, bias, mask)
        sums, counts = sums + more, counts + others
    return sums, counts


# --- Sums over keys ---------------------------------------------------------------------------------------------------
# A form gives the sums [B, T, N, V] and how many keys each query may see, [B, T, N], in the accumulator's dtype. Query
# t sees keys s <= t + offset, int32 []; without an offset all.


def _sums(
    query: Array, key: Array, value: Array, bias: Array | None, visible: Array, weigh: Callable[[Array], Array]
) -> tuple[Array, Array]:
    """By all logits of scaled queries. visible: bool, broadcast to [B, N, T, S]."""
    key, value = (repeat_key_heads(x.astype(query.dtype), query.shape[2]) for x in (key, value))
    logits = jnp.einsum("BTNH,BSNH->BNTS", query, key)
    if bias is not None:
        logits = logits + bias.astype(logits.dtype)
        visible = visible & (bias != -jnp.inf)
    weights = jnp.where(visible, weigh(jnp.where(visible, logits, 0)), 0)
    counts = jnp.sum(jnp.broadcast_to(visible, weights.shape), axis=-1, dtype=weights.dtype)
    return jnp.einsum("BNTS,BSNV->BTNV", weights, value), jnp.swapaxes(counts, 1, 2)


def _reference(
    query: Array,
    key: Array,
    value: Array,
    bias: Array | None,
    mask: Array | None,
    offset: Array | None,
    *,
    weigh: Callable[[Array], Array],
    scale: Any,
) -> tuple[Array, Array]:
    visible = jnp.ones((1, 1, 1, 1), bool) if mask is None else mask
    if offset is not None:
        visible = visible & (jnp.arange(key.shape[1])[None] <= jnp.arange(query.shape[1])[:, None] + offset)[None, None]
    return _sums(scale * query.astype(accumulator_dtype(query, key, value)), key, value, bias, visible, weigh)


def _xla(
    query: Array,
    key: Array,
    value: Array,
    bias: Array | None,
    mask: Array | None,
    offset: Array | None,
    *,
    weigh: Callable[[Array], Array],
    scale: Any,
) -> tuple[Array, Array]:
    dtype = accumulator_dtype(query, key, value)
    batch, queries, heads, _ = query.shape
    keys = key.shape[1]
    size, width = min(_QUERIES, queries), min(_KEYS, keys)
    scaled, key, value = vary_alike((scale * query.astype(dtype), key, value))

    def cut(x: Array | None, axis: int, size: int) -> Array | None:
        """[..., L, ...] -> [parts, ..., size, ...], the last one padded; None of an axis that broadcasts."""
        if x is None or x.shape[axis] == 1:
            return None
        count = -(-x.shape[axis] // size)
        x = jnp.pad(x, [(0, count * size - length if at == axis else 0) for at, length in enumerate(x.shape)])
        return jnp.moveaxis(x.reshape(*x.shape[:axis], count, size, *x.shape[axis + 1 :]), axis, 0)

    def tiles(x: Array, axis: int, size: int) -> Array:
        parts = cut(x, axis, size)
        return x[None] if parts is None else parts

    def row(inputs: Any) -> tuple[Array, Array]:
        number, query, bias_row, mask_row = inputs
        bias_row, mask_row = (x if part is None else part for x, part in ((bias, bias_row), (mask, mask_row)))
        of_queries = number * size + jnp.arange(size)

        @functools.partial(jax.checkpoint, prevent_cse=False)
        def tile(inputs: Any) -> tuple[Array, Array]:
            at, key, value, bias_tile, mask_tile = inputs
            bias_tile, mask_tile = (
                x if part is None else part for x, part in ((bias_row, bias_tile), (mask_row, mask_tile))
            )
            of_keys = at * width + jnp.arange(width)
            visible = (of_keys < keys)[None, None, None]
            if mask_tile is not None:
                visible = visible & mask_tile
            if offset is not None:
                visible = visible & (of_keys[None] <= of_queries[:, None] + offset)[None, None]
            return _sums(query, key, value, bias_tile, visible, weigh)

        def add(sums: Any, inputs: Any) -> tuple[Any, None]:
            if offset is None:
                more = tile(inputs)
            else:
                is_seen = inputs[0] * width <= of_queries[-1] + offset
                more = lax.cond(is_seen, tile, lambda _: nothing, inputs)
            return jax.tree.map(jnp.add, sums, more), None

        def zeros(*rest: int) -> Array:
            return jnp.zeros_like(query, shape=(batch, size, heads, *rest))

        nothing = zeros(value.shape[-1]), zeros()
        columns = (tiles(key, 1, width), tiles(value, 1, width), cut(bias_row, 3, width), cut(mask_row, 3, width))
        sums, _ = lax.scan(add, nothing, (jnp.arange(-(-keys // width)), *columns))
        return sums

    rows = (tiles(scaled, 1, size), cut(bias, 2, size), cut(mask, 2, size))
    parts = lax.map(row, (jnp.arange(-(-queries // size)), *rows))
    sums, counts = (jnp.moveaxis(x, 0, 1).reshape(batch, -1, *x.shape[3:])[:, :queries] for x in parts)
    return sums, counts


def _spoiling(form: Callable[..., tuple[Array, Array]]) -> Callable[..., tuple[Array, Array]]:
    """The form in which what is not finite reaches the queries that see it, whatever its weight."""

    @functools.wraps(form)
    def call(
        query: Array, key: Array, value: Array, *rest: Any, weigh: Callable[[Array], Array], scale: Any
    ) -> tuple[Array, Array]:
        def seen(*arrays: Array) -> Array:
            return form(*arrays, *rest, weigh=jnp.ones_like, scale=1.0)[0]

        sums, counts = form(*map(finite_or_zero, (query, key, value)), *rest, weigh=weigh, scale=scale)
        return spoil(sums, where_spoilt(query, key, value, seen)), counts

    return call


IMPLEMENTATIONS: Implementations = {"reference": _spoiling(_reference), "xla": _spoiling(_xla)}


# --- Decoding ---------------------------------------------------------------------------------------------------------


@primitive("B*N.", like="cache")
def pointwise_step(
    cache: DotProductCache,
    query: Array,
    key: Array,
    value: Array,
    *,
    activation: str = "sigmoid",
    bias: Array | None = None,
    scale: float | None = None,
    divide: bool = False,
) -> tuple[Array, DotProductCache]:
    """The next token of pointwise_attention(..., is_causal=True).

    Args:
      cache: of the tokens before, from init_dot_product_cache, prefill_dot_product_cache or an earlier step.
      query, key, value: the token's, [B, 1, N, H], [B, 1, K, H], [B, 1, K, V].
      bias: floating [B|1, N|1, 1, max_length|1], the token's row. The rest as in the call.

    Returns:
      (out [B, 1, N, V], the cache with the token added). Past max_length, which a compiled program cannot refuse, out
      is NaN.

    Complexity: O(max_length) time.
    """
    check_type("cache", cache, DotProductCache, "init_dot_product_cache")
    check_cached_step(query, key, value, cache.key, cache.value)
    check_position("cache.length", cache.length, query.shape[0])
    slots = cache.key.shape[1]
    check_over_logits(bias, None, (query.shape[0], query.shape[2], 1, slots))
    weigh = ACTIVATIONS[check_choice("activation", activation, tuple(ACTIVATIONS))]
    divide, factor = check_bool("divide", divide), default_scale(scale, query.shape[-1])
    keys, values = put(cache.key, key, cache.length), put(cache.value, value, cache.length)
    visible = (jnp.arange(slots)[None] <= by_row(cache.length))[:, None, None]
    attend = functools.partial(_spoiling(_reference), weigh=weigh, scale=factor)
    out = _finished(attend(query, keys, values, bias, visible, None), query.dtype, divide)
    out = jnp.where(by_row(cache.length)[..., None, None] < slots, out, jnp.nan)
    return out, DotProductCache(keys, values, cache.length + 1)
