"""Labelled images: scikit-learn's digits and photographs, and the files of MNIST, CIFAR-10 and downsampled ImageNet."""

import dataclasses
import hashlib
import math
import zipfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import grain
import numpy as np

from attnlab.attention._shared.checks import check_int, check_text, keep, require, shape_text, shown
from attnlab.data.batches import check_batches, content, endless, one_pass, read_once
from attnlab.errors import UserError


@dataclasses.dataclass(frozen=True)
class LabelledImages:
    """Images in two parts: pixels uint8 below `levels`, [count, Y, X, channels]; labels int32 [count]."""

    name: str
    classes: int
    train_images: np.ndarray
    train_labels: np.ndarray
    validation_images: np.ndarray
    validation_labels: np.ndarray
    levels: int = dataclasses.field(default=256, kw_only=True)

    def __post_init__(self) -> None:
        check_text("name", self.name)
        classes, levels = (
            check_int("classes", self.classes, least=1),
            check_int("levels", self.levels, least=2, most=256),
        )
        keep(self, classes=classes, levels=levels)
        for part in ("train", "validation"):
            images, labels = getattr(self, f"{part}_images"), getattr(self, f"{part}_labels")
            if not isinstance(images, np.ndarray) or images.ndim != 4 or images.dtype != np.uint8 or not images.size:
                raise TypeError(f"{part}_images: got {_given(images)}; need an array of uint8 [count, Y, X, channels]")
            if not isinstance(labels, np.ndarray) or not np.issubdtype(labels.dtype, np.integer):
                raise TypeError(f"{part}_labels: got {_given(labels)}; need an array of integers [count]")
            require(labels.shape == images.shape[:1], f"{part}_labels", labels.shape, f"need {images.shape[:1]}")
            most, label, lowest = int(images.max()), int(labels.max()), int(labels.min())
            require(most < levels, f"{part}_images", f"pixels up to {most}", f"need them below levels = {levels}")
            seen = f"labels from {lowest} to {label}"
            require(lowest >= 0 and label < classes, f"{part}_labels", seen, f"need 0 to classes - 1 = {classes - 1}")
        sizes = self.train_images.shape[1:], self.validation_images.shape[1:]
        require(sizes[0] == sizes[1], "validation_images", sizes[1], f"need the size of train_images, {sizes[0]}")

    def describe(self) -> dict[str, Any]:
        arrays = (self.train_images, self.train_labels, self.validation_images, self.validation_labels)
        content = hashlib.sha256(b"\0".join(array.tobytes() for array in arrays)).hexdigest()
        return {
            "source": self.name,
            "train images": len(self.train_images),
            "validation images": len(self.validation_images),
            "sha256": content,
        }


@read_once
def digits() -> LabelledImages:
    """scikit-learn's 1,797 handwritten digits, 8x8 of 17 levels, without a download.

    A fifth, by a hash of the index, validates.
    """
    from sklearn import datasets

    bunch = datasets.load_digits()
    images = bunch.images.astype(np.uint8)[..., None]
    labels = bunch.target.astype(np.int32)
    held_out = np.array([hashlib.sha256(str(index).encode()).digest()[0] % 5 == 0 for index in range(len(labels))])
    parts = images[~held_out], labels[~held_out], images[held_out], labels[held_out]
    return LabelledImages("scikit-learn digits", 10, *parts, levels=17)


