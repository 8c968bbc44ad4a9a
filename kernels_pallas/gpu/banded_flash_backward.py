"""Gradients of banded flash attention for Hopper, without atomics (FlashAttention-2, Dao 2023).

With the weights p_ts = exp(scale q_t . k_s - lse_t) of visible pairs, computed again tile by tile from the saved lse,
and d the gradient of a loss with respect to out and lse:

    D_t   = dout_t . out_t - dlse_t
    dl_ts = p_ts (dout_t . v_s - D_t)                                  the logits'
    dq_t  = scale sum_s dl_ts k_s        dk_s = scale sum_t dl_ts q_t        dv_s = sum_t p_ts dout_t

The first kernel goes through the key tiles that a query tile sees, as the forward kernel does, and adds up dq. The
second goes through the query tiles that see a key tile, over all query heads of a key head, and adds up dk and dv; its
tiles of logits are [keys, queries], so that p and dl are left operands of products and stay in registers. Wide heads
have a launch for dk and one for dv: a warpgroup's registers hold sums of 256 columns.

Numerics: as in banded_flash.py; p and dl are rounded to the operands' dtype before they multiply. In float16 dl is
multiplied by a power of two, the same for all of a call, by which none overflows and the largest possible one is at
least 2^14: what float16 loses of dl is below 2^-38 of that bound, 2 max |dout_t| max |v_s| + max |dlse_t|. So dl
overflows nowhere that it would not in bfloat16; gradients beyond 65504 are infinite, as in every float16 program.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from kernels_pallas.gpu.band import MASKED, TILE, Band, Side, factor_of, numbers_of
from kernels_pallas.gpu.band import refusal as band_refusal
from kernels_pallas.gpu.common import (
    COLUMN,
    MATRIX,
    ROW,
    ROWS,
    SMEM_BUDGET,
    WARPGROUPS,
    Product,
    Ring,
    add_dot,
    barriers,
    by_column,
    by_row,
    dot,
    dot_beside,
    dots,
    full,
    half,
    launch,
    load,
    store,
)
from kernels_pallas.patterns import Pattern

Array = jax.Array

_MOST_STAGES = 3
_MOST_SUMS = 256  # columns of float32 sums that a warpgroup's registers hold beside its logits
_SPARE_BYTES = 4096  # of shared memory, for barriers and tables
_LOG2_E = np.float32(np.log2(np.e))
# Rows of the table of numbers that belong to a query, and places of the numbers that belong to a call.
_LSE, _DELTA = range(2)
_FACTOR, _SHRINK, _GROW = range(3)


def _own_bytes(key_width: int, value_width: int) -> int:
    """Of shared memory, for what a block keeps: a tile of queries and dout, or of keys and values."""
    return 2 * TILE * (key_width + value_width)


def step_of(key_width: int, value_width: int) -> int:
    """Keys, or queries, that are multiplied at once: two steps of them fit into shared memory."""
    spare = SMEM_BUDGET - _SPARE_BYTES - _own_bytes(key_width, value_width)
    return 64 if 2 * 2 * 64 * (key_width + value_width) <= spare else 32


def _stages(key_width: int, value_width: int) -> int:
    each = 2 * step_of(key_width, value_width) * (key_width + value_width)
    return min(_MOST_STAGES, (SMEM_BUDGET - _SPARE_BYTES - _own_bytes(key_width, value_width)) // each)


def smem_bytes(key_width: int, value_width: int) -> int:
    """Shared memory of a block of any of the kernels, at padded widths."""
    moving = 2 * _stages(key_width, value_width) * step_of(key_width, value_width) * (key_width + value_width)
    return _own_bytes(key_width, value_width) + moving + _SPARE_BYTES


def refusal(query: Any, key: Any, value: Any, *, pattern: Pattern, segment_ids: Any = None) -> str | None:
    """Why banded_flash_gradients cannot serve these arguments (arrays may be shape structs), or None if it can."""
    return band_refusal(query, key, value, pattern=pattern, segment_ids=segment_ids, footprint=smem_bytes)


def banded_flash_gradients(
    query: Array,
    key: Array,
    value: Array,
    out: Array,
    lse: Array,
    out_gradient: Array,
    lse_gradient: Array,
    *,
    pattern: Pattern,
    segment_ids: tuple[Array, Array] | None = None,
    scale: float | Array,
) -> tuple[Array, Array, Array, Array]:
    """Gradients with respect to query, key, value and scale of banded_flash_attention.

    Args:
      query, key, value, pattern, segment_ids, scale: as in banded_flash_attention.
      out, lse: what it gave. out_gradient [B, T, N, V], lse_gradient [B, T, N]: of the loss, with respect to these.

    Returns:
      The gradients, of the arguments' shapes and dtypes; scale's is float32 []. A query that sees no key gives 0.

    Raises:
      ValueError: with refusal()'s reason.

    Complexity: O(B N H x visited tiles) time, 7 products a pair of tiles (8 where H' + V' > 256, the padded head dims).
    """
    reason = refusal(query, key, value, pattern=pattern, segment_ids=segment_ids)
    if reason is not None:
        raise ValueError(f"banded_flash_gradients: {reason}")
    band = Band(query, key, value, pattern.tiled(TILE, TILE), segment_ids)
    sign, factor = factor_of(scale)
    delta = jnp.sum(out_gradient.astype(jnp.float32) * out.astype(jnp.float32), axis=-1) - lse_gradient
    # A query that sees no key has no visible pair, whose weight would be exp(-inf + inf).
    finite_lse = jnp.where(lse == -jnp.inf, np.float32(0), lse)
    shrink = _shrink(value, out_gradient, lse_gradient)
    numbers = jnp.stack([finite_lse * _LOG2_E, delta * shrink], axis=1).astype(jnp.float32)
    numbers = jnp.pad(jnp.moveaxis(numbers, 3, 1), ((0, 0),) * 3 + ((0, band.query_tiles * TILE - query.shape[1]),))
    operands = [
        jnp.concatenate([factor, shrink[None], factor / (_LOG2_E * shrink)]),
        band.queries(query * sign.astype(query.dtype)),
        band.queries(out_gradient.astype(query.dtype)),
        band.keys(key),
        band.keys(value),
        numbers,
    ]
    to_query, by_scale = _query_gradient(band, operands)
    if band.key_width + band.value_width <= _MOST_SUMS:
        to_key, to_value = _key_gradients(band, operands, of_keys=True, of_values=True)
    else:
        (to_key,) = _key_gradients(band, operands, of_keys=True, of_values=False)
        (to_value,) = _key_gradients(band, operands, of_keys=False, of_values=True)
    sign = sign.astype(jnp.float32)
    return (
        (to_query[:, : query.shape[1], :, : query.shape[-1]] * sign.astype(query.dtype)),
        to_key[:, : key.shape[1], :, : key.shape[-1]],
        to_value[:, : value.shape[1], :, : value.shape[-1]],
        sign * jnp.sum(by_scale),
    )


def _shrink(value: Array, out_gradient: Array, lse_gradient: Array) -> Array:
    """The power of two, float32 [], by which dl is multiplied: it brings dl's bound to 2^14 to 2^15 in float16."""
    if value.dtype != jnp.float16:
        return jnp.float32(1)

    def longest(x: Array) -> Array:
        return jnp.sqrt(jnp.max(jnp.sum(x.astype(jnp.float32) ** 2, axis=-1)))

    bound = 2 * longest(value) * longest(out_gradient) + jnp.max(jnp.abs(lse_gradient)).astype(jnp.float32)
    _, exponent = jnp.frexp(jnp.clip(bound, np.float32(2.0**-60), np.float32(2.0**60)))  # a bound of inf, or NaN: no matter
    return jnp.ldexp(jnp.float32(1), 15 - exponent)


