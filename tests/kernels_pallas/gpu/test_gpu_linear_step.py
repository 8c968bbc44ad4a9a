"""A token of linear attention, simulated or on a card, against float64."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import export
from marks import slow_but

import attnlab
from kernels_pallas.gpu.common import SMEM_BUDGET
from kernels_pallas.gpu.linear_step import linear_step, refusal, smem_bytes


def draw(features, value_dim, *, batch=1, heads=2, decays=False, delta=False):
    """state, query, key, value, decay, beta."""
    rng = np.random.default_rng(features)

    def normal(*shape):
        return jnp.asarray(rng.normal(size=(batch, heads, *shape)), jnp.float32)

    arrays = normal(features, value_dim), normal(features), normal(features) / features**0.5, normal(value_dim)
    decay = jnp.asarray(rng.random((batch, heads, features)), jnp.float32) if decays else None
    return *arrays, decay, jnp.asarray(rng.random((batch, heads)), jnp.float32) if delta else None


def reference(*arrays):
    state, query, key, value, decay, beta = (None if x is None else np.asarray(x, np.float64) for x in arrays)
    state = state if decay is None else decay[..., None] * state
    update = value if beta is None else beta[..., None] * (value - np.einsum("bnf,bnfv->bnv", key, state))
    state = state + key[..., None] * update[:, :, None]
    return np.einsum("bnf,bnfv->bnv", query, state), state


CASES = {  # features, width of values, options of draw
    "plain": (16, 128, {}),
    "decays": (16, 128, {"decays": True}),
    "delta": (16, 128, {"delta": True}),
    "gated delta": (16, 128, {"decays": True, "delta": True, "batch": 2}),
    "two rows side by side": (32, 64, {"decays": True, "delta": True}),
    "two rows, plain": (32, 64, {}),
    "several parts": (8, 256, {"decays": True, "delta": True, "heads": 1}),
    "odd widths": (13, 20, {"decays": True, "delta": True}),
    "a part that is not full": (11, 200, {"delta": True, "heads": 1}),
    "one feature": (1, 1, {"decays": True}),
}
QUICK = ("two rows side by side",)


@pytest.mark.parametrize("case", slow_but(QUICK, CASES))
@pytest.mark.long
def test_equals_float64(case, on_gpu):
    features, value_dim, options = CASES[case]
    arrays = draw(features, value_dim, **options)
    results = on_gpu(jax.jit(linear_step), *arrays)
    for got, want in zip(results, reference(*arrays)):
        assert got.dtype == jnp.float32
        np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-5)
    for got, again in zip(results, on_gpu(jax.jit(linear_step), *arrays)):
        np.testing.assert_array_equal(got, again)


@pytest.mark.slow
def test_under_vmap_and_scan(on_gpu):
    arrays = draw(8, 128, decays=True, delta=True)
    want = on_gpu(linear_step, *arrays)
    batched = [jnp.stack([x, x]) for x in arrays]
    many = on_gpu(jax.vmap(linear_step), *batched)
    scanned = on_gpu(lambda *args: jax.lax.scan(lambda _, x: (0, linear_step(*x)), 0, args)[1], *batched)
    for results in (many, scanned):
        for got, wanted in zip(results, want):
            np.testing.assert_array_equal(got, jnp.stack([wanted, wanted]))


@pytest.mark.parametrize("shape", [(64, 64), (128, 128), (256, 256), (80, 40)])
@pytest.mark.long
def test_is_lowered_for_a_gpu(shape):
    with jax.enable_x64(shape == (80, 40)):
        exported = export.export(jax.jit(linear_step), platforms=["cuda"])(*draw(*shape, decays=True, delta=True))
        assert b"mosaic_gpu" in exported.mlir_module_serialized


def test_a_step_on_a_gpu_is_the_kernel():
    state = attnlab.init_linear_cache(1, 2, 64)
    token = jnp.ones((1, 1, 2, 64), jnp.bfloat16)
    step = jax.jit(lambda *args: attnlab.linear_step(*args, implementation="pallas_gpu"))
    assert "linear_step" in export.export(step, platforms=["cuda"])(state, token, token, token).mlir_module()


@pytest.mark.parametrize(
    ("state", "reason"),
    [
        (jnp.zeros((1, 1, 8, 8), jnp.bfloat16), "needs a float32 state, got bfloat16"),
        (jnp.zeros((0, 1, 8, 8)), r"needs a state that is not empty, got (0, 1, 8, 8)"),
        (jnp.zeros((1, 1, 1024, 128)), "takes 514 KiB of shared memory, more than 227"),
    ],
)
def test_refuses_with_the_reason(state, reason):
    assert refusal(state) == reason
    row = jnp.zeros(state.shape[:3])
    with pytest.raises(ValueError, match="linear_step: "):
        linear_step(state, row, row, jnp.zeros((*state.shape[:2], state.shape[3])))


def test_blocks_of_usual_states_fit_into_shared_memory():
    assert all(smem_bytes(features, 128) <= SMEM_BUDGET for features in (64, 128, 256, 384))
