"""The few layers around a mixer. Parameters are float32; `dtype` is what is computed in."""

import contextlib
import contextvars
import functools
import math
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from einops import rearrange
from flax import nnx
from jax.ad_checkpoint import checkpoint_name
from jax.custom_derivatives import SymbolicZero

from attnlab.attention._dispatch.deferred import tangent_call
from attnlab.attention._dispatch.exchange import Parts, over_positions, with_halo
from attnlab.attention._shared.checks import check_bool, check_dtype, check_float, check_int, check_ints
from attnlab.nn.parameters import Initializer, normal, ones, parameter, zeros
from attnlab.nn.sharding import laid

PRODUCT = "product with a parameter"  # jax.checkpoint's name for what a Linear gives


class Linear(nnx.Module):
    """x [..., *inputs] -> [..., *outputs]: contracts the last len(inputs) axes; no bias unless asked for."""

    def __init__(
        self,
        inputs: int | tuple[int, ...],
        outputs: int | tuple[int, ...],
        *,
        use_bias: bool = False,
        initializer: Initializer | None = None,
        dtype: Any = jnp.float32,
    ):
        inputs, outputs = check_ints("inputs", inputs), check_ints("outputs", outputs)
        self.inputs = inputs if isinstance(inputs, tuple) else (inputs,)
        self.outputs = outputs if isinstance(outputs, tuple) else (outputs,)
        self.dtype = check_dtype("dtype", dtype)
        self.kernel = parameter(self.inputs + self.outputs, initializer or normal(math.prod(self.inputs) ** -0.5))
        self.bias = parameter(self.outputs, zeros) if check_bool("use_bias", use_bias) else None

    def __call__(self, x: jax.Array) -> jax.Array:
        leading, sizes = x.shape[: x.ndim - len(self.inputs)], (math.prod(self.inputs), math.prod(self.outputs))
        x = x.astype(self.dtype).reshape(*leading, sizes[0])
        y = checkpoint_name(product(x, self.kernel[...].reshape(sizes), self.dtype), PRODUCT)
        y = y.reshape(*leading, *self.outputs)
        return y if self.bias is None else y + along(self.bias[...].astype(self.dtype), y)


_gradient_dtype: contextvars.ContextVar[jnp.dtype | None] = contextvars.ContextVar(
    "attnlab_gradient_dtype", default=None
)


@contextlib.contextmanager
def gradients_in(dtype: Any) -> Iterator[None]:
    """What is differentiated meanwhile has the gradients of its matrices summed in this dtype; None is the matrix's.

    Devices that share examples or positions each sum over their own, and exchange this dtype to add these up.
    """
    token = _gradient_dtype.set(None if dtype is None else jnp.dtype(dtype))
    try:
        yield
    finally:
        _gradient_dtype.reset(token)


@functools.partial(jax.custom_jvp, nondiff_argnums=(2, 3))
def product(x: jax.Array, kernel: jax.Array, dtype: Any, layout: str | None = None) -> jax.Array:
    """x [*leading, inputs], kernel [inputs, outputs], taken in x's dtype -> [*leading, outputs] of this dtype.

    layout: how the kernel lies where it is used, as `laid` takes it; None leaves it to XLA.

    The kernel's gradient is a product over the tokens, for which XLA on a CPU writes one factor anew, transposed. By
    JAX's own rule that is dy; here it is the narrower of x and dy, and x only once for all kernels that read it.
    """
    kernel = kernel.astype(x.dtype)  # before it is gathered
    kernel = kernel if layout is None else laid(kernel, layout)
    return jnp.matmul(x, kernel, preferred_element_type=dtype)


