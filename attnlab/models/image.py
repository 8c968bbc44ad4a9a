"""An image classifier: a vision transformer whose mixer may be any grid mixer."""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from einops import rearrange
from flax import nnx

from attnlab.models import blocks
from attnlab.nn.layers import Linear, RMSNorm
from attnlab.nn.mixers import MixerFactory
from attnlab.nn.parameters import normal, parameter


class ImageClassifier(nnx.Module):
    """Patches, learned positions, pre-norm blocks, mean pool: images [B, Y, X, channels] -> logits [B, classes].

    Args:
      image_size: (height, width, channels).
      classes: number of classes.
      mixers: as in LanguageModel; they get the patches as a grid [B, height / patch, width / patch, D].
      patch: side of a patch in pixels; must divide height and width.
      depth, features, mlp_hidden, dropout_rate, remat, dtype: as in LanguageModel.
    """

    def __init__(
        self,
        *,
        image_size: tuple[int, int, int],
        classes: int,
        mixers: Sequence[MixerFactory],
        patch: int = 1,
        depth: int = 4,
        features: int = 64,
        mlp_hidden: int | None = None,
        dropout_rate: float = 0.0,
        remat: bool = False,
        dtype: Any = jnp.float32,
    ):
        height, width, channels = image_size
        if patch < 1 or height % patch or width % patch:
            raise ValueError(f"patch: got {patch}; must divide the image's height {height} and width {width}")
        self.image_size, self.classes, self.patch = image_size, classes, patch
        self.features, self.remat, self.dtype = features, remat, dtype
        self.grid = (height // patch, width // patch)
        self.embedding = Linear(patch * patch * channels, features, use_bias=True, dtype=dtype)
        self.positions = parameter((*self.grid, features), normal(0.02))
        self.layers = blocks.stack(
            mixers,
            depth=depth,
            features=features,
            is_causal=False,
            mlp_hidden=mlp_hidden,
            dropout_rate=dropout_rate,
            dtype=dtype,
        )
        self.norm = RMSNorm(features)
        self.head = Linear(features, classes, use_bias=True, initializer=normal(0.02))

    def __call__(self, images: jax.Array, *, key: jax.Array | None = None) -> jax.Array:
        """images: float [B, Y, X, channels] -> float32 logits [B, classes]. key: for dropout; None is evaluation."""
        if images.ndim != 4 or images.shape[1:] != tuple(self.image_size):
            raise ValueError(f"images: got {list(images.shape)}; need [batch, {', '.join(map(str, self.image_size))}]")
        patches = rearrange(images, "B (Y p) (X q) c -> B Y X (p q c)", p=self.patch, q=self.patch)
        x = self.embedding(patches) + self.positions[...].astype(self.dtype)
        x = blocks.run(self.layers, x, segment_ids=None, key=key, remat=self.remat)
        return self.head(jnp.mean(self.norm(x).astype(jnp.float32), axis=(1, 2)))

    def flops(self) -> int:
        """Floating-point operations of matrix products (2 a multiply-add) for one image, forward."""
        height, width, channels = self.image_size
        return (
            sum(block.flops(self.grid) for block in self.layers)
            + 2 * height * width * channels * self.features
            + 2 * self.features * self.classes
        )
