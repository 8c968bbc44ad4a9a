"""What the machine does to a run: no room, folders that cannot be written, two owners, a parent that dies. Each is one
line, and the same command continues once the cause is gone.

A full disk is a limit on the size of files (RLIMIT_FSIZE) in the fast tests, and small file systems in memory, of few
bytes or inodes or read-only, in the slow ones, where they may be mounted. Permissions count for root too: the commands
give up the capabilities that make them void.
"""

import contextlib
import functools
import json
import shutil
import signal
import subprocess
import time
from pathlib import Path

import commands
import pytest

TRAIN = ("train", "train.gin", "--workdir", "run")
SWEEP = ("ablate", "sweep.gin", "--workdir", "run")


def check_continues(folder, untouched):
    commands.run(folder, *TRAIN).check(0)
    commands.assert_equal_runs(folder / "run", untouched / "train")


def wait_until(condition, command):
    end = time.monotonic() + 300
    while not condition():
        assert command.is_running(), command.printed
        assert time.monotonic() < end, f"waited in vain:\n{command.printed}"
        time.sleep(0.002)


def wait_for_checkpoint(command, folder, count=1):
    wait_until(lambda: sum(name.isdecimal() for name in commands.checkpoints(folder / "run")) >= count, command)


@pytest.mark.long
def test_without_room_for_a_checkpoint(folder, untouched):
    command = commands.run(folder, *TRAIN, prepare=functools.partial(commands.small_files, 6000))
    command.check(1, "run/checkpoints/4 cannot be written (", "; no checkpoint is in ")
    assert not list((folder / "run" / "checkpoints").iterdir())
    check_continues(folder, untouched)


@pytest.mark.slow
@pytest.mark.parametrize("size", [100, 600, 1000, 2000, 3000])
def test_without_room_for_a_file(folder, untouched, size):
    command = commands.run(folder, *TRAIN, prepare=functools.partial(commands.small_files, size))
    assert command.wait() in (1, 2), command.printed
    assert "Traceback" not in command.printed
    assert len(command.lines) == 1, command.printed
    check_continues(folder, untouched)


@pytest.fixture
def mounted(folder):
    """Makes folder/run a file system of its own."""

    def mount(*options):
        (folder / "run").mkdir()
        command = ["mount", "-t", "tmpfs", "-o", ",".join(options), "tmpfs", str(folder / "run")]
        try:
            subprocess.run(command, check=True, capture_output=True)
        except (OSError, subprocess.CalledProcessError):
            pytest.skip("file systems cannot be mounted here")

    yield mount
    subprocess.run(["umount", "-l", str(folder / "run")], check=False, capture_output=True)


def remount(folder, option):
    subprocess.run(["mount", "-o", f"remount,{option}", str(folder / "run")], check=True)


@pytest.mark.slow
@pytest.mark.parametrize("limit", ["size=8k", "size=40k", "size=100k", "size=150k", "nr_inodes=8", "nr_inodes=60"])
def test_a_full_file_system(folder, untouched, mounted, limit):
    mounted(limit)
    command = commands.run(folder, *TRAIN)
    assert command.wait() in (1, 2), command.printed
    assert "Traceback" not in command.printed, command.printed
    assert len(command.lines) == 1, command.printed
    assert "No space left on device" in command.lines[0]
    remount(folder, "size=50m,nr_inodes=10000")
    check_continues(folder, untouched)


@pytest.mark.slow
def test_a_file_system_that_fills_up_in_mid_run(folder, untouched, mounted):
    mounted("size=20m")
    command = commands.Command(folder, *TRAIN)
    wait_for_checkpoint(command, folder)
    command.send(signal.SIGSTOP)
    with (folder / "run" / "other").open("wb") as file:
        while True:
            try:
                file.write(bytes(2**16))
                file.flush()
            except OSError:
                break
    command.send(signal.SIGCONT)
    command.check(1, "No space left on device", "; the last checkpoint is step ")
    (folder / "run" / "other").unlink()
    check_continues(folder, untouched)


@pytest.mark.slow
def test_a_file_system_that_becomes_read_only(folder, untouched, mounted):
    mounted("size=50m")
    command = commands.Command(folder, *TRAIN)
    wait_for_checkpoint(command, folder)
    command.send(signal.SIGTERM)
    command.check(143, "is kept in ")
    remount(folder, "ro")
    commands.run(folder, *TRAIN).check(2, "workdir: cannot write to ", "(Read-only file system)")
    remount(folder, "rw")
    check_continues(folder, untouched)


def locked(path):
    path.mkdir(parents=True, exist_ok=True)
    path.chmod(0o555)


@pytest.mark.long
def test_checkpoints_that_cannot_be_written(folder, untouched):
    locked(folder / "run" / "checkpoints")
    command = commands.run(folder, *TRAIN, prepare=commands.powerless)
    command.check(2, "workdir: cannot write to ", "run/checkpoints (")
    (folder / "run" / "checkpoints").chmod(0o755)


@pytest.mark.slow
def test_a_workdir_that_cannot_be_written(folder, untouched):
    locked(folder / "run")
    commands.run(folder, *TRAIN, prepare=commands.powerless).check(2, "workdir: cannot write to ", "Permission denied")
    (folder / "run").chmod(0o755)
    check_continues(folder, untouched)


