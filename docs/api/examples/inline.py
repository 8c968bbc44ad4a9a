# For inline_attention.
import jax

import attnlab

query, key, value = jax.random.normal(jax.random.key(0), (3, 2, 6, 8, 4, 16))  # [batch, Y, X, heads, head_dim]
assert attnlab.inline_attention(query, key, value).shape == (2, 6, 8, 4, 16)
