"""Block-sparse attention by the GPU's banded flash kernels, simulated or on a card, beside its reference."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from attnlab import block_sparse_attention, masks

# Tokens, block sizes, options.
CASES = {
    "causal": (256, (128, 128), {"is_causal": True}),
    "cut short": (290, (128, 128), {}),
    "wide query blocks": (520, (256, 128), {"is_causal": True}),
    "wide key blocks, a mask": (520, (128, 256), {"mask": masks.window(150, 70)}),
    "one block": (100, (128, 128), {"is_causal": True}),
    "segments": (260, (128, 128), {"is_causal": True, "segment_ids": True}),
}


@pytest.mark.slow  # lists of tiles have a fast case in test_gpu_banded_flash.py
@pytest.mark.parametrize("case", CASES)
def test_lists_are_the_kernel_s(case, on_gpu):
    """Values, lse and gradients, of lists for each row and key head, to 2 % of the largest number."""
    length, (query_block, key_block), options = CASES[case]
    rng = np.random.default_rng(0)
    batch, key_heads = (1, 1) if case == "one block" else (2, 2)
    shapes = [(batch, length, n, 64) for n in (2 * key_heads, key_heads, key_heads)]
    arrays = tuple(jnp.asarray(rng.normal(size=shape), jnp.bfloat16) for shape in shapes)
    sizes = {"query_block": query_block, "key_block": key_block}
    key_blocks = -(-length // key_block)
    blocks = jnp.asarray(rng.integers(-1, key_blocks, size=(batch, key_heads, -(-length // query_block), 3)), jnp.int32)
    if "segment_ids" in options:
        options = {**options, "segment_ids": jnp.asarray(np.arange(length) // 100 * np.ones((2, 1)), jnp.int32)}
    weights = jnp.asarray(rng.normal(size=shapes[0]), jnp.float32)

    def run(form, arrays, blocks):
        def loss(arrays):
            out, lse = block_sparse_attention(*arrays, blocks, **sizes, **options, return_lse=True, implementation=form)
            shown = jnp.where(jnp.isfinite(lse), lse, 0)
            return jnp.sum(out.astype(jnp.float32) * weights) + shown.sum(), (out, lse)

        return jax.grad(loss, has_aux=True)(arrays)

    got = on_gpu(run, "pallas_gpu", arrays, blocks)
    want = run("reference", tuple(x.astype(jnp.float32) for x in arrays), blocks)
    for x, y in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        x, y = np.asarray(x, np.float32), np.asarray(y)
        np.testing.assert_array_equal(np.isfinite(x), np.isfinite(y))
        finite = np.isfinite(y)
        assert np.abs(x[finite] - y[finite]).max() <= 2e-2 * np.abs(y[finite]).max()


def test_what_is_refused(on_gpu):
    x = jnp.zeros((1, 256, 4, 64), jnp.bfloat16)
    lists = jnp.zeros((1, 1, 2, 1), jnp.int32)
    sizes = {"query_block": 128, "key_block": 128, "implementation": "pallas_gpu"}
    key = x[:, :, :2]
    for reason, call in {
        "has no block_bias": lambda: block_sparse_attention(x, key, key, lists, block_bias=lists * 1.0, **sizes),
        "serves lists of key heads, 2, got lists of 4": lambda: block_sparse_attention(
            x, key, key, jnp.tile(lists, (1, 4, 1, 1)), **sizes
        ),
        "serves blocks of multiples of 128 tokens, got 64": lambda: block_sparse_attention(
            x, key, key, jnp.tile(lists, (1, 1, 2, 1)), **{**sizes, "query_block": 64}
        ),
    }.items():
        with pytest.raises(ValueError, match=reason):
            on_gpu(call)


@pytest.mark.long
def test_lists_of_a_large_call_lower():
    query, key = (jax.ShapeDtypeStruct((8, 2**15, heads, 128), jnp.bfloat16) for heads in (32, 8))
    lists = jax.ShapeDtypeStruct((8, 8, 256, 16), jnp.int32)

    def loss(query, key, value, lists):
        sizes = {"query_block": 128, "key_block": 128, "is_causal": True, "implementation": "pallas_gpu"}
        return block_sparse_attention(query, key, value, lists, **sizes).astype(jnp.float32).sum()

    lowered = jax.export.export(jax.jit(jax.grad(loss, (0, 1, 2))), platforms=["cuda"])(query, key, key, lists)
    assert lowered.mlir_module_serialized.count(b"mosaic_gpu") >= 3
