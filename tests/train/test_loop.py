"""The loop: it learns, continues bit for bit after any stop, and reports what is wrong without losing anything."""

import dataclasses
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import jax
import numpy as np
import pytest
import runs

from attnlab import nn
from attnlab.errors import UserError
from attnlab.train import OptimizerOptions, loop, restore_values, step, train


def losses(history):
    """Everything about the rows but how long they took."""
    return [{name: value for name, value in row.items() if name not in ("seconds", "items")} for row in history]


def read_rows(workdir):
    return [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]


@pytest.fixture(scope="module")
def uninterrupted():
    return train(runs.experiment())


def start(workdir, **options):
    command = [sys.executable, str(Path(runs.__file__)), str(workdir)]
    return subprocess.Popen(command, stderr=subprocess.PIPE, text=True, **options)


def wait_until(condition, process, seconds=120):
    end = time.monotonic() + seconds
    while not condition():
        assert process.poll() is None, process.stderr.read()
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.002)


def test_it_learns(uninterrupted):
    train_losses = [row["loss"] for row in uninterrupted.history if row["split"] == "train"]
    assert train_losses[0] > 4.5
    assert uninterrupted.final["loss"] < 3.2
    assert uninterrupted.final["bits_per_byte"] == pytest.approx(uninterrupted.final["loss"] / np.log(2))
    assert uninterrupted.items_per_second > 0


def test_rows_come_at_the_steps_asked_for(uninterrupted):
    steps = [(row["split"], row["step"]) for row in uninterrupted.history]
    assert [step for split, step in steps if split == "train"] == list(range(4, 37, 4))
    assert [step for split, step in steps if split == "validation"] == [12, 24, 36]


def test_the_same_experiment_gives_the_same_numbers(uninterrupted):
    assert losses(train(runs.experiment()).history) == losses(uninterrupted.history)


def test_another_seed_gives_others(uninterrupted):
    assert losses(train(runs.experiment(seed=1)).history) != losses(uninterrupted.history)


def test_a_run_killed_at_any_moment_continues_bit_for_bit(uninterrupted, tmp_path):
    checkpoints = tmp_path / "checkpoints"

    def rows():
        path = tmp_path / "metrics.jsonl"
        return path.read_text().count("\n") if path.exists() else 0

    moments = [
        lambda: rows() >= 1,  # before the first checkpoint
        lambda: any(checkpoints.glob("*tmp*")),  # while a checkpoint is written
        lambda: rows() >= 8,  # between checkpoints
    ]
    for moment in moments:
        # As users' processes do, each compiles for itself; and none leaves half a program in the tests' cache.
        process = start(tmp_path, env={**os.environ, "JAX_ENABLE_COMPILATION_CACHE": "0"})
        wait_until(moment, process)
        process.send_signal(signal.SIGKILL)
        process.wait()
        process.stderr.close()
    result = train(runs.experiment(), workdir=tmp_path, fingerprint=runs.FINGERPRINT)
    assert losses(result.history) == losses(uninterrupted.history)
    assert losses(read_rows(tmp_path)) == losses(uninterrupted.history)


def test_sigterm_keeps_the_step_it_came_at(uninterrupted, tmp_path):
    process = start(tmp_path)
    wait_until(lambda: (tmp_path / "metrics.jsonl").exists(), process)
    process.send_signal(signal.SIGTERM)
    _, message = process.communicate(timeout=60)
    assert process.returncode == 143
    assert "attnlab: terminated; step " in message
    kept = max(int(path.name) for path in (tmp_path / "checkpoints").iterdir() if path.name.isdigit())
    assert f"step {kept} is kept in {tmp_path}" in message
    result = train(runs.experiment(), workdir=tmp_path, fingerprint=runs.FINGERPRINT)
    assert losses(result.history) == losses(uninterrupted.history)


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    workdir = tmp_path_factory.mktemp("finished")
    return workdir, train(runs.experiment(), workdir=workdir, fingerprint=runs.FINGERPRINT, config_text="# mine")


def test_a_workdir_holds_all_of_the_run(finished, uninterrupted):
    workdir, result = finished
    assert losses(read_rows(workdir)) == losses(uninterrupted.history)
    assert (workdir / "config.gin").read_text() == "# mine"
    assert any((workdir / "tensorboard").iterdir())
    assert json.loads((workdir / "result.json").read_text()) == dataclasses.asdict(result)


def test_a_finished_run_gives_its_result_at_once(finished):
    workdir, result = finished
    before = time.monotonic()
    assert train(runs.experiment(), workdir=workdir, fingerprint=runs.FINGERPRINT) == result
    assert time.monotonic() - before < 1


