"""The runs of an ablation, shared out among the processes that were started for it; results kept as they come."""

import contextlib
import dataclasses
import functools
import json
import math
import os
import platform
import queue
import shlex
import signal
import sys
import time
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent import futures
from importlib import metadata
from pathlib import Path
from typing import Any

import jax
from tqdm import tqdm

import attnlab
import attnlab.ablate.cache as cache
from attnlab import nn, signals
from attnlab.ablate.attending import attend
from attnlab.ablate.plan import Plan, Run, counted
from attnlab.ablate.results import are_rows
from attnlab.errors import OwnedError, RunError, UserError, parse_json
from attnlab.train import Experiment, store, train
from attnlab.train.claims import claim, forget
from attnlab.train.hosts import all_failed, by_first, is_first, lost_process
from attnlab.train.loop import duration
from attnlab.train.mesh import devices_of_runs, on_devices
from attnlab.train.step import loss_shapes
from attnlab.train.store import replace_text
from attnlab.train.workdir import check_path

_LOOK_AGAIN_AFTER = 1.0  # seconds, while other processes train what is left


def run_ablation(
    file: str,
    overrides: Sequence[str],
    workdir: Path,
    *,
    runs: Path | None = None,
    report: Callable[[str], None] = print,
) -> list[dict[str, Any]]:
    """Runs every arm with every seed and writes workdir/results.jsonl, one row per run; of searched rates,
    search.jsonl.

    A run that is finished is not run again and one that was interrupted resumes, so that the same command continues.
    Processes that run it at once, on any hosts that see the folders, share the runs among them and all give all rows.
    A run that fails leaves a row with its error, and the others continue. One that failed for a reason outside it, such
    as memory or a full disk, is tried again by the same command.

    Of several processes that train each run together (jax.distributed) each calls it alike. The first one alone reads
    and writes beside the runs, and decides. A run fails in all of them; what fails in one, and the others do not hear
    of, is raised.

    Args:
      file: the sweep's config. overrides: as in config.build, for every arm.
      workdir: takes the results.
      runs: the folder of the runs' own folders, workdir/runs by default. Sweeps that share it share equal runs: those
        with the same resolved config, data and version of the code.
      report: takes lines for the user.
    """
    plan = Plan(file, overrides)
    runs = workdir / "runs" if runs is None else runs
    if store.is_remote(runs) != store.is_remote(workdir):
        raise UserError(f"cache: got {runs} with the workdir {workdir}; need both in a store, or both here")
    by_first(functools.partial(_open, workdir, runs))
    command = shlex.join(["attnlab", "ablate", file, *(f"--gin.{override}" for override in overrides)])
    if not is_first():
        report = _say_nothing
    report(f"{plan.ablation.question}\n{plan.extent}: {counted(plan.size, 'run')} in {workdir}")

    outcomes: dict[str, dict[str, Any]] = {}
    begun = time.monotonic()
    named = plan.runs({}) if is_first() else []
    folders = {run.digest: cache.folder(runs, run.name, run.digest) for run in named}
    were_over = {digest for digest, folder in folders.items() if (folder / "result.json").is_file()}
    has_waited = False
    hidden = not (is_first() and sys.stderr.isatty())
    with tqdm(total=plan.size, desc="runs", unit="run", disable=hidden, dynamic_ncols=True) as bar:
        while left := [run for run in plan.runs(outcomes) if run.digest not in outcomes]:
            before = len(outcomes)
            for run, outcome, is_kept in _outcomes(left, plan.parts, runs, report):
                if outcome is None:
                    continue
                _check_metric(plan, run, outcome)
                outcomes[run.digest] = outcome
                done = [run for run in plan.runs(outcomes) if run.digest in outcomes]
                bar.update(len(done) - bar.n)
                rest = "" if is_kept else _time_left(plan, outcomes, were_over, time.monotonic() - begun)
                report(f"[{len(done)}/{plan.size}] {_summary(plan, run, outcome, is_kept)}{rest}")
                compared = [run for run in plan.compared(outcomes) if run in done]
                found = by_first(functools.partial(_attended, plan, compared, outcomes, runs, workdir))
                rows = [_row(plan, run, outcomes, command) | more for run, more in zip(compared, found)]
                by_first(functools.partial(write_rows, workdir / "results.jsonl", rows))
            if len(outcomes) == before:
                if not has_waited:
                    report(f"waiting for other processes, which have the runs that are left: {len(left)}")
                has_waited = True
                time.sleep(_LOOK_AGAIN_AFTER)
    if searches := [run for arm in plan.arms for run in plan.searches(arm)]:
        found = [_row(plan, run, outcomes, command) for run in searches]
        by_first(functools.partial(write_rows, workdir / "search.jsonl", found))
    return rows


def _open(workdir: Path, runs: Path) -> None:
    try:
        check_path(workdir).mkdir(parents=True, exist_ok=True)
        (check_path(runs) / "claims").mkdir(parents=True, exist_ok=True)
        if signals.HELPER not in os.environ:  # what a helper finds failed since, it need not try again
            cache.forget_failures(runs)
    except OSError as error:
        raise UserError(f"workdir: cannot write to {error.filename} ({error.strerror}); give another") from error


