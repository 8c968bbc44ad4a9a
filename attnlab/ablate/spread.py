"""Further processes on this machine for one ablation; they and we share the runs by claims."""

import contextlib
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path


@contextlib.contextmanager
def helpers(count: int, arguments: Sequence[str], workdir: Path) -> Iterator[None]:
    """Starts `attnlab ablate *arguments` `count` times beside us, and waits for all at the end of the block.

    What they say goes to workdir/process-2.log and so on. Should the block raise, they are asked to stop (SIGTERM).
    """
    with contextlib.ExitStack() as files:
        started = []
        for number in range(2, count + 2):
            workdir.mkdir(parents=True, exist_ok=True)
            log = files.enter_context((workdir / f"process-{number}.log").open("w"))
            command = [sys.executable, "-m", "attnlab.cli", "ablate", *arguments]
            started.append(subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT))
        try:
            yield
        except BaseException:
            for process in started:
                process.terminate()
            raise
        finally:
            for process in started:
                process.wait()
