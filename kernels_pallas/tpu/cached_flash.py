"""Attention of a few tokens to a cache of keys and values, for TPU: a step of decoding.

    out = sum_{s visible} softmax_s(scale q . k_s) v_s

With a softcap c the logits are c tanh(scale / c q . k_s). With sinks a head has one key more, of a logit of its own and
no value: the running maximum and sum begin with it.

The cache stays as it lies, [slots, heads, head dim]: its first two axes are read as one, rows of (slot, head). A block
of rows is multiplied with all tokens' query heads, and of the products those of a query head with another's key head
count as not visible. That wastes products, of which a step has few, and spares transposing the cache, which takes
longer than the step. A row's key head and which tokens see it are bits of one number. The grid is (batch, blocks of
rows); blocks after the last slot in use, each sequence's own, are not read.

Numerics as in banded_flash.py.
"""

import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from kernels_pallas.tpu.band import MASKED
from kernels_pallas.tpu.common import LANES, VMEM_BUDGET, dot, round_up, varying, zero

Array = jax.Array

_BLOCK_ROWS = 2048
_HEAD_BITS = 16
MOST_TOKENS = 32 - _HEAD_BITS  # of a step


def _block_rows(slots: int, key_heads: int) -> int:
    """Rows in a block: all, or whole registers of whole slots."""
    unit = math.lcm(key_heads, LANES)
    return min(unit * max(1, _BLOCK_ROWS // unit), slots * key_heads)


def num_blocks(slots: int, key_heads: int) -> int:
    return math.ceil(slots * key_heads / _block_rows(slots, key_heads))


def vmem_bytes(slots: int, heads: int, key_heads: int, head_dim: int, value_dim: int, dtype: Any) -> int:
    """VMEM that the kernel takes at most: two buffers for every block, the running state, and a step's temporaries.

    heads: query heads of all of a step's tokens."""
    size = jnp.dtype(dtype).itemsize
    rows, queries = round_up(_block_rows(slots, key_heads), LANES), round_up(heads, 16)
    key_lanes, value_lanes = (round_up(width, LANES) for width in (head_dim, value_dim))
    blocks = size * (rows * (key_lanes + value_lanes) + queries * (key_lanes + value_lanes)) + 4 * 8 * rows
    state = 4 * queries * (2 * LANES + value_lanes + 2 * LANES)  # with two buffers of sink logits, which few have
    logits = (4 + 4 + size) * queries * rows
    splits = 3 * size * rows * (key_lanes + value_lanes) if size == 4 else 0  # of operands, into bfloat16 parts
    return 2 * blocks + state + logits + size * rows * value_lanes + splits


def refusal(query: Any, key: Any, value: Any) -> str | None:
    """Why cached_flash_attention cannot serve these arrays (or shape structs), or None if it can."""
    dtype = jnp.dtype(query.dtype)
    if dtype not in (jnp.bfloat16, jnp.float32) or not dtype == key.dtype == value.dtype:
        return f"needs query and cache all bfloat16 or all float32, got {dtype}, {key.dtype} and {value.dtype}"
    _, slots, key_heads, head_dim = key.shape
    tokens, heads = query.shape[1:3]
    if tokens > MOST_TOKENS:
        return f"serves up to {MOST_TOKENS} tokens a step, got {tokens}"
    needed = vmem_bytes(slots, tokens * heads, key_heads, head_dim, value.shape[-1], dtype)
    if needed > VMEM_BUDGET:
        return f"takes {needed / 2**20:.1f} MiB of VMEM, more than {VMEM_BUDGET / 2**20:.0f} MiB"
    return None


def cached_flash_attention(
    query: Array,
    key: Array,
    value: Array,
    visible: Array,
    used: Array,
    *,
    scale: float | Array,
    softcap: float | None = None,
    sink_logits: Array | None = None,
) -> Array:
    """Attention of a few tokens to the slots of a cache that each of them sees.

    Args:
      query: [B, T, N, H], bfloat16 or float32. T is 1 to 16.
      key: [B, S, K, H] of the same dtype, S slots. K divides N: query head n reads key head n // (N / K).
      value: [B, S, K, V] of the same dtype.
      visible: bool [B, T, S].
      used: int [B]; no slot of the sequence from this one on is visible.
      scale: factor on the logits, may be traced.
      softcap: a number above 0, or None. sink_logits: [N], or None.

    Returns:
      [B, T, N, V] in query's dtype; 0 where no slot is visible.

    Raises:
      ValueError: with refusal()'s reason.

    Complexity: O(T N K (H + V)) time for each slot in use; reads each row of the used blocks once.
    """
    reason = refusal(query, key, value)
    if reason is not None:
        raise ValueError(f"cached_flash_attention: {reason}")
    batch, slots, key_heads, head_dim = key.shape
    tokens, heads, value_dim = *query.shape[1:3], value.shape[-1]
    queries = tokens * heads
    block, rows = _block_rows(slots, key_heads), slots * key_heads
    blocks = num_blocks(slots, key_heads)
    bits = visible.astype(jnp.int32) << (_HEAD_BITS + jnp.arange(tokens, dtype=jnp.int32))[:, None]
    seen_by = jnp.repeat(jnp.sum(bits, axis=1, dtype=jnp.int32), key_heads, axis=1)
    seen_by |= jnp.arange(rows, dtype=jnp.int32) % key_heads
    seen_by = jnp.pad(seen_by, ((0, 0), (0, blocks * block - rows)))[:, None]
    live = jnp.clip((used.astype(jnp.int32) * key_heads + block - 1) // block, 1, blocks)

    def row_block(b: Any, s: Any, live: Any) -> tuple[Any, ...]:
        return b, jnp.minimum(s, live[b] - 1), zero()

    def lane_block(b: Any, s: Any, live: Any) -> tuple[Any, ...]:
        return b, zero(), jnp.minimum(s, live[b] - 1)

    def whole(b: Any, s: Any, live: Any) -> tuple[Any, ...]:
        return b, zero(), zero()

    sizes: Any = {"heads": heads, "key_heads": key_heads, "rows": rows}
    sinks = [] if sink_logits is None else [jnp.tile(sink_logits.astype(jnp.float32), tokens)[:, None]]
    out = pl.pallas_call(
        functools.partial(_kernel, **sizes, softcap=softcap, has_sink_logits=bool(sinks)),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=1,
            grid=(batch, blocks),
            in_specs=[
                pl.BlockSpec((1, 1), lambda *_: (zero(), zero()), memory_space=pltpu.SMEM),
                pl.BlockSpec((None, queries, head_dim), whole),
                pl.BlockSpec((None, block, head_dim), row_block),
                pl.BlockSpec((None, block, value_dim), row_block),
                pl.BlockSpec((None, 1, block), lane_block),
                *[pl.BlockSpec((queries, 1), lambda *_: (zero(), zero()))] * len(sinks),
            ],
            out_specs=pl.BlockSpec((None, queries, value_dim), whole),
            scratch_shapes=[
                pltpu.VMEM((queries, LANES), jnp.float32),
                pltpu.VMEM((queries, LANES), jnp.float32),
                pltpu.VMEM((queries, value_dim), jnp.float32),
            ],
        ),
        out_shape=jax.ShapeDtypeStruct(
            (batch, queries, value_dim),
            query.dtype,
            manual_axis_type=varying(query, key, value, visible, used, jnp.asarray(scale), *sinks),
        ),
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "arbitrary"), vmem_limit_bytes=VMEM_BUDGET
        ),
        cost_estimate=pl.CostEstimate(
            flops=2 * batch * queries * rows * (head_dim + value_dim),
            transcendentals=batch * queries * rows,
            bytes_accessed=batch * rows * (head_dim + value_dim) * key.dtype.itemsize,
        ),
        name="cached_flash_attention",
    )(
        live,
        jnp.asarray(scale, jnp.float32).reshape(1, 1),
        query.reshape(batch, queries, head_dim),
        key.reshape(batch, rows, head_dim),
        value.reshape(batch, rows, value_dim),
        seen_by,
        *sinks,
    )
    return out.reshape(batch, tokens, heads, value_dim)


