"""The report as one HTML page: no address in it is followed, and it takes the reader's light or dark."""

import html
import math
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import attnlab.ablate.figures as figures
from attnlab.ablate.attending import TEMPERATURE, read_attending, unpacked
from attnlab.ablate.results import (
    Row,
    arms_of,
    attended,
    by_seed,
    costs,
    finished,
    first_row,
    mean_over_layers,
    printable,
    settings,
    weighed,
)
from attnlab.train import store

# Texts are escaped, since a run's folder may be somebody else's. Should one slip through, it runs and loads nothing.
_POLICY = "default-src 'none'; img-src data:; style-src 'unsafe-inline'"
_STYLE = """
:root { color-scheme: light dark; --ink: #1c1c1e; --soft: #60646c; --line: #d8dbe0; --page: #ffffff; --card: #f6f7f9;
  --shade: #0003; }
@media (prefers-color-scheme: dark) {
  :root { --ink: #e8e8ea; --soft: #a0a4ab; --line: #3a3d42; --page: #17181a; --card: #202225;
    --shade: #fff4; }
}
* { box-sizing: border-box; }
body { margin: 0 auto; padding: 2rem 1rem 4rem; max-width: 76rem; background: var(--page); color: var(--ink);
  font: 16px/1.5 system-ui, sans-serif; }
h1 { font-size: 1.6rem; line-height: 1.25; margin: 0 0 .5rem; }
h1, h3, p, li, summary, figcaption { overflow-wrap: anywhere; } h2 { font-size: 1.2rem; margin: 2.5rem 0 .5rem; }
h3 { font-size: 1rem; margin: .75rem 0 .25rem; } h3 + p { margin: 0 0 .5rem; }
p, ul { max-width: 56rem; } .lead { font-size: 1.05rem; } .soft { color: var(--soft); font-size: .92rem; }
/* Shadows show on which side a table scrolls on: those at its ends are covered by what moves along with it. */
.scroll { overflow-x: auto; background: linear-gradient(to right, var(--page) 40%, transparent) local,
  linear-gradient(to left, var(--page) 40%, transparent) right local,
  linear-gradient(to right, var(--shade), transparent), linear-gradient(to left, var(--shade), transparent) right;
  background-repeat: no-repeat; background-size: 2rem 100%, 2rem 100%, .8rem 100%, .8rem 100%; }
table { border-collapse: collapse; width: 100%; font-variant-numeric: tabular-nums; }
th, td { padding: .4rem .55rem; font-size: .95rem; text-align: right; border-bottom: 1px solid var(--line);
  white-space: nowrap; }
.scroll + .scroll { margin-top: 1rem; }
th:first-child, td:first-child { text-align: left; }
thead th { font-weight: 600; vertical-align: bottom; white-space: normal; }
td:first-child { white-space: normal; overflow-wrap: anywhere; }
table.arms td:first-child { min-width: var(--names); }
.arm { display: inline-flex; align-items: baseline; } .swatch { flex: none; }
table.facts td { text-align: left; } table.facts td:last-child { white-space: normal; overflow-wrap: anywhere; }
.figures { display: grid; grid-template-columns: repeat(auto-fill, minmax(min(100%, 21rem), 1fr)); gap: 1rem; }
figure { margin: 0; padding: .75rem; background: var(--card); border-radius: .5rem; min-width: 0; }
figcaption { font-size: .9rem; font-weight: 600; margin-bottom: .4rem; }
figure div svg { display: block; width: 100%; height: auto; }
figure svg text { paint-order: stroke; stroke: var(--card); stroke-width: 3px; stroke-linejoin: round; }
.figures > section { min-width: 0; }
.maps { display: flex; flex-wrap: wrap; gap: .75rem; }
.maps figure { padding: .5rem; width: 9.5rem; }
.maps figcaption { font-weight: 400; font-size: .8rem; margin: .3rem 0 0; }
img { display: block; image-rendering: pixelated; width: 100%; max-width: 24rem; height: auto; }
img.small { max-width: 12rem; }
pre { background: var(--card); padding: .75rem; border-radius: .5rem; overflow-x: auto; font-size: .8rem; margin: 0; }
pre.text { white-space: pre-wrap; overflow-wrap: anywhere; max-height: 12rem; overflow-y: auto; }
details p { max-width: none; overflow-wrap: anywhere; } summary { cursor: pointer; padding: .25rem 0; }
.swatch { width: 1.6rem; height: .8rem; margin-right: .5rem; vertical-align: -.05rem; }
"""


