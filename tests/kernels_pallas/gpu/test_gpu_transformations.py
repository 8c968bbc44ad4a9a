"""Kernels inside jit, vmap, scan and shard_map, simulated or on a card: values and gradients are those without.

JAX differentiates no effects inside jax.checkpoint, and a simulation has some: under remat kernels are only lowered.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec

import attnlab

LENGTH = 64
CALLS = {
    "local": functools.partial(attnlab.local_attention, window=20, is_causal=True),
    "gated delta": lambda query, key, value, **options: attnlab.linear_attention(
        query, key / 8, value, log_decay=-jnp.ones((query.shape[2],)) / 9, beta=jnp.ones(query.shape[:3]) / 2, **options
    ),
    "parallax": lambda query, key, value, **options: attnlab.parallax_attention(
        query, query / 8, key, value, **options
    ),
    "routing": lambda query, key, value, **options: attnlab.routing_attention(
        query, key, value, attnlab.init_routing(jax.random.key(5), 1, 2, 64), window=32, is_causal=True, **options
    )[0],
}


def in_jit(function):
    return jax.jit(function)


def in_vmap(function):
    return jax.vmap(lambda *rows: jax.tree.map(lambda x: x[0], function(*(row[None] for row in rows))))


def in_scan(function):
    def step(carry, rows):
        return carry, jax.tree.map(lambda x: x[0], function(*(row[None] for row in rows)))

    return lambda *arrays: jax.lax.scan(step, 0, arrays)[1]


def in_shard_map(function):
    mesh = jax.make_mesh((1,), ("data",), (jax.sharding.AxisType.Auto,), devices=jax.devices()[:1])
    rows = PartitionSpec("data")
    return jax.jit(jax.shard_map(function, mesh=mesh, in_specs=rows, out_specs=rows))


@functools.cache
def arrays():
    keys = jax.random.split(jax.random.key(0), 3)
    return [jax.random.normal(key, (2, LENGTH, 1, 64), jnp.bfloat16) for key in keys]


def values_and_gradients(call):
    def run(query, key, value):
        out, pull = jax.vjp(functools.partial(call, implementation="pallas_gpu"), query, key, value)
        return out, pull(jnp.cos(value))

    return run


@pytest.mark.slow
@pytest.mark.parametrize("transformation", [in_jit, in_vmap, in_scan, in_shard_map])
@pytest.mark.parametrize("name", CALLS)
def test_a_kernel_gives_what_it_gives_without(name, transformation, on_gpu):
    function = values_and_gradients(CALLS[name])
    got, want = on_gpu(transformation(function), *arrays()), on_gpu(function, *arrays())
    for x, y in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        x, y = (np.asarray(z, np.float32) for z in (x, y))
        np.testing.assert_allclose(x, y, rtol=0, atol=1e-2 * np.abs(y).max())