def _say_nothing(line: str) -> None:
    """What `report` is in processes other than the first."""


def _outcomes(
    left: Sequence[Run], parts: Sequence[Sequence[jax.Device]], runs: Path, report: Callable[[str], None]
) -> Iterator[tuple[Run, dict[str, Any] | None, bool]]:
    """Each run with what `_obtain` says of it, as it comes; as many are trained at once as there are parts."""
    same: dict[str, list[Run]] = {}
    for run in left:
        same.setdefault(run.digest, []).append(run)
    free: queue.SimpleQueue[Sequence[jax.Device]] = queue.SimpleQueue()
    for part in parts:
        free.put(part)

    def obtain(run: Run) -> tuple[dict[str, Any] | None, bool]:
        part = free.get()
        try:
            with on_devices(part):
                return _obtain(run, runs, report)
        finally:
            free.put(part)

    if len(parts) == 1:
        for alike in same.values():
            found = obtain(alike[0])
            yield from ((run, *found) for run in alike)
        return
    pool = futures.ThreadPoolExecutor(len(parts), "attnlab run")
    try:
        came = {pool.submit(obtain, alike[0]): alike for alike in same.values()}
        for future in futures.as_completed(came):
            found = future.result()
            yield from ((run, *found) for run in came[future])
    finally:
        pool.shutdown(cancel_futures=True)


def _obtain(run: Run, runs: Path, report: Callable[[str], None]) -> tuple[dict[str, Any] | None, bool]:
    """(What the run gave, trained here unless it is over already, or None while another process has it; whether it was
    over)."""
    try:
        with contextlib.ExitStack() as claimed:
            outcome, folder = by_first(functools.partial(_begin, run, runs, claimed))
            if folder is None:
                return outcome, True
            report(f"{run.name}: training")
            fingerprint = {**run.built.values, "code": run.code}
            train(run.experiment, workdir=runs / folder, fingerprint=fingerprint, config_text=run.built.text)
            return by_first(functools.partial(_known, run, runs)), False
    except OwnedError:
        return None, False
    except SystemExit as error:
        if error.code == 128 + signal.SIGTERM:  # by signals.stop
            raise
        return _failed(run, runs, RuntimeError(f"it called sys.exit({error.code!r})")), False
    except Exception as error:
        return _failed(run, runs, error), False


def _begin(run: Run, runs: Path, claimed: contextlib.ExitStack) -> tuple[dict[str, Any] | None, str | None]:
    """(What the run gave, None), or (None, the folder's name) of a run that is ours to train, or (None, None)."""
    if (outcome := _known(run, runs)) is not None:
        forget(runs / "claims", run.digest)
        return outcome, None
    if not claimed.enter_context(claim(runs / "claims", run.digest)):
        return None, None
    if (outcome := _known(run, runs)) is not None:  # another finished it in between
        return outcome, None
    folder = cache.folder(runs, run.name, run.digest)
    cache.write_machine(folder, _machine(run))
    return None, folder.name


def _known(run: Run, runs: Path) -> dict[str, Any] | None:
    """What is kept of a run that is over, with what it ran on."""
    folder = cache.folder(runs, run.name, run.digest)
    outcome = cache.outcome(folder)
    if outcome is None:
        return None
    machine = cache.read_machine(folder)
    if machine is None:
        machine = _machine(run)
        print(f"attnlab: {folder / 'machine.json'} is lost; it is written again of this machine", file=sys.stderr)
        cache.write_machine(folder, machine)
    return {**outcome, **machine}


def _failed(run: Run, runs: Path, error: Exception) -> dict[str, Any]:
    """The outcome of a run that raised in all processes; what this one alone raised is raised again."""
    if lost_process(error) or not all_failed():
        raise error
    return by_first(functools.partial(_keep_failure, run, runs, error))


def _keep_failure(run: Run, runs: Path, error: Exception) -> dict[str, Any]:
    """The outcome of a run that raised, kept where it can be, with the traceback where it is no known reason."""
    folder = cache.folder(runs, run.name, run.digest)
    text = " ".join(str(error).split()) or "no message"
    is_known = isinstance(error, (FloatingPointError, OSError, RunError, UserError))
    is_final = not isinstance(error, (OSError, MemoryError, RunError, UserError, jax.errors.JaxRuntimeError))
    shown = text if is_known else f"{type(error).__name__}: {text[:300]}"
    with contextlib.suppress(OSError):
        cache.write_failure(folder, shown, is_final=is_final)
        if not is_known:
            replace_text(folder / "error.txt", "".join(traceback.format_exception(error)))
    try:
        machine = _machine(run)
    except Exception:  # what failed may be the model
        machine = {"implementations": [], "environment": environment()}
    return {"status": "failed", "error": shown, "is_final": is_final, "run": folder.name, **machine}


def _machine(run: Run) -> dict[str, Any]:
    return {"implementations": implementations(run.experiment), "environment": environment()}