def _launch(
    body: Callable[..., None], name: str, band: Band, operands: list[Array], *, of_keys: bool, out: list[Any]
) -> list[Array]:
    """One of the kernels. of_keys: it has a block for every tile of keys, otherwise of queries."""
    widths = (band.key_width, band.value_width)
    step, stages = step_of(*widths), _stages(*widths)
    moving_table = band.query_table if of_keys else band.key_table
    copies = 2 + of_keys + (moving_table is not None)
    return launch(
        body,
        name,
        *operands,
        *(jnp.asarray(x) for x in (band.by_key if of_keys else band.by_query)),
        *(table for table in (band.query_table, band.key_table) if table is not None),
        out=out,
        grid={
            "batch": band.batch,
            "head": band.key_heads if of_keys else band.heads,
            "tile": band.key_tiles if of_keys else band.query_tiles,
        },
        scratch=[
            *(half(WARPGROUPS, ROWS, width, dtype=band.dtype) for width in widths),
            *(half(stages, step, width, dtype=band.dtype) for width in widths),
            plgpu.SMEM((stages, 2, step) if of_keys else (WARPGROUPS, ROWS), jnp.float32),
            None if moving_table is None else plgpu.SMEM((stages, moving_table.shape[1], step), jnp.int32),
            barriers(WARPGROUPS, 2),
            barriers(stages, copies),
            barriers(stages, WARPGROUPS),
        ],
    )


