"""The loop: it learns, continues bit for bit after any stop, and reports what is wrong without losing anything."""

import dataclasses
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import jax
import numpy as np
import pytest
import runs
from marks import DEEP, short, slow_but

from attnlab import nn
from attnlab.errors import OwnedError, UserError
from attnlab.train import OptimizerOptions, claims, loop, restore_values, step, train, workdir


def without_times(history):
    """Everything about the rows but how long they took."""
    return [{name: value for name, value in row.items() if not name.endswith("seconds")} for row in history]


def read_rows(workdir):
    return [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]


@pytest.fixture(scope="module")
def uninterrupted():
    return train(runs.experiment())


@pytest.fixture(scope="module")
def continued(tmp_path_factory):
    """A workdir that only lacks its result, and the rows."""
    workdir = tmp_path_factory.mktemp("continued")
    result = train(runs.experiment(), workdir=workdir, fingerprint=runs.FINGERPRINT)
    (workdir / "result.json").unlink()
    return workdir, result.history


def start(workdir, **options):
    command = [sys.executable, str(Path(runs.__file__)), str(workdir)]
    return subprocess.Popen(command, stderr=subprocess.PIPE, text=True, **options)


def wait_until(condition, process, seconds=120):
    end = time.monotonic() + seconds
    while not condition():
        assert process.poll() is None, process.stderr.read()
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.002)


@pytest.mark.long
def test_it_learns(uninterrupted):
    train_losses = [row["loss"] for row in uninterrupted.history if row["split"] == "train"]
    assert train_losses[0] > 4.5
    assert uninterrupted.final["loss"] < 3.2
    assert uninterrupted.final["bits_per_byte"] == pytest.approx(uninterrupted.final["loss"] / np.log(2))
    assert uninterrupted.items_per_second > 0


@pytest.mark.long
def test_rows_come_at_the_steps_asked_for(uninterrupted):
    steps = [(row["split"], row["step"]) for row in uninterrupted.history]
    assert [step for split, step in steps if split == "train"] == list(range(4, 37, 4))
    assert [step for split, step in steps if split == "validation"] == [12, 24, 36]


@pytest.mark.long
def test_the_same_experiment_gives_the_same_numbers(uninterrupted):
    assert without_times(train(runs.experiment()).history) == without_times(uninterrupted.history)


@pytest.mark.long
def test_without_a_bar_the_first_steps_say_once_how_long_the_others_take(monkeypatch, capsys):
    few = {"steps": 12, "evaluate_every": 12, "checkpoint_every": 12}
    train(runs.experiment(**few))
    assert "left" not in capsys.readouterr().err  # too short
    monkeypatch.setattr(loop, "_WORTH_SAYING", 0)
    train(runs.experiment(**few))
    lines = [line for line in capsys.readouterr().err.splitlines() if "left" in line]
    assert [re.sub(r"\d+ s ", "N s ", line) for line in lines] == ["step 4 of 12: about N s of steps left"]


@pytest.mark.parametrize(("seconds", "text"), [(0.4, "0 s"), (99, "99 s"), (120, "2 min"), (7200, "2.0 h")])
def test_durations_are_for_people(seconds, text):
    assert loop.duration(seconds) == text


@pytest.mark.slow
def test_another_seed_gives_others(uninterrupted):
    assert without_times(train(runs.experiment(seed=1)).history) != without_times(uninterrupted.history)


@pytest.mark.long
def test_sigterm_keeps_the_step_it_came_at(uninterrupted, tmp_path):
    process = start(tmp_path)
    wait_until(lambda: (tmp_path / "metrics.jsonl").exists(), process)
    process.send_signal(signal.SIGTERM)
    _, message = process.communicate(timeout=60)
    assert process.returncode == 143
    assert "attnlab: terminated; stopping after this step: saving ...\nattnlab: terminated; step " in message
    kept = max(int(path.name) for path in (tmp_path / "checkpoints").iterdir() if path.name.isdigit())
    assert f"step {kept} is kept in {tmp_path}" in message
    result = train(runs.experiment(), workdir=tmp_path, fingerprint=runs.FINGERPRINT)
    assert without_times(result.history) == without_times(uninterrupted.history)


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    workdir = tmp_path_factory.mktemp("finished")
    return workdir, train(runs.experiment(), workdir=workdir, fingerprint=runs.FINGERPRINT, config_text="# mine")


