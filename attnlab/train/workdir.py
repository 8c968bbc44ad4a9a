"""A run's folder: run.json, config.gin, metrics.jsonl, tensorboard/, checkpoints/, and result.json once it is over."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import grain
import jax
import orbax.checkpoint as ocp
from tensorboardX import SummaryWriter

from attnlab.errors import UserError

_KEPT_CHECKPOINTS = 2


class Workdir:
    """Opens or makes the folder. Nothing in it is ever deleted but checkpoints older than the newest two, and rows of
    metrics later than the checkpoint that a run goes on from."""

    def __init__(self, path: Path, fingerprint: Mapping[str, str], config_text: str):
        self.path = path.absolute()
        self._metrics = self.path / "metrics.jsonl"
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            self._claim(dict(fingerprint))
            _replace_text(self.path / "config.gin", config_text)
        except OSError as error:
            raise UserError(f"workdir: cannot write to {path} ({error.strerror}); give another --workdir") from error
        self._tensorboard: Any = None
        self._checkpoints: Any = None

    def _claim(self, fingerprint: dict[str, str]) -> None:
        """Makes the folder this run's, or refuses: it is another's."""
        run = self.path / "run.json"
        if not run.exists():
            _replace_text(run, json.dumps(fingerprint, indent=2, sort_keys=True))
            return
        kept = _read_json(run)
        names = sorted(kept.keys() | fingerprint.keys())
        differing = [name for name in names if kept.get(name) != fingerprint.get(name)]
        if differing:
            shown = ", ".join(f"{name} {kept.get(name)} there, {fingerprint.get(name)} now" for name in differing[:3])
            more = f" and {len(differing) - 3} more" if len(differing) > 3 else ""
            raise UserError(f"workdir: {self.path} holds a run with {shown}{more}; give another --workdir")

    def result(self) -> dict[str, Any] | None:
        """What `finish` kept, if the run is over."""
        path = self.path / "result.json"
        return _read_json(path) if path.exists() else None

    def restore(self, state: Any, batches: grain.DatasetIterator) -> tuple[Any, list[dict[str, Any]]]:
        """The newest checkpoint's state and the rows up to it, `batches` moved to its place; or the start."""
        options = ocp.CheckpointManagerOptions(max_to_keep=_KEPT_CHECKPOINTS)
        self._checkpoints = ocp.CheckpointManager(self.path / "checkpoints", options=options)
        step = self._checkpoints.latest_step()
        if step is not None:
            like = jax.tree.map(ocp.utils.to_shape_dtype_struct, state)
            place = grain.checkpoint.CheckpointRestore(batches)
            state = _restore(self._checkpoints, step, state=ocp.args.StandardRestore(like), data=place)["state"]
        rows = self._rows_until(step or 0)
        self._tensorboard = SummaryWriter(str(self.path / "tensorboard"), purge_step=(step or 0) + 1)
        return state, rows

    def _rows_until(self, step: int) -> list[dict[str, Any]]:
        """Cuts metrics.jsonl to the rows up to a step. A last line that was cut off in writing is later than that."""
        if not self._metrics.exists():
            return []
        lines = self._metrics.read_text().split("\n")[:-1]
        rows = [row for row in map(json.loads, lines) if row["step"] <= step]
        _replace_text(self._metrics, "".join(json.dumps(row) + "\n" for row in rows))
        return rows

    def write_row(self, row: Mapping[str, Any]) -> None:
        with self._metrics.open("a") as file:
            file.write(json.dumps(row) + "\n")
        for name, value in row.items():
            if name not in ("step", "split"):
                self._tensorboard.add_scalar(f"{row['split']}/{name}", value, row["step"])

    def save(self, step: int, state: Any, batches: grain.DatasetIterator) -> None:
        """Starts writing a checkpoint, which counts only once it is whole; training goes on meanwhile."""
        self._checkpoints.save(
            step,
            args=ocp.args.Composite(state=ocp.args.StandardSave(state), data=grain.checkpoint.CheckpointSave(batches)),
        )

    def close(self) -> None:
        """Waits for the last checkpoint."""
        self._checkpoints.wait_until_finished()
        self._checkpoints.close()
        self._tensorboard.close()

    def finish(self, result: Mapping[str, Any]) -> None:
        self.close()
        _replace_text(self.path / "result.json", json.dumps(result))


def read_state(path: Path, like: Any) -> tuple[int, Any]:
    """The step and the state of the newest checkpoint in a run's folder, which stays as it is; `like`: of its shapes.

    The run may still be going on.
    """
    folder = path.absolute() / "checkpoints"
    if folder.is_dir():
        with ocp.CheckpointManager(folder, options=ocp.CheckpointManagerOptions(create=False)) as checkpoints:
            step = checkpoints.latest_step()
            if step is not None:
                return step, _restore(checkpoints, step, state=ocp.args.StandardRestore(like))["state"]
    raise UserError(f"workdir: {path} has no checkpoint yet")


def _restore(checkpoints: Any, step: int, **items: Any) -> Any:
    try:
        return checkpoints.restore(step, args=ocp.args.Composite(**items))
    except Exception as error:
        raise UserError(
            f"checkpoint: {checkpoints.directory / str(step)} cannot be read ({type(error).__name__}); it was left as "
            "it is. Move it away to go on from the checkpoint before it, or give another --workdir"
        ) from error


def _read_json(path: Path) -> Any:
    try:
        return json.loads(path.read_text())
    except json.JSONDecodeError as error:
        raise UserError(f"workdir: {path} is not JSON ({error}); move it away, or give another --workdir") from error


def _replace_text(path: Path, text: str) -> None:
    """Writes a file in one step, so that it is never half there."""
    partial = path.with_name(path.name + ".partial")
    partial.write_text(text)
    partial.replace(path)