def _query_gradient(band: Band, operands: list[Array]) -> list[Array]:
    """dq / sign, and d scale / sign summed over the keys of each query, float32 [B, N, T]."""
    step, stages = step_of(band.key_width, band.value_width), _stages(band.key_width, band.value_width)
    has_queries, has_keys = band.query_table is not None, band.key_table is not None
    parts = np.int32(TILE // step)

    def body(
        scalars: Any,
        query_ref: Any,
        gradient_ref: Any,
        key_ref: Any,
        value_ref: Any,
        numbers_ref: Any,
        columns_ref: Any,
        counts_ref: Any,
        *refs: Any,
    ) -> None:
        refs_left = list(refs)
        query_table = refs_left.pop(0) if has_queries else None
        key_table = refs_left.pop(0) if has_keys else None
        out_ref, by_scale_ref, query_s, gradient_s, key_s, value_s, by_scale_s, table_s, own, ready, free = refs_left
        batch, head, warpgroup = (lax.axis_index(name) for name in ("batch", "head", "warpgroup"))
        tile = np.int32(band.query_tiles - 1) - lax.axis_index("tile")  # the longest lists of a causal band first
        key_head = lax.div(head, np.int32(band.group))
        in_lists = batch if columns_ref.shape[0] > 1 else np.int32(0)
        num_full, count = (parts * counts_ref[in_lists, tile, i] for i in range(2))
        factor, shrink, shape = scalars[_FACTOR], scalars[_SHRINK], (ROWS, step)
        first = tile * np.int32(TILE) + warpgroup * np.int32(ROWS)
        mine = pl.ds(first, ROWS)

        def first_key(number: Array) -> Array:
            column = columns_ref[in_lists, tile, lax.div(number, parts)]
            return column * np.int32(TILE) + lax.rem(number, parts) * np.int32(step)

        def fetch(number: Array, slot: Array, barrier: Any) -> None:
            rows = pl.ds(first_key(number), step)
            plgpu.copy_gmem_to_smem(key_ref.at[batch, rows, key_head], key_s.at[slot], barrier)
            plgpu.copy_gmem_to_smem(value_ref.at[batch, rows, key_head], value_s.at[slot], barrier)
            if key_table is not None:
                one = batch if key_table.shape[0] > 1 else np.int32(0)
                plgpu.copy_gmem_to_smem(key_table.at[one, :, rows], table_s.at[slot], barrier)

        ring = Ring(fetch, count, ready, free, stages)
        ring.start()
        plgpu.copy_gmem_to_smem(query_ref.at[batch, mine, head], query_s.at[warpgroup], own.at[warpgroup])
        plgpu.copy_gmem_to_smem(gradient_ref.at[batch, mine, head], gradient_s.at[warpgroup], own.at[warpgroup])
        lse, delta = (load(numbers_ref.at[batch, head, row, mine], ROW) for row in (_LSE, _DELTA))
        bounds = []
        if query_table is not None:
            bounds = numbers_of(query_table.at[batch if query_table.shape[0] > 1 else np.int32(0), :, mine], 0)
        plgpu.barrier_wait(own.at[warpgroup])

        def add(masked: bool) -> Callable[[Array, Array], Array]:
            def run(number: Array, total: Array) -> Array:
                slot = ring.slot(number)
                ring.wait(number)
                logits, products = dots(
                    [Product(query_s.at[warpgroup], key_s.at[slot], b_transposed=True)],
                    [Product(gradient_s.at[warpgroup], value_s.at[slot], b_transposed=True)],
                    shape=shape,
                )
                exponents = logits * factor - by_row(lse, shape)
                if masked:
                    keys = Side(1, first_key(number), [] if table_s is None else numbers_of(table_s.at[slot], 1))
                    sees = band.visible(Side(0, first, bounds), keys, shape)
                    exponents = jnp.where(sees, exponents, MASKED)
                slopes = jnp.exp2(exponents) * (products * shrink - by_row(delta, shape))
                total = add_dot(total, Product(slopes.astype(band.dtype), key_s.at[slot]))
                ring.release(number)
                return total

            return run

        wide = (ROWS, band.key_width)
        total = lax.fori_loop(jnp.int32(0), num_full, add(False), full(wide, 0.0))
        total = lax.fori_loop(num_full, count, add(True), total)
        mean = (total * load(query_s.at[warpgroup], MATRIX).astype(jnp.float32)).sum(axis=1)
        store(by_scale_s.at[warpgroup], mean / shrink)
        store(query_s.at[warpgroup], total * scalars[_GROW])
        plgpu.copy_smem_to_gmem(by_scale_s.at[warpgroup], by_scale_ref.at[batch, head, mine])
        plgpu.copy_smem_to_gmem(query_s.at[warpgroup], out_ref.at[batch, mine, head])
        plgpu.wait_smem_to_gmem(0)

    length = band.query_tiles * TILE
    out = [((band.batch, length, band.heads, band.key_width), band.dtype)]
    out.append(((band.batch, band.heads, length), jnp.float32))
    return _launch(body, "banded_flash_query_gradient", band, operands, of_keys=False, out=out)


def _key_gradients(band: Band, operands: list[Array], *, of_keys: bool, of_values: bool) -> list[Array]:
    """dk, dv, or one of them."""
    step, stages = step_of(band.key_width, band.value_width), _stages(band.key_width, band.value_width)
    has_queries, has_keys = band.query_table is not None, band.key_table is not None
    parts, group = np.int32(TILE // step), np.int32(band.group)
    widths = [band.key_width] * of_keys + [band.value_width] * of_values

    def body(
        scalars: Any,
        query_ref: Any,
        gradient_ref: Any,
        key_ref: Any,
        value_ref: Any,
        numbers_ref: Any,
        columns_ref: Any,
        counts_ref: Any,
        *refs: Any,
    ) -> None:
        refs_left = list(refs)
        query_table = refs_left.pop(0) if has_queries else None
        key_table = refs_left.pop(0) if has_keys else None
        out_refs = [refs_left.pop(0) for _ in widths]
        key_s, value_s, query_s, gradient_s, numbers_s, table_s, own, ready, free = refs_left
        batch, key_head, tile, warpgroup = (lax.axis_index(name) for name in ("batch", "head", "tile", "warpgroup"))
        in_lists = batch if columns_ref.shape[0] > 1 else np.int32(0)
        # A listed tile's parts follow each other, head by head: full tiles of all heads come before the others.
        num_full, count = (parts * group * counts_ref[in_lists, tile, i] for i in range(2))
        factor, shrink, shape = scalars[_FACTOR], scalars[_SHRINK], (ROWS, step)
        first = tile * np.int32(TILE) + warpgroup * np.int32(ROWS)
        mine = pl.ds(first, ROWS)

        def first_query(number: Array) -> Array:
            column = columns_ref[in_lists, tile, lax.div(number, parts * group)]
            return column * np.int32(TILE) + lax.rem(number, parts) * np.int32(step)

        def fetch(number: Array, slot: Array, barrier: Any) -> None:
            rows = pl.ds(first_query(number), step)
            head = key_head * group + lax.rem(lax.div(number, parts), group)
            plgpu.copy_gmem_to_smem(query_ref.at[batch, rows, head], query_s.at[slot], barrier)
            plgpu.copy_gmem_to_smem(gradient_ref.at[batch, rows, head], gradient_s.at[slot], barrier)
            plgpu.copy_gmem_to_smem(numbers_ref.at[batch, head, :, rows], numbers_s.at[slot], barrier)
            if query_table is not None:
                one = batch if query_table.shape[0] > 1 else np.int32(0)
                plgpu.copy_gmem_to_smem(query_table.at[one, :, rows], table_s.at[slot], barrier)

        ring = Ring(fetch, count, ready, free, stages)
        ring.start()
        plgpu.copy_gmem_to_smem(key_ref.at[batch, mine, key_head], key_s.at[warpgroup], own.at[warpgroup])
        plgpu.copy_gmem_to_smem(value_ref.at[batch, mine, key_head], value_s.at[warpgroup], own.at[warpgroup])
        coordinates = []
        if key_table is not None:
            coordinates = numbers_of(key_table.at[batch if key_table.shape[0] > 1 else np.int32(0), :, mine], 0)
        plgpu.barrier_wait(own.at[warpgroup])

        def add(masked: bool) -> Callable[[Array, list[Array]], list[Array]]:
            def run(number: Array, totals: list[Array]) -> list[Array]:
                slot, left = ring.slot(number), list(totals)
                ring.wait(number)
                def weigh(logits: Array) -> Array:
                    exponents = logits * factor - by_column(load(numbers_s.at[slot, _LSE], COLUMN), shape)
                    if masked:
                        bounds = [] if table_s is None else numbers_of(table_s.at[slot], 1)
                        sees = band.visible(Side(1, first_query(number), bounds), Side(0, first, coordinates), shape)
                        exponents = jnp.where(sees, exponents, MASKED)
                    return jnp.exp2(exponents)

                logits = dot(Product(key_s.at[warpgroup], query_s.at[slot], b_transposed=True), shape=shape)
                if of_keys:
                    with_values = Product(value_s.at[warpgroup], gradient_s.at[slot], b_transposed=True)
                    products, weights = dot_beside(with_values, shape=shape, work=lambda: weigh(logits))
                    slope = weights * (products * shrink - by_column(load(numbers_s.at[slot, _DELTA], COLUMN), shape))
                else:
                    weights = weigh(logits)
                if of_values:
                    left[-1] = add_dot(left[-1], Product(weights.astype(band.dtype), gradient_s.at[slot]))
                if of_keys:
                    left[0] = add_dot(left[0], Product(slope.astype(band.dtype), query_s.at[slot]))
                ring.release(number)
                return left

            return run

        totals = [full((ROWS, width), 0.0) for width in widths]
        totals = lax.fori_loop(jnp.int32(0), num_full, add(False), totals)
        totals = lax.fori_loop(num_full, count, add(True), totals)
        results = [(key_s, totals[0] * scalars[_GROW])] * of_keys + [(value_s, totals[-1])] * of_values
        for (ref, total), out_ref in zip(results, out_refs, strict=True):
            store(ref.at[warpgroup], total)
            plgpu.copy_smem_to_gmem(ref.at[warpgroup], out_ref.at[batch, mine, key_head])
        plgpu.wait_smem_to_gmem(0)

    length = band.key_tiles * TILE
    name = {(True, True): "key_value_gradients", (True, False): "key_gradient", (False, True): "value_gradient"}
    out = [((band.batch, length, band.key_heads, width), band.dtype) for width in widths]
    return _launch(body, f"banded_flash_{name[of_keys, of_values]}", band, operands, of_keys=True, out=out)
