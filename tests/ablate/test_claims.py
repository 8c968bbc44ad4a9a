"""Claims: one process has a run at a time, and what a dead one had is taken over by exactly one other."""

import json
import os
import subprocess
import sys
import threading
import time

import pytest

from attnlab.ablate import claims


def leave_claim(folder, name="run", *, pid=None, machine=None, age=0.0):
    """What another process that does not renew any more left behind."""
    path = folder / f"{name}.1"
    holder = {"machine": machine or claims._machine(), "host": "h", "pid": pid or os.getpid()}
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


def test_a_stale_one_is_taken_over(tmp_path):
    leave_claim(tmp_path, machine="another", age=claims.STALE_AFTER + 10)
    with claims.claim(tmp_path, "run") as ours, claims.claim(tmp_path, "run") as second:
        assert (ours, second) == (True, False)


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
    assert "another process took over the run" in process.stderr
    assert (tmp_path / "run.2").exists()
