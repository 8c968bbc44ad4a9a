"""What a sweep would run, and what that costs; nothing is trained or written."""

import dataclasses
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import attnlab.ablate.cache as cache
from attnlab.ablate.plan import Plan, Run
from attnlab.train.loop import duration
from attnlab.train.workdir import last_step


@dataclasses.dataclass(frozen=True)
class _Line:
    """A run of the table. run: itself, or one of equal cost while it is unknown. left: share of its training to do."""

    name: str
    learning_rate: str
    run: Run
    state: str
    left: float


def dry_run(file: str, overrides: Sequence[str], runs: Path) -> str:
    """A table in Markdown of a sweep's runs, and their totals.

    Training FLOPs are three times the forward's, over all steps. Time left follows from the speed of a finished run of
    the same arm, and there is no such column without any.

    Args:
      file, overrides, runs: as in run_ablation.
    """
    plan = Plan(file, overrides)
    outcomes: dict[str, dict[str, Any]] = {}
    for _ in range(2):  # what the first round finds may settle learning rates, and so name more runs
        for run in plan.runs(outcomes):
            outcome = cache.outcome(cache.folder(runs, run.name, run.digest))
            if outcome and outcome.get("is_final", True):
                outcomes[run.digest] = outcome
    finished = [run for run in plan.runs(outcomes) if outcomes.get(run.digest, {}).get("status") == "finished"]
    speeds = {run.arm: outcomes[run.digest]["items_per_second"] for run in finished}
    lines = list(_lines(plan, outcomes, runs))

    unit = lines[0].run.costs["unit"]
    head = ["run", "learning rate", "parameters", "training FLOPs", f"{unit}s", "state"]
    table = [[*head, *(["time left"] if speeds else [])]]
    for line in lines:
        run = line.run
        seconds = line.left * run.items / speeds[run.arm] if run.arm in speeds else None
        cells = [line.name, line.learning_rate, f"{run.costs['parameters']:,}", f"{run.training_flops:.3g}"]
        cells += [f"{run.items:,}", line.state]
        table.append([*cells, *(["unknown" if seconds is None else duration(seconds)] if speeds else [])])
    table.insert(1, ["---"] + ["---:"] * (len(table[0]) - 1))
    flops, items = sum(line.run.training_flops for line in lines), sum(line.run.items for line in lines)
    flops_left = sum(line.left * line.run.training_flops for line in lines)
    items_left = sum(line.left * line.run.items for line in lines)
    total = (
        f"{plan.extent}: {sum(line.left > 0 for line in lines)} of {len(lines)} runs to do: "
        f"{flops_left:.3g} of {flops:.3g} FLOPs, {items_left:,.0f} of {items:,} {unit}s"
    )
    if speeds and all(line.run.arm in speeds for line in lines if line.left):
        seconds = sum(line.left * line.run.items / speeds[line.run.arm] for line in lines if line.left)
        total += f", {duration(seconds)} of training one after the other"
    return "\n".join("| " + " | ".join(cells) + " |" for cells in table) + f"\n\n{total}"


def _lines(plan: Plan, outcomes: dict[str, dict[str, Any]], runs: Path) -> Iterator[_Line]:
    first: dict[str, Run] = {}
    for run in plan.runs(outcomes):
        step, steps = last_step(cache.folder(runs, run.name, run.digest)), run.experiment.steps
        if run is not first.setdefault(run.digest, run):
            state, left = f"is {first[run.digest].name}", 0.0
        elif run.digest in outcomes:
            state, left = outcomes[run.digest]["status"], 0.0
        else:
            state, left = (f"step {step} of {steps}" if step else "to run"), 1 - step / steps
        yield _Line(run.name, f"{run.experiment.optimizer.learning_rate:g}", run, state, left)
    for arm in plan.arms:
        if not plan.is_searched(arm, outcomes):
            for seed in plan.ablation.seeds:
                yield _Line(f"{arm}-seed{seed}", "the best", plan.searches(arm)[0], "to run", 1.0)
