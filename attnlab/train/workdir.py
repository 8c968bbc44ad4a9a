"""A run's folder: run.json, config.gin, metrics.jsonl, tensorboard/, checkpoints/, and result.json once it is over.

A checkpoint holds the state, a sum over the bits of each of its arrays, and all else that the run continues from: the
position in the data, the rows of metrics, and what the next row has of time and items. One that cannot be read, or
whose sums differ, is moved to damaged/, and the one before it is used.

In an object store metrics.jsonl and TensorBoard's events are written whole each time they grow, the events with the
checkpoints. Of several processes the first does all of this, and each writes and reads its shards of the checkpoints.
"""

import contextlib
import errno
import functools
import hashlib
import importlib.metadata
import json
import logging
import os
import platform
import re
import socket
import sys
import tempfile
import threading
import time
import uuid
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import grain
import jax
import orbax.checkpoint as ocp
from tensorboardX.event_file_writer import EventsWriter
from tensorboardX.proto.event_pb2 import Event, SessionLog
from tensorboardX.summary import scalar

from attnlab.errors import OwnedError, RunError, UserError, parse_json
from attnlab.train.claims import claim, holder, is_fading
from attnlab.train.hosts import by_first, first_failure, is_first, lost_process
from attnlab.train.integrity import examine
from attnlab.train.store import delete_folder, is_remote, move_folder, replace_text

_KEPT_CHECKPOINTS = 2
_PACKAGES = ("jax", "jaxlib", "flax", "optax", "grain", "numpy")
# Orbax numbers saves by one counter of the process, and by that number a save's threads wait for its folders, so two
# saves at once write where no folder is yet. Runs of several processes, which save together, train one after the other.
_saving = threading.Lock()
_RESULT = {"final", "history", "items_per_second", "seconds", "compile_seconds"}


