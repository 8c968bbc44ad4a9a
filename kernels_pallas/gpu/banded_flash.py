"""Banded flash attention for Hopper: every query sees a box of keys, in 1, 2 or 3 axes, and the first `sinks` keys;
or what lists of tiles give it.

    out_t = sum_{s visible to t} softmax_s(scale q_t . k_s) v_s
    lse_t = log sum_{s visible to t} exp(scale q_t . k_s)

A block has a tile of queries of one head, 64 for each of two warpgroups, and goes through the tiles of keys on the
tile's list, first those that all see, then those of the edges, which are masked (FlashAttention, Dao et al. 2022). The
logits of the next step are multiplied while the exponentials of this one are computed (FlashAttention-3, Shah et al.
2024). Arrays are read as they lie, [B, T, N, H].

Numerics: 16-bit operands, float32 sums; weights are rounded to the values' dtype before they multiply them, and exp2 is
the hardware's. Two runs give the same bits. Gradients are in banded_flash_backward.py.
"""

import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from kernels_pallas.gpu import blocks
from kernels_pallas.gpu.band import MASKED, TILE, Band, Side, factor_of, numbers_in_turn, numbers_of, words_of
from kernels_pallas.gpu.band import refusal as band_refusal
from kernels_pallas.gpu.common import (
    ROW,
    ROWS,
    SMEM_BUDGET,
    WARPGROUPS,
    Product,
    Ring,
    add_dot,
    barriers,
    by_row,
    dot,
    dot_beside,
    full,
    half,
    in_loop,
    launch,
    store,
)
from kernels_pallas.patterns import Boxes, Pattern

Array = jax.Array

_LOG_2 = np.float32(math.log(2))
_MOST_STAGES = 4
_BARRIERS = 128  # bytes that they take at most


