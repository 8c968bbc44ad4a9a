"""Speed is timed after the runs, in turn, once; no result depends on it, and the report states where it is unknown."""

import json
import re

import pytest
import tiny_sweep

from attnlab import cli
from attnlab.ablate import measure_speed, run_ablation, runs, speed, write_report


@pytest.fixture(scope="module")
def over(tmp_path_factory):
    """A sweep that is over: its file and rows."""
    folder = tmp_path_factory.mktemp("over")
    file = tiny_sweep.write(folder, "ablate.Ablation.seeds = [0]")
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(runs, "train", tiny_sweep.pretend_train)
        rows = run_ablation(file, [], folder / "out", report=lambda line: None)
    return file, [{**row, "items_per_second": 6400.0} for row in rows]


@pytest.fixture
def swept(over, tmp_path):
    """The same with a folder of its own for speed.json."""
    file, rows = over
    return file, tmp_path, rows


def timers(order):
    """In place of steps: note whose turn it is, and count upwards."""

    def timer(experiment):
        name = type(experiment.model.layers[0].mixer).__name__
        return lambda: order.append(name) or float(len(order))

    return timer


@pytest.mark.long
def test_arms_take_turns_and_finished_timings_stay(swept, monkeypatch):
    file, folder, rows = swept
    order = []
    monkeypatch.setattr(speed, "_timer", timers(order))
    assert measure_speed(file, [], folder, rows) is None
    pair = ["SoftmaxAttention", "LocalAttention"]
    assert order == [*[*pair, *pair[::-1]] * 4, *pair]
    kept = json.loads((folder / "speed.json").read_text())["arms"]
    assert kept["softmax"]["items_per_second"] == [1, 4, 5, 8, 9, 12, 13, 16, 17]
    assert {row["speed"] for row in speed.with_speed(rows, folder)} == {9, 10}
    assert measure_speed(file, [], folder, rows) is None
    assert len(order) == 18
    renamed = [{**row, "run": f"{row['run']}-of-other-code"} for row in rows]
    assert all("speed" not in row for row in speed.with_speed(renamed, folder))
    assert measure_speed(file, [], folder, renamed) is None
    assert len(order) == 36


@pytest.mark.slow
def test_real_steps_are_timed(swept):
    file, folder, rows = swept
    assert measure_speed(file, [], folder, rows) is None
    kept = json.loads((folder / "speed.json").read_text())["arms"]
    assert all(len(arm["items_per_second"]) == 9 and min(arm["items_per_second"]) > 0 for arm in kept.values())
    write_report(rows, folder)
    assert "tokens/s" in (folder / "results.md").read_text()


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"compile_seconds": 30.0}, "timing softmax would take 3[0-9] s, of at most 10"),
        ({"items_per_second": 1.0}, "timing softmax would take [0-9]+ s, of at most 10"),
        ({"parameters": 10**13}, "the states of all arms at once take .* GiB"),
    ],
)
def test_what_takes_too_long_or_too_much_is_not_timed(swept, change, reason, monkeypatch):
    file, folder, rows = swept
    monkeypatch.setattr(speed, "_timer", lambda experiment: pytest.fail("it was timed"))
    assert re.fullmatch(reason, measure_speed(file, [], folder, [row | change for row in rows]))
    assert not (folder / "speed.json").exists()


def test_training_that_took_long_leaves_more_time_to_time(swept, monkeypatch):
    file, folder, rows = swept
    monkeypatch.setattr(speed, "_timer", timers([]))
    assert measure_speed(file, [], folder, [row | {"compile_seconds": 30.0, "seconds": 700.0} for row in rows]) is None


@pytest.mark.long
def test_a_timing_that_fails_leaves_the_report(pretended, tmp_path, monkeypatch, capsys):
    def fail(experiment):
        raise MemoryError("no\nmore")

    monkeypatch.setattr(speed, "_timer", fail)
    monkeypatch.setattr(speed, "_MOST_SECONDS", 100.0)  # the stand-in's steps take one second
    file = tiny_sweep.write(tmp_path, "ablate.Ablation.seeds = [0]")
    assert cli.main(["ablate", file, "--workdir", str(tmp_path / "out")]) == 0
    out = capsys.readouterr().out
    assert "speed: not measured (no more)" in out
    assert "Speed was not measured, so no arm is ranked by it." in out
    assert "tokens/s" not in out


def test_arms_that_failed_are_not_timed(swept, monkeypatch):
    file, folder, rows = swept
    failed = {"status": "failed", "error": "e"}
    rows = [row | failed if row["arm"] == "local" else row for row in rows]
    monkeypatch.setattr(speed, "_timer", timers(order := []))
    assert measure_speed(file, [], folder, rows) is None
    assert set(order) == {"SoftmaxAttention"}
    assert measure_speed(file, [], folder, [row | failed for row in rows]) is None
