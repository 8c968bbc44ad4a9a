# For local_attention.
import jax

import attnlab

query, key, value = jax.random.normal(jax.random.key(0), (3, 2, 8, 12, 4, 16))  # [batch, Y, X, heads, head_dim]
out = attnlab.local_attention(query, key, value, window=(3, 5))
assert out.shape == (2, 8, 12, 4, 16)
