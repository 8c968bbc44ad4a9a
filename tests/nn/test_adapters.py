"""The primitives inside Flax's attention layers."""

import inspect

import flax.linen
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import attnlab
from attnlab.nn import attention_fn

causal_layers = pytest.mark.skipif(
    "is_causal" not in inspect.signature(nnx.MultiHeadAttention.__call__).parameters,
    reason="this version of Flax has no is_causal",
)
X = jax.random.normal(jax.random.key(0), (2, 10, 16))
PADDING = nnx.make_attention_mask(jnp.arange(10)[None] < 10, jnp.arange(10)[None] < jnp.array([[7], [10]]))


def layer(attention=None, **options):
    given = {} if attention is None else {"attention_fn": attention}
    return nnx.MultiHeadAttention(4, 16, decode=False, rngs=nnx.Rngs(0), **given, **options)


def linen_layer(attention, x, **call):
    module = flax.linen.MultiHeadDotProductAttention(num_heads=4, attention_fn=attention)
    return module.apply(module.init(jax.random.key(1), x), x, **call)


@pytest.mark.parametrize(
    "call",
    [
        {},
        {"mask": PADDING},
        pytest.param({"is_causal": True}, marks=causal_layers),
        {"mask": nnx.make_causal_mask(X[..., 0]) * PADDING},
    ],
)
def test_softmax_attention_in_nnx_is_flax_s(call):
    np.testing.assert_allclose(
        layer(attention_fn(attnlab.dot_product_attention))(X, **call), layer()(X, **call), atol=1e-5
    )


def test_softmax_attention_in_linen_is_flax_s():
    got, want = (
        linen_layer(attention, X, mask=flax.linen.make_causal_mask(X[..., 0]))
        for attention in (attention_fn(attnlab.dot_product_attention), flax.linen.dot_product_attention)
    )
    np.testing.assert_allclose(got, want, atol=1e-5)


def test_flax_s_cache_decodes_softmax_attention():
    decoding = layer(attention_fn(attnlab.dot_product_attention))
    want = decoding(X, mask=nnx.make_causal_mask(X[..., 0]))
    decoding.init_cache(X.shape)
    steps = [decoding(X[:, token : token + 1], decode=True) for token in range(10)]
    np.testing.assert_allclose(jnp.concatenate(steps, axis=1), want, atol=1e-5)


@causal_layers
def test_a_window_has_its_options_and_follows_the_layer_s_is_causal():
    local = layer(attention_fn(attnlab.local_attention, window=3, edge="clip"))
    index = jnp.arange(10)
    near = jnp.abs(index[:, None] - index) <= 1
    np.testing.assert_allclose(local(X), layer()(X, mask=near[None, None]), atol=1e-5)
    past = (index[:, None] >= index) & (index[:, None] - index < 3)
    np.testing.assert_allclose(local(X, is_causal=True), layer()(X, mask=past[None, None]), atol=1e-5)


def test_a_layer_s_dtype_is_what_the_primitive_gets():
    assert layer(attention_fn(attnlab.linear_attention), dtype=jnp.bfloat16)(X).dtype == jnp.bfloat16


LINEAR, DENSE = attention_fn(attnlab.linear_attention), attention_fn(attnlab.dot_product_attention)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: layer(LINEAR)(X, mask=PADDING), r"mask: got float32\[2,1,10,10\]; linear_attention takes none"),
        (lambda: linen_layer(LINEAR, X, mask=PADDING), "mask: got float32"),
        pytest.param(
            lambda: layer(attention_fn(attnlab.inline_attention))(X, is_causal=True),
            "is_causal: got True; inline_attention has no such option",
            marks=causal_layers,
        ),
        (
            lambda: layer(DENSE, dropout_rate=0.5)(X, rngs=nnx.Rngs(1), deterministic=False),
            "dropout_rate: got 0.5; dot_product_attention drops no attention weights; need 0",
        ),
        (lambda: layer(DENSE)(X, sow_weights=True), "sow_weights: got True; dot_product_attention keeps no"),
        (lambda: layer(DENSE, precision="highest")(X), "precision: got .*; dot_product_attention chooses its own"),
        (lambda: attention_fn(attnlab.local_attention), "window: got nothing; local_attention needs it"),
        (
            lambda: layer(attention_fn(attnlab.local_attention, window=11))(X),  # the mixers of attnlab.nn cut theirs
            "window: got 11; at most 10 fits on axis 0",
        ),
        (lambda: attention_fn(attnlab.local_attention, windw=3), "windw: got 3; local_attention takes window, stride"),
        (
            lambda: layer(attention_fn(attnlab.dot_product_attention, return_lse=True))(X),
            "primitive: got dot_product_attention with 2 results; need one array",
        ),
    ],
)
def test_what_a_primitive_cannot_do_is_refused(call, message):
    with pytest.raises(ValueError, match=message):
        call()


def test_dropout_in_evaluation_is_none():
    np.testing.assert_array_equal(layer(DENSE, dropout_rate=0.5)(X, deterministic=True), layer(DENSE)(X))
