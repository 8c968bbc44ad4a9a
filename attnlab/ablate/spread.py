"""Further processes on this machine for one ablation; they and we share the runs by claims."""

import contextlib
import os
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

from attnlab import signals
from attnlab.errors import UserError
from attnlab.train.store import here

_SAVING_TAKES = 20.0  # seconds at most that a helper has to save and end, once it is asked to


@contextlib.contextmanager
def helpers(count: int, arguments: Sequence[str], workdir: Path) -> Iterator[None]:
    """Starts `attnlab ablate *arguments` `count` times beside us, and waits for all at the end of the block.

    What they print goes to workdir/process-2.log and so on. A helper ends once its standard input does: we close that
    should the block raise or a signal come, and the system should we die.
    """
    started: list[subprocess.Popen] = []
    with contextlib.ExitStack() as stack:
        try:
            for number in range(2, count + 2):
                try:
                    workdir.mkdir(parents=True, exist_ok=True)
                    path = stack.enter_context(here(workdir / f"process-{number}.log"))
                    log = stack.enter_context(path.open("w"))
                except OSError as error:
                    raise UserError(f"workdir: cannot write to {workdir} ({error.strerror}); give another") from error
                process = subprocess.Popen(
                    [sys.executable, "-m", "attnlab.cli", "ablate", *arguments],
                    stdin=subprocess.PIPE,
                    stdout=log,
                    stderr=subprocess.STDOUT,
                    start_new_session=True,  # a terminal's Ctrl-C is for us, who tell them
                    env={**os.environ, signals.HELPER: "1"},
                )
                started.append(process)
                # Waits at once: one that died and was not waited for would stay on the system's list.
                threading.Thread(target=process.wait, daemon=True).start()
            stack.enter_context(signals.with_helpers(lambda: _tell(started), lambda: _end(started)))
            yield
        except BaseException:
            _end(started)
            raise
        for process in started:
            process.wait()


def _tell(processes: Sequence[subprocess.Popen]) -> None:
    for process in processes:
        if process.stdin is not None:
            process.stdin.close()


def _end(processes: Sequence[subprocess.Popen]) -> None:
    """Waits for helpers to save and end, and then ends them."""
    _tell(processes)
    end = time.monotonic() + _SAVING_TAKES
    for process in processes:
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(max(0.0, end - time.monotonic()))
    for process in processes:
        process.terminate()
    for process in processes:
        try:
            process.wait(5)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
