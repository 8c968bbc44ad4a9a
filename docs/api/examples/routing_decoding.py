# For routing_step, init_routing_cache, prefill_routing_cache.
import jax
import jax.numpy as jnp

import attnlab

query, key, value = jax.random.normal(jax.random.key(0), (3, 2, 9, 4, 16))
state = attnlab.init_routing(jax.random.key(1), num_heads=4, num_clusters=3, head_dim=16)
whole, _ = attnlab.routing_attention(query, key, value, state, window=4, is_causal=True)

cache = attnlab.init_routing_cache(batch=2, num_heads=4, num_clusters=3, head_dim=16, window=4)
cache = attnlab.prefill_routing_cache(cache, query[:, :8], key[:, :8], value[:, :8], state)
out, cache = attnlab.routing_step(cache, query[:, 8:], key[:, 8:], value[:, 8:], state)
assert jnp.allclose(out, whole[:, 8:], atol=1e-5)
