"""What the site computes: pictures, tables, the explorer's data, API pages and mathematics. A Sphinx extension.

A page says what it wants by a fenced block, which is replaced before the page is parsed:

    ```{generated} pictures local
    ```
"""

import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

from attnlab_docs import api, docstrings, explorer, links, mathematics, mechanisms, papers, results

GENERATORS: dict[str, Callable[..., str]] = {
    "api": api.page,
    "cards": mechanisms.cards,
    "gallery": results.gallery,
    "include": links.included,
    "papers": papers.table,
    "pictures": mechanisms.pictures,
}
_BLOCK = re.compile(r"^```\{generated\} (\w+)(.*)\n```$", re.MULTILINE)


def generated(text: str, page: str) -> str:
    """The page's text with its blocks replaced. page: its name, "guides/data"."""

    def fill(match: re.Match[str]) -> str:
        return GENERATORS[match[1]](page, *match[2].split())

    return _BLOCK.sub(fill, text)


def _on_source_read(app: Any, page: str, source: list[str]) -> None:
    # A page's links into the repository become links to pages, or to copies of the files.
    text = generated(source[0], page)
    source[0] = links.rewritten(text, Path(app.srcdir) / page, page)


def _on_page(app: Any, page: str, template: str, context: Any, doctree: Any) -> None:
    if page == "explorer":
        app.add_js_file("explorer-data.js")
        app.add_js_file("explorer.js", loading_method="defer")


def _on_finish(app: Any, error: Exception | None) -> None:
    if error is None and app.builder.format == "html":
        out = Path(app.outdir)
        (out / "_static" / "explorer-data.js").write_text(explorer.script())
        links.copy_files(out)
        shutil.rmtree(out / "_sources", ignore_errors=True)


def setup(app: Any) -> dict[str, bool]:
    from pygments.lexers.python import PythonLexer

    app.add_lexer("gin", PythonLexer)
    app.connect("source-read", _on_source_read)
    app.connect("html-page-context", _on_page)
    app.connect("build-finished", _on_finish)
    app.connect("autodoc-process-docstring", docstrings.on_docstring)
    app.connect("autodoc-process-signature", docstrings.on_signature)
    app.add_html_math_renderer(
        "mathml",
        inline_renderers=(mathematics.visit_inline, None),
        block_renderers=(mathematics.visit_block, None),
    )
    return {"parallel_read_safe": False, "parallel_write_safe": True}
