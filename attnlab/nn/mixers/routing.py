"""Attention inside clusters of tokens."""

import math
from typing import Any, Literal, get_args

import jax
import jax.numpy as jnp

import attnlab.attention as attention
from attnlab.attention._shared.checks import check_choice, check_float, check_int
from attnlab.attention.centroids import Normalize
from attnlab.attention.routing import Membership
from attnlab.nn.mixers.base import Attention, flat
from attnlab.nn.parameters import auxiliary_loss, buffer, normal, ones, zeros

Array = jax.Array


class RoutingAttention(Attention):
    """A token attends to tokens of its own k-means cluster: attention.routing_attention.

    The centroids are buffers: k-means of the first training batch, then an average over batches. A window longer than
    the input is cut to it.

    Args:
      clusters: centroids per head.
      window: keys that a query sees at most; the published models have clusters * window = length.
      membership: "strict", or the published "global", which is not causal (and does not decode).
      normalize: "unit" or "layer", with the update of centroids that was published with it.
      decay: of the centroids' average over batches.
      commitment: weight of the tokens' squared distance to their centroids, added to the loss.
      local_heads, local_window: this many of the heads attend to a sliding window instead, as in the published models.
    """

    segments_refusal = "routes the tokens of all documents to the same clusters, so packed ones cannot be kept apart"

    def __init__(
        self,
        features: int,
        *,
        clusters: int,
        window: int,
        membership: Membership = "strict",
        normalize: Normalize = "unit",
        decay: float = 0.999,
        commitment: float = 1e-4,
        local_heads: int = 0,
        local_window: int = 64,
        **shared: Any,
    ):
        super().__init__(features, **shared)
        local_heads = check_int("local_heads", local_heads)
        if not 0 <= local_heads < self.num_heads:
            raise ValueError(f"local_heads: got {local_heads}; need 0 to {self.num_heads - 1}, fewer than num_heads")
        if local_heads and self.num_key_heads != self.num_heads:
            raise ValueError(f"local_heads: got {local_heads}; needs as many key heads as heads, {self.num_heads}")
        clusters, self.window = check_int("clusters", clusters, least=1), check_int("window", window, least=1)
        self.clusters = clusters
        self.membership: Any = check_choice("membership", membership, get_args(Membership))
        self.normalize: Any = check_choice("normalize", normalize, get_args(Normalize))
        self.decay = check_float("decay", decay, least=0, most=1)
        self.commitment = check_float("commitment", commitment, least=0)
        self.local_heads, self.local_window = local_heads, check_int("local_window", local_window, least=1)
        routed = self.num_heads - local_heads
        self.centroids = buffer((routed, clusters, self.head_dim), normal(self.head_dim**-0.5))
        self.counts = buffer((routed, clusters), ones)
        self.sums = buffer((routed, clusters, self.head_dim), zeros)
        self.batches = buffer((), zeros)
        self.commitment_loss = auxiliary_loss()

    def _state(self) -> attention.RoutingState:
        return attention.RoutingState(self.centroids[...], self.counts[...], self.sums[...])

    def _attend(
        self, query: Array, key: Array, value: Array, state: attention.RoutingState
    ) -> tuple[Array, attention.RoutingAux]:
        space = query.shape[1:-2]
        query, key, value = flat(query), flat(key), flat(value)
        split, length = self.local_heads, query.shape[1]
        out, aux = attention.routing_attention(
            query[:, :, split:],
            key[:, :, split:],
            value[:, :, split:],
            state,
            window=min(self.window, length),
            is_causal=self.is_causal,
            membership=self.membership,
            normalize=self.normalize,
            implementation=self.implementation,
        )
        if split:
            near = attention.local_attention(
                *(heads[:, :, :split] for heads in (query, key, value)),
                window=min(self.local_window, length),
                is_causal=self.is_causal,
                implementation=self.implementation,
            )
            out = jnp.concatenate([near, out], axis=2)
        return out.reshape(out.shape[0], *space, *out.shape[2:]), aux

    def mix(self, query: Array, key: Array, value: Array, x: Array, segment_ids: Array | None) -> Array:
        return self._attend(query, key, value, self._state())[0]

    def mix_and_learn(self, query: Array, key: Array, value: Array, x: Array, segment_ids: Array | None) -> Array:
        if axes := jax.sharding.get_abstract_mesh().manual_axes:
            raise ValueError(
                f"is_training: got True over the manual axes {', '.join(map(str, axes))}; in jax.shard_map centroids "
                "would learn from a device's own tokens: train under jax.jit with a sharded batch, or call "
                "attnlab.update_routing(..., axis_name=...)"
            )

        def fitted(state: attention.RoutingState) -> attention.RoutingState:
            keys = jnp.repeat(flat(key), self.num_heads // self.num_key_heads, axis=2)
            both = jnp.concatenate([flat(query), keys], axis=1)[:, :, self.local_heads :]
            return attention.fit_routing(jax.lax.stop_gradient(both), state, normalize=self.normalize)

        state = jax.lax.cond(self.batches[...] == 0, fitted, lambda state: state, self._state())
        out, aux = self._attend(query, key, value, state)
        rule: Literal["ema", "unit"] = "ema" if self.normalize == "layer" else "unit"
        state = attention.update_routing(state, aux.statistics, decay=self.decay, rule=rule)
        self.centroids.set_value(state.centroids)
        self.counts.set_value(state.counts)
        self.sums.set_value(state.sums)
        self.batches.set_value(self.batches[...] + 1)
        self.commitment_loss.set_value(self.commitment * aux.loss.astype(jnp.float32))
        return out

    @property
    def decoding_refusal(self) -> str:
        if self.is_causal and self.membership != "strict":
            return f'membership: got {self.membership!r}; only "strict" decodes'
        return super().decoding_refusal

    def init_mechanism_cache(self, batch: int, max_length: int) -> Any:
        split, window = self.local_heads, min(self.window, max_length)
        widths = {"value_dim": self.value_dim, "dtype": self.dtype}
        routed = attention.init_routing_cache(
            batch, self.num_heads - split, self.clusters, self.head_dim, window=window, **widths
        )
        if not split:
            return routed, None
        near = min(self.local_window, max_length)
        return routed, attention.init_local_cache(batch, split, self.head_dim, window=near, **widths)

    def mechanism_capacity(self, cache: Any) -> int | None:
        routed, near = cache
        cut = [routed.key.shape[3]] if routed.key.shape[3] < self.window else []
        if near is not None and near.key.shape[1] < self.local_window:
            cut.append(near.key.shape[1])
        return min(cut, default=None)

    def mechanism_prefill(
        self, cache: Any, query: Array, key: Array, value: Array, x: Array, lengths: Array | None
    ) -> tuple[Array, Any]:
        routed, near = cache
        split, state = self.local_heads, self._state()
        routed = attention.prefill_routing_cache(
            routed,
            query[:, :, split:],
            key[:, :, split:],
            value[:, :, split:],
            state,
            normalize=self.normalize,
            lengths=lengths,
        )
        if split:
            window = near.key.shape[1]
            near = attention.prefill_local_cache(
                near, key[:, :, :split], value[:, :, :split], window=window, lengths=lengths
            )
        return self._attend(query, key, value, state)[0], (routed, near)

    def mechanism_step(self, cache: Any, query: Array, key: Array, value: Array, x: Array) -> tuple[Array, Any]:
        routed, near = cache
        split = self.local_heads
        out, routed = attention.routing_step(
            routed,
            query[:, :, split:],
            key[:, :, split:],
            value[:, :, split:],
            self._state(),
            normalize=self.normalize,
        )
        if split:
            window = near.key.shape[1]
            close, near = attention.local_step(
                near, query[:, :, :split], key[:, :, :split], value[:, :, :split], window=window
            )
            out = jnp.concatenate([close, out], axis=2)
        return out, (routed, near)

    def mechanism_flops(self, space: tuple[int, ...]) -> int:
        length = math.prod(space)
        routed, window = self.num_heads - self.local_heads, min(self.window, length)
        # Queries and keys are compared with the centroids; each query sees at most `window` keys.
        compare = 4 * length * routed * self.clusters * self.head_dim
        queries = length if self.membership == "strict" else self.clusters * window
        near = length * min(self.local_window, length) * self.local_heads
        return compare + 2 * (queries * window * routed + near) * (self.head_dim + self.value_dim)
