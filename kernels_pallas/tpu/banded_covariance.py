"""Covariances under the weights of banded flash attention, for TPU: what local linear attention is made of.

With p_ts the weights of attention, a_ts = x_t . k_s and means abar_t = x_t . kbar_t, kbar_t = sum_s p_ts k_s,

    out_t = Cov_p(v, k) x_t = sum_s p_ts (a_ts - abar_t) v_s

in one pass over the keys, since p_ts = exp(scale q_t . k_s - lse_t) with the lse that attention gave. With the gradient
g of a loss with respect to out, c_ts = g_t . v_s and cbar_t = g_t . vbar_t,

    dl_ts = p_ts ((a_ts - abar_t) (c_ts - cbar_t) - g_t . out_t)                       the logits'
    dq_t  = scale sum_s dl_ts k_s                     dx_t = sum_s p_ts (c_ts - cbar_t) k_s
    dk_s  = sum_t scale dl_ts q_t + p_ts (c_ts - cbar_t) x_t          dv_s = sum_t p_ts (a_ts - abar_t) g_t

where lse, kbar and vbar are functions of q, k and v, and their share is in dl. The kernels go through the pairs of
tiles as those of banded_flash.py and of its gradients do, several heads side by side; all four gradients come of one
kernel where VMEM holds the sums of the query tiles in between.

Numerics: x and the results are float32, since conjugate gradients are made of them. Where q, k and v are bfloat16, a
float32 operand is split in two bfloat16 numbers, so that a product is exact to about 2^-16; sums are float32.
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from kernels_pallas.patterns import BlockLists, Pattern
from kernels_pallas.tpu import common
from kernels_pallas.tpu.band import (
    Band,
    Body,
    Call,
    Piece,
    Step,
    SumsCall,
    blocks_of,
    finite,
    hide,
    is_last,
    is_last_of_queries,
    one_ahead,
    over_lanes,
    save_bounds,
    save_numbers,
    slot_of,
    visit,
)
from kernels_pallas.tpu.band import heads_of_a_step as band_heads
from kernels_pallas.tpu.band import refusal as band_refusal
from kernels_pallas.tpu.band import slots_of as band_slots

Array = jax.Array

# (queries in a tile, keys in a tile), by bytes of an element and padded head dim, for all kernels.
_BLOCKS = {(2, 64): (256, 512), (2, 128): (256, 512), (2, 256): (128, 256), (4, 64): (256, 256), (4, 128): (256, 256)}
_DEFAULT_BLOCKS = (128, 128)  # at other widths
# VMEM that the kernel for all gradients may take, which spares five of its products; libtpu's own limit is less.
_BUDGET = 18 * 2**20
_ONE = np.float32(1)
# Numbers that belong to a query, in their order.
_LSE, _KEY_MEAN, _VALUE_MEAN, _PRODUCT = range(4)


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
    slots: int = 0,
) -> int:
    """VMEM that the largest of the kernels takes at most, as in banded_flash.vmem_bytes; with slots the one for all
    gradients."""
    size = jnp.dtype(dtype).itemsize
    keys, values = (common.round_up(width, common.LANES) for width in (head_dim, value_dim))
    all_queries, all_keys = heads * block_q, key_heads * block_k
    read = size * (all_queries * keys + all_keys * (keys + values)) + 4 * all_queries * (keys + values)  # x and g last
    of_results = (size + 4) * all_queries * keys, size * all_keys * (keys + values)
    written = max((sum if slots else max)(of_results), 4 * all_queries * values)
    rows = 4 * common.SUBLANES * ((1 + heads) * block_q + (block_k if tables > 1 else 0))
    columns = 4 * common.LANES * block_q * 4 * heads  # numbers, each over the lanes
    state = columns + 4 * max(2 * all_queries * keys, all_keys * (keys + values))
    if slots:
        state = 4 * (slots * 2 * all_queries * keys + all_keys * (keys + values))
    logits = 4 * (12 if slots else 8) * block_q * block_k
    splits = 2 * size * (block_q + block_k) * (keys + values) * (2 if size == 4 else 1)
    return 2 * (read + rows + written) + state + logits + splits


def refusal(query: Any, key: Any, value: Any, *, pattern: Pattern) -> str | None:
    """Why the kernels cannot serve these arguments (arrays may be shape structs), or None if they can."""
    if isinstance(pattern, BlockLists):
        return "serves no lists of tiles"
    return band_refusal(query, key, value, pattern=pattern, default_blocks=default_blocks, footprint=vmem_bytes)


def heads_of_a_step(query: Any, key: Any, value: Any, *, pattern: Pattern) -> int:
    """How many query heads a step takes (arrays may be shape structs)."""
    return band_heads(query, key, value, pattern=pattern, default_blocks=default_blocks, footprint=vmem_bytes)


def slots_of(query: Any, key: Any, value: Any, *, pattern: Pattern) -> int:
    """Of how many query tiles the kernel for all gradients holds the sums (arrays may be shape structs); 0 where there
    are two kernels."""
    settings: Any = {"pattern": pattern, "default_blocks": default_blocks, "footprint": vmem_bytes}
    return band_slots(query, key, value, **settings, budget=_BUDGET)


def banded_covariance(
    query: Array,
    key: Array,
    value: Array,
    direction: Array,
    lse: Array,
    key_mean: Array,
    *,
    pattern: Pattern,
    scale: float | Array,
) -> Array:
    """Cov_p(v, k) x.

    Args:
      query [B, T, N, H], key [B, S, K, H], value [B, S, K, V], pattern, scale: as in banded_flash_attention.
      direction: x [B, T, N, H], float32.
      lse: [B, T, N], banded_flash_attention's. key_mean: [B, T, N, H], what it gives for keys as values.

    Returns:
      [B, T, N, V] float32; 0 for a query that sees no key.
    """
    band, heads = _band("banded_covariance", query, key, value, pattern)
    means = jnp.sum(direction * key_mean.astype(jnp.float32), axis=-1)
    (out,) = Call(band, by_key=False, heads=heads).run(
        functools.partial(_forward_kernel, band=band),
        "banded_covariance",
        scale=scale,
        numbers=band.numbers([finite(lse), means], heads),
        tokens=[
            band.queries(query),
            band.queries(direction.astype(jnp.float32)),
            band.keys(key),
            band.keys(value),
        ],
        out=[(band.value_width, jnp.float32)],
        scratch=[
            pltpu.VMEM((heads, band.block_q, band.value_width), jnp.float32),
            pltpu.VMEM((2 * heads, band.block_q, common.LANES), jnp.float32),
            *band.bounds_scratch(),
        ],
        products=(band.key_width, band.key_width, band.value_width),
    )
    return common.tokens_first(out, query.shape[1], value.shape[-1])


def banded_covariance_gradients(
    query: Array,
    key: Array,
    value: Array,
    direction: Array,
    lse: Array,
    key_mean: Array,
    value_mean: Array,
    out: Array,
    gradient: Array,
    *,
    pattern: Pattern,
    scale: float | Array,
) -> tuple[Array, Array, Array, Array, Array]:
    """Gradients with respect to query, key, value, direction and scale of banded_covariance.

    Args:
      query .. key_mean: as there. value_mean: [B, T, N, V], attention's output. out: what banded_covariance gave.
      gradient: [B, T, N, V], of the loss with respect to it.
    """
    gradient = gradient.astype(jnp.float32)
    numbers = [
        finite(lse),
        jnp.sum(direction * key_mean.astype(jnp.float32), axis=-1),
        jnp.sum(gradient * value_mean.astype(jnp.float32), axis=-1),
        jnp.sum(gradient * out, axis=-1),
    ]
    direction = direction.astype(jnp.float32)
    return tilted_gradients(query, key, value, direction, numbers, gradient, pattern=pattern, scale=scale)


def tilted_gradients(
    query: Array,
    key: Array,
    value: Array,
    direction: Array,
    numbers: Sequence[Array],
    gradient: Array,
    *,
    pattern: Pattern,
    scale: float | Array,
) -> tuple[Array, Array, Array, Array, Array]:
    """banded_covariance_gradients, of these numbers of a query [B, T, N]: lse, abar, cbar and g . out in this module's
    docstring. Direction and gradient are both float32, or both of query's dtype, to which weights are then rounded."""
    band, heads = _band("banded_covariance_gradients", query, key, value, pattern)
    operands: Any = {
        "scale": scale,
        "numbers": band.numbers(numbers, heads),
        "tokens": [
            band.queries(query),
            band.queries(direction),
            band.queries(gradient),
            band.keys(key),
            band.keys(value),
        ],
    }
    keys, values = band.key_width, band.value_width
    of_queries = [(keys, query.dtype), (keys, direction.dtype)]
    of_keys = [(keys, query.dtype), (values, query.dtype)]
    key_scratch = [
        pltpu.VMEM((max(1, heads // band.group), band.block_k, width), jnp.float32) for width in (keys, values)
    ]
    slots = slots_of(query, key, value, pattern=pattern)
    if slots:
        to_key, to_value, to_query, to_direction = SumsCall(band, heads=heads).run(
            functools.partial(_kernel, band=band),
            "banded_covariance_gradients",
            **operands,
            out=[*of_keys, *of_queries],
            scratch=[*key_scratch, *[pltpu.VMEM((slots, heads, band.block_q, keys), jnp.float32)] * 2],
            products=(keys, keys, values, keys, keys, keys, keys, values),
            vmem=_BUDGET,
        )
    else:
        to_query, to_direction = Call(band, by_key=False, heads=heads).run(
            functools.partial(_query_kernel, band=band),
            "banded_covariance_query_gradients",
            **operands,
            out=of_queries,
            scratch=[
                *[pltpu.VMEM((heads, band.block_q, keys), jnp.float32)] * 2,
                pltpu.VMEM((4 * heads, band.block_q, common.LANES), jnp.float32),
                *band.bounds_scratch(),
            ],
            products=(keys, keys, values, keys, keys),
        )
        to_key, to_value = Call(band, by_key=True, heads=heads).run(
            functools.partial(_kernel, band=band),
            "banded_covariance_key_value_gradients",
            **operands,
            out=of_keys,
            scratch=key_scratch,
            products=(keys, keys, values, keys, keys, values),
        )
    to_query, to_direction = (common.tokens_first(x, *query.shape[1::2]) for x in (to_query, to_direction))
    to_key, to_value = (common.tokens_first(x, *of.shape[1::2]) for x, of in ((to_key, key), (to_value, value)))
    to_scale = jnp.sum(query.astype(jnp.float32) * to_query.astype(jnp.float32)) / scale
    return to_query, to_key, to_value, to_direction, to_scale


def _band(name: str, query: Array, key: Array, value: Array, pattern: Pattern) -> tuple[Band, int]:
    """And the heads of a step."""
    reason = refusal(query, key, value, pattern=pattern)
    if reason is not None:
        raise ValueError(f"{name}: {reason}")
    tiling = pattern.tiled(*pattern.blocks(default_blocks(query, key, value)))
    return Band(query, key, value, tiling), heads_of_a_step(query, key, value, pattern=pattern)


def _product(a: Array, b: Array, contract: tuple[int, int]) -> Array:
    """A product of which one operand may be float32 and the other bfloat16."""
    if a.dtype == b.dtype:
        return common.dot(a, b, contract)
    if a.dtype == jnp.float32:
        return sum(common.dot(part, b, contract) for part in common.in_two(a, b.dtype))  # type: ignore[return-value]
    return sum(common.dot(a, part, contract) for part in common.in_two(b, a.dtype))  # type: ignore[return-value]


def _clear(*refs: Any) -> None:
    for ref in refs:
        ref[...] = jnp.zeros_like(ref)


def _forward_kernel(step: Step, scale_ref: Any, *refs: Any, band: Band) -> None:
    """One visit of a query tile to a key tile, of several heads."""
    numbers_ref, query_ref, direction_ref, key_ref, value_ref, out_ref, acc_ref, columns_ref, *bounds = refs
    heads = query_ref.shape[0]
    per_key = heads // key_ref.shape[0]
    pl.when(step.is_start)(lambda: _clear(acc_ref))
    save_bounds(band, step, bounds)
    save_numbers(step, numbers_ref, columns_ref)

    def accumulate(body: Body) -> None:
        def products(head: int, piece: Piece) -> tuple[Array, Array]:
            of_query, key = (head, piece.queries), key_ref[head // per_key, piece.keys]
            return _product(query_ref[of_query], key, (1, 1)), _product(direction_ref[of_query], key, (1, 1))

        def use(head: int, piece: Piece, products: tuple[Array, Array]) -> None:
            queries, num_keys = (head, piece.queries), products[0].shape[1]
            lse, key_mean = (over_lanes(columns_ref[n * heads + head, piece.queries], num_keys) for n in range(2))
            weights = jnp.exp(hide(band, step, piece, scale_ref[0, 0] * products[0], bounds) - lse)
            value = value_ref[head // per_key, piece.keys]
            acc_ref[queries] += _product(weights * (products[1] - key_mean), value, (1, 0))

        one_ahead(heads, body, products, use)

    visit(band, step, accumulate)

    @pl.when(is_last(step))
    def _() -> None:
        out_ref[...] = acc_ref[...]
        _clear(acc_ref)


def _query_kernel(step: Step, scale_ref: Any, numbers_ref: Any, *refs: Any, band: Band) -> None:
    """One visit of a query tile to a key tile, of several heads."""
    inputs = refs[:5]
    query_out_ref, direction_out_ref, query_acc_ref, direction_acc_ref, columns_ref, *bounds = refs[5:]
    key_ref, heads = inputs[3], inputs[0].shape[0]
    per_key = heads // key_ref.shape[0]
    pl.when(step.is_start)(lambda: _clear(query_acc_ref, direction_acc_ref))
    save_bounds(band, step, bounds)
    save_numbers(step, numbers_ref, columns_ref)

    def number(row: int, head: int, piece: Piece) -> Array:
        return over_lanes(columns_ref[row * heads + head, piece.queries], piece.keys.stop - piece.keys.start)

    def add(head: int, piece: Piece, weights: Array, slopes: Array, gains: Array, of_logits: Array) -> None:
        queries, key = (head, piece.queries), key_ref[head // per_key, piece.keys]
        query_acc_ref[queries] += _sums(inputs, of_logits, key, (1, 0))
        direction_acc_ref[queries] += _sums(inputs, weights * gains, key, (1, 0))

    _visit(band, step, scale_ref, number, inputs, add, bounds)

    @pl.when(is_last(step))
    def _() -> None:
        query_out_ref[...] = (scale_ref[0, 0] * query_acc_ref[...]).astype(query_out_ref.dtype)
        direction_out_ref[...] = direction_acc_ref[...].astype(direction_out_ref.dtype)
        _clear(query_acc_ref, direction_acc_ref)


def _kernel(step: Step, scale_ref: Any, numbers_ref: Any, *refs: Any, band: Band) -> None:
    """One visit of a key tile to a query tile, of several query heads; of a SumsCall with all gradients."""
    inputs, results = refs[:5], refs[5:]
    out_refs, acc_refs = results[: len(results) // 2], results[len(results) // 2 :]
    (key_out_ref, value_out_ref, *query_out_refs), (key_acc_ref, value_acc_ref, *query_acc_refs) = out_refs, acc_refs
    query_ref, direction_ref, gradient_ref, key_ref = inputs[:4]
    heads = query_ref.shape[0]
    per_key = heads // key_ref.shape[0]
    pl.when(step.is_start)(lambda: _clear(*acc_refs))
    slot = slot_of(step)

    def number(row: int, head: int, piece: Piece) -> Array:
        at = row * heads + head
        return numbers_ref[at : at + 1, piece.queries]

    def add(head: int, piece: Piece, weights: Array, slopes: Array, gains: Array, of_logits: Array) -> None:
        of_query, of_key = (head, piece.queries), (head // per_key, piece.keys)
        gained = weights * gains
        key_acc_ref[of_key] += _sums(inputs, scale_ref[0, 0] * of_logits, query_ref[of_query], (1, 0))
        key_acc_ref[of_key] += _sums(inputs, gained, direction_ref[of_query], (1, 0))
        value_acc_ref[of_key] += _sums(inputs, weights * slopes, gradient_ref[of_query], (1, 0))
        for acc_ref, x in zip(query_acc_refs, (of_logits, gained)):
            acc_ref[(slot, *of_query)] += _sums(inputs, x, key_ref[of_key], (0, 0))

    _visit(band, step, scale_ref, number, inputs, add)

    @pl.when(is_last(step))
    def _() -> None:
        for out_ref, acc_ref in ((key_out_ref, key_acc_ref), (value_out_ref, value_acc_ref)):
            out_ref[...] = acc_ref[...].astype(out_ref.dtype)
        _clear(key_acc_ref, value_acc_ref)

    def write_queries() -> None:
        for out_ref, acc_ref, factor in zip(query_out_refs, query_acc_refs, (scale_ref[0, 0], _ONE)):
            out_ref[...] = (factor * acc_ref[slot]).astype(out_ref.dtype)
            acc_ref[slot] = jnp.zeros(acc_ref.shape[1:], jnp.float32)

    if query_acc_refs:
        pl.when(is_last_of_queries(step))(write_queries)


def _visit(
    band: Band,
    step: Step,
    scale_ref: Any,
    number: Callable[[int, int, Piece], Array],
    inputs: Sequence[Any],
    add: Callable[..., None],
    bounds: Sequence[Any] = (),
) -> None:
    """add(head, piece, p, a - abar, c - cbar, dl) of all heads and pieces of a step: [queries, keys], by key [keys,
    queries].

    number(row, head, piece): of the piece's queries, what broadcasts to that. inputs: query, direction, gradient, key
      and value.
    """
    query_ref, direction_ref, gradient_ref, key_ref, value_ref = inputs
    heads = query_ref.shape[0]
    per_key = heads // key_ref.shape[0]

    def pairs(of_query: Array, of_key: Array) -> Array:
        """Products of every query's row with every key's."""
        return _product(of_key, of_query, (1, 1)) if step.by_key else _product(of_query, of_key, (1, 1))

    def accumulate(body: Body) -> None:
        def products(head: int, piece: Piece) -> tuple[Array, Array, Array]:
            of_query, of_key = (head, piece.queries), (head // per_key, piece.keys)
            key = key_ref[of_key]
            return (
                pairs(query_ref[of_query], key),
                pairs(direction_ref[of_query], key),
                pairs(gradient_ref[of_query], value_ref[of_key]),
            )

        def use(head: int, piece: Piece, products: tuple[Array, Array, Array]) -> None:
            logits = hide(band, step, piece, scale_ref[0, 0] * products[0], bounds)
            weights = jnp.exp(logits - number(_LSE, head, piece))
            slopes, gains = products[1] - number(_KEY_MEAN, head, piece), products[2] - number(_VALUE_MEAN, head, piece)
            add(head, piece, weights, slopes, gains, weights * (slopes * gains - number(_PRODUCT, head, piece)))

        one_ahead(heads, body, products, use)

    visit(band, step, accumulate)


def _sums(inputs: Sequence[Any], weights: Array, vectors: Array, contract: tuple[int, int]) -> Array:
    """Of vectors, by weights rounded to the vectors' dtype; beside a float32 direction in two parts."""
    direction_ref = inputs[1]
    if direction_ref.dtype == vectors.dtype:
        weights = weights.astype(vectors.dtype)
    return _product(weights, vectors, contract)
