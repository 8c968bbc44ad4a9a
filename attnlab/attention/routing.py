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
import numpy as np
from jax import lax

from attnlab.attention._cached import newest
from attnlab.attention._dispatch.choice import Implementations, dispatch
from attnlab.attention._dispatch.exchange import Parts, as_one, over_positions, swapped, whole_space
from attnlab.attention._dispatch.primitive import primitive
from attnlab.attention._kernels import routing as kernels
from attnlab.attention._shared.checks import (
    accumulator_dtype,
    check_array,
    check_bool,
    check_dtype,
    check_int,
    check_key_mask,
    check_lengths,
    check_query_key_value,
    check_sizes,
    check_step,
    check_type,
    default_scale,
    require,
)
from attnlab.attention._shared.clusters import members_of_both, strict_ranges, taken_once
from attnlab.attention._shared.finite import finite_or_zero, is_spoilt, spoil, spoil_if_any
from attnlab.attention._shared.heads import repeat_key_heads
from attnlab.attention._shared.softmax import scaled_for_logits, softmax_parts
from attnlab.attention.centroids import (
    Normalize,
    RoutingState,
    RoutingStatistics,
    check_normalize,
    check_state,
    layer_norm,
    squared_distance,
    statistics_of,
    unit,
)

Array = jax.Array
Membership = Literal["strict", "global"]

_COUNT_EPSILON = {"unit": 1e-5, "layer": 1e-2}
# Logits that "xla" holds at once, per head.
_STRICT_AT_ONCE, _GLOBAL_AT_ONCE = 2**15, 2**16


