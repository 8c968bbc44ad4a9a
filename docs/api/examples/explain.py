# For explain.
import jax

import attnlab

query, key, value = jax.random.normal(jax.random.key(0), (3, 2, 32, 4, 16))
for choice in attnlab.explain(attnlab.local_attention, query, key, value, window=8):
    print(choice)
    assert choice.by_platform["elsewhere"] == "xla"