@pytest.mark.long
def test_a_workdir_holds_all_of_the_run(finished, uninterrupted):
    workdir, result = finished
    assert without_times(read_rows(workdir)) == without_times(uninterrupted.history)
    assert (workdir / "config.gin").read_text() == "# mine"
    assert any((workdir / "tensorboard").iterdir())
    assert json.loads((workdir / "result.json").read_text()) == dataclasses.asdict(result)


@pytest.mark.long
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
    evaluation = step.make_evaluation(experiment.model, experiment.task, experiment.mesh.build())
    metrics = loop.evaluate(experiment, evaluation, values)
    np.testing.assert_allclose(metrics["loss"], result.final["loss"], rtol=1e-5)
    assert {path: path.stat().st_mtime_ns for path in workdir.rglob("*")} == before


def test_a_folder_without_checkpoints_is_named(tmp_path):
    with pytest.raises(UserError, match=r"checkpoint: .* holds none; give the folder of a run that has reached"):
        restore_values(runs.experiment(), tmp_path)


def unfinished(workdir):
    """A copy of the state of a run that was stopped at its last checkpoint."""
    train(runs.experiment(), workdir=workdir, fingerprint=runs.FINGERPRINT)
    (workdir / "result.json").unlink()


def damage(checkpoint):
    """Empties its files."""
    for path in checkpoint.rglob("*"):
        if path.is_file():
            path.write_bytes(b"")


@pytest.mark.long
def test_a_damaged_checkpoint_is_named_and_the_one_before_is_used(tmp_path, uninterrupted, capsys):
    unfinished(tmp_path)
    checkpoints = tmp_path / "checkpoints"
    damage(checkpoints / "36")
    values = restore_values(runs.experiment(), tmp_path)
    result = train(runs.experiment(), workdir=tmp_path, fingerprint=runs.FINGERPRINT)
    assert without_times(result.history) == without_times(uninterrupted.history)
    assert without_times(read_rows(tmp_path)) == without_times(uninterrupted.history)
    read, continued = [line for line in capsys.readouterr().err.splitlines() if line.startswith("attnlab")]
    assert read == continued
    assert f"{checkpoints / '36'} cannot be read (" in read
    assert read.endswith("); step 30 is used")
    assert {path.name for path in (tmp_path / "damaged").iterdir()} == {"36"}
    assert {path.name for path in checkpoints.iterdir()} == {"30", "36"}
    assert not jax.tree.all(jax.tree.map(np.array_equal, values, restore_values(runs.experiment(), tmp_path)))


@pytest.mark.long
def test_without_a_readable_checkpoint_nothing_is_begun_or_moved(tmp_path):
    unfinished(tmp_path)
    for checkpoint in (tmp_path / "checkpoints").iterdir():
        damage(checkpoint)
    before = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*") if path.is_file()}
    for call in (
        lambda: train(runs.experiment(), workdir=tmp_path, fingerprint=runs.FINGERPRINT),
        lambda: restore_values(runs.experiment(), tmp_path),
    ):
        with pytest.raises(UserError, match=r"checkpoint: .*/36 cannot be read \(.*\), nor can 1 older; move .* away"):
            call()
    after = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*") if path.is_file()}
    assert after.keys() == before.keys()
    changed = {path.name for path in before if after[path] != before[path]}
    assert changed <= {"config.gin"}, "which says the same"


@pytest.mark.slow
def test_time_and_items_of_the_steps_since_the_last_row_are_continued(tmp_path, monkeypatch):
    """A row every 4 steps, a checkpoint every 6."""
    placed, left = loop.placed, iter(range(9))
    monkeypatch.setattr(loop, "placed", lambda *batch: (next(left), placed(*batch))[1])
    with pytest.raises(StopIteration):
        train(runs.experiment(steps=16, evaluate_every=16), workdir=tmp_path)
    monkeypatch.setattr(loop, "placed", placed)
    result = train(runs.experiment(steps=16, evaluate_every=16), workdir=tmp_path)
    rows = [row for row in result.history if row["split"] == "train"]
    assert [row["items"] for row in rows] == [4 * 4 * 32] * 4
    assert all(row["seconds"] > 0 for row in rows)