@functools.partial(product.defjvp, symbolic_zeros=True)
def _(
    dtype: Any, layout: str | None, primals: tuple[Any, Any], tangents: tuple[Any, Any]
) -> tuple[jax.Array, jax.Array]:
    x, kernel = primals
    x_tangent, kernel_tangent = (None if isinstance(t, SymbolicZero) else t for t in tangents)
    y = product(x, kernel, dtype, layout)
    narrow = _gradient_dtype.get()  # now: the transpose is traced where it is lowered
    factors = x.dtype if narrow is None or narrow.itemsize >= x.dtype.itemsize else narrow
    sums = jnp.promote_types(factors, kernel.dtype if narrow is None else narrow)
    kernel_dtype = kernel.dtype  # the transpose outlives the trace, and may hold no array of it

    def change(x: jax.Array, kernel_tangent: jax.Array) -> jax.Array:
        return product(x, kernel_tangent, dtype, layout)

    def transpose(x: jax.Array, y_cotangent: jax.Array) -> jax.Array:
        x, y_cotangent, tokens = x.astype(factors), y_cotangent.astype(factors), tuple(range(x.ndim - 1))
        over_tokens = functools.partial(jnp.tensordot, axes=(tokens, tokens), preferred_element_type=sums)
        turned = x.shape[-1] > y_cotangent.shape[-1]
        gradient = over_tokens(y_cotangent, x) if turned else over_tokens(x, y_cotangent)
        if factors.itemsize < 4:  # XLA has no transposed product of 16-bit numbers on a CPU, but makes one if it can
            gradient = jax.lax.optimization_barrier(gradient)
        return (gradient.T if turned else gradient).astype(kernel_dtype)

    changes = []
    if x_tangent is not None:
        changes.append(change(x_tangent, kernel))
    if kernel_tangent is not None:
        changes.append(tangent_call(change, transpose, y, x, kernel_tangent))
    return y, sum(changes[1:], changes[0])


def along(values: jax.Array, x: jax.Array) -> jax.Array:
    """Values of the last axes of x, with axes of 1 in front of them, as jax_numpy_rank_promotion="raise" asks for."""
    return values.reshape((1,) * (x.ndim - values.ndim) + values.shape)


def unit_length(x: jax.Array) -> jax.Array:
    """x / |x| over the last axis, computed in float32; zeros stay."""
    wide = x.astype(jnp.float32)
    return (wide * jax.lax.rsqrt(jnp.sum(wide * wide, axis=-1, keepdims=True) + 1e-6)).astype(x.dtype)


class RMSNorm(nnx.Module):
    """x / rms(x) * scale over the last axis, in float32 or wider (Zhang and Sennrich 2019)."""

    def __init__(self, features: int, *, epsilon: float = 1e-6):
        self.epsilon = check_float("epsilon", epsilon, least=0)
        self.scale = parameter((check_int("features", features, least=1),), ones)

    def __call__(self, x: jax.Array) -> jax.Array:
        y = x.astype(jnp.promote_types(x.dtype, jnp.float32))
        y = y * jax.lax.rsqrt(jnp.mean(y * y, axis=-1, keepdims=True) + self.epsilon)
        return (y * along(self.scale[...], y)).astype(x.dtype)


class LayerNorm(nnx.Module):
    """(x - mean x) / sqrt(var x + epsilon) * scale + bias over the last axis, in float32 or wider (Ba et al. 2016)."""

    def __init__(self, features: int, *, epsilon: float = 1e-5):
        self.epsilon = epsilon
        self.scale = parameter((features,), ones)
        self.bias = parameter((features,), zeros)

    def __call__(self, x: jax.Array) -> jax.Array:
        y = x.astype(jnp.promote_types(x.dtype, jnp.float32))
        y = y - jnp.mean(y, axis=-1, keepdims=True)
        y = y * jax.lax.rsqrt(jnp.mean(y * y, axis=-1, keepdims=True) + self.epsilon)
        return (y * along(self.scale[...], y) + along(self.bias[...], y)).astype(x.dtype)


class GatedMLP(nnx.Module):
    """down(silu(gate x) * up x) (Shazeer 2020)."""

    def __init__(self, features: int, hidden: int, *, dtype: Any = jnp.float32):
        features, hidden = check_int("features", features, least=1), check_int("hidden", hidden, least=1)
        self.gate = Linear(features, hidden, dtype=dtype)
        self.up = Linear(features, hidden, dtype=dtype)
        self.down = Linear(hidden, features, dtype=dtype)

    def __call__(self, x: jax.Array) -> jax.Array:
        return self.down(_gated(self.gate(x), self.up(x)))


@jax.checkpoint
def _gated(gate: jax.Array, up: jax.Array) -> jax.Array:
    """Only gate and up are kept for the gradient: silu's parts cost as much to write and read as to compute again."""
    return jax.nn.silu(gate) * up


def dropout(x: jax.Array, rate: float, key: jax.Array | None) -> jax.Array:
    """Zeroes a share `rate` of x, 0 to 1, and scales the rest up; without a key (evaluation) x itself."""
    rate = check_float("rate", rate, least=0, most=1)
    if key is None or rate == 0.0:
        return x
    if rate == 1.0:
        return jnp.zeros_like(x)
    kept = jax.random.bernoulli(key, 1.0 - rate, x.shape)
    return jnp.where(kept, x / (1.0 - rate), 0)


