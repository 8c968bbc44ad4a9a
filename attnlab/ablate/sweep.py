"""What a sweep asks, and the arms that answer it."""

import ast
import dataclasses
import itertools
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from attnlab.attention._shared.checks import check_bool, check_choice, check_float, check_int, check_text, keep, shown
from attnlab.data.batches import MOST_SEED

COSTS = ("parameters", "flops", "state_size")

# {arm: {binding: values}}
Variations = Mapping[str, Mapping[str, Sequence[Any]]]


# Arms name folders and stand in tables and figures.
_ARM = re.compile(r"[^\W_](?:[-_.,:=+@()~%\w]*[-_+)%\w])?")
_LONGEST_NAME = 150

# So far from the seeds that people choose that a sweep with more of them finds its searches done.
_SEARCH_SEED = 1000


@dataclasses.dataclass(frozen=True)
class Ablation:
    """A question, and the arms that answer it.

    A binding is what `--gin.` takes: a macro or Class.option, such as WINDOW or LinearAttention.head_dim.

    Args:
      question: what the ablation asks, for the report.
      arms: by name, what makes the arm: a config file, or a list of files and bindings, read after the sweep's.
      seeds: every arm runs with each; a seed fixes initial values, batches and dropout alike.
      baseline: the arm that the others are compared with.
      metric: the validation metric that is compared.
      higher_is_better: as of an accuracy.
      product: {arm: {binding: values}}: in the arm's place, an arm for every combination of the values, named as
        local[WINDOW=8] is (an option by its last name).
      zipped: as product, but the bindings' values, equally many, go together: the first of each, the second of each.
      learning_rates: every arm tries each with `search_seed`, and the one whose last validation metric is best trains
        the arm's `seeds`, of which that one is none. One alone is not searched. None: the rate of the config.
      match: "parameters", "flops" or "state_size", of which every arm gets as much as the baseline has; None: no such.
      knobs: the integer option (a binding) that `match` sets, for all arms or {arm: binding}; arms left out stay as
        they are.
      devices_per_run: devices that each run has to itself, for its mesh; as many runs train at once as there are parts
        of so many. None: one run after the other, over all devices, those of several processes too.
    """

    question: str
    arms: Mapping[str, str | Sequence[str]]
    seeds: Sequence[int]
    baseline: str
    metric: str = "loss"
    higher_is_better: bool = False
    product: Variations = dataclasses.field(default_factory=dict)
    zipped: Variations = dataclasses.field(default_factory=dict)
    learning_rates: Sequence[float] | None = None
    match: str | None = None
    knobs: str | Mapping[str, str] | None = None
    devices_per_run: int | None = None

    def __post_init__(self) -> None:
        for field in ("question", "baseline", "metric"):
            check_text(field, getattr(self, field))
        keep(self, higher_is_better=check_bool("higher_is_better", self.higher_is_better))
        for field in ("arms", "product", "zipped"):
            if not isinstance(getattr(self, field), Mapping):
                raise TypeError(f"{field}: got {shown(getattr(self, field))}; need a dict by arm")
        if not self.arms:
            raise ValueError("arms: got none; need at least one arm")
        for name, sources in self.arms.items():
            if not isinstance(name, str) or not _ARM.fullmatch(name):
                raise ValueError(f"arms: got the name {shown(name)}; need letters and digits, and -_.,:=+ between them")
            listed = [sources] if isinstance(sources, str) else sources
            if not isinstance(listed, (list, tuple)) or not all(isinstance(source, str) for source in listed):
                raise TypeError(f"arms: got {shown(sources)} for {name}; need a file, or a list of files and bindings")
        for field, variations in (("product", self.product), ("zipped", self.zipped)):
            self._check_arms(field, variations)
            for arm, bindings in variations.items():
                _check_values(field, arm, bindings)
        for arm, bindings in self.zipped.items():
            if len({len(values) for values in bindings.values()}) > 1:
                counts = ", ".join(f"{len(values)} of {binding}" for binding, values in bindings.items())
                raise ValueError(f"zipped: got {counts} for {arm}; need equally many")
        if self.devices_per_run is not None:
            keep(self, devices_per_run=check_int("devices_per_run", self.devices_per_run, least=1))
        names = list(self.variants())
        for number, name in enumerate(names):
            if len(name) > _LONGEST_NAME:
                raise ValueError(f"arms: got the name {shown(name)}; need at most {_LONGEST_NAME} characters")
            if set(name) & set("$\\") or not name.isprintable():
                raise ValueError(f"arms: got the name {shown(name)}; need one without $, backslashes and line ends")
            if twin := [other for other in names[:number] if other.casefold() == name.casefold()]:
                raise ValueError(f"arms: got the names {twin[0]!r} and {name!r}; need them to differ in more than case")
        if self.baseline not in names:
            raise ValueError(f"baseline: got {self.baseline!r}; need one of the arms {names}")
        seeds, rates = _listed("seeds", self.seeds), self.learning_rates
        keep(self, seeds=[check_int("seeds", seed, least=0, most=MOST_SEED, of=self.seeds) for seed in seeds])
        if rates is not None:
            rates = [check_float("learning_rates", rate, above=0) for rate in _listed("learning_rates", rates)]
            keep(self, learning_rates=rates)
        if self.match is not None:
            check_choice("match", self.match, COSTS)
        if self.knobs is not None and not isinstance(self.knobs, (str, Mapping)):
            raise TypeError(f"knobs: got {shown(self.knobs)}; need an option's name, or a dict of one by arm")
        if (self.match is None) != (not self.knobs):
            raise ValueError(f"knobs: got {self.knobs!r} with match {self.match!r}; need both or none")
        if isinstance(self.knobs, Mapping):
            self._check_arms("knobs", self.knobs)
            for knob in self.knobs.values():
                check_text("knobs", knob)

    @property
    def search_seed(self) -> int:
        """With which learning rates are tried: none of `seeds`, since what chose a rate is no fair measure of it."""
        return next(seed for seed in itertools.count(_SEARCH_SEED) if seed not in self.seeds)

    def _check_arms(self, field: str, by_arm: Mapping[str, Any]) -> None:
        for arm in by_arm:
            if arm not in self.arms:
                raise ValueError(f"{field}: got the arm {arm!r}; need one of {list(self.arms)}")

    def variants(self) -> dict[str, list[str]]:
        """All arms, those of product and zipped in place of theirs: {name: files and bindings}."""
        variants = {}
        for arm, given in self.arms.items():
            sources = [given] if isinstance(given, str) else list(given)
            for values in self._combinations(arm):
                name = f"{arm}[{_shown(values)}]" if values else arm
                variants[name] = [*sources, *(f"{binding} = {value!r}" for binding, value in values.items())]
        return variants

    def _combinations(self, arm: str) -> Iterator[dict[str, Any]]:
        """Values by binding; one empty dict for an arm that stands as it is."""
        product, zipped = self.product.get(arm, {}), self.zipped.get(arm, {})
        together = list(zip(*zipped.values())) if zipped else [()]
        for values in together:
            for combination in itertools.product(*product.values()):
                yield {**dict(zip(zipped, values)), **dict(zip(product, combination))}

    def knob(self, variant: str) -> str | None:
        """The option that `match` sets in this arm of `variants`."""
        if variant == self.baseline or self.knobs is None:
            return None
        return self.knobs if isinstance(self.knobs, str) else self.knobs.get(variant.partition("[")[0])


