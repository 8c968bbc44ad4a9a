"""A share of a cache: the vectors, what it is at ratio 1, what NaN reaches, and rows of their own lengths."""

import functools
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import attnlab as A

VECTORS = Path(__file__).parents[1] / "vectors" / "compositions" / "sparse_cache.npz"


def decode(query, key, value, ratio, dtype):
    """out [B, T, N, V] and the cache, by steps."""
    cache = A.init_sparse_cache(
        len(key), key.shape[1], *key.shape[2:], ratio=ratio, value_dim=value.shape[-1], dtype=dtype
    )

    def step(cache, token):
        out, cache = A.sparse_cache_step(cache, *(x[:, None] for x in token), ratio=ratio)
        return cache, (out[:, 0], cache.rows)

    tokens = tuple(jnp.moveaxis(x, 1, 0) for x in (query, key, value))
    cache, (out, rows) = jax.lax.scan(step, cache, tokens)
    return jnp.moveaxis(out, 0, 1), rows, cache


def test_vectors_of_a_share_of_the_cache():
    data = np.load(VECTORS)
    with jax.enable_x64(True):
        run = jax.jit(functools.partial(decode, ratio=data["ratio"].item(), dtype=np.float64))
        out, rows, _ = jax.tree.map(np.asarray, run(*(data[name] for name in ("query", "key", "value"))))
    np.testing.assert_allclose(out, data["out"], atol=1e-12)
    kept = rows.shape[2]
    for t in range(len(rows)):
        np.testing.assert_allclose(rows[t, :, t % kept], data["rows"][:, t], atol=1e-12)
        np.testing.assert_array_equal(rows[t, :, t % kept] > 0, data["visible"][:, t])


LENGTH = 9
ARRAYS = np.random.default_rng(0).normal(size=(3, 2, LENGTH, 2, 4)).astype(np.float32)


@functools.cache
def program():
    return jax.jit(functools.partial(decode, ratio=1.0, dtype=np.float32))


def test_all_keys_are_seen_at_ratio_1_where_their_number_is_even():
    out, *_ = program()(*ARRAYS)
    want = A.dot_product_attention(*ARRAYS, is_causal=True)
    np.testing.assert_allclose(out[:, 1::2], want[:, 1::2], atol=1e-5)
    assert np.abs(out - want)[:, 2::2].max() > 1e-3


def test_a_key_that_is_not_finite_reaches_who_sees_it_alone():
    want, rows, _ = program()(*ARRAYS)
    broken = ARRAYS.copy()
    broken[1, 0, 4, 0, 0] = np.nan
    out, after, _ = program()(*broken)
    seen = np.array([rows[t, 0, t % rows.shape[2], 4] > 0 for t in range(LENGTH)])
    assert seen[4]
    np.testing.assert_array_equal(np.isnan(out[0, :5, 0]).all(-1), seen[:5])
    np.testing.assert_array_equal(out[1], want[1])
    np.testing.assert_array_equal(out[0, :4], want[0, :4])
    assert np.isfinite(after).all()


def test_rows_may_have_lengths_of_their_own_and_a_token_past_the_last_is_nan():
    _, _, cache = program()(*ARRAYS)
    token = ARRAYS[:, :, :1]
    past, _ = A.sparse_cache_step(cache, *token, ratio=1.0)
    assert np.isnan(past).all()
    out, by_row = A.sparse_cache_step(cache._replace(length=jnp.array([6, 3], jnp.int32)), *token, ratio=1.0)
    np.testing.assert_array_equal(by_row.length, [7, 4])
    for row, length in enumerate((6, 3)):
        alone, _ = A.sparse_cache_step(cache._replace(length=jnp.asarray(length, jnp.int32)), *token, ratio=1.0)
        np.testing.assert_allclose(out[row], alone[row], atol=1e-6)


def test_the_ratio_is_the_cache_s():
    cache = A.init_sparse_cache(2, 9, 2, 4, ratio=0.5)
    with pytest.raises(ValueError, match=r"ratio: got 1\.0; the cache was made for another: it keeps 2 steps' weights"):
        A.sparse_cache_step(cache, *ARRAYS[:, :, :1], ratio=1.0)
