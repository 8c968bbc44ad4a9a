"""What a case of `attnlab regress` leaves in its folder, but for its picture."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any


def write_page(
    folder: Path,
    name: str,
    *,
    title: str,
    note: str,
    shown: str,
    command: str,
    rows: Sequence[dict[str, Any]] = (),
) -> None:
    """Writes folder/NAME.md of a table, with the command that repeats it, and its rows, if any, as NAME.jsonl."""
    if rows:
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / f"{name}.md").write_text(f"# {title}\n\n{note}\n\n{shown}\n\nRepeat with: `{command}`\n")
