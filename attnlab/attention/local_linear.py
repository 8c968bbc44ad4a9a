"""Local linear attention: a ridge regression of values on keys around every query, weighted as softmax attention.

For query t, with p_s = softmax_s(scale q_t . k_s) over the keys that it sees, kbar = sum p k and vbar = sum p v:

    minimise over b, W    sum_s p_s |v_s - b - W (k_s - q)|^2 + ridge |W|^2          out_t = b

    A = Cov_p(k, k) + ridge I        A x = q_t - kbar        out_t = vbar + Cov_p(v, k) x

Weights of out on v: p_s (1 + (k_s - kbar) . x), which sum to 1 and can be negative. ridge -> infinity gives softmax
attention; ridge -> 0 reproduces values that are an affine function of the keys. Paper: Local Linear Attention (Zuo et
al. 2025), whose uncentred solution is rho = -x / (1 + (q - kbar) . x).

Nothing of the size of T x S or T x H x H is made. The covariances are derivatives of softmax attention: adding
e x . k_s to the logits tilts the weights, so that with f(q) = (kbar, vbar)

    d/de f(scale q + e x) at e = 0    =    Cov_p(k, k) x, Cov_p(v, k) x

and a forward derivative of attention, one pass over the keys, is the product that conjugate gradients take.
"""

import functools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from attnlab.attention import dot_product, local, masks
from attnlab.attention._banded import banded_attention, banded_refusal
from attnlab.attention._checks import accumulator_dtype, check_query_key_value, default_scale, require, shape_text
from attnlab.attention._dispatch import Kernel, dispatch
from attnlab.attention._kernel_call import kernel_call
from attnlab.attention._softmax import softmax_parts
from attnlab.attention.dot_product import DotProductCache, check_step, dense_attention, init_dot_product_cache

Array = jax.Array


class LocalLinearResiduals(NamedTuple):
    """How the regressions were solved.

    solution: x [B, T, N, H]. rho: [B, T, N, H], the paper's. iterations: int32 [B, T, N], of conjugate gradients (0 for
    "reference"). residual: [B, T, N], |A x - (q - kbar)| / |q - kbar| as the iterations see it.
    """

    solution: Array
    rho: Array
    iterations: Array
    residual: Array


def local_linear_attention(
    query: Array,
    key: Array,
    value: Array,
    *,
    ridge: float | Array,
    is_causal: bool = True,
    window: int | None = None,
    scale: float | None = None,
    tolerance: float = 1e-6,
    max_iterations: int = 32,
    return_residuals: bool = False,
    implementation: str | None = None,
) -> Any:
    """Local linear attention; the module's docstring has the formulas. Keys of about unit length suit it best.

    Args:
      query: [B, T, N, H], floating. key: [B, T, K, H], value: [B, T, K, V]; K divides N.
      ridge: > 0, a number or an array [], [N] or [B, T, N]; in units of the keys' variance, 0.01 to 10 in the paper.
        Differentiable. Small ones ask for many iterations and for float32 inputs.
      is_causal: a query sees itself and earlier keys.
      window: it sees this many keys at most, as in local_attention. None: all.
      scale: factor on the logits; None means H ** -0.5.
      tolerance: a query's iterations stop once |A x - b| <= tolerance |b|, b = q - kbar; or after max_iterations.
      return_residuals: return (out, LocalLinearResiduals).
      implementation: None, "reference", "xla", or "pallas_tpu" (bfloat16 or float32).

    Returns:
      [B, T, N, V] in query's dtype. Solved in float32 (float64 for float64 inputs). Derivatives are those of the exact
      solution, by one more solve: none goes through the iterations.

    Raises:
      ValueError, TypeError: at trace time, naming the argument.

    Complexity of "xla", with S keys seen (T, or the window) and i iterations: O(T S (H (1 + i) + V)) time, O(T) memory.
    """
    check_query_key_value(query, key, value)
    batch, length, heads, head_dim = query.shape
    check_window(window, is_causal, length)
    require(
        isinstance(tolerance, (int, float)) and not isinstance(tolerance, bool) and 0 < tolerance < 1,
        "tolerance",
        repr(tolerance),
        "need a number between 0 and 1",
    )
    is_count = isinstance(max_iterations, int) and not isinstance(max_iterations, bool)
    require(is_count and max_iterations >= 1, "max_iterations", repr(max_iterations), "need an int of at least 1")
    out, residuals = dispatch(
        "local_linear_attention",
        IMPLEMENTATIONS,
        implementation,
        query,
        key,
        value,
        _per_query(ridge, (batch, length, heads), accumulator_dtype(query, key, value)),
        is_causal=is_causal,
        window=window,
        scale=default_scale(scale, head_dim),
        tolerance=tolerance,
        max_iterations=max_iterations,
    )
    return (out, residuals) if return_residuals else out


