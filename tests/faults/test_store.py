"""Runs in an object store, whose server is a fake in this process: as in a folder, killed and continued too."""

import functools
import json
import os
import random
import signal
import subprocess
import time

import commands
import fake_gcs
import pytest
from test_kills import compare_sweeps

from attnlab.train import claims, store

RUN = ("train", "train.gin", "--workdir", "gs://bucket/runs/run")


@pytest.fixture(scope="module")
def server():
    pytest.importorskip("gcsfs")
    with pytest.MonkeyPatch.context() as patched:
        started = fake_gcs.Store()
        for name, value in started.environment.items():
            patched.setenv(name, value)
        yield started


@pytest.fixture
def bucket(server):
    """The server's objects, none yet."""
    server.objects.clear()
    return server.objects


@pytest.fixture
def run_folder(bucket):
    return store.find("gs://bucket/runs/run")


def arrive(environment):
    os.environ.update(environment)


def copied(objects, path):
    """The run's folder, with what the bucket holds of it."""
    for name, (data, *_) in list(objects.items()):
        file = path / name.removeprefix("runs/run/")
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(data)
    return path


def leave_claim(folder, **facts):
    holder = {"machine": claims._machine(), "host": "h", "pid": os.getpid(), "started": None, **facts}
    (folder / "owner.1").write_text(json.dumps(holder))


def test_a_claim_has_one_owner(run_folder, bucket):
    with claims.claim(run_folder, "owner") as first, claims.claim(run_folder, "owner") as second:
        assert (first, second) == (True, False)
        assert claims.holder(run_folder, "owner").startswith(f"process {os.getpid()} on ")
    assert not bucket


def test_only_one_creates_an_object(run_folder):
    with claims._created(run_folder / "owner.1") as file:
        file.write("first")
    with pytest.raises(FileExistsError), claims._created(run_folder / "owner.1") as file:
        file.write("second")
    assert (run_folder / "owner.1").read_text() == "first"


def test_a_claim_of_a_dead_process_here_is_taken_over_at_once(run_folder):
    process = subprocess.Popen(["true"])
    process.wait()
    leave_claim(run_folder, pid=process.pid)
    with claims.claim(run_folder, "owner") as ours:
        assert ours
        assert (run_folder / "owner.2").exists()


@pytest.mark.long
def test_a_stale_claim_of_another_machine_is_watched_and_then_taken_over(run_folder, bucket, monkeypatch):
    monkeypatch.setattr(claims, "WATCHED_FOR", 0.2)
    leave_claim(run_folder, machine="another")
    with claims.claim(run_folder, "owner") as ours:
        assert not ours
    assert not claims.is_fading(run_folder, "owner")
    data, generation, written = bucket["runs/run/owner.1"]
    bucket["runs/run/owner.1"] = data, generation, written - 2 * claims.STALE_AFTER
    assert claims.is_fading(run_folder, "owner")
    with claims.claim(run_folder, "owner") as ours:
        assert not ours
    time.sleep(0.3)
    with claims.claim(run_folder, "owner") as ours:
        assert ours


def test_a_claim_is_renewed(run_folder, bucket, monkeypatch):
    monkeypatch.setattr(claims, "RENEWED_EVERY", 0.01)
    with claims.claim(run_folder, "owner"):
        before, deadline = bucket["runs/run/owner.1"][1], time.monotonic() + 10
        while bucket["runs/run/owner.1"][1] == before:
            assert time.monotonic() < deadline
            time.sleep(0.01)


@pytest.mark.slow
def test_a_run_is_that_of_a_folder(folder, untouched, server, bucket, tmp_path):
    prepare = functools.partial(arrive, server.environment)
    command = commands.run(folder, *RUN, prepare=prepare)
    command.check(0)
    assert "gs://bucket/runs/run/metrics.jsonl" in command.printed
    path = copied(bucket, tmp_path / "copied")
    commands.assert_equal_runs(path, untouched / "train")
    assert sorted(file.name for file in path.iterdir()) == sorted(file.name for file in (untouched / "train").iterdir())
    assert sorted(step.name for step in (path / "checkpoints").iterdir()) == ["16", "20"]
    before = dict(bucket)
    commands.run(folder, *RUN, prepare=prepare).check(0)
    assert bucket == before


