"""Which tokens a token of a cluster sees: ranges of sorted keys, and the members that centroids take."""

from typing import NamedTuple

import jax
import jax.numpy as jnp

Array = jax.Array


class Ranges(NamedTuple):
    """Keys sorted by (cluster, position): order_k int32 [T], and rank_k, each key's rank among them. Query t sees the
    ranks first[t] <= rank < end[t]; both grow along order_q, the queries sorted alike."""

    order_k: Array
    rank_k: Array
    order_q: Array
    first: Array
    end: Array


def strict_ranges(
    cluster_q: Array, cluster_k: Array, key_mask: Array | None, *, num_clusters: int, window: int, is_causal: bool
) -> Ranges:
    """Of one head: clusters [T], key_mask bool [T]."""
    length = cluster_q.shape[0]
    position = jnp.arange(length)
    if key_mask is not None:  # padding makes up a last cluster, which is not looked at
        cluster_q, cluster_k = (jnp.where(key_mask, x, num_clusters) for x in (cluster_q, cluster_k))

    order_k = jnp.argsort(cluster_k, stable=True)
    rank_k = jnp.zeros(length, jnp.int32).at[order_k].set(position.astype(jnp.int32))
    start_of = jnp.searchsorted(cluster_k[order_k], jnp.arange(num_clusters + 2)).astype(jnp.int32)
    first, end = start_of[cluster_q], start_of[cluster_q + 1]
    now = _first_after(order_k.astype(jnp.int32), position.astype(jnp.int32), first, end)
    if is_causal:
        end = now
        first = jnp.maximum(first, now - window)
    else:
        first = jnp.maximum(first, now - (window - window // 2))
        end = jnp.minimum(end, now + window // 2)
    if key_mask is not None:
        end = jnp.where(key_mask, end, first)
    return Ranges(order_k, rank_k, jnp.argsort(cluster_q, stable=True), first, end)


def _first_after(numbers: Array, limit: Array, first: Array, end: Array) -> Array:
    """For each query the first index of first <= i < end with numbers[i] > limit, numbers growing there; end if none.

    By halves, within the query's range: numbering (cluster, position) pairs to search all at once would overflow.
    """

    def halve(_: int, bounds: tuple[Array, Array]) -> tuple[Array, Array]:
        low, high = bounds
        middle = low + (high - low) // 2
        is_after = (numbers[middle] > limit) | (low >= high)
        return jnp.where(is_after, low, middle + 1), jnp.where(is_after & (low < high), middle, high)

    return jax.lax.fori_loop(0, numbers.shape[0].bit_length(), halve, (first, end))[0]


def members_of_both(
    similarity: tuple[Array, Array], key_mask: Array | None, window: int, share_qk: bool
) -> tuple[Array, Array]:
    """Positions [B, N, c, w] of the queries and of the keys that each centroid takes; T, which no token has, for
    padding. similarity: [B, N, c, T], twice."""
    length = similarity[0].shape[3]

    def members(similarity: Array) -> Array:
        if key_mask is not None:
            similarity = jnp.where(key_mask[:, None, None], similarity, -jnp.inf)
        found, index = jax.lax.top_k(similarity, window)
        return jnp.where(found == -jnp.inf, length, index)

    taken_q = members(similarity[0])
    return taken_q, taken_q if share_qk else members(similarity[1])


def taken_once(query: Array, key_mask: Array | None) -> Array:
    # Made like query: inside shard_map it then varies over the mesh axes that query varies over.
    ones = jnp.ones_like(query, shape=query.shape[:3], dtype=jnp.int32)
    return ones if key_mask is None else ones * key_mask[..., None]
