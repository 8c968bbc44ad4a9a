"""Further processes on this machine for one ablation; they and we share the runs by claims."""

import contextlib
import subprocess
import sys
import threading
from collections.abc import Iterator, Sequence
from pathlib import Path

from attnlab.errors import UserError


@contextlib.contextmanager
def helpers(count: int, arguments: Sequence[str], workdir: Path) -> Iterator[None]:
    """Starts `attnlab ablate *arguments` `count` times beside us, and waits for all at the end of the block.

    What they print goes to workdir/process-2.log and so on. Should the block raise, they are asked to stop (SIGTERM).
    """
    with contextlib.ExitStack() as files:
        started = []
        for number in range(2, count + 2):
            try:
                workdir.mkdir(parents=True, exist_ok=True)
                log = files.enter_context((workdir / f"process-{number}.log").open("w"))
            except OSError as error:
                raise UserError(f"workdir: cannot write to {workdir} ({error.strerror}); give another") from error
            command = [sys.executable, "-m", "attnlab.cli", "ablate", *arguments]
            process = subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT)
            started.append(process)
            # Waits at once: one that died and was not waited for still counts as alive, and so would keep its claim.
            threading.Thread(target=process.wait, daemon=True).start()
        try:
            yield
        except BaseException:
            for process in started:
                process.terminate()
            raise
        finally:
            for process in started:
                process.wait()
