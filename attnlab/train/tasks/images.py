"""Classes of images."""

import dataclasses
from collections.abc import Sequence
from typing import Any

import grain
import jax
import jax.numpy as jnp
import optax

from attnlab import data
from attnlab.attention._shared.checks import check_int, keep, shown
from attnlab.models import ImageClassifier
from attnlab.train.tasks.base import TASK_DRAWS, Batch, weighted_means


@dataclasses.dataclass(frozen=True)
class ImageClassificationTask:
    """Mean cross entropy of an image's class, in nats.

    Args:
      images: what to classify.
      shift: in training, each image moves by a whole number of pixels that the key draws, at most this many up or down
        and this many left or right; zeros come in.
    """

    images: data.LabelledImages
    shift: int = 0

    def __post_init__(self) -> None:
        if not isinstance(self.images, data.LabelledImages):
            raise TypeError(f"images: got {shown(self.images)}; need images, such as data.digits()")
        side = min(self.images.train_images.shape[1:3])
        keep(self, shift=check_int("shift", self.shift))
        if not 0 <= self.shift < side:
            raise ValueError(f"shift: got {self.shift}; need 0 to {side - 1} for images of {side} pixels")

    def batches(self, split: str, batch_size: int, seed: int, rows: Sequence[int] | None = None) -> grain.IterDataset:
        return data.image_batches(self.images, split, batch_size=batch_size, seed=seed, rows=rows)

    def loss(
        self, model: ImageClassifier, batch: Batch, *, key: jax.Array | None
    ) -> tuple[jax.Array, dict[str, jax.Array]]:
        images = batch["image"]
        if key is not None and self.shift:
            images = _shifted(images, self.shift, jax.random.fold_in(key, TASK_DRAWS))
        logits = model(images, key=key)
        if logits.shape[-1] < self.images.classes:
            raise ValueError(f"classes: got {logits.shape[-1]}; {self.images.name} have {self.images.classes}")
        means = weighted_means(
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


def _shifted(images: jax.Array, most: int, key: jax.Array) -> jax.Array:
    """Each image [B, Y, X, channels] moved by up to `most` pixels along both axes, with zeros around it."""
    starts = jax.random.randint(key, (len(images), 2), 0, 2 * most + 1)
    padded = jnp.pad(images, ((0, 0), (most, most), (most, most), (0, 0)))
    cut = jax.vmap(lambda image, start: jax.lax.dynamic_slice(image, (*start, 0), images.shape[1:]))
    return cut(padded, starts)
