"""Memora: a memory whose weights are distributions over its inputs, which learn at every token.

    W_t   = softmax_h(e^{g_t} log W_{t-1} - beta_t k_t (c W_{t-1}^T k_t - v_t)^T)      of every output over the inputs h
    out_t = c W_t^T q_t

A token is a step of descent on |c W^T k - v|^2 / 2, its divergence from the weights before in place of the squared
distance that the delta rule has; g_t <= 0 forgets, towards uniform weights. Logarithms of weights do not add up over
tokens, as the error depends on the weights themselves: a scan over tokens in every form. Paper: It's All Connected: A
Journey Through Test-Time Memorization, Retention, Attentional Bias, and Online Optimization (Miras; Behrouz et al.
2025), which leaves open what the softmax goes over.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from attnlab.attention._dispatch.choice import Implementations, dispatch
from attnlab.attention._dispatch.exchange import Parts, in_turn, over_positions, positions_below, whole_space
from attnlab.attention._dispatch.primitive import primitive
from attnlab.attention._shared.checks import (
    Array,
    accumulator_dtype,
    check_array,
    check_bool,
    check_dtype,
    check_floating,
    check_lengths,
    check_position,
    check_query_key_value,
    check_sizes,
    check_step,
    check_type,
    default_scale,
)
from attnlab.attention._shared.chunks import scan_chunks
from attnlab.attention._shared.finite import (
    finite_or_zero,
    is_spoilt,
    spoil,
    spoilt_since,
    spoilt_tokens,
    state_is_spoilt,
)
from attnlab.attention._shared.heads import repeat_key_heads

_CHUNK = 32  # Tokens between the states that gradients keep.


class MemoraState(NamedTuple):
    """What the tokens so far have written, in float32 (float64 for float64 inputs).

    position: int32 [], the next token's, or [B], of each row.
    log_weights: [B, N, H, V], log W.
    """

    position: Array
    log_weights: Array


class _Tokens(NamedTuple):
    """is_token: bool [B, T], False of padding; None where there is none."""

    query: Array
    key: Array
    value: Array
    beta: Array
    log_decay: Array
    is_token: Array | None


# (tokens, log_weights) -> (out, the log weights after them), of finite arrays.
_Attend = Callable[[_Tokens, Array], tuple[Array, Array]]


@primitive("B*N.", "", "BN..")
def memora_attention(
    query: Array,
    key: Array,
    value: Array,
    *,
    beta: Array | None = None,
    log_decay: Array | None = None,
    scale: float | None = None,
    initial_state: MemoraState | None = None,
    return_state: bool = False,
    lengths: Array | None = None,
    implementation: str | None = None,
) -> Any:
    """A linear memory of distributions; the module's docstring has the formula. Causal.

    Args:
      query: [B, T, N, H], floating. key: [B, T, K, H], value: [B, T, K, V]; K divides N.
      beta: [B, T, N] >= 0, how far a token steps. None: 1.
      log_decay: g [B, T, N] <= 0. None: 0, which forgets nothing.
      scale: c > 0, on what is read, of queries and of keys: an output's weights sum to it. None means H ** 0.5, with
        which keys of unit length reach values of about 1.
      initial_state: of the tokens before the first (see init_memora_cache). Default: there are none.
      return_state: also return the MemoraState after the last token.
      lengths: integers [B], 0 to T: the row's tokens, padding after them, which leaves the state alone. Outputs of
        padding mean nothing. Default: T in all rows.
      implementation: None, "reference" (a scan over tokens) or "xla" (the same, chunks of it computed anew for
        gradients).

    Returns:
      [B, T, N, V] in query's dtype, or (that, MemoraState) with return_state. A token that is not finite makes NaN of
      what sees it, and of nothing else.

    Raises:
      ValueError, TypeError: at trace time, naming the argument.

    Complexity, per head: O(T H V) time, T steps one after the other; O(T) memory, and for gradients of "xla" a state
    for every 32 tokens more. Devices that share the positions wait for each other, as two parts' writes do not join.
    """
    check_query_key_value(query, key, value)
    batch, length = query.shape[:2]
    dtype, factor = accumulator_dtype(query, key, value), _scale(scale, query)
    beta, log_decay = _gates(query, beta, log_decay, dtype)
    return_state = check_bool("return_state", return_state)
    if initial_state is None:
        initial_state = _uniform(batch, query.shape[2], query.shape[-1], value.shape[-1], dtype, like=query)
    _check_state("initial_state", initial_state, query, value)
    is_token = None
    if (lengths := check_lengths(lengths, batch)) is not None:
        is_token = positions_below(lengths, length)
        key, value = (jnp.where(is_token[..., None, None], x, 0) for x in (key, value))
        beta, log_decay = (jnp.where(is_token[..., None], x, 0) for x in (beta, log_decay))
    attend = functools.partial(dispatch, "memora_attention", IMPLEMENTATIONS, implementation, scale=factor)
    out, log_weights = over_positions(
        functools.partial(_whole, attend),
        functools.partial(_parted, attend),
        ("B*N.", "B*K.", "B*K.", "B*N", "B*N", "B*", "BN.."),
        ("B*N.", "BN.."),
        *_Tokens(query, key, value, beta, log_decay, is_token),
        initial_state.log_weights.astype(dtype),
    )
    position = initial_state.position + (whole_space((length,))[0] if lengths is None else lengths)
    return (out, MemoraState(position, log_weights)) if return_state else out


def init_memora_cache(
    batch: int, num_heads: int, head_dim: int, value_dim: int | None = None, *, dtype: Any = jnp.float32
) -> MemoraState:
    """The state before the first token, for memora_step and initial_state: uniform weights. num_heads: the query's.
    value_dim=None means head_dim. Other weights to start from are another log_weights."""
    value_dim = head_dim if value_dim is None else value_dim
    sizes = check_sizes(batch=batch, num_heads=num_heads, head_dim=head_dim, value_dim=value_dim)
    batch, num_heads, head_dim, value_dim = sizes
    return _uniform(batch, num_heads, head_dim, value_dim, check_dtype("dtype", dtype))


@primitive("B*N.", like="state")
def memora_step(
    state: MemoraState,
    query: Array,
    key: Array,
    value: Array,
    *,
    beta: Array | None = None,
    log_decay: Array | None = None,
    scale: float | None = None,
) -> tuple[Array, MemoraState]:
    """One more token: memora_attention's next output and state, in O(H V) per head.

    Args:
      state: from init_memora_cache, an earlier step, or memora_attention(..., return_state=True).
      query, key, value: [B, 1, N, H], [B, 1, K, H], [B, 1, K, V]. beta, log_decay: [B, 1, N] or None; scale: as in the
        call.

    Returns:
      ([B, 1, N, V] in query's dtype, the state after this token).
    """
    check_step(query, key, value)
    _check_state("state", state, query, value)
    dtype = accumulator_dtype(query, key, value)
    tokens = _Tokens(query, key, value, *_gates(query, beta, log_decay, dtype), None)
    log_weights, out = _token(
        _error_of, _scale(scale, query), state.log_weights.astype(dtype), jax.tree.map(lambda x: x[:, 0], tokens)
    )
    return out[:, None], MemoraState(state.position + 1, log_weights)


def _scale(scale: Any, query: Array) -> Any:
    return default_scale(query.shape[-1] ** 0.5 if scale is None else scale, query.shape[-1])


def _gates(query: Array, beta: Array | None, log_decay: Array | None, dtype: Any) -> tuple[Array, Array]:
    for name, gate in (("beta", beta), ("log_decay", log_decay)):
        if gate is not None:
            check_array(name, gate, query.shape[:3], "[B, T, N]")
            check_floating(name, gate)
    # Made like query: inside shard_map they must vary over the mesh axes that a scan's inputs vary over.
    one = jnp.ones_like(query, shape=query.shape[:3], dtype=dtype)
    return (one if beta is None else beta.astype(dtype), 0 * one if log_decay is None else log_decay.astype(dtype))


def _uniform(
    batch: int, heads: int, head_dim: int, value_dim: int, dtype: Any, like: Array | None = None
) -> MemoraState:
    zeros: Callable[..., Array] = jnp.zeros if like is None else functools.partial(jnp.zeros_like, like)
    log_weights = zeros(shape=(batch, heads, head_dim, value_dim), dtype=dtype) - jnp.log(head_dim).astype(dtype)
    return MemoraState(jnp.zeros((), jnp.int32), log_weights)


def _check_state(name: str, state: Any, query: Array, value: Array) -> None:
    check_type(name, state, MemoraState, "init_memora_cache")
    batch, _, heads, head_dim = query.shape
    check_position(f"{name}.position", state.position, batch)
    shape = batch, heads, head_dim, value.shape[-1]
    check_array(f"{name}.log_weights", state.log_weights, shape, "[batch, heads, head_dim, value_dim]")


def _finite(tokens: _Tokens) -> _Tokens:
    """Zeros in place of what is not finite; a decay of -inf forgets all that came before."""
    query, key, value, beta = (finite_or_zero(x) for x in tokens[:4])
    decay = jnp.where(tokens.log_decay < jnp.inf, tokens.log_decay, 0)  # not NaN either
    return _Tokens(query, key, value, beta, decay, tokens.is_token)


def _spoilt(tokens: _Tokens, before: Array) -> Array:
    """bool [B, T, N]: tokens that have seen what is not finite. before: bool [B, N], of the state before them."""
    spoilt = spoilt_tokens(tokens.key, tokens.value, tokens.query.shape[2])
    spoilt = spoilt | ~jnp.isfinite(tokens.beta) | ~(tokens.log_decay < jnp.inf)
    return spoilt_since(spoilt, jnp.zeros_like(spoilt), before)


def _whole(attend: _Attend, *arrays: Any) -> tuple[Array, Array]:
    tokens, log_weights = _Tokens(*arrays[:-1]), arrays[-1]
    seen = _spoilt(tokens, state_is_spoilt(log_weights))
    out, after = attend(_finite(tokens), log_weights)
    return spoil(out, seen | is_spoilt(tokens.query)), spoil(after, seen[:, -1])


class _Before(NamedTuple):
    """What the tokens before a part leave. spoilt: [B, N], 1 where one of them is not finite, else 0."""

    log_weights: Array
    spoilt: Array


def _parted(attend: _Attend, parts: Parts, *arrays: Any) -> tuple[Array, Array]:
    """Each device's part, in turn."""
    tokens, log_weights = _Tokens(*arrays[:-1]), arrays[-1]
    finite, dtype = _finite(tokens), log_weights.dtype

    def passed_on(before: _Before) -> _Before:
        _, after = attend(finite, before.log_weights)
        return _Before(after, _spoilt(tokens, before.spoilt > 0)[:, -1].astype(dtype))

    before, end = in_turn(passed_on, _Before(log_weights, state_is_spoilt(log_weights).astype(dtype)), parts)
    out, _ = attend(finite, before.log_weights)
    seen = _spoilt(tokens, before.spoilt > 0)
    return spoil(out, seen | is_spoilt(tokens.query)), spoil(end.log_weights, end.spoilt > 0)


def _gradient_of(log_weights: Array, key: Array, value: Array, scale: Any) -> Array:
    """By the objective itself, in the weights c W, [B, N, H, V]."""

    def objective(weights: Array) -> Array:
        return jnp.sum(jnp.square(jnp.einsum("BNHV,BNH->BNV", weights, key) - value)) / 2

    return jax.grad(objective)(scale * jnp.exp(log_weights))


def _error_of(log_weights: Array, key: Array, value: Array, scale: Any) -> Array:
    """The same as the outer product that it is."""
    error = scale * jnp.einsum("BNHV,BNH->BNV", jnp.exp(log_weights), key) - value
    return key[..., None] * error[:, :, None]


def _token(gradient: Callable[..., Array], scale: Any, log_weights: Array, now: _Tokens) -> tuple[Array, Array]:
    """now: the token's arrays, without their axis of positions."""
    heads, dtype = now.query.shape[1], log_weights.dtype
    query = now.query.astype(dtype)
    key, value = (repeat_key_heads(x[:, None].astype(dtype), heads)[:, 0] for x in (now.key, now.value))
    decay = jnp.exp(now.log_decay)[..., None, None]  # 0 makes the weights uniform, whose logarithms are finite
    moved = decay * log_weights - now.beta[..., None, None] * gradient(log_weights, key, value, scale)
    after = jax.nn.log_softmax(moved, axis=2)
    if now.is_token is not None:
        after = jnp.where(now.is_token[:, None, None, None], after, log_weights)
    out = scale * jnp.einsum("BNHV,BNH->BNV", jnp.exp(after), query)
    return after, out.astype(now.query.dtype)


def _by_token(gradient: Callable[..., Array], scale: Any, log_weights: Array, tokens: _Tokens) -> tuple[Array, Array]:
    """(log weights after all tokens, out)."""
    by_time = jax.tree.map(lambda x: jnp.moveaxis(x, 1, 0), tokens)
    after, out = jax.lax.scan(functools.partial(_token, gradient, scale), log_weights, by_time)
    return after, jnp.moveaxis(out, 0, 1)


def _reference(tokens: _Tokens, log_weights: Array, *, scale: Any) -> tuple[Array, Array]:
    return _by_token(_gradient_of, scale, log_weights, tokens)[::-1]


def _xla(tokens: _Tokens, log_weights: Array, *, scale: Any) -> tuple[Array, Array]:
    chunk = functools.partial(_by_token, _error_of, scale)
    return scan_chunks(chunk, log_weights, tokens, _CHUNK)[::-1]


IMPLEMENTATIONS: Implementations = {"reference": _reference, "xla": _xla}
