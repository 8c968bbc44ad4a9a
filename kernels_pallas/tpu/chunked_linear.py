"""Chunked linear attention for TPU: the state stays in VMEM from a head's first chunk to its last.

    S~  = e^{g_t} S_{t-1}
    u_t = v_t                        or, with the delta rule,        u_t = beta_t (v_t - S~^T k_t)
    S_t = S~ + k_t u_t^T             o_t = q_t^T S_t

g_t <= 0 is absent, one number per token, or one per channel of the key (RetNet, Mamba-2, GLA, DeltaNet, Gated
DeltaNet). The grid is (batch, heads, chunks), chunks in order; a step is one chunk (chunk.py, which gives the formulas
and the numerics). The kernel of the gradients goes through the chunks backwards, with the gradient of the state in
VMEM, and is the chunk's function differentiated by JAX, from the states that the first kernel kept.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from kernels_pallas.tpu import common
from kernels_pallas.tpu.chunk import BLOCK_ROWS, CHUNK, chunk
from kernels_pallas.tpu.common import LANES, SUBLANES, VMEM_BUDGET, round_up

Array = jax.Array


def vmem_bytes(features: int, value_dim: int, dtype: Any, *, decay: str | None = None, delta: bool = False) -> int:
    """VMEM that the kernel of the gradients, the larger one, takes at most.

    features, value_dim: before padding. decay: None, "token" or "channel".
    """
    size = jnp.dtype(dtype).itemsize
    keys, values = (round_up(width, LANES) for width in (features, value_dim))
    rows = CHUNK * (2 * keys + values)
    gates = 4 * CHUNK * (keys if decay == "channel" else SUBLANES) + 4 * CHUNK * SUBLANES
    state = 4 * round_up(features, SUBLANES) * values
    blocks = (size + 4) * rows + size * CHUNK * values + 2 * gates + 3 * state
    squares = 4 * CHUNK * CHUNK * (8 + (4 if decay else 0) + (10 if delta else 0) + (8 if decay == "channel" else 0))
    wide = 4 * CHUNK * (3 * keys + 3 * values) * (2 if decay else 1)
    if decay == "channel":
        wide += 4 * CHUNK * keys * 3 * BLOCK_ROWS
    return 2 * blocks + 4 * state + squares + wide


def refusal(query: Any, key: Any, value: Any, log_decay: Any = None, beta: Any = None) -> str | None:
    """Why chunked_linear_attention cannot serve these arguments (arrays may be shape structs), or None if it can."""
    dtype = jnp.dtype(query.dtype)
    if dtype not in (jnp.bfloat16, jnp.float32) or not dtype == key.dtype == value.dtype:
        return f"needs query, key and value all bfloat16 or all float32, got {dtype}, {key.dtype} and {value.dtype}"
    if 0 in query.shape or 0 in value.shape:
        return f"needs arrays that are not empty, got query {query.shape} and value {value.shape}"
    decay = None if log_decay is None else "token" if log_decay.ndim == 3 else "channel"
    needed = vmem_bytes(query.shape[-1], value.shape[-1], dtype, decay=decay, delta=beta is not None)
    if needed > VMEM_BUDGET:
        return (
            f"{query.shape[-1]} features and {value.shape[-1]} value channels take {needed / 2**20:.1f} MiB of VMEM, "
            f"more than {VMEM_BUDGET / 2**20:.0f} MiB"
        )
    return None


def kept_shapes(query: Any, value: Any, log_decay: Any = None, beta: Any = None) -> jax.ShapeDtypeStruct:
    """What chunked_linear_attention keeps for gradients: the states before each chunk, [B, N, chunks, F, V], padded as
    the kernels take them."""
    del log_decay, beta
    batch, length, heads, features = query.shape
    chunks = round_up(length, CHUNK) // CHUNK
    widths = common.padded_width(features), common.padded_width(value.shape[-1])
    return jax.ShapeDtypeStruct((batch, heads, chunks, *widths), jnp.float32)


def chunked_linear_attention(
    query: Array,
    key: Array,
    value: Array,
    log_decay: Array | None,
    beta: Array | None,
    state: Array,
    *,
    out_dtype: Any = None,
    keep: bool = False,
) -> tuple[Array, ...]:
    """Causal linear attention, as in this module's docstring.

    Args:
      query: [B, T, N, F], bfloat16 or float32, after the feature map and the scale.
      key: [B, T, K, F] of the same dtype. K divides N: query head n reads key head n // (N / K).
      value: [B, T, K, V] of the same dtype.
      log_decay: [B, T, N] or [B, T, N, F], finite, or None.
      beta: [B, T, N] or None.
      state: [B, N, F, V], before the first token.
      out_dtype: of the output; query's by default.
      keep: also return what chunked_linear_gradients needs.

    Returns:
      out [B, T, N, V], the state after the last token [B, N, F, V] float32, and with keep an
      array of kept_shapes().

    Raises:
      ValueError: with refusal()'s reason.

    Complexity, per head: O(T (C (F + V) + F V)) time with C = 128, and O(T log(C) C^2) more with the delta rule.
    """
    call = _Call(query, key, value, log_decay, beta, state)
    chunks, value_dim = call.chunks, call.value_dim

    def kernel(*refs: Any) -> None:
        inputs, (state_ref, *outs) = refs[: call.inputs], refs[call.inputs :]
        *outs, running = outs
        step = pl.program_id(2)

        @pl.when(step == 0)
        def _() -> None:
            running[...] = state_ref[...]

        before = running[...]
        if keep:
            outs[2][...] = before
        after, out = chunk(before, *call.read(inputs))
        running[...] = after
        outs[0][...] = out.astype(outs[0].dtype)

        @pl.when(step == chunks - 1)
        def _() -> None:
            outs[1][...] = after

    out_dtype = out_dtype or query.dtype
    results = [call.tokens(value_dim, out_dtype), call.state()] + ([call.states()] if keep else [])
    out, last, *kept = call.run(kernel, "chunked_linear_attention", [call.state()[0]], [call.first], results)
    return call.from_tokens(out, value.shape[-1]), call.from_state(last), *kept


def chunked_linear_gradients(
    query: Array,
    key: Array,
    value: Array,
    log_decay: Array | None,
    beta: Array | None,
    states: Array,
    out_gradient: Array,
    state_gradient: Array,
) -> tuple[Array, Array, Array, Array | None, Array | None, Array]:
    """Gradients of chunked_linear_attention with respect to query, key, value, log_decay, beta and state.

    Args:
      query .. beta: as there. states: what keep gave.
      out_gradient: [B, T, N, V]. state_gradient: [B, N, F, V], of the state after the last token.
    """
    call = _Call(query, key, value, log_decay, beta, state_gradient, backwards=True)
    differentiable: Any = chunk
    chunks, dtype = call.chunks, query.dtype

    def kernel(*refs: Any) -> None:
        inputs = refs[: call.inputs]
        out_gradient_ref, states_ref, last_ref, *outs, running = refs[call.inputs :]
        step = pl.program_id(2)

        @pl.when(step == 0)
        def _() -> None:
            running[...] = last_ref[...]

        _, pull = jax.vjp(differentiable, states_ref[...], *call.read(inputs))
        to_state, *gradients = pull((running[...], out_gradient_ref[...].astype(jnp.float32)))
        running[...] = to_state
        given = [x for x in gradients if x is not None]
        for ref, gradient in zip(outs, given, strict=False):
            ref[...] = gradient.astype(ref.dtype)

        @pl.when(step == chunks - 1)
        def _() -> None:
            outs[-1][...] = to_state

    # Query heads of a key head are added up afterwards.
    part = dtype if call.group == 1 else jnp.float32
    results = [call.tokens(call.features, dtype), call.tokens(call.features, part), call.tokens(call.value_dim, part)]
    results += [call.gate(gate) for gate in call.gates] + [call.state()]
    given = [call.tokens(call.value_dim, out_gradient.dtype)[0], call.states()[0], call.state()[0]]
    arrays = [
        common.heads_first(out_gradient, call.padded_length, call.value_dim),
        states,
        call.first,
    ]
    found = call.run(kernel, "chunked_linear_gradients", given, arrays, results)
    to_query, to_key, to_value, *to_gates, to_state = found

    def to_key_heads(x: Array, like: Array) -> Array:
        x = call.from_tokens(x, like.shape[-1])
        return jnp.sum(x.reshape(*like.shape[:3], call.group, -1), axis=3).astype(like.dtype)

    gates = iter(to_gates)
    to_decay, to_beta = (None if x is None else call.from_gate(next(gates), x) for x in (log_decay, beta))
    return (
        call.from_tokens(to_query, query.shape[-1]),
        to_key_heads(to_key, key),
        to_key_heads(to_value, value),
        to_decay,
        to_beta,
        call.from_state(to_state),
    )


class _Call:
    """A call's arrays as the kernels take them: heads first, padded to whole chunks and lanes; and their blocks."""

    def __init__(
        self,
        query: Array,
        key: Array,
        value: Array,
        log_decay: Array | None,
        beta: Array | None,
        state: Array,
        backwards: bool = False,
    ):
        reason = refusal(query, key, value, log_decay, beta)
        if reason is not None:
            raise ValueError(f"chunked_linear_attention: {reason}")
        self.batch, self.length, self.heads, _ = query.shape
        self.group = self.heads // key.shape[2]
        self.features, self.value_dim = (common.padded_width(x.shape[-1]) for x in (query, value))
        self.widths = query.shape[-1], value.shape[-1]
        self.padded_length = round_up(self.length, CHUNK)
        self.chunks = self.padded_length // CHUNK
        self.backwards = backwards
        self.log_decay, self.beta = log_decay, beta
        self.gates = [self._padded_gate(gate) for gate in (log_decay, beta) if gate is not None]
        self.arrays = [
            common.heads_first(x, self.padded_length, width)
            for x, width in ((query, self.features), (key, self.features), (value, self.value_dim))
        ]
        self.inputs = 3 + len(self.gates)
        widths = [(0, self.features - state.shape[2]), (0, self.value_dim - state.shape[3])]
        self.first = jnp.pad(state.astype(jnp.float32), [(0, 0), (0, 0), *widths])
        self.over = common.varying(*(x for x in (query, key, value, log_decay, beta, state) if x is not None))
        self.itemsize = query.dtype.itemsize

    def _padded_gate(self, gate: Array) -> Array:
        """[B, T, N] -> [B, N, 1, T'], [B, T, N, F] -> [B, N, T', F'], 0 in the padding, which then does nothing."""
        gate = gate.astype(jnp.float32)
        if gate.ndim == 4:
            return common.heads_first(gate, self.padded_length, self.features)
        return jnp.swapaxes(common.heads_first(gate[..., None], self.padded_length, 1), 2, 3)

    def read(self, refs: Any) -> tuple[Any, ...]:
        query, key, value, *gates = (ref[...] for ref in refs)
        rest = iter(gates)
        return query, key, value, *(None if x is None else next(rest) for x in (self.log_decay, self.beta))

    def _chunk_index(self, step: Any) -> Any:
        return np.int32(self.chunks - 1) - step if self.backwards else step

    def _shape(self, shape: tuple[int, ...], dtype: Any) -> Any:
        return jax.ShapeDtypeStruct((self.batch, self.heads, *shape), dtype, manual_axis_type=self.over)

    def tokens(self, width: int, dtype: Any, group: int = 1) -> tuple[Any, Any]:
        """(block, whole) of an array [B, N, T', width]."""

        def index(b: Any, n: Any, c: Any) -> tuple[Any, ...]:
            return b, lax.div(n, np.int32(group)), self._chunk_index(c), common.zero()

        return pl.BlockSpec((None, None, CHUNK, width), index), self._shape((self.padded_length, width), dtype)

    def gate(self, gate: Array) -> tuple[Any, Any]:
        if gate.shape[2] > 1:
            return self.tokens(self.features, jnp.float32)

        def index(b: Any, n: Any, c: Any) -> tuple[Any, ...]:
            return b, n, common.zero(), self._chunk_index(c)

        return pl.BlockSpec((None, None, 1, CHUNK), index), self._shape((1, self.padded_length), jnp.float32)

    def state(self) -> tuple[Any, Any]:
        shape = (self.features, self.value_dim)
        spec = pl.BlockSpec((None, None, *shape), lambda b, n, c: (b, n, common.zero(), common.zero()))
        return spec, self._shape(shape, jnp.float32)

    def states(self) -> tuple[Any, Any]:
        shape = (self.features, self.value_dim)
        spec = pl.BlockSpec(
            (None, None, None, *shape), lambda b, n, c: (b, n, self._chunk_index(c), common.zero(), common.zero())
        )
        return spec, self._shape((self.chunks, *shape), jnp.float32)

    def run(
        self, kernel: Callable[..., None], name: str, specs: list[Any], arrays: list[Array], results: list[Any]
    ) -> list[Array]:
        """The kernel's results. specs, arrays: of its arguments beside query, key, value and gates."""
        dtype = self.arrays[0].dtype
        own = [
            self.tokens(self.features, dtype),
            self.tokens(self.features, dtype, self.group),
            self.tokens(self.value_dim, dtype, self.group),
            *map(self.gate, self.gates),
        ]
        given = [*self.arrays, *self.gates, *arrays]
        steps = self.batch * self.heads * self.chunks
        both = self.features + self.value_dim
        products = CHUNK * CHUNK * both + 2 * CHUNK * self.features * self.value_dim
        products += CHUNK * CHUNK * (self.features + 12 * CHUNK) if self.beta is not None else 0
        out_specs, out_shape = zip(*results, strict=True)
        return pl.pallas_call(
            kernel,
            grid=(self.batch, self.heads, self.chunks),
            in_specs=[*(spec for spec, _ in own), *specs],
            out_specs=list(out_specs),
            out_shape=list(out_shape),
            scratch_shapes=[pltpu.VMEM((self.features, self.value_dim), jnp.float32)],
            compiler_params=pltpu.CompilerParams(
                dimension_semantics=("parallel", "parallel", "arbitrary"), vmem_limit_bytes=VMEM_BUDGET
            ),
            cost_estimate=pl.CostEstimate(
                flops=2 * steps * products * (3 if self.backwards else 1),
                transcendentals=steps * CHUNK * CHUNK if self.log_decay is not None else 0,
                bytes_accessed=sum(x.size * x.dtype.itemsize for x in (*given, *out_shape)),
            ),
            name=name,
        )(*given)

    def from_tokens(self, x: Array, width: int) -> Array:
        return common.tokens_first(x, self.length, width)

    def from_gate(self, x: Array, gate: Array) -> Array:
        if gate.ndim == 4:
            return self.from_tokens(x, gate.shape[-1]).astype(gate.dtype)
        return jnp.swapaxes(x[:, :, 0, : self.length], 1, 2).astype(gate.dtype)

    def from_state(self, x: Array) -> Array:
        features, value_dim = self.widths
        return x[:, :, :features, :value_dim]