def _reference(
    query: Array,
    key: Array,
    value: Array,
    ridge: Array,
    *,
    is_causal: bool,
    window: int | None,
    scale: Any,
    tolerance: float,
    max_iterations: int,
) -> tuple[Array, LocalLinearResiduals]:
    dtype = accumulator_dtype(query, key, value)
    group = query.shape[2] // key.shape[2]
    q, k, v = query.astype(dtype), *(jnp.repeat(x.astype(dtype), group, axis=2) for x in (key, value))
    p = dense_weights(q, k, scale=scale, is_causal=is_causal, window=window)
    key_mean = jnp.einsum("BNTS,BSNH->BTNH", p, k)
    centred = k[:, None] - key_mean[:, :, None]  # [B, T, S, N, H]
    covariance = jnp.einsum("BNTS,BTSNH,BTSNI->BTNHI", p, centred, centred)
    # No key seen: the weights are 0, and so is the output.
    matrix = covariance + ridge[..., None] * jnp.eye(query.shape[-1], dtype=dtype)
    offset = q - key_mean
    solution = jnp.linalg.solve(matrix, offset[..., None])[..., 0]
    weights = p * (1 + jnp.einsum("BTSNH,BTNH->BNTS", centred, solution))
    out = jnp.einsum("BNTS,BSNV->BTNV", weights, v)
    zeros = jnp.zeros(query.shape[:3], dtype)
    return out.astype(query.dtype), _residuals(solution, offset, zeros.astype(jnp.int32), zeros)


def _xla(
    query: Array,
    key: Array,
    value: Array,
    ridge: Array,
    *,
    is_causal: bool,
    window: int | None,
    scale: Any,
    tolerance: float,
    max_iterations: int,
) -> tuple[Array, LocalLinearResiduals]:
    attention = blocked_attention(query, key, scale=scale, is_causal=is_causal, window=window)
    return _regress(attention, query, key, value, ridge, tolerance=tolerance, max_iterations=max_iterations)


def _regress(
    attention: "SoftmaxWeights",
    query: Array,
    key: Array,
    value: Array,
    ridge: Array,
    *,
    tolerance: float,
    max_iterations: int,
) -> tuple[Array, LocalLinearResiduals]:
    """ridge: [B, T, N, 1]."""
    dtype = accumulator_dtype(query, key, value)
    offset = query.astype(dtype) - attention.mean(key)

    def product(x: Array) -> Array:
        return attention.covariance(key, x) + ridge * x

    def solve(product: Callable[[Array], Array], offset: Array) -> tuple[Array, tuple[Array, Array]]:
        return _conjugate_gradients(product, offset, tolerance, max_iterations)

    solution, (iterations, residual) = lax.custom_linear_solve(product, offset, solve, symmetric=True, has_aux=True)
    out = attention.mean(value) + attention.covariance(value, solution)
    return out.astype(query.dtype), _residuals(solution, offset, iterations, residual)