def _kernel(
    live_ref: Any,
    scale_ref: Any,
    *refs: Any,
    heads: int,
    key_heads: int,
    rows: int,
    softcap: float | None,
    has_sink_logits: bool,
) -> None:
    """One block of rows."""
    query_ref, key_ref, value_ref, seen_by_ref, *sinks, out_ref, maximum_ref, sum_ref, acc_ref = refs
    step = pl.program_id(1)

    @pl.when(step == 0)
    def _() -> None:
        if has_sink_logits:
            maximum_ref[...] = jnp.broadcast_to(jnp.maximum(sinks[0][...], MASKED), maximum_ref.shape)
            sum_ref[...] = jnp.ones_like(sum_ref)
        else:
            maximum_ref[...] = jnp.full_like(maximum_ref, MASKED)
            sum_ref[...] = jnp.zeros_like(sum_ref)
        acc_ref[...] = jnp.zeros_like(acc_ref)

    @pl.when(step < live_ref[pl.program_id(0)])
    def _() -> None:
        logits = scale_ref[0, 0] * dot(query_ref[...], key_ref[...], contract=(1, 1))
        if softcap is not None:  # of infinity the tanh is 1
            capped = np.float32(softcap) * jnp.tanh(logits / np.float32(softcap))
            logits = jnp.where(jnp.abs(logits) < np.float32(np.inf), capped, np.float32(np.nan))
        query = lax.broadcasted_iota(jnp.int32, (logits.shape[0], 1), 0)
        key_head = lax.div(lax.rem(query, np.int32(heads)), np.int32(heads // key_heads))
        wanted = key_head | lax.shift_left(np.int32(1), np.int32(_HEAD_BITS) + lax.div(query, np.int32(heads)))
        seen_by = seen_by_ref[...]
        if logits.shape[0] > heads:  # without the bits of other tokens
            seen_by &= wanted | np.int32(2**_HEAD_BITS - 1)
        logits = jnp.where(seen_by == wanted, logits, MASKED)
        old_maximum = maximum_ref[:, :1]
        maximum = jnp.maximum(old_maximum, jnp.max(logits, axis=1, keepdims=True))
        weights = jnp.exp(logits - maximum)
        decay = jnp.exp(old_maximum - maximum)
        maximum_ref[...] = jnp.broadcast_to(maximum, maximum_ref.shape)
        sum_ref[...] = decay * sum_ref[...] + jnp.sum(weights, axis=1, keepdims=True)
        values = value_ref[...]
        # Rows after the last lie outside the array; what is read there may be NaN.
        row = step * np.int32(values.shape[0]) + lax.broadcasted_iota(jnp.int32, (values.shape[0], 1), 0)
        values = jnp.where(row < rows, values, jnp.zeros_like(values))
        acc_ref[...] = decay * acc_ref[...] + dot(weights.astype(values.dtype), values, contract=(1, 0))

    @pl.when(step == pl.num_programs(1) - 1)
    def _() -> None:
        empty = maximum_ref[:, :1] <= MASKED
        total = jnp.where(empty, np.float32(1), sum_ref[:, :1])
        out_ref[...] = jnp.where(empty, np.float32(0), acc_ref[...] / total).astype(out_ref.dtype)
