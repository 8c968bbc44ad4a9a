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
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from kernels_pallas.patterns import Pattern, for_every_head
from kernels_pallas.tpu import common
from kernels_pallas.tpu.band import MASKED, Band, Call, blocks_of, is_first, is_last, visible, visit
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


def refusal(query: Any, key: Any, value: Any, **settings: Any) -> str | None:
    """Why the kernels cannot serve these arguments, or None if they can; as band.refusal."""
    return band_refusal(query, key, value, footprint=vmem_bytes, **settings)


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
    band = _band("banded_covariance", query, key, value, pattern)
    means = jnp.sum(direction * key_mean.astype(jnp.float32), axis=-1)
    call = Call(band, pattern.by_query, band.heads)
    over = common.varying(query, key, value, direction, lse, jnp.asarray(scale))
    shape = (band.batch, band.heads, band.padded_queries, band.value_width)
    out = call.run(
        functools.partial(_forward_kernel, band=band),
        in_specs=[*_specs(call, call.row, call.key_head(call.column))],
        out_specs=call.block(band.block_q, band.value_width, call.row),
        scratch_shapes=[pltpu.VMEM((band.block_q, band.value_width), jnp.float32)],
        out_shape=jax.ShapeDtypeStruct(shape, jnp.float32, manual_axis_type=over),
        products=(band.key_width, band.key_width, band.value_width),
        name="banded_covariance",
        arrays=[*_arrays(band, scale, query, key, value, direction, {_LSE: _finite(lse), _KEY_MEAN: means})],
    )
    return _back(out, query.shape[1], value.shape[-1])


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
    band = _band("banded_covariance_gradients", query, key, value, pattern)
    gradient = gradient.astype(jnp.float32)
    numbers = {
        _LSE: _finite(lse),
        _KEY_MEAN: jnp.sum(direction * key_mean.astype(jnp.float32), axis=-1),
        _VALUE_MEAN: jnp.sum(gradient * value_mean.astype(jnp.float32), axis=-1),
        _PRODUCT: jnp.sum(gradient * out, axis=-1),
    }
    arrays = _arrays(band, scale, query, key, value, direction, numbers)
    arrays.append(common.heads_first(gradient, band.padded_queries, band.value_width))
    over = common.varying(query, key, value, direction, lse, gradient, jnp.asarray(scale))

    def results(call: Call, rows: int, tokens: int, widths: tuple[int, ...]) -> dict[str, Any]:
        shapes = [(band.batch, call.heads, tokens, width) for width in widths]
        return {
            "out_specs": [call.block(rows, width, call.row) for width in widths],
            "scratch_shapes": [pltpu.VMEM((rows, width), jnp.float32) for width in widths],
            "out_shape": [jax.ShapeDtypeStruct(shape, jnp.float32, manual_axis_type=over) for shape in shapes],
        }

    keys, values = band.key_width, band.value_width
    call = Call(band, pattern.by_query, band.heads)
    to_query, to_direction = call.run(
        functools.partial(_query_kernel, band=band),
        in_specs=[
            *_specs(call, call.row, call.key_head(call.column)),
            call.block(band.block_q, values, call.row),
        ],
        **results(call, band.block_q, band.padded_queries, (keys, keys)),
        products=(keys, keys, values, keys, keys),
        name="banded_covariance_query_gradients",
        arrays=arrays,
    )
    call = Call(band, for_every_head(pattern.by_key, band.group), band.key_heads)
    query_of = call.query_head(call.column)
    to_key, to_value = call.run(
        functools.partial(_key_kernel, band=band),
        in_specs=[*_specs(call, query_of, call.row), call.block(band.block_q, values, query_of)],
        **results(call, band.block_k, band.padded_keys, (keys, values)),
        products=(keys, keys, values, keys, keys, values),
        name="banded_covariance_key_value_gradients",
        arrays=arrays,
    )
    to_query = _back(to_query, query.shape[1], query.shape[-1])
    to_scale = jnp.sum(query.astype(jnp.float32) * to_query) / scale
    return (
        to_query.astype(query.dtype),
        _back(to_key, key.shape[1], key.shape[-1]).astype(key.dtype),
        _back(to_value, value.shape[1], value.shape[-1]).astype(value.dtype),
        _back(to_direction, query.shape[1], query.shape[-1]),
        to_scale,
    )


def _band(name: str, query: Array, key: Array, value: Array, pattern: Pattern) -> Band:
    reason = refusal(query, key, value, pattern=pattern)
    if reason is not None:
        raise ValueError(f"{name}: {reason}")
    return Band(query, key, value, pattern, None)


def _finite(lse: Array) -> Array:
    """A query that sees no key has no visible pair, whose weight would be exp(-inf + inf)."""
    return jnp.where(lse == -jnp.inf, 0, lse)


def _back(x: Array, length: int, width: int) -> Array:
    return jnp.swapaxes(x[:, :, :length, :width], 1, 2)


def _arrays(
    band: Band,
    scale: Any,
    query: Array,
    key: Array,
    value: Array,
    direction: Array,
    numbers: dict[int, Array],
) -> list[Array]:
    return [
        jnp.asarray(scale, jnp.float32).reshape(1, 1),
        *band.tables,
        band.numbers(numbers),
        common.heads_first(query, band.padded_queries, band.key_width),
        common.heads_first(key, band.padded_keys, band.key_width),
        common.heads_first(value, band.padded_keys, band.value_width),
        common.heads_first(direction.astype(jnp.float32), band.padded_queries, band.key_width),
    ]


