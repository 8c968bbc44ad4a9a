"""Covariances under the weights of banded flash attention, for Hopper: what local linear attention is made of.

With p_ts the weights of attention, a_ts = x_t . k_s and means abar_t = x_t . kbar_t, kbar_t = sum_s p_ts k_s,

    out_t = Cov_p(v, k) x_t = sum_s p_ts (a_ts - abar_t) v_s

in one pass over the keys, since p_ts = exp(scale q_t . k_s - lse_t) with the lse that attention gave. With the gradient
g of a loss with respect to out, c_ts = g_t . v_s and cbar_t = g_t . vbar_t,

    dl_ts = p_ts ((a_ts - abar_t) (c_ts - cbar_t) - g_t . out_t)                       the logits'
    dq_t  = scale sum_s dl_ts k_s                     dx_t = sum_s p_ts (c_ts - cbar_t) k_s
    dk_s  = sum_t scale dl_ts q_t + p_ts (c_ts - cbar_t) x_t          dv_s = sum_t p_ts (a_ts - abar_t) g_t

where lse, kbar and vbar are functions of q, k and v, and their share is in dl. dx = Cov_p(k, v) g is made as out is;
the others as tilted.py says.

Numerics: x and the results are float32, since conjugate gradients are made of them. x and the weights of v (in dx, g
and the weights of k) are each the sum of two 16-bit numbers, exact to about 2^-16 in bfloat16 and 2^-21 in float16.
The mean kbar comes in 16 bits: what its rounding does to out is undone where vbar is given (out minus vbar times the
sum of the tilted weights, which is 0 for the exact mean), and likewise in dx. dq, dk and dv are 16-bit results, of x
and g rounded to 16 bits and the means as they come: where these are many times larger than the keys' spread, dq, dk
and dv lose digits.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from kernels_pallas.gpu.band import Band
from kernels_pallas.gpu.common import Product, add_dot
from kernels_pallas.gpu.tilted import (
    ALONE,
    KEY_MEAN,
    LSE,
    Step,
    band_of,
    cut,
    gradients,
    in_base_2,
    inner,
    pairs,
    refusal,
    run,
    smem_bytes,
    split,
)
from kernels_pallas.patterns import Pattern

__all__ = ["banded_covariance", "banded_covariance_gradients", "refusal", "smem_bytes"]

Array = jax.Array
_MEAN = KEY_MEAN  # the only one, of keys or of values


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
) -> Array:
    """Cov_p(v, k) x.

    Args:
      query [B, T, N, H], key [B, S, K, H], value [B, S, K, V], pattern, scale: as in banded_flash_attention, H and V up
        to 128.
      direction: x [B, T, N, H], float32.
      lse: [B, T, N], banded_flash_attention's. key_mean: [B, T, N, H], what it gives for keys as values.
      value_mean: [B, T, N, V], what it gives for these values, to make up for the rounding of key_mean. None: as it is.

    Returns:
      [B, T, N, V] float32; 0 for a query that sees no key.

    Raises:
      ValueError: with refusal()'s reason.

    Complexity: O(B N (H + V) x visited tiles) time; memory beside the arguments: x in two 16-bit numbers.
    """
    band = band_of("banded_covariance", query, key, value, pattern)
    means = (key_mean, value_mean)
    return _covariance(band, query, key, value, direction, lse, means, source=0, scale=scale)


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
    band = band_of("banded_covariance_gradients", query, key, value, pattern)
    direction, gradient, out, scale = (jnp.asarray(x, jnp.float32) for x in (direction, gradient, out, scale))

    def numbers(x: Array, g: Array) -> tuple[Array, Array, Array]:
        return inner(x, key_mean), inner(g, value_mean), inner(g, out)

    to_query, to_key, to_value, _ = gradients(
        band,
        "banded_covariance",
        query,
        key,
        value,
        direction,
        gradient,
        lse,
        numbers,
        scale=scale,
        of_direction=False,
    )
    means = (value_mean, key_mean)
    return (
        (scale * to_query).astype(query.dtype),
        to_key.astype(key.dtype),
        to_value.astype(value.dtype),
        _covariance(band, query, key, value, gradient, lse, means, source=1, scale=scale),
        jnp.sum(query.astype(jnp.float32) * to_query),
    )


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
) -> Array:
    """Cov_p(v, k) x, or with source 1 Cov_p(k, v) x. means: of what x is multiplied with, and of what is summed."""
    tokens, widths = (key, value), (band.key_width, band.value_width)
    parts, exponent, direction = split(direction, tokens[source], ALONE, 2)
    out, rest = run(
        band,
        "banded_covariance" if source == 0 else "banded_covariance_direction_gradients",
        functools.partial(_forward_step, source=source),
        by_key=False,
        scale=scale,
        numbers={LSE: in_base_2(lse), _MEAN: inner(direction, means[0])},
        queries=[query, *parts],
        tokens=list(tokens),
        sums=(widths[1 - source],),
        row_sums=(0.0,),
    )
    if means[1] is not None:
        mean = band.queries(means[1].astype(jnp.float32))
        out = out - rest[..., None] * mean
    shape = (*query.shape[:3], tokens[1 - source].shape[-1])
    return cut(out, jax.ShapeDtypeStruct(shape, jnp.float32), exponent)


def _forward_step(step: Step, sums: list[Array], *, source: int) -> list[Array]:
    """source: of key and value, which one directions are multiplied with; the other one is summed."""
    query, *directions = step.own
    key, target = step.moving[0], step.moving[1 - source]
    logits, slopes = pairs([(query, key)], [(x, step.moving[source]) for x in directions])
    tilted = step.weights(logits) * (slopes - step.number(_MEAN))
    total, rest = sums
    weights = _halves(tilted, target.dtype)
    return [add_dot(total, *(Product(weight, target) for weight in weights)), rest + tilted.sum(axis=1)]


def _halves(x: Array, dtype: Any) -> list[Array]:
    """x as the sum of two 16-bit numbers."""
    if dtype == jnp.bfloat16:  # the upper half of a float32 number; faster than to round there and back
        bits = lax.bitcast_convert_type(x, jnp.int32) & np.int32(-(2**16))
        high = lax.bitcast_convert_type(bits, jnp.float32)
    else:
        high = x.astype(dtype).astype(jnp.float32)
    return [high.astype(dtype), (x - high).astype(dtype)]
