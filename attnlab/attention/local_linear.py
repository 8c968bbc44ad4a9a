"""Local linear attention: a ridge regression of values on keys around every query, weighted as softmax attention.

For query t, with p_s = softmax_s(scale q_t . k_s) over the keys that it sees, kbar = sum p k and vbar = sum p v:

    minimise over b, W    sum_s p_s |v_s - b - W (k_s - q)|^2 + ridge |W|^2          out_t = b

    A = Cov_p(k, k) + ridge I        A x = q_t - kbar        out_t = vbar + Cov_p(v, k) x

Weights of out on v: p_s (1 + (k_s - kbar) . x), which sum to 1 and can be negative. ridge -> infinity gives softmax
attention; ridge -> 0 reproduces values that are an affine function of the keys. Paper: Local Linear Attention (Zuo et
al. 2025), whose uncentred solution is rho = -x / (1 + (q - kbar) . x).

Nothing of the size of T x S or T x H x H is made. Conjugate gradients take products with the covariances alone. "xla"
holds the weights of a few queries while their regressions are solved. Kernels and rings know attention, of which
covariances are derivatives: adding e x . k_s to the logits tilts the weights, so that with f(q) = (kbar, vbar)

    d/de f(scale q + e x) at e = 0    =    Cov_p(k, k) x, Cov_p(v, k) x

and a forward derivative of attention, one pass over the keys, is that product.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from attnlab.attention import dot_product, local, masks
from attnlab.attention._cached import by_row, counted, newest, put, tokens_at
from attnlab.attention._dispatch.choice import Implementations, dispatch, form_of
from attnlab.attention._dispatch.deferred import vary_alike
from attnlab.attention._dispatch.exchange import Parts, any_device, over_positions
from attnlab.attention._dispatch.primitive import primitive
from attnlab.attention._kernels import covariance
from attnlab.attention._shared.checks import (
    accumulator_dtype,
    check_bool,
    check_cached_step,
    check_float,
    check_int,
    check_position,
    check_prompt,
    check_query_key_value,
    check_sizes,
    check_type,
    default_scale,
    require,
    shape_text,
)
from attnlab.attention._shared.finite import finite_or_zero, is_spoilt, spoil, spoilt_by_weights, spoilt_tokens
from attnlab.attention._shared.heads import repeat_key_heads
from attnlab.attention._shared.softmax_weights import (
    SoftmaxWeights,
    by_blocks,
    check_window,
    dense_weights,
    held_weights,
    sees_spoilt,
    weights_of,
)
from attnlab.attention.dot_product import DotProductCache, init_dot_product_cache, prefill_dot_product_cache

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


@primitive("B*N.", "B*N.", "B*N.", "B*N", "B*N")
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
      implementation: None, "reference", "xla", "pallas_tpu" (bfloat16 or float32), or "pallas_gpu" (bfloat16 or
        float16, head dims up to 128).

    Returns:
      [B, T, N, V] in query's dtype. Solved in float32 (float64 for float64 inputs). Derivatives are those of the exact
      solution, by one more solve: none goes through the iterations.

    Raises:
      ValueError, TypeError: at trace time, naming the argument.

    Complexity of "xla", with S keys seen (T, or the window) and i iterations: O(T S (H (1 + i) + V)) time, O(T + S)
    memory.
    """
    check_query_key_value(query, key, value)
    batch, length, heads, head_dim = query.shape
    is_causal, window = check_bool("is_causal", is_causal), check_window(window, length)
    return_residuals = check_bool("return_residuals", return_residuals)
    tolerance, max_iterations = _check_solve(tolerance, max_iterations)
    ridge = _per_query(ridge, (batch, length, heads), accumulator_dtype(query, key, value))
    settings: dict[str, Any] = {"is_causal": is_causal, "window": window, "scale": default_scale(scale, head_dim)}
    settings |= {"tolerance": tolerance, "max_iterations": max_iterations}
    attend = functools.partial(dispatch, "local_linear_attention", IMPLEMENTATIONS, implementation, **settings)

    def parted(parts: Parts, query: Array, key: Array, value: Array, ridge: Array) -> Any:
        if window is None:
            return _in_ring(parts, query, key, value, ridge, implementation=implementation, **settings)
        axis = masks.AxisWindow(parts.many * query.shape[1], window, is_causal=is_causal)

        def in_stretch(query: Array, ridge: Array, key: Array, value: Array) -> Any:
            return attend(query, key, value, ridge)

        return local.in_stretches(in_stretch, axis, parts, (query, ridge), (key, value))

    results = "B*N.", LocalLinearResiduals("B*N.", "B*N.", "B*N", "B*N")  # type: ignore[arg-type]
    layouts = ("B*N.", "B*K.", "B*K.", "B*N.")
    out, residuals = over_positions(attend, parted, layouts, results, query, key, value, ridge)
    return (out, residuals) if return_residuals else out


