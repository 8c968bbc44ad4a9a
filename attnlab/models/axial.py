"""The Axial Transformer: images drawn pixel by pixel, with attention along rows and columns (Ho et al. 2019).

    context = positions + conditioning
    outer: u = embed(tokens) + context; [row, column MASKED] x layers; u moved down by one        sees the rows above
    inner: r = embed(tokens) moved right by one + u + context; [row MASKED] x layers              sees the row so far
    logits = dense(norm(r))

Masks let a position see itself; the two moves, in which zeros enter, make the whole strict, so there is no start token.
An image of several channels is modelled one channel at a time, in order: exterior layers, which see everything of the
channels before, condition the next. The order of all is channel by channel, each in raster order.
"""

import functools
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import PartitionSpec

from attnlab.attention import (
    DotProductCache,
    axial_attention,
    dot_product_step,
    init_dot_product_cache,
)
from attnlab.attention._shared.checks import check_dtype, check_float, check_int, check_ints, check_sizes
from attnlab.models.blocks import check_remat, recomputed
from attnlab.nn.layers import LayerNorm, Linear, along, dropout
from attnlab.nn.parameters import normal, parameter, zeros
from attnlab.nn.sharding import laid, spec_of, under_auto_axes, varying_as

Array = jax.Array
# Chooses tokens [B] from the logits [B, levels] of a position, whose number in raster order is given.
Choose = Callable[[Array, Array], Array]
# Axes of images among their space axes; layers along _X mix a row, layers along _Y a column.
_Y, _X = 0, 1
# Folded into the dropout key, one number per stack of layers; each layer folds in its own.
_EXTERIOR, _OUTER, _INNER = 0, 1, 2


# Layers are unrolled, as those of other models.
_MOST_LAYERS = 256


