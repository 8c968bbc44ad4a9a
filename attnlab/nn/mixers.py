"""Mixers: layers that move information between places, [B, *space, D] -> [B, *space, D].

Every mixer is projections to query, key and value, a mechanism of attnlab.attention between the heads, and a projection
back. A mechanism is one subclass of Attention: what it computes, what it keeps to decode, and what that costs.
"""

import inspect
import math
from abc import abstractmethod
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from einops import rearrange
from flax import nnx

import attnlab.attention as attention
from attnlab.attention import masks
from attnlab.attention._checks import per_axis
from attnlab.nn.layers import Linear, RMSNorm, grid_positions, rotary_embedding
from attnlab.nn.parameters import normal, parameter, zeros

Array = jax.Array


class MixerCache(NamedTuple):
    """What a mixer keeps between decoding steps: the next token's position, int32 [], and the mechanism's own cache."""

    position: Array
    mechanism: Any


class Attention(nnx.Module):
    """The part that all mixers share; a subclass is a mechanism.

    Args:
      features: D, the width in and out.
      is_causal: whether a place may only see itself and those before it.
      num_heads, num_key_heads: N query heads and K key heads (default N); N must be a multiple of K.
      head_dim: H (default D / N).
      rotary: rotate queries and keys by position (each space axis turns its own share of H).
      normalize_qk: RMS-normalise queries and keys over H, with learned gains.
      implementation: passed to the primitive; None picks by platform.
      dtype: what is computed in (parameters stay float32).
    """

    def __init__(
        self,
        features: int,
        *,
        is_causal: bool,
        num_heads: int = 4,
        num_key_heads: int | None = None,
        head_dim: int | None = None,
        rotary: bool = True,
        normalize_qk: bool = False,
        implementation: str | None = None,
        dtype: Any = jnp.float32,
    ):
        if head_dim is None and features % num_heads:
            raise ValueError(f"num_heads: got {num_heads}; must divide features {features}, or give head_dim")
        num_key_heads = num_heads if num_key_heads is None else num_key_heads
        if num_heads % num_key_heads:
            raise ValueError(f"num_key_heads: got {num_key_heads}; must divide num_heads {num_heads}")
        self.features, self.is_causal, self.dtype = features, is_causal, dtype
        self.num_heads, self.num_key_heads = num_heads, num_key_heads
        self.head_dim = features // num_heads if head_dim is None else head_dim
        self.rotary, self.implementation = rotary, implementation
        self.query = Linear(features, (num_heads, self.head_dim), dtype=dtype)
        self.key = Linear(features, (num_key_heads, self.head_dim), dtype=dtype)
        self.value = Linear(features, (num_key_heads, self.head_dim), dtype=dtype)
        self.output = Linear((num_heads, self.head_dim), features, dtype=dtype)
        self.query_norm = RMSNorm(self.head_dim) if normalize_qk else None
        self.key_norm = RMSNorm(self.head_dim) if normalize_qk else None

    def __init_subclass__(cls, **kwargs: Any) -> None:
        """Shows a mechanism's own options and the shared ones in one signature, for help and for configs."""
        super().__init_subclass__(**kwargs)
        own = inspect.signature(cls.__init__).parameters
        shared = inspect.signature(super(cls, cls).__init__).parameters
        named = [option for option in own.values() if option.kind is not option.VAR_KEYWORD]
        named += [option for option in shared.values() if option.name not in own]
        cls.__init__.__signature__ = inspect.Signature(named)  # type: ignore[attr-defined]

    @abstractmethod
    def mix(self, query: Array, key: Array, value: Array, x: Array, segment_ids: Array | None) -> Array:
        """Heads [B, *space, N|K, H] -> [B, *space, N, V]; linear in value, of any width V. x: the input, for gates."""

    @abstractmethod
    def init_mechanism_cache(self, batch: int, max_length: int) -> Any:
        """What the mechanism keeps to decode up to max_length tokens."""

    @abstractmethod
    def mechanism_step(self, cache: Any, query: Array, key: Array, value: Array, x: Array) -> tuple[Array, Any]:
        """One token [B, 1, N|K, H] -> (out [B, 1, N, H], cache)."""

    @abstractmethod
    def mechanism_flops(self, space: tuple[int, ...]) -> int:
        """Floating-point operations (2 a multiply-add) between the heads, for one example, forward."""

    @abstractmethod
    def state_size(self, length: int) -> int:
        """Numbers kept per example to decode the token after `length` tokens."""

    def _project(self, x: Array, positions: Array) -> tuple[Array, Array, Array]:
        query, key, value = self.query(x), self.key(x), self.value(x)
        if self.query_norm is not None and self.key_norm is not None:
            query, key = self.query_norm(query), self.key_norm(key)
        if self.rotary:
            axes = positions.shape[-1]
            if self.head_dim % (2 * axes):
                raise ValueError(
                    f"head_dim: got {self.head_dim}; rotary positions on {axes} axes need a multiple of {2 * axes}"
                )
            query, key = rotary_embedding(query, positions), rotary_embedding(key, positions)
        return query, key, value

    def __call__(self, x: Array, *, segment_ids: Array | None = None) -> Array:
        """x [B, *space, D] -> [B, *space, D]. segment_ids: int [B, T], packed sequences that do not see each other."""
        query, key, value = self._project(x, grid_positions(x.shape[1:-1]))
        return self.output(self.normalize_output(self.mix(query, key, value, x, segment_ids)))

    def normalize_output(self, out: Array) -> Array:
        """Between the mechanism and the projection back: nothing, unless a mechanism needs it."""
        return out

    def attention_weights(self, x: Array) -> Array:
        """What each query takes of each value: x [B, *space, D] -> [B, N, T, S], places in raster order.

        Read off the mechanism itself, which is linear in the values, by giving key s the s-th unit vector as its value.
        """
        query, key, _ = self._project(x, grid_positions(x.shape[1:-1]))
        places = math.prod(x.shape[1:-1])
        unit = jnp.eye(places, dtype=self.dtype).reshape(1, *x.shape[1:-1], 1, places)
        weights = self.mix(query, key, jnp.broadcast_to(unit, (*key.shape[:-1], places)), x, None)
        return rearrange(_flat(weights), "B T N S -> B N T S")

    def init_cache(self, batch: int, max_length: int) -> MixerCache:
        if not self.is_causal:
            raise ValueError(f"{type(self).__name__}: only a causal mixer decodes; this one has is_causal=False")
        return MixerCache(jnp.zeros((), jnp.int32), self.init_mechanism_cache(batch, max_length))

    def step(self, cache: MixerCache, x: Array) -> tuple[Array, MixerCache]:
        """The next token x [B, 1, D] -> (y [B, 1, D], cache). Equals the call on the whole sequence at that place."""
        query, key, value = self._project(x, cache.position[None, None])
        out, mechanism = self.mechanism_step(cache.mechanism, query, key, value, x)
        return self.output(self.normalize_output(out)), MixerCache(cache.position + 1, mechanism)

    def flops(self, space: tuple[int, ...]) -> int:
        """Floating-point operations of matrix products (2 a multiply-add) for one example of this space, forward."""
        heads = 2 * self.num_heads + 2 * self.num_key_heads  # query, output; key, value
        return 2 * math.prod(space) * self.features * heads * self.head_dim + self.mechanism_flops(space)

    def _pair_flops(self, pairs: int) -> int:
        """Scores and weighted values for this many (query, key) pairs in every head."""
        return 4 * pairs * self.num_heads * self.head_dim


