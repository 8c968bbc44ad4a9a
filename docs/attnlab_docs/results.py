"""The gallery: every folder of experiments/results with its question, what came out, and its pictures."""

import re
from pathlib import Path
from typing import NamedTuple

from attnlab_docs import links

RESULTS = links.ROOT / "experiments" / "results"


class Result(NamedTuple):
    """A row of experiments/results/README.md. anchor: the path that it links to."""

    name: str
    anchor: str
    question: str
    command: str
    outcome: str


def results() -> list[Result]:
    rows = re.findall(
        r"^\| \[(.+?)\]\((.+?)\) \| (.+?) \| (.+?) \| (.+) \|$", (RESULTS / "README.md").read_text(), re.MULTILINE
    )
    return [Result(*row) for row in rows]


def pictures(folder: Path) -> list[str]:
    """Pictures in a folder, else the first of its report's curves, as HTML."""
    files = sorted(folder.glob("*.png"))
    if files:
        return [f'<img src="{{up}}{_copied(file)}" alt="{file.stem}">' for file in files]
    report = folder / "report.html"
    return first_pictures(report.read_text()) if report.exists() else []


def first_pictures(report: str) -> list[str]:
    """Of a report's page: the first pictures below the headings of curves and of quality against cost."""
    found = []
    for heading in ("Curves", "Quality against cost"):
        part = report.partition(f">{heading}</h2>")[2].partition("<h2")[0]
        for picture in re.findall(r"<svg\b.*?</svg>", part, re.DOTALL)[:1]:
            found.append(f"{picture}<p>{heading}</p>")
    return found


def first_table(text: str) -> str:
    return next(iter(re.findall(r"(?:^\|.*\n?)+", text, re.MULTILINE)), "").strip()


def gallery(page: str) -> str:
    up = "../" * page.count("/")
    parts, drawn = [], set()
    for result in results():
        file = RESULTS / result.anchor
        parts += [f"## {result.name}", "", f"**{result.question[0].upper()}{result.question[1:]}**", ""]
        if file.parent not in drawn:
            shown = "".join(f"<div>{picture}</div>" for picture in pictures(file.parent)).replace("{up}", up)
            parts += [f'<div class="gallery">{shown}</div>', ""] if shown else []
        drawn.add(file.parent)
        outcome = _moved(result.outcome)
        parts += [f"{outcome[0].upper()}{outcome[1:]}.", "", f"Repeat it: {_moved(result.command)}", ""]
        report = file.with_name("report.html")
        is_page = f"experiments/results/{result.anchor}" in links.PAGES
        parts += [] if is_page else [first_table(file.read_text()), ""]
        seen = [f"[{'All of it' if is_page else 'All tables, as text'}](../../experiments/results/{result.anchor})"]
        if report.exists():
            address = up + _copied(report)
            seen.append(f'<a href="{address}">report with curves, attention and configs</a>')
        parts += [", ".join(seen) + ".", ""]
    return "\n".join(parts)


def _copied(file: Path) -> str:
    return links.copy(file.relative_to(links.ROOT).as_posix())


def _moved(text: str) -> str:
    """Links of experiments/results/README.md, seen from docs/results."""
    return re.sub(r"\]\((?![a-z]+:)([^()]+)\)", r"](../../experiments/results/\1)", text)