def _specs(call: Call, query_of: Callable[..., Any], key_of: Callable[..., Any]) -> list[Any]:
    band = call.band
    return [
        *call.of_pair(query_of, key_of),
        call.block(band.block_q, band.key_width, query_of),
        call.block(band.block_k, band.key_width, key_of),
        call.block(band.block_k, band.value_width, key_of),
        call.block(band.block_q, band.key_width, query_of),
    ]


class _Tile:
    """What all three kernels compute of a pair of tiles, [queries, keys] (transposed: [keys, queries])."""

    def __init__(self, band: Band, refs: Any, query_tile: Array, key_tile: Array, *, transposed: bool = False):
        self.band, self.tiles, self.transposed = band, (query_tile, key_tile), transposed
        self.scale, self.queries, *refs = refs
        self.keys = None
        if band.key_table is not None:
            self.keys, *refs = refs
        self.numbers, self.query, self.key, self.value, self.direction, *self.rest = refs

    def number(self, row: int) -> Array:
        if self.transposed:
            return self.numbers[row : row + 1, :]
        return jnp.transpose(self.numbers[...])[:, row : row + 1]

    def pairs(self, of_query: Array, of_key: Array) -> Array:
        """Products of every query's row with every key's."""
        if self.transposed:
            return _product(of_key, of_query, (1, 1))
        return _product(of_query, of_key, (1, 1))

    def weights(self, masked: bool) -> Array:
        logits = self.scale[0, 0] * self.pairs(self.query[...], self.key[...])
        if masked:
            keys = None if self.keys is None else self.keys[...]
            if self.transposed:
                queries, keys = self.band.rows_of(self.queries), None if keys is None else jnp.transpose(keys)
            else:
                columns = jnp.transpose(self.queries[...])
                queries = [columns[:, row : row + 1] for row in self.band.rows]
            axis = 0 if self.transposed else 1
            sees = visible(self.band, *self.tiles, queries, keys, axis=axis)
            logits = jnp.where(sees, logits, MASKED)
        return jnp.exp(logits - self.number(_LSE))

    def slopes(self) -> Array:
        return self.pairs(self.direction[...], self.key[...]) - self.number(_KEY_MEAN)

    def gains(self, gradient: Array) -> Array:
        return self.pairs(gradient, self.value[...]) - self.number(_VALUE_MEAN)


def _product(a: Array, b: Array, contract: tuple[int, int]) -> Array:
    """A product of which one operand may be float32 and the other bfloat16."""
    if a.dtype == b.dtype:
        return common.dot(a, b, contract)
    if a.dtype == jnp.float32:
        return sum(common.dot(part, b, contract) for part in _halves(a))  # type: ignore[return-value]
    return sum(common.dot(a, part, contract) for part in _halves(b))  # type: ignore[return-value]


def _halves(x: Array) -> tuple[Array, Array]:
    high = x.astype(jnp.bfloat16)
    return high, (x - high.astype(jnp.float32)).astype(jnp.bfloat16)


def _clear(flags: Array, *sums: Any) -> None:
    @pl.when(is_first(flags))
    def _() -> None:
        for total in sums:
            total[...] = jnp.zeros_like(total)


def _forward_kernel(row: Array, column: Array, flags: Array, *refs: Any, band: Band) -> None:
    tile = _Tile(band, refs, row, column)
    out_ref, total = tile.rest
    _clear(flags, total)

    def accumulate(masked: bool) -> None:
        total[...] += _product(tile.weights(masked) * tile.slopes(), tile.value[...], (1, 0))

    visit(accumulate, flags, band.segments)

    @pl.when(is_last(flags))
    def _() -> None:
        out_ref[...] = total[...]


def _query_kernel(row: Array, column: Array, flags: Array, *refs: Any, band: Band) -> None:
    tile = _Tile(band, refs, row, column)
    gradient_ref, query_out, direction_out, to_query, to_direction = tile.rest
    _clear(flags, to_query, to_direction)

    def accumulate(masked: bool) -> None:
        weights, gains = tile.weights(masked), tile.gains(gradient_ref[...])
        key = tile.key[...]
        to_query[...] += _product(weights * (tile.slopes() * gains - tile.number(_PRODUCT)), key, (1, 0))
        to_direction[...] += _product(weights * gains, key, (1, 0))

    visit(accumulate, flags, band.segments)

    @pl.when(is_last(flags))
    def _() -> None:
        query_out[...] = tile.scale[0, 0] * to_query[...]
        direction_out[...] = to_direction[...]


def _key_kernel(row: Array, column: Array, flags: Array, *refs: Any, band: Band) -> None:
    tile = _Tile(band, refs, column, row, transposed=True)
    gradient_ref, key_out, value_out, to_key, to_value = tile.rest
    _clear(flags, to_key, to_value)

    def accumulate(masked: bool) -> None:
        gradient = gradient_ref[...]
        weights, slopes, gains = tile.weights(masked), tile.slopes(), tile.gains(gradient)
        of_logits = tile.scale[0, 0] * (weights * (slopes * gains - tile.number(_PRODUCT)))
        to_key[...] += _product(of_logits, tile.query[...], (1, 0))
        to_key[...] += common.dot(weights * gains, tile.direction[...], (1, 0))
        to_value[...] += common.dot(weights * slopes, gradient, (1, 0))

    visit(accumulate, flags, band.segments)

    @pl.when(is_last(flags))
    def _() -> None:
        key_out[...] = to_key[...]
        value_out[...] = to_value[...]
