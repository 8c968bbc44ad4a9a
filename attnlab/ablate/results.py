"""The rows of results.jsonl, one row per run, by arm."""

import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from attnlab.ablate.statistics import pareto_front

Row = Mapping[str, Any]

# Control characters (but the line's end and the tab), halves of characters, and what turns the direction of a text.
_UNPRINTABLE = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069\ud800-\udfff\ufffe\uffff]")


def printable(value: Any) -> Any:
    """A value of JSON in whose strings a replacement stands for every character that no page or figure can show."""
    if isinstance(value, str):
        return _UNPRINTABLE.sub("\ufffd", value)
    if isinstance(value, Mapping):
        return {printable(name): printable(item) for name, item in value.items()}
    return [printable(item) for item in value] if isinstance(value, (list, tuple)) else value


def _is_text(value: Any) -> bool:
    return isinstance(value, str)


def _is_count(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value < 2**63


def _is_number(value: Any) -> bool:
    """Neither NaN, nor infinite, nor an integer that no float can hold."""
    return isinstance(value, (int, float)) and not isinstance(value, bool) and abs(value) < 1e300


def _or_none(holds: Callable[[Any], bool]) -> Callable[[Any], bool]:
    return lambda value: value is None or holds(value)


def _list_of(holds: Callable[[Any], bool]) -> Callable[[Any], bool]:
    return lambda value: isinstance(value, list) and all(map(holds, value))


def _is_dict(value: Any) -> bool:
    return isinstance(value, dict)


def _are_shapes(value: Any) -> bool:
    return isinstance(value, dict) and bool(value) and all(map(_list_of(_is_count), value.values()))


def _are_scores(value: Any) -> bool:
    """[learning rate, score or None] each."""
    return _list_of(lambda pair: isinstance(pair, list) and len(pair) == 2 and _is_number(pair[0]))(value) and all(
        _or_none(_is_number)(score) for _, score in value
    )


def _is_match(value: Any) -> bool:
    return (
        isinstance(value, dict)
        and _is_text(value.get("cost"))
        and _is_number(value.get("off"))
        and _or_none(_is_text)(value.get("knob"))
    )


def _is_attending(value: Any) -> bool:
    if not isinstance(value, dict):
        return False
    means = [value[name] for name in ("distance", "entropy") if name in value]
    return len(means) != 1 and all(map(_list_of(_or_none(_is_number)), means)) and _is_text(value.get("skipped", ""))


# Fields that the report relies on, with what holds of them: of every row, and of rows that have them.
_FIELDS: dict[str, Callable[[Any], bool]] = {
    **dict.fromkeys(("question", "baseline", "metric", "arm", "status", "unit", "config", "command"), _is_text),
    **dict.fromkeys(("task", "environment"), _is_dict),
    **dict.fromkeys(("parameters", "seed"), _is_count),
    **dict.fromkeys(("state_size", "length"), _or_none(_is_count)),
    "higher_is_better": lambda value: isinstance(value, bool),
    "flops": _is_number,
    "implementations": _list_of(_is_text),
    "parameter_shapes": _are_shapes,
}
_FURTHER: dict[str, Callable[[Any], bool]] = {
    **dict.fromkeys(("seconds", "compile_seconds", "learning_rate"), _is_number),
    "folder": _is_text,
    "attending": _is_attending,
    "match": _or_none(_is_match),
    "searched_rates": _are_scores,
    "search_seed": _or_none(_is_count),
}


def are_rows(values: Sequence[Any]) -> bool:
    """Whether these are rows as run_ablation writes them, the baseline's among them."""

    def is_row(value: Any) -> bool:
        if not isinstance(value, dict) or not all(holds(value.get(name)) for name, holds in _FIELDS.items()):
            return False
        if not all(holds(value[name]) for name, holds in _FURTHER.items() if name in value):
            return False
        if value["status"] != "finished":
            return isinstance(value.get("error"), str)
        final, history = value.get("final"), value.get("history")
        return (
            isinstance(final, dict)
            and value["metric"] in final
            and all(isinstance(number, (int, float)) for number in final.values())
            and isinstance(history, list)
            and all(isinstance(point, dict) and {"step", "split"} <= point.keys() for point in history)
        )

    return bool(values) and all(map(is_row, values)) and values[0]["baseline"] in arms_of(values)


def arms_of(rows: Sequence[Row]) -> list[str]:
    return list(dict.fromkeys(row["arm"] for row in rows))


def first_row(rows: Sequence[Row], arm: str) -> Row:
    return next(row for row in rows if row["arm"] == arm)


def finished(rows: Sequence[Row], arm: str) -> list[Row]:
    return [row for row in rows if row["arm"] == arm and row["status"] == "finished"]


def by_seed(rows: Sequence[Row], arm: str) -> dict[int, float]:
    """The metric at the end of each finished run."""
    return {row["seed"]: row["final"][row["metric"]] for row in finished(rows, arm)}


def settings(arms: Sequence[str]) -> dict[str, dict[str, dict[float, str]]]:
    """Arms that a sweep made of one arm by a single number, such as local[WINDOW=8]: by option, arm and number, where
    some arm has several."""
    found: dict[str, dict[str, dict[float, str]]] = {}
    for arm in arms:
        if parts := re.fullmatch(r"(.+)\[([\w.]+)=([-+\d.e]+)\]", arm):
            family, option, number = parts.groups()
            found.setdefault(option, {}).setdefault(family, {})[float(number)] = arm
    return {option: families for option, families in found.items() if max(map(len, families.values())) > 1}


class Cost(NamedTuple):
    """What quality is weighed against. column: of a row."""

    column: str
    name: str
    more_is_better: bool


def decodes(rows: Sequence[Row]) -> bool:
    """Whether some arm's model decodes. Those that do not have no state size."""
    return any(row["state_size"] is not None for row in rows)


def costs(rows: Sequence[Row]) -> list[Cost]:
    unit = rows[0]["unit"]
    return [
        Cost("flops", f"FLOPs/{unit}", False),
        *([Cost("state_size", "decode state", False)] if decodes(rows) else []),
        *([Cost("speed", f"{unit}s/s", True)] if any("speed" in row for row in rows) else []),
    ]


def mean_cost(rows: Sequence[Row], arm: str, cost: Cost) -> float:
    """Over the arm's finished runs."""
    return float(np.mean([row[cost.column] for row in finished(rows, arm)]))


def weighed(rows: Sequence[Row], cost: Cost) -> list[str]:
    """Arms with a finished run whose cost is known."""
    return [arm for arm in arms_of(rows) if (done := finished(rows, arm)) and done[0].get(cost.column) is not None]


def front(rows: Sequence[Row], cost: Cost) -> list[str]:
    """Arms of which no other is both better (mean over seeds) and cheaper, from the cheapest to the best.

    Speed is measured, so an arm counts as slower only where `is_slower` holds: on its front are those that are faster
    than every better arm.
    """
    arms, losses = weighed(rows, cost), _losses(rows)
    if cost.column != "speed":
        expense = -1 if cost.more_is_better else 1
        points = [(expense * mean_cost(rows, arm, cost), losses[arm]) for arm in arms]
        return [arms[index] for index in pareto_front(points)]
    rounds = _rounds(rows, arms)
    best = [
        arm
        for arm in arms
        if all(losses[other] >= losses[arm] or is_slower(rounds[other], rounds[arm]) for other in arms)
    ]
    return sorted(best, key=lambda arm: losses[arm], reverse=True)


def tied(rows: Sequence[Row], cost: Cost) -> list[str]:
    """Arms that the front of speed leaves out though no better arm is faster: they tie with one."""
    arms, losses, best = weighed(rows, cost), _losses(rows), front(rows, cost)
    rounds = _rounds(rows, arms)

    def is_beaten(arm: str) -> bool:
        return any(losses[other] < losses[arm] and is_slower(rounds[arm], rounds[other]) for other in arms)

    return [arm for arm in arms if arm not in best and not is_beaten(arm)]


def _losses(rows: Sequence[Row]) -> dict[str, float]:
    """The metric's mean over seeds, by arm, of its negative where higher is better."""
    quality = -1 if rows[0]["higher_is_better"] else 1
    values = {arm: list(by_seed(rows, arm).values()) for arm in arms_of(rows)}
    return {arm: quality * float(np.mean(some)) for arm, some in values.items() if some}


def _rounds(rows: Sequence[Row], arms: Sequence[str]) -> dict[str, Sequence[float]]:
    return {arm: finished(rows, arm)[0]["rounds"] for arm in arms}


def is_slower(one: Sequence[float], other: Sequence[float]) -> bool:
    """Whether the first is below the second in all rounds but one, at most; two equal speeds are so in 2 % of cases."""
    return sum(a >= b for a, b in zip(one, other, strict=True)) <= 1


def attended(rows: Sequence[Row], arm: str) -> Row | None:
    """The arm's run of which it is known what it attends to."""
    return next((row for row in finished(rows, arm) if "distance" in row.get("attending", {})), None)


def mean_over_layers(row: Row, name: str) -> float | None:
    """name: "distance" or "entropy"."""
    return mean_of_known(row["attending"][name])


def mean_of_known(numbers: Sequence[float | None]) -> float | None:
    """To 4 decimal places; None if none is known."""
    known = [number for number in numbers if number is not None]
    return round(sum(known) / len(known), 4) if known else None


def count(number: float, digits: int = 3) -> str:
    """A number to three digits, as "1.23 k", or more of them."""
    for size, suffix in ((1e12, " T"), (1e9, " G"), (1e6, " M"), (1e3, " k")):
        if abs(number) >= size:
            return f"{number / size:.{digits}g}{suffix}"
    return f"{number:.0f}"
