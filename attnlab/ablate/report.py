"""The report of an ablation: a Markdown table, a CSV of the runs, and one HTML page that needs nothing beside it."""

import csv
import html
import io
import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from matplotlib import ticker

from attnlab.ablate.notes import add_matching, choices
from attnlab.ablate.statistics import Difference, paired_difference, seeds_needed

Row = Mapping[str, Any]

# Okabe and Ito's colours, told apart also by colour-blind readers.
COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#8c6d31", "#7f7f7f")
# Drawn in this colour, text and axes take the page's own (light or dark) by the replacement in `_svg`.
_INK = "#010203"


def write_report(rows: Sequence[Row], workdir: Path) -> Path:
    """Writes workdir/results.md, results.csv and report.html from the rows of results.jsonl; gives the page's path."""
    arms = _arms(rows)
    table = add_matching(_table(rows, arms), rows)
    question, metric = rows[0]["question"], rows[0]["metric"]
    (workdir / "results.md").write_text(f"# {question}\n\n{_markdown(table)}\n\n{_note(rows)}\n")
    _write_csv(rows, workdir / "results.csv")
    page = workdir / "report.html"
    page.write_text(_page(question, metric, rows, arms, table))
    return page


def _write_csv(rows: Sequence[Row], path: Path) -> None:
    """A line a run: arm, seed, what it cost, and every metric of the last evaluation."""
    costs = ["parameters", "flops", "state_size", "items_per_second", "seconds", "compile_seconds", "learning_rate"]
    metrics = list(dict.fromkeys(name for row in rows for name in row.get("final", {})))
    with path.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["arm", "seed", "status", *(f"validation {name}" for name in metrics), *costs])
        for row in rows:
            final = row.get("final", {})
            values = [final.get(name, "") for name in metrics] + [row.get(name, "") for name in costs]
            writer.writerow([row["arm"], row["seed"], row["status"], *values])


def _arms(rows: Sequence[Row]) -> list[str]:
    return list(dict.fromkeys(row["arm"] for row in rows))


def _finished(rows: Sequence[Row], arm: str) -> list[Row]:
    return [row for row in rows if row["arm"] == arm and row["status"] == "finished"]


def _by_seed(rows: Sequence[Row], arm: str) -> dict[int, float]:
    return {row["seed"]: row["final"][row["metric"]] for row in _finished(rows, arm)}


def _better(row: Row) -> str:
    return "higher" if row["higher_is_better"] else "lower"


def _spread(values: Sequence[float]) -> str:
    mean = f"{np.mean(values):.4f}"
    return mean if len(values) < 2 else f"{mean} ± {np.std(values, ddof=1):.4f}"


def _interval(difference: Difference) -> str:
    if math.isnan(difference.low):
        return f"{difference.mean:+.4f} (one seed: no interval)"
    return f"{difference.mean:+.4f} [{difference.low:+.4f}, {difference.high:+.4f}]"


def _count(number: float) -> str:
    for size, suffix in ((1e12, " T"), (1e9, " G"), (1e6, " M"), (1e3, " k")):
        if abs(number) >= size:
            return f"{number / size:.3g}{suffix}"
    return f"{number:.0f}"


def _table(rows: Sequence[Row], arms: Sequence[str]) -> list[list[str]]:
    """Header and a row an arm."""
    metric, baseline, unit = rows[0]["metric"], rows[0]["baseline"], rows[0]["unit"]
    decodes = rows[0]["state_size"] is not None
    head = ["arm", f"validation {metric}", f"minus {baseline} [95 % CI]", "parameters", f"FLOPs/{unit}", f"{unit}s/s"]
    table = [[*head, *(["decode state"] if decodes else []), "seeds"]]
    for arm in arms:
        done = _finished(rows, arm)
        some = next(row for row in rows if row["arm"] == arm)
        if not done:
            costs = [f"{some['parameters']:,}", _count(some["flops"]), ""]
            table.append([arm, "failed", "", *costs, *([""] if decodes else []), "0"])
            continue
        values = _by_seed(rows, arm)
        base = _by_seed(rows, baseline)
        if arm == baseline:
            difference = "baseline"
        elif set(values) & set(base):
            difference = _interval(paired_difference(values, base))
        else:
            difference = "no seed in common"
        table.append(
            [
                arm,
                _spread(list(values.values())),
                difference,
                f"{some['parameters']:,}",
                _count(some["flops"]),
                _count(float(np.mean([row["items_per_second"] for row in done]))),
                *([_count(some["state_size"])] if decodes else []),
                str(len(done)),
            ]
        )
    return table


def _markdown(table: Sequence[Sequence[str]]) -> str:
    head, *body = table
    lines = [head, ["---"] + ["---:"] * (len(head) - 1), *body]
    return "\n".join("| " + " | ".join(cells) + " |" for cells in lines)


