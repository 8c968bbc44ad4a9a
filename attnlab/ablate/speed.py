"""How fast the arms of a sweep train: timed in turn, on one machine, after all runs, so that they can be compared.

What the runs themselves took depends on what else the machine did at that time, and is compared with nothing.
"""

import contextlib
import functools
import json
import math
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax

from attnlab.ablate.plan import Plan
from attnlab.ablate.results import Row, arms_of, finished
from attnlab.errors import parse_json
from attnlab.train import Experiment
from attnlab.train.claims import claim
from attnlab.train.hosts import all_failed, by_first, lost_process
from attnlab.train.loop import batches_of
from attnlab.train.memory import memory
from attnlab.train.mesh import on_devices, placed
from attnlab.train.step import initial_state, make_optimizer, make_step
from attnlab.train.store import replace_text

ROUNDS = 9
# Seconds that one arm is timed for in a round, at least (one step may take longer).
_ROUND_TAKES = 0.05
# An arm's timing takes at most so many seconds, or this share of its training where that is more.
_MOST_SECONDS, _MOST_SHARE = 10.0, 0.1
# State of one parameter while it is trained: itself, its gradient and two moments of Adam. All arms' are held at once.
_STATE_BYTES = 4 * 4


def measure_speed(file: str, overrides: Sequence[str], workdir: Path, rows: Sequence[Row]) -> str | None:
    """Writes workdir/speed.json, with the speed of every arm that has a finished run, unless these are there already.
    Processes that train each run together call it alike.

    Args:
      file, overrides, workdir: as in run_ablation. rows: what it gave.

    Returns:
      why nothing was measured; None: it was, or there is nothing to measure.
    """
    first = {arm: done[0] for arm in arms_of(rows) if (done := finished(rows, arm))}
    if not first or by_first(lambda: _kept(workdir, first) is not None):
        return None
    plan = Plan(file, overrides)
    experiments = {arm: plan.run(arm, plan.ablation.seeds[0], plan.rates[0]).experiment for arm in first}
    if reason := by_first(functools.partial(_refusal, rows, experiments)):
        return reason
    try:
        with contextlib.ExitStack() as claimed:  # two processes that time at once would slow each other
            if not by_first(lambda: claimed.enter_context(claim(workdir, "speed"))):
                return "another process measures it"
            with on_devices(plan.parts[0]):
                by_first(lambda: print("timing steps of the arms in turn", flush=True))
                speeds = time_in_turn(experiments)
            device = f"{len(plan.parts[0])} x {plan.parts[0][0].device_kind}"
            arms = {arm: {"run": first[arm]["run"], "items_per_second": speeds[arm]} for arm in first}
            kept = json.dumps({"device": device, "arms": arms})
            by_first(functools.partial(replace_text, workdir / "speed.json", kept))
    except Exception as error:  # the runs' results are there all the same
        if lost_process(error) or not all_failed():
            raise
        return " ".join(str(error).split()) or type(error).__name__
    return None


def with_speed(rows: Sequence[Row], workdir: Path) -> list[Row]:
    """The rows, with "speed", items per second, "rounds", those of each round, and "speed_device", if measured."""
    kept = _kept(workdir, {arm: done[0] for arm in arms_of(rows) if (done := finished(rows, arm))})
    if kept is None:
        return list(rows)

    def speed(row: Row) -> dict[str, Any]:
        rounds = kept["arms"][row["arm"]]["items_per_second"]
        return {"speed": statistics.median(rounds), "rounds": rounds, "speed_device": str(kept["device"])}

    return [{**row, **speed(row)} if row["status"] == "finished" else row for row in rows]


def _kept(workdir: Path, first: Mapping[str, Row]) -> dict[str, Any] | None:
    """What speed.json holds, if it is whole and of these very runs, first by arm."""
    try:
        kept = parse_json((workdir / "speed.json").read_bytes())
        arms = kept["arms"]
        is_whole = isinstance(kept["device"], str) and all(
            arms[arm]["run"] == row.get("run")
            and len(arms[arm]["items_per_second"]) == ROUNDS
            and all(math.isfinite(speed) and speed > 0 for speed in arms[arm]["items_per_second"])
            for arm, row in first.items()
        )
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return kept if is_whole else None


def _refusal(rows: Sequence[Row], experiments: Mapping[str, Experiment]) -> str | None:
    """Why the arms are not timed, if they are not: it would take too long, or more memory than there may be.

    What it takes is judged by the quickest of an arm's runs, since others may have shared the machine.
    """
    first = {arm: finished(rows, arm)[0] for arm in experiments}
    for arm, experiment in experiments.items():
        done = finished(rows, arm)
        step = experiment.batch_size * first[arm]["units"] / max(row["items_per_second"] for row in done)
        takes = min(row["compile_seconds"] for row in done) + (ROUNDS + 2) * max(step, _ROUND_TAKES)
        most = max(_MOST_SECONDS, _MOST_SHARE * sum(row["seconds"] for row in done))
        if takes > most:
            return f"timing {arm} would take {takes:.0f} s, of at most {most:.0f}"
    needed = _STATE_BYTES * sum(row["parameters"] for row in first.values())
    if needed > memory() / 4:
        return f"the states of all arms at once take {needed / 2**30:.1f} GiB"
    return None


def time_in_turn(experiments: Mapping[str, Experiment]) -> dict[str, list[float]]:
    """Items (tokens, images) per second of training steps, by arm, ROUNDS of each; batches are drawn before.

    In a round every arm is timed once, in turn, so that what else the machine does comes upon all of them alike.
    """
    timers = {arm: _timer(experiment) for arm, experiment in experiments.items()}
    speeds: dict[str, list[float]] = {arm: [] for arm in timers}
    for number in range(ROUNDS):
        for arm in list(timers)[:: -1 if number % 2 else 1]:
            speeds[arm].append(timers[arm]())
    return speeds


def _timer(experiment: Experiment) -> Callable[[], float]:
    """Compiles an experiment's step; each call of what this gives then takes some steps, and gives items per second."""
    model, task, batch_size = experiment.model, experiment.task, experiment.batch_size
    optimizer, key = make_optimizer(experiment.optimizer, experiment.steps), jax.random.key(experiment.seed)
    mesh = experiment.mesh.build()
    state = initial_state(model, task, batch_size, optimizer, key, mesh)
    batch = placed(next(iter(batches_of(experiment, "train", mesh))), mesh)
    step = make_step(model, task, optimizer, key, mesh, experiment.accumulation, experiment.gradient_dtype)
    items = batch_size * task.costs(model)["units"]
    # CPUs of several processes block for ever where two programs with collectives overlap.
    is_waiting = jax.process_count() > 1 and jax.default_backend() == "cpu"

    def run(steps: int) -> float:
        nonlocal state
        start = time.perf_counter()
        for _ in range(steps):
            state = step(state, batch)
            if is_waiting:
                jax.block_until_ready(state)
        jax.block_until_ready(state)
        return time.perf_counter() - start

    run(1)
    takes = run(1)
    steps = by_first(lambda: math.ceil(_ROUND_TAKES / takes))  # by whose clock all take as many
    return lambda: steps * items / run(steps)
