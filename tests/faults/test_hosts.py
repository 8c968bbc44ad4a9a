"""Two processes of two devices on this machine: they train one run, or a sweep's, stop together, and continue as if
nothing had happened, whichever of them is killed."""

import functools
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time

import commands
import jax
import numpy as np
import pytest
from test_kills import moment

from attnlab import config
from attnlab.ablate import cache
from attnlab.ablate.plan import Plan
from attnlab.train import restore_values

RUN = ("train", "hosts.gin", "--workdir", "run")
SWEEP = ("ablate", "hosts_sweep.gin", "--workdir", "run")
LINEAR = (*SWEEP, "--gin.Ablation.arms={'linear': 'experiments/mixers/linear.gin'}", "--gin.Ablation.baseline=linear")
NUMBERS = {signal.SIGKILL: -signal.SIGKILL, signal.SIGTERM: 143, signal.SIGINT: 130}


def wait_for_checkpoint(pair, path):
    while not any(name.isdecimal() for name in commands.checkpoints(path)):
        assert pair.is_running(), [command.printed for command in pair.both]
        time.sleep(0.002)


def parameters(path):
    built = config.build([str(path / "config.gin")], ["Mesh.fsdp=1"], root="Experiment")
    return restore_values(built.value, path)


def assert_close_runs(path, other, within):
    for x, y in zip(commands.rows(path), commands.rows(other), strict=True):
        assert x.keys() == y.keys()
        for name, value in x.items():
            assert value == (y[name] if isinstance(value, str) else pytest.approx(y[name], rel=0, abs=within)), name
    for x, y in zip(*(jax.tree.leaves(parameters(folder)) for folder in (path, other)), strict=True):
        np.testing.assert_allclose(x, y, rtol=0, atol=within)


@pytest.mark.long
def test_a_signal_to_one_saves_on_both_and_one_process_of_four_devices_continues(folder, untouched):
    pair = commands.Pair(folder, *RUN, keep=True)
    wait_for_checkpoint(pair, folder / "run")
    pair.both[1].send(signal.SIGTERM)
    pair.check(143, "terminated; step ", " is kept in ")
    assert ["terminated; stopping after this step" in command.printed for command in pair.both] == [False, True]
    shards = sorted((folder / "run" / "checkpoints").glob("*/state/ocdbt.process_*/d/*"))
    assert {path.parts[-3] for path in shards} == {"ocdbt.process_0", "ocdbt.process_1"}
    prepare = functools.partial(commands.devices, 4)
    commands.run(folder, *RUN, prepare=prepare).check(0)
    assert_close_runs(folder / "run", untouched / "train", 1e-6)


@pytest.mark.long
def test_what_the_first_refuses_ends_both_with_a_line(folder):
    (folder / "run").mkdir()
    (folder / "run" / "run.json").write_text('{"a": "1"}')
    commands.Pair(folder, *RUN).check(2, "run holds a run with Experiment.accumulation None there, 1 now, ", "; give ")


@pytest.mark.long
def test_a_sweep_s_runs_need_all_devices_of_two_processes(folder):
    pair = commands.Pair(folder, *SWEEP, "--gin.Ablation.devices_per_run=2")
    pair.check(2, "devices_per_run: got 2 with 2 processes, which train each run together on 4 devices; leave it out")


@pytest.mark.long
def test_without_a_cluster_it_is_a_line(folder):
    commands.run(folder, *RUN, "--distributed").check(
        2, "distributed: no cluster's environment is here", "--coordinator"
    )


@pytest.fixture(scope="module")
def untouched_pair(untouched):
    """A folder with a run `pair` of two processes that nothing happened to."""
    pair = commands.Pair(untouched, "train", "hosts.gin", "--workdir", "pair", keep=True)
    assert pair.wait() == (0, 0)
    first, other = (command.printed for command in pair.both)
    assert "validation: " in first
    assert "validation" not in other
    return untouched / "pair"


@pytest.mark.slow
def test_two_processes_train_as_one_device_does(untouched, untouched_pair):
    assert_close_runs(untouched_pair, untouched / "train", 1e-6)


