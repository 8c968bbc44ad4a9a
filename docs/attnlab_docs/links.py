"""Links from pages into the repository, and files of the repository as pages."""

import os
import posixpath
import re
import shutil
from collections.abc import Callable
from pathlib import Path

DOCS = Path(__file__).resolve().parents[1]
ROOT = DOCS.parent
# Files of the repository that are (part of) a page: the page, and the heading in it.
PAGES = {
    "README.md": "index",
    "CONTRIBUTING.md": "guides/adding_a_mechanism",
    "kernels_pallas/README.md": "guides/kernels",
    "experiments/results/README.md": "results/index",
    "experiments/results/bench/bench.md": "results/lengths",
    "experiments/results/bench/h100.md": "results/h100",
    "experiments/results/bench/peers.md": "results/peers",
    "experiments/results/bench/prompts.md": "results/prompts",
    "experiments/results/pods/compiled.md": "results/pods",
    "experiments/results/regress/regression.md": "results/regression",
}
_LINK = re.compile(r"(!?)\[([^\[\]]*)\]\(([^()\s]+)\)")
_copied: set[str] = set()


def included(page: str, file: str) -> str:
    """A file of the repository as this page's text, its links seen from here."""
    text = (ROOT / file).read_text()
    folder = posixpath.dirname(file)
    here = posixpath.join("docs", posixpath.dirname(page))

    def moved(match: re.Match[str]) -> str:
        bang, label, target = match.groups()
        if re.match(r"[a-z]+:|#", target):
            return match[0]
        path, _, anchor = target.partition("#")
        path = posixpath.relpath(posixpath.join(folder, path), here)
        return f"{bang}[{label}]({path}{'#' + anchor if anchor else ''})"

    return _outside_code(text, lambda part: _LINK.sub(moved, part))


def rewritten(text: str, path: Path, page: str) -> str:
    """Links that lead out of docs/, to another page that has the file in it, or to a copy of it."""

    def moved(match: re.Match[str]) -> str:
        bang, label, target = match.groups()
        if bang or re.match(r"[a-z]+:|#", target):
            return match[0]
        file, _, _anchor = target.partition("#")
        full = Path(os.path.normpath(path.parent / file))
        name = full.relative_to(ROOT).as_posix() if full.is_relative_to(ROOT) else None
        if name is None or not full.exists():
            return match[0]  # Sphinx says what is wrong with it
        if PAGES.get(name, page) != page:
            return f"[{label}](/{PAGES[name]}.md)"
        if full.is_relative_to(DOCS):
            return match[0]
        _copied.add(name)
        up = "../" * page.count("/")
        shown = label.replace("`", "")
        return f'<a href="{up}files/{copy_name(name)}">{shown}</a>'

    return _outside_code(text, lambda part: _LINK.sub(moved, part))


def copy_name(name: str) -> str:
    """Of a copied file. What browsers do not show as text is called .txt; a folder is a list of its files."""
    if (ROOT / name).is_dir():
        return f"{name}/index.html"
    return name if name.endswith((".html", ".png", ".csv")) else f"{name}.txt"


def copy(name: str) -> str:
    """Has a file of the repository copied; gives its address seen from the site's root."""
    _copied.add(name)
    return f"files/{copy_name(name)}"


def copy_files(out: Path) -> None:
    for name in sorted(_copied):
        target = out / "files" / copy_name(name)
        target.parent.mkdir(parents=True, exist_ok=True)
        if not (ROOT / name).is_dir():
            shutil.copyfile(ROOT / name, target)
            continue
        files = sorted(file for file in (ROOT / name).iterdir() if file.is_file())
        for file in files:
            shutil.copyfile(file, out / "files" / copy_name(file.relative_to(ROOT).as_posix()))
        items = "".join(f'<li><a href="{Path(copy_name(f"{name}/{f.name}")).name}">{f.name}</a></li>' for f in files)
        target.write_text(f"<!doctype html><meta charset=utf-8><title>{name}</title><h1>{name}</h1><ul>{items}</ul>\n")


def _outside_code(text: str, change: Callable[[str], str]) -> str:
    """Applied to what is in no fenced block."""
    parts = re.split(r"(^ *```.*?^ *```\s*?$)", text, flags=re.MULTILINE | re.DOTALL)
    return "".join(part if index % 2 else change(part) for index, part in enumerate(parts))
