"""Texts by diffusion within blocks."""

import dataclasses
import functools
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from attnlab import nn
from attnlab.attention import masks
from attnlab.attention._shared.checks import check_int, keep, require
from attnlab.models import LanguageModel, fill_blocks
from attnlab.train.tasks.base import Batch, sequence_costs, weighted_means
from attnlab.train.tasks.texts import TextTask

# Folded into the dropout key for what is masked; a LanguageModel folds in smaller numbers.
_MASKS = 2**31 + 1
_GOLDEN = (5**0.5 - 1) / 2


@dataclasses.dataclass(frozen=True)
class BlockDiffusionTask(TextTask):
    """Masked tokens of a block after the clean blocks before it: a bound on the nats per token (docs: tasks of blocks).

    Of a block's tokens k are masked, k uniform over 1 to `block` and which ones uniform too; the loss is the mean cross
    entropy of the masked ones. Its mean over the draws is at least -log p per token, and is it with block 1. The model
    reads [noisy; clean] under masks.block_diffusion; its vocabulary is the corpus' and the mask, which is the last.

    Block Diffusion (Arriola et al. 2025), its linear schedule with the time integrated out.

    Args:
      corpus: the text.
      sequence_length: tokens that are predicted in an example, a multiple of block. Those of LanguageTask, which is
        given the one before them; here nothing is.
      block: tokens in a block.
      steps: forward passes in which a block is drawn; None is one for each of its tokens.
    """

    block: int = 16
    steps: int | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        block = check_int("block", self.block, least=1)
        fits = self.sequence_length % block == 0
        require(fits, "block", block, f"must divide sequence_length {self.sequence_length}")
        keep(self, block=block)
        if self.steps is not None:
            keep(self, steps=check_int("steps", self.steps, least=1, most=block))

    @functools.cached_property
    def pattern(self) -> nn.Pattern:
        """Of the noisy tokens and then the clean ones, which stand at the same positions."""
        mask = masks.block_diffusion(self.sequence_length, self.block)
        return nn.Pattern(mask, np.tile(np.arange(self.sequence_length), 2))

    def masked(self, tokens: jax.Array, key: jax.Array | None) -> tuple[jax.Array, jax.Array]:
        """Which of tokens [B, L] are masked, bool [B, L], and how many of their block, int32 [B, L].

        The blocks of a batch spread evenly over the numbers of masked tokens. key: None is evaluation, which masks an
        example by its own tokens, so that all runs mask it alike.
        """
        rows, blocks = len(tokens), self.sequence_length // self.block
        if key is None:
            of_place = np.cumprod(np.full(self.sequence_length, 0x9E3779B1, np.uint32), dtype=np.uint32)
            number = jnp.sum(tokens.astype(jnp.uint32) * of_place, axis=1, dtype=jnp.uint32)
            keys = jax.vmap(functools.partial(jax.random.fold_in, jax.random.key(0)))(number)
            first = jax.vmap(lambda key: jax.random.uniform(jax.random.fold_in(key, blocks)))(keys)[:, None]
            walk = np.arange(blocks)[None]
        else:
            key = jax.random.fold_in(key, _MASKS)
            keys = jax.vmap(functools.partial(jax.random.fold_in, key))(jnp.arange(rows))
            first = jax.random.uniform(jax.random.fold_in(key, rows))
            walk = np.arange(rows * blocks).reshape(rows, blocks)
        places = (first + (walk * _GOLDEN % 1).astype(np.float32)) % 1
        count = jnp.minimum(jnp.floor(places * self.block).astype(jnp.int32), self.block - 1) + 1
        noise = jax.vmap(lambda key: jax.random.uniform(key, (blocks, self.block)))(keys)
        masked = jnp.argsort(jnp.argsort(noise, axis=-1), axis=-1) < count[..., None]
        return masked.reshape(tokens.shape), jnp.repeat(count, self.block, axis=1)

    def loss(
        self, model: LanguageModel, batch: Batch, *, key: jax.Array | None
    ) -> tuple[jax.Array, dict[str, jax.Array]]:
        self._check(model)
        clean = batch["tokens"][:, 1:]
        masked, count = self.masked(clean, key)
        noisy = jnp.where(masked, self.corpus.vocabulary, clean)
        wanted = jnp.broadcast_to(jnp.arange(self.sequence_length), clean.shape)
        both = jnp.concatenate([noisy, clean], axis=1)
        logits = model(both, pattern=self.pattern, output_positions=wanted, key=key)[..., : self.corpus.vocabulary]
        losses = optax.losses.softmax_cross_entropy_with_integer_labels(logits, clean)
        means = weighted_means(batch, loss=jnp.mean(jnp.where(masked, losses * self.block / count, 0), axis=-1))
        return means["loss"], means

    def _check(self, model: LanguageModel) -> None:
        needed = self.corpus.vocabulary + 1
        allowed = f"{self.corpus.name} needs {needed}, {needed - 1} tokens and the mask"
        require(model.vocabulary == needed, "vocabulary", model.vocabulary, allowed)

    def derived(self, metrics: dict[str, float]) -> dict[str, float]:
        """The bound in the units of the literature."""
        return {f"{name}, at most": value for name, value in super().derived(metrics).items()}

    def describe(self) -> dict[str, Any]:
        return {**super().describe(), "block": self.block}

    def costs(self, model: LanguageModel) -> dict[str, Any]:
        """Of training, which reads two tokens for each that is predicted; it decodes without a cache."""
        length = self.sequence_length
        flops = model.flops(2 * length, pairs=length * (length + self.block), outputs=length)
        return {**sequence_costs(model, length), "flops": flops / length, "state_size": None}

    def _stream(
        self, model: LanguageModel, values: nn.Parameters, prompts: np.ndarray, lengths: np.ndarray, **draws: Any
    ) -> Iterator[np.ndarray]:
        """All tokens are drawn before the first is given."""
        length, key = draws.pop("length"), draws.pop("key")

        @jax.jit
        def draw(values: nn.Parameters, prompts: jax.Array, lengths: jax.Array, key: jax.Array) -> jax.Array:
            tokens = jnp.pad(prompts, ((0, 0), (0, length)))
            known = jnp.arange(tokens.shape[1]) < lengths[:, None]
            tokens = jnp.where(known, tokens, self.corpus.vocabulary)
            return fill_blocks(nn.bind(model, values), tokens, block=self.block, steps=self.steps, key=key, **draws)

        tokens = np.asarray(draw(values, jnp.asarray(prompts), jnp.asarray(lengths), key))
        return iter([tokens[np.arange(len(tokens)), lengths + number] for number in range(length)])

    def _generate(self, model: LanguageModel, prompts: jax.Array, *, length: int, **draws: Any) -> jax.Array:
        tokens = jnp.pad(prompts, ((0, 0), (0, length)), constant_values=self.corpus.vocabulary)
        return fill_blocks(model, tokens, block=self.block, steps=self.steps, **draws)
