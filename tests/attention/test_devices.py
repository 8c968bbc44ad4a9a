"""Mechanisms over several devices of a CPU."""

import os
import subprocess
import sys

import pytest

# Every delta rule's output and gradients with the batch over all devices, beside one device's.
_DELTA_RULES = """
import sys, jax, jax.numpy as jnp, numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from attnlab.catalog import MECHANISMS

sharding = NamedSharding(Mesh(np.array(jax.devices()), ("data",)), PartitionSpec("data"))
for name in sys.argv[1:]:
    mechanism = MECHANISMS[name]
    arrays = mechanism.inputs(512, batch=8, heads=8, head_dim=16, value_dim=16)
    arrays["key"] /= np.linalg.norm(arrays["key"], axis=-1, keepdims=True)  # so that rounding does not grow
    arrays["beta"] /= arrays["beta"].max()

    def loss(arrays):
        out = mechanism(arrays)
        return jnp.sum(out**2), out

    run = jax.jit(jax.grad(loss, has_aux=True))
    got, want = run(jax.device_put(arrays, sharding)), run(arrays)
    assert len(got[0]["query"].sharding.device_set) == len(jax.devices())
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        np.testing.assert_allclose(a, b, rtol=0, atol=2e-5 * max(1, np.abs(b).max()))
    print(name)
"""


@pytest.mark.slow
@pytest.mark.parametrize("count", [2, 8])
@pytest.mark.parametrize("name", ["linear, gated delta rule", "linear, delta rule"])
def test_delta_rules_return_where_their_batch_is_sharded(name, count):
    """LAPACK's triangular solve never did, with jax 0.10.2: it waits for a thread of the pool that it runs in. The
    size of that pool depends on how many devices a process has, so each runs in a process of its own."""
    flags = os.environ["XLA_FLAGS"].replace("device_count=8", f"device_count={count}")
    command = [sys.executable, "-c", _DELTA_RULES, name]
    done = subprocess.run(
        command, env={**os.environ, "XLA_FLAGS": flags}, capture_output=True, text=True, timeout=300, check=False
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout == f"{name}\n"
