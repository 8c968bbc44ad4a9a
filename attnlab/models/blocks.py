"""The residual block, and the stack of them that models share, with mixers by layer."""

import math
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from attnlab.attention._shared.checks import check_bool, check_dtype, check_float, check_int, shown
from attnlab.nn.layers import GatedMLP, RMSNorm, dropout
from attnlab.nn.mixers.base import Attention, MixerCache, MixerFactory
from attnlab.nn.parameters import absorb, as_function
from attnlab.nn.sharding import laid
from attnlab.nn.signatures import show_shared_options

# Layers are unrolled: each takes its time to trace and to compile.
_MOST_LAYERS = 256


class Block(nnx.Module):
    """x += mixer(norm x); x += mlp(norm x). Dropout on both branches."""

    def __init__(
        self, features: int, mixer: MixerFactory, *, is_causal: bool, mlp_hidden: int, dropout_rate: float, dtype: Any
    ):
        self.mixer_norm = RMSNorm(features)
        self.mixer = mixer(features, is_causal=is_causal, dtype=dtype)
        if not isinstance(self.mixer, Attention):
            raise TypeError(f"mixers: got what makes {shown(self.mixer)}; need subclasses of attnlab.nn.Attention")
        self.mlp_norm = RMSNorm(features)
        self.mlp = GatedMLP(features, mlp_hidden, dtype=dtype)
        self.features, self.mlp_hidden, self.dropout_rate = features, mlp_hidden, dropout_rate

    def __call__(self, x: jax.Array, *, segment_ids: jax.Array | None, key: jax.Array | None) -> jax.Array:
        mixer_key, mlp_key = (None, None) if key is None else jax.random.split(key)
        mixed = self.mixer(self.mixer_norm(x), segment_ids=segment_ids, is_training=key is not None)
        x = x + dropout(mixed, self.dropout_rate, mixer_key)
        return x + dropout(self.mlp(self.mlp_norm(x)), self.dropout_rate, mlp_key)

    def step(self, cache: MixerCache, x: jax.Array) -> tuple[jax.Array, MixerCache]:
        mixed, cache = self.mixer.step(cache, self.mixer_norm(x))
        x = x + mixed
        return x + self.mlp(self.mlp_norm(x)), cache

    def flops(self, space: tuple[int, ...]) -> int:
        return self.mixer.flops(space) + 6 * math.prod(space) * self.features * self.mlp_hidden


def _makes_mixers(factory: Any) -> bool:
    """Whether it may be a mixer's class, or a function that makes one."""
    made = getattr(factory, "func", factory)  # of a partial
    return issubclass(made, Attention) if isinstance(made, type) else callable(made)


class Stack(nnx.Module):
    """Blocks in turn, and the norm for what comes after: what every model is built around.

    Args:
      mixers: mixer factories; layer i has mixers[i mod len(mixers)], so one entry serves all layers and several make a
        hybrid.
      depth, features, mlp_hidden: layers, width D, hidden width of the MLP (default 8/3 D, in multiples of 8).
      dropout_rate: on every residual branch, in training.
      remat: recompute each block in the backward, to save memory.
      dtype: what is computed in; parameters are float32.
    """

    is_causal = True

    def __init__(
        self,
        *,
        mixers: Sequence[MixerFactory],
        depth: int = 4,
        features: int = 128,
        mlp_hidden: int | None = None,
        dropout_rate: float = 0.0,
        remat: bool = False,
        dtype: Any = jnp.float32,
    ):
        if not isinstance(mixers, (list, tuple)) or not all(map(_makes_mixers, mixers)):
            raise TypeError(f"mixers: got {shown(mixers)}; need a list of mixers, which are called to make the layers")
        if not mixers:
            raise ValueError("mixers: got an empty list; need at least one mixer, repeated over the layers")
        depth = check_int("depth", depth, least=1, most=_MOST_LAYERS)
        features, dtype = check_int("features", features, least=1), check_dtype("dtype", dtype)
        dropout_rate = check_float("dropout_rate", dropout_rate, least=0, most=1)
        self.features, self.dropout_rate, self.dtype = features, dropout_rate, dtype
        self.remat = check_bool("remat", remat)
        hidden = -(-features * 8 // 24) * 8 if mlp_hidden is None else check_int("mlp_hidden", mlp_hidden, least=1)
        self.layers = nnx.List(
            Block(
                features,
                mixers[layer % len(mixers)],
                is_causal=self.is_causal,
                mlp_hidden=hidden,
                dropout_rate=dropout_rate,
                dtype=dtype,
            )
            for layer in range(depth)
        )
        self.norm = RMSNorm(features)

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        show_shared_options(cls)

    def run(self, x: jax.Array, *, key: jax.Array | None, segment_ids: jax.Array | None = None) -> jax.Array:
        """Applies the blocks in turn, [B, *space, D] -> [B, *space, D].

        key: for dropout; None is evaluation. segment_ids: int [B, T], packed sequences that do not see each other.
        """

        def apply(block: Block, x: jax.Array, key: jax.Array | None) -> jax.Array:
            return block(x, segment_ids=segment_ids, key=key)

        layout = "BT" + "." * (x.ndim - 2)
        for layer, block in enumerate(self.layers):
            x = laid(x, layout)
            block_key = None if key is None else jax.random.fold_in(key, layer)
            if self.remat:
                function, state = as_function(apply, block)
                x, learned = jax.checkpoint(function)(state, x, block_key)
                absorb(block, learned)
            else:
                x = apply(block, x, block_key)
        return laid(x, layout)

    def stack_flops(self, space: tuple[int, ...]) -> int:
        """Floating-point operations of matrix products (2 per multiply-add) in the blocks, forward, for one example."""
        return sum(block.flops(space) for block in self.layers)

    @property
    def decoding_refusal(self) -> str:
        """Why it does not decode: the reason of its first mixer that does not; "" where all do."""
        return next((block.mixer.decoding_refusal for block in self.layers if not block.mixer.decodes), "")

    def state_size(self, length: int) -> int | None:
        """Numbers kept per sequence to decode the token after `length` tokens; None if it does not decode."""
        sizes = (block.mixer.state_size(length) for block in self.layers)
        return sum(size for size in sizes if size is not None) if not self.decoding_refusal else None
