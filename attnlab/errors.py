"""The one exception for mistakes a user can mend, and what to do about a package that is missing."""

import json
from importlib import metadata
from pathlib import Path


class UserError(ValueError):
    """Bad input from outside: a file, a config, a folder. The command line prints its message as one line."""


def missing_package(module: str) -> str:
    """What to do where a module of the extra "experiments" cannot be imported, from where attnlab was installed."""
    return f"this needs {module}: {_installation()}"


def _installation() -> str:
    try:
        recorded = metadata.distribution("attnlab").read_text("direct_url.json")
    except metadata.PackageNotFoundError:
        return f"pip install -e '{Path(__file__).parent.parent}[experiments]'"
    if recorded is None:  # from an index
        return "pip install 'attnlab[experiments]'"
    source = json.loads(recorded)
    url = source["url"]
    if source.get("dir_info", {}).get("editable"):
        return f"pip install -e '{url.removeprefix('file://')}[experiments]'"
    if "vcs_info" in source:
        url = f"{source['vcs_info']['vcs']}+{url}@{source['vcs_info']['commit_id']}"
    return f"pip install 'attnlab[experiments] @ {url}'"
