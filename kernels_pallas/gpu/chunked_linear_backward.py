"""Gradients of chunked linear attention for Hopper, from what its forward kernels kept.

With G the gradient of the state after a chunk, dO that of its outputs, and chunk.py's formulas:

    dU  = tril(QK^T * e^D)^T dO + (e^{D_Cj} K) G            dR = X^T dU        dA = -tril(dR U^T, -1)
    G  <- e^{D_C0} G + (e^{D_i0} Q)^T dO - (e^{D_i0} K)^T (beta dR)
    dQ  = (tril(dO U^T) * e^D) K + e^{D_i0} dO S_0^T
    dK  = (tril(dO U^T) * e^D)^T Q + e^{D_Cj} U G^T + (B * e^D + (B * e^D)^T) K - e^{D_i0} beta dR S_0^T, B = beta dA
    dV  = beta dR, or dU without the delta rule

- state gradients: as the states' kernel, from the last chunk to the first.
- token gradients: every chunk's and 64 channels' of the key, from S, G, U and dR.
- channel gradients: with decays per channel, what goes through the products within a chunk.

Gradients of log decays: per token by the identity dg_t = sum_{i >= t} (q_i . dq_i - k_i . dk_i) within the chunk, to
which what goes to or from the states is added where it counts, rather than where it cancels; per channel level by
level.
"""

