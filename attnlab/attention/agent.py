"""Agent attention: a few agents gather from all tokens, and every token reads the agents.

    Va_j  = sum_s softmax_s(scale a_j . k_s + gather_bias_js) v_s            agents gather
    out_t = sum_j softmax_j(scale q_t . a_j + broadcast_bias_tj) Va_j        agents broadcast

With m agents this costs O(n m) in place of O(n^2); the weights of out on v are a row-stochastic matrix of rank <= m.
The published layer pools the agents from the query's image (pool_agents), builds both biases from tables (agent_bias)
and adds a 3x3 depthwise convolution of v, which is not part of this module. Paper: Agent Attention (Han et al. 2023).
"""

import functools
import math
from collections.abc import Callable, Sequence
from typing import Any

import einops
import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from attnlab.attention import dot_product
from attnlab.attention._dispatch.choice import Implementations, dispatch, form_of
from attnlab.attention._dispatch.exchange import Parts, as_one, over_positions
from attnlab.attention._dispatch.primitive import primitive
from attnlab.attention._kernels import agent as kernels
from attnlab.attention._kernels.agent import Merge
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
from attnlab.attention._shared.finite import finite_or_zero, is_spoilt, spoil

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
      implementation: None, "reference", "xla", "pallas_tpu" (bfloat16 or float32) or "pallas_gpu" (bfloat16 or
        float16; no biases).

    Returns:
      [B, *space, N, V] in query's dtype. Agents gather in float32 (float64 for float64 inputs; "pallas_tpu" rounds what
      they have gathered to query's dtype). Where no key is visible the output is 0, with zero gradients.

    Raises:
      ValueError, TypeError: at trace time, naming the argument.

    Complexity, with n = S + T: O(n m) time; memory O(n + m) beyond the arguments for "xla", O(n m) for "reference".
    """
    check_query_key_value(query, key, value, space_ranks=(1, 2, 3), same_space=False)
    agents = batched_agents(agents, query)
    (batch, *space, heads, head_dim), key_space = query.shape, key.shape[1:-2]
    count, queries, keys = agents.shape[1], math.prod(space), math.prod(key_space)
    gather_bias = _check_bias("gather_bias", gather_bias, (batch, heads, count, keys), "[batch|1, heads|1, m|1, S|1]")
    broadcast_bias = _check_bias(
        "broadcast_bias", broadcast_bias, (batch, heads, queries, count), "[batch|1, heads|1, T|1, m|1]"
    )
    if key_mask is not None:
        check_key_mask(key_mask, key.shape[:-2], "[batch, *space] of key")
    attend = functools.partial(
        dispatch, "agent_attention", IMPLEMENTATIONS, implementation, scale=default_scale(scale, head_dim)
    )
    return over_positions(
        functools.partial(_of_grids, functools.partial(attend, merge=None)),
        functools.partial(_parted, attend),
        ("B*N.", "B+K.", "B+K.", "B.N.", _bias_layout(gather_bias, ".+"), _bias_layout(broadcast_bias, "+."), "B+"),
        "B*N.",
        query,
        key,
        value,
        agents,
        _on_grid(gather_bias, 3, key_space),
        _on_grid(broadcast_bias, 2, space),
        key_mask,
    )


def _parted(attend: Callable[..., Array], parts: Parts, *arrays: Any) -> Array:
    """Each device's part of the queries, from what agents have gathered of all keys."""
    return _of_grids(functools.partial(attend, merge=functools.partial(_merged, parts)), *arrays)


def _merged(parts: Parts, gathered: Array, lse: Array) -> tuple[Array, Array]:
    """What agents have gathered of the keys of all devices, and its lse, from those of each device's keys."""
    spoilt = is_spoilt(gathered) | jnp.isnan(lse)  # some key that they see
    lse = jnp.where(spoilt, -jnp.inf, lse)
    largest = lax.pmax(lax.stop_gradient(lse), parts.names)
    largest = jnp.where(largest == -jnp.inf, 0, largest)
    share = jnp.exp(lse - largest)
    sums = (share[..., None] * finite_or_zero(gathered), share, spoilt.astype(share.dtype))
    of_values, total, spoilt_devices = as_one(lambda x: lax.psum(x, parts.names), sums)
    empty = total == 0
    total = jnp.where(empty, 1, total)
    lse = jnp.where(empty, -jnp.inf, largest + jnp.log(total))
    gathered = (of_values / total[..., None]).astype(gathered.dtype)
    return spoil(gathered, spoilt_devices > 0), spoil(lse, spoilt_devices > 0)


def _of_grids(
    attend: Callable[..., Array],
    query: Array,
    key: Array,
    value: Array,
    agents: Array,
    gather_bias: Array | None,
    broadcast_bias: Array | None,
    key_mask: Array | None,
) -> Array:
    """attend, whose arrays have one axis of positions, of arrays with any number of space axes."""
    if gather_bias is not None:
        gather_bias = einops.rearrange(gather_bias, "B N m ... -> B N m (...)")
    if broadcast_bias is not None:
        broadcast_bias = einops.rearrange(broadcast_bias, "B N ... m -> B N (...) m")
    if key_mask is not None:
        key_mask = einops.rearrange(key_mask, "B ... -> B 1 1 (...)")
    flat = (einops.rearrange(x, "B ... N H -> B (...) N H") for x in (query, key, value))
    out = attend(*flat, agents, gather_bias, broadcast_bias, key_mask)
    return out.reshape(*query.shape[:-1], value.shape[-1])


def _on_grid(bias: Array | None, axis: int, space: Sequence[int]) -> Array | None:
    """A bias whose axis of positions is made the space axes, each of length 1 where it is."""
    if bias is None:
        return None
    space = space if bias.shape[axis] != 1 else (1,) * len(space)
    return bias.reshape(*bias.shape[:axis], *space, *bias.shape[axis + 1 :])


def _bias_layout(bias: Array | None, rest: str) -> str | None:
    if bias is None:
        return None
    return ("." if bias.shape[0] == 1 else "B") + ("." if bias.shape[1] == 1 else "N") + rest


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
    merge: Merge | None,
) -> Array:
    """By two calls of one of dot_product_attention's forms."""
    # What the agents gather has their dtype.
    agents = agents.astype(accumulator_dtype(query, key, value, agents))
    gathered, lse = attend(agents, key, value, gather_bias, key_mask, None, is_causal=False, scale=scale)
    if merge is not None:
        gathered, lse = merge(gathered, lse)
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

    def pool(query: Array, weights: list[Array]) -> Array:
        pooled = jnp.einsum("pY,rX,BYXNH->BprNH", *weights, query.astype(dtype))
        return einops.rearrange(pooled, "B p r N H -> B (p r) N H")

    def whole(query: Array) -> Array:
        weights = [jnp.asarray(_bin_means(length, n), dtype) for length, n in zip(query.shape[1:3], bins)]
        return pool(query, weights).astype(query.dtype)

    def parted(parts: Parts, query: Array) -> Array:
        own = query.shape[1 + parts.axis]
        lengths = (n * (parts.many if axis == parts.axis else 1) for axis, n in enumerate(query.shape[1:3]))
        weights = [jnp.asarray(_bin_means(*pair), dtype) for pair in zip(lengths, bins)]
        of_part = lax.dynamic_slice_in_dim(weights[parts.axis], parts.number() * own, own, axis=1)
        weights[parts.axis] = of_part
        return lax.psum(pool(query, weights), parts.names).astype(query.dtype)

    return over_positions(whole, parted, ("B*N.",), "B.N.", query)


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