# A mixer as models take it: a class above with its options bound, called as mixer(features, is_causal=..., dtype=...).
MixerFactory = Callable[..., Attention]


def _flat(heads: Array) -> Array:
    """[B, *space, N, H] -> [B, T, N, H] in raster order."""
    return heads.reshape(heads.shape[0], -1, *heads.shape[-2:])


class SoftmaxAttention(Attention):
    """Every place sees every other (or every earlier one): attention.dot_product_attention."""

    def mix(self, query: Array, key: Array, value: Array, x: Array, segment_ids: Array | None) -> Array:
        out = attention.dot_product_attention(
            _flat(query),
            _flat(key),
            _flat(value),
            is_causal=self.is_causal,
            segment_ids=segment_ids,
            implementation=self.implementation,
        )
        return out.reshape(*query.shape[:-1], value.shape[-1])

    def init_mechanism_cache(self, batch: int, max_length: int) -> Any:
        return attention.init_dot_product_cache(batch, max_length, self.num_key_heads, self.head_dim, dtype=self.dtype)

    def mechanism_step(self, cache: Any, query: Array, key: Array, value: Array, x: Array) -> tuple[Array, Any]:
        return attention.dot_product_step(cache, query, key, value)

    def mechanism_flops(self, space: tuple[int, ...]) -> int:
        length = math.prod(space)
        return self._pair_flops(length * (length + 1) // 2 if self.is_causal else length * length)

    def state_size(self, length: int) -> int:
        return 2 * length * self.num_key_heads * self.head_dim


class LocalAttention(Attention):
    """Every place sees the `window` places around it (or up to it, if causal), per axis: attention.local_attention.

    A window longer than an axis is cut to it, so that one config serves short inputs too.
    """

    def __init__(
        self,
        features: int,
        *,
        window: int | tuple[int, ...],
        stride: int | tuple[int, ...] = 1,
        edge: masks.Edge = "shift",
        sinks: int = 0,
        **shared: Any,
    ):
        super().__init__(features, **shared)
        self.window, self.stride, self.edge, self.sinks = window, stride, edge, sinks

    def _dilation(self, space: tuple[int, ...]) -> tuple[int, ...]:
        return (1,) * len(space)

    def _window(self, space: tuple[int, ...]) -> tuple[int, ...]:
        return tuple(min(pair) for pair in zip(per_axis("window", self.window, len(space)), space))

    def mix(self, query: Array, key: Array, value: Array, x: Array, segment_ids: Array | None) -> Array:
        return attention.local_attention(
            query,
            key,
            value,
            window=self._window(x.shape[1:-1]),
            stride=self.stride,
            is_causal=self.is_causal,
            edge=self.edge,
            sinks=self.sinks,
            segment_ids=segment_ids,
            implementation=self.implementation,
        )

    def init_mechanism_cache(self, batch: int, max_length: int) -> Any:
        (window,) = per_axis("window", self.window, 1)
        self._check_decodes()
        return attention.init_local_cache(
            batch, self.num_key_heads, self.head_dim, window=window, sinks=self.sinks, dtype=self.dtype
        )

    def _check_decodes(self) -> None:
        if per_axis("stride", self.stride, 1) > (1,) and self.edge == "shift":
            raise ValueError(
                'edge: got "shift" with a stride; the last window would depend on where the sequence ends, so decoding '
                'needs edge="clip"'
            )

    def mechanism_step(self, cache: Any, query: Array, key: Array, value: Array, x: Array) -> tuple[Array, Any]:
        (window,), (stride,) = per_axis("window", self.window, 1), per_axis("stride", self.stride, 1)
        return attention.local_step(cache, query, key, value, window=window, sinks=self.sinks, stride=stride)

    def mechanism_flops(self, space: tuple[int, ...]) -> int:
        rank = len(space)
        axes = masks.axis_windows(
            space,
            window=self._window(space),
            stride=per_axis("stride", self.stride, rank),
            dilation=self._dilation(space),
            is_causal=(self.is_causal,) * rank,
            edge=self.edge,
        )
        bounds = [axis.bounds(np.arange(axis.length)) for axis in axes]
        seen = (np.sum(-(-(end - start) // axis.dilation)) for axis, (start, end) in zip(axes, bounds))
        pairs = math.prod(map(int, seen))
        if self.sinks:
            pairs += int(np.sum(np.minimum(bounds[0][0], self.sinks)))
        return self._pair_flops(pairs)

    def state_size(self, length: int) -> int:
        return 2 * min(length, per_axis("window", self.window, 1)[0] + self.sinks) * self.num_key_heads * self.head_dim


class DilatedAttention(LocalAttention):
    """Every place sees a window of every `dilation`-th place: attention.dilated_attention.

    Where the dilated window is longer than an axis, the dilation is lowered until it fits, then the window.
    """

    def __init__(self, features: int, *, dilation: int | tuple[int, ...], **local: Any):
        super().__init__(features, **local)
        if self.sinks:
            raise ValueError(f"sinks: got {self.sinks}; dilated attention has none")
        self.dilation = dilation

    def _dilation(self, space: tuple[int, ...]) -> tuple[int, ...]:
        dilation, window = per_axis("dilation", self.dilation, len(space)), self._window(space)
        return tuple(min(d, length // k) for d, k, length in zip(dilation, window, space))

    def mix(self, query: Array, key: Array, value: Array, x: Array, segment_ids: Array | None) -> Array:
        return attention.dilated_attention(
            query,
            key,
            value,
            window=self._window(x.shape[1:-1]),
            dilation=self._dilation(x.shape[1:-1]),
            stride=self.stride,
            is_causal=self.is_causal,
            edge=self.edge,
            segment_ids=segment_ids,
            implementation=self.implementation,
        )

    def init_mechanism_cache(self, batch: int, max_length: int) -> Any:
        (window,), (dilation,) = self._window((max_length,)), self._dilation((max_length,))
        self._check_decodes()
        return attention.init_dilated_cache(
            batch, self.num_key_heads, self.head_dim, window=window, dilation=dilation, dtype=self.dtype
        )

    def mechanism_step(self, cache: Any, query: Array, key: Array, value: Array, x: Array) -> tuple[Array, Any]:
        _, dilation, window = cache.key.shape[:3]
        (stride,) = per_axis("stride", self.stride, 1)
        return attention.dilated_step(cache, query, key, value, window=window, dilation=dilation, stride=stride)

    def state_size(self, length: int) -> int:
        (window,), (dilation,) = self._window((length,)), self._dilation((length,))
        return 2 * min(length, window * dilation) * self.num_key_heads * self.head_dim


class LinearAttention(Attention):
    """A running sum of key-value products, one state of fixed size: attention.linear_attention.

    Args:
      decay: how the state forgets: "none"; "retention", RetNet's constant per head; "data", a gate per token and head
        computed from x as in Mamba-2, log decay = -exp(a) softplus(w x + b).
      feature_map: of queries and keys, as in linear_attention; None is the identity.
      normalize: divide by the sum of the weights (needs a feature map that is positive). Without it the heads' outputs
        are RMS-normalised, as their size grows with length.
    """

    def __init__(
        self,
        features: int,
        *,
        decay: str = "none",
        feature_map: str | Callable[[Array], Array] | None = None,
        normalize: bool = False,
        rotary: bool = False,
        **shared: Any,
    ):
        super().__init__(features, rotary=rotary, **shared)
        if decay not in ("none", "retention", "data"):
            raise ValueError(f'decay: got {decay!r}; need "none", "retention" or "data"')
        if decay != "none" and not self.is_causal:
            raise ValueError(f'decay: got {decay!r} with is_causal=False; decay needs an order, so "none"')
        self.decay, self.feature_map, self.normalize = decay, feature_map, normalize
        self.output_norm = None if normalize else RMSNorm(self.head_dim)
        if decay == "data":
            self.gate = Linear(features, self.num_heads, initializer=normal(0.02))
            self.gate_bias = parameter((self.num_heads,), _gate_bias)
            self.log_rate = parameter((self.num_heads,), zeros)

    def _log_decay(self, x: Array) -> Array | None:
        if self.decay == "none":
            return None
        if self.decay == "retention":
            return attention.retention_log_decay(self.num_heads)
        return -jnp.exp(self.log_rate[...]) * jax.nn.softplus(self.gate(x) + self.gate_bias[...])

    def normalize_output(self, out: Array) -> Array:
        return out if self.output_norm is None else self.output_norm(out)

    def mix(self, query: Array, key: Array, value: Array, x: Array, segment_ids: Array | None) -> Array:
        out = attention.linear_attention(
            _flat(query),
            _flat(key),
            _flat(value),
            is_causal=self.is_causal,
            log_decay=self._log_decay(x),
            feature_map=self.feature_map,
            normalize=self.normalize,
            segment_ids=segment_ids,
            implementation=self.implementation,
        )
        return out.reshape(*query.shape[:-1], value.shape[-1])

    def init_mechanism_cache(self, batch: int, max_length: int) -> Any:
        return attention.init_linear_cache(
            batch, self.num_heads, self.head_dim, feature_map=self.feature_map, normalize=self.normalize
        )

    def mechanism_step(self, cache: Any, query: Array, key: Array, value: Array, x: Array) -> tuple[Array, Any]:
        return attention.linear_step(
            cache,
            query,
            key,
            value,
            log_decay=self._log_decay(x),
            feature_map=self.feature_map,
            normalize=self.normalize,
        )

    def mechanism_flops(self, space: tuple[int, ...]) -> int:
        # A token writes k v^T into the state and reads q^T S from it.
        kv = jax.eval_shape(lambda: self.init_mechanism_cache(1, 1).kv)
        return 4 * math.prod(space) * kv.size

    def state_size(self, length: int) -> int:
        return sum(leaf.size for leaf in jax.tree.leaves(jax.eval_shape(lambda: self.init_mechanism_cache(1, length))))


def _gate_bias(key: Array, shape: tuple[int, ...], dtype: Any) -> Array:
    """softplus^-1 of steps spread evenly in log over [0.001, 0.1], so that heads start with memories of 10 to 1000."""
    steps = jnp.exp(jax.random.uniform(key, shape, dtype, math.log(1e-3), math.log(1e-1)))
    return steps + jnp.log(-jnp.expm1(-steps))
