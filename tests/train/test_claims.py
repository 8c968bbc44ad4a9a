"""Claims: one process has a run at a time, and what a dead one had is taken over by exactly one other."""

import json
import os
import subprocess
import sys
import threading
import time

import pytest

from attnlab.train import claims


def leave_claim(folder, name="run", *, pid=None, started=None, machine=None, age=0.0):
    """What another process that does not renew any more left behind."""
    path = folder / f"{name}.1"
    holder = {"machine": machine or claims._machine(), "host": "h", "pid": pid or os.getpid(), "started": started}
    path.write_text(json.dumps(holder))
    os.utime(path, (time.time() - age, time.time() - age))
    return path


@pytest.fixture(scope="module")
def dead_pid():
    process = subprocess.Popen([sys.executable, "-c", ""])
    process.wait()
    return process.pid


def test_one_has_it_until_the_end_of_the_block(tmp_path):
    with claims.claim(tmp_path, "run") as first, claims.claim(tmp_path, "run") as second:
        assert (first, second) == (True, False)
        with claims.claim(tmp_path, "other") as other:
            assert other
    assert not list(tmp_path.iterdir())
    with claims.claim(tmp_path, "run") as again:
        assert again


def test_an_error_releases_it(tmp_path):
    with pytest.raises(KeyboardInterrupt), claims.claim(tmp_path, "run"):
        raise KeyboardInterrupt
    assert not list(tmp_path.iterdir())


def test_a_fresh_one_of_another_machine_is_respected(tmp_path, dead_pid):
    leave_claim(tmp_path, pid=dead_pid, machine="another", age=claims.STALE_AFTER / 2)
    with claims.claim(tmp_path, "run") as ours:
        assert not ours


def test_one_that_is_not_written_yet_is_respected(tmp_path):
    leave_claim(tmp_path).write_text("")
    with claims.claim(tmp_path, "run") as ours:
        assert not ours


def test_the_holder_of_one_that_is_not_written_yet_is_waited_for(tmp_path):
    path = leave_claim(tmp_path)
    written = path.read_text()
    path.write_text("")
    assert claims.holder(tmp_path, "run") == "another process"
    threading.Timer(0.3, path.write_text, [written]).start()
    assert claims.holder(tmp_path, "run") == f"process {os.getpid()} on h"


@pytest.fixture
def quick_watch(monkeypatch):
    """Claims of other machines are watched for a tenth of a second, and for half of one where they look fresh."""
    monkeypatch.setattr(claims, "WATCHED_FOR", 0.1)
    monkeypatch.setattr(claims, "STALE_AFTER", 0.5)
    monkeypatch.setattr(claims, "_watched", {})


def taken_after(folder, seconds=3.0):
    """How long until the claim is ours, asked for again and again; None if it never is."""
    start = time.monotonic()
    while (waited := time.monotonic() - start) < seconds:
        with claims.claim(folder, "run") as ours:
            if ours:
                return waited
        time.sleep(0.02)
    return None


@pytest.mark.parametrize("age", [1000, -1000], ids=["old", "from the future"])
@pytest.mark.parametrize("is_empty", [False, True], ids=["whole", "not written"])
def test_a_stale_one_is_taken_over_by_one(tmp_path, quick_watch, age, is_empty):
    path = leave_claim(tmp_path, machine="another")
    if is_empty:
        path.write_text("")
    os.utime(path, (time.time() - age, time.time() - age))
    assert claims.is_fading(tmp_path, "run")
    with claims.claim(tmp_path, "run") as at_once:
        assert not at_once  # the clock may have been set
    time.sleep(0.2)
    with claims.claim(tmp_path, "run") as ours, claims.claim(tmp_path, "run") as second:
        assert (ours, second) == (True, False)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("age", [-4e7, 0, 4e7], ids=["clock set back", "clock right", "clock set forward"])
