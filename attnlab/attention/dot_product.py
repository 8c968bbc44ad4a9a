"""Softmax attention over all keys.

    out_t = sum_s softmax_s(scale q_t . k_s + bias_ts) v_s        over the keys s that t may see
    lse_t = log sum_s exp(scale q_t . k_s + bias_ts)

The blocked form goes through the keys in chunks with the online softmax (Milakov & Gimelshein 2018; Rabe & Staats
2021; FlashAttention, Dao et al. 2022): the running maximum m, sum l and unnormalised output o of what has been seen,

    m' = max(m, max_s logits)     l' = exp(m - m') l + sum_s exp(logits - m')     o' = exp(m - m') o + sum_s exp(..) v_s

Chunks are recomputed in the backward, so that no buffer of T x S is held in either direction.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from attnlab.attention import masks
from attnlab.attention._cached import attend_to_cache
from attnlab.attention._dispatch.choice import Implementations, dispatch
from attnlab.attention._dispatch.primitive import primitive
from attnlab.attention._kernels import dot_product as kernels
from attnlab.attention._shared.checks import (
    accumulator_dtype,
    check_array,
    check_bool,
    check_cached_step,
    check_dtype,
    check_query_key_value,
    check_segment_ids,
    check_sizes,
    check_type,
    default_scale,
    require,
    shape_text,
)
from attnlab.attention._shared.softmax import dense_attention

Array = jax.Array

_QUERY_CHUNK = 128
_KEY_CHUNK = 128


@primitive("B*N.", "B*N")
def dot_product_attention(
    query: Array,
    key: Array,
    value: Array,
    *,
    bias: Array | None = None,
    mask: Array | None = None,
    is_causal: bool = False,
    scale: float | None = None,
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
      mask: bool [B|1, N|1, T|1, S|1], True = attend.
      is_causal: query t sees keys s <= t. Aligned at the first token (top left) when T != S, as in jax.nn.
      scale: factor on the logits; None means H ** -0.5.
      segment_ids: integers [B, T] when T = S, or a pair ([B, T], [B, S]). Queries see keys of their own segment.
      return_lse: return (out, lse).
      implementation: None, "reference", "xla", or "pallas_tpu" (without bias and mask; bfloat16 or float32).

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
    for name, array, kind in (("bias", bias, jnp.floating), ("mask", mask, jnp.bool_)):
        if array is None:
            continue
        check_array(name, array, (None,) * 4, "[batch|1, heads|1, T|1, S|1]")
        if not jnp.issubdtype(array.dtype, kind):
            hint = "a bool mask (True = attend)" if name == "mask" else "a floating bias; give a bool array as mask="
            raise TypeError(f"{name}: got dtype {array.dtype}; need {hint}")
        full = (batch, heads, queries, keys)
        fits = all(got in (1, want) for got, want in zip(array.shape, full, strict=True))
        require(fits, name, shape_text(array), f"need [batch|1, heads|1, T|1, S|1] of {list(full)}")
    segments = _segment_pair(segment_ids, batch, queries, keys)
    is_causal, return_lse = check_bool("is_causal", is_causal), check_bool("return_lse", return_lse)
    out, lse = dispatch(
        "dot_product_attention",
        IMPLEMENTATIONS,
        implementation,
        query,
        key,
        value,
        bias,
        mask,
        segments,
        is_causal=is_causal,
        scale=default_scale(scale, query.shape[-1]),
    )
    return (out, lse) if return_lse else out


def _segment_pair(segment_ids: Any, batch: int, queries: int, keys: int) -> tuple[Array, Array] | None:
    if segment_ids is None:
        return None
    if isinstance(segment_ids, (tuple, list)):
        require(len(segment_ids) == 2, "segment_ids", f"{len(segment_ids)} arrays", "need one, or (query's, key's)")
        query_ids, key_ids = segment_ids
    else:
        query_ids = key_ids = segment_ids
    check_segment_ids("segment_ids", query_ids, (batch, queries), "[batch, T]")
    check_segment_ids("segment_ids", key_ids, (batch, keys), "[batch, S] (a pair gives T and S ids of their own)")
    return query_ids, key_ids


def _reference(
    query: Array,
    key: Array,
    value: Array,
    bias: Array | None,
    mask: Array | None,
    segments: tuple[Array, Array] | None,
    *,
    is_causal: bool,
    scale: Any,
) -> tuple[Array, Array]:
    visible = jnp.ones((), bool) if mask is None else mask
    if is_causal:
        visible = visible & masks.dense_mask(masks.causal(), (query.shape[1],), (key.shape[1],))
    if segments is not None:
        visible = visible & (segments[0][:, None, :, None] == segments[1][:, None, None, :])
    return dense_attention(query, key, value, visible=visible, bias=bias, scale=scale)


class _Queries(NamedTuple):
    """What belongs to queries: [B, K, G, T, H], ids [B, T], bias and mask [b, k, g, T|1, S|1], positions [T]."""

    query: Array
    ids: Array | None
    bias: Array | None
    mask: Array | None
    position: Array


class _Keys(NamedTuple):
    """What belongs to keys: [B, K, S, H], [B, K, S, V], ids [B, S], positions [S]; of some queries, bias and mask."""

    key: Array
    value: Array
    ids: Array | None
    bias: Array | None
    mask: Array | None
    position: Array


# Which axis of each field is that of T, and of S.
_QUERY_AXES, _KEY_AXES = (3, 1, 3, 3, 0), (2, 2, 1, 4, 4, 0)


class _Running(NamedTuple):
    """The softmax over the keys so far: [B, K, G, T, 1], the same, and [B, K, G, T, V]."""

    largest: Array
    total: Array
    out: Array


def _xla(
    query: Array,
    key: Array,
    value: Array,
    bias: Array | None,
    mask: Array | None,
    segments: tuple[Array, Array] | None,
    *,
    is_causal: bool,
    scale: Any,
) -> tuple[Array, Array]:
    batch, queries, heads, _ = query.shape
    key_heads = key.shape[2]
    group = heads // key_heads  # query heads that read one key head

    def by_key_head(x: Array | None) -> Array | None:
        """[b, n, T, S] -> [b, K, G, T, S], where an axis of length 1 stays one."""
        if x is None:
            return None
        b, n, *rest = x.shape
        return x.reshape(b, 1, 1, *rest) if n == 1 else x.reshape(b, key_heads, group, *rest)

    query_ids, key_ids = (None, None) if segments is None else segments
    grouped = jnp.moveaxis(query.reshape(batch, queries, key_heads, group, -1), 1, 3)
    of_queries = _Queries(grouped, query_ids, by_key_head(bias), by_key_head(mask), jnp.arange(queries))
    parts, join = _chunks(of_queries, _QUERY_AXES, _QUERY_CHUNK)

    def attend(_: None, part: Any) -> tuple[None, tuple[Array, Array]]:
        queries = join(part)
        keys, values = (jnp.moveaxis(x, 1, 2) for x in (key, value))
        of_keys = _Keys(keys, values, key_ids, queries.bias, queries.mask, jnp.arange(key.shape[1]))
        out, lse = _attend(queries, of_keys, is_causal, scale, accumulator_dtype(query, key, value))
        return None, (out.astype(query.dtype), lse)

    _, (out, lse) = lax.scan(jax.checkpoint(attend, prevent_cse=False), None, parts)
    # [chunks, B, K, G, chunk, ...] -> [B, T, N, ...]
    out = jnp.moveaxis(out, (0, 4), (1, 2)).reshape(batch, -1, heads, value.shape[-1])[:, :queries]
    lse = jnp.moveaxis(lse, (0, 4), (1, 2)).reshape(batch, -1, heads)[:, :queries]
    return out, lse


def _attend(queries: _Queries, keys: _Keys, is_causal: bool, scale: Any, dtype: Any) -> tuple[Array, Array]:
    """A chunk of queries over all keys, chunk by chunk: out [B, K, G, T, V] and lse [B, K, G, T]."""
    parts, join = _chunks(keys, _KEY_AXES, _KEY_CHUNK)

    def visit(running: _Running, part: Any) -> _Running:
        return _visit(running, queries, join(part), is_causal, scale)

    def step(running: _Running, part: Any) -> tuple[_Running, None]:
        if not is_causal:
            return visit(running, part), None
        past = join(part).position[0] > queries.position.max()  # a chunk after all the queries
        return lax.cond(past, lambda running, _: running, visit, running, part), None

    rows = queries.query.shape[:-1]
    start = _Running(
        jnp.full((*rows, 1), -jnp.inf, dtype),
        jnp.zeros((*rows, 1), dtype),
        jnp.zeros((*rows, keys.value.shape[-1]), dtype),
    )
    (largest, total, out), _ = lax.scan(jax.checkpoint(step, prevent_cse=False), start, parts)
    denominator = jnp.where(total > 0, total, 1)
    lse = jnp.where(total > 0, largest + jnp.log(denominator), -jnp.inf)
    return out / denominator, lse[..., 0]


def _visit(running: _Running, queries: _Queries, keys: _Keys, is_causal: bool, scale: Any) -> _Running:
    """One chunk of keys more."""
    dtype = running.out.dtype
    logits = jnp.asarray(scale, dtype) * jnp.einsum(
        "BKGTH,BKSH->BKGTS", queries.query, keys.key, preferred_element_type=dtype
    )
    if keys.bias is not None:
        logits = logits + keys.bias.astype(dtype)
    visible = keys.position >= 0  # the padding has -1
    if is_causal:
        visible = visible & (keys.position <= queries.position[:, None])
    if keys.mask is not None:
        visible = visible & keys.mask
    if queries.ids is not None and keys.ids is not None:
        visible = visible & (queries.ids[:, :, None] == keys.ids[:, None, :])[:, None, None]
    logits = jnp.where(visible, logits, -jnp.inf)
    # The maximum keeps exp in range and cancels out of the result, so it carries no gradient.
    largest = jnp.maximum(running.largest, lax.stop_gradient(logits.max(-1, keepdims=True)))
    reference = jnp.where(largest == -jnp.inf, 0, largest)
    numerators = jnp.exp(logits - reference)
    rescale = jnp.exp(running.largest - reference)
    total = rescale * running.total + numerators.sum(-1, keepdims=True)
    out = rescale * running.out + jnp.einsum(
        "BKGTS,BKSV->BKGTV", numerators, keys.value.astype(dtype), preferred_element_type=dtype
    )
    return _Running(largest, total, out)


def _chunks(arrays: Any, axes: tuple[int, ...], most: int) -> tuple[list[Array], Callable[[list[Array]], Any]]:
    """Cuts a NamedTuple's arrays along their given axes into chunks for lax.scan: (the scan's xs, from one x to the
    NamedTuple of a chunk).

    The last chunk is padded: integers with -1, others with 0. None, and axes of length 1, are passed whole, so that
    a bias that broadcasts is not copied.
    """
    length = arrays.position.shape[0]
    size = min(most, max(length, 1))
    count = max(-(-length // size), 1)
    is_cut = [x is not None and x.shape[axis] == length for x, axis in zip(arrays, axes)]

    def cut(x: Array, axis: int) -> Array:
        widths = [(0, 0)] * x.ndim
        widths[axis] = (0, count * size - length)
        fill = -1 if jnp.issubdtype(x.dtype, jnp.integer) else 0
        padded = jnp.pad(x, widths, constant_values=fill)
        return jnp.moveaxis(padded.reshape(*x.shape[:axis], count, size, *x.shape[axis + 1 :]), axis, 0)

    parts = [cut(x, axis) for x, axis, flag in zip(arrays, axes, is_cut) if flag]

    def join(part: list[Array]) -> Any:
        left = iter(part)
        return type(arrays)(*(next(left) if flag else x for x, flag in zip(arrays, is_cut)))

    return parts, join


IMPLEMENTATIONS: Implementations = {"reference": _reference, "xla": _xla, **kernels.KERNELS}


class DotProductCache(NamedTuple):
    """Keys and values of the tokens so far: key [B, max_length, K, H], value [B, max_length, K, V], length int32 []."""

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


@primitive("B*N.", like="cache")
def dot_product_step(
    cache: DotProductCache,
    query: Array,
    key: Array,
    value: Array,
    *,
    scale: float | None = None,
    implementation: str | None = None,
) -> tuple[Array, DotProductCache]:
    """The next token of causal attention: the token's row of dot_product_attention(..., is_causal=True).

    Args:
      cache: of the tokens before.
      query, key, value: the token's, [B, 1, N, H], [B, 1, K, H], [B, 1, K, V].
      implementation: "xla", "pallas_tpu" or None.

    Returns:
      (out [B, 1, N, V], the cache with the token added). Past max_length, which a compiled program cannot refuse, out
      is NaN.

    Complexity: O(max_length) time.
    """
    check_type("cache", cache, DotProductCache, "init_dot_product_cache")
    check_cached_step(query, key, value, cache.key, cache.value)
    keys, values = (
        lax.dynamic_update_slice_in_dim(old, new.astype(old.dtype), cache.length, axis=1)
        for old, new in ((cache.key, key), (cache.value, value))
    )
    visible = jnp.arange(keys.shape[1]) <= cache.length
    out = attend_to_cache(
        "dot_product_step",
        query,
        keys,
        values,
        visible=visible,
        used=cache.length + 1,
        scale=default_scale(scale, query.shape[-1]),
        implementation=implementation,
    )
    out = jnp.where(cache.length < keys.shape[1], out, jnp.nan)
    return out, DotProductCache(keys, values, cache.length + 1)
