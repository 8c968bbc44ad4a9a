"""Causal agent attention: every token reads what a few agents have gathered from it and the tokens before it.

Agents are fixed, and token t reads what each agent gathered from tokens <= t. With the logits l_tj =
scale a_j . k_t and L_tj = log sum_{s<=t} exp(l_sj), what agent j has gathered is a decayed sum,

    Va_tj = (1 - p_tj) Va_{t-1,j} + p_tj v_t        p_tj = sigmoid(l_tj - L_{t-1,j})

so the whole is linear attention with query softmax_j(scale q_t . a_j), key p_t and one decay per agent, log(1 - p_t):
that is how the kernels compute it. The blocked form carries sums of exp(l - largest) over chunks of tokens instead.

Paper: Agent Attention (Han et al. 2023), whose published form is agent.py's; the causal form is this library's.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import einops
import jax
import jax.numpy as jnp

from attnlab.attention._dispatch.choice import Implementations, dispatch
from attnlab.attention._dispatch.exchange import Parts, over_positions, positions_below, states_before
from attnlab.attention._dispatch.primitive import primitive
from attnlab.attention._kernels import linear as kernels
from attnlab.attention._kernels.backends import on_backends
from attnlab.attention._shared.checks import (
    accumulator_dtype,
    check_array,
    check_bool,
    check_dtype,
    check_int,
    check_lengths,
    check_query_key_value,
    check_sizes,
    check_step,
    check_type,
    default_scale,
)
from attnlab.attention._shared.chunks import scan_chunks
from attnlab.attention._shared.finite import finite_or_zero, is_spoilt, spoil, spoilt_since, spoilt_tokens
from attnlab.attention._shared.heads import repeat_key_heads
from attnlab.attention._shared.softmax import scaled_for_logits, softmax_parts
from attnlab.attention.agent import batched_agents
from attnlab.attention.linear import LinearState, linear_attention

Array = jax.Array

# Logits of a chunk further than this above its unit are not summed in it. Gradients divide by the square of a sum of
# such, which float32 has of any chunk.
_FAR = 30.0
_NOTHING = -1e30  # The log of a sum of no tokens: finite, so that its differences and their gradients are.


class AgentState(NamedTuple):
    """Every agent's softmax over the tokens so far, in float32 (float64 for float64 inputs): N m (V + 2) numbers.

    largest: [B, N, m], the largest logit; -inf before the first token. A unit of the other two, without a gradient.
    denominator: [B, N, m], sum of exp(logit - largest).
    numerator: [B, N, m, V], sum of exp(logit - largest) v.
    """

    largest: Array
    denominator: Array
    numerator: Array


# (query, key, value, agents, state, is_token) -> (out, the state after the tokens), of finite tokens.
# is_token: bool [B, T], False of padding; None where there is none.
_Attend = Callable[..., tuple[Array, AgentState]]


@primitive("B*N.", "BN.", "BN.", "BN..")
def causal_agent_attention(
    query: Array,
    key: Array,
    value: Array,
    agents: Array,
    *,
    scale: float | None = None,
    initial_state: AgentState | None = None,
    return_state: bool = False,
    lengths: Array | None = None,
    chunk_size: int = 64,
    implementation: str | None = None,
) -> Any:
    """Causal agent attention: token t sees the tokens <= t, through agents that are the same for all tokens.

    Args:
      query: [B, T, N, H], floating. key: [B, T, K, H], value: [B, T, K, V]; K divides N.
      agents: [m, N, H] or [B, m, N, H], m >= 1. For a causal model they must not depend on the tokens: parameters.
      scale: factor on the logits of both steps; None means H ** -0.5.
      initial_state: of the tokens before the first (see init_agent_cache). Default: there are none.
      return_state: also return the AgentState after the last token.
      lengths: integers [B], 0 to T: the row's tokens, padding after them, which the state does not see. Outputs of
        padding mean nothing. Default: T in all rows.
      chunk_size: tokens taken at once by "xla".
      implementation: None, "reference" (a scan over tokens), "xla", or "pallas_tpu" and "pallas_gpu" (linear
        attention's kernels).

    Returns:
      [B, T, N, V] in query's dtype, or (that, AgentState) with return_state.

    Raises:
      ValueError, TypeError: at trace time, naming the argument.

    Complexity of "xla", per head with chunks of C: O(T (m (H + V) + C (m + V))) time; memory O(T m), and for gradients
    one state per chunk more, O(T m V / C).
    """
    check_query_key_value(query, key, value)
    agents = batched_agents(agents, query)
    chunk_size, return_state = check_int("chunk_size", chunk_size, least=1), check_bool("return_state", return_state)
    batch, length, heads, head_dim = query.shape
    dtype = accumulator_dtype(query, key, value, agents)
    is_token = None
    if (lengths := check_lengths(lengths, batch)) is not None:
        is_token = positions_below(lengths, length)
        key, value = (jnp.where(is_token[..., None, None], x, 0) for x in (key, value))
    if initial_state is None:
        # Made like query: inside shard_map a scan's carry must vary over the mesh axes that its inputs vary over.
        initial_state = jax.tree.map(
            lambda leaf: jnp.zeros_like(query, shape=leaf.shape, dtype=dtype) + leaf.astype(dtype),
            init_agent_cache(batch, heads, agents.shape[1], value.shape[-1]),
        )
    _check_state("initial_state", initial_state, query, value, agents)
    factor = default_scale(scale, head_dim)
    attend = functools.partial(
        dispatch, "causal_agent_attention", IMPLEMENTATIONS, implementation, scale=factor, chunk_size=chunk_size
    )
    of_state = AgentState("BN.", "BN.", "BN..")  # type: ignore[arg-type]
    out, state = over_positions(
        functools.partial(_whole, attend),
        functools.partial(_parted, attend, factor),
        ("B*N.", "B*K.", "B*K.", "B.N.", of_state, "B*"),
        ("B*N.", of_state),
        query,
        key,
        value,
        agents.astype(dtype),
        jax.tree.map(lambda leaf: leaf.astype(dtype), initial_state),
        is_token,
    )
    return (out, state) if return_state else out


def _whole(
    attend: _Attend,
    query: Array,
    key: Array,
    value: Array,
    agents: Array,
    state: AgentState,
    is_token: Array | None,
) -> tuple[Array, AgentState]:
    tokens = spoilt_tokens(key, value, query.shape[2])
    out, state = attend(*map(finite_or_zero, (query, key, value)), agents, state, is_token)
    nothing = jnp.zeros_like(tokens)
    seen = spoilt_since(tokens, nothing, nothing[:, 0])
    return spoil(out, seen | is_spoilt(query)), jax.tree.map(lambda leaf: spoil(leaf, seen[:, -1]), state)


class _Before(NamedTuple):
    """What the tokens before a part leave. spoilt: [B, N], 1 where one of them is not finite, else 0."""

    state: AgentState
    spoilt: Array


def _parted(
    attend: _Attend,
    scale: Any,
    parts: Parts,
    query: Array,
    key: Array,
    value: Array,
    agents: Array,
    state: AgentState,
    is_token: Array | None,
) -> tuple[Array, AgentState]:
    """Each device's part, from the state that the parts before it leave."""
    tokens = spoilt_tokens(key, value, query.shape[2])
    query_is_spoilt = is_spoilt(query)
    query, key, value = map(finite_or_zero, (query, key, value))
    own = _Before(_state_of(key, value, agents, is_token, scale), tokens.any(1).astype(agents.dtype))
    start = _Before(state, jnp.zeros_like(own.spoilt))
    before, after = states_before(_joined, start, own, parts)
    out, _ = attend(query, key, value, agents, before.state, is_token)
    seen = spoilt_since(tokens, jnp.zeros_like(tokens), before.spoilt > 0)
    end = after()
    return spoil(out, seen | query_is_spoilt), jax.tree.map(lambda leaf: spoil(leaf, end.spoilt > 0), end.state)


def _joined(earlier: _Before, later: _Before) -> _Before:
    """Of two stretches of tokens, one after the other."""
    units = [jax.lax.stop_gradient(stretch.state.largest) for stretch in (earlier, later)]
    largest = jnp.maximum(*units)
    kept, added = (jnp.exp(unit - jnp.where(largest == -jnp.inf, 0, largest)) for unit in units)
    state = AgentState(
        largest,
        kept * earlier.state.denominator + added * later.state.denominator,
        kept[..., None] * earlier.state.numerator + added[..., None] * later.state.numerator,
    )
    return _Before(state, jnp.maximum(earlier.spoilt, later.spoilt))


def _state_of(key: Array, value: Array, agents: Array, is_token: Array | None, scale: Any) -> AgentState:
    """The state after these tokens, of none before them."""
    logits = _logits(key, agents, is_token, scale)
    largest = jax.lax.stop_gradient(jnp.max(logits, axis=1))
    added = jnp.exp(logits - largest[:, None])
    values = repeat_key_heads(value.astype(agents.dtype), agents.shape[2])
    numerator = jnp.einsum("BTNm,BTNV->BNmV", added, values, preferred_element_type=agents.dtype)
    return AgentState(largest, jnp.sum(added, axis=1), numerator)


def init_agent_cache(
    batch: int, num_heads: int, num_agents: int, value_dim: int, *, dtype: Any = jnp.float32
) -> AgentState:
    """The state before the first token, for agent_step and initial_state. num_heads: the query's."""
    batch, num_heads, num_agents, value_dim = check_sizes(
        batch=batch, num_heads=num_heads, num_agents=num_agents, value_dim=value_dim
    )
    shape, dtype = (batch, num_heads, num_agents), check_dtype("dtype", dtype)
    return AgentState(jnp.full(shape, -jnp.inf, dtype), jnp.zeros(shape, dtype), jnp.zeros((*shape, value_dim), dtype))


@primitive("B*N.", like="state")
def agent_step(
    state: AgentState,
    query: Array,
    key: Array,
    value: Array,
    agents: Array,
    *,
    scale: float | None = None,
    implementation: str | None = None,
) -> tuple[Array, AgentState]:
    """One more token: causal_agent_attention's next output and state, in O(m (H + V)) per head.

    Args:
      state: from init_agent_cache, an earlier step, or causal_agent_attention(..., return_state=True).
      query, key, value: [B, 1, N, H], [B, 1, K, H], [B, 1, K, V]. agents, scale: as in causal_agent_attention.
      implementation: "xla", or "pallas_tpu" and "pallas_gpu" (the kernel of linear_step), or None.

    Returns:
      ([B, 1, N, V] in query's dtype, the state after this token).
    """
    check_step(query, key, value)
    agents = batched_agents(agents, query)
    _check_state("state", state, query, value, agents)
    dtype, factor = accumulator_dtype(query, key, value, agents), default_scale(scale, query.shape[-1])
    state = jax.tree.map(lambda leaf: leaf.astype(dtype), state)
    logits, shares = (x[:, 0] for x in _logits_and_shares(query, key, agents.astype(dtype), None, factor))
    before = jax.lax.stop_gradient(state.largest)
    largest = jnp.maximum(before, jax.lax.stop_gradient(logits))
    kept, added = jnp.exp(before - largest), jnp.exp(logits - largest)
    denominator = kept * state.denominator + added
    # A step of linear attention, of a decay, a key and a query per agent.
    values = repeat_key_heads(value[:, 0], query.shape[2]).astype(dtype)
    arrays = (state.numerator, shares / denominator, added, values, kept)
    out, numerator = dispatch("agent_step", STEP_IMPLEMENTATIONS, implementation, *arrays)
    return out[:, None].astype(query.dtype), AgentState(largest, denominator, numerator)


def _step_xla(state: Array, query: Array, key: Array, value: Array, decay: Array) -> tuple[Array, Array]:
    """out [B, N, V] and the new state [B, N, m, V] of query, key and decay [B, N, m] and value [B, N, V]."""
    state = decay[..., None] * state + key[..., None] * value[:, :, None]
    return jnp.einsum("BNm,BNmV->BNV", query, state), state


STEP_IMPLEMENTATIONS: Implementations = {"xla": _step_xla, **kernels.STATE_KERNELS}


def _reference(
    query: Array,
    key: Array,
    value: Array,
    agents: Array,
    state: AgentState,
    is_token: Array | None,
    *,
    scale: Any,
    chunk_size: int | None = None,
) -> tuple[Array, AgentState]:
    dtype, heads = agents.dtype, query.shape[2]
    scaled_query, agents_read = scaled_for_logits(query, agents, scale, dtype)
    scaled_agents, keys = scaled_for_logits(agents, key, scale, dtype)

    def token(state: AgentState, now: Any) -> tuple[AgentState, Array]:
        query, key, value, is_token = now
        logits = jnp.einsum("BmNH,BNH->BNm", scaled_agents, key)
        logits = logits if is_token is None else jnp.where(is_token[:, None, None], logits, _NOTHING)
        largest = jnp.maximum(state.largest, jax.lax.stop_gradient(logits))
        kept, added = jnp.exp(state.largest - largest), jnp.exp(logits - largest)
        denominator = kept * state.denominator + added
        numerator = kept[..., None] * state.numerator + added[..., None] * value[:, :, None]
        weights = jax.nn.softmax(jnp.einsum("BNH,BmNH->BNm", query, agents_read), axis=-1)
        out = jnp.einsum("BNm,BNmV->BNV", weights / denominator, numerator)
        return AgentState(largest, denominator, numerator), out

    tokens = (scaled_query, *(repeat_key_heads(x.astype(dtype), heads) for x in (keys, value)), is_token)
    state = state._replace(largest=jax.lax.stop_gradient(state.largest))
    state, out = jax.lax.scan(token, state, jax.tree.map(lambda x: jnp.moveaxis(x, 1, 0), tokens))
    return jnp.moveaxis(out, 0, 1).astype(query.dtype), state


def _logits_and_shares(
    query: Array, key: Array, agents: Array, is_token: Array | None, scale: Any
) -> tuple[Array, Array]:
    """Of agents over keys, the logits, and of queries over agents, the softmax weights: [B, T, N, m] both."""
    dtype = agents.dtype
    scaled, read = scaled_for_logits(query, agents, scale, dtype)
    shares, total, _ = softmax_parts(jnp.einsum("BTNH,BmNH->BTNm", scaled, read, preferred_element_type=dtype))
    return _logits(key, agents, is_token, scale), shares / total


def _logits(key: Array, agents: Array, is_token: Array | None, scale: Any) -> Array:
    """Of agents over keys, [B, T, N, m]; of padding that of no tokens."""
    dtype = agents.dtype
    scaled, keys = scaled_for_logits(agents, key, scale, dtype)
    by_group = einops.rearrange(scaled, "B m (K G) H -> B m K G H", K=key.shape[2])
    logits = jnp.einsum("BTKH,BmKGH->BTKGm", keys, by_group, preferred_element_type=dtype)
    logits = einops.rearrange(logits, "B T K G m -> B T (K G) m")
    return logits if is_token is None else jnp.where(is_token[..., None, None], logits, _NOTHING)


def _xla(
    query: Array,
    key: Array,
    value: Array,
    agents: Array,
    state: AgentState,
    is_token: Array | None,
    *,
    scale: Any,
    chunk_size: int,
) -> tuple[Array, AgentState]:
    dtype, heads = agents.dtype, query.shape[2]
    logits, shares = _logits_and_shares(query, key, agents, is_token, scale)

    def chunk(state: AgentState, tokens: Any) -> tuple[AgentState, Array]:
        *by_agent, value = tokens
        values = jnp.moveaxis(repeat_key_heads(value.astype(dtype), heads), 2, 1)
        logits, shares = (jnp.moveaxis(x, 2, 1) for x in by_agent)  # [B, N, C, m]
        # The unit of sums within the chunk, which no later token changes, and that of the state after it.
        unit = jnp.maximum(state.largest, jax.lax.stop_gradient(logits[:, :, 0]))
        largest = jnp.maximum(unit, jax.lax.stop_gradient(logits.max(2)))
        far = ~((largest - unit).max() <= _FAR)  # so too where an agent elsewhere in the batch is NaN
        weights, weight_before = jax.lax.cond(far, _weights_far, _weights, shares, logits, state, unit)
        out = weights @ values + weight_before @ state.numerator
        kept, added = jnp.exp(state.largest - largest), jnp.exp(logits - largest[:, :, None])
        denominator = kept * state.denominator + added.sum(2)
        numerator = kept[..., None] * state.numerator + added.mT @ values
        return AgentState(largest, denominator, numerator), jnp.moveaxis(out, 1, 2).astype(query.dtype)

    state = state._replace(largest=jax.lax.stop_gradient(state.largest))
    state, out = scan_chunks(chunk, state, (logits, shares, value), chunk_size)
    return out, state


def _weights(shares: Array, logits: Array, state: AgentState, unit: Array) -> tuple[Array, Array]:
    """Of a chunk's tokens over its values, [B, N, C, C], and over the state's numerators, [B, N, C, m]."""
    # In the branch not taken of a batch they may be larger, and have to stay finite.
    added = jnp.exp(jnp.minimum(logits - unit[:, :, None], _FAR))
    kept = jnp.exp(state.largest - unit)[:, :, None]
    until = jnp.tril(jnp.ones_like(logits, shape=(logits.shape[2],) * 2))
    by_sum = shares / (until[None, None] @ added + kept * state.denominator[:, :, None])
    return jnp.tril(by_sum @ added.mT), by_sum * kept


def _weights_far(shares: Array, logits: Array, state: AgentState, unit: Array) -> tuple[Array, Array]:
    """The same for any logits. A token that sees a far one has an exponential per earlier token and agent."""
    length = logits.shape[2]
    until = jnp.tril(jnp.ones((length, length), bool))[None, None, :, :, None]
    pairs = jnp.where(until, logits[:, :, None], -jnp.inf)  # [B, N, C, C, m]: what each token sees
    largest = jnp.maximum(state.largest[:, :, None], jax.lax.stop_gradient(pairs.max(3)))
    added, kept = jnp.exp(pairs - largest[:, :, :, None]), jnp.exp(state.largest[:, :, None] - largest)
    by_sum = shares / (added.sum(3) + kept * state.denominator[:, :, None])
    weights = (by_sum[:, :, :, None] * added).sum(-1), by_sum * kept
    far = (largest - unit[:, :, None] > _FAR).any(-1, keepdims=True)
    return jax.tree.map(functools.partial(jnp.where, far), weights, _weights(shares, logits, state, unit))


def _pallas(
    backend: str,
    xla: Any,
    query: Array,
    key: Array,
    value: Array,
    agents: Array,
    state: AgentState,
    is_token: Array | None,
    *,
    scale: Any,
    chunk_size: int,
) -> tuple[Array, AgentState]:
    """By linear attention's kernels."""
    largest, denominator, numerator = state
    largest = jax.lax.stop_gradient(largest)
    logits, shares = _logits_and_shares(query, key, agents, is_token, scale)
    some = denominator > 0
    divisor = jnp.where(some, denominator, 1)
    before = jnp.where(some, jnp.where(some, largest, 0) + jnp.log(divisor), _NOTHING)
    # Log of the sum over the tokens before each one: the state's, then up to all but the last.
    sums = jax.lax.cumlogsumexp(jnp.concatenate([before[:, None], logits[:, :-1]], axis=1), axis=1)
    surplus = logits - sums
    tokens = (shares, jax.nn.sigmoid(surplus), repeat_key_heads(value, query.shape[2]))
    out, gathered = linear_attention(
        *(x.astype(query.dtype) for x in tokens),
        log_decay=-jax.nn.softplus(surplus),
        scale=1.0,
        initial_state=LinearState(numerator / divisor[..., None]),
        return_state=True,
        chunk_size=chunk_size,
        implementation=f"pallas_{backend}",
    )

    new_largest = jnp.maximum(largest, jax.lax.stop_gradient(jnp.max(logits, axis=1, initial=-jnp.inf)))
    unit = jnp.where(new_largest == -jnp.inf, 0, new_largest)
    denominator = jnp.exp(largest - unit) * denominator + jnp.sum(jnp.exp(logits - unit[:, None]), axis=1)
    return out.astype(query.dtype), AgentState(new_largest, denominator, gathered.kv * denominator[..., None])


def _pallas_refusal(
    backend: str,
    query: Array,
    key: Array,
    value: Array,
    agents: Array,
    state: AgentState,
    is_token: Array | None,
    *,
    scale: Any,
    chunk_size: int,
) -> str | None:
    shares = jax.ShapeDtypeStruct((*query.shape[:3], agents.shape[1]), query.dtype)
    repeated = jax.ShapeDtypeStruct((*query.shape[:3], value.shape[-1]), query.dtype)
    return kernels.chunked_refusal(backend, shares, shares, repeated, shares)


IMPLEMENTATIONS: Implementations = {
    "reference": _reference,
    "xla": _xla,
    **on_backends(_pallas, _pallas_refusal),
}


def _check_state(name: str, state: Any, query: Array, value: Array, agents: Array) -> None:
    check_type(name, state, AgentState, "init_agent_cache")
    shape = (query.shape[0], query.shape[2], agents.shape[1])
    check_array(f"{name}.largest", state.largest, shape, "[B, N, m]")
    check_array(f"{name}.denominator", state.denominator, shape, "[B, N, m]")
    check_array(f"{name}.numerator", state.numerator, (*shape, value.shape[-1]), "[B, N, m, V]")
