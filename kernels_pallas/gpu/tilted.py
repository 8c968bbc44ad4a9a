"""What the kernels of covariances and of Parallax share: softmax weights p_ts that are multiplied with slopes of s.

With a direction x and a gradient g per query, numbers m, n and P per query, and p_ts = exp(scale q_t . k_s - lse_t),

    u_ts = x_t . k_s - m_t      w_ts = g_t . v_s - n_t      dl_ts = p_ts (u_ts w_ts - P_t)
    sum_s dl_ts k_s    sum_s p_ts w_ts k_s    sum_t scale dl_ts q_t + p_ts w_ts x_t    sum_t p_ts u_ts g_t

are the gradients of q, x, k and v: the first two by a kernel whose rows are queries, the others by one whose rows are
keys. A block has a tile of them of one head, 64 for each of two warpgroups, and goes through its list of tiles of the
others, first those seen in full, then those of the edges, which are masked.

Numerics: 16-bit operands, float32 sums. float16 has few exponents: rows of x and g are scaled by powers of two, so that
no product overflows, and weights in gradients are raised. Deterministic: sums go in the order of the lists.
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from kernels_pallas.gpu import blocks
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
    in_loop,
    launch,
    load,
    store,
)
from kernels_pallas.patterns import BlockLists, Pattern

Array = jax.Array

STEP = 64  # keys, or queries, that are multiplied at once: three matrices of so many columns beside two sums
LOG_2 = np.float32(np.log(2))
# Rows of the table of numbers that belong to a query.
LSE, KEY_MEAN, VALUE_MEAN, PRODUCT = range(4)
# In float16, powers of two: that bound x . k, alone or multiplied with g . v and weights; that raise these weights.
ALONE, _IN_PRODUCTS, _RAISED = 14, 1, 10
_MOST_STAGES = 4
_MOST_WIDTH = 128  # of what fits into shared memory
_SPARE_BYTES = 4096  # of shared memory, for tables and barriers


def stages_of(own: list[int], moving: list[int]) -> int:
    """As many slots as a block has that keeps matrices of these widths, for those that move; two at least."""
    left = SMEM_BUDGET - _SPARE_BYTES - 2 * TILE * sum(own)
    return max(2, min(_MOST_STAGES, left // (2 * STEP * sum(moving))))


def smem_bytes(key_width: int, value_width: int) -> int:
    """Shared memory of a block of the largest of the kernels, at padded widths."""
    tokens, most = [key_width, value_width], max(key_width, value_width)
    kernels = (  # own, moving
        ([key_width, most, most], tokens),  # q, x or g in two parts
        ([key_width] * 2 + ([] if key_width == value_width else [value_width] * 2), tokens),  # q, r, results
        ([key_width, *tokens], tokens),  # q, x, g
        (tokens, [key_width, *tokens]),
    )
    return (
        max(2 * TILE * sum(own) + 2 * stages_of(own, moving) * STEP * sum(moving) for own, moving in kernels)
        + _SPARE_BYTES
    )


def refusal(query: Any, key: Any, value: Any, *, pattern: Pattern) -> str | None:
    """Why the kernels cannot serve these arguments (arrays may be shape structs), or None if they can."""
    if max(query.shape[-1], value.shape[-1]) > _MOST_WIDTH:
        return f"serves head dims up to {_MOST_WIDTH}, got {query.shape[-1]} and {value.shape[-1]}"
    if isinstance(pattern, BlockLists):
        return "serves no lists of tiles"
    return band_refusal(query, key, value, pattern=pattern, footprint=smem_bytes)


def band_of(name: str, query: Array, key: Array, value: Array, pattern: Pattern) -> Band:
    reason = refusal(query, key, value, pattern=pattern)
    if reason is not None:
        raise ValueError(f"{name}: {reason}")
    return Band(query, key, value, pattern.tiled(TILE, TILE))


def in_base_2(lse: Array) -> Array:
    """A query that sees no key has no visible pair, whose weight would be exp(-inf + inf)."""
    return jnp.where(lse == -jnp.inf, 0, lse) / LOG_2


def inner(x: Array, mean: Array) -> Array:
    return jnp.sum(x * mean.astype(jnp.float32), axis=-1)


def cut(x: Array, like: Any, exponent: Array) -> Array:
    """x without the padding, times 2^exponent, of each row or of all."""
    x = x[:, : like.shape[1], :, : like.shape[3]]
    return jnp.ldexp(x, jnp.broadcast_to(exponent[..., None], x.shape))


def split(
    x: Array, tokens: Array, bound: int, parts: int, least: int | None = None
) -> tuple[list[Array], Array, Array]:
    """x [B, T, N, H] as so many 16-bit arrays times 2^exponent: (the arrays, exponent int32 [B, T, N], their sum).

    In float16, products of the parts with a row of `tokens` are at most 2^bound, and the parts themselves 2^14, by the
    least exponents that do it, but none below `least`.
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
        exponent = exponent if least is None else jnp.maximum(exponent, np.int32(least))
        x = jnp.ldexp(x, -exponent[..., None])
    info = jnp.finfo(dtype)
    high = lax.reduce_precision(x, info.nexp, info.nmant)  # conversions there and back may be left out by XLA
    if parts == 1:
        return [high.astype(dtype)], exponent, high
    return [high.astype(dtype), (x - high).astype(dtype)], exponent, x


