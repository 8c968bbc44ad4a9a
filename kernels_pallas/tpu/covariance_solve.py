"""Regressions under the weights of banded flash attention, for TPU: the iterations of local linear attention.

With p_ts the weights of attention and kbar_t = sum_s p_ts k_s, conjugate gradients solve, for every query by itself,

    Cov_p(k, k) x_t + ridge_t x_t = b_t           Cov_p(k, k) d = sum_s p_ts (d . k_s - d . kbar_t) k_s

A step of the grid has a tile of queries, of one head or of two of a key head. The keys that any of them sees are copied
into VMEM, and so are their weights when they are known; an iteration is then two products with each tile of keys. It
ends when all queries of the step are solved.

Numerics: vectors and sums are float32. Beside bfloat16 keys a float32 operand is split in two bfloat16 numbers, as in
banded_covariance.py.
"""

import functools
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from kernels_pallas.patterns import Intervals, Pattern
from kernels_pallas.tpu import common
from kernels_pallas.tpu.band import MASKED, finite, over_lanes, spread
from kernels_pallas.tpu.common import LANES, SUBLANES, VMEM_BUDGET, heads_first, padded_width, round_up, zero

Array = jax.Array

_BLOCK_K = 256
_BLOCKS_Q = 256, 128  # the first for which VMEM holds the weights
_MOST_HEADS = 2  # of a key head in a step
# Vectors of so many queries go through an iteration's steps at once, in registers.
_ROWS = 64
# Rows of the tables of a query's numbers, float32 and int32, and of results.
_LSE, _RIDGE = range(2)
_START, _END = range(2)
_STEPS, _RESIDUAL = range(2)


class Sizes(NamedTuple):
    """Queries in a tile, how many tiles of keys a tile of queries sees at most, and query heads of a step."""

    block_q: int
    tiles: int
    heads: int = 1


def vmem_bytes(sizes: Sizes, head_dim: int, dtype: Any) -> int:
    """VMEM that the kernel takes at most: two buffers for what the grid brings, keys, weights, vectors, temporaries."""
    size, width, block_q = jnp.dtype(dtype).itemsize, round_up(head_dim, LANES), sizes.heads * sizes.block_q
    blocks = block_q * width * (size + 4 + 4) + 4 * 3 * SUBLANES * block_q
    keys = sizes.tiles * _BLOCK_K * width * size
    weights = 4 * sizes.tiles * block_q * _BLOCK_K
    vectors = 4 * block_q * (5 * width + 6 * LANES)
    temporaries = 4 * 8 * block_q * _BLOCK_K + 3 * 4 * _BLOCK_K * width
    return 2 * blocks + keys + weights + vectors + temporaries


def sizes_of(query: Any, key: Any, pattern: Intervals) -> Sizes:
    """The largest tiles that VMEM holds, of the most heads; the smallest if it holds none."""
    group = query.shape[2] // key.shape[2]
    for block_q in _BLOCKS_Q:
        block_q = min(block_q, round_up(query.shape[1], LANES))
        first, last = tiles_seen(pattern, block_q)
        for heads in range(_MOST_HEADS, 0, -1):
            sizes = Sizes(block_q, int((last - first).max()), heads)
            if group % heads == 0 and vmem_bytes(sizes, key.shape[-1], query.dtype) <= VMEM_BUDGET:
                return sizes
    return sizes