def _bytes(key_width: int, value_width: int, numbers: int, step: int, stages: int) -> int:
    """Of shared memory, where each array begins at a multiple of 1024. numbers: that a key brings for the mask."""
    queries, keys = 2 * TILE, 2 * stages * step
    outputs = queries * value_width if value_width != key_width else 0  # else they take the queries' place
    parts = [queries * key_width, outputs, keys * key_width, keys * value_width, 4 * TILE, 2 * keys * numbers]
    return sum(-(-part // 1024) * 1024 for part in parts) + _BARRIERS


def _sizes(key_width: int, value_width: int, numbers: int) -> list[tuple[int, int]]:
    """(keys that are multiplied at once, slots for them) that fit; two slots at least."""
    steps = (
        (128, 64) if max(key_width, value_width) <= 128 else (64,)
    )  # of a warpgroup, logits and outputs are in registers
    sizes = [(step, stages) for step in steps for stages in range(_MOST_STAGES, 1, -1)]
    return [each for each in sizes if _bytes(key_width, value_width, numbers, *each) <= SMEM_BUDGET] or sizes[-1:]


def smem_bytes(key_width: int, value_width: int, numbers: int = 0) -> int:
    """Shared memory of a block, at padded widths. numbers: that a key brings for the mask, coordinates and segment."""
    return _bytes(key_width, value_width, numbers, *_sizes(key_width, value_width, numbers)[0])


def refusal(query: Any, key: Any, value: Any, *, pattern: Pattern, segment_ids: Any = None) -> str | None:
    """Why banded_flash_attention cannot serve these arguments (arrays may be shape structs), or None if it can."""
    axes = len(pattern.axes) if isinstance(pattern, Boxes) else 1
    footprint = functools.partial(smem_bytes, numbers=axes * pattern.has_coordinates + (segment_ids is not None))
    return band_refusal(query, key, value, pattern=pattern, segment_ids=segment_ids, footprint=footprint)


def banded_flash_attention(
    query: Array,
    key: Array,
    value: Array,
    *,
    pattern: Pattern,
    segment_ids: tuple[Array, Array] | None = None,
    scale: float | Array,
) -> tuple[Array, Array]:
    """Attention of every query to the keys that the pattern gives it.

    Args:
      query: [B, T, N, H], bfloat16 or float16.
      key: [B, S, K, H] of the same dtype. K divides N: query head n reads key head n // (N / K).
      value: [B, S, K, V] of the same dtype. H and V up to 256; others than 64, 128, 192 and 256 are padded.
      pattern: of T queries and S keys.
      segment_ids: integers ([B, T], [B, S]); a query sees keys of its own segment only.
      scale: factor on the logits, may be traced.

    Returns:
      out [B, T, N, V] in query's dtype, lse [B, T, N] float32. A query that sees no key: 0 and -inf.

    Raises:
      ValueError: with refusal()'s reason.

    Complexity: O(B N H x visited tiles) time. Memory beside the arguments: padded copies where T or S is no multiple
    of 128, or a head dim is padded; of lists of tiles, a number for each pair of tiles if they are traced, and an
    eighth of the bank.
    """
    reason = refusal(query, key, value, pattern=pattern, segment_ids=segment_ids)
    if reason is not None:
        raise ValueError(f"banded_flash_attention: {reason}")
    band = Band(query, key, value, pattern.tiled(TILE, TILE), segment_ids)
    sign, factor = factor_of(scale)
    tokens = [band.queries(query * sign.astype(query.dtype)), band.keys(key), band.keys(value)]
    tables = [table for table in (band.query_table, band.key_table) if table is not None]
    widths, length = (band.key_width, band.value_width), band.query_tiles * TILE
    numbers = 0 if band.key_table is None else band.key_table.shape[1]
    name = "banded_flash_attention"
    step, stages = blocks.chosen(name, (*widths, numbers), _sizes(*widths, numbers))
    out, lse = launch(
        _body(band, step, stages),
        name,
        factor,
        *tokens,
        *band.lists(by_key=False),
        *tables,
        out=[
            ((band.batch, length, band.heads, band.value_width), band.dtype),
            ((band.batch, band.heads, length), jnp.float32),
        ],
        grid={"batch": band.batch, "head": band.heads, "tile": band.query_tiles},
        scratch=[
            half(WARPGROUPS, ROWS, band.key_width, dtype=band.dtype),
            half(WARPGROUPS, ROWS, band.value_width, dtype=band.dtype) if widths[0] != widths[1] else None,
            half(stages, step, band.key_width, dtype=band.dtype),
            half(stages, step, band.value_width, dtype=band.dtype),
            plgpu.SMEM((WARPGROUPS, ROWS), jnp.float32),
            None if band.key_table is None else plgpu.SMEM((stages, band.key_table.shape[1], step), jnp.int32),
            barriers(WARPGROUPS, 1),
            barriers(stages, 2 + (band.key_table is not None)),
            barriers(stages, WARPGROUPS),
        ],
    )
    out, lse = out[:, : query.shape[1], :, : value.shape[-1]], lse[:, :, : query.shape[1]]
    return out, jnp.swapaxes(lse, 1, 2)


def _body(band: Band, step: int, stages: int) -> Any:
    has_queries, has_keys = band.query_table is not None, band.key_table is not None
    parts = TILE // step

    def body(
        factor_ref: Any, query_ref: Any, key_ref: Any, value_ref: Any, columns_ref: Any, counts_ref: Any, *refs: Any
    ) -> None:
        refs_left = list(refs)
        seen_ref, bank_ref = (refs_left.pop(0) for _ in range(2)) if band.has_bank else (None, None)
        query_table = refs_left.pop(0) if has_queries else None
        key_table = refs_left.pop(0) if has_keys else None
        out_ref, lse_ref, query_s, out_s, key_s, value_s, lse_s, numbers_s, query_ready, ready, free = refs_left
        out_s = query_s if out_s is None else out_s
        batch, head, warpgroup = (lax.axis_index(name) for name in ("batch", "head", "warpgroup"))
        tile = np.int32(band.query_tiles - 1) - lax.axis_index("tile")  # the longest lists of a causal band first
        key_head = lax.div(head, np.int32(band.group))
        in_lists = band.list_of(columns_ref.shape[0], batch, key_head)
        num_full, count = (np.int32(parts) * counts_ref[in_lists, tile, i] for i in range(2))
        factor, shape = factor_ref[0], (ROWS, step)
        # Then masked logits are scaled before the next product begins, which takes their registers: what the bank says
        # of them comes later than that.
        is_early = band.has_bank
        first = tile * np.int32(TILE) + warpgroup * np.int32(ROWS)

        def first_key(number: Array) -> Array:
            column = columns_ref[in_lists, tile, lax.div(number, np.int32(parts))]
            return column * np.int32(TILE) + lax.rem(number, np.int32(parts)) * np.int32(step)

        def fetch(first: Array, slot: Array, barrier: Any) -> None:
            rows = pl.ds(first, step)
            plgpu.copy_gmem_to_smem(key_ref.at[batch, rows, key_head], key_s.at[slot], barrier)
            plgpu.copy_gmem_to_smem(value_ref.at[batch, rows, key_head], value_s.at[slot], barrier)
            if key_table is not None:
                one = batch if key_table.shape[0] > 1 else np.int32(0)
                plgpu.copy_gmem_to_smem(key_table.at[one, :, rows], numbers_s.at[slot], barrier)

        mine = pl.ds(first, ROWS)
        plgpu.copy_gmem_to_smem(query_ref.at[batch, mine, head], query_s.at[warpgroup], query_ready.at[warpgroup])
        ring = Ring(fetch, count, ready, free, stages, first_key)
        ring.start()
        numbers = []
        if query_table is not None:
            numbers = numbers_of(query_table.at[batch if query_table.shape[0] > 1 else np.int32(0), :, mine], 0)
        plgpu.barrier_wait(query_ready.at[warpgroup])

        def products(number: Array) -> Product:
            return Product(query_s.at[warpgroup + in_loop(number)], key_s.at[ring.slot(number)], b_transposed=True)

        def attend(number: Array, logits: Array, carry: Any, masked: bool) -> Any:
            """Adds a step's values; its slot is free then."""
            total, maximum, weight = carry
            slot = ring.slot(number)
            if masked:
                keys = Side(1, first_key(number), () if numbers_s is None else numbers_in_turn(numbers_s.at[slot], 1))
                words = words_of(seen_ref, bank_ref, (in_lists, tile), number, step) if band.has_bank else ()
                sees = band.visible(Side(0, first + in_loop(number), numbers), keys, shape, words)
                scaled = jnp.where(sees, logits if is_early else logits * factor, MASKED)
                new = jnp.maximum(maximum, scaled.max(axis=1))
                weights = jnp.exp2(scaled - by_row(new, shape))
            else:
                new = jnp.maximum(maximum, logits.max(axis=1) * factor)
                weights = jnp.exp2(logits * factor - by_row(new, shape))
            decay = jnp.exp2(maximum - new)
            weight = weight * decay + weights.sum(axis=1)
            total = add_dot(total * by_row(decay, total.shape), Product(weights.astype(band.dtype), value_s.at[slot]))
            ring.release(number)
            return total, new, weight

        def iterate(masked: bool) -> Any:
            def one(number: Array, carry: Any) -> Any:
                logits, *carry = carry
                logits = logits * factor if masked and is_early else logits
                ring.wait(number + 1)
                return dot_beside(products(number + 1), shape=shape, work=lambda: attend(number, logits, carry, masked))

            def run(number: Array, carry: Any) -> Any:
                logits, carry = one(number, carry)
                return logits, *carry

            return run

        ring.wait(jnp.int32(0))
        logits = dot(products(jnp.int32(0)), shape=shape)
        wide = (ROWS, band.value_width)
        carry = (logits, full(wide, 0.0), full((ROWS,), MASKED, ROW), full((ROWS,), 0.0, ROW))
        last = count - 1
        before = jnp.minimum(num_full, last)
        carry = lax.fori_loop(jnp.int32(0), before, iterate(False), carry)
        logits, *carry = lax.fori_loop(before, last, iterate(True), carry)
        total, maximum, weight = attend(last, logits * factor if is_early else logits, carry, True)
        empty = maximum <= MASKED
        inverse = jnp.where(empty, np.float32(0), 1 / weight)
        # What a query without keys has added up may be anything.
        nothing = by_row(maximum, wide) <= MASKED
        store(out_s.at[warpgroup], jnp.where(nothing, np.float32(0), total * by_row(inverse, wide)))
        store(lse_s.at[warpgroup], jnp.where(empty, np.float32(-np.inf), maximum * _LOG_2 + jnp.log(weight)))
        plgpu.copy_smem_to_gmem(out_s.at[warpgroup], out_ref.at[batch, mine, head])
        plgpu.copy_smem_to_gmem(lse_s.at[warpgroup], lse_ref.at[batch, head, mine])
        plgpu.wait_smem_to_gmem(0)

    return body
