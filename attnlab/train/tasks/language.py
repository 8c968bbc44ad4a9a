"""Texts."""

import dataclasses
import math
from collections.abc import Iterator, Sequence
from typing import Any

import grain
import jax
import jax.numpy as jnp
import numpy as np
import optax

from attnlab import data, nn
from attnlab.attention._shared.checks import check_bool, keep, shown
from attnlab.data.text import check_length
from attnlab.models import LanguageModel, generate, stream
from attnlab.train.tasks.base import Batch, sequence_costs, weighted_means


@dataclasses.dataclass(frozen=True)
class LanguageTask:
    """Prediction of the next token of a text: mean cross entropy in nats per token, and as bits or perplexity.

    Args:
      corpus: the text.
      sequence_length: tokens that are predicted in an example.
      probe_future: evaluation also looks for a leak: it reads each sequence again with the second half of another one,
        and reports the loss in the first half both times ("first half, own future", "first half, other future") and the
        share of its positions whose logits move by more than 0.001 ("leak"), which is 0 for a causal model. The other
        one is the next of the batch; where they agree, or where there is none, its tokens count one up from the own.
    """

    corpus: data.Corpus
    sequence_length: int = 256
    probe_future: bool = False

    def __post_init__(self) -> None:
        if not isinstance(self.corpus, data.Corpus):
            raise TypeError(f"corpus: got {shown(self.corpus)}; need a text, such as data.embedded_text()")
        length = check_length(self.corpus, self.sequence_length)
        keep(self, sequence_length=length, probe_future=check_bool("probe_future", self.probe_future))
        if self.probe_future and self.sequence_length < 4:
            raise ValueError(f"probe_future: got True with sequence_length {self.sequence_length}; needs at least 4")

    def batches(self, split: str, batch_size: int, seed: int, rows: Sequence[int] | None = None) -> grain.IterDataset:
        return data.text_batches(
            self.corpus, split, sequence_length=self.sequence_length, batch_size=batch_size, seed=seed, rows=rows
        )

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

    def derived(self, metrics: dict[str, float]) -> dict[str, float]:
        """Of the mean loss, in the units of the literature."""
        if self.corpus.unit == "word":
            return {"perplexity": math.exp(min(metrics["loss"], 700.0))}
        return {f"bits_per_{self.corpus.unit}": metrics["loss"] / math.log(2)}

    def inputs(self, batch_size: int) -> Batch:
        return {"tokens": jax.ShapeDtypeStruct((batch_size, self.sequence_length + 1), jnp.int32)}

    def describe(self) -> dict[str, Any]:
        return {**self.corpus.describe(), "sequence length": self.sequence_length}

    def costs(self, model: LanguageModel) -> dict[str, Any]:
        return sequence_costs(model, self.sequence_length)

    def beginnings(self, count: int) -> list[np.ndarray]:
        """So many texts of the validation text, of one length: integers [tokens] each."""
        given = max(1, min(32, self.sequence_length // 4))
        starts = np.linspace(0, len(self.corpus.validation) - given, count).astype(int)
        return [self.corpus.validation[start : start + given] for start in starts]

    def continued(
        self,
        model: LanguageModel,
        values: nn.Parameters,
        prompts: Sequence[np.ndarray],
        *,
        length: int,
        stop: Sequence[str] = (),
        **draws: Any,
    ) -> Iterator[list[str | None]]:
        """How the model continues prompts, integers [tokens] each, as it is drawn: yields, after every token of all
        prompts, what it adds to each text, None to those that have ended.

        model: without values. stop: texts that end a continuation, which stand in it. draws: as generate takes them.
        """
        lengths = np.array([len(prompt) for prompt in prompts], np.int32)
        padded = np.zeros((len(prompts), lengths.max()), np.int32)
        for row, prompt in zip(padded, prompts):
            row[: len(prompt)] = prompt
        decoders, texts = [self.corpus.decoder() for _ in prompts], [""] * len(prompts)
        ended = [False] * len(prompts)
        drawn = stream(
            nn.bind(model, values),
            jnp.asarray(padded),
            length=length,
            lengths=jnp.asarray(lengths) if lengths.min() < lengths.max() else None,
            below=self.corpus.vocabulary,
            **draws,
        )
        for number, tokens in enumerate(drawn, 1):
            added: list[str | None] = []
            for row, token in enumerate(tokens.tolist()):
                if ended[row]:
                    added.append(None)
                    continue
                piece = decoders[row](token, number == length)
                texts[row] += piece
                # A stop text can begin in what came before.
                ended[row] = any(text in texts[row][-len(piece) - len(text) + 1 :] for text in stop if piece)
                added.append(piece)
            yield added
            if all(ended):
                return

    def continuations(
        self, model: LanguageModel, values: nn.Parameters, *, key: jax.Array, count: int, temperature: float
    ) -> list[tuple[str, str]]:
        """Beginnings from the validation text and how the model continues them, sequence_length tokens together.

        model: without values. temperature: 0 takes the likeliest tokens.
        """
        prompts = np.stack(self.beginnings(count)).astype(np.int32)
        given = prompts.shape[1]

        @jax.jit
        def draw(values: nn.Parameters, prompts: jax.Array) -> jax.Array:
            return generate(
                nn.bind(model, values),
                prompts,
                length=self.sequence_length - given,
                key=key,
                temperature=temperature,
                below=self.corpus.vocabulary,
            )

        texts = np.asarray(draw(values, prompts))
        return [(self.corpus.decode(text[:given]), self.corpus.decode(text[given:])) for text in texts]
