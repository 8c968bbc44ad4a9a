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

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

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
    full,
    half,
    in_loop,
    launch,
    load,
    store,
)
from kernels_pallas.patterns import Pattern

Array = jax.Array

_MOST_SUMS = 256  # columns of float32 sums that a warpgroup's registers hold beside its logits
# Slots of what moves and is read to the end of a step, and of what is read only by its first products.
_SLOTS = ((3, 3), (2, 2), (2, 1))
_SPARE_BYTES = 1024  # of shared memory, for barriers
_LOG2_E = np.float32(np.log2(np.e))
# Rows of the table of numbers that belong to a query, and places of the numbers that belong to a call.
_LSE, _DELTA = range(2)
_FACTOR, _SHRINK, _GROW, _UNSEEN = range(4)


class _Plan(NamedTuple):
    """How a kernel uses shared memory.

    step: queries, or keys, that move at once. late, early: slots of each, see _SLOTS. has_table: the moving tokens'
    table is copied too; otherwise edge tiles read it from global memory.
    """

    step: int
    late: int
    early: int
    has_table: bool

    @property
    def is_split(self) -> bool:
        return self.late != self.early


def _plans(steps: Sequence[int], own: int, late: int, early: int, numbers: int, table: int) -> dict[_Plan, int]:
    """Those that fit, and their bytes of shared memory.

    own: bytes that a block keeps. late, early: widths. numbers, table: rows of 32-bit numbers that move too.
    """

    def size(plan: _Plan) -> int:
        rows = (numbers, table * plan.has_table)
        tables = sum(-(-4 * plan.step * plan.late * each // 1024) * 1024 for each in rows)
        return own + 2 * plan.step * (late * plan.late + early * plan.early) + tables + _SPARE_BYTES

    has_table = dict.fromkeys((True, not table))
    plans = [_Plan(step, *slots, each) for step in steps for slots in _SLOTS for each in has_table]
    return {plan: size(plan) for plan in plans if size(plan) <= SMEM_BUDGET} or {plans[-1]: size(plans[-1])}


def _query_plans(key_width: int, value_width: int, table: int = 0) -> dict[_Plan, int]:
    steps = (128, 64) if max(key_width, value_width) <= 64 and not table else (64,)  # as many as registers take
    return _plans(steps, 2 * TILE * (key_width + value_width) + 1024, key_width, value_width, 0, table)


def _key_plans(key_width: int, value_width: int, *, of_keys: bool, of_values: bool, table: int = 0) -> dict[_Plan, int]:
    if of_keys:
        return _plans((64,), 2 * TILE * (key_width + value_width), key_width, value_width, 2, table)
    out = 0 if key_width == value_width else value_width
    return _plans((64,), 2 * TILE * (key_width + out), value_width, key_width, 2, table)


def _parts(key_width: int, value_width: int) -> list[dict[str, bool]]:
    """What each launch over the keys adds up."""
    if key_width + value_width <= _MOST_SUMS:
        return [{"of_keys": True, "of_values": True}]
    return [{"of_keys": True, "of_values": False}, {"of_keys": False, "of_values": True}]


def smem_bytes(key_width: int, value_width: int) -> int:
    """Shared memory of the largest of the kernels' blocks, at padded widths."""
    widths = key_width, value_width
    plans = [_query_plans(*widths), *(_key_plans(*widths, **part) for part in _parts(*widths))]
    return max(next(iter(each.values())) for each in plans)


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
    sign, size = factor_of(scale)
    factor = sign.astype(jnp.float32) * size
    # Summed as it lies, and transposed afterwards: XLA otherwise does both in one pass that is four times slower.
    delta = lax.optimization_barrier(jnp.sum(out_gradient.astype(jnp.float32) * out.astype(jnp.float32), axis=-1))
    delta = delta - lse_gradient
    # A query that sees no key has no visible pair, whose weight would be exp(-inf + inf).
    finite_lse = jnp.where(lse == -jnp.inf, np.float32(0), lse)
    shrink = _shrink(value, out_gradient, lse_gradient)
    numbers = jnp.stack([finite_lse * _LOG2_E, delta * shrink], axis=1).astype(jnp.float32)
    numbers = jnp.pad(jnp.moveaxis(numbers, 3, 1), ((0, 0),) * 3 + ((0, band.query_tiles * TILE - query.shape[1]),))
    operands = [
        jnp.concatenate([factor, shrink[None], factor / (_LOG2_E * shrink), sign[None] * MASKED]),
        band.queries(query),
        band.queries(out_gradient.astype(query.dtype)),
        band.keys(key),
        band.keys(value),
        numbers,
    ]
    to_query, by_scale = _query_gradient(band, operands)
    parts = _parts(band.key_width, band.value_width)
    to_key, to_value = (x for part in parts for x in _key_gradients(band, operands, **part))
    return (
        to_query[:, : query.shape[1], :, : query.shape[-1]],
        to_key[:, : key.shape[1], :, : key.shape[-1]],
        to_value[:, : value.shape[1], :, : value.shape[-1]],
        jnp.sum(by_scale),
    )


def _shrink(value: Array, out_gradient: Array, lse_gradient: Array) -> Array:
    """The power of two, float32 [], by which dl is multiplied: it brings dl's bound to 2^14 to 2^15 in float16."""
    if value.dtype != jnp.float16:
        return jnp.float32(1)

    def longest(x: Array) -> Array:
        x = jnp.where(jnp.isfinite(x), x, 0).astype(jnp.float32)  # others' gradients stay what they are
        return jnp.sqrt(jnp.max(jnp.sum(x**2, axis=-1)))

    bound = 2 * longest(value) * longest(out_gradient) + longest(lse_gradient[..., None])
    _, exponent = jnp.frexp(jnp.clip(bound, np.float32(2.0**-60), np.float32(2.0**60)))
    return jnp.ldexp(jnp.float32(1), 15 - exponent)


def _rings(plan: _Plan, moved: Sequence[Any], count: Array, find: Any, late: Any, early: Any) -> tuple[Ring, Ring]:
    """Of what is read to the end of a step, and of what is not: one and the same where they have as many slots.

    moved: their barriers. late, early: what fetches, from where `find` says.
    """

    def both(*where: Any) -> None:
        late(*where)
        early(*where)

    if not plan.is_split:
        ring = Ring(both, count, moved[0], moved[1], plan.late, find)
        return ring, ring
    return (
        Ring(late, count, moved[0], moved[1], plan.late, find),
        Ring(early, count, moved[2], moved[3], plan.early, find),
    )


def _barriers(plan: _Plan, late: int, early: int) -> list[Any]:
    """Of _rings, for so many copies of each."""
    if not plan.is_split:
        return [barriers(plan.late, late + early), barriers(plan.late, WARPGROUPS)]
    return [
        barriers(n, arrivals)
        for n, copies in ((plan.late, late), (plan.early, early))
        for arrivals in (copies, WARPGROUPS)
    ]


def _launch(
    body: Callable[..., None],
    name: str,
    band: Band,
    operands: list[Array],
    *,
    of_keys: bool,
    counts: bool,
    out: list[Any],
    scratch: Any,
) -> list[Array]:
    """One of the kernels. of_keys: it has a block for every tile of keys, otherwise of queries. counts: it reads the
    moving tokens' numbers, which registers have no room for."""
    return launch(
        body,
        name,
        *operands,
        *band.lists(by_key=of_keys),
        *(table for table in (band.query_table, band.key_table) if table is not None),
        *([jnp.arange(TILE * max(band.query_tiles, band.key_tiles), dtype=jnp.int32)] if counts else []),
        out=out,
        grid={
            "batch": band.batch,
            "head": band.key_heads if of_keys else band.heads,
            "tile": band.key_tiles if of_keys else band.query_tiles,
        },
        scratch=scratch,
    )


def _query_gradient(band: Band, operands: list[Array]) -> list[Array]:
    """dq, and d scale summed over the keys of each query, float32 [B, N, T]."""
    widths = band.key_width, band.value_width
    has_queries, has_keys = band.query_table is not None, band.key_table is not None
    name, table_rows = "banded_flash_query_gradient", band.key_table.shape[1] if has_keys else 0
    plan = blocks.chosen(name, (*widths, table_rows), list(_query_plans(*widths, table=table_rows)))
    step, copies_table = plan.step, has_keys and plan.has_table
    counts = plan.is_split and not (band.has_coordinates or band.has_bank)
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
        seen_ref, bank_ref = (refs_left.pop(0) for _ in range(2)) if band.has_bank else (None, None)
        query_table: Any = refs_left.pop(0) if has_queries else None
        key_table: Any = refs_left.pop(0) if has_keys else None
        numbers_from: Any = refs_left.pop(0) if counts else None
        out_ref, by_scale_ref, query_s, gradient_s, key_s, value_s, by_scale_s, table_s, own, *moved = refs_left
        batch, head, warpgroup = (lax.axis_index(name) for name in ("batch", "head", "warpgroup"))
        tile = np.int32(band.query_tiles - 1) - lax.axis_index("tile")  # the longest lists of a causal band first
        key_head = lax.div(head, np.int32(band.group))
        in_lists = band.list_of(columns_ref.shape[0], batch, key_head)
        num_full, count = (parts * counts_ref[in_lists, tile, i] for i in (0, 2))
        factor, shrink, shape = scalars[_FACTOR], scalars[_SHRINK], (ROWS, step)
        first = tile * np.int32(TILE) + warpgroup * np.int32(ROWS)
        mine = pl.ds(first, ROWS)

        def first_key(number: Array) -> Array:
            column = columns_ref[in_lists, tile, lax.div(number, parts)]
            return column * np.int32(TILE) + lax.rem(number, parts) * np.int32(step)

        def fetch_late(first: Array, slot: Array, barrier: Any) -> None:
            rows = pl.ds(first, step)
            plgpu.copy_gmem_to_smem(key_ref.at[batch, rows, key_head], key_s.at[slot], barrier)
            if copies_table:
                plgpu.copy_gmem_to_smem(table_at(first), table_s.at[slot], barrier)

        def fetch_early(first: Array, slot: Array, barrier: Any) -> None:
            rows = pl.ds(first, step)
            plgpu.copy_gmem_to_smem(value_ref.at[batch, rows, key_head], value_s.at[slot], barrier)

        def table_at(first: Array) -> Any:
            one = batch if key_table.shape[0] > 1 else np.int32(0)
            return key_table.at[one, :, pl.ds(first, step)]

        late, early = _rings(plan, moved, count, first_key, fetch_late, fetch_early)
        plgpu.copy_gmem_to_smem(query_ref.at[batch, mine, head], query_s.at[warpgroup], own.at[warpgroup])
        plgpu.copy_gmem_to_smem(gradient_ref.at[batch, mine, head], gradient_s.at[warpgroup], own.at[warpgroup])
        late.start()
        if plan.is_split:
            early.start()
        lse, delta = (load(numbers_ref.at[batch, head, row, mine], ROW) for row in (_LSE, _DELTA))
        bounds = []
        if query_table is not None:
            bounds = numbers_of(query_table.at[batch if query_table.shape[0] > 1 else np.int32(0), :, mine], 0)
        plgpu.barrier_wait(own.at[warpgroup])

        def step_of(masked: bool) -> Callable[[Array, Any], Any]:
            def run(number: Array, total: Any) -> Any:
                late_slot, early_slot = late.slot(number), early.slot(number)
                here = in_loop(number)
                me = warpgroup + here

                def weigh(logits: Array) -> Array:
                    exponents = logits * factor - by_row(lse, shape)
                    if masked:
                        table = (
                            table_s.at[late_slot] if copies_table else table_at(first_key(number)) if has_keys else None
                        )
                        counted = load(numbers_from.at[pl.ds(first_key(number), step)], COLUMN) if counts else None
                        of_keys = () if table is None else numbers_in_turn(table, 1)
                        keys = Side(1, first_key(number), of_keys, counted)
                        words = words_of(seen_ref, bank_ref, (in_lists, tile), number, step) if band.has_bank else ()
                        sees = band.visible(Side(0, first + here, bounds), keys, shape, words)
                        exponents = jnp.where(sees, exponents, MASKED)
                    return jnp.exp2(exponents)

                late.wait(number)
                logits = dot(Product(query_s.at[me], key_s.at[late_slot], b_transposed=True), shape=shape)
                if plan.is_split:
                    early.wait(number)
                with_values = Product(gradient_s.at[me], value_s.at[early_slot], b_transposed=True)
                products, weights = dot_beside(with_values, shape=shape, work=lambda: weigh(logits))
                if plan.is_split:
                    early.release(number)
                slopes = weights * (products * shrink - by_row(delta, shape))
                total = add_dot(total, Product(slopes.astype(band.dtype), key_s.at[late_slot]))
                late.release(number)
                return total

            return run

        total = lax.fori_loop(jnp.int32(0), num_full, step_of(False), full((ROWS, band.key_width), 0.0))
        total = lax.fori_loop(num_full, count, step_of(True), total)
        by_scale = (total * load(query_s.at[warpgroup], MATRIX).astype(jnp.float32)).sum(axis=1)
        store(by_scale_s.at[warpgroup], by_scale / shrink)
        store(query_s.at[warpgroup], total * scalars[_GROW])
        plgpu.copy_smem_to_gmem(by_scale_s.at[warpgroup], by_scale_ref.at[batch, head, mine])
        plgpu.copy_smem_to_gmem(query_s.at[warpgroup], out_ref.at[batch, mine, head])
        plgpu.wait_smem_to_gmem(0)

    length = band.query_tiles * TILE
    out: list[Any] = [
        ((band.batch, length, band.heads, band.key_width), band.dtype),
        ((band.batch, band.heads, length), jnp.float32),
    ]
    scratch = [
        *(half(WARPGROUPS, ROWS, width, dtype=band.dtype) for width in widths),
        half(plan.late, step, band.key_width, dtype=band.dtype),
        half(plan.early, step, band.value_width, dtype=band.dtype),
        plgpu.SMEM((WARPGROUPS, ROWS), jnp.float32),
        plgpu.SMEM((plan.late, band.key_table.shape[1], step), jnp.int32) if copies_table else None,
        barriers(WARPGROUPS, 2),
        *_barriers(plan, 1 + copies_table, 1),
    ]
    return _launch(body, name, band, operands, of_keys=False, counts=counts, out=out, scratch=scratch)


def _key_gradients(band: Band, operands: list[Array], *, of_keys: bool, of_values: bool) -> list[Array]:
    """dk, dv, or one of them."""
    has_queries, has_keys = band.query_table is not None, band.key_table is not None
    table_rows = band.query_table.shape[1] if has_queries else 0
    plans = _key_plans(band.key_width, band.value_width, of_keys=of_keys, of_values=of_values, table=table_rows)
    name = "_".join(["banded_flash", *["key"] * of_keys, *["value"] * of_values, "gradient"])
    plan = blocks.chosen(name, (band.key_width, band.value_width, table_rows), list(plans))
    step, copies_table = plan.step, has_queries and plan.has_table
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
        seen_ref, bank_ref = (refs_left.pop(0) for _ in range(2)) if band.has_bank else (None, None)
        query_table: Any = refs_left.pop(0) if has_queries else None
        key_table: Any = refs_left.pop(0) if has_keys else None
        out_refs = [refs_left.pop(0) for _ in widths]
        key_s, value_s, query_s, gradient_s, numbers_s, table_s, own, *moved = refs_left
        value_s = key_s if value_s is None else value_s  # where dv alone is added up, for it
        batch, key_head, tile, warpgroup = (lax.axis_index(name) for name in ("batch", "head", "tile", "warpgroup"))
        in_lists = band.list_of(columns_ref.shape[0], batch, key_head)
        # A listed tile's parts follow each other, head by head: full tiles of all heads come before the others.
        num_full, count = (parts * group * counts_ref[in_lists, tile, i] for i in (0, 2))
        factor, shrink, shape = scalars[_FACTOR], scalars[_SHRINK], (ROWS, step)
        first = tile * np.int32(TILE) + warpgroup * np.int32(ROWS)
        mine = pl.ds(first, ROWS)

        def first_query(number: Array) -> Array:
            column = columns_ref[in_lists, tile, lax.div(number, parts * group)]
            return column * np.int32(TILE) + lax.rem(number, parts) * np.int32(step)

        def head_of(number: Array) -> Array:
            return key_head * group + lax.rem(lax.div(number, parts), group)

        def find(number: Array) -> tuple[Array, Array]:
            return head_of(number), first_query(number)

        def fetch_queries(place: Any, slot: Array, barrier: Any) -> None:
            of_head, rows = place[0], pl.ds(place[1], step)
            plgpu.copy_gmem_to_smem(query_ref.at[batch, rows, of_head], query_s.at[slot], barrier)

        def fetch_gradients(place: Any, slot: Array, barrier: Any) -> None:
            of_head, rows = place[0], pl.ds(place[1], step)
            plgpu.copy_gmem_to_smem(gradient_ref.at[batch, rows, of_head], gradient_s.at[slot], barrier)

        def fetch_late(place: Any, slot: Array, barrier: Any) -> None:
            (fetch_queries if of_keys else fetch_gradients)(place, slot, barrier)
            of_head, first = place
            plgpu.copy_gmem_to_smem(numbers_ref.at[batch, of_head, :, pl.ds(first, step)], numbers_s.at[slot], barrier)
            if copies_table:
                plgpu.copy_gmem_to_smem(table_at(first), table_s.at[slot], barrier)

        def table_at(first: Array) -> Any:
            one = batch if query_table.shape[0] > 1 else np.int32(0)
            return query_table.at[one, :, pl.ds(first, step)]

        late, early = _rings(plan, moved, count, find, fetch_late, fetch_gradients if of_keys else fetch_queries)
        plgpu.copy_gmem_to_smem(key_ref.at[batch, mine, key_head], key_s.at[warpgroup], own.at[warpgroup])
        if of_keys:
            plgpu.copy_gmem_to_smem(value_ref.at[batch, mine, key_head], value_s.at[warpgroup], own.at[warpgroup])
        late.start()
        if plan.is_split:
            early.start()
        coordinates = []
        if key_table is not None:
            coordinates = numbers_of(key_table.at[batch if key_table.shape[0] > 1 else np.int32(0), :, mine], 0)
        plgpu.barrier_wait(own.at[warpgroup])

        def step_of(masked: bool) -> Callable[[Array, Any], Any]:
            def run(number: Array, totals: Any) -> Any:
                left = list(totals)
                here = in_loop(number)
                late_slot, early_slot = late.slot(number) + here, early.slot(number) + here  # there may be one slot
                me = warpgroup + here
                of_query, of_gradient = (late_slot, early_slot) if of_keys else (early_slot, late_slot)
                query_here, gradient_here = query_s.at[of_query], gradient_s.at[of_gradient]

                def spread(row: int) -> Array:
                    return by_column(load(numbers_s.at[late_slot, row], COLUMN), shape)

                late.wait(number)
                if plan.is_split:
                    early.wait(number)
                logits = dot(Product(key_s.at[me], query_here, b_transposed=True), shape=shape)
                if masked:
                    table = (
                        table_s.at[late_slot]
                        if copies_table
                        else table_at(first_query(number))
                        if has_queries
                        else None
                    )
                    queries = Side(1, first_query(number), () if table is None else numbers_in_turn(table, 1))
                    words: Sequence[Array] = ()
                    if band.has_bank:
                        of_tile = lax.div(number, parts * group) * parts + lax.rem(number, parts)
                        words = words_of(seen_ref, bank_ref, (in_lists, tile), of_tile, step)
                    sees = band.visible(queries, Side(0, first + here, coordinates), shape, words)
                    logits = jnp.where(sees, logits, scalars[_UNSEEN])  # before lse is read: fewer numbers at once
                weights = jnp.exp2(logits * factor - spread(_LSE))
                # One product after the other: what is live at once fits into the registers.
                if of_values:
                    left[-1] = add_dot(left[-1], Product(weights.astype(band.dtype), gradient_here))
                if of_keys:
                    products = dot(Product(value_s.at[me], gradient_here, b_transposed=True), shape=shape)
                    slopes = weights * (products * shrink - spread(_DELTA))
                if plan.is_split:
                    early.release(number)
                if of_keys:
                    left[0] = add_dot(left[0], Product(slopes.astype(band.dtype), query_here))
                late.release(number)
                return left

            return run

        totals = [full((ROWS, width), 0.0) for width in widths]
        totals = lax.fori_loop(jnp.int32(0), num_full, step_of(False), totals)
        totals = lax.fori_loop(num_full, count, step_of(True), totals)
        results = [(key_s, totals[0] * scalars[_GROW])] * of_keys + [(value_s, totals[-1])] * of_values
        for (ref, total), out_ref in zip(results, out_refs, strict=True):
            store(ref.at[warpgroup], total)
            plgpu.copy_smem_to_gmem(ref.at[warpgroup], out_ref.at[batch, mine, key_head])
        plgpu.wait_smem_to_gmem(0)

    length = band.key_tiles * TILE
    out = [((band.batch, length, band.key_heads, width), band.dtype) for width in widths]
    late_width, early_width = (band.key_width, band.value_width) if of_keys else (band.value_width, band.key_width)
    late = half(plan.late, step, late_width, dtype=band.dtype)
    early = half(plan.early, step, early_width, dtype=band.dtype)
    has_values = of_keys or band.key_width != band.value_width
    scratch = [
        half(WARPGROUPS, ROWS, band.key_width, dtype=band.dtype),
        half(WARPGROUPS, ROWS, band.value_width, dtype=band.dtype) if has_values else None,
        *((late, early) if of_keys else (early, late)),
        plgpu.SMEM((plan.late, 2, step), jnp.float32),
        plgpu.SMEM((plan.late, table_rows, step), jnp.int32) if copies_table else None,
        barriers(WARPGROUPS, 1 + of_keys),
        *_barriers(plan, 2 + copies_table, 1),
    ]
    return _launch(body, name, band, operands, of_keys=True, counts=False, out=out, scratch=scratch)