class Workdir:
    """Opens or makes the folder. Nothing in it is ever deleted but checkpoints older than the newest two, and rows of
    metrics later than the checkpoint that a run continues from.

    fingerprint: what the run is, by name. A folder of another run is refused (UserError).
    """

    def __init__(self, path: Path, fingerprint: Mapping[str, str], config_text: str):
        self.path = check_path(path) if is_remote(path) else check_path(path).absolute()
        self._fingerprint, self._config_text = dict(fingerprint), config_text
        self._metrics, self._checkpoints = self.path / "metrics.jsonl", self.path / "checkpoints"
        decides = {name: value for name, value in fingerprint.items() if name != "mesh"}
        self._run = _digest(decides)
        self._events: EventsWriter | None = None
        self._local_events: Path | None = None  # where they are written if not where they are kept
        self._rows = ""
        self._newest = 0
        by_first(self._open)

    def _open(self) -> None:
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            self._check_run()
        except OSError as error:
            raise _unwritable(self.path, error) from error

    def result(self) -> dict[str, Any] | None:
        """As read_result gives it."""
        return by_first(functools.partial(read_result, self.path))

    @contextlib.contextmanager
    def owned(self) -> Iterator[None]:
        """Makes the run this process's until the end of the block, and what fails there for want of room one line.

        Raises:
          OwnedError: it is another's.
          UserError: the folder cannot be written, or another process of the run does not see it.
        """
        with contextlib.ExitStack() as stack:
            by_first(functools.partial(self._take, stack))
            is_seen = (self.path / "run.json").exists()
            missing = first_failure(None if is_seen else f"process {jax.process_index()} on {socket.gethostname()}")
            if missing is not None:
                raise UserError(f"workdir: {self.path} is not there for {missing}; give a folder that all hosts share")
            try:
                yield
            except OSError as error:
                where = error.filename or self.path
                raise RunError(f"run: {where}: {error.strerror or error}; {self.kept()}") from error
            finally:
                if self._events is not None:
                    with contextlib.suppress(OSError):
                        self._events.close()
                        self._keep_events()
                if self._local_events is not None:
                    delete_folder(self._local_events)

    def _take(self, stack: contextlib.ExitStack) -> None:
        try:
            while not stack.enter_context(claim(self.path, "owner")):
                if not is_fading(self.path, "owner"):
                    owner = holder(self.path, "owner")
                    raise OwnedError(f"workdir: {self.path} is in use by {owner}; wait for it, or give another")
                time.sleep(1)
            if not (self.path / "run.json").exists():
                replace_text(self.path / "run.json", json.dumps(self._facts(), indent=2, sort_keys=True))
            replace_text(self.path / "config.gin", self._config_text)
            if is_remote(self._checkpoints):
                return
            self._checkpoints.mkdir(exist_ok=True)
            if not os.access(self._checkpoints, os.W_OK | os.X_OK):
                raise PermissionError(13, "not writable", str(self._checkpoints))
        except OSError as error:
            raise _unwritable(self.path, error) from error

    def _facts(self) -> dict[str, str]:
        versions = {f"version {name}": importlib.metadata.version(name) for name in _PACKAGES}
        python = ".".join(platform.python_version_tuple()[:2])
        return {**self._fingerprint, **versions, "version python": python}

    def _check_run(self) -> None:
        """Refuses another run's folder, and warns of other versions, or another mesh, than the run was started with."""
        path = self.path / "run.json"
        if not path.exists():
            self._check_lost()
            return
        kept, now = _read_json(path), self._facts()
        if not isinstance(kept, dict) or not kept:
            raise UserError(f"workdir: {path} does not say what the run is; move it away, or give another --workdir")
        differing = [name for name in sorted(kept.keys() | now.keys()) if kept.get(name) != now.get(name)]
        harmless = [name for name in differing if name.startswith("version ") or name == "mesh"]
        others = [name for name in differing if name not in harmless]
        if others:
            shown = ", ".join(f"{name} {kept.get(name)} there, {now.get(name)} now" for name in others[:3])
            more = f" and {len(others) - 3} more" if len(others) > 3 else ""
            raise UserError(f"workdir: {self.path} holds a run with {shown}{more}; give another --workdir")
        changed = [name for name in harmless if name in kept]
        if changed and not (self.path / "result.json").exists():
            shown = ", ".join(f"{name.removeprefix('version ')} {kept[name]}, now {now.get(name)}" for name in changed)
            _warn(f"the run in {self.path} was started with {shown}; its numbers may differ from then on")

    def _check_lost(self) -> None:
        """Without run.json: refuses what is there of a run unless its resolved config says that it is this one."""
        if last_step(self.path) == 0 and not (self.path / "result.json").exists():
            return
        try:
            kept = (self.path / "config.gin").read_text()
        except (FileNotFoundError, UnicodeDecodeError):
            kept = None
        if kept != self._config_text:
            raise UserError(f"workdir: {self.path} has lost its run.json and holds another run; give another --workdir")
        _warn(f"{self.path / 'run.json'} is lost; it is written again")

    def restore(self, like: Any, batches: grain.DatasetIterator) -> tuple[Any, list[dict[str, Any]], dict[str, float]]:
        """The newest readable checkpoint's state, the rows up to it, and what `save` was given as `pending`; `batches`
        is moved to its position. None for a state if there is no checkpoint.

        like: the state's shapes, dtypes and shardings.

        Raises UserError: there are checkpoints, and none can be read, or they are another run's (run.json was lost).
        """
        by_first(functools.partial(_delete_partial, self._checkpoints))
        state: Any = None
        rows: list[dict[str, Any]] = []
        pending: dict[str, float] = {}
        damaged: list[int] = []
        found = _newest_readable(self._checkpoints, like)
        if found is not None:
            self._newest, state, facts, damaged = found
            if facts.get("run", self._run) != self._run:
                raise UserError(f"workdir: {self.path} holds checkpoints of another run; give another --workdir")
            batches.set_state(facts["data"])
            rows, pending = facts["rows"], facts["pending"]
        by_first(functools.partial(self._restore_files, damaged, rows))
        return state, rows, pending

    def _restore_files(self, damaged: list[int], rows: list[dict[str, Any]]) -> None:
        for step in damaged:
            self._set_aside(step)
        self._restore_rows(rows)
        folder = self.path / "tensorboard"
        if is_remote(folder):
            folder = self._local_events = Path(tempfile.mkdtemp(prefix="attnlab-events-"))
        folder.mkdir(exist_ok=True)
        self._events = EventsWriter(str(folder / "events"), filename_suffix=f".{os.getpid()}")
        start = Event(step=self._newest + 1, session_log=SessionLog(status=SessionLog.START))  # hides later rows
        self._write_event(start)

    def _set_aside(self, step: int) -> None:
        folder = self.path / "damaged"
        folder.mkdir(exist_ok=True)
        aside = folder / str(step)
        while aside.exists():
            aside = folder / f"{step}-{uuid.uuid4().hex[:8]}"
        move_folder(self._checkpoints / str(step), aside)

    def _restore_rows(self, rows: list[dict[str, Any]]) -> None:
        """Cuts metrics.jsonl back to the checkpoint's rows, or writes them again."""
        text = _lines(rows)
        there = self._metrics.read_bytes() if self._metrics.exists() else b""
        if not there.startswith(text.encode()):
            _warn(f"{self._metrics} had lost rows, which are written again from the checkpoint")
        if there != text.encode():
            replace_text(self._metrics, text)
        self._rows = text

    def write_row(self, row: Mapping[str, Any]) -> None:
        """By the first process, as finish."""
        if is_remote(self._metrics):
            self._rows += _lines([row])
            replace_text(self._metrics, self._rows)
        else:
            with self._metrics.open("a") as file:
                file.write(_lines([row]))
        for name, value in row.items():
            if name not in ("step", "split"):
                self._write_event(Event(step=row["step"], summary=scalar(f"{row['split']}/{name}", value)))

    def _write_event(self, event: Event) -> None:
        """At once: a queue's thread that died, of a full disk or a clock set back, would be waited for without end."""
        assert self._events is not None, "restore first"
        event.wall_time = time.time()
        self._events.write_event(event)
        self._events.flush()

    def _keep_events(self) -> None:
        for written in self._local_events.iterdir() if self._local_events else ():
            (self.path / "tensorboard" / written.name).write_bytes(written.read_bytes())

    def save(
        self,
        step: int,
        state: Any,
        batches: grain.DatasetIterator,
        rows: list[dict[str, Any]],
        pending: Mapping[str, float],
    ) -> None:
        """Writes a checkpoint, which counts only once it is whole. pending: of the steps since the last row.

        Raises:
          FloatingPointError: a number in it is not finite.
          RunError: it cannot be written.
        """
        examined = examine(state)
        # A buffer may hold an infinity to start with, such as the largest value so far.
        wild = [
            path for path, one in examined.items() if one.has_nan or not (one.is_finite or path.startswith(".buffers"))
        ]
        if wild:
            raise FloatingPointError(f"{wild[0].lstrip('.')} is not finite at step {step}; {self.kept()}")
        facts = {
            "sums": {path: one.sum for path, one in examined.items()},
            "data": batches.get_state(),
            "rows": rows,
            "pending": dict(pending),
            "run": self._run,
        }
        arguments = ocp.args.Composite(
            state=ocp.args.StandardSave(state), facts=ocp.args.JsonSave({**facts, "digest": _digest(facts)})
        )
        try:
            with _saving:
                _checkpointer().save(self._checkpoints / str(step), args=arguments)
        except Exception as error:
            if lost_process(error):
                raise
            if is_first():
                _delete_partial(self._checkpoints)
            where = self._checkpoints / str(step)
            raise RunError(f"checkpoint: {where} cannot be written ({_reason(error)}); {self.kept()}") from error
        self._newest = step
        if is_first():
            self._keep_events()
            for old in _steps(self._checkpoints)[_KEPT_CHECKPOINTS:]:
                delete_folder(self._checkpoints / str(old))

    def kept(self) -> str:
        """What there is to continue from, for people."""
        if self._newest == 0:
            return f"no checkpoint is in {self.path} yet"
        return f"the last checkpoint is step {self._newest} in {self.path}"

    def finish(self, rows: list[dict[str, Any]], result: Mapping[str, Any]) -> None:
        if not self._metrics.exists() or self._metrics.read_bytes() != _lines(rows).encode():
            replace_text(self._metrics, _lines(rows))
        replace_text(self.path / "result.json", json.dumps(result))


