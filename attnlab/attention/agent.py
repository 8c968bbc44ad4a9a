"""Agent attention: a few agents gather from all tokens, and every token reads the agents.

    Va_j  = sum_s softmax_s(scale a_j . k_s + gather_bias_js) v_s            agents gather
    out_t = sum_j softmax_j(scale q_t . a_j + broadcast_bias_tj) Va_j        agents broadcast

With m agents this costs O(n m) in place of O(n^2); the weights of out on v are a row-stochastic matrix of rank <= m.
The published layer pools the agents from the query's image (pool_agents), builds both biases from tables (agent_bias)
and adds a 3x3 depthwise convolution of v, which is not part of this module. Paper: Agent Attention (Han et al. 2023).

The causal form has fixed agents, and token t reads what each agent gathered from tokens <= t. With the logits l_tj =
scale a_j . k_t and L_tj = log sum_{s<=t} exp(l_sj), what agent j has gathered is a decayed sum,

    Va_tj = (1 - p_tj) Va_{t-1,j} + p_tj v_t        p_tj = sigmoid(l_tj - L_{t-1,j})

so the whole is linear attention with query softmax_j(scale q_t . a_j), key p_t and one decay per agent, log(1 - p_t).
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import einops
import jax
import jax.numpy as jnp
import numpy as np

from attnlab.attention import dot_product
from attnlab.attention._checks import (
    accumulator_dtype,
    check_array,
    check_query_key_value,
    default_scale,
    require,
    shape_text,
)
from attnlab.attention._dispatch import Kernel, dispatch
from attnlab.attention._softmax import softmax_parts
from attnlab.attention.linear import LinearState, linear_attention

Array = jax.Array

_NOTHING = -1e30  # The log of a sum of no tokens: finite, so that its differences and their gradients are.


def agent_attention(
    query: Array,
    key: Array,
    value: Array,
    agents: Array,
    *,
    gather_bias: Array | None = None,
    broadcast_bias: Array | None = None,
    key_mask: Array | None = None,
    scale: float | None = None,
    implementation: str | None = None,
) -> Array:
    """Agent attention, not causal: every token sees every token through the agents.

    Args:
      query: [B, *space, N, H], floating, with 1 to 3 space axes of T places together (an image with a class token is a
        sequence, [B, 1 + Y X, N, H]).
      key: [B, *space, K, H] and value: [B, *space, K, V], of S places, which may differ from the query's; K divides N.
      agents: [B, m, N, H], or [m, N, H] for all of the batch, with m >= 1. Used as they are in both steps.
      gather_bias: floating [B|1, N|1, m|1, S|1] or [N|1, m|1, S|1], added to the scaled logits of agents and keys.
      broadcast_bias: floating [B|1, N|1, T|1, m|1] or [N|1, T|1, m|1], added to those of queries and agents.
      key_mask: bool [B, *space] of key, True = attend. An agent that sees no key is seen by no query.
      scale: factor on the logits of both steps; None means H ** -0.5.
      implementation: None, "reference", "xla", or "pallas_tpu" (without biases; bfloat16 or float32).

    Returns:
      [B, *space, N, V] in query's dtype. Agents gather in float32 (float64 for float64 inputs; "pallas_tpu" rounds what
      they have gathered to query's dtype). Where no key is visible
      the output is 0, with zero gradients.

    Raises:
      ValueError, TypeError: at trace time, naming the argument.

    Complexity, with n = S + T: O(n m) time; memory O(n + m) beyond the arguments for "xla", O(n m) for "reference".
    """
    check_query_key_value(query, key, value, space_ranks=(1, 2, 3), same_space=False)
    agents = _batched_agents(agents, query)
    flat_query, flat_key, flat_value = (einops.rearrange(x, "B ... N H -> B (...) N H") for x in (query, key, value))
    batch, queries, heads, head_dim = flat_query.shape
    count, keys = agents.shape[1], flat_key.shape[1]
    gather_bias = _check_bias("gather_bias", gather_bias, (batch, heads, count, keys), "[batch|1, heads|1, m|1, S|1]")
    broadcast_bias = _check_bias(
        "broadcast_bias", broadcast_bias, (batch, heads, queries, count), "[batch|1, heads|1, T|1, m|1]"
    )
    if key_mask is not None:
        check_array("key_mask", key_mask, key.shape[:-2], "[batch, *space] of key")
        if key_mask.dtype != jnp.bool_:
            raise TypeError(f"key_mask: got dtype {key_mask.dtype}; need a bool mask (True = attend)")
        key_mask = key_mask.reshape(batch, 1, 1, keys)
    out = dispatch(
        "agent_attention",
        IMPLEMENTATIONS,
        implementation,
        flat_query,
        flat_key,
        flat_value,
        agents,
        gather_bias,
        broadcast_bias,
        key_mask,
        scale=default_scale(scale, head_dim),
    )
    return out.reshape(*query.shape[:-1], value.shape[-1])


def _two_steps(form: str) -> Callable[..., Array]:
    """Agent attention by two calls of one of dot_product_attention's forms."""
    attend: Any = dot_product.IMPLEMENTATIONS[form]

    def run(
        query: Array,
        key: Array,
        value: Array,
        agents: Array,
        gather_bias: Array | None,
        broadcast_bias: Array | None,
        key_mask: Array | None,
        *,
        scale: Any,
    ) -> Array:
        # What the agents gather has their dtype.
        agents = agents.astype(accumulator_dtype(query, key, value, agents))
        gathered, lse = attend(agents, key, value, gather_bias, key_mask, None, is_causal=False, scale=scale)
        sees_a_key = einops.rearrange(lse > -jnp.inf, "B m N -> B N 1 m")
        out, _ = attend(query, agents, gathered, broadcast_bias, sees_a_key, None, is_causal=False, scale=scale)
        return out

    return run


