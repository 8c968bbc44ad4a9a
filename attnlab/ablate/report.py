"""The report of an ablation: a Markdown table, a CSV of the runs, and one HTML page that needs nothing beside it."""

import csv
import io
import math
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

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
    printable,
    tied,
)
from attnlab.ablate.speed import ROUNDS, with_speed
from attnlab.ablate.statistics import FEWEST_SEEDS, Difference, holm, paired_difference

# A difference counts where its corrected p is below.
_SIGNIFICANT = 0.05
# Arms that the headline has a sentence for, each; of more, it groups them and names so many of a group.
_MOST_SENTENCES, _MOST_NAMED = 4, 6


def write_report(rows: Sequence[Row], workdir: Path) -> Path:
    """Writes workdir/results.md, results.csv and report.html from the rows of results.jsonl; gives the page's path.

    Samples and pictures of what the arms attend to are taken from the runs' own folders, where they are there.
    """
    rows = printable(with_speed(rows, workdir))
    pairs = _differences(rows)
    table, metrics, notes = add_matching(_table(rows, pairs), rows), _other_metrics(rows), _notes(rows, pairs)
    tables = [_markdown_table(some) for some in (table, metrics, _weighed(rows)) if some]
    texts = [_markdown(note) for note in [*_failures(rows), *notes]]
    command = "\n".join(f"    {line}" for line in str(rows[0]["command"]).splitlines())
    parts = [f"# {_markdown(rows[0]['question'])}", *tables, *texts, "Repeat with:", command]
    (workdir / "results.md").write_text("\n\n".join(parts) + "\n", "utf-8")
    _write_csv(rows, workdir / "results.csv")
    path, verdict = workdir / "report.html", _verdict(rows, pairs)
    path.write_text(page(rows, workdir, verdict=verdict, table=table, metrics=metrics, notes=notes), "utf-8")
    return path


def _write_csv(rows: Sequence[Row], path: Path) -> None:
    """One line per run: arm, seed, every metric of the last evaluation, what it cost, and what it attended to.

    Pareto columns are the arm's: whether it is on the front of the metric and that cost.
    """
    measured = ["parameters", "flops", "state_size", "seconds", "compile_seconds", "learning_rate"]
    measured += ["speed"] if any("speed" in row for row in rows) else []
    metrics = list(dict.fromkeys(name for row in rows for name in row.get("final", {})))
    fronts = {cost.column: front(rows, cost) for cost in costs(rows)}
    looked = ["distance", "entropy"] if any(attended(rows, arm) for arm in arms_of(rows)) else []
    text = io.StringIO(newline="")
    writer = csv.writer(text)
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
    path.write_bytes(text.getvalue().encode())


def _spread(values: Sequence[float]) -> str:
    mean = f"{np.mean(values):.4f}"
    return mean if len(values) < 2 else f"{mean} ± {np.std(values, ddof=1):.4f}"


def _interval(difference: Difference) -> str:
    if math.isnan(difference.low):
        return f"{difference.mean:+.4f} ({_few(difference.seeds)}: no interval)"
    return f"{difference.mean:+.4f} [{difference.low:+.4f}, {difference.high:+.4f}]"


def _few(seeds: int) -> str:
    return "one seed" if seeds == 1 else "two seeds"


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
    p, speeds = _corrected(differences), {row["arm"]: row["rounds"] for row in rows if "rounds" in row}
    with_p, ties = any(not math.isnan(value) for value in p.values()), _ties(rows)
    head = ["arm", f"validation {metric}", f"minus {baseline} [95 % CI]"]
    head += [*([_p_name(p)] if with_p else []), "parameters", f"FLOPs/{unit}", *([f"{unit}s/s"] if speeds else [])]
    table = [[*head, *(["decode state"] if with_state else []), "seeds"]]
    for arm in arms_of(rows):
        done, some = finished(rows, arm), first_row(rows, arm)
        if not done:
            known = [f"{some['parameters']:,}", count(some["flops"]), *([""] if speeds else [])]
            table.append([arm, "failed", "", *([""] if with_p else []), *known, *([""] if with_state else []), "0"])
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
                *([_p(p.get(arm, math.nan))] if with_p else []),
                f"{some['parameters']:,}",
                count(some["flops"]),
                *([_speed(speeds[arm]) + ", tie" * (arm in ties)] if speeds else []),
                *([_state(some)] if with_state else []),
                str(len(done)),
            ]
        )
    return table