def read_result(path: Path) -> dict[str, Any] | None:
    """What `finish` kept in a run's folder, if the run is over. Raises UserError: it is damaged."""
    file = path / "result.json"
    if not file.exists():
        return None
    result = _read_json(file)
    if not _is_result(result):
        raise UserError(f"workdir: {file} is no run's result; move it away, and the same command writes it again")
    return result


def _is_result(value: Any) -> bool:
    """Whether this is what `finish` writes, so that others can rely on it."""

    def is_number(value: Any) -> bool:
        return isinstance(value, (int, float)) and not isinstance(value, bool)

    if not isinstance(value, dict) or value.keys() != _RESULT:
        return False
    final, history, *rest = (value[name] for name in ("final", "history", *sorted(_RESULT - {"final", "history"})))
    return (
        isinstance(final, dict)
        and "loss" in final
        and all(map(is_number, [*final.values(), *rest]))
        and isinstance(history, list)
        and all(isinstance(row, dict) and {"step", "split"} <= row.keys() for row in history)
    )


def last_step(path: Path) -> int:
    """The step of the newest checkpoint in a run's folder; 0 if it has none."""
    return max(_steps(path / "checkpoints"), default=0)


def newest_state(path: Path, like: Any) -> Any:
    """The state in the newest readable checkpoint of a run's folder, which is only read.

    like: its shapes, dtypes and shardings.

    Raises UserError: there is none.
    """
    found = _newest_readable((path if is_remote(path) else path.absolute()) / "checkpoints", like)
    if found is None:
        raise UserError(
            f"checkpoint: {path} holds none; give the folder of a run that has reached its first checkpoint"
        )
    return found[1]


