"""Log-linear attention: a state per power of two of the distance, each read by a scale of its own.

With log decay g_t <= 0, scale s and level scales lambda_t^l >= 0, of which a query has L,

    out_t = s sum_{r<=t} lambda_t^{level(t,r)} e^{g_{r+1} + ... + g_t} (q_t . k_r) v_r

level(t, t) = 0, else the number of bits of t xor r, positions counted from 0: the tokens before t fall into at most
log2 t runs, each a power of two long, the nearest the shortest. All scales 1 is linear attention. Paper: Log-Linear
Attention (Guo et al. 2025).

The state after token e has one sum of k v^T per level(e, r). A token t after it sees all of level l at one level,

    level(t, r) = max(bits(t xor e), l)

so sums are read, moved on and joined by whole levels, wherever a chunk or a device's part begins.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from attnlab.attention._dispatch.choice import Implementations, dispatch
from attnlab.attention._dispatch.deferred import vary_alike
from attnlab.attention._dispatch.exchange import Parts, over_positions, positions_below, states_before, whole_space
from attnlab.attention._dispatch.primitive import primitive
from attnlab.attention._shared.checks import (
    Array,
    accumulator_dtype,
    check_array,
    check_bool,
    check_dtype,
    check_floating,
    check_int,
    check_lengths,
    check_position,
    check_query_key_value,
    check_sizes,
    check_step,
    check_type,
    default_scale,
    require,
    shape_text,
)
from attnlab.attention._shared.chunks import decayed_products, decays_of_chunk, scan_chunks
from attnlab.attention._shared.finite import (
    finite_or_zero,
    is_spoilt,
    spoil,
    spoilt_since,
    spoilt_tokens,
    state_is_spoilt,
)
from attnlab.attention._shared.heads import repeat_key_heads


class LogLinearState(NamedTuple):
    """What log-linear attention remembers of the tokens so far, in float32 (float64 for float64 inputs).

    levels: [B, N, L, H, V], the decayed sums of k v^T, by their level as the last token sees them.
    position: int32 [], the next token's, or [B], of each row.
    """

    levels: Array
    position: Array


class _Inputs(NamedTuple):
    """Of a call or a part: log_decay [B, T, N] or None; levels before the first token, whose position is int32 [B];
    limit: int32 [B], the position after the last token, past which there is padding, zeros that do not decay."""

    query: Array
    key: Array
    value: Array
    level_scales: Array
    log_decay: Array | None
    levels: Array
    position: Array
    limit: Array


# (inputs, scale=, chunk_size=) -> (out, levels after the tokens), of finite arrays.
_Attend = Callable[..., tuple[Array, Array]]


@primitive("B*N.", "BN...", "")
def log_linear_attention(
    query: Array,
    key: Array,
    value: Array,
    level_scales: Array,
    *,
    log_decay: Array | None = None,
    scale: float | None = None,
    initial_state: LogLinearState | None = None,
    return_state: bool = False,
    lengths: Array | None = None,
    chunk_size: int = 64,
    implementation: str | None = None,
) -> Any:
    """Causal linear attention with a scale per query and level of distance; the module's docstring has the formula.

    Args:
      query: [B, T, N, H], floating. key: [B, T, K, H], value: [B, T, K, V]; K divides N.
      level_scales: [B, T, N, L], floating, L >= 1 + ceil(log2 T): the query's factor on its own token, then on tokens
        whose position differs from its own from bit 0, 1, .. on. Usually >= 0.
      log_decay: [B, T, N], natural log of the decay, <= 0; applied before the token writes. -inf drops the state.
      scale: of the output; None means H ** -0.5.
      initial_state: of the tokens before the first (see init_log_linear_cache). Default: there are none.
      return_state: also return the LogLinearState after the last token.
      lengths: integers [B], 0 to T: the row's tokens, padding after them, which the state does not see. Outputs of
        padding mean nothing. Default: T in all rows.
      chunk_size: tokens taken at once by "xla".
      implementation: None, "reference" (a scan over tokens) or "xla" (a scan over chunks).

    Returns:
      [B, T, N, V] in query's dtype, or (that, LogLinearState) with return_state. From position 2^(L-1) on, for which L
      levels are too few, NaN.

    Raises:
      ValueError, TypeError: at trace time, naming the argument.

    Complexity of "xla", per head with chunks of C: O(T (C (H + V + L) + L H V)) time; O(T (H + V + L)) memory, and for
    gradients one state per chunk more, O(T L H V / C).
    """
    check_query_key_value(query, key, value)
    batch, length, heads, head_dim = query.shape
    return_state, chunk_size = check_bool("return_state", return_state), check_int("chunk_size", chunk_size, least=1)
    _check_gates(query, level_scales, log_decay)
    (total,) = whole_space((length,))
    if not jax.export.is_symbolic_dim(total):
        least = 1 + (total - 1).bit_length()
        allowed = f"need [B, T, N, L] of at least {least} levels for {total} tokens"
        require(level_scales.shape[-1] >= least, "level_scales", shape_text(level_scales), allowed)
    dtype = accumulator_dtype(query, key, value)
    if initial_state is None:
        sizes = (batch, heads, level_scales.shape[-1], head_dim, value.shape[-1])
        # Made like query: inside shard_map a scan's carry must vary over the mesh axes that its inputs vary over.
        initial_state = LogLinearState(jnp.zeros_like(query, shape=sizes), jnp.zeros((), jnp.int32))
    _check_state("initial_state", initial_state, query, value, level_scales)
    count = jnp.asarray(total, jnp.int32)
    if (lengths := check_lengths(lengths, batch)) is not None:
        count, is_token = lengths, positions_below(lengths, length)
        key, value = (jnp.where(is_token[..., None, None], x, 0) for x in (key, value))
        log_decay = None if log_decay is None else jnp.where(is_token[..., None], log_decay, 0)
    end = initial_state.position + count
    inputs = _Inputs(
        query,
        key,
        value,
        level_scales,
        log_decay,
        initial_state.levels.astype(dtype),
        *(jnp.broadcast_to(x, (batch,)).astype(jnp.int32) for x in (initial_state.position, end)),
    )
    attend = functools.partial(
        dispatch,
        "log_linear_attention",
        IMPLEMENTATIONS,
        implementation,
        scale=default_scale(scale, head_dim),
        chunk_size=chunk_size,
    )
    out, levels = over_positions(
        functools.partial(_whole, attend),
        functools.partial(_parted, attend),
        ("B*N.", "B*K.", "B*K.", "B*N.", "B*N", "BN...", "B", "B"),
        ("B*N.", "BN..."),
        *inputs,
    )
    return (out, LogLinearState(levels, end)) if return_state else out


def init_log_linear_cache(
    batch: int,
    num_heads: int,
    num_levels: int,
    head_dim: int,
    value_dim: int | None = None,
    *,
    dtype: Any = jnp.float32,
) -> LogLinearState:
    """The state before the first token, for log_linear_step and initial_state.

    num_heads: the query's. num_levels: L, for 2^(L-1) tokens. value_dim: default head_dim.
    """
    value_dim, dtype = head_dim if value_dim is None else value_dim, check_dtype("dtype", dtype)
    shape = check_sizes(batch=batch, num_heads=num_heads, num_levels=num_levels, head_dim=head_dim, value_dim=value_dim)
    return LogLinearState(jnp.zeros(shape, dtype), jnp.zeros((), jnp.int32))


@primitive("B*N.", like="state")
def log_linear_step(
    state: LogLinearState,
    query: Array,
    key: Array,
    value: Array,
    level_scales: Array,
    *,
    log_decay: Array | None = None,
    scale: float | None = None,
) -> tuple[Array, LogLinearState]:
    """One more token: log_linear_attention's next output and state, in O(L H V) per head.

    Args:
      state: from init_log_linear_cache, an earlier step, or log_linear_attention(..., return_state=True).
      query, key, value: [B, 1, N, H], [B, 1, K, H], [B, 1, K, V].
      level_scales: [B, 1, N, L]. log_decay: [B, 1, N]. The rest as in log_linear_attention.

    Returns:
      ([B, 1, N, V] in query's dtype, the state after this token).
    """
    check_step(query, key, value)
    _check_gates(query, level_scales, log_decay)
    _check_state("state", state, query, value, level_scales)
    dtype = accumulator_dtype(query, key, value)
    position = jnp.broadcast_to(state.position, query.shape[:1]).astype(jnp.int32)
    inputs = _Inputs(query, key, value, level_scales, log_decay, state.levels.astype(dtype), position, position + 1)
    out, levels = _whole(functools.partial(_reference, scale=default_scale(scale, query.shape[-1])), *inputs)
    return out, LogLinearState(levels, state.position + 1)


# --- What the forms share ---------------------------------------------------------------------------------------------


def _check_gates(query: Array, level_scales: Any, log_decay: Any) -> None:
    shape = query.shape[:-1]
    check_array("level_scales", level_scales, (*shape, None), "[B, T, N, L]")
    check_floating("level_scales", level_scales)
    require(level_scales.shape[-1] > 0, "level_scales", shape_text(level_scales), "need at least one level")
    if log_decay is not None:
        check_array("log_decay", log_decay, shape, "[B, T, N]")
        check_floating("log_decay", log_decay)


def _check_state(name: str, state: Any, query: Array, value: Array, level_scales: Array) -> None:
    check_type(name, state, LogLinearState, "init_log_linear_cache")
    batch, _, heads, head_dim = query.shape
    shape = (batch, heads, level_scales.shape[-1], head_dim, value.shape[-1])
    check_array(f"{name}.levels", state.levels, shape, "[B, N, L, H, V]")
    check_floating(f"{name}.levels", state.levels)
    check_position(f"{name}.position", state.position, batch)


def _bits(number: Array) -> Array:
    """How many bits a number has; 32 of a negative one."""
    return 32 - jax.lax.clz(number.astype(jnp.int32))


def _at(level: Array, count: int, dtype: Any) -> Array:
    """[...] -> [..., L], 1 at the level. What comes before position 0 is past all levels, and nothing."""
    return jax.nn.one_hot(jnp.minimum(level, count - 1), count, dtype=dtype)


def _moves(distance: Array, count: int, dtype: Any) -> Array:
    """[...] -> [..., L, L], 1 at (l, m) if sums at level l are at m for one `distance` = bits(t xor e) away."""
    own = jnp.arange(count).reshape((1,) * distance.ndim + (count,))
    return _at(jnp.maximum(distance[..., None], own), count, dtype)


def _moved_on(levels: Array, distance: Array) -> Array:
    """The sums [B, N, L, H, V] by their level as a token sees them, distance int [B, N] or [B, 1] away."""
    moves = _moves(distance, levels.shape[2], levels.dtype)
    return (moves.mT @ levels.reshape(*levels.shape[:3], -1)).reshape(levels.shape)


def _finite(inputs: _Inputs) -> _Inputs:
    """Zeros in place of what is not finite; a decay may be -inf."""
    names = ("query", "key", "value", "level_scales", "levels")
    zeroed = {name: finite_or_zero(getattr(inputs, name)) for name in names}
    gates = inputs.log_decay
    return inputs._replace(**zeroed, log_decay=None if gates is None else jnp.where(gates < jnp.inf, gates, 0))


def _marks(inputs: _Inputs) -> tuple[Array, Array]:
    """bool [B, T, N]: tokens that are not finite, and tokens that drop the state before them."""
    tokens, gates = spoilt_tokens(inputs.key, inputs.value, inputs.query.shape[2]), inputs.log_decay
    if gates is None:
        return tokens, jnp.zeros_like(tokens)
    return tokens | ~(gates < jnp.inf), gates == -jnp.inf


def _spoilt_out(out: Array, inputs: _Inputs, before: Array) -> tuple[Array, Array]:
    """out, NaN where it has seen what is not finite or has too few levels; and bool [B, N], whether the end has seen.

    before: bool [B, N], of the sums before the first token.
    """
    seen = spoilt_since(*_marks(inputs), before)
    at = inputs.position[:, None] + jnp.arange(out.shape[1])[None]
    is_past = _bits(at) >= inputs.level_scales.shape[-1]
    own = is_spoilt(inputs.query) | is_spoilt(inputs.level_scales) | is_past[..., None]
    return spoil(out, seen | own), seen[:, -1]


def _whole(attend: _Attend, *arrays: Any) -> tuple[Array, Array]:
    inputs = _Inputs(*arrays)
    out, levels = attend(_finite(inputs))
    out, at_end = _spoilt_out(out, inputs, state_is_spoilt(inputs.levels))
    return out, spoil(levels, at_end)


# --- Over devices -----------------------------------------------------------------------------------------------------


class _Stretch(NamedTuple):
    """What tokens one after the other leave. levels: [B, N, L, H, V]. decay: [B, N], over all of them. spoilt, keeps:
    [B, N], 1 where what they leave is not finite, and where none of them drops what was before. end: int32 [B, N], the
    position of the last."""

    levels: Array
    decay: Array
    spoilt: Array
    keeps: Array
    end: Array


def _joined(earlier: _Stretch, later: _Stretch) -> _Stretch:
    moved = _moved_on(earlier.levels, _bits(earlier.end ^ later.end))
    return _Stretch(
        later.levels + later.decay[..., None, None, None] * moved,
        earlier.decay * later.decay,
        jnp.maximum(earlier.spoilt * later.keeps, later.spoilt),
        earlier.keeps * later.keeps,
        later.end,
    )


def _parted(attend: _Attend, parts: Parts, *arrays: Any) -> tuple[Array, Array]:
    """Each device's part, from the levels that the parts before it leave."""
    inputs = _Inputs(*arrays)
    length, dtype = inputs.query.shape[1], inputs.levels.dtype
    first, last = (
        jnp.minimum(inputs.position + number * length, inputs.limit) for number in (parts.number(), parts.number() + 1)
    )
    own = inputs._replace(position=first, limit=last)
    finite = _finite(own)
    tokens, starts = _marks(own)
    nothing = jnp.zeros_like(tokens[:, 0])
    _, levels = attend(finite._replace(levels=jnp.zeros_like(inputs.levels)))
    one = jnp.ones(nothing.shape, dtype)
    gates = finite.log_decay
    stretch = _Stretch(
        levels,
        one if gates is None else jnp.exp(jnp.sum(gates.astype(dtype), axis=1)),
        spoilt_since(tokens, starts, nothing)[:, -1].astype(dtype),
        (~starts.any(1)).astype(dtype),
        jnp.broadcast_to(last[:, None] - 1, nothing.shape),
    )
    spoilt = state_is_spoilt(inputs.levels).astype(dtype)
    end = jnp.broadcast_to(inputs.position[:, None] - 1, nothing.shape)
    start = _Stretch(finite.levels, one, spoilt, one, end)
    before, after = states_before(_joined, start, stretch, parts)
    out, _ = attend(finite._replace(levels=before.levels))
    out, _ = _spoilt_out(out, own, before.spoilt > 0)
    at_end = after()
    return out, spoil(at_end.levels, at_end.spoilt > 0)


# --- Reference: a scan over tokens ------------------------------------------------------------------------------------


def _reference(inputs: _Inputs, *, scale: Any, chunk_size: int | None = None) -> tuple[Array, Array]:
    query, key, value, level_scales, log_decay, levels, position, limit = inputs
    dtype, heads = levels.dtype, query.shape[2]
    key, value = (repeat_key_heads(x.astype(dtype), heads) for x in (key, value))
    decay = None if log_decay is None else jnp.exp(log_decay.astype(dtype))

    def token(state: Any, now: Any) -> tuple[Any, Array]:
        (levels, position), (query, key, value, level_scales, decay) = state, now
        after = jnp.minimum(position + 1, limit)
        levels = _moved_on(levels, _bits((after - 1) ^ (position - 1))[:, None])
        levels = levels if decay is None else decay[..., None, None, None] * levels
        levels = levels.at[:, :, 0].add(key[..., None] * value[..., None, :])
        return (levels, after), jnp.einsum("BNL,BNH,BNLHV->BNV", level_scales, query, levels)

    tokens = (scale * query.astype(dtype), key, value, level_scales.astype(dtype), decay)
    by_token = jax.tree.map(lambda x: jnp.moveaxis(x, 1, 0), tokens)
    levels, position, limit = vary_alike((levels, position, limit))
    (levels, _), out = jax.lax.scan(token, (levels, position), by_token)
    return jnp.moveaxis(out, 0, 1).astype(query.dtype), levels


# --- XLA: a scan over chunks ------------------------------------------------------------------------------------------


def _xla(inputs: _Inputs, *, scale: Any, chunk_size: int) -> tuple[Array, Array]:
    query, key, value, level_scales, log_decay, levels, position, limit = inputs
    dtype, heads = levels.dtype, query.shape[2]
    levels, position, limit = vary_alike((levels, position, limit))

    def chunk(state: Any, tokens: Any) -> tuple[Any, Array]:
        levels, position = state
        query, key, value, level_scales, log_decay = jax.tree.map(lambda x: x.astype(dtype), tokens)
        key, value = (repeat_key_heads(x, heads) for x in (key, value))
        by_head = (scale * query, key, value, level_scales, log_decay)
        after = jnp.minimum(position + query.shape[1], limit)
        levels, out = _chunk(levels, position, after, *jax.tree.map(lambda x: jnp.moveaxis(x, 2, 1), by_head))
        return (levels, after), jnp.moveaxis(out, 1, 2).astype(inputs.query.dtype)

    gates = None if log_decay is None else log_decay[..., None]
    (levels, _), out = scan_chunks(chunk, (levels, position), (query, key, value, level_scales, gates), chunk_size)
    return out, levels


def _chunk(
    levels: Array,
    position: Array,
    after: Array,
    query: Array,
    key: Array,
    value: Array,
    level_scales: Array,
    log_decay: Array | None,
) -> tuple[Array, Array]:
    """C tokens of every head, [B,N,C,...], from int32 [B] up to `after` -> the levels after them, out [B,N,C,V]."""
    size, count, dtype = query.shape[2], levels.shape[2], levels.dtype
    at = position[:, None] + jnp.arange(size)[None]
    into, onward, through = query, key, None
    if log_decay is not None:
        into_decay, onward_decay = decays_of_chunk(log_decay)
        into, onward, through = query * into_decay, key * onward_decay, into_decay[..., -1, :]

    # Within the chunk, each pair by its level; the tokens before it by their sums.
    pairs = _at(_bits(at[:, :, None] ^ at[:, None]), count, dtype)
    scales = jnp.einsum("BNCL,BCSL->BNCS", level_scales, pairs)
    out = jnp.tril(scales * decayed_products(query, key, log_decay)) @ value
    seen_at = _moves(_bits(at ^ (position[:, None] - 1)), count, dtype)
    of_sums = jnp.einsum("BNCM,BCLM->BNCL", level_scales, seen_at)
    out += _by_level(of_sums, into) @ levels.reshape(*levels.shape[:2], -1, levels.shape[-1])

    last = after[:, None] - 1
    levels = _moved_on(levels, _bits(last ^ (position[:, None] - 1)))
    levels = levels if through is None else through[..., None, None] * levels
    written = _by_level(_at(_bits(last ^ at), count, dtype)[:, None], onward).mT @ value
    return levels + written.reshape(levels.shape), out


def _by_level(weights: Array, x: Array) -> Array:
    """[B, N or 1, C, L] and [B, N, C, H] -> their products, [B, N, C, L H]."""
    return (weights[..., None] * x[..., None, :]).reshape(*x.shape[:3], -1)


IMPLEMENTATIONS: Implementations = {"reference": _reference, "xla": _xla}