def _conjugate_gradients(
    product: Callable[[Array], Array], offset: Array, tolerance: float, max_iterations: int
) -> tuple[Array, tuple[Array, Array]]:
    """Solves product(x) = offset [B, T, N, H], a positive definite system for each [B, T, N]; (x, (steps, residual)).

    A row that has converged is left alone; the loop ends when all have.
    """

    def dot(a: Array, b: Array) -> Array:
        return jnp.sum(a * b, axis=-1, keepdims=True)

    first = dot(offset, offset)
    target = tolerance**2 * first

    def is_active(square: Array) -> Array:
        return square > target

    def unfinished(carry: Any) -> Array:
        *_, square, _, number = carry
        return jnp.any(is_active(square)) & (number < max_iterations)

    def step(carry: Any) -> Any:
        x, rest, direction, square, steps, number = carry
        active = is_active(square)
        image = product(direction)
        curvature = dot(direction, image)
        # Rounding can make the curvature of a nearly singular system vanish; that row then stays where it is.
        moves = active & (curvature > 0)
        length = jnp.where(moves, square / jnp.where(moves, curvature, 1), 0)
        x, rest = x + length * direction, rest - length * image
        new_square = dot(rest, rest)
        turn = jnp.where(active, new_square / jnp.where(active, square, 1), 0)
        direction = jnp.where(active, rest + turn * direction, direction)
        return x, rest, direction, new_square, steps + active[..., 0], number + 1

    steps = jnp.zeros_like(first[..., 0], dtype=jnp.int32)
    start = (jnp.zeros_like(offset), offset, offset, first, steps, jnp.zeros((), jnp.int32))
    x, _, _, square, steps, _ = lax.while_loop(unfinished, step, start)
    return x, (steps, jnp.sqrt(square / jnp.where(first > 0, first, 1))[..., 0])


def _residuals(solution: Array, offset: Array, iterations: Array, residual: Array) -> LocalLinearResiduals:
    # 1 + (q - kbar)^T A^-1 (q - kbar) >= 1
    ratio = 1 + jnp.sum(offset * solution, axis=-1, keepdims=True)
    return LocalLinearResiduals(solution, -solution / ratio, iterations, residual)


def _pallas_tpu(
    query: Array,
    key: Array,
    value: Array,
    ridge: Array,
    *,
    is_causal: bool,
    window: int | None,
    scale: Any,
    tolerance: float,
    max_iterations: int,
) -> tuple[Array, LocalLinearResiduals]:
    attention = pallas_attention(query, key, scale=scale, is_causal=is_causal, window=window)
    return _regress(attention, query, key, value, ridge, tolerance=tolerance, max_iterations=max_iterations)


def _pallas_tpu_refusal(
    query: Array, key: Array, value: Array, ridge: Array, *, is_causal: bool, window: int | None, **_: Any
) -> str | None:
    return pallas_refusal(query, key, value, is_causal=is_causal, window=window)


IMPLEMENTATIONS: dict[str, Callable[..., Any] | Kernel] = {
    "reference": _reference,
    "xla": _xla,
    "pallas_tpu": Kernel(_pallas_tpu, _pallas_tpu_refusal),
}


# --- Shared with Parallax ---------------------------------------------------------------------------------------------


class SoftmaxWeights(NamedTuple):
    """Sums under the softmax weights p of a query over its keys, in the accumulator's dtype.

    mean: values [B, T, K, V] -> sum_s p_s v_s [B, T, N, V]. covariance: values, x [B, T, N, H] -> Cov_p(v, k) x.
    """

    mean: Callable[[Array], Array]
    covariance: Callable[[Array, Array], Array]


def blocked_attention(query: Array, key: Array, *, scale: Any, is_causal: bool, window: int | None) -> SoftmaxWeights:
    """By the blocked forms of dot-product and local attention."""

    def attend(query: Array, values: Array) -> Array:
        if window is None:
            blocked: Any = dot_product.IMPLEMENTATIONS["xla"]
            return blocked(query, key, values, None, None, None, is_causal=is_causal, scale=1.0)[0]
        banded: Any = local.IMPLEMENTATIONS["xla"]
        settings = {"window": (window,), "stride": (1,), "dilation": (1,), "is_causal": (is_causal,)}
        return banded(query, key, values, None, edge="shift", sinks=0, scale=1.0, **settings)[0]

    return weights_of(attend, scale * query.astype(accumulator_dtype(query, key)))


def weights_of(attend: Callable[[Array, Array], Array], query: Array) -> SoftmaxWeights:
    """attend(scaled query, values): softmax attention, whose forward derivative gives the covariance."""

    def covariance(values: Array, x: Array) -> Array:
        return jax.jvp(lambda query: attend(query, values), (query,), (x,))[1]

    return SoftmaxWeights(lambda values: attend(query, values), covariance)