def _check_solve(tolerance: Any, max_iterations: Any) -> tuple[float, int]:
    tolerance = check_float("tolerance", tolerance)
    require(0 < tolerance < 1, "tolerance", repr(tolerance), "need a number between 0 and 1")
    max_iterations = check_int("max_iterations", max_iterations, least=1)
    require(max_iterations < 2**31, "max_iterations", max_iterations, "need less than 2^31")
    return tolerance, max_iterations


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
    q = finite_or_zero(query).astype(dtype)
    k, v = (finite_or_zero(repeat_key_heads(x, query.shape[2])).astype(dtype) for x in (key, value))
    p = dense_weights(q, k, scale=scale, is_causal=is_causal, window=window)
    key_mean = jnp.einsum("BNTS,BSNH->BTNH", p, k)
    centred = k[:, None] - key_mean[:, :, None]  # [B, T, S, N, H]
    covariance = jnp.einsum("BNTS,BTSNH,BTSNI->BTNHI", p, centred, centred)
    # No key seen: the weights are 0, and so is the output.
    identity = jnp.eye(query.shape[-1], dtype=dtype)[None, None, None]
    matrix = covariance + ridge[..., None] * identity
    offset = q - key_mean
    solution = jnp.linalg.solve(matrix, offset[..., None])[..., 0]
    weights = p * (1 + jnp.einsum("BTSNH,BTNH->BNTS", centred, solution))
    out = jnp.einsum("BNTS,BSNV->BTNV", weights, v)
    seen = dense_weights(jnp.zeros_like(q), jnp.zeros_like(k), scale=scale, is_causal=is_causal, window=window)
    spoilt = spoilt_by_weights(seen, query, key, value)
    zeros = jnp.zeros(query.shape[:3], dtype)
    out, solution = spoil(out.astype(query.dtype), spoilt), spoil(solution, spoilt)
    return out, _residuals(solution, offset, zeros.astype(jnp.int32), zeros)


def blocked_weights(
    query: Array, key: Array, value: Array, *, scale: Any, is_causal: bool, window: int | None
) -> SoftmaxWeights:
    """By the blocked forms of dot-product and local attention."""

    def attend(query: Array, values: Array) -> Array:
        if window is None:
            blocked = form_of(dot_product.IMPLEMENTATIONS, "xla")
            return blocked(query, key, values, None, None, None, is_causal=is_causal, scale=1.0)[0]
        banded = form_of(local.IMPLEMENTATIONS, "xla")
        settings = {"window": (window,), "stride": (1,), "dilation": (1,), "is_causal": (is_causal,)}
        return banded(query, key, values, None, edge="shift", sinks=0, scale=1.0, **settings)[0]

    return weights_of(attend, scale * query.astype(accumulator_dtype(query, key)), key, value)


def _by_weights(
    weights: Callable[..., SoftmaxWeights],
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
    any_device: Callable[[Array], Array] | None = None,
) -> tuple[Array, LocalLinearResiduals]:
    """From the sums under the softmax weights: blocked_weights, or those of kernels or of a ring.

    any_device: where weights are exchanged, whether a flag is True on any of the devices that exchange them.
    """
    if isinstance(scale, jax.Array):
        query, scale = vary_alike((query, scale))
    attention = weights(query, key, value, scale=scale, is_causal=is_causal, window=window)
    dtype = accumulator_dtype(query, key, value)
    solve = _solve_with(tolerance, max_iterations, any_device)
    return _regress(attention, query.astype(dtype), ridge, solve, query.dtype)


