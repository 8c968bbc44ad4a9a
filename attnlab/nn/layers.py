"""The few layers around a mixer. Parameters are float32; `dtype` is what is computed in."""

import math

import jax
import jax.numpy as jnp
from einops import rearrange
from flax import nnx

from attnlab.nn.parameters import Initializer, normal, ones, parameter, zeros


class Linear(nnx.Module):
    """x [..., *inputs] -> [..., *outputs]: contracts the last len(inputs) axes; no bias unless asked for."""

    def __init__(
        self,
        inputs: int | tuple[int, ...],
        outputs: int | tuple[int, ...],
        *,
        use_bias: bool = False,
        initializer: Initializer | None = None,
        dtype: jnp.dtype = jnp.float32,
    ):
        self.inputs = (inputs,) if isinstance(inputs, int) else inputs
        self.outputs = (outputs,) if isinstance(outputs, int) else outputs
        self.dtype = dtype
        self.kernel = parameter(self.inputs + self.outputs, initializer or normal(math.prod(self.inputs) ** -0.5))
        self.bias = parameter(self.outputs, zeros) if use_bias else None

    def __call__(self, x: jax.Array) -> jax.Array:
        y = jnp.tensordot(x.astype(self.dtype), self.kernel[...].astype(self.dtype), axes=len(self.inputs))
        return y if self.bias is None else y + self.bias[...].astype(self.dtype)


class RMSNorm(nnx.Module):
    """x / rms(x) * scale over the last axis, in float32 (Zhang and Sennrich 2019)."""

    def __init__(self, features: int, *, epsilon: float = 1e-6):
        self.epsilon = epsilon
        self.scale = parameter((features,), ones)

    def __call__(self, x: jax.Array) -> jax.Array:
        y = x.astype(jnp.float32)
        y = y * jax.lax.rsqrt(jnp.mean(y * y, axis=-1, keepdims=True) + self.epsilon)
        return (y * self.scale[...]).astype(x.dtype)


class GatedMLP(nnx.Module):
    """down(silu(gate x) * up x) (Shazeer 2020)."""

    def __init__(self, features: int, hidden: int, *, dtype: jnp.dtype = jnp.float32):
        self.gate = Linear(features, hidden, dtype=dtype)
        self.up = Linear(features, hidden, dtype=dtype)
        self.down = Linear(hidden, features, dtype=dtype)

    def __call__(self, x: jax.Array) -> jax.Array:
        return self.down(jax.nn.silu(self.gate(x)) * self.up(x))


def dropout(x: jax.Array, rate: float, key: jax.Array | None) -> jax.Array:
    """Zeroes a share `rate` of x and scales the rest up; without a key (evaluation) x itself."""
    if key is None or rate == 0.0:
        return x
    kept = jax.random.bernoulli(key, 1.0 - rate, x.shape)
    return jnp.where(kept, x / (1.0 - rate), 0)


def rotary_embedding(x: jax.Array, positions: jax.Array, *, base: float = 10_000.0) -> jax.Array:
    """Rotates pairs of channels by angles that grow with position (Su et al. 2021), an equal share of pairs per axis.

    Args:
      x: [B, *space, N, H]; H a multiple of twice the number of space axes.
      positions: [*space, axes], the coordinate of each place on each space axis (a row per place).
      base: the longest wavelength is 2 pi base places.
    """
    axes = positions.shape[-1]
    pairs = x.shape[-1] // (2 * axes)
    frequencies = base ** (-jnp.arange(pairs, dtype=jnp.float32) / pairs)
    angles = positions.astype(jnp.float32)[..., None] * frequencies  # [*space, axes, pairs]
    angles = rearrange(angles, "... axes pairs -> ... 1 (axes pairs)")  # one head axis to broadcast over
    even, odd = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    cos, sin = jnp.cos(angles), jnp.sin(angles)
    return jnp.concatenate([even * cos - odd * sin, even * sin + odd * cos], axis=-1).astype(x.dtype)


def grid_positions(space: tuple[int, ...]) -> jax.Array:
    """The coordinates of every place of a grid: int32 [*space, len(space)]."""
    return jnp.stack(jnp.meshgrid(*(jnp.arange(length) for length in space), indexing="ij"), axis=-1)
