"""Softmax attention over all keys.

    out_t = sum_s softmax_s(scale q_t . k_s + bias_ts) v_s        over the keys s that t may see
    lse_t = log sum_s exp(scale q_t . k_s + bias_ts)

With a softcap c, c tanh(scale q_t . k_s / c) stands for scale q_t . k_s (Gemma 2). With sink logits
each head has one key more, of a learned logit and no value, which is in the softmax and in lse (gpt-oss, OpenAI 2025).

The blocked form is _shared/tiled_softmax.py's: tiles of queries and keys with the online softmax, recomputed in the
gradient, so that no buffer of T x S is held in either direction.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from attnlab.attention import masks
from attnlab.attention._cached import attend_to_cache, by_row, counted, filled, put
from attnlab.attention._dispatch.choice import Implementations, dispatch
from attnlab.attention._dispatch.exchange import (
    Parts,
    given_positions,
    over_positions,
    softmax_ring,
    whole_space,
)
from attnlab.attention._dispatch.primitive import primitive
from attnlab.attention._kernels import dot_product as kernels
from attnlab.attention._shared.checks import (
    accumulator_dtype,
    check_bool,
    check_cached_steps,
    check_dtype,
    check_over_logits,
    check_position,
    check_prompt,
    check_query_key_value,
    check_segment_pair,
    check_sink_logits,
    check_sizes,
    check_softcap,
    check_type,
    default_scale,
    require,
    shape_text,
)
from attnlab.attention._shared.finite import infinite_as_nan
from attnlab.attention._shared.softmax import reference_attention, scaled_for_logits, with_sink_logits
from attnlab.attention._shared.tiled_softmax import Inputs, Predicate, Sees, tiled_attention

Array = jax.Array


@primitive("B*N.", "B*N")
def dot_product_attention(
    query: Array,
    key: Array,
    value: Array,
    *,
    bias: Array | None = None,
    mask: Array | masks.Mask | None = None,
    is_causal: bool = False,
    scale: float | None = None,
    softcap: float | None = None,
    sink_logits: Array | None = None,
    segment_ids: Array | tuple[Array, Array] | None = None,
    return_lse: bool = False,
    implementation: str | None = None,
) -> Any:
    """Softmax attention. Arguments follow jax.nn.dot_product_attention.

    Args:
      query: [B, T, N, H], floating.
      key: [B, S, K, H]. K divides N: query head n reads key head n // (N / K). S may differ from T.
      value: [B, S, K, V].
      bias: floating [B|1, N|1, T|1, S|1], added to the scaled logits.
      mask: bool [B|1, N|1, T|1, S|1], True = attend; or a masks.Mask of one axis, of the numbers of queries and keys,
        whose T x S pairs are held nowhere but in "reference" (and of a part, where devices share positions).
      is_causal: query t sees keys s <= t. Aligned at the first token (top left) when T != S, as in jax.nn.
      scale: factor on the logits; None means H ** -0.5.
      softcap: a number above 0; logits l become softcap tanh(l / softcap), before the bias and the mask. None: they
        stay.
      sink_logits: floating [N], learned: each head has one key more, of this logit and no value. A query that sees no
        other key then gives 0 and lse = the logit.
      segment_ids: integers [B, T] when T = S, or a pair ([B, T], [B, S]). Queries see keys of their own segment.
      return_lse: return (out, lse).
      implementation: None, "reference", "xla", "pallas_tpu" (bfloat16 or float32; a finite bias below -1e38 counts as
        -1e38) or "pallas_gpu" (bfloat16 or float16; no softcap, no bias); both take a mask that is a masks.Mask.

    Returns:
      out [B, T, N, V] in query's dtype; with return_lse also lse [B, T, N], float32 (float64 for float64 inputs),
      differentiable. A query that sees no key gives 0 and lse = -inf, with zero gradients.

    Raises:
      ValueError, TypeError: naming the argument, for shapes and dtypes other than these.

    Complexity: O(T S) time; memory O(T + S) beyond the arguments for "xla", O(T S) for "reference".
    """
    check_query_key_value(query, key, value, same_space=False)
    batch, queries, heads, _ = query.shape
    keys = key.shape[1]
    predicate, mask = (mask, None) if isinstance(mask, masks.Mask) else (None, mask)
    if predicate is not None:
        masks.check_mask(predicate, whole_space((keys,)))
    # All keys, also where devices share positions.
    check_over_logits(bias, mask, (batch, heads, queries, *whole_space((keys,))))
    segments = check_segment_pair(segment_ids, batch, queries, keys)
    check_sink_logits(sink_logits, heads)
    is_causal, return_lse = check_bool("is_causal", is_causal), check_bool("return_lse", return_lse)
    factor = default_scale(scale, query.shape[-1])
    # A name of its own: what a card checks, and what becomes a default by it, are calls without.
    name = "dot_product_attention" if predicate is None else "dot_product_attention with a Mask"
    attend = functools.partial(dispatch, name, IMPLEMENTATIONS, implementation, softcap=check_softcap(softcap))
    whole = functools.partial(attend, is_causal=is_causal, scale=factor, predicate=predicate)
    arrays = query, key, value, bias, mask, segments, sink_logits
    if is_causal and queries != keys:  # parts of queries and of keys begin at other positions
        out, lse = whole(*arrays)
    else:
        are_given_parts = given_positions() is not None

        def parted(parts: Parts, *arrays: Any) -> tuple[Array, Array]:
            if arrays[1].shape[1] == keys and not are_given_parts:  # keys that the devices do not divide are whole
                if predicate is None:
                    return whole(*arrays)
                mask = _pairs(predicate, parts.number() * arrays[0].shape[1], arrays[0].shape[1], 0, keys)
                return attend(*arrays[:4], mask, *arrays[5:], is_causal=is_causal, scale=factor)
            *others, sink_logits = arrays  # which count once, not in each turn
            ring = functools.partial(in_ring, predicate=predicate)
            return with_sink_logits(*ring(attend, is_causal, factor, parts, *others), sink_logits)

        over_logits = (layout_over_logits(x, (batch, heads, queries)) for x in (bias, mask))
        layouts = ("B*N.", "B+K.", "B+K.", *over_logits, None if segments is None else ("B*", "B+"), "N")
        out, lse = over_positions(whole, parted, layouts, ("B*N.", "B*N"), *arrays)
    return (out, lse) if return_lse else out


def layout_over_logits(x: Array | None, sizes: tuple[int, int, int]) -> str:
    """The layout of a bias or mask: an axis of 1 is whole on every device, and so is that of the keys."""
    shape = sizes if x is None else x.shape
    return "".join(letter if size == full != 1 else "." for letter, size, full in zip("BN*", shape, sizes)) + "."


def _pairs(predicate: masks.Mask, first_query: Any, queries: int, first_key: Any, keys: int) -> Array:
    """bool [1, 1, T, S] of so many from these on."""
    query, key = first_query + jnp.arange(queries)[:, None], first_key + jnp.arange(keys)[None]
    return jnp.broadcast_to(predicate.sees((query,), (key,)), (1, 1, queries, keys))


def in_ring(
    attend: Callable[..., tuple[Array, Array]],
    is_causal: bool,
    scale: Any,
    parts: Parts,
    query: Array,
    key: Array,
    value: Array,
    bias: Array | None = None,
    mask: Array | None = None,
    segments: tuple[Array, Array] | None = None,
    predicate: masks.Mask | None = None,
) -> tuple[Array, Array]:
    """Each device's queries over the keys of all parts, in a ring; causal ones leave out later parts.

    attend: dot_product_attention by parts, (query, key, value, bias, mask, segments, is_causal=, scale=) -> (out, lse).
    """
    query_ids, key_ids = (None, None) if segments is None else segments

    def turn(number: int, own: Any, passed: Any, fixed: Any) -> tuple[Array, Array]:
        (query, bias, traced_scale), (key, value), ((mask, query_ids), key_ids) = own, passed, fixed
        first = (parts.number() - number) % parts.many * key.shape[1]

        def columns(x: Array | None) -> Array | None:
            return x if x is None or x.shape[-1] == 1 else lax.dynamic_slice_in_dim(x, first, key.shape[1], axis=3)

        segments = None if query_ids is None else (query_ids, key_ids)
        seen_keys = columns(mask)
        if predicate is not None:
            queries, keys = query.shape[1], key.shape[1]
            seen_keys = _pairs(predicate, parts.number() * queries, queries, first, keys)
        arrays = query, key, value, columns(bias), seen_keys, segments

        def seen(*arrays: Any) -> tuple[Array, Array]:
            of_logits = scale if traced_scale is None else traced_scale
            return attend(*arrays, is_causal=is_causal and number == 0, scale=of_logits)

        def unseen(query: Array, key: Array, value: Array, *_: Any) -> tuple[Array, Array]:
            out, lse = jax.eval_shape(seen, *arrays)
            return jnp.zeros_like(query, shape=out.shape), jnp.full_like(query, -jnp.inf, lse.dtype, shape=lse.shape)

        if not is_causal or number == 0:
            return seen(*arrays)
        return lax.cond(parts.number() >= number, seen, unseen, *arrays)

    own = query, bias, scale if isinstance(scale, jax.Array) else None
    out, lse = softmax_ring(turn, parts, own, (key, value), ((mask, query_ids), key_ids))
    return out.astype(query.dtype), lse


def _reference(
    query: Array,
    key: Array,
    value: Array,
    bias: Array | None,
    mask: Array | None,
    segments: tuple[Array, Array] | None,
    sink_logits: Array | None = None,
    *,
    is_causal: bool,
    scale: Any,
    softcap: float | None = None,
    predicate: masks.Mask | None = None,
) -> tuple[Array, Array]:
    visible = jnp.ones((), bool) if mask is None else mask
    if predicate is not None:
        visible = visible & masks.dense_mask(predicate, (query.shape[1],), (key.shape[1],))
    if is_causal:
        visible = visible & masks.dense_mask(masks.causal(), (query.shape[1],), (key.shape[1],))
    if segments is not None:
        visible = visible & (segments[0][:, None, :, None] == segments[1][:, None, None, :])
    options: Any = {"scale": scale, "softcap": softcap, "sink_logits": sink_logits}
    return reference_attention(query, key, value, visible=visible, bias=bias, **options)


def _xla(
    query: Array,
    key: Array,
    value: Array,
    bias: Array | None,
    mask: Array | None,
    segments: tuple[Array, Array] | None,
    sink_logits: Array | None = None,
    *,
    is_causal: bool,
    scale: Any,
    softcap: float | None = None,
    predicate: masks.Mask | None = None,
) -> tuple[Array, Array]:
    batch, queries, heads, _ = query.shape
    key_heads = key.shape[2]
    group = heads // key_heads  # query heads that read one key head
    dtype = accumulator_dtype(query, key, value)

    def by_key_head(x: Array | None, dtype: Any) -> Array | None:
        """[b, n, T, S] -> [b, K, G, T, S], where an axis of length 1 stays one."""
        if x is None:
            return None
        b, n, *rest = x.shape
        x = x.reshape(b, 1, 1, *rest) if n == 1 else x.reshape(b, key_heads, group, *rest)
        return x.astype(dtype)

    if softcap is not None:
        query, key = infinite_as_nan(query), infinite_as_nan(key)
    scaled, key = scaled_for_logits(query, key, scale, dtype)
    inputs = Inputs(
        jnp.moveaxis(scaled.reshape(batch, queries, key_heads, group, -1), 1, 3),
        jnp.moveaxis(key, 1, 2),
        jnp.moveaxis(value.astype(dtype), 1, 2),
        by_key_head(bias, dtype),
    )
    by_numbers = None if predicate is None else Predicate(lambda query, key: predicate.sees((query,), (key,)))
    query_ids, key_ids = (None, None) if segments is None else segments
    sees = Sees(by_key_head(mask, bool), query_ids, key_ids, by_numbers)
    out, lse = tiled_attention(inputs, sees, is_causal=is_causal, softcap=softcap)
    out, lse = (jnp.moveaxis(x, 3, 1).reshape(batch, queries, heads, *x.shape[4:]) for x in (out, lse))
    return with_sink_logits(out.astype(query.dtype), lse, sink_logits)


IMPLEMENTATIONS: Implementations = {"reference": _reference, "xla": _xla, **kernels.KERNELS}


class DotProductCache(NamedTuple):
    """Keys and values of the tokens so far: key [B, max_length, K, H], value [B, max_length, K, V].

    length: int32 [], how many they are, or [B], of each row.
    """

    key: Array
    value: Array
    length: Array


def init_dot_product_cache(
    batch: int,
    max_length: int,
    num_key_heads: int,
    head_dim: int,
    *,
    value_dim: int | None = None,
    dtype: Any = jnp.float32,
) -> DotProductCache:
    """An empty cache for causal decoding of at most max_length tokens. value_dim=None means head_dim."""
    value_dim, dtype = head_dim if value_dim is None else value_dim, check_dtype("dtype", dtype)
    batch, max_length, num_key_heads, head_dim, value_dim = check_sizes(
        batch=batch, max_length=max_length, num_key_heads=num_key_heads, head_dim=head_dim, value_dim=value_dim
    )
    shape = (batch, max_length, num_key_heads)
    return DotProductCache(
        key=jnp.zeros((*shape, head_dim), dtype),
        value=jnp.zeros((*shape, value_dim), dtype),
        length=jnp.zeros((), jnp.int32),
    )


@primitive(like="cache")
def prefill_dot_product_cache(
    cache: DotProductCache, key: Array, value: Array, *, lengths: Array | None = None
) -> DotProductCache:
    """The cache after a prompt: what dot_product_step leaves of it, token by token.

    Args:
      cache: an empty one, which the prompt fits into.
      key: [B, P, K, H], value: [B, P, K, V]. Attention over the prompt is dot_product_attention(..., is_causal=True).
      lengths: integers [B], 0 to P: the row's tokens, padding after them. None: P in all rows.
    """
    check_type("cache", cache, DotProductCache, "init_dot_product_cache")
    lengths = check_prompt(key, value, cache.key, cache.value, lengths)
    slots, count = cache.key.shape[1], counted(key, lengths)
    require(key.shape[1] <= slots, "key", shape_text(key), f"the cache was made for {slots} tokens")
    return DotProductCache(filled(cache.key, key, count), filled(cache.value, value, count), count)


@primitive("B*N.", like="cache")
def dot_product_step(
    cache: DotProductCache,
    query: Array,
    key: Array,
    value: Array,
    *,
    scale: float | None = None,
    softcap: float | None = None,
    sink_logits: Array | None = None,
    implementation: str | None = None,
) -> tuple[Array, DotProductCache]:
    """The next tokens of causal attention: their rows of dot_product_attention(..., is_causal=True).

    Args:
      cache: of the tokens before.
      query, key, value: the tokens', [B, T, N, H], [B, T, K, H], [B, T, K, V]; T is 1, or more where they are known
        at once, as parts of a prompt are, or a draft to be verified.
      softcap, sink_logits: as in dot_product_attention.
      implementation: "xla", "pallas_tpu" (T up to 16), "pallas_gpu" (T = 1, neither of these two) or None.

    Returns:
      (out [B, T, N, V], the cache with the tokens added). Where these do not all fit into max_length, which a compiled
      program cannot refuse, the row's out is NaN.

    Complexity: O(T max_length) time.
    """
    check_type("cache", cache, DotProductCache, "init_dot_product_cache")
    check_cached_steps(query, key, value, cache.key, cache.value)
    check_position("cache.length", cache.length, query.shape[0])
    keys, values = put(cache.key, key, cache.length), put(cache.value, value, cache.length)
    after = cache.length + query.shape[1]
    now = by_row(cache.length) + jnp.arange(query.shape[1])[None]
    visible = jnp.arange(keys.shape[1])[None, None] <= now[..., None]
    out = attend_to_cache(
        "dot_product_step",
        query,
        keys,
        values,
        visible=visible,
        used=after,
        scale=default_scale(scale, query.shape[-1]),
        softcap=softcap,
        sink_logits=sink_logits,
        implementation=implementation,
    )
    out = jnp.where(by_row(after)[..., None, None] <= keys.shape[1], out, jnp.nan)
    return out, DotProductCache(keys, values, after)