class Gradients(NamedTuple):
    """float32, each of its array's shape; query's is yet to be multiplied with the scale."""

    query: Array
    key: Array
    value: Array
    direction: Array | None


def gradients(
    band: Band,
    name: str,
    query: Array,
    key: Array,
    value: Array,
    direction: Array,
    gradient: Array,
    lse: Array,
    numbers: Callable[[Array, Array], tuple[Array, Array, Array]],
    *,
    scale: Array,
    of_direction: bool,
    least: int | None = None,
) -> Gradients:
    """numbers: (x, g), rounded to 16 bits -> m, n and P. least: of x's exponents, see split."""
    [x], of_x, direction = split(direction, key, _IN_PRODUCTS, 1, least)
    [g], of_g, gradient = split(gradient, value, _IN_PRODUCTS, 1)
    raised = np.int32(_RAISED if key.dtype == jnp.float16 else 0)
    mean, other_mean, product = numbers(jnp.ldexp(direction, of_x[..., None]), gradient)
    table = {
        LSE: in_base_2(lse) - np.float32(raised),
        KEY_MEAN: jnp.ldexp(mean, -of_x),
        VALUE_MEAN: other_mean,
        PRODUCT: jnp.ldexp(product, -of_x),
    }
    widths = (band.key_width, band.value_width)
    operands: Any = {"queries": [query, x, g], "tokens": [key, value]}
    to_query, *to_direction = run(
        band,
        f"{name}_query_gradients",
        _query_step,
        by_key=False,
        scale=scale,
        numbers=table,
        sums=widths[:1] * (2 if of_direction else 1),
        **operands,
    )
    # Here queries are summed over: what scales their rows of x and g goes into their weights.
    row_exponent = of_x + of_g
    most = jnp.max(row_exponent)
    to_key, to_value = run(
        band,
        f"{name}_key_value_gradients",
        _key_step,
        by_key=True,
        scale=scale,
        numbers=table | {LSE: table[LSE] + (most - row_exponent).astype(jnp.float32)},
        sums=widths,
        **operands,
    )
    return Gradients(
        cut(to_query, query, row_exponent - raised),
        cut(to_key, key, most - raised),
        cut(to_value, value, most - raised),
        cut(to_direction[0], query, of_g - raised) if of_direction else None,
    )


class Step(NamedTuple):
    """What the kernels read of a step, of which rows are a warpgroup's own tokens, and columns those that move.

    own, moving: refs of 16-bit matrices. sees: gives bool, or is None where all is seen. number: row of the table ->
    that number of each query, over the matrix. factor, size: the scale's size in base 2, and as it is.
    """

    own: list[Any]
    moving: list[Any]
    sees: Callable[[], Array] | None
    number: Callable[[int], Array]
    factor: Array
    size: Array

    def in_base_2(self, logits: Array) -> Array:
        logits = logits * self.factor
        return logits if self.sees is None else jnp.where(self.sees(), logits, MASKED)

    def weights(self, logits: Array) -> Array:
        return jnp.exp2(self.in_base_2(logits) - self.number(LSE))


def pairs(*sums: list[tuple[Any, Any]]) -> list[Array]:
    """Products of every own row with every row that moves, summed over the pairs of a list."""
    products = [[Product(own, moving, b_transposed=True) for own, moving in pairs] for pairs in sums]
    return dots(*products, shape=(ROWS, STEP))


