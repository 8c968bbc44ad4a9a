"""What tasks share: what the training loop asks of one, and what several compute alike."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import grain
import jax
import jax.numpy as jnp

from attnlab import data, nn
from attnlab.models import LanguageModel, SequenceRegressor

Batch = dict[str, Any]
# Folded into the dropout key for what a task itself draws of images: a channel, a shift. Their models fold in smaller
# numbers.
TASK_DRAWS = 2**31


@runtime_checkable
class Task(Protocol):
    """What the training loop asks of a task."""

    def batches(self, split: str, batch_size: int, seed: int, rows: Sequence[int] | None = None) -> grain.IterDataset:
        """Batches of "train" (endless, ordered by the seed) or "validation" (one pass, always the same).

        rows: of each batch only these examples, ascending, which the devices of a process hold; None is all of them.
        """

    def loss(self, model: Any, batch: Batch, *, key: jax.Array | None) -> tuple[jax.Array, dict[str, jax.Array]]:
        """The loss and the metrics (means over the batch, "loss" among them). key: for dropout; None is evaluation."""

    def derived(self, metrics: dict[str, float]) -> dict[str, float]:
        """Further metrics, which follow from the means over an evaluation or over the steps of a row."""

    def inputs(self, batch_size: int) -> Batch:
        """Shapes and dtypes of a training batch."""

    def describe(self) -> dict[str, Any]:
        """The data, as JSON: source, sizes, content hash."""

    def costs(self, model: Any) -> dict[str, Any]:
        """{"unit": "token" or "image" or the like, "units": in an example, "flops": forward, of a unit, "state_size":
        None where nothing is decoded, "length": None where there is no sequence}."""


@runtime_checkable
class Illustrated(Protocol):
    """A task whose models draw something to look at; the loop asks for it once, after the last step."""

    def illustrate(
        self, model: Any, values: nn.Parameters, path: Path, *, key: jax.Array, count: int, temperature: float
    ) -> None:
        """Writes a picture of `count` samples. model: without values. temperature: 0 takes what is likeliest."""


def weighted_means(batch: Batch, **metrics: jax.Array) -> dict[str, jax.Array]:
    """Means over the examples, [batch] -> [], by the batch's weights."""
    weight = data.weight_of(batch)
    return {name: jnp.sum(values * weight) / jnp.sum(weight) for name, values in metrics.items()}


def sequence_costs(model: LanguageModel | SequenceRegressor, length: int) -> dict[str, Any]:
    return {
        "unit": "token",
        "units": length,
        "flops": model.flops(length) / length,
        "state_size": model.state_size(length),
        "length": length,
    }