class RoutingAux(NamedTuple):
    """What routing returns besides the output.

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


@primitive("B*N.", "", "..", "...", "B*N", "B*N", "B*N")
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
      implementation: None, "reference", "xla", "pallas_tpu" (bfloat16 or float32) or "pallas_gpu" (bfloat16 or
        float16), both with share_qk only where causal.

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
    (whole_length,) = whole_space([length])
    check_state("state", state, heads, head_dim)
    require(membership in ("strict", "global"), "membership", repr(membership), 'need "strict" or "global"')
    check_normalize(normalize)
    is_causal, share_qk = check_bool("is_causal", is_causal), check_bool("share_qk", share_qk)
    window = check_int("window", window, least=1)
    require(window <= whole_length, "window", window, f"need 1 to the length, {whole_length}")
    if share_qk:
        check_array("key", key, query.shape, "query's shape, as share_qk=True")
    if key_mask is not None:
        check_key_mask(key_mask, (batch, length), "[batch, length]")

    def whole(
        query: Array, key: Array, value: Array, state: RoutingState, key_mask: Array | None
    ) -> tuple[Array, _Sums, Array, Array, Array]:
        if key_mask is not None:
            query, key, value = (jnp.where(key_mask[..., None, None], x, 0) for x in (query, key, value))
        heads, operands = query.shape[2], query.dtype
        spoilt = is_spoilt(query)
        of_keys = spoilt[..., None] if share_qk else repeat_key_heads(is_spoilt(key)[..., None], heads)
        of_keys = of_keys | repeat_key_heads(is_spoilt(value)[..., None], heads)
        query, key, value = map(finite_or_zero, (query, key, value))

        dtype = accumulator_dtype(query, key, value)
        state = jax.lax.stop_gradient(jax.tree.map(lambda leaf: leaf.astype(dtype), state))
        query_tokens, key_tokens, query_heads, key_heads = _normalized(query, key, normalize, share_qk)

        def similarity(tokens: Array) -> Array:
            return jnp.einsum("BTNH,NcH->BNcT", jax.lax.stop_gradient(tokens), state.centroids)

        similarity_q = similarity(query_tokens)
        similarity_k = similarity_q if share_qk else similarity(key_tokens)
        # Moved first: XLA of jax 0.12 otherwise gives argmax's two results different layouts, which it refuses.
        by_token = (jnp.moveaxis(x, 3, 1) for x in (similarity_q, similarity_k))
        cluster_q, cluster_k = (jnp.argmax(x, axis=3).astype(jnp.int32) for x in by_token)
        routed = [(query_tokens, cluster_q)] if share_qk else [(query_tokens, cluster_q), (key_tokens, cluster_k)]
        out, taken = dispatch(
            "routing_attention",
            IMPLEMENTATIONS,
            implementation,
            query_heads,
            key_heads,
            repeat_key_heads(value, heads).astype(dtype),
            (similarity_q, similarity_k),
            (cluster_q, cluster_k),
            key_mask,
            of_keys,
            num_clusters=state.centroids.shape[1],
            window=window,
            is_causal=is_causal,
            membership=membership,
            self_is_last=share_qk and normalize == "unit",
            share_qk=share_qk,
            epsilon=_COUNT_EPSILON[normalize],
            scale=_scale(scale, normalize, head_dim),
            operands=operands,
        )
        sums = [_sums(tokens, cluster, state, key_mask) for tokens, cluster in routed]
        added = jax.tree.map(lambda *leaves: functools.reduce(jnp.add, leaves)[None], *sums)
        return spoil(out, spoilt).astype(operands), added, cluster_q, cluster_k, taken

    of_state = RoutingState("N..", "N.", "N..")  # type: ignore[arg-type]
    of_sums = _Sums("BN", "BN", RoutingStatistics("BN.", "BN.."))  # type: ignore[arg-type]
    out, sums, cluster_q, cluster_k, taken = over_positions(
        whole,
        functools.partial(_parted, whole, share_qk),
        ("B*N.", "B*K.", "B*K.", of_state, "B*"),
        ("B*N.", of_sums, "B*N", "B*N", "B*N"),
        query,
        key,
        value,
        state,
        key_mask,
    )
    sums = jax.tree.map(lambda x: jnp.sum(x, axis=0), sums)
    # "layer" adds the means of queries and of keys, "unit" takes the mean over both; the sums are over both.
    loss = jnp.sum(sums.squares) / (head_dim * jnp.maximum(jnp.sum(sums.tokens), 1))
    loss = 2 * loss if normalize == "layer" else loss
    return out, RoutingAux(loss, sums.statistics, cluster_q, cluster_k, taken)


class _Sums(NamedTuple):
    """Over tokens of queries and, unless they are shared, of keys, by head.

    tokens: [N], how many are real. squares: [N], of the distances to their centroids. statistics: for update_routing.
    """

    tokens: Array
    squares: Array
    statistics: RoutingStatistics


def _sums(tokens: Array, cluster: Array, state: RoutingState, key_mask: Array | None) -> _Sums:
    squares = squared_distance(tokens, cluster, state, key_mask)
    real = cluster.shape[0] * cluster.shape[1] if key_mask is None else jnp.sum(key_mask, dtype=squares.dtype)
    return _Sums(jnp.zeros_like(squares) + real, squares, statistics_of(tokens, cluster, state, key_mask))


# --- Over devices -----------------------------------------------------------------------------------------------------


def _parted(
    whole: Callable[..., tuple[Array, _Sums, Array, Array, Array]],
    share_qk: bool,
    parts: Parts,
    query: Array,
    key: Array,
    value: Array,
    state: RoutingState,
    key_mask: Array | None,
) -> tuple[Array, _Sums, Array, Array, Array]:
    """Each device routes whole sequences of its share of the heads, which it gets for its part of all and gives back.

    What is shared are groups of query heads with the key head that they read. Where the devices do not divide their
    number, groups of zeros fill it up, and what is computed of these is dropped: a device has one head at least.
    """
    heads, groups = query.shape[2], _groups(query.shape[2], key.shape[2], parts.many)
    share, size = -(-groups // parts.many), heads // groups

    def filled(x: Array, axis: int, count: int) -> Array:
        return jnp.pad(x, [(0, count - length if a == axis else 0) for a, length in enumerate(x.shape)])

    def sent(*arrays: Array) -> list[Array]:
        """Of [B, part, groups, ...] those of this device, [B, T, share, ...], in one message if of one dtype."""
        if len({x.dtype for x in arrays}) > 1:
            return [sent(x)[0] for x in arrays]
        message = filled(jnp.concatenate(arrays, axis=-1), 2, share * parts.many)
        ends = np.cumsum([x.shape[-1] for x in arrays])[:-1]
        return jnp.split(swapped(message, parts, whole=1, split=2), ends, axis=-1)

    def returned(x: Array) -> Array:
        """Of this device's heads [B, T, ...] its part of all, [B, part, N, ...]."""
        return swapped(x, parts, whole=2, split=1)[:, :, :heads]

    def of_all(x: Array) -> Array:
        """Of this device's heads [1, ...] -> [1, N, ...], on every device."""
        every = jnp.zeros_like(x, shape=(1, own * parts.many, *x.shape[2:]))
        every = lax.dynamic_update_slice_in_dim(every, x, first, axis=1)
        return lax.psum(every, parts.names)[:, :heads]

    own = share * size
    first = own * parts.number()
    key_of, value_of = (repeat_key_heads(x, groups) for x in (key, value))
    query_of = query.reshape(*query.shape[:2], groups, -1)
    query_of, *keys, value_of = sent(query_of, value_of) if share_qk else sent(query_of, key_of, value_of)
    query_of = query_of.reshape(*query_of.shape[:2], own, query.shape[3])
    key_of = query_of.astype(key.dtype) if share_qk else keys[0]
    state = jax.tree.map(lambda x: lax.dynamic_slice_in_dim(filled(x, 0, own * parts.many), first, own, axis=0), state)
    if key_mask is not None:
        key_mask = lax.all_gather(key_mask, parts.names, axis=1, tiled=True)
    out, sums, *integers = whole(query_of, key_of, value_of, state, key_mask)
    cluster_q, cluster_k, taken = jnp.unstack(returned(jnp.stack(integers, axis=-1)), axis=-1)
    return returned(out), as_one(of_all, sums), cluster_q, cluster_k, taken


