"""A token of linear attention for TPU: a state is read once, changed and written in place.

    S~ = diag(a) S        u = v, or beta (v - S~^T k)        S' = S~ + k u^T        out = q^T S'

The grid is (batch, blocks of heads); a step is so short of arithmetic that its time is that of moving the state.
"""

from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from kernels_pallas.tpu.common import LANES, SUBLANES, VMEM_BUDGET, round_up, varying, zero

Array = jax.Array

_BLOCK_HEADS = 8


def block_heads(heads: int, features: int, value_dim: int) -> int:
    """The most heads of a block that divide all and fit, or 0."""
    counts = [n for n in range(1, min(heads, _BLOCK_HEADS) + 1) if heads % n == 0]
    return max((n for n in counts if _block_bytes(n, features, value_dim) <= VMEM_BUDGET), default=0)


def _block_bytes(count: int, features: int, value_dim: int) -> int:
    rows, lanes = round_up(features, SUBLANES), round_up(value_dim, LANES)
    state = count * rows * lanes
    small = 3 * rows * LANES + 3 * SUBLANES * lanes
    # Two buffers of what is read and of what is written; the temporaries of a head.
    return 4 * (2 * (2 * state + small) + 4 * rows * lanes)


def vmem_bytes(heads: int, features: int, value_dim: int) -> int:
    """VMEM that the kernel takes at most."""
    return _block_bytes(max(1, block_heads(heads, features, value_dim)), features, value_dim)


def refusal(state: Any) -> str | None:
    """Why linear_step cannot serve this state [B, N, F, V], or None if it can."""
    if state.dtype != jnp.float32:
        return f"needs a float32 state, got {state.dtype}"
    needed = vmem_bytes(*state.shape[1:])
    if needed > VMEM_BUDGET:
        return f"takes {needed / 2**20:.1f} MiB of VMEM, more than {VMEM_BUDGET / 2**20:.0f} MiB"
    return None


def linear_step(
    state: Array, query: Array, key: Array, value: Array, decay: Array | None = None, beta: Array | None = None
) -> tuple[Array, Array]:
    """One token.

    Args:
      state: [B, N, F, V] float32.
      query, key: [B, N, F] float32, after the feature map and the scale. value: [B, N, V] float32.
      decay: [B, N, F] float32, the factor of each of the state's rows, or None for 1.
      beta: [B, N] float32, with the delta rule.

    Returns:
      out [B, N, V] and the new state, both float32; the state's memory is reused where the caller gives it away.

    Raises:
      ValueError: with refusal()'s reason.

    Complexity: O(B N F V) time; reads and writes the state once.
    """
    reason = refusal(state)
    if reason is not None:
        raise ValueError(f"linear_step: {reason}")
    batch, heads, features, value_dim = state.shape
    count = block_heads(heads, features, value_dim)
    blocks = heads // count

    def columns(x: Array) -> Array:
        """[B, N, F] -> [B, blocks, F, heads of a block]: a head's numbers lie along the rows of its state."""
        return jnp.swapaxes(x.reshape(batch, blocks, count, features), 2, 3)

    def rows(x: Array) -> Array:
        return x.reshape(batch, blocks, count, value_dim)

    def block(*shape: int) -> Any:
        return pl.BlockSpec((None, None, *shape), lambda b, n: (b, n, *(zero() for _ in shape)))

    arrays = [columns(query), columns(key)] + ([] if decay is None else [columns(decay)])
    arrays += [rows(value)]
    if beta is not None:
        arrays += [rows(jnp.broadcast_to(beta[..., None], value.shape))]

    def kernel(state_ref: Any, query_ref: Any, key_ref: Any, *refs: Any) -> None:
        *given, out_ref, new_ref = refs
        inputs = iter(given)
        decay_ref = None if decay is None else next(inputs)
        value_ref = next(inputs)
        beta_ref = None if beta is None else next(inputs)
        for head in range(count):
            now, column, row = state_ref[head], slice(head, head + 1), slice(head, head + 1)
            key = key_ref[:, column]
            if decay_ref is not None:
                now = decay_ref[:, column] * now
            update = value_ref[row]
            if beta_ref is not None:
                update = beta_ref[row] * (update - jnp.sum(key * now, axis=0, keepdims=True))
            now = now + key * update
            new_ref[head] = now
            out_ref[row] = jnp.sum(query_ref[:, column] * now, axis=0, keepdims=True)

    over = varying(state, query, key, value, *(x for x in (decay, beta) if x is not None))
    out, new = pl.pallas_call(
        kernel,
        grid=(batch, blocks),
        in_specs=[block(count, features, value_dim)]
        + [block(features, count)] * (2 + (decay is not None))
        + [block(count, value_dim)] * (1 + (beta is not None)),
        out_specs=[block(count, value_dim), block(count, features, value_dim)],
        out_shape=[
            jax.ShapeDtypeStruct((batch, blocks, count, value_dim), jnp.float32, manual_axis_type=over),
            jax.ShapeDtypeStruct((batch, blocks, count, features, value_dim), jnp.float32, manual_axis_type=over),
        ],
        input_output_aliases={0: 1},
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "parallel"), vmem_limit_bytes=VMEM_BUDGET
        ),
        cost_estimate=pl.CostEstimate(flops=8 * state.size, transcendentals=0, bytes_accessed=8 * state.size),
        name="linear_step",
    )(state.reshape(batch, blocks, count, features, value_dim), *arrays)
    return out.reshape(batch, heads, value_dim), new.reshape(state.shape)
