"""From examples by index to batches. What a batch holds depends on the source, the batch size and the seed alone."""

import functools
import gzip
import inspect
import math
import numbers
import zlib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, TypeVar

import grain
import jax
import numpy as np

from attnlab.attention._shared.checks import check_choice, check_int, shown
from attnlab.errors import UserError

Data = TypeVar("Data")

MOST_SEED = 2**31 - 1  # of training; what validates is drawn from the next one

_EXAMPLES = 2**62  # of training, in all epochs: grain counts them in 64 bits


def check_batches(split: str, batch_size: int, seed: int, rows: Sequence[int] | None) -> None:
    """Checks what all functions that make batches take."""
    check_choice("split", split, ("train", "validation"))
    check_int("batch_size", batch_size, least=1)
    check_int("seed", seed, least=0, most=MOST_SEED)
    if rows is not None and not (isinstance(rows, Sequence) and len(rows)):
        raise TypeError(f"rows: got {shown(rows)}; need a sequence of ints, or None for all")
    for row in rows or ():
        check_int("rows", row, least=0, most=batch_size - 1)


def read_once(read: Callable[..., Data]) -> Callable[..., Data]:
    """A function that reads data, called once for the same arguments."""
    cached = functools.lru_cache(maxsize=None, typed=True)(read)

    @functools.wraps(read)
    def call(*args: Any, **options: Any) -> Data:
        given = inspect.signature(read).bind(*args, **options)
        for name, value in given.arguments.items():
            if isinstance(value, numbers.Integral) and not isinstance(value, bool):
                given.arguments[name] = int(value)
            elif not isinstance(value, (str, Path)):
                raise TypeError(f"{name}: got {shown(value)}; need a string, or an int")
        return cached(*given.args, **given.kwargs)

    call.cache_clear = cached.cache_clear  # type: ignore[attr-defined]
    return call


def content(function: str, file: Path, *, unpacks: bool = False) -> bytes:
    """What a file holds. unpacks: decompressed, where its name ends in .gz. function: what reads it, for errors."""
    try:
        held = file.read_bytes()
        return gzip.decompress(held) if unpacks and file.suffix == ".gz" else held
    except (OSError, EOFError, zlib.error) as error:
        raise UserError(f"{function}: cannot read {file}: {error}") from error


def endless(source: Any, batch_size: int, seed: int, rows: Sequence[int] | None = None) -> grain.IterDataset:
    """Batches for training, without end: each epoch in an order of its own that the seed decides."""
    epochs = _EXAMPLES // len(source)
    return batched(grain.MapDataset.source(source).shuffle(seed=seed).repeat(epochs), batch_size, rows)


def one_pass(source: Any, batch_size: int, rows: Sequence[int] | None = None) -> grain.IterDataset:
    """Batches of one pass in the source's order, all of one shape.

    Every batch has "weight", float32 [batch]: 1 for an example, 0 for the copies that fill the last batch up.
    """
    return batched(grain.MapDataset.source(_Filled(source, batch_size)), batch_size, rows)


def batched(examples: grain.MapDataset, batch_size: int, rows: Sequence[int] | None = None) -> grain.IterDataset:
    """The examples in batches, some drawn ahead by a thread.

    rows: of each batch only these, ascending, so that several processes draw a batch together; None draws all of them.
    """
    if rows is not None:
        examples, batch_size = _Rows(examples, batch_size, rows), len(rows)
    return examples.batch(batch_size).to_iter_dataset(grain.ReadOptions(num_threads=1, prefetch_buffer_size=4))


class _Rows(grain.MapDataset):
    """Of every `batch_size` examples those at `rows`."""

    def __init__(self, parent: grain.MapDataset, batch_size: int, rows: Sequence[int]):
        super().__init__(parent)
        self._batch_size, self._rows = batch_size, rows

    def __len__(self) -> int:
        return len(self._parent) // self._batch_size * len(self._rows)

    def __getitem__(self, index: Any) -> Any:
        if isinstance(index, slice):
            return self.slice(index)
        batch, place = divmod(index, len(self._rows))
        return self._parent[batch * self._batch_size + self._rows[place]]


class _Filled(grain.sources.RandomAccessDataSource):
    """A source made a multiple of `batch_size` long by copies of weight 0."""

    def __init__(self, source: Any, batch_size: int):
        self._source, self._batch_size = source, batch_size

    def __len__(self) -> int:
        return math.ceil(len(self._source) / self._batch_size) * self._batch_size

    def __getitem__(self, index: int) -> dict[str, np.ndarray]:
        real = index < len(self._source)
        return {**self._source[index if real else 0], "weight": np.float32(real)}


def weight_of(batch: dict[str, jax.Array]) -> jax.Array:
    """The examples' weights, [batch]; 1 each in training batches, which carry none."""
    examples = next(iter(batch.values()))
    return batch.get("weight", jax.numpy.ones(examples.shape[0]))
