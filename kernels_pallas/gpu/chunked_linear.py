"""Chunked linear attention for Hopper: states chunk after chunk, all else for every chunk at once.

    S~  = e^{g_t} S_{t-1}
    u_t = v_t                        or, with the delta rule,        u_t = beta_t (v_t - S~^T k_t)
    S_t = S~ + k_t u_t^T             o_t = q_t^T S_t

g_t <= 0 is absent, one number per token, or one per channel of the key (RetNet, Mamba-2, GLA, DeltaNet, Gated
DeltaNet). chunk.py gives a chunk's formulas. Three kernels, of one warpgroup a block:

- weights: tril(QK^T * e^D) and the inverse X of a chunk, where decays per channel or the delta rule make them costly.
- states: a block goes through a head's chunks with 64 of the value channels, and writes the state before each of them.
  Where such blocks are few and chunks many, stretches of chunks go side by side (chunk.py's `stretches`).
  The state is kept transposed, [V, F], in registers. Every product of the chain from one state to the next then has
  its left operand in registers, as the last one left it: nothing on that way goes through shared memory.
- outputs: every chunk's from its state.

Numerics: 16-bit operands, float32 sums; what is computed (states, weights, inverses, updates) is rounded to the
operands' dtype before it is multiplied: in float16, states beyond 65504 overflow. Inverses are computed in float32. The
order of sums is fixed: two runs give the same bits. Gradients are in chunked_linear_backward.py.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from kernels_pallas.gpu import blocks
from kernels_pallas.gpu.band import padded_width
from kernels_pallas.gpu.chunk import (
    BETA,
    CHUNK,
    COLUMN,
    INTO,
    ONWARD,
    ROW,
    SQUARE,
    WIDEST,
    Call,
    inverse,
    ones_to_middle,
    over_levels,
    pairs,
    place_of,
    run,
    split,
    states_before,
)
from kernels_pallas.gpu.common import (
    MATRIX,
    ROWS,
    SMEM_BUDGET,
    Product,
    Ring,
    add_dot,
    barriers,
    by_column,
    by_row,
    dot,
    dots,
    full,
    half,
    in_loop,
    iota,
    load,
    single,
    store,
)

Array = jax.Array

_MOST_STAGES = 3
_RESERVED = 2**10  # of shared memory, for barriers and alignment


def refusal(query: Any, key: Any, value: Any, log_decay: Any = None, beta: Any = None) -> str | None:
    """Why chunked_linear_attention cannot serve these arguments (arrays may be shape structs), or None if it can."""
    dtype = jnp.dtype(query.dtype)
    if dtype not in (jnp.bfloat16, jnp.float16) or not dtype == key.dtype == value.dtype:
        return f"needs query, key and value all bfloat16 or all float16, got {dtype}, {key.dtype} and {value.dtype}"
    if 0 in query.shape or 0 in value.shape:
        return f"needs arrays that are not empty, got query {query.shape} and value {value.shape}"
    if max(query.shape[-1], value.shape[-1]) > WIDEST:
        return f"serves up to {WIDEST} features and value channels, got {query.shape[-1]} and {value.shape[-1]}"
    decay = None if log_decay is None else "token" if log_decay.ndim == 3 else "channel"
    needed = smem_bytes(query.shape[-1], value.shape[-1], decay=decay, delta=beta is not None)
    if needed > SMEM_BUDGET:
        return f"takes {-(-needed // 2**10)} KiB of shared memory, more than {SMEM_BUDGET / 2**10:.0f} KiB"
    return None


def smem_bytes(features: int, value_dim: int, *, decay: str | None = None, delta: bool = False) -> int:
    """Shared memory of a block of the kernel that takes most, gradients among them.

    features, value_dim: before padding. decay: None, "token" or "channel".
    """
    features, values = padded_width(features), padded_width(value_dim)
    stage = _stage_bytes(features, decay, delta, backwards=True)
    states = stage * max(1, _stages(features, decay, delta, backwards=True)) + _state_bytes(features)
    part = _value_part(values)
    outputs = 2 * (2 * CHUNK * features + features * part + CHUNK * part) + 4 * CHUNK * part + 2 * CHUNK * CHUNK
    tokens = 2 * CHUNK * values * (5 if delta else 4) + 8 * CHUNK * CHUNK
    weights = 2 * CHUNK * (2 * features + 6 * CHUNK)
    channels = 2 * CHUNK * CHUNK * (16 if delta else 13) if decay == "channel" else 0
    return max(states, outputs, tokens, weights, channels) + 4 * 8 * CHUNK + _RESERVED


def _state_bytes(features: int) -> int:
    """Of a block of the states' kernels, beside its stages: the state in 16 bits and in float32, updates, identity."""
    return ROWS * (2 * features + 4 * state_part(features)) + 2 * 2 * CHUNK * CHUNK