def _note(rows: Sequence[Row]) -> str:
    """What the table's numbers mean and how they came about, in plain text."""
    row = rows[0]
    length = "" if row["state_size"] is None else f" Decode state: numbers kept to decode after {row['length']} tokens."
    return (
        f"{_better(row).capitalize()} is better. ±: standard deviation over seeds. Differences are paired by seed, "
        f"with Student's t interval. FLOPs: forward, matrix products only, 2 a multiply-add.{length}\n\n"
        f"{choices(rows)}{_shared(rows)}\n\nRepeat with: `{row['command']}`"
    )


def _shared(rows: Sequence[Row]) -> str:
    """How much of each arm starts from the baseline's very bits."""
    base = next(row for row in rows if row["arm"] == row["baseline"])["parameter_shapes"]
    parts = []
    for arm in _arms(rows):
        shapes = next(row for row in rows if row["arm"] == arm)["parameter_shapes"]
        if arm != rows[0]["baseline"]:
            same = sum(math.prod(shape) for path, shape in shapes.items() if base.get(path) == shape)
            share = same / sum(math.prod(shape) for shape in shapes.values())
            parts.append(f"{arm} {share:.1%}")
    together = ", ".join(parts)
    return (
        "Runs with one seed see the same batches in the same order. "
        + (f"Share of an arm's parameters that start from the baseline's very bits: {together}." if parts else "")
    ).strip()


def _svg(draw: Callable[[Any, Any], None], *, width: float, height: float, title: str) -> str:
    """A figure as SVG text for inlining. draw(figure, axes) fills it."""
    from matplotlib.figure import Figure

    style: Any = {
        "svg.fonttype": "none",
        "svg.hashsalt": title,
        "font.family": "sans-serif",
        "font.size": 10,
        "text.color": _INK,
        "axes.edgecolor": _INK,
        "axes.labelcolor": _INK,
        "axes.titlesize": 11,
        "axes.titleweight": "bold",
        "axes.titlelocation": "left",
        "axes.spines.top": False,
        "axes.spines.right": False,
        "xtick.color": _INK,
        "ytick.color": _INK,
        "legend.frameon": False,
    }
    with matplotlib.rc_context(style):
        figure = Figure(figsize=(width, height), layout="constrained")
        axes = figure.subplots()
        axes.set_title(title)
        draw(figure, axes)
        out = io.StringIO()
        figure.savefig(out, format="svg", transparent=True, metadata={"Date": None})
    text = out.getvalue()
    body = text[text.index("<svg") :].replace(_INK, "currentColor")
    return f'<figure role="img" aria-label="{html.escape(title)}">{body}</figure>'


def _curves(rows: Sequence[Row], arms: Sequence[str], split: str, metric: str) -> Callable[[Any, Any], None]:
    """A line a seed, thin, and the mean over seeds, thick."""

    def draw(figure: Any, axes: Any) -> None:
        for arm, colour in zip(arms, _colours(arms)):
            lines = [
                np.array([(point["step"], point[metric]) for point in row["history"] if point["split"] == split])
                for row in _finished(rows, arm)
            ]
            lines = [line for line in lines if len(line)]
            for line in lines:
                axes.plot(*line.T, color=colour, linewidth=0.8, alpha=0.4)
            if lines:
                steps = lines[0][:, 0]
                mean = np.mean([np.interp(steps, *line.T) for line in lines], axis=0)
                axes.plot(steps, mean, color=colour, linewidth=2, label=arm, marker="o" if len(steps) < 15 else None)
        axes.set_xlabel("step")
        axes.set_ylabel(f"{metric} (nats)" if metric == "loss" else metric)
        axes.grid(alpha=0.2)
        axes.legend()

    return draw


def _colours(arms: Sequence[str]) -> list[str]:
    return [COLOURS[index % len(COLOURS)] for index in range(len(arms))]


def _differences(rows: Sequence[Row], arms: Sequence[str], metric: str) -> Callable[[Any, Any], None]:
    """A dot a seed, and the mean with its interval, relative to the baseline."""
    baseline, side = rows[0]["baseline"], "right" if rows[0]["higher_is_better"] else "left"

    def draw(figure: Any, axes: Any) -> None:
        base = _by_seed(rows, baseline)
        others = [arm for arm in arms if arm != baseline and set(_by_seed(rows, arm)) & set(base)]
        for height, arm in enumerate(reversed(others)):
            values = _by_seed(rows, arm)
            colour = _colours(arms)[list(arms).index(arm)]
            dots = [values[seed] - base[seed] for seed in values if seed in base]
            difference = paired_difference(values, base)
            axes.plot(dots, [height] * len(dots), "o", color=colour, alpha=0.5, markersize=6)
            if not math.isnan(difference.low):
                axes.plot([difference.low, difference.high], [height, height], color=colour, linewidth=2)
            axes.plot([difference.mean], [height], "D", color=colour, markersize=8)
        axes.axvline(0, color=_INK, linewidth=1)
        axes.set_yticks(range(len(others)), list(reversed(others)))
        axes.set_ylim(-0.6, len(others) - 0.4)
        axes.set_xlabel(f"validation {metric} minus {baseline}'s ({side} is better)")
        axes.grid(alpha=0.2, axis="x")

    return draw


