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
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from kernels_pallas.tpu import banded_flash as forward
from kernels_pallas.tpu import common
from kernels_pallas.tpu.banded_flash import Band

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
# Rows of the table of numbers that belong to a query.
_LSE, _DELTA = range(2)


def default_blocks(query: Any, key: Any, value: Any) -> tuple[int, int]:
    """(block_q, block_k) for arrays of these shapes and dtype, from a frozen table."""
    return forward.blocks_of(_BLOCKS, _DEFAULT_BLOCKS, query, key, value)


def vmem_bytes(block_q: int, block_k: int, head_dim: int, value_dim: int, dtype: Any, *, segments: bool = False) -> int:
    """VMEM that the larger of the two kernels takes at most, as in banded_flash.vmem_bytes."""
    size = jnp.dtype(dtype).itemsize
    key_lanes, value_lanes = (common.round_up(width, common.LANES) for width in (head_dim, value_dim))
    both = key_lanes + value_lanes
    read = size * (block_q + block_k) * both  # query, dout; key, value
    written = size * max(block_q * key_lanes, block_k * both)
    rows = 4 * common.SUBLANES * (2 * block_q + (block_k if segments else 0))
    state = 4 * max(block_q * key_lanes, block_k * both)
    logits = (4 * 4 + 2 * size) * block_q * block_k  # logits, p, dp and dl; p and dl in the operands' dtype
    columns = 4 * common.LANES * (block_q * (5 if segments else 4) + (block_k if segments else 0))
    splits = 2 * size * (block_q + block_k) * both if size == 4 else 0
    return 2 * (read + written + rows) + 2 * state + logits + columns + splits


def refusal(query: Any, key: Any, value: Any, **settings: Any) -> str | None:
    """Why banded_flash_gradients cannot serve these arguments, or None if it can; as banded_flash.refusal."""
    return forward.refusal(query, key, value, default=default_blocks, footprint=vmem_bytes, **settings)


def banded_flash_gradients(
    query: Array,
    key: Array,
    value: Array,
    out: Array,
    lse: Array,
    out_gradient: Array,
    lse_gradient: Array,
    *,
    starts: np.ndarray,
    ends: np.ndarray,
    sinks: int = 0,
    segment_ids: tuple[Array, Array] | None = None,
    scale: float | Array,
    block_q: int | None = None,
    block_k: int | None = None,
) -> tuple[Array, Array, Array, Array]:
    """Gradients with respect to query, key, value and scale of banded_flash_attention.

    Args:
      query, key, value, starts, ends, sinks, segment_ids, scale: as in banded_flash_attention.
      out, lse: what it gave. out_gradient [B, T, N, V], lse_gradient [B, T, N]: of the loss, with respect to these.
      block_q, block_k: queries and keys in a tile, multiples of 128; None takes the frozen table's.

    Returns:
      The gradients, of the arguments' shapes and dtypes; scale's is float32 [].

    Raises:
      ValueError: with refusal()'s reason.

    Complexity: O(B N H x visited tiles x block_q x block_k) time, of which two kernels recompute the logits.
    """
    settings: dict[str, Any] = {"starts": starts, "ends": ends, "sinks": sinks, "segment_ids": segment_ids}
    reason = refusal(query, key, value, block_q=block_q, block_k=block_k, **settings)
    if reason is not None:
        raise ValueError(f"banded_flash_gradients: {reason}")
    default_q, default_k = default_blocks(query, key, value)
    band = Band(query, key, value, block_q=block_q or default_q, block_k=block_k or default_k, **settings)

    wide_gradient = out_gradient.astype(jnp.float32)
    delta = jnp.sum(wide_gradient * out.astype(jnp.float32), axis=-1) - lse_gradient
    # A query that sees no key has no visible pair, whose weight would be exp(-inf + inf).
    finite_lse = jnp.where(lse == -jnp.inf, 0, lse)
    numbers = jnp.zeros((query.shape[0], query.shape[2], common.SUBLANES, band.padded_queries), jnp.float32)
    for row, x in ((_LSE, finite_lse), (_DELTA, delta)):
        numbers = numbers.at[:, :, row, : query.shape[1]].set(jnp.swapaxes(x, 1, 2).astype(jnp.float32))

    arrays = (
        jnp.asarray(scale, jnp.float32).reshape(1, 1),
        band.table,
        numbers,
        common.heads_first(query, band.padded_queries, band.key_width),
        common.heads_first(out_gradient.astype(query.dtype), band.padded_queries, band.value_width),
        common.heads_first(key, band.padded_keys, band.key_width),
        common.heads_first(value, band.padded_keys, band.value_width),
        *band.key_segments,
    )
    over = common.varying(query, key, value, out_gradient, lse_gradient, jnp.asarray(scale), *(segment_ids or ()))
    query_gradient = _query_gradient(band, arrays, query.dtype, over)
    key_gradient, value_gradient = _key_value_gradients(band, arrays, query.dtype, over)

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


