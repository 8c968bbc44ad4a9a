"""A token's attention to a cache of keys and values: what the steps of softmax, local and dilated attention share."""

from typing import Any

import jax
import jax.numpy as jnp

from attnlab.attention._dispatch.choice import Implementations, dispatch
from attnlab.attention._kernels import cache
from attnlab.attention._shared.checks import accumulator_dtype
from attnlab.attention._shared.softmax import dense_attention

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
    return dense_attention(query, key, value, visible=visible[:, None, None], scale=scale)[0]


STEP_IMPLEMENTATIONS: Implementations = {"xla": _xla, **cache.KERNELS}
