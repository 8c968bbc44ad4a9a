"""States of fixed size: linear attention with its gates, and InLine attention for images."""

import functools
import math
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from einops import rearrange

import attnlab.attention as attention
from attnlab.attention._shared.checks import check_bool, check_choice, check_float, check_int, require
from attnlab.attention._shared.feature_maps import feature_width
from attnlab.nn.layers import Linear, RMSNorm, along, depthwise_convolution, unit_length
from attnlab.nn.mixers.base import Attention, Pattern, flat
from attnlab.nn.parameters import normal, ones, parameter, zeros

Array = jax.Array

_DECAYS = ("none", "retention", "data", "channel", "softplus_channel")
_OUTPUT_GATES = {"silu": jax.nn.silu, "sigmoid": jax.nn.sigmoid}
# Of the two matrices that compute a decay per channel, and what its logarithm is divided by (Yang et al. 2023).
_GATE_RANK, _GATE_DIVISOR = 16, 16.0


class LinearAttention(Attention):
    """A running sum of key-value products, one state of fixed size: attention.linear_attention.

    Args:
      decay: how the state forgets: "none"; "retention", RetNet's constant per head; "data", a gate per token and head
        computed from x as in Mamba-2, log decay = -exp(a) softplus(w x + b); "channel", one per token, head and channel
        of the key as in GLA, log decay = logsigmoid(W W' x + b) / 16; "softplus_channel", the same as in Kimi Delta
        Attention, log decay = -exp(a) softplus(W W' x + b), W' of head_dim rows and a per head.
      beta: with a number, the delta rule, of strength beta * sigmoid(w x) per token and head, and queries and keys of
        unit length: 1 is DeltaNet's, 2 lets the state's transition have negative eigenvalues. None: no delta rule.
      writes: with a number R, each token corrects the state R times, by keys, values and strengths of its own, and
        then reads it (DeltaProduct). The decay comes before the first. Needs beta.
      feature_map: of queries and keys, as in linear_attention; None is the identity.
      normalize: divide by the sum of the weights (needs a feature map that is positive). Without it the heads' outputs
        are RMS-normalised, as their size grows with length.
      normalizer_floor: with a number, divide by the sum of the weights or this, whichever is larger, and multiply by a
        learned number per head, as L2ViT does (with 100 and "relu"). Not causal.
      output_gate: multiply the heads' outputs by silu(W x), or with "sigmoid" by sigmoid(W x).
    """

    def __init__(
        self,
        features: int,
        *,
        decay: str = "none",
        beta: float | None = None,
        writes: int = 1,
        feature_map: str | Callable[[Array], Array] | None = None,
        normalize: bool = False,
        normalizer_floor: float | None = None,
        output_gate: bool | str = False,
        rotary: bool = False,
        **shared: Any,
    ):
        super().__init__(features, rotary=rotary, **shared)
        check_choice("decay", decay, _DECAYS)
        beta = None if beta is None else check_float("beta", beta, above=0)
        normalize, writes = check_bool("normalize", normalize), check_int("writes", writes, least=1)
        if isinstance(output_gate, str):
            check_choice("output_gate", output_gate, tuple(_OUTPUT_GATES))
            gate_kind, output_gate = output_gate, True
        else:
            gate_kind, output_gate = "silu", check_bool("output_gate", output_gate)
        if not callable(feature_map):
            feature_width(feature_map, 1)  # refuses what is no name of one
        if feature_map == "taylor2":  # whose state has the square of it
            check_int("head_dim", self.head_dim, most=4096)
        if normalizer_floor is not None:
            normalizer_floor = check_float("normalizer_floor", normalizer_floor, above=0)
        for name, given in (("decay", None if decay == "none" else decay), ("beta", beta)):
            if given is not None and not self.is_causal:
                raise ValueError(f"{name}: got {given!r} with is_causal=False, which has no order of tokens")
        if normalizer_floor is not None and (normalize or self.is_causal):
            raise ValueError(f"normalizer_floor: got {normalizer_floor}; needs normalize=False and is_causal=False")
        if writes > 1:
            require(
                beta is not None, "writes", writes, "needs beta: without the delta rule several are one of their sum"
            )
            taken = self.residual_convolution is not None
            require(not taken, "residual_convolution", "some", "must be 0 with writes > 1, which have several values")
            self.num_key_heads *= writes  # of the first write, then of the second, and so on
            self.key = Linear(features, (self.num_key_heads, self.head_dim), dtype=self.dtype)
            self.value = Linear(features, (self.num_key_heads, self.value_dim), dtype=self.dtype)
            width = shared.get("convolution", 0)
            self.key_convolution = self._convolution(width, self.num_key_heads * self.head_dim)
            self.value_convolution = self._convolution(width, self.num_key_heads * self.value_dim)
        self.decay, self.beta, self.feature_map, self.writes = decay, beta, feature_map, writes
        self.normalize, self.normalizer_floor = normalize, normalizer_floor
        self.output_norm = None if normalize or normalizer_floor is not None else RMSNorm(self.value_dim)
        if normalizer_floor is not None:
            self.temperature = parameter((self.num_heads,), ones)
        self.output_gate = Linear(features, (self.num_heads, self.value_dim), dtype=self.dtype) if output_gate else None
        self.gate_function = _OUTPUT_GATES[gate_kind]
        strengths = self.num_heads if writes == 1 else (writes, self.num_heads)
        self.strength = None if beta is None else Linear(features, strengths, initializer=normal(0.02))
        if decay == "data":
            self.gate = Linear(features, self.num_heads, initializer=normal(0.02))
            self.gate_bias = parameter((self.num_heads,), gate_bias)
            self.log_rate = parameter((self.num_heads,), zeros)
        if decay == "channel":
            self.gate_down = Linear(features, _GATE_RANK)
            self.gate = Linear(_GATE_RANK, (self.num_heads, self.head_dim), use_bias=True)
        if decay == "softplus_channel":
            self.gate_down = Linear(features, self.head_dim)
            self.gate = Linear(self.head_dim, (self.num_heads, self.head_dim), initializer=normal(0.02))
            self.gate_bias = parameter((self.num_heads, self.head_dim), gate_bias)
            self.log_rate = parameter((self.num_heads,), zeros)

    def _recurrence(self, x: Array) -> dict[str, Any]:
        """What both the call and the step pass on, for x [B, T, D]."""
        log_decay: Array | None = None
        if self.decay == "retention":
            log_decay = attention.retention_log_decay(self.num_heads)
        elif self.decay == "data":
            _, log_decay = softplus_decay(self.gate(x.astype(jnp.float32)), self.gate_bias[...], self.log_rate[...])
        elif self.decay == "channel":
            log_decay = jax.nn.log_sigmoid(self.gate(self.gate_down(x.astype(jnp.float32)))) / _GATE_DIVISOR
        elif self.decay == "softplus_channel":
            steps = self.gate(self.gate_down(x.astype(jnp.float32)))
            _, log_decay = softplus_decay(steps, self.gate_bias[...], self.log_rate[...][:, None])
        beta: Array | None = None
        if self.strength is not None and self.beta is not None:
            beta = self.beta * jax.nn.sigmoid(self.strength(x.astype(jnp.float32)))
        return {"log_decay": log_decay, "beta": beta, "feature_map": self.feature_map, "normalize": self.normalize}

    def _unit(self, heads: Array) -> Array:
        """Queries and keys of unit length, for the delta rule alone."""
        return heads if self.beta is None else unit_length(heads)

    def mix(self, query: Array, key: Array, value: Array, x: Array, segment_ids: Array | None) -> Array:
        if self.normalizer_floor is not None:
            return self._floored(query, key, value, self.normalizer_floor, segment_ids)
        out = self._attend(flat(query), flat(key), flat(value), x, is_causal=self.is_causal, segment_ids=segment_ids)
        return out.reshape(*query.shape[:-1], value.shape[-1])

    def _attend(self, query: Array, key: Array, value: Array, x: Array, **options: Any) -> Any:
        """linear_attention of [B, T, N|K, H]; options beside what `_recurrence` gives."""
        recurrence = self._recurrence(x)
        call = functools.partial(
            attention.linear_attention,
            implementation=self.implementation,
            feature_map=recurrence.pop("feature_map"),
            normalize=recurrence.pop("normalize"),
        )
        if self.writes > 1:
            call = functools.partial(write_in_turn, call, self.writes)
        return call(self._unit(query), self._unit(key), value, **recurrence, **options)

    def attention_weights(self, x: Array, *, pattern: Pattern | None = None) -> Array:
        """As of others; NaN with writes > 1, which have several values that a query takes different shares of."""
        if self.writes == 1:
            return super().attention_weights(x, pattern=pattern)
        positions = math.prod(x.shape[1:-1])
        return jnp.full((x.shape[0], self.num_heads, positions, positions), jnp.nan)

    def _floored(self, query: Array, key: Array, value: Array, floor: float, segment_ids: Array | None) -> Array:
        """t q (K^T V) / max(q . sum k, floor), t learned per head."""
        # A channel of ones adds up the weights.
        value = jnp.concatenate([value, jnp.ones_like(value[..., :1])], axis=-1).astype(jnp.float32)
        out = attention.linear_attention(
            flat(query).astype(jnp.float32),
            flat(key),
            flat(value),
            is_causal=False,
            feature_map=self.feature_map,
            scale=1.0,
            segment_ids=segment_ids,
            implementation=self.implementation,
        )
        out = along(self.temperature[...][:, None], out) * out[..., :-1] / jnp.maximum(out[..., -1:], floor)
        return out.reshape(*query.shape[:-1], value.shape[-1] - 1).astype(query.dtype)

    def finish(self, out: Array, value: Array, x: Array) -> Array:
        out = out if self.output_norm is None else self.output_norm(out)
        return out if self.output_gate is None else out * self.gate_function(self.output_gate(x))

    def init_mechanism_cache(self, batch: int, max_length: int) -> Any:
        return attention.init_linear_cache(
            batch,
            self.num_heads,
            self.head_dim,
            self.value_dim,
            feature_map=self.feature_map,
            normalize=self.normalize,
            dtype=jnp.promote_types(self.dtype, jnp.float32),
        )

    def mechanism_prefill(
        self, cache: Any, query: Array, key: Array, value: Array, x: Array, lengths: Array | None
    ) -> tuple[Array, Any]:
        return self._attend(query, key, value, x, initial_state=cache, return_state=True, lengths=lengths)

    def mechanism_step(self, cache: Any, query: Array, key: Array, value: Array, x: Array) -> tuple[Array, Any]:
        if self.writes > 1:
            return self.mechanism_prefill(cache, query, key, value, x, None)
        return attention.linear_step(cache, self._unit(query), self._unit(key), value, **self._recurrence(x))

    def mechanism_flops(self, space: tuple[int, ...]) -> int:
        # A token writes k v^T into the state and reads q^T S from it; the delta rule first reads k^T S.
        kv = jax.eval_shape(lambda: self.init_mechanism_cache(1, 1).kv)
        return (2 + (2 if self.beta is None else 4) * self.writes) * math.prod(space) * kv.size

    @classmethod
    def is_for_grids(cls, options: Mapping[str, Any]) -> bool:
        return options.get("normalizer_floor") is not None or super().is_for_grids(options)


