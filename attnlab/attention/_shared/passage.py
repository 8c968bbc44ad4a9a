"""What a stretch of tokens makes of the state before it, where linear attention goes over several stretches at once.

A stretch takes the state S [F, V] before it to P S + L: P a number, one per channel, or with the delta rule or erase a
matrix [F, F]. Two stretches in turn are one again, with P = P2 P1 and L = P2 L1 + L2.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax.numpy as jnp
from jax import lax

from attnlab.attention._shared.checks import Array
from attnlab.attention._shared.chunks import segment_starts
from attnlab.attention._shared.feature_maps import apply_feature_map
from attnlab.attention._shared.heads import repeat_key_heads
from attnlab.attention._shared.recurrence import LinearInputs, LinearOptions, LinearState


class Passage(NamedTuple):
    """transition P: [B, N, 1 or F, 1], or [B, N, F, F] with the delta rule or erase. state L: [B, N, F, V], finite, the
    sum of keys as one more column if there is one. keeps: [B, N], 1 where something of what came before may be left,
    else 0. spoilt: [B, N], 1 where what is not finite has come in and is not dropped."""

    transition: Array
    state: Array
    keeps: Array
    spoilt: Array


def joined(earlier: Passage, later: Passage) -> Passage:
    """Of two stretches, one after the other."""
    return Passage(
        _applied(later.transition, earlier.transition),
        _applied(later.transition, earlier.state) + later.state,
        earlier.keeps * later.keeps,
        jnp.maximum(earlier.spoilt * later.keeps, later.spoilt),
    )


def _applied(transition: Array, state: Array) -> Array:
    # States are float32, which products on a TPU or a GPU are not by default.
    if transition.shape[-1] == 1:
        return transition * state
    return jnp.matmul(transition, state, precision=lax.Precision.HIGHEST)


def entered(passage: Passage, continues: Array | None) -> Passage:
    """The passage of a stretch that drops what comes before it, where bool [B] `continues` is not True."""
    if continues is None:
        return passage
    kept = continues.astype(passage.keeps.dtype)
    transition = jnp.where(continues[:, None, None, None], passage.transition, 0)
    return passage._replace(transition=transition, keeps=passage.keeps * kept[:, None])


def dropped(before: Passage, continues: Array | None) -> Passage:
    """What comes before a stretch, of which nothing is left where bool [B] `continues` is not True."""
    if continues is None:
        return before
    state = jnp.where(continues[:, None, None, None], before.state, 0)
    return before._replace(state=state, spoilt=before.spoilt * continues[:, None])


def from_state(state: LinearState, spoilt: Array, like: Passage) -> Passage:
    """What comes before the first stretch."""
    columns = state.kv if state.k_sum is None else jnp.concatenate([state.kv, state.k_sum[..., None]], axis=-1)
    nothing = jnp.zeros_like(like.keeps)
    return Passage(jnp.zeros_like(like.transition), columns, nothing, spoilt.astype(nothing.dtype))


def to_state(passage: Passage, like: LinearState) -> LinearState:
    if like.k_sum is None:
        return LinearState(passage.state)
    return LinearState(passage.state[..., :-1], passage.state[..., -1])


def passage_of(
    inputs: LinearInputs,
    options: LinearOptions,
    attend: Callable[[LinearInputs], tuple[Array, LinearState]],
    keeps: Array,
    spoilt: Array,
) -> Passage:
    """Of causal tokens; their outputs are not computed. attend: the mechanism, for the delta rule and erase.

    inputs: finite, whose state says of which kind states are. keeps, spoilt: bool [B, N].
    """
    query, key, value, log_decay, beta, state, segment_ids, erase = inputs
    dtype, (batch, heads, features, width) = state.kv.dtype, state.kv.shape
    marks = keeps.astype(dtype), spoilt.astype(dtype)
    if beta is not None or erase is not None:
        # Values that are 0 leave of the identity what the transitions make of it.
        wide = jnp.concatenate([value, jnp.zeros_like(value, shape=(*value.shape[:-1], features))], axis=-1)
        identity = jnp.broadcast_to(jnp.eye(features, dtype=dtype), (batch, heads, features, features))
        start = jnp.concatenate([jnp.zeros_like(state.kv), identity + 0 * state.kv[..., :1]], axis=-1)
        _, end = attend(inputs._replace(value=wide, state=LinearState(start)))
        return Passage(end.kv[..., width:], end.kv[..., :width], *marks)
    _, key = apply_feature_map(options.feature_map, query, key, options.scale, dtype)
    key, value = (repeat_key_heads(x, heads) for x in (key, value.astype(dtype)))
    if state.k_sum is not None:
        value = jnp.concatenate([value, jnp.ones_like(value[..., :1])], axis=-1)
    transition = jnp.ones_like(state.kv[:, :, :1, :1])
    if log_decay is not None:
        gates = log_decay.astype(dtype)
        gates = gates if gates.ndim == 4 else jnp.broadcast_to(gates, key.shape[:-1])[..., None]
        after = jnp.flip(jnp.cumsum(jnp.flip(gates, 1), 1), 1)  # -inf drops what comes before
        key = key * jnp.exp(jnp.pad(after[:, 1:], ((0, 0), (0, 1), (0, 0), (0, 0))))
        transition = jnp.exp(after[:, 0])[..., None]
    if segment_ids is not None:
        starts_after = jnp.flip(jnp.cumsum(jnp.flip(segment_starts(segment_ids), 1), 1), 1)
        in_last = jnp.pad(starts_after[:, 1:], ((0, 0), (0, 1))) == 0
        key = jnp.where(in_last[..., None, None], key, 0)
        transition = jnp.where((starts_after[:, 0] == 0)[:, None, None, None], transition, 0)
    state_after = jnp.einsum("BTNF,BTNV->BNFV", key, value, preferred_element_type=dtype)
    return Passage(transition, state_after, *marks)
