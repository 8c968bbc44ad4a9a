"""Pixels of images, one by one: in the order of an Axial Transformer, or in raster order by a language model."""

import dataclasses
import math
from abc import abstractmethod
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import grain
import jax
import jax.numpy as jnp
import numpy as np
import optax

from attnlab import data, nn
from attnlab.attention import masks
from attnlab.attention._shared.checks import check_int, keep, require, shown
from attnlab.models import AxialTransformer, LanguageModel, generate, next_blocks, sample
from attnlab.train.tasks.base import TASK_DRAWS, Batch, sequence_costs, weighted_means
from attnlab.train.tasks.pictures import draw_images


@dataclasses.dataclass(frozen=True)
class _PixelTask:
    """What both orders of pixels share: batches of integers, and bits per dimension from the loss."""

    images: data.LabelledImages

    def __post_init__(self) -> None:
        if not isinstance(self.images, data.LabelledImages):
            raise TypeError(f"images: got {shown(self.images)}; need images, such as data.digits()")

    def batches(self, split: str, batch_size: int, seed: int, rows: Sequence[int] | None = None) -> grain.IterDataset:
        return data.image_batches(self.images, split, batch_size=batch_size, seed=seed, with_labels=False, rows=rows)

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
    """Pixels by an AxialTransformer: mean cross entropy in nats per sub-pixel, and as bits per dimension.

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
            slices = jax.random.randint(jax.random.fold_in(key, TASK_DRAWS), pixels.shape[:1], 0, self.image_size[-1])
            logits = model(pixels, slices=slices, key=key)
            targets = jnp.take_along_axis(pixels, slices[:, None, None, None], axis=-1)[..., 0]
        losses = optax.losses.softmax_cross_entropy_with_integer_labels(logits, targets)
        means = weighted_means(batch, loss=jnp.mean(losses, axis=tuple(range(1, losses.ndim))))
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
    """Pixels by a LanguageModel, in raster order with channels innermost: nats per sub-pixel, and bits per dimension.

    The model reads a start token, `levels`, and then the sub-pixels, so its vocabulary is levels + 1; the start token
    itself is never predicted.
    """

    def loss(
        self, model: LanguageModel, batch: Batch, *, key: jax.Array | None
    ) -> tuple[jax.Array, dict[str, jax.Array]]:
        return self._loss(model, batch, shift=1, pattern=None, key=key)

    def _loss(
        self, model: LanguageModel, batch: Batch, *, shift: int, pattern: nn.Pattern | None, key: jax.Array | None
    ) -> tuple[jax.Array, dict[str, jax.Array]]:
        """Of sub-pixels that the logits predict which stand `shift` before them."""
        levels = self.images.levels
        if model.vocabulary != levels + 1:
            raise ValueError(
                f"vocabulary: got {model.vocabulary}; {self.images.name} need {levels + 1}, "
                f"{levels} levels and a start token"
            )
        targets = batch["pixels"].reshape(len(batch["pixels"]), -1)
        inputs = jnp.concatenate([jnp.full_like(targets[:, :shift], levels), targets[:, :-shift]], axis=1)
        logits = model(inputs, pattern=pattern, key=key)[..., :levels]
        losses = optax.losses.softmax_cross_entropy_with_integer_labels(logits, targets)
        means = weighted_means(batch, loss=jnp.mean(losses, axis=-1))
        return means["loss"], means

    def costs(self, model: LanguageModel) -> dict[str, Any]:
        return {**sequence_costs(model, math.prod(self.image_size)), "unit": self.unit}

    def sample(self, model: LanguageModel, *, count: int, temperature: float, key: jax.Array) -> jax.Array:
        levels, length = self.images.levels, math.prod(self.image_size)
        start = jnp.full((count, 1), levels, jnp.int32)
        tokens = generate(model, start, length=length, key=key, temperature=temperature, below=levels)
        return tokens[:, 1:].reshape(count, *self.image_size)


@dataclasses.dataclass(frozen=True)
class NextBlockImageTask(RasterImageTask):
    """Blocks of sub-pixels by a LanguageModel, all of a block in parallel: nats per sub-pixel, and bits per dimension.

    The model reads a block of start tokens, `levels`, and then the blocks but the last, under masks.block_causal; its
    logits at a block predict the next one, so that a sub-pixel is independent of its own block given those before it.
    With block 1 this is RasterImageTask. Next Block Prediction (Ren et al. 2025).

    Args:
      images: the images.
      block: sub-pixels in a block, in raster order with channels innermost: of a row, its width times the channels.
    """

    block: int = 1

    def __post_init__(self) -> None:
        super().__post_init__()
        block, size = check_int("block", self.block, least=1), math.prod(self.image_size)
        require(size % block == 0, "block", block, f"must divide the {size} sub-pixels of an image")
        keep(self, block=block)

    @property
    def pattern(self) -> nn.Pattern:
        return nn.Pattern(masks.block_causal(self.block))

    def loss(
        self, model: LanguageModel, batch: Batch, *, key: jax.Array | None
    ) -> tuple[jax.Array, dict[str, jax.Array]]:
        return self._loss(model, batch, shift=self.block, pattern=self.pattern, key=key)

    def describe(self) -> dict[str, Any]:
        return {**super().describe(), "block": self.block}

    def costs(self, model: LanguageModel) -> dict[str, Any]:
        """It draws without a cache."""
        length = math.prod(self.image_size)
        flops = model.flops(length, pairs=length * (length + self.block) // 2)
        return {**super().costs(model), "flops": flops / length, "state_size": None}

    def sample(self, model: LanguageModel, *, count: int, temperature: float, key: jax.Array) -> jax.Array:
        size = math.prod(self.image_size)
        tokens = next_blocks(model, count=count, length=size, block=self.block, key=key, temperature=temperature)
        return tokens.reshape(count, *self.image_size)
