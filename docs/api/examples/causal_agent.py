# For causal_agent_attention, agent_step, init_agent_cache.
import jax
import jax.numpy as jnp

import attnlab

query, key, value = jax.random.normal(jax.random.key(0), (3, 2, 9, 4, 16))
agents = jax.random.normal(jax.random.key(1), (5, 4, 16))  # parameters: [agents, heads, head_dim]
whole = attnlab.causal_agent_attention(query, key, value, agents)

state = attnlab.init_agent_cache(batch=2, num_heads=4, num_agents=5, value_dim=16)
prompt = (x[:, :8] for x in (query, key, value))
_, state = attnlab.causal_agent_attention(*prompt, agents, initial_state=state, return_state=True)
out, state = attnlab.agent_step(state, query[:, 8:], key[:, 8:], value[:, 8:], agents)
assert jnp.allclose(out, whole[:, 8:], atol=1e-5)
