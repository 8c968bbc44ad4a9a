# For agent_bias.
import jax.numpy as jnp

import attnlab

heads, agents, rows, columns = 4, 6, 8, 10
tables = {"an": jnp.zeros((heads, agents, 7, 7)), "na": jnp.zeros((heads, agents, 7, 7))}
lines = {
    "ah": jnp.zeros((1, heads, agents, rows, 1)),
    "aw": jnp.zeros((1, heads, agents, 1, columns)),
    "ha": jnp.zeros((1, heads, rows, 1, agents)),
    "wa": jnp.zeros((1, heads, 1, columns, agents)),
}
gather_bias, broadcast_bias = attnlab.agent_bias(**tables, **lines)
assert gather_bias.shape == (4, 6, 80)
assert broadcast_bias.shape == (4, 80, 6)
