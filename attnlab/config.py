"""Configs: gin files wire Python objects. The only module that imports gin, and the library decorates nothing.

A file names what it uses with `from attnlab import nn, ...` after `from __gin__ import dynamic_registration`, so a
project's own modules work the same way. gin lets a misspelled macro pass in silence; `build` rejects it.
"""

import ast
import contextlib
import dataclasses
import difflib
import inspect
import os
import re
import sys
import tokenize
import types
import typing
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

import gin
import gin.config
from gin import config_parser
from gin.config_parser import ImportStatement

from attnlab import data, models, nn, train
from attnlab.errors import UserError, missing_package, own_place

# What they offer can be named by overrides without an import. Anything else a file imports itself, ablate among it.
_PACKAGES = (data, models, nn, train)


@dataclasses.dataclass(frozen=True)
class Built:
    """What a config gave.

    value: the object. text: the resolved config, itself a config file. values: every option that was in force, defaults
    included, {"LanguageModel.depth": "4"}. modules: names of the modules of all that was called, and of others than
    attnlab's that the files import, in order. unread: names of the bindings, among those given beside files, that
    nothing which was built has read.
    """

    value: Any
    text: str
    values: dict[str, str]
    modules: tuple[str, ...]
    unread: tuple[str, ...]


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


def _beside(name: str) -> list[Path]:
    """The .gin files in the folder of a path that may not exist."""
    try:
        return sorted(Path(name).parent.glob("*.gin"))
    except (OSError, ValueError):
        return []


def find(name: str) -> Path:
    """The file of this path; a path that does not exist here is also looked up among the configs of attnlab."""
    path = _path(name)
    if path is not None and path.suffix == ".gin":
        return path
    if path is not None:
        raise UserError(f"config: {name} is no .gin file")
    if os.path.isdir(name):
        held = sorted(file.name for file in Path(name).glob("*.gin"))
        inside = f", such as {Path(name) / held[0]}" if held else "; there is none in it"
        raise UserError(f"config: {name} is a folder; give a .gin file{inside}")
    named = [path for path in shipped() if Path(path).stem == Path(name).stem]
    beside = [str(Path(name).with_name(file.name)) for file in _beside(name)]
    hint = f"; did you mean {' or '.join(map(repr, named))}?" if named else _nearest(name, [*beside, *shipped()])
    raise UserError(f"config: no file {name[:200]}{hint} (`attnlab list` prints those that come along)")


def _path(name: str) -> Path | None:
    parts = Path(name).parts
    shipped_path = directory() / Path(*(parts[1:] if parts[:1] == ("experiments",) else parts))
    return next((path for path in (Path(name), shipped_path) if os.path.isfile(path)), None)


def describe(name: str) -> str:
    """The first comment line of a config."""
    for line in find(name).read_text().splitlines():
        if line.startswith("#"):
            return line.lstrip("# ")
    return ""


def build(sources: Sequence[str], overrides: Sequence[str] = (), *, root: str, trusts: bool = True) -> Built:
    """Reads configs and calls the class `root` ("Experiment") as they specify.

    Args:
      sources: each a path ending in .gin, or a binding such as "models.LanguageModel.depth = 2"; later ones win.
      overrides: "NAME=VALUE" from the command line; the value is a gin literal, or a bare word for a string.
      root: the class or function, named as in the files without its module.
      trusts: whether the files may run code: of modules that they import, which are also looked for beside them and in
        the current folder, and whatever else they name. Else they may name only what attnlab offers to build.

    Raises:
      UserError: a missing file, a syntax error, an unknown name, an unused or undefined macro, a value that is refused.
    """
    with _read(sources, overrides, root, trusts) as selector:
        value = gin.get_configurable(selector)()
        given = [*(source for source in sources if re.match(r"[\w./]+ *=", source)), *overrides]
        unread = tuple(dict.fromkeys(name for name in map(_name, given) if not _is_read(name)))
        return Built(value, gin.operative_config_str(), dict(_operative_values()), _modules(), unread)


def check_read(overrides: Sequence[str], *built: Built) -> None:
    """Refuses overrides that nothing has read in any of what was built with them. Raises UserError."""
    for name in map(_name, overrides):
        if all(name in each.unread for each in built):
            read = sorted({option for each in built for option in each.values})
            option = name.rpartition(".")[2]
            close = [other for other in read if other.rpartition(".")[2] == option]
            close = close or difflib.get_close_matches(name, read, n=2, cutoff=0.8)
            classes = sorted({other.rpartition(".")[0].rpartition("/")[2] for other in read} - {""})
            hint = f"did you mean {' or '.join(map(repr, close))}?" if close else f"what is built: {', '.join(classes)}"
            raise UserError(f"config: --gin.{name}: nothing that is built reads it; {hint}")


