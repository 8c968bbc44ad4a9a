"""Block diffusion: what its loss is of, that it bounds -log p, and that samples have the probabilities it bounds."""

import functools
import itertools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from attnlab import data, masks, models, nn
from attnlab.train import BlockDiffusionTask

SYMBOLS, LENGTH = 3, 4
MASK = SYMBOLS
ALL = np.array(list(itertools.product(range(SYMBOLS), repeat=LENGTH)), np.int32)  # every sequence, [81, 4]


def task_of(block, length=LENGTH, **options):
    text = np.random.default_rng(0).integers(SYMBOLS, size=300).astype(np.int32)
    corpus = data.Corpus("letters", text, text, "character", SYMBOLS, tuple("abc"))
    return BlockDiffusionTask(corpus, sequence_length=length, block=block, **options)


@functools.cache
def bound_model():
    """Far from even, so that orders and masks matter."""
    model = models.LanguageModel(
        vocabulary=SYMBOLS + 1,
        mixers=[functools.partial(nn.SoftmaxAttention, num_heads=2)],
        depth=2,
        features=8,
        scan_layers=True,
    )
    values = jax.tree.map(lambda x: 4 * x, nn.initialize(model, jax.random.key(0)))
    return model, values, nn.bind(model, values)


def surprise(logits, tokens):
    """In numpy, float64: nats by position, of all tokens but the mask."""
    logits = np.asarray(logits, np.float64)[..., :SYMBOLS]
    return np.log(np.exp(logits).sum(-1)) - np.take_along_axis(logits, np.asarray(tokens)[..., None], -1)[..., 0]


def batch_of(tokens):
    """The token before those that are predicted is not read."""
    return {"tokens": jnp.pad(jnp.asarray(tokens), ((0, 0), (1, 0)))}


@pytest.mark.parametrize("block", [pytest.param(1, marks=pytest.mark.long), 3])
def test_loss_is_that_of_masked_tokens_after_clean_blocks_alone(block):
    """Against numpy, block by block, without the second copy of the tokens. With blocks of 1 it is the next token's."""
    task, bound = task_of(block, 6), bound_model()[2]
    tokens = np.random.default_rng(1).integers(SYMBOLS, size=(4, 6)).astype(np.int32)
    both = jax.jit(lambda tokens: (task.loss(bound, batch_of(tokens), key=None), task.masked(tokens, None)[0]))
    (loss, metrics), masked = both(tokens)
    masked = np.asarray(masked)
    assert masked.all() == (block == 1)
    reads, places = [], []
    for row, hidden in zip(tokens, masked):
        for start in range(0, 6, block):
            # Clean before the block; after it something else, which nothing before may see.
            reads.append([*row[:start], *np.where(hidden, MASK, row)[start : start + block], *[0] * 6][:6])
            places.append((row, hidden, slice(start, start + block)))
    pattern = nn.Pattern(masks.block_causal(block))
    logits = jax.jit(lambda tokens: bound(tokens, pattern=pattern))(jnp.array(reads))
    expected = [surprise(of[own], row[own])[hidden[own]].mean() for of, (row, hidden, own) in zip(logits, places)]
    np.testing.assert_allclose(loss, np.mean(expected), rtol=1e-5)
    assert metrics["loss"] == loss
    assert task.derived({"loss": 1.0}) == {"bits_per_character, at most": pytest.approx(1 / math.log(2))}


def test_noisy_tokens_see_neither_their_own_clean_block_nor_later_ones():
    task, bound = task_of(2, 6), bound_model()[2]
    call = jax.jit(lambda tokens: bound(tokens, pattern=task.pattern))
    tokens = np.random.default_rng(2).integers(SYMBOLS, size=(1, 12)).astype(np.int32)
    own = np.asarray(call(tokens))
    for first in (0, 2, 4):  # of a block
        later, earlier = tokens.copy(), tokens.copy()
        later[:, 6 + first :] = (later[:, 6 + first :] + 1) % SYMBOLS  # the clean block and those after it
        later[:, first + 2 : 6] = MASK  # other noisy blocks
        later[:, :first] = MASK
        np.testing.assert_array_equal(np.asarray(call(later))[:, first : first + 2], own[:, first : first + 2])
        earlier[:, 6 : 6 + first] = (earlier[:, 6 : 6 + first] + 1) % SYMBOLS
        moved = np.abs(np.asarray(call(earlier)) - own)[:, first : first + 2].max() > 1e-3
        assert moved == (first > 0)


