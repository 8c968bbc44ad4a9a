# For routing_attention, init_routing, fit_routing, update_routing.
import jax

import attnlab

query, key, value = jax.random.normal(jax.random.key(0), (3, 2, 32, 4, 16))
state = attnlab.init_routing(jax.random.key(1), num_heads=4, num_clusters=4, head_dim=16)
state = attnlab.fit_routing(query, state)  # once, of the first batch
out, aux = attnlab.routing_attention(query, key, value, state, window=8, is_causal=True)
state = attnlab.update_routing(state, aux.statistics)  # after every batch of training
assert out.shape == (2, 32, 4, 16)
assert aux.loss.shape == ()
