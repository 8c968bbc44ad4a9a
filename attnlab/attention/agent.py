"""Agent attention: a few agents gather from all tokens, and every token reads the agents.

    Va_j  = sum_s softmax_s(scale a_j . k_s + gather_bias_js) v_s            agents gather
    out_t = sum_j softmax_j(scale q_t . a_j + broadcast_bias_tj) Va_j        agents broadcast

With m agents this costs O(n m) in place of O(n^2); the weights of out on v are a row-stochastic matrix of rank <= m.
The published layer pools the agents from the query's image (pool_agents), builds both biases from tables (agent_bias)
and adds a 3x3 depthwise convolution of v, which is not part of this module. Paper: Agent Attention (Han et al. 2023).
"""

import functools
from collections.abc import Callable
from typing import Any

import einops
import jax
import jax.numpy as jnp
import numpy as np

from attnlab.attention import dot_product
from attnlab.attention._dispatch.choice import Implementations, dispatch, form_of
from attnlab.attention._dispatch.primitive import primitive
from attnlab.attention._kernels import agent as kernels
from attnlab.attention._shared.checks import (
    accumulator_dtype,
    check_array,
    check_floating,
    check_int,
    check_key_mask,
    check_query_key_value,
    default_scale,
    require,
    shape_text,
)

Array = jax.Array


@primitive("B*N.")
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
      query: [B, *space, N, H], floating, with 1 to 3 space axes of T positions together (an image with a class token is
        a sequence, [B, 1 + Y X, N, H]).
      key: [B, *space, K, H] and value: [B, *space, K, V], of S positions, which may differ from the query's; K divides
        N.
      agents: [B, m, N, H], or [m, N, H] for all of the batch, with m >= 1. Used as they are in both steps.
      gather_bias: floating [B|1, N|1, m|1, S|1] or [N|1, m|1, S|1], added to the scaled logits of agents and keys.
      broadcast_bias: floating [B|1, N|1, T|1, m|1] or [N|1, T|1, m|1], added to those of queries and agents.
      key_mask: bool [B, *space] of key, True = attend. An agent that sees no key is seen by no query.
      scale: factor on the logits of both steps; None means H ** -0.5.
      implementation: None, "reference", "xla", or "pallas_tpu" (without biases; bfloat16 or float32).

    Returns:
      [B, *space, N, V] in query's dtype. Agents gather in float32 (float64 for float64 inputs; "pallas_tpu" rounds what
      they have gathered to query's dtype). Where no key is visible the output is 0, with zero gradients.

    Raises:
      ValueError, TypeError: at trace time, naming the argument.

    Complexity, with n = S + T: O(n m) time; memory O(n + m) beyond the arguments for "xla", O(n m) for "reference".
    """
    check_query_key_value(query, key, value, space_ranks=(1, 2, 3), same_space=False)
    agents = batched_agents(agents, query)
    flat_query, flat_key, flat_value = (einops.rearrange(x, "B ... N H -> B (...) N H") for x in (query, key, value))
    batch, queries, heads, head_dim = flat_query.shape
    count, keys = agents.shape[1], flat_key.shape[1]
    gather_bias = _check_bias("gather_bias", gather_bias, (batch, heads, count, keys), "[batch|1, heads|1, m|1, S|1]")
    broadcast_bias = _check_bias(
        "broadcast_bias", broadcast_bias, (batch, heads, queries, count), "[batch|1, heads|1, T|1, m|1]"
    )
    if key_mask is not None:
        check_key_mask(key_mask, key.shape[:-2], "[batch, *space] of key")
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


def _two_steps(
    attend: Callable[..., tuple[Array, Array]],
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
    """By two calls of one of dot_product_attention's forms."""
    # What the agents gather has their dtype.
    agents = agents.astype(accumulator_dtype(query, key, value, agents))
    gathered, lse = attend(agents, key, value, gather_bias, key_mask, None, is_causal=False, scale=scale)
    sees_a_key = einops.rearrange(lse != -jnp.inf, "B m N -> B N 1 m")  # NaN, too, is of a key
    out, _ = attend(query, agents, gathered, broadcast_bias, sees_a_key, None, is_causal=False, scale=scale)
    return out


IMPLEMENTATIONS: Implementations = {
    "reference": functools.partial(_two_steps, form_of(dot_product.IMPLEMENTATIONS, "reference")),
    "xla": functools.partial(_two_steps, form_of(dot_product.IMPLEMENTATIONS, "xla")),
    **kernels.kernels(form_of(dot_product.IMPLEMENTATIONS, "xla")),
}


# --- Agents and biases of the published image models ------------------------------------------------------------------


@primitive("B.N.")
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
    check_floating("query", query)
    require(0 not in query.shape[1:3], "query", shape_text(query), "Y and X must be at least 1")
    if not isinstance(grid, (tuple, list)):
        raise TypeError(f"grid: got {grid!r}; need two ints, (p, r)")
    require(len(grid) == 2, "grid", grid, "need two ints of at least 1, (p, r)")
    dtype, bins = accumulator_dtype(query), [check_int("grid", count, least=1, of=grid) for count in grid]
    rows, columns = (jnp.asarray(_bin_means(length, n), dtype) for length, n in zip(query.shape[1:3], bins))
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


# --- Checks -----------------------------------------------------------------------------------------------------------


def batched_agents(agents: Array, query: Array) -> Array:
    """Checks agents [B, m, N, H] or [m, N, H] against query [B, *space, N, H]; returns the former."""
    batch, (heads, head_dim) = query.shape[0], query.shape[-2:]
    layout = "[batch, m, heads, head_dim] or [m, heads, head_dim] of query's heads"
    has_batch = getattr(agents, "ndim", 4) == 4
    check_array("agents", agents, (batch, None, heads, head_dim) if has_batch else (None, heads, head_dim), layout)
    check_floating("agents", agents)
    require(agents.shape[-3] >= 1, "agents", shape_text(agents), "need at least one agent")
    return agents if has_batch else jnp.broadcast_to(agents, (batch, *agents.shape))


def _check_bias(name: str, bias: Array | None, full: tuple[int, ...], layout: str) -> Array | None:
    """Checks a bias [B|1, N|1, .., ..] or [N|1, .., ..]; returns the former."""
    if bias is None:
        return None
    check_array(name, bias, (None,) * (3 if getattr(bias, "ndim", 4) == 3 else 4), f"{layout}, with or without batch")
    check_floating(name, bias)
    bias = bias[None] if bias.ndim == 3 else bias
    fits = all(got in (1, want) for got, want in zip(bias.shape, full))
    require(fits, name, shape_text(bias), f"need {layout} of {list(full)}")
    return bias