def _listed(field: str, values: Any) -> Sequence[Any]:
    if isinstance(values, (str, Mapping)) or not isinstance(values, Sequence):
        raise TypeError(f"{field}: got {shown(values)}; need a list")
    if not values or len({repr(value) for value in values}) != len(values):
        raise ValueError(f"{field}: got {shown(list(values))}; need at least one, each once")
    return values


def _check_values(field: str, arm: str, bindings: Mapping[str, Sequence[Any]]) -> None:
    if not isinstance(bindings, Mapping):
        raise TypeError(f"{field}: got {shown(bindings)} for {arm}; need a dict of values by binding")
    if not bindings:
        raise ValueError(f"{field}: got no bindings for {arm}; need at least one")
    for binding, values in bindings.items():
        if isinstance(values, str) or not isinstance(values, Sequence) or not values:
            raise ValueError(f"{field}: got {values!r} for {binding} of {arm}; need a list of at least one value")
        for value in values:
            try:
                ast.literal_eval(repr(value))
            except (ValueError, SyntaxError):
                raise ValueError(
                    f"{field}: got {value!r} for {binding} of {arm}; need numbers, strings, lists or tuples"
                ) from None
        if len({repr(value) for value in values}) != len(values):
            raise ValueError(f"{field}: got {list(values)} for {binding} of {arm}; need each value once")


def _shown(values: Mapping[str, Any]) -> str:
    """WINDOW=8,head_dim=16: options by their last name, or whole where two have the same."""
    short = [binding.rpartition(".")[2] for binding in values]
    names = short if len(set(short)) == len(short) else list(values)
    return ",".join(f"{name}={value}" for name, value in zip(names, values.values())).replace(" ", "")
