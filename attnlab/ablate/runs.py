"""The runs of an ablation: every arm with every seed, one after the other, results kept as they come."""

import dataclasses
import json
import platform
import shlex
import sys
from collections.abc import Callable, Mapping, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

import jax
from tqdm import tqdm

import attnlab
from attnlab import config, nn
from attnlab.ablate.attending import attend
from attnlab.errors import UserError
from attnlab.train import Experiment, train
from attnlab.train.loop import loss_shapes


@dataclasses.dataclass(frozen=True)
class Ablation:
    """A question, and the arms that answer it.

    Args:
      question: what the ablation asks, for the report.
      arms: by name, what makes the arm: a config file, or a list of files and bindings, read after the sweep's.
      seeds: every arm runs with each; a seed fixes initial values, batches and dropout alike.
      baseline: the arm that the others are compared with.
      metric: the validation metric that is compared.
      higher_is_better: as of an accuracy.
    """

    question: str
    arms: Mapping[str, str | Sequence[str]]
    seeds: Sequence[int]
    baseline: str
    metric: str = "loss"
    higher_is_better: bool = False

    def __post_init__(self) -> None:
        if not self.arms:
            raise ValueError("arms: got none; need at least one arm")
        if self.baseline not in self.arms:
            raise ValueError(f"baseline: got {self.baseline!r}; need one of the arms {list(self.arms)}")
        if not self.seeds or len(set(self.seeds)) != len(self.seeds):
            raise ValueError(f"seeds: got {list(self.seeds)}; need at least one, each once")
        for name in self.arms:
            if not name or set(name) & set('/\\ "'):
                raise ValueError(f"arms: got the name {name!r}; need a name without spaces, quotes and slashes")

    def sources(self, arm: str) -> list[str]:
        sources = self.arms[arm]
        return [sources] if isinstance(sources, str) else list(sources)


def run_ablation(
    file: str, overrides: Sequence[str], workdir: Path, *, say: Callable[[str], None] = print
) -> list[dict[str, Any]]:
    """Runs every arm with every seed and writes workdir/results.jsonl, a row a run.

    A run that is finished is not run again and one that was interrupted resumes, so that the same command continues.
    A run that fails leaves a row with its error, and the others go on.

    Args:
      file: the sweep's config. overrides: as in config.build, for every arm.
      workdir: the runs' own folders are below workdir/runs.
      say: takes lines for the user.
    """
    ablation: Ablation = config.build([file], overrides, root="Ablation").value
    pairs = [(arm, seed) for seed in ablation.seeds for arm in ablation.arms]
    built = {
        (arm, seed): config.build(
            [file, *ablation.sources(arm)], [*overrides, f"Experiment.seed={seed}"], root="Experiment"
        )
        for arm, seed in pairs
    }
    command = shlex.join(["attnlab", "ablate", file, *(f"--gin.{override}" for override in overrides)])
    say(f"{ablation.question}\n{len(ablation.arms)} arms x {len(ablation.seeds)} seeds in {workdir}")
    rows: list[dict[str, Any]] = []
    with tqdm(pairs, desc="runs", unit="run", disable=not sys.stderr.isatty(), dynamic_ncols=True) as progress:
        for number, (arm, seed) in enumerate(progress, start=1):
            name = f"{arm}-seed{seed}"
            run = built[arm, seed]
            row = {**describe_run(ablation, arm, run.value, run.text), "command": command}
            try:
                result = train(run.value, workdir=workdir / "runs" / name, fingerprint=run.values, config_text=run.text)
            except FloatingPointError as error:
                row.update(status="failed", error=str(error))
                say(f"[{number}/{len(pairs)}] {name} failed: {error}")
            else:
                row.update(status="finished", **dataclasses.asdict(result))
                if seed == ablation.seeds[0]:
                    row["attending"] = attend(run.value, workdir / "runs" / name)
                say(
                    f"[{number}/{len(pairs)}] {name}: validation {ablation.metric} "
                    f"{row['final'][ablation.metric]:.4f}, {row['seconds']:.0f} s"
                )
            rows.append(row)
            write_rows(workdir / "results.jsonl", rows)
    return rows


def describe_run(ablation: Ablation, arm: str, experiment: Experiment, config_text: str) -> dict[str, Any]:
    """What is known of a run before it starts: what it is, what it costs, and what it runs on."""
    asked = {name: getattr(ablation, name) for name in ("question", "baseline", "metric", "higher_is_better")}
    shapes = nn.parameter_shapes(experiment.model)
    return {
        **asked,
        "arm": arm,
        "seed": experiment.seed,
        "parameter_shapes": {path: list(shape) for path, shape in shapes.items()},
        "parameters": nn.count_parameters(experiment.model),
        **experiment.task.costs(experiment.model),
        "task": experiment.task.describe(),
        "implementations": implementations(experiment),
        "environment": environment(),
        "config": config_text,
    }


def implementations(experiment: Experiment) -> list[str]:
    """Which implementation each attention call of the model runs, once each."""
    return list(dict.fromkeys(str(choice) for choice in attnlab.explain(lambda: loss_shapes(experiment))))


def environment() -> dict[str, str]:
    device = jax.devices()[0]
    versions = {name: metadata.version(name) for name in ("attnlab", "jax", "jaxlib", "flax", "optax", "grain")}
    return {
        "device": f"{jax.device_count()} x {device.device_kind}",
        "machine": f"{platform.system()} {platform.machine()}",
        "python": platform.python_version(),
        **versions,
    }


def write_rows(path: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    """Replaces the file in one step, so that a reader never sees half of it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_suffix(".partial")
    partial.write_text("".join(json.dumps(row) + "\n" for row in rows))
    partial.replace(path)


def read_rows(workdir: Path) -> list[dict[str, Any]]:
    path = workdir / "results.jsonl"
    if not path.is_file():
        raise UserError(f"report: {workdir} has no results.jsonl; give the folder of an ablation (`attnlab ablate`)")
    try:
        return [json.loads(line) for line in path.read_text().splitlines()]
    except json.JSONDecodeError as error:
        raise UserError(
            f"report: {path} is not JSON lines: {error}; run the ablation again to write it anew"
        ) from error
