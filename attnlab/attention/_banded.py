"""Banded flash attention's kernels as an implementation: values, gradients, and what they refuse."""

from typing import Any

import jax
import jax.numpy as jnp

from attnlab.attention._kernel_call import kernel_call

Array = jax.Array
# Tables of so many tokens are made when a call is traced, and no more.
MOST_TOKENS = 2**22


def banded_attention(
    query: Array, key: Array, value: Array, segment_ids: Any, *, scale: Any, pattern: Any, blocked: Any
) -> tuple[Array, Array]:
    """(out, lse) of query [B, T, N, H], key, value and a pair of segment ids, or None, on TPU.

    blocked: (query, key, value, segment_ids, scale) -> the same in plain JAX.
    """
    from kernels_pallas.tpu import banded_flash, banded_flash_backward

    def kernel(arrays: Any, segment_ids: Any, keep: bool) -> tuple[Any, Any]:
        *tokens, scale = arrays
        results = banded_flash.banded_flash_attention(*tokens, pattern=pattern, segment_ids=segment_ids, scale=scale)
        return results, results

    def gradients(arrays: Any, segment_ids: Any, kept: Any, cotangents: Any) -> Any:
        *tokens, scale = arrays
        return banded_flash_backward.banded_flash_gradients(
            *tokens, *kept, *cotangents, pattern=pattern, segment_ids=segment_ids, scale=scale
        )

    def in_plain_jax(arrays: Any, segment_ids: Any) -> Any:
        *tokens, scale = arrays
        return blocked(*tokens, segment_ids, scale)

    arrays = (query, key, value, jnp.asarray(scale, jnp.float32))
    return kernel_call(kernel, gradients, in_plain_jax, arrays, segment_ids)


def banded_refusal(query: Any, key: Any, value: Any, segment_ids: Any, pattern: Any) -> str | None:
    """Why banded_attention cannot serve arrays of these shapes, or None if it can."""
    from kernels_pallas.tpu import banded_flash, banded_flash_backward

    if 0 in query.shape or 0 in key.shape:
        return f"needs arrays that are not empty, got query {query.shape} and key {key.shape}"
    if max(query.shape[1], key.shape[1]) > MOST_TOKENS:
        return f"serves up to {MOST_TOKENS} tokens, got {max(query.shape[1], key.shape[1])}"
    for module in (banded_flash, banded_flash_backward):
        reason = module.refusal(query, key, value, pattern=pattern, segment_ids=segment_ids)
        if reason is not None:
            return reason
    return None
