"""SIGINT and SIGTERM, which do the same: what trains is saved, the process ends with status 130 or 143, and a second
signal ends it at once. Each is answered by a line.

A thread reads the signals (signal.set_wakeup_fd), since a handler waits until the main thread is back in Python, which
a compilation or a write can put off for minutes, and since an exception raised out of one is lost in a callback.
"""

import contextlib
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any, NoReturn

_NUMBERS = (signal.SIGINT, signal.SIGTERM)
# Set for a process that ends with its parent, of which its standard input is then a pipe.
HELPER = "ATTNLAB_HELPER"
_AGAIN = " again; ending at once, and what is not saved is lost"


class _Received:
    """What has come to this process. came: the first signal's number."""

    def __init__(self) -> None:
        self.lock = threading.Lock()
        self.came: int | None = None
        self.is_handled = False
        self.deferring = 0  # blocks of `deferred`, of one thread or of several that each train
        self.doing = ""  # what these do first
        self.continues = False
        self.helpers: list[tuple[Callable[[], None], Callable[[], None]]] = []


_received = _Received()


def _verb(number: int) -> str:
    return "interrupted" if number == signal.SIGINT else "terminated"


def announce(number: int, rest: str) -> None:
    """Prints what a signal did. Not by print, whose lock a thread that was stopped may hold."""
    line = f"attnlab: {_verb(number)}{rest}\n"
    with contextlib.suppress(OSError):
        os.write(2, ("\n" if os.isatty(2) else "").encode() + line.encode("utf-8", "backslashreplace"))


@contextlib.contextmanager
def handled(*, continues: bool = False) -> Iterator[None]:
    """For a program, around all of it: a signal ends the process, at once or, inside `deferred`, when that block says.

    Signals that were ignored before stay so. continues: whether the same command continues what it began.
    """
    if threading.current_thread() is not threading.main_thread() or _received.is_handled:
        yield
        return
    reader, writer = os.pipe()
    os.set_blocking(writer, False)
    numbers = [number for number in _NUMBERS if signal.getsignal(number) is not signal.SIG_IGN]
    previous_fd = signal.set_wakeup_fd(writer, warn_on_full_buffer=False)
    previous = {number: signal.signal(number, lambda *_: None) for number in numbers}
    _received.came, _received.is_handled, _received.continues = None, True, continues
    watching = threading.Thread(target=_watch, args=(reader,), daemon=True)
    watching.start()
    if HELPER in os.environ:
        threading.Thread(target=_watch_parent, daemon=True).start()
    try:
        yield
    except (SystemExit, KeyboardInterrupt):
        if _received.came is not None:
            leave(128 + _received.came)
        raise
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
        signal.set_wakeup_fd(previous_fd)
        os.write(writer, b"\0")
        watching.join()
        os.close(reader)
        os.close(writer)
        _received.is_handled = False


@contextlib.contextmanager
def deferred(doing: str) -> Iterator[Callable[[], int | None]]:
    """Yields a function: the number of the signal that has come, or None. The block then saves and calls `stop`.

    doing: what the block does before it stops, which is printed as the signal comes.

    Outside a program's `handled` the signals are taken here, if this is the main thread; a second one raises as `stop`.
    """
    is_main = threading.current_thread() is threading.main_thread()
    if _received.is_handled:
        with _received.lock:
            ending = _received.came
            _received.deferring += ending is None
            _received.doing = doing
        if ending is not None and not is_main:
            stop(ending)
        while ending is not None:  # the process is about to end, and nothing new begins
            time.sleep(1)
        try:
            yield lambda: _received.came
        finally:
            with _received.lock:
                _received.deferring -= 1
        came = _received.came
        if came is not None:
            announce(came, _continuation())
    else:
        numbers: list[int] = []

        def note(number: int, _: Any) -> None:
            numbers.append(number)
            if len(numbers) > 1:
                announce(number, _AGAIN)
                stop(number)
            announce(number, f"; {doing}")

        taken = [n for n in _NUMBERS if is_main and signal.getsignal(n) is not signal.SIG_IGN]
        previous = {number: signal.signal(number, note) for number in taken}
        try:
            yield lambda: numbers[0] if numbers else None
        finally:
            for number, handler in previous.items():
                signal.signal(number, handler)
        came = numbers[0] if numbers else None
    if came is not None:  # after the block had looked for the last time
        stop(came)


def stop(number: int) -> None:
    """Raises what ends the process as the signal asks, which may have come to another process of the run:
    KeyboardInterrupt or SystemExit(143).
    """
    if _received.is_handled and _received.came is None:
        _received.came = number
    if number == signal.SIGINT:
        raise KeyboardInterrupt
    raise SystemExit(128 + number)


@contextlib.contextmanager
def with_helpers(tell: Callable[[], None], wait: Callable[[], None]) -> Iterator[None]:
    """In the block, the first signal calls `tell` at once, and `wait` is called before the process ends by it."""
    _received.helpers.append((tell, wait))
    try:
        yield
    finally:
        _received.helpers.remove((tell, wait))


def _watch(reader: int) -> None:
    while (number := os.read(reader, 1)[0]) != 0:
        if number in _NUMBERS:
            _receive(number)


def _watch_parent() -> None:
    """Takes the end of standard input, which the parent's end brings too, for a SIGTERM, if it is the first."""
    while os.read(0, 1):
        pass
    if _received.came is None:
        _receive(signal.SIGTERM)


def _receive(number: int) -> None:
    with _received.lock:
        if _received.came is not None:
            announce(number, _AGAIN)
            os._exit(128 + number)
        _received.came = number
        at_once = not _received.deferring
    if not at_once:
        announce(number, f"; {_received.doing}")
    for tell, _ in _received.helpers:
        tell()
    if at_once:
        announce(number, _continuation())
        threading.Thread(target=_end, args=(number,), daemon=True).start()


def _continuation() -> str:
    return "; the same command continues from what is kept" if _received.continues else ""


def _end(number: int) -> None:
    for _, wait in list(_received.helpers):
        wait()
    os._exit(128 + number)


def leave(status: int) -> NoReturn:
    """Ends without taking the interpreter down, in which threads of libraries crash, or are waited for without end."""
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError, ValueError):
            stream.flush()
    os._exit(status)