def _stage_bytes(features: int, decay: str | None, delta: bool, *, backwards: bool) -> int:
    keys = (1 + (decay == "channel") if delta else 1) + (backwards and delta)
    squares = 1 + delta * (2 if backwards else 1)
    vectors = 4 * 5 * CHUNK + (4 * features if decay == "channel" else 0)
    return 2 * CHUNK * (keys * features + squares * CHUNK) + vectors


def _stages(features: int, decay: str | None, delta: bool, *, backwards: bool) -> int:
    each = _stage_bytes(features, decay, delta, backwards=backwards)
    return min(_MOST_STAGES, (SMEM_BUDGET - _RESERVED - _state_bytes(features)) // each)


def stages_of(call: Call, *, backwards: bool) -> int:
    """Slots of the states' kernels."""
    name = "linear_state_gradients" if backwards else "linear_states"
    decay = "token" if call.per_token else "channel" if call.per_channel else None
    most = max(1, _stages(call.features, decay, call.delta, backwards=backwards))
    [stages] = blocks.chosen(name, (call.features, decay, call.delta), [(n,) for n in range(most, 0, -1)])
    return stages


def _value_part(values: int) -> int:
    """Of the value channels, those of a block of outputs."""
    return 128 if values % 128 == 0 else 64


def state_part(features: int) -> int:
    """Columns of a state that one product changes: a larger one leaves no registers beside it."""
    return 128 if features % 128 == 0 else 64


def kept_shapes(query: Any, value: Any, log_decay: Any = None, beta: Any = None) -> list[jax.ShapeDtypeStruct]:
    """What chunked_linear_attention keeps for gradients: states before each chunk; with decays per channel or the delta
    rule weights of queries and keys; with the delta rule inverses and updates."""
    call = Call(query, query, value, log_decay, beta)
    square = (call.batch, call.heads, call.padded, CHUNK)
    shapes: list[tuple[int, ...]] = [(call.batch, call.heads, call.chunks, call.values, call.features)]
    shapes += [square] if call.per_channel or call.delta else []
    shapes += [square, (call.batch, call.heads, call.values, call.padded)] if call.delta else []
    return [jax.ShapeDtypeStruct(shape, call.dtype) for shape in shapes]


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
) -> tuple[Any, ...]:
    """Causal linear attention, as in this module's docstring.

    Args:
      query: [B, T, N, F], bfloat16 or float16, after the feature map and the scale.
      key: [B, T, K, F] of the same dtype. K divides N: query head n reads key head n // (N / K).
      value: [B, T, K, V] of the same dtype. F and V up to 256; others than 64, 128, 192 and 256 are padded.
      log_decay: [B, T, N] or [B, T, N, F], finite, or None.
      beta: [B, T, N] or None.
      state: [B, N, F, V], before the first token.
      out_dtype: of the output, of 16 or 32 bits; query's by default.
      keep: also return what chunked_linear_gradients needs.

    Returns:
      out [B, T, N, V], the state after the last token [B, N, F, V] float32, and with keep arrays of kept_shapes().

    Raises:
      ValueError: with refusal()'s reason.

    Complexity, per head: O(T (C (F + V) + F V)) time with C = 64, and O(T log(C) C (C + F)) more with the delta rule or
    decays per channel. Memory beside the arguments: a state per chunk, 16 bit; with decays per channel three decayed
    copies of queries and keys.
    """
    reason = refusal(query, key, value, log_decay, beta)
    if reason is not None:
        raise ValueError(f"chunked_linear_attention: {reason}")
    call = Call(query, key, value, log_decay, beta)
    query, key, value = (
        call.tokens(x, width) for x, width in ((query, call.features), (key, call.features), (value, call.values))
    )
    gates = call.gates(log_decay, beta)
    into, key_into, key_onward, through, weights, inverses = query, key, key, None, None, None
    if log_decay is not None and call.per_channel:
        log_decay = call.tokens(log_decay, call.features, jnp.float32)
        into, key_into, key_onward, through = call.decayed(query, key, log_decay)
        weights, inverses = channel_weights(call, query, key, log_decay, gates)
    elif gates is not None and call.delta:
        weights, inverses = token_weights(call, query, key, gates)
    operands = Operands(key_into, key_onward, inverses, gates, through)
    states, last, updates = _states(call, operands, value, call.state(state))
    out = outputs(
        call, into, key, states, value if updates is None else updates, weights, gates, out_dtype or call.dtype
    )
    results = out[:, : call.length, :, : call.value_width], call.from_state(last)
    return (*results, [x for x in (states, weights, inverses, updates) if x is not None]) if keep else results