def _against_cost(rows: Sequence[Row], arms: Sequence[str], metric: str, cost: str) -> Callable[[Any, Any], None]:
    """A dot an arm: the metric's mean over seeds against a cost, in log scale."""

    def draw(figure: Any, axes: Any) -> None:
        for arm, colour in zip(arms, _colours(arms)):
            done = _finished(rows, arm)
            if done:
                mean = float(np.mean(list(_by_seed(rows, arm).values())))
                at = float(np.mean([row[cost] for row in done]))
                axes.plot([at], [mean], "o", color=colour, markersize=8)
                axes.annotate(arm, (at, mean), xytext=(0, 8), textcoords="offset points", ha="center")
        axes.set_xscale("log")
        axes.margins(0.25)
        axes.xaxis.set_major_locator(ticker.LogLocator(subs=(1, 2, 5)))
        axes.xaxis.set_major_formatter(lambda value, _: _count(value))
        axes.xaxis.set_minor_formatter(ticker.NullFormatter())
        names = {"state_size": "decode state (numbers kept)", "flops": f"FLOPs per {rows[0]['unit']}, forward"}
        axes.set_xlabel(names[cost])
        axes.set_ylabel(f"validation {metric}")
        axes.grid(alpha=0.2)

    return draw


def _by_group(rows: Sequence[Row], arms: Sequence[str], names: Sequence[str]) -> Callable[[Any, Any], None]:
    """A line an arm over the metric's groups, "accuracy, 4 pairs" and so on: means over seeds, a dot a seed."""

    def draw(figure: Any, axes: Any) -> None:
        for arm, colour in zip(arms, _colours(arms)):
            done = _finished(rows, arm)
            if done:
                values = np.array([[row["final"][name] for name in names] for row in done])
                axes.plot(values.mean(axis=0), color=colour, linewidth=2, label=arm)
                for line in values:
                    axes.plot(line, "o", color=colour, alpha=0.5, markersize=4)
        axes.set_xticks(range(len(names)), [name.partition(", ")[2] for name in names])
        axes.set_ylabel(names[0].partition(", ")[0])
        axes.grid(alpha=0.2)
        axes.legend()

    return draw


_STYLE = """
:root { color-scheme: light dark; --ink: #1c1c1e; --soft: #60646c; --line: #d8dbe0; --page: #ffffff; --card: #f6f7f9; }
@media (prefers-color-scheme: dark) {
  :root { --ink: #e8e8ea; --soft: #a0a4ab; --line: #3a3d42; --page: #17181a; --card: #202225; }
}
body { margin: 0 auto; padding: 2rem 1.25rem 4rem; max-width: 72rem; background: var(--page); color: var(--ink);
  font: 16px/1.5 system-ui, sans-serif; }
h1 { font-size: 1.6rem; line-height: 1.25; margin: 0 0 .5rem; } h2 { font-size: 1.15rem; margin: 2.25rem 0 .75rem; }
p.lead { font-size: 1.05rem; } .soft, caption { color: var(--soft); }
.scroll { overflow-x: auto; } table { border-collapse: collapse; width: 100%; font-variant-numeric: tabular-nums; }
th, td { padding: .4rem .55rem; font-size: .95rem; text-align: right; border-bottom: 1px solid var(--line);
  white-space: nowrap; }
th:first-child, td:first-child { text-align: left; } thead th { font-weight: 600; vertical-align: bottom; }
.figures { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 26rem), 1fr)); gap: 1rem; }
figure { margin: 0; padding: .75rem; background: var(--card); border-radius: .5rem; }
figure svg { width: 100%; height: auto; }
pre { background: var(--card); padding: .75rem; border-radius: .5rem; overflow-x: auto; font-size: .8rem; }
code { font-size: .9em; } summary { cursor: pointer; padding: .25rem 0; }
.swatch { display: inline-block; width: .7em; height: .7em; border-radius: 50%; margin-right: .5em; }
"""


