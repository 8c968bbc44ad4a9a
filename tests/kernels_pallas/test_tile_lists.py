"""Lists of tiles in the TPU's banded flash kernels, in interpret mode: block-sparse attention and masks."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from attnlab import block_sparse_attention, dot_product_attention, masks
from attnlab.attention._kernels import dot_product
from kernels_pallas.aot.compile import TOPOLOGIES, compile_for_tpu
from kernels_pallas.tpu import band

# Tokens, block sizes, (rows, key heads) of the lists, query heads of a key head, options.
CASES = {
    "causal": (256, (128, 128), (2, 2), 2, {"is_causal": True}),
    "cut short": (290, (128, 128), (2, 1), 4, {}),
    "the same for the batch": (260, (128, 128), (1, 2), 2, {}),
    "the same for all": (260, (128, 128), (1, 1), 2, {"is_causal": True}),
    "wide blocks, a mask": (600, (256, 128), (2, 2), 1, {"mask": masks.window(150, 70)}),
    "more heads than a step has": (256, (128, 128), (2, 2), 6, {"is_causal": True}),
    "one block": (100, (128, 128), (1, 1), 2, {"is_causal": True}),
    "segments": (260, (128, 128), (2, 2), 2, {"is_causal": True, "segment_ids": True}),
}


def assert_equals_the_reference(case, interpreted, batch=2):
    length, (query_block, key_block), lists, group, options = CASES[case]
    rng = np.random.default_rng(0)
    key_heads = 2
    shapes = [(batch, length, n, 64) for n in (group * key_heads, key_heads, key_heads)]
    arrays = tuple(jnp.asarray(rng.normal(size=shape), jnp.float32) for shape in shapes)
    sizes = {"query_block": query_block, "key_block": key_block}
    blocks = rng.integers(
        -1, -(-length // key_block), size=(min(batch, lists[0]), lists[1], -(-length // query_block), 3)
    )
    if "segment_ids" in options:
        options = {**options, "segment_ids": jnp.asarray(np.arange(length) // 100 * np.ones((batch, 1)), jnp.int32)}
    weights = jnp.asarray(rng.normal(size=shapes[0]), jnp.float32)

    def run(form, arrays, blocks):
        def loss(arrays):
            out, lse = block_sparse_attention(*arrays, blocks, **sizes, **options, return_lse=True, implementation=form)
            return jnp.sum(out * weights) + jnp.where(jnp.isfinite(lse), lse, 0).sum(), (out, lse)

        return jax.grad(loss, has_aux=True)(arrays)

    got = interpreted(run, "pallas_tpu", arrays, jnp.asarray(blocks, jnp.int32))
    want = run("reference", arrays, jnp.asarray(blocks, jnp.int32))
    for x, y in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        np.testing.assert_array_equal(np.isfinite(x), np.isfinite(y))
        finite = np.isfinite(y)
        np.testing.assert_allclose(x[finite], y[finite], rtol=0, atol=1e-5 * np.abs(y[finite]).max())


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES)
def test_values_and_gradients_equal_the_reference_s(case, interpreted):
    assert_equals_the_reference(case, interpreted)


OF_ONE_LIST = {("causal", 1): 120, ("the same for the batch", 2): 200, ("segments", 2): 200}  # bytes


@pytest.mark.parametrize(
    ("case", "batch"),
    [case if case[1] == 1 else pytest.param(*case, marks=pytest.mark.slow) for case in OF_ONE_LIST],
)
@pytest.mark.long
def test_lists_that_scalar_memory_does_not_hold_are_read_by_several_calls(case, batch, interpreted, monkeypatch):
    monkeypatch.setattr(band, "SMEM_BUDGET", OF_ONE_LIST[case, batch])
    assert_equals_the_reference(case, interpreted, batch)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["diffusion", "window"])
def test_a_mask_is_lists_of_tiles(name, interpreted, monkeypatch):
    length, mask = {"diffusion": (384, masks.block_diffusion(192, 32)), "window": (300, ~masks.window(20, 90))}[name]
    monkeypatch.setattr(dot_product, "_tile", lambda backend: (128, 128))
    arrays = tuple(np.random.default_rng(0).normal(size=(3, 1, length, 2, 64)).astype(np.float32))

    def run(form):
        def loss(arrays):
            out, lse = dot_product_attention(*arrays, mask=mask, return_lse=True, implementation=form)
            return jnp.sum(jnp.sin(out)) + jnp.where(jnp.isfinite(lse), lse, 0).sum(), (out, lse)

        return jax.grad(loss, has_aux=True)(arrays)

    for x, y in zip(jax.tree.leaves(interpreted(run, "pallas_tpu")), jax.tree.leaves(run("reference")), strict=True):
        np.testing.assert_allclose(x, y, rtol=0, atol=1e-5 * np.abs(y[np.isfinite(y)]).max())


@pytest.mark.slow
@pytest.mark.parametrize("tpu", TOPOLOGIES)
def test_lists_of_a_large_call_compile(tpu):
    """64 lists of 4096 tiles, of which scalar memory holds a few at a time, forward and back."""
    query, key = (jax.ShapeDtypeStruct((8, 2**15, heads, 128), jnp.bfloat16) for heads in (32, 8))
    lists = jax.ShapeDtypeStruct((8, 8, 256, 16), jnp.int32)

    def loss(query, key, value, lists):
        out = block_sparse_attention(query, key, value, lists, query_block=128, key_block=128, is_causal=True)
        return out.astype(jnp.float32).sum()

    compiled = compile_for_tpu(jax.grad(loss, (0, 1, 2)), query, key, key, lists, tpu=tpu).as_text()
    for name in ("attention", "query_gradient", "key_value_gradients"):
        assert f"banded_flash_{name}" in compiled
