# For retention_log_decay, lightning_log_decay.
import jax

import attnlab

query, key, value = jax.random.normal(jax.random.key(0), (3, 2, 32, 4, 16))
retention = attnlab.retention_log_decay(num_heads=4)
lightning = attnlab.lightning_log_decay(num_heads=4, layer=0, num_layers=12, form="code")
for log_decay in (retention, lightning):
    assert attnlab.linear_attention(query, key, value, log_decay=log_decay).shape == (2, 32, 4, 16)
