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
import numpy as np
from jax import lax

from attnlab.attention import masks
from attnlab.attention._banded import banded_attention, banded_refusal
from attnlab.attention._checks import (
    accumulator_dtype,
    check_array,
    check_query_key_value,
    default_scale,
    require,
    shape_text,
)
from attnlab.attention._dispatch import Kernel, dispatch
from attnlab.attention._kernel_call import kernel_call
from attnlab.attention._softmax import softmax_parts

Array = jax.Array

_QUERY_CHUNK = 128
_KEY_CHUNK = 128


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
    if not isinstance(is_causal, bool):
        raise TypeError(f"is_causal: got {is_causal!r}; need a bool")
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


def check_segment_ids(name: str, ids: Any, shape: tuple[int, ...], layout: str) -> None:
    check_array(name, ids, shape, layout)
    if not jnp.issubdtype(ids.dtype, jnp.integer):
        raise TypeError(f"{name}: got dtype {ids.dtype}; need an integer dtype")


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


def dense_attention(
    query: Array, key: Array, value: Array, *, visible: Any = True, bias: Array | None = None, scale: Any
) -> tuple[Array, Array]:
    """Attention with all logits in one array: (out [B,T,N,V], lse [B,T,N]). visible, bias: broadcast to [B,N,T,S]."""
    dtype = accumulator_dtype(query, key, value)
    group = query.shape[2] // key.shape[2]
    key, value = (jnp.repeat(x.astype(dtype), group, axis=2) for x in (key, value))
    logits = jnp.asarray(scale, dtype) * jnp.einsum(
        "btnh,bsnh->bnts", query.astype(dtype), key, preferred_element_type=dtype
    )
    if bias is not None:
        logits = logits + bias.astype(dtype)
    numerators, denominator, lse = softmax_parts(logits, visible)
    out = jnp.einsum("bnts,bsnv->btnv", numerators / denominator, value, preferred_element_type=dtype)
    return out.astype(query.dtype), jnp.swapaxes(lse, 1, 2)


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
    keys, key_heads = key.shape[1:3]
    group = heads // key_heads  # query heads that read one key head
    dtype = accumulator_dtype(query, key, value)
    query_chunk, key_chunk = (min(size, max(n, 1)) for size, n in ((_QUERY_CHUNK, queries), (_KEY_CHUNK, keys)))

    def by_key_head(x: Array | None) -> Array | None:
        """[b, n, T, S] -> [b, K, G, T, S], where an axis of length 1 stays one."""
        if x is None:
            return None
        b, n, *rest = x.shape
        return x.reshape(b, 1, 1, *rest) if n == 1 else x.reshape(b, key_heads, group, *rest)

    # What depends on the query, and what depends on the key, as (array, its axis of tokens); b key-head layout.
    query_ids, key_ids = (None, None) if segments is None else segments
    per_query = (
        (jnp.moveaxis(query.reshape(batch, queries, key_heads, group, -1), 1, 3), 3),  # [B, K, G, T, H]
        (query_ids, 1),
        (by_key_head(bias), 3),
        (by_key_head(mask), 3),
        (jnp.arange(queries), 0),
    )
    query_parts, join_query_parts = _chunks(per_query, query_chunk)

    def attend(_: None, part: Any) -> tuple[None, tuple[Array, Array]]:
        query, query_ids, bias, mask, query_index = join_query_parts(part)
        per_key = (
            (jnp.moveaxis(key, 1, 2), 2),  # [B, K, S, H]
            (jnp.moveaxis(value, 1, 2), 2),
            (key_ids, 1),
            (bias, 4),
            (mask, 4),
            (jnp.arange(keys), 0),
        )
        key_parts, join_key_parts = _chunks(per_key, key_chunk)

        def visit(carry: tuple[Array, Array, Array], part: Any) -> tuple[Array, Array, Array]:
            largest, total, out = carry
            key, value, key_ids, bias, mask, key_index = join_key_parts(part)
            logits = jnp.asarray(scale, dtype) * jnp.einsum(
                "bkgth,bksh->bkgts", query, key, preferred_element_type=dtype
            )
            if bias is not None:
                logits = logits + bias.astype(dtype)
            visible = key_index >= 0  # the padding has index -1
            if is_causal:
                visible = visible & (key_index <= query_index[:, None])
            if mask is not None:
                visible = visible & mask
            if key_ids is not None:
                visible = visible & (query_ids[:, :, None] == key_ids[:, None, :])[:, None, None]
            logits = jnp.where(visible, logits, -jnp.inf)
            # The maximum keeps exp in range and cancels out of the result, so it carries no gradient.
            new_largest = jnp.maximum(largest, lax.stop_gradient(logits.max(-1, keepdims=True)))
            reference = jnp.where(new_largest == -jnp.inf, 0, new_largest)
            numerators = jnp.exp(logits - reference)
            rescale = jnp.exp(largest - reference)
            total = rescale * total + numerators.sum(-1, keepdims=True)
            out = rescale * out + jnp.einsum(
                "bkgts,bksv->bkgtv", numerators, value.astype(dtype), preferred_element_type=dtype
            )
            return new_largest, total, out

        def step(carry: tuple[Array, Array, Array], part: Any) -> tuple[tuple[Array, Array, Array], None]:
            if not is_causal:
                return visit(carry, part), None
            first_key = join_key_parts(part)[-1][0]
            past = first_key > query_index.max()  # a chunk after all the queries
            return lax.cond(past, lambda carry, _: carry, visit, carry, part), None

        rows = query.shape[:-1]
        start = (
            jnp.full((*rows, 1), -jnp.inf, dtype),
            jnp.zeros((*rows, 1), dtype),
            jnp.zeros((*rows, value.shape[-1]), dtype),
        )
        (largest, total, out), _ = lax.scan(jax.checkpoint(step, prevent_cse=False), start, key_parts)
        denominator = jnp.where(total > 0, total, 1)
        lse = jnp.where(total > 0, largest + jnp.log(denominator), -jnp.inf)
        return None, ((out / denominator).astype(query.dtype), lse[..., 0])

    _, (out, lse) = lax.scan(jax.checkpoint(attend, prevent_cse=False), None, query_parts)
    # [chunks, B, K, G, chunk, ...] -> [B, T, N, ...]
    out = jnp.moveaxis(out, (0, 4), (1, 2)).reshape(batch, -1, heads, value.shape[-1])[:, :queries]
    lse = jnp.moveaxis(lse, (0, 4), (1, 2)).reshape(batch, -1, heads)[:, :queries]
    return out, lse


