# For local_linear_attention, local_linear_step, init_local_linear_cache, prefill_local_linear_cache.
import jax
import jax.numpy as jnp

import attnlab

query, key, value = 0.3 * jax.random.normal(jax.random.key(0), (3, 2, 9, 4, 16))
whole = attnlab.local_linear_attention(query, key, value, ridge=1.0)

cache = attnlab.init_local_linear_cache(batch=2, max_length=9, num_key_heads=4, head_dim=16)
cache = attnlab.prefill_local_linear_cache(cache, key[:, :8], value[:, :8])
out, cache = attnlab.local_linear_step(cache, query[:, 8:], key[:, 8:], value[:, 8:], ridge=1.0)
assert jnp.allclose(out, whole[:, 8:], atol=1e-4)