def _corrected(differences: Mapping[str, Difference]) -> dict[str, float]:
    """p by arm, corrected for how many arms are compared; NaN of those with too few seeds."""
    return dict(zip(differences, holm([difference.p for difference in differences.values()])))


def _comparisons(p: Mapping[str, float]) -> int:
    return sum(not math.isnan(value) for value in p.values())


def _p_name(p: Mapping[str, float]) -> str:
    return "p (Holm)" if _comparisons(p) > 1 else "p"


def _p(value: float) -> str:
    if math.isnan(value):
        return ""
    return f"{value:.3f}" if value >= 0.001 else "< 0.001"


def _speed(rounds: Sequence[float]) -> str:
    low, middle, high = np.quantile(rounds, [0.25, 0.5, 0.75])
    return f"{count(middle)} ± {50 * (high - low) / middle:.0f} %"


def _ties(rows: Sequence[Row]) -> list[str]:
    return [arm for cost in costs(rows) if cost.column == "speed" for arm in tied(rows, cost)]


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


# What means something to Markdown, GitHub's mathematics among it. An underscore within a word does not, nor does a
# bracket that no address follows.
_MARKS = re.compile(r"[\\`*$#~]|<(?=[a-zA-Z/!?])|&(?=#?\w+;)|\](?=[(\[:])|!(?=\[)|(?<![^\W_])_|_(?![^\W_])")


def _markdown(text: Any) -> str:
    """Plain text as Markdown, on one line."""
    return _MARKS.sub(r"\\\g<0>", " ".join(str(text).split()))


def _markdown_table(table: Sequence[Sequence[str]]) -> str:
    head, *body = [[_markdown(cell).replace("|", "\\|") for cell in line] for line in table]
    lines = [head, ["---"] + ["---:"] * (len(head) - 1), *body]
    return "\n".join("| " + " | ".join(cells) + " |" for cells in lines)


def _failures(rows: Sequence[Row]) -> list[str]:
    return [f"{row['arm']}, seed {row['seed']}, failed: {row['error']}" for row in rows if row["status"] == "failed"]


def _better(row: Row) -> str:
    return "higher" if row["higher_is_better"] else "lower"