def rotary_embedding(x: jax.Array, positions: jax.Array, *, base: float = 10_000.0) -> jax.Array:
    """Rotates pairs of channels by angles that grow with position (Su et al. 2021), an equal share of pairs per axis.

    Args:
      x: [B, *space, N, H]; H a multiple of twice the number of space axes.
      positions: [*space, axes], the coordinate of each position on each space axis (one row per position), or
        [B, *space, axes], of each example.
      base: the longest wavelength is 2 pi base positions.
    """
    axes = positions.shape[-1]
    pairs = x.shape[-1] // (2 * axes)
    dtype = jnp.promote_types(x.dtype, jnp.float32)
    frequencies = base ** (-jnp.arange(pairs, dtype=dtype) / pairs)
    angles = positions.astype(dtype)[..., None]
    angles = along(angles * along(frequencies, angles), x)  # [B or 1, *space, axes, pairs]
    angles = rearrange(angles, "... axes pairs -> ... 1 (axes pairs)")  # one head axis to broadcast over
    even, odd = jnp.split(x.astype(dtype), 2, axis=-1)
    cos, sin = jnp.cos(angles), jnp.sin(angles)
    return jnp.concatenate([even * cos - odd * sin, even * sin + odd * cos], axis=-1).astype(x.dtype)


def grid_positions(space: tuple[int, ...]) -> jax.Array:
    """The coordinates of every position of a grid: int32 [*space, len(space)]."""
    return jnp.stack(jnp.meshgrid(*(jnp.arange(length) for length in space), indexing="ij"), axis=-1)


def document_numbers(segment_ids: jax.Array) -> jax.Array:
    """Documents, runs of equal ids, counted from 1 in each row: int [B, T] -> int32 [B, T]."""
    return laid(jnp.cumsum(_begins(segment_ids), axis=1, dtype=jnp.int32), "B.")


def document_positions(segment_ids: jax.Array) -> jax.Array:
    """Each token's distance from the first one of its document, a run of equal ids: int [B, T] -> int32 [B, T]."""
    index = jnp.broadcast_to(jnp.arange(segment_ids.shape[1], dtype=jnp.int32)[None], segment_ids.shape)
    return laid(index - jax.lax.cummax(jnp.where(_begins(segment_ids), index, 0), axis=1), "B.")


def _begins(segment_ids: jax.Array) -> jax.Array:
    """bool [B, T]; like all that is counted along the positions, whole on every device that shares these."""
    changes = segment_ids[:, 1:] != segment_ids[:, :-1]
    return laid(jnp.concatenate([jnp.ones_like(segment_ids[:, :1], bool), changes], axis=1), "B.")


def depthwise_convolution(
    x: jax.Array, kernel: jax.Array, *, is_causal: bool, segment_ids: jax.Array | None = None
) -> jax.Array:
    """Every channel convolved on its own, zeros around the space: y[p] = sum_o kernel[o] x[p + o - centre].

    Args:
      x: [B, *space, channels].
      kernel: [*widths, channels], or [B, *widths, channels] for one per example. The centre of a width w is w div 2.
      is_causal: the centre is the last offset, so that a token takes itself and earlier ones; one space axis.
      segment_ids: int [B, T]; tokens of other segments count as zeros. One space axis.

    Where devices share the positions, each takes of the ones beside it as many as the kernel reaches.
    """
    rank, per_example = x.ndim - 2, kernel.ndim == x.ndim
    convolved = functools.partial(_convolved, is_causal=is_causal)
    of_kernel = ("B" if per_example else "") + "." * rank + "N"
    # Channels are convolved as heads are attended with: each on its own.
    channels = over_positions(
        functools.partial(convolved, None),
        convolved,
        ("B*N.", of_kernel, "B*"),
        "B*N.",
        x[..., None],
        kernel,
        segment_ids,
    )
    return channels[..., 0]