def page(
    rows: Sequence[Row],
    workdir: Path,
    *,
    verdict: Sequence[str],
    table: Sequence[Sequence[str]],
    metrics: Sequence[Sequence[str]],
    notes: Sequence[str],
) -> str:
    """The whole page.

    Args:
      workdir: where the runs' folders are.
      verdict: what is compared, and one sentence per arm. table: header and one row per arm, the arm's name first.
        metrics: the same of further metrics, or empty. notes: paragraphs. All of these are plain text.
    """
    arms = arms_of(rows)
    looks = figures.styles(arms)
    question = html.escape(rows[0]["question"])
    failures = "".join(
        f"<p>{html.escape(row['arm'])}, seed {html.escape(str(row['seed']))}, failed: {html.escape(row['error'])}</p>"
        for row in rows
        if row["status"] == "failed"
    )
    return f"""<!doctype html>
<html lang="en"><head><meta charset="utf-8">
<meta http-equiv="Content-Security-Policy" content="{_POLICY}">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{question}</title><style>{_STYLE}{figures.dark_style()}</style></head><body>
<h1>{question}</h1>
{_verdict(verdict)}
{failures}
{_table(table, looks)}
{_table(metrics, looks)}
{"".join(f'<p class="soft">{html.escape(note)}</p>' for note in notes)}
{_curves(rows, looks)}
{_against_costs(rows, looks)}
{_attending(rows, workdir, looks)}
{_samples(rows, workdir, looks)}
<h2>Repeat it</h2>
<pre>{html.escape(rows[0]["command"])}</pre>
<p class="soft">{len(rows)} runs, {sum(row.get("seconds", 0.0) for row in rows):.0f} seconds of training and evaluation
in all, on the machine below.</p>
<h2>What ran</h2>
{_what_ran(rows)}
</body></html>
"""


def _verdict(sentences: Sequence[str]) -> str:
    if len(sentences) < 3 or len(" ".join(sentences)) < 240:
        return f'<p class="lead">{html.escape(" ".join(sentences))}</p>'
    lines = "".join(f"<li>{html.escape(sentence)}</li>" for sentence in sentences[1:])
    return f'<p class="lead">{html.escape(sentences[0])}</p><ul>{lines}</ul>'


def _table(table: Sequence[Sequence[str]], looks: Mapping[str, figures.Style]) -> str:
    """A header and one row per arm; nothing for an empty table."""
    if not table:
        return ""
    head, *body = table
    lines = "".join(f"<tr><td>{_named(line[0], looks)}</td>{_cells('td', line[1:])}</tr>" for line in body)
    # Letters are wider than a digit, and a swatch is as wide as four.
    style = f"--names: {6 + min(40, 1.15 * max(len(line[0]) for line in body)):.0f}ch"
    return f"""<div class="scroll" tabindex="0"><table class="arms" style="{style}">
<thead><tr>{_cells("th", head)}</tr></thead>
<tbody>{lines}</tbody></table></div>"""


def _cells(tag: str, texts: Sequence[str]) -> str:
    return "".join(f"<{tag}>{html.escape(text)}</{tag}>" for text in texts)


def _named(arm: str, looks: Mapping[str, figures.Style]) -> str:
    return f'<span class="arm">{figures.swatch(looks[arm])}<span>{html.escape(arm)}</span></span>'


def _section(arm: str, looks: Mapping[str, figures.Style], content: str) -> str:
    return f"<section><h3>{_named(arm, looks)}</h3>{content}</section>"