def _pallas_tpu(
    query: Array,
    key: Array,
    value: Array,
    agents: Array,
    gather_bias: None,
    broadcast_bias: None,
    key_mask: Array | None,
    *,
    scale: Any,
) -> Array:
    """As _two_steps, but what is not to be seen is another segment, and agents gather in query's dtype."""
    attend: Any = dot_product.IMPLEMENTATIONS["pallas_tpu"].call  # type: ignore[union-attr]
    agents = agents.astype(query.dtype)
    gathers, reads = None, None
    if key_mask is not None:
        hidden = (~key_mask[:, 0, 0]).astype(jnp.int32)  # [B, S]
        gathers = (jnp.zeros(agents.shape[:2], jnp.int32), hidden)
        reads = (
            jnp.zeros(query.shape[:2], jnp.int32),
            jnp.broadcast_to(hidden.min(1, keepdims=True), agents.shape[:2]),
        )
    gathered, _ = attend(agents, key, value, None, None, gathers, is_causal=False, scale=scale)
    out, _ = attend(query, agents, gathered, None, None, reads, is_causal=False, scale=scale)
    return out


def _pallas_tpu_refusal(
    query: Array,
    key: Array,
    value: Array,
    agents: Array,
    gather_bias: Array | None,
    broadcast_bias: Array | None,
    key_mask: Array | None,
    *,
    scale: Any,
) -> str | None:
    for name, given in (("gather_bias", gather_bias), ("broadcast_bias", broadcast_bias)):
        if given is not None:
            return f"has no {name}"
    refusal = dot_product.IMPLEMENTATIONS["pallas_tpu"].refusal  # type: ignore[union-attr]
    rounded = jax.ShapeDtypeStruct(agents.shape, query.dtype)
    gathered = jax.ShapeDtypeStruct((*agents.shape[:-1], value.shape[-1]), query.dtype)
    steps = ((rounded, key, value), (query, rounded, gathered))
    reasons = (refusal(*step, None, None, None, is_causal=False, scale=1.0) for step in steps)
    return next(filter(None, reasons), None)


