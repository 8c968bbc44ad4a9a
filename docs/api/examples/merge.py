# For merge_attention.
import jax
import jax.numpy as jnp

import attnlab

query, key, value = jax.random.normal(jax.random.key(0), (3, 2, 16, 4, 16))
halves = [(key[:, :8], value[:, :8]), (key[:, 8:], value[:, 8:])]
parts = [attnlab.dot_product_attention(query, *half, return_lse=True) for half in halves]
out, lse = attnlab.merge_attention(*zip(*parts))
assert jnp.allclose(out, attnlab.dot_product_attention(query, key, value), atol=1e-5)
