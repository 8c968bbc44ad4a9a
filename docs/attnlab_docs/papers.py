"""The table of papers, made from the lists at the ends of pages."""

import re
from typing import NamedTuple

from attnlab_docs import mechanisms
from attnlab_docs.links import DOCS

_ITEM = re.compile(
    r"^- \*(?P<title>[^*]+)\* \((?P<authors>[^()]+) (?P<year>\d{4})\):\s+(?P<what>(?:.+\n?(?:  .+\n?)*))", re.M
)


class Paper(NamedTuple):
    """authors: "Roy et al." what: which of it is here. page: the page that names it."""

    title: str
    authors: str
    year: int
    what: str
    page: str


def papers() -> list[Paper]:
    """By year, then by title; one that several pages name is there once for each."""
    pages = [f"mechanisms/{name}" for name in mechanisms.names()] + ["guides/masks", "guides/models_and_tasks"]
    found = []
    for page in pages:
        text = (DOCS / f"{page}.md").read_text().partition("\n## Papers\n")[2]
        for match in _ITEM.finditer(text):
            what = " ".join(match["what"].split())
            found.append(Paper(match["title"], match["authors"], int(match["year"]), what, page))
    return sorted(found, key=lambda paper: (paper.year, paper.title))


def table(page: str) -> str:
    lines = ["| year | paper | what of it is here |", "|---|---|---|"]
    for paper in papers():
        title = re.findall(r"\A# (.*)\n", (DOCS / f"{paper.page}.md").read_text())[0]
        lines.append(f"| {paper.year} | *{paper.title}*, {paper.authors} | {paper.what}: [{title}](/{paper.page}.md) |")
    return "\n".join(lines) + "\n"