IMPLEMENTATIONS: dict[str, Callable[..., Any] | Kernel] = {
    **{form: _two_steps(form) for form in ("reference", "xla")},
    "pallas_tpu": Kernel(_pallas_tpu, _pallas_tpu_refusal),
}


# --- Agents and biases of the published image models ------------------------------------------------------------------


def pool_agents(query: Array, grid: tuple[int, int]) -> Array:
    """Agents as means of the query over a grid of p x r bins (adaptive average pooling).

    Args:
      query: [B, Y, X, N, H], floating; a class token left out.
      grid: (p, r). Bin i of the Y axis covers the rows floor(i Y / p) to ceil((i + 1) Y / p) - 1, likewise on X: bins
        overlap where p does not divide Y.

    Returns:
      [B, p * r, N, H] in query's dtype, row by row.
    """
    check_array("query", query, (None,) * 5, "[batch, Y, X, heads, head_dim]")
    if not jnp.issubdtype(query.dtype, jnp.floating):
        raise TypeError(f"query: got dtype {query.dtype}; need a floating dtype")
    require(0 not in query.shape[1:3], "query", shape_text(query), "Y and X must be at least 1")
    if not isinstance(grid, (tuple, list)) or any(isinstance(n, bool) or not hasattr(n, "__index__") for n in grid):
        raise TypeError(f"grid: got {grid!r}; need two ints, (p, r)")
    require(len(grid) == 2 and min(grid) >= 1, "grid", grid, "need two ints of at least 1, (p, r)")
    dtype = accumulator_dtype(query)
    rows, columns = (jnp.asarray(_bin_means(n, bins), dtype) for n, bins in zip(query.shape[1:3], grid))
    pooled = jnp.einsum("pY,rX,BYXNH->BprNH", rows, columns, query.astype(dtype))
    return einops.rearrange(pooled, "B p r N H -> B (p r) N H").astype(query.dtype)


def _bin_means(length: int, bins: int) -> np.ndarray:
    """[bins, length], row i the weights of the mean over bin i."""
    index = np.arange(bins)[:, None]
    start, end = index * length // bins, -(-(index + 1) * length // bins)
    covered = (start <= np.arange(length)) & (np.arange(length) < end)
    return covered / covered.sum(axis=1, keepdims=True)


def agent_bias(
    an: Array,
    ah: Array,
    aw: Array,
    na: Array,
    ha: Array,
    wa: Array,
    *,
    ac: Array | None = None,
    ca: Array | None = None,
) -> tuple[Array, Array]:
    """Both biases of agent_attention from the published models' parameters, under the names these have there.

    Tables on a coarse grid (7 x 7 in the paper) are resized bilinearly with half-pixel centres, and not antialiased
    where they shrink.

    Args:
      an: [N, m, y, x], of agents and keys on a grid [Y', X']; with ah: [1, N, m, Y', 1] and aw: [1, N, m, 1, X'].
      na: [N, m, y, x], of queries on a grid [Y, X] and agents; with ha: [1, N, Y, 1, m] and wa: [1, N, 1, X, m].
      ac: [1, N, m, 1], of the class token as a key. ca: [1, N, 1, m], of the class token as a query. With these, token
        0 is the class token.

    Returns:
      gather_bias [N, m, Y' X'] (one more in front with ac), broadcast_bias [N, Y X, m] (one more in front with ca), in
      the dtype of the tables.
    """
    check_array("an", an, (None,) * 4, "[heads, m, y, x]")
    heads, count = an.shape[:2]
    check_array("na", na, (heads, count, None, None), "[heads, m, y, x] of an's heads and m")
    check_array("ah", ah, (1, heads, count, None, 1), "[1, heads, m, Y', 1]")
    check_array("aw", aw, (1, heads, count, 1, None), "[1, heads, m, 1, X']")
    check_array("ha", ha, (1, heads, None, 1, count), "[1, heads, Y, 1, m]")
    check_array("wa", wa, (1, heads, 1, None, count), "[1, heads, 1, X, m]")

    def resize(table: Array, rows: int, columns: int) -> Array:
        return jax.image.resize(table, (heads, count, rows, columns), "bilinear", antialias=False)

    gather = (resize(an, ah.shape[3], aw.shape[4]) + ah[0] + aw[0]).reshape(heads, count, -1)
    table = einops.rearrange(resize(na, ha.shape[2], wa.shape[3]), "N m Y X -> N Y X m")
    broadcast = (table + ha[0] + wa[0]).reshape(heads, -1, count)
    if ac is not None:
        check_array("ac", ac, (1, heads, count, 1), "[1, heads, m, 1]")
        gather = jnp.concatenate([ac[0], gather], axis=2)
    if ca is not None:
        check_array("ca", ca, (1, heads, 1, count), "[1, heads, 1, m]")
        broadcast = jnp.concatenate([ca[0], broadcast], axis=1)
    return gather, broadcast


