"""Decoding that sees a share of its keys: the newest, and those attended to most (ALISA, Zhao et al. 2024).

    n keys, the token's own among them    w = max(1, floor(n ratio / 2))
    visible: the last w, and of the others the w with the largest sums of weights over all heads and the last w steps
    p_s = softmax over the visible of scale q . k_s        out = sum_s p_s v_s

All keys and values stay, and one that was left out may be seen again: a step leaves its weights for the steps after it.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from attnlab.attention._cached import by_row, newest, put
from attnlab.attention._dispatch.primitive import primitive
from attnlab.attention._shared.checks import (
    accumulator_dtype,
    check_cached_step,
    check_dtype,
    check_float,
    check_position,
    check_sizes,
    check_type,
    default_scale,
    require,
)
from attnlab.attention._shared.finite import finite_or_zero
from attnlab.attention._shared.softmax import reference_attention

Array = jax.Array


class SparseCache(NamedTuple):
    """Tokens so far, key [B, max_length, K, H], value [B, max_length, K, V], and what the last W of them saw.

    rows: [B, W, max_length], weights summed over the heads, of step t in row t mod W; 0 where it did not see.
    length: int32 [], how many tokens they are, or [B], of each row.
    """

    key: Array
    value: Array
    rows: Array
    length: Array


def init_sparse_cache(
    batch: int,
    max_length: int,
    num_key_heads: int,
    head_dim: int,
    *,
    ratio: float,
    value_dim: int | None = None,
    dtype: Any = jnp.float32,
) -> SparseCache:
    """An empty cache for at most max_length tokens, of which steps read the share `ratio`, 0 to 1. value_dim=None means
    head_dim."""
    value_dim, dtype = head_dim if value_dim is None else value_dim, check_dtype("dtype", dtype)
    batch, max_length, num_key_heads, head_dim, value_dim = check_sizes(
        batch=batch, max_length=max_length, num_key_heads=num_key_heads, head_dim=head_dim, value_dim=value_dim
    )
    shape = (batch, max_length, num_key_heads)
    rows = int(_widths(max_length, check_float("ratio", ratio, least=0, most=1))[-1])
    return SparseCache(
        key=jnp.zeros((*shape, head_dim), dtype),
        value=jnp.zeros((*shape, value_dim), dtype),
        rows=jnp.zeros((batch, rows, max_length), jnp.promote_types(dtype, jnp.float32)),
        length=jnp.zeros((), jnp.int32),
    )


def _widths(most: int, ratio: float) -> np.ndarray:
    """w, by the number of keys from 0 to `most`."""
    return np.maximum(1, np.floor(np.arange(most + 1) * ratio / 2)).astype(np.int32)


@primitive("B*N.", like="cache")
def sparse_cache_step(
    cache: SparseCache, query: Array, key: Array, value: Array, *, ratio: float, scale: float | None = None
) -> tuple[Array, SparseCache]:
    """The next token, which attends to a share of the tokens before it; the module's docstring says which.

    Args:
      cache: of the tokens before.
      query, key, value: the token's, [B, 1, N, H], [B, 1, K, H], [B, 1, K, V].
      ratio: the share of the keys, 0 to 1, for which the cache was made. 1 sees all keys, but for one of an odd number.
      scale: factor on the logits; None means H ** -0.5.

    Returns:
      (out [B, 1, N, V], the cache with the token added). Past max_length, which a compiled program cannot refuse, out
      is NaN. A key or value that is not finite makes NaN of the tokens that see it, and of nothing else.

    Complexity: O(max_length W) time beside attention, which here reads all of the cache, as a mask hides the rest: the
    reads that it saves are a gather's or an offloaded cache's.
    """
    check_type("cache", cache, SparseCache, "init_sparse_cache")
    check_cached_step(query, key, value, cache.key, cache.value)
    check_position("cache.length", cache.length, query.shape[0])
    slots, rows = cache.key.shape[1], cache.rows.shape[1]
    widths = _widths(slots, check_float("ratio", ratio, least=0, most=1))
    require(widths[-1] == rows, "ratio", ratio, f"the cache was made for another: it keeps {rows} steps' weights")
    keys, values = put(cache.key, key, cache.length), put(cache.value, value, cache.length)
    position, slot = by_row(cache.length), jnp.arange(slots)[None]
    width = jnp.asarray(widths)[jnp.minimum(position + 1, slots)]
    is_recent = (slot <= position) & (slot > position - width)
    step = newest(position, rows)
    counts = (step >= 0) & (step >= position - width)
    sums = jnp.sum(jnp.where(counts[..., None], cache.rows, 0), axis=1)
    others = jnp.where(slot <= position - width, sums, -jnp.inf)
    best, chosen = lax.top_k(others, rows)  # of equal sums the first
    is_chosen = (best > -jnp.inf) & (jnp.arange(rows)[None] < width)
    visible = is_recent | jnp.any(is_chosen[..., None] & (chosen[..., None] == slot[:, None]), axis=1)
    factor = default_scale(scale, query.shape[-1])
    out, lse = reference_attention(query, keys, values, visible=visible[:, None, None], scale=factor)
    # Weights that are not finite are of no use to later tokens.
    dtype = accumulator_dtype(query, keys)
    grouped = query.astype(dtype).reshape(*query.shape[:1], keys.shape[2], -1, query.shape[-1])
    logits = factor * jnp.einsum("BKGH,BSKH->BKGS", grouped, keys.astype(dtype))
    exponents = logits - lse[:, 0].reshape(logits.shape[:3])[..., None]
    weights = finite_or_zero(jnp.exp(jnp.where(visible[:, None, None], exponents, -jnp.inf)))
    added = put(cache.rows, weights.sum((1, 2))[:, None], cache.length % rows)
    out = jnp.where((position < slots)[..., None, None], out, jnp.nan)
    return out, SparseCache(keys, values, added, cache.length + 1)
