"""A decoder-only language model that takes any causal mixer, layer by layer."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import PartitionSpec

from attnlab.attention._shared.checks import check_int, check_lengths, check_segment_ids, require, shape_text, shown
from attnlab.models.blocks import Stack
from attnlab.nn.layers import document_positions, dropout, product
from attnlab.nn.mixers.base import MixerCache, Pattern
from attnlab.nn.parameters import normal, parameter
from attnlab.nn.sharding import laid, spec_of, specs_of, under_auto_axes, varying_as

# Folded into the dropout key; the layers fold in their number, so that a layer's dropout does not depend on depth.
_EMBEDDING_DROPOUT = 2**31


def check_tokens(name: str, tokens: Any) -> None:
    is_array = hasattr(tokens, "shape") and hasattr(tokens, "dtype")
    fits = is_array and len(tokens.shape) == 2 and jnp.issubdtype(tokens.dtype, jnp.integer)
    given = shape_text(tokens) if is_array else shown(tokens)
    require(fits, name, given, "need integers [batch, length]")


def _of_rows(model: "LanguageModel", tokens: jax.Array) -> Any:
    """How a cache lies on Explicit axes: by row, as tokens [B, P] do."""
    cache = jax.eval_shape(lambda: model.init_cache(len(tokens), tokens.shape[1]))
    rows = spec_of(tokens, 1)
    return jax.tree.map(lambda leaf: rows if leaf.ndim else PartitionSpec(), cache)


class LanguageModel(Stack):
    """Tied embeddings, pre-norm blocks of mixer and gated MLP: tokens [B, T] -> logits [B, T, vocabulary].

    Args:
      vocabulary: number of tokens.
      max_length: with a number, learned positions up to it are added to the embeddings; None adds none (the mixers'
        rotary positions are their own). Logits after a position beyond it are NaN, where that is not refused.
      stack: mixers and further options, as in attnlab.models.blocks.Stack. Dropout is on the embeddings too; logits are
        float32.
    """

    def __init__(self, *, vocabulary: int, max_length: int | None = None, **stack: Any):
        super().__init__(**stack)
        self.vocabulary = vocabulary = check_int("vocabulary", vocabulary, least=1)
        self.max_length = None if max_length is None else check_int("max_length", max_length, least=1)
        self.embedding = parameter((vocabulary, self.features), normal(0.02))
        self.positions = None if max_length is None else parameter((max_length, self.features), normal(0.02))

    @under_auto_axes(
        lambda self, tokens, output_positions=None, **_: spec_of(
            tokens if output_positions is None else output_positions
        )
    )
    def __call__(
        self,
        tokens: jax.Array,
        *,
        segment_ids: jax.Array | None = None,
        pattern: Pattern | None = None,
        output_positions: jax.Array | None = None,
        key: jax.Array | None = None,
    ) -> jax.Array:
        """tokens: int [B, T] -> float32 logits [B, T, vocabulary] of the next token.

        segment_ids: int [B, T], documents packed one after another, each a run of equal ids; their logits are those of
        each alone, positions from 0 too. pattern: who sees whom, and at which positions, in place of a causal order
        (nn.SoftmaxAttention and its sums take one). output_positions: int [B, A], where logits are wanted, [B, A,
        vocabulary]; None is everywhere. key: for dropout; None is evaluation.
        """
        check_tokens("tokens", tokens)
        if segment_ids is not None:
            check_segment_ids("segment_ids", segment_ids, tokens.shape, "[batch, length]")
            positions = document_positions(segment_ids)
        else:
            places = np.arange(tokens.shape[1]) if pattern is None else pattern.places(tokens.shape[1])
            length = int(places.max(initial=-1)) + 1
            if self.max_length is not None and length > self.max_length:
                raise ValueError(f"tokens: got length {length}; max_length is {self.max_length}")
            positions = jnp.asarray(places)[None]
        x = self._embed(tokens, positions)
        x = dropout(x, self.dropout_rate, None if key is None else jax.random.fold_in(key, _EMBEDDING_DROPOUT))
        x = self.run(x, key=key, segment_ids=segment_ids, pattern=pattern)
        if output_positions is not None:
            x = jnp.take_along_axis(x, output_positions[..., None], axis=1)
        return self._logits(x)

    def _embed(self, tokens: jax.Array, positions: jax.Array) -> jax.Array:
        """tokens [B, T], positions [B or 1, T] -> [B, T, D]."""
        x = laid(self.embedding[...], "V.")[tokens]
        if self.positions is not None:
            x = x + self.positions[...].at[positions].get(mode="fill", fill_value=jnp.nan)
        return x.astype(self.dtype)

    def _logits(self, x: jax.Array) -> jax.Array:
        return laid(product(self.norm(x), self.embedding[...].T, jnp.float32, ".V"), "BTV")

    def init_cache(self, batch: int, max_length: int) -> list[MixerCache]:
        """An empty cache for decoding up to max_length tokens."""
        if self.max_length is not None and max_length > self.max_length:
            raise ValueError(f"max_length: got {max_length}; the model has positions for {self.max_length} tokens")
        return [block.mixer.init_cache(batch, max_length) for block in self.layers]

    @under_auto_axes(lambda self, tokens, lengths=None, *, max_length: (spec_of(tokens, 1), _of_rows(self, tokens)))
    def prefill(
        self, tokens: jax.Array, lengths: jax.Array | None = None, *, max_length: int
    ) -> tuple[jax.Array, list[MixerCache]]:
        """Reads prompts, int [B, P], at once: (logits [B, vocabulary] of the tokens after them, cache), as step gives.

        lengths: integers [B], 1 to P: the row's tokens, padding after them. None: P in all rows. max_length: how many
        tokens the cache is for, the prompt's and those to come.
        """
        check_tokens("tokens", tokens)
        batch, length = tokens.shape
        require(length > 0, "tokens", shape_text(tokens), "need at least one token")
        lengths, max_length = check_lengths(lengths, batch, most=length), check_int("max_length", max_length)
        require(max_length >= length, "max_length", max_length, f"need at least the prompt's {length} tokens")
        empty = varying_as(self.init_cache(batch, max_length), (nnx.state(self), tokens, lengths))
        x, cache = self._embed(tokens, jnp.arange(length)[None]), []
        for block, block_cache in zip(self.layers, empty):
            x, block_cache = block.prefill(block_cache, laid(x, "BT."), lengths)
            cache.append(block_cache)
        if lengths is None:
            return self._logits(x[:, -1:])[:, 0], cache
        # Where a compiled program is given no right length, not a number.
        last = jnp.where(lengths > 0, lengths - 1, length)[:, None, None]
        return self._logits(jnp.take_along_axis(x, last, axis=1, mode="fill", fill_value=jnp.nan))[:, 0], cache

    @under_auto_axes(lambda self, cache, tokens: (spec_of(tokens), specs_of(cache)))
    def step(self, cache: list[MixerCache], tokens: jax.Array) -> tuple[jax.Array, list[MixerCache]]:
        """The next tokens, int [B] -> (logits [B, vocabulary] of the ones after, cache)."""
        if tokens.ndim != 1 or not jnp.issubdtype(tokens.dtype, jnp.integer):
            raise ValueError(f"tokens: got {shape_text(tokens)}; need integers [batch]")
        x = self._embed(tokens[:, None], cache[0].position.reshape(-1, 1))
        new_cache = []
        for block, block_cache in zip(self.layers, cache):
            x, block_cache = block.step(block_cache, x)
            new_cache.append(block_cache)
        return self._logits(x)[:, 0], new_cache

    def flops(self, length: int, *, pairs: int | None = None, outputs: int | None = None) -> int:
        """Floating-point operations of matrix products (2 per multiply-add) for one sequence, forward.

        pairs: of a query and a key that it sees, where a pattern is given. outputs: how many logits are wanted of it;
        None is all.
        """
        logits = 2 * (length if outputs is None else outputs) * self.features * self.vocabulary
        return self.stack_flops((length,), pairs=pairs) + logits
