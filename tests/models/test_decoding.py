"""A model decodes what it was trained as: with any option of its mixers, prompt, length and capacity of the cache."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from marks import slow_but
from mixers import DECODING, MIXERS

from attnlab import nn
from attnlab.models import LanguageModel, generate

FEATURES, LENGTH, VOCABULARY = 16, 13, 17
# Beside the rows of the table, options whose windows are longer than a prompt or than all there is.
OPTIONS = {
    "a window longer than all": functools.partial(nn.LocalAttention, window=64),
    "a window and sinks longer than all": functools.partial(nn.LocalAttention, window=9, sinks=30),
    "strides in windows of all but the last": functools.partial(nn.LocalAttention, window=14, stride=5, edge="clip"),
    "a dilated window longer than all": functools.partial(nn.DilatedAttention, window=8, dilation=4),
    "a dilation longer than all": functools.partial(nn.DilatedAttention, window=2, dilation=50),
    "dilated strides longer than all": functools.partial(
        nn.DilatedAttention, window=5, dilation=3, stride=4, edge="clip"
    ),
    "rotary before a feature map": functools.partial(
        nn.LinearAttention, feature_map="elu", normalize=True, rotary=True, convolution=3
    ),
    "routing in windows longer than all": functools.partial(
        nn.RoutingAttention, clusters=2, window=50, local_heads=1, local_window=60
    ),
    "a regression on a window longer than all": functools.partial(nn.LocalLinearAttention, window=40),
}
CAUSAL = {name: MIXERS[name] for name in DECODING} | OPTIONS
STACKS = {name: [mixer] for name, mixer in CAUSAL.items()} | {
    "hybrid": [CAUSAL[name] for name in ("local_sinks", "gated", "a dilated window longer than all")]
}


@pytest.mark.parametrize("name", slow_but({"hybrid"}, STACKS))
@pytest.mark.long
def test_generated_tokens_are_the_likeliest_of_the_call(name):
    mixers = STACKS[name]
    model = LanguageModel(vocabulary=VOCABULARY, mixers=mixers, depth=len(mixers), features=FEATURES, max_length=LENGTH)
    values = nn.initialize(model, jax.random.key(0))
    prompt = jax.random.randint(jax.random.key(1), (4, 3), 0, VOCABULARY)

    @jax.jit
    def generated(values):
        bound = nn.bind(model, values)
        tokens = generate(bound, prompt, length=LENGTH - 3, key=jax.random.key(2), temperature=0)
        return tokens, bound(tokens)

    tokens, logits = generated(values)
    np.testing.assert_array_equal(tokens[:, :3], prompt)
    # Of two tokens that are equal to rounding, either one.
    chosen = np.take_along_axis(logits[:, 2:-1], tokens[:, 3:, None], axis=-1)[..., 0]
    np.testing.assert_allclose(chosen, np.max(logits[:, 2:-1], axis=-1), atol=1e-6)


@functools.cache
def mixer_of(name):
    mixer = CAUSAL[name](FEATURES, is_causal=True)
    values = nn.initialize(mixer, jax.random.key(0))
    x = jax.random.normal(jax.random.key(1), (2, LENGTH, FEATURES))

    @functools.partial(jax.jit, static_argnums=2)
    def decode(values, x, capacity):
        bound = nn.bind(mixer, values)

        def step(cache, token):
            y, cache = bound.step(cache, token[:, None])
            return cache, y[:, 0]

        _, y = jax.lax.scan(step, bound.init_cache(2, capacity), jnp.swapaxes(x, 0, 1))
        return jnp.swapaxes(y, 0, 1)

    call = jax.jit(lambda values, x: nn.bind(mixer, values)(x))
    return values, x, call, decode


# One token, the windows of the table's rows and one beyond them, and all.
LENGTHS = (1, 3, 4, 5, 6, 7, LENGTH)
QUICK = {("local_stride", 4), ("dilated_stride", 5), ("strides in windows of all but the last", LENGTH)}


@pytest.mark.parametrize(
    "row",
    slow_but(QUICK, [(name, length) for name in CAUSAL for length in LENGTHS]),
    ids=lambda row: f"{row[0]}, {row[1]}",
)
def test_a_call_and_a_cache_for_any_number_of_tokens_give_the_same(row):
    name, length = row
    values, x, call, decode = mixer_of(name)
    want = decode(values, x, 99)[:, :length]
    np.testing.assert_allclose(call(values, x[:, :length]), want, atol=2e-5, rtol=2e-5)
    np.testing.assert_allclose(decode(values, x[:, :length], length), want, atol=2e-5, rtol=2e-5)


@pytest.mark.parametrize("name", slow_but({"local_sinks", "dilated", "routing_layer"}, CAUSAL))
def test_a_token_past_the_capacity_is_right_or_not_a_number(name):
    values, x, _, decode = mixer_of(name)
    got, want = decode(values, x, 4), decode(values, x, 99)
    np.testing.assert_allclose(got[:, :4], want[:, :4], atol=2e-5, rtol=2e-5)
    is_number = np.all(np.isfinite(got), axis=-1)
    np.testing.assert_allclose(got[is_number], want[is_number], atol=2e-5, rtol=2e-5)


# --- Prompts ----------------------------------------------------------------------------------------------------------

PROMPTS = np.array([9, 1, 6])


@functools.cache
def read(name, dtype=jnp.float32):
    """Of a mixer: what the call gives; what prompts and steps after them give at the same positions; and caches after
    a prompt read at once and by steps."""
    mixer = CAUSAL[name](FEATURES, is_causal=True, dtype=dtype)
    values = nn.initialize(mixer, jax.random.key(0))
    x = jax.random.normal(jax.random.key(1), (len(PROMPTS), LENGTH, FEATURES), dtype)

    @jax.jit
    def run(values, x, lengths):
        bound = nn.bind(mixer, values)

        def by_steps(cache, tokens):
            def step(cache, token):
                y, cache = bound.step(cache, token[:, None])
                return cache, y[:, 0]

            cache, y = jax.lax.scan(step, cache, jnp.swapaxes(tokens, 0, 1))
            return cache, jnp.swapaxes(y, 0, 1)

        empty, most = bound.init_cache(len(x), LENGTH), PROMPTS.max()
        prompt = jnp.where(jnp.arange(most)[None, :, None] < lengths[:, None, None], x[:, :most], 3)
        y, cache = bound.prefill(empty, prompt, lengths)
        rest = lengths[:, None] + jnp.arange(LENGTH - most)[None]
        _, after = by_steps(cache, jnp.take_along_axis(x, rest[..., None], axis=1))
        want = bound(x)
        wanted = want[:, :most], jnp.take_along_axis(want, rest[..., None], axis=1)
        whole, stepped = bound.prefill(empty, x[:, :most])[1], by_steps(empty, x[:, :most])[0]
        return wanted, (y, after), whole, stepped

    return jax.tree.map(np.asarray, run(values, x, PROMPTS))


QUICK_PROMPTS = {"softmax_convolved", "dilated", "agent"}


@pytest.mark.parametrize("name", slow_but(QUICK_PROMPTS, CAUSAL))
def test_a_prompt_read_at_once_and_steps_after_it_give_what_the_call_gives(name):
    (want, want_after), (y, after), whole, stepped = read(name)
    for row, length in enumerate(PROMPTS):
        np.testing.assert_allclose(y[row, :length], want[row, :length], atol=2e-5, rtol=2e-5)
    np.testing.assert_allclose(after, want_after, atol=2e-5, rtol=2e-5)
    assert jax.tree.map(lambda x: (x.shape, x.dtype), whole) == jax.tree.map(lambda x: (x.shape, x.dtype), stepped)
    jax.tree.map(functools.partial(np.testing.assert_allclose, atol=2e-5, rtol=2e-5), whole, stepped)


@pytest.mark.parametrize("name", slow_but({"softmax_convolved"}, CAUSAL))
def test_a_prompt_in_bfloat16_is_read_as_in_float32(name):
    """A prompt of one length, and a step."""
    mixer, wide = (CAUSAL[name](FEATURES, is_causal=True, dtype=dtype) for dtype in (jnp.bfloat16, jnp.float32))
    values, x, _, _ = mixer_of(name)

    @jax.jit
    def read(values, x):
        bound = nn.bind(mixer, values)
        y, cache = bound.prefill(bound.init_cache(2, LENGTH), x[:, :-1].astype(jnp.bfloat16))
        last, cache = bound.step(cache, x[:, -1:].astype(jnp.bfloat16))
        return jnp.concatenate([y, last], axis=1), cache, bound.init_cache(2, LENGTH), nn.bind(wide, values)(x)

    y, cache, empty, want = read(values, x)
    assert y.dtype == jnp.bfloat16
    assert jax.tree.map(lambda x: x.dtype, cache) == jax.tree.map(lambda x: x.dtype, empty)
    np.testing.assert_allclose(y.astype(jnp.float32), want, atol=0.08, rtol=0.08)
