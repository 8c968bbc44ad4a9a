"""Covariances under the weights of banded flash attention, for TPU: what local linear attention is made of.

With p_ts the weights of attention, a_ts = x_t . k_s and means abar_t = x_t . kbar_t, kbar_t = sum_s p_ts k_s,

    out_t = Cov_p(v, k) x_t = sum_s p_ts (a_ts - abar_t) v_s

in one pass over the keys, since p_ts = exp(scale q_t . k_s - lse_t) with the lse that attention gave. With the gradient
g of a loss with respect to out, c_ts = g_t . v_s and cbar_t = g_t . vbar_t,

    dl_ts = p_ts ((a_ts - abar_t) (c_ts - cbar_t) - g_t . out_t)                       the logits'
    dq_t  = scale sum_s dl_ts k_s                     dx_t = sum_s p_ts (c_ts - cbar_t) k_s
    dk_s  = sum_t scale dl_ts q_t + p_ts (c_ts - cbar_t) x_t          dv_s = sum_t p_ts (a_ts - abar_t) g_t

where lse, kbar and vbar are functions of q, k and v, and their share is in dl. The kernels go through the pairs of
tiles of banded_flash.py, the same way.

Numerics: x and the results are float32, since conjugate gradients are made of them. Where q, k and v are bfloat16, a
float32 operand is split in two bfloat16 numbers, so that a product is exact to about 2^-16; sums are float32.
"""

import functools
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
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
    Tokens,
    blocks_of,
    finite,
    hide,
    is_last,
    save_bounds,
    visit,
)
from kernels_pallas.tpu.band import refusal as band_refusal

Array = jax.Array

# (queries in a tile, keys in a tile), by bytes of an element and padded head dim, for all three kernels.
_BLOCKS = {(2, 64): (256, 512), (2, 128): (256, 512), (2, 256): (128, 256), (4, 64): (256, 256), (4, 128): (256, 256)}
_DEFAULT_BLOCKS = (128, 128)  # at other widths
# Rows of the table of numbers that belong to a query.
_LSE, _KEY_MEAN, _VALUE_MEAN, _PRODUCT = range(4)


def default_blocks(query: Any, key: Any, value: Any) -> tuple[int, int]:
    """(block_q, block_k) for arrays of these shapes and dtype, from a frozen table."""
    return blocks_of(_BLOCKS, _DEFAULT_BLOCKS, query, key, value)


def vmem_bytes(block_q: int, block_k: int, head_dim: int, value_dim: int, dtype: Any, *, tables: int = 1) -> int:
    """VMEM that the largest of the kernels takes at most, as in banded_flash.vmem_bytes."""
    size = jnp.dtype(dtype).itemsize
    keys, values = (common.round_up(width, common.LANES) for width in (head_dim, value_dim))
    read = size * (block_q + block_k) * (keys + values) + 4 * block_q * (keys + values)  # q, k, v; x, g
    written = 4 * max(2 * block_q * keys, block_k * (keys + values))
    rows = 4 * common.SUBLANES * 3 * max(block_q, block_k)
    logits = 4 * 8 * block_q * block_k
    columns = 4 * common.LANES * block_q * 6
    splits = 2 * size * (block_q + block_k) * (keys + values) * (2 if size == 4 else 1)
    return 2 * (read + rows) + 3 * written + logits + columns + splits


