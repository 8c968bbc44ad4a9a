"""Centroids of heads: spherical k-means of tokens, fitted to data and moved along in training.

With x a token's query or key, normalised, and mu_c the centroids of its head, token i is in argmax_c x_i . mu_c.

    "unit"    x / |x|, as in lucidrains' routing-transformer
    "layer"   layer norm without gain or bias (1e-6), as in Google's Routing Transformer
"""

import functools
from typing import Any, Literal, NamedTuple

import einops
import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from attnlab.attention._dispatch.exchange import given_positions
from attnlab.attention._dispatch.primitive import primitive
from attnlab.attention._shared.checks import (
    accumulator_dtype,
    check_array,
    check_float,
    check_floating,
    check_int,
    check_sizes,
    check_type,
    require,
    shape_text,
)

Array = jax.Array
Normalize = Literal["unit", "layer"]

_SMOOTHING = 1e-5


class RoutingState(NamedTuple):
    """The centroids of N heads, in float32 (float64 for float64 inputs), and the sums behind them.

    centroids: [N, c, H]. counts: [N, c], tokens per batch, and sums: [N, c, H], their sum per batch, both as
    exponential moving averages; rule "ema" of update_routing alone needs them.
    """

    centroids: Array
    counts: Array
    sums: Array


class RoutingStatistics(NamedTuple):
    """What update_routing needs of a batch; those of several batches add up. counts: [N, c]; sums: [N, c, H]."""

    counts: Array
    sums: Array


def init_routing(rng: Array, num_heads: int, num_clusters: int, head_dim: int) -> RoutingState:
    """Random centroids of unit length, which count as one token each. Better ones come from data: fit_routing."""
    num_heads, num_clusters, head_dim = check_sizes(num_heads=num_heads, num_clusters=num_clusters, head_dim=head_dim)
    if not hasattr(rng, "dtype") or not (
        jnp.issubdtype(rng.dtype, jax.dtypes.prng_key) or (rng.dtype == jnp.uint32 and rng.ndim)
    ):
        raise TypeError(f"rng: got {rng!r}; need a key, as jax.random.key gives it")
    centroids = unit(jax.random.normal(rng, (num_heads, num_clusters, head_dim)))
    return RoutingState(centroids, jnp.ones((num_heads, num_clusters)), centroids)


