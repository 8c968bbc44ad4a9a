"""Times on an accelerator, unattended: cases are checked, timed, and kept as they come; the same command continues.

Processes compile and check a case each, on a GPU several beside each other; then cases are timed one after the other. A
process serves until one of its cases crashes or gives no answer: then the row says so, and a new process continues with
others. A case of ours is timed only if its values and gradients, on fresh random inputs, are those of the reference in
float64.
"""

import concurrent.futures
import dataclasses
import hashlib
import importlib.util
import json
import multiprocessing
import os
import statistics
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from attnlab import signals
from attnlab.errors import UserError

_MOST_SECONDS = 120.0  # that a case may take to compile and to be checked, beside the others, and to be timed
_LEAST_RUNS, _MOST_RUNS, _TIMED_SECONDS = 20, 1000, 0.5


class Wrong(Exception):
    """A case whose results are not the reference's."""


# The calls and the check of a Case.
Prepared = tuple[Sequence[tuple[Any, ...]], Callable[[], dict[str, float]] | None]


@dataclasses.dataclass(frozen=True)
class Case:
    """What one row measures.

    Args:
      name: what is computed, alike for all libraries: "window 1024, 16384 tokens". library: by what.
      passes: "forward" or "backward", which is the gradients alone, of a forward that has run.
      flops: of matrix products that the call needs, without those that a form adds. tokens: in all.
      prepare: -> (calls, errors). calls: a function and its arguments, for as many sets of inputs as keep each out of
        the cache until it is used again. errors() -> {array: largest difference from the reference, over its largest
        number}; None for other libraries.
      clock: (function, *arguments) -> milliseconds on the device, in all and by kernel.
    """

    name: str
    library: str
    passes: str
    flops: float
    tokens: int
    prepare: Callable[[], Prepared]
    clock: Callable[..., tuple[float, Mapping[str, float]]]
    most_error: float = 0.0

    @property
    def key(self) -> tuple[str, str, str]:
        return self.name, self.library, self.passes


