"""Claims: which process has which run, agreed upon by processes and hosts that share a folder and nothing else.

A claim is a file NAME.1 that only one process can create. Its holder renews it; when the holder is gone, one other can
create NAME.2, and so on: the highest number counts. So nothing is ever taken by deleting a file, which two could do.

On one machine a holder is gone when its process is, whatever any clock says. That of another machine is gone when it
was not seen to renew its claim for long enough, by the clock of the process that looks, which nobody sets.

In an object store (a folder that is an epath.Path) only one process can create an object, too; a claim is renewed by
writing it again.
"""

import contextlib
import json
import os
import socket
import sys
import threading
import time
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any, cast

from attnlab.errors import parse_json
from attnlab.train.store import is_remote

RENEWED_EVERY = 15.0  # seconds
STALE_AFTER = 120.0  # seconds without renewal after which the holder counts as gone
# Seconds for which a claim that looks stale by the folder's clock is watched: that clock may have been set.
WATCHED_FOR = 2 * RENEWED_EVERY

_watched: dict[Path, tuple[float, float]] = {}  # time of renewal, and when that was first seen, by time.monotonic


@contextlib.contextmanager
def claim(folder: Path, name: str) -> Iterator[bool]:
    """Gives whether this process now has the claim; if so, it is kept until the end of the block.

    A claim of a process that died on this machine is taken over at once; one on another machine after STALE_AFTER, or
    after WATCHED_FOR if it was that old already, for which the caller has to ask again. Should this process be the one
    that was given up (it lost the folder, or its host was suspended), it exits at once, with status 1.
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
        with contextlib.suppress(OSError):  # the folder may be gone, or read-only by now
            for number in range(1, int(path.suffix[1:]) + 1):  # the highest, which counts, last
                path.with_suffix(f".{number}").unlink(missing_ok=True)


def holder(folder: Path, name: str) -> str:
    """Who has the claim, for people."""
    for _ in range(10):
        with contextlib.suppress(OSError):
            facts = _facts((folder / f"{name}.{_newest(folder, name)}").read_text())
            if facts:
                return f"process {facts['pid']} on {facts['host']}"
        time.sleep(0.1)  # its holder creates the file a moment before writing this
    return "another process"


def is_fading(folder: Path, name: str) -> bool:
    """Whether the claim looks stale, so that watching it for WATCHED_FOR will tell."""
    try:
        return _looks_stale(folder / f"{name}.{_newest(folder, name)}")
    except OSError:
        return False


def forget(folder: Path, name: str) -> None:
    """Deletes what dead processes left of a claim that nobody needs any more."""
    for path in _files(folder, name):
        with contextlib.suppress(OSError):
            if _is_abandoned(path):
                path.unlink()


def _take(folder: Path, name: str) -> Path | None:
    newest = _newest(folder, name)
    before = folder / f"{name}.{newest}"
    judged = _text(before)
    if newest and not _is_abandoned(before):
        return None
    path = folder / f"{name}.{newest + 1}"
    holder = {"machine": _machine(), "host": socket.gethostname(), "pid": os.getpid(), "started": _started(os.getpid())}
    try:
        with _created(path) as file:
            try:
                json.dump({**holder, "token": uuid.uuid4().hex}, file)
                file.flush()
            except OSError:  # no room
                path.unlink()
                raise
    except FileExistsError:  # another process was faster
        return None
    if _newest(folder, name) != newest + 1 or _text(before) != judged:  # others took and released it meanwhile
        path.unlink(missing_ok=True)
        return None
    return path


def _created(path: Path) -> Any:
    """A file to write to, which must not be there; in an object store FileExistsError comes when it is closed."""
    if not is_remote(path):
        return path.open("x")
    import fsspec

    return fsspec.open(str(path), "x")


def _files(folder: Path, name: str) -> list[Path]:
    return [path for path in folder.glob(f"{name}.*") if path.suffix[1:].isdigit()]


def _newest(folder: Path, name: str) -> int:
    """The number that counts; 0 if there is none."""
    return max((int(path.suffix[1:]) for path in _files(folder, name)), default=0)


def _text(path: Path) -> str | None:
    try:
        return path.read_text()
    except (FileNotFoundError, UnicodeDecodeError):
        return None


def _facts(text: str) -> dict[str, Any]:
    """The holder; empty for a claim that is not written yet, or damaged."""
    try:
        facts = parse_json(text)
    except ValueError:
        return {}
    return facts if isinstance(facts, dict) and {"machine", "host", "pid"} <= facts.keys() else {}


def _is_abandoned(path: Path) -> bool:
    try:
        renewed, text = _renewed(path)
    except FileNotFoundError:  # released just now; the next attempt sees it
        return False
    facts = _facts(text)
    if facts.get("machine") == _machine():
        return not _is_alive(facts["pid"], facts.get("started"))
    now = time.monotonic()
    seen, since = _watched.get(path, (None, now))
    if seen != renewed:
        since = now
    _watched[path] = (renewed, since)
    return now - since > STALE_AFTER or (now - since > WATCHED_FOR and _looks_stale(path))


def _renewed(path: Path) -> tuple[float, str]:
    """When, by the folder's clock, and the text. Opening asks a network's file system for the true time."""
    if is_remote(path):
        return cast(Any, path).stat().mtime, path.read_text()
    with path.open(errors="replace") as file:
        return os.fstat(file.fileno()).st_mtime, file.read()


def _looks_stale(path: Path) -> bool:
    """By the folder's own clock, as hosts' clocks differ. One from the future is as odd as an old one: a clock was
    set back since."""
    probe = path.with_name(f"clock-{uuid.uuid4().hex}")
    try:
        probe.write_text("now")
        return abs(_renewed(probe)[0] - _renewed(path)[0]) > STALE_AFTER
    finally:
        probe.unlink(missing_ok=True)


def _machine() -> str:
    """What process numbers are unique in: this boot and container on Linux, else the host."""
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text().strip() + " " + os.readlink("/proc/self/ns/pid")
    except OSError:
        return socket.gethostname()


def _started(pid: int) -> int | None:
    """When a process began, in the kernel's own count; None where the kernel does not say."""
    fields = _status(pid)
    return int(fields[19]) if fields else None


def _status(pid: int) -> list[str]:
    """/proc/PID/stat from the state on; its second field, the name, may hold anything."""
    try:
        return Path(f"/proc/{pid}/stat").read_text(errors="replace").rpartition(")")[2].split()
    except OSError:
        return []


def _is_alive(pid: int, started: int | None) -> bool:
    """Whether it is the same process still: a number can be given again, and one that ended may not be waited for."""
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:  # another user's
        pass
    fields = _status(pid)
    return not fields or (fields[0] not in "ZX" and (started is None or int(fields[19]) == started))


def _renew(path: Path, released: threading.Event) -> None:
    """Renews a claim until it is released; ends the process if it was lost."""
    folder, name, number = path.parent, path.stem, int(path.suffix[1:])
    while not released.wait(RENEWED_EVERY):
        try:
            if is_remote(path):
                path.write_text(path.read_text())
            else:
                os.utime(path)
            lost = _newest(folder, name) > number and not released.wait(0.1) and _newest(folder, name) > number
        except FileNotFoundError:
            lost = True
        except OSError:  # a network's file system that does not answer now
            continue
        if lost and not released.is_set():
            line = f"{path} is gone or was taken over by another process; this one stops"
            print(f"attnlab: {line}", file=sys.stderr, flush=True)
            os._exit(1)  # a signal would wait for the main thread, or be ignored, or write a checkpoint to what is lost
