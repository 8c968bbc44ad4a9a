"""Softmax attention over all keys as banded flash attention: the band has every key, or every earlier one."""

from collections.abc import Callable
from typing import Any

import jax

from attnlab.attention._kernels.backends import on_backends
from attnlab.attention._kernels.banded import banded_attention, banded_refusal, window_pattern

Array = jax.Array


def _call(
    backend: str,
    xla: Callable[..., Any],
    query: Array,
    key: Array,
    value: Array,
    bias: None,
    mask: None,
    segments: Any,
    *,
    is_causal: bool,
    scale: Any,
) -> tuple[Array, Array]:
    def blocked(query: Array, key: Array, value: Array, segments: Any, scale: Any) -> Any:
        return xla(query, key, value, None, None, segments, is_causal=is_causal, scale=scale)

    pattern = window_pattern(query.shape[1], key.shape[1], is_causal=is_causal)
    return banded_attention(blocked, query, key, value, segments, scale=scale, pattern=pattern, backend=backend)


def _refusal(
    backend: str,
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
    pattern = window_pattern(query.shape[1], key.shape[1], is_causal=is_causal)
    return banded_refusal(query, key, value, segments, pattern, backend)


KERNELS = on_backends(_call, _refusal)
