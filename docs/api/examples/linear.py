# For linear_attention, linear_step, init_linear_cache.
import jax
import jax.numpy as jnp

import attnlab

query, key, value = jax.random.normal(jax.random.key(0), (3, 2, 9, 4, 16))
options = {"feature_map": "elu", "normalize": True}
whole = attnlab.linear_attention(query, key, value, **options)

state = attnlab.init_linear_cache(batch=2, num_heads=4, head_dim=16, **options)
prompt = (x[:, :8] for x in (query, key, value))
_, state = attnlab.linear_attention(*prompt, initial_state=state, return_state=True, **options)
out, state = attnlab.linear_step(state, query[:, 8:], key[:, 8:], value[:, 8:], **options)
assert jnp.allclose(out, whole[:, 8:], atol=1e-5)