def options(sources: Sequence[str], overrides: Sequence[str] = (), *, root: str) -> dict[str, Any]:
    """The options that configs set of the class `root`, by name and built, as `build` would pass them to it."""
    with _read(sources, overrides, root) as selector:
        return gin.get_bindings(selector)


def named(
    sources: Sequence[str], overrides: Sequence[str] = (), *, trusts: bool = True
) -> list[tuple[Any, dict[str, Any]]]:
    """The classes and functions that configs name, once per scope, each with the options that they set of it.

    Macros are replaced by their values; nothing is built, and the configs need not be complete. trusts: as in build.
    """
    with _parsed(sources, overrides, trusts):
        references = gin.config.iterate_references(gin.config._CONFIG)
        keys = {*gin.config._CONFIG, *(reference.config_key for reference in references)}
        found = []
        for scope, selector in sorted(key for key in keys if key[1] != "gin.macro"):
            bindings = gin.get_bindings(f"{scope}/{selector}".lstrip("/"), resolve_references=False)
            values = {option: _macro_value(value) for option, value in bindings.items()}
            found.append((gin.config._REGISTRY[selector].wrapped, values))
        return found


def sets(source: str, name: str) -> bool:
    """Whether a source, as of build, sets this macro or option itself; in a file, whether it sets this macro."""
    if _is_file(source):
        return "." not in name and bool(re.search(rf"^{re.escape(name)} *=", find(source).read_text(), re.MULTILINE))
    return _name(source).split(".")[-2:] == name.split(".")[-2:]


def _macro_value(value: Any) -> Any:
    """What a macro stands for, where it is set; any other value as it is."""
    passed = set[str]()
    while isinstance(value, gin.config.ConfigurableReference) and value.config_key[1] == "gin.macro":
        macro = value.config_key[0]
        if macro in passed:
            raise UserError(f"config: macro %{macro} stands for itself")
        passed.add(macro)
        value = gin.config._CONFIG.get(value.config_key, {}).get("value")
    return value


@contextlib.contextmanager
def _read(sources: Sequence[str], overrides: Sequence[str], root: str, trusts: bool = True) -> Iterator[str]:
    """Reads configs that are complete and gives gin's name for `root`. Raises UserError as `_parsed` does."""
    with _parsed(sources, overrides, trusts) as (defined, used):
        selectors = {selector for _, selector in gin.config._CONFIG if selector.rpartition(".")[2] == root}
        if len(selectors) != 1:
            raise UserError(f"config: {', '.join(sources)} configures no {root}; `attnlab list` prints files that do")
        for name in sorted(used - defined):
            raise UserError(f"config: macro %{name} is used but never set{_nearest(name, defined)}")
        for name in sorted(defined - used):
            hint = _nearest(name, used) or _files_that_use(name)
            raise UserError(f"config: macro {name} is set but nothing uses it{hint}")
        yield selectors.pop()


@contextlib.contextmanager
def _parsed(sources: Sequence[str], overrides: Sequence[str], trusts: bool) -> Iterator[tuple[set[str], set[str]]]:
    """Reads configs into gin and gives the macros that are set and those that are used.

    What fails, also in the body, is raised as UserError.
    """
    gin.clear_config()
    _register_attnlab()
    if _READER not in gin.config._FILE_READERS:
        gin.config._FILE_READERS.insert(0, _READER)
    try:
        defined, used = set[str](), set[str]()
        for source in filter(_is_file, sources):
            if trusts:
                _make_importable(find(source).parent, Path.cwd())
            else:
                _check_harmless(source)
        for number, source in enumerate((*sources, *overrides)):
            if number >= len(sources):
                _bind(source)
            elif _is_file(source):
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
        place = own_place(error)
        if isinstance(error, _MISTAKES):
            raise UserError(f"config: {_explained(error)}{place}") from error
        if place:  # of another type, which says what the text may not
            raise UserError(f"config: {type(error).__name__}: {_explained(error)}{place}") from error
        raise


# What gin and the objects that it builds raise for a mistake in a config.
_MISTAKES = (
    *(SyntaxError, tokenize.TokenError, NameError, AttributeError, ImportError),
    *(ValueError, TypeError, OSError, OverflowError, RecursionError),
)


def _is_file(source: str) -> bool:
    """Whether a source is meant as a file, and not as a binding or another statement of gin."""
    return source.endswith(".gin") or not re.search(r"[=\s]", source) or os.path.exists(source)