def _newest_readable(folder: Path, like: Any) -> tuple[int, Any, dict[str, Any], list[int]] | None:
    """(step, state, facts, newer steps that cannot be read); None if there is no checkpoint.

    Those that cannot be read are named. Raises UserError: there are only such.
    """
    damaged: dict[int, str] = {}
    for step in by_first(functools.partial(_steps, folder)):
        state: Any = None
        facts: dict[str, Any] = {}
        failure: str | None = None
        try:
            state, facts = _read_checkpoint(folder / str(step), like)
        except (MemoryError, jax.errors.JaxRuntimeError):
            raise
        except Exception as error:
            if isinstance(error, OSError) and not isinstance(error, (FileNotFoundError, NotADirectoryError)):
                raise
            failure = _reason(error)
        failure = first_failure(failure) or _differing(state, facts)
        if failure:
            damaged[step] = failure
            continue
        for newer, reason in damaged.items():
            _warn(f"checkpoint: {folder / str(newer)} cannot be read ({reason}); step {step} is used")
        return step, state, facts, list(damaged)
    if damaged:
        newest, reason = next(iter(damaged.items()))
        others = f", nor can {len(damaged) - 1} older" if len(damaged) > 1 else ""
        raise UserError(
            f"checkpoint: {folder / str(newest)} cannot be read ({reason}){others}; move {folder} away to start anew"
        )
    return None


def _read_checkpoint(path: Path, like: Any) -> tuple[Any, dict[str, Any]]:
    """This process's shards of the state, and the facts. Raises any exception at all if something is damaged."""
    arguments = ocp.args.Composite(state=ocp.args.StandardRestore(like), facts=ocp.args.JsonRestore())
    # Not by a Checkpointer, which would wait for processes that could not read theirs.
    restored = _handler().restore(path, args=arguments)
    state, facts = restored["state"], restored["facts"]
    digest = facts.pop("digest")
    if digest != _digest(facts):
        raise ValueError("facts differ from their digest")
    return state, facts


def _differing(state: Any, facts: Mapping[str, Any]) -> str | None:
    """What of a state has not the sums that were kept."""
    sums = {name: one.sum for name, one in examine(state).items()}
    if sums == facts["sums"]:
        return None
    wrong = [name for name, number in sums.items() if facts["sums"].get(name) != number]
    return f"the sum of {wrong[0].lstrip('.')} differs" if wrong else "arrays are missing"


def _delete_partial(folder: Path) -> None:
    """Deletes what was begun, to which threads of a writer that failed may still add."""
    for _ in range(10):
        partial = [path for path in folder.glob("*") if path.name.isdecimal() and not _is_committed(path)]
        partial += folder.glob("*.orbax-checkpoint-tmp*")
        if not partial:
            return
        for path in partial:
            delete_folder(path)
        time.sleep(0.05)