def _check_metric(plan: Plan, run: Run, outcome: Mapping[str, Any]) -> None:
    metric = plan.ablation.metric
    if metric not in outcome.get("final", {metric: math.nan}):
        raise UserError(f"metric: got {metric!r}; {run.arm} has {', '.join(outcome['final'])}")


def _summary(plan: Plan, run: Run, outcome: Mapping[str, Any], is_kept: bool) -> str:
    if outcome["status"] == "failed":
        return f"{run.name} failed: {outcome['error']}"
    metric = plan.ablation.metric
    how = "trained before" if is_kept else f"{outcome['seconds']:.0f} s"
    return f"{run.name}: validation {metric} {outcome['final'][metric]:.4f}, {how}"


def _time_left(plan: Plan, outcomes: Mapping[str, Mapping[str, Any]], were_over: set[str], seconds: float) -> str:
    """About how long the runs that are left take, from those that came in so many seconds, of all processes.

    were_over: digests of runs that were finished already.
    """
    came = len(outcomes.keys() - were_over)
    left = plan.size - sum(run.digest in outcomes or run.digest in were_over for run in plan.runs(outcomes))
    return f"; about {duration(seconds / came * left)} left" if came and left else ""


def _row(plan: Plan, run: Run, outcomes: Mapping[str, Mapping[str, Any]], command: str) -> dict[str, Any]:
    """All that is known of a run: what was asked, what it is, what was chosen for it, what it costs, what it gave."""
    match = plan.matches.get(run.arm)
    scores = list(plan.scores(run.arm, outcomes).items()) if plan.is_searched(run.arm, outcomes) else []
    return {
        **{name: getattr(plan.ablation, name) for name in ("question", "baseline", "metric", "higher_is_better")},
        "arm": run.arm,
        "seed": run.experiment.seed,
        "learning_rate": run.experiment.optimizer.learning_rate,
        "searched_rates": [list(pair) for pair in scores],
        "search_seed": plan.ablation.search_seed if scores else None,
        "match": None if match is None else dataclasses.asdict(match),
        "parameter_shapes": {path: list(shape) for path, shape in nn.parameter_shapes(run.experiment.model).items()},
        **run.costs,
        "task": run.data,
        "config": run.built.text,
        "code": run.code,
        "command": command,
        **outcomes[run.digest],
    }


def _attended(
    plan: Plan, compared: Sequence[Run], outcomes: Mapping[str, Mapping[str, Any]], runs: Path, workdir: Path
) -> list[dict[str, Any]]:
    """Of each run where its folder is, seen from the results, and of an arm's first seed what it attends to."""
    rows: list[dict[str, Any]] = []
    for run in compared:
        outcome = outcomes[run.digest]
        folder = runs / outcome["run"]
        rows.append({"folder": store.relative(folder, workdir)})
        if outcome["status"] == "finished" and run.experiment.seed == plan.ablation.seeds[0]:
            try:
                with on_devices(jax.local_devices()):  # the others only wait
                    rows[-1]["attending"] = attend(run.experiment, folder)
            except Exception as error:  # a user's mixer, no room, a damaged checkpoint: the run is there all the same
                rows[-1]["attending"] = {"skipped": " ".join(str(error).split()) or type(error).__name__}
    return rows


def implementations(experiment: Experiment) -> list[str]:
    """Which implementation each attention call of the model runs on the devices of this run, once each."""
    model, task, batch_size = experiment.model, experiment.task, experiment.batch_size
    platform = {"gpu": "cuda"}.get(name := devices_of_runs()[0].platform, name)
    choices = attnlab.explain(lambda: loss_shapes(model, task, batch_size))
    names = [(choice.primitive, choice.by_platform) for choice in choices]
    found = (
        f"{primitive}: {by.get(platform) or by.get('elsewhere') or by['every platform']}" for primitive, by in names
    )
    return list(dict.fromkeys(found))


def environment() -> dict[str, str]:
    devices = devices_of_runs()
    versions = {name: metadata.version(name) for name in ("jax", "jaxlib", "flax", "optax", "grain")}
    return {
        "device": f"{len(devices)} x {devices[0].device_kind}",
        "machine": f"{platform.system()} {platform.machine()}",
        "python": platform.python_version(),
        "attnlab": attnlab.__version__,  # of a checkout that is not installed, too
        **versions,
    }


def write_rows(path: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    replace_text(path, "".join(json.dumps(row) + "\n" for row in rows))


def read_rows(workdir: Path) -> list[dict[str, Any]]:
    path = workdir / "results.jsonl"
    if not path.is_file():
        raise UserError(f"report: {workdir} has no results.jsonl; give the folder of an ablation (`attnlab ablate`)")
    try:
        rows = [parse_json(line) for line in path.read_text().splitlines()]
    except ValueError as error:
        reason = f"is not JSON lines ({error})"
    else:
        if are_rows(rows):
            return rows
        reason = "has no rows of runs"
    raise UserError(f"report: {path} {reason}; run the ablation again to write it anew")