def _bounds(position: np.ndarray, length: int, is_causal: bool, window: int | None) -> tuple[np.ndarray, np.ndarray]:
    """(starts, ends) of the keys that the queries at these positions see."""
    if window is None:
        return np.zeros_like(position), position + 1 if is_causal else np.full_like(position, length)
    return masks.window_bounds(position, length, window=window, stride=1, is_causal=is_causal, edge="shift")


def _pattern(length: int, is_causal: bool, window: int | None) -> Any:
    from kernels_pallas.patterns import Intervals

    return Intervals(lambda query: _bounds(query, length, is_causal, window), length, length)


def pallas_attention(query: Array, key: Array, *, scale: Any, is_causal: bool, window: int | None) -> SoftmaxWeights:
    """By the TPU kernels."""
    from kernels_pallas.tpu import banded_covariance

    pattern = _pattern(query.shape[1], is_causal, window)
    settings: Any = {"is_causal": is_causal, "window": window}

    def attend_blocked(query: Array, key: Array, value: Array, _: None, scale: Any) -> Any:
        out = blocked_attention(query, key, scale=scale, **settings).mean(value).astype(query.dtype)
        return out, jnp.zeros(query.shape[:3], jnp.float32)  # the lse's derivative is not asked for

    scale = jnp.asarray(scale, jnp.float32)
    means: list[tuple[Array, Array, Array]] = []  # (values, their mean, lse)

    def mean_and_lse(values: Array) -> tuple[Array, Array]:
        for known, mean, lse in means:
            if known is values:
                return mean, lse
        # The lse is used as a constant: that it depends on query and key is part of the covariance's own gradients.
        mean, lse = banded_attention(query, key, values, None, scale=scale, pattern=pattern, blocked=attend_blocked)
        means.append((values, mean, lax.stop_gradient(lse)))
        return mean, means[-1][2]

    def covariance_kernel(arrays: Any, fixed: Any, keep: bool) -> tuple[Any, Any]:
        *tokens, x, scale = arrays
        run: Any = functools.partial(banded_covariance.banded_covariance, pattern=pattern)
        out = run(*tokens, x, *fixed[:2], scale=scale)
        return out, out

    def covariance_gradients(arrays: Any, fixed: Any, kept: Any, cotangent: Any) -> Any:
        *tokens, x, scale = arrays
        run: Any = banded_covariance.banded_covariance_gradients
        return run(*tokens, x, *fixed, kept, cotangent, pattern=pattern, scale=scale)

    def covariance_blocked(arrays: Any, _: Any) -> Any:
        query, key, values, x, scale = arrays
        return blocked_attention(query, key, scale=scale, **settings).covariance(values, x)

    def covariance(values: Array, x: Array) -> Array:
        key_mean, lse = mean_and_lse(key)
        fixed = lax.stop_gradient((lse, key_mean, mean_and_lse(values)[0]))
        arrays = (query, key, values, x.astype(jnp.float32), scale)
        return kernel_call(covariance_kernel, covariance_gradients, covariance_blocked, arrays, fixed)

    return SoftmaxWeights(lambda values: mean_and_lse(values)[0].astype(jnp.float32), covariance)


def pallas_refusal(query: Array, key: Array, value: Array, *, is_causal: bool, window: int | None) -> str | None:
    from kernels_pallas.tpu import banded_covariance

    pattern = _pattern(query.shape[1], is_causal, window)
    for values in (key, value):
        arrays = (query, key, values)
        reason = banded_refusal(*arrays, None, pattern)
        reason = reason or banded_covariance.refusal(*arrays, pattern=pattern)
        if reason is not None:
            return reason
    return None


def dense_weights(query: Array, key: Array, *, scale: Any, is_causal: bool, window: int | None) -> Array:
    """Softmax weights [B, N, T, S] of query and key [B, T, N, H]."""
    length = query.shape[1]
    mask = masks.Mask(lambda query, key: (query[0] >= 0) & (key[0] >= 0))
    if window is not None:
        mask = masks.neighborhood((length,), window, is_causal=is_causal)
    elif is_causal:
        mask = masks.causal()
    logits = scale * jnp.einsum("BTNH,BSNH->BNTS", query, key)
    numerators, denominator, _ = softmax_parts(logits, masks.dense_mask(mask, (length,)))
    return numerators / denominator


