"""Synthetic sequences: what is asked follows from what was shown, and an example is decided by seed and index."""

import itertools

import numpy as np
import pytest

from attnlab import data

SOURCES = {
    "recall": data.MultiQueryRecall(length=64, pairs=8, vocabulary=256),
    "recall, mixed": data.MultiQueryRecall(length=64, pairs=(1, 4, 16), vocabulary=256),
    "copy": data.Copy(length=20, vocabulary=9),
    "selective copy": data.SelectiveCopy(length=40, tokens=6, vocabulary=9),
    "induction": data.Induction(length=17, vocabulary=9),
    "S3": data.Permutations(length=12, points=3),
    "S5": data.Permutations(length=12, points=5),
    "needle": data.Needle(length=40, distances=(2, 17, 39), vocabulary=30),
}
every_source = pytest.mark.parametrize("name", SOURCES)


def examples(name, count=60, seed=3):
    source = SOURCES[name]
    return [source.draw(np.random.default_rng((seed, index)), index) for index in range(count)]


@every_source
def test_examples_have_the_promised_shapes(name):
    source = SOURCES[name]
    for example in examples(name):
        assert set(example) == {"inputs", "targets"} | ({"group"} if source.groups else set())
        inputs, targets = example["inputs"], example["targets"]
        assert inputs.shape == targets.shape == (source.length,)
        assert {x.dtype for x in example.values()} == {np.dtype(np.int32)}
        assert inputs.min() >= 0
        assert inputs.max() < source.vocabulary
        assert targets.max() < source.vocabulary
        assert 1 <= np.sum(targets != data.IGNORED) <= source.answers
    assert max(np.sum(example["targets"] != data.IGNORED) for example in examples(name)) == source.answers


@every_source
def test_batches_are_decided_by_the_seed_and_validation_is_the_same_for_all(name):
    def first(split, seed):
        batches = data.sequence_batches(SOURCES[name], split, batch_size=4, seed=seed, validation_examples=10)
        return [batch["inputs"] for batch in itertools.islice(batches, 3)]

    assert np.array_equal(first("train", 0), first("train", 0))
    assert not np.array_equal(first("train", 0), first("train", 1))
    assert np.array_equal(first("validation", 0), first("validation", 1))
    fresh = np.concatenate(first("train", 0))
    assert len(np.unique(fresh, axis=0)) == len(fresh)


@pytest.mark.parametrize("name", ["recall", "recall, mixed"])
def test_recall_asks_for_the_value_of_a_key_shown_before(name):
    source = SOURCES[name]
    for index, example in enumerate(examples(name)):
        pairs = source.pairs if isinstance(source.pairs, int) else source.pairs[index % 3]
        inputs, targets = example["inputs"], example["targets"]
        keys, values = inputs[0 : 2 * pairs : 2], inputs[1 : 2 * pairs : 2]
        assert len(set(keys)) == len(set(values)) == pairs
        assert keys.min() >= 1
        assert keys.max() < 128 <= values.min()
        asked = np.flatnonzero(targets != data.IGNORED)
        assert len(asked) == pairs
        assert asked.min() >= 2 * pairs
        assert np.all(asked % 2 == 0)
        value_of = dict(zip(keys, values, strict=True))
        assert [value_of[key] for key in inputs[asked]] == list(targets[asked])
        assert set(inputs[asked]) == set(keys)


def test_recall_asks_early_by_its_power_law():
    """Slot i in proportion to i^(a - 1): with a = 0.01 nearly 1 / i; with a = 1 all alike."""

    def share_in_first_half(power):
        source = data.MultiQueryRecall(length=128, pairs=1, vocabulary=64, power=power)
        drawn = [source.draw(np.random.default_rng(index), index)["targets"] for index in range(1000)]
        return np.mean([np.argmax(targets != data.IGNORED) < 2 + 63 for targets in drawn])

    slots = np.arange(1, 64) ** -0.99
    expected = slots[:32].sum() / slots.sum()
    assert abs(share_in_first_half(0.01) - expected) < 0.04
    assert abs(share_in_first_half(1.0) - 0.5) < 0.05


def test_copying_repeats_the_first_half():
    for example in examples("copy"):
        inputs, targets = example["inputs"], example["targets"]
        assert inputs[10] == 0
        assert np.array_equal(targets[10:], inputs[:10])
        assert np.array_equal(inputs[11:], inputs[:9])
        assert np.all(targets[:10] == data.IGNORED)


def test_selective_copying_keeps_the_order():
    for example in examples("selective copy"):
        inputs, targets = example["inputs"], example["targets"]
        shown = inputs[:34]
        assert np.array_equal(shown[shown > 0], targets[34:])
        assert np.all(inputs[34:] == 1)


def test_induction_asks_for_what_followed_the_trigger():
    for example in examples("induction"):
        first, last = np.flatnonzero(example["inputs"] == 0)
        assert last == 16
        assert example["targets"][-1] == example["inputs"][first + 1]


@pytest.mark.parametrize("points", [3, 5])
def test_permutations_are_composed(points):
    table = list(itertools.permutations(range(points)))
    for example in examples(f"S{points}"):
        taken = list(range(points))  # where each thing has been taken
        for number, target in zip(example["inputs"], example["targets"], strict=True):
            taken = [table[number][x] for x in taken]
            assert table[target] == tuple(taken)


def test_a_needle_lies_at_its_distance():
    source = SOURCES["needle"]
    for index, example in enumerate(examples("needle")):
        inputs, distance = example["inputs"], source.distances[index % 3]
        assert example["group"] == index % 3
        key = inputs[39 - distance]
        assert key == inputs[39]
        assert np.sum(inputs == key) == 2
        assert example["targets"][-1] == inputs[40 - distance]


@pytest.mark.parametrize(
    ("make", "what"),
    [
        (lambda: data.MultiQueryRecall(length=14, pairs=4), "length: got 14"),
        (lambda: data.MultiQueryRecall(pairs=0), "pairs: got 0"),
        (lambda: data.MultiQueryRecall(vocabulary=8), "vocabulary: got 8"),
        (lambda: data.Copy(length=7), "length: got 7"),
        (lambda: data.SelectiveCopy(length=8, tokens=5), "tokens: got 5"),
        (lambda: data.Induction(length=2), "length: got 2"),
        (lambda: data.Permutations(points=9), "points: got 9"),
        (lambda: data.Needle(length=8, distances=(8,)), "distances: got"),
    ],
)
def test_a_source_that_cannot_be_is_refused_with_the_reason(make, what):
    with pytest.raises(ValueError, match=what.replace("(", r"\(")):
        make()


def test_regressions_give_every_pair_of_one_map_and_ask_for_each():
    source = data.LinearRegressions(dim=3, pairs=6)
    example = source.draw(np.random.default_rng(0), 0)
    inputs, targets = example["inputs"], example["targets"]
    assert inputs.shape == (source.length, 4) == (11, 4)
    assert targets.shape == (6,)
    x = inputs[::2, :3]
    assert np.all(inputs[::2, 3] == 0)
    assert np.all(inputs[1::2, :3] == 0)
    np.testing.assert_array_equal(inputs[1::2, 3], targets[:5])
    w, *_ = np.linalg.lstsq(x[:3], targets[:3], rcond=None)  # three pairs decide a map of three dimensions
    np.testing.assert_allclose(x @ w, targets, rtol=1e-3, atol=1e-4)
