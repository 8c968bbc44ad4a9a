"""The residual block, and the stack of them that models share, with mixers by layer."""

import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from attnlab.attention._shared.checks import check_bool, check_dtype, check_float, check_int, require, shown
from attnlab.nn.layers import PRODUCT, GatedMLP, RMSNorm, dropout
from attnlab.nn.mixers.base import MixerCache, MixerFactory, Pattern, check_mixers, given, make_mixer
from attnlab.nn.parameters import Learned, absorb, as_function
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
        self.mixer = make_mixer(mixer, features, is_causal=is_causal, dtype=dtype)
        self.mlp_norm = RMSNorm(features)
        self.mlp = GatedMLP(features, mlp_hidden, dtype=dtype)
        self.features, self.mlp_hidden, self.dropout_rate = features, mlp_hidden, dropout_rate

    def __call__(
        self, x: jax.Array, *, segment_ids: jax.Array | None, pattern: Pattern | None = None, key: jax.Array | None
    ) -> jax.Array:
        mixer_key, mlp_key = (None, None) if key is None else jax.random.split(key)
        options: dict[str, Any] = {"segment_ids": segment_ids, "is_training": key is not None, **given(pattern=pattern)}
        mixed = self.mixer(self.mixer_norm(x), **options)
        x = x + dropout(mixed, self.dropout_rate, mixer_key)
        return x + dropout(self.mlp(self.mlp_norm(x)), self.dropout_rate, mlp_key)

    def step(self, cache: MixerCache, x: jax.Array) -> tuple[jax.Array, MixerCache]:
        mixed, cache = self.mixer.step(cache, self.mixer_norm(x))
        x = x + mixed
        return x + self.mlp(self.mlp_norm(x)), cache

    def prefill(self, cache: MixerCache, x: jax.Array, lengths: jax.Array | None) -> tuple[jax.Array, MixerCache]:
        mixed, cache = self.mixer.prefill(cache, self.mixer_norm(x), lengths)
        x = x + mixed
        return x + self.mlp(self.mlp_norm(x)), cache

    def flops(self, space: tuple[int, ...], *, pairs: int | None = None) -> int:
        return self.mixer.flops(space, **given(pairs=pairs)) + 6 * math.prod(space) * self.features * self.mlp_hidden


def check_remat(remat: Any) -> bool | str:
    """Raises TypeError or ValueError for what is no choice of what the backward recomputes."""
    allowed = "need True, False or 'products'"
    if isinstance(remat, str):
        require(remat == "products", "remat", shown(remat), allowed)
        return remat
    if not isinstance(remat, (bool, np.bool_)):
        raise TypeError(f"remat: got {shown(remat)}; {allowed}")
    return bool(remat)


def recomputed(function: Callable[..., Any], remat: bool | str) -> Callable[..., Any]:
    """The function, of which the backward recomputes this much, see Stack."""
    if remat is False:
        return function
    policy = jax.checkpoint_policies.save_only_these_names(PRODUCT) if remat == "products" else None
    return jax.checkpoint(function, policy=policy)


class Stack(nnx.Module):
    """Blocks in turn, and the norm for what comes after: what every model is built around.

    Args:
      mixers: mixer factories; layer i has mixers[i mod len(mixers)], so one entry serves all layers and several make a
        hybrid.
      depth, features, mlp_hidden: layers, width D, hidden width of the MLP (default 8/3 D, in multiples of 8).
      dropout_rate: on every residual branch, in training.
      remat: what the backward recomputes of each block, to save memory: nothing (False), all of it (True), or all but
        the products with parameters ("products").
      scan_layers: compile what repeats once, the layers of len(mixers), and run it in a loop: for deep models, which
        take long to compile. Parameters keep their paths.
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
        remat: bool | str = False,
        scan_layers: bool = False,
        dtype: Any = jnp.float32,
    ):
        check_mixers(mixers, "repeated over the layers")
        depth = check_int("depth", depth, least=1, most=_MOST_LAYERS)
        features, dtype = check_int("features", features, least=1), check_dtype("dtype", dtype)
        dropout_rate = check_float("dropout_rate", dropout_rate, least=0, most=1)
        self.features, self.dropout_rate, self.dtype = features, dropout_rate, dtype
        self.remat, self.scan_layers = check_remat(remat), check_bool("scan_layers", scan_layers)
        self.period = len(mixers)
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

    def run(
        self,
        x: jax.Array,
        *,
        key: jax.Array | None,
        segment_ids: jax.Array | None = None,
        pattern: Pattern | None = None,
    ) -> jax.Array:
        """Applies the blocks in turn, [B, *space, D] -> [B, *space, D].

        key: for dropout; None is evaluation. segment_ids: int [B, T], packed sequences that do not see each other.
        pattern: who sees whom in place of the mixers' own.
        """

        layout = "BT" + "." * (x.ndim - 2)

        def apply(block: Block, x: jax.Array, layer: Any) -> jax.Array:
            block_key = None if key is None else jax.random.fold_in(key, layer)
            return block(laid(x, layout), segment_ids=segment_ids, pattern=pattern, key=block_key)

        turns = len(self.layers) // self.period if self.scan_layers else 0
        scanned = turns * self.period if turns > 1 else 0
        if scanned:
            x = self._scan(apply, x, turns)
        for layer, block in enumerate(self.layers[scanned:], scanned):
            if self.remat is False:
                x = apply(block, x, layer)
            else:
                function, state = as_function(apply, block)
                x, learned = recomputed(function, self.remat)(state, x, layer)
                absorb(block, learned)
        return laid(x, layout)

    def _scan(self, apply: Callable[[Block, jax.Array, Any], jax.Array], x: jax.Array, turns: int) -> jax.Array:
        """Applies the first layers, of which each `period` are alike, in a loop over that many turns."""
        period = self.period
        functions, states = zip(*(as_function(apply, block) for block in self.layers[: turns * period]))
        alike = functions[:period]

        def turn(x: jax.Array, of_turn: tuple[Any, jax.Array]) -> tuple[jax.Array, list[Learned]]:
            states, first = of_turn
            learned = []
            for number, (function, state) in enumerate(zip(alike, states)):
                x, of_block = recomputed(function, self.remat)(state, x, first + number)
                learned.append(of_block)
            return x, learned

        stacked = [jax.tree.map(lambda *leaves: jnp.stack(leaves), *states[number::period]) for number in range(period)]
        x, learned = jax.lax.scan(turn, x, (stacked, period * jnp.arange(turns)))
        for layer, block in enumerate(self.layers[: turns * period]):
            absorb(block, {path: values[layer // period] for path, values in learned[layer % period].items()})
        return x

    def stack_flops(self, space: tuple[int, ...], *, pairs: int | None = None) -> int:
        """Floating-point operations of matrix products (2 per multiply-add) in the blocks, forward, for one example.

        pairs: of a query and a key that it sees, where a pattern is given.
        """
        return sum(block.flops(space, pairs=pairs) for block in self.layers)

    @property
    def decoding_refusal(self) -> str:
        """Why it does not decode: the reason of its first mixer that does not; "" where all do."""
        return next((block.mixer.decoding_refusal for block in self.layers if not block.mixer.decodes), "")

    def state_size(self, length: int) -> int | None:
        """Numbers kept per sequence to decode the token after `length` tokens; None if it does not decode."""
        sizes = (block.mixer.state_size(length) for block in self.layers)
        return sum(size for size in sizes if size is not None) if not self.decoding_refusal else None