@pytest.mark.slow
@pytest.mark.parametrize("first", [2, 4])
def test_the_number_of_processes_may_change(folder, untouched_pair, first):
    """Two of two devices, then one of four; and one of four, then two of two."""
    prepare = functools.partial(commands.devices, 4)
    if first == 2:
        pair = commands.Pair(folder, *RUN)
        wait_for_checkpoint(pair, folder / "run")
        pair.both[0].send(signal.SIGINT)
        assert pair.wait() == (130, 130)
        commands.run(folder, *RUN, prepare=prepare).check(0)
    else:
        command = commands.Command(folder, *RUN, prepare=prepare)
        while not any(name.isdecimal() for name in commands.checkpoints(folder / "run")):
            time.sleep(0.002)
        command.send(signal.SIGTERM)
        command.check(143)
        assert commands.Pair(folder, *RUN).wait() == (0, 0)
    assert_close_runs(folder / "run", untouched_pair, 1e-6)


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(3))
def test_kills_of_one_or_both(folder, untouched_pair, seed):
    """At random moments, checkpoint writes included; what is started again ends bit for bit as if nothing had been."""
    generator, hit = random.Random(400 + seed), []

    def compare():
        commands.assert_equal_runs(folder / "run", untouched_pair)
        assert not (folder / "run" / "damaged").exists()

    while len(hit) < 10:
        pair = commands.Pair(folder, *RUN)
        kind = moment(generator, pair, folder)
        victims = generator.choice([(0,), (1,), (0, 1)])
        number = generator.choice(list(NUMBERS))
        was_running = all(command.is_running() for command in pair.both)
        for victim in victims:
            pair.both[victim].send(number)
        statuses = ended(pair)
        printed = [command.printed for command in pair.both]
        assert not any(word in text for text in printed for word in ("Traceback", "Segmentation")), printed
        is_over = (folder / "run" / "result.json").exists()
        if was_running and any(statuses):
            assert all(statuses) or is_over, (statuses, printed)
            assert all(statuses[victim] in (NUMBERS[number], 0) for victim in victims) or len(victims) == 2, printed
            hit.append((kind, number.name, victims, statuses))
        if is_over:
            compare()
            shutil.rmtree(folder / "run")
    assert commands.Pair(folder, *RUN).wait() == (0, 0)
    compare()
    print(*hit, sep="\n")


def ended(pair):
    """Both statuses. As what restarts a job does, ends a process that waits for one that ended before they had met."""
    while all(command.is_running() for command in pair.both):
        time.sleep(0.05)
    end = time.monotonic() + 45
    while pair.is_running() and time.monotonic() < end:
        time.sleep(0.05)
    for command in pair.both:
        if command.is_running():
            assert "Gloo" not in command.printed, f"a lost process is not noticed:\n{command.printed}"
            command.send(signal.SIGKILL)
    return pair.wait()


@pytest.mark.slow
@pytest.mark.parametrize("place", [0.2, 0.5, 0.8])
def test_a_damaged_checkpoint_is_named_once_and_both_take_the_one_before(folder, untouched_pair, place):
    """Also where one of them alone reads the byte."""
    shutil.copytree(untouched_pair, folder / "run")
    (folder / "run" / "result.json").unlink()
    (arrays,) = (folder / "run" / "checkpoints" / "20" / "state" / "d").iterdir()
    data = bytearray(arrays.read_bytes())
    data[int(place * len(data))] ^= 1
    arrays.write_bytes(data)
    pair = commands.Pair(folder, *RUN)
    assert pair.wait() == (0, 0), [command.printed for command in pair.both]
    assert [len(command.lines) for command in pair.both] == [1, 0]
    assert "checkpoints/20 cannot be read (" in pair.both[0].printed
    assert [path.name for path in (folder / "run" / "damaged").iterdir()] == ["20"]
    commands.assert_equal_runs(folder / "run", untouched_pair)


