"""Calls whose positions devices share, beside one device: what tests of parts, and of a mechanism, check them by."""

import collections
import re
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from attnlab import positions_over

SHARED, WHOLE = P(None, "context"), P()
COUNTED = r" (all-gather|all-reduce|all-to-all|collective-permute|reduce-scatter)(?:-start)?\("


def normal(*shape, seed=0):
    return np.random.default_rng((seed, *shape)).standard_normal(shape, np.float32)


def qkv(*space, heads=4, key_heads=2, keys=None, batch=2, spoilt=False):
    """spoilt: a key and a query are not finite."""
    keys = keys or space
    arrays = {
        "query": normal(batch, *space, heads, 8, seed=1),
        "key": normal(batch, *keys, key_heads, 8, seed=2),
        "value": normal(batch, *keys, key_heads, 6, seed=3),
    }
    if spoilt:
        arrays["key"][1, keys[0] // 2, ..., 1, 3] = np.nan
        arrays["query"][0, 3, ..., 2, 0] = np.inf
    return arrays


class Case(NamedTuple):
    """exchanged: the collectives of the forward, of 8 devices. specs: of arrays that are not shared on axis 1."""

    call: Any
    arrays: dict[str, Any]
    exchanged: dict[str, int]
    specs: dict[str, P] = {}  # noqa: RUF012
    results: Any = SHARED


def with_gradients(call):
    """arrays -> (results, gradients of a weighted sum of what is finite in them)."""

    def loss(floating, arrays):
        results = call(**arrays | floating)
        weighted = (
            jnp.sum(jnp.where(jnp.isfinite(x), x, 0) * normal(*x.shape, seed=9)) for x in jax.tree.leaves(results)
        )
        return sum(weighted), results

    def run(arrays):
        floating = {name: x for name, x in arrays.items() if jax.tree.leaves(x)[0].dtype == np.float32}
        gradients, results = jax.grad(loss, has_aux=True)(floating, arrays)
        return results, gradients

    return run


def mesh_of(count, kind=AxisType.Auto):
    return jax.make_mesh((count,), ("context",), axis_types=(kind,), devices=jax.devices()[:count])


def specs_of(case):
    return {name: case.specs.get(name, SHARED) for name in case.arrays}


def placed(case, mesh):
    specs = specs_of(case)
    return {name: jax.device_put(x, NamedSharding(mesh, specs[name])) for name, x in case.arrays.items()}


def collectives(call, arrays):
    text = jax.jit(lambda arrays: call(**arrays)).lower(arrays).compile().as_text()
    return dict(collections.Counter(re.findall(COUNTED, text)))


def assert_alike(got, want):
    """To 2e-5 of the largest number, and not finite alike."""

    def alike(x, y):
        size = max(1, np.abs(y, where=np.isfinite(y), out=np.zeros_like(y)).max())
        np.testing.assert_allclose(x, y, rtol=0, atol=2e-5 * size)

    jax.tree.map(alike, got, jax.tree.map(np.asarray, want))


def mapped(case, mesh, check_vma):
    """The call as another project's jax.shard_map has it."""

    def own_part(arrays):
        with positions_over("context"):
            return case.call(**arrays)

    own = jax.shard_map(own_part, mesh=mesh, in_specs=(specs_of(case),), out_specs=case.results, check_vma=check_vma)
    return lambda **arrays: own(arrays)


def assert_equals_one_device(case):
    """On eight devices, in shard_map too: values and gradients, by these exchanges."""
    want, mesh = jax.jit(with_gradients(case.call))(case.arrays), mesh_of(8)
    assert_equals_by_exchanges(case, want)
    got = jax.jit(with_gradients(mapped(case, mesh, check_vma=True)))(placed(case, mesh))
    assert_alike(got, want)


def assert_equals_by_exchanges(case, want):
    """On eight devices that a call sees as one. want: results and gradients of one device."""
    mesh = mesh_of(8)
    arrays = placed(case, mesh)
    with jax.set_mesh(mesh):
        got = jax.jit(with_gradients(case.call))(arrays)
        assert collectives(case.call, arrays) == case.exchanged
    assert_alike(got, want)
    assert all(np.isfinite(x).all() for x in jax.tree.leaves(got[1]))