class AxialBlock(nnx.Module):
    """x += attention(norm x) along one axis; x += mlp(norm x), with z sigmoid(1.702 z) between the MLP's two layers.

    Args:
      features, heads: width D, and heads of D / heads.
      axis: 0 mixes the positions of a column, 1 those of a row.
      is_causal: a position sees itself and those before it along the axis.
      mlp_hidden: hidden width of the MLP.
      dropout_rate: on both branches, in training.
    """

    def __init__(
        self,
        features: int,
        *,
        heads: int,
        axis: int,
        is_causal: bool,
        mlp_hidden: int,
        dropout_rate: float,
        dtype: Any,
    ):
        self.features, self.mlp_hidden, self.dropout_rate, self.dtype = features, mlp_hidden, dropout_rate, dtype
        self.heads, self.axis, self.is_causal = heads, axis, is_causal
        split = (heads, features // heads)
        dense = functools.partial(Linear, use_bias=True, dtype=dtype)
        self.attention_norm = LayerNorm(features)
        self.query, self.key, self.value = (dense(features, split) for _ in range(3))
        self.output = dense(split, features)
        self.mlp_norm = LayerNorm(features)
        self.mlp_in = dense(features, mlp_hidden)
        self.mlp_out = dense(mlp_hidden, features)

    def __call__(self, x: Array, *, key: Array | None) -> Array:
        """x [B, Y, X, D] -> the same shape. key: for dropout; None is evaluation."""
        attention_key, mlp_key = (None, None) if key is None else jax.random.split(key)
        mixed = axial_attention(*self._heads(x), axis=self.axis, is_causal=self.is_causal)
        x = x + dropout(self.output(mixed), self.dropout_rate, attention_key)
        return x + dropout(self._mlp(x), self.dropout_rate, mlp_key)

    def init_cache(self, lines: int, length: int) -> DotProductCache:
        """An empty cache for this many lines (rows, or columns) of `length` positions."""
        return init_dot_product_cache(lines, length, self.heads, self.features // self.heads, dtype=self.dtype)

    def step(self, cache: DotProductCache, x: Array) -> tuple[Array, DotProductCache]:
        """The next position of every line, x [lines, 1, D] -> (the same shape, cache); for causal blocks."""
        mixed, cache = dot_product_step(cache, *self._heads(x))
        x = x + self.output(mixed)
        return x + self._mlp(x), cache

    def _heads(self, x: Array) -> tuple[Array, Array, Array]:
        x = self.attention_norm(x)
        return self.query(x), self.key(x), self.value(x)

    def _mlp(self, x: Array) -> Array:
        hidden = self.mlp_in(self.mlp_norm(x))
        return self.mlp_out(hidden * jax.nn.sigmoid(1.702 * hidden))

    def flops(self, size: tuple[int, int]) -> int:
        """Floating-point operations of matrix products (2 per multiply-add) for one map of this size, forward."""
        length = size[self.axis]
        seen = (length + 1) / 2 if self.is_causal else length  # positions that a query sees, on average
        return round(math.prod(size) * self.features * (8 * self.features + 4 * self.mlp_hidden + 4 * seen))


class _Positions(nnx.Module):
    """A table for rows and one for columns: their sum at every position, [Y, X, D]."""

    def __init__(self, size: tuple[int, int], features: int):
        self.rows = parameter((size[0], features), normal(0.02))
        self.columns = parameter((size[1], features), normal(0.02))

    def __call__(self) -> Array:
        return self.rows[...][:, None] + self.columns[...][None]


class AxialDecoder(nnx.Module):
    """The outer and the inner layers: one channel of tokens, given what conditions it.

    Args:
      size: (height Y, width X).
      levels: tokens are integers below it.
      layer: makes a block, layer(features, axis=..., is_causal=...).
      others: as in AxialTransformer.
    """

    def __init__(
        self,
        size: tuple[int, int],
        *,
        levels: int,
        features: int,
        outer_layers: int,
        inner_layers: int,
        layer: Callable[..., AxialBlock],
        remat: bool | str,
        dtype: Any,
    ):
        self.size, self.levels, self.features, self.remat, self.dtype = size, levels, features, remat, dtype
        self.embedding = parameter((levels, features), normal(features**-0.5))
        self.positions = _Positions(size, features)
        self.outer = nnx.List(
            layer(features, axis=axis, is_causal=axis == _Y) for _ in range(outer_layers) for axis in (_X, _Y)
        )
        self.inner = nnx.List(layer(features, axis=_X, is_causal=True) for _ in range(inner_layers))
        self.norm = LayerNorm(features)
        self.head = Linear(
            features, levels, use_bias=True, initializer=normal(0.02), dtype=jnp.promote_types(dtype, jnp.float32)
        )

    def __call__(self, tokens: Array, conditioning: Array | None = None, *, key: Array | None = None) -> Array:
        """tokens: int [B, Y, X]; conditioning: [B, Y, X, D] -> float32 logits [B, Y, X, levels].

        The logits of a position depend on the tokens before it in raster order, and on all of the conditioning.
        """
        embedded, context = self._embed(tokens), self._context(conditioning)
        u = _run(self.outer, embedded + context, key=_stack_key(key, _OUTER), remat=self.remat)
        r = shift(embedded, axis=_X) + shift(u, axis=_Y) + context
        return self.head(self.norm(_run(self.inner, r, key=_stack_key(key, _INNER), remat=self.remat)))

    def decode(self, choose: Choose, batch: int, conditioning: Array | None = None, *, like: Any = ()) -> Array:
        """Draws tokens, int32 [B, Y, X], position by position: `choose` takes the logits of each, [B, levels].

        A row takes X passes of one position through the inner layers, which keep the row's keys and values, and one
        pass of the finished row through the outer layers, which keep the columns'. So all N positions cost N^1.5, not
        N^2.5. like: arrays that `choose` depends on, as jax.shard_map has to know.
        """
        height, width = self.size
        context = jnp.broadcast_to(self._context(conditioning), (batch, height, width, self.features))
        like = nnx.state(self), conditioning, like

        def draw_row(carry: Any, y: Array) -> tuple[Any, Array]:
            columns, above = carry
            given = jax.lax.dynamic_index_in_dim(context, y, axis=1, keepdims=False)  # [B, X, D]

            def draw_position(carry: Any, x: Array) -> tuple[Any, Array]:
                row, left = carry
                logits, row = self._inner_step(row, left + (above + given)[:, x])
                tokens = choose(logits, y * width + x).astype(jnp.int32)
                return (row, self._embed(tokens)), tokens

            start = [block.init_cache(batch, width) for block in self.inner], jnp.zeros_like(above[:, 0])
            _, tokens = jax.lax.scan(draw_position, varying_as(start, like), jnp.arange(width))
            tokens = tokens.T  # [X, B] -> [B, X]
            above, columns = self._outer_step(columns, self._embed(tokens) + given)
            return (columns, above), tokens

        columns = [block.init_cache(batch * width, height) for block in self.outer if block.axis == _Y]
        start = columns, jnp.zeros_like(context[:, 0])
        _, rows = jax.lax.scan(draw_row, varying_as(start, like), jnp.arange(height))
        return jnp.moveaxis(rows, 0, 1)

    def _inner_step(self, caches: list[DotProductCache], x: Array) -> tuple[Array, list[DotProductCache]]:
        """The next position of a row, x [B, D] -> (logits [B, levels], caches)."""
        x, new_caches = x[:, None], []
        for block, cache in zip(self.inner, caches):
            x, cache = block.step(cache, x)
            new_caches.append(cache)
        return self.head(self.norm(x))[:, 0], new_caches

    def _outer_step(self, caches: list[DotProductCache], x: Array) -> tuple[Array, list[DotProductCache]]:
        """The next row, x [B, X, D] -> (u of the row, [B, X, D], before it is moved down; caches)."""
        shape, remaining, new_caches = x.shape, iter(caches), []
        for block in self.outer:
            if block.axis == _X:
                x = block(x[:, None], key=None)[:, 0]
            else:
                x, cache = block.step(next(remaining), x.reshape(-1, 1, self.features))
                x = x.reshape(shape)
                new_caches.append(cache)
        return x, new_caches

    def _embed(self, tokens: Array) -> Array:
        return self.embedding[...][tokens].astype(self.dtype)

    def _context(self, conditioning: Array | None) -> Array:
        positions = self.positions()[None].astype(self.dtype)
        return positions if conditioning is None else positions + conditioning

    def flops(self) -> int:
        return (
            sum(block.flops(self.size) for block in (*self.outer, *self.inner))
            + 2 * math.prod(self.size) * self.features * self.levels
        )

    def state_size(self) -> int:
        """Numbers kept per image to draw its last position: keys and values of a row, and of all columns."""
        height, width = self.size
        columns = sum(block.axis == _Y for block in self.outer)
        return 2 * self.features * width * (len(self.inner) + height * columns)


class AxialConditioner(nnx.Module):
    """The exterior layers: what a slice is conditioned on, computed from all of the channels before it.

    A 3x3 convolution of those channels (scaled to 0 to 1, the others 0) and of the slice's number (one-hot, at every
    position), position embeddings, and pairs of a row and a column layer without masks.
    """

    def __init__(
        self,
        image_size: tuple[int, int, int],
        *,
        levels: int,
        features: int,
        layers: int,
        layer: Callable[..., AxialBlock],
        remat: bool | str,
        dtype: Any,
    ):
        *size, channels = image_size
        self.levels, self.channels, self.remat, self.dtype = levels, channels, remat, dtype
        self.kernel = parameter((3, 3, 2 * channels, features), normal((18 * channels) ** -0.5))
        self.bias = parameter((features,), zeros)
        self.positions = _Positions((size[0], size[1]), features)
        self.layers = nnx.List(layer(features, axis=axis, is_causal=False) for _ in range(layers) for axis in (_X, _Y))

    def __call__(self, images: Array, slices: Array, *, key: Array | None = None) -> Array:
        """images: int [B, Y, X, C]; slices: int [B], the channel that is modelled -> [B, Y, X, D].

        Of an image, the channels before the slice count.
        """
        before = jnp.arange(self.channels)[None, None, None] < slices[:, None, None, None]
        known = jnp.where(before, images, 0).astype(jnp.promote_types(self.dtype, jnp.float32))
        known = (known / (self.levels - 1)).astype(self.dtype)
        number = jax.nn.one_hot(slices, self.channels, dtype=self.dtype)[:, None, None]
        inputs = jnp.concatenate([known, jnp.broadcast_to(number, known.shape)], axis=-1)
        x = jax.lax.conv_general_dilated(
            inputs,
            self.kernel[...].astype(self.dtype),
            window_strides=(1, 1),
            padding="SAME",
            dimension_numbers=("NHWC", "HWIO", "NHWC"),
        )
        x = x + along(self.bias[...], x).astype(self.dtype) + self.positions()[None].astype(self.dtype)
        return _run(self.layers, x, key=_stack_key(key, _EXTERIOR), remat=self.remat)

    def flops(self, size: tuple[int, int]) -> int:
        return sum(block.flops(size) for block in self.layers) + 2 * math.prod(size) * math.prod(self.kernel.shape)


class AxialTransformer(nnx.Module):
    """Autoregressive images: integers [B, Y, X, C] -> logits [B, Y, X, C, levels].

    Args:
      image_size: (height, width, channels C).
      levels: pixels are integers below it; 256 for bytes.
      features: width D.
      heads: must divide D.
      exterior_layers, outer_layers: pairs of a row and a column layer. Exterior ones are for images of several
        channels; with one channel there must be none.
      inner_layers: row layers.
      mlp_factor: hidden width of the MLPs, in D.
      dropout_rate: on every residual branch, in training.
      remat: what the backward recomputes of each block, as in attnlab.models.blocks.Stack.
      dtype: what is computed in; parameters and logits are float32.
    """

    def __init__(
        self,
        *,
        image_size: tuple[int, int, int],
        levels: int = 256,
        features: int = 64,
        heads: int = 4,
        exterior_layers: int = 0,
        outer_layers: int = 2,
        inner_layers: int = 2,
        mlp_factor: int = 4,
        dropout_rate: float = 0.0,
        remat: bool | str = False,
        dtype: Any = jnp.float32,
    ):
        height, width, channels = check_ints("image_size", image_size, layout=("height", "width", "channels"))
        levels, features = check_int("levels", levels, least=2), check_int("features", features, least=1)
        heads, mlp_factor = check_int("heads", heads, least=1), check_int("mlp_factor", mlp_factor, least=1)
        if features % heads:
            raise ValueError(f"heads: got {heads}; must divide features {features}")
        outer_layers = check_int("outer_layers", outer_layers, least=1, most=_MOST_LAYERS)
        inner_layers = check_int("inner_layers", inner_layers, least=1, most=_MOST_LAYERS)
        exterior_layers = check_int("exterior_layers", exterior_layers, least=0, most=_MOST_LAYERS)
        if channels == 1 and exterior_layers:
            allowed = "0, as the only channel has none before it"
            raise ValueError(f"exterior_layers: got {exterior_layers}; need {allowed}")
        dropout_rate = check_float("dropout_rate", dropout_rate, least=0, most=1)
        remat, dtype = check_remat(remat), check_dtype("dtype", dtype)
        self.image_size, self.levels, self.features = (height, width, channels), levels, features
        layer = functools.partial(
            AxialBlock, heads=heads, mlp_hidden=features * mlp_factor, dropout_rate=dropout_rate, dtype=dtype
        )
        self.conditioner = (
            None
            if channels == 1
            else AxialConditioner(
                (height, width, channels),
                levels=levels,
                features=features,
                layers=exterior_layers,
                layer=layer,
                remat=remat,
                dtype=dtype,
            )
        )
        self.decoder = AxialDecoder(
            (height, width),
            levels=levels,
            features=features,
            outer_layers=outer_layers,
            inner_layers=inner_layers,
            layer=layer,
            remat=remat,
            dtype=dtype,
        )

    @under_auto_axes(lambda self, images, slices=None, **_: spec_of(images, 4 if slices is None else 3))
    def __call__(self, images: Array, *, slices: Array | None = None, key: Array | None = None) -> Array:
        """images: int [B, Y, X, C], below `levels` -> float32 logits.

        The logits of a sub-pixel depend on the channels before its own, and in its own channel on the positions before
        it in raster order.

        Args:
          slices: int [B], the one channel of each image whose logits are wanted, [B, Y, X, levels]; None is every
            channel, [B, Y, X, C, levels].
          key: for dropout; None is evaluation.
        """
        if images.ndim != 4 or images.shape[1:] != self.image_size or not jnp.issubdtype(images.dtype, jnp.integer):
            raise ValueError(
                f"images: got {images.dtype}{list(images.shape)}; need integers "
                f"[batch, {', '.join(map(str, self.image_size))}]"
            )
        batch, *_, channels = images.shape
        if slices is None:
            every = jax.lax.map(lambda c: self(images, slices=jnp.full(batch, c), key=key), jnp.arange(channels))
            return jnp.moveaxis(every, 0, 3)
        if slices.shape != (batch,):
            raise ValueError(f"slices: got {list(slices.shape)}; need [{batch}], a channel for each image")
        conditioning = None if self.conditioner is None else self.conditioner(images, slices, key=key)
        tokens = jnp.take_along_axis(images, slices[:, None, None, None], axis=-1)[..., 0]
        return self.decoder(tokens, conditioning, key=key)

    def flops(self) -> int:
        """Floating-point operations of matrix products (2 per multiply-add) for all channels of one image, forward."""
        height, width, channels = self.image_size
        exterior = 0 if self.conditioner is None else self.conditioner.flops((height, width))
        return channels * (exterior + self.decoder.flops())

    def state_size(self) -> int:
        """Numbers kept per image to draw its last sub-pixel."""
        return self.decoder.state_size()


@under_auto_axes(lambda model, **_: PartitionSpec())
def sample(model: AxialTransformer, *, count: int, key: Array, temperature: float = 1.0) -> Array:
    """Draws images: int32 [count, Y, X, C], below model.levels.

    A channel takes one pass of the exterior layers, one of the outer layers per row and one of the inner layers per
    position.
    The noise of a sub-pixel is that of fold_in(key, its number), counted channel by channel, each in raster order.
    temperature 0 takes the likeliest level.
    """
    (count,), temperature = check_sizes(count=count), check_float("temperature", temperature, least=0)
    height, width, channels = model.image_size

    def draw_channel(channel: Array, images: Array) -> Array:
        def choose(logits: Array, position: Array) -> Array:
            if temperature == 0:
                return jnp.argmax(logits, axis=-1)
            position_key = jax.random.fold_in(key, channel * (height * width) + position)
            return jax.random.categorical(position_key, logits / temperature)

        slices = jnp.full(count, channel)
        conditioning = None if model.conditioner is None else model.conditioner(images, slices)
        return images.at[..., channel].set(model.decoder.decode(choose, count, conditioning, like=key))

    images = jnp.zeros((count, height, width, channels), jnp.int32)
    return jax.lax.fori_loop(0, channels, draw_channel, varying_as(images, (nnx.state(model), key)))


def shift(x: Array, *, axis: int) -> Array:
    """Moves a map [B, Y, X, D] by one position along a space axis: zeros enter, the last line drops out."""
    padding = [(0, 0)] * x.ndim
    padding[1 + axis] = (1, 0)
    return jax.lax.slice_in_dim(jnp.pad(x, padding), 0, x.shape[1 + axis], axis=1 + axis)


def _run(layers: nnx.List, x: Array, *, key: Array | None, remat: bool | str) -> Array:
    for number, block in enumerate(layers):
        block_key = None if key is None else jax.random.fold_in(key, number)
        apply = functools.partial(block.__call__, key=block_key)
        # Not nnx's remat, which cannot run inside the loop over channels; nothing in a block changes as it runs.
        x = recomputed(apply, remat)(laid(x, "BT.."))
    return laid(x, "BT..")


def _stack_key(key: Array | None, stack: int) -> Array | None:
    return None if key is None else jax.random.fold_in(key, stack)