@functools.cache
def by_subset():
    """Nats of every sequence's tokens, by the masked subset of each block of 2: [3, 81, 2 blocks, 2]."""
    task, bound = task_of(2), bound_model()[2]
    subsets = np.array([[True, False], [False, True], [True, True]])
    noisy = np.where(np.tile(subsets, 2)[:, None], MASK, ALL)  # [3, 81, 4]
    both = np.concatenate([noisy, np.broadcast_to(ALL, noisy.shape)], -1).reshape(-1, 2 * LENGTH)
    logits = jax.jit(lambda tokens: bound(tokens, pattern=task.pattern))(jnp.asarray(both))[:, :LENGTH]
    return surprise(logits.reshape(3, len(ALL), LENGTH, -1), np.broadcast_to(ALL, noisy.shape)).reshape(3, -1, 2, 2)


def probabilities():
    """Of every sequence, when a block's tokens are drawn one at a time in a random order: [81]."""
    first, second, both = np.exp(-by_subset())  # [81, 2 blocks, 2]; the first one masked alone, ...
    of_block = (both[..., 0] * second[..., 1] + both[..., 1] * first[..., 0]) / 2
    return of_block.prod(-1)


def bounds():
    """Of every sequence: the mean over numbers of masked tokens, and over which, of the mean of theirs: [81]."""
    first, second, both = by_subset()
    return ((first[..., 0] + second[..., 1]) / 2 / 2 + both.mean(-1) / 2).mean(-1)


@pytest.mark.long
def test_the_bound_is_the_integral_over_time_and_bounds_the_probability_of_what_is_drawn():
    """(1/t) nats of each masked token, masked with probability t, over t uniform: Gauss's rule is exact for it."""
    p, bound = probabilities(), bounds()
    assert p.sum() == pytest.approx(1, rel=1e-5)
    assert np.all(-np.log(p) / LENGTH <= bound + 1e-12)
    assert np.max(bound + np.log(p) / LENGTH) > 0.05
    first, second, both = by_subset()
    nodes, weights = np.polynomial.legendre.leggauss(4)
    integral = sum(
        w / 2 * (t * (1 - t) * (first[..., 0] + second[..., 1]) + t**2 * both.sum(-1)) / t / 2
        for t, w in zip((nodes + 1) / 2, weights)
    ).mean(-1)
    np.testing.assert_allclose(bound, integral, rtol=1e-10)


@pytest.mark.long
def test_the_mean_loss_of_training_is_the_bound():
    """Within 5 standard errors of 1000 draws."""
    task, bound = task_of(2), bound_model()[2]
    keys = jax.random.split(jax.random.key(3), 1000)
    few = ALL[[7, 40, 77]]
    drawn = jax.jit(lambda keys: jax.vmap(lambda key: task.loss(bound, batch_of(few), key=key)[0])(keys))(keys)
    drawn, expected = np.asarray(drawn, np.float64), bounds()[[7, 40, 77]].mean()
    error = drawn.std() / math.sqrt(len(keys))
    assert error < 0.02
    assert abs(drawn.mean() - expected) < 5 * error


@pytest.mark.long
def test_blocks_of_one_token_have_their_exact_likelihood():
    task, bound = task_of(1), bound_model()[2]
    one = jax.vmap(lambda tokens: task.loss(bound, batch_of(tokens[None]), key=None)[0])
    losses = np.asarray(jax.jit(one)(ALL), np.float64)
    assert np.exp(-LENGTH * losses).sum() == pytest.approx(1, rel=1e-5)


@pytest.mark.long
def test_what_is_masked_is_even_over_numbers_and_the_same_in_every_evaluation():
    task = task_of(4, 32)
    tokens = np.random.default_rng(4).integers(SYMBOLS, size=(5, 32)).astype(np.int32)
    drawn = jax.jit(task.masked)
    masked, count = map(np.asarray, drawn(tokens, None))
    np.testing.assert_array_equal(masked.reshape(5, 8, 4).sum(-1), count.reshape(5, 8, 4)[..., 0])
    np.testing.assert_array_equal(np.asarray(task.masked(jnp.asarray(tokens[3:]), None)[0]), masked[3:])
    assert len({row.tobytes() for row in masked}) == 5
    masked, count = map(np.asarray, jax.vmap(drawn, (None, 0))(tokens, jax.random.split(jax.random.key(0), 50)))
    by_number = np.stack([(count[:, :, ::4] == number).sum((1, 2)) for number in (1, 2, 3, 4)])
    assert by_number.min() >= 8  # of 40 blocks in each draw
    assert by_number.max() <= 12
    np.testing.assert_allclose(masked.mean((0, 1)), 2.5 / 4, atol=0.1)


