"""Parallax in one pass over the keys, for TPU: softmax attention whose weights a probe r tilts.

    p_ts = softmax_s(scale q_t . k_s)      a_ts = r_t . k_s      abar_t = sum_s p_ts a_ts
    out_t = sum_s p_ts (1 + abar_t - a_ts) v_s

A step adds up p v and p a v side by side, as banded_flash.py does one of them, and gives the values' mean
vbar_t = sum_s p_ts v_s too, for the gradients. With the gradient g of a loss with respect to out, c_ts = g_t . v_s and
cbar_t = g_t . vbar_t,

    dl_ts = p_ts ((1 + abar_t - a_ts) (c_ts - cbar_t) - (g_t . out_t - cbar_t))        the logits'
    dq_t  = scale sum_s dl_ts k_s                     dr_t = - sum_s p_ts (c_ts - cbar_t) k_s
    dk_s  = sum_t scale dl_ts q_t - p_ts (c_ts - cbar_t) r_t          dv_s = sum_t p_ts (1 + abar_t - a_ts) g_t

which are banded_covariance.py's kernels for the direction x = -r and other numbers.

Numerics: the probe and the gradient are taken in query's dtype, weights p and p a are rounded to it, sums are float32.
a is taken relative to r . (the mean of all keys), which leaves out as it is, so that keys far from 0 lose no digits.
Results and gradients are of query's dtype. Two runs give the same bits.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from kernels_pallas.patterns import BlockLists, Pattern
from kernels_pallas.tpu import banded_covariance
from kernels_pallas.tpu.band import (
    MASKED,
    Band,
    Body,
    Call,
    Piece,
    Step,
    add_by_lane,
    blocks_of,
    finite,
    hide,
    in_base_2,
    is_last,
    lse_of,
    one_ahead,
    over_lanes,
    save_bounds,
    save_numbers,
    visit_anew,
)
from kernels_pallas.tpu.band import heads_of_a_step as band_heads
from kernels_pallas.tpu.band import refusal as band_refusal
from kernels_pallas.tpu.common import LANES, SUBLANES, dot, round_up, tokens_first

Array = jax.Array

# (queries in a tile, keys in a tile), by bytes of an element and padded head dim.
_BLOCKS = {(2, 64): (512, 512), (2, 128): (512, 512), (2, 256): (256, 512), (4, 64): (256, 512), (4, 128): (256, 512)}
_DEFAULT_BLOCKS = (128, 256)  # at other widths
_ONE = np.float32(1)


def default_blocks(query: Any, key: Any, value: Any) -> tuple[int, int]:
    """(block_q, block_k) for arrays of these shapes and dtype, from a frozen table."""
    return blocks_of(_BLOCKS, _DEFAULT_BLOCKS, query, key, value)


def vmem_bytes(
    block_q: int,
    block_k: int,
    head_dim: int,
    value_dim: int,
    dtype: Any,
    *,
    tables: int = 1,
    heads: int = 1,
    key_heads: int = 1,
) -> int:
    """VMEM that the kernel of values takes at most, as in banded_flash.vmem_bytes."""
    size = jnp.dtype(dtype).itemsize
    keys, values = (round_up(width, LANES) for width in (head_dim, value_dim))
    blocks = size * (heads * block_q * 2 + key_heads * block_k) * (keys + values)
    rows = 4 * SUBLANES * ((1 + 3 * heads) * block_q + (block_k if tables > 1 else 0))
    state = 4 * heads * block_q * (4 * LANES + 2 * values)
    # Logits and slopes, those of the next head with them, weights, both in the values' dtype.
    logits = (8 * min(heads, 2) + 4 + 2 * size) * block_q * block_k
    columns = 4 * block_q * LANES * 8
    products = 2 * 4 * block_q * values
    splits = 2 * size * (2 * block_q + block_k) * keys if size == 4 else 0
    return 2 * (blocks + rows) + state + logits + columns + products + splits


def refusal(query: Any, key: Any, value: Any, *, pattern: Pattern) -> str | None:
    """Why the kernels cannot serve these arguments (arrays may be shape structs), or None if they can."""
    if isinstance(pattern, BlockLists):
        return "serves no lists of tiles"
    own = band_refusal(query, key, value, pattern=pattern, default_blocks=default_blocks, footprint=vmem_bytes)
    return own or banded_covariance.refusal(query, key, value, pattern=pattern)


def heads_of_a_step(query: Any, key: Any, value: Any, *, pattern: Pattern) -> int:
    """How many query heads a step of the kernel of values takes (arrays may be shape structs)."""
    return band_heads(query, key, value, pattern=pattern, default_blocks=default_blocks, footprint=vmem_bytes)


def banded_parallax(
    query: Array, key: Array, value: Array, probe: Array, *, pattern: Pattern, scale: float | Array
) -> tuple[Array, Array, Array, Array]:
    """Parallax attention of every query to the keys that the pattern gives it.

    Args:
      query [B, T, N, H], key [B, S, K, H], value [B, S, K, V], pattern, scale: as in banded_flash_attention.
      probe: r [B, T, N, H], floating; rounded to query's dtype.

    Returns:
      out [B, T, N, V] in query's dtype; lse [B, T, N] float32, as banded_flash_attention's; the mean of r . k
      [B, T, N] float32; the mean of values [B, T, N, V] in query's dtype. A query that sees no key: 0, -inf, any, 0.

    Raises:
      ValueError: with refusal()'s reason.

    Complexity: O(B N (H + V) x visited tiles) time. Memory beside the arguments: copies of them with heads first.
    """
    reason = refusal(query, key, value, pattern=pattern)
    if reason is not None:
        raise ValueError(f"banded_parallax: {reason}")
    heads = heads_of_a_step(query, key, value, pattern=pattern)
    tiling = pattern.tiled(*pattern.blocks(default_blocks(query, key, value)))
    band = Band(query, key, value, tiling)
    probe = probe.astype(query.dtype)
    center = jnp.repeat(jnp.mean(key.astype(jnp.float32), axis=1), band.group, axis=1)
    reference = jnp.sum(probe.astype(jnp.float32) * center[:, None], axis=-1)
    query, scale = in_base_2(query, scale)
    lanes = [pltpu.VMEM((heads, band.block_q, LANES), jnp.float32)] * 4
    sums = [pltpu.VMEM((heads, band.block_q, band.value_width), jnp.float32)] * 2
    out, mean, *rows = Call(band, by_key=False, heads=heads).run(
        functools.partial(_kernel, band=band),
        "banded_parallax",
        scale=scale,
        numbers=band.numbers([reference], heads),
        tokens=[band.queries(query), band.queries(probe), band.keys(key), band.keys(value)],
        out=[(band.value_width, query.dtype)] * 2,
        rows=2,
        scratch=[*lanes, *sums, *band.bounds_scratch()],
        products=(band.key_width, band.key_width, band.value_width, band.value_width),
    )
    length = query.shape[1]
    lse, slope = (jnp.swapaxes(x.reshape(band.batch, band.heads, -1)[:, :, :length], 1, 2) for x in rows)
    out, mean = (tokens_first(x, length, value.shape[-1]) for x in (out, mean))
    return out, lse, slope + reference, mean


def banded_parallax_gradients(
    query: Array,
    key: Array,
    value: Array,
    probe: Array,
    out: Array,
    lse: Array,
    slope_mean: Array,
    value_mean: Array,
    gradient: Array,
    *,
    pattern: Pattern,
    scale: float | Array,
) -> tuple[Array, Array, Array, Array, Array]:
    """Gradients with respect to query, key, value, probe and scale of banded_parallax's out.

    Args:
      query .. probe: as there. out .. value_mean: what it gave.
      gradient: [B, T, N, V], of the loss with respect to out.
    """
    gradient, tilt = gradient.astype(query.dtype), -probe.astype(query.dtype)
    mean, product = (jnp.sum(gradient.astype(jnp.float32) * x.astype(jnp.float32), axis=-1) for x in (value_mean, out))
    numbers = [finite(lse), -slope_mean - 1, mean, product - mean]
    to_query, to_key, to_value, to_tilt, to_scale = banded_covariance.tilted_gradients(
        query, key, value, tilt, numbers, gradient, pattern=pattern, scale=scale
    )
    return to_query, to_key, to_value, -to_tilt.astype(probe.dtype), to_scale


def _kernel(step: Step, scale_ref: Any, reference_ref: Any, *refs: Any, band: Band) -> None:
    """One visit of a query tile to a key tile, of several heads. A query's maximum and reference are repeated over the
    lanes; each lane has sums of its own, over the keys at its place."""
    query_ref, probe_ref, key_ref, value_ref, out_ref, mean_ref, lse_ref, slope_ref, *refs = refs  # type: ignore[assignment]
    maximum_ref, offset_ref, sum_ref, tilted_sum_ref, plain_ref, tilted_ref, *bounds = refs
    heads = query_ref.shape[0]
    per_key = heads // key_ref.shape[0]

    def start(queries: slice) -> None:
        for ref in (maximum_ref, sum_ref, tilted_sum_ref, plain_ref, tilted_ref):
            ref[:, queries] = jnp.full_like(ref[:, queries], MASKED if ref is maximum_ref else 0)

    save_bounds(band, step, bounds)
    save_numbers(step, reference_ref, offset_ref)

    def accumulate(body: Body, is_new: bool) -> None:
        def product(head: int, piece: Piece) -> tuple[Array, Array]:
            keys = key_ref[head // per_key, piece.keys]
            logits, slopes = (dot(ref[head, piece.queries], keys, contract=(1, 1)) for ref in (query_ref, probe_ref))
            return hide(band, step, piece, logits, bounds), slopes

        def use(head: int, piece: Piece, products: tuple[Array, Array]) -> None:
            logits, slopes = products
            queries, num_keys = (head, piece.queries), logits.shape[1]
            old_maximum = jnp.full((logits.shape[0], LANES), MASKED) if is_new else maximum_ref[queries]
            maximum = jnp.maximum(old_maximum, jnp.max(logits, axis=1, keepdims=True))
            maximum_ref[queries] = maximum
            # As in banded_flash.py, also of a query that has seen no key yet.
            weights = jnp.exp2(scale_ref[0, 0] * (logits - over_lanes(maximum, num_keys)))
            tilted = weights * (slopes - over_lanes(offset_ref[queries], num_keys))
            values = value_ref[head // per_key, piece.keys]
            decay = jnp.exp2(scale_ref[0, 0] * (old_maximum - maximum))
            for x, total, sums in ((weights, sum_ref, plain_ref), (tilted, tilted_sum_ref, tilted_ref)):
                of_sum, of_values = add_by_lane(x), dot(x.astype(values.dtype), values, contract=(1, 0))
                if not is_new:
                    of_sum += decay * total[queries]
                    of_values += over_lanes(decay, sums.shape[2]) * sums[queries]
                total[queries], sums[queries] = of_sum, of_values

        one_ahead(heads, body, product, use)

    visit_anew(band, step, start, accumulate)

    @pl.when(is_last(step))
    def _() -> None:
        # Numbers of all heads side by side, so that they become rows in one transposition.
        lanes = lax.broadcasted_iota(jnp.int32, maximum_ref.shape[1:], 1)
        columns = jnp.zeros(maximum_ref.shape[1:], jnp.float32)
        for head in range(heads):
            maximum = maximum_ref[head]
            total, tilted = (jnp.sum(ref[head], axis=1, keepdims=True) for ref in (sum_ref, tilted_sum_ref))
            total = jnp.where(maximum <= MASKED, np.float32(np.inf), total)  # of a query that has seen no key
            inverse = _ONE / total
            slope = tilted * inverse
            wide = over_lanes(inverse, plain_ref.shape[2])
            mean = plain_ref[head] * wide
            out = mean + (mean * over_lanes(slope, mean.shape[1]) - tilted_ref[head] * wide)
            out_ref[head], mean_ref[head] = (x.astype(out_ref.dtype) for x in (out, mean))
            for row, x in enumerate((maximum, total, slope)):
                columns = jnp.where(lanes == row * heads + head, x, columns)
        table = jnp.transpose(columns)
        maxima, totals, slopes = (table[row * heads : (row + 1) * heads] for row in range(3))
        lse_ref[...] = lse_of(scale_ref[0, 0], maxima, totals)
        slope_ref[...] = slopes
