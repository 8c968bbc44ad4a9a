"""Gradients of banded flash attention for TPU, in one kernel or two (FlashAttention-2, Dao 2023), and one of a bias.

With the weights p_ts = exp(scale q_t . k_s - lse_t) of visible pairs, computed again tile by tile from the saved lse,
and d the gradient of a loss with respect to out and lse:

    D_t   = dout_t . out_t - dlse_t
    dl_ts = p_ts (dout_t . v_s - D_t)                                  the logits'
    dq_t  = scale sum_s dl_ts k_s        dk_s = scale sum_t dl_ts q_t        dv_s = sum_t p_ts dout_t

With a softcap c the logits are c z_ts, z_ts = tanh(scale / c q_t . k_s), and dl_ts, there, times 1 - z_ts^2.

A kernel goes through the query tiles that see a key tile, over all query heads of a key head, and adds up dk and dv;
its tiles of logits are [keys, queries], so that what belongs to a query lies along the lanes. It adds up dq as well
where VMEM holds the sums of all query tiles that it has begun with and not yet left (slots_of: windows, short
sequences), which spares two of seven products. Elsewhere another kernel goes through the key tiles that a query tile
sees, as the forward kernel does, and adds up dq. Sums are float32. Heads go side by side and tiles by quarters, as in
the forward kernel.

A bias' gradient is dl, summed over the axes that it has not. Its own kernel computes dl again, pair by pair of tiles,
and where rows of the batch or heads share the bias adds theirs up before the next pair. If nobody asks for this
gradient, XLA leaves the kernel out.
"""

import functools
from collections.abc import Callable
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
    BiasCall,
    Body,
    Call,
    Piece,
    Step,
    SumsCall,
    add_by_lane,
    biased,
    block_bytes,
    blocks_of,
    capped_in_base_2,
    hide,
    is_first,
    is_last,
    is_last_of_queries,
    one_ahead,
    over_lanes,
    save_bounds,
    slot_of,
    spread,
    visit,
)
from kernels_pallas.tpu.band import heads_of_a_step as band_heads
from kernels_pallas.tpu.band import refusal as band_refusal
from kernels_pallas.tpu.band import slots_of as band_slots

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
# Exponents are of 2, which spares a product.
_LOG_2 = np.float32(np.log(2))
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
    bias: Any = None,
    slots: int = 0,
) -> int:
    """VMEM that the largest of the kernels takes at most, as in banded_flash.vmem_bytes; with slots the one for all of
    query, key and value."""
    size = jnp.dtype(dtype).itemsize
    key_lanes, value_lanes = (common.round_up(width, common.LANES) for width in (head_dim, value_dim))
    both, all_queries, all_keys = key_lanes + value_lanes, heads * block_q, key_heads * block_k
    read = size * (all_queries + all_keys) * both  # query, dout; key, value
    of_results = all_queries * key_lanes, all_keys * both
    written = size * (sum if slots else max)(of_results)
    rows = 4 * common.SUBLANES * ((1 + heads) * block_q + (block_k if tables > 1 else 0))
    state = 4 * max(all_queries * (key_lanes + 2 * common.LANES), all_keys * both)
    if slots:
        state = 4 * (slots * of_results[0] + of_results[1])
    # Logits (a tanh takes their place) and dp, those of the next head with them, p and dl, and these in the operands'
    # dtype.
    logits = (4 * (2 * min(heads, 2) + 1) + 2 * size) * block_q * block_k
    columns = 4 * common.LANES * ((0 if slots else block_q * 8) + (block_k if tables > 1 else 0))
    products = 4 * max(block_q * key_lanes, block_k * both)  # before they are added to the sums
    splits = 2 * size * (block_q + block_k) * both if size == 4 else 0
    every = 2 * (read + rows) + logits + columns + splits
    largest = 2 * written + state + products
    if bias is not None:  # its gradient, or the sums by lane of one of keys alone
        has_one_row = bias.shape[1] == 1
        sums = 4 * bias.shape[0] * block_k * common.LANES if has_one_row else 0
        largest = max(largest, 2 * block_bytes(bias, jnp.float32) + sums)
        # A head's in float32, and turned around.
        every += 2 * block_bytes(bias) + 8 * block_k * (common.LANES if has_one_row else block_q)
    return every + largest


def refusal(
    query: Any, key: Any, value: Any, *, pattern: Pattern, segment_ids: Any = None, bias: Any = None
) -> str | None:
    """Why banded_flash_gradients cannot serve these arguments (arrays may be shape structs), or None if it can."""
    settings: Any = {"pattern": pattern, "segment_ids": segment_ids, "bias": bias}
    return band_refusal(query, key, value, **settings, default_blocks=default_blocks, footprint=vmem_bytes)


