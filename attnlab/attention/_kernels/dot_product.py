"""Softmax attention over all keys as banded flash attention: the band has every key, or every earlier one; a mask of
numbers becomes lists of tiles."""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from attnlab.attention import masks
from attnlab.attention._kernels.backends import on_backends
from attnlab.attention._kernels.banded import banded_attention, banded_refusal, window_pattern
from attnlab.attention._shared.softmax import with_sink_logits

Array = jax.Array
_MOST_PAIRS = 2**32  # of a query and a key, which a mask is asked for where a call is lowered


def _call(
    backend: str,
    xla: Callable[..., Any],
    query: Array,
    key: Array,
    value: Array,
    bias: Array | None,
    mask: None,
    segments: Any,
    sink_logits: Array | None = None,
    *,
    is_causal: bool,
    scale: Any,
    softcap: float | None = None,
    predicate: masks.Mask | None = None,
) -> tuple[Array, Array]:
    def blocked(query: Array, key: Array, value: Array, segments: Any, scale: Any, bias: Array | None = None) -> Any:
        options: Any = {"is_causal": is_causal, "scale": scale, "softcap": softcap, "predicate": predicate}
        return xla(query, key, value, bias, None, segments, **options)

    queries, keys = query.shape[1], key.shape[1]
    if predicate is None:
        pattern = window_pattern(queries, keys, is_causal=is_causal)
    else:
        pattern = mask_lists(queries, keys, is_causal, predicate, _tile(backend))
    of_queries, of_keys = (bias, None) if _has_no_keys(bias) else (None, bias)
    of_call: Any = {"scale": scale, "softcap": softcap, "pattern": pattern, "bias": of_keys, "backend": backend}
    out, lse = banded_attention(blocked, query, key, value, segments, **of_call)
    if of_queries is not None:
        out, lse = _with_bias_of_queries(out, lse, of_queries)
    return with_sink_logits(out, lse, sink_logits)


def _has_no_keys(bias: Any) -> bool:
    return bias is not None and bias.shape[3] == 1


def _with_bias_of_queries(out: Array, lse: Array, bias: Array) -> tuple[Array, Array]:
    """The results with a bias [B|1, N|1, T|1, 1], which moves no weight: it is in lse alone, but for what is not
    finite."""
    bias = jnp.swapaxes(bias[..., 0], 1, 2).astype(lse.dtype)
    is_empty = (lse == -jnp.inf) | (bias == -jnp.inf)
    spoilt = jnp.where(is_empty | jnp.isfinite(bias), 0, jnp.nan)
    out = jnp.where(is_empty[..., None], 0, out + spoilt[..., None].astype(out.dtype))
    return out, jnp.where(is_empty, -jnp.inf, lse + bias + spoilt)


def _refusal(
    backend: str,
    query: Array,
    key: Array,
    value: Array,
    bias: Array | None,
    mask: Array | None,
    segments: Any,
    sink_logits: Array | None = None,
    *,
    is_causal: bool,
    scale: Any,
    softcap: float | None = None,
    predicate: masks.Mask | None = None,
) -> str | None:
    if bias is not None and backend == "gpu":
        return "has no bias"
    if mask is not None:
        return "has no mask that is an array"
    bias = None if _has_no_keys(bias) else bias
    queries, keys = query.shape[1], key.shape[1]
    pattern = window_pattern(queries, keys, is_causal=is_causal)
    on_logits: Any = {"softcap": softcap, "bias": bias}
    reason = banded_refusal(query, key, value, segments, pattern, backend, **on_logits)
    if predicate is None or reason is not None:
        return reason
    of_mask = queries, keys, is_causal, predicate, _tile(backend)
    if (reason := mask_refusal(*of_mask)) is not None:
        return reason
    return banded_refusal(query, key, value, segments, mask_lists(*of_mask), backend, **on_logits)


def mask_refusal(queries: int, keys: int, is_causal: bool, predicate: masks.Mask, tile: tuple[int, int]) -> str | None:
    """Why there are no mask_lists."""
    if queries * keys > _MOST_PAIRS:
        return f"serves masks of up to {_MOST_PAIRS} pairs of a query and a key, got {queries * keys}"
    from kernels_pallas.patterns import LargeBank

    try:
        mask_lists(queries, keys, is_causal, predicate, tile)
    except jax.errors.TracerArrayConversionError:
        return "needs a mask that reads no arrays of the program"
    except LargeBank as error:
        return str(error)
    return None


def _tile(backend: str) -> tuple[int, int]:
    """Of a mask's lists, queries and keys. On a TPU a step costs more, and larger tiles leave out fewer pairs."""
    if backend == "tpu":
        return 256, 256
    from kernels_pallas.gpu.band import TILE

    return TILE, TILE


@functools.lru_cache(maxsize=16)  # a call needs them twice: to be served, and to run
def mask_lists(queries: int, keys: int, is_causal: bool, predicate: masks.Mask, tile: tuple[int, int]) -> Any:
    """patterns.BlockLists of a mask, in tiles of so many queries and keys."""
    from kernels_pallas.patterns import BlockLists

    seen = predicate & masks.causal() if is_causal else predicate

    def sees(query: Any, key: Any) -> Any:
        with jax.ensure_compile_time_eval():
            return seen.sees((query,), (key,))

    return BlockLists.of(sees, queries, keys, *tile)


KERNELS = on_backends(_call, _refusal)
