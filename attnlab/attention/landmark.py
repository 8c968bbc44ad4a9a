"""Landmark attention: a kernel between all positions by way of a few landmarks, as Nystrom's method completes a matrix.

    out = K(q, l) K(l, l)^+ K(l, k) v                       l: M landmarks

    "gaussian"   K(x, y) = exp(-scale |x - y|^2 / 2)        SOFT (Lu et al. 2021), where key = query
    "softmax"    K(x, y) = softmax of scale x . y over y    Nystromformer (Xiong et al. 2021), with one set of landmarks

    inverse      "exact"    (K(l, l) + ridge I)^-1
                 "newton"   20 steps X <- 2 X - X A X, A = K(l, l) + ridge I, from 1.8 / (r c) A^T, with r and c the
                            largest sums of a row and of a column of K(l, l)
    symmetric    D^-1/2 on both sides of the inverse, D the sums of the rows of K(l, l)

Not causal. With the queries as landmarks, key = query and no ridge, the gaussian kernel gives K(q, k) v.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import einops
import jax.numpy as jnp
from jax import lax

from attnlab.attention._dispatch.choice import Implementations, dispatch
from attnlab.attention._dispatch.exchange import Parts, as_one, given_positions, over_positions
from attnlab.attention._dispatch.primitive import primitive
from attnlab.attention._shared.checks import (
    Array,
    accumulator_dtype,
    check_array,
    check_bool,
    check_choice,
    check_float,
    check_floating,
    check_query_key_value,
    default_scale,
    require,
    shape_text,
)
from attnlab.attention._shared.finite import finite_or_zero, is_spoilt, spoil, spoilt_tokens
from attnlab.attention._shared.heads import repeat_key_heads
from attnlab.attention._shared.softmax import scaled_for_logits, softmax_parts

KERNELS, INVERSES = ("gaussian", "softmax"), ("exact", "newton")
STEPS = 20  # of "newton"


class _Options(NamedTuple):
    kernel: str
    inverse: str
    ridge: float
    symmetric: bool
    scale: Any


@primitive("B*N.")
def landmark_attention(
    query: Array,
    key: Array,
    value: Array,
    landmarks: Array,
    *,
    kernel: str = "gaussian",
    inverse: str = "exact",
    ridge: float = 0.0,
    symmetric: bool = False,
    scale: float | None = None,
    implementation: str | None = None,
) -> Array:
    """Attention by way of landmarks, not causal; the module's docstring has the formula.

    Args:
      query: [B, *space, N, H], floating, with 1 to 3 space axes of T positions together. key: [B, *space, K, H] and
        value: [B, *space, K, V], of S >= 1 positions, which may differ from the query's; K divides N.
      landmarks: [B, M, N, H], M >= 1; pooled queries, say.
      kernel: "gaussian" or "softmax".
      inverse: "exact" or "newton", which is the less exact the closer together the landmarks lie.
      ridge: >= 0, added to the diagonal before it is inverted. Landmarks that are alike need one with "exact".
      symmetric: normalise the inverse by the sums of rows.
      scale: of the squared distance or the product; None means H ** -0.5.
      implementation: None, "reference" (differences of all pairs) or "xla" (products).

    Returns:
      [B, *space, N, V] in query's dtype; computed in float32 (float64 for float64 inputs). The gradient is that of
      what is computed, of the steps with "newton".

    Raises:
      ValueError, TypeError: at trace time, naming the argument.

    Complexity of "xla", per head: O((T + S) M (H + V) + M^3) time, O((T + S) M) memory.
    """
    check_query_key_value(query, key, value, space_ranks=(1, 2, 3), same_space=False)
    require(0 not in key.shape[1:-2], "key", shape_text(key), "need at least one key")
    batch, heads, head_dim = query.shape[0], *query.shape[-2:]
    check_array("landmarks", landmarks, (batch, None, heads, head_dim), "[batch, landmarks, heads, head_dim]")
    check_floating("landmarks", landmarks)
    require(landmarks.shape[1] > 0, "landmarks", shape_text(landmarks), "need at least one landmark")
    options = _Options(
        check_choice("kernel", kernel, KERNELS),
        check_choice("inverse", inverse, INVERSES),
        check_float("ridge", ridge, least=0),
        check_bool("symmetric", symmetric),
        default_scale(scale, head_dim),
    )
    space, are_given_parts = key.shape[1:-2], given_positions() is not None

    def attend(forms: Implementations, query: Array, key: Array, value: Array, landmarks: Array) -> Array:
        flat = (einops.rearrange(x, "B ... N H -> B (...) N H") for x in (query, key, value))
        out = dispatch("landmark_attention", forms, implementation, *flat, landmarks, options=options)
        return out.reshape(*query.shape[:-1], value.shape[-1])

    def parted(parts: Parts, *arrays: Array) -> Array:
        are_whole = arrays[1].shape[1:-2] == space and not are_given_parts  # keys that the devices do not divide
        form = _xla if are_whole else functools.partial(_xla, names=parts.names)
        return attend(dict.fromkeys(IMPLEMENTATIONS, form), *arrays)

    layouts = ("B*N.", "B+K.", "B+K.", "B.N.")
    whole = functools.partial(attend, IMPLEMENTATIONS)
    return over_positions(whole, parted, layouts, "B*N.", query, key, value, landmarks)


# --- Forms ------------------------------------------------------------------------------------------------------------
# Of query [B, T, N, H], key [B, S, K, H], value [B, S, K, V] and landmarks [B, M, N, H].


def _differences(x: Array, y: Array) -> Array:
    """|x - y|^2 [B, N, X, Y] of x [B, X, N, H] and y [B, Y, N, H]."""
    return jnp.moveaxis(jnp.sum((x[:, :, None] - y[:, None]) ** 2, axis=-1), 3, 1)


def _by_products(x: Array, y: Array) -> Array:
    """The same without an array of all differences, to rounding."""
    of_x, of_y = (jnp.moveaxis(jnp.sum(z * z, axis=-1), 2, 1) for z in (x, y))
    products = jnp.einsum("BXNH,BYNH->BNXY", x, y)
    return jnp.maximum(of_x[..., None] + of_y[..., None, :] - 2 * products, 0)


def _attend(
    distances: Callable[[Array, Array], Array],
    query: Array,
    key: Array,
    value: Array,
    landmarks: Array,
    *,
    options: _Options,
    names: tuple[str, ...] = (),
) -> Array:
    """names: mesh axes over whose devices keys are shared."""
    dtype, out_dtype, heads = accumulator_dtype(query, key, value), query.dtype, query.shape[2]
    queries_spoilt = is_spoilt(query)
    spoilt = spoilt_tokens(key, value, heads).any(1) | is_spoilt(landmarks).any(1)  # [B, N]
    wide = [finite_or_zero(x).astype(dtype) for x in (query, key, value, landmarks)]
    query, middle = wide[0], wide[3]
    key, value = (repeat_key_heads(x, heads) for x in wide[1:3])

    def logits(x: Array, y: Array) -> Array:
        return jnp.einsum("BXNH,BYNH->BNXY", *scaled_for_logits(x, y, options.scale, dtype))

    def similar(x: Array, y: Array) -> Array:
        """K(x, y) [B, N, X, Y], x and y [B, X|Y, N, H], of whole positions."""
        if options.kernel == "gaussian":
            return jnp.exp(-options.scale / 2 * distances(x, y))
        numerators, denominator, _ = softmax_parts(logits(x, y))
        return numerators / denominator

    def total(x: Any) -> Any:
        return as_one(functools.partial(lax.psum, axis_name=names), x) if names else x

    values = jnp.moveaxis(value, 2, 1)
    if options.kernel == "gaussian":
        gathered, count = total((similar(middle, key) @ values, spoilt.astype(dtype)))
    else:
        of_keys = logits(middle, key)
        largest = lax.stop_gradient(jnp.max(of_keys, axis=-1, keepdims=True))
        numerators = jnp.exp(of_keys - (lax.pmax(largest, names) if names else largest))
        gathered, denominator, count = total(
            (numerators @ values, jnp.sum(numerators, axis=-1, keepdims=True), spoilt.astype(dtype))
        )
        gathered = gathered / denominator
    out = similar(query, middle) @ _inverse_times(similar(middle, middle), gathered, options)
    return spoil(jnp.moveaxis(out, 1, 2).astype(out_dtype), (count > 0)[:, None] | queries_spoilt)


def _inverse_times(kernel: Array, x: Array, options: _Options) -> Array:
    """K(l, l)^+ x, of kernel [B, N, M, M] and x [B, N, M, V]."""
    rows = jnp.sum(kernel, axis=-1, keepdims=True)
    system = kernel + options.ridge * jnp.eye(kernel.shape[-1], dtype=kernel.dtype)[None, None]
    x = x * lax.rsqrt(rows) if options.symmetric else x
    if options.inverse == "exact":
        x = jnp.linalg.solve(system, x)
    else:
        columns = jnp.sum(kernel, axis=-2, keepdims=True)
        start = 1.8 / (jnp.max(rows, axis=-2, keepdims=True) * jnp.max(columns, axis=-1, keepdims=True)) * system.mT
        inverse, _ = lax.scan(lambda y, _: (2 * y - y @ system @ y, None), start, length=STEPS)
        x = inverse @ x
    return x * lax.rsqrt(rows) if options.symmetric else x


_reference = functools.partial(_attend, _differences)
_xla = functools.partial(_attend, _by_products)
IMPLEMENTATIONS: Implementations = {"reference": _reference, "xla": _xla}