def tiles_seen(pattern: Intervals, block_q: int) -> tuple[np.ndarray, np.ndarray]:
    """The first tile of keys that a tile of queries sees, and the first one after those; one at least."""
    starts, ends = _bounds(pattern, block_q)
    first = starts.reshape(-1, block_q).min(1) // _BLOCK_K
    return first, np.maximum(-(-ends.reshape(-1, block_q).max(1) // _BLOCK_K), first + 1)


def _bounds(pattern: Intervals, block_q: int) -> tuple[np.ndarray, np.ndarray]:
    """starts, ends int32 [T'], whole tiles; queries in the padding copy the last one."""
    number = np.minimum(np.arange(round_up(pattern.queries, block_q)), pattern.queries - 1)
    starts, ends = (np.clip(x, 0, pattern.keys).astype(np.int32) for x in pattern.bounds(number))
    return np.minimum(starts, ends), ends


def refusal(query: Any, key: Any, *, pattern: Pattern) -> str | None:
    """Why the kernel cannot serve these arguments (arrays may be shape structs), or None if it can."""
    dtype = jnp.dtype(query.dtype)
    if dtype not in (jnp.bfloat16, jnp.float32) or dtype != key.dtype:
        return f"needs query and key both bfloat16 or both float32, got {dtype} and {key.dtype}"
    if not isinstance(pattern, Intervals) or pattern.sinks:
        return "serves an interval of keys per query"
    if 0 in query.shape or 0 in key.shape:
        return f"needs arrays that are not empty, got query {query.shape} and key {key.shape}"
    sizes = sizes_of(query, key, pattern)
    needed = vmem_bytes(sizes, key.shape[-1], dtype)
    if needed > VMEM_BUDGET:
        return (
            f"{sizes.block_q} queries that see {sizes.tiles * _BLOCK_K} keys of {key.shape[-1]} channels take "
            f"{needed / 2**20:.1f} MiB of VMEM, more than {VMEM_BUDGET / 2**20:.0f} MiB"
        )
    return None


def covariance_solve(
    query: Array,
    key: Array,
    offset: Array,
    ridge: Array,
    lse: Array,
    *,
    pattern: Intervals,
    scale: float | Array,
    tolerance: float,
    max_iterations: int,
) -> tuple[Array, Array, Array]:
    """x of Cov_p(k, k) x + ridge x = offset.

    Args:
      query [B, T, N, H], key [B, S, K, H], bfloat16 or float32; pattern, scale: as in banded_flash_attention.
      offset: b [B, T, N, H], float32. ridge: [B, T, N], above 0.
      lse: [B, T, N], banded_flash_attention's.
      tolerance: a query is solved once |A x - b| <= tolerance |b|; or after max_iterations.

    Returns:
      (x [B, T, N, H] float32, iterations and |A x - b| / |b|, as they see it, float32 [B, T, N]).

    Raises:
      ValueError: with refusal()'s reason.

    Complexity: O(T S H) time for the weights and for each iteration, S keys seen.
    """
    reason = refusal(query, key, pattern=pattern)
    if reason is not None:
        raise ValueError(f"covariance_solve: {reason}")
    batch, length, heads, head_dim = query.shape
    group, width = heads // key.shape[2], padded_width(head_dim)
    sizes = sizes_of(query, key, pattern)
    block_q, tiles, of_step = sizes
    padded, all_tiles = round_up(length, block_q), max(-(-key.shape[1] // _BLOCK_K), tiles)
    first, last = tiles_seen(pattern, block_q)
    # What is copied begins where it does not reach past the last key, and the tiles before those seen have weights 0.
    begin = np.minimum(first, all_tiles - tiles).astype(np.int32)
    bounds = np.zeros((1, SUBLANES, padded), np.int32)
    bounds[0, [_START, _END]] = _bounds(pattern, block_q)
    numbers = jnp.stack([finite(lse), ridge.astype(jnp.float32)], axis=1)  # [B, 2, T, N]
    numbers = jnp.pad(jnp.moveaxis(numbers, 3, 1), ((0, 0), (0, 0), (0, 0), (0, padded - length)), mode="edge")
    keys = heads_first(key, all_tiles * _BLOCK_K, width).reshape(batch, key.shape[2], all_tiles, _BLOCK_K, width)
    operands = (
        jnp.asarray(scale, jnp.float32).reshape(1, 1),
        jnp.asarray(bounds),
        numbers,
        heads_first(query, padded, width),
        heads_first(offset.astype(jnp.float32), padded, width),
        keys,
    )
    over = common.varying(*operands)

    def of_tokens(b: Any, n: Any, t: Any, *_: Any) -> tuple[Any, ...]:
        return b, n, t, zero()

    def of_rows(b: Any, n: Any, t: Any, *_: Any) -> tuple[Any, ...]:
        return b, n, zero(), t

    tokens = pl.BlockSpec((None, of_step, block_q, width), of_tokens)
    of_queries = pl.BlockSpec((None, of_step, 2, block_q), of_rows)
    queries = of_step * block_q
    solution, rows = pl.pallas_call(
        functools.partial(_kernel, group=group // of_step, tolerance=tolerance, max_iterations=max_iterations),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=2,
            grid=(batch, heads // of_step, padded // block_q),
            in_specs=[
                pl.BlockSpec((1, 1), lambda *_: (zero(), zero()), memory_space=pltpu.SMEM),
                pl.BlockSpec((None, SUBLANES, block_q), lambda b, n, t, *_: (zero(), zero(), t)),
                of_queries,
                tokens,
                tokens,
                pl.BlockSpec(memory_space=pl.ANY),
            ],
            out_specs=[tokens, of_queries],
            scratch_shapes=[
                pltpu.VMEM((tiles, _BLOCK_K, width), key.dtype),
                pltpu.VMEM((tiles, queries, _BLOCK_K), jnp.float32),
                *state_of(queries, width, key.dtype),
                pltpu.SemaphoreType.DMA,
            ],
        ),
        out_shape=[
            jax.ShapeDtypeStruct((batch, heads, padded, width), jnp.float32, manual_axis_type=over),
            jax.ShapeDtypeStruct((batch, heads, 2, padded), jnp.float32, manual_axis_type=over),
        ],
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "parallel", "parallel"), vmem_limit_bytes=VMEM_BUDGET
        ),
        name="covariance_solve",
    )(jnp.asarray(begin), jnp.asarray((last - begin).astype(np.int32)), *operands)
    steps, residual = (jnp.swapaxes(rows[:, :, row, :length], 1, 2) for row in (_STEPS, _RESIDUAL))
    return common.tokens_first(solution, length, head_dim), steps, residual


def _kernel(
    begin_ref: Any, count_ref: Any, scale: Any, bounds: Any, numbers: Any, *refs: Any, group: int, **options: Any
) -> None:
    """A tile of queries of one key head's heads, which stand below each other."""
    query, offset, keys, out, rows, held, weights, *state, arrived = refs
    heads, block_q, width = query.shape
    batch, head, tile = map(pl.program_id, range(3))
    begin, count = begin_ref[tile], count_ref[tile]
    source = keys.at[batch, lax.div(head, np.int32(group)), pl.ds(begin, held.shape[0])]
    copy = pltpu.make_async_copy(source, held, arrived)
    copy.start()
    start, end = (over_lanes(jnp.tile(spread(bounds[n : n + 1, :]), (heads, 1)), _BLOCK_K) for n in (_START, _END))
    lse, ridge = (jnp.concatenate([spread(numbers[head, n : n + 1]) for head in range(heads)]) for n in (_LSE, _RIDGE))
    queries, offsets = (ref[...].reshape(heads * block_q, width) for ref in (query, offset))
    copy.wait()

    def fill(j: Any, mean: Array) -> Array:
        logits = scale[0, 0] * common.dot(queries, held[j], (1, 1))
        position = (begin + j) * np.int32(_BLOCK_K) + lax.broadcasted_iota(jnp.int32, (1, _BLOCK_K), 1)
        logits = jnp.where((position >= start) & (position < end), logits, MASKED)
        weights[j] = jnp.exp(logits - over_lanes(lse, _BLOCK_K))
        return mean + product(parts(weights[j], held.dtype), held[j], (1, 0))

    mean = lax.fori_loop(zero(), count, fill, jnp.zeros(offsets.shape, jnp.float32))
    solution, steps, residual = conjugate_gradients(held, weights, count, offsets, ridge, mean, state, **options)
    out[...] = solution.reshape(out.shape)
    rows[...] = jnp.stack([_row(steps, heads), _row(residual, heads)], axis=1)


def _row(column: Array, heads: int) -> Array:
    """[heads x n, 128] -> [heads, n]"""
    return jnp.concatenate([jnp.transpose(x)[:1] for x in jnp.split(column, heads)])


def parts(x: Array, dtype: Any) -> Sequence[Array]:
    """x, float32, as numbers of this dtype whose sum it is."""
    return (x,) if dtype == jnp.float32 else common.in_two(x, dtype)


def product(summands: Sequence[Array], matrix: Array, contract: tuple[int, int]) -> Array:
    """Of the sum of parts() with a matrix, float32."""
    rows = summands[0].shape[0]
    if rows >= LANES or len(summands) == 1:
        return sum(common.dot(part, matrix, contract) for part in summands)  # type: ignore[return-value]
    # Of few rows the matrix's way into the matrix unit is most of a product: all parts go at once.
    both = common.dot(jnp.concatenate(summands), matrix, contract)
    return both[:rows] + both[rows:]


def state_of(queries: int, width: int, dtype: Any) -> list[Any]:
    """Scratch of conjugate_gradients. Numbers of queries are equal over the lanes."""
    vector, column = pltpu.VMEM((queries, width), jnp.float32), pltpu.VMEM((queries, LANES), jnp.float32)
    return [*[vector] * 4, pltpu.VMEM((1 if dtype == jnp.float32 else 2, queries, width), dtype), *[column] * 4]


def conjugate_gradients(
    keys: Any,
    weights: Any,
    count: Any,
    offset: Array,
    ridge: Array,
    mean: Array,
    state: Sequence[Any],
    *,
    tolerance: float,
    max_iterations: int,
) -> tuple[Array, Array, Array]:
    """Of queries in rows: (x [queries, H], iterations and relative residual [queries, 128], float32).

    Args:
      keys: reference [tiles, block, H]; weights: float32 reference [tiles, queries, block]. The first `count` are used.
      offset, mean: [queries, H], float32; ridge: [queries, 128].
      state: state_of's references.
    """
    solution, rest, direction, image, halves, tilt, square, steps, target = state
    (queries, width), block = offset.shape, weights.shape[2]
    some_rows = [slice(row, min(row + _ROWS, queries)) for row in range(0, queries, _ROWS)]

    def turn_to(rows: slice, towards: Array) -> Array:
        """Sets a direction of these rows, and what the product with it begins with; which rows are not solved yet."""
        direction[rows], tilt[rows] = towards, _dot(towards, mean[rows])
        image[rows] = over_lanes(ridge[rows], width) * towards
        for number, half in enumerate(parts(towards, keys.dtype)):
            halves[number, rows] = half
        return (square[rows] > target[rows]).astype(jnp.float32)

    def multiply(first: Any, many: int) -> None:
        """With so many tiles of keys, whose chains of two products are independent."""
        tiles = [first + np.int32(number) for number in range(many)]
        towards = [halves[number] for number in range(halves.shape[0])]
        slopes = [product(towards, keys[j], (1, 1)) for j in tiles]
        changes = [weights[j] * (slope - over_lanes(tilt[...], block)) for j, slope in zip(tiles, slopes)]
        image[...] += sum(product(parts(change, keys.dtype), keys[j], (1, 0)) for j, change in zip(tiles, changes))

    def pair(number: Any, _: None) -> None:
        multiply(2 * number, 2)

    def single(number: Any, _: None) -> None:
        multiply(number, 1)

    def advance(rows: slice) -> Array:
        along, is_active = direction[rows], square[rows] > target[rows]
        curvature = _dot(along, image[rows])
        # Rounding can make the curvature of a nearly singular system vanish; that row then stays where it is.
        moves = is_active & (curvature > 0)
        length = over_lanes(jnp.where(moves, square[rows] / jnp.where(moves, curvature, 1), 0), width)
        solution[rows] += length * along
        left = rest[rows] - length * image[rows]
        new_square = _dot(left, left)
        turn = over_lanes(jnp.where(is_active, new_square / jnp.where(is_active, square[rows], 1), 0), width)
        rest[rows], square[rows] = left, new_square
        steps[rows] += is_active.astype(jnp.float32)
        return turn_to(rows, jnp.where(over_lanes(is_active, width), left + turn * along, along))

    def iterate(carry: Any) -> Any:
        number, _ = carry
        pairs = lax.div(count, np.int32(2))
        lax.fori_loop(zero(), pairs, pair, None)
        lax.fori_loop(2 * pairs, count, single, None)
        return number + np.int32(1), _largest(map(advance, some_rows))

    def goes_on(carry: Any) -> Array:
        number, active = carry
        return (active > 0) & (number < max_iterations)

    first = _dot(offset, offset)
    solution[...], steps[...], target[...] = jnp.zeros_like(offset), jnp.zeros_like(first), tolerance**2 * first
    rest[...], square[...] = offset, first
    active = _largest(turn_to(rows, offset[rows]) for rows in some_rows)
    lax.while_loop(goes_on, iterate, (zero(), active))
    return solution[...], steps[...], jnp.sqrt(square[...] / jnp.where(first > 0, first, 1))


def _largest(columns: Iterable[Array]) -> Array:
    return jnp.max(functools.reduce(jnp.maximum, columns))


def _dot(a: Array, b: Array) -> Array:
    """Of rows [n, H]: [n, 128], equal over the lanes."""
    return jnp.broadcast_to(jnp.sum(a * b, axis=1, keepdims=True), (a.shape[0], LANES))
