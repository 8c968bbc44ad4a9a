"""Configs: gin files wire Python objects. The only module that imports gin, and the library decorates nothing.

A file names what it uses with `from attnlab import nn, ...` after `from __gin__ import dynamic_registration`, so a
project's own modules work the same way. gin lets a misspelled macro pass in silence; `build` rejects it.
"""

import ast
import contextlib
import dataclasses
import difflib
import inspect
import re
import tokenize
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

import gin
import gin.config
from gin.config_parser import ImportStatement

from attnlab import data, models, nn, train
from attnlab.errors import UserError

# What they offer can be named by overrides without an import. Anything else a file imports itself, ablate among it.
_PACKAGES = (data, models, nn, train)


@dataclasses.dataclass(frozen=True)
class Built:
    """What a config gave.

    value: the object. text: the resolved config, itself a config file. values: every option that was in force, defaults
    included, {"LanguageModel.depth": "4"}. modules: names of the modules of all that was called, and of others than
    attnlab's that the files import, in order.
    """

    value: Any
    text: str
    values: dict[str, str]
    modules: tuple[str, ...]


def directory() -> Path:
    """The folder of configs that come with attnlab: inside the installed package, or the checkout's experiments/."""
    inside = Path(__file__).parent / "experiments"
    return inside if inside.is_dir() else Path(__file__).parent.parent / "experiments"


def shipped() -> list[str]:
    """The configs that come with attnlab, as paths that `find` takes."""
    return sorted(
        str(Path("experiments") / path.relative_to(directory()))
        for path in directory().rglob("*.gin")
        if "results" not in path.parts
    )


def find(name: str) -> Path:
    """The file of this path; a path that does not exist here is also looked up among the configs of attnlab."""
    path = _path(name)
    if path is not None:
        return path
    raise UserError(f"config: no file {name}{_nearest(name, shipped())} (`attnlab list` prints those that come along)")


def _path(name: str) -> Path | None:
    parts = Path(name).parts
    shipped_path = directory() / Path(*(parts[1:] if parts[:1] == ("experiments",) else parts))
    return next((path for path in (Path(name), shipped_path) if path.is_file()), None)


def describe(name: str) -> str:
    """The first comment line of a config."""
    for line in find(name).read_text().splitlines():
        if line.startswith("#"):
            return line.lstrip("# ")
    return ""


def build(sources: Sequence[str], overrides: Sequence[str] = (), *, root: str) -> Built:
    """Reads configs and calls the class `root` ("Experiment") as they specify.

    Args:
      sources: each a path ending in .gin, or a binding such as "models.LanguageModel.depth = 2"; later ones win.
      overrides: "NAME=VALUE" from the command line; the value is a gin literal, or a bare word for a string.
      root: the class or function, named as in the files without its module.

    Raises:
      UserError: a missing file, a syntax error, an unknown name, an unused or undefined macro, a value that is refused.
    """
    with _read(sources, overrides, root) as selector:
        value = gin.get_configurable(selector)()
        return Built(value, gin.operative_config_str(), dict(_operative_values()), _modules())


def options(sources: Sequence[str], overrides: Sequence[str] = (), *, root: str) -> dict[str, Any]:
    """The options that configs set of the class `root`, by name and built, as `build` would pass them to it."""
    with _read(sources, overrides, root) as selector:
        return gin.get_bindings(selector)


def named(sources: Sequence[str], overrides: Sequence[str] = ()) -> list[tuple[Any, dict[str, Any]]]:
    """The classes and functions that configs name, once per scope, each with the options that they set of it.

    Macros are replaced by their values; nothing is built, and the configs need not be complete.
    """
    with _parsed(sources, overrides):
        references = gin.config.iterate_references(gin.config._CONFIG)
        keys = {*gin.config._CONFIG, *(reference.config_key for reference in references)}
        found = []
        for scope, selector in sorted(key for key in keys if key[1] != "gin.macro"):
            bindings = gin.get_bindings(f"{scope}/{selector}".lstrip("/"), resolve_references=False)
            values = {option: _macro_value(value) for option, value in bindings.items()}
            found.append((gin.config._REGISTRY[selector].wrapped, values))
        return found


def _macro_value(value: Any) -> Any:
    """What a macro stands for, where it is set; any other value as it is."""
    while isinstance(value, gin.config.ConfigurableReference) and value.config_key[1] == "gin.macro":
        value = gin.config._CONFIG.get(value.config_key, {}).get("value")
    return value


@contextlib.contextmanager
def _read(sources: Sequence[str], overrides: Sequence[str], root: str) -> Iterator[str]:
    """Reads configs that are complete and gives gin's name for `root`. Raises UserError as `_parsed` does."""
    with _parsed(sources, overrides) as (defined, used):
        selectors = {selector for _, selector in gin.config._CONFIG if selector.rpartition(".")[2] == root}
        if len(selectors) != 1:
            raise UserError(f"config: {', '.join(sources)} configures no {root}; `attnlab list` prints files that do")
        for name in sorted(used - defined):
            raise UserError(f"config: macro %{name} is used but never set{_nearest(name, defined)}")
        for name in sorted(defined - used):
            raise UserError(f"config: macro {name} is set but nothing uses it{_nearest(name, used)}")
        yield selectors.pop()


