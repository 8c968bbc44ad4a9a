"""Sequences that are drawn as they are asked for: tokens to recall, and regression in context."""

import dataclasses
from collections.abc import Sequence
from typing import Any

import grain
import jax
import jax.numpy as jnp
import optax

from attnlab import data
from attnlab.attention._shared.checks import check_int, keep, shown
from attnlab.models import LanguageModel, SequenceRegressor
from attnlab.train.tasks.base import Batch, sequence_costs, weighted_means


@dataclasses.dataclass(frozen=True)
class _DrawnTask:
    """What tasks of drawn examples share.

    Args:
      source: draws the examples.
      validation_examples: the same ones for every seed.
    """

    source: Any
    validation_examples: int = 1024

    def __post_init__(self) -> None:
        examples = check_int("validation_examples", self.validation_examples, least=1, most=2**31 - 1)
        keep(self, validation_examples=examples)
        if not hasattr(self.source, "draw") or isinstance(self.source, type):
            raise TypeError(f"source: got {shown(self.source)}; need a source of sequences, such as data.Copy()")

    def batches(self, split: str, batch_size: int, seed: int, rows: Sequence[int] | None = None) -> grain.IterDataset:
        return data.sequence_batches(
            self.source,
            split,
            batch_size=batch_size,
            seed=seed,
            validation_examples=self.validation_examples,
            rows=rows,
        )

    def derived(self, metrics: dict[str, float]) -> dict[str, float]:
        return {}

    def describe(self) -> dict[str, Any]:
        options = dataclasses.asdict(self.source)
        return {"source": type(self.source).__name__, **options, "validation examples": self.validation_examples}

    def costs(self, model: LanguageModel | SequenceRegressor) -> dict[str, Any]:
        return sequence_costs(model, self.source.length)


@dataclasses.dataclass(frozen=True)
class SequenceTask(_DrawnTask):
    """Synthetic sequences (attnlab.data.sequences): mean cross entropy, in nats, of the positions that are asked for.

    "accuracy" is their share answered right, "solved" that of examples with every answer right. Evaluation also reports
    accuracy by the source's groups: with a batch size that is a multiple of their number these are exact means.
    """

    source: data.SequenceSource

    def loss(
        self, model: LanguageModel, batch: Batch, *, key: jax.Array | None
    ) -> tuple[jax.Array, dict[str, jax.Array]]:
        if model.vocabulary < self.source.vocabulary:
            needed = f"the tokens of {type(self.source).__name__} need {self.source.vocabulary}"
            raise ValueError(f"vocabulary: got {model.vocabulary}; {needed}")
        # Logits are computed where they are asked for, which is at few positions of many.
        positions = jnp.argsort(batch["targets"] == data.IGNORED, axis=-1, stable=True)[:, : self.source.answers]
        targets = jnp.take_along_axis(batch["targets"], positions, axis=-1)
        asked = targets != data.IGNORED
        logits = model(batch["inputs"], output_positions=positions, key=key)
        losses = optax.losses.softmax_cross_entropy_with_integer_labels(logits, jnp.maximum(targets, 0))
        right = asked & (jnp.argmax(logits, axis=-1) == targets)
        count = jnp.sum(asked, axis=-1)
        accuracy = jnp.sum(right, axis=-1) / count
        means = weighted_means(
            batch,
            loss=jnp.sum(losses * asked, axis=-1) / count,
            accuracy=accuracy,
            solved=jnp.sum(right, axis=-1) == count,
        )
        if key is None:
            weight = data.weight_of(batch)
            for number, name in enumerate(self.source.groups):
                inside = weight * (batch["group"] == number)
                means[f"accuracy, {name}"] = jnp.sum(accuracy * inside) / jnp.maximum(jnp.sum(inside), 1)
        return means["loss"], means

    def inputs(self, batch_size: int) -> Batch:
        tokens = jax.ShapeDtypeStruct((batch_size, self.source.length), jnp.int32)
        group = {"group": jax.ShapeDtypeStruct((batch_size,), jnp.int32)} if self.source.groups else {}
        return {"inputs": tokens, "targets": tokens, **group}


@dataclasses.dataclass(frozen=True)
class RegressionTask(_DrawnTask):
    """Regression in context (attnlab.data.LinearRegressions): mean squared error over dim, so that answering 0 costs 1.

    Evaluation reports the error by the pairs seen before, "error, 4 pairs", beside what two predictors of the same
    pairs leave: "ridge" (regression with a ridge of 1e-3) and "one step" (of gradient descent from 0, of the size that
    is best on average, 1 / (pairs + dim + 1)).
    """

    source: data.LinearRegressions

    def loss(
        self, model: SequenceRegressor, batch: Batch, *, key: jax.Array | None
    ) -> tuple[jax.Array, dict[str, jax.Array]]:
        targets = batch["targets"]
        errors = (model(batch["inputs"], key=key)[:, ::2] - targets) ** 2 / self.source.dim  # [batch, pairs]
        metrics = {"loss": jnp.mean(errors, axis=-1)}
        if key is None:
            x = batch["inputs"][:, ::2, :-1]
            for seen in self._seen():
                metrics[f"error, {seen} pairs"] = errors[:, seen]
                for name, weights in _in_context_weights(x[:, :seen], targets[:, :seen]).items():
                    answer = jnp.einsum("bd,bd->b", weights, x[:, seen])
                    metrics[f"{name}, {seen} pairs"] = (answer - targets[:, seen]) ** 2 / self.source.dim
        means = weighted_means(batch, **metrics)
        return means["loss"], means

    def _seen(self) -> list[int]:
        """Numbers of pairs before a question: powers of two, and the last."""
        last = self.source.pairs - 1
        return sorted({2**power for power in range(last.bit_length()) if 2**power <= last} | {last})

    def inputs(self, batch_size: int) -> Batch:
        source = self.source
        return {
            "inputs": jax.ShapeDtypeStruct((batch_size, source.length, source.dim + 1), jnp.float32),
            "targets": jax.ShapeDtypeStruct((batch_size, source.pairs), jnp.float32),
        }


def _in_context_weights(x: jax.Array, y: jax.Array) -> dict[str, jax.Array]:
    """x [batch, seen, dim], y [batch, seen] -> by predictor, the w of its answers w . x, [batch, dim]."""
    _, seen, dim = x.shape
    moment = jnp.einsum("bsd,bs->bd", x, y)
    gram = jnp.einsum("bsd,bse->bde", x, x) + 1e-3 * jnp.eye(dim)
    return {"ridge": jnp.linalg.solve(gram, moment[..., None])[..., 0], "one step": moment / (seen + dim + 1)}