def token_weights(call: Call, query: Array, key: Array, gates: Array) -> tuple[Array, Array]:
    """tril(QK^T * e^D) and X of every chunk, [B, N, T', C]: with the delta rule, without decays per channel."""

    def body(ref: Any) -> None:
        batch, head, chunk = place_of("batch", "head", "chunk")
        tokens = pl.ds(chunk * np.int32(CHUNK), CHUNK)
        for source, target in ((ref.query, ref.query_s), (ref.key, ref.key_s)):
            plgpu.copy_gmem_to_smem(source.at[batch, tokens, call.head_of(source, head)], target, ref.ready.at[0])
        plgpu.copy_gmem_to_smem(ref.gates.at[batch, head, :, tokens], ref.gates_s, ref.ready.at[0])
        plgpu.barrier_wait(ref.ready.at[0])
        decays = call.decays(ref.gates_s)
        weights = dot(Product(ref.query_s, ref.key_s, b_transposed=True), shape=SQUARE)
        store(ref.weights_s, weights * decays)
        plgpu.copy_smem_to_gmem(ref.weights_s, ref.weights.at[batch, head, tokens])
        beta = by_row(call.vector(ref.gates_s, BETA, ROW), SQUARE)
        system = dot(Product(ref.key_s, ref.key_s, b_transposed=True), shape=SQUARE) * decays * beta
        _invert(ref, system, ref.inverse.at[batch, head, tokens])
        plgpu.wait_smem_to_gmem(0)

    tile = half(CHUNK, call.features, dtype=call.dtype)
    results = run(
        body,
        "linear_weights",
        {"query": query, "key": key, "gates": gates},
        out=_weights_out(call),
        grid={"batch": call.batch, "head": call.heads, "chunk": call.chunks},
        scratch={
            "query_s": tile,
            "key_s": tile,
            "gates_s": plgpu.SMEM((len(call.rows), CHUNK), jnp.float32),
            **_weights_scratch(call),
            "ready": barriers(1, 3),
        },
    )
    return results["weights"], results["inverse"]


