"""Parallax in one pass over the keys, for Hopper: softmax attention whose weights a probe r tilts.

    p_ts = softmax_s(scale q_t . k_s)      a_ts = r_t . k_s      abar_t = sum_s p_ts a_ts
    out_t = sum_s p_ts (1 + abar_t - a_ts) v_s

A block adds up p v and p a v side by side, and gives the values' mean vbar_t = sum_s p_ts v_s too, for the gradients.
With the gradient g of a loss with respect to out, c_ts = g_t . v_s and cbar_t = g_t . vbar_t,

    dl_ts = p_ts ((1 + abar_t - a_ts) (c_ts - cbar_t) - (g_t . out_t - cbar_t))        the logits'
    dq_t  = scale sum_s dl_ts k_s                     dr_t = - sum_s p_ts (c_ts - cbar_t) k_s
    dk_s  = sum_t scale dl_ts q_t - p_ts (c_ts - cbar_t) r_t          dv_s = sum_t p_ts (1 + abar_t - a_ts) g_t

which tilted.py's kernels give for the direction x = -r and numbers m = -abar - 1, n = cbar and P = g . out - cbar.

Numerics: 16-bit operands, the probe as well, float32 sums; weights p and p a are rounded to 16 bits. a is taken
relative to r . (the mean of all keys), which leaves out as it is, so that keys far from 0 lose no digits. Results and
gradients are of query's dtype. Deterministic.
"""

import jax
import jax.numpy as jnp
import numpy as np

from kernels_pallas.gpu.band import MASKED
from kernels_pallas.gpu.common import ROWS, Product, add_dot, by_row
from kernels_pallas.gpu.tilted import (
    ALONE,
    LOG_2,
    STEP,
    Step,
    band_of,
    gradients,
    inner,
    pairs,
    refusal,
    run,
    smem_bytes,
    split,
)
from kernels_pallas.patterns import Pattern

__all__ = ["banded_parallax", "banded_parallax_gradients", "refusal", "smem_bytes"]

Array = jax.Array
# Rows of the table of numbers that belong to a query: what a is relative to, and 2^exponent of its probe.
_REFERENCE, _SIZE = range(2)


def banded_parallax(
    query: Array, key: Array, value: Array, probe: Array, *, pattern: Pattern, scale: float | Array
) -> tuple[Array, Array, Array, Array]:
    """Parallax attention of every query to the keys that the pattern gives it.

    Args:
      query [B, T, N, H], key [B, S, K, H], value [B, S, K, V], pattern, scale: as in banded_flash_attention, H and V up
        to 128.
      probe: r [B, T, N, H], floating; rounded to query's dtype.

    Returns:
      out [B, T, N, V] in query's dtype; lse [B, T, N] float32, as banded_flash_attention's; the mean of r . k
      [B, T, N] float32; the mean of values [B, T, N, V] in query's dtype. A query that sees no key: 0, -inf, any, 0.

    Raises:
      ValueError: with refusal()'s reason.

    Complexity: O(B N (H + V) x visited tiles) time; memory beside the arguments: the probe in 16 bits.
    """
    band = band_of("banded_parallax", query, key, value, pattern)
    [part], exponent, probe = split(probe, key, ALONE, 1)
    center = jnp.repeat(jnp.mean(key.astype(jnp.float32), axis=1), band.group, axis=1)
    out, mean, lse, slope = run(
        band,
        "banded_parallax",
        _step,
        by_key=False,
        scale=scale,
        numbers={
            _REFERENCE: inner(probe, center[:, None]),
            _SIZE: jnp.ldexp(jnp.ones_like(probe[..., 0]), exponent),
        },
        queries=[query, part],
        tokens=[key, value],
        sums=(band.value_width,) * 2,
        row_sums=(float(MASKED), 0.0, 0.0),
        finish=_finish,
        row_results=2,
        out_dtype=query.dtype,
    )
    out, mean = (x[:, : query.shape[1], :, : value.shape[-1]] for x in (out, mean))
    lse, slope = (x[:, : query.shape[1]] for x in (lse, slope))
    return out, lse, slope, mean


def banded_parallax_gradients(
    query: Array,
    key: Array,
    value: Array,
    probe: Array,
    out: Array,
    lse: Array,
    slope_mean: Array,
    value_mean: Array,
    gradient: Array,
    *,
    pattern: Pattern,
    scale: float | Array,
) -> tuple[Array, Array, Array, Array, Array]:
    """Gradients with respect to query, key, value, probe and scale of banded_parallax's out.

    Args:
      query .. probe: as there. out .. value_mean: what it gave.
      gradient: [B, T, N, V], of the loss with respect to out.
    """
    band = band_of("banded_parallax_gradients", query, key, value, pattern)
    scale = jnp.asarray(scale, jnp.float32)

    def numbers(x: Array, g: Array) -> tuple[Array, Array, Array]:
        mean = inner(g, value_mean)
        return -slope_mean - 1, mean, inner(g, out) - mean

    to_query, to_key, to_value, to_direction = gradients(
        band,
        "banded_parallax",
        query,
        key,
        value,
        -probe.astype(jnp.float32),
        gradient,
        lse,
        numbers,
        scale=scale,
        of_direction=True,
        least=0,
    )
    assert to_direction is not None
    return (
        (scale * to_query).astype(query.dtype),
        to_key.astype(key.dtype),
        to_value.astype(value.dtype),
        (-to_direction).astype(probe.dtype),
        jnp.sum(query.astype(jnp.float32) * to_query),
    )


def _step(step: Step, carry: list[Array]) -> list[Array]:
    query, probe = step.own
    key, value = step.moving
    plain, tilted, maximum, weight, slope = carry
    logits, slopes = pairs([(query, key)], [(probe, key)])
    logits = step.in_base_2(logits)
    new = jnp.maximum(maximum, logits.max(axis=1))
    weights = jnp.exp2(logits - by_row(new, (ROWS, STEP)))
    slopes = weights * (slopes - step.number(_REFERENCE))
    decay = jnp.exp2(maximum - new)
    weight, slope = weight * decay + weights.sum(axis=1), slope * decay + slopes.sum(axis=1)
    wide = by_row(decay, (ROWS, plain.shape[1]))
    plain = add_dot(plain * wide, Product(weights.astype(value.dtype), value))
    tilted = add_dot(tilted * wide, Product(slopes.astype(value.dtype), value))
    return [plain, tilted, new, weight, slope]


def _finish(carry: list[Array], rows: list[Array]) -> list[Array]:
    """out, the mean of values, lse, the mean of r . k."""
    plain, tilted, maximum, weight, slope = carry
    is_empty = maximum <= MASKED
    inverse = jnp.where(is_empty, np.float32(0), 1 / weight)
    slope = slope * inverse
    shape = (ROWS, plain.shape[1])
    spread, size = by_row(inverse, shape), by_row(rows[_SIZE], shape)
    mean = plain * spread
    out = mean + size * (mean * by_row(slope, shape) - tilted * spread)
    lse = jnp.where(is_empty, np.float32(-np.inf), maximum * LOG_2 + jnp.log(weight))
    return [out, mean, lse, (slope + rows[_REFERENCE]) * rows[_SIZE]]