def _specs(band: Band, query_of: Callable[..., Any], key_of: Callable[..., Any]) -> list[Any]:
    """Blocks of the arrays of both kernels. query_of, key_of: grid indices -> (batch, head, tile)."""

    def block(shape: tuple[int, ...], of: Callable[..., Any]) -> Any:
        return pl.BlockSpec((None, None, *shape), lambda *indices: (*of(*indices), common.zero()))

    def table(*indices: Any) -> tuple[Any, ...]:
        batch, _, tile = query_of(*indices)
        return batch if band.segments else common.zero(), common.zero(), tile

    def numbers(*indices: Any) -> tuple[Any, ...]:
        batch, head, tile = query_of(*indices)
        return batch, head, common.zero(), tile

    def key_segments(*indices: Any) -> tuple[Any, ...]:
        batch, _, tile = key_of(*indices)
        return batch, common.zero(), tile

    specs = [
        pl.BlockSpec((1, 1), lambda *_: (common.zero(), common.zero()), memory_space=pltpu.SMEM),
        pl.BlockSpec((None, common.SUBLANES, band.block_q), table),
        pl.BlockSpec((None, None, common.SUBLANES, band.block_q), numbers),
        block((band.block_q, band.key_width), query_of),
        block((band.block_q, band.value_width), query_of),
        block((band.block_k, band.key_width), key_of),
        block((band.block_k, band.value_width), key_of),
    ]
    if band.segments:
        specs.append(pl.BlockSpec((None, 1, band.block_k), key_segments))
    return specs


def _query_gradient(band: Band, arrays: tuple[Array, ...], dtype: Any, over: Any) -> Array:
    visits = band.visits
    query_tiles, longest = visits.key_tiles.shape

    def query_of(b: Any, n: Any, i: Any, j: Any, *_: Any) -> tuple[Any, ...]:
        return b, n, i

    def key_of(b: Any, n: Any, i: Any, j: Any, tiles: Any, *_: Any) -> tuple[Any, ...]:
        return b, lax.div(n, np.int32(band.group)), tiles[i * np.int32(longest) + j]

    steps = band.batch * band.heads * int(visits.counts.sum())
    shape = (band.batch, band.heads, band.padded_queries, band.key_width)
    return pl.pallas_call(
        functools.partial(_query_kernel, sinks=band.sinks, longest=longest, segments=band.segments),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=4,
            grid=(band.batch, band.heads, query_tiles, longest),
            in_specs=_specs(band, query_of, key_of),
            out_specs=pl.BlockSpec(
                (None, None, band.block_q, band.key_width), lambda *indices: (*query_of(*indices), common.zero())
            ),
            scratch_shapes=[pltpu.VMEM((band.block_q, band.key_width), jnp.float32)],
        ),
        out_shape=jax.ShapeDtypeStruct(shape, dtype, manual_axis_type=over),
        compiler_params=forward.compiler_params(),
        cost_estimate=band.cost(steps, products=(band.key_width, band.key_width, band.value_width)),
        name="banded_flash_query_gradient",
    )(*map(jnp.asarray, (visits.key_tiles.ravel(), visits.counts, visits.latest_start, visits.earliest_end)), *arrays)


def _query_kernel(
    key_tiles_ref: Any,
    counts_ref: Any,
    latest_start_ref: Any,
    earliest_end_ref: Any,
    scale_ref: Any,
    table_ref: Any,
    numbers_ref: Any,
    query_ref: Any,
    gradient_ref: Any,
    key_ref: Any,
    value_ref: Any,
    *refs: Any,
    sinks: int,
    longest: int,
    segments: bool,
) -> None:
    """One visit of a query tile to a key tile."""
    *key_segments_ref, out_ref, acc_ref = refs
    tile, visit = pl.program_id(2), pl.program_id(3)
    first_key = key_tiles_ref[tile * np.int32(longest) + visit] * np.int32(key_ref.shape[0])

    @pl.when(visit == 0)
    def _() -> None:
        acc_ref[...] = jnp.zeros_like(acc_ref)

    def accumulate(masked: bool) -> None:
        key = key_ref[...]
        numbers = jnp.transpose(numbers_ref[...])  # one query a sublane
        logits = scale_ref[0, 0] * common.dot(query_ref[...], key, contract=(1, 1))
        if masked:
            table = jnp.transpose(table_ref[...])
            rows = (table[:, row : row + 1] for row in range(3))
            segment = key_segments_ref[0][...] if segments else None
            index = first_key + lax.broadcasted_iota(jnp.int32, logits.shape, 1)
            logits = jnp.where(forward.visible(index, *rows, sinks=sinks, key_segment=segment), logits, forward.MASKED)
        weights = jnp.exp(logits - numbers[:, _LSE : _LSE + 1])
        products = common.dot(gradient_ref[...], value_ref[...], contract=(1, 1))
        slopes = weights * (products - numbers[:, _DELTA : _DELTA + 1])
        acc_ref[...] += common.dot(slopes.astype(key.dtype), key, contract=(1, 0))

    forward.visit(
        accumulate,
        active=visit < counts_ref[tile],
        first_key=first_key,
        end_key=first_key + np.int32(key_ref.shape[0]),
        latest_start=latest_start_ref[tile],
        earliest_end=earliest_end_ref[tile],
        sinks=sinks,
        segments=segments,
    )

    @pl.when(visit == longest - 1)
    def _() -> None:
        out_ref[...] = (scale_ref[0, 0] * acc_ref[...]).astype(out_ref.dtype)


