"""From examples by index to batches. What a batch holds depends on the source, the batch size and the seed alone."""

import math
from typing import Any

import grain
import jax
import numpy as np


def endless(source: Any, batch_size: int, seed: int) -> grain.IterDataset:
    """Batches for training, without end: each epoch in an order of its own that the seed decides."""
    return prefetched(grain.MapDataset.source(source).shuffle(seed=seed).repeat().batch(batch_size))


def one_pass(source: Any, batch_size: int) -> grain.IterDataset:
    """Batches of one pass in the source's order, all of one shape.

    Every batch has "weight", float32 [batch]: 1 for an example, 0 for the copies that fill the last batch up.
    """
    return prefetched(grain.MapDataset.source(_Filled(source, batch_size)).batch(batch_size))


def prefetched(batches: grain.MapDataset) -> grain.IterDataset:
    """The batches in order, some drawn ahead by a thread."""
    return batches.to_iter_dataset(grain.ReadOptions(num_threads=1, prefetch_buffer_size=4))


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
