"""LaTeX in pages as MathML, which browsers show by themselves: no script, no network."""

import re
from typing import Any

_ALIGNED = re.compile(r"\\begin\{aligned\}(.*?)\\end\{aligned\}", re.DOTALL)


def mathml(latex: str, display: str) -> str:
    from latex2mathml.converter import convert

    # The converter knows align*, which is aligned as a whole formula.
    return convert(_ALIGNED.sub(r"\\begin{align*}\1\\end{align*}", latex.strip()), display=display)


def visit_inline(translator: Any, node: Any) -> None:
    from docutils import nodes

    translator.body.append(mathml(node.astext(), "inline"))
    raise nodes.SkipNode


def visit_block(translator: Any, node: Any) -> None:
    from docutils import nodes

    translator.body.append(f'<div class="formula">{mathml(node.astext(), "block")}</div>\n')
    raise nodes.SkipNode
