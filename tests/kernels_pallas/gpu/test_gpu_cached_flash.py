"""A token's attention to a cache, simulated or on a card, against float64."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import export
from marks import slow_but

from kernels_pallas.gpu.cached_flash import cached_flash_attention, refusal, smem_bytes
from kernels_pallas.gpu.common import SMEM_BUDGET

TOLERANCE = {jnp.bfloat16: 2e-2, jnp.float16: 2.5e-3}  # weights are rounded to 16 bits, and so is the output


def draw(slots, *, batch=1, heads=2, key_heads=1, dims=(64, 64), dtype=jnp.bfloat16, used=None, shown=0.7):
    """query, key, value, visible, used. shown: the share of slots in use that are visible. used: all, a number, or one
    for each sequence."""
    rng = np.random.default_rng(slots)
    shapes = [(1, heads, dims[0]), (slots, key_heads, dims[0]), (slots, key_heads, dims[1])]
    tokens = [jnp.asarray(rng.normal(size=(batch, *shape)), dtype) for shape in shapes]
    used = np.broadcast_to(slots if used is None else used, batch)
    visible = (rng.random((batch, 1, slots)) < shown) & (np.arange(slots) < used[:, None, None])
    return *tokens, jnp.asarray(visible), jnp.asarray(used, jnp.int32)


def reference(query, key, value, visible, _, *, scale):
    query, key, value, sees = (np.asarray(x, np.float64) for x in (query, key, value, visible))
    key, value = (np.repeat(x, query.shape[2] // key.shape[2], axis=2) for x in (key, value))
    logits = np.where(sees, scale * np.einsum("bqnh,bsnh->bns", query, key), -1e300)
    weights = np.exp(logits - logits.max(-1, keepdims=True)) * sees
    total = weights.sum(-1, keepdims=True)
    return np.einsum("bns,bsnv->bnv", weights / np.where(total > 0, total, 1), value)[:, None]


CASES = {  # slots, options of draw, scale
    "one part": (64, {"used": 40}, 0.125),
    "parts": (200, {"batch": 2, "heads": 8, "key_heads": 2}, 0.125),
    "each sequence its own": (400, {"batch": 2, "used": (70, 400)}, 0.125),
    "parts that have nothing": (400, {"used": 70}, 0.125),
    "a last tile that begins earlier": (136, {"used": 136}, 0.125),
    "few slots": (5, {"heads": 3, "key_heads": 3, "shown": 1.0}, 0.125),
    "slots no multiple of 8": (99, {"dtype": jnp.float16}, 0.125),
    "wide": (130, {"dims": (128, 128), "heads": 16, "key_heads": 2}, 0.1),
    "widest": (64, {"dims": (256, 256)}, 0.1),
    "other widths": (72, {"dims": (80, 40), "dtype": jnp.float16}, 0.1),
    "negative scale": (72, {}, -0.7),
    "scale 0": (72, {}, 0.0),
    "large scale": (72, {"heads": 64}, 30.0),
}
QUICK = ("one part",)


@pytest.mark.parametrize("case", slow_but(QUICK, CASES))
@pytest.mark.long
def test_equals_float64(case, on_gpu):
    slots, options, scale = CASES[case]
    arrays = draw(slots, **options)
    run = jax.jit(functools.partial(cached_flash_attention, scale=scale))
    got = on_gpu(run, *arrays)
    want = reference(*arrays, scale=scale)
    tolerance = TOLERANCE[arrays[0].dtype.type]
    assert got.dtype == arrays[0].dtype
    np.testing.assert_allclose(np.asarray(got, np.float64), want, rtol=tolerance, atol=tolerance)
    if case not in QUICK:
        np.testing.assert_array_equal(got, on_gpu(run, *arrays))


@pytest.mark.slow
def test_slots_past_the_last_in_use_are_not_read_and_no_slot_gives_zero(on_gpu):
    query, key, value, visible, used = draw(256, batch=2, used=100)
    unread = (jnp.arange(256) >= 128)[:, None, None]
    holes = [jnp.where(unread, jnp.nan, x) for x in (key, value)]
    visible = visible.at[1].set(False)
    got = on_gpu(cached_flash_attention, query, *holes, visible, used, scale=jnp.float32(0.2))
    assert np.all(got[1] == 0)
    want = reference(query, key, value, visible, used, scale=0.2)
    np.testing.assert_allclose(np.asarray(got, np.float64), want, rtol=2e-2, atol=2e-2)


@pytest.mark.slow
def test_under_vmap_and_scan(on_gpu):
    arrays = draw(72)
    run = functools.partial(cached_flash_attention, scale=0.125)
    want = on_gpu(run, *arrays)
    batched = [jnp.stack([x, x]) for x in arrays]
    many = on_gpu(jax.vmap(run), *batched)
    scanned = on_gpu(lambda *args: jax.lax.scan(lambda _, x: (0, run(*x)), 0, args)[1], *batched)
    for each in (*many, *scanned):
        np.testing.assert_array_equal(each, want)


LOWERED = [
    (dtype, dims)
    for dtype in (jnp.bfloat16, jnp.float16)
    for dims in ((64, 64), (80, 80), (128, 128), (192, 64), (256, 256))
]


@pytest.mark.parametrize(("dtype", "dims"), LOWERED)
def test_is_lowered_for_a_gpu(dtype, dims):
    with jax.enable_x64(dtype == jnp.float16):
        arrays = draw(1000, heads=8, key_heads=2, dims=dims, dtype=dtype)
        run = functools.partial(cached_flash_attention, scale=0.1)
        exported = export.export(jax.jit(run), platforms=["cuda"])(*arrays)
        assert b"mosaic_gpu" in exported.mlir_module_serialized


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"dtype": jnp.float32}, "needs query and cache all bfloat16 or all float16, got float32, float32 and float32"),
        ({"dims": (257, 64)}, "serves head dims up to 256, got 257 and 64"),
        ({"heads": 65}, "serves up to 64 query heads for a key head, got 65 for 1"),
    ],
)
def test_refuses_with_the_reason(options, reason):
    arrays = draw(8, **options)
    assert refusal(*arrays[:3]) == reason
    with pytest.raises(ValueError, match=reason):
        cached_flash_attention(*arrays, scale=1.0)


def test_blocks_fit_into_shared_memory():
    widths = (64, 128, 192, 256)
    assert all(smem_bytes(keys, values) <= SMEM_BUDGET for keys in widths for values in widths)
