"""Folders of runs, found by what decides a run's numbers, so that sweeps that ask for the same run share it.

A folder is called ARM-seedSEED-DIGEST for people; the digest of config, data and code alone identifies it.
"""

import functools
import hashlib
import importlib.util
import json
import re
import sys
from collections.abc import Mapping
from importlib import metadata
from pathlib import Path
from typing import Any

import attnlab
from attnlab.train.workdir import read_result, replace_text

# The parts of attnlab that a run can depend on once its config is resolved.
_PARTS = ("attention", "data", "models", "nn", "train")
_LIBRARIES = ("jax", "jaxlib", "flax", "optax", "grain", "numpy")


@functools.cache
def code_version(modules: tuple[str, ...] = ()) -> str:
    """Digest of the sources that a run executes, and of the versions of Python and the libraries below them.

    modules: names of imported modules beside attnlab's; of these, the file alone counts and not what it imports.
    """
    kernels = importlib.util.find_spec("kernels_pallas")
    folders = [Path(attnlab.__file__).parent / part for part in _PARTS]
    folders += map(Path, (kernels and kernels.submodule_search_locations) or [])
    sources = {f"{folder.name}/{path.relative_to(folder)}": path for folder in folders for path in folder.rglob("*.py")}
    sources |= {name: Path(file) for name in modules if (file := getattr(sys.modules[name], "__file__", None))}
    versions = {name: metadata.version(name) for name in _LIBRARIES} | {"python": list(sys.version_info[:2])}
    digests = {name: hashlib.sha256(path.read_bytes()).hexdigest() for name, path in sources.items()}
    return digest({"sources": digests, "versions": versions})


def digest(facts: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(facts, sort_keys=True, default=str).encode()).hexdigest()[:12]


def folder(cache: Path, name: str, digest: str) -> Path:
    """The run's folder: the one that is there, whoever named it, or a new one of this name."""
    existing = sorted(cache.glob(f"*-{digest}"))
    return existing[0] if existing else cache / f"{re.sub(r'[^-.=_a-zA-Z0-9]+', '-', name)}-{digest}"


def outcome(path: Path) -> dict[str, Any] | None:
    """What a run gave that is over, with what it ran on: of a failed one, its error. None: it is not over."""
    if (path / "failed.json").exists():
        result = {"status": "failed", **json.loads((path / "failed.json").read_text())}
    elif (finished := read_result(path)) is not None:
        result = {"status": "finished", **finished}
    else:
        return None
    return {**result, **json.loads((path / "machine.json").read_text()), "run": path.name}


def write_failure(path: Path, error: str) -> None:
    """A run that diverged diverges again, so it is kept; to have it tried again, delete its folder."""
    replace_text(path / "failed.json", json.dumps({"error": error}))


def write_machine(path: Path, facts: Mapping[str, Any]) -> None:
    """Keeps what the run executes on, for the rows of processes that find it done."""
    path.mkdir(parents=True, exist_ok=True)
    replace_text(path / "machine.json", json.dumps(facts))
