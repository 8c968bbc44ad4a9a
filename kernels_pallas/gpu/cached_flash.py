"""Attention of one token to a cache of keys and values, for Hopper: a step of decoding.

    out = sum_{s visible} softmax_s(scale q . k_s) v_s

The cache stays as it lies, [slots, heads, head dim], and every slot in use is read once: that takes the time. A block
is one warpgroup; its rows are the query heads of one key head, padded to the 64 that the tensor cores multiply. The
slots in use are parted among as many blocks as fill the card; each writes its sum of weighted values, not yet divided,
with its largest logit and the sum of its weights, and these are added afterwards (Flash-Decoding, Dao et al. 2023).

Numerics as in banded_flash.py; the parts are float32. Two runs give the same bits.
"""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from kernels_pallas.gpu import blocks
from kernels_pallas.gpu.band import MASKED, factor_of, padded_width
from kernels_pallas.gpu.common import (
    COLUMN,
    ROW,
    ROWS,
    SMEM_BUDGET,
    Product,
    Ring,
    add_dot,
    barriers,
    by_column,
    by_row,
    dot,
    full,
    half,
    iota,
    launch,
    load,
    single,
    store,
)

Array = jax.Array

SLOTS = 64  # of the cache, that are multiplied at once
_ALIGNED = 8  # slots that a copy to shared memory begins at a multiple of
_MOST_WIDTH = 256
_BLOCKS = 264  # two for each of the card's 132 multiprocessors, which hide each other's waits
_SPARE_BYTES = 2048  # of shared memory, for masks and barriers


def _own_bytes(key_width: int, value_width: int) -> int:
    return 2 * ROWS * key_width + 4 * ROWS * value_width