def _key_value_gradients(band: Band, arrays: tuple[Array, ...], dtype: Any, over: Any) -> tuple[Array, Array]:
    visits = band.visits
    query_tiles, counts = visits.by_key_tile(band.padded_keys // band.block_k)
    key_tiles, longest = query_tiles.shape
    group = band.group

    # The innermost steps: every query head of the key head, and for each the query tiles of the list.
    def query_of(b: Any, k: Any, i: Any, j: Any, tiles: Any, *_: Any) -> tuple[Any, ...]:
        head = k * np.int32(group) + lax.div(j, np.int32(longest))
        return b, head, tiles[i * np.int32(longest) + lax.rem(j, np.int32(longest))]

    def key_of(b: Any, k: Any, i: Any, j: Any, *_: Any) -> tuple[Any, ...]:
        return b, k, i

    def result(width: int) -> tuple[Any, Any, Any]:
        spec = pl.BlockSpec((None, None, band.block_k, width), lambda *indices: (*key_of(*indices), common.zero()))
        shape = (band.batch, band.heads // group, band.padded_keys, width)
        struct = jax.ShapeDtypeStruct(shape, dtype, manual_axis_type=over)
        return spec, struct, pltpu.VMEM((band.block_k, width), jnp.float32)

    specs, structs, scratch = zip(result(band.key_width), result(band.value_width))
    steps = band.batch * band.heads * int(counts.sum())
    return pl.pallas_call(
        functools.partial(
            _key_value_kernel, sinks=band.sinks, longest=longest, steps=group * longest, segments=band.segments
        ),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=4,
            grid=(band.batch, band.heads // group, key_tiles, group * longest),
            in_specs=_specs(band, query_of, key_of),
            out_specs=list(specs),
            scratch_shapes=list(scratch),
        ),
        out_shape=list(structs),
        compiler_params=forward.compiler_params(),
        cost_estimate=band.cost(steps, products=(band.key_width,) * 2 + (band.value_width,) * 2),
        name="banded_flash_key_value_gradients",
    )(*map(jnp.asarray, (query_tiles.ravel(), counts, visits.latest_start, visits.earliest_end)), *arrays)


def _key_value_kernel(
    query_tiles_ref: Any,
    counts_ref: Any,
    latest_start_ref: Any,
    earliest_end_ref: Any,
    scale_ref: Any,
    table_ref: Any,
    numbers_ref: Any,
    query_ref: Any,
    gradient_ref: Any,
    key_ref: Any,
    value_ref: Any,
    *refs: Any,
    sinks: int,
    longest: int,
    steps: int,
    segments: bool,
) -> None:
    """One visit of a key tile to a query tile of one query head."""
    *key_segments_ref, key_out_ref, value_out_ref, key_acc_ref, value_acc_ref = refs
    tile, step = pl.program_id(2), pl.program_id(3)
    visit = lax.rem(step, np.int32(longest))
    query_tile = query_tiles_ref[tile * np.int32(longest) + visit]
    first_key = tile * np.int32(key_ref.shape[0])

    @pl.when(step == 0)
    def _() -> None:
        key_acc_ref[...] = jnp.zeros_like(key_acc_ref)
        value_acc_ref[...] = jnp.zeros_like(value_acc_ref)

    def accumulate(masked: bool) -> None:
        query, gradient = query_ref[...], gradient_ref[...]
        logits = scale_ref[0, 0] * common.dot(key_ref[...], query, contract=(1, 1))  # [keys, queries]
        if masked:
            rows = (table_ref[row : row + 1, :] for row in range(3))
            segment = jnp.transpose(key_segments_ref[0][...]) if segments else None
            index = first_key + lax.broadcasted_iota(jnp.int32, logits.shape, 0)
            logits = jnp.where(forward.visible(index, *rows, sinks=sinks, key_segment=segment), logits, forward.MASKED)
        weights = jnp.exp(logits - numbers_ref[_LSE : _LSE + 1, :])
        value_acc_ref[...] += common.dot(weights.astype(gradient.dtype), gradient, contract=(1, 0))
        products = common.dot(value_ref[...], gradient, contract=(1, 1))
        slopes = weights * (products - numbers_ref[_DELTA : _DELTA + 1, :])
        key_acc_ref[...] += common.dot(slopes.astype(query.dtype), query, contract=(1, 0))

    forward.visit(
        accumulate,
        active=visit < counts_ref[tile],
        first_key=first_key,
        end_key=first_key + np.int32(key_ref.shape[0]),
        latest_start=latest_start_ref[query_tile],
        earliest_end=earliest_end_ref[query_tile],
        sinks=sinks,
        segments=segments,
    )

    @pl.when(step == steps - 1)
    def _() -> None:
        key_out_ref[...] = (scale_ref[0, 0] * key_acc_ref[...]).astype(key_out_ref.dtype)
        value_out_ref[...] = value_acc_ref[...].astype(value_out_ref.dtype)
