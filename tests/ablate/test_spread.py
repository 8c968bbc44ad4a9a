"""Further processes of an ablation: started beside ours, waited for, and stopped with it."""

import sys
import time

import pytest

from attnlab.ablate import spread


@pytest.fixture
def program(tmp_path, monkeypatch):
    """Stands in for Python: prints its arguments, and then waits where it is asked to."""

    def write(last):
        path = tmp_path / "program"
        path.write_text(f'#!/bin/sh\necho "$@"\n{last}\n')
        path.chmod(0o755)
        monkeypatch.setattr(sys, "executable", str(path))

    return write


def test_they_get_the_command_and_are_waited_for(program, tmp_path):
    program("sleep 0.2; echo done")
    with spread.helpers(2, ["sweep.gin", "--cache", "runs"], tmp_path / "out"):
        pass
    for number in (2, 3):
        printed = (tmp_path / "out" / f"process-{number}.log").read_text()
        assert printed == "-m attnlab.cli ablate sweep.gin --cache runs\ndone\n"


@pytest.mark.parametrize("last", ["cat; echo saved", "exec sleep 60"], ids=["asked", "made to"])
def test_they_stop_with_ours(program, tmp_path, monkeypatch, last):
    """Asked by the end of their input; one that does not listen is ended."""
    monkeypatch.setattr(spread, "_SAVING_TAKES", 1.0)
    program(last)
    before = time.monotonic()
    with pytest.raises(KeyboardInterrupt), spread.helpers(2, ["sweep.gin"], tmp_path):
        raise KeyboardInterrupt
    assert time.monotonic() - before < 10
    assert ("saved" in (tmp_path / "process-2.log").read_text()) == ("saved" in last)
