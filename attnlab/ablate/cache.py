"""Folders of runs, found by what decides a run's numbers, so that sweeps that ask for the same run share it.

A folder is called ARM-seedSEED-DIGEST for people; the digest of config, data and code alone identifies it. The code is
what the modules of the config's classes import, as their sources state, and what those import in turn.
"""

import ast
import functools
import hashlib
import importlib.util
import json
import re
import sys
from collections.abc import Iterable, Mapping
from importlib import metadata
from pathlib import Path
from typing import Any

from attnlab.errors import is_installed, parse_json
from attnlab.train.store import replace_text
from attnlab.train.workdir import read_result

_OURS = ("attnlab", "kernels_pallas")


@functools.cache
def code_version(modules: tuple[str, ...]) -> str:
    """Digest of the sources that a run executes, and of the versions of Python and the libraries below them.

    modules: names of the modules of what the config builds (config.Built.modules).
    """
    sources = reached(modules)
    digests = {name: hashlib.sha256(source).hexdigest() for name, source in sources.items()}
    return digest({"sources": digests, "versions": versions(sources), "python": list(sys.version_info[:2])})


def versions(sources: Mapping[str, bytes]) -> dict[str, str]:
    """Of the installed packages that these modules import, by name, and of jaxlib, which jax imports."""
    imported = {
        base.partition(".")[0] for source in sources.values() for level, base, _ in _imports(source) if not level
    }
    names = {"jaxlib", *(name for top in imported.difference(_OURS) for name in _packages().get(top, ()))}
    return {name: metadata.version(name) for name in sorted(names)}


@functools.cache  # it reads the folder of every installed package
def _packages() -> Mapping[str, list[str]]:
    return metadata.packages_distributions()


def reached(modules: Iterable[str]) -> dict[str, bytes]:
    """The sources of these modules and of all that they import, also inside functions, by module name.

    Followed are attnlab, kernels_pallas, the packages of the modules given, and others that are not installed: what
    lies beside them. Nothing is imported.
    """
    followed = {*_OURS, *(name.partition(".")[0] for name in modules)}
    sources: dict[str, bytes] = {}
    seen, left = set[str](), list(modules)
    while left:
        name = left.pop()
        if name in seen:
            continue
        seen.add(name)
        left += [".".join(name.split(".")[:count]) for count in range(1, name.count(".") + 1)]  # run on its import
        path = _path(name)
        if path is not None and (name.partition(".")[0] in followed or not is_installed(path)):
            sources[name] = path.read_bytes()
            package = name if path.name == "__init__.py" else name.rpartition(".")[0]
            for level, base, names in _imports(sources[name]):
                above = package.split(".")[: package.count(".") + 2 - level] if level else []
                full = ".".join([*above, *([base] if base else [])])
                left += [full, *(f"{full}.{each}" for each in names)]  # a name may be a module
    return sources


@functools.cache  # arms share nearly all of their sources
def _imports(source: bytes) -> list[tuple[int, str, list[str]]]:
    """(level, a, [b]) of every `from a import b` and `import a`, also inside functions; level counts leading dots."""
    found: list[tuple[int, str, list[str]]] = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            found += [(0, alias.name, []) for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            found.append((node.level, node.module or "", [alias.name for alias in node.names]))
    return found


def _path(name: str) -> Path | None:
    """The file of a module, found without importing it; None for what is no module or has no source in Python."""
    top, *rest = name.split(".")
    try:
        spec = importlib.util.find_spec(top)
    except ValueError:  # a module made by hand
        return None
    if spec is None:
        return None
    folders = [Path(folder).joinpath(*rest) for folder in spec.submodule_search_locations or ()]
    files = [folder / "__init__.py" for folder in folders] + [folder.with_suffix(".py") for folder in folders if rest]
    if not rest and spec.origin is not None:
        files.append(Path(spec.origin))
    return next((file for file in files if file.suffix == ".py" and file.is_file()), None)


def digest(facts: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(facts, sort_keys=True, default=str).encode()).hexdigest()[:12]


def folder(cache: Path, name: str, digest: str) -> Path:
    """The run's folder: the one that is there, whoever named it, or a new one of this name."""
    existing = sorted(cache.glob(f"*-{digest}"))
    return existing[0] if existing else cache / f"{re.sub(r'[^-.=_a-zA-Z0-9]+', '-', name)}-{digest}"


def outcome(path: Path) -> dict[str, Any] | None:
    """What a run gave that is over; of a failed one, its error, and whether it would fail again. None: it is not over.

    Raises UserError: result.json is damaged.
    """
    failure = _facts(path / "failed.json")
    if failure is not None and isinstance(failure.get("error"), str):  # a damaged one only means to try again
        result = {"status": "failed", "error": failure["error"], "is_final": failure.get("is_final", True)}
    elif (finished := read_result(path)) is not None:
        result = {"status": "finished", **finished}
    else:
        return None
    return {**result, "run": path.name}


def write_failure(path: Path, error: str, *, is_final: bool) -> None:
    """A run that diverged diverges again, so it is kept; to have it tried again, delete its folder."""
    path.mkdir(parents=True, exist_ok=True)
    replace_text(path / "failed.json", json.dumps({"error": error, "is_final": is_final}))


def forget_failures(cache: Path) -> None:
    """Deletes what is kept of failures that are no fault of the run's, so that it is tried again."""
    for path in cache.glob("*/failed.json"):
        if (_facts(path) or {"is_final": False}).get("is_final") is False:
            path.unlink(missing_ok=True)


def write_machine(path: Path, facts: Mapping[str, Any]) -> None:
    """Keeps what the run executes on, for the rows of processes that find it done."""
    path.mkdir(parents=True, exist_ok=True)
    replace_text(path / "machine.json", json.dumps(facts))


def read_machine(path: Path) -> dict[str, Any] | None:
    """None: it is not there, or damaged."""
    facts = _facts(path / "machine.json")
    return facts if facts and {"implementations", "environment"} <= facts.keys() else None


def _facts(path: Path) -> dict[str, Any] | None:
    """A file's JSON object; None for a file that is not there or holds none."""
    try:
        facts = parse_json(path.read_bytes())
    except (FileNotFoundError, ValueError):
        return None
    return facts if isinstance(facts, dict) else None