@pytest.mark.slow
def test_a_second_pair_is_refused_while_the_first_trains(folder, untouched_pair):
    first = commands.Pair(folder, *RUN)
    wait_for_checkpoint(first, folder / "run")
    for command in first.both:
        command.send(signal.SIGSTOP)
    commands.Pair(folder, *RUN).check(2, "run is in use by process ", "; wait for it")
    for command in first.both:
        command.send(signal.SIGCONT)
    assert first.wait() == (0, 0), [command.printed for command in first.both]
    assert json.loads((folder / "run" / "result.json").read_text())["final"]["loss"]
    commands.assert_equal_runs(folder / "run", untouched_pair)


def sweep_rows(workdir):
    """results.jsonl without times."""

    def timeless(value):
        if isinstance(value, list):
            return [timeless(each) for each in value]
        if not isinstance(value, dict):
            return value
        return {name: timeless(each) for name, each in value.items() if not name.endswith(("seconds", "_per_second"))}

    return [timeless(json.loads(line)) for line in (workdir / "results.jsonl").read_text().splitlines()]


def assert_close(x, y, within):
    """Two rows, or parts of them."""
    if isinstance(x, float) and isinstance(y, float):
        assert x == pytest.approx(y, rel=0, abs=within)
    elif isinstance(x, list) and isinstance(y, list):
        for each, other in zip(x, y, strict=True):
            assert_close(each, other, within)
    elif isinstance(x, dict) and isinstance(y, dict):
        assert x.keys() == y.keys()
        for name, value in x.items():
            assert_close(value, y[name], within)
    else:
        assert x == y


@pytest.mark.slow
def test_two_processes_take_what_is_known_and_fail_together(folder, untouched, monkeypatch):
    monkeypatch.chdir(folder)
    run = Plan("sweep.gin", []).run("softmax", 0, None)
    softmax = cache.folder(folder / "run" / "runs", run.name, run.digest)
    shutil.copytree(untouched / "train", softmax)
    fail = functools.partial(commands.one_that_fails, OSError(28, "No space left on device"))
    pair = commands.Pair(folder, *SWEEP, "--gin.Ablation.seeds=[0]", then=fail)
    assert pair.wait() == (1, 1), [command.printed for command in pair.both]
    first, other = (command.printed for command in pair.both)
    assert "linear-seed0 failed: [Errno 28] No space left on device" in first
    assert not any(word in other for word in ("seed0", "Traceback", "report"))
    rows = sweep_rows(folder / "run")
    assert [(row["arm"], row["status"]) for row in rows] == [("softmax", "finished"), ("linear", "failed")]
    known = rows[0]
    assert known["final"] == json.loads((softmax / "result.json").read_text())["final"]
    assert len(known["attending"]["distance"]) == 1
    assert json.loads((folder / "run" / "speed.json").read_text())["device"] == "4 x cpu"
    assert not list((folder / "run" / "runs" / "claims").iterdir())


@pytest.mark.slow
@pytest.mark.parametrize("process", [0, 1])
def test_what_fails_in_one_alone_ends_both(folder, process):
    fail = functools.partial(commands.one_that_fails, OSError(5, "Input/output error"), process)
    pair = commands.Pair(folder, *LINEAR, "--gin.Ablation.seeds=[0]", then=fail)
    statuses = pair.wait(120)
    assert statuses[process] == 1, pair.both[process].printed
    assert all(statuses)
    assert "Input/output error" in pair.both[process].printed
    assert commands.Pair(folder, *LINEAR, "--gin.Ablation.seeds=[0]").wait() == (0, 0)


@pytest.mark.slow
@pytest.mark.parametrize(("what", "process"), [("row", 0), ("checkpoint", 0), ("checkpoint", 1)])
def test_what_one_alone_cannot_write_fails_the_run_in_both(folder, what, process):
    pair = commands.Pair(folder, *LINEAR, then=functools.partial(commands.no_room, what, process))
    assert pair.wait() == (1, 1), [command.printed for command in pair.both]
    failed, finished = sweep_rows(folder / "run")
    assert (failed["status"], finished["status"]) == ("failed", "finished")
    assert "No space left on device" in failed["error"]
    assert "; no checkpoint is in " in failed["error"]