def heads_of_a_step(
    query: Any, key: Any, value: Any, *, pattern: Pattern, segment_ids: Any = None, bias: Any = None
) -> int:
    """How many query heads a step takes (arrays may be shape structs)."""
    settings: Any = {"pattern": pattern, "segment_ids": segment_ids, "bias": bias}
    return band_heads(query, key, value, **settings, default_blocks=default_blocks, footprint=vmem_bytes)


def slots_of(query: Any, key: Any, value: Any, *, pattern: Pattern, segment_ids: Any = None, bias: Any = None) -> int:
    """Of how many query tiles the kernel for all of query, key and value holds the sums (arrays may be shape structs);
    0 where there are two kernels."""
    settings: Any = {"pattern": pattern, "segment_ids": segment_ids, "bias": bias}
    return band_slots(query, key, value, **settings, default_blocks=default_blocks, footprint=vmem_bytes)


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
    bias: Array | None = None,
    scale: float | Array,
    softcap: float | None = None,
) -> tuple[Array, ...]:
    """Gradients with respect to query, key, value, scale and, if there is one, bias of banded_flash_attention.

    Args:
      query, key, value, pattern, segment_ids, bias, scale, softcap: as in banded_flash_attention.
      out, lse: what it gave. out_gradient [B, T, N, V], lse_gradient [B, T, N]: of the loss, with respect to these.

    Returns:
      The gradients, of the arguments' shapes and dtypes; scale's is float32 [].

    Raises:
      ValueError: with refusal()'s reason.

    Complexity: O(B N H x pairs x block_q x block_k) time, of which all kernels recompute the logits.
    """
    reason = refusal(query, key, value, pattern=pattern, segment_ids=segment_ids, bias=bias)
    if reason is not None:
        raise ValueError(f"banded_flash_gradients: {reason}")
    heads = heads_of_a_step(query, key, value, pattern=pattern, segment_ids=segment_ids, bias=bias)
    tiling = pattern.tiled(*pattern.blocks(default_blocks(query, key, value)))
    band = Band(query, key, value, tiling, segment_ids, bias)
    delta = jnp.sum(out_gradient.astype(jnp.float32) * out.astype(jnp.float32), axis=-1) - lse_gradient
    # A query that sees no key has no visible pair, whose weight would be exp(-inf + inf).
    finite_lse = jnp.where(lse == -jnp.inf, 0, lse)
    # Queries in the padding have weights of 0, whatever the bias of the keys.
    past = 0 if bias is None else -MASKED
    operands: Any = {
        "scale": scale / _unit(softcap),
        "numbers": band.numbers([finite_lse / _LOG_2, delta], heads, past=past),
        "tokens": [
            band.queries(query),
            band.queries(out_gradient.astype(query.dtype)),
            band.keys(key),
            band.keys(value),
        ],
    }
    of_keys: Any = {
        "out": [(width, query.dtype) for width in (band.key_width, band.value_width)],
        "scratch": [
            pltpu.VMEM((max(1, heads // band.group), band.block_k, width), jnp.float32)
            for width in (band.key_width, band.value_width)
        ],
    }
    slots = slots_of(query, key, value, pattern=pattern, segment_ids=segment_ids, bias=bias)
    if slots:
        to_key, to_value, to_query = SumsCall(band, heads=heads).run(
            functools.partial(_kernel, band=band, softcap=softcap),
            "banded_flash_gradients",
            **operands,
            out=[*of_keys["out"], (band.key_width, query.dtype)],
            scratch=[*of_keys["scratch"], pltpu.VMEM((slots, heads, band.block_q, band.key_width), jnp.float32)],
            products=(band.key_width,) * 3 + (band.value_width,) * 2,
        )
    else:
        (to_query,) = Call(band, by_key=False, heads=heads).run(
            functools.partial(_query_kernel, band=band, softcap=softcap),
            "banded_flash_query_gradient",
            **operands,
            out=[(band.key_width, query.dtype)],
            scratch=[
                *[
                    pltpu.VMEM((heads, band.block_q, width), jnp.float32)
                    for width in (band.key_width, *[common.LANES] * 2)
                ],
                *band.bounds_scratch(),
            ],
            products=(band.key_width, band.key_width, band.value_width),
        )
        to_key, to_value = Call(band, by_key=True, heads=heads).run(
            functools.partial(_kernel, band=band, softcap=softcap),
            "banded_flash_key_value_gradients",
            **operands,
            **of_keys,
            products=(band.key_width,) * 2 + (band.value_width,) * 2,
        )
    to_query = common.tokens_first(to_query, *query.shape[1::2])
    # dq = scale sum dl k, and dscale = sum dl (q . k).
    to_scale = jnp.sum(query.astype(jnp.float32) * to_query.astype(jnp.float32)) / scale
    to_key, to_value = (common.tokens_first(x, *of.shape[1::2]) for x, of in ((to_key, key), (to_value, value)))
    if bias is None:
        return to_query, to_key, to_value, to_scale
    of_heads, queries = 1 if bias.shape[1] == 1 else heads, bias.shape[2]
    (to_bias,) = BiasCall(band, heads=heads).run(
        functools.partial(_bias_kernel, band=band, softcap=softcap),
        "banded_flash_bias_gradient",
        **operands,
        out=(),
        scratch=[pltpu.VMEM((of_heads, band.block_k, common.LANES), jnp.float32)] if queries == 1 else [],
        products=(band.key_width, band.value_width),
    )
    return to_query, to_key, to_value, to_scale, to_bias[:, :, :queries, : bias.shape[3]].astype(bias.dtype)


def _unit(softcap: float | None) -> np.float32:
    """What the scale is divided by on its way into the kernels."""
    return _LOG_2 if softcap is None else np.float32(softcap)


def _logits(scaled: Array, softcap: float | None) -> tuple[Array, Callable[[Array], Array]]:
    """Logits for exponents of 2, and what makes slopes of them those of `scaled`, but for a factor."""
    if softcap is None:
        return scaled, lambda slopes: slopes
    capped = jnp.tanh(scaled)
    return capped_in_base_2(softcap) * capped, lambda slopes: slopes * (_ONE - capped * capped)


def _query_kernel(step: Step, scale_ref: Any, *refs: Any, band: Band, softcap: float | None) -> None:
    """One visit of a query tile to a key tile, of several heads."""
    numbers_ref, query_ref, gradient_ref, key_ref, value_ref, out_ref, acc_ref, lse_ref, delta_ref, *bounds = refs
    heads = query_ref.shape[0]
    per_key = heads // key_ref.shape[0]

    def start() -> None:
        acc_ref[...] = jnp.zeros_like(acc_ref)

    pl.when(step.is_start)(start)
    save_bounds(band, step, bounds)

    @pl.when(is_first(step))
    def _() -> None:
        for head in range(heads):
            for ref, row in ((lse_ref, head), (delta_ref, heads + head)):
                ref[head] = spread(numbers_ref[row : row + 1, :])

    def accumulate(body: Body) -> None:
        def products(head: int, piece: Piece) -> tuple[Array, Array]:
            of_query, of_key = (head, piece.queries), (head // per_key, piece.keys)
            return (
                common.dot(query_ref[of_query], key_ref[of_key], contract=(1, 1)),
                common.dot(gradient_ref[of_query], value_ref[of_key], contract=(1, 1)),
            )

        def use(head: int, piece: Piece, products: tuple[Array, Array]) -> None:
            queries, num_keys = (head, piece.queries), products[0].shape[1]
            logits, slope = _logits(scale_ref[0, 0] * products[0], softcap)
            logits = hide(band, step, piece, biased(step, head, piece, logits), bounds)
            weights = jnp.exp2(logits - over_lanes(lse_ref[queries], num_keys))
            slopes = slope(weights * (products[1] - over_lanes(delta_ref[queries], num_keys)))
            key = key_ref[head // per_key, piece.keys]
            acc_ref[queries] += common.dot(slopes.astype(key.dtype), key, contract=(1, 0))

        one_ahead(heads, body, products, use)

    visit(band, step, accumulate)

    @pl.when(is_last(step))
    def _() -> None:
        out_ref[...] = (_unit(softcap) * scale_ref[0, 0] * acc_ref[...]).astype(out_ref.dtype)
        start()


def _kernel(step: Step, scale_ref: Any, *refs: Any, band: Band, softcap: float | None) -> None:
    """One visit of a key tile to a query tile, of several query heads; of a SumsCall with their gradient too."""
    (query_ref, gradient_ref, key_ref), results = refs[1:4], refs[5:]
    out_refs, acc_refs = results[: len(results) // 2], results[len(results) // 2 :]
    (key_out_ref, value_out_ref, *query_out_ref), (key_acc_ref, value_acc_ref, *query_acc_ref) = out_refs, acc_refs
    heads = query_ref.shape[0]
    per_key = heads // key_ref.shape[0]

    def start() -> None:
        key_acc_ref[...] = jnp.zeros_like(key_acc_ref)
        value_acc_ref[...] = jnp.zeros_like(value_acc_ref)

    slot = slot_of(step)

    @pl.when(step.is_start)
    def _() -> None:
        start()
        for ref in query_acc_ref:
            ref[...] = jnp.zeros_like(ref)

    def add(head: int, piece: Piece, weights: Array, slopes: Array) -> None:
        of_query, of_key = (head, piece.queries), (head // per_key, piece.keys)
        query, gradient = query_ref[of_query], gradient_ref[of_query]
        slopes = slopes.astype(query.dtype)
        value_acc_ref[of_key] += common.dot(weights.astype(gradient.dtype), gradient, contract=(1, 0))
        key_acc_ref[of_key] += common.dot(slopes, query, contract=(1, 0))
        for acc_ref in query_acc_ref:
            acc_ref[(slot, *of_query)] += common.dot(slopes, key_ref[of_key], contract=(0, 0))

    _visit_by_key(band, step, scale_ref, refs[:5], add, softcap)

    @pl.when(is_last(step))
    def _() -> None:
        key_out_ref[...] = (_unit(softcap) * scale_ref[0, 0] * key_acc_ref[...]).astype(key_out_ref.dtype)
        value_out_ref[...] = value_acc_ref[...].astype(value_out_ref.dtype)
        start()

    for out_ref, acc_ref in zip(query_out_ref, query_acc_ref):

        @pl.when(is_last_of_queries(step))
        def _(out_ref: Any = out_ref, acc_ref: Any = acc_ref) -> None:
            out_ref[...] = (_unit(softcap) * scale_ref[0, 0] * acc_ref[slot]).astype(out_ref.dtype)
            acc_ref[slot] = jnp.zeros(acc_ref.shape[1:], jnp.float32)


def _bias_kernel(step: Step, scale_ref: Any, *refs: Any, band: Band, softcap: float | None) -> None:
    """One visit of a key tile to a query tile, of several query heads. sum_ref: of a bias of one row, which is read as
    a row for each key tile; a sum has a lane for the queries at its place."""
    out_ref, *sum_ref = refs[5:]

    @pl.when(is_first(step))
    def _() -> None:
        of_sum = (sum_ref or [out_ref])[0]
        of_sum[...] = jnp.zeros_like(of_sum)

    def add(head: int, piece: Piece, weights: Array, slopes: Array) -> None:
        at = head if out_ref.shape[0] > 1 else 0
        if sum_ref:
            sum_ref[0][at, piece.keys] += add_by_lane(slopes)
        else:
            of_pair = at, piece.queries, piece.keys
            out_ref[of_pair] = (out_ref[of_pair] + jnp.transpose(slopes)).astype(out_ref.dtype)

    _visit_by_key(band, step, scale_ref, refs[:5], add, softcap, of_logits=True)

    if sum_ref:

        @pl.when(is_last(step))
        def _() -> None:
            for head in range(out_ref.shape[0]):
                out_ref[head] = jnp.sum(jnp.transpose(sum_ref[0][head]), axis=0, keepdims=True)


def _visit_by_key(
    band: Band,
    step: Step,
    scale_ref: Any,
    refs: Any,
    add: Callable[[int, Piece, Array, Array], None],
    softcap: float | None,
    of_logits: bool = False,
) -> None:
    """add(head, piece, weights, slopes) of all heads and pieces of a step by key: p and dl, [keys, queries].

    refs: numbers, query, gradient, key, value. of_logits: slopes of the logits that a bias is added to, where they
      differ by a softcap from those of the products.
    """
    numbers_ref, query_ref, gradient_ref, key_ref, value_ref = refs
    heads = query_ref.shape[0]
    per_key = heads // key_ref.shape[0]

    def accumulate(body: Body) -> None:
        def products(head: int, piece: Piece) -> tuple[Array, Array]:
            of_query, of_key = (head, piece.queries), (head // per_key, piece.keys)
            return (
                common.dot(key_ref[of_key], query_ref[of_query], contract=(1, 1)),
                common.dot(value_ref[of_key], gradient_ref[of_query], contract=(1, 1)),
            )

        def use(head: int, piece: Piece, products: tuple[Array, Array]) -> None:
            lse, delta = (numbers_ref[row : row + 1, piece.queries] for row in (head, heads + head))
            logits, slope = _logits(scale_ref[0, 0] * products[0], softcap)
            weights = jnp.exp2(hide(band, step, piece, biased(step, head, piece, logits)) - lse)
            slopes = weights * (products[1] - delta)
            add(head, piece, weights, slopes if of_logits else slope(slopes))

        one_ahead(heads, body, products, use)

    visit(band, step, accumulate)
