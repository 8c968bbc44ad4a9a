"""Prompts of several lengths, and the check that reading them leaves the cache that steps leave."""

import jax
import jax.numpy as jnp
import numpy as np

TOKENS, LENGTHS = 11, np.array([11, 0, 1, 6], np.int32)
BATCH, HEADS, KEY_HEADS, HEAD_DIM, VALUE_DIM = len(LENGTHS), 4, 2, 4, 3
_rng = np.random.default_rng(0)


def normal(*shape):
    return _rng.normal(size=shape)


ARRAYS = {
    "query": normal(BATCH, TOKENS, HEADS, HEAD_DIM),
    "key": normal(BATCH, TOKENS, KEY_HEADS, HEAD_DIM),
    "value": normal(BATCH, TOKENS, KEY_HEADS, VALUE_DIM),
}


def assert_leaves_what_steps_leave(cache, fill, step, arrays, *, tolerance_of_copies=0):
    """fill(cache, **arrays, lengths=) -> the cache, or (out, state). step(cache, **arrays of a token) -> (out, cache).
    arrays [BATCH, TOKENS, ...] by name. tolerance_of_copies: of what keys and values go into, where it is products of
    them. In float64, where jax_enable_x64 is set."""

    @jax.jit
    def by_steps(cache, arrays):
        def token(cache, now):
            out, cache = step(cache, **jax.tree.map(lambda x: x[:, None], now))
            return cache, (out[:, 0], cache)

        _, (outs, caches) = jax.lax.scan(token, cache, jax.tree.map(lambda x: jnp.moveaxis(x, 1, 0), arrays))
        return outs, jax.tree.map(lambda first, later: jnp.concatenate([first[None], later]), cache, caches)

    outs, caches = by_steps(cache, arrays)
    padding = np.arange(TOKENS)[None] >= LENGTHS[:, None]
    spoilt = jax.tree.map(lambda x: np.where(padding.reshape(*padding.shape, *(1,) * (x.ndim - 2)), np.nan, x), arrays)
    for lengths in (LENGTHS, None):
        result = jax.jit(fill)(cache, **(arrays if lengths is None else spoilt), lengths=lengths)
        counts = np.full(BATCH, TOKENS) if lengths is None else lengths
        out, got = (None, result) if hasattr(result, "_fields") else result

        def after(leaf, counts=counts):
            return leaf[counts, np.arange(BATCH)] if leaf.ndim > 1 else leaf[counts]

        # What keys and values are copied into equals, bit for bit; of a state's row without tokens, see below.
        tolerance, rows = (tolerance_of_copies, slice(None)) if out is None else (1e-12, counts > 0)
        for x, y in zip(jax.tree.leaves(got), jax.tree.leaves(jax.tree.map(after, caches)), strict=True):
            assert x.dtype == y.dtype
            x = np.broadcast_to(x, y.shape)  # a count for all rows
            np.testing.assert_allclose(x[rows], y[rows], rtol=tolerance, atol=tolerance)
        for row, count in enumerate(counts if out is not None else ()):
            np.testing.assert_allclose(out[row, :count], outs[:count, row], rtol=1e-12, atol=1e-12)
