"""Every mechanism of the catalog by its GPU kernels, simulated or on a card: values and gradients against the
references."""

import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from attnlab.catalog import MECHANISMS

# Rows of mechanisms that have kernels which do not serve them: but for the softcap the TPU's refuse them too, for the
# same reason, or there are none. Of block-sparse attention see test_gpu_block_sparse.py.
REFUSED = {
    "block-sparse": "serves blocks of multiples of 128 tokens",
    "block-sparse, causal": "serves blocks of multiples of 128 tokens",
    "agent": "has no gather_bias",
    "dot_product, softcap and learned sinks": "has no softcap",
    "local, softcap and learned sinks": "has no softcap",
    "linear, not causal": "serves causal calls",
    "linear, taylor2": "serves up to 256 features and value channels, got 2145 and 65",
}


def serves(name):
    module = sys.modules[MECHANISMS[name].function.__module__]
    return "pallas_gpu" in getattr(module, "IMPLEMENTATIONS", ("pallas_gpu",)) and name not in REFUSED


# Jax 0.10 simulates a block in two seconds; each kernel has a few fast cases in a file of its own.
SERVED = [pytest.param(name, marks=pytest.mark.slow, id=name) for name in MECHANISMS if serves(name)]


def catalog_inputs(name, length):
    """In bfloat16, as floating arrays of models are."""
    arrays = MECHANISMS[name].inputs(length, batch=1, heads=2, key_heads=1, head_dim=64, value_dim=64)
    return jax.tree.map(lambda x: jnp.asarray(x, jnp.bfloat16 if np.issubdtype(x.dtype, np.floating) else None), arrays)


def values_and_gradients(name, arrays, implementation):
    mechanism = MECHANISMS[name]
    shape = jax.eval_shape(lambda: mechanism(arrays, "reference")).shape
    weights = jnp.asarray(np.random.default_rng(1).normal(size=shape), jnp.float32)

    def loss(arrays):
        out = mechanism(arrays, implementation)
        return jnp.sum(out.astype(jnp.float32) * weights), out

    return jax.grad(loss, has_aux=True, allow_int=True)(arrays)


@pytest.mark.parametrize("name", SERVED)
def test_the_catalog_s_values_and_gradients_equal_the_reference_s(name, on_gpu):
    """Within 2 % of the largest number of each array: weights and results are rounded to bfloat16. Regressions multiply
    that, 2^-9, by their condition, (largest eigenvalue of the covariance + ridge) / ridge: 16 and 18 here."""
    tolerance = 18 / 512 if "local-linear" in name else 2e-2
    arrays = catalog_inputs(name, 144)
    got = on_gpu(values_and_gradients, name, arrays, "pallas_gpu")
    want = values_and_gradients(name, jax.tree.map(lambda x: x.astype(jnp.float32), arrays), "reference")
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        a, b = np.asarray(a, np.float32), np.asarray(b, np.float32)
        np.testing.assert_allclose(a, b, rtol=0, atol=tolerance * np.abs(b).max())


@pytest.mark.parametrize("name", REFUSED)
def test_rows_that_kernels_refuse_say_so(name):
    with pytest.raises(ValueError, match=REFUSED[name]):
        jax.eval_shape(lambda arrays: MECHANISMS[name](arrays, "pallas_gpu"), catalog_inputs(name, 144))
