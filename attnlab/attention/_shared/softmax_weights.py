"""Sums under the softmax weights of attention: what local linear attention and Parallax are made of."""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from attnlab.attention import masks
from attnlab.attention._dispatch.deferred import vary_alike
from attnlab.attention._dispatch.exchange import whole_space
from attnlab.attention._shared.checks import accumulator_dtype, check_int, require
from attnlab.attention._shared.finite import where_spoilt
from attnlab.attention._shared.softmax import scaled_for_logits, softmax_parts

Array = jax.Array

_QUERIES, _QUERIES_OF_WINDOW = 128, 64  # of a block: more read a key less often, and see more keys of others
_STRETCHES = 4, 8  # of causal queries without a window: the blocks of one see keys up to its end


class SoftmaxWeights(NamedTuple):
    """Sums under the softmax weights p of a query over its keys, in the accumulator's dtype.

    key_mean: () -> sum_s p_s k_s [B, T, N, H]. value_mean: () -> sum_s p_s v_s [B, T, N, V].
    key_covariance: x [B, T, N, H] -> Cov_p(k, k) x. value_covariance: x -> Cov_p(v, k) x.
    solve: where a kernel iterates by itself, (solver in plain JAX, offset, ridge [B, T, N, 1], tolerance=,
    max_iterations=) -> what the solver gives of (x -> Cov_p(k, k) x + ridge x, offset).
    """

    key_mean: Callable[[], Array]
    value_mean: Callable[[], Array]
    key_covariance: Callable[[Array], Array]
    value_covariance: Callable[[Array], Array]
    solve: Callable[..., Any] | None = None


def weights_of(attend: Callable[[Array, Array], Array], query: Array, key: Array, value: Array) -> SoftmaxWeights:
    """attend(scaled query, values): softmax attention to `key`, whose forward derivative gives the covariance."""

    def mean(values: Array) -> Callable[[], Array]:
        return lambda: attend(query, values)

    def covariance(values: Array) -> Callable[[Array], Array]:
        return jax.linearize(lambda query: attend(query, values), query)[1]

    return SoftmaxWeights(mean(key), mean(value), covariance(key), covariance(value))


def held_weights(query: Array, key: Array, value: Array, visible: Array) -> SoftmaxWeights:
    """Of scaled queries [B, K, T, H], all of a key head's, whose weights are held: sums [B, K, T, ...].

    key [B, K, S, H], value [B, K, S, V], of query's dtype; visible: bool, broadcast to [B, K, T, S].
    """
    logits = jnp.einsum("BKTH,BKSH->BKTS", *scaled_for_logits(query, key, 1.0, query.dtype))
    numerators, denominator, _ = softmax_parts(logits, visible)
    weights = numerators / denominator

    def mean(values: Array) -> Array:
        return jnp.einsum("BKTS,BKSV->BKTV", weights, values)

    key_mean, value_mean = mean(key), mean(value)

    def covariance(x: Array, values: Array, values_mean: Array) -> Array:
        scores = jnp.einsum("BKTH,BKSH->BKTS", x, key) - jnp.sum(x * key_mean, axis=-1, keepdims=True)
        changes = weights * scores
        # Their sum is 0 but for rounding, which counts where keys lie far from 0 and close together.
        rest = jnp.sum(changes, axis=-1, keepdims=True) * values_mean
        return jnp.einsum("BKTS,BKSV->BKTV", changes, values) - rest

    return SoftmaxWeights(
        lambda: key_mean,
        lambda: value_mean,
        lambda x: covariance(x, key, key_mean),
        lambda x: covariance(x, value, value_mean),
    )


def by_blocks(
    function: Callable[..., Any],
    query: Array,
    key: Array,
    value: Array,
    *others: Array,
    scale: Any,
    is_causal: bool,
    window: int | None,
) -> Any:
    """function(held_weights of a block of queries, the block, further arrays' blocks), joined: [B, T, N, ...].

    query [B, T, N, H], key [B, T, K, H], value [B, T, K, V], others [B, T, N, ...]: finite. function takes arrays
    [B, K, G C, ...], C queries of the G heads of a key head, unscaled and in the accumulator's dtype; it gives a pytree
    of such arrays.

    Complexity: O(T S) time and O(C S) memory beside the results, S keys seen, in both directions of differentiation.
    """
    dtype = accumulator_dtype(query, key, value)
    length, heads, key_heads = query.shape[1], query.shape[2], key.shape[2]
    tokens = (x.astype(dtype) for x in (query, key, value))
    query, key, value, scale, *rest = vary_alike((*tokens, jnp.asarray(scale, dtype), *others))
    key, value = (jnp.swapaxes(x, 1, 2) for x in (key, value))
    group, size = heads // key_heads, min(_QUERIES if window is None else _QUERIES_OF_WINDOW, length)
    count = -(-length // size)
    axis = None if window is None else masks.AxisWindow(length, window, is_causal=is_causal)

    def in_blocks(x: Array) -> Array:
        """[B, T, N, ...] -> [count, B, K, G size, ...]"""
        x = jnp.pad(x, [(0, 0), (0, count * size - length), *((0, 0),) * (x.ndim - 2)])
        x = x.reshape(x.shape[0], count, size, key_heads, group, *x.shape[3:])
        x = jnp.moveaxis(x, (1, 3, 4, 2), (0, 2, 3, 4))
        return x.reshape(*x.shape[:3], group * size, *x.shape[5:])

    def joined(x: Array) -> Array:
        x = x.reshape(*x.shape[:3], group, size, *x.shape[4:])
        x = jnp.moveaxis(x, (0, 2, 3, 4), (1, 3, 4, 2))
        return x.reshape(x.shape[0], count * size, heads, *x.shape[5:])[:, :length]

    def over(start: int, end: int) -> Any:
        """Of these blocks, each of which sees keys among `span` in a row."""
        if window is not None:
            span = min(window + size - 1, length)
        else:
            span = min(end * size, length) if is_causal else length

        @functools.partial(jax.checkpoint, prevent_cse=False)
        def block(inputs: Any) -> Any:
            number, query, *others = inputs
            of_query = number * size + jnp.tile(jnp.arange(size), group)[:, None]
            first = 0 if axis is None else jnp.minimum(axis.bounds(number * size)[0], length - span)
            of_key = (first + jnp.arange(span))[None]
            keys, values = (lax.dynamic_slice_in_dim(x, first, span, axis=2) for x in (key, value))
            if axis is not None:
                visible = axis.sees(of_query, of_key)
            else:
                visible = of_key <= of_query if is_causal else of_key < length
            return function(held_weights(scale * query, keys, values, visible), query, *others)

        return lax.map(block, (jnp.arange(start, end), *(x[start:end] for x in arrays)))

    arrays = [in_blocks(x) for x in (query, *rest)]
    stretches = sorted((*_STRETCHES, length // 512))[1] if is_causal and window is None else 1
    ends = sorted({-(-count * number // stretches) for number in range(1, stretches + 1)})
    results = [over(start, end) for start, end in zip([0, *ends], ends)]
    return jax.tree.map(lambda *leaves: joined(jnp.concatenate(leaves)), *results)


def sees_spoilt(query: Array, key: Array, value: Array, *, is_causal: bool, window: int | None) -> Array:
    """bool [B, T, N]: queries that are not finite, or see what is not."""

    def attend(query: Array, key: Array, value: Array) -> Array:
        sees: Any = {"is_causal": is_causal, "window": window}
        return by_blocks(lambda weights, _: weights.value_mean(), query, key, value, scale=1.0, **sees)

    return where_spoilt(query, key, value, attend)


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