# --- Causal -----------------------------------------------------------------------------------------------------------


class AgentState(NamedTuple):
    """Every agent's softmax over the tokens so far, in float32 (float64 for float64 inputs): N m (V + 2) numbers.

    largest: [B, N, m], the largest logit; -inf before the first token. A unit of the other two, without a gradient.
    denominator: [B, N, m], sum of exp(logit - largest).
    numerator: [B, N, m, V], sum of exp(logit - largest) v.
    """

    largest: Array
    denominator: Array
    numerator: Array


def causal_agent_attention(
    query: Array,
    key: Array,
    value: Array,
    agents: Array,
    *,
    scale: float | None = None,
    initial_state: AgentState | None = None,
    return_state: bool = False,
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
      chunk_size: tokens taken at once by "xla".
      implementation: None, "reference" (a scan over tokens), "xla" or "pallas_tpu" (linear attention's forms).

    Returns:
      [B, T, N, V] in query's dtype, or (that, AgentState) with return_state.

    Raises:
      ValueError, TypeError: at trace time, naming the argument.

    Complexity of "xla", per head with chunks of C: O(T (m (H + V) + C (m + V))) time; memory O(T m), and for gradients
    one state per chunk more, O(T m V / C).
    """
    check_query_key_value(query, key, value)
    agents = _batched_agents(agents, query)
    require(
        isinstance(chunk_size, int) and not isinstance(chunk_size, bool) and chunk_size >= 1,
        "chunk_size",
        chunk_size,
        "need an integer >= 1",
    )
    batch, _, heads, head_dim = query.shape
    dtype = accumulator_dtype(query, key, value, agents)
    if initial_state is None:
        # Made like query: inside shard_map a scan's carry must vary over the mesh axes that its inputs vary over.
        initial_state = jax.tree.map(
            lambda leaf: jnp.zeros_like(query, shape=leaf.shape, dtype=dtype) + leaf.astype(dtype),
            init_agent_cache(batch, heads, agents.shape[1], value.shape[-1]),
        )
    _check_state("initial_state", initial_state, query, value, agents)
    out, state = dispatch(
        "causal_agent_attention",
        CAUSAL_IMPLEMENTATIONS,
        implementation,
        query,
        key,
        value,
        agents.astype(dtype),
        jax.tree.map(lambda leaf: leaf.astype(dtype), initial_state),
        scale=default_scale(scale, head_dim),
        chunk_size=chunk_size,
    )
    return (out, state) if return_state else out


def init_agent_cache(
    batch: int, num_heads: int, num_agents: int, value_dim: int, *, dtype: Any = jnp.float32
) -> AgentState:
    """The state before the first token, for agent_step and initial_state. num_heads: the query's."""
    shape = (batch, num_heads, num_agents)
    return AgentState(jnp.full(shape, -jnp.inf, dtype), jnp.zeros(shape, dtype), jnp.zeros((*shape, value_dim), dtype))


def agent_step(
    state: AgentState, query: Array, key: Array, value: Array, agents: Array, *, scale: float | None = None
) -> tuple[Array, AgentState]:
    """One more token: causal_agent_attention's next output and state, in O(m (H + V)) per head.

    Args:
      state: from init_agent_cache, an earlier step, or causal_agent_attention(..., return_state=True).
      query, key, value: [B, 1, N, H], [B, 1, K, H], [B, 1, K, V]. agents, scale: as in causal_agent_attention.

    Returns:
      ([B, 1, N, V] in query's dtype, the state after this token).
    """
    check_query_key_value(query, key, value)
    require(query.shape[1] == 1, "query", shape_text(query), "need one token, [B, 1, N, H]")
    agents = _batched_agents(agents, query)
    _check_state("state", state, query, value, agents)
    dtype = accumulator_dtype(query, key, value, agents)
    state = jax.tree.map(lambda leaf: leaf.astype(dtype), state)
    return _causal_reference(
        query, key, value, agents.astype(dtype), state, scale=default_scale(scale, query.shape[-1])
    )


def _causal_reference(
    query: Array,
    key: Array,
    value: Array,
    agents: Array,
    state: AgentState,
    *,
    scale: Any,
    chunk_size: int | None = None,
) -> tuple[Array, AgentState]:
    dtype = agents.dtype
    group = query.shape[2] // key.shape[2]

    def token(state: AgentState, now: tuple[Array, Array, Array]) -> tuple[AgentState, Array]:
        query, key, value = now
        logits = scale * jnp.einsum("BmNH,BNH->BNm", agents, key)
        largest = jnp.maximum(state.largest, jax.lax.stop_gradient(logits))
        kept, added = jnp.exp(state.largest - largest), jnp.exp(logits - largest)
        denominator = kept * state.denominator + added
        numerator = kept[..., None] * state.numerator + added[..., None] * value[:, :, None]
        weights = jax.nn.softmax(scale * jnp.einsum("BNH,BmNH->BNm", query, agents), axis=-1)
        out = jnp.einsum("BNm,BNmV->BNV", weights / denominator, numerator)
        return AgentState(largest, denominator, numerator), out

    tokens = (query.astype(dtype), *(jnp.repeat(x.astype(dtype), group, axis=2) for x in (key, value)))
    state = state._replace(largest=jax.lax.stop_gradient(state.largest))
    state, out = jax.lax.scan(token, state, jax.tree.map(lambda x: jnp.moveaxis(x, 1, 0), tokens))
    return jnp.moveaxis(out, 0, 1).astype(query.dtype), state


def _causal_by_linear(
    query: Array,
    key: Array,
    value: Array,
    agents: Array,
    state: AgentState,
    *,
    scale: Any,
    chunk_size: int,
    implementation: str = "xla",
    operands: Any = None,
) -> tuple[Array, AgentState]:
    """By one of linear_attention's forms. operands: dtype of what it multiplies, None for the accumulator's."""
    dtype, key_heads = agents.dtype, key.shape[2]
    largest, denominator, numerator = state
    largest = jax.lax.stop_gradient(largest)
    by_group = einops.rearrange(agents, "B m (K G) H -> B m K G H", K=key_heads)
    logits = scale * jnp.einsum("BTKH,BmKGH->BTKGm", key, by_group, preferred_element_type=dtype)
    logits = einops.rearrange(logits, "B T K G m -> B T (K G) m")
    shares, total, _ = softmax_parts(scale * jnp.einsum("BTNH,BmNH->BTNm", query, agents, preferred_element_type=dtype))

    some = denominator > 0
    divisor = jnp.where(some, denominator, 1)
    before = jnp.where(some, jnp.where(some, largest, 0) + jnp.log(divisor), _NOTHING)
    # Log of the sum over the tokens before each one: the state's, then up to all but the last.
    sums = jax.lax.cumlogsumexp(jnp.concatenate([before[:, None], logits[:, :-1]], axis=1), axis=1)
    surplus = logits - sums
    tokens = (shares / total, jax.nn.sigmoid(surplus), jnp.repeat(value, query.shape[2] // key_heads, axis=2))
    out, gathered = linear_attention(
        *(x if operands is None else x.astype(operands) for x in tokens),
        log_decay=-jax.nn.softplus(surplus),
        scale=1.0,
        initial_state=LinearState(numerator / divisor[..., None]),
        return_state=True,
        chunk_size=chunk_size,
        implementation=implementation,
    )

    new_largest = jnp.maximum(largest, jax.lax.stop_gradient(jnp.max(logits, axis=1, initial=-jnp.inf)))
    unit = jnp.where(new_largest == -jnp.inf, 0, new_largest)
    denominator = jnp.exp(largest - unit) * denominator + jnp.sum(jnp.exp(logits - unit[:, None]), axis=1)
    return out.astype(query.dtype), AgentState(new_largest, denominator, gathered.kv * denominator[..., None])


def _causal_pallas_tpu(query: Array, *arrays: Any, **options: Any) -> tuple[Array, AgentState]:
    return _causal_by_linear(query, *arrays, implementation="pallas_tpu", operands=query.dtype, **options)


def _causal_pallas_tpu_refusal(
    query: Array, key: Array, value: Array, agents: Array, state: AgentState, *, scale: Any, chunk_size: int
) -> str | None:
    from kernels_pallas.tpu.chunked_linear import refusal

    shares = jax.ShapeDtypeStruct((*query.shape[:3], agents.shape[1]), query.dtype)
    repeated = jax.ShapeDtypeStruct((*query.shape[:3], value.shape[-1]), query.dtype)
    return refusal(shares, shares, repeated, shares)


CAUSAL_IMPLEMENTATIONS: dict[str, Callable[..., Any] | Kernel] = {
    "reference": _causal_reference,
    "xla": _causal_by_linear,
    "pallas_tpu": Kernel(_causal_pallas_tpu, _causal_pallas_tpu_refusal),
}


# --- Checks -----------------------------------------------------------------------------------------------------------


def _batched_agents(agents: Array, query: Array) -> Array:
    """Checks agents [B, m, N, H] or [m, N, H] against query [B, *space, N, H]; returns the former."""
    batch, (heads, head_dim) = query.shape[0], query.shape[-2:]
    layout = "[batch, m, heads, head_dim] or [m, heads, head_dim] of query's heads"
    has_batch = getattr(agents, "ndim", 4) == 4
    check_array("agents", agents, (batch, None, heads, head_dim) if has_batch else (None, heads, head_dim), layout)
    if not jnp.issubdtype(agents.dtype, jnp.floating):
        raise TypeError(f"agents: got dtype {agents.dtype}; need a floating dtype")
    require(agents.shape[-3] >= 1, "agents", shape_text(agents), "need at least one agent")
    return agents if has_batch else jnp.broadcast_to(agents, (batch, *agents.shape))


def _check_bias(name: str, bias: Array | None, full: tuple[int, ...], layout: str) -> Array | None:
    """Checks a bias [B|1, N|1, .., ..] or [N|1, .., ..]; returns the former."""
    if bias is None:
        return None
    check_array(name, bias, (None,) * (3 if getattr(bias, "ndim", 4) == 3 else 4), f"{layout}, with or without batch")
    if not jnp.issubdtype(bias.dtype, jnp.floating):
        raise TypeError(f"{name}: got dtype {bias.dtype}; need a floating bias")
    bias = bias[None] if bias.ndim == 3 else bias
    fits = all(got in (1, want) for got, want in zip(bias.shape, full))
    require(fits, name, shape_text(bias), f"need {layout} of {list(full)}")
    return bias


def _check_state(name: str, state: Any, query: Array, value: Array, agents: Array) -> None:
    if not isinstance(state, AgentState):
        raise TypeError(f"{name}: got {type(state).__name__}; need an AgentState")
    shape = (query.shape[0], query.shape[2], agents.shape[1])
    check_array(f"{name}.largest", state.largest, shape, "[B, N, m]")
    check_array(f"{name}.denominator", state.denominator, shape, "[B, N, m]")
    check_array(f"{name}.numerator", state.numerator, (*shape, value.shape[-1]), "[B, N, m, V]")