def _make_importable(*folders: Path) -> None:
    """Lets configs import modules that lie in these folders, where none of their name is installed."""
    for folder in map(str, map(Path.resolve, folders)):
        if folder not in sys.path:
            sys.path.append(folder)


def _is_harmless(name: str) -> bool:
    """Whether attnlab offers it and building it runs no code of somebody else and writes nothing."""
    package, _, attribute = name.removeprefix("attnlab.").partition(".")
    thing = {each.__name__.partition(".")[2]: vars(each) for each in _PACKAGES}.get(package, {}).get(attribute)
    return isinstance(thing, type) or (package == "data" and callable(thing))


def _check_harmless(name: str) -> None:
    """Refuses a config that names anything but what attnlab offers to build; nothing of it is run.

    Raises UserError: it imports another module, or names what lies behind attnlab's own.
    """
    path = find(name)
    named: list[str] = []

    class Names(config_parser.ParserDelegate):
        def configurable_reference(self, scoped_configurable_name: str, evaluate: bool) -> None:
            named.append(scoped_configurable_name)

        def macro(self, macro_name: str) -> None:
            pass

    try:
        with path.open() as file:
            for statement in config_parser.ConfigParser(file, Names()):
                if isinstance(statement, config_parser.IncludeStatement):
                    _check_harmless(statement.filename)
                elif isinstance(statement, ImportStatement):
                    is_ours = statement.module.split(".")[0] == "attnlab" and statement.alias is None
                    if statement.is_from:
                        is_ours = is_ours and statement.module.count(".") == 1
                    if not is_ours and statement.module != "__gin__.dynamic_registration":
                        raise _untrusted(path, f"imports {statement.module}")
                elif statement.selector and getattr(statement, "arg_name", True):
                    named.append(statement.selector)
    except (SyntaxError, tokenize.TokenError, UnicodeDecodeError, OSError, RecursionError) as error:
        raise UserError(f"config: cannot read {path}: {_explained(error)}") from error
    for each in named:
        if not _is_harmless(each.rpartition("/")[2]):
            raise _untrusted(path, f"names {each}")


def _untrusted(path: Path, what: str) -> UserError:
    return UserError(
        f"config: {path} {what}, which is not attnlab's: it would run code. If you trust who wrote that, give --trust "
        "(in Python, trusts=True)"
    )


# How gin opens what a file includes: first of its readers, as its own for packages fails on a folder without modules.
# Of every name, so that what is not there is named as elsewhere and not looked for in packages.
_READER = (lambda name: open(find(name)), lambda name: True)  # noqa: SIM115


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


def _bind(override: str) -> None:
    """Sets what an override from the command line says."""
    name, equals, value = override.partition("=")
    if not equals or not name.strip() or not value.strip():
        raise UserError(f"config: override {override!r} is not NAME=VALUE")
    binding = f"{name.strip()} = {_literal(value.strip(), _kinds(name.strip()))}"
    try:
        gin.parse_config(binding)
    except (SyntaxError, tokenize.TokenError) as error:
        hint = "text with spaces or signs needs quotes of its own, \"'like this'\""
        raise UserError(f"config: --gin.{override}: cannot read it; {hint}") from error


# As YAML, JSON and shells write them, in any case.
_WORDS = {"true": True, "false": False, "none": None, "null": None}


def _literal(value: str, kinds: set[Any]) -> str:
    """A value from the command line as a literal of gin. kinds: types that the option takes; empty: not known."""
    if value.lower() in _WORDS:
        meant = _WORDS[value.lower()]
        return repr(value) if str in kinds and type(meant) not in kinds else repr(meant)
    try:
        literal = ast.literal_eval(value)
    except (SyntaxError, ValueError):
        return repr(value) if re.fullmatch(r"[\w./:~+-]+", value) else value
    if isinstance(literal, (int, float)) and str in kinds and not kinds & {int, float, bool}:
        return repr(value)  # such as a file whose name is a number
    if isinstance(literal, float):
        is_count = int in kinds and float not in kinds and literal.is_integer()
        return repr(int(literal)) if is_count else value
    return repr(literal)


def _kinds(name: str) -> set[Any]:
    """Types that the annotations of an option state, or of all options that a macro is for; empty where unknown."""
    selector = name.rpartition("/")[2]
    owner, _, option = selector.rpartition(".")
    if owner:
        return _annotated(owner, option)
    kinds = set[Any]()
    for (_, selector), bindings in gin.config._CONFIG.items():
        for option, value in bindings.items():
            is_macro = isinstance(value, gin.config.ConfigurableReference) and value.config_key[1] == "gin.macro"
            if is_macro and value.config_key[0] == name and selector != "gin.macro":
                kinds |= _annotated(selector, option)
    return kinds


