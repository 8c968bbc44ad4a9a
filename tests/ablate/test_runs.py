"""The arms of a sweep: alike in all but what the arm says; a failing arm does not take the others with it."""

import json

import jax
import numpy as np
import pytest

from attnlab import cli, config, nn
from attnlab.ablate import Ablation

SWEEP = "experiments/sweeps/quickstart.gin"


@pytest.fixture(scope="module")
def arms():
    ablation = config.build([SWEEP], root="Ablation").value
    return {
        arm: config.build([SWEEP, *ablation.sources(arm)], ["Experiment.seed=1"], root="Experiment")
        for arm in ablation.arms
    }


def leaves(parameters):
    return {jax.tree_util.keystr(path): leaf for path, leaf in jax.tree.leaves_with_path(parameters)}


def test_arms_start_from_the_same_bits_where_they_share_a_parameter(arms):
    drawn = {arm: leaves(nn.initialize(built.value.model, jax.random.key(1))) for arm, built in arms.items()}
    assert drawn["softmax"].keys() == drawn["local"].keys()
    assert drawn["softmax"].keys() < drawn["gated_linear"].keys()
    for path, values in drawn["softmax"].items():
        np.testing.assert_array_equal(values, drawn["local"][path])
        np.testing.assert_array_equal(values, drawn["gated_linear"][path])


def test_arms_see_the_same_batches_in_the_same_order(arms):
    experiments = [built.value for built in arms.values()]
    streams = [iter(e.task.batches("train", e.batch_size, e.seed)) for e in experiments]
    for _ in range(4):
        first, *others = (next(stream)["tokens"] for stream in streams)
        for other in others:
            np.testing.assert_array_equal(first, other)


def test_arms_differ_in_nothing_but_the_mixer(arms):
    def shared(values):
        mixers = ("SoftmaxAttention.", "LocalAttention.", "LinearAttention.", "MIXERS", "WINDOW")
        return {name: value for name, value in values.items() if not name.startswith(mixers)}

    first, *others = (shared(built.values) for built in arms.values())
    assert len(first) > 20
    assert all(other == first for other in others)


def test_an_arm_that_fails_leaves_the_others_and_the_report(tmp_path, capsys):
    sweep = tmp_path / "sweep.gin"
    sweep.write_text(
        f"""# One arm whose loss is not a number.
from __gin__ import dynamic_registration
from attnlab import ablate
from attnlab import train
include '{SWEEP}'
ablate.Ablation.arms = {{
    'softmax': 'experiments/mixers/softmax.gin',
    'wild': ['train.OptimizerOptions.learning_rate = 1e30', 'train.OptimizerOptions.clip_norm = 1e30'],
}}
ablate.Ablation.seeds = [0]
STEPS = 6
train.OptimizerOptions.warmup_steps = 2
train.Experiment.batch_size = 2
train.Experiment.evaluation_batches = 1
train.LanguageTask.sequence_length = 32
"""
    )
    assert cli.main(["ablate", str(sweep), "--workdir", str(tmp_path / "out")]) == 1
    rows = [json.loads(line) for line in (tmp_path / "out" / "results.jsonl").read_text().splitlines()]
    assert {row["arm"]: row["status"] for row in rows} == {"softmax": "finished", "wild": "failed"}
    assert "loss is nan at step" in rows[1]["error"]
    page = (tmp_path / "out" / "report.html").read_text()
    assert "wild, seed 0, failed: loss is nan" in page
    assert "| wild | failed |" in (tmp_path / "out" / "results.md").read_text()
    assert "wild-seed0 failed" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"arms": {}}, "arms: got none"),
        ({"baseline": "nobody"}, r"baseline: got 'nobody'; need one of the arms \['one', 'two'\]"),
        ({"seeds": []}, r"seeds: got \[\]"),
        ({"seeds": [1, 1]}, r"seeds: got \[1, 1\]; need at least one, each once"),
        ({"arms": {"one": [], "a/b": []}}, "arms: got the name 'a/b'"),
    ],
)
def test_bad_sweeps_are_named(options, message):
    good = {"question": "?", "arms": {"one": [], "two": []}, "seeds": [0], "baseline": "one"}
    with pytest.raises(ValueError, match=message):
        Ablation(**{**good, **options})
