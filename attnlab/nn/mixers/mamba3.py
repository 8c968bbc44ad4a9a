"""Mamba-3: a state that is written by the trapezoid rule and turns, from linear attention."""

import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

import attnlab.attention as attention
from attnlab.attention import LinearState
from attnlab.attention._shared.checks import check_bool
from attnlab.attention._shared.chunks import segment_starts
from attnlab.attention._shared.heads import repeat_key_heads
from attnlab.nn.layers import Linear, RMSNorm, along
from attnlab.nn.mixers.base import Attention, flat
from attnlab.nn.mixers.linear import gate_bias, softplus_decay
from attnlab.nn.parameters import normal, ones, parameter, zeros

Array = jax.Array


class Gates(NamedTuple):
    """Of each token and head, in float32. step, log_decay, trapezoid: [B, T, N]. angle: [B, T, N, P], by which the
    first P pairs of channels turn at the token."""

    step: Array
    log_decay: Array
    trapezoid: Array
    angle: Array


class Mamba3Cache(NamedTuple):
    """After a token: the state, its turned key [B, N, H] and value [B, N, V], and the angles so far [B, N, P]."""

    state: LinearState
    key: Array
    value: Array
    angle: Array


class Mamba3Attention(Attention):
    """A state whose writes the trapezoid rule takes from two tokens, with keys that turn (Lahoti et al. 2026).

        S_t = e^{g_t} (S_{t-1} + (1 - lambda_t) D_t k_{t-1} v_{t-1}^T) + lambda_t D_t k_t v_t^T        o_t = q_t^T S_t

    with D = softplus(w x + b), g = -exp(a) D, lambda = sigmoid(w' x), and queries and keys turned, pair of channels by
    pair, by the sum of the angles D W x so far: the real form of a state of complex numbers. Queries and keys are
    normalised and get learned biases, which stand in for the convolution of Mamba-2. A learned multiple of the token's
    value is added, and the heads' outputs are RMS-normalised. Causal.

    Args:
      output_gate: multiply the heads' outputs by silu(W x).
    """

    def __init__(
        self,
        features: int,
        *,
        normalize_qk: bool = True,
        output_gate: bool = True,
        rotary: bool = False,
        **shared: Any,
    ):
        super().__init__(features, normalize_qk=normalize_qk, rotary=rotary, **shared)
        if not self.is_causal:
            raise ValueError("is_causal: got False; Mamba3Attention takes tokens in their order")
        if self.head_dim % 2:
            raise ValueError(f"head_dim: got {self.head_dim}; must be even, as pairs of channels turn")
        output_gate = check_bool("output_gate", output_gate)
        heads = self.num_heads
        self.query_bias = parameter((heads, self.head_dim), ones)
        self.key_bias = parameter((heads, self.head_dim), ones)
        self.step_size = Linear(features, heads, initializer=normal(0.02))
        self.step_bias = parameter((heads,), gate_bias)
        self.log_rate = parameter((heads,), zeros)
        self.trapezoid = Linear(features, heads, initializer=normal(0.02))
        self.angle = Linear(features, (heads, self.head_dim // 2))
        self.skip = parameter((heads,), ones)
        self.output_norm = RMSNorm(self.value_dim)
        self.output_gate = Linear(features, (heads, self.value_dim), dtype=self.dtype) if output_gate else None

    def _gates(self, x: Array) -> Gates:
        x = x.astype(jnp.float32)
        step, log_decay = softplus_decay(self.step_size(x), self.step_bias[...], self.log_rate[...])
        return Gates(step, log_decay, jax.nn.sigmoid(self.trapezoid(x)), step[..., None] * self.angle(x))

    def _by_head(self, query: Array, key: Array, value: Array) -> tuple[Array, Array, Array]:
        """With their biases, [B, T, N, H|V]."""
        key, value = (repeat_key_heads(heads, self.num_heads) for heads in (key, value))
        query, key = (
            heads + along(bias[...].astype(heads.dtype), heads)
            for heads, bias in ((query, self.query_bias), (key, self.key_bias))
        )
        return query, key, value

    def _skipped(self, value: Array) -> Array:
        return along(self.skip[...][:, None], value).astype(value.dtype) * value

    def mix(self, query: Array, key: Array, value: Array, x: Array, segment_ids: Array | None) -> Array:
        heads = self._by_head(flat(query), flat(key), flat(value))
        gates = self._gates(x.reshape(x.shape[0], -1, x.shape[-1]))
        out, _ = trapezoid_attention(*heads, gates, segment_ids=segment_ids, implementation=self.implementation)
        return (out + self._skipped(heads[2])).reshape(*query.shape[:-1], value.shape[-1])

    def finish(self, out: Array, value: Array, x: Array) -> Array:
        out = self.output_norm(out)
        return out if self.output_gate is None else out * jax.nn.silu(self.output_gate(x))

    def init_mechanism_cache(self, batch: int, max_length: int) -> Mamba3Cache:
        dtype = jnp.promote_types(self.dtype, jnp.float32)
        state = attention.init_linear_cache(batch, self.num_heads, self.head_dim, self.value_dim, dtype=dtype)
        widths = (self.head_dim, self.value_dim, self.head_dim // 2)
        return Mamba3Cache(state, *(jnp.zeros((batch, self.num_heads, width), dtype) for width in widths))

    def mechanism_prefill(
        self, cache: Mamba3Cache, query: Array, key: Array, value: Array, x: Array, lengths: Array | None
    ) -> tuple[Array, Mamba3Cache]:
        heads = self._by_head(query, key, value)
        out, after = trapezoid_attention(*heads, self._gates(x), lengths=lengths, implementation=self.implementation)
        after = jax.tree.map(lambda new, old: new.astype(old.dtype), after, cache)
        return out + self._skipped(heads[2]), after

    def mechanism_step(
        self, cache: Mamba3Cache, query: Array, key: Array, value: Array, x: Array
    ) -> tuple[Array, Mamba3Cache]:
        heads = self._by_head(query, key, value)
        out, cache = trapezoid_step(cache, *heads, self._gates(x))
        return out + self._skipped(heads[2]), cache

    def mechanism_flops(self, space: tuple[int, ...]) -> int:
        # A token writes k v^T into the state and reads q^T S from it; its own pair is taken apart.
        pair = self.head_dim + self.value_dim
        return math.prod(space) * self.num_heads * (4 * self.head_dim * self.value_dim + 2 * pair)


def trapezoid_attention(
    query: Array,
    key: Array,
    value: Array,
    gates: Gates,
    *,
    lengths: Array | None = None,
    segment_ids: Array | None = None,
    implementation: str | None = None,
) -> tuple[Array, Mamba3Cache]:
    """The recurrence of Mamba3Attention from an empty state, as one linear attention.

    With A_t the state after token t and what token t + 1 adds of token t,

        A_t = e^{g_t} A_{t-1} + (lambda_t D_t + (1 - lambda_{t+1}) D_{t+1}) k_t v_t^T
        o_t = (e^{g_t} q_t)^T A_{t-1} + lambda_t D_t (q_t . k_t) v_t

    so the query of token t + 1 goes beside the key of token t. (The same from q_t^T A_t, less what t + 1 adds, has
    later tokens in the rounding of earlier outputs.)

    query, key: [B, T, N, H]; value: [B, T, N, V]; lengths [B] and segment_ids [B, T] as in linear_attention.
    -> ([B, T, N, V] in value's dtype, the cache after the last token).
    """
    batch, length = query.shape[:2]
    angle = jnp.cumsum(gates.angle, axis=1)
    query, key = turned(query, angle), turned(key, angle)
    own, of_last = gates.trapezoid * gates.step, (1 - gates.trapezoid) * gates.step
    ends = jnp.full((batch,), length) if lengths is None else lengths
    follows = jnp.arange(1, length + 1)[None] < ends[:, None]
    starts = jnp.zeros((batch, length), bool) if segment_ids is None else segment_starts(segment_ids)
    follows = follows & ~_next(starts)
    weight = own + jnp.where(follows[..., None], _next(of_last), 0)
    out, state = attention.linear_attention(
        _next(jnp.exp(gates.log_decay)[..., None].astype(query.dtype) * query),
        key,
        weight[..., None].astype(value.dtype) * value,
        log_decay=gates.log_decay,
        scale=1.0,
        return_state=True,
        lengths=lengths,
        segment_ids=segment_ids,
        implementation=implementation,
    )
    out = jnp.pad(out, ((0, 0), (1, 0), (0, 0), (0, 0)))[:, :-1]
    out = jnp.where(starts[..., None, None], 0, out)
    last = jnp.maximum(ends - 1, 0)

    def at_last(x: Array) -> Array:
        of_row = jnp.take_along_axis(x, last.reshape(batch, *(1,) * (x.ndim - 1)), axis=1)[:, 0]
        return jnp.where((ends > 0).reshape(batch, *(1,) * (x.ndim - 2)), of_row, 0)

    return out + _own(query, key, value, own), Mamba3Cache(state, *map(at_last, (key, value, _within_a_turn(angle))))


def trapezoid_step(
    cache: Mamba3Cache, query: Array, key: Array, value: Array, gates: Gates
) -> tuple[Array, Mamba3Cache]:
    """One more token, [B, 1, N, H|V]: the state takes what is left of the last one, then a step of linear attention."""
    angle = cache.angle + gates.angle[:, 0]
    query, key = (turned(heads, angle[:, None]) for heads in (query, key))
    of_last = ((1 - gates.trapezoid) * gates.step)[:, 0, :, None, None]
    state = LinearState(cache.state.kv + of_last * cache.key[..., None] * cache.value[..., None, :])
    own = (gates.trapezoid * gates.step)[..., None].astype(value.dtype) * value
    out, state = attention.linear_step(state, query, key, own, log_decay=gates.log_decay, scale=1.0)
    key, value = key[:, 0].astype(cache.key.dtype), value[:, 0].astype(cache.value.dtype)
    return out, Mamba3Cache(state, key, value, _within_a_turn(angle))


def turned(heads: Array, angle: Array) -> Array:
    """[B, T, N, H] whose pairs of channels (2i, 2i + 1), i < P, are turned by the angles [B, T, N, P]."""
    wide = heads.astype(jnp.promote_types(heads.dtype, jnp.float32))
    pairs, rest = wide[..., : 2 * angle.shape[-1]], wide[..., 2 * angle.shape[-1] :]
    even, odd, cos, sin = pairs[..., 0::2], pairs[..., 1::2], jnp.cos(angle), jnp.sin(angle)
    pairs = jnp.stack([even * cos - odd * sin, even * sin + odd * cos], axis=-1).reshape(pairs.shape)
    return jnp.concatenate([pairs, rest], axis=-1).astype(heads.dtype)


def _within_a_turn(angle: Array) -> Array:
    """Less whole turns: a sum that grew would lose digits."""
    return angle - 2 * math.pi * jnp.round(angle / (2 * math.pi))


def _next(x: Array) -> Array:
    """[B, T, ...]: of the token after each, zeros of the last."""
    return jnp.pad(x[:, 1:], ((0, 0), (0, 1), *((0, 0),) * (x.ndim - 2)))


def _own(query: Array, key: Array, value: Array, own: Array) -> Array:
    """What a token reads of itself."""
    product = jnp.sum(query.astype(own.dtype) * key.astype(own.dtype), axis=-1)
    return ((own * product)[..., None] * value).astype(value.dtype)
