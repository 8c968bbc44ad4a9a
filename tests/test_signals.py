"""SIGINT and SIGTERM: both save and end alike, whatever the main thread does, and a second one ends at once."""

import contextlib
import os
import signal
import subprocess
import sys
import threading

import pytest

from attnlab import signals

# The module alone, which starts at once.
HEAD = f"""
import importlib.util, os, sys, threading, time
spec = importlib.util.spec_from_file_location("signals", {signals.__file__!r})
signals = importlib.util.module_from_spec(spec)
spec.loader.exec_module(signals)
def begin():
    print("begun", flush=True)
"""
BLOCKED = "lock = threading.Lock(); lock.acquire(); begin(); lock.acquire()"
PROGRAMS = {
    # Deaf to exceptions, as callbacks of libraries are.
    "deaf": """
with signals.handled(continues=True):
    begin()
    while True:
        try:
            time.sleep(0.01)
        except BaseException:
            pass
""",
    "saving": """
with signals.handled(), signals.deferred("saving ...") as came:
    begin()
    while came() is None:
        time.sleep(0.01)
    print("saved", flush=True)
    signals.announce(came(), "; saved")
    signals.stop(came())
""",
    "too late": """
with signals.handled():
    with signals.deferred("saving ..."):
        begin()
        time.sleep(1)
        print("saved", flush=True)
    print("went on", flush=True)
""",
    "library": """
with signals.deferred("saving ...") as came:
    begin()
    while came() is None:
        time.sleep(0.01)
    print("saved", flush=True)
    signals.stop(came())
""",
    "hanging": f"with signals.handled(), signals.deferred('saving ...'):\n    {BLOCKED}",
}


def run(program, *numbers, between=0.3, **options):
    """Sends the signals once the program has begun. (status, what it printed, errors)."""
    command = [sys.executable, "-c", HEAD + PROGRAMS.get(program, program)]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True, **options}
    with subprocess.Popen(command, **pipes) as process:
        try:
            assert process.stdout.readline() == "begun\n"
            for number in numbers:
                process.send_signal(number)
                with contextlib.suppress(subprocess.TimeoutExpired):
                    process.wait(between)
            printed, errors = process.communicate(timeout=30)
        finally:
            process.kill()
    return process.returncode, printed.split(), errors


NUMBERS = [(signal.SIGINT, 130, "interrupted"), (signal.SIGTERM, 143, "terminated")]


@pytest.mark.parametrize(("number", "status", "verb"), NUMBERS)
def test_a_program_ends_alike(number, status, verb):
    kept = "; the same command continues from what is kept"
    assert run("deaf", number) == (status, [], f"attnlab: {verb}{kept}\n")
    at_once = f"attnlab: {verb}; saving ...\n"
    assert run("saving", number) == (status, ["saved"], f"{at_once}attnlab: {verb}; saved\n")
    assert run("too late", number) == (status, ["saved"], f"{at_once}attnlab: {verb}\n")


@pytest.mark.parametrize(("number", "status", "verb"), NUMBERS)
def test_a_second_signal_ends_at_once_even_in_a_call_that_never_returns(number, status, verb):
    lines = ["terminated; saving ...", f"{verb} again; ending at once, and what is not saved is lost"]
    assert run("hanging", signal.SIGTERM, number) == (status, [], "".join(f"attnlab: {line}\n" for line in lines))


@pytest.mark.parametrize(("number", "status"), [(signal.SIGINT, -signal.SIGINT), (signal.SIGTERM, 143)])
def test_in_a_library_the_loop_saves_and_raises(number, status):
    code, printed, errors = run("library", number)
    assert (code, printed) == (status, ["saved"])
    assert ("KeyboardInterrupt" in errors) == (number == signal.SIGINT)
    assert "; saving ...\n" in errors


def test_a_signal_that_was_ignored_stays_so():
    """As SIGINT is of what a shell starts in the background, or under nohup."""
    ignoring = HEAD + "import signal\nsignal.signal(signal.SIGINT, signal.SIG_IGN)\n" + PROGRAMS["saving"]
    assert run(ignoring, signal.SIGINT, signal.SIGTERM)[0] == 143


def test_a_helper_ends_with_its_standard_input():
    reader, writer = os.pipe()
    command = [sys.executable, "-c", HEAD + PROGRAMS["saving"]]
    environment = {**os.environ, signals.HELPER: "1"}
    with subprocess.Popen(command, stdin=reader, stdout=subprocess.PIPE, env=environment, text=True) as process:
        os.close(reader)
        assert process.stdout.readline() == "begun\n"
        os.close(writer)
        assert process.communicate(timeout=30)[0] == "saved\n"
    assert process.returncode == 143


def test_handlers_are_restored():
    def handlers():
        return [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]

    before, threads = handlers(), threading.active_count()
    with signals.handled(), signals.deferred("saving ...") as came:
        assert came() is None
        assert handlers() != before
    assert handlers() == before
    with signals.deferred("saving ..."):
        assert handlers() != before
    assert (handlers(), threading.active_count()) == (before, threads)
    outside = threading.Thread(target=lambda: signals.deferred("saving ...").__enter__())
    outside.start()
    outside.join()
    assert handlers() == before


def test_helpers_hear_of_the_first_signal_and_are_waited_for():
    program = """
with signals.handled(), signals.with_helpers(lambda: print("told", flush=True), lambda: print("waited", flush=True)):
    begin()
    time.sleep(60)
"""
    assert run(program, signal.SIGTERM)[:2] == (143, ["told", "waited"])
