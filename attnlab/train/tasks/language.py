"""Texts."""

import dataclasses
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from attnlab import nn
from attnlab.attention._shared.checks import check_bool, keep
from attnlab.models import LanguageModel, generate, stream
from attnlab.train.tasks.base import Batch, sequence_costs, weighted_means
from attnlab.train.tasks.texts import TextTask


@dataclasses.dataclass(frozen=True)
class LanguageTask(TextTask):
    """Prediction of the next token of a text: mean cross entropy in nats per token, and as bits or perplexity.

    Args:
      corpus: the text.
      sequence_length: tokens that are predicted in an example.
      probe_future: evaluation also looks for a leak: it reads each sequence again with the second half of another one,
        and reports the loss in the first half both times ("first half, own future", "first half, other future") and the
        share of its positions whose logits move by more than 0.001 ("leak"), which is 0 for a causal model. The other
        one is the next of the batch; where they agree, or where there is none, its tokens count one up from the own.
    """

    probe_future: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        keep(self, probe_future=check_bool("probe_future", self.probe_future))
        if self.probe_future and self.sequence_length < 4:
            raise ValueError(f"probe_future: got True with sequence_length {self.sequence_length}; needs at least 4")

    def loss(
        self, model: LanguageModel, batch: Batch, *, key: jax.Array | None
    ) -> tuple[jax.Array, dict[str, jax.Array]]:
        if model.vocabulary < self.corpus.vocabulary:
            raise ValueError(
                f"vocabulary: got {model.vocabulary}; the tokens of {self.corpus.name} need {self.corpus.vocabulary}"
            )
        targets = batch["tokens"][:, 1:]
        logits = model(batch["tokens"][:, :-1], key=key)
        losses = optax.losses.softmax_cross_entropy_with_integer_labels(logits, targets)
        means = weighted_means(
            batch,
            loss=jnp.mean(losses, axis=-1),
            accuracy=jnp.mean(jnp.argmax(logits, axis=-1) == targets, axis=-1),
        )
        if self.probe_future and key is None:
            means |= weighted_means(batch, **self._leak(model, batch["tokens"], logits))
        return means["loss"], means

    def _leak(self, model: LanguageModel, tokens: jax.Array, logits: jax.Array) -> dict[str, jax.Array]:
        half = self.sequence_length // 2
        future = jnp.roll(tokens[:, half:], 1, axis=0)
        is_same = jnp.all(future == tokens[:, half:], axis=1, keepdims=True)  # as where a batch holds copies
        future = jnp.where(is_same, (future + 1) % self.corpus.vocabulary, future)
        swapped = jnp.concatenate([tokens[:, :half], future], axis=1)
        # The last position of the first half predicts a token of the second.
        own, other = (x[:, : half - 1] for x in (logits, model(swapped[:, :-1])))
        targets = tokens[:, 1:half]
        entropy = optax.losses.softmax_cross_entropy_with_integer_labels
        return {
            "first half, own future": jnp.mean(entropy(own, targets), axis=-1),
            "first half, other future": jnp.mean(entropy(other, targets), axis=-1),
            "leak": jnp.mean(jnp.max(jnp.abs(own - other), axis=-1) > 1e-3, axis=-1),
        }

    def costs(self, model: LanguageModel) -> dict[str, Any]:
        return sequence_costs(model, self.sequence_length)

    def _stream(
        self, model: LanguageModel, values: nn.Parameters, prompts: np.ndarray, lengths: np.ndarray, **draws: Any
    ) -> Iterator[np.ndarray]:
        given = jnp.asarray(lengths) if lengths.min() < lengths.max() else None
        return stream(
            nn.bind(model, values), jnp.asarray(prompts), lengths=given, below=self.corpus.vocabulary, **draws
        )

    def _generate(self, model: LanguageModel, prompts: jax.Array, *, length: int, **draws: Any) -> jax.Array:
        return generate(model, prompts, length=length, below=self.corpus.vocabulary, **draws)
