"""Chunked linear attention for TPU: the state stays in VMEM from a head's first chunk to its last.

    S~  = e^{g_t} S_{t-1}
    u_t = v_t                        or, with the delta rule,        u_t = beta_t (v_t - S~^T k_t)
    S_t = S~ + k_t u_t^T             o_t = q_t^T S_t

g_t <= 0 is absent, one number per token, or one per channel of the key (RetNet, Mamba-2, GLA, DeltaNet, Gated
DeltaNet). A step of the grid (chunk_call.py) is one chunk of a few heads (chunk.py, which gives the formulas and the
numerics), chunks in order. The kernel of the gradients goes through the chunks backwards, with the gradient of the
state in VMEM, and is the chunk's function differentiated by JAX, from what the first kernel kept: the states before
chunks, and with the delta rule inverses.
"""

from typing import Any

import jax
import jax.numpy as jnp

from kernels_pallas.tpu import common
from kernels_pallas.tpu.chunk import BLOCK, CHUNK, chunk
from kernels_pallas.tpu.chunk_call import Call, budget_of, plan_of
from kernels_pallas.tpu.common import round_up

Array = jax.Array


def refusal(query: Any, key: Any, value: Any, log_decay: Any = None, beta: Any = None) -> str | None:
    """Why chunked_linear_attention cannot serve these arguments (arrays may be shape structs), or None if it can."""
    dtype = jnp.dtype(query.dtype)
    if dtype not in (jnp.bfloat16, jnp.float32) or not dtype == key.dtype == value.dtype:
        return f"needs query, key and value all bfloat16 or all float32, got {dtype}, {key.dtype} and {value.dtype}"
    if 0 in query.shape or 0 in value.shape:
        return f"needs arrays that are not empty, got query {query.shape} and value {value.shape}"
    _, needed = plan_of(query, key, value, log_decay, beta, backwards=True)  # which take more
    budget = budget_of(log_decay, beta, backwards=True)
    if needed > budget:
        return (
            f"{query.shape[-1]} features and {value.shape[-1]} value channels take {needed / 2**20:.1f} MiB of VMEM, "
            f"more than {budget / 2**20:.0f} MiB"
        )
    return None


def kept_shapes(query: Any, value: Any, log_decay: Any = None, beta: Any = None) -> list[jax.ShapeDtypeStruct]:
    """What chunked_linear_attention keeps for gradients: the states before each chunk, [B, N, chunks, F, V], and with
    the delta rule inverses [B, N, BLOCK, T']; padded as the kernels take them."""
    del log_decay
    batch, length, heads, features = query.shape
    padded = round_up(length, CHUNK)
    widths = common.padded_width(features), common.padded_width(value.shape[-1])
    states = jax.ShapeDtypeStruct((batch, heads, padded // CHUNK, *widths), query.dtype)
    inverses = jax.ShapeDtypeStruct((batch, heads, BLOCK, padded), jnp.float32)
    return [states] if beta is None else [states, inverses]


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
      query: [B, T, N, F], bfloat16 or float32, after the feature map and the scale.
      key: [B, T, K, F] of the same dtype. K divides N: query head n reads key head n // (N / K).
      value: [B, T, K, V] of the same dtype.
      log_decay: [B, T, N] or [B, T, N, F], finite, or None.
      beta: [B, T, N] or None.
      state: [B, N, F, V], before the first token.
      out_dtype: of the output; query's by default.
      keep: also return what chunked_linear_gradients needs.

    Returns:
      out [B, T, N, V], the state after the last token [B, N, F, V] float32, and with keep arrays of kept_shapes().

    Raises:
      ValueError: with refusal()'s reason.

    Complexity, per head: O(T (C (F + V) + F V)) time with C = 128, and O(T log(C) C^2) more with the delta rule.
    """
    if (reason := refusal(query, key, value, log_decay, beta)) is not None:
        raise ValueError(f"chunked_linear_attention: {reason}")
    call = Call(query, key, value, log_decay, beta, state)
    kept_parts = call.kept(kept_shapes(query, value, log_decay, beta)) if keep else []
    out_part = call.queries(call.value_dim, out_dtype or query.dtype)

    def function(arrays: list[Array], state: Array, mild: bool = False) -> tuple[Array, list[Any]]:
        inputs, _ = call.given(arrays)
        (after, out), inverses = chunk(query.dtype, state, *inputs, mild=mild)
        return after, [out, state, inverses][: 1 + len(kept_parts)]

    inputs = call.inputs(query, key, value, log_decay, beta)
    (out, *kept), last = call.run("chunked_linear_attention", function, inputs, state, [out_part, *kept_parts])
    out = call.tokens(out_part, out, value.shape[-1])
    return (out, last, kept) if keep else (out, last)


def chunked_linear_gradients(
    query: Array,
    key: Array,
    value: Array,
    log_decay: Array | None,
    beta: Array | None,
    kept: list[Array],
    out_gradient: Array,
    state_gradient: Array,
) -> tuple[Array, Array, Array, Array | None, Array | None, Array]:
    """Gradients of chunked_linear_attention with respect to query, key, value, log_decay, beta and state.

    Args:
      query .. beta: as there. kept: what keep gave.
      out_gradient: [B, T, N, V]. state_gradient: [B, N, F, V], of the state after the last token.
    """
    if (reason := refusal(query, key, value, log_decay, beta)) is not None:
        raise ValueError(f"chunked_linear_gradients: {reason}")
    call = Call(query, key, value, log_decay, beta, state_gradient, backwards=True)

    def function(arrays: list[Array], to_state: Array, mild: bool = False) -> tuple[Array, list[Array]]:
        inputs, (out_gradient, state, *inverses) = call.given(arrays)

        def run(*inputs: Any) -> Any:
            return chunk(query.dtype, *inputs, *inverses, mild=mild)[0]

        _, pull = jax.vjp(run, state, *inputs)
        to_state, *gradients = pull((to_state, out_gradient))
        return to_state, [x for x in gradients if x is not None]

    out_part = call.queries(call.value_dim, out_gradient.dtype)
    given = [
        *call.inputs(query, key, value, log_decay, beta),
        (out_part, call.laid_out(out_part, out_gradient)),
        *zip(call.kept(kept), kept),
    ]
    parts = call.gradients()
    gradients, to_state = call.run("chunked_linear_gradients", function, given, state_gradient, parts)
    (to_query, to_key, to_value, to_decay, to_beta), _ = call.given(gradients)
    return (
        call.tokens(parts[0], to_query, query.shape[-1]),
        call.to_keys(parts[1], to_key, key),
        call.to_keys(parts[2], to_value, value),
        None if log_decay is None else call.to_decay(parts[3], to_decay, log_decay),
        None if beta is None else call.to_row(to_beta, beta),
        to_state,
    )
