"""A run small enough to be started often, in this process or, as `python runs.py WORKDIR`, in another."""

import functools
import sys
from pathlib import Path

import numpy as np

from attnlab import data, nn
from attnlab.models import LanguageModel
from attnlab.train import Experiment, LanguageTask, OptimizerOptions, train

FINGERPRINT = {"Experiment.steps": "36"}


@functools.cache
def corpus() -> data.Corpus:
    """Text that is easy to learn: words of a small vocabulary in a random order."""
    random = np.random.default_rng(0)
    words = [bytes(random.integers(97, 123, size=length).astype(np.uint8)) for length in range(2, 8)]
    text = np.frombuffer(b" ".join(words[i] for i in random.integers(0, len(words), 4000)), np.uint8)
    return data.Corpus("words", text[:-2000], text[-2000:])


def experiment(**options) -> Experiment:
    model = LanguageModel(
        vocabulary=256,
        mixers=[functools.partial(nn.LocalAttention, window=8)],
        depth=1,
        features=32,
        dropout_rate=0.1,
    )
    settings = {
        "steps": 36,
        "batch_size": 4,
        "log_every": 4,
        "evaluate_every": 12,
        "evaluation_batches": 2,
        "checkpoint_every": 6,
        "optimizer": OptimizerOptions(learning_rate=1e-2, warmup_steps=4),
    }
    return Experiment(model=model, task=LanguageTask(corpus(), sequence_length=32), **{**settings, **options})


if __name__ == "__main__":
    train(experiment(), workdir=Path(sys.argv[1]), fingerprint=FINGERPRINT)
