"""Linear attention for TPU by chunks of tokens: the state stays in VMEM from a head's first chunk to its last.

    S~  = e^{g_t} S_{t-1}
    u_t = v_t                        or, with the delta rule,        u_t = beta_t (v_t - S~^T k_t)
    S_t = S~ + k_t u_t^T             o_t = q_t^T S_t

g_t <= 0 is absent, one number a token, or one a channel of the key. With D_ij = g_{j+1} + ... + g_i, a chunk is

    U   = (I + A)^{-1} beta (V - (e^{D_i0} K) S_0)            A = tril(beta KK^T * e^D, -1)
    O   = tril(QK^T * e^D) U + (e^{D_i0} Q) S_0
    S_C = e^{D_C0} S_0 + (e^{D_Cj} K)^T U

(RetNet, Mamba-2, GLA, DeltaNet, Gated DeltaNet; the chunk form of the delta rule: Yang et al. 2024.) The grid is
(batch, heads, chunks), chunks in order. The kernel of the gradients goes through the chunks backwards, with the
gradient of the state in VMEM, and is the chunk's function differentiated by JAX, from the states that the first kernel
kept.

Numerics: every exponent is a sum of log decays, never a difference of two sums, so it is <= 0 and exact to float32
behind any decay. Products of bfloat16 operands are accumulated in float32, and what is computed from float32 numbers
(states, weights, decayed keys) is rounded to the operands' dtype before it is multiplied. Float32 operands are
multiplied at full precision. Inverses are computed in float32, by blocks.
"""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from kernels_pallas.tpu import common
from kernels_pallas.tpu.common import LANES, SUBLANES, VMEM_BUDGET, round_up

Array = jax.Array

CHUNK = 128  # tokens
# Rows that are next to each other in a block of decays per channel, done one by one; pairs of blocks are products.
_ROWS = 8


# --- One chunk --------------------------------------------------------------------------------------------------------


def chunk(
    state: Array, query: Array, key: Array, value: Array, log_decay: Array | None, beta: Array | None
) -> tuple[Array, Array]:
    """C tokens of one head.

    state: [F, V] float32. query, key: [C, F]. value: [C, V]. log_decay: [1, C] or [C, F] float32.
    beta: [1, C] float32. Returns the state after them and their outputs [C, V], float32.
    """
    dtype = query.dtype
    if beta is not None and log_decay is None:
        log_decay = beta * np.float32(0)  # without one, libtpu 0.0.51 fails at some head dims for v6e and tpu7x
    into, from_key, onward, through = query, key, key, None
    if log_decay is not None:
        # Decay from before the chunk to each token, and from each token to the chunk's end.
        if log_decay.shape[0] == 1:
            before = jnp.sum(_where(_until, log_decay), axis=1, keepdims=True)
            after = jnp.sum(_where(_after, log_decay), axis=1, keepdims=True)
            through = jnp.exp(jnp.sum(log_decay, axis=1, keepdims=True))
        else:
            before, after = (_prefix(which, log_decay) for which in (_until, _after))
            total = jnp.sum(log_decay, axis=0, keepdims=True)
            through = jnp.exp(jnp.transpose(jnp.broadcast_to(total, (SUBLANES, total.shape[1])))[:, :1])
        into, from_key, onward = (
            _times(x, jnp.exp(sums)) for x, sums in ((query, before), (key, before), (key, after))
        )
    if beta is not None:
        strength = jnp.sum(_where(_same, beta), axis=1, keepdims=True)
        value = strength * (value.astype(jnp.float32) - _dot(from_key, state.astype(dtype), (1, 0)))
        system = strength * _decayed_products(key, key, log_decay, strict=True)
        value = _dot(_inverse(system), value, (1, 0))
    # In this order: with the state last, libtpu 0.0.51 fails at head dim 64 for v6e and tpu7x.
    written = value.astype(dtype)
    state_after = _dot(onward, written, (0, 0)) + (state if through is None else through * state)
    from_state = _dot(into, state.astype(dtype), (1, 0))
    weights = _decayed_products(query, key, log_decay, strict=False)
    return state_after, _dot(weights.astype(dtype), written, (1, 0)) + from_state


def _decayed_products(query: Array, key: Array, log_decay: Array | None, *, strict: bool) -> Array:
    """[C, C] of sum_h q_ih k_jh exp(g_{j+1,h} + ... + g_{i,h}) for j <= i (j < i if strict), 0 elsewhere."""
    keep = _before if strict else _until
    if log_decay is None:
        return _where(keep, _dot(query, key, (1, 1)))
    if log_decay.shape[0] == 1:
        size = log_decay.shape[1]
        exponents = _sums(_where(_until, log_decay), _ones(_before, size))
        return _where(keep, _dot(query, key, (1, 1)) * jnp.exp(exponents))
    return _products_by_channel(query, key, log_decay, strict)


