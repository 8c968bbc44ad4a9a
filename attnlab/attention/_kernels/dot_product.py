"""Softmax attention over all keys as banded flash attention: the band has every key, or every earlier one; a mask of
numbers becomes lists of tiles."""

import functools
from collections.abc import Callable
from typing import Any

import jax

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
    bias: None,
    mask: None,
    segments: Any,
    sink_logits: Array | None = None,
    *,
    is_causal: bool,
    scale: Any,
    softcap: float | None = None,
    predicate: masks.Mask | None = None,
) -> tuple[Array, Array]:
    def blocked(query: Array, key: Array, value: Array, segments: Any, scale: Any) -> Any:
        options: Any = {"is_causal": is_causal, "scale": scale, "softcap": softcap, "predicate": predicate}
        return xla(query, key, value, None, None, segments, **options)

    queries, keys = query.shape[1], key.shape[1]
    if predicate is None:
        pattern = window_pattern(queries, keys, is_causal=is_causal)
    else:
        pattern = mask_lists(queries, keys, is_causal, predicate, _tile(backend))
    of_call: Any = {"scale": scale, "softcap": softcap, "pattern": pattern, "backend": backend}
    return with_sink_logits(*banded_attention(blocked, query, key, value, segments, **of_call), sink_logits)


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
    for name, given in (("bias", bias), ("mask", mask)):
        if given is not None:
            return f"has no {name}" + " that is an array" * (name == "mask")
    queries, keys = query.shape[1], key.shape[1]
    pattern = window_pattern(queries, keys, is_causal=is_causal)
    reason = banded_refusal(query, key, value, segments, pattern, backend, softcap)
    if predicate is None or reason is not None:
        return reason
    of_mask = queries, keys, is_causal, predicate, _tile(backend)
    if (reason := mask_refusal(*of_mask)) is not None:
        return reason
    return banded_refusal(query, key, value, segments, mask_lists(*of_mask), backend)


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
