# For init_sparse_cache, sparse_cache_step.
import jax

import attnlab

query, key, value = jax.random.normal(jax.random.key(0), (3, 2, 20, 4, 16))
cache = attnlab.init_sparse_cache(2, 20, num_key_heads=4, head_dim=16, ratio=0.4)
for t in range(20):
    out, cache = attnlab.sparse_cache_step(cache, *(x[:, t : t + 1] for x in (query, key, value)), ratio=0.4)
seen = cache.rows[:, 19 % cache.rows.shape[1]] > 0
assert isinstance(cache, attnlab.SparseCache)
assert out.shape == (2, 1, 4, 16)
assert (seen.sum(-1) == 8).all()
assert seen[:, -4:].all()
