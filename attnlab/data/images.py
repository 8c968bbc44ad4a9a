"""Labelled images."""

import dataclasses
import functools
import hashlib
from typing import Any

import grain
import numpy as np

from attnlab.data.batches import endless, one_pass


@dataclasses.dataclass(frozen=True)
class LabelledImages:
    """Images in two parts: pixels float32 in [0, 1], [count, Y, X, channels]; labels int32 [count]."""

    name: str
    classes: int
    train_images: np.ndarray
    train_labels: np.ndarray
    validation_images: np.ndarray
    validation_labels: np.ndarray

    def describe(self) -> dict[str, Any]:
        arrays = (self.train_images, self.train_labels, self.validation_images, self.validation_labels)
        content = hashlib.sha256(b"\0".join(array.tobytes() for array in arrays)).hexdigest()
        return {
            "source": self.name,
            "train images": len(self.train_images),
            "validation images": len(self.validation_images),
            "sha256": content,
        }


@functools.cache
def digits() -> LabelledImages:
    """scikit-learn's 1,797 handwritten digits, 8x8, without a download; a fifth, by a hash of the index, validates."""
    from sklearn import datasets

    bunch = datasets.load_digits()
    images = (bunch.images / 16).astype(np.float32)[..., None]
    labels = bunch.target.astype(np.int32)
    held_out = np.array([hashlib.sha256(str(index).encode()).digest()[0] % 5 == 0 for index in range(len(labels))])
    return LabelledImages(
        "scikit-learn digits", 10, images[~held_out], labels[~held_out], images[held_out], labels[held_out]
    )


class _Examples(grain.sources.RandomAccessDataSource):
    def __init__(self, images: np.ndarray, labels: np.ndarray):
        self._images, self._labels = images, labels

    def __len__(self) -> int:
        return len(self._labels)

    def __getitem__(self, index: int) -> dict[str, np.ndarray]:
        return {"image": self._images[index], "label": self._labels[index]}


def image_batches(images: LabelledImages, split: str, *, batch_size: int, seed: int) -> grain.IterDataset:
    """{"image": float32 [batch, Y, X, channels], "label": int32 [batch]}; splits as in text_batches."""
    if split == "train":
        return endless(_Examples(images.train_images, images.train_labels), batch_size, seed)
    return one_pass(_Examples(images.validation_images, images.validation_labels), batch_size)
