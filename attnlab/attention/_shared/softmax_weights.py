"""Sums under the softmax weights of attention: what local linear attention and Parallax are made of."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from attnlab.attention import masks
from attnlab.attention._dispatch.exchange import whole_space
from attnlab.attention._shared.checks import check_int, require
from attnlab.attention._shared.softmax import scaled_for_logits, softmax_parts

Array = jax.Array


class SoftmaxWeights(NamedTuple):
    """Sums under the softmax weights p of a query over its keys, in the accumulator's dtype.

    key_mean: () -> sum_s p_s k_s [B, T, N, H]. value_mean: () -> sum_s p_s v_s [B, T, N, V].
    key_covariance: x [B, T, N, H] -> Cov_p(k, k) x. value_covariance: x -> Cov_p(v, k) x.
    """

    key_mean: Callable[[], Array]
    value_mean: Callable[[], Array]
    key_covariance: Callable[[Array], Array]
    value_covariance: Callable[[Array], Array]


def weights_of(attend: Callable[[Array, Array], Array], query: Array, key: Array, value: Array) -> SoftmaxWeights:
    """attend(scaled query, values): softmax attention to `key`, whose forward derivative gives the covariance."""

    def mean(values: Array) -> Callable[[], Array]:
        return lambda: attend(query, values)

    def covariance(values: Array) -> Callable[[Array], Array]:
        return jax.linearize(lambda query: attend(query, values), query)[1]

    return SoftmaxWeights(mean(key), mean(value), covariance(key), covariance(value))


def dense_weights(query: Array, key: Array, *, scale: Any, is_causal: bool, window: int | None) -> Array:
    """Softmax weights [B, N, T, S] of query and key [B, T, N, H]."""
    length = query.shape[1]
    mask = masks.Mask(lambda query, key: (query[0] >= 0) & (key[0] >= 0))
    if window is not None:
        mask = masks.neighborhood((length,), window, is_causal=is_causal)
    elif is_causal:
        mask = masks.causal()
    logits = jnp.einsum("BTNH,BSNH->BNTS", *scaled_for_logits(query, key, scale, query.dtype))
    numerators, denominator, _ = softmax_parts(logits, masks.dense_mask(mask, (length,)))
    return numerators / denominator


def check_window(window: Any, length: int) -> int | None:
    """The window as an int from 1 to the length, or None."""
    if window is None:
        return None
    window, (length,) = check_int("window", window, least=1), whole_space((length,))
    require(window <= length, "window", window, f"need 1 to the length, {length}")
    return window
