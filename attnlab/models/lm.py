"""A decoder-only language model that takes any causal mixer, layer by layer."""

from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from attnlab.attention._shared.checks import check_float, check_int, check_segment_ids, require, shape_text
from attnlab.models.blocks import Stack
from attnlab.nn.layers import document_positions, dropout, product
from attnlab.nn.mixers.base import MixerCache
from attnlab.nn.parameters import normal, parameter
from attnlab.nn.sharding import laid, spec_of, specs_of, under_auto_axes, varying_as

# Folded into the dropout key; the layers fold in their number, so that a layer's dropout does not depend on depth.
_EMBEDDING_DROPOUT = 2**31


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
        output_positions: jax.Array | None = None,
        key: jax.Array | None = None,
    ) -> jax.Array:
        """tokens: int [B, T] -> float32 logits [B, T, vocabulary] of the next token.

        segment_ids: int [B, T], documents packed one after another, each a run of equal ids; their logits are those of
        each alone, positions from 0 too. output_positions: int [B, A], where logits are wanted, [B, A, vocabulary];
        None is everywhere. key: for dropout; None is evaluation.
        """
        if tokens.ndim != 2 or not jnp.issubdtype(tokens.dtype, jnp.integer):
            raise ValueError(f"tokens: got {tokens.dtype}{list(tokens.shape)}; need integers [batch, length]")
        if segment_ids is not None:
            check_segment_ids("segment_ids", segment_ids, tokens.shape, "[batch, length]")
            positions = document_positions(segment_ids)
        else:
            if self.max_length is not None and tokens.shape[1] > self.max_length:
                raise ValueError(f"tokens: got length {tokens.shape[1]}; max_length is {self.max_length}")
            positions = jnp.arange(tokens.shape[1])[None]
        x = self._embed(tokens, positions)
        x = dropout(x, self.dropout_rate, None if key is None else jax.random.fold_in(key, _EMBEDDING_DROPOUT))
        x = self.run(x, key=key, segment_ids=segment_ids)
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

    @under_auto_axes(lambda self, cache, tokens: (spec_of(tokens), specs_of(cache)))
    def step(self, cache: list[MixerCache], tokens: jax.Array) -> tuple[jax.Array, list[MixerCache]]:
        """The next tokens, int [B] -> (logits [B, vocabulary] of the ones after, cache)."""
        if tokens.ndim != 1 or not jnp.issubdtype(tokens.dtype, jnp.integer):
            raise ValueError(f"tokens: got {shape_text(tokens)}; need integers [batch]")
        x = self._embed(tokens[:, None], cache[0].position[None, None])
        new_cache = []
        for block, block_cache in zip(self.layers, cache):
            x, block_cache = block.step(block_cache, x)
            new_cache.append(block_cache)
        return self._logits(x)[:, 0], new_cache

    def flops(self, length: int) -> int:
        """Floating-point operations of matrix products (2 per multiply-add) for one sequence, forward."""
        return self.stack_flops((length,)) + 2 * length * self.features * self.vocabulary


@under_auto_axes(lambda model, prompt, **_: spec_of(prompt, 1))
def generate(
    model: LanguageModel,
    prompt: jax.Array,
    *,
    length: int,
    key: jax.Array,
    temperature: float = 1.0,
    below: int | None = None,
) -> jax.Array:
    """Samples a continuation: prompt int [B, P], P >= 1 -> tokens int [B, P + length].

    Decodes one token per step from the mixers' caches, the prompt too.

    Args:
      temperature: 0 takes the likeliest token.
      below: draw only tokens below this number; None draws of all.
    """
    is_prompt = prompt.ndim == 2 and prompt.size and jnp.issubdtype(prompt.dtype, jnp.integer)
    require(bool(is_prompt), "prompt", shape_text(prompt), "need integers [batch, length], both at least 1")
    length, temperature = check_int("length", length, least=0), check_float("temperature", temperature, least=0)
    below = None if below is None else check_int("below", below, least=1)
    prompt_length = prompt.shape[1]

    def step(carry: Any, index: jax.Array) -> tuple[Any, jax.Array]:
        cache, token = carry
        logits, cache = model.step(cache, token)
        logits = logits[:, :below]
        if temperature == 0:
            following = jnp.argmax(logits, axis=-1)
        else:
            following = jax.random.categorical(jax.random.fold_in(key, index), logits / temperature)
        given = prompt[:, jnp.minimum(index + 1, prompt_length - 1)]
        token = jnp.where(index + 1 < prompt_length, given, following.astype(prompt.dtype))
        return (cache, token), token

    steps = prompt_length + length - 1  # the last token is drawn and not read
    start = model.init_cache(prompt.shape[0], max(steps, 1)), prompt[:, 0]
    _, tokens = jax.lax.scan(step, varying_as(start, (nnx.state(model), prompt, key)), jnp.arange(steps))
    return jnp.concatenate([prompt[:, :1], tokens.T], axis=1)