def _curves(rows: Sequence[Row], looks: dict[str, figures.Style]) -> str:
    metric, baseline = rows[0]["metric"], rows[0]["baseline"]
    drawn = [
        figures.svg(figures.curves(rows, looks, "validation", metric), title=f"Validation {metric}"),
        figures.svg(figures.curves(rows, looks, "train", metric), title=f"Training {metric}"),
    ]
    base = by_seed(rows, baseline)
    others = [arm for arm in looks if arm != baseline and set(by_seed(rows, arm)) & set(base)]
    if others:
        draw = figures.differences(rows, looks, metric, others)
        title = f"Difference to {baseline}, paired by seed"
        drawn.append(figures.svg(draw, title=title, height=max(2.4, 1.2 + 0.27 * len(others))))
    drawn += [
        figures.svg(
            figures.by_setting(rows, looks, metric, option, families), title=f"{metric.capitalize()} by {option}"
        )
        for option, families in settings([arm for arm in looks if finished(rows, arm)]).items()
    ]
    drawn += _by_group(rows, looks)
    seeds = '<p class="soft">Thin lines and small dots are seeds, thick lines and diamonds their means.</p>'
    return f'<h2>Curves</h2>{seeds}<div class="figures">{"".join(drawn)}</div>'


def _by_group(rows: Sequence[Row], looks: dict[str, figures.Style]) -> list[str]:
    """A figure for every metric reported by group, as "accuracy, 4 pairs"; those that no arm changes are references."""
    finals = [row["final"] for row in rows if row["status"] == "finished"]
    families: dict[str, list[str]] = {}
    for name in finals[0] if finals else ():
        if ", " in name:
            families.setdefault(name.partition(", ")[0], []).append(name)
    for names in families.values():  # a line goes from number to number
        names.sort(key=lambda name: [int(number) for number in re.findall(r"\d+", name)])

    def is_fixed(names: list[str]) -> bool:
        first = finals[0]
        return all(math.isclose(final[n], first[n], rel_tol=1e-5, abs_tol=1e-6) for final in finals for n in names)

    changing = {family: names for family, names in families.items() if not is_fixed(names)} or families
    references = [names for family, names in families.items() if family not in changing]
    return [
        figures.svg(
            figures.by_group(rows, looks, names, references), title=f"{family.capitalize()} by group, at the end"
        )
        for family, names in changing.items()
    ]


def _against_costs(rows: Sequence[Row], looks: dict[str, figures.Style]) -> str:
    if not any(finished(rows, arm) for arm in looks):
        return ""
    drawn = "".join(
        figures.svg(
            figures.against_cost(rows, looks, rows[0]["metric"], cost), title=f"Quality against {cost.name}", height=3.6
        )
        for cost in costs(rows)
        if weighed(rows, cost)
    )
    timed = (
        " Level bars: quartiles of speed, in which arms tie unless one is faster in all rounds but one."
        if any(cost.column == "speed" for cost in costs(rows))
        else ""
    )
    return f"""<h2>Quality against cost</h2>
<p class="soft">One dot per arm, the mean over seeds; the bar is their standard deviation. Dashed: the Pareto front.
Arms on it are in bold; every other one is beaten or equalled in both by one of them.{timed}</p>
<div class="figures">{drawn}</div>"""


def _attending(rows: Sequence[Row], workdir: Path, looks: dict[str, figures.Style]) -> str:
    """What each arm attends to; nothing where no row has it."""
    kept: dict[str, dict[str, Any]] = {}
    parts = []
    for arm in looks:
        row = attended(rows, arm)
        if row is not None and (found := read_attending(store.found(row["folder"], workdir))) is not None:
            kept[arm] = found
            distance, entropy = (mean_over_layers(row, name) for name in ("distance", "entropy"))
            text = "sees nothing" if distance is None else f"mean distance {distance:.2f}, entropy {entropy:.2f} nats"
            maps = "".join(_layer_maps(number, layer) for number, layer in enumerate(found["layers"]))
            parts.append(_section(arm, looks, f'<p class="soft">{text}</p><div class="maps">{maps}</div>'))
            continue
        reasons = [skipped for row in finished(rows, arm) if (skipped := row.get("attending", {}).get("skipped"))]
        parts += [_section(arm, looks, f'<p class="soft">{html.escape(reason)}</p>') for reason in reasons]
    if not parts:
        return ""
    drawn = ""
    if kept:
        for name, title, label in (
            ("distance", "Mean attention distance", "distance in positions"),
            ("entropy", "Entropy of the attention", "entropy (nats)"),
        ):
            heads = {arm: [layer[name] for layer in found["layers"]] for arm, found in kept.items()}
            drawn += figures.svg(figures.by_layer(looks, heads, label), title=f"{title} by layer")
    example = _example(next(iter(kept.values()))["example"]) if kept else ""
    signed = [arm for arm, found in kept.items() if any(layer["is_signed"] for layer in found["layers"])]
    size = f" Some weights of {', '.join(signed)} are negative; their size is shown." if signed else ""
    return f"""<h2>What each mechanism attends to</h2>
<p class="soft">In the first validation example, after the last step of the first seed. Maps by layer, means over heads:
queries from top to bottom, keys from left to right, images in raster order; and, of images, what the position in
the middle sees. Yellow is a query's largest weight, dark a small one, blank none.{html.escape(size)} Small dots in the
figures are heads.</p>
<div class="figures">{example}{drawn}</div>
<div class="figures">{"".join(parts)}</div>"""


