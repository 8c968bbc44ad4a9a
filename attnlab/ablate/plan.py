"""The plan of a sweep: every run with its config and costs, as far as they are known while rates are searched."""

import dataclasses
import difflib
import functools
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax

import attnlab.ablate.cache as cache
from attnlab import config, nn
from attnlab.ablate.matching import Match, closest, cost_of
from attnlab.ablate.sweep import Ablation
from attnlab.errors import UserError
from attnlab.train import Experiment
from attnlab.train.causality import check_causality
from attnlab.train.mesh import devices_of_runs, is_described, on_devices, without_mesh
from attnlab.train.step import validation_metrics

# What a run gave, by the run's digest.
Outcomes = Mapping[str, Mapping[str, Any]]


@dataclasses.dataclass(frozen=True, eq=False)
class Run:
    """One arm with one seed.

    name: for people. data: Task.describe. code: its version. digest: of all that decides the run's numbers.
    """

    arm: str
    name: str
    experiment: Experiment
    built: config.Built
    data: dict[str, Any]
    code: str
    digest: str

    @functools.cached_property
    def costs(self) -> dict[str, Any]:
        """Parameters; unit, units, flops, state_size and length as of Task.costs."""
        model = self.experiment.model
        return {"parameters": nn.count_parameters(model), **self.experiment.task.costs(model)}

    @property
    def items(self) -> int:
        """Tokens or images that training takes in."""
        return self.experiment.steps * self.experiment.batch_size * self.costs["units"]

    @property
    def training_flops(self) -> float:
        """Of all steps: the backward is twice the forward."""
        return 3 * self.costs["flops"] * self.items


def _parts(devices_per_run: int | None) -> list[Sequence[jax.Device]]:
    """The devices of the runs that train at once, of each so many."""
    devices = devices_of_runs()
    size = len(devices) if devices_per_run is None else devices_per_run
    if size > len(devices):
        raise UserError(f"devices_per_run: got {size}, and there are {len(devices)} devices")
    if size < len(devices) and jax.process_count() > 1:
        together = f"{jax.process_count()} processes, which train each run together on {len(devices)} devices"
        raise UserError(f"devices_per_run: got {size} with {together}; leave it out")
    return [devices[start : start + size] for start in range(0, len(devices) - size + 1, size)]


def counted(number: int, thing: str) -> str:
    return f"{number} {thing}{'s' * (number != 1)}"


