"""Sizes of blocks: who chooses them, and that results do not depend on them."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from attnlab import dot_product_attention, linear_attention
from kernels_pallas.gpu import blocks, target

KERNEL, FITTING = ("banded_flash_attention", (64, 64, 0)), [(128, 4), (128, 2), (64, 2)]


def test_the_first_are_taken_unless_the_table_has_others_that_fit(monkeypatch):
    assert blocks.chosen(*KERNEL, FITTING) == (128, 4)
    monkeypatch.setattr(target, "device_kind", lambda: "a card")
    monkeypatch.setattr(blocks, "FROZEN", {"a card": {KERNEL: (64, 2)}, "another": {KERNEL: (128, 2)}})
    assert blocks.chosen(*KERNEL, FITTING) == (64, 2)
    assert blocks.chosen(*KERNEL, FITTING[:2]) == (128, 4)
    with blocks.trying({KERNEL: (128, 2)}), blocks.noting() as noted:
        assert blocks.chosen(*KERNEL, FITTING) == (128, 2)
    assert noted == {KERNEL: FITTING}
    with blocks.trying({}):
        assert blocks.chosen(*KERNEL, FITTING) == (128, 4)


def flash(query, key, value):
    return dot_product_attention(query, key, value, is_causal=True, implementation="pallas_gpu")


def gated_delta(query, key, value):
    key = key / jnp.linalg.norm(key.astype(jnp.float32), axis=-1, keepdims=True)
    gates = jnp.full(query.shape[:3], -0.1), jnp.full(query.shape[:3], 0.5)
    log_decay, beta = gates
    arrays = query, key.astype(query.dtype), value
    return linear_attention(*arrays, log_decay=log_decay, beta=beta, implementation="pallas_gpu")


@pytest.mark.slow
@pytest.mark.parametrize("attend", [flash, gated_delta])
def test_results_do_not_depend_on_the_sizes(attend, on_gpu):
    """Steps of more keys add up in another order; slots change nothing at all."""
    rng = np.random.default_rng(0)
    arrays = [jnp.asarray(rng.normal(size=(1, 200, 1, 64)), jnp.bfloat16) for _ in range(3)]

    def run(sizes):
        jax.clear_caches()
        with blocks.trying(sizes), blocks.noting() as noted:
            gradients = jax.grad(lambda arrays: jnp.sum(attend(*arrays).astype(jnp.float32) ** 2))
            results = on_gpu(jax.jit(lambda arrays: (attend(*arrays), gradients(arrays))), arrays)
        return [np.asarray(x, np.float32) for x in jax.tree.leaves(results)], noted

    want, choices = run({})
    assert len(choices) == (3 if attend is flash else 2)
    for kernel, fitting in choices.items():
        for sizes in fitting[1:]:
            got, _ = run({kernel: sizes})
            is_same_order = len(sizes) == 1 or sizes[0] == fitting[0][0]
            for a, b in zip(got, want, strict=True):
                np.testing.assert_allclose(a, b, rtol=0, atol=0 if is_same_order else 2e-2 * np.abs(b).max())
    jax.clear_caches()