def _query_step(step: Step, sums: list[Array]) -> list[Array]:
    """sums: of the gradients of queries, and of directions where there are two."""
    query, direction, gradient = step.own
    key, value = step.moving
    [gains] = pairs([(gradient, value)])  # first: in another order fewer registers are left
    gains = gains - step.number(VALUE_MEAN)
    logits, slopes = pairs([(query, key)], [(direction, key)])
    weights = step.weights(logits)
    slopes = weights * (slopes - step.number(KEY_MEAN))
    of_logits = slopes * gains - weights * step.number(PRODUCT)
    factors = [of_logits, weights * gains][: len(sums)]
    return [add_dot(total, Product(x.astype(key.dtype), key)) for total, x in zip(sums, factors, strict=True)]


def _key_step(step: Step, sums: list[Array]) -> list[Array]:
    key, value = step.own
    query, direction, gradient = step.moving
    to_key, to_value = sums
    logits, slopes = pairs([(key, query)], [(key, direction)])
    weights = step.weights(logits)
    slopes = weights * (slopes - step.number(KEY_MEAN))
    to_value = add_dot(to_value, Product(slopes.astype(key.dtype), gradient))
    [gains] = pairs([(value, gradient)])
    gains = gains - step.number(VALUE_MEAN)
    of_logits = step.size * (slopes * gains - weights * step.number(PRODUCT))
    to_key = add_dot(to_key, Product(of_logits.astype(key.dtype), query))
    to_key = add_dot(to_key, Product((weights * gains).astype(key.dtype), direction))
    return [to_key, to_value]


