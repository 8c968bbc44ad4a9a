# For local_step, init_local_cache, prefill_local_cache.
import jax
import jax.numpy as jnp

import attnlab

query, key, value = jax.random.normal(jax.random.key(0), (3, 2, 9, 4, 16))
cache = attnlab.init_local_cache(2, 4, 16, window=4, sinks=1)  # batch, key heads, head_dim
cache = attnlab.prefill_local_cache(cache, key[:, :8], value[:, :8], window=4, sinks=1)
out, cache = attnlab.local_step(cache, query[:, 8:], key[:, 8:], value[:, 8:], window=4, sinks=1)

whole = attnlab.local_attention(query, key, value, window=4, sinks=1, is_causal=True)
assert jnp.allclose(out, whole[:, 8:], atol=1e-5)
