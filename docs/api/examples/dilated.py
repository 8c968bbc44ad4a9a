# For dilated_attention, dilated_step, init_dilated_cache, prefill_dilated_cache.
import jax
import jax.numpy as jnp

import attnlab

query, key, value = jax.random.normal(jax.random.key(0), (3, 2, 17, 4, 16))
whole = attnlab.dilated_attention(query, key, value, window=4, dilation=3, is_causal=True)

cache = attnlab.init_dilated_cache(2, 4, 16, window=4, dilation=3)  # batch, key heads, head_dim
cache = attnlab.prefill_dilated_cache(cache, key[:, :16], value[:, :16], dilation=3)
out, cache = attnlab.dilated_step(cache, query[:, 16:], key[:, 16:], value[:, 16:], window=4, dilation=3)
assert jnp.allclose(out, whole[:, 16:], atol=1e-5)