@read_once
def photo_crops(size: int = 32) -> LabelledImages:
    """Square crops of scikit-learn's two photographs, 427 x 640 pixels in colour, without a download.

    The rightmost fifth of each photograph validates, in crops side by side. The rest trains: crops that start every
    size / 4 pixels, each as it is and mirrored. The label is the photograph's number.

    Args:
      size: side of a crop in pixels, 4 to 128.
    """
    check_int("size", size, least=4, most=128)
    from sklearn import datasets

    photographs = datasets.load_sample_images().images
    parts: list[np.ndarray] = []
    for is_training, step in ((True, size // 4), (False, size)):
        crops = []
        for photograph in photographs:
            cut = photograph.shape[1] * 4 // 5
            region = photograph[:, :cut] if is_training else photograph[:, cut:]
            windows = np.lib.stride_tricks.sliding_window_view(region, (size, size), axis=(0, 1))[::step, ::step]
            some = windows.transpose(0, 1, 3, 4, 2).reshape(-1, size, size, 3)
            crops.append(np.concatenate([some, some[:, :, ::-1]]) if is_training else some)
        labels = np.repeat(np.arange(len(crops), dtype=np.int32), [len(some) for some in crops])
        parts += [np.concatenate(crops), labels]
    return LabelledImages(f"scikit-learn photographs, crops of {size}", len(photographs), *parts)


@read_once
def idx_images(path: str) -> LabelledImages:
    """MNIST, Fashion-MNIST and others of their format, from a folder with the four idx files, plain or .gz.

    train-images*, train-labels*, t10k-images*, t10k-labels*; the test images are for validation.
    """
    folder = _folder("idx_images", path)
    parts = []
    for part in ("train", "t10k"):
        images, labels = (_idx(_only("idx_images", folder, f"{part}-{what}*")) for what in ("images", "labels"))
        if images.ndim != 3 or labels.shape != images.shape[:1]:
            raise UserError(f"idx_images: {path} has {part} images {images.shape} and labels {labels.shape}")
        parts += [images[..., None], labels.astype(np.int32)]
    return LabelledImages(folder.name, int(parts[1].max()) + 1, *parts)


def _idx(file: Path) -> np.ndarray:
    """An idx file of bytes: 0, 0, 8 (unsigned byte), rank, sizes as big-endian int32, then the bytes."""
    held = content("idx_images", file, unpacks=True)
    if len(held) < 4 or held[:3] != b"\0\0\x08" or len(held) < 4 + 4 * held[3]:
        raise UserError(f"idx_images: {file} is no idx file of bytes")
    start = 4 + 4 * held[3]
    shape = tuple(int(size) for size in np.frombuffer(held[4:start], ">i4"))
    if len(held) - start != math.prod(shape):
        raise UserError(f"idx_images: {file} states {shape} and holds {len(held) - start} bytes; download it again")
    return np.frombuffer(held, np.uint8, offset=start).reshape(shape)


@read_once
def cifar10(path: str) -> LabelledImages:
    """CIFAR-10's binary version, from the folder with data_batch_*.bin and test_batch.bin; the latter validates."""
    folder = _folder("cifar10", path)
    parts: list[np.ndarray] = []
    for pattern in ("data_batch_*.bin", "test_batch.bin"):
        files = sorted(folder.glob(pattern))
        if not files:
            raise UserError(f"cifar10: need {pattern} in {path}; found none (the binary version, not Python's)")
        held = np.concatenate([np.frombuffer(content("cifar10", file), np.uint8) for file in files])
        if len(held) % 3073:
            raise UserError(f"cifar10: {pattern} in {path} hold {len(held)} bytes; need a multiple of 3073")
        records = held.reshape(-1, 3073)
        images = records[:, 1:].reshape(-1, 3, 32, 32).transpose(0, 2, 3, 1)
        parts += [np.ascontiguousarray(images), records[:, 0].astype(np.int32)]
    return LabelledImages("CIFAR-10", 10, *parts)


@read_once
def imagenet_npz(path: str) -> LabelledImages:
    """Downsampled ImageNet (32 or 64 pixels per side), from the folder with train_data_batch_*.npz and val_data.npz."""
    folder = _folder("imagenet_npz", path)
    parts: list[np.ndarray] = []
    for pattern in ("train_data*.npz", "val_data*.npz"):
        files = sorted(folder.glob(pattern))
        if not files:
            raise UserError(f"imagenet_npz: need {pattern} in {path}; found none")
        rows, numbers = (np.concatenate([_array(file, name) for file in files]) for name in ("data", "labels"))
        if rows.ndim != 2 or rows.dtype != np.uint8 or numbers.shape != rows.shape[:1]:
            raise UserError(
                f"imagenet_npz: {pattern} in {path} hold {shape_text(rows)} and {shape_text(numbers)} labels"
            )
        side = round((rows.shape[1] / 3) ** 0.5)
        if rows.shape[1] != 3 * side * side:
            raise UserError(f"imagenet_npz: {pattern} in {path} hold rows of {rows.shape[1]} numbers; need 3 side^2")
        labels = numbers - 1  # counted from 1 in the files
        images = rows.reshape(-1, 3, side, side).transpose(0, 2, 3, 1)
        parts += [np.ascontiguousarray(images), labels.astype(np.int32)]
    return LabelledImages(folder.name, 1000, *parts)


def _given(array: Any) -> str:
    return shape_text(array) if isinstance(array, np.ndarray) else shown(array)


def _array(file: Path, name: str) -> np.ndarray:
    try:
        with np.load(file) as arrays:
            return arrays[name]
    except (OSError, EOFError, KeyError, ValueError, zipfile.BadZipFile) as error:
        raise UserError(f"imagenet_npz: cannot read {name} of {file}: {error}") from error


def _folder(function: str, path: str) -> Path:
    folder = Path(path).expanduser()
    if not folder.is_dir():
        raise UserError(f"{function}: no folder {path}")
    return folder


def _only(function: str, folder: Path, pattern: str) -> Path:
    files = sorted(folder.glob(pattern))
    if len(files) != 1:
        raise UserError(
            f"{function}: need one file {pattern} in {folder}; found {', '.join(file.name for file in files) or 'none'}"
        )
    return files[0]


class _Examples(grain.sources.RandomAccessDataSource):
    def __init__(self, images: np.ndarray, labels: np.ndarray, levels: int):
        self._images, self._labels, self._highest = images, labels, np.float32(levels - 1)

    def __len__(self) -> int:
        return len(self._labels)

    def __getitem__(self, index: int) -> dict[str, np.ndarray]:
        return {"image": self._images[index].astype(np.float32) / self._highest, "label": self._labels[index]}


class _Pixels(grain.sources.RandomAccessDataSource):
    def __init__(self, images: np.ndarray):
        self._images = images

    def __len__(self) -> int:
        return len(self._images)

    def __getitem__(self, index: int) -> dict[str, np.ndarray]:
        return {"pixels": self._images[index].astype(np.int32)}


def image_batches(
    images: LabelledImages,
    split: str,
    *,
    batch_size: int,
    seed: int,
    with_labels: bool = True,
    rows: Sequence[int] | None = None,
) -> grain.IterDataset:
    """{"image": float32 [batch, Y, X, channels] in [0, 1], "label": int32 [batch]}; splits and rows as in text_batches.

    Without labels {"pixels": int32 [batch, Y, X, channels] below images.levels}, of the same images in the same order.
    """
    check_batches(split, batch_size, seed, rows)
    if split == "train":
        pixels, labels = images.train_images, images.train_labels
    else:
        pixels, labels = images.validation_images, images.validation_labels
    source = _Examples(pixels, labels, images.levels) if with_labels else _Pixels(pixels)
    return endless(source, batch_size, seed, rows) if split == "train" else one_pass(source, batch_size, rows)
