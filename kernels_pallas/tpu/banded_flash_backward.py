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
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from kernels_pallas.patterns import Pattern
from kernels_pallas.tpu import common
from kernels_pallas.tpu.band import (
    MASKED,
    Band,
    Call,
    Step,
    blocks_of,
    bounds_along_lanes,
    is_first,
    is_last,
    over_lanes,
    save_bounds,
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


def refusal(query: Any, key: Any, value: Any, *, pattern: Pattern, segment_ids: Any = None) -> str | None:
    """Why banded_flash_gradients cannot serve these arguments (arrays may be shape structs), or None if it can."""
    settings: Any = {"pattern": pattern, "segment_ids": segment_ids}
    return band_refusal(query, key, value, **settings, default_blocks=default_blocks, footprint=vmem_bytes)


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
      The gradients, of the arguments' shapes and dtypes; scale's is float32 [].

    Raises:
      ValueError: with refusal()'s reason.

    Complexity: O(B N H x pairs x block_q x block_k) time, of which two kernels recompute the logits.
    """
    reason = refusal(query, key, value, pattern=pattern, segment_ids=segment_ids)
    if reason is not None:
        raise ValueError(f"banded_flash_gradients: {reason}")
    tiling = pattern.tiled(*pattern.blocks(default_blocks(query, key, value)))
    band = Band(query, key, value, tiling, segment_ids)
    delta = jnp.sum(out_gradient.astype(jnp.float32) * out.astype(jnp.float32), axis=-1) - lse_gradient
    # A query that sees no key has no visible pair, whose weight would be exp(-inf + inf).
    finite_lse = jnp.where(lse == -jnp.inf, 0, lse)
    operands: Any = {
        "scale": scale / _LOG_2,
        "numbers": band.numbers({_LSE: finite_lse / _LOG_2, _DELTA: delta}),
        "tokens": [
            band.queries(query),
            band.queries(out_gradient.astype(query.dtype)),
            band.keys(key),
            band.keys(value),
        ],
    }
    (to_query,) = Call(band, by_key=False).run(
        functools.partial(_query_kernel, band=band),
        "banded_flash_query_gradient",
        **operands,
        out=[(band.key_width, query.dtype)],
        scratch=[
            pltpu.VMEM((band.block_q, band.key_width), jnp.float32),
            pltpu.VMEM((band.block_q, common.LANES), jnp.float32),
            pltpu.VMEM((band.block_q, common.LANES), jnp.float32),
            *band.bounds_scratch(),
        ],
        products=(band.key_width, band.key_width, band.value_width),
    )
    to_key, to_value = Call(band, by_key=True).run(
        functools.partial(_key_value_kernel, band=band),
        "banded_flash_key_value_gradients",
        **operands,
        out=[(width, query.dtype) for width in (band.key_width, band.value_width)],
        scratch=[pltpu.VMEM((band.block_k, width), jnp.float32) for width in (band.key_width, band.value_width)],
        products=(band.key_width,) * 2 + (band.value_width,) * 2,
    )
    to_query = common.tokens_first(to_query, *query.shape[1::2])
    # dq = scale sum dl k, and dscale = sum dl (q . k).
    to_scale = jnp.sum(query.astype(jnp.float32) * to_query.astype(jnp.float32)) / scale
    return (
        to_query,
        common.tokens_first(to_key, *key.shape[1::2]),
        common.tokens_first(to_value, *value.shape[1::2]),
        to_scale,
    )


def _query_kernel(step: Step, scale_ref: Any, *refs: Any, band: Band) -> None:
    """One visit of a query tile to a key tile."""
    numbers_ref, query_ref, gradient_ref, key_ref, value_ref, out_ref, acc_ref, lse_ref, delta_ref, *bounds = refs

    @pl.when(is_first(step))
    def _() -> None:
        acc_ref[...] = jnp.zeros_like(acc_ref)
        for row, ref in ((_LSE, lse_ref), (_DELTA, delta_ref)):
            ref[...] = spread(numbers_ref[row : row + 1, :])
        save_bounds(band, step, bounds)

    def accumulate(masked: bool) -> None:
        key = key_ref[...]
        logits = scale_ref[0, 0] * common.dot(query_ref[...], key, contract=(1, 1))
        if masked:
            sees = visible(band, step, [over_lanes(ref[...], band.block_k) for ref in bounds])
            logits = jnp.where(sees, logits, MASKED)
        weights = jnp.exp2(logits - over_lanes(lse_ref[...], band.block_k))
        products = common.dot(gradient_ref[...], value_ref[...], contract=(1, 1))
        slopes = weights * (products - over_lanes(delta_ref[...], band.block_k))
        acc_ref[...] += common.dot(slopes.astype(key.dtype), key, contract=(1, 0))

    visit(band, step, accumulate)

    @pl.when(is_last(step))
    def _() -> None:
        out_ref[...] = (_LOG_2 * scale_ref[0, 0] * acc_ref[...]).astype(out_ref.dtype)


def _key_value_kernel(step: Step, scale_ref: Any, *refs: Any, band: Band) -> None:
    """One visit of a key tile to a query tile of one query head."""
    numbers_ref, query_ref, gradient_ref, key_ref, value_ref, key_out_ref, value_out_ref, *sums = refs
    key_acc_ref, value_acc_ref = sums

    @pl.when(is_first(step))
    def _() -> None:
        key_acc_ref[...] = jnp.zeros_like(key_acc_ref)
        value_acc_ref[...] = jnp.zeros_like(value_acc_ref)

    def accumulate(masked: bool) -> None:
        query, gradient = query_ref[...], gradient_ref[...]
        logits = scale_ref[0, 0] * common.dot(key_ref[...], query, contract=(1, 1))  # [keys, queries]
        if masked:
            sees = visible(band, step, bounds_along_lanes(band, step))
            logits = jnp.where(sees, logits, MASKED)
        weights = jnp.exp2(logits - numbers_ref[_LSE : _LSE + 1, :])
        value_acc_ref[...] += common.dot(weights.astype(gradient.dtype), gradient, contract=(1, 0))
        products = common.dot(value_ref[...], gradient, contract=(1, 1))
        slopes = weights * (products - numbers_ref[_DELTA : _DELTA + 1, :])
        key_acc_ref[...] += common.dot(slopes.astype(query.dtype), query, contract=(1, 0))

    visit(band, step, accumulate)

    @pl.when(is_last(step))
    def _() -> None:
        key_out_ref[...] = (_LOG_2 * scale_ref[0, 0] * key_acc_ref[...]).astype(key_out_ref.dtype)
        value_out_ref[...] = value_acc_ref[...].astype(value_out_ref.dtype)