def ring_weights(parts: Parts, implementation: str | None) -> Callable[..., SoftmaxWeights]:
    """As blocked_weights, by dot-product attention of this implementation over the keys of all parts."""

    def weights(
        query: Array, key: Array, value: Array, *, scale: Any, is_causal: bool, window: None = None
    ) -> SoftmaxWeights:
        each = functools.partial(dispatch, "dot_product_attention", dot_product.IMPLEMENTATIONS, implementation)

        def attend(query: Array, values: Array) -> Array:
            return dot_product.in_ring(each, is_causal, 1.0, parts, query, key, values)[0]

        return weights_of(attend, scale * query.astype(accumulator_dtype(query, key)), key, value)

    return weights


def _in_ring(
    parts: Parts, query: Array, key: Array, value: Array, ridge: Array, *, implementation: str | None, **settings: Any
) -> tuple[Array, LocalLinearResiduals]:
    """Each device's queries over the keys of all parts, by their finite numbers as in _xla."""
    weights = ring_weights(parts, implementation)
    q, k, v = map(finite_or_zero, (query, key, value))
    out, residuals = _by_weights(weights, q, k, v, ridge, any_device=any_device, **settings)
    tokens = spoilt_tokens(key, value, query.shape[2])
    of_parts = lax.all_gather(tokens.any(1), parts.names)  # [parts, B, N]
    counts = jnp.arange(parts.many) < parts.number() if settings["is_causal"] else jnp.ones(parts.many, bool)
    seen = (of_parts & counts[:, None, None]).any(0)[:, None]
    if settings["is_causal"]:
        seen = seen | (jnp.cumsum(tokens, axis=1) > 0)
    where = seen | is_spoilt(query)
    return _spoilt(out, residuals, where)


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
    """Block by block of queries, of finite numbers: a gradient through the solves of a query that is NaN would reach
    the keys that it sees."""
    solve = _solve_with(tolerance, max_iterations)

    def regress(attention: SoftmaxWeights, wide: Array, ridge: Array) -> tuple[Array, LocalLinearResiduals]:
        return _regress(attention, wide, ridge, solve, query.dtype)

    sees: Any = {"is_causal": is_causal, "window": window}
    q, k, v = map(finite_or_zero, (query, key, value))
    out, residuals = by_blocks(regress, q, k, v, ridge, scale=scale, **sees)
    where = sees_spoilt(query, key, value, **sees)
    return _spoilt(out, residuals, where)


def _spoilt(out: Array, residuals: LocalLinearResiduals, where: Array) -> tuple[Array, LocalLinearResiduals]:
    solution, rho = (spoil(x, where) for x in residuals[:2])
    return spoil(out, where), residuals._replace(solution=solution, rho=rho)


def _regress(
    attention: SoftmaxWeights, query: Array, ridge: Array, solve: Callable[..., Any], out_dtype: Any
) -> tuple[Array, LocalLinearResiduals]:
    """query: in the accumulator's dtype. ridge: [B, T, N, 1]. solve: _solve_with's."""
    query, ridge = vary_alike((query, ridge))
    offset = query - attention.key_mean()

    def product(x: Array) -> Array:
        return attention.key_covariance(x) + ridge * x

    solver = functools.partial(solve, attention, ridge)
    solution, (iterations, residual) = lax.custom_linear_solve(product, offset, solver, symmetric=True, has_aux=True)
    out = attention.value_mean() + attention.value_covariance(solution)
    return out.astype(out_dtype), _residuals(solution, offset, iterations, residual)