def _convolved(
    parts: Parts | None, channels: jax.Array, kernel: jax.Array, segment_ids: jax.Array | None, *, is_causal: bool
) -> jax.Array:
    """depthwise_convolution of channels [B, *space, channels, 1]. parts: where these are each device's part."""
    x = channels[..., 0]
    space, rank = x.shape[1:-1], x.ndim - 2
    widths = kernel.shape[-1 - rank : -1]
    centres = [width - 1 if is_causal else width // 2 for width in widths]
    padding = [(centre, width - 1 - centre) for centre, width in zip(centres, widths)]

    def extended(x: jax.Array, padding: list[tuple[int, int]], fill: int) -> jax.Array:
        """[B, *space, ...] with so much around it, of other parts or of what there is around the space."""
        if parts is not None:
            (before, after), others = padding[parts.axis], (parts.many - 1) * space[parts.axis]
            x = with_halo(x, min(before, others), min(after, others), parts, 1 + parts.axis)
            rest = max(before - others, 0), max(after - others, 0)
            padding = [rest if axis == parts.axis else sides for axis, sides in enumerate(padding)]
        return jnp.pad(x, [(0, 0), *padding, *((0, 0),) * (x.ndim - 1 - rank)], constant_values=fill)

    padded = extended(x, padding, 0)
    ids = None if segment_ids is None else extended(segment_ids, padding, -1)
    out = jnp.zeros_like(x)
    for offset in np.ndindex(*widths):
        window = tuple(slice(start, start + length) for start, length in zip(offset, space))
        tap = kernel[(..., *offset, slice(None))]
        tap = tap.reshape(*tap.shape[:-1] or (1,), *(1,) * rank, x.shape[-1])  # [B or 1, 1.., channels]
        shifted = padded[(slice(None), *window)]
        if ids is not None and segment_ids is not None:
            shifted = jnp.where((ids[:, window[0]] == segment_ids)[..., None], shifted, 0)
        out = out + tap * shifted
    return out[..., None]


_MOST_TAPS = 1024


class DepthwiseConvolution(nnx.Module):
    """depthwise_convolution with a learned kernel over this many positions per space axis; causal ones decode."""

    def __init__(
        self, widths: tuple[int, ...], features: int, *, is_causal: bool, use_bias: bool, dtype: Any = jnp.float32
    ):
        if min(widths) < 1 or (is_causal and len(widths) > 1):
            allowed = "one width of at least 1 where causal" if is_causal else "widths of at least 1"
            raise ValueError(f"convolution: got widths {widths}; need {allowed}, or 0 for none")
        self.widths, self.features, self.is_causal, self.dtype = widths, features, is_causal, dtype
        self.taps = math.prod(widths)
        if self.taps > _MOST_TAPS:
            raise ValueError(
                f"convolution: got widths {widths}; need at most {_MOST_TAPS} taps, each a term of its own"
            )
        self.kernel = parameter((*widths, features), normal(self.taps**-0.5))
        self.bias = parameter((features,), zeros) if use_bias else None

    def __call__(self, x: jax.Array, *, segment_ids: jax.Array | None = None) -> jax.Array:
        """x [B, *space, features] -> the same shape."""
        if x.ndim - 2 != len(self.widths):
            raise ValueError(
                f"convolution: got widths {self.widths} for {x.ndim - 2} space axes; need a width for each"
            )
        kernel = self.kernel[...].astype(self.dtype)
        return self._biased(depthwise_convolution(x, kernel, is_causal=self.is_causal, segment_ids=segment_ids))

    def _biased(self, y: jax.Array) -> jax.Array:
        return y if self.bias is None else y + along(self.bias[...].astype(self.dtype), y)

    def init_cache(self, batch: int) -> jax.Array:
        """The inputs before the first token: zeros [batch, width - 1, features]."""
        return jnp.zeros((batch, self.taps - 1, self.features), self.dtype)

    def prefill(self, x: jax.Array, lengths: jax.Array | None) -> tuple[jax.Array, jax.Array]:
        """A prompt x [B, P, features] -> (y, the cache after it). lengths: int32 [B], its tokens; None: all."""
        before = self.taps - 1
        inputs = jnp.pad(x.astype(self.dtype), ((0, 0), (before, 0), (0, 0)))
        if lengths is None:
            return self(x), inputs[:, x.shape[1] :]
        last = lengths[:, None] + jnp.arange(before)[None]
        return self(x), jnp.take_along_axis(inputs, last[..., None], axis=1)

    def step(self, cache: jax.Array, x: jax.Array) -> tuple[jax.Array, jax.Array]:
        """The next token x [B, 1, features] -> (y, cache)."""
        inputs = jnp.concatenate([cache, x.astype(cache.dtype)], axis=1)
        kernel = self.kernel[...].astype(self.dtype)
        return self._biased(jnp.sum(kernel[None] * inputs, axis=1, keepdims=True)), inputs[:, 1:]
