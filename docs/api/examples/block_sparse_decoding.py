# For block_sparse_step, init_block_sparse_cache, prefill_block_sparse_cache.
import jax
import jax.numpy as jnp

import attnlab

query, key, value = jax.random.normal(jax.random.key(0), (3, 2, 20, 4, 16))
lists = attnlab.block_selection.pooled_blocks(query, key, query_block=2, key_block=4, count=2)
whole = attnlab.block_sparse_attention(query, key, value, lists, query_block=2, key_block=4, is_causal=True)

cache = attnlab.init_block_sparse_cache(2, 20, num_key_heads=4, head_dim=16, key_block=4, count=2)
cache = attnlab.prefill_block_sparse_cache(cache, query[:, :15], key[:, :15], value[:, :15], query_block=2)
out, cache = attnlab.block_sparse_step(cache, query[:, 15:], key[:, 15:], value[:, 15:], query_block=2)
assert jnp.allclose(out, whole[:, 15:], atol=1e-5)

# Down a tree: every head has lists of its own, and nothing but keys and values is kept.
sizes = {"key_block": 4, "count": 2, "list_heads": 4, "representative_dim": 0}
cache = attnlab.init_block_sparse_cache(2, 20, num_key_heads=4, head_dim=16, **sizes)
out, cache = attnlab.block_sparse_step(cache, query, key, value, query_block=2, rule="tree")
