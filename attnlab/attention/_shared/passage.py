"""What a stretch of tokens makes of the state before it, where linear attention goes over several stretches at once.

A stretch takes the state S [F, V] before it to P S + L: P a number, one per channel, or with the delta rule a matrix
[F, F]. Two stretches in turn are one again, with P = P2 P1 and L = P2 L1 + L2.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from attnlab.attention._shared.checks import Array
from attnlab.attention._shared.chunks import segment_starts
from attnlab.attention._shared.feature_maps import apply_feature_map
from attnlab.attention._shared.heads import repeat_key_heads
from attnlab.attention._shared.recurrence import LinearInputs, LinearOptions, LinearState


class Passage(NamedTuple):
    """transition P: [B, N, 1 or F, 1], or [B, N, F, F] with the delta rule. state L: [B, N, F, V], finite, the sum of
    keys as one more column if there is one. keeps: [B, N], 1 where something of what came before may be left, else 0.
    spoilt: [B, N], 1 where what is not finite has come in and is not dropped."""

    transition: Array
    state: Array
    keeps: Array
    spoilt: Array


def joined(earlier: Passage, later: Passage) -> Passage:
    """Of two stretches, one after the other."""
    return Passage(
        *_in_turn(earlier[:2], later[:2]),
        earlier.keeps * later.keeps,
        jnp.maximum(earlier.spoilt * later.keeps, later.spoilt),
    )


def _in_turn(earlier: tuple[Array, Array], later: tuple[Array, Array]) -> tuple[Array, Array]:
    """(P, L) of two stretches."""
    return _applied(later[0], earlier[0]), _applied(later[0], earlier[1]) + later[1]


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
    """Of causal tokens; their outputs are not computed. attend: the mechanism, for the delta rule.

    inputs: finite, whose state says of which kind states are. keeps, spoilt: bool [B, N].
    """
    query, key, value, log_decay, beta, state, segment_ids = inputs
    dtype, heads = state.kv.dtype, state.kv.shape[1]
    marks = keeps.astype(dtype), spoilt.astype(dtype)
    if beta is not None:

        def left(value: Array, state: Array) -> Array:
            return attend(inputs._replace(value=value, state=LinearState(state)))[1].kv

        return Passage(*_of_identity(left, value, state.kv), *marks)
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


_TOKENS = 64  # a multiple of them is in each of the stretches that are taken side by side


def side_by_side(
    attend: Callable[..., tuple[Array, Array]],
    count: int,
    query: Array,
    key: Array,
    value: Array,
    log_decay: Array | None,
    beta: Array | None,
    state: Array,
) -> tuple[Array, Array]:
    """attend(query, key, value, log_decay, beta, state) by so many stretches of every row at once.

    attend: the causal recurrence of mapped and scaled tokens, -> (out [B, T, N, V], the state after them). query, key:
    [B, T, N or K, F]. log_decay: [B, T, N] or [B, T, N, F]. state: [B, N, F, V] float32.

    They go from no state first, then from those that the ones before them leave: what `attend` does is done twice, and
    with the delta rule F value channels more of it once.
    """
    batch, length = query.shape[:2]
    size = -(-length // (count * _TOKENS)) * _TOKENS

    def split(x: Array) -> Array:
        # Zeros leave the state alone.
        x = jnp.pad(x, [(0, 0), (0, count * size - length), *((0, 0),) * (x.ndim - 2)])
        return x.reshape(batch * count, size, *x.shape[2:])

    def by_stretch(x: Array) -> Array:
        return jnp.moveaxis(x.reshape(batch, count, *x.shape[1:]), 1, 0)

    tokens = *jax.tree.map(split, (query, key, value, log_decay, beta)), state
    own = jax.tree.map(by_stretch, _from_nothing(attend, *tokens))
    own = own[0], own[1].at[0].add(_applied(own[0][0], state))
    ends = lax.associative_scan(_in_turn, own)[1]
    starts = jnp.concatenate([state[None], ends[:-1]])
    out, ends = attend(*tokens[:-1], jnp.moveaxis(starts, 0, 1).reshape(batch * count, *state.shape[1:]))
    return out.reshape(batch, count * size, *out.shape[2:])[:, :length], by_stretch(ends)[-1]


def _from_nothing(
    attend: Callable[..., tuple[Array, Array]],
    query: Array,
    key: Array,
    value: Array,
    log_decay: Array | None,
    beta: Array | None,
    like: Array,
) -> tuple[Array, Array]:
    """(P, L) of stretches. like: a state."""
    nothing = jnp.zeros_like(like, shape=(len(query), *like.shape[1:]))
    if beta is None:
        _, end = attend(query, key, value, log_decay, beta, nothing)
        if log_decay is None:
            return jnp.ones_like(end[..., :1, :1]), end
        transition = jnp.exp(jnp.sum(log_decay.astype(end.dtype), axis=1))
        return transition.reshape(*end.shape[:2], -1, 1), end
    return _of_identity(lambda value, state: attend(query, key, value, log_decay, beta, state)[1], value, nothing)


def _of_identity(after: Callable[[Array, Array], Array], value: Array, like: Array) -> tuple[Array, Array]:
    """(P, L) of stretches of the delta rule. after(value, state) -> the state after them. like: a state of theirs."""
    # Values that are 0 leave of the identity what the transitions make of it.
    width, features = value.shape[-1], like.shape[-2]
    wide = jnp.concatenate([value, jnp.zeros_like(value, shape=(*value.shape[:-1], features))], axis=-1)
    identity = jnp.broadcast_to(jnp.eye(features, dtype=like.dtype), (*like.shape[:-1], features))
    end = after(wide, jnp.concatenate([jnp.zeros_like(like), identity + 0 * like[..., :1]], axis=-1))
    return end[..., width:], end[..., :width]
