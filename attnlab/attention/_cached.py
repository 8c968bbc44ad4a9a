"""Caches of keys and values: how prompts and tokens are put into them, and attention to one of a few tokens.

The tokens so far are counted once for all rows, int32 [], or where prompts differ in length by row, int32 [B].
"""

from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from attnlab.attention._dispatch.choice import Implementations, dispatch
from attnlab.attention._kernels import cache
from attnlab.attention._shared.checks import accumulator_dtype, check_sink_logits, check_softcap
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
    softcap: float | None,
    sink_logits: Array | None,
    implementation: str | None,
) -> Array:
    """[B, T, N, V]: the attention of T tokens to a cache [B, S, K, H], [B, S, K, V].

    visible: bool [B or 1, T, S]. used: int [] or [B], no slot from this one on is visible. Checks the two options.
    """
    softcap = check_softcap(softcap)
    check_sink_logits(sink_logits, query.shape[2])
    # One row per sequence of the batch, so that devices share it as they share the batch.
    batch = query.shape[0]
    visible, used = jnp.broadcast_to(visible, (batch, *visible.shape[1:])), jnp.broadcast_to(used, (batch,))
    arrays = (query, key, value, visible, used, jnp.asarray(scale, accumulator_dtype(query, key, value)), sink_logits)
    return dispatch(primitive, STEP_IMPLEMENTATIONS, implementation, *arrays, softcap=softcap)


def _xla(
    query: Array,
    key: Array,
    value: Array,
    visible: Array,
    used: Array,
    scale: Array,
    sink_logits: Array | None,
    *,
    softcap: float | None,
) -> Array:
    options: Any = {"visible": visible[:, None], "scale": scale, "softcap": softcap, "sink_logits": sink_logits}

    def form(attend: Any) -> Any:
        return lambda *arrays: attend(*arrays, **options)[0]

    # A slot that is not visible may hold a NaN: of a window's earlier tokens, or of what a caller did not clear.
    return jax.lax.cond(are_finite(key, value), form(dense_attention), form(reference_attention), query, key, value)


def by_row(count: Array) -> Array:
    """A count [] or [B] as [1, 1] or [B, 1], to compare with what runs along the slots."""
    return count.reshape(-1, 1)


def put(cache: Array, new: Array, slot: Array) -> Array:
    """cache [B, S, ...] with new [B, T, ...] in slots from this one on, int [] or [B]."""
    new = new.astype(cache.dtype)
    if slot.ndim == 0:
        return lax.dynamic_update_slice_in_dim(cache, new, slot, axis=1)
    return jax.vmap(lambda x, new, slot: lax.dynamic_update_slice_in_dim(x, new, slot, axis=0))(cache, new, slot)


def at(cache: Array, slot: Array) -> Array:
    """[B, S, ...] -> [B, ...], what a slot holds, int [] or [B]."""
    if slot.ndim == 0:
        return lax.dynamic_index_in_dim(cache, slot, axis=1, keepdims=False)
    return jax.vmap(lambda x, slot: lax.dynamic_index_in_dim(x, slot, axis=0, keepdims=False))(cache, slot)


# --- Prompts ----------------------------------------------------------------------------------------------------------


def counted(x: Array, lengths: Array | None) -> Array:
    """A cache's count of tokens after a prompt [B, P, ...]: int32 [], or the lengths [B]."""
    return jnp.asarray(x.shape[1], jnp.int32) if lengths is None else lengths


def filled(cache: Array, prompt: Array, count: Array) -> Array:
    """An empty cache [B, S, K, H] with a prompt's tokens [B, P, K, H], zeros from `count` on."""
    is_token = (jnp.arange(prompt.shape[1])[None] < by_row(count))[..., None, None]
    rest = ((0, 0), (0, cache.shape[1] - prompt.shape[1]), (0, 0), (0, 0))
    return jnp.pad(jnp.where(is_token, prompt, 0).astype(cache.dtype), rest)


def newest(count: Array, slots: int) -> Array:
    """Of counts [B or 1, 1] of tokens, of which token i goes into slot i mod slots: the last one that came into each,
    [B or 1, slots], negative where none did."""
    last = count - 1
    return last - (last - jnp.arange(slots)[None]) % slots


def tokens_at(x: Array, index: Array) -> Array:
    """[B, P, ...] -> [B, S, ...], at the tokens int [B or 1, S]; zeros where these are negative."""
    index = index.reshape(*index.shape, *(1,) * (x.ndim - 2))
    return jnp.where(index < 0, 0, jnp.take_along_axis(x, jnp.maximum(index, 0), axis=1))


STEP_IMPLEMENTATIONS: Implementations = {"xla": _xla, **cache.KERNELS}
