"""What tasks of texts share."""

import dataclasses
import math
from abc import abstractmethod
from collections.abc import Iterator, Sequence
from typing import Any

import grain
import jax
import jax.numpy as jnp
import numpy as np

from attnlab import data, nn
from attnlab.attention._shared.checks import keep, shown
from attnlab.data.text import check_length
from attnlab.models import LanguageModel
from attnlab.train.tasks.base import Batch


@dataclasses.dataclass(frozen=True)
class TextTask:
    """What tasks of texts share: batches of tokens, and texts that are continued.

    Args:
      corpus: the text.
      sequence_length: tokens that are predicted in an example.
    """

    corpus: data.Corpus
    sequence_length: int = 256

    def __post_init__(self) -> None:
        if not isinstance(self.corpus, data.Corpus):
            raise TypeError(f"corpus: got {shown(self.corpus)}; need a text, such as data.embedded_text()")
        keep(self, sequence_length=check_length(self.corpus, self.sequence_length))

    def batches(self, split: str, batch_size: int, seed: int, rows: Sequence[int] | None = None) -> grain.IterDataset:
        return data.text_batches(
            self.corpus, split, sequence_length=self.sequence_length, batch_size=batch_size, seed=seed, rows=rows
        )

    def derived(self, metrics: dict[str, float]) -> dict[str, float]:
        """Of the mean loss, in the units of the literature."""
        if self.corpus.unit == "word":
            return {"perplexity": math.exp(min(metrics["loss"], 700.0))}
        return {f"bits_per_{self.corpus.unit}": metrics["loss"] / math.log(2)}

    def inputs(self, batch_size: int) -> Batch:
        return {"tokens": jax.ShapeDtypeStruct((batch_size, self.sequence_length + 1), jnp.int32)}

    def describe(self) -> dict[str, Any]:
        return {**self.corpus.describe(), "sequence length": self.sequence_length}

    @abstractmethod
    def _stream(
        self, model: LanguageModel, values: nn.Parameters, prompts: np.ndarray, lengths: np.ndarray, **draws: Any
    ) -> Iterator[np.ndarray]:
        """Tokens [B] after prompts [B, P] of these lengths, one of each row after another, as `stream` gives them."""

    @abstractmethod
    def _generate(self, model: LanguageModel, prompts: jax.Array, *, length: int, **draws: Any) -> jax.Array:
        """Prompts [B, P] and the tokens after them, [B, P + length]."""

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
        drawn = self._stream(model, values, padded, lengths, length=length, **draws)
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
            length = self.sequence_length - given
            return self._generate(nn.bind(model, values), prompts, length=length, key=key, temperature=temperature)

        texts = np.asarray(draw(values, prompts))
        return [(self.corpus.decode(text[:given]), self.corpus.decode(text[given:])) for text in texts]