@contextlib.contextmanager
def _parsed(sources: Sequence[str], overrides: Sequence[str]) -> Iterator[tuple[set[str], set[str]]]:
    """Reads configs into gin and gives the macros that are set and those that are used.

    What fails, also in the body, is raised as UserError.
    """
    gin.clear_config()
    _register_attnlab()
    if _READER not in gin.config._FILE_READERS:
        gin.config._FILE_READERS.insert(0, _READER)
    try:
        defined, used = set[str](), set[str]()
        for source in (*sources, *map(_binding, overrides)):
            if source.endswith(".gin"):
                gin.parse_config_file(str(find(source)))
            else:
                gin.parse_config(source)
            # A macro counts as used also where a later source replaces the value that refers to it.
            now_defined, now_used = _macros()
            defined, used = defined | now_defined, used | now_used
        yield defined, used
    except UserError as error:
        raise UserError(_explained(error)) from error  # gin may have added lines of its own
    except Exception as error:
        if isinstance(error, _MISTAKES):
            raise UserError(f"config: {_explained(error)}") from error
        raise


# What gin and the objects that it builds raise for a mistake in a config.
_MISTAKES = (
    *(SyntaxError, tokenize.TokenError, NameError, AttributeError, ImportError),
    *(ValueError, TypeError, OSError),
)

# How gin opens what a file includes: first of its readers, as its own for packages fails on a folder without modules.
_READER = (lambda name: open(find(name)), lambda name: _path(name) is not None)  # noqa: SIM115


def _register_attnlab() -> None:
    """Makes everything that attnlab's packages offer known to gin, so that overrides may name what no file does."""
    with gin.config._parse_scope() as context:
        context._enable_dynamic_registration()
        for name in _known_names():
            package, _, attribute = name.partition(".")
            if package not in context._symbol_table:
                statement = ImportStatement(f"attnlab.{package}", True, None, None)
                context.process_import(statement)
            if callable(getattr(context._symbol_table[package], attribute)):
                context.get_configurable(name)


def _binding(override: str) -> str:
    name, equals, value = override.partition("=")
    if not equals or not name.strip():
        raise UserError(f"config: override {override!r} is not NAME=VALUE")
    value = value.strip()
    if re.fullmatch(r"[\w./:-]+", value):
        try:
            ast.literal_eval(value)
        except (SyntaxError, ValueError):
            value = repr(value)
    return f"{name.strip()} = {value}"


def _macros() -> tuple[set[str], set[str]]:
    """Names of the macros that are set, and of those that something refers to."""
    names = (reference.scoped_selector for reference in gin.config.iterate_references(gin.config._CONFIG))
    used = {name.removesuffix("/gin.macro") for name in names if name.endswith("/gin.macro")}
    return {scope for scope, selector in gin.config._CONFIG if selector == "gin.macro"}, used


def _modules() -> tuple[str, ...]:
    selectors = {selector for _, selector in gin.config._OPERATIVE_CONFIG if not selector.startswith("gin.")}
    called = {gin.config._REGISTRY[selector].wrapped.__module__ for selector in selectors}
    imported = {statement.module for statement in gin.config._IMPORTS}
    own = {name for name in imported if name.partition(".")[0] not in ("attnlab", "__gin__")}
    return tuple(sorted(called | own))


def _operative_values() -> Iterator[tuple[str, str]]:
    for (scope, selector), parameters in sorted(gin.config._OPERATIVE_CONFIG.items()):
        prefix = (f"{scope}/" if scope else "") + selector.rpartition(".")[2]
        for parameter, value in sorted(parameters.items()):
            yield scope if selector == "gin.macro" else f"{prefix}.{parameter}", repr(value)


def _nearest(name: str, candidates: Iterable[str]) -> str:
    close = difflib.get_close_matches(name, list(candidates), n=1, cutoff=0.5)
    return f"; did you mean {close[0]!r}?" if close else ""


def offered(package: ModuleType) -> dict[str, Any]:
    """What a package of attnlab offers, by name: all that its __init__ imports."""
    return {
        name: thing for name, thing in vars(package).items() if name[0] != "_" and not isinstance(thing, ModuleType)
    }


def _known_names() -> list[str]:
    """Everything an override can name without an import: what attnlab's packages offer, by module and name."""
    return [f"{package.__name__.removeprefix('attnlab.')}.{name}" for package in _PACKAGES for name in offered(package)]


def _explained(error: Exception) -> str:
    """gin's error as one line, with the nearest valid name where a name is the trouble."""
    text = " ".join(str(error).split())
    text = re.sub(r" In call to configurable '([\w.]+)' \(<.*?>\)", r" (in \1)", text)
    unknown = re.search(r"(?:Couldn't resolve selector|No configurable matching(?: reference)?) '?@?([\w./]+)", text)
    if unknown:
        name = unknown.group(1).rstrip(".")
        # What the files imported and named before, gin has registered too.
        registered = {selector.removeprefix("attnlab.") for selector, _ in gin.config._REGISTRY.items()}
        known = sorted({*_known_names(), *(name for name in registered if not name.startswith("gin."))})
        candidates = known if "." in name else sorted({full.rpartition(".")[2] for full in known})
        return f"unknown name {name!r}{_nearest(name, candidates)}{_location(text)}"
    parameter = re.search(r"'([\w./]+)' doesn't have a parameter named '(\w+)'", text)
    if parameter:
        owner, option = parameter.groups()
        function = gin.config._REGISTRY.get_match(owner).wrapped
        function = vars(function).get("__init__", function) if isinstance(function, type) else function
        accepted = list(inspect.signature(function).parameters)
        return f"{owner.rpartition('.')[2]} has no option {option!r}{_nearest(option, accepted)}{_location(text)}"
    return text


def _location(text: str) -> str:
    found = re.search(r"In file \"([^\"]+)\", line (\d+)", text)
    return f" ({found.group(1)}, line {found.group(2)})" if found else ""
