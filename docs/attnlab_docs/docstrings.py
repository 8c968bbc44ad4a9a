"""Docstrings, which are plain text in Google's style, as reStructuredText: everything in them is escaped, and shapes,
sections and formulas are told apart by their form."""

import ast
import inspect
import re
import textwrap
from collections.abc import Iterable
from typing import Any

from attnlab_docs import api

_SECTIONS = {"Args": "param", "Returns": "returns", "Raises": "raises"}
_SECTION = re.compile(r"(Args|Returns|Raises):$")
_ITEM = re.compile(r"(\*{0,2}\w+\*?(?:, \*{0,2}\w+\*?)*): (?=\S)")
_TOKEN = re.compile(
    r"""`+(?P<code>[^`]+)`+
      | (?P<quoted>"[a-z0-9_]+")
      | (?P<shape>\[[^\[\]{}"]*\])
      | (?P<name>\b[A-Za-z_]\w*(?:\.[A-Za-z_]\w*)*)""",
    re.VERBOSE,
)

# [], [B, *space, N|K, H], [m, N, H], [0, 1]: parts of which one is a letter, a number or a starred name.
_SHAPE = re.compile(r"\[(?:|(?:[\w*|+/'. ()-]+, )*(?:[A-Za-z]|\d+|\*?\w*\*?\w+|[A-Z]\W[^,]*)(?:, [\w*|+/'. ()-]+)*)\]$")


def on_signature(app: Any, what: str, name: str, obj: Any, options: Any, signature: Any, returns: Any) -> Any:
    """autodoc's event: types by their last names."""
    from sphinx.util.inspect import stringify_signature

    def short(text: str | None) -> str | None:
        text = text and re.sub(r"<class 'jax\.numpy\.(\w+)'>", r"jnp.\1", text)
        return text and re.sub(r"~?\b(?:[a-z_]\w*\.)+(?=[A-Z])", "", text).replace("~", "")

    if what == "class" and signature == "(*args: Any, **kwargs: Any)":  # Flax's, in front of the class's own
        own = inspect.signature(obj.__init__)
        own = own.replace(parameters=[*own.parameters.values()][1:], return_annotation=inspect.Signature.empty)
        signature = stringify_signature(own, show_annotation=True)
    return short(signature), short(returns)


def on_docstring(app: Any, what: str, name: str, obj: Any, options: Any, lines: list[str]) -> None:
    """autodoc's event: the lines are replaced."""
    lines[:] = to_rst(lines, itself=name)
    if what == "function" and (example := api.example(name)):
        lines += [
            "",
            ".. rubric:: Example",
            "",
            ".. code-block:: python",
            "",
            *textwrap.indent(example, "   ").split("\n"),
        ]


def to_rst(lines: Iterable[str], itself: str = "") -> list[str]:
    out: list[str] = []
    for block in _blocks([line.rstrip() for line in lines]):
        if match := _SECTION.match(block[0]):
            out += _section(match[1], textwrap.dedent("\n".join(block[1:])).split("\n"), itself)
        elif block[0].startswith("   "):
            text = textwrap.dedent("\n".join(block))
            out += [f".. code-block:: {_language(text)}", "", *("   " + line for line in text.split("\n"))]
        elif block[0].startswith("Complexity"):
            out += [f"**Complexity**{inline(' '.join(line.strip() for line in block)[len('Complexity') :], itself)}"]
        elif _is_list(block):
            for term, text in _items(block):
                out += [f"**{_escaped(term)}**", f"   {inline(text, itself)}", ""]
        elif all(line.startswith("- ") or line.startswith("  ") for line in block):
            out += [inline(line, itself) for line in block]
        else:
            out += [inline(" ".join(line.strip() for line in block), itself)]
        out += [""]
    return out


def inline(text: str, itself: str = "") -> str:
    """A line of a docstring: code, shapes and names of ours are marked, the rest is escaped."""
    out, end = [], 0
    for match in _TOKEN.finditer(text):
        marked = _marked(match, itself)
        if marked is None:
            continue
        out += [_escaped(text[end : match.start()]), f"\\ {marked}\\ "]
        end = match.end()
    return "".join([*out, _escaped(text[end:])])


def _marked(match: re.Match[str], itself: str) -> str | None:
    if match["name"]:
        target = api.target(match["name"])
        return f":py:obj:`{match['name']} <{target}>`" if target and target != itself else None
    if match["shape"] and not _SHAPE.match(match[0]):
        return None
    return f"``{match['code'] or match[0]}``"


def _language(text: str) -> str:
    """Formulas in docstrings are no Python."""
    try:
        ast.parse(text)
    except SyntaxError:
        return "text"
    return "python"


def _escaped(text: str) -> str:
    return re.sub(r"([\\*`|_])", r"\\\1", text)


def _blocks(lines: list[str]) -> Iterable[list[str]]:
    """Paragraphs; a section is one, also with empty lines in it, and so are indented lines one after another."""
    block: list[str] = []
    for number, line in enumerate(lines):
        following = next((after for after in lines[number:] if after), "")
        if not line:
            goes_on = block and following.startswith("  ") and (_SECTION.match(block[0]) or block[0].startswith("   "))
            if goes_on:
                block.append("")
            elif block:
                yield block
                block = []
            continue
        breaks = block and (
            (_SECTION.match(line) is not None)
            or (line.startswith("   ") and not block[0].startswith(" ") and not _in_item(block))
            or (not line.startswith(" ") and (block[0].startswith("   ") or _SECTION.match(block[0])))
        )
        if breaks:
            yield block
            block = []
        block.append(line)
    if block:
        yield block


def _in_item(block: list[str]) -> bool:
    return _SECTION.match(block[0]) is not None or _is_list(block)


def _is_list(block: list[str]) -> bool:
    """Whether every line begins an item "name: text" or goes on with one."""
    return _ITEM.match(block[0]) is not None and all(line.startswith("  ") or _ITEM.match(line) for line in block)


def _items(block: list[str]) -> list[tuple[str, str]]:
    items: list[tuple[str, str]] = []
    for line in block:
        match = None if line.startswith(" ") else _ITEM.match(line)
        if match:
            items.append((match[1], line[match.end() :].strip()))
        elif items:
            items[-1] = (items[-1][0], f"{items[-1][1]} {line.strip()}")
        else:
            items.append(("", line.strip()))
    return items


def _section(title: str, lines: list[str], itself: str) -> list[str]:
    if title == "Returns" or (title == "Raises" and not _ITEM.match(lines[0])):
        return [f":{_SECTIONS[title]}: {inline(' '.join(line.strip() for line in lines), itself)}"]
    fields = []
    for term, text in _items([line for line in lines if line]):
        names = term if title == "Args" else term.partition(",")[0]
        if term == "":
            fields.append(inline(text, itself))
        elif title == "Args":
            fields.append(
                f":param {_escaped(names).replace(', ', ',')}: {inline(text, itself)}"
            )  # a blank would part a type
        else:
            fields.append(f":raises {term}: {inline(text, itself)}")
    return fields