def measured(case: Case, ready: Callable[[], None] = lambda: None) -> dict[str, Any]:
    """{"ms": median, "low", "high": quartiles, "runs", "errors", "kernels": milliseconds by name} of a case, or
    {"error": why it has no time}. ready: called between what may run beside other cases and what may not."""
    try:
        calls, errors = case.prepare()
        found = errors() if errors is not None else {}
        if wrong := {name: error for name, error in found.items() if not error <= case.most_error}:
            raise Wrong(", ".join(f"{name} is off by {error:.1e}" for name, error in wrong.items()))
        for call in calls:
            case.clock(*call)
        ready()
        times: list[float] = []
        kernels: Mapping[str, float] = {}
        end = time.monotonic() + _TIMED_SECONDS
        while len(times) < _LEAST_RUNS or (len(times) < _MOST_RUNS and time.monotonic() < end):
            milliseconds, kernels = case.clock(*calls[len(times) % len(calls)])
            times.append(milliseconds)
    except ImportError as error:
        return {"error": f"missing: {error.name}"}
    except Exception as error:
        return {"error": f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"}
    low, middle, high = statistics.quantiles(times, n=4)
    return {"ms": middle, "low": low, "high": high, "runs": len(times), "errors": found, "kernels": dict(kernels)}


def time_cases(
    cases: Callable[[], Sequence[Case]],
    facts: Mapping[str, str],
    folder: Path,
    *,
    budget: float,
    processes: int = 6,
    report: Callable[[str], None] = print,
) -> int:
    """Measures the cases that have no row yet, and appends rows to folder/device.jsonl. Returns how many are left.

    Args:
      cases: a function at the top of a module, which the processes call too.
      facts: of the device, the versions and the code; rows of others stay, and do not count.
      budget: seconds after which no further case is begun.
      processes: so many compile and check a case each, and as many cases are in the device's memory.
    """
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "device.jsonl"
    done = {(row["name"], row["library"], row["passes"]) for row in rows_of(path, facts)}
    left = [case.key for case in cases() if case.key not in done]
    start, total = time.monotonic(), len(left)
    workers: list[_Worker] = []
    try:
        while left and time.monotonic() - start < budget:
            batch, left = left[:processes], left[processes:]
            workers = [worker for worker in workers if worker.serves]
            workers += [_Worker(cases) for _ in batch[len(workers) :]]
            for worker, key in zip(workers, batch):
                worker.begin(key)
            for worker, _ in zip(workers, batch):
                worker.wait()
            for number, (worker, key) in enumerate(zip(workers, batch), total - len(left) - len(batch) + 1):
                row = worker.row()
                name, library, passes = key
                with path.open("a") as file:
                    file.write(json.dumps({"name": name, "library": library, "passes": passes, **facts, **row}) + "\n")
                shown = f"{row['ms']:.3f} ms" if "ms" in row else row["error"]
                report(f"[{number}/{total}] {name}, {passes}, {library}: {shown}")
    finally:
        for worker in workers:
            worker.end()
    return len(left)


def rows_of(path: Path, facts: Mapping[str, str]) -> list[dict[str, Any]]:
    """The rows of a device, versions and code."""
    if not path.exists():
        return []
    try:
        rows = [json.loads(line) for line in path.read_text().splitlines()]
    except ValueError as error:
        raise UserError(f"workdir: {path} is not JSON lines ({error}); give another folder") from error
    return [row for row in rows if all(row.get(name) == value for name, value in facts.items())]


def kind_of(platform: str) -> str:
    """jax.Device.device_kind of the first device of "gpu" or "tpu", found by a process that then ends: a TPU serves one
    at a time, and a GPU's memory stays free. Raises UserError: there is none."""
    with concurrent.futures.ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
        found = pool.submit(_kind_of, platform).result()
    if found is None:
        plugin = "jax[cuda13]" if platform == "gpu" else "jax[tpu]"
        raise UserError(f"device: JAX finds no {platform.upper()}; install {plugin}")
    return found


def _kind_of(platform: str) -> str | None:
    import jax

    try:
        return jax.devices(platform)[0].device_kind
    except RuntimeError:
        return None


_READY, _GO = "ready", "go"


class _Worker:
    """A process that measures the cases it is asked for: begin(), wait() until it may be timed, row()."""

    def __init__(self, cases: Callable[[], Sequence[Case]]):
        context = multiprocessing.get_context("spawn")
        self._connection, other = context.Pipe()
        self._process = context.Process(target=_serve, args=(other, cases), daemon=True)
        self._process.start()
        other.close()
        self._found: Any = None
        self._end = 0.0
        self.serves = True

    def begin(self, key: tuple[str, str, str]) -> None:
        self._connection.send(key)
        self._end = time.monotonic() + _MOST_SECONDS

    def wait(self) -> None:
        self._found = self._received()

    def row(self) -> dict[str, Any]:
        if self._found == _READY:
            self._connection.send(_GO)
            self._end = time.monotonic() + _MOST_SECONDS
            self._found = self._received()
        return self._found

    def _received(self) -> Any:
        with signals.with_helpers(self._process.kill, self._process.join):
            try:
                if self._connection.poll(max(0.0, self._end - time.monotonic())):
                    return self._connection.recv()
                reason = f"no answer in {_MOST_SECONDS:.0f} seconds"
            except (EOFError, ConnectionError):
                self._process.join(10)
                reason = f"its process ended with {self._process.exitcode}"
        self.end()
        return {"error": reason}

    def end(self) -> None:
        self.serves = False
        self._process.kill()
        self._process.join()
        self._connection.close()


def _serve(connection: Any, cases: Callable[[], Sequence[Case]]) -> None:
    os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")  # the others use the same device
    by_key = {case.key: case for case in cases()}

    def ready() -> None:
        connection.send(_READY)
        connection.recv()

    while True:
        try:
            key = connection.recv()
        except EOFError:
            return
        connection.send(measured(by_key[key], ready))


def code_digest(*packages: str) -> str:
    """Of these packages' sources."""
    digest = hashlib.sha256()
    for package in packages:
        spec = importlib.util.find_spec(package)
        for folder in spec.submodule_search_locations or [] if spec is not None else []:
            for path in sorted(Path(folder).rglob("*.py")):
                digest.update(path.read_bytes())
    return digest.hexdigest()[:12]


def table(rows: Sequence[Mapping[str, Any]], cases: Iterable[Case], peak: float | None) -> str:
    """Markdown: a line per case and library, milliseconds, TFLOP/s, and the share of the device's peak."""
    by_key = {case.key: case for case in cases}
    lines = ["| what | passes | library | ms | quartiles | TFLOP/s | of the peak | M tokens/s |"]
    lines.append("|---|---|---|---:|---:|---:|---:|---:|")
    for row in rows:
        case = by_key.get((row["name"], row["library"], row["passes"]))
        cells = [row["name"], row["passes"], row["library"]]
        if "ms" not in row or case is None:
            cells += [row.get("error", "another version's"), "", "", "", ""]
        else:
            rate = case.flops / row["ms"] * 1e3
            share = f"{rate / peak:.0%}" if peak else ""
            quartiles = f"{row['low']:.3f} to {row['high']:.3f}"
            tokens = f"{case.tokens / row['ms'] / 1e3:.2f}"
            cells += [f"{row['ms']:.3f}", quartiles, f"{rate / 1e12:.0f}", share, tokens]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def draw(rows: Sequence[Mapping[str, Any]], path: Path, title: str) -> None:
    """A bar per library, by case: milliseconds."""
    import matplotlib.pyplot as plt

    timed = [row for row in rows if "ms" in row]
    groups = list(dict.fromkeys((row["name"], row["passes"]) for row in timed))
    libraries = list(dict.fromkeys(row["library"] for row in timed))
    colors = {library: plt.get_cmap("tab10")(number % 10) for number, library in enumerate(libraries)}
    figure, axes = plt.subplots(figsize=(9, 1.2 + 0.22 * (len(timed) + len(groups))), layout="constrained")
    place, ticks = 0.0, []
    for group in groups:
        members = [row for row in timed if (row["name"], row["passes"]) == group]
        for number, row in enumerate(members):
            at = place - number
            axes.barh(at, row["ms"], color=colors[row["library"]])
            axes.text(row["ms"], at, f" {row['library']}, {row['ms']:.2f}", va="center", fontsize=7)
        ticks.append((place - (len(members) - 1) / 2, ", ".join(group)))
        place -= len(members) + 1
    axes.set_yticks([at for at, _ in ticks], [label for _, label in ticks], fontsize=8)
    axes.set_xscale("log")
    axes.set_xlabel("milliseconds")
    axes.set_title(title, fontsize=10)
    axes.spines[["top", "right"]].set_visible(False)
    axes.margins(x=0.3)
    figure.savefig(path, dpi=150)
    plt.close(figure)