import functools
from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any, cast

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from kernels_pallas.gpu.chunk import (
    BETA,
    CHUNK,
    COLUMN,
    INTO,
    LEVELS,
    ONWARD,
    ROW,
    SQUARE,
    Call,
    ones_to_middle,
    over_levels,
    pairs,
    place_of,
    run,
    split,
    states_before,
)
from kernels_pallas.gpu.chunked_linear import (
    Operands,
    chunk_scratch,
    columns,
    decayed_state,
    fetch_chunk,
    identity,
    outputs,
    place,
    read_parts,
    refusal,
    stages_of,
    state_fits,
    state_operands,
    state_part,
    store_parts,
    transitions,
    write_parts,
)
from kernels_pallas.gpu.common import (
    MATRIX,
    ROWS,
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

_EARLY, _LATE, _STRENGTH = "early", "late", "strength"


def chunked_linear_gradients(
    query: Array,
    key: Array,
    value: Array,
    log_decay: Array | None,
    beta: Array | None,
    kept: Sequence[Array],
    out_gradient: Array,
    state_gradient: Array,
) -> tuple[Array, Array, Array, Array | None, Array | None, Array]:
    """Gradients of chunked_linear_attention with respect to query, key, value, log_decay, beta and state.

    Args:
      query .. beta: as there. kept: what keep gave.
      out_gradient: [B, T, N, V], rounded to query's dtype. state_gradient: [B, N, F, V], of the state after the last
        token.

    Raises:
      ValueError: with refusal()'s reason.

    Complexity: as chunked_linear_attention; memory: as it keeps, and a gradient of a state per chunk, 16 bit.
    """
    reason = refusal(query, key, value, log_decay, beta)
    if reason is not None:
        raise ValueError(f"chunked_linear_gradients: {reason}")
    call = Call(query, key, value, log_decay, beta)
    states, weights, inverses, updates = cast(Any, (*kept, None, None, None)[:4])
    arrays = query, key, value
    query, key, value, out_gradient = (
        call.tokens(x, width)
        for x, width in zip((*arrays, out_gradient), (call.features,) * 2 + (call.values,) * 2, strict=True)
    )
    gates: Any = call.gates(log_decay, beta)
    into, key_into, key_onward = query, key, key
    through, pull, to_through, to_decay = (cast(Any, None) for _ in range(4))
    if log_decay is not None and call.per_channel:
        decay = call.tokens(log_decay, call.features, jnp.float32)
        (into, key_into, key_onward, through), pull = jax.vjp(cast(Any, call.decayed), query, key, decay)
    operands = Operands(key_into, key_onward, inverses, gates, through)
    state_gradients, first, rests = _state_gradients(
        call, into, operands, out_gradient, weights, call.state(state_gradient)
    )
    if log_decay is not None:
        over = "BNCVF,BNCVF->BNCF" if call.per_channel else "BNCVF,BNCVF->BNC"
        to_through = jnp.einsum(over, states, state_gradients, preferred_element_type=jnp.float32)
    written = value if updates is None else updates
    own_key = key_into if call.per_channel else key
    found = _token_gradients(call, query, own_key, written, out_gradient, rests, states, state_gradients, gates)
    numbers = _named(call, found.get("numbers"), _rows(call))
    strength: Any = numbers.get(_STRENGTH)
    if rests is not None:
        rest = jnp.swapaxes(jnp.swapaxes(rests, 2, 3), 1, 2).astype(jnp.float32)  # [B, T', N, V']
        to_value = rest * jnp.swapaxes(call.row(gates, BETA), 1, 2)[..., None]
        per_head = jnp.repeat(value, call.group, axis=2).astype(jnp.float32)
        strength += jnp.swapaxes(jnp.sum(rest * per_head, axis=-1), 1, 2).reshape(strength.shape)
    else:
        to_value = outputs(
            call, key_onward, query, state_gradients, out_gradient, weights, gates, call.part_dtype, backwards=True
        )
    if log_decay is not None and call.per_channel:
        through_key = found["key_into"] if call.delta else jnp.zeros_like(key_into)
        outer = pull((found["into"], through_key, found["key_onward"], to_through))
        inner = _channel_gradients(call, query, key, decay, found["weights"], found.get("system"), gates)
        to_query = outer[0].astype(jnp.float32) + inner["to_query"].astype(jnp.float32)
        to_key = outer[1].astype(jnp.float32) + call.to_key_heads(inner["to_key"])
        to_decay = (outer[2] + inner["to_decay"])[:, : call.length, :, : call.key_width].astype(log_decay.dtype)
        if call.delta:
            strength += _named(call, inner["numbers"], [_STRENGTH])[_STRENGTH]
    else:
        to_query, to_key = found["to_query"], call.to_key_heads(found["to_key"])
    if log_decay is not None and call.per_token:
        into_last = call.row(gates, INTO).reshape(*to_through.shape, CHUNK)[..., -1:]
        late = jnp.cumsum(numbers[_LATE], axis=-1)
        before = jnp.pad(late[..., :-1], ((0, 0), (0, 0), (0, 0), (1, 0)))
        total = lax.cumsum(numbers[_EARLY], axis=3, reverse=True) + before + to_through[..., None] * into_last
        to_decay = call.from_chunks(total, log_decay)
    to_beta = None if beta is None else call.from_chunks(strength, beta)
    results = zip((to_query, to_key, call.to_key_heads(to_value)), arrays, strict=True)
    tokens = [x[:, : call.length, :, : like.shape[-1]].astype(like.dtype) for x, like in results]
    return *tokens, to_decay, to_beta, call.from_state(first)


def _rows(call: Call) -> list[str]:
    """The vectors that the token gradients give."""
    return ([_EARLY, _LATE] if call.per_token else []) + ([_STRENGTH] if call.delta else [])


def _named(call: Call, numbers: Array | None, rows: list[str]) -> dict[str, Array]:
    """[B, N, parts of the key, rows, T'] -> their sums over the parts by name, [B, N, chunks, C]."""
    if numbers is None:
        return {}
    numbers = jnp.sum(numbers, axis=2).reshape(call.batch, call.heads, len(rows), call.chunks, CHUNK)
    return {row: numbers[:, :, i] for i, row in enumerate(rows)}


def _state_gradients(
    call: Call, query_into: Array, operands: Operands, out_gradient: Array, weights: Array | None, last: Array
) -> tuple[Array, Array, Array | None]:
    """The gradients of the states after each chunk [B, N, chunks, V, F], that of the first state [B, N, V, F] float32,
    and dR [B, N, V, T'] with the delta rule."""
    lasts = last[:, :, None]
    of_stretches = functools.partial(_of_stretches, call, query_into, operands, out_gradient, weights)
    if call.stretches > 1:
        nothing = jnp.zeros_like(last, shape=(*last.shape[:2], call.stretches - 1, *last.shape[2:]))
        own = of_stretches(nothing, keep=False, first=1)["first"]
        # From the last stretch to the first; a matrix [F, F] counts transposed.
        by = transitions(call, operands, first=1)
        by = jnp.swapaxes(by, 3, 4) if call.delta else by
        lasts = jnp.flip(states_before(last, jnp.flip(own, 2), jnp.flip(by, 2)), 2)
    found = of_stretches(lasts)
    return found["states"], found["first"][:, :, 0], found.get("rests")


def _of_stretches(
    call: Call,
    query_into: Array,
    operands: Operands,
    out_gradient: Array,
    weights: Array | None,
    lasts: Array,
    *,
    keep: bool = True,
    first: int = 0,
) -> dict[str, Array]:
    """From the gradients of the states after stretches [B, N, stretches, V, F], the first of them of number `first`,
    those of the states before them ("first"), and with keep those after each chunk ("states") and dR ("rests");
    everything transposed, as in the states' kernel."""
    key_into, key_onward, inverses, gates, through = operands
    delta, slots, fits = call.delta, stages_of(call, backwards=True), state_fits(call)
    inputs = {"query": query_into, "key": key_onward if delta else None}
    inputs |= {"key_into": key_into if delta and call.per_channel else None, "out_gradient": out_gradient}
    inputs |= {"weights": weights if delta else None, "inverse": inverses}
    inputs |= {"gates": gates, "through": through, "lasts": lasts}
    inputs |= {"spans": jnp.asarray(call.spans(first, lasts.shape[2]))}
    names = ("query", "key", "key_into")

    def body(ref: Any) -> None:
        batch, head, stretch, part = place_of("batch", "head", "stretch", "part")
        begin, count = (ref.spans[stretch, np.int32(i)] for i in range(2))
        channels = pl.ds(part * np.int32(ROWS), ROWS)

        def tokens_of(chunk: Array) -> Any:
            return pl.ds(chunk * np.int32(CHUNK), CHUNK)

        def chunk_of(number: Array) -> Array:
            return begin + count - np.int32(1) - number

        def fetch(number: Array, slot: Array, barrier: Any) -> None:
            chunk = chunk_of(number)
            tokens = tokens_of(chunk)
            fetch_chunk(call, ref, (batch, head, chunk), tokens, slot, barrier, names)
            here = ref.out_gradient.at[batch, tokens, head, channels]
            plgpu.copy_gmem_to_smem(here, ref.out_gradient_s.at[slot], barrier)
            if delta:
                plgpu.copy_gmem_to_smem(ref.weights.at[batch, head, tokens], ref.weights_s.at[slot], barrier)
                plgpu.copy_gmem_to_smem(ref.inverse.at[batch, head, tokens], ref.inverse_s.at[slot], barrier)

        ring = Ring(fetch, count, ref.ready, None, slots)
        ring.start()
        store(ref.identity_s, identity())

        def step(number: Array, now: Any) -> Any:
            here, chunk, rounded = place(call, number), chunk_of(number), [x.astype(call.dtype) for x in now]
            slot, state_s = ring.slot(number) + here, ref.state_s.at[here]
            query_s, out_s = ref.query_s.at[slot], ref.out_gradient_s.at[slot]
            gates_s = ref.gates_s.at[slot] if gates is not None else None

            def keep_state() -> None:
                if keep:
                    plgpu.wait_smem_to_gmem(0, wait_read_only=True)  # what the last step stored has been read
                    store_parts(state_s, rounded)
                    plgpu.copy_smem_to_gmem(ref.state_s.at[0], ref.states.at[batch, head, chunk, channels])
                elif not fits:
                    store_parts(state_s, rounded)

            def vector(name: str) -> Array:
                return by_column(call.vector(gates_s, name, COLUMN), SQUARE)

            ring.wait(number)
            sums, transpose = [], Product(out_s, ref.identity_s, a_transposed=True)
            if delta:
                key_s = ref.key_s.at[slot]
                sources = state_operands(call, state_s, rounded, keep_state)
                of_state = [Product(x, columns(key_s, i), b_transposed=True) for i, x in enumerate(sources)]
                sums += [of_state, [Product(out_s, ref.weights_s.at[slot], a_transposed=True)]]
            if call.per_token and fits:
                sums.append([transpose])
            if sums:
                found = dots(*sums, shape=SQUARE, work=keep_state if fits else None)
            else:
                keep_state()
            if delta:
                more, update = found[:2]
                update += more * vector(ONWARD) if call.per_token else more
            # What the outputs' and the updates' gradients write into the state's.
            writes: list[tuple[Any, Any, bool]] = [(out_s, query_s, True)]
            if call.per_token:
                out = found[-1] if fits else dot(transpose, shape=SQUARE)
                writes = [((out * vector(INTO)).astype(call.dtype), query_s, False)]
            if delta:
                rest = dot(Product(update.astype(call.dtype), ref.inverse_s.at[slot]), shape=SQUARE)
                if keep:
                    store(ref.rest_s, rest)
                    plgpu.copy_smem_to_gmem(ref.rest_s, ref.rests.at[batch, head, channels, tokens_of(chunk)])
                rest *= -vector(BETA)
                rest *= vector(INTO) if call.per_token else np.float32(1)
                key_s = ref.key_into_s.at[slot] if call.per_channel else key_s
                writes.append((rest.astype(call.dtype), key_s, False))
            before = tuple(
                add_dot(
                    decayed_state(call, ref, x, slot, i),
                    *(Product(left, columns(right, i), flag) for left, right, flag in writes),
                )
                for i, x in enumerate(now)
            )
            ring.release(number)
            return before

        last = read_parts(call, ref.lasts.at[batch, head, stretch, channels], ref.wide_s, ref.last_ready.at[0])
        before = lax.fori_loop(jnp.int32(0), count, step, last)
        write_parts(before, ref.wide_s, ref.first.at[batch, head, stretch, channels])

    square, squares = (half(*shape, dtype=call.dtype) for shape in (SQUARE, (slots, *SQUARE)))
    out: dict[str, Any] = {"first": (lasts.shape, jnp.float32)}
    scratch = chunk_scratch(call, inputs, names, slots) | {"out_gradient_s": squares}
    if delta:
        scratch |= {"weights_s": squares, "inverse_s": squares}
    copies = len(scratch)
    if keep:
        out["states"] = ((call.batch, call.heads, call.chunks, call.values, call.features), call.dtype)
        if delta:
            out["rests"] = ((call.batch, call.heads, call.values, call.padded), call.dtype)
            scratch["rest_s"] = square
    scratch |= {
        "identity_s": square,
        "state_s": half(1, ROWS, call.features, dtype=call.dtype),
        "wide_s": single(ROWS, state_part(call.features)),
        "ready": barriers(slots, copies),
        "last_ready": barriers(1, 1),
    }
    grid = {"batch": call.batch, "head": call.heads, "stretch": lasts.shape[2], "part": call.values // ROWS}
    return run(body, "linear_state_gradients", inputs, out=out, grid=grid, scratch=scratch)


def _token_gradients(
    call: Call,
    query: Array,
    key: Array,
    written: Array,
    out_gradient: Array,
    rests: Array | None,
    states: Array,
    state_gradients: Array,
    gates: Array | None,
) -> dict[str, Array]:
    """Without decays per channel dq, dk ("to_query", "to_key"; [B, T', N, F']) and vectors of decays and betas
    ("numbers", [B, N, parts, rows, T'], to be added up).

    With them, gradients of decayed queries and keys ("into", "key_into", "key_onward"), and of weights and A / beta
    before they are decayed ("weights", "system", [B, N, T', C]); `key` is the one that decays from before the chunk.
    """
    delta, channel, rows = call.delta, call.per_channel, _rows(call)
    inputs = {
        "query": None if channel else query,
        "key": key if delta or not channel else None,
        "written": written,
        "out_gradient": out_gradient,
        "rests": rests,
        "states": states,
        "state_gradients": state_gradients,
        "gates": gates,
    }

    def body(ref: Any) -> None:
        batch, head, chunk, part = place_of("batch", "head", "chunk", "part")
        tokens, columns = pl.ds(chunk * np.int32(CHUNK), CHUNK), pl.ds(part * np.int32(ROWS), ROWS)

        def fetch(source: Any, target: Any) -> None:
            plgpu.copy_gmem_to_smem(source, target, ref.ready.at[0])

        for name in ("query", "key"):
            if inputs[name] is not None:
                source = getattr(ref, name)
                fetch(source.at[batch, tokens, call.head_of(source, head), columns], getattr(ref, f"{name}_s"))
        fetch(ref.out_gradient.at[batch, tokens, head], ref.out_gradient_s)
        if delta:
            fetch(ref.written.at[batch, head, :, tokens], ref.written_s)
            fetch(ref.rests.at[batch, head, :, tokens], ref.rests_s)
        else:
            fetch(ref.written.at[batch, tokens, call.head_of(ref.written, head)], ref.written_s)
        fetch(ref.states.at[batch, head, chunk, :, columns], ref.states_s)
        fetch(ref.state_gradients.at[batch, head, chunk, :, columns], ref.state_gradients_s)
        if gates is not None:
            fetch(ref.gates.at[batch, head, :, tokens], ref.gates_s)
        plgpu.barrier_wait(ref.ready.at[0])

        sums = [
            [Product(ref.out_gradient_s, ref.written_s, b_transposed=not delta)],
            [Product(ref.out_gradient_s, ref.states_s)],
            [Product(ref.written_s, ref.state_gradients_s, a_transposed=delta)],
        ]
        if delta:
            sums.append([Product(ref.rests_s, ref.written_s, a_transposed=True)])
            sums.append([Product(ref.rests_s, ref.states_s, a_transposed=True)])
        of_weights, into, onward, *rest = dots(*sums, shape=SQUARE)
        strict = iota(SQUARE, 0) > iota(SQUARE, 1)
        # What was multiplied makes room.
        first_rows = pl.ds(0, CHUNK)
        states_s, state_gradients_s = ref.states_s.at[first_rows], ref.state_gradients_s.at[first_rows]
        rests_s = ref.rests_s.at[first_rows] if delta else None

        def vector(name: str) -> Array:
            return by_row(call.vector(ref.gates_s, name, ROW), SQUARE)

        def put(x: Array, smem: Any, target: Any) -> None:
            store(smem, x)
            plgpu.copy_smem_to_gmem(smem, target)

        def put_numbers(named: dict[str, Array]) -> None:
            for i, row in enumerate(rows):
                store(ref.numbers_s.at[i], named[row].sum(axis=1))
            plgpu.copy_smem_to_gmem(ref.numbers_s, ref.numbers.at[batch, head, part, :, tokens])

        here = (batch, tokens, head, columns)
        if channel:
            put(into, states_s, ref.into.at[here])
            put(onward, state_gradients_s, ref.key_onward.at[here])
            if delta:
                put(-(rest[1] * vector(BETA)), ref.written_s.at[first_rows], ref.key_into.at[here])
                put_numbers({_STRENGTH: -rest[1] * load(ref.key_s, MATRIX).astype(jnp.float32)})

            @pl.when(part == 0)
            def _() -> None:
                keep = iota(SQUARE, 0) >= iota(SQUARE, 1)
                put(jnp.where(keep, of_weights, np.float32(0)), ref.weights_s, ref.weights.at[batch, head, tokens])
                if delta:
                    system = jnp.where(strict, -rest[0], np.float32(0))
                    put(system, rests_s, ref.system.at[batch, head, tokens])

            plgpu.wait_smem_to_gmem(0)
            return

        decays = call.decays(ref.gates_s if call.per_token else None)
        store(states_s, of_weights * decays)
        backs = [Product(states_s, ref.query_s, a_transposed=True)]
        if call.per_token:
            into, onward = into * vector(INTO), onward * vector(ONWARD)
        if delta:
            system = jnp.where(strict, -rest[0] * decays, np.float32(0))
            store(state_gradients_s, system)
            store(rests_s, system * vector(BETA))
            backs.append(Product(rests_s, ref.key_s, a_transposed=True))
        to_query = add_dot(into, Product(states_s, ref.key_s))
        back = dot(*backs, shape=SQUARE)
        query, key = (load(x, MATRIX).astype(jnp.float32) for x in (ref.query_s, ref.key_s))
        to_key = onward + back
        named = {_EARLY: query * to_query - key * back, _LATE: key * onward}
        if delta:
            forth = dot(Product(state_gradients_s, ref.key_s), shape=SQUARE)
            forth -= rest[1] * vector(INTO) if call.per_token else rest[1]
            named[_STRENGTH] = key * forth
            forth *= vector(BETA)
            to_key += forth
            named[_EARLY] += key * forth
        plgpu.commit_smem()  # all threads have read queries and keys, whose place the gradients take
        put(to_query, ref.query_s, ref.to_query.at[here])
        put(to_key, ref.key_s if ref.to_key.dtype == call.dtype else ref.to_key_s, ref.to_key.at[here])
        if rows:
            put_numbers(named)
        plgpu.wait_smem_to_gmem(0)

    square = half(*SQUARE, dtype=call.dtype)
    tall, updates = (half(*shape, dtype=call.dtype) for shape in ((call.values, ROWS), (call.values, CHUNK)))
    scratch: dict[str, Any] = {f"{name}_s": square for name in ("query", "key") if inputs[name] is not None}
    scratch |= {
        "out_gradient_s": half(CHUNK, call.values, dtype=call.dtype),
        "states_s": tall,
        "state_gradients_s": tall,
    }
    scratch["written_s"] = updates if delta else half(CHUNK, call.values, dtype=call.dtype)
    if delta:
        scratch["rests_s"] = updates
    if gates is not None:
        scratch["gates_s"] = plgpu.SMEM((len(call.rows), CHUNK), jnp.float32)
    scratch["ready"] = barriers(1, len(scratch))
    tokens, inner = (call.batch, call.padded, call.heads, call.features), (call.batch, call.heads, call.padded, CHUNK)
    parts = call.features // ROWS
    if channel:
        out: dict[str, Any] = dict.fromkeys(
            ("into", "key_onward", *(["key_into"] if delta else [])), (tokens, call.dtype)
        )
        scratch["weights_s"] = square
        out |= dict.fromkeys(("weights", *(["system"] if delta else [])), (inner, call.dtype))
    else:
        out = {"to_query": (tokens, call.dtype), "to_key": (tokens, call.part_dtype)}
        if call.part_dtype == jnp.float32:
            scratch["to_key_s"] = single(*SQUARE)
    if rows:
        out["numbers"] = ((call.batch, call.heads, parts, len(rows), call.padded), jnp.float32)
        scratch["numbers_s"] = plgpu.SMEM((len(rows), CHUNK), jnp.float32)
    grid = {"batch": call.batch, "head": call.heads, "chunk": call.chunks, "part": parts}
    return run(body, "linear_token_gradients", inputs, out=out, grid=grid, scratch=scratch)


def _channel_gradients(
    call: Call,
    query: Array,
    key: Array,
    log_decay: Array,
    weights: Array,
    system: Array | None,
    gates: Array | None,
) -> dict[str, Array]:
    """With decays per channel: the gradients of queries, keys and log decays ("to_query", "to_key", "to_decay"; [B, T',
    N, F']) through products within a chunk, and of betas ("numbers").

    weights, system: gradients of weights and of A / beta before they are decayed, [B, N, T', C]. A block has 64
    channels, and makes the operands of each level anew.
    """
    inputs = {"query": query, "key": key, "log_decay": log_decay, "weights": weights, "system": system, "gates": gates}
    delta = call.delta
    # With the delta rule registers are short: nothing of what in_loop is for may be computed before the levels' loop.
    inputs["levels"] = jnp.full(1, LEVELS, jnp.int32) if delta else None

    def body(refs: Any) -> None:
        def at(here: Any) -> Any:
            """The refs by name; with the delta rule tiles where they lie, 0."""
            return SimpleNamespace(**{name: x.at[here] if name in tiles else x for name, x in vars(refs).items()})

        ref = at(0)
        batch, head, chunk, part = place_of("batch", "head", "chunk", "part")
        tokens, columns = pl.ds(chunk * np.int32(CHUNK), CHUNK), pl.ds(part * np.int32(ROWS), ROWS)

        def fetch(source: Any, target: Any) -> None:
            plgpu.copy_gmem_to_smem(source, target, ref.ready.at[0])

        for source, target in ((ref.query, ref.query_s), (ref.key, ref.key_s), (ref.log_decay, ref.decay_s)):
            fetch(source.at[batch, tokens, call.head_of(source, head), columns], target)
        fetch(ref.weights.at[batch, head, tokens], ref.weights_s)
        if delta:
            fetch(ref.system.at[batch, head, tokens], ref.system_s)
            fetch(ref.gates.at[batch, head, :, tokens], ref.gates_s)
        plgpu.barrier_wait(ref.ready.at[0])

        for i, x in enumerate(split(load(ref.decay_s, MATRIX), jnp.bfloat16, 3)):
            store(ref.split_s.at[i], x)
        zero, diagonal = np.float32(0), iota(SQUARE, 0) == iota(SQUARE, 1)

        def masked(source: Any, where: Array) -> Array:
            return jnp.where(where, load(source, MATRIX).astype(jnp.float32), zero)

        store(ref.masked_s, masked(ref.weights_s, diagonal))
        to_query, to_key = dots([Product(ref.masked_s, ref.key_s)], [Product(ref.masked_s, ref.query_s)], shape=SQUARE)

        def level(block: Array, carry: Any) -> Any:
            to_query, *strength = carry
            here = in_loop(block) if delta else 0
            ref = at(here)
            between, where = ones_to_middle(block, jnp.bfloat16), pairs(block)
            exponents = dot(*(Product(between, ref.split_s.at[here + i]) for i in range(3)), shape=SQUARE)
            factor = jnp.exp(exponents)

            def decayed(source: Any) -> Array:  # read again where it is used: it would not fit into registers
                return load(source, MATRIX).astype(jnp.float32) * factor

            ref.into_s[...] = decayed(ref.query_s).astype(call.dtype)
            ref.onward_s[...] = decayed(ref.key_s).astype(call.dtype)
            store(ref.masked_s, masked(ref.weights_s, where))
            of_onward = [Product(ref.masked_s, ref.into_s, a_transposed=True)]
            if delta:
                of_system = masked(ref.system_s, where)
                ref.inner_s[...] = of_system.astype(call.dtype)
                store(ref.strong_s, of_system * by_row(call.vector(ref.gates_s, BETA, ROW), SQUARE))
                of_onward.append(Product(ref.strong_s, ref.onward_s, a_transposed=True))
                forth = dot(Product(ref.inner_s, ref.onward_s), shape=SQUARE)
                strength = [strength[0] + (forth * decayed(ref.key_s)).sum(axis=1)]
                to_onward = add_dot(forth * by_row(call.vector(ref.gates_s, BETA, ROW), SQUARE), *of_onward)
            else:
                to_onward = dot(*of_onward, shape=SQUARE)
            ref.to_key_s[...] = load(ref.to_key_s, MATRIX) + to_onward * factor
            of_exponents = to_onward * decayed(ref.key_s)
            to_into = dot(Product(ref.masked_s, ref.onward_s), shape=SQUARE)
            to_query += to_into * factor
            of_exponents += to_into * decayed(ref.query_s)
            high, low = split(of_exponents, jnp.bfloat16, 2)
            ref.exponents_s[...] = high
            store(ref.exponents_low_s, low)
            back = ones_to_middle(block, jnp.bfloat16, transposed=True)
            parts = (Product(back, x) for x in (ref.exponents_s, ref.exponents_low_s))
            ref.decay_s[...] = add_dot(load(ref.decay_s, MATRIX), *parts)
            return to_query, *strength

        # Two of the sums are in shared memory: they would not fit into registers.
        ref.decay_s[...] = full(SQUARE, 0.0)
        ref.to_key_s[...] = to_key
        carry = (to_query, *([full((CHUNK,), 0.0, ROW)] if delta else []))
        to_query, *strength = over_levels(level, carry, ref.levels[0] if delta else LEVELS)
        here = (batch, tokens, head, columns)
        store(ref.into_s, to_query)
        plgpu.copy_smem_to_gmem(ref.into_s, ref.to_query.at[here])
        plgpu.copy_smem_to_gmem(ref.to_key_s, ref.to_key.at[here])
        plgpu.copy_smem_to_gmem(ref.decay_s, ref.to_decay.at[here])
        if delta:
            store(ref.numbers_s.at[0], strength[0])
            plgpu.copy_smem_to_gmem(ref.numbers_s, ref.numbers.at[batch, head, part, :, tokens])
        plgpu.wait_smem_to_gmem(0)

    shape = (1, *SQUARE) if delta else SQUARE
    square, wide, exact = half(*shape, dtype=call.dtype), single(*shape), half(*shape, dtype=jnp.bfloat16)
    scratch: dict[str, Any] = {"query_s": square, "key_s": square, "decay_s": wide, "weights_s": square}
    if delta:
        scratch |= {"system_s": square, "gates_s": plgpu.SMEM((len(call.rows), CHUNK), jnp.float32)}
    scratch["ready"] = barriers(1, len(scratch))
    scratch |= {
        "split_s": half(3, *SQUARE, dtype=jnp.bfloat16),
        "exponents_s": exact,
        "exponents_low_s": exact,
        "masked_s": square,
        "into_s": square,
        "onward_s": square,
        "to_key_s": wide,
    }
    tokens, parts = (call.batch, call.padded, call.heads, call.features), call.features // ROWS
    out: dict[str, Any] = {
        "to_query": (tokens, call.dtype),
        "to_key": (tokens, jnp.float32),
        "to_decay": (tokens, jnp.float32),
    }
    if delta:
        scratch |= {"inner_s": square, "strong_s": square, "numbers_s": plgpu.SMEM((1, CHUNK), jnp.float32)}
        out["numbers"] = ((call.batch, call.heads, parts, 1, call.padded), jnp.float32)
    tiles = {name for name, x in scratch.items() if delta and any(x is y for y in (square, wide, exact))}
    grid = {"batch": call.batch, "head": call.heads, "chunk": call.chunks, "part": parts}
    return run(body, "linear_channel_gradients", inputs, out=out, grid=grid, scratch=scratch)
