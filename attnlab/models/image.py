"""An image classifier: a vision transformer whose mixer may be any grid mixer."""

from typing import Any

import jax
import jax.numpy as jnp
from einops import rearrange

from attnlab.attention._shared.checks import check_int, check_ints
from attnlab.models.blocks import Stack
from attnlab.nn.layers import Linear
from attnlab.nn.parameters import normal, parameter
from attnlab.nn.sharding import spec_of, under_auto_axes


class ImageClassifier(Stack):
    """Patches, learned positions, pre-norm blocks, mean pool: images [B, Y, X, channels] -> logits [B, classes].

    Args:
      image_size: (height, width, channels).
      classes: number of classes.
      patch: side of a patch in pixels; must divide height and width.
      features, stack: mixers and further options, as in attnlab.models.blocks.Stack. The mixers get the patches as a
        grid [B, height / patch, width / patch, D].
    """

    is_causal = False

    def __init__(
        self,
        *,
        image_size: tuple[int, int, int],
        classes: int,
        patch: int = 1,
        features: int = 64,
        **stack: Any,
    ):
        height, width, channels = check_ints("image_size", image_size, layout=("height", "width", "channels"))
        classes, patch = check_int("classes", classes, least=1), check_int("patch", patch, least=1)
        if height % patch or width % patch:
            raise ValueError(f"patch: got {patch}; must divide the image's height {height} and width {width}")
        super().__init__(features=features, **stack)
        self.image_size, self.classes, self.patch = (height, width, channels), classes, patch
        self.grid = (height // patch, width // patch)
        features = self.features
        self.embedding = Linear(patch * patch * channels, features, use_bias=True, dtype=self.dtype)
        self.positions = parameter((*self.grid, features), normal(0.02))
        self.head = Linear(features, classes, use_bias=True, initializer=normal(0.02))

    @under_auto_axes(lambda self, images, **_: spec_of(images, 1))
    def __call__(self, images: jax.Array, *, key: jax.Array | None = None) -> jax.Array:
        """images: float [B, Y, X, channels] -> float32 logits [B, classes]. key: for dropout; None is evaluation."""
        if images.ndim != 4 or images.shape[1:] != tuple(self.image_size):
            raise ValueError(f"images: got {list(images.shape)}; need [batch, {', '.join(map(str, self.image_size))}]")
        patches = rearrange(images, "B (Y p) (X q) c -> B Y X (p q c)", p=self.patch, q=self.patch)
        x = self.embedding(patches) + self.positions[...][None].astype(self.dtype)
        x = self.run(x, key=key)
        return self.head(jnp.mean(self.norm(x).astype(jnp.float32), axis=(1, 2)))

    def flops(self) -> int:
        """Floating-point operations of matrix products (2 per multiply-add) for one image, forward."""
        height, width, channels = self.image_size
        return (
            self.stack_flops(self.grid)
            + 2 * height * width * channels * self.features
            + 2 * self.features * self.classes
        )
