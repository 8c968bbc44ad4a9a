"""The documentation: its pages are whole, its code runs, its links lead somewhere. What builds the site needs the extra
"docs"."""

import html.parser
import inspect
import os
import re
import shlex
import subprocess
import sys
import urllib.parse
from pathlib import Path

import numpy as np
import pytest
from attnlab_docs import (
    GENERATORS,
    api,
    docstrings,
    explorer,
    generated,
    links,
    mathematics,
    mechanisms,
    papers,
    results,
)
from marks import slow_but

import attnlab
from attnlab import catalog, cli, config, masks, nn, train

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"

PAGES = {page.relative_to(DOCS).with_suffix("").as_posix(): page for page in sorted(DOCS.rglob("*.md"))}
HEADINGS = [
    "Formula",
    "When to use it",
    "Cost",
    "Limits",
    "Beside other implementations",
    "What users trip over",
    "Example",
    "Papers",
]


def blocks(text, language):
    """What stands in fenced blocks of this language."""
    return re.findall(rf"^```{language}\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)


def run_blocks(text, name):
    """All Python of a page, one block after the other."""
    names = {"__name__": "docs"}
    for block in blocks(text, "python"):
        exec(compile(block, name, "exec"), names)


# Pages of mechanisms.


@pytest.mark.parametrize("mechanism", mechanisms.names())
def test_every_mechanism_of_the_catalog_has_a_whole_page(mechanism):
    page = mechanisms.read(mechanism)
    assert list(page.sections) == HEADINGS
    assert all(text.strip() for text in page.sections.values())
    text = mechanisms.path_of(mechanism).read_text()
    assert f"```{{generated}} pictures {mechanism}\n```" in text
    assert "$$" in page.sections["Formula"]
    assert len(blocks(page.sections["Example"], "python")) == 1
    functions = {row.function.__name__ for _, row in mechanisms.rows(mechanism)}
    assert all(f"attnlab.{function}(" in page.sections["Example"] for function in functions)


def test_every_page_of_a_mechanism_is_of_one_of_the_catalog():
    assert {page.stem for page in mechanisms.PAGES.glob("*.md")} == {*mechanisms.names(), "index"}


@pytest.mark.parametrize("row", slow_but(["local, causal", "linear, delta rule"], list(catalog.MECHANISMS)))
def test_pictures_are_of_what_the_mechanism_computes(row):
    """By as much as the weights say, what it gives moves with its values."""
    mechanism = catalog.MECHANISMS[row]
    arrays = mechanism.inputs(mechanisms.LENGTH, batch=1, heads=1, value_dim=1)
    by = 0.05 * np.random.default_rng(1).normal(size=arrays["value"].shape).astype(np.float32)
    less, more = (
        mechanism({**arrays, "value": arrays["value"] + sign * by}, implementation="reference") for sign in (-1, 1)
    )
    np.testing.assert_allclose(2 * mechanisms.weights(row) @ by.ravel(), np.ravel(more - less), rtol=0, atol=2e-5)


def test_a_picture_has_a_cell_for_each_key_that_is_seen():
    picture = mechanisms.pictures("mechanisms/local", "local")
    seen = sum((np.abs(mechanisms.weights(row)) > 1e-9).sum() for row, _ in mechanisms.rows("local"))
    of_one_query = 3 * 4
    assert picture.count("<rect") == seen + of_one_query
    assert "local_attention(window=5, is_causal=True)" in picture


# Code.


@pytest.mark.parametrize("page", slow_but(
    ["mechanisms/local", "mechanisms/inline", "guides/statistics", "guides/masks", "guides/own_mixer"],
    [name for name, page in PAGES.items() if blocks(page.read_text(), "python")],
))  # fmt: skip
def test_the_code_of_a_page_runs(page):
    run_blocks(PAGES[page].read_text(), page)


@pytest.mark.long
def test_the_readme_s_first_example_runs():
    run_blocks(blocks((ROOT / "README.md").read_text(), "python")[0].join(["```python\n", "```\n"]), "README.md")


@pytest.mark.parametrize(
    "file", slow_but(["explain", "local_decoding"], sorted(file.stem for file in api.EXAMPLES.glob("*.py")))
)
def test_an_example_of_the_api_runs(file):
    exec(compile((api.EXAMPLES / f"{file}.py").read_text(), file, "exec"), {"__name__": "docs"})


COMMANDS = {
    (name, line.partition("  #")[0].rstrip())
    for name, page in PAGES.items()
    for block in blocks(page.read_text(), "sh")
    for line in block.splitlines()
    if re.match(r"(\.venv/bin/)?attnlab ", line) and not line.endswith("\\")
}


@pytest.mark.parametrize(("page", "command"), sorted(COMMANDS))
def test_a_command_of_a_page_is_one(page, command):
    """Its options are known, and the configs that come with attnlab are there."""
    _, given, _ = cli._parse(shlex.split(command)[1:])
    own = re.findall(r"^# (\S+\.gin)$", PAGES[page].read_text(), re.MULTILINE)
    for source in [getattr(given, "config", None), *getattr(given, "configs", [])]:
        assert source is None or source in own or config.find(source)


@pytest.mark.slow
@pytest.mark.parametrize("page", [name for name, page in PAGES.items() if blocks(page.read_text(), "gin")])
def test_the_sweeps_of_a_page_would_run(page, tmp_path, monkeypatch, capsys):
    """Files whose names their first lines say, then the page's sweeps with --dry-run."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    text = PAGES[page].read_text()
    for block in [*blocks(text, "gin"), *blocks(text, "python")]:
        if match := re.match(r"# (\S+\.(?:gin|py))\n", block):
            Path(match[1]).write_text(block)
    sweeps = [command for name, command in sorted(COMMANDS) if name == page and re.search(r"ablate (?!exp)", command)]
    assert sweeps
    for command in sweeps:
        assert cli.main([*shlex.split(command)[1:], "--dry-run"]) == 0
        assert "softmax" in capsys.readouterr().out


# What pages are made of.


@pytest.mark.parametrize("package", api.PACKAGES)
def test_every_public_name_is_in_the_api_once(package):
    pages = [page for page in PAGES.values() if f"```{{generated}} api {package}\n" in page.read_text()]
    assert len(pages) == 1
    entries = re.findall(r"^\.\. auto(?:function|class):: (\S+)$", api.page("api/x", package), re.MULTILINE)
    assert sorted(entries) == sorted(f"{api.path_of(package)}.{name}" for name in api.public(package))
    assert entries


def test_the_api_has_all_that_attnlab_offers():
    assert {*api.public("attnlab")} == {*attnlab.__all__} - {"masks", "block_selection"}
    assert "LocalAttention" in api.public("attnlab.nn")
    assert "neighborhood" in api.public("attnlab.masks")


def test_every_primitive_has_an_example_and_every_example_is_of_one():
    functions = {f"attnlab.{name}" for name, value in api.public("attnlab").items() if not isinstance(value, type)}
    assert {name for name in functions if api.example(name)} == functions
    assert set(api._examples()) == functions
    assert all(f"{name}(" in api.example(name) for name in functions)


def test_docstrings_become_sections_code_and_escaped_text():
    text = """What it does, |x| of *space.

        out_t = sum_s  v_s

    Args:
      query: [B, *space, N, H], floating. None or "xla".
      window*: of local_attention,
        on two lines.

    Returns:
      out [B, T].

    Complexity: O(T).""".replace("\n    ", "\n")
    assert docstrings.to_rst(text.split("\n")) == [
        r"What it does, \|x\| of \*space.",
        "",
        ".. code-block:: text",
        "",
        "   out_t = sum_s  v_s",
        "",
        r':param query: \ ``[B, *space, N, H]``\ , floating. None or \ ``"xla"``\ .',
        r":param window\*: of \ :py:obj:`local_attention <attnlab.local_attention>`\ , on two lines.",
        "",
        r":returns: out \ ``[B, T]``\ .",
        "",
        "**Complexity**: O(T).",
        "",
    ]


def test_the_table_of_papers_has_all_that_the_code_names():
    first = re.compile(r"(?: et al\.| and .*)$")
    known = {(first.sub("", paper.authors), paper.year) for paper in papers.papers()}
    named = set()
    for file in (ROOT / "attnlab").rglob("*.py"):
        text = " ".join(file.read_text().split())
        named |= {
            (authors, int(year))
            for authors, year in re.findall(r"\b([A-Z]\w+)(?: et al\.| and [A-Z]\w+| & [A-Z]\w+)? (20[12]\d)\b", text)
            if authors not in ("Zoology", "Python")
        }
    assert len(named) > 20
    assert named <= known


def test_what_papers_are_expressed_by_exists():
    """Names are attributes, keywords are their options, configs are files; a number is in its config's head, or in the
    result that it links to."""
    text = (DOCS / "expressions.md").read_text()
    assert len(re.findall(r"^\| .* \| .* \| .* \| .* \|$", text, re.MULTILINE)) == 2 + 31 + 23
    known = {
        "attnlab": attnlab,
        "nn": nn,
        "masks": masks,
        "block_selection": attnlab.block_selection,
        "train": train,
    }
    calls = re.findall(r"(?<![/\w])(attnlab|nn|masks|block_selection|train)\.([A-Za-z]\w*)(?:\(([^`]*?)\))?", text)
    assert len(calls) > 80
    for module, name, options in calls:
        value = getattr(known[module], name)
        taken = {*inspect.signature(value.__init__ if isinstance(value, type) else value).parameters}
        if isinstance(value, type) and issubclass(value, nn.Attention):
            taken |= {*inspect.signature(nn.Attention.__init__).parameters}
        assert {*re.findall(r"(\w+)=", options)} <= taken, (name, options)
    for row in re.findall(r"^\| .*", text, re.MULTILINE):
        files = [ROOT / "experiments" / file for file in re.findall(r"\.\./experiments/(\w+/\w+\.gin)", row)]
        files += [DOCS / link for link in re.findall(r"\]\((\S+results\S+\.md)\)", row)]
        sources = "".join(file.read_text() for file in files)
        for number in re.findall(r"(?<![\d.])\d\.\d+", row.split(" | ")[-1]):
            assert number in sources, row


def test_the_gallery_has_every_folder_of_results():
    shown = results.results()
    assert all((results.RESULTS / result.anchor).exists() for result in shown)
    folders = {folder.name for folder in results.RESULTS.iterdir() if folder.is_dir()}
    assert {result.anchor.partition("/")[0] for result in shown} == folders
    with_pictures = {result.name for result in shown if results.pictures((results.RESULTS / result.anchor).parent)}
    assert {"quickstart", "recall_state", "window_recall", "regress", "mnist_pixels"} <= with_pictures
    assert "{up}" not in results.gallery("results/index")


def test_the_explorer_shows_masks_tiles_and_costs():
    setting = {"length": 64, "window": 16, "stride": 1, "is_causal": True, "sinks": 4}
    shown = explorer.entry("local", setting)
    pattern = masks.neighborhood((64,), 16, is_causal=True) | (masks.causal() & masks.first_keys(4))
    expected = np.asarray(masks.dense_mask(pattern, (64,)))
    np.testing.assert_array_equal(drawn(shown["rows"], 64), expected)
    tiles = masks.block_map(pattern, (64,), (16,), (16,))
    assert [int(tile) > 0 for tile in shown["tiles"]] == tiles.visited.ravel().tolist()
    assert shown["pairs"] == expected.sum()
    assert shown["flops"] == 4 * 64 * expected.sum()  # scores and values of one head of 64
    assert shown["state"] == 2 * 64 * (16 + 4)
    assert shown["call"] == "attnlab.local_attention(query, key, value, window=16, is_causal=True, sinks=4)"
    assert "sinks: got 4" in explorer.entry("local", {**setting, "is_causal": False})["refused"]


@pytest.mark.slow
@pytest.mark.parametrize("name", explorer.KINDS)
def test_the_explorer_has_every_setting(name):
    kind = explorer.KINDS[name]
    entries = [(setting, explorer.entry(name, setting)) for setting in explorer.settings(kind)]
    possible = [(setting, shown) for setting, shown in entries if "refused" not in shown]
    assert len(possible) > len(entries) // 2
    for setting, shown in possible:
        assert drawn(shown["rows"], setting["length"]).sum() == shown["pairs"]


def drawn(rows, length):
    """What explorer.js draws."""
    seen = np.zeros((length, length), bool)
    query = 0
    for count, parts in rows:
        for _ in range(count):
            for first, last, step in zip(*[iter(parts)] * 3):
                seen[query, query + np.arange(first, last + 1, step)] = True
            query += 1
    assert query == length
    return seen


def test_what_is_explored_is_a_mechanism_of_the_catalog():
    assert set(explorer.KINDS) <= set(mechanisms.names())


def test_formulas_become_mathematics():
    pytest.importorskip("latex2mathml", reason='needs the extra "docs"')
    for name, page in PAGES.items():
        text = re.sub(r"^```.*?^```$|`[^`]*`", "", page.read_text(), flags=re.MULTILINE | re.DOTALL)
        for block, line in re.findall(r"\$\$(.*?)\$\$|\$([^$]+)\$", text, re.DOTALL):
            made = mathematics.mathml(block or line, "block")
            assert not re.search(r"&</mi>|\\", made), (name, block or line)


@pytest.mark.parametrize("page", PAGES)
def test_links_between_sources_lead_to_files(page):
    text = generated(
        re.sub(r"^```\{generated\} (api|pictures|cards).*?^```$", "", PAGES[page].read_text(), flags=re.M | re.S), page
    )
    for _, _, target in links._LINK.findall(re.sub(r"^ *```.*?^ *```$|`[^`\n]*`", "", text, flags=re.M | re.S)):
        path = target.partition("#")[0]
        if path and not re.match(r"[a-z]+:", path):
            base = DOCS if path.startswith("/") else PAGES[page].parent
            assert (base / path.lstrip("/")).exists(), target


def test_generated_blocks_are_of_known_kinds():
    for page in PAGES.values():
        assert set(re.findall(r"^```\{generated\} (\w+)", page.read_text(), re.MULTILINE)) <= set(GENERATORS)


# The site.


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    """Built as CONTRIBUTING.md says; every warning is an error."""
    for module in ("sphinx", "furo", "myst_parser", "latex2mathml"):
        pytest.importorskip(module, reason='needs the extra "docs"')
    line = re.findall(
        r"^\.venv/bin/(sphinx-build .*?)(?:  #.*)?$", (ROOT / "CONTRIBUTING.md").read_text(), re.MULTILINE
    )[0]
    out = tmp_path_factory.mktemp("site")
    command = [sys.executable, "-m", "sphinx", *shlex.split(line)[1:-1], str(out)]
    built = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, env={**os.environ, "XLA_FLAGS": ""})
    assert built.returncode == 0, built.stdout[-3000:] + built.stderr[-3000:]
    return out


class _Page(html.parser.HTMLParser):
    """Of a built page: its anchors, where it links to, and what a browser would load for it."""

    def __init__(self, text):
        super().__init__()
        self.ids, self.links, self.loaded = set(), [], []
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        given = dict(attributes)
        self.ids |= {value for name, value in attributes if name in ("id", "name")}
        if tag == "a" and "href" in given:
            self.links.append(given["href"])
        self.loaded += [given["src"]] if given.get("src") else []
        self.loaded += (
            [given["href"]] if tag == "link" and given.get("rel") in ("stylesheet", "icon", "preload") else []
        )


@pytest.mark.slow
def test_no_link_of_the_site_is_dead_and_nothing_is_fetched(site):
    pages = {page: _Page(page.read_text()) for page in site.rglob("*.html")}
    built = {page.relative_to(site).with_suffix("").as_posix() for page in pages}
    assert set(PAGES) <= built
    for page, read in pages.items():
        if "files" in page.relative_to(site).parts:
            continue  # copies of reports, which have tests of their own
        for target in read.loaded:
            assert not re.match(r"(https?:)?//", target), f"{page.name} loads {target}"
        for target in [*read.links, *read.loaded]:
            if re.match(r"[a-z]+:", target):
                continue
            path, _, anchor = target.partition("#")
            file = (page.parent / urllib.parse.unquote(path.partition("?")[0])).resolve() if path else page.resolve()
            assert file.is_file(), f"{page.relative_to(site)} links to {target}"
            if anchor and file in pages:
                assert urllib.parse.unquote(anchor) in pages[file].ids, f"{page.relative_to(site)} links to {target}"


@pytest.mark.slow
def test_the_site_can_be_searched_without_a_server(site):
    index = (site / "searchindex.js").read_text()
    assert index.startswith("Search.setIndex(")
    assert "local_attent" in index
    script = (site / "_static" / "explorer-data.js").read_text()
    assert script.startswith("window.ATTNLAB = ")
    assert 'src="_static/explorer-data.js' in (site / "explorer.html").read_text()
    assert "<math" in (site / "mechanisms" / "local.html").read_text()