def _solve_with(
    tolerance: float, max_iterations: int, any_device: Callable[[Array], Array] | None = None
) -> Callable[..., Any]:
    """(weights, ridge, product, offset) -> (x, (steps, residual)) of product(x) = Cov_p(k, k) x + ridge x = offset."""
    settings: Any = {"tolerance": tolerance, "max_iterations": max_iterations}

    def solver(product: Callable[[Array], Array], offset: Array) -> Any:
        return _conjugate_gradients(product, offset, **settings, any_device=any_device or (lambda flag: flag))

    def solve(attention: SoftmaxWeights, ridge: Array, product: Callable[[Array], Array], offset: Array) -> Any:
        if attention.solve is None:
            return solver(product, offset)
        return attention.solve(solver, offset, ridge, **settings)

    return solve


def _conjugate_gradients(
    product: Callable[[Array], Array],
    offset: Array,
    *,
    tolerance: float,
    max_iterations: int,
    any_device: Callable[[Array], Array],
) -> tuple[Array, tuple[Array, Array]]:
    """Solves product(x) = offset [B, T, N, H], a positive definite system for each [B, T, N]; (x, (steps, residual)).

    A row that has converged is left alone; the loop ends when all have, on every device that product exchanges with.
    """

    def dot(a: Array, b: Array) -> Array:
        return jnp.sum(a * b, axis=-1, keepdims=True)

    first = dot(offset, offset)
    target = tolerance**2 * first

    def is_active(square: Array) -> Array:
        return square > target

    def unfinished(carry: Any) -> Array:
        *_, is_anyone_active, number = carry
        return is_anyone_active & (number < max_iterations)

    def step(carry: Any) -> Any:
        x, rest, direction, square, steps, _, number = carry
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
        goes_on = any_device(jnp.any(is_active(new_square)))
        return x, rest, direction, new_square, steps + active[..., 0], goes_on, number + 1

    steps = jnp.zeros_like(first[..., 0], dtype=jnp.int32)
    begins = any_device(jnp.any(is_active(first)))
    start = (jnp.zeros_like(offset), offset, offset, first, steps, begins, jnp.zeros((), jnp.int32))
    x, _, _, square, steps, _, _ = lax.while_loop(unfinished, step, start)
    return x, (steps, jnp.sqrt(square / jnp.where(first > 0, first, 1))[..., 0])


def _residuals(solution: Array, offset: Array, iterations: Array, residual: Array) -> LocalLinearResiduals:
    # 1 + (q - kbar)^T A^-1 (q - kbar) >= 1
    ratio = 1 + jnp.sum(offset * solution, axis=-1, keepdims=True)
    return LocalLinearResiduals(solution, -solution / ratio, iterations, residual)


IMPLEMENTATIONS: Implementations = {
    "reference": _reference,
    "xla": _xla,
    **covariance.kernels(_by_weights, blocked_weights),
}


def _per_query(ridge: Any, shape: tuple[int, int, int], dtype: Any) -> Array:
    """[B, T, N, 1]"""
    if isinstance(ridge, (int, float, np.generic)):
        ridge = check_float("ridge", ridge)
        require(ridge > 0, "ridge", repr(ridge), "need a number above 0")
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
    slots = max_length if window is None else check_sizes(window=window)[0]
    return init_dot_product_cache(batch, slots, num_key_heads, head_dim, value_dim=value_dim, dtype=dtype)


@primitive(like="cache")
def prefill_local_linear_cache(
    cache: DotProductCache, key: Array, value: Array, *, window: int | None = None, lengths: Array | None = None
) -> DotProductCache:
    """The cache after a prompt: what local_linear_step or parallax_step leaves of it, token by token.

    Args:
      cache: from init_local_linear_cache with the same window; without one, the prompt fits into it.
      key: [B, P, K, H], value: [B, P, K, V]. Attention over the prompt is the causal call.
      lengths: integers [B], 0 to P: the row's tokens, padding after them. None: P in all rows.
    """
    check_type("cache", cache, DotProductCache, "init_local_linear_cache")
    if _check_window(cache, window) is None:
        return prefill_dot_product_cache(cache, key, value, lengths=lengths)
    count = counted(key, check_prompt(key, value, cache.key, cache.value, lengths))
    index = newest(by_row(count), cache.key.shape[1])
    keys, values = (tokens_at(x, index).astype(old.dtype) for x, old in ((key, cache.key), (value, cache.value)))
    return DotProductCache(keys, values, count)


