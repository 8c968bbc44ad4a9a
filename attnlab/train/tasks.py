"""Tasks: where batches come from, and what a model's answer to one is worth."""

import dataclasses
import math
from typing import Any, Protocol

import grain
import jax
import jax.numpy as jnp
import optax

from attnlab import data
from attnlab.models import ImageClassifier, LanguageModel, SequenceRegressor

Batch = dict[str, Any]


class Task(Protocol):
    """What the training loop asks of a task."""

    def batches(self, split: str, batch_size: int, seed: int) -> grain.IterDataset:
        """Batches of "train" (endless, ordered by the seed) or "validation" (one pass, always the same)."""

    def loss(self, model: Any, batch: Batch, *, key: jax.Array | None) -> tuple[jax.Array, dict[str, jax.Array]]:
        """The loss and the metrics (means over the batch, "loss" among them). key: for dropout; None is evaluation."""

    def derived(self, metrics: dict[str, float]) -> dict[str, float]:
        """Further metrics, which follow from the means over an evaluation or over the steps of a row."""

    def inputs(self, batch_size: int) -> Batch:
        """Shapes and dtypes of a training batch."""

    def describe(self) -> dict[str, Any]:
        """The data, as JSON: source, sizes, content hash."""

    def costs(self, model: Any) -> dict[str, Any]:
        """{"unit": "token" or "image", "units": in an example, "flops": forward, of a unit, "state_size", "length"}."""


def _weighted_means(batch: Batch, **metrics: jax.Array) -> dict[str, jax.Array]:
    """Means over the examples, [batch] -> [], by the batch's weights."""
    weight = data.weight_of(batch)
    return {name: jnp.sum(values * weight) / jnp.sum(weight) for name, values in metrics.items()}


def _sequence_costs(model: LanguageModel | SequenceRegressor, length: int) -> dict[str, Any]:
    return {
        "unit": "token",
        "units": length,
        "flops": model.flops(length) / length,
        "state_size": model.state_size(length),
        "length": length,
    }


@dataclasses.dataclass(frozen=True)
class LanguageTask:
    """Prediction of the next token of a text: mean cross entropy in nats a token, and as bits or perplexity.

    Args:
      corpus: the text.
      sequence_length: tokens that are predicted in an example.
      probe_future: evaluation also looks for a leak: it reads each sequence again with the second half of another one,
        and tells the loss in the first half both times ("first half, own future", "first half, other future") and the
        share of its places whose logits move by more than 0.001 ("leak"), which is 0 for a causal model.
    """

    corpus: data.Corpus
    sequence_length: int = 256
    probe_future: bool = False

    def __post_init__(self) -> None:
        if self.probe_future and self.sequence_length < 4:
            raise ValueError(f"probe_future: got True with sequence_length {self.sequence_length}; needs at least 4")

    def batches(self, split: str, batch_size: int, seed: int) -> grain.IterDataset:
        return data.text_batches(
            self.corpus, split, sequence_length=self.sequence_length, batch_size=batch_size, seed=seed
        )

    def loss(
        self, model: LanguageModel, batch: Batch, *, key: jax.Array | None
    ) -> tuple[jax.Array, dict[str, jax.Array]]:
        if model.vocabulary < self.corpus.vocabulary:
            raise ValueError(
                f"vocabulary: got {model.vocabulary}; the tokens of {self.corpus.name} need {self.corpus.vocabulary}"
            )
        targets = batch["tokens"][:, 1:]
        logits = model(batch["tokens"][:, :-1], key=key)
        losses = optax.losses.softmax_cross_entropy_with_integer_labels(logits, targets)
        means = _weighted_means(
            batch,
            loss=jnp.mean(losses, axis=-1),
            accuracy=jnp.mean(jnp.argmax(logits, axis=-1) == targets, axis=-1),
        )
        if self.probe_future and key is None:
            means |= _weighted_means(batch, **self._leak(model, batch["tokens"], logits))
        return means["loss"], means

    def _leak(self, model: LanguageModel, tokens: jax.Array, logits: jax.Array) -> dict[str, jax.Array]:
        half = self.sequence_length // 2
        swapped = jnp.concatenate([tokens[:, :half], jnp.roll(tokens[:, half:], 1, axis=0)], axis=1)
        # The last place of the first half predicts a token of the second.
        own, other = (x[:, : half - 1] for x in (logits, model(swapped[:, :-1])))
        targets = tokens[:, 1:half]
        entropy = optax.losses.softmax_cross_entropy_with_integer_labels
        return {
            "first half, own future": jnp.mean(entropy(own, targets), axis=-1),
            "first half, other future": jnp.mean(entropy(other, targets), axis=-1),
            "leak": jnp.mean(jnp.max(jnp.abs(own - other), axis=-1) > 1e-3, axis=-1),
        }

    def derived(self, metrics: dict[str, float]) -> dict[str, float]:
        """Of the mean loss, in the units of the literature."""
        if self.corpus.unit == "word":
            return {"perplexity": math.exp(min(metrics["loss"], 700.0))}
        return {f"bits_per_{self.corpus.unit}": metrics["loss"] / math.log(2)}

    def inputs(self, batch_size: int) -> Batch:
        return {"tokens": jax.ShapeDtypeStruct((batch_size, self.sequence_length + 1), jnp.int32)}

    def describe(self) -> dict[str, Any]:
        return {**self.corpus.describe(), "sequence length": self.sequence_length}

    def costs(self, model: LanguageModel) -> dict[str, Any]:
        return _sequence_costs(model, self.sequence_length)


