"""Pages of the API: every public name once, by the module that defines it. Which names are public stands in the
packages themselves: attnlab.attention._public and the imports of the other packages' __init__."""

import functools
import importlib
import inspect
import re
import types
from typing import Any

from attnlab_docs import mechanisms
from attnlab_docs.links import DOCS

# Packages in the order of their pages; `attnlab` has the primitives.
PACKAGES = (
    "attnlab",
    "attnlab.masks",
    "attnlab.block_selection",
    "attnlab.nn",
    "attnlab.models",
    "attnlab.data",
    "attnlab.train",
    "attnlab.ablate",
    "attnlab.catalog",
)
# Modules of attnlab.attention that are attributes of attnlab.
_OF_ATTENTION = ("attnlab.masks", "attnlab.block_selection")
EXAMPLES = DOCS / "api" / "examples"


@functools.cache
def public(package: str) -> dict[str, Any]:
    """Names and what they stand for, modules left out."""
    if package == "attnlab":
        import attnlab

        found = {name: getattr(attnlab, name) for name in attnlab.__all__}
    elif package in (*_OF_ATTENTION, "attnlab.catalog"):
        module = importlib.import_module(path_of(package))
        found = {name: value for name, value in vars(module).items() if _home(value) == module.__name__}
    else:
        found = vars(importlib.import_module(package))
    return {
        name: value
        for name, value in found.items()
        if not name.startswith("_") and not isinstance(value, types.ModuleType) and _is_ours(value)
    }


def _home(value: Any) -> str:
    return getattr(value, "__module__", "") if inspect.isclass(value) or inspect.isfunction(value) else ""


def _is_ours(value: Any) -> bool:
    return _home(value).startswith("attnlab")


@functools.cache
def _targets() -> dict[str, str]:
    return {
        name: f"{path_of(package)}.{name}"
        for package in reversed(PACKAGES)
        for name in public(package)
        if "_" in name or re.match(r"[A-Z]+[a-z]+[A-Z]", name)  # others are words of English too
    }


def path_of(package: str) -> str:
    """What Python imports."""
    return package.replace("attnlab.", "attnlab.attention.") if package in _OF_ATTENTION else package


def target(name: str) -> str | None:
    """The full name that a name in a docstring stands for, if it is one of ours that is no word of English."""
    return _targets().get(name.rpartition(".")[2])


def page(page: str, package: str) -> str:
    """An entry for every public name, with a heading for each module that defines some."""
    from attnlab_docs.docstrings import to_rst

    modules: dict[str, list[str]] = {}
    for name, value in public(package).items():
        home = _home(value)
        modules.setdefault("" if "._" in home else home, []).append(name)
    parts = []
    for module, names in sorted(modules.items(), key=lambda item: item[0] == ""):  # private modules' names last
        if len(modules) > 1:
            parts += [f"## {module.rpartition('.')[2].replace('_', ' ') or 'Which form runs, and where'}", ""]
        text = inspect.getdoc(importlib.import_module(module)) or "" if module else ""
        parts += ["```{eval-rst}", *to_rst(text.split("\n"))]
        for name in names:
            parts += ["", *_entry(f"{path_of(package)}.{name}", public(package)[name])]
        parts += ["```", ""]
    return "\n".join(parts)


def _entry(name: str, value: Any) -> list[str]:
    if not inspect.isclass(value):
        return [f".. autofunction:: {name}"]
    is_tuple = issubclass(value, tuple)
    return [f".. autoclass:: {name}", *([] if is_tuple else ["   :members:"])]


@functools.cache
def _examples() -> dict[str, str]:
    """Examples by the names of the functions that they are for: those that a mechanism's page calls, and those that a
    file's first line has."""
    found = {}
    for mechanism in mechanisms.names():
        code = mechanisms.read(mechanism).sections["Example"].partition("```python\n")[2].partition("```")[0]
        for name in re.findall(r"attnlab\.(\w+)\(", code):
            found.setdefault(f"attnlab.{name}", code.strip())
    for file in sorted(EXAMPLES.glob("*.py")):
        first, _, code = file.read_text().partition("\n")
        for name in first.removeprefix("# For ").rstrip(".").split(", "):
            found[f"attnlab.{name}"] = code.strip()
    return found


def example(name: str) -> str | None:
    return _examples().get(name)
