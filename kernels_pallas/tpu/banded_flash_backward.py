"""Gradients of banded flash attention for TPU, in two kernels (FlashAttention-2, Dao 2023).

With the weights p_ts = exp(scale q_t . k_s - lse_t) of visible pairs, computed again tile by tile from the saved lse,
and d the gradient of a loss with respect to out and lse:

    D_t   = dout_t . out_t - dlse_t
    dl_ts = p_ts (dout_t . v_s - D_t)                                  the logits'
    dq_t  = scale sum_s dl_ts k_s        dk_s = scale sum_t dl_ts q_t        dv_s = sum_t p_ts dout_t

The first kernel goes through the key tiles that a query tile sees, as the forward kernel does, and adds up dq. The
second goes through the query tiles that see a key tile, over all query heads of a key head, and adds up dk and dv; its
tiles of logits are [keys, queries], so that what belongs to a query lies along the lanes. Sums are float32.
"""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from kernels_pallas.patterns import Pattern, Visits, for_every_head
from kernels_pallas.tpu import common
from kernels_pallas.tpu.band import (
    MASKED,
    Band,
    Call,
    blocks_of,
    is_first,
    is_last,
    over_lanes,
    spread,
    visible,
    visit,
)
from kernels_pallas.tpu.band import refusal as band_refusal

Array = jax.Array

# (queries in a tile, keys in a tile), by bytes of an element and padded head dim, for both kernels.
_BLOCKS = {
    (2, 64): (512, 512),
    (2, 128): (512, 512),
    (2, 256): (256, 512),
    (4, 64): (256, 512),
    (4, 128): (256, 512),
    (4, 256): (256, 256),
}
_DEFAULT_BLOCKS = (128, 256)  # at other widths
# Rows of the table of numbers that belong to a query. Exponents are of 2, which spares a product.
_LSE, _DELTA = range(2)
_LOG_2 = np.float32(np.log(2))


def default_blocks(query: Any, key: Any, value: Any) -> tuple[int, int]:
    """(block_q, block_k) for arrays of these shapes and dtype, from a frozen table."""
    return blocks_of(_BLOCKS, _DEFAULT_BLOCKS, query, key, value)


def vmem_bytes(block_q: int, block_k: int, head_dim: int, value_dim: int, dtype: Any, *, tables: int = 1) -> int:
    """VMEM that the larger of the two kernels takes at most, as in banded_flash.vmem_bytes."""
    size = jnp.dtype(dtype).itemsize
    key_lanes, value_lanes = (common.round_up(width, common.LANES) for width in (head_dim, value_dim))
    both = key_lanes + value_lanes
    read = size * (block_q + block_k) * both  # query, dout; key, value
    written = size * max(block_q * key_lanes, block_k * both)
    rows = 4 * common.SUBLANES * (2 * block_q + (block_k if tables > 1 else 0))
    state = 4 * max(block_q * key_lanes, block_k * both)
    logits = (4 * 4 + 2 * size) * block_q * block_k  # logits, p, dp and dl; p and dl in the operands' dtype
    columns = 4 * common.LANES * (block_q * 10 + (block_k if tables > 1 else 0))
    splits = 2 * size * (block_q + block_k) * both if size == 4 else 0
    return 2 * (read + written + rows) + 2 * state + logits + columns + splits


