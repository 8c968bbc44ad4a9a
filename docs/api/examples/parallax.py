# For parallax_attention, parallax_step.
import jax
import jax.numpy as jnp

import attnlab

query, probe, key, value = 0.3 * jax.random.normal(jax.random.key(0), (4, 2, 9, 4, 16))
whole = attnlab.parallax_attention(query, probe, key, value)

cache = attnlab.init_local_linear_cache(batch=2, max_length=9, num_key_heads=4, head_dim=16)
cache = attnlab.prefill_local_linear_cache(cache, key[:, :8], value[:, :8])
out, cache = attnlab.parallax_step(cache, query[:, 8:], probe[:, 8:], key[:, 8:], value[:, 8:])
assert jnp.allclose(out, whole[:, 8:], atol=1e-5)
