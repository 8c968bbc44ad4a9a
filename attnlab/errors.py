"""The exceptions that the command line prints as one line, and what they need to know of what lies outside attnlab."""

import json
import os
import sysconfig
import traceback
from importlib import metadata
from pathlib import Path
from typing import Any


class UserError(ValueError):
    """Bad input from outside: a file, a config, a folder. Exit status 2."""


class OwnedError(UserError):
    """The folder is in use by another process."""


class RunError(RuntimeError):
    """A run stopped for a reason outside it, such as a full disk. Exit status 1; what it kept stays."""


def out_of_memory(error: BaseException) -> bool:
    """Whether an error says that memory ran out, of the host or of a device."""
    return isinstance(error, MemoryError) or (
        type(error).__name__ == "JaxRuntimeError" and "RESOURCE_EXHAUSTED" in str(error)
    )


def parse_json(text: str | bytes) -> Any:
    """json.loads, whose only error is a ValueError: also of what is nested more deeply than Python reads."""
    try:
        return json.loads(text)
    except RecursionError as error:
        raise ValueError("nested too deeply") from error


def is_installed(path: Path) -> bool:
    """Whether a file belongs to the standard library or to an installed package."""
    return path.is_relative_to(sysconfig.get_path("stdlib")) or not {"site-packages", "dist-packages"}.isdisjoint(
        path.parts
    )


def own_place(error: Exception) -> str:
    """Where in a user's own module it was raised, or what raised it was called; "" where no such module took part."""
    frames = (frame for frame, _ in traceback.walk_tb(error.__traceback__))
    places = [(frame.f_code.co_filename, frame.f_lineno) for frame in frames]
    own = [(file, line) for file, line in places if os.path.isfile(file) and not _is_library(Path(file))]
    return ", at {}:{}".format(*own[-1]) if own else ""


def _is_library(path: Path) -> bool:
    return path.is_relative_to(Path(__file__).parent) or is_installed(path)


# Of what the extra "experiments" does not bring.
_EXTRAS = {"tokenizers": "tokenizers", "gcsfs": "gcs", "libtpu": "tpu-aot"}


def missing_package(module: str) -> str:
    """What to do where a module of attnlab's extras cannot be imported, from where attnlab was installed."""
    extras = ",".join(["experiments", *filter(None, [_EXTRAS.get(module.partition(".")[0])])])
    return f"this needs {module}: {_installation(extras)}"


def _installation(extras: str) -> str:
    try:
        recorded = metadata.distribution("attnlab").read_text("direct_url.json")
    except metadata.PackageNotFoundError:
        return f"pip install -e '{Path(__file__).parent.parent}[{extras}]'"
    if recorded is None:  # from an index
        return f"pip install 'attnlab[{extras}]'"
    source = json.loads(recorded)
    url = source["url"]
    if source.get("dir_info", {}).get("editable"):
        return f"pip install -e '{url.removeprefix('file://')}[{extras}]'"
    if "vcs_info" in source:
        url = f"{source['vcs_info']['vcs']}+{url}@{source['vcs_info']['commit_id']}"
    return f"pip install 'attnlab[{extras}] @ {url}'"
