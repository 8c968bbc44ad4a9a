"""Routing attention: a token attends to the tokens that k-means puts into its cluster.

With x a token's query or key, normalised (below), and mu_c the centroids of its head:

    s_ic = x_i . mu_c                              similarity of token i and centroid c
    "global"   centroid c takes the `window` queries and the `window` keys most similar to it; a query attends to the
               keys beside it, and its output is the sum over the clusters that took it / (their number + eps)
    "strict"   token i belongs to c_i = argmax_c s_ic; a query attends to the last `window` keys of its own cluster
               at or before its own position

"global" is the published choice and not causal, not even with is_causal=True: a later token can push an earlier one out
of a cluster, so outputs before it change, though the gradient between them is zero. "strict" is causal under any
perturbation and equals decoding step by step, to rounding: the blocks of "xla" depend on all tokens.

Two normalisations are published:

    "unit"    lucidrains' routing-transformer: x / |x| for routing alone; logits scale q.k with raw q and k; where
              queries and keys are shared, k has unit length, and a token sees itself only if it sees no other; eps 1e-5
    "layer"   Google's: layer norm without gain or bias (1e-6) of H^-1/2 q and of k, for routing and for logits, which
              have no further scale; eps 1e-2

Paper: Efficient Content-Based Sparse Attention with Routing Transformers (Roy et al. 2020).
"""

import functools
from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import einops
import jax
import jax.numpy as jnp

from attnlab.attention._checks import (
    accumulator_dtype,
    check_array,
    check_query_key_value,
    default_scale,
    require,
    shape_text,
)
from attnlab.attention._dispatch import Kernel, dispatch
from attnlab.attention._kernel_call import kernel_call
from attnlab.attention._softmax import softmax_parts

Array = jax.Array
Membership = Literal["strict", "global"]
Normalize = Literal["unit", "layer"]

_COUNT_EPSILON = {"unit": 1e-5, "layer": 1e-2}
_SMOOTHING = 1e-5
# Queries and key tiles whose logits "xla" holds at once, a head: 2^16 numbers of the strict form.
_LOGITS_AT_ONCE = 2**16


class RoutingState(NamedTuple):
    """The centroids of N heads, in float32 (float64 for float64 inputs), and the sums behind them.

    centroids: [N, c, H]. counts: [N, c], tokens a batch, and sums: [N, c, H], their sum a batch, both as exponential
    moving averages; rule "ema" of update_routing alone needs them.
    """

    centroids: Array
    counts: Array
    sums: Array


class RoutingStatistics(NamedTuple):
    """What update_routing needs of a batch; those of several batches add up. counts: [N, c]; sums: [N, c, H]."""

    counts: Array
    sums: Array


class RoutingAux(NamedTuple):
    """What routing tells besides the output.

    loss: [], mean squared distance of tokens and their nearest centroids; times 1e-4, say, it is the published
      auxiliary loss. Its gradient moves the tokens, not the centroids. "layer": queries' mean plus keys'; "unit": mean
      over both.
    statistics: for update_routing, without a gradient.
    query_cluster, key_cluster: int32 [B, T, N], the most similar centroid.
    taken: int32 [B, T, N], how many clusters took the query: 1 everywhere with membership="strict".
    """

    loss: Array
    statistics: RoutingStatistics
    query_cluster: Array
    key_cluster: Array
    taken: Array


