"""Covariances under the weights of banded flash attention, for Hopper: what local linear attention is made of.

With p_ts the weights of attention, a_ts = x_t . k_s and means abar_t = x_t . kbar_t, kbar_t = sum_s p_ts k_s,

    out_t = Cov_p(v, k) x_t = sum_s p_ts (a_ts - abar_t) v_s

in one pass over the keys, since p_ts = exp(scale q_t . k_s - lse_t) with the lse that attention gave. With the gradient
g of a loss with respect to out, c_ts = g_t . v_s and cbar_t = g_t . vbar_t,

    dl_ts = p_ts ((a_ts - abar_t) (c_ts - cbar_t) - g_t . out_t)                       the logits'
    dq_t  = scale sum_s dl_ts k_s                     dx_t = sum_s p_ts (c_ts - cbar_t) k_s
    dk_s  = sum_t scale dl_ts q_t + p_ts (c_ts - cbar_t) x_t          dv_s = sum_t p_ts (a_ts - abar_t) g_t

where lse, kbar and vbar are functions of q, k and v, and their share is in dl. A block has a tile of queries of one
head, 64 for each of two warpgroups, and goes through the tiles of keys on the tile's list as in banded_flash.py; one
kernel gives the gradients of queries and directions, and one, whose rows are keys, those of keys and values.

Numerics: x and the results are float32, since conjugate gradients are made of them; products have 16-bit operands and
float32 sums. With is_exact, x and the weights of v (and in dx g and the weights of k) are each the sum of two 16-bit
numbers, exact to about 2^-16 in bfloat16 and 2^-21 in float16; without, they are rounded to one, which is all that there
is where x and g come from 16-bit arrays. kbar comes in 16 bits: what its rounding does to out is undone where vbar is
given (out minus vbar times the sum of the tilted weights, which is 0 for the exact mean). dq, dk and dv are 16-bit
results, made of x and g rounded to 16 bits. float16 has few exponents: rows of x and g are scaled by powers of two.
Deterministic: sums go in the order of the lists.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

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
    dots,
    full,
    half,
    launch,
    load,
    store,
)
from kernels_pallas.patterns import Pattern

Array = jax.Array

STEP = 64  # keys, or queries, that are multiplied at once: three matrices of so many columns beside two sums
_MOST_STAGES = 4
_MOST_WIDTH = 128  # of what fits into shared memory
_SPARE_BYTES = 4096  # of shared memory, for tables and barriers
_LOG_2 = np.float32(np.log(2))
# Rows of the table of numbers that belong to a query.
_LSE, _KEY_MEAN, _VALUE_MEAN, _PRODUCT = range(4)
_MEAN = _KEY_MEAN  # the only one, of either
# In float16, powers of two: that bound x . k, alone or multiplied with g . v and weights; that raise these weights.
_ALONE, _IN_PRODUCTS, _RAISED = 14, 1, 10


def _stages(own: list[int], moving: list[int]) -> int:
    """Slots of a block that keeps matrices of these widths, for those that move; two at least."""
    left = SMEM_BUDGET - _SPARE_BYTES - 2 * TILE * sum(own)
    return max(2, min(_MOST_STAGES, left // (2 * STEP * sum(moving))))


def smem_bytes(key_width: int, value_width: int) -> int:
    """Shared memory of a block of the largest of the kernels, at padded widths."""
    tokens, each = [key_width, value_width], 2 * max(key_width, value_width)
    kernels = (  # own, moving
        ([key_width, each], tokens),  # q, x or g in two parts
        ([key_width, *tokens], tokens),  # q, x, g
        (tokens, [key_width, *tokens]),
    )
    return (
        max(2 * TILE * sum(own) + 2 * _stages(own, moving) * STEP * sum(moving) for own, moving in kernels)
        + _SPARE_BYTES
    )


def refusal(query: Any, key: Any, value: Any, *, pattern: Pattern) -> str | None:
    """Why the kernels cannot serve these arguments (arrays may be shape structs), or None if they can."""
    if max(query.shape[-1], value.shape[-1]) > _MOST_WIDTH:
        return f"serves head dims up to {_MOST_WIDTH}, got {query.shape[-1]} and {value.shape[-1]}"
    return band_refusal(query, key, value, pattern=pattern, footprint=smem_bytes)


def banded_covariance(
    query: Array,
    key: Array,
    value: Array,
    direction: Array,
    lse: Array,
    key_mean: Array,
    value_mean: Array | None = None,
    *,
    pattern: Pattern,
    scale: float | Array,
    is_exact: bool = True,
) -> Array:
    """Cov_p(v, k) x.

    Args:
      query [B, T, N, H], key [B, S, K, H], value [B, S, K, V], pattern, scale: as in banded_flash_attention, H and V up
        to 128.
      direction: x [B, T, N, H], float32.
      lse: [B, T, N], banded_flash_attention's. key_mean: [B, T, N, H], what it gives for keys as values.
      value_mean: [B, T, N, V], what it gives for these values, to make up for the rounding of key_mean. None: as it is.
      is_exact: x and weights of 16 bits or more; else of query's dtype, for 3 products of matrices instead of 5.

    Returns:
      [B, T, N, V] float32; 0 for a query that sees no key.

    Raises:
      ValueError: with refusal()'s reason.

    Complexity: O(B N (H + V) x visited tiles) time; memory beside the arguments: x in two 16-bit numbers.
    """
    band = _band("banded_covariance", query, key, value, pattern)
    means = (key_mean, value_mean)
    return _covariance(band, query, key, value, direction, lse, means, source=0, scale=scale, is_exact=is_exact)


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
    is_exact: bool = True,
) -> tuple[Array, Array, Array, Array, Array]:
    """Gradients with respect to query, key, value, direction and scale of banded_covariance.

    Args:
      query .. key_mean: as there. value_mean: [B, T, N, V], attention's output. out: what banded_covariance gave.
      gradient: [B, T, N, V], of the loss with respect to it.
      is_exact: of direction's gradient, as there; the others have query's precision.
    """
    band = _band("banded_covariance_gradients", query, key, value, pattern)
    gradient, out, scale = (jnp.asarray(x, jnp.float32) for x in (gradient, out, scale))
    [x], of_x, direction = _split(direction, key, _IN_PRODUCTS, 1)
    [g], of_g, rounded = _split(gradient, value, _IN_PRODUCTS, 1)
    raised = np.int32(_RAISED if key.dtype == jnp.float16 else 0)
    numbers = {
        _LSE: _finite(lse) - np.float32(raised) * _LOG_2,
        _KEY_MEAN: _inner(direction, key_mean),
        _VALUE_MEAN: _inner(rounded, value_mean),
        _PRODUCT: jnp.ldexp(_inner(rounded, out), -of_x),
    }
    widths, tokens, operands = (band.key_width, band.value_width), [key, value], [query, x, g]
    to_query, *to_direction = _run(
        band,
        "banded_covariance_query_gradients",
        _query_step,
        by_key=False,
        scale=scale,
        numbers=numbers,
        queries=operands,
        tokens=tokens,
        sums=widths[:1] * (1 if is_exact else 2),
    )
    # Here queries are summed over: what scales their rows of x and g goes into their weights.
    row_exponent = of_x + of_g
    most = jnp.max(row_exponent)
    to_key, to_value = _run(
        band,
        "banded_covariance_key_value_gradients",
        _key_step,
        by_key=True,
        scale=scale,
        numbers=numbers | {_LSE: numbers[_LSE] + (most - row_exponent).astype(jnp.float32) * _LOG_2},
        queries=operands,
        tokens=tokens,
        sums=widths,
    )
    to_query = _cut(to_query, query, row_exponent - raised)
    if is_exact:
        means = (value_mean, key_mean)
        to_x = _covariance(band, query, key, value, gradient, lse, means, source=1, scale=scale, is_exact=True)
    else:
        to_x = _cut(to_direction[0], query, of_g - raised)
    to_key, to_value = (
        _cut(total, x, most - raised).astype(x.dtype) for total, x in ((to_key, key), (to_value, value))
    )
    to_scale = jnp.sum(query.astype(jnp.float32) * to_query)
    return (scale * to_query).astype(query.dtype), to_key, to_value, to_x, to_scale


def _covariance(
    band: Band,
    query: Array,
    key: Array,
    value: Array,
    direction: Array,
    lse: Array,
    means: tuple[Array, Array | None],
    *,
    source: int,
    scale: float | Array,
    is_exact: bool,
) -> Array:
    """Cov_p(v, k) x, or with source 1 Cov_p(k, v) x. means: of what x is multiplied with, and of what is summed."""
    tokens, widths = (key, value), (band.key_width, band.value_width)
    parts, exponent, direction = _split(direction, tokens[source], _ALONE, 2 if is_exact else 1)
    out, rest = _run(
        band,
        "banded_covariance" if source == 0 else "banded_covariance_direction_gradients",
        functools.partial(_forward_step, source=source, is_exact=is_exact),
        by_key=False,
        scale=scale,
        numbers={_LSE: _finite(lse), _MEAN: _inner(direction, means[0])},
        queries=[query, *parts],
        tokens=list(tokens),
        sums=(widths[1 - source],),
        row_sums=1,
    )
    if means[1] is not None:
        mean = band.queries(means[1].astype(jnp.float32))
        out = out - rest[..., None] * mean
    shape = (*query.shape[:3], tokens[1 - source].shape[-1])
    return _cut(out, jax.ShapeDtypeStruct(shape, jnp.float32), exponent)


def _cut(x: Array, like: Any, exponent: Array) -> Array:
    """x without the padding, times 2^exponent, of each row or of all."""
    x = x[:, : like.shape[1], :, : like.shape[3]]
    return jnp.ldexp(x, jnp.broadcast_to(exponent[..., None], x.shape))


def _band(name: str, query: Array, key: Array, value: Array, pattern: Pattern) -> Band:
    reason = refusal(query, key, value, pattern=pattern)
    if reason is not None:
        raise ValueError(f"{name}: {reason}")
    return Band(query, key, value, pattern.tiled(TILE, TILE))


def _finite(lse: Array) -> Array:
    """A query that sees no key has no visible pair, whose weight would be exp(-inf + inf)."""
    return jnp.where(lse == -jnp.inf, 0, lse)


def _inner(x: Array, mean: Array) -> Array:
    return jnp.sum(x * mean.astype(jnp.float32), axis=-1)


def _split(x: Array, tokens: Array, bound: int, parts: int) -> tuple[list[Array], Array, Array]:
    """x [B, T, N, H] as so many 16-bit arrays times 2^exponent: (the arrays, exponent int32 [B, T, N], their sum).

    In float16, products of the parts with a row of `tokens` are at most 2^bound, and the parts themselves 2^14.
    """
    x, dtype = x.astype(jnp.float32), tokens.dtype
    exponent = jnp.zeros(x.shape[:-1], jnp.int32)
    if dtype == jnp.float16:
        squares = jnp.sum(jnp.square(tokens.astype(jnp.float32)), axis=-1)
        longest = jnp.sqrt(jnp.max(jnp.where(jnp.isfinite(squares), squares, 0)))
        largest = jnp.max(jnp.abs(x), axis=-1)
        shrunk = x / jnp.where(largest > 0, largest, 1)[..., None]  # whose squares are in range
        reach = jnp.sqrt(jnp.sum(jnp.square(shrunk), axis=-1)) * largest * longest
        exponent = jnp.maximum(jnp.frexp(reach)[1] - bound, jnp.frexp(largest)[1] - 14).astype(jnp.int32)
        x = jnp.ldexp(x, -exponent[..., None])
    info = jnp.finfo(dtype)
    high = lax.reduce_precision(x, info.nexp, info.nmant)  # conversions there and back may be left out by XLA
    if parts == 1:
        return [high.astype(dtype)], exponent, high
    return [high.astype(dtype), (x - high).astype(dtype)], exponent, x


class _Step(NamedTuple):
    """What the kernels read of a step, of which rows are a warpgroup's own tokens, and columns those that move.

    own, moving: refs of 16-bit matrices. sees: gives bool, or is None where all is seen. number: row of the table -> it,
    over the matrix. factor, size: the scale's size in base 2, and as it is.
    """

    own: list[Any]
    moving: list[Any]
    sees: Callable[[], Array] | None
    number: Callable[[int], Array]
    factor: Array
    size: Array

    def weights(self, logits: Array) -> Array:
        logits = logits * self.factor
        if self.sees is not None:
            logits = jnp.where(self.sees(), logits, MASKED)
        return jnp.exp2(logits - self.number(_LSE))


def _pairs(*sums: list[tuple[Any, Any]]) -> list[Array]:
    """Products of every own row with every row that moves, summed over the pairs of a list."""
    products = [[Product(own, moving, b_transposed=True) for own, moving in pairs] for pairs in sums]
    return dots(*products, shape=(ROWS, STEP))


def _rounded(x: Array, dtype: Any, is_exact: bool) -> list[Array]:
    """x in 16 bits, or as the sum of two such numbers."""
    if not is_exact:
        return [x.astype(dtype)]
    if dtype == jnp.bfloat16:  # the upper half of a float32 number; faster than to round there and back
        bits = lax.bitcast_convert_type(x, jnp.int32) & np.int32(-(2**16))
        high = lax.bitcast_convert_type(bits, jnp.float32)
    else:
        high = x.astype(dtype).astype(jnp.float32)
    return [high.astype(dtype), (x - high).astype(dtype)]


def _forward_step(step: _Step, sums: list[Array], *, source: int, is_exact: bool) -> list[Array]:
    """source: of key and value, which one directions are multiplied with; the other one is summed."""
    query, *directions = step.own
    key, target = step.moving[0], step.moving[1 - source]
    logits, slopes = _pairs([(query, key)], [(x, step.moving[source]) for x in directions])
    tilted = step.weights(logits) * (slopes - step.number(_MEAN))
    total, rest = sums
    weights = _rounded(tilted, target.dtype, is_exact)
    return [add_dot(total, *(Product(weight, target) for weight in weights)), rest + tilted.sum(axis=1)]


def _query_step(step: _Step, sums: list[Array]) -> list[Array]:
    """sums: of the gradients of queries, and of directions where there are two."""
    query, direction, gradient = step.own
    key, value = step.moving
    logits, slopes = _pairs([(query, key)], [(direction, key)])
    weights = step.weights(logits)
    slopes = weights * (slopes - step.number(_KEY_MEAN))
    [gains] = _pairs([(gradient, value)])
    gains = gains - step.number(_VALUE_MEAN)
    of_logits = slopes * gains - weights * step.number(_PRODUCT)
    factors = [of_logits, weights * gains][: len(sums)]
    return [add_dot(total, Product(x.astype(key.dtype), key)) for total, x in zip(sums, factors, strict=True)]


def _key_step(step: _Step, sums: list[Array]) -> list[Array]:
    key, value = step.own
    query, direction, gradient = step.moving
    to_key, to_value = sums
    logits, slopes = _pairs([(key, query)], [(key, direction)])
    weights = step.weights(logits)
    slopes = weights * (slopes - step.number(_KEY_MEAN))
    to_value = add_dot(to_value, Product(slopes.astype(key.dtype), gradient))
    [gains] = _pairs([(value, gradient)])
    gains = gains - step.number(_VALUE_MEAN)
    of_logits = step.size * (slopes * gains - weights * step.number(_PRODUCT))
    to_key = add_dot(to_key, Product(of_logits.astype(key.dtype), query))
    to_key = add_dot(to_key, Product((weights * gains).astype(key.dtype), direction))
    return [to_key, to_value]


def _run(
    band: Band,
    name: str,
    accumulate: Callable[[_Step, list[Array]], list[Array]],
    *,
    by_key: bool,
    scale: float | Array,
    numbers: dict[int, Array],
    queries: list[Array],
    tokens: list[Array],
    sums: tuple[int, ...],
    row_sums: int = 0,
) -> list[Array]:
    """Runs `accumulate` over the steps of every tile of queries, or of keys.

    numbers: [B, T, N] by row of the table; lse not yet in base 2. queries: of which the first is query. tokens: key and
    value. sums: widths of the sums, all 0 at first, each [B, T, N, width] float32 (by key [B, S, K, width]).
    row_sums: sums of a number per row, after them, [B, T, N].
    """
    sign, factor = factor_of(scale)
    factors = jnp.concatenate([factor, factor * _LOG_2])
    first, *more = queries
    queries = [band.queries(x) for x in (first * sign.astype(first.dtype), *more)]
    tokens = [band.keys(x) for x in tokens]
    numbers = numbers | {_LSE: numbers[_LSE] / _LOG_2}
    length = band.query_tiles * TILE
    table = jnp.stack([jnp.moveaxis(numbers[row], 1, 2) for row in sorted(numbers)], axis=2)
    table = jnp.pad(table, ((0, 0), (0, 0), (0, 0), (0, length - table.shape[-1])))
    own, moving = (tokens, queries) if by_key else (queries, tokens)
    heads, tiles = (band.key_heads, band.key_tiles) if by_key else (band.heads, band.query_tiles)
    lists = [jnp.asarray(x) for x in (band.by_key if by_key else band.by_query)]
    tables = [x for x in (band.query_table, band.key_table) if x is not None]
    moving_table = band.query_table if by_key else band.key_table
    stages = _stages(*([x.shape[-1] for x in arrays] for arrays in (own, moving)))
    copies = len(moving) + by_key + (moving_table is not None)
    results = launch(
        _body(
            band,
            accumulate,
            by_key=by_key,
            own=len(own),
            moving=len(moving),
            sums=sums,
            row_sums=row_sums,
            stages=stages,
        ),
        name,
        factors,
        table,
        *lists,
        *own,
        *moving,
        *tables,
        out=[
            *[((band.batch, tiles * TILE, heads, width), jnp.float32) for width in sums],
            *[((band.batch, heads, tiles * TILE), jnp.float32) for _ in range(row_sums)],
        ],
        grid={"batch": band.batch, "head": heads, "tile": tiles},
        scratch=[
            *[half(WARPGROUPS, ROWS, x.shape[-1], dtype=band.dtype) for x in own],
            *[half(stages, STEP, x.shape[-1], dtype=band.dtype) for x in moving],
            *[plgpu.SMEM((WARPGROUPS, ROWS), jnp.float32) for _ in range(row_sums)],
            plgpu.SMEM((stages, table.shape[2], STEP), jnp.float32) if by_key else None,
            None if moving_table is None else plgpu.SMEM((stages, moving_table.shape[1], STEP), jnp.int32),
            barriers(WARPGROUPS, len(own)),
            barriers(stages, copies),
            barriers(stages, WARPGROUPS),
        ],
    )
    return [*results[: len(sums)], *(jnp.swapaxes(x, 1, 2) for x in results[len(sums) :])]


def _body(
    band: Band,
    accumulate: Callable[[_Step, list[Array]], list[Array]],
    *,
    by_key: bool,
    own: int,
    moving: int,
    sums: tuple[int, ...],
    row_sums: int,
    stages: int,
) -> Callable[..., None]:
    own_axis, parts, group = int(by_key), TILE // STEP, band.group

    def body(factors_ref: Any, numbers_ref: Any, columns_ref: Any, counts_ref: Any, *refs: Any) -> None:
        left = iter(refs)
        own_refs, moving_refs = ([next(left) for _ in range(many)] for many in (own, moving))
        query_table = None if band.query_table is None else next(left)
        key_table = None if band.key_table is None else next(left)
        out_refs, row_refs = ([next(left) for _ in range(many)] for many in (len(sums), row_sums))
        own_s, moving_s, row_s = ([next(left) for _ in range(many)] for many in (own, moving, row_sums))
        numbers_s, table_s, own_ready, ready, free = left
        own_table, moving_table = (key_table, query_table) if by_key else (query_table, key_table)
        batch, head, warpgroup = (lax.axis_index(name) for name in ("batch", "head", "warpgroup"))
        tile = lax.axis_index("tile")
        if not by_key:  # the longest lists of a causal band first
            tile = np.int32(band.query_tiles - 1) - tile
        in_lists = batch if columns_ref.shape[0] > 1 else np.int32(0)
        num_full, num_all = (np.int32(parts) * counts_ref[in_lists, tile, i] for i in range(2))
        heads = np.int32(group if by_key else 1)
        full_steps, count = heads * num_full, heads * num_all

        def place(number: Array) -> tuple[Array, Array]:
            """(head, first token) of what moves: for every head the tiles seen in full, then for every head others."""
            of_head, item = (head if by_key else lax.div(head, np.int32(group))), number
            if by_key and group > 1:
                is_edge = (number >= full_steps).astype(jnp.int32)
                of_each = jnp.maximum(num_full + is_edge * (num_all - 2 * num_full), 1)
                item = number - is_edge * full_steps
                of_head = head * np.int32(group) + lax.div(item, of_each)
                item = lax.rem(item, of_each) + is_edge * num_full
            column = columns_ref[in_lists, tile, lax.div(item, np.int32(parts))]
            return of_head, column * np.int32(TILE) + lax.rem(item, np.int32(parts)) * np.int32(STEP)

        def fetch(number: Array, slot: Array, barrier: Any) -> None:
            of_head, token = place(number)
            rows = pl.ds(token, STEP)
            for ref, s in zip(moving_refs, moving_s, strict=True):
                plgpu.copy_gmem_to_smem(ref.at[batch, rows, of_head], s.at[slot], barrier)
            if by_key:
                plgpu.copy_gmem_to_smem(numbers_ref.at[batch, of_head, :, rows], numbers_s.at[slot], barrier)
            if moving_table is not None:
                one = batch if moving_table.shape[0] > 1 else np.int32(0)
                plgpu.copy_gmem_to_smem(moving_table.at[one, :, rows], table_s.at[slot], barrier)

        ring = Ring(fetch, count, ready, free, stages)
        ring.start()
        first = tile * np.int32(TILE) + warpgroup * np.int32(ROWS)
        mine = pl.ds(first, ROWS)
        for ref, s in zip(own_refs, own_s, strict=True):
            plgpu.copy_gmem_to_smem(ref.at[batch, mine, head], s.at[warpgroup], own_ready.at[warpgroup])
        own_numbers: list[Array] = []
        if own_table is not None:
            own_numbers = numbers_of(own_table.at[batch if own_table.shape[0] > 1 else np.int32(0), :, mine], 0)
        rows = []
        if not by_key:
            rows = [load(numbers_ref.at[batch, head, row, mine], ROW) for row in range(numbers_ref.shape[2])]
        plgpu.barrier_wait(own_ready.at[warpgroup])
        shape = (ROWS, STEP)

        def iterate(masked: bool) -> Callable[[Array, list[Array]], list[Array]]:
            def run(number: Array, carry: list[Array]) -> list[Array]:
                ring.wait(number)
                slot = ring.slot(number)
                # 0, as if it depended on the step: else addresses of what a block owns, and much of the mask, are
                # computed before the loop and kept in registers that there are not.
                hidden = lax.shift_right_arithmetic(number, np.int32(30))

                def number_of(row: int) -> Array:
                    if by_key:
                        return by_column(load(numbers_s.at[slot, row], COLUMN), shape)
                    return by_row(rows[row], shape)

                sees = None
                if masked:
                    others = [] if table_s is None else numbers_of(table_s.at[slot], 1)
                    sides = [Side(0, first + hidden, own_numbers), Side(1, place(number)[1], others)]
                    sees = functools.partial(band.visible, sides[own_axis], sides[1 - own_axis], shape)
                step = _Step(
                    [s.at[warpgroup + hidden] for s in own_s],
                    [s.at[slot] for s in moving_s],
                    sees,
                    number_of,
                    factors_ref[0],
                    factors_ref[1],
                )
                carry = accumulate(step, carry)
                ring.release(number)
                return carry

            return run

        carry = [full((ROWS, width), 0.0) for width in sums] + [full((ROWS,), 0.0, ROW) for _ in range(row_sums)]
        carry = lax.fori_loop(jnp.int32(0), full_steps, iterate(False), carry)
        carry = lax.fori_loop(full_steps, count, iterate(True), carry)
        for ref, total in zip(out_refs, carry):
            ref[batch, mine, head] = total
        for ref, s, total in zip(row_refs, row_s, carry[len(sums) :], strict=True):
            store(s.at[warpgroup], total)
            plgpu.copy_smem_to_gmem(s.at[warpgroup], ref.at[batch, head, mine])
        if row_sums:
            plgpu.wait_smem_to_gmem(0)

    return body
