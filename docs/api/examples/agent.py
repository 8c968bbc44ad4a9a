# For agent_attention, pool_agents.
import jax

import attnlab

query, key, value = jax.random.normal(jax.random.key(0), (3, 2, 6, 8, 4, 16))  # [batch, Y, X, heads, head_dim]
agents = attnlab.pool_agents(query, grid=(2, 3))
out = attnlab.agent_attention(query, key, value, agents)
assert agents.shape == (2, 6, 4, 16)
assert out.shape == (2, 6, 8, 4, 16)