def refusal(query: Any, key: Any, value: Any, *, pattern: Pattern) -> str | None:
    """Why the kernels cannot serve these arguments (arrays may be shape structs), or None if they can."""
    if isinstance(pattern, BlockLists):
        return "serves no lists of tiles"
    return band_refusal(query, key, value, pattern=pattern, default_blocks=default_blocks, footprint=vmem_bytes)


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
    # By quarters the compiler leaves the matrix unit waiting on v6e: 19 % more cycles for a window of 1024.
    band = _band("banded_covariance", query, key, value, pattern, quarters=False)
    means = jnp.sum(direction * key_mean.astype(jnp.float32), axis=-1)
    (out,) = Call(band, by_key=False).run(
        functools.partial(_forward_kernel, band=band),
        "banded_covariance",
        scale=scale,
        numbers=band.numbers([finite(lse), means]),
        tokens=_tokens(band, query, key, value, direction.astype(jnp.float32)),
        out=[(band.value_width, jnp.float32)],
        scratch=[pltpu.VMEM((band.block_q, band.value_width), jnp.float32), *band.bounds_scratch()],
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
    band = _band("banded_covariance_gradients", query, key, value, pattern, quarters=True)
    operands: Any = {
        "scale": scale,
        "numbers": band.numbers(numbers),
        "tokens": [*_tokens(band, query, key, value, direction), band.queries(gradient)],
    }
    keys, values = band.key_width, band.value_width
    to_query, to_direction = Call(band, by_key=False).run(
        functools.partial(_query_kernel, band=band),
        "banded_covariance_query_gradients",
        **operands,
        out=[(keys, jnp.float32), (keys, jnp.float32)],
        scratch=[*[pltpu.VMEM((band.block_q, keys), jnp.float32)] * 2, *band.bounds_scratch()],
        products=(keys, keys, values, keys, keys),
    )
    to_key, to_value = Call(band, by_key=True).run(
        functools.partial(_key_kernel, band=band),
        "banded_covariance_key_value_gradients",
        **operands,
        out=[(width, jnp.float32) for width in (keys, values)],
        scratch=[pltpu.VMEM((band.block_k, width), jnp.float32) for width in (keys, values)],
        products=(keys, keys, values, keys, keys, values),
    )
    to_query = common.tokens_first(to_query, *query.shape[1::2])
    to_scale = jnp.sum(query.astype(jnp.float32) * to_query) / scale
    return (
        to_query.astype(query.dtype),
        common.tokens_first(to_key, *key.shape[1::2]).astype(key.dtype),
        common.tokens_first(to_value, *value.shape[1::2]).astype(value.dtype),
        common.tokens_first(to_direction, *query.shape[1::2]),
        to_scale,
    )


def _band(name: str, query: Array, key: Array, value: Array, pattern: Pattern, *, quarters: bool) -> Band:
    reason = refusal(query, key, value, pattern=pattern)
    if reason is not None:
        raise ValueError(f"{name}: {reason}")
    tiling = pattern.tiled(*pattern.blocks(default_blocks(query, key, value)))
    return Band(query, key, value, tiling, quarters=quarters)


def _tokens(band: Band, query: Array, key: Array, value: Array, direction: Array) -> list[Tokens]:
    return [band.queries(query), band.keys(key), band.keys(value), band.queries(direction)]


class _Tile(NamedTuple):
    """What all three kernels compute of a piece of a pair of tiles, [queries, keys], by key [keys, queries].

    Fields from scale on are references; bounds: Band.bounds_scratch.
    """

    band: Band
    step: Step
    piece: Piece
    scale: Any
    numbers: Any
    query: Any
    key: Any
    value: Any
    direction: Any
    bounds: Sequence[Any]

    def number(self, row: int) -> Array:
        if self.step.by_key:
            return self.numbers[row : row + 1, :]
        return jnp.transpose(self.numbers[...])[:, row : row + 1]

    def pairs(self, of_query: Array, of_key: Array) -> Array:
        """Products of every query's row with every key's."""
        if self.step.by_key:
            return _product(of_key, of_query, (1, 1))
        return _product(of_query, of_key, (1, 1))

    def weights(self) -> Array:
        logits = self.scale[0, 0] * self.pairs(self.query[...], self.key[...])
        return jnp.exp(hide(self.band, self.step, self.piece, logits, self.bounds) - self.number(_LSE))

    def slopes(self) -> Array:
        return self.pairs(self.direction[...], self.key[...]) - self.number(_KEY_MEAN)

    def sums(self, weights: Array, vectors: Array) -> Array:
        """Of a row's vectors, by weights rounded to the vectors' dtype; beside a float32 direction in two parts."""
        if self.direction.dtype == vectors.dtype:
            weights = weights.astype(vectors.dtype)
        return _product(weights, vectors, (1, 0))

    def gains(self, gradient: Array) -> Array:
        return self.pairs(gradient, self.value[...]) - self.number(_VALUE_MEAN)


def _pieces(band: Band, step: Step, body: Body, inputs: Sequence[Any], bounds: Sequence[Any]) -> Iterator[_Tile]:
    scale, numbers, query, key, value, direction = inputs
    for piece in body:
        queries, keys = piece.queries, piece.keys
        of_piece = numbers.at[:, queries], query.at[queries], key.at[keys], value.at[keys], direction.at[queries]
        yield _Tile(band, step, piece, scale, *of_piece, bounds)


def _product(a: Array, b: Array, contract: tuple[int, int]) -> Array:
    """A product of which one operand may be float32 and the other bfloat16."""
    if a.dtype == b.dtype:
        return common.dot(a, b, contract)
    if a.dtype == jnp.float32:
        return sum(common.dot(part, b, contract) for part in common.in_two(a, b.dtype))  # type: ignore[return-value]
    return sum(common.dot(a, part, contract) for part in common.in_two(b, a.dtype))  # type: ignore[return-value]


def _start(*sums: Any) -> None:
    for total in sums:
        total[...] = jnp.zeros_like(total)


def _forward_kernel(step: Step, *refs: Any, band: Band) -> None:
    *inputs, out_ref, total = refs[:8]
    bounds = refs[8:]
    pl.when(step.is_start)(lambda: _start(total))
    save_bounds(band, step, bounds)

    def accumulate(body: Body) -> None:
        for tile in _pieces(band, step, body, inputs, bounds):
            total[tile.piece.queries] += tile.sums(tile.weights() * tile.slopes(), tile.value[...])

    visit(band, step, accumulate)

    @pl.when(is_last(step))
    def _() -> None:
        out_ref[...] = total[...]
        _start(total)


def _query_kernel(step: Step, *refs: Any, band: Band) -> None:
    *inputs, gradient_ref, query_out, direction_out, to_query, to_direction = refs[:11]
    scale, bounds = inputs[0], refs[11:]
    pl.when(step.is_start)(lambda: _start(to_query, to_direction))
    save_bounds(band, step, bounds)

    def accumulate(body: Body) -> None:
        for tile in _pieces(band, step, body, inputs, bounds):
            queries = tile.piece.queries
            weights, gains, key = tile.weights(), tile.gains(gradient_ref[queries]), tile.key[...]
            to_query[queries] += tile.sums(weights * (tile.slopes() * gains - tile.number(_PRODUCT)), key)
            to_direction[queries] += tile.sums(weights * gains, key)

    visit(band, step, accumulate)

    @pl.when(is_last(step))
    def _() -> None:
        query_out[...] = scale[0, 0] * to_query[...]
        direction_out[...] = to_direction[...]
        _start(to_query, to_direction)


def _key_kernel(step: Step, *refs: Any, band: Band) -> None:
    *inputs, gradient_ref, key_out, value_out, to_key, to_value = refs
    pl.when(step.is_start)(lambda: _start(to_key, to_value))

    def accumulate(body: Body) -> None:
        for tile in _pieces(band, step, body, inputs, ()):
            queries, keys = tile.piece.queries, tile.piece.keys
            gradient = gradient_ref[queries]
            weights, slopes, gains = tile.weights(), tile.slopes(), tile.gains(gradient)
            of_logits = tile.scale[0, 0] * (weights * (slopes * gains - tile.number(_PRODUCT)))
            to_key[keys] += tile.sums(of_logits, tile.query[...])
            to_key[keys] += tile.sums(weights * gains, tile.direction[...])
            to_value[keys] += tile.sums(weights * slopes, gradient)

    visit(band, step, accumulate)

    @pl.when(is_last(step))
    def _() -> None:
        key_out[...] = to_key[...]
        value_out[...] = to_value[...]
        _start(to_key, to_value)