@pytest.mark.parametrize(
    "text",
    [
        pytest.param(lambda text: b"", id="emptied"),
        pytest.param(lambda text: None, id="deleted"),
        pytest.param(lambda text: text[:100], id="cut"),
        pytest.param(lambda text: text[:100] + text[140:], id="a middle line cut"),
        pytest.param(lambda text: text[:100] + b"\xff\xfe" + text[102:], id="not UTF-8"),
        pytest.param(lambda text: text + b'{"step": 37, "spl', id="a last line cut"),
    ],
)
def test_rows_of_metrics_are_not_lost_with_their_file(tmp_path, continued, text, capsys):
    folder, history = continued
    shutil.copytree(folder, tmp_path, dirs_exist_ok=True)
    file = tmp_path / "metrics.jsonl"
    damaged = text(file.read_bytes())
    if damaged is None:
        file.unlink()
    else:
        file.write_bytes(damaged)
    result = train(runs.experiment(), workdir=tmp_path, fingerprint=runs.FINGERPRINT)
    assert result.history == read_rows(tmp_path) == history
    lost = f"attnlab: {file} had lost rows, which are written again from the checkpoint"
    assert (lost in capsys.readouterr().err.splitlines()) == (not damaged or not damaged.startswith(file.read_bytes()))


@pytest.mark.parametrize("name", ["run.json", "result.json"])
@pytest.mark.parametrize(
    "text", slow_but(["", "[]", DEEP], ["", "{}", "[]", "3", '{"final": {}}', "\udcff", DEEP]), ids=short
)
def test_a_damaged_file_of_facts_is_named(tmp_path, finished, name, text):
    folder, result = finished
    shutil.copytree(folder, tmp_path, dirs_exist_ok=True)
    (tmp_path / name).write_bytes(text.encode(errors="surrogateescape"))
    with pytest.raises(UserError, match=rf"workdir: .*/{name} |holds a run with"):
        train(runs.experiment(), workdir=tmp_path, fingerprint=runs.FINGERPRINT)
    (tmp_path / name).unlink()
    again = train(runs.experiment(), workdir=tmp_path, fingerprint=runs.FINGERPRINT, config_text="# mine")
    assert without_times(again.history) == without_times(result.history)


RESULT_FIELDS = {
    "no final values": {"final": {}},
    "a final value that is a text": {"final": {"loss": "low"}},
    "a final value that is none": {"final": {"loss": None}},
    "a speed that is a list": {"items_per_second": [1.0]},
    "no history": {"history": 3},
    "rows without a step": {"history": [{"loss": 1.0}]},
}


@pytest.mark.parametrize("field", RESULT_FIELDS)
def test_a_result_of_other_types_is_named(tmp_path, finished, field):
    shutil.copytree(finished[0], tmp_path, dirs_exist_ok=True)
    result = json.loads((tmp_path / "result.json").read_text())
    (tmp_path / "result.json").write_text(json.dumps({**result, **RESULT_FIELDS[field]}))
    with pytest.raises(UserError, match=r"workdir: .*/result.json is no run's result"):
        train(runs.experiment(), workdir=tmp_path, fingerprint=runs.FINGERPRINT)


@pytest.mark.parametrize("kept", ["result.json", "checkpoints"])
def test_what_is_kept_without_run_json_is_of_this_config_or_refused(tmp_path, finished, kept, capsys):
    """Or a run with other options would be taken for this one, and its numbers for this one's."""
    folder, _ = finished
    path = tmp_path / "run"
    path.mkdir()
    (shutil.copytree if (folder / kept).is_dir() else shutil.copy)(folder / kept, path / kept)
    for other in ("A.b = 2\n", None):
        if other is not None:
            (path / "config.gin").write_text(other)
        with pytest.raises(UserError, match=rf"{path} has lost its run.json and holds another run; give another"):
            workdir.Workdir(path, {}, "A.b = 1\n")
        (path / "config.gin").unlink(missing_ok=True)
    (path / "config.gin").write_text("A.b = 1\n")
    capsys.readouterr()
    workdir.Workdir(path, {}, "A.b = 1\n")
    assert capsys.readouterr().err == f"attnlab: {path / 'run.json'} is lost; it is written again\n"


def test_checkpoints_of_other_data_are_refused_without_run_json_too(tmp_path, continued):
    """The resolved config is then the same."""
    shutil.copytree(continued[0], tmp_path, dirs_exist_ok=True)
    for name in ("run.json", "result.json"):
        (tmp_path / name).unlink(missing_ok=True)
    with pytest.raises(UserError, match=f"workdir: {tmp_path} holds checkpoints of another run; give another"):
        train(runs.experiment(), workdir=tmp_path, fingerprint={**runs.FINGERPRINT, "data": "other"})


