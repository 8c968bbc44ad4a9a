"""Patterns that a caller gives: who sees whom, and where each token stands."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from attnlab import masks, nn

LENGTH = 6
X = jax.random.normal(jax.random.key(0), (2, LENGTH, 16))


@functools.cache
def bound(*, is_causal=True, **options):
    mixer = nn.SoftmaxAttention(16, is_causal=is_causal, **options)
    return nn.bind(mixer, nn.initialize(mixer, jax.random.key(0)))


@pytest.mark.long
def test_a_pattern_takes_the_place_of_the_own_one_and_its_positions_turn_queries_and_keys():
    """Tokens in another order, with their positions and a mask by these, give the same in that order."""
    order = np.array([3, 0, 5, 1, 4, 2])
    causal = masks.Mask(lambda query, key: jnp.asarray(order)[key[0]] <= jnp.asarray(order)[query[0]])
    pattern = nn.Pattern(causal, order)
    mixer = bound()
    own, plain, moved = jax.jit(
        lambda x: (mixer(x), mixer(x, pattern=nn.Pattern(masks.causal())), mixer(x[:, order], pattern=pattern))
    )(X)
    np.testing.assert_allclose(plain, own, atol=1e-6)
    np.testing.assert_allclose(moved, own[:, order], atol=1e-6)


@pytest.mark.long
def test_weights_are_those_of_the_pattern():
    pattern, mixer = nn.Pattern(masks.block_causal(2)), bound()
    weights = np.asarray(jax.jit(lambda x: mixer.attention_weights(x, pattern=pattern))(X))
    np.testing.assert_array_equal(weights.max((0, 1)) > 0, masks.dense_mask(pattern.mask, (LENGTH,)))
    np.testing.assert_allclose(weights.sum(-1), 1, rtol=1e-5)


def test_wrong_patterns_are_refused_in_a_line():
    good, places = masks.causal(), np.arange(LENGTH)
    for mixer, x, options, message in (
        (bound(), X, {"pattern": nn.Pattern(good, places[1:])}, r"^pattern.positions: got .*\[6\]"),
        (bound(), X, {"pattern": nn.Pattern(3)}, r"^pattern.mask: got 3; need a masks.Mask"),
        (bound(), X[:, None], {"pattern": nn.Pattern(good)}, r"^pattern: got one for 2 space axes"),
        (bound(), X, {"pattern": nn.Pattern(good), "segment_ids": jnp.zeros((2, LENGTH), int)}, "^pattern: got some"),
        (bound(convolution=2), X, {"pattern": nn.Pattern(good)}, "^pattern: .* has convolutions, which follow none"),
        (nn.LinearAttention(16, is_causal=True), X, {"pattern": nn.Pattern(good)}, "^pattern: got one; but LinearAtt"),
    ):
        with pytest.raises(ValueError, match=message):
            mixer(x, **options)
