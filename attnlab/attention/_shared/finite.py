"""NaN and infinities of a token, which reach the positions that see the token and nothing else.

That a weight is 0 does not stop them, as 0 * NaN is NaN. So a call computes with zeros in their place, and what they
reach is made NaN afterwards.
"""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from attnlab.attention._dispatch.deferred import vary_alike
from attnlab.attention._shared.heads import repeat_key_heads

Array = jax.Array


def is_spoilt(x: Array) -> Array:
    """[..., H] -> bool [...]: whether a channel is NaN or infinite."""
    return ~jnp.isfinite(x).all(-1)


def spoilt_tokens(key: Array, value: Array, heads: int) -> Array:
    """[B, T, K, H|V] -> bool [B, T, N]: whether a token's key or value is not finite, for each of N query heads."""
    return repeat_key_heads((is_spoilt(key) | is_spoilt(value))[..., None], heads)[..., 0]


def state_is_spoilt(state: Any) -> Array:
    """A pytree of [B, N, ...] -> bool [B, N]."""
    # Most states are zeros, which XLA would look through one by one while it compiles: seconds, for a large batch.
    leaves = jax.lax.optimization_barrier(jax.lax.stop_gradient(jax.tree.leaves(state)))
    return functools.reduce(jnp.logical_or, (is_spoilt(x.reshape(*x.shape[:2], -1)) for x in leaves))


def finite_or_zero(x: Array) -> Array:
    """x with zeros for NaN and infinities."""
    return jnp.where(jnp.isfinite(x), x, 0)


def infinite_as_nan(x: Array) -> Array:
    """x with NaN for infinities, which a tanh of products would take for 1."""
    return jnp.where(jnp.isfinite(x), x, jnp.nan)


def spoil(x: Array, where: Array) -> Array:
    """x [*S, ...] made NaN where bool [*S] says so. Gradients are those of x."""
    return x + jnp.where(where, jnp.nan, 0).astype(x.dtype).reshape(where.shape + (1,) * (x.ndim - where.ndim))


def spoilt_by_weights(weights: Array, query: Array, key: Array, value: Array) -> Array:
    """bool [B, T, N]: queries that are not finite, or see what is not. weights: [B, N, T, S], above 0 where a key is
    seen: those of logits of 0, as a softmax may leave 0 of a key that is seen."""
    tokens = spoilt_tokens(key, value, query.shape[2])
    reached = jnp.einsum("BNTS,BSN->BTN", jax.lax.stop_gradient(weights), tokens.astype(weights.dtype))
    return (reached > 0) | is_spoilt(query)


def are_finite(*arrays: Array) -> Array:
    """bool []: whether they have neither NaN nor infinities, for less than it takes to look for these one by one."""
    zeros = [(jax.lax.stop_gradient(x) * 0).sum() for x in arrays]  # NaN * 0 and infinity * 0 are NaN
    return functools.reduce(jnp.add, zeros) == 0


def where_spoilt(query: Array, key: Array, value: Array, attend: Callable[[Array, Array, Array], Array]) -> Array:
    """bool [B, *T, N]: queries that are not finite, or see what is not.

    attend: (query, key, value) -> out [B, *T, N, V]. It is asked, if anything is not finite, for logits of 0 and a
      value of one channel.
    """

    def seen() -> Array:
        tokens = (is_spoilt(key) | is_spoilt(value))[..., None].astype(value.dtype)
        return (attend(jnp.zeros_like(query), jnp.zeros_like(key), tokens)[..., 0] > 0) | is_spoilt(query)

    return jax.lax.cond(are_finite(query, key, value), lambda: jnp.zeros_like(query[..., 0], bool), seen)


def spoiling(form: Callable[..., tuple[Array, Array]]) -> Callable[..., tuple[Array, Array]]:
    """A form (query, key, value, ...) -> (out [B, *T, N, V], lse [B, *T, N]) in which what is not finite reaches the
    queries that see it, and the query that holds it."""

    @functools.wraps(form)
    def call(query: Array, key: Array, value: Array, *rest: Any, **options: Any) -> tuple[Array, Array]:
        out, lse = form(*map(finite_or_zero, (query, key, value)), *rest, **options)
        where = where_spoilt(query, key, value, lambda *arrays: form(*arrays, *rest, **options)[0])
        return spoil(out, where), spoil(lse, where)

    return call


def spoil_if_any(x: Array, spoilt: Array, seen: Callable[[], Array]) -> Array:
    """spoil(x, seen()), where the second is computed only if any token is spoilt."""
    where = jax.lax.cond(spoilt.any(), seen, lambda: jnp.zeros_like(x[..., 0], bool))
    return spoil(x, where)


def spoilt_since(spoilt: Array, starts: Array, before: Array) -> Array:
    """bool [B, T, N]: whether a token at or before this one is spoilt, of those since the last start.

    spoilt, starts: bool [B, T, N]; a start forgets the tokens before it. before: bool [B, N], of the tokens before the
    first. O(T) steps, which are taken only if any of them is.
    """

    def step(seen: Array, now: tuple[Array, Array]) -> tuple[Array, Array]:
        spoilt, start = now
        seen = (seen & ~start) | spoilt
        return seen, seen

    def by_token(spoilt: Array, starts: Array, before: Array) -> Array:
        _, seen = jax.lax.scan(step, before, (jnp.moveaxis(spoilt, 1, 0), jnp.moveaxis(starts, 1, 0)))
        return jnp.moveaxis(seen, 0, 1)

    def none(spoilt: Any, *_: Any) -> Array:
        return jnp.zeros_like(spoilt)

    spoilt, starts, before = vary_alike((spoilt, starts, before))
    return jax.lax.cond(spoilt.any() | before.any(), by_token, none, spoilt, starts, before)