@pytest.mark.slow
@pytest.mark.parametrize("place", ["run", "run/checkpoints"])
def test_what_becomes_unwritable_in_mid_run(folder, untouched, place):
    command = commands.Command(folder, *TRAIN, prepare=commands.powerless)
    wait_for_checkpoint(command, folder)
    (folder / place).chmod(0o555)
    assert command.wait() in (0, 1)  # 0: it was over by then
    assert "Traceback" not in command.printed, command.printed
    assert len(command.lines) == command.wait(), command.printed
    (folder / place).chmod(0o755)
    check_continues(folder, untouched)


@pytest.mark.slow
@pytest.mark.parametrize("place", ["run", "run/checkpoints"])
def test_a_folder_that_disappears_in_mid_run(folder, untouched, place):
    command = commands.Command(folder, *TRAIN)
    wait_for_checkpoint(command, folder)
    (folder / place).rename(folder / "away")
    assert command.wait() in (0, 1)
    assert "Traceback" not in command.printed, command.printed
    shutil.rmtree(folder / "run", ignore_errors=True)
    check_continues(folder, untouched)


@pytest.mark.long
def test_two_owners(folder, untouched):
    first = commands.Command(folder, *TRAIN)
    claim = folder / "run" / "owner.1"
    wait_until(lambda: claim.exists() and claim.stat().st_size > 0, first)  # it is made, then written
    first.send(signal.SIGSTOP)
    commands.run(folder, *TRAIN).check(2, f"run is in use by process {first.pid} on ", "; wait for it")
    first.send(signal.SIGCONT)
    first.check(0)
    commands.assert_equal_runs(folder / "run", untouched / "train")
    assert not list((folder / "run").glob("owner.*"))


@pytest.mark.slow
@pytest.mark.parametrize("days", [-400, 400])
def test_a_clock_that_is_set(folder, untouched, days):
    commands.run(folder, *TRAIN, prepare=functools.partial(commands.clock_set, days)).check(0)
    commands.assert_equal_runs(folder / "run", untouched / "train")


@pytest.mark.slow
@pytest.mark.parametrize("first", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.parametrize("second", [signal.SIGINT, signal.SIGTERM])
def test_a_second_signal_ends_at_once(folder, untouched, first, second):
    command = commands.Command(folder, *TRAIN)
    wait_for_checkpoint(command, folder)
    command.send(first)
    command.send(second)
    status, printed = command.wait(), command.printed
    assert status in {128 + first, 128 + second}, printed
    assert "Traceback" not in printed
    check_continues(folder, untouched)


def helpers_of(folder):
    """Process numbers of commands with the folder among their arguments."""
    found = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        with contextlib.suppress(OSError):
            if str(folder).encode() in path.read_bytes():
                found.append(int(path.parent.name))
    return found


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM, signal.SIGINT])
def test_helpers_end_with_their_parent(folder, untouched_sweep, number):
    """Also while the parent waits for them, with nothing left to train itself."""
    command = commands.Command(folder, "ablate", "sweep.gin", "--workdir", str(folder / "run"), "--processes", "2")
    wait_until(lambda: helpers_of(folder) and list(folder.glob("run/runs/claims/*")), command)
    command.send(number)
    assert command.wait(60) == {signal.SIGKILL: -9, signal.SIGTERM: 143, signal.SIGINT: 130}[number]
    end = time.monotonic() + 60
    while helpers_of(folder):
        assert time.monotonic() < end, helpers_of(folder)
        time.sleep(0.1)
    assert "Traceback" not in command.printed, command.printed
    commands.run(folder, *SWEEP).check(0)


FAILURES = {
    "ValueError": (ValueError("such is life"), True),
    "memory": (MemoryError("no more of it"), False),
    "a full disk": (OSError(28, "No space left on device"), False),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", FAILURES)
def test_an_arm_that_fails_is_a_row_and_the_others_are_run(folder, untouched_sweep, name):
    error, is_final = FAILURES[name]
    command = commands.run(folder, *SWEEP, prepare=functools.partial(commands.one_that_fails, error))
    assert command.wait() == 1, command.printed
    assert "Traceback" not in command.printed, command.printed
    rows = [json.loads(line) for line in (folder / "run" / "results.jsonl").read_text().splitlines()]
    assert [(row["arm"], row["status"]) for row in rows] == [("softmax", "finished"), ("linear", "failed")] * 2
    assert all(str(error) in row["error"] for row in rows if row["status"] == "failed")
    assert str(error) in (folder / "run" / "report.html").read_text()
    again = commands.run(folder, *SWEEP)
    assert again.wait() == (1 if is_final else 0), again.printed


@pytest.mark.slow
@pytest.mark.parametrize("name", ["machine.json", "attending.json", "failed.json", "result.json"])
@pytest.mark.parametrize("text", ["", "{}", "[]", '{"environ'])
def test_a_damaged_file_of_a_finished_arm(folder, untouched_sweep, name, text):
    shutil.copytree(untouched_sweep / "sweep", folder / "run")
    path = next((folder / "run" / "runs").glob("softmax-seed0-*")) / name
    path.write_text(text)
    command = commands.run(folder, *SWEEP)
    assert "Traceback" not in command.printed, command.printed
    assert command.wait() == (name == "result.json"), command.printed
    path.unlink(missing_ok=True)
    commands.run(folder, *SWEEP).check(0)
    rows = [json.loads(line) for line in (folder / "run" / "results.jsonl").read_text().splitlines()]
    assert {row["status"] for row in rows} == {"finished"}