def run(
    band: Band,
    name: str,
    accumulate: Callable[[Step, list[Array]], list[Array]],
    *,
    by_key: bool,
    scale: float | Array,
    numbers: dict[int, Array],
    queries: list[Array],
    tokens: list[Array],
    sums: tuple[int, ...],
    row_sums: Sequence[float] = (),
    finish: Callable[[list[Array], list[Array]], list[Array]] | None = None,
    row_results: int | None = None,
    out_dtype: Any = jnp.float32,
) -> list[Array]:
    """Runs `accumulate` over the steps of every tile of queries, or of keys.

    numbers: [B, T, N] by row of the table, lse in base 2. queries: of which the first is query. tokens: key and value.
    sums: widths of the sums, 0 at first. row_sums: what numbers per row that are summed up as well are at first.
    finish: (sums and row sums, rows of the table) -> as many matrices as there are sums, and row_results numbers per
    row; without it the sums as they are.

    Returns them: [B, T, N, width] of out_dtype (by key [B, S, K, width]), and [B, T, N] float32.
    """
    sign, factor = factor_of(scale)
    factors = jnp.concatenate([factor, factor * LOG_2])
    first, *more = queries
    queries = [band.queries(x) for x in (first * sign.astype(first.dtype), *more)]
    tokens = [band.keys(x) for x in tokens]
    length = band.query_tiles * TILE
    table = jnp.stack([jnp.moveaxis(numbers[row], 1, 2) for row in range(len(numbers))], axis=2)
    table = jnp.pad(table, ((0, 0), (0, 0), (0, 0), (0, length - table.shape[-1])))
    own, moving = (tokens, queries) if by_key else (queries, tokens)
    heads, tiles = (band.key_heads, band.key_tiles) if by_key else (band.heads, band.query_tiles)
    lists = band.lists(by_key=by_key)
    tables = [x for x in (band.query_table, band.key_table) if x is not None]
    moving_table = band.query_table if by_key else band.key_table
    own_widths, moving_widths = ([x.shape[-1] for x in arrays] for arrays in (own, moving))
    # 16-bit results pass through shared memory, float32 ones go to global memory by sectors of whole rows.
    is_staged = out_dtype != jnp.float32
    staged = [width for width, old in zip(sums, own_widths) if is_staged and width != old]
    most = stages_of([*own_widths, *staged], moving_widths)
    [stages] = blocks.chosen(name, (*own_widths, *moving_widths), [(n,) for n in range(most, 1, -1)])
    row_results = len(row_sums) if row_results is None else row_results
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
            finish=finish or (lambda carry, rows: carry),
            row_results=row_results,
            is_staged=is_staged,
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
            *[((band.batch, tiles * TILE, heads, width), out_dtype) for width in sums],
            *[((band.batch, heads, tiles * TILE), jnp.float32) for _ in range(row_results)],
        ],
        grid={"batch": band.batch, "head": heads, "tile": tiles},
        scratch=[
            *[half(WARPGROUPS, ROWS, x.shape[-1], dtype=band.dtype) for x in own],
            *[half(stages, STEP, x.shape[-1], dtype=band.dtype) for x in moving],
            *[plgpu.SMEM((WARPGROUPS, ROWS), jnp.float32) for _ in range(row_results)],
            *[half(WARPGROUPS, ROWS, width, dtype=band.dtype) for width in staged],
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
    accumulate: Callable[[Step, list[Array]], list[Array]],
    *,
    by_key: bool,
    own: int,
    moving: int,
    sums: tuple[int, ...],
    row_sums: Sequence[float],
    finish: Callable[[list[Array], list[Array]], list[Array]],
    row_results: int,
    is_staged: bool,
    stages: int,
) -> Callable[..., None]:
    own_axis, parts, group = int(by_key), TILE // STEP, band.group

    def body(factors_ref: Any, numbers_ref: Any, columns_ref: Any, counts_ref: Any, *refs: Any) -> None:
        left = iter(refs)
        own_refs, moving_refs = ([next(left) for _ in range(many)] for many in (own, moving))
        query_table = None if band.query_table is None else next(left)
        key_table = None if band.key_table is None else next(left)
        out_refs, row_refs = ([next(left) for _ in range(many)] for many in (len(sums), row_results))
        own_s, moving_s, row_s = ([next(left) for _ in range(many)] for many in (own, moving, row_results))
        *staged_s, numbers_s, table_s, own_ready, ready, free = left
        own_table, moving_table = (key_table, query_table) if by_key else (query_table, key_table)
        batch, head, warpgroup = (lax.axis_index(name) for name in ("batch", "head", "warpgroup"))
        tile = lax.axis_index("tile")
        if not by_key:  # the longest lists of a causal band first
            tile = np.int32(band.query_tiles - 1) - tile
        in_lists = batch if columns_ref.shape[0] > 1 else np.int32(0)
        num_full, num_all = (np.int32(parts) * counts_ref[in_lists, tile, i] for i in range(2))
        heads = np.int32(group if by_key else 1)
        full_steps, count = heads * num_full, heads * num_all

        def find(number: Array) -> tuple[Array, Array]:
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

        def fetch(place: tuple[Array, Array], slot: Array, barrier: Any) -> None:
            of_head, rows = place[0], pl.ds(place[1], STEP)
            for ref, s in zip(moving_refs, moving_s, strict=True):
                plgpu.copy_gmem_to_smem(ref.at[batch, rows, of_head], s.at[slot], barrier)
            if by_key:
                plgpu.copy_gmem_to_smem(numbers_ref.at[batch, of_head, :, rows], numbers_s.at[slot], barrier)
            if moving_table is not None:
                one = batch if moving_table.shape[0] > 1 else np.int32(0)
                plgpu.copy_gmem_to_smem(moving_table.at[one, :, rows], table_s.at[slot], barrier)

        first = tile * np.int32(TILE) + warpgroup * np.int32(ROWS)
        mine = pl.ds(first, ROWS)
        for ref, s in zip(own_refs, own_s, strict=True):
            plgpu.copy_gmem_to_smem(ref.at[batch, mine, head], s.at[warpgroup], own_ready.at[warpgroup])
        ring = Ring(fetch, count, ready, free, stages, find)
        ring.start()
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
                here = in_loop(number)

                def number_of(row: int) -> Array:
                    if by_key:
                        return by_column(load(numbers_s.at[slot, row], COLUMN), shape)
                    return by_row(rows[row], shape)

                sees = None
                if masked:
                    others = [] if table_s is None else numbers_of(table_s.at[slot], 1)
                    sides = [Side(0, first + here, own_numbers), Side(1, find(number)[1], others)]
                    sees = functools.partial(band.visible, sides[own_axis], sides[1 - own_axis], shape)
                step = Step(
                    [s.at[warpgroup + here] for s in own_s],
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

        carry = [full((ROWS, width), 0.0) for width in sums] + [full((ROWS,), x, ROW) for x in row_sums]
        carry = lax.fori_loop(jnp.int32(0), full_steps, iterate(False), carry)
        carry = lax.fori_loop(full_steps, count, iterate(True), carry)
        results = finish(carry, rows)
        for ref, s, result in zip(out_refs, own_s, results):
            if is_staged:  # in the place of what the block has no more use for, where that is as wide
                s = s if s.shape[-1] == ref.shape[-1] else staged_s.pop(0)
                store(s.at[warpgroup], result)
                plgpu.copy_smem_to_gmem(s.at[warpgroup], ref.at[batch, mine, head])
            else:
                ref[batch, mine, head] = result
        for ref, s, total in zip(row_refs, row_s, results[len(sums) :], strict=True):
            store(s.at[warpgroup], total)
            plgpu.copy_smem_to_gmem(s.at[warpgroup], ref.at[batch, head, mine])
        if row_results or is_staged:
            plgpu.wait_smem_to_gmem(0)

    return body