def channel_weights(
    call: Call, query: Array, key: Array, log_decay: Array, gates: Array | None
) -> tuple[Array, Array | None]:
    """The same with decays per channel, log_decay [B, T', N, F'], and X only with the delta rule.

    A block goes through 64 channels after another, and level by level through each: what decays in a token of the
    later or of the earlier block of each pair is a product of 0 and 1 with the log decays, of which three bfloat16
    parts make float32.
    """
    parts = call.features // ROWS

    def body(ref: Any) -> None:
        batch, head, chunk = place_of("batch", "head", "chunk")
        tokens = pl.ds(chunk * np.int32(CHUNK), CHUNK)
        if call.delta:
            plgpu.copy_gmem_to_smem(ref.gates.at[batch, head, :, tokens], ref.gates_s, ref.gates_ready.at[0])

        def fetch(number: Array, slot: Array, barrier: Any) -> None:
            columns = pl.ds(number * np.int32(ROWS), ROWS)
            for source, target in ((ref.query, ref.query_s), (ref.key, ref.key_s), (ref.log_decay, ref.decay_s)):
                here = source.at[batch, tokens, call.head_of(source, head), columns]
                plgpu.copy_gmem_to_smem(here, target.at[slot], barrier)

        ring = Ring(fetch, jnp.int32(parts), ref.ready, None, 1)
        ring.start()

        def part(number: Array, carry: Any) -> Any:
            ring.wait(number)
            slot = ring.slot(number)
            query_s, key_s = ref.query_s.at[slot], ref.key_s.at[slot]
            decay = load(ref.decay_s.at[slot], MATRIX)
            for i, x in enumerate(split(decay, jnp.bfloat16, 3)):
                store(ref.split_s.at[i], x)
            diagonal = iota(SQUARE, 0) == iota(SQUARE, 1)
            found = list(carry)
            products = dot(Product(query_s, key_s, b_transposed=True), shape=SQUARE)
            found[0] += jnp.where(diagonal, products, np.float32(0))

            def level(block: Array, found: Any) -> Any:
                between = ones_to_middle(block, jnp.bfloat16)
                exponents = dot(*(Product(between, ref.split_s.at[i]) for i in range(3)), shape=SQUARE)
                factor = jnp.exp(exponents)
                query, key = (load(x, MATRIX).astype(jnp.float32) for x in (query_s, key_s))
                ref.into_s[...] = (query * factor).astype(call.dtype)
                store(ref.onward_s, key * factor)
                left = [ref.into_s] + ([ref.onward_s] if call.delta else [])
                both = dots(*([Product(x, ref.onward_s, b_transposed=True)] for x in left), shape=SQUARE)
                where = pairs(block)
                return tuple(x + jnp.where(where, y, np.float32(0)) for x, y in zip(found, both, strict=True))

            found = over_levels(level, tuple(found))
            ring.release(number)
            return found

        carry = tuple(full(SQUARE, 0.0) for _ in range(1 + call.delta))
        weights, *system = lax.fori_loop(jnp.int32(0), jnp.int32(parts), part, carry)
        store(ref.weights_s, weights)
        plgpu.copy_smem_to_gmem(ref.weights_s, ref.weights.at[batch, head, tokens])
        if call.delta:
            plgpu.barrier_wait(ref.gates_ready.at[0])
            beta = by_row(call.vector(ref.gates_s, BETA, ROW), SQUARE)
            _invert(ref, system[0] * beta, ref.inverse.at[batch, head, tokens])
        plgpu.wait_smem_to_gmem(0)

    tile = half(CHUNK, ROWS, dtype=call.dtype)
    tiles = half(1, CHUNK, ROWS, dtype=call.dtype)
    results = run(
        body,
        "linear_channel_weights",
        {"query": query, "key": key, "log_decay": log_decay, "gates": gates},
        out=_weights_out(call),
        grid={"batch": call.batch, "head": call.heads, "chunk": call.chunks},
        scratch={
            "query_s": tiles,
            "key_s": tiles,
            "decay_s": single(1, CHUNK, ROWS),
            "split_s": half(3, CHUNK, ROWS, dtype=jnp.bfloat16),
            "into_s": tile,
            "onward_s": tile,
            "gates_s": plgpu.SMEM((max(1, len(call.rows)), CHUNK), jnp.float32),
            **_weights_scratch(call),
            "ready": barriers(1, 3),
            "gates_ready": barriers(1, 1),
        },
    )
    return results["weights"], results.get("inverse")


def _weights_out(call: Call) -> dict[str, Any]:
    shape = (call.batch, call.heads, call.padded, CHUNK), call.dtype
    return {"weights": shape, **({"inverse": shape} if call.delta else {})}


def _weights_scratch(call: Call) -> dict[str, Any]:
    tile, parts = half(*SQUARE, dtype=call.dtype), half(2, *SQUARE, dtype=jnp.float16)
    delta = {"inverse_s": tile, "system_parts": parts, "inverse_parts": parts} if call.delta else {}
    return {"weights_s": tile, **delta}


