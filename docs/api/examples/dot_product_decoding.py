# For dot_product_step, init_dot_product_cache, prefill_dot_product_cache.
import jax
import jax.numpy as jnp

import attnlab

query, key, value = jax.random.normal(jax.random.key(0), (3, 2, 9, 4, 16))
cache = attnlab.init_dot_product_cache(batch=2, max_length=16, num_key_heads=4, head_dim=16)
cache = attnlab.prefill_dot_product_cache(cache, key[:, :8], value[:, :8])  # the prompt, at once
out, cache = attnlab.dot_product_step(cache, query[:, 8:], key[:, 8:], value[:, 8:])

whole = attnlab.dot_product_attention(query, key, value, is_causal=True)
assert jnp.allclose(out, whole[:, 8:], atol=1e-5)