def test_restored_values_evaluate_as_the_run_did_at_its_end(finished):
    workdir, result = finished
    before = {path: path.stat().st_mtime_ns for path in workdir.rglob("*")}
    values = restore_values(runs.experiment(), workdir)
    experiment = runs.experiment()
    metrics = loop.evaluate(experiment, step.make_evaluation(experiment.model, experiment.task), values)
    np.testing.assert_allclose(metrics["loss"], result.final["loss"], rtol=1e-5)
    assert {path: path.stat().st_mtime_ns for path in workdir.rglob("*")} == before


def test_a_folder_without_checkpoints_is_named(tmp_path):
    with pytest.raises(UserError, match=r"checkpoint: .* holds none; give the folder of a run that has reached"):
        restore_values(runs.experiment(), tmp_path)


def unfinished(workdir):
    """A copy of the state of a run that was stopped at its last checkpoint."""
    train(runs.experiment(), workdir=workdir, fingerprint=runs.FINGERPRINT)
    (workdir / "result.json").unlink()


def test_a_corrupt_checkpoint_is_named_and_left_alone(tmp_path, uninterrupted):
    unfinished(tmp_path)
    newest = tmp_path / "checkpoints" / "36"
    damaged = [path for path in newest.rglob("*") if path.is_file() and "commit" not in path.name]
    for path in damaged:
        path.write_bytes(b"")
    with pytest.raises(UserError, match=r"checkpoint: .*/36 cannot be read .* Move it away"):
        train(runs.experiment(), workdir=tmp_path, fingerprint=runs.FINGERPRINT)
    assert all(path.exists() for path in damaged)
    assert len(read_rows(tmp_path)) == len(uninterrupted.history)
    newest.rename(tmp_path / "away")
    result = train(runs.experiment(), workdir=tmp_path, fingerprint=runs.FINGERPRINT)
    assert losses(result.history) == losses(uninterrupted.history)


def test_a_workdir_of_another_run_is_refused(finished):
    workdir, _ = finished
    before = {path: path.stat().st_mtime_ns for path in workdir.rglob("*")}
    with pytest.raises(UserError, match=r"holds a run with Experiment.steps 36 there, 99 now; give another --workdir"):
        train(runs.experiment(), workdir=workdir, fingerprint={"Experiment.steps": "99"})
    assert {path: path.stat().st_mtime_ns for path in workdir.rglob("*")} == before


def test_a_workdir_of_a_run_on_other_data_is_refused(finished):
    workdir, _ = finished
    other = runs.experiment()
    text = other.task.corpus.train.copy()
    text[0] += 1
    task = dataclasses.replace(other.task, corpus=dataclasses.replace(other.task.corpus, train=text))
    with pytest.raises(UserError, match=r"holds a run with data sha256 \w+ there, \w+ now"):
        train(dataclasses.replace(other, task=task), workdir=workdir, fingerprint=runs.FINGERPRINT)


def test_a_workdir_that_cannot_be_written_is_named(tmp_path):
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(UserError, match=r"workdir: cannot write to .*file/run"):
        train(runs.experiment(), workdir=tmp_path / "file" / "run")


def test_a_loss_that_is_not_finite_stops_the_run_and_keeps_the_checkpoint(tmp_path):
    wild = runs.experiment(optimizer=OptimizerOptions(learning_rate=1e30, warmup_steps=0, clip_norm=1e30))
    with pytest.raises(FloatingPointError, match=r"loss is nan at step \d+; the last checkpoint is in"):
        train(wild, workdir=tmp_path)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"steps": 0}, "steps: got 0"),
        ({"batch_size": -1}, "batch_size: got -1"),
        ({"evaluation_batches": 0}, "evaluation_batches: got 0"),
        ({"steps": 4}, "warmup_steps: got 4; need fewer than steps, so 0 to 3"),
        ({"seed": -1}, "seed: got -1; need 0 to 2147483647"),
        ({"seed": 10**30}, "seed: got 1000000000000000000000000000000; need 0 to 2147483647"),
    ],
)
def test_bad_options_are_named(options, message):
    with pytest.raises(ValueError, match=message):
        runs.experiment(**options)


@pytest.mark.parametrize("name", ["steps", "batch_size", "log_every", "evaluation_batches"])
def test_counts_are_integers(name):
    for given in (True, 8.0):
        with pytest.raises(TypeError, match=f"{name}: got {given}; need an int"):
            runs.experiment(**{name: given})


def test_evaluation_is_exact_over_a_ragged_last_batch():
    """The mean over all validation examples, whatever the batch size."""
    results = []
    for batch_size in (3, 8):
        experiment = runs.experiment(batch_size=batch_size, steps=5, evaluation_batches=None)
        parameters = nn.initialize(experiment.model, jax.random.key(0))
        evaluation = step.make_evaluation(experiment.model, experiment.task)
        results.append(loop.evaluate(experiment, evaluation, parameters)["loss"])
    np.testing.assert_allclose(*results, rtol=1e-5)
