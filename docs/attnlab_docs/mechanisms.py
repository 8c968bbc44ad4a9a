"""The catalog's mechanisms: their pages, and who sees whom in every row, read off the mechanism itself."""

import functools
import html
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np

from attnlab import catalog
from attnlab_docs.links import DOCS

PAGES = DOCS / "mechanisms"
LENGTH = 24


class Page(NamedTuple):
    """A mechanism's page: title, idea (its first paragraph), and texts by heading."""

    name: str
    title: str
    idea: str
    sections: dict[str, str]


def names() -> list[str]:
    """Mechanisms: what is before the comma in the names of the catalog's rows."""
    return list(dict.fromkeys(row.partition(",")[0] for row in catalog.MECHANISMS))


def rows(mechanism: str) -> Iterator[tuple[str, catalog.Mechanism]]:
    for name, row in catalog.MECHANISMS.items():
        if name.partition(",")[0] == mechanism:
            yield name, row


def path_of(mechanism: str) -> Path:
    return PAGES / f"{mechanism}.md"


def read(mechanism: str) -> Page:
    text = path_of(mechanism).read_text()
    head, *rest = re.split(r"^## (.*)\n", text, flags=re.MULTILINE)
    title, idea = re.findall(r"\A# (.*)\n\n((?:.+\n)+)", head)[0]
    return Page(mechanism, title, " ".join(idea.split()), dict(zip(rest[::2], rest[1::2])))


@functools.cache
def weights(name: str) -> np.ndarray:
    return weights_of(catalog.MECHANISMS[name], LENGTH, {})


def weights_of(row: catalog.Mechanism, length: int, options: dict[str, Any], **sizes: int) -> np.ndarray:
    """What each query of one head takes of each key's value, [T, S]: how far its output goes with the value, which of
    all but memories is the same at any value."""
    arrays = row.inputs(length, batch=1, heads=1, value_dim=1, **sizes)

    def moved(by: jax.Array) -> jax.Array:
        value = arrays["value"]
        return row({**arrays, "value": value + by.reshape(value.shape)}, "reference", **options).reshape(length)

    return np.asarray(jax.jit(jax.jacfwd(moved))(np.zeros(length, np.float32)))


def space(name: str, length: int = LENGTH) -> tuple[int, ...]:
    return catalog.MECHANISMS[name].inputs(length, batch=1, heads=1)["query"].shape[1:-2]


def pictures(page: str, mechanism: str) -> str:
    figures = "".join(_figure(name, row) for name, row in rows(mechanism))
    shown = (
        f"Rows are queries and columns keys, of {LENGTH} positions and one head with random inputs. The stronger the"
        " colour, the larger the weight beside the query's largest; blue adds the value, orange subtracts it, and what"
        " is empty is not seen."
    )
    return f'<div class="who-row">{figures}</div>\n\n<p class="who-note">{shown}</p>\n'


def _figure(name: str, row: catalog.Mechanism) -> str:
    size, seen = weights(name), np.abs(weights(name)) > 1e-9
    call = ", ".join(f"{option}={value!r}" for option, value in row.options.items())
    call = html.escape(f"{row.function.__name__}({call})")
    grid = space(name)
    parts = [_matrix(size, f"{name}: who sees whom")]
    if len(grid) > 1:
        middle = int(np.ravel_multi_index([n // 2 for n in grid], grid))
        parts.append(_matrix(size[middle].reshape(grid), f"{name}: keys of one query in place", mark=middle, cell=16))
    keys = f"{seen.sum() / len(seen):.1f} of {len(seen)} keys per query"
    note = f"; right: one query of {' x '.join(map(str, grid))} places" if len(grid) > 1 else ""
    caption = f"<b>{html.escape(name)}</b>: {keys}{note}<br><code>{call}</code>"
    return f'<figure class="who">{"".join(parts)}<figcaption>{caption}</figcaption></figure>'


def _matrix(size: np.ndarray, title: str, mark: int | None = None, cell: int = 8) -> str:
    """An SVG that takes its colours from the page. mark: the number of a cell to draw a ring in."""
    height, width = (cell * n for n in size.shape)
    largest = np.maximum(np.abs(size).max() if mark is not None else np.abs(size).max(axis=1, keepdims=True), 1e-30)
    shade = np.abs(size) / largest
    cells = []
    for y, x in np.argwhere(np.abs(size) > 1e-9):
        sign = "plus" if size[y, x] > 0 else "minus"
        opacity = 0.15 + 0.85 * float(shade[y, x])
        cells.append(f'<rect class="{sign}" x="{cell * x}" y="{cell * y}" fill-opacity="{opacity:.2f}"/>')
    if mark is not None:
        y, x = divmod(mark, size.shape[1])
        cells.append(f'<circle cx="{cell * x + cell / 2}" cy="{cell * y + cell / 2}" r="{cell / 3}"/>')
    body = "".join(cells).replace("/>", f' width="{cell}" height="{cell}"/>', len(cells) - (mark is not None))
    frame = f'<path class="frame" d="M0 0H{width}V{height}H0Z"/>'
    view = f'viewBox="-1 -1 {width + 2} {height + 2}" width="{width + 2}"'
    return f'<svg {view} role="img"><title>{html.escape(title)}</title>{body}{frame}</svg>'


def cards(page: str) -> str:
    """A card for each mechanism: picture of its first row, title and the first sentence of its idea."""
    items = []
    up = "" if page.startswith("mechanisms/") else "mechanisms/"
    for mechanism in names():
        text, (name, _) = read(mechanism), next(rows(mechanism))
        functions = dict.fromkeys(row.function.__name__ for _, row in rows(mechanism))
        called = ", ".join(f"<code>{function}</code>" for function in functions)
        sentence = html.escape(re.split(r"(?<=\.)\s", text.idea)[0])
        picture = _matrix(weights(name), f"{name}: who sees whom", cell=4)
        items.append(
            f'<a class="card" href="{up}{mechanism}.html">{picture}<span><b>{html.escape(text.title)}</b>'
            f"<br>{called}<br>{sentence}</span></a>"
        )
    return f'<div class="cards">{"".join(items)}</div>\n'
