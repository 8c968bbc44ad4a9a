"""Synthetic sequences that ask for one ability each: recall, copying, selecting, following a state, regression.

An example is {"inputs": int32 [length], "targets": int32 [length]}, a target of -1 asking nothing; some sources add
"group", int32, by which accuracy is reported. Example i of a seed is always the same and is drawn when it is asked
for, so that training never sees one twice and nothing is stored.
"""

import dataclasses
import functools
import itertools
import math
from collections.abc import Sequence
from typing import ClassVar, Protocol

import grain
import numpy as np

from attnlab.attention._shared.checks import check_float, check_int, check_ints, keep, require, shown
from attnlab.data.batches import MOST_SEED, batched, check_batches, one_pass

IGNORED = -1
# Validation is the same for all seeds of training. Seeds of training count up from 0 and do not reach it.
_VALIDATION_SEED = MOST_SEED + 1
_ENDLESS = 2**31 - 1


class ExampleSource(Protocol):
    def draw(self, rng: np.random.Generator, index: int) -> dict[str, np.ndarray]:
        """Example number `index`, from this stream."""


class SequenceSource(ExampleSource, Protocol):
    """What draws examples of tokens.

    length, vocabulary: of inputs and targets. answers: positions that an example asks for, at most. groups: names of
    the numbers in "group", or empty.
    """

    @property
    def length(self) -> int: ...

    @property
    def vocabulary(self) -> int: ...

    @property
    def answers(self) -> int: ...

    @property
    def groups(self) -> tuple[str, ...]: ...


def sequence_batches(
    source: ExampleSource,
    split: str,
    *,
    batch_size: int,
    seed: int,
    validation_examples: int,
    rows: Sequence[int] | None = None,
) -> grain.IterDataset:
    """Batches of examples: "train" without end, never an example twice; "validation" one pass over its own.

    rows: as in text_batches.
    """
    check_batches(split, batch_size, seed, rows)
    if split == "train":
        return batched(grain.MapDataset.source(_Drawn(source, seed, _ENDLESS)), batch_size, rows)
    examples = check_int("validation_examples", validation_examples, least=1, most=_ENDLESS)
    return one_pass(_Drawn(source, _VALIDATION_SEED, examples), batch_size, rows)


class _Drawn(grain.sources.RandomAccessDataSource):
    def __init__(self, source: ExampleSource, seed: int, count: int):
        self._source, self._seed, self._count = source, seed, count

    def __len__(self) -> int:
        return self._count

    def __getitem__(self, index: int) -> dict[str, np.ndarray]:
        return self._source.draw(np.random.default_rng((self._seed, index)), index)


def _example(inputs: np.ndarray, targets: np.ndarray, **more: int) -> dict[str, np.ndarray]:
    return {name: np.asarray(x, np.int32) for name, x in {"inputs": inputs, "targets": targets, **more}.items()}