def _notes(rows: Sequence[Row], differences: Mapping[str, Difference]) -> list[str]:
    """What the tables' numbers mean and how they came about, in paragraphs of plain text."""
    row = rows[0]
    length = f" Decode state: numbers kept to decode after {row['length']} tokens." if decodes(rows) else ""
    notes = [
        f"{_better(row).capitalize()} is better. ±: standard deviation over seeds. Differences are paired by seed. "
        f"FLOPs: forward, matrix products only, 2 per multiply-add.{length}",
        *_tests(differences),
        *_bootstrapped(differences),
        *_timed(rows),
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


def _tests(differences: Mapping[str, Difference]) -> list[str]:
    """What the intervals and p are, and where there are none."""
    p, parts = _corrected(differences), []
    if number := _comparisons(p):
        corrected = f", corrected by Holm for {number} comparisons with the baseline" if number > 1 else ""
        alone = "; an interval is of its own difference alone, not corrected" if number > 1 else ""
        parts.append(f"Intervals are Student's t. p: two-sided paired t test{corrected}{alone}.")
    if few := [arm for arm, difference in differences.items() if math.isnan(difference.p)]:
        which = "" if len(few) == len(differences) else f", so not of {', '.join(few)}"
        parts.append(f"Fewer than {FEWEST_SEEDS} seeds give no interval and no test{which}.")
    return [" ".join(parts)] if parts else []


def _timed(rows: Sequence[Row]) -> list[str]:
    """How speed was measured."""
    unit = rows[0]["unit"]
    device = next((row["speed_device"] for row in rows if "speed_device" in row), None)
    if device is None:
        return ["Speed was not measured, so no arm is ranked by it."]
    return [
        f"{unit.capitalize()}s/s: of training steps alone, timed after all runs on {device}, the arms in turn; median "
        f"of {ROUNDS} rounds ± half the distance of their quartiles. An arm counts as faster than another if it was so "
        f"in at least {ROUNDS - 1} rounds."
        + " Tie: not on the Pareto front, as it is not faster than every better arm."
        * bool(_ties(rows))
    ]


def _bootstrapped(differences: Mapping[str, Difference]) -> list[str]:
    """The differences' intervals once more, from resampled seeds; nothing for fewer than ten."""
    parts = [
        f"{arm} [{difference.bootstrap_low:+.4f}, {difference.bootstrap_high:+.4f}]"
        for arm, difference in differences.items()
        if not math.isnan(difference.bootstrap_low)
    ]
    if not parts:
        return []
    return [f"95 % intervals by bootstrap (10,000 resamples of the seeds): {', '.join(parts)}."]


def _shared(rows: Sequence[Row]) -> str:
    """How much of each arm starts from the baseline's very bits."""
    base = first_row(rows, rows[0]["baseline"])["parameter_shapes"]
    parts = []
    for arm in arms_of(rows):
        shapes = first_row(rows, arm)["parameter_shapes"]
        if arm != rows[0]["baseline"]:
            same = sum(math.prod(shape) for path, shape in shapes.items() if base.get(path) == shape)
            share = same / sum(math.prod(shape) for shape in shapes.values())
            parts.append(f"{arm} {math.floor(1000 * share) / 10:.1f}%")  # 100% is all of them
    together = ", ".join(parts)
    return (
        "Runs with one seed see the same batches in the same order. "
        + (f"Share of an arm's parameters that start from the baseline's very bits: {together}." if parts else "")
    ).strip()


def _verdict(rows: Sequence[Row], differences: Mapping[str, Difference]) -> list[str]:
    """The answer in sentences: which arms differ from the baseline, by the corrected p."""
    baseline, p = rows[0]["baseline"], _corrected(differences)
    lead = f"Validation {rows[0]['metric']}, {_better(rows[0])} is better:"
    if len(differences) > _MOST_SENTENCES:
        return [lead, *_grouped(rows, differences)]
    number, sentences, few = _comparisons(p), [], list[str]()
    for arm, difference in differences.items():
        size = f"{arm} ends {abs(difference.mean):.4f} {'below' if difference.mean < 0 else 'above'} {baseline}"
        if math.isnan(difference.p):
            few.append(f"{size} ({_few(difference.seeds)}, so no interval).")
        elif p[arm] >= _SIGNIFICANT:
            if difference.p < _SIGNIFICANT:
                alone = f"and its interval alone excludes 0, but corrected for {number} comparisons (Holm)"
                sentences.append(f"{size}, {alone} {difference.seeds} seeds cannot tell this from no difference.")
            else:
                sentences.append(f"{size}, but {difference.seeds} seeds cannot tell this from no difference.")
        elif number > 1:
            sentences.append(f"{size}: a difference at 5 %, corrected for {number} comparisons (Holm).")
        else:
            sentences.append(f"{size}, and the 95 % interval excludes 0.")
    return [lead, *sentences, *few]


def _grouped(rows: Sequence[Row], differences: Mapping[str, Difference]) -> list[str]:
    """The same of many arms: a sentence for all that came out alike, the best of them first."""
    baseline, p, sign = rows[0]["baseline"], _corrected(differences), -1 if rows[0]["higher_is_better"] else 1
    groups: dict[str, list[str]] = {}
    for arm in sorted(differences, key=lambda arm: sign * differences[arm].mean):
        if math.isnan(p[arm]):
            group = f"Minus {baseline}, without an interval (fewer than {FEWEST_SEEDS} seeds)"
        elif p[arm] >= _SIGNIFICANT:
            group = f"Not to be told from {baseline} with these seeds"
        else:
            side = "below" if differences[arm].mean < 0 else "above"
            group = f"Ends {side} {baseline} (at 5 %, corrected for {_comparisons(p)} comparisons)"
        groups.setdefault(group, []).append(f"{arm} {differences[arm].mean:+.4f}")
    return [f"{group}: {_first(arms)}." for group, arms in groups.items()]


def _first(names: Sequence[str]) -> str:
    left = len(names) - _MOST_NAMED
    return ", ".join(names[:_MOST_NAMED]) + (f" and {left} more" if left > 0 else "")
