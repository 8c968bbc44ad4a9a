"""Claims: which process has which run, agreed upon by processes and hosts that share a folder and nothing else.

A claim is a file NAME.1 that only one process can create. Its holder renews it; when the holder is gone, one other can
create NAME.2, and so on: the highest number counts. So nothing is ever taken by deleting a file, which two could do.
"""

import contextlib
import json
import os
import socket
import sys
import tempfile
import threading
from collections.abc import Iterator
from pathlib import Path

RENEWED_EVERY = 15.0  # seconds
STALE_AFTER = 120.0  # seconds without renewal after which the holder counts as gone


@contextlib.contextmanager
def claim(folder: Path, name: str) -> Iterator[bool]:
    """Gives whether this process now has the claim; if so, it is kept until the end of the block.

    A claim of a process that died on this machine is taken over at once, and one on another after STALE_AFTER. Should
    this process be the one that was given up (it was suspended, or lost the folder), it exits at once, with status 1.
    """
    path = _take(folder, name)
    if path is None:
        yield False
        return
    released = threading.Event()
    renewing = threading.Thread(target=_renew, args=(path, released), daemon=True)
    renewing.start()
    try:
        yield True
    finally:
        released.set()
        renewing.join()
        path.unlink(missing_ok=True)


def _take(folder: Path, name: str) -> Path | None:
    newest = _newest(folder, name)
    if newest and not _is_abandoned(folder / f"{name}.{newest}"):
        return None
    path = folder / f"{name}.{newest + 1}"
    try:
        with path.open("x") as file:
            json.dump({"machine": _machine(), "host": socket.gethostname(), "pid": os.getpid()}, file)
    except FileExistsError:  # another process was faster
        return None
    return path


def _newest(folder: Path, name: str) -> int:
    """The number that counts; 0 if there is none."""
    return max((int(path.suffix[1:]) for path in folder.glob(f"{name}.*")), default=0)


def _is_abandoned(path: Path) -> bool:
    try:
        with path.open() as file:  # opening asks a network's file system for the true time of renewal
            renewed, text = os.fstat(file.fileno()).st_mtime, file.read()
    except FileNotFoundError:  # released just now; the next attempt sees it
        return False
    # The folder's own clock, as hosts' clocks differ.
    with tempfile.NamedTemporaryFile(dir=path.parent, prefix="clock-") as probe:
        if os.stat(probe.name).st_mtime - renewed > STALE_AFTER:
            return True
    try:
        holder = json.loads(text)
    except json.JSONDecodeError:  # not yet written
        return False
    return holder["machine"] == _machine() and not _is_alive(holder["pid"])


def _machine() -> str:
    """What process numbers are unique in: this boot and container on Linux, else the host."""
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text().strip() + " " + os.readlink("/proc/self/ns/pid")
    except OSError:
        return socket.gethostname()


def _is_alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:  # another user's
        return True
    return True


def _renew(path: Path, released: threading.Event) -> None:
    """Renews a claim until it is released; ends the process if it was lost."""
    folder, name, number = path.parent, path.stem, int(path.suffix[1:])
    while not released.wait(RENEWED_EVERY):
        try:
            os.utime(path)
            lost = _newest(folder, name) > number
        except FileNotFoundError:
            lost = True
        except OSError:  # a network's file system that does not answer now
            continue
        if lost and not released.is_set():
            print(f"attnlab: another process took over the run of {path}; this one stops", file=sys.stderr, flush=True)
            os._exit(1)  # a signal would wait for the main thread, or be ignored, or write a checkpoint to what is lost