@pytest.fixture(scope="module")
def untouched_sweep_of_two(untouched):
    """A folder with a sweep `sweep-of-two` of two processes that nothing happened to."""
    pair = commands.Pair(untouched, "ablate", "hosts_sweep.gin", "--workdir", "sweep-of-two", keep=True)
    assert pair.wait() == (0, 0), [command.printed for command in pair.both]
    first, other = (command.printed for command in pair.both)
    assert "report: " in first
    assert not any(word in other for word in ("seed", "validation", "report"))
    return untouched / "sweep-of-two"


@pytest.mark.slow
def test_a_sweep_of_two_processes_has_the_rows_of_one(folder, untouched_sweep_of_two):
    commands.run(folder, *SWEEP, prepare=functools.partial(commands.devices, 4)).check(0)
    rows = sweep_rows(folder / "run")
    arms = [(row["arm"], row["seed"]) for row in rows]
    assert arms == [(arm, seed) for seed in (0, 1) for arm in ("softmax", "linear")]
    assert_close(sweep_rows(untouched_sweep_of_two), rows, 1e-6)
    for workdir in (folder / "run", untouched_sweep_of_two):
        assert (workdir / "report.html").exists()
        speeds = json.loads((workdir / "speed.json").read_text())
        assert (speeds["device"], list(speeds["arms"])) == ("4 x cpu", ["softmax", "linear"])


@pytest.mark.slow
def test_a_sweep_of_two_processes_that_are_killed_continues(folder, untouched_sweep_of_two):
    """One of them, then both, then one by a signal at which both save; each in another run."""

    def begin(run):
        pair = commands.Pair(folder, *SWEEP)
        while not list(folder.glob(f"run/runs/{run}-*/checkpoints/4")):
            assert pair.is_running(), [command.printed for command in pair.both]
            time.sleep(0.002)
        return pair

    for run, victims, number in (
        ("softmax-seed0", (1,), signal.SIGKILL),
        ("linear-seed0", (0, 1), signal.SIGKILL),
        ("softmax-seed1", (1,), signal.SIGTERM),
    ):
        pair = begin(run)
        for victim in victims:
            pair.both[victim].send(number)
        statuses = ended(pair)
        assert all(statuses), [command.printed for command in pair.both]
        assert all(statuses[victim] == NUMBERS[number] for victim in victims)
        if number == signal.SIGTERM:
            pair.check(143, "terminated; step ", " is kept in ")
    assert commands.Pair(folder, *SWEEP).wait() == (0, 0)
    assert sweep_rows(folder / "run") == sweep_rows(untouched_sweep_of_two)


ROWS = """
import sys
import jax, numpy
from jax.experimental import multihost_utils
from attnlab.attention._dispatch.mesh import MESH_AXES
from attnlab.train import hosts
from attnlab.train.mesh import own_rows, placed

hosts.join(sys.argv[1], 2, int(sys.argv[2]), 10)
batch = numpy.arange(24).reshape(8, 3)
for order in ([0, 1, 2, 3], [0, 2, 1, 3], [3, 0, 2, 1]):
    for shape in ((4, 1, 1, 1), (2, 2, 1, 1), (2, 1, 1, 2), (1, 1, 2, 2)):
        mesh = jax.sharding.Mesh(numpy.array(jax.devices())[order].reshape(shape), MESH_AXES)
        found = placed({"x": batch[own_rows(mesh, 8)]}, mesh)["x"]
        numpy.testing.assert_array_equal(multihost_utils.process_allgather(found, tiled=True), batch)
hosts.leave()
"""


@pytest.mark.slow
def test_rows_are_those_of_a_process_s_devices_in_any_order_of_them():
    """On a pod the devices of a host are not side by side along the mesh."""
    command = [sys.executable, "-c", ROWS, f"127.0.0.1:{commands.free_port()}"]
    environment = {**os.environ, "XLA_FLAGS": "", "JAX_NUM_CPU_DEVICES": "2"}
    both = [subprocess.Popen([*command, str(number)], env=environment) for number in range(2)]
    assert [process.wait(120) for process in both] == [0, 0]
