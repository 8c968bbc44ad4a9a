"""A token of local linear attention for TPU: a regression per query head on a cache of keys and values.

    p = softmax over the slots in use of scale q . k_s        kbar = sum_s p_s k_s        vbar = sum_s p_s v_s
    Cov_p(k, k) x + ridge x = q - kbar                        out = vbar + Cov_p(v, k) x

The cache stays as it lies, as in cached_flash.py: rows of (slot, key head), multiplied with all query heads. The grid
is (batch, blocks of rows); each block is kept in VMEM, and after the last one in use, each sequence's own, the rest is
computed, by covariance_solve.py's iterations.

Numerics as there.
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

from kernels_pallas.tpu.band import MASKED, over_lanes
from kernels_pallas.tpu.common import LANES, VMEM_BUDGET, dot, round_up, varying, zero
from kernels_pallas.tpu.covariance_solve import conjugate_gradients, parts, product, state_of

Array = jax.Array

_BLOCK_ROWS = 1024
_QUERIES = 16  # a multiple of which there are, some of them padding


def blocks_of(slots: int, key_heads: int) -> tuple[int, int]:
    """How many blocks, and the rows in each: whole registers of whole slots."""
    unit = math.lcm(key_heads, LANES)
    block = unit * max(1, min(_BLOCK_ROWS, round_up(slots * key_heads, unit)) // unit)
    return math.ceil(slots * key_heads / block), block


def vmem_bytes(slots: int, heads: int, key_heads: int, head_dim: int, value_dim: int, dtype: Any) -> int:
    """VMEM that the kernel takes at most: keys, values and weights, two buffers of a block, vectors, temporaries."""
    size, queries = jnp.dtype(dtype).itemsize, round_up(heads, _QUERIES)
    blocks, block = blocks_of(slots, key_heads)
    widths = sum(round_up(width, LANES) for width in (head_dim, value_dim))
    held = blocks * block * (size * widths + 4 * queries)
    state = 4 * queries * (5 * round_up(head_dim, LANES) + 8 * LANES)
    temporaries = 4 * 6 * queries * block + (3 if size == 4 else 1) * size * block * widths
    return held + 2 * size * block * widths + state + temporaries


def refusal(query: Any, key: Any, value: Any) -> str | None:
    """Why local_linear_step cannot serve these arrays (or shape structs), or None if it can."""
    dtype = jnp.dtype(query.dtype)
    if dtype not in (jnp.bfloat16, jnp.float32) or not dtype == key.dtype == value.dtype:
        return f"needs query and cache all bfloat16 or all float32, got {dtype}, {key.dtype} and {value.dtype}"
    _, slots, key_heads, head_dim = key.shape
    if any(width > LANES and width % LANES for width in (head_dim, value.shape[-1])):
        return f"serves head dims up to {LANES} and multiples of it, got {head_dim} and {value.shape[-1]}"
    needed = vmem_bytes(slots, query.shape[2], key_heads, head_dim, value.shape[-1], dtype)
    if needed > VMEM_BUDGET:
        return (
            f"{slots} slots of {key_heads} key heads take {needed / 2**20:.1f} MiB of VMEM, more than "
            f"{VMEM_BUDGET / 2**20:.0f} MiB"
        )
    return None


def local_linear_step(
    query: Array,
    key: Array,
    value: Array,
    ridge: Array,
    used: Array,
    *,
    scale: float | Array,
    tolerance: float,
    max_iterations: int,
) -> Array:
    """Local linear attention of a token to the slots of a cache that are in use.

    Args:
      query: [B, 1, N, H], bfloat16 or float32. key: [B, S, K, H], value: [B, S, K, V] of the same dtype, S slots. K
        divides N.
      ridge: [B, 1, N], above 0. used: int [B]: the first `used` slots are seen, one at least.
      scale: factor on the logits. tolerance, max_iterations: as in covariance_solve.

    Returns:
      [B, 1, N, V] in query's dtype.

    Raises:
      ValueError: with refusal()'s reason.

    Complexity: O(N K (H + V)) time for each slot in use, and O(N K H) for each iteration; reads each used row once.
    """
    reason = refusal(query, key, value)
    if reason is not None:
        raise ValueError(f"local_linear_step: {reason}")
    batch, slots, key_heads, head_dim = key.shape
    heads, value_dim = query.shape[2], value.shape[-1]
    queries = round_up(heads, _QUERIES)
    blocks, block = blocks_of(slots, key_heads)
    rows = used.astype(jnp.int32) * np.int32(key_heads)
    past = ((0, 0), (0, queries - heads))

    def block_of(b: Any, s: Any, rows: Any) -> tuple[Any, ...]:
        return b, jnp.minimum(s, lax.div(rows[b] - 1, np.int32(block))), zero()

    def whole(b: Any, s: Any, rows: Any) -> tuple[Any, ...]:
        return b, zero(), zero()

    options: dict[str, Any] = {"tolerance": tolerance, "max_iterations": max_iterations}
    column = pltpu.VMEM((queries, LANES), jnp.float32)
    out = pl.pallas_call(
        functools.partial(_kernel, heads=heads, key_heads=key_heads, **options),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=1,
            grid=(batch, blocks),
            in_specs=[
                pl.BlockSpec((1, 1), lambda *_: (zero(), zero()), memory_space=pltpu.SMEM),
                pl.BlockSpec((None, queries, head_dim), whole),
                pl.BlockSpec((None, queries, 1), whole),
                pl.BlockSpec((None, block, head_dim), block_of),
                pl.BlockSpec((None, block, value_dim), block_of),
            ],
            out_specs=pl.BlockSpec((None, queries, value_dim), whole),
            scratch_shapes=[
                pltpu.VMEM((blocks, block, head_dim), key.dtype),
                pltpu.VMEM((blocks, block, value_dim), key.dtype),
                pltpu.VMEM((blocks, queries, block), jnp.float32),
                column,
                column,
                *state_of(queries, head_dim, key.dtype),
            ],
        ),
        out_shape=jax.ShapeDtypeStruct(
            (batch, queries, value_dim),
            query.dtype,
            manual_axis_type=varying(query, key, value, ridge, used, jnp.asarray(scale)),
        ),
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "arbitrary"), vmem_limit_bytes=VMEM_BUDGET
        ),
        name="local_linear_step",
    )(
        rows,
        jnp.asarray(scale, jnp.float32).reshape(1, 1),
        jnp.pad(query[:, 0], (*past, (0, 0))),
        jnp.pad(ridge[:, 0].astype(jnp.float32), past, constant_values=1)[..., None],
        key.reshape(batch, slots * key_heads, head_dim),
        value.reshape(batch, slots * key_heads, value_dim),
    )
    return out[:, None, :heads]


def _kernel(rows_ref: Any, scale_ref: Any, *refs: Any, heads: int, key_heads: int, **options: Any) -> None:
    """One block of rows; with the last one that is in use, the token."""
    query_ref, ridge_ref, key_ref, value_ref, out_ref, keys, values, weights, maximum_ref, sum_ref, *state = refs
    step, rows, block = pl.program_id(1), rows_ref[pl.program_id(0)], key_ref.shape[0]

    @pl.when(step == 0)
    def _() -> None:
        maximum_ref[...] = jnp.full_like(maximum_ref, MASKED)
        sum_ref[...] = jnp.zeros_like(sum_ref)

    @pl.when(step * np.int32(block) < rows)
    def _() -> None:
        first = step * np.int32(block)
        is_used = first + lax.broadcasted_iota(jnp.int32, (block, 1), 0) < rows  # others may hold NaN
        keys[step] = jnp.where(is_used, key_ref[...], jnp.zeros_like(key_ref))
        values[step] = jnp.where(is_used, value_ref[...], jnp.zeros_like(value_ref))
        logits = scale_ref[0, 0] * dot(query_ref[...], keys[step], (1, 1))
        row = first + lax.broadcasted_iota(jnp.int32, (1, block), 1)
        key_head = lax.div(lax.broadcasted_iota(jnp.int32, (logits.shape[0], 1), 0), np.int32(heads // key_heads))
        logits = jnp.where((row < rows) & (lax.rem(row, np.int32(key_heads)) == key_head), logits, MASKED)
        weights[step] = logits
        old = maximum_ref[...]
        maximum = jnp.maximum(old, jnp.max(logits, axis=1, keepdims=True))
        terms = jnp.exp(logits - over_lanes(maximum, block))
        sum_ref[...] = jnp.exp(old - maximum) * sum_ref[...] + jnp.sum(terms, axis=1, keepdims=True)
        maximum_ref[...] = maximum

    @pl.when(step == pl.num_programs(1) - 1)
    def _() -> None:
        count = lax.div(rows + np.int32(block - 1), np.int32(block))
        # Queries in the padding see no row; their weights are 0.
        empty = maximum_ref[...] <= MASKED
        lse = jnp.where(empty, 0, maximum_ref[...] + jnp.log(jnp.where(empty, 1, sum_ref[...])))

        def add(j: Any, means: tuple[Array, Array]) -> Any:
            weights[j] = jnp.exp(weights[j] - over_lanes(lse, block))
            of_block = parts(weights[j], keys.dtype)
            return tuple(mean + product(of_block, x[j], (1, 0)) for mean, x in zip(means, (keys, values)))

        empty_means = tuple(jnp.zeros((query_ref.shape[0], x.shape[2]), jnp.float32) for x in (keys, values))
        key_mean, value_mean = lax.fori_loop(zero(), count, add, empty_means)
        offset = query_ref[...].astype(jnp.float32) - key_mean
        ridge = jnp.broadcast_to(ridge_ref[...], (offset.shape[0], LANES))
        x, _, _ = conjugate_gradients(keys, weights, count, offset, ridge, key_mean, state, **options)
        halves = parts(x, keys.dtype)
        tilt = jnp.sum(x * key_mean, axis=1, keepdims=True)

        def tilted(j: Any, out: Array) -> Array:
            changes = weights[j] * (product(halves, keys[j], (1, 1)) - tilt)
            return out + product(parts(changes, keys.dtype), values[j], (1, 0))

        out_ref[...] = lax.fori_loop(zero(), count, tilted, value_mean).astype(out_ref.dtype)