def _annotated(owner: str, option: str) -> set[Any]:
    try:
        annotation = _parameters(owner)[option].annotation
    except (KeyError, ValueError, TypeError):  # a name that is not there: gin reports it
        return set()
    parts = typing.get_args(annotation) if typing.get_origin(annotation) in (typing.Union, types.UnionType) else ()
    kinds = {str if typing.get_origin(part) is typing.Literal else part for part in (parts or (annotation,))}
    return set() if Any in kinds or inspect.Parameter.empty in kinds else kinds


def _parameters(owner: str) -> typing.Mapping[str, inspect.Parameter]:
    match = gin.config._REGISTRY.get_match(owner)
    if match is None:
        raise KeyError(owner)
    function = match.wrapped
    function = vars(function).get("__init__", function) if isinstance(function, type) else function
    return inspect.signature(function).parameters


def _name(binding: str) -> str:
    return binding.partition("=")[0].strip()


def _is_read(name: str) -> bool:
    """Whether what was built has read the value of this binding."""
    scope, _, selector = name.rpartition("/")
    owner, _, option = selector.rpartition(".")
    if not owner:
        return (name, "gin.macro") in gin.config._OPERATIVE_CONFIG
    full = gin.config._REGISTRY.get_match(owner).selector
    for (called, selector), bindings in gin.config._OPERATIVE_CONFIG.items():
        if selector == full and option in bindings:
            parts = called.split("/") if called else []
            scopes = ["/".join(parts[:count]) for count in range(len(parts), -1, -1)]
            # The innermost scope that sets the option decides.
            if next((s for s in scopes if option in gin.config._CONFIG.get((s, full), {})), None) == scope:
                return True
    return False


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


def _files_that_use(macro: str) -> str:
    files = [path for path in map(find, shipped()) if re.search(rf"%{re.escape(macro)}\b", path.read_text())]
    return f"; used by {', '.join(path.name for path in files)}" if files else ""


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
    absent = re.search(r"No module named '([\w.]+)'", text)
    if absent and "In call to configurable" in text:
        return missing_package(absent.group(1).partition(".")[0])
    if absent:
        places = "looked for beside the config, in the current folder and on Python's path"
        return f"no module {absent.group(1)}; {places}{_location(text)}"
    if isinstance(error, RecursionError) and not own_place(error):
        return "files include one another in a circle, or a macro stands for itself"
    word = re.search(r"Failed to parse token '(\w+)'", text)
    if word:
        return f"cannot read {word.group(1)}; text needs quotes, and words are True, False and None{_location(text)}"
    needed = re.search(
        r"missing (?:\d+|a) required [a-z- ]*arguments?: (.*?) (?:No values|In call).*?configurable '(\w+)'", text
    )
    if needed:
        options = re.findall(r"'(\w+)'", needed.group(1))
        return (
            f"{' and '.join(f'{needed.group(2)}.{option}' for option in options)}: nothing sets it; it has no default"
        )
    text = re.sub(r" In call to configurable '([\w.]+)' \(<.*", r" (in \1)", text)  # the innermost comes first
    unknown = re.search(r"(?:Couldn't resolve selector|No configurable matching(?: reference)?) '?@?([\w./]+)", text)
    if unknown:
        name = unknown.group(1).rstrip(".")
        # What the files imported and named before, gin has registered too.
        registered = {selector.removeprefix("attnlab.") for selector, _ in gin.config._REGISTRY.items()}
        known = sorted({*_known_names(), *(name for name in registered if not name.startswith("gin."))})
        candidates = known if "." in name else sorted({full.rpartition(".")[2] for full in known})
        module = name.rpartition(".")[0]
        candidates += [f"{module}.{each}" for each in dir(sys.modules.get(module)) if each[0] != "_"]
        return f"unknown name {name!r}{_nearest(name, candidates)}{_location(text)}"
    parameter = re.search(r"'([\w./]+)' doesn't have a parameter named '(\w+)'", text)
    if parameter:
        owner, option = parameter.groups()
        accepted = list(_parameters(owner))
        return f"{owner.rpartition('.')[2]} has no option {option!r}{_nearest(option, accepted)}{_location(text)}"
    return text


def _location(text: str) -> str:
    found = re.search(r"[Ii]n file \"([^\"]+)\", line (\d+)", text) or re.search(r"\(([^() ]+), line (\d+)\)", text)
    return f" ({found.group(1)}, line {found.group(2)})" if found else ""