def refusal(query: Any, key: Any, value: Any, **settings: Any) -> str | None:
    """Why banded_flash_gradients cannot serve these arguments, or None if it can; as band.refusal."""
    return band_refusal(query, key, value, footprint=vmem_bytes, **settings)


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
      query, key, value, pattern, segment_ids, scale: as in banded_flash_attention; the pattern's tiles may differ.
      out, lse: what it gave. out_gradient [B, T, N, V], lse_gradient [B, T, N]: of the loss, with respect to these.

    Returns:
      The gradients, of the arguments' shapes and dtypes; scale's is float32 [].

    Raises:
      ValueError: with refusal()'s reason.

    Complexity: O(B N H x pairs x block_q x block_k) time, of which two kernels recompute the logits.
    """
    reason = refusal(query, key, value, pattern=pattern, segment_ids=segment_ids)
    if reason is not None:
        raise ValueError(f"banded_flash_gradients: {reason}")
    band = Band(query, key, value, pattern, segment_ids)

    wide_gradient = out_gradient.astype(jnp.float32)
    delta = jnp.sum(wide_gradient * out.astype(jnp.float32), axis=-1) - lse_gradient
    # A query that sees no key has no visible pair, whose weight would be exp(-inf + inf).
    finite_lse = jnp.where(lse == -jnp.inf, 0, lse)
    numbers = band.numbers({_LSE: finite_lse / _LOG_2, _DELTA: delta})
    arrays = [
        jnp.asarray(scale / _LOG_2, jnp.float32).reshape(1, 1),
        *band.tables,
        numbers,
        common.heads_first(query, band.padded_queries, band.key_width),
        common.heads_first(out_gradient.astype(query.dtype), band.padded_queries, band.value_width),
        common.heads_first(key, band.padded_keys, band.key_width),
        common.heads_first(value, band.padded_keys, band.value_width),
    ]
    over = common.varying(query, key, value, out_gradient, lse_gradient, jnp.asarray(scale), *(segment_ids or ()))
    query_gradient = _query_gradient(band, pattern.by_query, arrays, query.dtype, over)
    by_key = for_every_head(pattern.by_key, band.group)
    key_gradient, value_gradient = _key_value_gradients(band, by_key, arrays, query.dtype, over)

    def back(x: Array, length: int, width: int) -> Array:
        return jnp.swapaxes(x[:, :, :length, :width], 1, 2)

    query_gradient = back(query_gradient, *query.shape[1::2])
    # dq = scale sum dl k, and dscale = sum dl (q . k).
    scale_gradient = jnp.sum(query.astype(jnp.float32) * query_gradient.astype(jnp.float32)) / scale
    return (
        query_gradient,
        back(key_gradient, *key.shape[1::2]),
        back(value_gradient, *value.shape[1::2]),
        scale_gradient,
    )


def _specs(call: Call, query_of: Callable[..., Any], key_of: Callable[..., Any]) -> list[Any]:
    """Blocks of the arrays of both kernels. query_of, key_of: grid indices -> (batch, head, tile)."""
    band = call.band
    return [
        *call.of_pair(query_of, key_of),
        call.block(band.block_q, band.key_width, query_of),
        call.block(band.block_q, band.value_width, query_of),
        call.block(band.block_k, band.key_width, key_of),
        call.block(band.block_k, band.value_width, key_of),
    ]


def _query_gradient(band: Band, visits: Visits, arrays: list[Array], dtype: Any, over: Any) -> Array:
    call = Call(band, visits, band.heads)
    shape = (band.batch, band.heads, band.padded_queries, band.key_width)
    return call.run(
        functools.partial(_query_kernel, band=band),
        in_specs=_specs(call, call.row, call.key_head(call.column)),
        out_specs=call.block(band.block_q, band.key_width, call.row),
        scratch_shapes=[
            pltpu.VMEM((band.block_q, band.key_width), jnp.float32),
            *[pltpu.VMEM((band.block_q, common.LANES), jnp.float32)] * 2,
            *band.query_numbers(),
        ],
        out_shape=jax.ShapeDtypeStruct(shape, dtype, manual_axis_type=over),
        products=(band.key_width, band.key_width, band.value_width),
        name="banded_flash_query_gradient",
        arrays=arrays,
    )


def _unpack(band: Band, refs: Any) -> tuple[Any, ...]:
    """(scale, table of queries, table of keys or None, the rest)."""
    scale, queries, *rest = refs
    if band.key_table is None:
        return scale, queries, None, rest
    return scale, queries, rest[0], rest[1:]


def _query_kernel(row: Array, column: Array, flags: Array, *refs: Any, band: Band) -> None:
    """One visit of a query tile to a key tile."""
    scale_ref, queries_ref, keys_ref, rest = _unpack(band, refs)
    numbers_ref, query_ref, gradient_ref, key_ref, value_ref, out_ref, acc_ref, lse_ref, delta_ref, *bounds = rest

    @pl.when(is_first(flags))
    def _() -> None:
        acc_ref[...] = jnp.zeros_like(acc_ref)
        for row, ref in ((_LSE, lse_ref), (_DELTA, delta_ref)):
            ref[...] = spread(numbers_ref[row : row + 1, :])
        band.read_queries(queries_ref, bounds)

    def accumulate(masked: bool) -> None:
        key = key_ref[...]
        logits = scale_ref[0, 0] * common.dot(query_ref[...], key, contract=(1, 1))
        if masked:
            queries = [over_lanes(ref[...], band.block_k) for ref in bounds]
            keys = None if keys_ref is None else keys_ref[...]
            sees = visible(band, row, column, queries, keys, axis=1)
            logits = jnp.where(sees, logits, MASKED)
        weights = jnp.exp2(logits - over_lanes(lse_ref[...], band.block_k))
        products = common.dot(gradient_ref[...], value_ref[...], contract=(1, 1))
        slopes = weights * (products - over_lanes(delta_ref[...], band.block_k))
        acc_ref[...] += common.dot(slopes.astype(key.dtype), key, contract=(1, 0))

    visit(accumulate, flags, band.segments)

    @pl.when(is_last(flags))
    def _() -> None:
        out_ref[...] = (_LOG_2 * scale_ref[0, 0] * acc_ref[...]).astype(out_ref.dtype)


def _key_value_gradients(band: Band, visits: Visits, arrays: list[Array], dtype: Any, over: Any) -> tuple[Array, Array]:
    call = Call(band, visits, band.key_heads)
    widths = (band.key_width, band.value_width)
    shapes = [(band.batch, band.key_heads, band.padded_keys, width) for width in widths]
    return call.run(
        functools.partial(_key_value_kernel, band=band),
        in_specs=_specs(call, call.query_head(call.column), call.row),
        out_specs=[call.block(band.block_k, width, call.row) for width in widths],
        scratch_shapes=[pltpu.VMEM((band.block_k, width), jnp.float32) for width in widths],
        out_shape=[jax.ShapeDtypeStruct(shape, dtype, manual_axis_type=over) for shape in shapes],
        products=(band.key_width,) * 2 + (band.value_width,) * 2,
        name="banded_flash_key_value_gradients",
        arrays=arrays,
    )


def _key_value_kernel(row: Array, column: Array, flags: Array, *refs: Any, band: Band) -> None:
    """One visit of a key tile to a query tile of one query head."""
    scale_ref, queries_ref, keys_ref, rest = _unpack(band, refs)
    numbers_ref, query_ref, gradient_ref, key_ref, value_ref, key_out_ref, value_out_ref, *sums = rest
    key_acc_ref, value_acc_ref = sums

    @pl.when(is_first(flags))
    def _() -> None:
        key_acc_ref[...] = jnp.zeros_like(key_acc_ref)
        value_acc_ref[...] = jnp.zeros_like(value_acc_ref)

    def accumulate(masked: bool) -> None:
        query, gradient = query_ref[...], gradient_ref[...]
        logits = scale_ref[0, 0] * common.dot(key_ref[...], query, contract=(1, 1))  # [keys, queries]
        if masked:
            keys = None if keys_ref is None else jnp.transpose(keys_ref[...])
            queries = band.rows_of(queries_ref)
            sees = visible(band, column, row, queries, keys, axis=0)
            logits = jnp.where(sees, logits, MASKED)
        weights = jnp.exp2(logits - numbers_ref[_LSE : _LSE + 1, :])
        value_acc_ref[...] += common.dot(weights.astype(gradient.dtype), gradient, contract=(1, 0))
        products = common.dot(value_ref[...], gradient, contract=(1, 1))
        slopes = weights * (products - numbers_ref[_DELTA : _DELTA + 1, :])
        key_acc_ref[...] += common.dot(slopes.astype(query.dtype), query, contract=(1, 0))

    visit(accumulate, flags, band.segments)

    @pl.when(is_last(flags))
    def _() -> None:
        key_out_ref[...] = (_LOG_2 * scale_ref[0, 0] * key_acc_ref[...]).astype(key_out_ref.dtype)
        value_out_ref[...] = value_acc_ref[...].astype(value_out_ref.dtype)