def _groups(heads: int, key_heads: int, parts: int) -> int:
    """Into how many groups with a key head each to cut the heads, so that devices have few: as many as key heads, or
    more where these are then repeated."""
    counts = [count for count in range(key_heads, heads + 1, key_heads) if heads % count == 0]
    return min(counts, key=lambda count: (-(-count // parts) * (heads // count), count))


def _normalized(query: Array, key: Array, normalize: str, share_qk: bool) -> tuple[Array, Array, Array, Array]:
    """Tokens to route by, of queries and keys, and what goes into the logits; all [B, T, N, H]."""
    dtype = accumulator_dtype(query, key)
    query = query.astype(dtype)
    key = repeat_key_heads(key, query.shape[2]).astype(dtype)
    if normalize == "unit":
        query_tokens = unit(query)
        return (query_tokens, query_tokens, query, query_tokens) if share_qk else (query_tokens, unit(key), query, key)
    query_tokens = layer_norm(query * query.shape[-1] ** -0.5)
    key_tokens = query_tokens if share_qk else layer_norm(key)
    return query_tokens, key_tokens, query_tokens, key_tokens


def _scale(scale: Any, normalize: str, head_dim: int) -> Any:
    return 1.0 if scale is None and normalize == "layer" else default_scale(scale, head_dim)


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
    logits = jnp.einsum("BTNH,BSNH->BNTS", *scaled_for_logits(query, key, scale, value.dtype))
    until = position[:, None] >= position[None]
    ordered = until if is_causal else jnp.ones_like(until)
    itself = position[:, None] == position[None]

    def attend(visible: Array) -> Array:
        """[B, N, T, S] -> [B, T, N, V]"""
        if self_is_last:
            visible = _others_if_any(visible, itself)
        numerators, denominator, _ = softmax_parts(logits, visible)
        return jnp.einsum("BNTS,BSNV->BTNV", numerators / denominator, value)

    if membership == "strict":
        cluster_q, cluster_k = (einops.rearrange(x, "B T N -> B N T") for x in cluster)
        both = real[:, None, :, None] & real[:, None, None, :]
        same = (cluster_q[..., None] == cluster_k[..., None, :]) & both
        up_to_now = jnp.sum(same & until, axis=-1, keepdims=True)
        number = jnp.cumsum(same, axis=-1)  # of this key among the keys of the query's cluster, from 1
        last = up_to_now if is_causal else up_to_now + window // 2
        first = up_to_now - (window if is_causal else window - window // 2)
        return attend(same & (first < number) & (number <= last)), taken_once(query, key_mask)

    taken_q, taken_k = (_taken(x, window, real) for x in similarity)  # [B, N, c, T]
    total = jnp.zeros_like(value)
    for centroid in range(num_clusters):
        visible = taken_q[:, :, centroid, :, None] & taken_k[:, :, centroid, None, :] & ordered
        total = total + attend(visible)
    count = einops.rearrange(jnp.sum(taken_q, axis=2), "B N T -> B T N")
    return total / (count + epsilon)[..., None].astype(value.dtype), count.astype(jnp.int32)


def _taken(similarity: Array, window: int, real: Array) -> Array:
    """bool [B, N, c, T]: the `window` tokens most similar to each centroid; of equals, the earlier."""
    order = jnp.argsort(-jnp.where(real[:, None, None], similarity, -jnp.inf), axis=-1)
    rank = jnp.argsort(order, axis=-1)
    return (rank < window) & real[:, None, None, :]


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
    share_qk: bool,
    epsilon: float,
    operands: Any,
    **options: Any,
) -> tuple[Array, Array]:
    if membership == "global":
        taken = members_of_both(similarity, key_mask, options["window"], share_qk)
        return _global_xla(query, key, value, *taken, epsilon=epsilon, **options)
    # The sorting is written for one head of one sequence at a time.
    one: Any = functools.partial(_strict_head, **options)
    over_heads = jax.vmap(one, in_axes=(1, 1, 1, 1, 1, None), out_axes=1)
    mask_axis = None if key_mask is None else 0
    out = jax.vmap(over_heads, in_axes=(0, 0, 0, 0, 0, mask_axis))(query, key, value, *cluster, key_mask)
    return out, taken_once(query, key_mask)


class _Blocks(NamedTuple):
    """Queries of a head by the tile of sorted keys that holds the last one each sees, in blocks of `tile` slots.

    query: int32 [blocks, tile], the query in a slot; T in an empty one. slot: int32 [T], each query's, counted through
    all blocks. tile: int32 [blocks], the tile of keys.
    """

    query: Array
    slot: Array
    tile: Array


def _block_queries(last_tile: Array, tiles: int, size: int) -> _Blocks:
    """last_tile: int [T], for each query. Every tile takes as many blocks of `size` slots as its queries fill."""
    length = last_tile.shape[0]
    order = jnp.argsort(last_tile, stable=True)
    counts = jnp.bincount(last_tile, length=tiles)
    taken = -(-counts // size)
    ends = jnp.cumsum(taken)
    in_tile = jnp.arange(length) - (jnp.cumsum(counts) - counts)[last_tile[order]]
    place = (ends - taken)[last_tile[order]] * size + in_tile
    slot = jnp.zeros(length, jnp.int32).at[order].set(place.astype(jnp.int32))
    blocks = length // size + tiles  # at most
    query = jnp.full(blocks * size, length, jnp.int32).at[slot].set(jnp.arange(length, dtype=jnp.int32))
    tile = jnp.minimum(jnp.searchsorted(ends, jnp.arange(blocks), side="right"), tiles - 1)
    return _Blocks(query.reshape(blocks, size), slot, tile)


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
    scale: Any,
) -> Array:
    """query [T, H], key [T, H], value [T, V], clusters [T] -> [T, V].

    Tiles of `size` sorted keys; a query goes to the tile that its last key is in, and sees that tile and the `back`
    tiles before it.
    """
    length = query.shape[0]
    size = max(16, min(256, -(-window // 2)))
    back = -(-(window - 1) // size)
    tiles = -(-length // size)
    ranges = strict_ranges(
        cluster_q, cluster_k, key_mask, num_clusters=num_clusters, window=window, is_causal=is_causal
    )
    blocks = _block_queries(jnp.maximum(ranges.end - 1, 0) // size, tiles, size)
    seen = (back + 1) * size

    def slots(x: Array) -> Array:
        """[T, ...] -> [blocks, tile, ...], 0 in empty slots."""
        return x.at[blocks.query].get(mode="fill", fill_value=0)

    keys, values = (jnp.pad(x[ranges.order_k], ((back * size, tiles * size - length), (0, 0))) for x in (key, value))

    @functools.partial(jax.checkpoint, prevent_cse=False)
    def attend(block: tuple[Array, ...]) -> Array:
        query, first, end, itself, number = block
        key, value = (lax.dynamic_slice_in_dim(x, number * size, seen) for x in (keys, values))
        rank = ((number - back) * size + jnp.arange(seen))[None]
        visible = (first[:, None] <= rank) & (rank < end[:, None])
        if self_is_last:
            visible = _others_if_any(visible, rank == itself[:, None])
        query, key = scaled_for_logits(query, key, scale, value.dtype)
        numerators, denominator, _ = softmax_parts(query @ key.T, visible)
        return (numerators @ value) / denominator

    at_once = max(1, _STRICT_AT_ONCE // (size * seen))
    of_queries = (slots(x) for x in (ranges.first, ranges.end, ranges.rank_k))
    inputs = (slots(query), *of_queries, blocks.tile)
    out = jax.lax.map(attend, inputs, batch_size=min(at_once, len(blocks.tile)))
    return out.reshape(-1, out.shape[-1])[blocks.slot]


def _others_if_any(visible: Array, itself: Array) -> Array:
    """visible [..., T, S] without a token itself, but where it sees no other."""
    others = jnp.any(visible & ~itself, axis=-1, keepdims=True)
    return visible & ~(itself & others)


def _global_xla(
    query: Array,
    key: Array,
    value: Array,
    taken_q: Array,
    taken_k: Array,
    *,
    num_clusters: int,
    window: int,
    is_causal: bool,
    self_is_last: bool,
    epsilon: float,
    scale: Any,
) -> tuple[Array, Array]:
    """taken_q, taken_k: int32 [B, N, c, w], the positions that each centroid takes; T for none."""
    length = query.shape[1]

    @functools.partial(jax.checkpoint, prevent_cse=False)
    def attend(cluster: tuple[Array, ...]) -> Array:
        query, key, value, position_q, position_k = cluster
        position_q, position_k = position_q[:, None], position_k[None]
        visible = (position_k < length) & (position_q < length)
        if is_causal:
            visible &= position_k <= position_q
        if self_is_last:
            visible = _others_if_any(visible, position_k == position_q)
        query, key = scaled_for_logits(query, key, scale, value.dtype)
        numerators, denominator, _ = softmax_parts(query @ key.T, visible)
        return (numerators @ value) / denominator

    def head(query: Array, key: Array, value: Array, taken_q: Array, taken_k: Array) -> tuple[Array, Array]:
        """[T, H], [T, H], [T, V], positions [c, w] -> sums over clusters [T, V], how many took the query [T]."""
        gathered = [
            x.at[positions].get(mode="fill", fill_value=0)
            for x, positions in ((query, taken_q), (key, taken_k), (value, taken_k))
        ]
        at_once = max(1, _GLOBAL_AT_ONCE // window**2)
        out = jax.lax.map(attend, (*gathered, taken_q, taken_k), batch_size=min(at_once, num_clusters))
        total = jnp.zeros_like(value).at[taken_q.ravel()].add(out.reshape(-1, value.shape[-1]), mode="drop")
        return total, jnp.zeros(length, jnp.int32).at[taken_q.ravel()].add(1, mode="drop")

    over_heads = jax.vmap(head, in_axes=(1, 1, 1, 0, 0), out_axes=1)
    total, count = jax.vmap(over_heads)(query, key, value, taken_q, taken_k)
    return total / (count + epsilon)[..., None].astype(value.dtype), count


def _spoiling(form: Callable[..., tuple[Array, Array]]) -> Callable[..., tuple[Array, Array]]:
    """The form with bool [B, T, N, 1] as one more array: tokens whose key or value makes NaN of what sees it."""

    @functools.wraps(form)
    def call(query: Array, key: Array, value: Array, *routes: Any, **options: Any) -> tuple[Array, Array]:
        *shared, spoilt = routes
        out, taken = form(query, key, value, *shared, **options)

        def seen() -> Array:
            tokens = spoilt.astype(value.dtype)
            return form(jnp.zeros_like(query), jnp.zeros_like(key), tokens, *shared, **options)[0][..., 0] > 0

        return spoil_if_any(out, spoilt, seen), taken

    return call


# All take query, key, value [B, T, N, ...], similarities [B, N, c, T], clusters, the mask and what is spoilt, and give
# (out, taken).
IMPLEMENTATIONS: Implementations = {
    "reference": _spoiling(_reference),
    "xla": _spoiling(_xla),
    **kernels.KERNELS,
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
    """The cache before the first token. num_heads: the query's. It holds N c window (H + V) numbers per sequence."""
    value_dim, dtype = head_dim if value_dim is None else value_dim, check_dtype("dtype", dtype)
    *shape, head_dim, value_dim = check_sizes(
        batch=batch,
        num_heads=num_heads,
        num_clusters=num_clusters,
        window=window,
        head_dim=head_dim,
        value_dim=value_dim,
    )
    return RoutingCache(
        jnp.zeros((*shape, head_dim), dtype),
        jnp.zeros((*shape, value_dim), dtype),
        jnp.zeros(shape[:-1], jnp.int32),
    )


@primitive(like="cache")
def prefill_routing_cache(
    cache: RoutingCache,
    query: Array,
    key: Array,
    value: Array,
    state: RoutingState,
    *,
    normalize: Normalize = "unit",
    share_qk: bool = False,
    lengths: Array | None = None,
) -> RoutingCache:
    """The cache after a prompt: what routing_step leaves of it, token by token.

    Args:
      cache: an empty one. query, key, value, state, normalize, share_qk: as in routing_attention(...,
        membership="strict", is_causal=True), which is attention over the prompt.
      lengths: integers [B], 0 to P: the row's tokens, padding after them. None: P in all rows.

    Complexity: O(P c H + P log P) per head.
    """
    check_query_key_value(query, key, value)
    share_qk = _check_cached(cache, query, value, state, normalize, share_qk)
    batch, length, heads, _ = query.shape
    clusters, window = cache.counts.shape[2], cache.key.shape[3]
    lengths = check_lengths(lengths, batch)
    _, tokens, _, keys = _normalized(query, key, normalize, share_qk)
    cluster = _nearest(tokens, state, "BTNH,NcH->BTNc")
    if lengths is not None:  # padding makes up a last cluster
        cluster = jnp.where(jnp.arange(length)[None, :, None] < lengths[:, None, None], cluster, clusters)

    def head(key: Array, value: Array, cluster: Array) -> RoutingCache:
        """[T, H], [T, V], [T] -> [c, window, H], [c, window, V], [c]."""
        order = jnp.argsort(cluster, stable=True)
        start = jnp.searchsorted(cluster[order], jnp.arange(clusters + 1)).astype(jnp.int32)
        counts = start[1:] - start[:-1]
        number = newest(counts[:, None], window)
        token = order[start[:-1, None] + jnp.maximum(number, 0)]
        key, value = (jnp.where(number[..., None] < 0, 0, x[token]) for x in (key, value))
        return RoutingCache(key.astype(cache.key.dtype), value.astype(cache.value.dtype), counts)

    over_heads = jax.vmap(head, in_axes=1)
    return jax.vmap(over_heads)(keys, repeat_key_heads(value, heads), cluster)


def _check_cached(
    cache: RoutingCache, query: Array, value: Array, state: RoutingState, normalize: Any, share_qk: Any
) -> bool:
    """Gives share_qk."""
    check_state("state", state, *query.shape[2:])
    check_normalize(normalize)
    check_type("cache", cache, RoutingCache, "init_routing_cache")
    batch, _, heads, head_dim = query.shape
    shape = batch, heads, state.centroids.shape[1]
    check_array("cache.key", cache.key, (*shape, None, head_dim), "[B, N, c, window, H]")
    check_array("cache.value", cache.value, (*shape, cache.key.shape[3], value.shape[-1]), "[B, N, c, window, V]")
    return check_bool("share_qk", share_qk)


def _nearest(tokens: Array, state: RoutingState, product: str) -> Array:
    """The most similar centroid of each token."""
    return jnp.argmax(jnp.einsum(product, tokens, state.centroids.astype(tokens.dtype)), axis=-1)


@primitive("B*N.", like="cache")
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
    implementation: str | None = None,
) -> tuple[Array, RoutingCache]:
    """One more token of routing_attention(..., membership="strict", is_causal=True).

    Args:
      cache: from init_routing_cache, whose window is the call's, or an earlier step.
      query, key, value: [B, 1, N, H], [B, 1, K, H], [B, 1, K, V]. The rest as in routing_attention.
      implementation: "xla", "pallas_tpu" or None.

    Returns:
      ([B, 1, N, V] in query's dtype, the cache after this token).

    Complexity: O(c H + window (H + V)) per head.
    """
    check_step(query, key, value)
    share_qk = _check_cached(cache, query, value, state, normalize, share_qk)
    heads, window = query.shape[2], cache.key.shape[3]
    dtype = accumulator_dtype(query, key, value)
    tokens_q, tokens_k, heads_q, heads_k = (x[:, 0] for x in _normalized(query, key, normalize, share_qk))
    cluster_q, cluster_k = (_nearest(tokens, state, "BNH,NcH->BNc") for tokens in (tokens_q, tokens_k))
    factor = _scale(scale, normalize, query.shape[-1])
    wide_value = repeat_key_heads(value[:, 0], heads)

    def put(key: Array, value: Array, cluster: Array, cache: RoutingCache) -> RoutingCache:
        """A head's token in its ring."""
        slot = cache.counts[cluster] % window
        return RoutingCache(
            cache.key.at[cluster, slot].set(key.astype(cache.key.dtype)),
            cache.value.at[cluster, slot].set(value.astype(cache.value.dtype)),
            cache.counts.at[cluster].add(1),
        )

    before, cache = cache, jax.vmap(jax.vmap(put))(heads_k, wide_value, cluster_k, cache)
    of_ring = functools.partial(jnp.take_along_axis, indices=cluster_q[..., None], axis=2)
    counts, hidden = of_ring(cache.counts)[..., 0], jnp.full_like(cluster_q, -1)
    if share_qk and normalize == "unit" and window > 1:  # the token is in the ring that it reads, and sees itself last
        hidden = jnp.where(counts == 1, -1, of_ring(before.counts)[..., 0] % window)
    arrays = (factor * heads_q.astype(dtype), cache.key, cache.value, cluster_q, jnp.minimum(counts, window), hidden)
    out = dispatch("routing_step", STEP_IMPLEMENTATIONS, implementation, *arrays)
    return out[:, None].astype(query.dtype), cache


def _step_xla(query: Array, key: Array, value: Array, cluster: Array, used: Array, hidden: Array) -> Array:
    """[B, N, V]: of the scaled query [B, N, H] over a ring of each head's cache, of its first `used` slots without the
    hidden one."""

    def head(query: Array, key: Array, value: Array, cluster: Array, used: Array, hidden: Array) -> Array:
        slot = jnp.arange(key.shape[1])
        keys, values = (jnp.where((slot < used)[:, None], x[cluster], 0).astype(query.dtype) for x in (key, value))
        numerators, denominator, _ = softmax_parts(keys @ query, (slot < used) & (slot != hidden))
        return numerators @ values / denominator

    return jax.vmap(jax.vmap(head))(query, key, value, cluster, used, hidden)


STEP_IMPLEMENTATIONS: Implementations = {"xla": _step_xla, **kernels.STEP_KERNELS}