def _check_window(cache: DotProductCache, window: Any) -> int | None:
    slots, window = cache.key.shape[1], None if window is None else check_int("window", window, least=1)
    require(window in (None, slots), "window", window, f"the cache was made for {slots}")
    return window


@primitive("B*N.", like="cache")
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
    implementation: str | None = None,
) -> tuple[Array, DotProductCache]:
    """One more token of local_linear_attention(..., is_causal=True), in O(S (H + V)) per iteration, S keys cached.

    Args:
      cache: from init_local_linear_cache with the same window, or an earlier step.
      query, key, value: [B, 1, N, H], [B, 1, K, H], [B, 1, K, V]. ridge: a number, [], [N] or [B, 1, N]. The rest as in
        local_linear_attention.
      implementation: "xla", "pallas_tpu" or None.

    Returns:
      ([B, 1, N, V] in query's dtype, the cache with the token added). Without a window, out is NaN past max_length.
    """
    check_type("cache", cache, DotProductCache, "init_local_linear_cache")
    check_cached_step(query, key, value, cache.key, cache.value)
    dtype = accumulator_dtype(query, key, value)
    ridge = _per_query(ridge, (query.shape[0], 1, query.shape[2]), dtype)[..., 0]
    tolerance, max_iterations = _check_solve(tolerance, max_iterations)
    cache, used, fits = append(cache, key, value, window)
    arrays = (query, cache.key, cache.value, ridge, used, jnp.asarray(default_scale(scale, query.shape[-1]), dtype))
    settings = {"tolerance": tolerance, "max_iterations": max_iterations}
    out = dispatch("local_linear_step", STEP_IMPLEMENTATIONS, implementation, *arrays, **settings)
    return jnp.where(fits, out, jnp.nan), cache


def _step_xla(
    query: Array,
    key: Array,
    value: Array,
    ridge: Array,
    used: Array,
    scale: Array,
    *,
    tolerance: float,
    max_iterations: int,
) -> Array:
    wide = query.astype(scale.dtype)
    attention = cached_weights(scale * wide, key, value, used)
    wide, ridge = (x.reshape(x.shape[0], key.shape[2], -1, x.shape[-1]) for x in (wide, ridge[..., None]))
    out, _ = _regress(attention, wide, ridge, _solve_with(tolerance, max_iterations), query.dtype)
    return out.reshape(*query.shape[:3], -1)


STEP_IMPLEMENTATIONS: Implementations = {"xla": _step_xla, **covariance.STEP_KERNELS}


def append(
    cache: DotProductCache, key: Array, value: Array, window: int | None
) -> tuple[DotProductCache, Array, Array]:
    """Adds a token: (cache, how many slots are in use now, int32 [B], whether the token still fitted, bool
    [B or 1, 1, 1, 1])."""
    slots, window = cache.key.shape[1], _check_window(cache, window)
    check_position("cache.length", cache.length, key.shape[0])
    slot, count = cache.length if window is None else cache.length % slots, cache.length + 1
    cache = DotProductCache(put(cache.key, key, slot), put(cache.value, value, slot), count)
    fits = (by_row(count) <= slots) | (window is not None)
    return cache, jnp.broadcast_to(jnp.minimum(count, slots), key.shape[:1]), fits[..., None, None]


def cached_weights(query: Array, key: Array, value: Array, used: Array) -> SoftmaxWeights:
    """Of a token's scaled query [B, 1, N, H] over the first `used` slots of a cache, of arrays [B, K, G, ...]."""
    visible = jnp.arange(key.shape[1])[None] < used[:, None]
    query = query.reshape(query.shape[0], key.shape[2], -1, query.shape[-1])
    # What a caller left in other slots may be NaN.
    keys, values = (
        jnp.swapaxes(jnp.where(visible[..., None, None], x, 0), 1, 2).astype(query.dtype) for x in (key, value)
    )
    # A linear solve takes what its product closes over to vary alike already.
    query, keys, values, visible = vary_alike((query, keys, values, visible[:, None, None]))
    return held_weights(query, keys, values, visible)
