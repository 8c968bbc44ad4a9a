"""Folders in an object store, gs://BUCKET/..., beside those of this machine: what differs of pathlib's ways.

An object is written whole or not at all, and cannot be added to; a folder is where there are objects.
"""

import contextlib
import importlib.util
import logging
import os
import shutil
import tempfile
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any, cast

from attnlab.errors import UserError


def find(text: str) -> Path:
    """A path of this machine, or for gs://... an epath.Path, which has pathlib's methods as far as they are used here.

    Raises UserError: it is in another kind of store, or the package for this one is missing.
    """
    if "://" not in text:
        return Path(text)
    if not text.removeprefix("gs://").strip("/") or not text.startswith("gs://"):
        raise UserError(f"workdir: got {text}; need a folder, or gs://BUCKET/...")
    if importlib.util.find_spec("gcsfs") is None:
        raise UserError(f"workdir: {text} needs the package gcsfs: pip install gcsfs")
    import fsspec.config
    from etils import epath

    # It prints a traceback of what it also raises: that a file is gone which another process has just deleted.
    logging.getLogger("fsspec.prefetcher").setLevel(logging.CRITICAL)
    fsspec.config.conf.setdefault("gcs", {})["use_listings_cache"] = False  # others write there too
    return cast(Path, epath.Path(text))


def is_remote(path: Path) -> bool:
    return not isinstance(path, Path)


def whole(path: Path) -> Path:
    """From the root of this machine, or of the store."""
    return path if is_remote(path) else path.resolve()


def replace_text(path: Path, text: str) -> None:
    """Writes a file in one step, so that it is never half there. Several processes may write one."""
    if is_remote(path):
        path.write_text(text)
        return
    partial = path.with_name(f"{path.name}.{uuid.uuid4().hex[:8]}.partial")
    try:
        partial.write_text(text)
        partial.replace(path)
    except OSError:
        with contextlib.suppress(OSError):
            partial.unlink(missing_ok=True)
        raise


def delete_folder(path: Path) -> None:
    """As far as it is there and can be deleted."""
    if not is_remote(path):
        shutil.rmtree(path, ignore_errors=True)
        return
    with contextlib.suppress(OSError):
        cast(Any, path).rmtree()


def move_folder(path: Path, target: Path) -> None:
    if not is_remote(path):
        path.rename(target)
        return
    import fsspec

    fsspec.filesystem("gcs").mv(str(path), str(target), recursive=True)


@contextlib.contextmanager
def here(path: Path) -> Iterator[Path]:
    """A path of this machine for a file that is read or written in the block; what is written lies at `path` after it,
    also where the block raises."""
    if not is_remote(path):
        yield path
        return
    with tempfile.TemporaryDirectory() as folder:
        local = Path(folder) / path.name
        before = path.read_bytes() if path.exists() else None
        if before is not None:
            local.write_bytes(before)
        try:
            yield local
        finally:
            if local.exists() and (after := local.read_bytes()) != before:
                path.write_bytes(after)


def relative(path: Path, folder: Path) -> str:
    """A path as a file in the folder keeps it: from there, or in a store whole where it is outside."""
    if not is_remote(path):
        return os.path.relpath(path, folder)
    return str(path.relative_to(folder)) if path.is_relative_to(folder) else str(path)


def found(text: str, folder: Path) -> Path:
    """The path that `relative` gave. A file of a folder here, which may be somebody else's, leads to no store."""
    return find(text) if is_remote(folder) and "://" in text else folder / text
