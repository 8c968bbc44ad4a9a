"""Tasks: where batches come from, and what a model's answer to one is worth."""

import dataclasses
from typing import Any, Protocol

import grain
import jax
import jax.numpy as jnp
import numpy as np
import optax

from attnlab import data
from attnlab.models import ImageClassifier, LanguageModel

Batch = dict[str, Any]


class Task(Protocol):
    """What the training loop asks of a task."""

    def batches(self, split: str, batch_size: int, seed: int) -> grain.IterDataset:
        """Batches of "train" (endless, ordered by the seed) or "validation" (one pass, always the same)."""

    def loss(self, model: Any, batch: Batch, *, key: jax.Array | None) -> tuple[jax.Array, dict[str, jax.Array]]:
        """The loss and the metrics (means over the batch, "loss" among them). key: for dropout; None is evaluation."""

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


@dataclasses.dataclass(frozen=True)
class LanguageTask:
    """Next-byte prediction: mean cross entropy in nats a byte."""

    corpus: data.Corpus
    sequence_length: int = 256

    def batches(self, split: str, batch_size: int, seed: int) -> grain.IterDataset:
        return data.text_batches(
            self.corpus, split, sequence_length=self.sequence_length, batch_size=batch_size, seed=seed
        )

    def loss(
        self, model: LanguageModel, batch: Batch, *, key: jax.Array | None
    ) -> tuple[jax.Array, dict[str, jax.Array]]:
        targets = batch["tokens"][:, 1:]
        logits = model(batch["tokens"][:, :-1], key=key)
        losses = optax.losses.softmax_cross_entropy_with_integer_labels(logits, targets)
        means = _weighted_means(
            batch,
            loss=jnp.mean(losses, axis=-1),
            accuracy=jnp.mean(jnp.argmax(logits, axis=-1) == targets, axis=-1),
        )
        return means["loss"], {**means, "bits_per_byte": means["loss"] / np.log(2)}

    def inputs(self, batch_size: int) -> Batch:
        return {"tokens": jax.ShapeDtypeStruct((batch_size, self.sequence_length + 1), jnp.int32)}

    def describe(self) -> dict[str, Any]:
        return {**self.corpus.describe(), "sequence length": self.sequence_length}

    def costs(self, model: LanguageModel) -> dict[str, Any]:
        length = self.sequence_length
        return {
            "unit": "token",
            "units": length,
            "flops": model.flops(length) / length,
            "state_size": model.state_size(length),
            "length": length,
        }


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

    def inputs(self, batch_size: int) -> Batch:
        shape = (batch_size, *self.images.train_images.shape[1:])
        return {"image": jax.ShapeDtypeStruct(shape, jnp.float32), "label": jax.ShapeDtypeStruct(shape[:1], jnp.int32)}

    def describe(self) -> dict[str, Any]:
        return self.images.describe()

    def costs(self, model: ImageClassifier) -> dict[str, Any]:
        return {"unit": "image", "units": 1, "flops": model.flops(), "state_size": None, "length": None}