def routing_attention(
    query: Array,
    key: Array,
    value: Array,
    state: RoutingState,
    *,
    window: int,
    is_causal: bool = False,
    membership: Membership = "strict",
    normalize: Normalize = "unit",
    share_qk: bool = False,
    key_mask: Array | None = None,
    scale: float | None = None,
    implementation: str | None = None,
) -> tuple[Array, RoutingAux]:
    """Routing attention; the module's docstring has the formulas.

    Args:
      query: [B, T, N, H], floating. key: [B, T, K, H], value: [B, T, K, V]; K divides N.
      state: centroids for N heads (init_routing, fit_routing, update_routing). No gradient goes into them.
      window: keys that a query sees at most, 1 to T; with "global" also the number of queries a centroid takes.
      is_causal: keys at or before the query alone. With "global" this hides later keys, but which tokens a centroid
        takes still depends on later tokens.
      membership: "strict" or "global". "strict" without is_causal: the window div 2 next keys of the cluster and the
        others before them.
      normalize: "unit" or "layer".
      share_qk: the queries serve as keys; key must be of query's shape and is not read.
      key_mask: bool [B, T], True = a token; padding is in no cluster, sees nothing and is not counted.
      scale: factor on the logits; None means H ** -0.5 for "unit" and 1 for "layer".
      implementation: None, "reference", "xla", or "pallas_tpu" (share_qk only where causal; bfloat16 or float32).

    Returns:
      ([B, T, N, V] in query's dtype, RoutingAux). Where a query sees no key, or no centroid takes it, the output is 0,
      with zero gradients.

    Raises:
      ValueError, TypeError: at trace time, naming the argument.

    Complexity of "xla", per head with c centroids and windows of w: O(T c H) to compare; then "strict" O(T w H) time
    and O(T (c + H)) memory, "global" O(c w^2 H) time and O(T c + c w^2) memory: O(T^1.5 H) time where c = w = T^0.5.
    """
    check_query_key_value(query, key, value)
    batch, length, heads, head_dim = query.shape
    _check_state("state", state, heads, head_dim)
    _check_options(membership, normalize)
    require(isinstance(window, int) and not isinstance(window, bool), "window", repr(window), "need an int")
    require(1 <= window <= length, "window", window, f"need 1 to the length, {length}")
    if share_qk:
        check_array("key", key, query.shape, "query's shape, as share_qk=True")
    if key_mask is not None:
        check_array("key_mask", key_mask, (batch, length), "[batch, length]")
        if key_mask.dtype != jnp.bool_:
            raise TypeError(f"key_mask: got dtype {key_mask.dtype}; need a bool mask (True = attend)")

    dtype = accumulator_dtype(query, key, value)
    state = jax.lax.stop_gradient(jax.tree.map(lambda leaf: leaf.astype(dtype), state))
    query_tokens, key_tokens, query_heads, key_heads = _normalized(query, key, normalize, share_qk)
    similarity_q = jnp.einsum("BTNH,NcH->BTNc", jax.lax.stop_gradient(query_tokens), state.centroids)
    similarity_k = similarity_q
    if not share_qk:
        similarity_k = jnp.einsum("BTNH,NcH->BTNc", jax.lax.stop_gradient(key_tokens), state.centroids)
    cluster_q, cluster_k = (jnp.argmax(x, axis=-1).astype(jnp.int32) for x in (similarity_q, similarity_k))
    parts = [(query_tokens, cluster_q)] if share_qk else [(query_tokens, cluster_q), (key_tokens, cluster_k)]
    losses = [_commitment(tokens, cluster, state, key_mask) for tokens, cluster in parts]
    weight = 1.0 / len(parts) if normalize == "unit" else 2.0 / len(parts)
    statistics = [_statistics(tokens, cluster, state, key_mask) for tokens, cluster in parts]

    out, taken = dispatch(
        "routing_attention",
        IMPLEMENTATIONS,
        implementation,
        query_heads,
        key_heads,
        jnp.repeat(value, heads // value.shape[2], axis=2).astype(dtype),
        (similarity_q, similarity_k),
        (cluster_q, cluster_k),
        key_mask,
        num_clusters=state.centroids.shape[1],
        window=window,
        is_causal=is_causal,
        membership=membership,
        self_is_last=share_qk and normalize == "unit",
        share_qk=share_qk,
        epsilon=_COUNT_EPSILON[normalize],
        scale=_scale(scale, normalize, head_dim),
        operands=query.dtype,
    )
    aux = RoutingAux(
        weight * functools.reduce(jnp.add, losses),
        jax.tree.map(lambda *leaves: functools.reduce(jnp.add, leaves), *statistics),
        cluster_q,
        cluster_k,
        taken,
    )
    return out.astype(query.dtype), aux


# --- Centroids --------------------------------------------------------------------------------------------------------


def init_routing(rng: Array, num_heads: int, num_clusters: int, head_dim: int) -> RoutingState:
    """Random centroids of unit length, which count as one token each. Better ones come from data: fit_routing."""
    for name, given in (("num_heads", num_heads), ("num_clusters", num_clusters), ("head_dim", head_dim)):
        require(given >= 1, name, given, "need at least 1")
    centroids = _unit(jax.random.normal(rng, (num_heads, num_clusters, head_dim)))
    return RoutingState(centroids, jnp.ones((num_heads, num_clusters)), centroids)


def fit_routing(
    tokens: Array, state: RoutingState, iterations: int = 10, *, normalize: Normalize = "unit"
) -> RoutingState:
    """Centroids from data: k-means of tokens [B, T, N, H], started from tokens at equal distances.

    tokens: queries, or queries and keys one after the other, as routing_attention gets them; for the cold start of a
      model, its first batch's. normalize: as in routing_attention (the queries' H^-1/2 does not matter here).
    state: gives the number of centroids; one that no token is nearest to stays what it was.
    """
    check_array("tokens", tokens, (None, None, None, None), "[batch, length, heads, head_dim]")
    _check_state("state", state, *tokens.shape[2:])
    require(iterations >= 1, "iterations", iterations, "need at least 1")
    _check_options("strict", normalize)
    dtype = accumulator_dtype(tokens)
    normalized = jax.lax.stop_gradient(_unit(tokens) if normalize == "unit" else _layer_norm(tokens.astype(dtype)))
    flat = einops.rearrange(normalized, "B T N H -> N (B T) H").astype(dtype)
    clusters = state.centroids.shape[1]
    seeds = flat[:, jnp.arange(clusters) * flat.shape[1] // clusters]

    def iterate(centroids: Array, _: None) -> tuple[Array, RoutingStatistics]:
        cluster = jnp.argmax(jnp.einsum("NTH,NcH->NTc", flat, centroids), axis=-1)
        statistics = _sums(flat, cluster, clusters)
        means = statistics.sums / jnp.maximum(statistics.counts, 1)[..., None]
        means = _unit(means) if normalize == "unit" else means
        return jnp.where(statistics.counts[..., None] > 0, means, centroids), statistics

    centroids, statistics = jax.lax.scan(iterate, seeds, None, length=iterations)
    count = jnp.maximum(statistics.counts[-1], 1)
    return RoutingState(centroids, count, centroids * count[..., None])


def update_routing(
    state: RoutingState,
    stats: RoutingStatistics,
    *,
    decay: float = 0.999,
    rule: Literal["ema", "unit"] = "ema",
    axis_name: Any = None,
) -> RoutingState:
    """The centroids after a batch; RoutingAux.statistics of microbatches may be added up before.

    rule "ema" (Google's): counts and sums are averaged over batches with `decay`, and
        mu = sums / ((counts + 1e-5) / (sum counts + c 1e-5) sum counts), c the number of centroids.
    rule "unit" (lucidrains'): mu = decay mu + (1 - decay) sums / |sums|, not renormalised; a centroid without a token
      stays what it was.
    axis_name: mapped axes (shard_map, pmap, vmap) over which the statistics are added up first.
    """
    require(rule in ("ema", "unit"), "rule", repr(rule), 'need "ema" or "unit"')
    check_array("stats.counts", stats.counts, state.counts.shape, "[heads, clusters]")
    check_array("stats.sums", stats.sums, state.sums.shape, "[heads, clusters, head_dim]")
    if axis_name is not None:
        stats = jax.lax.psum(stats, axis_name)
    if rule == "unit":
        moved = decay * state.centroids + (1 - decay) * _unit(stats.sums)
        return state._replace(centroids=jnp.where(stats.counts[..., None] > 0, moved, state.centroids))
    count = decay * state.counts + (1 - decay) * stats.counts
    total = decay * state.sums + (1 - decay) * stats.sums
    everything = jnp.sum(count, axis=-1, keepdims=True)
    smoothed = (count + _SMOOTHING) / (everything + count.shape[-1] * _SMOOTHING) * everything
    return RoutingState(total / smoothed[..., None], count, total)


def _unit(x: Array) -> Array:
    """x / |x| over the last axis, and 0 for 0, with finite gradients."""
    wide = x.astype(accumulator_dtype(x))
    # Divided by the largest first, so that squares neither overflow nor vanish.
    largest = jax.lax.stop_gradient(jnp.max(jnp.abs(wide), axis=-1, keepdims=True))
    wide = wide / jnp.where(largest > 0, largest, 1)
    square = jnp.sum(wide * wide, axis=-1, keepdims=True)
    return wide / jnp.sqrt(jnp.where(square > 0, square, 1))


def _layer_norm(x: Array) -> Array:
    centred = x - jnp.mean(x, axis=-1, keepdims=True)
    return centred * jax.lax.rsqrt(jnp.mean(centred * centred, axis=-1, keepdims=True) + 1e-6)


def _normalized(query: Array, key: Array, normalize: str, share_qk: bool) -> tuple[Array, Array, Array, Array]:
    """Tokens to route by, of queries and keys, and what goes into the logits; all [B, T, N, H]."""
    dtype = accumulator_dtype(query, key)
    query = query.astype(dtype)
    key = jnp.repeat(key, query.shape[2] // key.shape[2], axis=2).astype(dtype)
    if normalize == "unit":
        query_tokens = _unit(query)
        return (query_tokens, query_tokens, query, query_tokens) if share_qk else (query_tokens, _unit(key), query, key)
    query_tokens = _layer_norm(query * query.shape[-1] ** -0.5)
    key_tokens = query_tokens if share_qk else _layer_norm(key)
    return query_tokens, key_tokens, query_tokens, key_tokens


def _scale(scale: Any, normalize: str, head_dim: int) -> Any:
    return 1.0 if scale is None and normalize == "layer" else default_scale(scale, head_dim)


def _commitment(tokens: Array, cluster: Array, state: RoutingState, key_mask: Array | None) -> Array:
    """Mean squared distance of tokens [B, T, N, H] and their centroids, over real tokens and channels."""
    heads = jnp.arange(tokens.shape[2])
    square = (tokens - state.centroids[heads, cluster]) ** 2
    if key_mask is None:
        return jnp.mean(square)
    weight = jnp.broadcast_to(key_mask[:, :, None, None], square.shape)
    return jnp.sum(jnp.where(weight, square, 0)) / jnp.maximum(jnp.sum(weight), 1)


def _statistics(tokens: Array, cluster: Array, state: RoutingState, key_mask: Array | None) -> RoutingStatistics:
    clusters = state.centroids.shape[1]
    tokens = einops.rearrange(jax.lax.stop_gradient(tokens), "B T N H -> N (B T) H")
    if key_mask is not None:  # padding goes to a cluster of its own, which _sums drops
        cluster = jnp.where(key_mask[..., None], cluster, clusters)
    return _sums(tokens, einops.rearrange(cluster, "B T N -> N (B T)"), clusters)


def _sums(tokens: Array, cluster: Array, clusters: int) -> RoutingStatistics:
    """Counts and sums of tokens [N, S, H] by cluster [N, S]; clusters out of range are dropped."""

    def head(tokens: Array, cluster: Array) -> RoutingStatistics:
        add = functools.partial(jax.ops.segment_sum, segment_ids=cluster, num_segments=clusters)
        return RoutingStatistics(add(jnp.ones_like(tokens[:, 0])), add(tokens))

    return jax.vmap(head)(tokens, cluster)


# --- Reference: dense weights, O(T^2) ---------------------------------------------------------------------------------


def _reference(
    query: Array,
    key: Array,
    value: Array,
    similarity: tuple[Array, Array],
    cluster: tuple[Array, Array],
    key_mask: Array | None,
    *,
    num_clusters: int,
    window: int,
    is_causal: bool,
    membership: str,
    self_is_last: bool,
    share_qk: bool,
    epsilon: float,
    scale: Any,
    operands: Any,
) -> tuple[Array, Array]:
    length = query.shape[1]
    position = jnp.arange(length)
    real = jnp.ones(query.shape[:2], bool) if key_mask is None else key_mask
    logits = scale * jnp.einsum("BTNH,BSNH->BNTS", query, key)
    ordered = position[:, None] >= position if is_causal else jnp.ones((length, length), bool)
    itself = position[:, None] == position

    def attend(visible: Array) -> Array:
        """[B, N, T, S] -> [B, T, N, V]"""
        if self_is_last:
            others = jnp.any(visible & ~itself, axis=-1, keepdims=True)
            visible = visible & ~(itself & others)
        numerators, denominator, _ = softmax_parts(logits, visible)
        return jnp.einsum("BNTS,BSNV->BTNV", numerators / denominator, value)

    if membership == "strict":
        cluster_q, cluster_k = (einops.rearrange(x, "B T N -> B N T") for x in cluster)
        both = real[:, None, :, None] & real[:, None, None, :]
        same = (cluster_q[..., None] == cluster_k[..., None, :]) & both
        up_to_now = jnp.sum(same & (position[:, None] >= position), axis=-1, keepdims=True)
        number = jnp.cumsum(same, axis=-1)  # of this key among the keys of the query's cluster, from 1
        last = up_to_now if is_causal else up_to_now + window // 2
        first = up_to_now - (window if is_causal else window - window // 2)
        return attend(same & (first < number) & (number <= last)), _taken_once(query, key_mask)

    taken_q, taken_k = (_taken(x, window, real) for x in similarity)  # [B, N, c, T]
    total = jnp.zeros_like(value)
    for centroid in range(num_clusters):
        visible = taken_q[:, :, centroid, :, None] & taken_k[:, :, centroid, None, :] & ordered
        total = total + attend(visible)
    count = einops.rearrange(jnp.sum(taken_q, axis=2), "B N T -> B T N")
    return total / (count + epsilon)[..., None].astype(value.dtype), count.astype(jnp.int32)


def _taken(similarity: Array, window: int, real: Array) -> Array:
    """[B, T, N, c] -> bool [B, N, c, T]: the `window` tokens most similar to each centroid; of equals, the earlier."""
    similarity = jnp.where(real[:, :, None, None], similarity, -jnp.inf)
    order = jnp.argsort(-einops.rearrange(similarity, "B T N c -> B N c T"), axis=-1)
    rank = jnp.argsort(order, axis=-1)
    return (rank < window) & real[:, None, None, :]


def _taken_once(query: Array, key_mask: Array | None) -> Array:
    ones = jnp.ones(query.shape[:3], jnp.int32)
    return ones if key_mask is None else ones * key_mask[..., None]


# --- XLA --------------------------------------------------------------------------------------------------------------


def _xla(
    query: Array,
    key: Array,
    value: Array,
    similarity: tuple[Array, Array],
    cluster: tuple[Array, Array],
    key_mask: Array | None,
    *,
    membership: str,
    operands: Any,
    **options: Any,
) -> tuple[Array, Array]:
    if membership == "global":
        return _global_xla(query, key, value, similarity, key_mask, **options)
    # A head of a sequence at a time is what the sorting is written for.
    one: Any = functools.partial(_strict_head, **options)
    over_heads = jax.vmap(one, in_axes=(1, 1, 1, 1, 1, None), out_axes=1)
    mask_axis = None if key_mask is None else 0
    out = jax.vmap(over_heads, in_axes=(0, 0, 0, 0, 0, mask_axis))(query, key, value, *cluster, key_mask)
    return out, _taken_once(query, key_mask)


class _Ranges(NamedTuple):
    """Keys sorted by (cluster, position): order_k int32 [T], and rank_k, each key's place among them. Query t sees the
    places first[t] <= place < end[t]; both grow along order_q, the queries sorted alike."""

    order_k: Array
    rank_k: Array
    order_q: Array
    first: Array
    end: Array


def _strict_ranges(
    cluster_q: Array, cluster_k: Array, key_mask: Array | None, *, num_clusters: int, window: int, is_causal: bool
) -> _Ranges:
    """Of one head: clusters [T], key_mask bool [T]."""
    length = cluster_q.shape[0]
    position = jnp.arange(length)
    if key_mask is not None:  # padding makes up a last cluster, which is not looked at
        cluster_q, cluster_k = (jnp.where(key_mask, x, num_clusters) for x in (cluster_q, cluster_k))

    order_k = jnp.argsort(cluster_k, stable=True)
    rank_k = jnp.zeros(length, jnp.int32).at[order_k].set(position.astype(jnp.int32))
    start_of = jnp.searchsorted(cluster_k[order_k], jnp.arange(num_clusters + 2)).astype(jnp.int32)
    # Keys of the query's cluster up to its position: for a query among sorted (cluster, position) pairs of keys.
    pairs_k = cluster_k[order_k] * length + order_k
    now = jnp.searchsorted(pairs_k, cluster_q * length + position, side="right").astype(jnp.int32)
    first, end = start_of[cluster_q], start_of[cluster_q + 1]
    if is_causal:
        end = now
        first = jnp.maximum(first, now - window)
    else:
        first = jnp.maximum(first, now - (window - window // 2))
        end = jnp.minimum(end, now + window // 2)
    if key_mask is not None:
        end = jnp.where(key_mask, end, first)
    return _Ranges(order_k, rank_k, jnp.argsort(cluster_q, stable=True), first, end)


def _strict_head(
    query: Array,
    key: Array,
    value: Array,
    cluster_q: Array,
    cluster_k: Array,
    key_mask: Array | None,
    *,
    num_clusters: int,
    window: int,
    is_causal: bool,
    self_is_last: bool,
    share_qk: bool,
    epsilon: float,
    scale: Any,
) -> Array:
    """query [T, H], key [T, H], value [T, V], clusters [T] -> [T, V].

    Tiles of `tile` sorted keys; a query goes to the tile that its last key is in, and sees that tile and the `back`
    tiles before it. Tiles take their queries in blocks of `tile` slots, some of them empty.
    """
    length = query.shape[0]
    tile = max(16, min(256, -(-window // 2)))
    back = -(-(window - 1) // tile)
    tiles = -(-length // tile)
    position = jnp.arange(length)
    ranges = _strict_ranges(
        cluster_q, cluster_k, key_mask, num_clusters=num_clusters, window=window, is_causal=is_causal
    )
    order_k, first, end, rank_k = ranges.order_k, ranges.first, ranges.end, ranges.rank_k
    itself = rank_k if self_is_last else jnp.full(length, -1, jnp.int32)

    last_tile = jnp.maximum(end - 1, 0) // tile
    order_q = jnp.argsort(last_tile, stable=True)
    tile_counts = jnp.bincount(last_tile, length=tiles)
    block_ends = jnp.cumsum(-(-tile_counts // tile))
    blocks = length // tile + tiles  # at most
    in_tile = jnp.arange(length) - (jnp.cumsum(tile_counts) - tile_counts)[last_tile[order_q]]
    block_starts = block_ends - -(-tile_counts // tile)
    slot = jnp.zeros(length, jnp.int32).at[order_q].set(block_starts[last_tile[order_q]] * tile + in_tile)
    query_of = jnp.full(blocks * tile, length, jnp.int32).at[slot].set(position.astype(jnp.int32))
    tile_of = jnp.minimum(jnp.searchsorted(block_ends, jnp.arange(blocks), side="right"), tiles - 1)

    def slots(x: Array) -> Array:
        """[T, ...] -> [blocks, tile, ...], 0 in empty slots."""
        taken = x.at[query_of].get(mode="fill", fill_value=0)
        return taken.reshape(blocks, tile, *x.shape[1:])

    def windows(x: Array) -> Array:
        """[T, ...] of keys -> [blocks, (back + 1) tile, ...]: the tiles that a block sees."""
        x = x[order_k]
        x = jnp.pad(x, ((back * tile, tiles * tile - length), *((0, 0),) * (x.ndim - 1)))
        x = x.reshape(back + tiles, tile, *x.shape[1:])
        x = x[tile_of[:, None] + jnp.arange(back + 1)]
        return x.reshape(blocks, (back + 1) * tile, *x.shape[3:])

    @functools.partial(jax.checkpoint, prevent_cse=False)
    def attend(block: Any) -> Array:
        query, key, value, first, end, itself, number = block
        rank = (number - back) * tile + jnp.arange(key.shape[0])
        visible = (first[:, None] <= rank) & (rank < end[:, None])
        if self_is_last:
            mine = rank == itself[:, None]
            others = jnp.any(visible & ~mine, axis=-1, keepdims=True)
            visible = visible & ~(mine & others)
        numerators, denominator, _ = softmax_parts(scale * query @ key.T, visible)
        return (numerators @ value) / denominator

    at_once = max(1, _LOGITS_AT_ONCE // (tile * (back + 1) * tile))
    inputs = (slots(query), windows(key), windows(value), slots(first), slots(end), slots(itself), tile_of)
    out = jax.lax.map(attend, inputs, batch_size=min(at_once, blocks))
    return out.reshape(blocks * tile, -1)[slot]


def _members_of_both(
    similarity: tuple[Array, Array], key_mask: Array | None, window: int, share_qk: bool
) -> tuple[Array, Array]:
    """Positions [B, N, c, w] of the queries and of the keys that each centroid takes; T, which no token has, for
    padding. similarity: [B, T, N, c], twice."""
    length = similarity[0].shape[1]

    def members(similarity: Array) -> Array:
        if key_mask is not None:
            similarity = jnp.where(key_mask[:, :, None, None], similarity, -jnp.inf)
        found, index = jax.lax.top_k(einops.rearrange(similarity, "B T N c -> B N c T"), window)
        return jnp.where(found == -jnp.inf, length, index)

    taken_q = members(similarity[0])
    return taken_q, taken_q if share_qk else members(similarity[1])


def _global_xla(
    query: Array,
    key: Array,
    value: Array,
    similarity: tuple[Array, Array],
    key_mask: Array | None,
    *,
    num_clusters: int,
    window: int,
    is_causal: bool,
    self_is_last: bool,
    share_qk: bool,
    epsilon: float,
    scale: Any,
) -> tuple[Array, Array]:
    length = query.shape[1]
    taken_q, taken_k = _members_of_both(similarity, key_mask, window, share_qk)

    def head(query: Array, key: Array, value: Array, taken_q: Array, taken_k: Array) -> tuple[Array, Array]:
        """[T, H], [T, H], [T, V], positions [c, w] -> sums over clusters [T, V], how many took the query [T]."""

        @functools.partial(jax.checkpoint, prevent_cse=False)
        def attend(clusters: tuple[Array, Array, Array, Array, Array]) -> Array:
            query, key, value, place_q, place_k = clusters
            visible = (place_k < length) & (place_q < length)[:, None]
            if is_causal:
                visible &= place_k <= place_q[:, None]
            if self_is_last:
                mine = place_k == place_q[:, None]
                others = jnp.any(visible & ~mine, axis=-1, keepdims=True)
                visible = visible & ~(mine & others)
            numerators, denominator, _ = softmax_parts(scale * query @ key.T, visible)
            return (numerators @ value) / denominator

        gathered = [
            x.at[place].get(mode="fill", fill_value=0)
            for x, place in ((query, taken_q), (key, taken_k), (value, taken_k))
        ]
        at_once = max(1, _LOGITS_AT_ONCE // window**2)
        out = jax.lax.map(attend, (*gathered, taken_q, taken_k), batch_size=min(at_once, num_clusters))
        total = jnp.zeros_like(value).at[taken_q.ravel()].add(out.reshape(-1, value.shape[-1]), mode="drop")
        return total, jnp.zeros(length, jnp.int32).at[taken_q.ravel()].add(1, mode="drop")

    over_heads = jax.vmap(head, in_axes=(1, 1, 1, 0, 0), out_axes=1)
    total, count = jax.vmap(over_heads)(query, key, value, taken_q, taken_k)
    return total / (count + epsilon)[..., None].astype(value.dtype), count


# --- Pallas -----------------------------------------------------------------------------------------------------------


class _Rows(NamedTuple):
    """Routing as banded attention, each head of a sequence (strict), or each cluster of one (global), a row of a batch.

    pattern: the kernels'. cut: query, key, value [B, N, T, H] -> [rows, tokens, 1, H]. join: [rows, tokens, V] ->
    [B, N, T, V], sums over the clusters. times_taken: [B, T, N], by how many clusters a query was.
    """

    pattern: Any
    cut: Callable[..., tuple[Array, ...]]
    join: Callable[[Array], Array]
    times_taken: Array


def _row_block(tokens: int, window: int) -> int:
    return 256 if min(tokens, window) >= 256 else 128


def _strict_rows(
    similarity: Any,
    cluster: tuple[Array, Array],
    key_mask: Array | None,
    *,
    num_clusters: int,
    window: int,
    is_causal: bool,
    self_is_last: bool,
    share_qk: bool,
) -> _Rows:
    from kernels_pallas.patterns import SortedIntervals

    batch, length, heads = cluster[0].shape
    ranges_of: Any = functools.partial(_strict_ranges, num_clusters=num_clusters, window=window, is_causal=is_causal)
    mask_axis = None if key_mask is None else 0
    ranges = jax.vmap(jax.vmap(ranges_of, in_axes=(1, 1, None)), in_axes=(0, 0, mask_axis))(*cluster, key_mask)
    end = ranges.end
    if self_is_last:  # causal: a query's own key is the last of its range, and counts if it is the only one
        end = jnp.where(end - 1 > ranges.first, end - 1, end)
    first, end = (
        jnp.take_along_axis(x, ranges.order_q, axis=2).reshape(batch * heads, length) for x in (ranges.first, end)
    )
    pattern = SortedIntervals(first, end, length, reach=window, block=_row_block(length, window))
    back = jnp.argsort(ranges.order_q, axis=2)

    def ordered(x: Array, order: Array) -> Array:
        return jnp.take_along_axis(x, order[..., None], axis=2)

    def cut(*arrays: Array) -> tuple[Array, ...]:
        orders = (ranges.order_q, ranges.order_k, ranges.order_k)
        return tuple(ordered(x, order).reshape(batch * heads, length, 1, -1) for x, order in zip(arrays, orders))

    def join(out: Array) -> Array:
        return ordered(out.reshape(batch, heads, length, -1), back)

    return _Rows(pattern, cut, join, _taken_once(cluster[0][..., None], key_mask))


def _global_rows(
    similarity: tuple[Array, Array],
    cluster: Any,
    key_mask: Array | None,
    *,
    num_clusters: int,
    window: int,
    is_causal: bool,
    self_is_last: bool,
    share_qk: bool,
) -> _Rows:
    from kernels_pallas.patterns import AllPairs

    batch, length, heads, _ = similarity[0].shape
    taken_q, taken_k = _members_of_both(similarity, key_mask, window, share_qk)
    rows = batch * heads * num_clusters
    place_q, place_k = (x.reshape(rows, window) for x in (taken_q, taken_k))
    real_q, real_k = place_q < length, place_k < length
    end = place_q + 1 if is_causal else jnp.full_like(place_q, length)
    if self_is_last:  # causal: others are those before
        earliest = jnp.min(jnp.where(real_k, place_k, length), axis=1, keepdims=True)
        end = jnp.where(place_q > earliest, place_q, end)
    pattern = AllPairs(
        jnp.zeros_like(place_q),
        jnp.where(real_q, end, 0),
        jnp.where(real_k, place_k, -1),
        block=_row_block(window, window),
    )

    def over_heads(function: Callable[..., Array]) -> Callable[..., Array]:
        return jax.vmap(jax.vmap(function))

    def cut(*arrays: Array) -> tuple[Array, ...]:
        gather = over_heads(lambda x, place: x.at[place].get(mode="fill", fill_value=0))
        places = (taken_q, taken_k, taken_k)
        return tuple(gather(x, place).reshape(rows, window, 1, -1) for x, place in zip(arrays, places))

    def join(out: Array) -> Array:
        nothing = jnp.zeros((batch, heads, length, out.shape[-1]), out.dtype)
        scatter = over_heads(lambda total, place, x: total.at[place].add(x, mode="drop"))
        return scatter(nothing, taken_q, out.reshape(*taken_q.shape, -1))

    return _Rows(pattern, cut, join, jnp.moveaxis(join(jnp.ones((rows, window, 1)))[..., 0], 1, 2).astype(jnp.int32))


def _pallas_tpu(
    query: Array,
    key: Array,
    value: Array,
    similarity: tuple[Array, Array],
    cluster: tuple[Array, Array],
    key_mask: Array | None,
    *,
    membership: str,
    scale: Any,
    epsilon: float,
    operands: Any,
    **options: Any,
) -> tuple[Array, Array]:
    """Banded flash attention: "strict" over sorted keys, its lists of tiles computed with the clusters; "global" within
    each cluster, with positions as coordinates."""
    from kernels_pallas.tpu.banded_flash import banded_flash_attention
    from kernels_pallas.tpu.banded_flash_backward import banded_flash_gradients

    def prepare(routes: Any) -> tuple[_Rows, Callable[..., Any], Callable[..., Any]]:
        rows = _strict_rows(*routes, **options) if membership == "strict" else _global_rows(*routes, **options)

        def cut(arrays: Any) -> Any:
            return rows.cut(*(jnp.moveaxis(x.astype(operands), 2, 1) for x in arrays))

        def join(out: Array) -> Array:
            return jnp.moveaxis(rows.join(out[:, :, 0].astype(query.dtype)), 1, 2)

        return rows, cut, join

    def kernel(arrays: Any, routes: Any, keep: bool) -> tuple[Any, Any]:
        *tokens, scale = arrays
        rows, cut, join = prepare(routes)
        out, lse = banded_flash_attention(*cut(tokens), pattern=rows.pattern, scale=scale)
        # Kept with the batch in front again, by which a call is spread over devices.
        return (join(out), rows.times_taken), tuple(x.reshape(arrays[0].shape[0], -1, *x.shape[1:]) for x in (out, lse))

    def gradients(arrays: Any, routes: Any, kept: Any, cotangents: Any) -> Any:
        *tokens, scale = arrays
        rows, cut, join = prepare(routes)
        kept = [x.reshape(-1, *x.shape[2:]) for x in kept]
        parts, back = jax.vjp(cut, tokens)
        (to_out,) = jax.linear_transpose(join, kept[0])(cotangents[0])
        differentiate: Any = functools.partial(banded_flash_gradients, pattern=rows.pattern, scale=scale)
        *to_parts, to_scale = differentiate(*parts, *kept, to_out, jnp.zeros_like(kept[1]))
        return (*back(tuple(to_parts))[0], to_scale)

    def blocked(arrays: Any, routes: Any) -> Any:
        *tokens, scale = arrays
        run: Any = functools.partial(_xla, membership=membership, scale=scale, epsilon=epsilon, operands=operands)
        out, count = run(*tokens, *routes, **options)
        return (out if membership == "strict" else out * (count + epsilon)[..., None].astype(out.dtype)), count

    arrays = (query, key, value, jnp.asarray(scale, jnp.float32))
    out, count = kernel_call(kernel, gradients, blocked, arrays, (similarity, cluster, key_mask))
    if membership == "global":
        out = out / (count + epsilon)[..., None].astype(out.dtype)
    return out, count


def _pallas_tpu_refusal(
    query: Array,
    key: Array,
    value: Array,
    similarity: Any,
    cluster: Any,
    key_mask: Any,
    *,
    membership: str,
    num_clusters: int,
    window: int,
    is_causal: bool,
    self_is_last: bool,
    operands: Any,
    **_: Any,
) -> str | None:
    from kernels_pallas import patterns
    from kernels_pallas.tpu import banded_flash, banded_flash_backward

    if self_is_last and not is_causal:
        return "serves share_qk where it is causal: else a token's own key lies among those that it sees"
    batch, length, heads, _head_dim = query.shape
    is_strict = membership == "strict"
    tokens = length if is_strict else window
    block = _row_block(tokens, window)
    rows = batch * heads * (1 if is_strict else num_clusters)
    numbers = jax.ShapeDtypeStruct((rows, tokens), jnp.int32)
    pattern: Any = (
        patterns.SortedIntervals(numbers, numbers, length, reach=window, block=block)
        if is_strict
        else patterns.AllPairs(numbers, numbers, numbers, block=block)
    )
    arrays = [jax.ShapeDtypeStruct((rows, tokens, 1, x.shape[-1]), operands) for x in (query, key, value)]
    reasons = (module.refusal(*arrays, pattern=pattern) for module in (banded_flash, banded_flash_backward))
    return next(filter(None, reasons), None)


IMPLEMENTATIONS: dict[str, Callable[..., Any] | Kernel] = {
    "reference": _reference,
    "xla": _xla,
    "pallas_tpu": Kernel(_pallas_tpu, _pallas_tpu_refusal),
}


# --- Decoding ---------------------------------------------------------------------------------------------------------


class RoutingCache(NamedTuple):
    """The last `window` keys and values of every cluster, rings that are written at counts mod window.

    key: [B, N, c, window, H], as the logits take them, and value: [B, N, c, window, V]. counts: int32 [B, N, c], keys
    that each cluster has had.
    """

    key: Array
    value: Array
    counts: Array


def init_routing_cache(
    batch: int,
    num_heads: int,
    num_clusters: int,
    head_dim: int,
    *,
    window: int,
    value_dim: int | None = None,
    dtype: Any = jnp.float32,
) -> RoutingCache:
    """The cache before the first token. num_heads: the query's. It holds N c window (H + V) numbers a sequence."""
    shape = (batch, num_heads, num_clusters, window)
    return RoutingCache(
        jnp.zeros((*shape, head_dim), dtype),
        jnp.zeros((*shape, head_dim if value_dim is None else value_dim), dtype),
        jnp.zeros(shape[:-1], jnp.int32),
    )


def routing_step(
    cache: RoutingCache,
    query: Array,
    key: Array,
    value: Array,
    state: RoutingState,
    *,
    normalize: Normalize = "unit",
    share_qk: bool = False,
    scale: float | None = None,
) -> tuple[Array, RoutingCache]:
    """One more token of routing_attention(..., membership="strict", is_causal=True), in O(c H + window (H + V)) a head.

    Args:
      cache: from init_routing_cache, whose window is the call's, or an earlier step.
      query, key, value: [B, 1, N, H], [B, 1, K, H], [B, 1, K, V]. The rest as in routing_attention.

    Returns:
      ([B, 1, N, V] in query's dtype, the cache after this token).
    """
    check_query_key_value(query, key, value)
    require(query.shape[1] == 1, "query", shape_text(query), "need one token, [B, 1, N, H]")
    _check_state("state", state, *query.shape[2:])
    _check_options("strict", normalize)
    batch, _, heads, head_dim = query.shape
    clusters, window = state.centroids.shape[1], cache.key.shape[3]
    check_array("cache.key", cache.key, (batch, heads, clusters, None, head_dim), "[B, N, c, window, H]")
    check_array("cache.value", cache.value, (batch, heads, clusters, window, value.shape[-1]), "[B, N, c, window, V]")
    dtype = accumulator_dtype(query, key, value)
    tokens_q, tokens_k, heads_q, heads_k = (x[:, 0] for x in _normalized(query, key, normalize, share_qk))
    centroids = state.centroids.astype(dtype)
    cluster_q, cluster_k = (
        jnp.argmax(jnp.einsum("BNH,NcH->BNc", tokens, centroids), axis=-1) for tokens in (tokens_q, tokens_k)
    )
    factor = _scale(scale, normalize, head_dim)
    wide_value = jnp.repeat(value[:, 0], heads // value.shape[2], axis=1)

    def head(query: Array, key: Array, value: Array, in_q: Array, in_k: Array, cache: RoutingCache) -> Any:
        place = cache.counts[in_k] % window
        cache = RoutingCache(
            cache.key.at[in_k, place].set(key.astype(cache.key.dtype)),
            cache.value.at[in_k, place].set(value.astype(cache.value.dtype)),
            cache.counts.at[in_k].add(1),
        )
        visible = jnp.arange(window) < cache.counts[in_q]
        if share_qk and normalize == "unit":
            visible &= (jnp.arange(window) != place) | (cache.counts[in_q] == 1) | (window == 1)
        logits = factor * cache.key[in_q].astype(dtype) @ query
        numerators, denominator, _ = softmax_parts(logits, visible)
        return numerators @ cache.value[in_q].astype(dtype) / denominator, cache

    step = jax.vmap(jax.vmap(head))
    out, cache = step(heads_q, heads_k, wide_value, cluster_q, cluster_k, cache)
    return out[:, None].astype(query.dtype), cache


# --- Checks -----------------------------------------------------------------------------------------------------------


def _check_state(name: str, state: Any, heads: int, head_dim: int) -> None:
    if not isinstance(state, RoutingState):
        raise TypeError(f"{name}: got {type(state).__name__}; need a RoutingState")
    check_array(f"{name}.centroids", state.centroids, (heads, None, head_dim), "[heads, clusters, head_dim]")
    clusters = state.centroids.shape[1]
    require(clusters >= 1, f"{name}.centroids", shape_text(state.centroids), "need at least one cluster")
    check_array(f"{name}.counts", state.counts, (heads, clusters), "[heads, clusters]")
    check_array(f"{name}.sums", state.sums, (heads, clusters, head_dim), "[heads, clusters, head_dim]")


def _check_options(membership: Any, normalize: Any) -> None:
    require(membership in ("strict", "global"), "membership", repr(membership), 'need "strict" or "global"')
    require(normalize in ("unit", "layer"), "normalize", repr(normalize), 'need "unit" or "layer"')