def _chunks(arrays: tuple[tuple[Array | None, int], ...], size: int) -> tuple[Any, Callable[[Any], tuple]]:
    """Cuts arrays along their given axes into chunks for lax.scan: (the scan's xs, from one x to the arrays' chunks).

    The last chunk is padded: integers with -1, others with 0. None, and axes of length 1, are passed whole, so that
    a bias that broadcasts is not copied.
    """
    length = max(x.shape[axis] for x, axis in arrays if x is not None)
    count = max(-(-length // size), 1)
    is_cut = [x is not None and x.shape[axis] == length for x, axis in arrays]

    def cut(x: Array, axis: int) -> Array:
        widths = [(0, 0)] * x.ndim
        widths[axis] = (0, count * size - length)
        fill = -1 if jnp.issubdtype(x.dtype, jnp.integer) else 0
        padded = jnp.pad(x, widths, constant_values=fill)
        return jnp.moveaxis(padded.reshape(*x.shape[:axis], count, size, *x.shape[axis + 1 :]), axis, 0)

    parts = [cut(x, axis) for (x, axis), flag in zip(arrays, is_cut) if flag and x is not None]

    def join(part: list[Array]) -> tuple[Array | None, ...]:
        left = iter(part)
        return tuple(next(left) if flag else x for (x, _), flag in zip(arrays, is_cut))

    return parts, join


def _pattern(query: Any, key: Any, is_causal: bool) -> Any:
    """One interval of keys a query."""
    from kernels_pallas.patterns import Intervals

    queries, keys = query.shape[1], key.shape[1]

    def bounds(query: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        return np.zeros_like(query), np.minimum(query + 1, keys) if is_causal else np.full_like(query, keys)

    return Intervals(bounds, queries, keys)


def _pallas_tpu(
    query: Array, key: Array, value: Array, bias: None, mask: None, segments: Any, *, is_causal: bool, scale: Any
) -> tuple[Array, Array]:
    def blocked(query: Array, key: Array, value: Array, segments: Any, scale: Any) -> Any:
        return _xla(query, key, value, None, None, segments, is_causal=is_causal, scale=scale)

    pattern = _pattern(query, key, is_causal)
    return banded_attention(query, key, value, segments, scale=scale, pattern=pattern, blocked=blocked)


def _pallas_tpu_refusal(
    query: Array,
    key: Array,
    value: Array,
    bias: Array | None,
    mask: Array | None,
    segments: Any,
    *,
    is_causal: bool,
    scale: Any,
) -> str | None:
    for name, given in (("bias", bias), ("mask", mask)):
        if given is not None:
            return f"has no {name}"
    return banded_refusal(query, key, value, segments, _pattern(query, key, is_causal))


IMPLEMENTATIONS: dict[str, Callable[..., Any] | Kernel] = {
    "reference": _reference,
    "xla": _xla,
    "pallas_tpu": Kernel(_pallas_tpu, _pallas_tpu_refusal),
}


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
    shape = (batch, max_length, num_key_heads)
    return DotProductCache(
        key=jnp.zeros((*shape, head_dim), dtype),
        value=jnp.zeros((*shape, head_dim if value_dim is None else value_dim), dtype),
        length=jnp.zeros((), jnp.int32),
    )


def check_step(query: Array, key: Array, value: Array, cached_key: Array, cached_value: Array) -> None:
    """Checks one token's query [B,1,N,H], key [B,1,K,H], value [B,1,K,V] against a cache's [B,*,K,H] and [B,*,K,V]."""
    check_query_key_value(query, key, value)
    require(query.shape[1] == 1, "query", shape_text(query), "a step takes one token, [batch, 1, heads, head_dim]")
    for name, new, old in (("key", key, cached_key), ("value", value, cached_value)):
        check_array(name, new, (old.shape[0], 1, *old.shape[2:]), f"the cache's layout, {shape_text(old)}, one token")


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
    check_step(query, key, value, cache.key, cache.value)
    at = (0, cache.length, 0, 0)
    keys = lax.dynamic_update_slice(cache.key, key.astype(cache.key.dtype), at)
    values = lax.dynamic_update_slice(cache.value, value.astype(cache.value.dtype), at)
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


def attend_to_cache(
    primitive: str,
    query: Array,
    key: Array,
    value: Array,
    *,
    visible: Array,
    used: Array,
    scale: Any,
    implementation: str | None,
) -> Array:
    """[B, 1, N, V]: a token's attention to a cache [B, S, K, H], [B, S, K, V].

    visible: bool [S]. used: int [], no slot from this one on is visible.
    """
    # A row for each of the batch, so that devices share it as they share the batch.
    visible = jnp.broadcast_to(visible, (query.shape[0], *visible.shape))
    arrays = (query, key, value, visible, used, jnp.asarray(scale, accumulator_dtype(query, key, value)))
    return dispatch(primitive, STEP_IMPLEMENTATIONS, implementation, *arrays)


def _xla_step(query: Array, key: Array, value: Array, visible: Array, used: Array, scale: Array) -> Array:
    return dense_attention(query, key, value, visible=visible[:, None, None], scale=scale)[0]


def _pallas_tpu_step(query: Array, key: Array, value: Array, visible: Array, used: Array, scale: Array) -> Array:
    from kernels_pallas.tpu.cached_flash import cached_flash_attention

    def kernel(arrays: Any, fixed: Any, _: bool) -> tuple[Array, Any]:
        *tokens, scale = arrays
        return cached_flash_attention(*tokens, *fixed, scale=scale), ()

    def plain(arrays: Any, fixed: Any) -> Array:
        query, key, value, scale = arrays
        visible, used = fixed
        return _xla_step(query, key, value, visible, used, scale)

    return kernel_call(kernel, None, plain, (query, key, value, scale), (visible, used))


def _pallas_tpu_step_refusal(query: Any, key: Any, value: Any, *_: Any) -> str | None:
    from kernels_pallas.tpu.cached_flash import refusal

    return refusal(query, key, value)


STEP_IMPLEMENTATIONS: dict[str, Callable[..., Any] | Kernel] = {
    "xla": _xla_step,
    "pallas_tpu": Kernel(_pallas_tpu_step, _pallas_tpu_step_refusal),
}
