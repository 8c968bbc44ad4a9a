"""Linear attention over all tokens for TPU: a sum over tokens of outer products, and tokens times such a state.

    token_sums:   S = sum_t x_t y_t^T,  c = sum_t y_t          times_state:   y_t = S^T x_t + c

Both are linear in each argument, and the gradients of each are calls of the two. The grid is (batch, blocks of heads,
tiles of tokens); a block's sums stay in VMEM from the first tile to the last. Arrays of tokens are read and written as
they are, [B, T, N, W], where Mosaic loads a head of a block by strides: as rows of 32 bits, two heads of 16 bits a row.
Others are copied heads first. Nothing is padded: what a last tile has beyond the tokens is masked.
"""

from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from kernels_pallas.tpu import common
from kernels_pallas.tpu.common import LANES, SUBLANES, VMEM_BUDGET, round_up, zero

Array = jax.Array

_TILES = {2: (512, 256, 128), 4: (256, 128)}  # tokens, by the bytes of a number


class Plan(NamedTuple):
    """Tokens of a tile and heads of a block, and whether arrays are read as they lie."""

    tile: int
    heads: int
    in_place: bool


def vmem_bytes(plan: Plan, features: int, value_dim: int, dtype: Any) -> int:
    """VMEM that either kernel takes at most, of tokens of these widths."""
    size = jnp.dtype(dtype).itemsize
    wide = [round_up(width, LANES) for width in (features, value_dim)]
    tokens = size * round_up(plan.tile, 2 * SUBLANES) * sum(wide)
    state = 4 * (round_up(features, SUBLANES) + SUBLANES) * wide[1]
    # Two buffers of each block, and rows; the temporaries of two heads, tokens in float32 and products.
    blocks = plan.heads * ((3 if plan.in_place else 2) * tokens + 2 * state)
    return blocks + 2 * (4 * tokens // size + tokens + state)


def plan_of(x: Any, value_dim: int) -> tuple[Plan, int]:
    """The first plan that VMEM holds, else the smallest one; and the bytes that it takes."""
    _, length, heads, features = x.shape
    tiles = [min(tile, length) for tile in _TILES[jnp.dtype(x.dtype).itemsize]]
    can_lie = features % LANES == value_dim % LANES == 0
    plans = [Plan(tile, SUBLANES, True) for tile in tiles if can_lie and heads % SUBLANES == 0]
    counts = [n for n in (8, 4, 2, 1) if heads % n == 0]
    plans += [Plan(tile, count, False) for count in counts for tile in tiles]
    sizes = [vmem_bytes(plan, features, value_dim, x.dtype) for plan in plans]
    number = next((n for n, size in enumerate(sizes) if size <= VMEM_BUDGET), len(plans) - 1)
    return plans[number], sizes[number]


def refusal(x: Any, y: Any) -> str | None:
    """Why the kernels cannot serve tokens [B, T, N, F] and [B, T, N, V] (may be shape structs), or None if they can."""
    dtype = jnp.dtype(x.dtype)
    if dtype not in (jnp.bfloat16, jnp.float32) or dtype != y.dtype:
        return f"needs arrays of tokens all bfloat16 or all float32, got {dtype} and {y.dtype}"
    if 0 in x.shape or 0 in y.shape:
        return f"needs arrays that are not empty, got {x.shape} and {y.shape}"
    widths = x.shape[-1], y.shape[-1]
    for features, value_dim in (widths, widths[::-1]):  # gradients take states of both orders
        _, needed = plan_of(jax.ShapeDtypeStruct((*x.shape[:-1], features), dtype), value_dim)
        if needed > VMEM_BUDGET:
            return (
                f"{widths[0]} features and {widths[1]} value channels take {needed / 2**20:.1f} MiB of VMEM, "
                f"more than {VMEM_BUDGET / 2**20:.0f} MiB"
            )
    return None


def token_sums(x: Array, y: Array, *, sums: bool = False) -> tuple[Array, Array | None]:
    """The sum over tokens of outer products of x and y.

    Args:
      x: [B, T, N, F], bfloat16 or float32. y: [B, T, N, V] of the same dtype.
      sums: also give the sum of y.

    Returns:
      [B, N, F, V] and, with sums, [B, N, V]; float32.

    Raises:
      ValueError: with refusal()'s reason.

    Complexity: O(B N T F V) time; reads x and y once.
    """
    if (reason := refusal(x, y)) is not None:
        raise ValueError(f"token_sums: {reason}")
    batch, length, heads, features = x.shape
    value_dim, plan = y.shape[-1], plan_of(x, y.shape[-1])[0]

    def kernel(*refs: Any) -> None:
        (x_ref, y_ref, sum_ref, *y_sum_ref), (x_rows, y_rows) = _cut(refs, plan)

        @pl.when(pl.program_id(2) == 0)
        def _() -> None:
            for ref in (sum_ref, *y_sum_ref):
                ref[...] = jnp.zeros(ref.shape, ref.dtype)

        def add(count: int) -> None:
            for head, x, y in zip(range(plan.heads), _heads_of(x_ref, x_rows, plan), _heads_of(y_ref, y_rows, plan)):
                x, y = (_masked(each, count) for each in (x, y))
                sum_ref[head] += common.dot(x, y, (0, 0))
                for ref in y_sum_ref:
                    ref[head] += jnp.sum(y.astype(jnp.float32), axis=0, keepdims=True)

        _by_tile(add, length, plan.tile)

    over = common.varying(x, y)
    shapes = [(features, value_dim), *([(1, value_dim)] if sums else [])]
    found = pl.pallas_call(
        kernel,
        grid=(batch, heads // plan.heads, pl.cdiv(length, plan.tile)),
        in_specs=[_tokens(plan, features), _tokens(plan, value_dim)],
        out_specs=[_state(plan, *shape) for shape in shapes],
        out_shape=[
            jax.ShapeDtypeStruct((batch, heads, *shape), jnp.float32, manual_axis_type=over) for shape in shapes
        ],
        scratch_shapes=[*_rows(plan, features, x.dtype), *_rows(plan, value_dim, x.dtype)],
        **_options("token_sums" + "_and_sum" * sums, x, value_dim, 4 * batch * heads * features * value_dim),
    )(_laid_out(x, plan), _laid_out(y, plan))
    return found[0], found[1][:, :, 0] if sums else None


def times_state(x: Array, state: Array, offset: Array | None = None) -> Array:
    """Each token times its head's state.

    Args:
      x: [B, T, N, F], bfloat16 or float32.
      state: [B, N, F, V], which is rounded to x's dtype. offset: [B, N, V], added in float32, or None for 0.

    Returns:
      [B, T, N, V] in x's dtype.

    Raises:
      ValueError: with refusal()'s reason.

    Complexity: O(B N T F V) time; reads x and writes the result once.
    """
    batch, length, heads, features = x.shape
    value_dim = state.shape[-1]
    result = jax.ShapeDtypeStruct(
        (batch, length, heads, value_dim),
        x.dtype,
        manual_axis_type=common.varying(x, state, *(() if offset is None else (offset,))),
    )
    if (reason := refusal(x, result)) is not None:
        raise ValueError(f"times_state: {reason}")
    plan, _ = plan_of(x, value_dim)

    def kernel(*refs: Any) -> None:
        (x_ref, state_ref, *offset_ref, out_ref), (x_rows, out_rows) = _cut(refs, plan)

        def results() -> Iterator[Array]:
            for head, x in enumerate(_heads_of(x_ref, x_rows, plan)):
                out = common.dot(x, state_ref[head].astype(x.dtype), (1, 0))
                yield out + offset_ref[0][head] if offset_ref else out

        _put_heads(out_ref, out_rows, plan, results())

    arrays = [x.astype(jnp.float32) for x in (state, *(() if offset is None else (offset[:, :, None],)))]
    shape = result.shape if plan.in_place else (batch, heads, length, value_dim)
    out = pl.pallas_call(
        kernel,
        grid=(batch, heads // plan.heads, pl.cdiv(length, plan.tile)),
        in_specs=[_tokens(plan, features), *(_state(plan, *each.shape[2:]) for each in arrays)],
        out_specs=_tokens(plan, value_dim),
        out_shape=result.update(shape=shape),
        scratch_shapes=[*_rows(plan, features, x.dtype), *_rows(plan, value_dim, x.dtype)],
        **_options("times_state" + "_plus_offset" * (len(arrays) > 1), x, value_dim, 4 * sum(x.size for x in arrays)),
    )(_laid_out(x, plan), *arrays)
    return out if plan.in_place else jnp.swapaxes(out, 1, 2)


# --- What the two share -----------------------------------------------------------------------------------------------


def _options(name: str, x: Array, value_dim: int, of_state: int) -> dict[str, Any]:
    """of_state: bytes."""
    batch, length, heads, features = x.shape
    return {
        "compiler_params": pltpu.CompilerParams(
            dimension_semantics=("parallel", "parallel", "arbitrary"), vmem_limit_bytes=VMEM_BUDGET
        ),
        "cost_estimate": pl.CostEstimate(
            flops=2 * x.size * value_dim,
            transcendentals=0,
            bytes_accessed=batch * length * heads * (features + value_dim) * x.dtype.itemsize + of_state,
        ),
        "name": name,
    }


def _laid_out(x: Array, plan: Plan) -> Array:
    return x if plan.in_place else jnp.swapaxes(x, 1, 2)


def _tokens(plan: Plan, width: int) -> Any:
    if plan.in_place:
        return pl.BlockSpec((None, plan.tile, plan.heads, width), lambda b, n, t: (b, t, n, zero()))
    return pl.BlockSpec((None, plan.heads, plan.tile, width), lambda b, n, t: (b, n, t, zero()))


def _state(plan: Plan, *shape: int) -> Any:
    return pl.BlockSpec((None, plan.heads, *shape), lambda b, n, t: (b, n, zero(), zero()))


def _by_tile(body: Callable[[int], None], length: int, tile: int) -> None:
    """body with the number of tokens that the tile has, of which all but the last one are full."""
    tiles, rest = pl.cdiv(length, tile), length % tile
    if not rest:
        body(tile)
        return
    is_last = pl.program_id(2) == tiles - 1
    pl.when(jnp.logical_not(is_last))(lambda: body(tile))
    pl.when(is_last)(lambda: body(rest))


def _masked(x: Array, count: int) -> Array:
    """x [tile, W] with zeros after `count` rows."""
    if count == x.shape[0]:
        return x
    return jnp.where(lax.broadcasted_iota(jnp.int32, x.shape, 0) < count, x, jnp.zeros_like(x))


_LATER_HEAD = np.uint32(0xFFFF0000)  # of a row of two; bfloat16 is the upper half of a float32


def _rows(plan: Plan, width: int, dtype: Any) -> list[Any]:
    """Scratch for a block that lies as [tile, heads, width]: the same as rows of 32 bits, LANES by LANES."""
    if not plan.in_place:
        return []
    is_wide = dtype == jnp.float32
    shape = (width // LANES, plan.tile * plan.heads // (1 if is_wide else 2), LANES)
    return [pltpu.VMEM(shape, jnp.float32 if is_wide else jnp.uint32)]


def _cut(refs: Sequence[Any], plan: Plan) -> tuple[Sequence[Any], Sequence[Any]]:
    """A kernel's blocks, and the rows of its two blocks of tokens, None where they are not read as they lie."""
    return (refs[:-2], refs[-2:]) if plan.in_place else (refs, (None, None))


def _parts_of(rows: Any) -> Iterator[tuple[int, Any]]:
    """The parts of rows, and the lanes of a block that they hold."""
    return ((part, pl.ds(part * LANES, LANES)) for part in range(rows.shape[0]))


def _heads_of(ref: Any, rows: Any, plan: Plan) -> Iterator[Array]:
    """[tile, W] of each head of a block."""
    if rows is None:
        yield from (ref[head] for head in range(plan.heads))
        return
    for part, lanes in _parts_of(rows):
        block = ref[:, :, lanes]
        block = block if ref.dtype == jnp.float32 else pltpu.bitcast(block, jnp.uint32)
        rows[part] = block.reshape(rows.shape[1:])
    stride = rows.shape[1] // plan.tile
    for number in range(stride):
        tokens = pl.ds(number, plan.tile, stride=stride)
        row = jnp.concatenate([rows[part, tokens] for part, _ in _parts_of(rows)], axis=1)
        if ref.dtype == jnp.float32:
            yield row
            continue
        for bits in (row << np.uint32(16), row & _LATER_HEAD):
            yield lax.bitcast_convert_type(bits, jnp.float32).astype(ref.dtype)


def _put_heads(ref: Any, rows: Any, plan: Plan, heads: Iterator[Array]) -> None:
    """What _heads_of reads, from float32."""
    if rows is None:
        for head, x in enumerate(heads):
            ref[head] = x.astype(ref.dtype)
        return
    stride = rows.shape[1] // plan.tile
    for number in range(stride):
        if ref.dtype == jnp.float32:
            row = next(heads)
        else:
            first, later = (_bits(next(heads), ref.dtype) for _ in range(2))
            row = (first >> np.uint32(16)) | later
        for part, _ in _parts_of(rows):
            rows[part, pl.ds(number, plan.tile, stride=stride)] = row[:, part * LANES : (part + 1) * LANES]
    for part, lanes in _parts_of(rows):
        block = rows[part].reshape(plan.tile, -1, LANES)
        ref[:, :, lanes] = block if ref.dtype == jnp.float32 else pltpu.bitcast(block, ref.dtype)


def _bits(x: Array, dtype: Any) -> Array:
    return lax.bitcast_convert_type(x.astype(dtype).astype(jnp.float32), jnp.uint32)
