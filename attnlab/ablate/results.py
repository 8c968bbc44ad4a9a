"""The rows of results.jsonl, one row per run, by arm."""

import re
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from attnlab.ablate.statistics import pareto_front

Row = Mapping[str, Any]


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
        Cost("items_per_second", f"{unit}s/s", True),
    ]


def mean_cost(rows: Sequence[Row], arm: str, cost: Cost) -> float:
    """Over the arm's finished runs."""
    return float(np.mean([row[cost.column] for row in finished(rows, arm)]))


def weighed(rows: Sequence[Row], cost: Cost) -> list[str]:
    """Arms with a finished run whose cost is known."""
    return [arm for arm in arms_of(rows) if (done := finished(rows, arm)) and done[0][cost.column] is not None]


def front(rows: Sequence[Row], cost: Cost) -> list[str]:
    """Arms of which no other is both better (mean over seeds) and cheaper, from the cheapest to the best."""
    arms = weighed(rows, cost)
    quality, expense = (-1 if rows[0]["higher_is_better"] else 1), (-1 if cost.more_is_better else 1)
    points = [
        (expense * mean_cost(rows, arm, cost), quality * float(np.mean(list(by_seed(rows, arm).values()))))
        for arm in arms
    ]
    return [arms[index] for index in pareto_front(points)]


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


def count(number: float) -> str:
    """A number to three digits, as "1.23 k"."""
    for size, suffix in ((1e12, " T"), (1e9, " G"), (1e6, " M"), (1e3, " k")):
        if abs(number) >= size:
            return f"{number / size:.3g}{suffix}"
    return f"{number:.0f}"