@dataclasses.dataclass(frozen=True)
class MultiQueryRecall:
    """MQAR (Arora et al. 2023, Zoology): k1 v1 ... kN vN, then keys again at positions drawn from a power law, each
    asking for its value; the positions between hold random tokens.

    Args:
      length, pairs: length >= 4 pairs. An example whose `pairs` is a tuple draws one of its numbers by index, and the
        accuracy is reported by it.
      vocabulary: keys from [1, vocabulary / 2), values from [vocabulary / 2, vocabulary).
      power: a; slot i of the queries is drawn in proportion to i^(a - 1), so small a asks early.
    """

    length: int = 64
    pairs: int | tuple[int, ...] = 4
    vocabulary: int = 8192
    power: float = 0.01

    def __post_init__(self) -> None:
        length, vocabulary = check_int("length", self.length), check_int("vocabulary", self.vocabulary)
        pairs, power = check_ints("pairs", self.pairs), check_float("power", self.power)
        keep(self, length=length, vocabulary=vocabulary, pairs=pairs, power=power)
        most = max(self._pairs)
        require(
            length % 2 == 0 and length >= 4 * most, "length", length, f"need an even one >= {4 * most} for pairs {most}"
        )
        require(vocabulary // 2 > most, "vocabulary", vocabulary, f"need more than {2 * most} for pairs {most}")

    @property
    def _pairs(self) -> tuple[int, ...]:
        return (self.pairs,) if isinstance(self.pairs, int) else self.pairs

    @property
    def groups(self) -> tuple[str, ...]:
        return () if isinstance(self.pairs, int) else tuple(f"{pairs} pairs" for pairs in self.pairs)

    @property
    def answers(self) -> int:
        return max(self._pairs)

    def draw(self, rng: np.random.Generator, index: int) -> dict[str, np.ndarray]:
        group = index % len(self._pairs)
        pairs, half = self._pairs[group], self.vocabulary // 2
        keys = 1 + rng.choice(half - 1, pairs, replace=False)
        values = half + rng.choice(self.vocabulary - half, pairs, replace=False)
        inputs = rng.integers(self.vocabulary, size=self.length)
        inputs[0 : 2 * pairs : 2], inputs[1 : 2 * pairs : 2] = keys, values
        slots = np.arange(1, (self.length - 2 * pairs) // 2 + 1)
        chance = slots ** (self.power - 1.0)
        asked = 2 * pairs + 2 * rng.choice(len(slots), pairs, replace=False, p=chance / chance.sum())
        targets = np.full(self.length, IGNORED)
        inputs[asked], targets[asked] = keys, values
        return _example(inputs, targets, **({"group": group} if self.groups else {}))


@dataclasses.dataclass(frozen=True)
class Copy:
    """Random tokens, a separator, and the tokens again: all of the second time is asked for.

    length: even; half of it tokens. vocabulary: the separator is token 0.
    """

    length: int = 64
    vocabulary: int = 32
    groups: ClassVar[tuple[str, ...]] = ()

    def __post_init__(self) -> None:
        length = check_int("length", self.length)
        require(length % 2 == 0 and length >= 2, "length", length, "need an even one, at least 2")
        keep(self, length=length, vocabulary=check_int("vocabulary", self.vocabulary, least=2))

    @property
    def answers(self) -> int:
        return self.length // 2

    def draw(self, rng: np.random.Generator, index: int) -> dict[str, np.ndarray]:
        half = self.length // 2
        tokens = rng.integers(1, self.vocabulary, size=half)
        inputs = np.concatenate([tokens, [0], tokens[:-1]])
        return _example(inputs, np.concatenate([np.full(half, IGNORED), tokens]))


@dataclasses.dataclass(frozen=True)
class SelectiveCopy:
    """Tokens scattered among blanks, then as many separators, at which the tokens are asked for in order (Gu and Dao
    2023): what to keep depends on the content.

    length: of it all. tokens: how many are to be copied. vocabulary: 0 is the blank, 1 the separator.
    """

    length: int = 128
    tokens: int = 16
    vocabulary: int = 32
    groups: ClassVar[tuple[str, ...]] = ()

    def __post_init__(self) -> None:
        length = check_int("length", self.length, least=2)
        tokens = check_int("tokens", self.tokens, least=1, most=length // 2)
        keep(self, length=length, tokens=tokens, vocabulary=check_int("vocabulary", self.vocabulary, least=3))

    @property
    def answers(self) -> int:
        return self.tokens

    def draw(self, rng: np.random.Generator, index: int) -> dict[str, np.ndarray]:
        before = self.length - self.tokens
        tokens = rng.integers(2, self.vocabulary, size=self.tokens)
        inputs, targets = np.zeros(self.length, int), np.full(self.length, IGNORED)
        inputs[np.sort(rng.choice(before, self.tokens, replace=False))] = tokens
        inputs[before:], targets[before:] = 1, tokens
        return _example(inputs, targets)


@dataclasses.dataclass(frozen=True)
class Induction:
    """Random tokens in which a trigger comes twice, the second time at the end: what followed the first is asked for
    (Fu et al. 2023).

    vocabulary: 0 is the trigger.
    """

    length: int = 64
    vocabulary: int = 32
    groups: ClassVar[tuple[str, ...]] = ()

    def __post_init__(self) -> None:
        vocabulary = check_int("vocabulary", self.vocabulary, least=2)
        keep(self, length=check_int("length", self.length, least=3), vocabulary=vocabulary)

    @property
    def answers(self) -> int:
        return 1

    def draw(self, rng: np.random.Generator, index: int) -> dict[str, np.ndarray]:
        inputs = rng.integers(1, self.vocabulary, size=self.length)
        first = int(rng.integers(self.length - 2))
        inputs[first] = inputs[-1] = 0
        targets = np.full(self.length, IGNORED)
        targets[-1] = inputs[first + 1]
        return _example(inputs, targets)


@dataclasses.dataclass(frozen=True)
class Permutations:
    """Composition of permutations of `points` things (3: S3, 5: S5): at every position the product of all so far is
    asked for, which takes a state (Merrill et al. 2024).

    An input is the number of a permutation in lexicographic order; the target is p_t o ... o p_1.
    """

    length: int = 32
    points: int = 3
    groups: ClassVar[tuple[str, ...]] = ()

    def __post_init__(self) -> None:
        points = check_int("points", self.points, least=2, most=6)
        keep(self, length=check_int("length", self.length, least=1), points=points)

    @property
    def vocabulary(self) -> int:
        return math.factorial(self.points)

    @property
    def answers(self) -> int:
        return self.length

    def draw(self, rng: np.random.Generator, index: int) -> dict[str, np.ndarray]:
        products = _products(self.points)
        inputs = rng.integers(len(products), size=self.length)
        targets = itertools.accumulate(inputs.tolist(), lambda before, now: products[before][now])
        return _example(inputs, np.array(list(targets)))


@functools.cache
def _products(points: int) -> list[list[int]]:
    """[points!][points!], the number of q o p by those of p and q, in lexicographic order."""
    table = np.array(list(itertools.permutations(range(points))))
    codes = points ** np.arange(points)[::-1]  # a permutation as a number, which keeps the order
    return np.searchsorted(table @ codes, (table[:, table] @ codes).T).tolist()


@dataclasses.dataclass(frozen=True)
class Needle:
    """One key and its value in a haystack of random tokens; the key at the end asks for the value.

    Args:
      length: of the sequence.
      distances: tokens from the needle's key to the question's; examples take them in turn, and the accuracy is
        reported by distance.
      vocabulary: a third each for keys, values and the haystack.
    """

    length: int = 256
    distances: tuple[int, ...] = (16, 64, 128, 255)
    vocabulary: int = 96

    def __post_init__(self) -> None:
        length = check_int("length", self.length, least=3)
        vocabulary, distances = check_int("vocabulary", self.vocabulary, least=3), self.distances
        if not isinstance(distances, (tuple, list)) or not distances:
            raise TypeError(f"distances: got {shown(distances)}; need a tuple of ints")
        distances = tuple(check_int("distances", item, of=self.distances) for item in distances)
        inside = all(2 <= distance < length for distance in distances)
        require(inside, "distances", shown(self.distances), f"need numbers from 2 to {length - 1}")
        keep(self, length=length, vocabulary=vocabulary, distances=distances)

    @property
    def groups(self) -> tuple[str, ...]:
        return tuple(f"distance {distance}" for distance in self.distances)

    @property
    def answers(self) -> int:
        return 1

    def draw(self, rng: np.random.Generator, index: int) -> dict[str, np.ndarray]:
        group, third = index % len(self.distances), self.vocabulary // 3
        inputs = rng.integers(2 * third, self.vocabulary, size=self.length)
        key, value = rng.integers(third), third + rng.integers(third)
        position = int(self.length - 1 - self.distances[group])
        inputs[position], inputs[position + 1], inputs[-1] = key, value, key
        targets = np.full(self.length, IGNORED)
        targets[-1] = value
        return _example(inputs, targets, group=group)


@dataclasses.dataclass(frozen=True)
class LinearRegressions:
    """A linear map in every example, to be learned from pairs in the context: x_1 y_1 x_2 y_2 ... x_n, y_i = w . x_i,
    with w and all x_i from N(0, I) (Garg et al. 2022). At every x_i its y_i is asked for.

    An example is {"inputs": float32 [2 pairs - 1, dim + 1], rows (x_i, 0) and (0, y_i) in turn; "targets": float32
    [pairs], the y_i}.

    Args:
      dim: of x. pairs: x_i of a sequence.
    """

    dim: int = 4
    pairs: int = 16

    def __post_init__(self) -> None:
        keep(self, dim=check_int("dim", self.dim, least=1), pairs=check_int("pairs", self.pairs, least=2))

    @property
    def length(self) -> int:
        return 2 * self.pairs - 1

    def draw(self, rng: np.random.Generator, index: int) -> dict[str, np.ndarray]:
        x, w = rng.normal(size=(self.pairs, self.dim)), rng.normal(size=self.dim)
        y = x @ w
        inputs = np.zeros((2 * self.pairs, self.dim + 1), np.float32)
        inputs[::2, :-1], inputs[1::2, -1] = x, y
        return {"inputs": inputs[:-1], "targets": y.astype(np.float32)}