@primitive("...", "..", "...")
def fit_routing(
    tokens: Array, state: RoutingState, iterations: int = 10, *, normalize: Normalize = "unit"
) -> RoutingState:
    """Centroids from data: k-means of tokens [B, T, N, H], started from tokens at equal distances.

    tokens: queries, or queries and keys one after the other, as routing_attention gets them; for the cold start of a
      model, its first batch's. normalize: as in routing_attention (the queries' H^-1/2 does not matter here).
    state: gives the number of centroids; one that no token is nearest to stays what it was.
    """
    check_state("state", state, None, None)
    heads, _, head_dim = state.centroids.shape
    check_array("tokens", tokens, (None, None, heads, head_dim), "[batch, length, heads, head_dim] of the state")
    check_floating("tokens", tokens)
    require(0 not in tokens.shape, "tokens", shape_text(tokens), "need at least one token")
    iterations = check_int("iterations", iterations, least=1)
    check_normalize(normalize)
    dtype = accumulator_dtype(tokens)
    normalized = unit(tokens) if normalize == "unit" else layer_norm(tokens.astype(dtype))
    normalized = lax.stop_gradient(normalized).astype(dtype)
    clusters, over = state.centroids.shape[1], given_positions()

    def total(x: Array) -> Array:
        """The sum over devices, where these have parts of the positions."""
        return x if over is None else lax.psum(x, over[0])

    # Batch and positions stay axes apart, and sums are products: XLA then adds up parts of either.
    def iterate(centroids: Array, _: None) -> tuple[Array, Array]:
        cluster = jnp.argmax(jnp.einsum("BTNH,NcH->BTNc", normalized, centroids), axis=-1)
        members = jax.nn.one_hot(cluster, clusters, dtype=dtype)
        counts = total(jnp.sum(members, axis=(0, 1)))
        means = total(jnp.einsum("BTNc,BTNH->NcH", members, normalized)) / jnp.maximum(counts, 1)[..., None]
        means = unit(means) if normalize == "unit" else means
        return jnp.where(counts[..., None] > 0, means, centroids), counts

    number, parts = (0, 1) if over is None else (lax.axis_index(over[0]), lax.axis_size(over[0]))
    batch, length = tokens.shape[0], tokens.shape[1] * parts
    at = jnp.arange(clusters) * (batch * length) // clusters
    row, part, position = at // length, at % length // tokens.shape[1], at % tokens.shape[1]
    seeds = total(jnp.where((part == number)[:, None, None], normalized[row, position], 0))
    centroids, counts = lax.scan(iterate, jnp.moveaxis(seeds, 0, 1), None, length=iterations)
    count = jnp.maximum(counts[-1], 1)
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
    axis_name: mapped axes (shard_map, pmap, vmap) over which the statistics are added up first: of the batch alone, as
      over positions that devices share (positions_over) they are sums already.
    """
    require(rule in ("ema", "unit"), "rule", repr(rule), 'need "ema" or "unit"')
    check_state("state", state, None, None)
    check_type("stats", stats, RoutingStatistics, "routing_attention")
    if not isinstance(decay, (jax.Array, np.ndarray)):
        decay = check_float("decay", decay)
        require(0 <= decay <= 1, "decay", repr(decay), "need a number from 0 to 1")
    check_array("stats.counts", stats.counts, state.counts.shape, "[heads, clusters]")
    check_array("stats.sums", stats.sums, state.sums.shape, "[heads, clusters, head_dim]")
    if axis_name is not None:
        stats = lax.psum(stats, axis_name)
    if rule == "unit":
        moved = decay * state.centroids + (1 - decay) * unit(stats.sums)
        return state._replace(centroids=jnp.where(stats.counts[..., None] > 0, moved, state.centroids))
    count = decay * state.counts + (1 - decay) * stats.counts
    total = decay * state.sums + (1 - decay) * stats.sums
    everything = jnp.sum(count, axis=-1, keepdims=True)
    smoothed = (count + _SMOOTHING) / (everything + count.shape[-1] * _SMOOTHING) * everything
    return RoutingState(total / smoothed[..., None], count, total)


def unit(x: Array) -> Array:
    """x / |x| over the last axis, and 0 for 0, with finite gradients."""
    wide = x.astype(accumulator_dtype(x))
    # Divided by the largest first, so that squares neither overflow nor vanish.
    largest = lax.stop_gradient(jnp.max(jnp.abs(wide), axis=-1, keepdims=True))
    wide = wide / jnp.where(largest > 0, largest, 1)
    square = jnp.sum(wide * wide, axis=-1, keepdims=True)
    return wide / jnp.sqrt(jnp.where(square > 0, square, 1))


def layer_norm(x: Array) -> Array:
    centred = x - jnp.mean(x, axis=-1, keepdims=True)
    return centred * lax.rsqrt(jnp.mean(centred * centred, axis=-1, keepdims=True) + 1e-6)


def squared_distance(tokens: Array, cluster: Array, state: RoutingState, key_mask: Array | None) -> Array:
    """[N]: of tokens [B, T, N, H] and their centroids, summed over real tokens and channels."""
    heads = jnp.arange(tokens.shape[2])
    square = (tokens - state.centroids[heads, cluster]) ** 2
    if key_mask is not None:
        square = jnp.where(key_mask[:, :, None, None], square, 0)
    return jnp.sum(square, axis=(0, 1, 3))


def statistics_of(tokens: Array, cluster: Array, state: RoutingState, key_mask: Array | None) -> RoutingStatistics:
    clusters = state.centroids.shape[1]
    tokens = einops.rearrange(lax.stop_gradient(tokens), "B T N H -> N (B T) H")
    if key_mask is not None:  # padding goes to a cluster of its own, which _sums drops
        cluster = jnp.where(key_mask[..., None], cluster, clusters)
    return _sums(tokens, einops.rearrange(cluster, "B T N -> N (B T)"), clusters)


def _sums(tokens: Array, cluster: Array, clusters: int) -> RoutingStatistics:
    """Counts and sums of tokens [N, S, H] by cluster [N, S]; clusters out of range are dropped."""

    def head(tokens: Array, cluster: Array) -> RoutingStatistics:
        add = functools.partial(jax.ops.segment_sum, segment_ids=cluster, num_segments=clusters)
        return RoutingStatistics(add(jnp.ones_like(tokens[:, 0])), add(tokens))

    return jax.vmap(head)(tokens, cluster)


def check_state(name: str, state: Any, heads: int | None, head_dim: int | None) -> None:
    """heads, head_dim: None for any."""
    check_type(name, state, RoutingState, "init_routing")
    check_array(f"{name}.centroids", state.centroids, (heads, None, head_dim), "[heads, clusters, head_dim]")
    heads, clusters, head_dim = state.centroids.shape
    require(clusters >= 1, f"{name}.centroids", shape_text(state.centroids), "need at least one cluster")
    check_array(f"{name}.counts", state.counts, (heads, clusters), "[heads, clusters]")
    check_array(f"{name}.sums", state.sums, (heads, clusters, head_dim), "[heads, clusters, head_dim]")


def check_normalize(normalize: Any) -> None:
    require(normalize in ("unit", "layer"), "normalize", repr(normalize), 'need "unit" or "layer"')
