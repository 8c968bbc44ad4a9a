"""A run's folder: run.json, config.gin, metrics.jsonl, tensorboard/, checkpoints/, and result.json once it is over."""

import json
import uuid
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
    metrics later than the checkpoint that a run continues from."""

    def __init__(self, path: Path, fingerprint: Mapping[str, str], config_text: str):
        self.path = path.absolute()
        self._metrics = self.path / "metrics.jsonl"
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            self._claim(dict(fingerprint))
            replace_text(self.path / "config.gin", config_text)
        except OSError as error:
            raise UserError(f"workdir: cannot write to {path} ({error.strerror}); give another --workdir") from error
        self._tensorboard: Any = None
        self._checkpoints: Any = None

    def _claim(self, fingerprint: dict[str, str]) -> None:
        """Makes the folder this run's, or refuses: it is another's."""
        run = self.path / "run.json"
        if not run.exists():
            replace_text(run, json.dumps(fingerprint, indent=2, sort_keys=True))
            return
        kept = _read_json(run)
        names = sorted(kept.keys() | fingerprint.keys())
        differing = [name for name in names if kept.get(name) != fingerprint.get(name)]
        if differing:
            shown = ", ".join(f"{name} {kept.get(name)} there, {fingerprint.get(name)} now" for name in differing[:3])
            more = f" and {len(differing) - 3} more" if len(differing) > 3 else ""
            raise UserError(f"workdir: {self.path} holds a run with {shown}{more}; give another --workdir")

    def restore(self, state: Any, batches: grain.DatasetIterator) -> tuple[Any, list[dict[str, Any]]]:
        """The newest checkpoint's state and the rows up to it, `batches` moved to its position; or the start."""
        options = ocp.CheckpointManagerOptions(max_to_keep=_KEPT_CHECKPOINTS)
        self._checkpoints = ocp.CheckpointManager(self.path / "checkpoints", options=options)
        step = self._checkpoints.latest_step()
        if step is not None:
            like = jax.tree.map(ocp.utils.to_shape_dtype_struct, state)
            try:
                restored = self._checkpoints.restore(
                    step,
                    args=ocp.args.Composite(
                        state=ocp.args.StandardRestore(like), data=grain.checkpoint.CheckpointRestore(batches)
                    ),
                )
            except Exception as error:
                raise _unreadable(self.path / "checkpoints" / str(step), error) from error
            state = restored["state"]
        rows = self._rows_until(step or 0)
        self._tensorboard = SummaryWriter(str(self.path / "tensorboard"), purge_step=(step or 0) + 1)
        return state, rows

    def _rows_until(self, step: int) -> list[dict[str, Any]]:
        """Cuts metrics.jsonl to the rows up to a step. A last line that was cut off in writing is later than that."""
        if not self._metrics.exists():
            return []
        lines = self._metrics.read_text().split("\n")[:-1]
        rows = [row for row in map(json.loads, lines) if row["step"] <= step]
        replace_text(self._metrics, "".join(json.dumps(row) + "\n" for row in rows))
        return rows

    def write_row(self, row: Mapping[str, Any]) -> None:
        with self._metrics.open("a") as file:
            file.write(json.dumps(row) + "\n")
        for name, value in row.items():
            if name not in ("step", "split"):
                self._tensorboard.add_scalar(f"{row['split']}/{name}", value, row["step"])

    def save(self, step: int, state: Any, batches: grain.DatasetIterator) -> None:
        """Starts writing a checkpoint, which counts only once it is whole; training continues meanwhile."""
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
        replace_text(self.path / "result.json", json.dumps(result))


def read_result(path: Path) -> dict[str, Any] | None:
    """What `finish` kept in a run's folder, if the run is over."""
    return _read_json(path / "result.json") if (path / "result.json").exists() else None


def last_step(path: Path) -> int:
    """The step of the newest checkpoint in a run's folder; 0 if it has none."""
    return max((int(step.name) for step in (path / "checkpoints").glob("*") if step.name.isdigit()), default=0)


def newest_state(path: Path, like: Any) -> Any:
    """The state in the newest checkpoint of a run's folder, which is only read. like: its shapes and dtypes."""
    step = last_step(path)
    if step == 0:
        raise UserError(
            f"checkpoint: {path} holds none; give the folder of a run that has reached its first checkpoint"
        )
    here = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    like = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=here), like)
    newest = path.absolute() / "checkpoints" / str(step)
    try:
        with ocp.StandardCheckpointer() as checkpointer:
            return checkpointer.restore(newest / "state", like)
    except Exception as error:
        raise _unreadable(newest, error) from error


def _unreadable(checkpoint: Path, error: Exception) -> UserError:
    return UserError(
        f"checkpoint: {checkpoint} cannot be read ({type(error).__name__}); it was left as it is. Move it away to "
        "continue from the checkpoint before it, or give another --workdir"
    )


def _read_json(path: Path) -> Any:
    try:
        return json.loads(path.read_text())
    except json.JSONDecodeError as error:
        raise UserError(f"workdir: {path} is not JSON ({error}); move it away, or give another --workdir") from error


def replace_text(path: Path, text: str) -> None:
    """Writes a file in one step, so that it is never half there. Several processes may write one."""
    partial = path.with_name(f"{path.name}.{uuid.uuid4().hex[:8]}.partial")
    partial.write_text(text)
    partial.replace(path)
