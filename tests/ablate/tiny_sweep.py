"""A sweep small enough to be run often, and a stand-in for training that only writes down what a run would give.

As `python tiny_sweep.py FILE WORKDIR` it runs a sweep with the stand-in in a process of its own.
"""

import dataclasses
import json
import math
import sys
import time
from pathlib import Path

from attnlab.ablate import run_ablation, runs
from attnlab.train import Result

TEXT = """# A tiny sweep.
from __gin__ import dynamic_registration
from attnlab import ablate
from attnlab import data
from attnlab import models
from attnlab import train
include 'experiments/recall/mqar.gin'
ablate.Ablation.question = 'Which?'
ablate.Ablation.baseline = 'softmax'
ablate.Ablation.seeds = [0, 1]
ablate.Ablation.arms = {
    'softmax': 'experiments/mixers/softmax.gin',
    'local': ['experiments/mixers/local.gin', 'WINDOW = 4'],
}
PAIRS = 2
STEPS = 4
models.LanguageModel.vocabulary = 32
models.LanguageModel.features = 16
models.LanguageModel.depth = 1
data.MultiQueryRecall.length = 16
data.MultiQueryRecall.vocabulary = 32
train.Experiment.batch_size = 4
train.Experiment.log_every = 2
train.Experiment.checkpoint_every = 2
train.SequenceTask.validation_examples = 8
train.OptimizerOptions.warmup_steps = 2
"""


def write(folder: Path, *bindings: str) -> str:
    """The tiny sweep with further bindings, as a file."""
    path = folder / "sweep.gin"
    path.write_text(TEXT + "\n".join(bindings) + "\n")
    return str(path)


def pretend_train(experiment, *, workdir, fingerprint, config_text):
    """Notes the run in trained.txt beside its folder. The loss is lowest at a rate of 0.01, and diverges above 1."""
    with (workdir.parent / "trained.txt").open("a") as file:
        file.write(f"{workdir.name}\n")
    time.sleep(0.02)
    rate = experiment.optimizer.learning_rate
    if rate > 1:
        raise FloatingPointError("loss is nan at step 2")
    final = {"loss": (math.log10(rate) + 2) ** 2 + 0.01 * experiment.seed, "accuracy": 0.5}
    history = [{"step": experiment.steps, "split": split, **final} for split in ("train", "validation")]
    result = Result(final, history, items_per_second=64.0, seconds=1.0, compile_seconds=1.0)
    (workdir / "result.json").write_text(json.dumps(dataclasses.asdict(result)))


def trained(folder: Path) -> list[str]:
    """Folders of the runs that were trained, as often as they were."""
    return (folder / "trained.txt").read_text().splitlines()


if __name__ == "__main__":
    runs.train = pretend_train
    run_ablation(sys.argv[1], [], Path(sys.argv[2]))