def _products_by_channel(query: Array, key: Array, log_decay: Array, strict: bool) -> Array:
    """Within blocks of a few rows diagonal by diagonal; then pairs of blocks, of twice the rows each time.

    In a pair, query decays from the middle to each row of the later block, and key from each row of the earlier block
    up to the middle.
    """
    size = query.shape[0]
    rows, columns = _indices((size, size))
    later, earlier = query.astype(jnp.float32), key.astype(jnp.float32)
    exponents = jnp.zeros_like(log_decay)
    total = jnp.zeros((size, size), jnp.float32)
    for distance in range(min(_ROWS, size)):
        if distance:
            exponents = exponents + _roll(log_decay, distance - 1)
        if distance or not strict:
            numbers = jnp.sum(later * _roll(earlier, distance) * jnp.exp(exponents), axis=1, keepdims=True)
            here = (rows - columns == distance) & (lax.rem(rows, np.int32(_ROWS)) >= distance)
            total = jnp.where(here, numbers, total)
    block = _ROWS
    before, after = (
        _sums(jnp.where(which(rows, columns) & _share_block(rows, columns, block), *_one_zero()), log_decay)
        for which in (_until, _after)
    )
    while block < size:
        corner = _dot(_times(query, jnp.exp(before)), _times(key, jnp.exp(after)), (1, 1))
        pair = _share_block(rows, columns, 2 * block) & (
            lax.div(rows, np.int32(block)) > lax.div(columns, np.int32(block))
        )
        total = jnp.where(pair, corner, total)
        # A block's total, at all its rows, goes to the rows of its neighbour.
        sums = before + after
        odd = lax.rem(lax.div(lax.broadcasted_iota(jnp.int32, sums.shape, 0), np.int32(block)), np.int32(2)) == 1
        zeros = jnp.zeros_like(sums)
        before, after = (
            before + jnp.where(odd, _roll(sums, block), zeros),
            after + jnp.where(odd, zeros, _roll(sums, -block)),
        )
        block *= 2
    return total


@jax.custom_vjp
def _inverse(system: Array) -> Array:
    """(I + A)^{-1}, float32 [C, C], of A's strict lower triangle: blocks of twice the rows each time.

    With L the part of A that leads from the earlier block of a pair to the later one, and X the inverse so far, block
    by block: X - X L X.
    """
    size = system.shape[0]
    rows, columns = _indices(system.shape)
    one, nothing = _one_zero()
    result = jnp.where(rows == columns, one, nothing)
    block = 1
    while block < size:
        pair = _share_block(rows, columns, 2 * block) & (
            lax.div(rows, np.int32(block)) > lax.div(columns, np.int32(block))
        )
        leads = jnp.where(pair, system, nothing)
        # X is the identity at first.
        change = leads if block == 1 else common.dot(common.dot(result, leads, (1, 0)), result, (1, 0))
        result = result - change
        block *= 2
    return result


def _inverse_forward(system: Array) -> tuple[Array, Array]:
    result = _inverse(system)
    return result, result


def _inverse_backward(result: Array, gradient: Array) -> tuple[Array]:
    inner = common.dot(result, gradient, (0, 0))
    return (_where(_before, -common.dot(inner, result, (1, 1))),)


_inverse.defvjp(_inverse_forward, _inverse_backward)


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def _dot(a: Array, b: Array, contract: tuple[int, int]) -> Array:
    """common.dot, whose gradients round the cotangent to the operands' dtype as it does its operands."""
    return common.dot(a, b, contract)


def _dot_forward(a: Array, b: Array, contract: tuple[int, int]) -> tuple[Array, tuple[Array, Array]]:
    return common.dot(a, b, contract), (a, b)


def _dot_backward(contract: tuple[int, int], operands: tuple[Array, Array], gradient: Array) -> tuple[Array, Array]:
    a, b = operands
    of_a, of_b = contract
    gradient = gradient.astype(a.dtype)
    to_a = common.dot(gradient, b, (1, 1 - of_b)) if of_a == 1 else common.dot(b, gradient, (1 - of_b, 1))
    to_b = common.dot(a, gradient, (1 - of_a, 0)) if of_b == 0 else common.dot(gradient, a, (0, 1 - of_a))
    return to_a.astype(a.dtype), to_b.astype(b.dtype)


_dot.defvjp(_dot_forward, _dot_backward)


@functools.partial(jax.custom_vjp, nondiff_argnums=(1,))
def _roll(x: Array, rows: int) -> Array:
    """Row i of the result is row i - rows of x, around the ends."""
    rows %= x.shape[0]
    return jnp.concatenate([x[x.shape[0] - rows :], x[: x.shape[0] - rows]], axis=0) if rows else x


_roll.defvjp(lambda x, rows: (_roll(x, rows), None), lambda rows, _, gradient: (_roll(gradient, -rows),))


