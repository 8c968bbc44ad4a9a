"""A token's attention to a cache of keys and values: what the steps of softmax, local and dilated attention share."""

from typing import Any

import jax
import jax.numpy as jnp

from attnlab.attention._dispatch.choice import Implementations, dispatch
from attnlab.attention._kernels import cache
from attnlab.attention._shared.checks import accumulator_dtype
from attnlab.attention._shared.finite import are_finite
from attnlab.attention._shared.softmax import dense_attention, reference_attention

Array = jax.Array


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
    # One row per sequence of the batch, so that devices share it as they share the batch.
    visible = jnp.broadcast_to(visible, (query.shape[0], *visible.shape))
    arrays = (query, key, value, visible, used, jnp.asarray(scale, accumulator_dtype(query, key, value)))
    return dispatch(primitive, STEP_IMPLEMENTATIONS, implementation, *arrays)


def _xla(query: Array, key: Array, value: Array, visible: Array, used: Array, scale: Array) -> Array:
    def form(attend: Any) -> Any:
        return lambda *arrays: attend(*arrays, visible=visible[:, None, None], scale=scale)[0]

    # A slot that is not visible may hold a NaN: of a window's earlier tokens, or of what a caller did not clear.
    return jax.lax.cond(are_finite(key, value), form(dense_attention), form(reference_attention), query, key, value)


STEP_IMPLEMENTATIONS: Implementations = {"xla": _xla, **cache.KERNELS}