def _invert(ref: Any, system: Array, target: Any) -> None:
    """Writes the inverse of the system's strict lower triangle."""
    system = jnp.where(iota(SQUARE, 0) > iota(SQUARE, 1), system, np.float32(0))
    store(ref.inverse_s, inverse(system, ref.system_parts, ref.inverse_parts))
    plgpu.copy_smem_to_gmem(ref.inverse_s, target)


class Operands(NamedTuple):
    """What states are made of beside values: keys that decay from before the chunk and to its end [B, T', K or N, F'],
    X [B, N, T', C], gates, and the decay over each chunk [B, N, chunks, F']; as far as the call has them."""

    key_into: Array
    key_onward: Array
    inverses: Array | None
    gates: Array | None
    through: Array | None


def _states(call: Call, operands: Operands, value: Array, state: Array) -> tuple[Array, Array, Array | None]:
    """The states before each chunk [B, N, chunks, V, F], the last one [B, N, V, F] float32, updates U [B, N, V, T']."""
    starts = state[:, :, None]
    if call.stretches > 1:
        nothing = jnp.zeros_like(state, shape=(*state.shape[:2], call.stretches - 1, *state.shape[2:]))
        own = _states_of_stretches(call, operands, value, nothing, keep=False)["last"]
        starts = states_before(state, own, transitions(call, operands))
    found = _states_of_stretches(call, operands, value, starts)
    return found["states"], found["last"][:, :, -1], found.get("updates")


def transitions(call: Call, operands: Operands, first: int = 0) -> Array:
    """What the stretches from `first` on, one fewer than there are, multiply a state by, as states_before takes it."""
    many = call.stretches - 1
    through = operands.through
    if call.delta:
        shape = (call.batch, call.heads, many, call.features, call.features)
        unit = jnp.zeros_like(operands.key_into, jnp.float32, shape=shape) + jnp.eye(call.features, dtype=jnp.float32)
        return _states_of_stretches(call, operands, None, unit, keep=False, first=first)["last"]
    if operands.gates is not None:
        through = call.row(operands.gates, INTO).reshape(call.batch, call.heads, call.chunks, CHUNK)[..., -1:]
    if through is None:
        return jnp.ones_like(operands.key_into, jnp.float32, shape=(call.batch, call.heads, many, 1, 1))
    return call.by_stretch(through)[:, :, first : first + many]