def _verdict(rows: Sequence[Row], arms: Sequence[str]) -> str:
    """The answer in a sentence or two: which arms differ from the baseline beyond the interval."""
    metric, baseline = rows[0]["metric"], rows[0]["baseline"]
    base = _by_seed(rows, baseline)
    sentences = []
    for arm in arms:
        values = _by_seed(rows, arm)
        if arm == baseline or not set(values) & set(base):
            continue
        difference = paired_difference(values, base)
        size = f"{arm} ends {abs(difference.mean):.4f} {'below' if difference.mean < 0 else 'above'} {baseline}"
        if math.isnan(difference.low):
            sentences.append(f"{size} (one seed, so no interval).")
        elif difference.low <= 0 <= difference.high:
            more = ""
            if abs(difference.mean) > 0.1 * difference.deviation:  # else it takes more seeds than anybody runs
                needed = seeds_needed(difference.deviation, difference.mean)
                more = f"; if it is real, {needed} would in 4 of 5 repeats"
            sentences.append(f"{size}, but {difference.seeds} seeds cannot tell this from no difference{more}.")
        else:
            sentences.append(f"{size}, and the 95 % interval excludes no difference.")
    return f"Validation {metric}, {_better(rows[0])} is better: " + " ".join(sentences)


def _page(question: str, metric: str, rows: Sequence[Row], arms: Sequence[str], table: Sequence[Sequence[str]]) -> str:
    head, *body = table
    colours = dict(zip(arms, _colours(arms)))
    cells = "".join(
        "<tr>"
        + f'<td><span class="swatch" style="background:{colours[line[0]]}"></span>{html.escape(line[0])}</td>'
        + "".join(f"<td>{html.escape(cell)}</td>" for cell in line[1:])
        + "</tr>"
        for line in body
    )
    figures = [
        _svg(_curves(rows, arms, "validation", metric), width=5.6, height=3.8, title=f"Validation {metric}"),
        _svg(_curves(rows, arms, "train", metric), width=5.6, height=3.8, title=f"Training {metric}"),
    ]
    others = [arm for arm in arms if arm != rows[0]["baseline"] and _finished(rows, arm)]
    if others:
        figures.append(
            _svg(
                _differences(rows, arms, metric),
                width=5.6,
                height=max(3.2, 1.6 + 0.5 * len(others)),
                title=f"Difference to {rows[0]['baseline']}, paired by seed",
            )
        )
    cost, title = (
        ("flops", "Quality against compute")
        if rows[0]["state_size"] is None
        else ("state_size", "Quality against memory")
    )
    figures.append(_svg(_against_cost(rows, arms, metric, cost), width=5.6, height=3.2, title=title))
    groups = [name for name in next((row["final"] for row in rows if row["status"] == "finished"), {}) if ", " in name]
    if groups:
        figures.append(_svg(_by_group(rows, arms, groups), width=5.6, height=3.8, title="By group, at the end"))
    failures = "".join(
        f"<p>{html.escape(row['arm'])}, seed {row['seed']}, failed: {html.escape(row['error'])}</p>"
        for row in rows
        if row["status"] == "failed"
    )
    facts = {**rows[0]["environment"], **{f"data: {key}": value for key, value in rows[0]["task"].items()}}
    fact_rows = "".join(
        f"<tr><td>{html.escape(str(key))}</td><td>{html.escape(str(value))}</td></tr>" for key, value in facts.items()
    )
    configs = "".join(
        f"<details><summary>{html.escape(arm)}</summary><p>{'<br>'.join(map(html.escape, some['implementations']))}</p>"
        f"<pre>{html.escape(some['config'])}</pre></details>"
        for arm in arms
        for some in [next(row for row in rows if row["arm"] == arm)]
    )
    notes = "".join(f"<p class=soft>{html.escape(line)}</p>" for line in _note(rows).split("\n\n")[:-1])
    seconds = sum(row.get("seconds", 0.0) for row in rows)
    return f"""<!doctype html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">
<title>{html.escape(question)}</title><style>{_STYLE}</style></head><body>
<h1>{html.escape(question)}</h1>
<p class="lead">{html.escape(_verdict(rows, arms))}</p>
{failures}
<div class="scroll"><table><thead><tr>{"".join(f"<th>{html.escape(cell)}</th>" for cell in head)}</tr></thead>
<tbody>{cells}</tbody></table></div>
{notes}
<h2>Curves</h2>
<p class="soft">Thin lines are seeds, thick lines their mean.</p>
<div class="figures">{"".join(figures)}</div>
<h2>Repeat it</h2>
<pre>{html.escape(rows[0]["command"])}</pre>
<p class="soft">{len(rows)} runs, {seconds:.0f} seconds of training and evaluation in all, on the machine below.</p>
<h2>What ran</h2>
{configs}
<details><summary>machine, versions and data</summary>
<div class="scroll"><table><tbody>{fact_rows}</tbody></table></div></details>
</body></html>
"""