class Plan:
    """Which runs a sweep needs, and what was decided for its arms.

    Args:
      file, overrides: the sweep's config and the command line's bindings, as of config.build.

    Raises:
      UserError: a mistake in the config, also of a single arm; an arm that cannot be matched.
    """

    def __init__(self, file: str, overrides: Sequence[str]):
        self._file, self._overrides = file, list(overrides)
        sweep = self._built()
        self.ablation: Ablation = sweep.value
        self.parts = _parts(self.ablation.devices_per_run)
        self._check_superseded()
        self._sources = self.ablation.variants()
        self.arms = list(self._sources)
        self.matches = self._matched()
        self._runs: dict[tuple[str, int, float | None], Run] = {}
        for arm in self.arms:  # so that a mistake in the last arm is reported before the first trains
            self._check(self.run(arm, self.ablation.seeds[0], self.rates[0]))
        built = [self.run(arm, self.ablation.seeds[0], self.rates[0]).built for arm in self.arms]
        config.check_read(overrides, sweep, *built)

    def _built(self) -> config.Built:
        try:
            return config.build([self._file], self._overrides, root="Ablation")
        except UserError as error:
            # Of a macro of its arms' files, which it names, it says only that the sweep does not use it.
            text = str(error)
            try:
                alone = config.build([self._file], root="Ablation")
            except UserError:
                raise error from None
            self._check_arms_keep(alone.value, lambda source, name: name in text and config.sets(source, name))
            raise

    def _check_arms_keep(self, ablation: Ablation, sets: Callable[[str, str], bool]) -> None:
        """Refuses overrides of what arms set themselves: they differ in it, or the sweep does not know it.

        sets: whether a source of an arm sets a name.
        """
        for override in self._overrides:
            name, _, value = (part.strip() for part in override.partition("="))
            where: dict[str, str] = {}
            for arm, given in ablation.arms.items():
                listed = [given] if isinstance(given, str) else given
                where.update((arm, source) for source in listed if sets(source, name))
            for field, variations in (("product", ablation.product), ("zipped", ablation.zipped)):
                for arm, bindings in variations.items():
                    if any(config.sets(f"{binding} =", name) for binding in bindings):
                        where[arm] = f"Ablation.{field}"
            if where:
                by = ", ".join(f"{arm} ({source})" for arm, source in where.items())
                change = f"change it there, or add '{name} = {value}' to an arm's list, in {self._file}"
                raise UserError(f"config: --gin.{name}: arms set it themselves, {by}; {change}")

    def _check_superseded(self) -> None:
        """Refuses overrides in whose place the sweep sets values of its own."""
        ablation = self.ablation
        # A file's macros the override sets in all arms alike.
        self._check_arms_keep(ablation, lambda source, name: "=" in source and config.sets(source, name))
        knobs = ablation.knobs.values() if isinstance(ablation.knobs, Mapping) else [ablation.knobs or ""]
        own = {"Experiment.seed": "seeds", **dict.fromkeys(filter(None, knobs), "knobs")}
        if ablation.learning_rates is not None:
            own["OptimizerOptions.learning_rate"] = "learning_rates"
        for override in self._overrides:
            name = override.partition("=")[0].strip()
            for option, field in own.items():
                if name.split(".")[-2:] == option.split(".")[-2:]:
                    raise UserError(f"config: --gin.{name}: the sweep sets it itself, from Ablation.{field}; set that")

    def _check(self, run: Run) -> None:
        """Refuses what of the sweep does not reach this run, the metric and values that its arm varies, and a leak."""
        ablation, experiment = self.ablation, run.experiment
        if not is_described():
            try:
                check_causality(experiment.model, experiment.task)
            except UserError as error:
                raise UserError(f"{error} (arm {run.arm})") from error
        if ablation.metric != "loss":
            names = validation_metrics(experiment.model, experiment.task, experiment.batch_size)
            if ablation.metric not in names:
                close = difflib.get_close_matches(ablation.metric, names, n=1)
                hint = f"; did you mean {close[0]!r}?" if close else ""
                raise UserError(f"metric: got {ablation.metric!r}; {run.arm} has {', '.join(names)}{hint}")
        arm = run.arm.partition("[")[0]
        for field, variations in (("product", ablation.product), ("zipped", ablation.zipped)):
            for binding in variations.get(arm, {}):
                if binding in run.built.unread:
                    raise UserError(f"{field}: got {binding} for {arm}; nothing that the arm builds reads it")

    @property
    def rates(self) -> list[float | None]:
        return [None] if self.ablation.learning_rates is None else list(self.ablation.learning_rates)

    @property
    def size(self) -> int:
        """Number of runs, searched rates among them."""
        searched = len(self.rates) if len(self.rates) > 1 else 0
        return len(self.arms) * (searched + len(self.ablation.seeds))

    @property
    def extent(self) -> str:
        """What it is made of, for people: "3 arms x 3 seeds x 120 steps"."""
        steps = sorted({self.run(arm, self.ablation.seeds[0], self.rates[0]).experiment.steps for arm in self.arms})
        parts = [counted(len(self.arms), "arm"), counted(len(self.ablation.seeds), "seed")]
        if len(self.rates) > 1:
            parts[1] = f"({parts[1]} + {len(self.rates)} learning rates)"
        return " x ".join([*parts, " to ".join(map(str, dict.fromkeys([steps[0], steps[-1]]))) + " steps"])

    def run(self, arm: str, seed: int, rate: float | None) -> Run:
        """A run of an arm. rate: None is the config's."""
        if (arm, seed, rate) not in self._runs:
            with on_devices(self.parts[0]):
                self._runs[arm, seed, rate] = self._build(arm, seed, rate)
        return self._runs[arm, seed, rate]

    def _build(self, arm: str, seed: int, rate: float | None) -> Run:
        overrides = [*self._overrides, f"Experiment.seed={seed}"]
        match = self.matches.get(arm)
        if match is not None and match.knob is not None:
            overrides.append(f"{match.knob}={match.value}")
        if rate is not None:
            overrides.append(f"OptimizerOptions.learning_rate={rate!r}")
        try:
            built = config.build([self._file, *self._sources[arm]], overrides, root="Experiment")
        except UserError as error:
            raise UserError(f"{error} (arm {arm})") from error
        experiment: Experiment = built.value
        if rate is not None and experiment.optimizer.learning_rate != rate:
            raise UserError(
                "learning_rates: the config leaves Experiment.optimizer at its default, which no rate reaches; add "
                "train.Experiment.optimizer = @train.OptimizerOptions()"
            )
        data, code = experiment.task.describe(), cache.code_version(built.modules)
        digest = cache.digest({"config": without_mesh(built.values), "data": data, "code": code})
        name = f"{arm}-seed{seed}" + ("" if rate is None else f"-rate{rate:g}")
        return Run(arm, name, experiment, built, data, code, digest)

    def _matched(self) -> dict[str, Match]:
        """By arm; empty without `match`."""
        ablation, matched_by = self.ablation, self.ablation.match
        if matched_by is None:
            return {}

        def cost(arm: str, knob: str | None = None, value: int | None = None) -> float:
            overrides = [*self._overrides, *([f"{knob}={value}"] if knob else [])]
            options = config.options([self._file, *self._sources[arm]], overrides, root="Experiment")
            return cost_of(options, matched_by)

        target = cost(ablation.baseline)
        matches = {}
        for arm in self.arms:
            knob, value = ablation.knob(arm), None
            if knob is not None:
                what = f"{knob} of {arm} for the {matched_by} of {ablation.baseline}"
                value = closest(functools.partial(cost, arm, knob), target, what=what)
            matches[arm] = Match(matched_by, cost(arm, knob, value) / target - 1, knob, value)
        return matches

    def searches(self, arm: str) -> list[Run]:
        """The runs that try the learning rates; none where there is nothing to choose."""
        if len(self.rates) == 1:
            return []
        return [self.run(arm, self.ablation.search_seed, rate) for rate in self.rates]

    def is_searched(self, arm: str, outcomes: Outcomes) -> bool:
        """Whether the arm's learning rate is known."""
        return all(run.digest in outcomes for run in self.searches(arm))

    def rate(self, arm: str, outcomes: Outcomes) -> float | None:
        """The learning rate with the best score; the lowest where every one failed. None is the config's."""
        if len(self.rates) == 1:
            return self.rates[0]
        scores = self.scores(arm, outcomes)
        sign = -1 if self.ablation.higher_is_better else 1
        return min(scores, key=lambda rate: (math.inf if (score := scores[rate]) is None else sign * score, rate))

    def scores(self, arm: str, outcomes: Outcomes) -> dict[float, float | None]:
        """The last validation metric by learning rate; None of one that failed."""
        scores: dict[float, float | None] = {}
        for rate, run in zip(self.ablation.learning_rates or (), self.searches(arm)):
            value = outcomes[run.digest].get("final", {}).get(self.ablation.metric, math.nan)
            scores[rate] = value if math.isfinite(value) else None
        return scores

    def runs(self, outcomes: Outcomes) -> list[Run]:
        """The runs that are known to be needed: all, once every arm's learning rate is."""
        searches = [run for arm in self.arms for run in self.searches(arm)]
        return searches + [run for run in self.compared(outcomes) if run not in searches]

    def compared(self, outcomes: Outcomes) -> list[Run]:
        """The runs that the report compares, an arm's once its learning rate is known."""
        rates = {arm: self.rate(arm, outcomes) for arm in self.arms if self.is_searched(arm, outcomes)}
        return [self.run(arm, seed, rate) for seed in self.ablation.seeds for arm, rate in rates.items()]