@pytest.mark.slow
def test_a_damaged_checkpoint_is_named_and_the_one_before_is_used(folder, untouched, server, bucket, tmp_path):
    prepare = functools.partial(arrive, server.environment)
    commands.run(folder, *RUN, prepare=prepare).check(0)
    del bucket["runs/run/result.json"]
    arrays = [name for name in bucket if "/20/state/" in name and "/d/" in name]
    largest = max(arrays, key=lambda name: len(bucket[name][0]))
    data = bytearray(bucket[largest][0])
    data[len(data) // 2] ^= 1
    server.write(largest, bytes(data))
    command = commands.run(folder, *RUN, prepare=prepare)
    command.check(0, "gs://bucket/runs/run/checkpoints/20 cannot be read (", "step 16 is used")
    path = copied(bucket, tmp_path / "copied")
    assert [step.name for step in (path / "damaged").iterdir()] == ["20"]
    commands.assert_equal_runs(path, untouched / "train")


@pytest.mark.slow
def test_kills(folder, untouched, server, bucket, tmp_path):
    generator, hit = random.Random(500), 0
    prepare = functools.partial(arrive, server.environment)
    while hit < 12:
        command = commands.Command(folder, *RUN, prepare=prepare)
        kind = generator.choice(["starting", "checkpoint", "anywhere"])
        seen = set(bucket)
        while (
            kind == "checkpoint"
            and command.is_running()
            and not any("/checkpoints/" in name for name in set(bucket) - seen)
        ):
            time.sleep(0.002)
        time.sleep(generator.uniform(0, {"starting": 1.5, "checkpoint": 0.3, "anywhere": 8}[kind]))
        number = generator.choice([signal.SIGKILL, signal.SIGTERM])
        command.send(number)
        status = command.wait()
        assert "Traceback" not in command.printed, command.printed
        hit += status != 0
        if status == 0:
            commands.assert_equal_runs(copied(bucket, tmp_path / str(time.monotonic_ns())), untouched / "train")
            bucket.clear()
    commands.run(folder, *RUN, prepare=prepare).check(0)
    commands.assert_equal_runs(copied(bucket, tmp_path / "last"), untouched / "train")
    assert not any("damaged" in name or "owner" in name or "clock" in name for name in bucket)


@pytest.mark.slow
def test_two_processes_train_in_a_store(folder, server, bucket):
    pair = commands.Pair(folder, "train", "hosts.gin", *RUN[2:], environment=server.environment)
    assert pair.wait() == (0, 0), [command.printed for command in pair.both]
    assert any("ocdbt.process_1/d/" in name for name in bucket)


@pytest.mark.slow
def test_two_processes_run_a_sweep_in_a_store(folder, server, bucket):
    sweep = ("ablate", "hosts_sweep.gin", *RUN[2:], "--gin.Ablation.seeds=[0]")
    pair = commands.Pair(folder, *sweep, environment=server.environment)
    assert pair.wait() == (0, 0), [command.printed for command in pair.both]
    rows = [json.loads(line) for line in bucket["runs/run/results.jsonl"][0].splitlines()]
    assert [(row["arm"], row["status"]) for row in rows] == [("softmax", "finished"), ("linear", "finished")]
    assert all(row["attending"]["distance"] for row in rows)
    assert "runs/run/report.html" in bucket


@pytest.mark.slow
def test_an_ablation_in_a_store_is_that_of_a_folder_and_is_reported_and_sampled_there(
    folder, untouched_sweep, server, bucket, tmp_path
):
    prepare = functools.partial(arrive, server.environment)
    where = "gs://bucket/runs/run"
    ablate = ("ablate", "sweep.gin", "--workdir", where)
    command = commands.run(folder, *ablate, "--processes", "2", prepare=prepare)
    command.check(0)
    assert f"report: {where}/report.html" in command.printed
    path = copied(bucket, tmp_path / "run")
    (path / "runs" / "claims").mkdir(exist_ok=True)  # a store has no empty folders
    compare_sweeps(tmp_path, untouched_sweep)
    assert {"process-2.log", "report.html", "results.csv", "results.md"} <= {file.name for file in path.iterdir()}
    page = (path / "report.html").read_text()
    before = dict(bucket)
    commands.run(folder, *ablate, prepare=prepare).check(0)
    assert bucket.keys() == before.keys()
    del bucket["runs/run/report.html"]
    commands.run(folder, "report", where, prepare=prepare).check(0)
    assert bucket["runs/run/report.html"][0].decode() == page
    commands.run(folder, *ablate, "--cache", "elsewhere", prepare=prepare).check(2, "cache: got elsewhere")
    commands.run(folder, "sample", f"{where}/nothing", prepare=prepare).check(2, "has no config.gin")


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["text", "images"])
def test_samples_of_a_run_in_a_store_are_those_of_a_folder(folder, server, bucket, kind):
    config = {"text": "experiments/lm/quickstart.gin", "images": "experiments/image/digits_raster.gin"}[kind]
    small = ["Experiment.steps=2", "Experiment.batch_size=2", "LanguageModel.depth=1", "LanguageModel.features=16"]
    small = small if kind == "text" else small[:2]
    options = [f"--gin.{option}" for option in (*small, "OptimizerOptions.warmup_steps=1")]
    prepare = functools.partial(arrive, server.environment)
    printed = []
    for where in ("local-run", "gs://bucket/runs/run"):
        commands.run(folder, "train", config, "--workdir", where, *options, prepare=prepare).check(0)
        command = commands.run(folder, "sample", where, "--count", "2", prepare=prepare)
        command.check(0)
        printed.append(command.printed.partition("step 2 of 2\n")[2].replace(where, "").rstrip())
    assert printed[0].rpartition("\n")[0] == printed[1].rpartition("\n")[0]  # but for its speed
    if kind == "images":
        assert bucket["runs/run/samples.png"][0] == (folder / "local-run" / "samples.png").read_bytes()