def write_in_turn(
    call: Callable[..., Any],
    writes: int,
    query: Array,
    key: Array,
    value: Array,
    *,
    log_decay: Array | None,
    beta: Array,
    segment_ids: Array | None = None,
    lengths: Array | None = None,
    **options: Any,
) -> Any:
    """Causal linear attention, `call`, with R writes a token, as so many tokens: the state decays at the first of them
    and is read after the last.

    query: [B, T, N, H]. key, value: [B, T, R K, H|V], the first write's heads first. beta: [B, T, R, N]. log_decay:
      None, [N], [B, T, N] or [B, T, N, H]. The rest is the call's, of T tokens.
    """
    batch, length, heads, _ = query.shape

    def in_turn(x: Array) -> Array:
        return x.reshape(batch, length * writes, -1, *x.shape[3:])

    if log_decay is not None:
        log_decay = jnp.broadcast_to(log_decay, (batch, length, heads)) if log_decay.ndim == 1 else log_decay
        later = ((0, 0), (0, 0), (0, writes - 1), *((0, 0),) * (log_decay.ndim - 2))
        log_decay = jnp.pad(log_decay[:, :, None], later).reshape(batch, length * writes, *log_decay.shape[2:])
    results = call(
        jnp.repeat(query, writes, axis=1),
        in_turn(key),
        in_turn(value),
        log_decay=log_decay,
        beta=beta.reshape(batch, length * writes, heads),
        segment_ids=None if segment_ids is None else jnp.repeat(segment_ids, writes, axis=1),
        lengths=None if lengths is None else lengths * writes,
        **options,
    )
    out, *state = results if isinstance(results, tuple) else (results,)
    out = out[:, writes - 1 :: writes]
    return (out, *state) if state else out


