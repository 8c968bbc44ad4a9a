"""The report of an ablation: a Markdown table, a CSV of the runs, and one HTML page that needs nothing beside it."""

import csv
import math
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from attnlab.ablate.notes import add_matching, choices
from attnlab.ablate.page import page
from attnlab.ablate.results import (
    Row,
    arms_of,
    attended,
    by_seed,
    costs,
    count,
    decodes,
    finished,
    first_row,
    front,
    mean_over_layers,
)
from attnlab.ablate.statistics import Difference, paired_difference, seeds_needed


def write_report(rows: Sequence[Row], workdir: Path) -> Path:
    """Writes workdir/results.md, results.csv and report.html from the rows of results.jsonl; gives the page's path.

    Samples and pictures of what the arms attend to are taken from the runs' own folders, where they are there.
    """
    pairs = _differences(rows)
    table, metrics, notes = add_matching(_table(rows, pairs), rows), _other_metrics(rows), _notes(rows, pairs)
    tables = "\n\n".join(_markdown(some) for some in (table, metrics, _weighed(rows)) if some)
    repeat = f"Repeat with: `{rows[0]['command']}`"
    (workdir / "results.md").write_text("\n\n".join([f"# {rows[0]['question']}", tables, *notes, repeat]) + "\n")
    _write_csv(rows, workdir / "results.csv")
    path = workdir / "report.html"
    path.write_text(page(rows, workdir, verdict=_verdict(rows, pairs), table=table, metrics=metrics, notes=notes))
    return path


def _write_csv(rows: Sequence[Row], path: Path) -> None:
    """One line per run: arm, seed, every metric of the last evaluation, what it cost, and what it attended to.

    Pareto columns are the arm's: whether it is on the front of the metric and that cost.
    """
    measured = ["parameters", "flops", "state_size", "items_per_second", "seconds", "compile_seconds", "learning_rate"]
    metrics = list(dict.fromkeys(name for row in rows for name in row.get("final", {})))
    fronts = {cost.column: front(rows, cost) for cost in costs(rows)}
    looked = ["distance", "entropy"] if any(attended(rows, arm) for arm in arms_of(rows)) else []
    with path.open("w", newline="") as file:
        writer = csv.writer(file)
        names = [f"validation {name}" for name in metrics] + measured
        names += [f"pareto {column}" for column in fronts] + [f"attention {name}" for name in looked]
        writer.writerow(["arm", "seed", "status", *names])
        for row in rows:
            final = row.get("final", {})
            values = [final.get(name, "") for name in metrics] + [row.get(name, "") for name in measured]
            values += ["yes" if row["arm"] in arms else "no" for arms in fronts.values()]
            seen = row is attended(rows, row["arm"])
            values += [mean_over_layers(row, name) if seen else "" for name in looked]
            writer.writerow([row["arm"], row["seed"], row["status"], *values])


def _spread(values: Sequence[float]) -> str:
    mean = f"{np.mean(values):.4f}"
    return mean if len(values) < 2 else f"{mean} ± {np.std(values, ddof=1):.4f}"


def _interval(difference: Difference) -> str:
    if math.isnan(difference.low):
        return f"{difference.mean:+.4f} (one seed: no interval)"
    return f"{difference.mean:+.4f} [{difference.low:+.4f}, {difference.high:+.4f}]"


def _differences(rows: Sequence[Row]) -> dict[str, Difference]:
    """To the baseline, by arm, where the two have a seed in common."""
    baseline = rows[0]["baseline"]
    base = by_seed(rows, baseline)
    values = {arm: by_seed(rows, arm) for arm in arms_of(rows) if arm != baseline}
    return {arm: paired_difference(by, base) for arm, by in values.items() if set(by) & set(base)}


def _table(rows: Sequence[Row], differences: Mapping[str, Difference]) -> list[list[str]]:
    """Header and one row per arm."""
    metric, baseline, unit = rows[0]["metric"], rows[0]["baseline"], rows[0]["unit"]
    with_state = decodes(rows)
    head = ["arm", f"validation {metric}", f"minus {baseline} [95 % CI]", "parameters", f"FLOPs/{unit}", f"{unit}s/s"]
    table = [[*head, *(["decode state"] if with_state else []), "seeds"]]
    for arm in arms_of(rows):
        done, some = finished(rows, arm), first_row(rows, arm)
        if not done:
            known = [f"{some['parameters']:,}", count(some["flops"]), ""]
            table.append([arm, "failed", "", *known, *([""] if with_state else []), "0"])
            continue
        values = by_seed(rows, arm)
        if arm == baseline:
            difference = "baseline"
        elif arm in differences:
            difference = _interval(differences[arm])
        else:
            difference = "no seed in common"
        table.append(
            [
                arm,
                _spread(list(values.values())),
                difference,
                f"{some['parameters']:,}",
                count(some["flops"]),
                count(float(np.mean([row["items_per_second"] for row in done]))),
                *([_state(some)] if with_state else []),
                str(len(done)),
            ]
        )
    return table


def _state(row: Row) -> str:
    return "" if row["state_size"] is None else count(row["state_size"])