def test_other_versions_than_the_run_was_started_with_are_named(tmp_path, continued, capsys, monkeypatch):
    folder, _ = continued
    shutil.copytree(folder, tmp_path, dirs_exist_ok=True)
    run = json.loads((tmp_path / "run.json").read_text())
    (tmp_path / "run.json").write_text(json.dumps({**run, "version jax": "0.1.2"}))
    train(runs.experiment(), workdir=tmp_path, fingerprint=runs.FINGERPRINT)
    (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("attnlab")]
    assert f"was started with jax 0.1.2, now {jax.__version__}; its numbers may differ" in line


def test_a_workdir_has_one_owner(tmp_path):
    with claims.claim(tmp_path, "owner"):
        with pytest.raises(OwnedError, match=rf"is in use by process {os.getpid()} on .*; wait for it"):
            train(runs.experiment(), workdir=tmp_path)
        assert not (tmp_path / "metrics.jsonl").exists()


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


WILD = OptimizerOptions(learning_rate=1e30, warmup_steps=0, clip_norm=1e30)


@pytest.mark.parametrize(
    ("options", "kept"),
    [
        pytest.param({"optimizer": WILD}, 0, marks=pytest.mark.slow),
        ({"optimizer": WILD, "log_every": 36}, 0),
        ({"optimizer": WILD, "log_every": 36, "checkpoint_every": 1}, 1),
    ],
)
@pytest.mark.long
def test_a_state_that_is_not_finite_is_not_kept(tmp_path, options, kept):
    """The first step leaves huge finite values behind, the second is of no number."""
    shown = f"the last checkpoint is step {kept} in {tmp_path}" if kept else f"no checkpoint is in {tmp_path} yet"
    for _ in range(2):
        with pytest.raises(FloatingPointError, match=rf"is (nan|inf|not finite) at step \d+; {shown}$"):
            train(runs.experiment(**options), workdir=tmp_path)
        steps = [int(path.name) for path in (tmp_path / "checkpoints").iterdir()]
        assert steps == ([kept] if kept else [])


@pytest.mark.long
def test_a_state_is_looked_at_beside_its_loss(tmp_path, monkeypatch):
    monkeypatch.setattr(loop, "_means", lambda sums: {"loss": 1.0})
    with pytest.raises(FloatingPointError, match=r"\S+ is not finite at step 6; no checkpoint is in"):
        train(runs.experiment(optimizer=WILD), workdir=tmp_path)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"steps": 0}, "steps: got 0"),
        ({"batch_size": -1}, "batch_size: got -1"),
        ({"evaluation_batches": 0}, "evaluation_batches: got 0"),
        ({"steps": 4}, "warmup_steps: got 4; need fewer than steps, so OptimizerOptions.warmup_steps of 0 to 3"),
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


@pytest.mark.long
def test_evaluation_is_exact_over_a_ragged_last_batch():
    """The mean over all validation examples, whatever the batch size."""
    results = []
    for batch_size in (3, 8):
        experiment = runs.experiment(batch_size=batch_size, steps=5, evaluation_batches=None)
        parameters = nn.initialize(experiment.model, jax.random.key(0))
        evaluation = step.make_evaluation(experiment.model, experiment.task, experiment.mesh.build())
        results.append(loop.evaluate(experiment, evaluation, parameters)["loss"])
    np.testing.assert_allclose(*results, rtol=1e-5)


@pytest.mark.long
def test_a_profile_has_the_steps_that_were_asked_for(tmp_path):
    """As xprof opens it."""
    train(runs.experiment(steps=8), workdir=tmp_path, profiled=3)
    (path,) = (tmp_path / "profile").rglob("*.xplane.pb")
    planes = jax.profiler.ProfileData.from_file(str(path)).planes
    events = [event for plane in planes for line in plane.lines for event in line.events]
    steps = [dict(event.stats)["step_num"] for event in events if event.name == "train"]
    assert sorted(map(int, steps)) == [3, 4, 5]
    assert sum(event.name == "data" for event in events) == 3


@pytest.mark.long
def test_rows_say_how_long_data_and_checkpoints_took(tmp_path):
    result = train(runs.experiment(steps=8, log_every=2, checkpoint_every=2), workdir=tmp_path)
    training = [row for row in result.history if row["split"] == "train"]
    assert all(0 < row["data_seconds"] < row["seconds"] for row in training)
    assert [row["checkpoint_seconds"] > 0 for row in training] == [False, True, True, True]
