"""What other libraries call it, their call beside ours; docs/comparison.md has the table in words.

Those that are no part of the tests' environment are compared where they are installed (`-m slow`), by their forms for a
CPU: what their kernels compute, they say themselves.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_mask as splash

import attnlab

HEADS, HEAD_DIM, LENGTH = 2, 16, 32
QUERY, KEY, VALUE, PROBE = jax.random.normal(jax.random.key(0), (4, 1, LENGTH, HEADS, HEAD_DIM))
UNIT_KEY = KEY / jnp.linalg.norm(KEY, axis=-1, keepdims=True)
LOG_DECAY = -jax.random.uniform(jax.random.key(1), (1, LENGTH, HEADS))
LOG_DECAY_OF_CHANNELS = -jax.random.uniform(jax.random.key(2), (1, LENGTH, HEADS, HEAD_DIM))
BETA = jax.random.uniform(jax.random.key(3), (1, LENGTH, HEADS))

OPTIONAL = pytest.mark.slow  # needs a library that is no part of the tests' environment


def assert_equal(theirs, ours):
    np.testing.assert_allclose(np.asarray(theirs), np.asarray(ours), rtol=1e-4, atol=1e-5)


def tensors(*arrays, heads_first=False):
    torch = pytest.importorskip("torch", reason="PyTorch is not installed")
    found = [torch.tensor(np.asarray(array)) for array in arrays]
    return [x.transpose(1, 2) for x in found] if heads_first else found


def naive(module, function, reason="flash-linear-attention is not installed"):
    """A form of flash-linear-attention in plain PyTorch."""
    return getattr(pytest.importorskip(f"fla.ops.{module}.naive", reason=reason), function)


def test_windows_of_jax_nn():
    """local_window_size has keys on either side, ours is how many keys a query sees, itself among them."""
    for theirs, ours in (
        ({"local_window_size": (7, 0), "is_causal": True}, {"window": 8, "is_causal": True}),
        ({"local_window_size": (4, 4)}, {"window": 9, "edge": "clip"}),
    ):
        want = jax.nn.dot_product_attention(QUERY, KEY, VALUE, **theirs)
        assert_equal(want, attnlab.local_attention(QUERY, KEY, VALUE, **ours))


@pytest.mark.parametrize(
    ("mask", "ours"),
    [
        (splash.CausalMask((LENGTH, LENGTH)), attnlab.masks.causal()),
        (splash.LocalMask((LENGTH, LENGTH), (7, 0), 0), attnlab.masks.neighborhood((LENGTH,), 8, is_causal=True)),
        (splash.LocalMask((LENGTH, LENGTH), (4, 4), 0), attnlab.masks.neighborhood((LENGTH,), 9, edge="clip")),
        (splash.ChunkedCausalMask((LENGTH, LENGTH), 8), attnlab.masks.causal() & attnlab.masks.blocks(8)),
    ],
)
def test_masks_of_splash_attention(mask, ours):
    np.testing.assert_array_equal(mask[:, :], attnlab.masks.dense_mask(ours, (LENGTH,)))


def test_splash_attention_scales_nothing():
    """Nor does it take [B, T, N, H]: its arrays are [N, T, H] of one example."""
    kernel = pytest.importorskip("jax.experimental.pallas.ops.tpu.splash_attention.splash_attention_kernel")
    mask = splash.MultiHeadMask([splash.CausalMask((LENGTH, LENGTH))] * HEADS)
    heads_first = [jnp.swapaxes(x[0], 0, 1) for x in (QUERY, KEY, VALUE)]
    info = kernel.attention_reference(jnp.asarray(mask[0, :, :]), *(x[0] for x in heads_first), segment_ids=None)
    want = attnlab.dot_product_attention(QUERY, KEY, VALUE, is_causal=True, scale=1.0)
    assert_equal(info, want[0, :, 0])


@OPTIONAL
def test_windows_of_flex_attention():
    torch = pytest.importorskip("torch.nn.attention.flex_attention", reason="PyTorch is not installed")

    def sees(batch, head, query, key):
        return (query >= key) & (query - key < 8)

    mask = torch.create_block_mask(sees, None, None, LENGTH, LENGTH, device="cpu")
    out = torch.flex_attention(*tensors(QUERY, KEY, VALUE, heads_first=True), block_mask=mask)
    assert_equal(out.transpose(1, 2), attnlab.local_attention(QUERY, KEY, VALUE, window=8, is_causal=True))


@OPTIONAL
@pytest.mark.filterwarnings("ignore")
def test_windows_of_local_attention():
    """Of lucidrains' package: a block sees itself and the one before; exact_windowsize is a window, of one key more."""
    library = pytest.importorskip("local_attention", reason="local-attention is not installed")
    options = {"dim": HEAD_DIM, "window_size": 8, "causal": True, "look_backward": 1}
    options |= {"use_rotary_pos_emb": False, "autopad": True}
    heads_first = tensors(QUERY, KEY, VALUE, heads_first=True)
    exact = library.LocalAttention(**options, exact_windowsize=True)(*heads_first).transpose(1, 2).detach()
    assert_equal(exact, attnlab.local_attention(QUERY, KEY, VALUE, window=9, is_causal=True))
    blocks = library.LocalAttention(**options)(*heads_first).transpose(1, 2).detach()
    position = jnp.arange(LENGTH)
    sees = (position <= position[:, None]) & (position[:, None] // 8 - position // 8 <= 1)
    assert_equal(blocks, attnlab.dot_product_attention(QUERY, KEY, VALUE, mask=sees[None, None]))


@OPTIONAL
def test_windows_of_tokamax():
    try:
        tokamax = pytest.importorskip("tokamax", reason="tokamax is not installed")
    except SyntaxError:
        pytest.skip("tokamax needs a newer Python")
    options = {"is_causal": True, "local_window_size": (7, 0), "implementation": "xla"}
    out = tokamax.dot_product_attention(QUERY, KEY, VALUE, **options)
    assert_equal(out, attnlab.local_attention(QUERY, KEY, VALUE, window=8, is_causal=True))


# Of flash-linear-attention: the function, its arrays in its order, and ours. Its g is our log_decay; both scale by
# H ** -0.5; neither normalises keys unless told to.
RECURRENCES = {
    ("gated_delta_rule", "naive_recurrent_gated_delta_rule"): (
        (QUERY, UNIT_KEY, VALUE, BETA, LOG_DECAY),
        {"key": UNIT_KEY, "log_decay": LOG_DECAY, "beta": BETA},
    ),
    ("kda", "naive_recurrent_kda"): (
        (QUERY, UNIT_KEY, VALUE, LOG_DECAY_OF_CHANNELS, BETA),
        {"key": UNIT_KEY, "log_decay": LOG_DECAY_OF_CHANNELS, "beta": BETA},
    ),
    ("gla", "naive_recurrent_gla"): (
        (QUERY, KEY, VALUE, LOG_DECAY_OF_CHANNELS),
        {"key": KEY, "log_decay": LOG_DECAY_OF_CHANNELS},
    ),
}


@OPTIONAL
@pytest.mark.parametrize(("module", "function"), RECURRENCES)
def test_recurrences_of_flash_linear_attention(module, function):
    arrays, ours = RECURRENCES[module, function]
    out = naive(module, function)(*tensors(*arrays))
    assert_equal(out[0] if isinstance(out, tuple) else out, attnlab.linear_attention(QUERY, value=VALUE, **ours))


@OPTIONAL
def test_retention_of_flash_linear_attention():
    out = naive("retention", "naive_retention")(*tensors(QUERY, KEY, VALUE, heads_first=True))
    rates = jnp.log(1 - 2.0 ** (-5 - jnp.arange(HEADS)))
    assert_equal(out.transpose(1, 2), attnlab.linear_attention(QUERY, KEY, VALUE, log_decay=rates))


@OPTIONAL
@pytest.mark.parametrize("window", [None, 8])
def test_parallax_of_flash_linear_attention(window):
    out = naive("parallax", "naive_parallax")(*tensors(QUERY, PROBE, KEY, VALUE), window_size=window)
    assert_equal(out, attnlab.parallax_attention(QUERY, PROBE, KEY, VALUE, window=window))