def _layer_maps(number: int, layer: Mapping[str, Any]) -> str:
    name = f"layer {number}"
    maps = [(layer["map"], html.escape(f"{name}: {layer['mixer']}"))]
    if "middle" in layer:
        maps.append((layer["middle"], f"{name}: from the middle"))
    return "".join(
        f'<figure><img alt="" src="{figures.weights_png(unpacked(packed))}"><figcaption>{caption}</figcaption></figure>'
        for packed, caption in maps
    )


def _example(example: Mapping[str, Any]) -> str:
    if "pixels" in example:
        shown = f'<img class="small" alt="" src="{figures.png(unpacked(example["pixels"]))}">'
    else:
        shown = f'<pre class="text">{html.escape(example["text"])}</pre>'
    return f"<figure><figcaption>The example</figcaption>{shown}</figure>"


def _samples(rows: Sequence[Row], workdir: Path, looks: dict[str, figures.Style]) -> str:
    """What the arms make by themselves, of the first seed that has something; nothing if none has."""
    parts, prompt = [], ""
    for arm in looks:
        for row in finished(rows, arm):
            if "folder" not in row:  # of an older version, which kept no samples
                continue
            folder = store.found(row["folder"], workdir)
            shown = ""
            if (picture := folder / "samples.png").is_file():
                address = figures.data_address(picture.read_bytes())
                shown += f'<p><img alt="samples of {html.escape(arm)}" src="{address}"></p>'
            if (text := folder / "samples.txt").is_file():
                shown += f'<pre class="text">{html.escape(printable(text.read_text("utf-8", errors="replace")))}</pre>'
                prompt = prompt or (read_attending(folder) or {}).get("prompt", "")
            if shown:
                parts.append(_section(arm, looks, f'<p class="soft">seed {html.escape(str(row["seed"]))}</p>{shown}'))
                break
    if not parts:
        return ""
    before = ""
    if prompt:
        before = f"""<p class="soft">Each text continues this beginning of the first validation example, at
temperature {TEMPERATURE}.</p><pre class="text">{html.escape(prompt)}</pre>"""
    return f'<h2>Samples</h2>{before}<div class="figures">{"".join(parts)}</div>'


def _what_ran(rows: Sequence[Row]) -> str:
    """The resolved config of each arm, with the implementation that ran; machine, versions and data."""
    configs = ""
    for arm in arms_of(rows):
        row = first_row(rows, arm)
        ran = "<br>".join(map(html.escape, row["implementations"])) or "no attention of attnlab's"
        config = html.escape(row["config"])
        configs += f"<details><summary>{html.escape(arm)}</summary><p>{ran}</p><pre>{config}</pre></details>"
    facts = {**rows[0]["environment"], **{f"data: {name}": value for name, value in rows[0]["task"].items()}}
    lines = "".join(f"<tr>{_cells('td', [str(name), str(value)])}</tr>" for name, value in facts.items())
    return f"""{configs}
<details><summary>machine, versions and data</summary>
<div class="scroll"><table class="facts"><tbody>{lines}</tbody></table></div></details>"""