def _steps(folder: Path) -> list[int]:
    """Of the checkpoints in a folder, from the newest."""
    found = (int(path.name) for path in folder.glob("*") if path.name.isdecimal() and _is_committed(path))
    return sorted(found, reverse=True)


def _is_committed(path: Path) -> bool:
    """A checkpoint gets its name when it is whole; in an object store, which cannot rename, this file is its last."""
    return not is_remote(path) or (path / "commit_success.txt").exists()


def _checkpointer() -> ocp.Checkpointer:
    """Writes before it returns, so that what fails is raised here and nothing is waited for in the end."""
    handler = _handler()
    handler.save = functools.partial(_save_in_all, handler.save)
    return ocp.Checkpointer(handler)


def _save_in_all(save: Callable[..., None], *arguments: Any, **options: Any) -> None:
    """What one process cannot write fails in all, who would else wait for it in the Checkpointer."""
    try:
        save(*arguments, **options)
    except Exception as error:
        if not lost_process(error):
            first_failure(_reason(error))
        raise
    if (reason := first_failure(None)) is not None:
        raise OSError(reason)


def _handler() -> ocp.CompositeCheckpointHandler:
    _quieten_orbax()
    return ocp.CompositeCheckpointHandler()


def _digest(facts: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()


def _lines(rows: list[Any]) -> str:
    return "".join(json.dumps(row) + "\n" for row in rows)


def _reason(error: Exception) -> str:
    """An error of orbax or the file system in a few words."""
    chain: list[BaseException] = [error]
    while (cause := chain[-1].__cause__ or chain[-1].__context__) is not None and cause not in chain:
        chain.append(cause)
    for each in chain:
        if isinstance(each, OSError) and each.strerror:
            return each.strerror
    # Libraries below give the system's words somewhere in long texts of their own.
    for each in chain:
        for code in (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES, errno.EIO, errno.EMFILE, errno.ENOENT):
            if os.strerror(code) in str(each):
                return os.strerror(code)
    text = " ".join(str(error).split())
    return text if len(text) <= 80 else f"{text[:77].rstrip()}..."


@functools.cache
def _quieten_orbax() -> None:
    """One exception is enough of what fails in orbax, which prints it, also later, by threads, event loops and logs."""
    unraisable_hook, thread_hook = sys.unraisablehook, threading.excepthook

    def unraisable(found: Any) -> None:
        code = getattr(found.object, "cr_code", None)  # of a coroutine that is left behind
        if str(found.exc_value) != "Event loop is closed" and not (code and "orbax" in Path(code.co_filename).parts):
            unraisable_hook(found)

    def in_thread(found: Any) -> None:
        if not type(found.thread).__module__.startswith("orbax"):
            thread_hook(found)

    sys.unraisablehook, threading.excepthook = unraisable, in_thread
    left = re.compile("was never retrieved|during asyncio.run.. shutdown")
    logging.getLogger("asyncio").addFilter(lambda record: not left.search(record.getMessage()))
    logging.getLogger("absl").addFilter(lambda record: "orbax" not in Path(record.pathname).parts)


def _warn(line: str) -> None:
    if is_first():
        print(f"attnlab: {line}", file=sys.stderr, flush=True)


def check_path(path: Path) -> Path:
    """Refuses a name that the libraries below cannot write."""
    try:
        str(path.absolute()).encode()
    except UnicodeEncodeError:
        raise UserError(f"workdir: got {str(path)!a}; need a name in UTF-8") from None
    if not is_remote(path) and path.is_symlink() and not path.exists():
        raise UserError(f"workdir: {path} is a link to nothing; give another --workdir")
    return path


def _unwritable(path: Path, error: OSError) -> UserError:
    where = error.filename or path
    return UserError(f"workdir: cannot write to {where} ({error.strerror or error}); give another --workdir")


def _read_json(path: Path) -> Any:
    try:
        return parse_json(path.read_bytes())
    except ValueError as error:
        raise UserError(f"workdir: {path} is not JSON ({error}); move it away, or give another --workdir") from error