def _states_of_stretches(
    call: Call, operands: Operands, value: Array | None, starts: Array, *, keep: bool = True, first: int = 0
) -> dict[str, Array]:
    """From the states before stretches [B, N, stretches, V, F], the first of them of number `first`, those after them
    ("last"), and with keep those before each chunk ("states") and updates; value None: of zeros.

    A chunk's chain is, transposed: S^T K^T, R^T = beta (V^T - that), U^T = R^T X^T, S^T + U^T K.
    """
    key_into, key_onward, inverses, gates, through = operands
    delta, slots = call.delta, stages_of(call, backwards=False)
    # Without decays per channel the two keys are one.
    inputs = {"key": key_onward, "key_into": key_into if delta and call.per_channel else None, "value": value}
    inputs |= {"inverse": inverses, "gates": gates, "through": through, "starts": starts}
    inputs |= {"spans": jnp.asarray(call.spans(first, starts.shape[2]))}

    def body(ref: Any) -> None:
        batch, head, stretch, part = place_of("batch", "head", "stretch", "part")
        begin, count = (ref.spans[stretch, np.int32(i)] for i in range(2))
        channels = pl.ds(part * np.int32(ROWS), ROWS)

        def fetch(number: Array, slot: Array, barrier: Any) -> None:
            chunk = begin + number
            tokens = pl.ds(chunk * np.int32(CHUNK), CHUNK)
            fetch_chunk(call, ref, (batch, head, chunk), tokens, slot, barrier, ("key", "key_into"))
            if value is not None:
                here = ref.value.at[batch, tokens, call.head_of(ref.value, head), channels]
                plgpu.copy_gmem_to_smem(here, ref.value_s.at[slot], barrier)
            if delta:
                plgpu.copy_gmem_to_smem(ref.inverse.at[batch, head, tokens], ref.inverse_s.at[slot], barrier)

        ring = Ring(fetch, count, ref.ready, None, slots)
        ring.start()
        if value is not None:
            # Without decays per token between them, values are subtracted where old ones are summed.
            store(ref.identity_s, -identity() if delta and not call.per_token else identity())

        def step(number: Array, now: Any) -> Any:
            here, chunk, rounded = place(call, number), begin + number, [x.astype(call.dtype) for x in now]
            slot, tokens = ring.slot(number) + here, pl.ds(chunk * np.int32(CHUNK), CHUNK)
            key_s, state_s = ref.key_s.at[slot], ref.state_s.at[here]

            def keep_state() -> None:
                if keep:
                    plgpu.wait_smem_to_gmem(0, wait_read_only=True)  # what the last chunk stored has been read
                    store_parts(state_s, rounded)
                    plgpu.copy_smem_to_gmem(ref.state_s.at[0], ref.states.at[batch, head, chunk, channels])
                elif not state_fits(call):
                    store_parts(state_s, rounded)

            ring.wait(number)
            values = [Product(ref.value_s.at[slot], ref.identity_s, a_transposed=True)] if value is not None else []
            gates_s = ref.gates_s.at[slot] if gates is not None else None
            if delta:
                from_key_s = ref.key_into_s.at[slot] if call.per_channel else key_s
                sources = state_operands(call, state_s, rounded, keep_state)
                old = [Product(x, columns(from_key_s, i), b_transposed=True) for i, x in enumerate(sources)]
                sums = [old, values] if call.per_token and values else [old + values]
                read, *new = dots(*sums, shape=SQUARE, work=keep_state if state_fits(call) else None)
                if call.per_token:
                    read *= by_column(call.vector(gates_s, INTO, COLUMN), SQUARE)
                wanted = (new[0] - read if new else -read) * by_column(call.vector(gates_s, BETA, COLUMN), SQUARE)
                wanted = wanted.astype(call.dtype)
                update = dot(Product(wanted, ref.inverse_s.at[slot], b_transposed=True), shape=SQUARE)
                if keep:
                    store(ref.update_s, update)
                    plgpu.copy_smem_to_gmem(ref.update_s, ref.updates.at[batch, head, channels, tokens])
            elif call.per_token:
                [update] = dots(values, shape=SQUARE, work=keep_state)
            else:
                keep_state()
            if call.per_token:
                update *= by_column(call.vector(gates_s, ONWARD, COLUMN), SQUARE)
            write = (update.astype(call.dtype), False) if call.per_token or delta else (ref.value_s.at[slot], True)
            after = tuple(
                add_dot(decayed_state(call, ref, x, slot, i), Product(write[0], columns(key_s, i), write[1]))
                for i, x in enumerate(now)
            )
            ring.release(number)
            return after

        start = read_parts(call, ref.starts.at[batch, head, stretch, channels], ref.wide_s, ref.start_ready.at[0])
        last = lax.fori_loop(jnp.int32(0), count, step, start)
        write_parts(last, ref.wide_s, ref.last.at[batch, head, stretch, channels])

    square, squares = (half(*shape, dtype=call.dtype) for shape in (SQUARE, (slots, *SQUARE)))
    out: dict[str, Any] = {"last": (starts.shape, jnp.float32)}
    scratch = chunk_scratch(call, inputs, ("key", "key_into"), slots)
    scratch |= {"value_s": squares} if value is not None else {}
    scratch |= {"inverse_s": squares} if delta else {}
    copies = len(scratch)
    if keep:
        out["states"] = ((call.batch, call.heads, call.chunks, call.values, call.features), call.dtype)
        if delta:
            out["updates"] = ((call.batch, call.heads, call.values, call.padded), call.dtype)
            scratch["update_s"] = square
    scratch |= {
        "identity_s": square,
        "state_s": half(1, ROWS, call.features, dtype=call.dtype),
        "wide_s": single(ROWS, state_part(call.features)),
        "ready": barriers(slots, copies),
        "start_ready": barriers(1, 1),
    }
    many, width = starts.shape[2:4]
    grid = {"batch": call.batch, "head": call.heads, "stretch": many, "part": width // ROWS}
    return run(body, "linear_states", inputs, out=out, grid=grid, scratch=scratch)


def identity() -> Array:
    """[C, C]: a product with it transposes what lies in shared memory into registers."""
    return jnp.where(iota(SQUARE, 0) == iota(SQUARE, 1), np.float32(1), np.float32(0))


def chunk_scratch(call: Call, inputs: dict[str, Any], tokens: tuple[str, ...], slots: int) -> dict[str, Any]:
    """Slots for a chunk of these inputs [B, T', heads, F'], its gates and its decay, as far as there are any."""
    scratch: dict[str, Any] = {
        f"{x}_s": half(slots, CHUNK, call.features, dtype=call.dtype) for x in tokens if inputs[x] is not None
    }
    if inputs["gates"] is not None:
        scratch["gates_s"] = plgpu.SMEM((slots, len(call.rows), CHUNK), jnp.float32)
    if inputs["through"] is not None:
        scratch["through_s"] = plgpu.SMEM((slots, call.features), jnp.float32)
    return scratch


def fetch_chunk(
    call: Call, ref: Any, place: Any, tokens: Any, slot: Array, barrier: Any, names: tuple[str, ...]
) -> None:
    """Issues the copies into chunk_scratch. place: (batch, head, chunk)."""
    batch, head, number = place
    for name in names:
        if hasattr(ref, name):
            source, target = getattr(ref, name), getattr(ref, f"{name}_s")
            plgpu.copy_gmem_to_smem(source.at[batch, tokens, call.head_of(source, head)], target.at[slot], barrier)
    if hasattr(ref, "gates"):
        plgpu.copy_gmem_to_smem(ref.gates.at[batch, head, :, tokens], ref.gates_s.at[slot], barrier)
    if hasattr(ref, "through"):
        plgpu.copy_gmem_to_smem(ref.through.at[batch, head, number], ref.through_s.at[slot], barrier)


def columns(ref: Any, part: int) -> Any:
    """A part of the columns of a ref [rows, width]."""
    width = state_part(ref.shape[-1])
    return ref if width == ref.shape[-1] else ref.at[:, part * width : (part + 1) * width]


def read_parts(call: Call, source: Any, wide_s: Any, barrier: Any) -> tuple[Array, ...]:
    """A float32 state [V, F] in registers, in parts of its columns."""
    parts = []
    for part in range(call.features // wide_s.shape[-1]):
        plgpu.copy_gmem_to_smem(columns(source, part), wide_s, barrier)
        plgpu.barrier_wait(barrier)
        parts.append(load(wide_s, MATRIX))
        plgpu.commit_smem()
    return tuple(parts)


def write_parts(parts: Any, wide_s: Any, target: Any) -> None:
    """The reverse of read_parts; waits for all stores."""
    for part, x in enumerate(parts):
        store(wide_s, x)
        plgpu.copy_smem_to_gmem(wide_s, columns(target, part))
        plgpu.wait_smem_to_gmem(0)


def state_fits(call: Call) -> bool:
    """Whether registers hold a state beside what is made of it: with the delta rule in 16 bits, and three products."""
    return not call.delta or call.features <= 128


def place(call: Call, number: Array) -> Array | int:
    """0; where a state leaves few registers, in a way that keeps addresses in the loop (in_loop)."""
    return 0 if state_fits(call) else in_loop(number)


def state_operands(call: Call, state_s: Any, rounded: list[Array], keep_state: Callable[[], None]) -> list[Any]:
    """The left operands of a state's products: in registers, or in shared memory after keep_state()."""
    if state_fits(call):
        return rounded
    keep_state()
    return [columns(state_s, part) for part in range(len(rounded))]


def store_parts(ref: Any, parts: Any) -> None:
    for part, x in enumerate(parts):
        store(columns(ref, part), x)


def decayed_state(call: Call, ref: Any, state: Array, slot: Array, part: int) -> Array:
    """A part of the columns of a state [V, F] times the decay over the chunk."""
    if call.per_token:
        return state * ref.gates_s[slot, call.rows.index(INTO), CHUNK - 1]
    if call.per_channel:
        width = state.shape[1]
        through = load(ref.through_s.at[slot, part * width : (part + 1) * width], COLUMN)
        return state * by_column(through, (ROWS, width))
    return state


def outputs(
    call: Call,
    query: Array,
    key: Array,
    states: Array,
    value: Array,
    weights: Array | None,
    gates: Array | None,
    dtype: Any,
    *,
    backwards: bool = False,
) -> Array:
    """tril(QK^T * e^D) U + e^{D_i0} Q S of every chunk, [B, T', N, V'].

    value: [B, T', heads, V'], or updates [B, N, V', T']. weights: the triangle, where there is one already.
    backwards: triu(QK^T * (e^D)^T) U + e^{D_Ci} Q S, with the transposed weights: gradients of values are outputs whose
    queries are keys, and whose keys are queries.
    """
    width, is_update = _value_part(call.values), call.delta and not backwards

    def body(ref: Any) -> None:
        batch, head, chunk, part = place_of("batch", "head", "chunk", "part")
        tokens, channels = pl.ds(chunk * np.int32(CHUNK), CHUNK), pl.ds(part * np.int32(width), width)

        def fetch(source: Any, target: Any) -> None:
            plgpu.copy_gmem_to_smem(source, target, ref.ready.at[0])

        fetch(ref.query.at[batch, tokens, call.head_of(ref.query, head)], ref.query_s)
        if weights is None:
            fetch(ref.key.at[batch, tokens, call.head_of(ref.key, head)], ref.key_s)
        else:
            fetch(ref.weights.at[batch, head, tokens], ref.weights_s)
        fetch(ref.states.at[batch, head, chunk, channels], ref.states_s)
        if is_update:
            fetch(ref.value.at[batch, head, channels, tokens], ref.value_s)
        else:
            fetch(ref.value.at[batch, tokens, call.head_of(ref.value, head), channels], ref.value_s)
        if call.per_token:
            fetch(ref.gates.at[batch, head, :, tokens], ref.gates_s)
        plgpu.barrier_wait(ref.ready.at[0])
        shape = (CHUNK, width)
        out = dot(Product(ref.query_s, ref.states_s, b_transposed=True), shape=shape)
        if call.per_token:
            out *= by_row(call.vector(ref.gates_s, ONWARD if backwards else INTO, ROW), shape)
        if weights is None:
            products = dot(Product(ref.query_s, ref.key_s, b_transposed=True), shape=SQUARE)
            own = (products * call.decays(ref.gates_s if call.per_token else None, backwards)).astype(call.dtype)
            out = add_dot(out, Product(own, ref.value_s, b_transposed=is_update))
        else:
            out = add_dot(out, Product(ref.weights_s, ref.value_s, backwards, is_update))
        store(ref.out_s, out)
        plgpu.copy_smem_to_gmem(ref.out_s, ref.out.at[batch, tokens, head, channels])
        plgpu.wait_smem_to_gmem(0)

    tile = half(CHUNK, call.features, dtype=call.dtype)
    wide = jnp.dtype(dtype).itemsize == 4
    scratch: dict[str, Any] = {"query_s": tile}
    scratch |= {"key_s": tile} if weights is None else {"weights_s": half(*SQUARE, dtype=call.dtype)}
    scratch["states_s"] = half(width, call.features, dtype=call.dtype)
    scratch["value_s"] = half(*((width, CHUNK) if is_update else (CHUNK, width)), dtype=call.dtype)
    if call.per_token:
        scratch["gates_s"] = plgpu.SMEM((len(call.rows), CHUNK), jnp.float32)
    scratch["ready"] = barriers(1, len(scratch))
    scratch["out_s"] = single(CHUNK, width) if wide else half(CHUNK, width, dtype=dtype)
    results = run(
        body,
        "linear_outputs",
        {
            "query": query,
            "key": key if weights is None else None,
            "weights": weights,
            "states": states,
            "value": value,
            "gates": gates if call.per_token else None,
        },
        out={"out": ((call.batch, call.padded, call.heads, call.values), dtype)},
        grid={"batch": call.batch, "head": call.heads, "chunk": call.chunks, "part": call.values // width},
        scratch=scratch,
    )
    return results["out"]
