# For positions_over.
import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

import attnlab

query, key, value = jax.random.normal(jax.random.key(0), (3, 2, 32, 4, 16))


def attend(query, key, value):
    with attnlab.positions_over("context"):
        return attnlab.local_attention(query, key, value, window=8, is_causal=True)


mesh = jax.make_mesh((len(jax.devices()),), ("context",))
parts = jax.shard_map(attend, mesh=mesh, in_specs=P(None, "context"), out_specs=P(None, "context"))
shared = jax.device_put((query, key, value), NamedSharding(mesh, P(None, "context")))
whole = attnlab.local_attention(query, key, value, window=8, is_causal=True)
assert jnp.allclose(jax.jit(parts)(*shared), whole, atol=1e-5)