def _other_metrics(rows: Sequence[Row]) -> list[list[str]]:
    """Header and one row per arm: what the last evaluation reports beside the metric, but by group; or empty."""
    reported = dict.fromkeys(name for row in rows for name in row.get("final", {}))
    names = [name for name in reported if name != rows[0]["metric"] and ", " not in name]
    if not names:
        return []
    table = [["arm", *(f"validation {name.replace('_', ' ')}" for name in names)]]
    for arm in arms_of(rows):
        finals = [row["final"] for row in finished(rows, arm)]
        table.append([arm, *(_spread([final[name] for final in finals]) if finals else "" for name in names)])
    return table


def _weighed(rows: Sequence[Row]) -> list[list[str]]:
    """Header and one row per arm: the Pareto fronts it is on, and means over the layers of what it attends to."""
    fronts = {cost.name: front(rows, cost) for cost in costs(rows)}
    looks = {arm: row for arm in arms_of(rows) if (row := attended(rows, arm)) is not None}
    table = [["arm", "on the Pareto front of", *(["attention distance", "entropy (nats)"] if looks else [])]]
    for arm in arms_of(rows):
        on = ", ".join(name for name, arms in fronts.items() if arm in arms) or "none"
        numbers = [mean_over_layers(looks[arm], name) if arm in looks else None for name in ("distance", "entropy")]
        cells = ["" if number is None else f"{number:.2f}" for number in numbers]
        table.append([arm, on, *(cells if looks else [])])
    return table


def _markdown(table: Sequence[Sequence[str]]) -> str:
    head, *body = table
    lines = [head, ["---"] + ["---:"] * (len(head) - 1), *body]
    return "\n".join("| " + " | ".join(cells) + " |" for cells in lines)


def _better(row: Row) -> str:
    return "higher" if row["higher_is_better"] else "lower"


def _notes(rows: Sequence[Row], differences: Mapping[str, Difference]) -> list[str]:
    """What the tables' numbers mean and how they came about, in paragraphs of plain text."""
    row = rows[0]
    length = f" Decode state: numbers kept to decode after {row['length']} tokens." if decodes(rows) else ""
    notes = [
        f"{_better(row).capitalize()} is better. ±: standard deviation over seeds. Differences are paired by seed, "
        f"with Student's t interval. FLOPs: forward, matrix products only, 2 per multiply-add.{length}",
        *_bootstrapped(differences),
        *choices(rows),
        _shared(rows),
    ]
    fronts = {cost.name: front(rows, cost) for cost in costs(rows)}
    if any(fronts.values()):
        listed = "; ".join(f"{name}: {', '.join(arms)}" for name, arms in fronts.items())
        notes.append(f"On the Pareto front (no other arm has a better mean {row['metric']} for less), {listed}.")
    if any(attended(rows, arm) for arm in arms_of(rows)):
        notes.append(
            "Attention distance: with p = |weight| over the sum of a query's, the mean of sum p |i - j| over queries, "
            "heads and layers, in positions. Entropy: of -sum p log p. Both for the first validation example, after "
            "the last step of the first seed."
        )
    return notes


def _bootstrapped(differences: Mapping[str, Difference]) -> list[str]:
    """The differences' intervals once more, from resampled seeds; nothing for one seed."""
    parts = [
        f"{arm} [{difference.bootstrap_low:+.4f}, {difference.bootstrap_high:+.4f}]"
        for arm, difference in differences.items()
        if difference.seeds > 1
    ]
    if not parts:
        return []
    return [
        "95 % intervals by bootstrap (10,000 resamples of the seeds; too narrow for fewer than about ten seeds): "
        f"{', '.join(parts)}."
    ]


def _shared(rows: Sequence[Row]) -> str:
    """How much of each arm starts from the baseline's very bits."""
    base = first_row(rows, rows[0]["baseline"])["parameter_shapes"]
    parts = []
    for arm in arms_of(rows):
        shapes = first_row(rows, arm)["parameter_shapes"]
        if arm != rows[0]["baseline"]:
            same = sum(math.prod(shape) for path, shape in shapes.items() if base.get(path) == shape)
            share = same / sum(math.prod(shape) for shape in shapes.values())
            parts.append(f"{arm} {share:.1%}")
    together = ", ".join(parts)
    return (
        "Runs with one seed see the same batches in the same order. "
        + (f"Share of an arm's parameters that start from the baseline's very bits: {together}." if parts else "")
    ).strip()


def _verdict(rows: Sequence[Row], differences: Mapping[str, Difference]) -> list[str]:
    """The answer in sentences: which arms differ from the baseline beyond the interval."""
    metric, baseline = rows[0]["metric"], rows[0]["baseline"]
    sentences: list[str] = []
    singles: list[str] = []
    for arm, difference in differences.items():
        size = f"{arm} ends {abs(difference.mean):.4f} {'below' if difference.mean < 0 else 'above'} {baseline}"
        if math.isnan(difference.low):
            singles.append(size if not singles else size.replace(" ends ", " ").removesuffix(f" {baseline}"))
        elif difference.low <= 0 <= difference.high:
            more = ""
            if abs(difference.mean) > 0.1 * difference.deviation:  # else it takes more seeds than anybody runs
                needed = seeds_needed(difference.deviation, difference.mean)
                more = f"; if it is real, {needed} would in 4 of 5 repeats"
            sentences.append(f"{size}, but {difference.seeds} seeds cannot tell this from no difference{more}.")
        else:
            sentences.append(f"{size}, and the 95 % interval excludes no difference.")
    if singles:
        sentences.append(f"{', '.join(singles)} (one seed, so no interval).")
    return [f"Validation {metric}, {_better(rows[0])} is better:", *sentences]