def check_window(window: Any, is_causal: Any, length: int) -> None:
    if not isinstance(is_causal, bool):
        raise TypeError(f"is_causal: got {is_causal!r}; need a bool")
    if window is None:
        return
    require(isinstance(window, int) and not isinstance(window, bool), "window", repr(window), "need an int or None")
    require(1 <= window <= length, "window", window, f"need 1 to the length, {length}")


def _per_query(ridge: Any, shape: tuple[int, int, int], dtype: Any) -> Array:
    """[B, T, N, 1]"""
    if isinstance(ridge, (int, float)) and not isinstance(ridge, bool):
        require(0 < ridge < math.inf, "ridge", ridge, "need a number above 0")
    elif not (hasattr(ridge, "shape") and hasattr(ridge, "dtype") and jnp.issubdtype(ridge.dtype, jnp.floating)):
        raise TypeError(f"ridge: got {type(ridge).__name__}; need a number or a floating array [], [N] or [B, T, N]")
    ridge = jnp.asarray(ridge, dtype)
    require(
        ridge.shape in ((), shape[2:], shape),
        "ridge",
        shape_text(ridge),
        f"need [], [N] = {shape[2:]} or {list(shape)}",
    )
    return jnp.broadcast_to(ridge, shape)[..., None]


# --- Decoding ---------------------------------------------------------------------------------------------------------


def init_local_linear_cache(
    batch: int,
    max_length: int,
    num_key_heads: int,
    head_dim: int,
    *,
    window: int | None = None,
    value_dim: int | None = None,
    dtype: Any = jnp.float32,
) -> DotProductCache:
    """An empty cache for causal decoding of local linear attention or Parallax, of at most max_length tokens; with a
    window it keeps that many, and decodes any number."""
    require(window is None or window >= 1, "window", window, "need at least 1")
    slots = max_length if window is None else window
    return init_dot_product_cache(batch, slots, num_key_heads, head_dim, value_dim=value_dim, dtype=dtype)


def local_linear_step(
    cache: DotProductCache,
    query: Array,
    key: Array,
    value: Array,
    *,
    ridge: float | Array,
    window: int | None = None,
    scale: float | None = None,
    tolerance: float = 1e-6,
    max_iterations: int = 32,
) -> tuple[Array, DotProductCache]:
    """One more token of local_linear_attention(..., is_causal=True), in O(S (H + V)) an iteration with S keys cached.

    Args:
      cache: from init_local_linear_cache with the same window, or an earlier step.
      query, key, value: [B, 1, N, H], [B, 1, K, H], [B, 1, K, V]. ridge: a number, [], [N] or [B, 1, N]. The rest as in
        local_linear_attention.

    Returns:
      ([B, 1, N, V] in query's dtype, the cache with the token added). Without a window, out is NaN past max_length.
    """
    check_step(query, key, value, cache.key, cache.value)
    wide = query.astype(accumulator_dtype(query, key, value))
    cache, attention, fits = append(cache, default_scale(scale, query.shape[-1]) * wide, key, value, window)
    out, _ = _regress(
        attention,
        query,
        cache.key,
        cache.value,
        _per_query(ridge, (query.shape[0], 1, query.shape[2]), wide.dtype),
        tolerance=tolerance,
        max_iterations=max_iterations,
    )
    return jnp.where(fits, out, jnp.nan), cache


def append(
    cache: DotProductCache, query: Array, key: Array, value: Array, window: int | None
) -> tuple[DotProductCache, SoftmaxWeights, Array]:
    """Adds a token: (cache, weights of the scaled query over the keys cached now, whether the token still fitted)."""
    slots = cache.key.shape[1]
    require(window in (None, slots), "window", window, f"the cache was made for {slots}")
    place = cache.length if window is None else cache.length % slots

    def store(old: Array, new: Array) -> Array:
        return lax.dynamic_update_slice(old, new.astype(old.dtype), (0, place, 0, 0))

    cache = DotProductCache(store(cache.key, key), store(cache.value, value), cache.length + 1)
    visible = jnp.arange(slots) < cache.length

    def attend(query: Array, values: Array) -> Array:
        return dense_attention(query, cache.key, values, visible=visible, scale=1.0)[0]

    return cache, weights_of(attend, query), (cache.length <= slots) | (window is not None)
