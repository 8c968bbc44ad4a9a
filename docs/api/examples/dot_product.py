# For dot_product_attention.
import jax

import attnlab

query = jax.random.normal(jax.random.key(0), (2, 32, 8, 16))
key, value = jax.random.normal(jax.random.key(1), (2, 2, 32, 2, 16))  # 2 key heads for 8 query heads
out, lse = attnlab.dot_product_attention(query, key, value, is_causal=True, return_lse=True)
assert out.shape == (2, 32, 8, 16)
assert lse.shape == (2, 32, 8)
