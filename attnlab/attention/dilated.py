"""Dilated local attention: a window of every d-th token.

    out_t = sum_{s in window(t), s = t mod d} softmax_s(scale q_t . k_s) v_s

On every axis the tokens fall into d residue groups; each is a sequence (image, video) of its own, in which the windows
of local attention apply, with their strides and causality. Paper: Dilated Neighborhood Attention (Hassani & Shi 2022).
"""

from typing import Any

import jax
import jax.numpy as jnp

from attnlab.attention import masks
from attnlab.attention._cached import at, by_row, counted, newest, put, tokens_at
from attnlab.attention._dispatch.primitive import primitive
from attnlab.attention._shared.checks import check_bool, check_int, check_position, check_prompt, check_type, require
from attnlab.attention.local import LocalCache, init_local_cache, local_step, windowed_attention

Array = jax.Array


@primitive("B*N.", "B*N")
def dilated_attention(
    query: Array,
    key: Array,
    value: Array,
    *,
    window: int | tuple[int, ...],
    dilation: int | tuple[int, ...],
    stride: int | tuple[int, ...] = 1,
    is_causal: bool | tuple[bool, ...] = False,
    edge: masks.Edge = "shift",
    scale: float | None = None,
    segment_ids: Array | None = None,
    return_lse: bool = False,
    implementation: str | None = None,
) -> Any:
    """Local attention within residue groups. As local_attention, but for:

    Args:
      dilation: a query sees keys whose coordinate equals its own modulo this, along each axis; one value or one per
        axis. window * dilation may not exceed the axis' length.
      window, stride: counted in tokens of the residue group.

    The rest, what is returned and raised, and the complexity: see local_attention.
    """
    return_lse = check_bool("return_lse", return_lse)
    out, lse = windowed_attention(
        "dilated_attention",
        query,
        key,
        value,
        segment_ids,
        window=window,
        stride=stride,
        dilation=dilation,
        is_causal=is_causal,
        edge=edge,
        sinks=0,
        scale=scale,
        implementation=implementation,
    )
    return (out, lse) if return_lse else out


def init_dilated_cache(
    batch: int,
    num_key_heads: int,
    head_dim: int,
    *,
    window: int,
    dilation: int,
    value_dim: int | None = None,
    dtype: Any = jnp.float32,
) -> LocalCache:
    """An empty cache for causal decoding: a local cache for each residue group, key [B, dilation, window, K, H]."""
    dilation = check_int("dilation", dilation, least=1)
    group = init_local_cache(batch, num_key_heads, head_dim, window=window, value_dim=value_dim, dtype=dtype)
    key, value = (jnp.repeat(x[:, None], dilation, axis=1) for x in (group.key, group.value))
    return LocalCache(key, value, group.position)


@primitive(like="cache")
def prefill_dilated_cache(
    cache: LocalCache, key: Array, value: Array, *, dilation: int, lengths: Array | None = None
) -> LocalCache:
    """The cache after a prompt: what dilated_step leaves of it, token by token.

    Args:
      cache: from init_dilated_cache with the same dilation.
      key: [B, P, K, H], value: [B, P, K, V]. Attention over the prompt is dilated_attention(..., is_causal=True).
      lengths: integers [B], 0 to P: the row's tokens, padding after them. None: P in all rows.
    """
    check_type("cache", cache, LocalCache, "init_dilated_cache")
    dilation = _check_dilation(cache, dilation)
    lengths = check_prompt(key, value, cache.key, cache.value, lengths)
    count, window = counted(key, lengths), cache.key.shape[2]
    residue = jnp.arange(dilation)[None]
    in_group = newest(((by_row(count) - residue + dilation - 1) // dilation).reshape(-1, 1), window)
    index = in_group.reshape(-1, dilation, window) * dilation + residue[..., None]
    index = index.reshape(-1, dilation * window)

    def placed(old: Array, new: Array) -> Array:
        return tokens_at(new, index).reshape(old.shape).astype(old.dtype)

    return LocalCache(placed(cache.key, key), placed(cache.value, value), count)


def _check_dilation(cache: LocalCache, dilation: Any) -> int:
    dilation = check_int("dilation", dilation, least=1)
    require(cache.key.shape[1] == dilation, "dilation", dilation, f"the cache was made for {cache.key.shape[1]}")
    return dilation


@primitive("B*N.", like="cache")
def dilated_step(
    cache: LocalCache,
    query: Array,
    key: Array,
    value: Array,
    *,
    window: int,
    dilation: int,
    stride: int = 1,
    scale: float | None = None,
    implementation: str | None = None,
) -> tuple[Array, LocalCache]:
    """The next token of causal dilated attention: a step of local attention in the token's residue group.

    Args:
      cache: from init_dilated_cache with the same window and dilation.
      query, key, value: the token's, [B, 1, N, H], [B, 1, K, H], [B, 1, K, V].
      implementation: "xla", "pallas_tpu", "pallas_gpu" or None.

    Returns:
      (out [B, 1, N, V], the cache with the token added). For stride > 1 see local_step.

    Complexity: O(window) time and O(window dilation) memory.
    """
    check_type("cache", cache, LocalCache, "init_dilated_cache")
    dilation = _check_dilation(cache, dilation)
    check_position("cache.position", cache.position, cache.key.shape[0])
    residue = cache.position % dilation
    group = LocalCache(at(cache.key, residue), at(cache.value, residue), cache.position // dilation)
    out, group = local_step(
        group, query, key, value, window=window, stride=stride, scale=scale, implementation=implementation
    )
    keys, values = (put(old, new[:, None], residue) for old, new in zip(cache[:2], group[:2]))
    return out, LocalCache(keys, values, cache.position + 1)
