"""Tasks: where batches come from, and what a model's answer to one is worth."""

import dataclasses
import math
from abc import abstractmethod
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import grain
import jax
import jax.numpy as jnp
import numpy as np
import optax

from attnlab import data, nn
from attnlab.models import AxialTransformer, ImageClassifier, LanguageModel, SequenceRegressor, generate, sample
from attnlab.train.pictures import draw_images

Batch = dict[str, Any]
# Folded into the dropout key to draw channels and shifts; models fold in smaller numbers.
_SLICES = _SHIFTS = 2**31


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
        """{"unit": "token" or "image" or the like, "units": in an example, "flops": forward, of a unit, "state_size",
        "length"}."""


@runtime_checkable
class Illustrated(Protocol):
    """A task whose models draw something to look at; the loop asks for it once, after the last step."""

    def illustrate(
        self, model: Any, values: nn.Parameters, path: Path, *, key: jax.Array, count: int, temperature: float
    ) -> None:
        """Writes a picture of `count` samples. model: without values. temperature: 0 takes what is likeliest."""


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

    def continuations(
        self, model: LanguageModel, values: nn.Parameters, *, key: jax.Array, count: int, temperature: float
    ) -> list[tuple[str, str]]:
        """Beginnings from the validation text and how the model goes on, sequence_length tokens together.

        model: without values. temperature: 0 takes the likeliest tokens.
        """
        given = max(1, min(32, self.sequence_length // 4))
        starts = np.linspace(0, len(self.corpus.validation) - given, count).astype(int)
        prompts = np.stack([self.corpus.validation[start : start + given] for start in starts]).astype(np.int32)

        @jax.jit
        def draw(values: nn.Parameters, prompts: jax.Array) -> jax.Array:
            return generate(
                nn.bind(model, values),
                prompts,
                length=self.sequence_length - given,
                key=key,
                temperature=temperature,
                below=self.corpus.vocabulary,
            )

        texts = np.asarray(draw(values, prompts))
        return [(self.corpus.decode(text[:given]), self.corpus.decode(text[given:])) for text in texts]


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
        if self.validation_examples < 1:
            raise ValueError(f"validation_examples: got {self.validation_examples}; need at least 1")

    def batches(self, split: str, batch_size: int, seed: int) -> grain.IterDataset:
        return data.sequence_batches(
            self.source, split, batch_size=batch_size, seed=seed, validation_examples=self.validation_examples
        )

    def derived(self, metrics: dict[str, float]) -> dict[str, float]:
        return {}

    def describe(self) -> dict[str, Any]:
        options = dataclasses.asdict(self.source)
        return {"source": type(self.source).__name__, **options, "validation examples": self.validation_examples}

    def costs(self, model: LanguageModel | SequenceRegressor) -> dict[str, Any]:
        return _sequence_costs(model, self.source.length)


@dataclasses.dataclass(frozen=True)
class SequenceTask(_DrawnTask):
    """Synthetic sequences (attnlab.data.sequences): mean cross entropy, in nats, of the places that are asked for.

    "accuracy" is their share answered right, "solved" that of examples with every answer right. Evaluation also tells
    accuracy by the source's groups: with a batch size that is a multiple of their number these are exact means.
    """

    source: data.SequenceSource

    def loss(
        self, model: LanguageModel, batch: Batch, *, key: jax.Array | None
    ) -> tuple[jax.Array, dict[str, jax.Array]]:
        if model.vocabulary < self.source.vocabulary:
            needed = f"the tokens of {type(self.source).__name__} need {self.source.vocabulary}"
            raise ValueError(f"vocabulary: got {model.vocabulary}; {needed}")
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

    def inputs(self, batch_size: int) -> Batch:
        tokens = jax.ShapeDtypeStruct((batch_size, self.source.length), jnp.int32)
        group = {"group": jax.ShapeDtypeStruct((batch_size,), jnp.int32)} if self.source.groups else {}
        return {"inputs": tokens, "targets": tokens, **group}


@dataclasses.dataclass(frozen=True)
class RegressionTask(_DrawnTask):
    """Regression in context (attnlab.data.LinearRegressions): mean squared error over dim, so that answering 0 costs 1.

    Evaluation tells the error by the pairs seen before, "error, 4 pairs", beside what two predictors of the same pairs
    leave: "ridge" (regression with a ridge of 1e-3) and "one step" (of gradient descent from 0, of the size that is
    best on average, 1 / (pairs + dim + 1)).
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
        means = _weighted_means(batch, **metrics)
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
        side = min(self.images.train_images.shape[1:3])
        if not 0 <= self.shift < side:
            raise ValueError(f"shift: got {self.shift}; need 0 to {side - 1} for images of {side} pixels")

    def batches(self, split: str, batch_size: int, seed: int) -> grain.IterDataset:
        return data.image_batches(self.images, split, batch_size=batch_size, seed=seed)

    def loss(
        self, model: ImageClassifier, batch: Batch, *, key: jax.Array | None
    ) -> tuple[jax.Array, dict[str, jax.Array]]:
        images = batch["image"]
        if key is not None and self.shift:
            images = _shifted(images, self.shift, jax.random.fold_in(key, _SHIFTS))
        logits = model(images, key=key)
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


def _shifted(images: jax.Array, most: int, key: jax.Array) -> jax.Array:
    """Each image [B, Y, X, channels] moved by up to `most` pixels along both axes, with zeros around it."""
    starts = jax.random.randint(key, (len(images), 2), 0, 2 * most + 1)
    padded = jnp.pad(images, ((0, 0), (most, most), (most, most), (0, 0)))
    cut = jax.vmap(lambda image, start: jax.lax.dynamic_slice(image, (*start, 0), images.shape[1:]))
    return cut(padded, starts)


@dataclasses.dataclass(frozen=True)
class _PixelTask:
    """What both orders of pixels share: batches of integers, and bits per dimension from the loss."""

    images: data.LabelledImages

    def batches(self, split: str, batch_size: int, seed: int) -> grain.IterDataset:
        return data.pixel_batches(self.images, split, batch_size=batch_size, seed=seed)

    def derived(self, metrics: dict[str, float]) -> dict[str, float]:
        return {"bits_per_dim": metrics["loss"] / math.log(2)}

    def inputs(self, batch_size: int) -> Batch:
        return {"pixels": jax.ShapeDtypeStruct((batch_size, *self.image_size), jnp.int32)}

    def describe(self) -> dict[str, Any]:
        return self.images.describe()

    @abstractmethod
    def sample(self, model: Any, *, count: int, temperature: float, key: jax.Array) -> jax.Array:
        """Images that a model draws: int32 [count, Y, X, C]."""

    def illustrate(
        self,
        model: Any,
        values: nn.Parameters,
        path: Path,
        *,
        key: jax.Array,
        count: int = 64,
        temperature: float = 1.0,
    ) -> None:
        """Draws samples under a row of validation images, as a .png. model: without values."""

        @jax.jit
        def draw(values: nn.Parameters) -> jax.Array:
            return self.sample(nn.bind(model, values), count=count, temperature=temperature, key=key)

        real = self.images.validation_images
        spread = np.linspace(0, len(real) - 1, min(8, len(real))).astype(int)  # they may be in order of what they show
        shown = {
            f"{self.images.name}: validation images": real[spread],
            f"samples of the model, temperature {temperature:g}": np.asarray(draw(values)),
        }
        draw_images(path, shown, levels=self.images.levels)

    @property
    def image_size(self) -> tuple[int, ...]:
        return self.images.train_images.shape[1:]

    @property
    def unit(self) -> str:
        return "pixel" if self.image_size[-1] == 1 else "sub-pixel"


class AxialImageTask(_PixelTask):
    """Pixels by an AxialTransformer: mean cross entropy in nats a sub-pixel, and as bits a dimension.

    Training draws one channel of each image, evaluation takes them all.
    """

    def loss(
        self, model: AxialTransformer, batch: Batch, *, key: jax.Array | None
    ) -> tuple[jax.Array, dict[str, jax.Array]]:
        if model.levels != self.images.levels:
            raise ValueError(f"levels: got {model.levels}; {self.images.name} have {self.images.levels}")
        pixels = batch["pixels"]
        if key is None:
            logits, targets = model(pixels), pixels
        else:
            slices = jax.random.randint(jax.random.fold_in(key, _SLICES), pixels.shape[:1], 0, self.image_size[-1])
            logits = model(pixels, slices=slices, key=key)
            targets = jnp.take_along_axis(pixels, slices[:, None, None, None], axis=-1)[..., 0]
        losses = optax.losses.softmax_cross_entropy_with_integer_labels(logits, targets)
        means = _weighted_means(batch, loss=jnp.mean(losses, axis=tuple(range(1, losses.ndim))))
        return means["loss"], means

    def costs(self, model: AxialTransformer) -> dict[str, Any]:
        height, width, channels = self.image_size
        return {
            "unit": self.unit,
            "units": height * width,  # a step takes one channel of an image
            "flops": model.flops() / (height * width * channels),
            "state_size": model.state_size(),
            "length": height * width * channels,
        }

    def sample(self, model: AxialTransformer, *, count: int, temperature: float, key: jax.Array) -> jax.Array:
        return sample(model, count=count, temperature=temperature, key=key)


class RasterImageTask(_PixelTask):
    """Pixels by a LanguageModel, in raster order with channels innermost: nats a sub-pixel, and bits a dimension.

    The model reads a start token, `levels`, and then the sub-pixels, so its vocabulary is levels + 1; the start token
    itself is never predicted.
    """

    def loss(
        self, model: LanguageModel, batch: Batch, *, key: jax.Array | None
    ) -> tuple[jax.Array, dict[str, jax.Array]]:
        levels = self.images.levels
        if model.vocabulary != levels + 1:
            raise ValueError(
                f"vocabulary: got {model.vocabulary}; {self.images.name} need {levels + 1}, "
                f"{levels} levels and a start token"
            )
        targets = batch["pixels"].reshape(len(batch["pixels"]), -1)
        inputs = jnp.concatenate([jnp.full_like(targets[:, :1], levels), targets[:, :-1]], axis=1)
        logits = model(inputs, key=key)[..., :levels]
        losses = optax.losses.softmax_cross_entropy_with_integer_labels(logits, targets)
        means = _weighted_means(batch, loss=jnp.mean(losses, axis=-1))
        return means["loss"], means

    def costs(self, model: LanguageModel) -> dict[str, Any]:
        return {**_sequence_costs(model, math.prod(self.image_size)), "unit": self.unit}

    def sample(self, model: LanguageModel, *, count: int, temperature: float, key: jax.Array) -> jax.Array:
        levels, length = self.images.levels, math.prod(self.image_size)
        start = jnp.full((count, 1), levels, jnp.int32)
        tokens = generate(model, start, length=length, key=key, temperature=temperature, below=levels)
        return tokens[:, 1:].reshape(count, *self.image_size)