def _stages(key_width: int, value_width: int) -> int:
    """As many as let two blocks share a multiprocessor; at least two."""
    each = 2 * SLOTS * (key_width + value_width)
    return max(2, min(4, (SMEM_BUDGET // 2 - _SPARE_BYTES - _own_bytes(key_width, value_width)) // each))


def smem_bytes(key_width: int, value_width: int) -> int:
    """Shared memory of a block, at padded widths."""
    moving = 2 * _stages(key_width, value_width) * SLOTS * (key_width + value_width)
    return _own_bytes(key_width, value_width) + moving + _SPARE_BYTES


def refusal(query: Any, key: Any, value: Any) -> str | None:
    """Why cached_flash_attention cannot serve these arrays (or shape structs), or None if it can."""
    dtype = jnp.dtype(query.dtype)
    if dtype not in (jnp.bfloat16, jnp.float16) or not dtype == key.dtype == value.dtype:
        return f"needs query and cache all bfloat16 or all float16, got {dtype}, {key.dtype} and {value.dtype}"
    if query.shape[1] > 1:
        return f"serves one token a step, got {query.shape[1]}"
    if query.shape[2] > ROWS * key.shape[2]:
        return f"serves up to {ROWS} query heads for a key head, got {query.shape[2]} for {key.shape[2]}"
    if max(query.shape[-1], value.shape[-1]) > _MOST_WIDTH:
        return f"serves head dims up to {_MOST_WIDTH}, got {query.shape[-1]} and {value.shape[-1]}"
    if 0 in query.shape or 0 in key.shape:
        return f"needs arrays that are not empty, got query {query.shape} and key {key.shape}"
    return None


def cached_flash_attention(
    query: Array, key: Array, value: Array, visible: Array, used: Array, *, scale: float | Array
) -> Array:
    """Attention of one query per head to the visible slots of a cache.

    Args:
      query: [B, 1, N, H], bfloat16 or float16.
      key: [B, S, K, H] of the same dtype, S slots. Query head n reads key head n // (N / K), where N / K is at most 64.
      value: [B, S, K, V] of the same dtype. H and V up to 256.
      visible: bool [B, 1, S].
      used: int [B]; no slot of the sequence from this one on is visible.
      scale: factor on the logits, may be traced.

    Returns:
      [B, 1, N, V] in query's dtype; 0 where no slot is visible.

    Raises:
      ValueError: with refusal()'s reason.

    Complexity: O(B K used (H + V)) time, reads each slot in use once. The cache is copied first where S is no multiple
    of 8, or less than 64, or a head dim is none of 64, 128, 192 and 256.
    """
    reason = refusal(query, key, value)
    if reason is not None:
        raise ValueError(f"cached_flash_attention: {reason}")
    batch, slots, key_heads, head_dim = key.shape
    heads, value_dim = query.shape[2], value.shape[-1]
    group, widths = heads // key_heads, (padded_width(head_dim), padded_width(value_dim))
    padded_slots = max(SLOTS, -(-slots // _ALIGNED) * _ALIGNED)
    rows = -(-group // _ALIGNED) * _ALIGNED
    sign, factor = factor_of(scale)
    of_head = (query[:, 0] * sign.astype(query.dtype)).reshape(batch, key_heads, group, head_dim)
    of_head = jnp.pad(of_head, ((0, 0), (0, 0), (0, ROWS - group), (0, widths[0] - head_dim)))
    key, value = (
        jnp.pad(x, ((0, 0), (0, padded_slots - slots), (0, 0), (0, width - x.shape[-1])))
        for x, width in ((key, widths[0]), (value, widths[1]))
    )
    sees = jnp.pad(visible[:, 0].astype(jnp.int32), ((0, 0), (0, padded_slots - slots)))
    tiles = -(-padded_slots // SLOTS)
    parts = min(tiles, max(1, -(-_BLOCKS // (batch * key_heads))))
    used_tiles = jnp.clip((used.astype(jnp.int32) + np.int32(SLOTS - 1)) // SLOTS, 1, tiles)
    name = "cached_flash_attention"
    [stages] = blocks.chosen(name, widths, [(n,) for n in range(_stages(*widths), 1, -1)])
    out, totals = launch(
        _body(padded_slots, parts, rows, stages, widths[1], query.dtype),
        name,
        factor,
        used_tiles,
        of_head,
        key,
        value,
        sees,
        out=[
            ((batch, key_heads, parts, rows, widths[1]), jnp.float32),
            ((batch, key_heads, parts, 2, ROWS), jnp.float32),
        ],
        grid={"batch": batch, "head": key_heads, "part": parts},
        scratch=[
            half(ROWS, widths[0], dtype=query.dtype),
            half(stages, SLOTS, widths[0], dtype=query.dtype),
            half(stages, SLOTS, widths[1], dtype=query.dtype),
            plgpu.SMEM((stages, SLOTS), jnp.int32),
            single(ROWS, widths[1]),
            plgpu.SMEM((2, ROWS), jnp.float32),
            barriers(1, 1),
            barriers(stages, 3),
            barriers(stages, 1),
        ],
        warpgroups=1,
    )
    maximum, weight = totals[:, :, :, 0, :group], totals[:, :, :, 1, :group]
    share = jnp.exp2(maximum - jnp.max(maximum, axis=2, keepdims=True))
    total = jnp.sum(share * weight, axis=2)[..., None]
    out = jnp.sum(share[..., None] * out[:, :, :, :group, :value_dim], axis=2)
    out = jnp.where(total > 0, out / jnp.where(total > 0, total, 1), 0)
    return out.reshape(batch, 1, heads, value_dim).astype(query.dtype)


def _body(slots: int, parts: int, rows: int, stages: int, value_width: int, dtype: Any) -> Any:
    def body(
        factor_ref: Any,
        used_ref: Any,
        query_ref: Any,
        key_ref: Any,
        value_ref: Any,
        sees_ref: Any,
        out_ref: Any,
        totals_ref: Any,
        query_s: Any,
        key_s: Any,
        value_s: Any,
        sees_s: Any,
        out_s: Any,
        totals_s: Any,
        query_ready: Any,
        ready: Any,
        free: Any,
    ) -> None:
        batch, head, part = (lax.axis_index(name) for name in ("batch", "head", "part"))
        factor, used = factor_ref[0], used_ref[batch]
        each = lax.div(used + np.int32(parts - 1), np.int32(parts))
        before = part * each
        count = jnp.maximum(jnp.minimum(each, used - before), 0)
        shape = (ROWS, SLOTS)

        def first_slot(number: Array) -> Array:
            """The last tile begins earlier where it would end past the last slot."""
            return jnp.minimum((before + number) * np.int32(SLOTS), np.int32(slots - SLOTS))

        def fetch(number: Array, slot: Array, barrier: Any) -> None:
            tokens = pl.ds(first_slot(number), SLOTS)
            plgpu.copy_gmem_to_smem(key_ref.at[batch, tokens, head], key_s.at[slot], barrier)
            plgpu.copy_gmem_to_smem(value_ref.at[batch, tokens, head], value_s.at[slot], barrier)
            plgpu.copy_gmem_to_smem(sees_ref.at[batch, tokens], sees_s.at[slot], barrier)

        ring = Ring(fetch, count, ready, free, stages)
        ring.start()
        plgpu.copy_gmem_to_smem(query_ref.at[batch, head], query_s, query_ready.at[0])
        plgpu.barrier_wait(query_ready.at[0])

        def attend(number: Array, carry: Any) -> Any:
            total, maximum, weight = carry
            ring.wait(number)
            slot = ring.slot(number)
            logits = dot(Product(query_s, key_s.at[slot], b_transposed=True), shape=shape) * factor
            sees = by_column(load(sees_s.at[slot], COLUMN), shape) > np.int32(0)
            sees &= iota(shape, 1) + first_slot(number) >= (before + number) * np.int32(SLOTS)
            logits = jnp.where(sees, logits, MASKED)
            new = jnp.maximum(maximum, logits.max(axis=1))
            # Where no slot has been seen yet the largest logit is MASKED itself, and exp2 gives 1.
            weights = jnp.where(sees, jnp.exp2(logits - by_row(new, shape)), np.float32(0))
            decay = jnp.exp2(maximum - new)
            weight = weight * decay + weights.sum(axis=1)
            total = add_dot(total * by_row(decay, total.shape), Product(weights.astype(dtype), value_s.at[slot]))
            ring.release(number)
            return total, new, weight

        carry = full((ROWS, value_width), 0.0), full((ROWS,), float(MASKED), ROW), full((ROWS,), 0.0, ROW)
        total, maximum, weight = lax.fori_loop(jnp.int32(0), count, attend, carry)
        store(out_s, total)
        store(totals_s.at[0], maximum)
        store(totals_s.at[1], weight)
        plgpu.copy_smem_to_gmem(out_s.at[pl.ds(0, rows)], out_ref.at[batch, head, part])
        plgpu.copy_smem_to_gmem(totals_s, totals_ref.at[batch, head, part])
        plgpu.wait_smem_to_gmem(0)

    return body
