# For axial_attention.
import jax

import attnlab

query, key, value = jax.random.normal(jax.random.key(0), (3, 2, 6, 8, 4, 16))  # [batch, Y, X, heads, head_dim]
rows = attnlab.axial_attention(query, key, value, axis=1)
assert rows.shape == (2, 6, 8, 4, 16)