def softplus_decay(steps: Array, bias: Array, log_rate: Array) -> tuple[Array, Array]:
    """Mamba-2's gate: the step D = softplus(steps + bias), and the log decay -exp(log_rate) D."""
    steps = jax.nn.softplus(steps + along(bias, steps))
    return steps, -along(jnp.exp(log_rate), steps) * steps


def gate_bias(key: Array, shape: tuple[int, ...], dtype: Any) -> Array:
    """softplus^-1 of steps spread evenly in log over [0.001, 0.1], so that heads start with memories of 10 to 1000."""
    steps = jnp.exp(jax.random.uniform(key, shape, dtype, math.log(1e-3), math.log(1e-1)))
    return steps + jnp.log(-jnp.expm1(-steps))


class InlineAttention(Attention):
    """Every position sees every other through sums, with weights that add to 1: attention.inline_attention. Not causal.

    Args:
      residual: add a depthwise 3x3 convolution of the values whose kernel a small MLP per head computes from the mean
        input (images alone), as published.
    """

    has_causal_form = False
    segments_refusal = "sums over all positions, so packed documents cannot be kept apart"

    def __init__(self, features: int, *, residual: bool = True, rotary: bool = False, **shared: Any):
        super().__init__(features, rotary=rotary, **shared)
        residual = check_bool("residual", residual)
        if residual and (self.num_heads, self.value_dim * self.num_heads) != (self.num_key_heads, features):
            raise ValueError(
                f"residual: got True with {self.num_heads} heads, {self.num_key_heads} key heads and values of "
                f"{self.value_dim}; needs as many key heads, and values that make up the features {features}"
            )
        width = self.value_dim
        if residual:
            self.residual_hidden = parameter((self.num_heads, width, width), normal(width**-0.5))
            # Small, so that the convolution starts out faint beside the attention.
            self.residual_kernel = parameter((self.num_heads, width, 9 * width), normal(0.1 * width**-0.5))
        self.residual = residual

    def mix(self, query: Array, key: Array, value: Array, x: Array, segment_ids: Array | None) -> Array:
        return attention.inline_attention(query, key, value, implementation=self.implementation)

    def finish(self, out: Array, value: Array, x: Array) -> Array:
        if not self.residual:
            return out
        if x.ndim != 4:
            raise ValueError(f"residual: got True for {x.ndim - 2} space axes; the convolution is for images")
        mean = rearrange(jnp.mean(x.astype(jnp.float32), axis=(1, 2)), "B (N H) -> B N H", N=self.num_heads)
        hidden = jax.nn.gelu(jnp.einsum("BNH,NHF->BNF", mean, self.residual_hidden[...]))
        kernel = jnp.einsum("BNH,NHF->BNF", hidden, self.residual_kernel[...])
        kernel = rearrange(kernel, "B N (y x H) -> B y x (N H)", y=3, x=3).astype(self.dtype)
        channels = rearrange(value, "... N H -> ... (N H)")
        return out + depthwise_convolution(channels, kernel, is_causal=False).reshape(out.shape)

    def mechanism_flops(self, space: tuple[int, ...]) -> int:
        # k v^T and q^T S; the kernel's MLP and the convolution.
        heads = 4 * math.prod(space) * self.num_heads * self.head_dim * self.value_dim
        residual = self.num_heads * (20 * self.value_dim**2 + 18 * math.prod(space) * self.value_dim)
        return heads + (residual if self.residual else 0)