@pytest.mark.long
def test_samples_have_the_probabilities_that_are_bounded():
    """Every sequence's frequency among 4,000, within 5 standard errors."""
    bound, count = bound_model()[2], 4_000
    draw = jax.jit(lambda key: models.fill_blocks(bound, jnp.full((count, LENGTH), MASK), block=2, key=key))
    tokens, p = np.asarray(draw(jax.random.key(0))), probabilities()
    assert tokens.min() >= 0
    assert tokens.max() < SYMBOLS
    frequency = np.bincount(tokens @ SYMBOLS ** np.arange(LENGTH)[::-1], minlength=len(p)) / count
    assert np.all(np.abs(frequency - p) < 5 * np.sqrt(p / count) + 1 / count)
    np.testing.assert_array_equal(tokens, draw(jax.random.key(0)))
    assert np.any(tokens != draw(jax.random.key(1)))


@pytest.mark.slow
def test_given_tokens_stay_and_one_step_takes_a_whole_block():
    """At temperature 0 and in one step, a block is the likeliest of each of its tokens after those before it."""
    bound = bound_model()[2]
    call = jax.jit(lambda tokens: bound(tokens, pattern=nn.Pattern(masks.block_causal(3))))
    given = np.array([[0, 2, MASK, MASK, MASK], [1, MASK, 0, MASK, 2]], np.int32)  # the last block lacks a token
    fill = functools.partial(models.fill_blocks, bound, block=3, steps=1, temperature=0)
    drawn = np.asarray(jax.jit(lambda tokens, key: fill(tokens, key=key))(given, jax.random.key(0)))
    expected = np.pad(given, ((0, 0), (0, 1)), constant_values=MASK)
    for own in (slice(0, 3), slice(3, 6)):
        likeliest = np.argmax(call(expected)[:, own, :SYMBOLS], axis=-1)
        expected[:, own] = np.where(expected[:, own] == MASK, likeliest, expected[:, own])
    np.testing.assert_array_equal(drawn, expected[:, :5])


@pytest.mark.slow
def test_prompts_of_other_lengths_are_continued_and_given_as_texts():
    task, (model, values, _) = task_of(4, 12, steps=2), bound_model()
    draws = {"key": jax.random.key(1), "temperature": 1.0}
    prompts = [task.corpus.encode(text) for text in ("a", "abcab")]
    rows = list(zip(*task.continued(model, values, prompts, length=6, **draws)))
    assert [len(row) for row in rows] == [6, 6]
    assert set("".join(map("".join, rows))) <= set("abc")
    texts = [
        (task.corpus.decode(b), "".join(row))
        for b, row in zip(
            task.beginnings(2), zip(*task.continued(model, values, task.beginnings(2), length=9, **draws))
        )
    ]
    assert texts == task.continuations(model, values, count=2, **draws)


def test_costs_are_of_the_pairs_that_the_pattern_has():
    task, model = task_of(3, 12), bound_model()[0]
    pairs = int(masks.dense_mask(task.pattern.mask, (24,)).sum())
    assert task.costs(model)["flops"] * 12 == model.flops(24, pairs=pairs, outputs=12)
    assert (task.costs(model)["state_size"], task.costs(model)["units"]) == (None, 12)


@pytest.mark.long
def test_what_does_not_fit_is_refused_in_a_line():
    with pytest.raises(ValueError, match=r"^block: got 5; must divide sequence_length 12"):
        task_of(5, 12)
    with pytest.raises(ValueError, match=r"^steps: got 4"):
        task_of(3, 12, steps=4)
    task = task_of(3, 12)
    for options, message in (
        ({"vocabulary": 3}, "^vocabulary: got 3; letters needs 4, 3 tokens and the mask"),
        ({"mixers": [nn.LinearAttention]}, "^pattern: got one; but LinearAttention sees what its own options say"),
        ({"mixers": [functools.partial(nn.SoftmaxAttention, convolution=2)]}, "^pattern: .* has convolutions"),
        ({"max_length": 11}, "^tokens: got length 12; max_length is 11"),
    ):
        model = models.LanguageModel(
            **{"vocabulary": 4, "mixers": [nn.SoftmaxAttention], "depth": 1, "features": 8, **options}
        )
        bound = nn.bind(model, nn.initialize(model, jax.random.key(0)))
        with pytest.raises(ValueError, match=message):
            jax.eval_shape(lambda bound=bound: task.loss(bound, batch_of(np.zeros((2, 12), np.int32)), key=None))