@dataclasses.dataclass(frozen=True)
class SequenceTask:
    """Synthetic sequences (attnlab.data.sequences): mean cross entropy, in nats, of the places that are asked for.

    "accuracy" is their share answered right, "solved" that of examples with every answer right. Evaluation also tells
    accuracy by the source's groups: with a batch size that is a multiple of their number these are exact means.

    Args:
      source: draws the examples.
      validation_examples: the same ones for every seed.
    """

    source: data.SequenceSource
    validation_examples: int = 1024

    def __post_init__(self) -> None:
        if self.validation_examples < 1:
            raise ValueError(f"validation_examples: got {self.validation_examples}; need at least 1")

    def batches(self, split: str, batch_size: int, seed: int) -> grain.IterDataset:
        return data.sequence_batches(
            self.source, split, batch_size=batch_size, seed=seed, validation_examples=self.validation_examples
        )

    def loss(
        self, model: LanguageModel, batch: Batch, *, key: jax.Array | None
    ) -> tuple[jax.Array, dict[str, jax.Array]]:
        # Logits are computed where they are asked for, which is at few places of many.
        places = jnp.argsort(batch["targets"] == data.IGNORED, axis=-1, stable=True)[:, : self.source.answers]
        targets = jnp.take_along_axis(batch["targets"], places, axis=-1)
        asked = targets != data.IGNORED
        logits = model(batch["inputs"], places=places, key=key)
        losses = optax.losses.softmax_cross_entropy_with_integer_labels(logits, jnp.maximum(targets, 0))
        right = asked & (jnp.argmax(logits, axis=-1) == targets)
        count = jnp.sum(asked, axis=-1)
        accuracy = jnp.sum(right, axis=-1) / count
        means = _weighted_means(
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

    def derived(self, metrics: dict[str, float]) -> dict[str, float]:
        return {}

    def inputs(self, batch_size: int) -> Batch:
        tokens = jax.ShapeDtypeStruct((batch_size, self.source.length), jnp.int32)
        group = {"group": jax.ShapeDtypeStruct((batch_size,), jnp.int32)} if self.source.groups else {}
        return {"inputs": tokens, "targets": tokens, **group}

    def describe(self) -> dict[str, Any]:
        options = dataclasses.asdict(self.source)  # type: ignore[call-overload]
        return {"source": type(self.source).__name__, **options, "validation examples": self.validation_examples}

    def costs(self, model: LanguageModel) -> dict[str, Any]:
        return _sequence_costs(model, self.source.length)


@dataclasses.dataclass(frozen=True)
class RegressionTask:
    """Regression in context (attnlab.data.LinearRegressions): mean squared error over dim, so that answering 0 costs 1.

    Evaluation tells the error by the pairs seen before, "error, 4 pairs", beside what two predictors of the same pairs
    leave: "ridge" (regression with a ridge of 1e-3) and "one step" (of gradient descent from 0, of the size that is
    best on average, 1 / (pairs + dim + 1)).
    """

    source: data.LinearRegressions
    validation_examples: int = 1024

    def __post_init__(self) -> None:
        if self.validation_examples < 1:
            raise ValueError(f"validation_examples: got {self.validation_examples}; need at least 1")

    def batches(self, split: str, batch_size: int, seed: int) -> grain.IterDataset:
        return data.sequence_batches(
            self.source, split, batch_size=batch_size, seed=seed, validation_examples=self.validation_examples
        )

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
        means = _weighted_means(batch, **metrics)
        return means["loss"], means

    def _seen(self) -> list[int]:
        """Numbers of pairs before a question: powers of two, and the last."""
        last = self.source.pairs - 1
        return sorted({2**power for power in range(last.bit_length()) if 2**power <= last} | {last})

    def derived(self, metrics: dict[str, float]) -> dict[str, float]:
        return {}

    def inputs(self, batch_size: int) -> Batch:
        source = self.source
        return {
            "inputs": jax.ShapeDtypeStruct((batch_size, source.length, source.dim + 1), jnp.float32),
            "targets": jax.ShapeDtypeStruct((batch_size, source.pairs), jnp.float32),
        }

    def describe(self) -> dict[str, Any]:
        options = dataclasses.asdict(self.source)
        return {"source": type(self.source).__name__, **options, "validation examples": self.validation_examples}

    def costs(self, model: SequenceRegressor) -> dict[str, Any]:
        return _sequence_costs(model, self.source.length)


def _in_context_weights(x: jax.Array, y: jax.Array) -> dict[str, jax.Array]:
    """x [batch, seen, dim], y [batch, seen] -> by predictor, the w of its answers w . x, [batch, dim]."""
    _, seen, dim = x.shape
    moment = jnp.einsum("bsd,bs->bd", x, y)
    gram = jnp.einsum("bsd,bse->bde", x, x) + 1e-3 * jnp.eye(dim)
    return {"ridge": jnp.linalg.solve(gram, moment[..., None])[..., 0], "one step": moment / (seen + dim + 1)}


@dataclasses.dataclass(frozen=True)
class ImageClassificationTask:
    """Mean cross entropy of an image's class, in nats."""

    images: data.LabelledImages

    def batches(self, split: str, batch_size: int, seed: int) -> grain.IterDataset:
        return data.image_batches(self.images, split, batch_size=batch_size, seed=seed)

    def loss(
        self, model: ImageClassifier, batch: Batch, *, key: jax.Array | None
    ) -> tuple[jax.Array, dict[str, jax.Array]]:
        logits = model(batch["image"], key=key)
        means = _weighted_means(
            batch,
            loss=optax.losses.softmax_cross_entropy_with_integer_labels(logits, batch["label"]),
            accuracy=jnp.argmax(logits, axis=-1) == batch["label"],
        )
        return means["loss"], means

    def derived(self, metrics: dict[str, float]) -> dict[str, float]:
        return {}

    def inputs(self, batch_size: int) -> Batch:
        shape = (batch_size, *self.images.train_images.shape[1:])
        return {"image": jax.ShapeDtypeStruct(shape, jnp.float32), "label": jax.ShapeDtypeStruct(shape[:1], jnp.int32)}

    def describe(self) -> dict[str, Any]:
        return self.images.describe()

    def costs(self, model: ImageClassifier) -> dict[str, Any]:
        return {"unit": "image", "units": 1, "flops": model.flops(), "state_size": None, "length": None}