def _times(x: Array, factor: Array) -> Array:
    return (x.astype(jnp.float32) * factor).astype(x.dtype)


def _prefix(which: Callable[[Array, Array], Array], x: Array) -> Array:
    """[C, F]: at each row the sum of the rows that `which` takes."""
    return _sums(_ones(which, x.shape[0]), x)


def _sums(a: Array, b: Array) -> Array:
    return _dot(a, b, (1, 0))


def _ones(which: Callable[[Array, Array], Array], size: int) -> Array:
    return jnp.where(which(*_indices((size, size))), *_one_zero())


def _where(which: Callable[[Array, Array], Array], x: Array) -> Array:
    """x, [C, C] or one row of it, at the places that `which` takes, 0 elsewhere."""
    size = x.shape[1]
    return jnp.where(which(*_indices((size, size))), jnp.broadcast_to(x, (size, size)), np.float32(0))


def _indices(shape: tuple[int, ...]) -> tuple[Array, Array]:
    return lax.broadcasted_iota(jnp.int32, shape, 0), lax.broadcasted_iota(jnp.int32, shape, 1)


def _share_block(rows: Array, columns: Array, block: int) -> Array:
    return lax.div(rows, np.int32(block)) == lax.div(columns, np.int32(block))


def _one_zero() -> tuple[np.float32, np.float32]:
    return np.float32(1), np.float32(0)


def _until(row: Array, column: Array) -> Array:
    return column <= row


def _before(row: Array, column: Array) -> Array:
    return column < row


def _after(row: Array, column: Array) -> Array:
    return column > row


def _same(row: Array, column: Array) -> Array:
    return column == row


# --- The kernels ------------------------------------------------------------------------------------------------------


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
        wide += 4 * CHUNK * keys * 3 * _ROWS
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


def chunked_linear_attention(
    query: Array,
    key: Array,
    value: Array,
    log_decay: Array | None,
    beta: Array | None,
    state: Array,
    *,
    out_dtype: Any = None,
    keep_states: bool = False,
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
      keep_states: also return the states before each chunk, for chunked_linear_gradients.

    Returns:
      out [B, T, N, V], the state after the last token [B, N, F, V] float32, and with keep_states
      [B, N, chunks, F, V] float32.

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
        if keep_states:
            outs[2][...] = before
        after, out = chunk(before, *call.read(inputs))
        running[...] = after
        outs[0][...] = out.astype(outs[0].dtype)

        @pl.when(step == chunks - 1)
        def _() -> None:
            outs[1][...] = after

    out_dtype = out_dtype or query.dtype
    results = [call.tokens(value_dim, out_dtype), call.state()] + ([call.states()] if keep_states else [])
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
      query .. beta: as there. states: what keep_states gave.
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

    def _place(self, step: Any) -> Any:
        return np.int32(self.chunks - 1) - step if self.backwards else step

    def _shape(self, shape: tuple[int, ...], dtype: Any) -> Any:
        return jax.ShapeDtypeStruct((self.batch, self.heads, *shape), dtype, manual_axis_type=self.over)

    def tokens(self, width: int, dtype: Any, group: int = 1) -> tuple[Any, Any]:
        """(block, whole) of an array [B, N, T', width]."""

        def index(b: Any, n: Any, c: Any) -> tuple[Any, ...]:
            return b, lax.div(n, np.int32(group)), self._place(c), common.zero()

        return pl.BlockSpec((None, None, CHUNK, width), index), self._shape((self.padded_length, width), dtype)

    def gate(self, gate: Array) -> tuple[Any, Any]:
        if gate.shape[2] > 1:
            return self.tokens(self.features, jnp.float32)

        def index(b: Any, n: Any, c: Any) -> tuple[Any, ...]:
            return b, n, common.zero(), self._place(c)

        return pl.BlockSpec((None, None, 1, CHUNK), index), self._shape((1, self.padded_length), jnp.float32)

    def state(self) -> tuple[Any, Any]:
        shape = (self.features, self.value_dim)
        spec = pl.BlockSpec((None, None, *shape), lambda b, n, c: (b, n, common.zero(), common.zero()))
        return spec, self._shape(shape, jnp.float32)

    def states(self) -> tuple[Any, Any]:
        shape = (self.features, self.value_dim)
        spec = pl.BlockSpec(
            (None, None, None, *shape), lambda b, n, c: (b, n, self._place(c), common.zero(), common.zero())
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
        return jnp.swapaxes(x[:, :, : self.length, :width], 1, 2)

    def from_gate(self, x: Array, gate: Array) -> Array:
        if gate.ndim == 4:
            return self.from_tokens(x, gate.shape[-1]).astype(gate.dtype)
        return jnp.swapaxes(x[:, :, 0, : self.length], 1, 2).astype(gate.dtype)

    def from_state(self, x: Array) -> Array:
        features, value_dim = self.widths
        return x[:, :, :features, :value_dim]