def test_a_holder_on_another_machine_that_renews_keeps_it_whatever_the_clock_says(tmp_path, quick_watch, age):
    path, ended = leave_claim(tmp_path, machine="another", age=age), threading.Event()

    def renew():
        moment = time.time() - age
        while not ended.wait(0.03):
            moment += 0.03
            os.utime(path, (moment, moment))

    renewing = threading.Thread(target=renew)
    renewing.start()
    try:
        assert taken_after(tmp_path, 1.0) is None
    finally:
        ended.set()
        renewing.join()
    assert taken_after(tmp_path) is not None


@pytest.mark.parametrize("age", [-4e7, 4e7])
def test_a_live_process_here_is_never_given_up_by_age(tmp_path, quick_watch, age):
    """It may be suspended, or asleep with its machine."""
    leave_claim(tmp_path, started=claims._started(os.getpid()), age=age)
    assert taken_after(tmp_path, 1.0) is None


def test_a_number_that_another_process_has_by_now_is_not_its_holder(tmp_path):
    started = claims._started(os.getpid())
    if started is None:
        pytest.skip("the kernel does not say when a process began")
    leave_claim(tmp_path, started=started - 1)
    assert taken_after(tmp_path) is not None


def test_one_that_ended_and_is_not_waited_for_is_dead(tmp_path):
    process = subprocess.Popen([sys.executable, "-c", ""])
    leave_claim(tmp_path, pid=process.pid, started=claims._started(process.pid))
    assert taken_after(tmp_path, 30) is not None
    process.wait()


def test_what_the_dead_left_of_a_run_that_is_over_is_deleted(tmp_path, dead_pid):
    leave_claim(tmp_path, pid=dead_pid)
    live = leave_claim(tmp_path, "other")
    for name in ("run", "other"):
        claims.forget(tmp_path, name)
    assert list(tmp_path.iterdir()) == [live]


def test_without_room_there_is_no_claim(tmp_path, monkeypatch):
    def refuse(*arguments):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(claims.json, "dump", refuse)
    with pytest.raises(OSError, match="No space left"), claims.claim(tmp_path, "run"):
        pass
    assert not list(tmp_path.iterdir())


def test_one_of_a_dead_process_here_is_taken_over_at_once(tmp_path, dead_pid):
    leave_claim(tmp_path, pid=dead_pid)
    with claims.claim(tmp_path, "run") as ours:
        assert ours


def test_of_many_exactly_one_takes_over(tmp_path, dead_pid):
    for trial in range(20):
        leave_claim(tmp_path, f"run{trial}", pid=dead_pid)
        together, finish, got = threading.Barrier(8), threading.Barrier(8), []

        def contend(name=f"run{trial}", together=together, finish=finish, got=got):
            together.wait()
            with claims.claim(tmp_path, name) as ours:
                got.append(ours)
                finish.wait()

        threads = [threading.Thread(target=contend) for _ in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert sorted(got) == [False] * 7 + [True]


def test_it_is_renewed(tmp_path, monkeypatch):
    monkeypatch.setattr(claims, "RENEWED_EVERY", 0.01)
    with claims.claim(tmp_path, "run"):
        os.utime(tmp_path / "run.1", (0, 0))
        deadline = time.monotonic() + 10
        while (tmp_path / "run.1").stat().st_mtime == 0:
            assert time.monotonic() < deadline
            time.sleep(0.01)


@pytest.mark.long
def test_a_holder_that_was_given_up_stops(tmp_path):
    program = """
import importlib.util, pathlib, sys, time
spec = importlib.util.spec_from_file_location("claims", sys.argv[1])
claims = importlib.util.module_from_spec(spec)
spec.loader.exec_module(claims)
claims.RENEWED_EVERY = 0.01
folder = pathlib.Path(sys.argv[2])
with claims.claim(folder, "run"):
    (folder / "run.2").write_text("")
    time.sleep(60)
"""
    command = [sys.executable, "-c", program, claims.__file__, str(tmp_path)]
    process = subprocess.run(command, capture_output=True, text=True, timeout=30)
    assert process.returncode == 1
    assert "was taken over by another process; this one stops" in process.stderr
    assert (tmp_path / "run.2").exists()
