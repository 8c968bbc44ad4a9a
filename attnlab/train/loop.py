"""The training loop, from top to bottom: `train` is the whole of it, around the steps of `attnlab.train.step`.

A run is decided by its experiment alone: initial values by parameter path, batches by index, dropout by step, all from
one seed. A checkpoint holds the state and the position in the data, and a resumed run cuts its metrics back to the
checkpoint, so a run that was stopped, however abruptly, continues bit for bit as if it had not been.
"""

import contextlib
import dataclasses
import functools
import math
import sys
import threading
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import grain
import jax
import jax.numpy as jnp
from flax import nnx
from tqdm import tqdm

from attnlab import nn, signals
from attnlab.attention._shared.checks import check_dtype, check_int, keep, require, shown
from attnlab.data.batches import MOST_SEED
from attnlab.errors import UserError
from attnlab.train import store
from attnlab.train.causality import check_causality
from attnlab.train.hosts import by_first, is_first, make_agreement, meet
from attnlab.train.memory import check_memory
from attnlab.train.mesh import (
    Mesh,
    check_batch_size,
    check_processes,
    devices_of_runs,
    is_described,
    own_rows,
    placed,
    without_mesh,
)
from attnlab.train.step import (
    OptimizerOptions,
    batch_shapes,
    initial_state,
    loss_shapes,
    make_evaluation,
    make_optimizer,
    make_step,
    state_shapes,
)
from attnlab.train.tasks.base import Batch, Illustrated, Task
from attnlab.train.workdir import Workdir, newest_state

_PENDING = ("seconds", "items", "data_seconds", "checkpoint_seconds")
# Seconds that steps are to take for it to be said, where no bar shows it.
_WORTH_SAYING = 30
# Folded into the seed's key to draw samples; the step folds in smaller numbers.
_SAMPLES = 2


@dataclasses.dataclass(frozen=True)
class Experiment:
    """One training run.

    Args:
      model: built without values (attnlab.models).
      task: batches and loss.
      optimizer: its options.
      steps, batch_size: length of training, in batches of this many examples.
      seed: decides initial values, order of batches and dropout.
      log_every: steps between rows of training metrics, which are means over them.
      evaluate_every: steps between evaluations; one more follows the last step.
      evaluation_batches: batches of an evaluation; None takes all of the validation data.
      checkpoint_every: steps between checkpoints; one more follows the last step.
      mesh: the devices that share the run; one by default.
      accumulation: parts of a batch whose gradients are taken one after the other and added, which takes the memory of
        one part. Dropout is drawn by part, and buffers learn from each in turn.
      gradient_dtype: in which devices add up the gradients of matrices, such as "bfloat16", which halves what they
        exchange; None is float32, as the parameters are. Those of vectors, and of looked up embeddings, stay float32.
    """

    model: nnx.Module
    task: Task
    steps: int
    batch_size: int
    optimizer: OptimizerOptions = dataclasses.field(default_factory=OptimizerOptions)
    seed: int = 0
    log_every: int = 10
    evaluate_every: int = 100
    evaluation_batches: int | None = 16
    checkpoint_every: int = 100
    mesh: Mesh = dataclasses.field(default_factory=Mesh)
    accumulation: int = 1
    gradient_dtype: Any = None

    def __post_init__(self) -> None:
        if not isinstance(self.model, nnx.Module):
            raise TypeError(f"model: got {shown(self.model)}; need a model, such as models.LanguageModel()")
        if not isinstance(self.task, Task) or isinstance(self.task, type):
            raise TypeError(f"task: got {shown(self.task)}; need a task, such as train.LanguageTask()")
        if not isinstance(self.optimizer, OptimizerOptions):
            raise TypeError(f"optimizer: got {shown(self.optimizer)}; need train.OptimizerOptions()")
        if not isinstance(self.mesh, Mesh):
            raise TypeError(f"mesh: got {shown(self.mesh)}; need train.Mesh()")
        for name in ("steps", "batch_size", "log_every", "evaluate_every", "checkpoint_every", "accumulation"):
            keep(self, **{name: check_int(name, getattr(self, name), least=1, most=2**31 - 1)})
        if self.evaluation_batches is not None:
            keep(self, evaluation_batches=check_int("evaluation_batches", self.evaluation_batches, least=1))
        if self.gradient_dtype is not None:
            keep(self, gradient_dtype=check_dtype("gradient_dtype", self.gradient_dtype))
        keep(self, seed=check_int("seed", self.seed, least=0, most=MOST_SEED))
        warmup, steps = self.optimizer.warmup_steps, self.steps
        allowed = f"need fewer than steps, so OptimizerOptions.warmup_steps of 0 to {steps - 1}"
        require(warmup < steps, "warmup_steps", warmup, allowed)
        _check_implementations(self.model)
        check_processes(self.mesh)
        check_batch_size(self.mesh, self.batch_size, self.accumulation)
        if not is_described():  # else its compiler says
            check_memory(self.model, self.task, self.batch_size // self.accumulation, self.mesh)
        # Traces the model on the task's shapes, so that what does not fit is refused now, not during the run; and so is
        # a mixer of one's own whose costs cannot be told.
        loss_shapes(self.model, self.task, self.batch_size)
        self.task.costs(self.model)


def _check_implementations(model: nnx.Module) -> None:
    """Refuses a kernel for another device than the run's, which would fail when the step is compiled."""
    here = devices_of_runs()[0].platform
    for _, module in nnx.iter_graph(model):
        if isinstance(module, nn.Attention) and (name := module.implementation or "").startswith("pallas_"):
            require(name == f"pallas_{here}", "implementation", repr(name), f"the devices are {here}s; leave it out")


@dataclasses.dataclass(frozen=True)
class Result:
    """What a run gave.

    final: validation metrics after the last step. history: rows of metrics, {"step", "split": "train" or "validation",
    "loss", ...}. items_per_second: tokens or images in training steps alone. seconds: training and evaluation.
    compile_seconds: of the training step. All of these count the whole run, also if it was resumed.
    """

    final: dict[str, float]
    history: list[dict[str, Any]]
    items_per_second: float
    seconds: float
    compile_seconds: float


def train(
    experiment: Experiment,
    *,
    workdir: Path | None = None,
    fingerprint: Mapping[str, str] | None = None,
    config_text: str = "",
    profiled: int = 0,
) -> Result:
    """Trains a model, or continues its training. Of several processes (jax.distributed) each calls it alike.

    Args:
      experiment: what to train.
      workdir: folder for checkpoints and metrics, and samples.png of a task that draws; a second call continues from
        the last checkpoint there, and one after the end gives the result at once. None keeps nothing. Also a folder in
        an object store, as attnlab.train.store.find gives it of gs://...
      fingerprint: the run's options by name. A workdir that holds a run with other options or data is refused; on
        another mesh it is continued.
      config_text: kept as workdir/config.gin.
      profiled: steps of which jax.profiler writes a trace into workdir/profile, from the third of this call on.

    Raises:
      UserError: the workdir cannot be written, is in use or holds another run, or no checkpoint there can be read; a
        mixer of one's own that is to be causal sees later tokens.
      FloatingPointError: the loss or the state is not finite. Checkpoints are of finite states alone, and stay.
      RunError: a file cannot be written or read.
      KeyboardInterrupt, SystemExit(143): after SIGINT or SIGTERM, once a checkpoint is written.
    """
    profiled = check_int("profiled", profiled, least=0)
    check_causality(experiment.model, experiment.task)
    if workdir is None:
        if profiled:
            raise ValueError(f"profiled: got {profiled} without a workdir, which takes the trace")
        return _run(experiment, None)
    if profiled and store.is_remote(workdir):
        raise UserError(
            f"profile: got {profiled} with {workdir}; the profiler writes to a disk, so give another --workdir"
        )
    read = {f"data {name}": str(value) for name, value in experiment.task.describe().items()}
    facts = {**without_mesh(fingerprint or {}), **read, "mesh": str(experiment.mesh)}
    folder = Workdir(workdir, facts, config_text)
    if (finished := folder.result()) is not None:
        return Result(**finished)
    with folder.owned():
        if (finished := folder.result()) is not None:  # by its owner until now
            return Result(**finished)
        return _run(experiment, folder, profiled)


def _run(experiment: Experiment, folder: Workdir | None, profiled: int = 0) -> Result:
    model, task, steps = experiment.model, experiment.task, experiment.steps
    key, mesh = jax.random.key(experiment.seed), experiment.mesh.build()
    optimizer = make_optimizer(experiment.optimizer, steps)
    step_function = make_step(model, task, optimizer, key, mesh, experiment.accumulation, experiment.gradient_dtype)
    evaluate_function = make_evaluation(model, task, mesh)
    unit, units = (task.costs(model)[name] for name in ("unit", "units"))

    batches: grain.DatasetIterator = iter(batches_of(experiment, "train", mesh))
    history: list[dict[str, Any]] = []
    # Of the steps since the last row: evaluating and saving are not in their seconds, waiting for data is.
    pending = dict.fromkeys(_PENDING, 0.0)
    state = None
    if folder is not None:
        shapes = state_shapes(model, task, experiment.batch_size, optimizer, mesh)
        state, history, kept = folder.restore(shapes, batches)
        pending |= kept
    if state is None:
        state = initial_state(model, task, experiment.batch_size, optimizer, key, mesh)
    start = int(state.step)

    compile_start = time.perf_counter()
    step_function = step_function.lower(state, batch_shapes(task, experiment.batch_size, mesh)).compile()
    compile_seconds = time.perf_counter() - compile_start
    meet()

    def record(row: dict[str, Any]) -> None:
        history.append(row)
        if folder is not None:
            by_first(functools.partial(folder.write_row, row))

    def refuse_diverged(name: str, loss: float, step: int) -> None:
        if not math.isfinite(loss):
            where = "" if folder is None else f"; {folder.kept()}"
            raise FloatingPointError(f"{name} is {loss} at step {step}{where}")

    agreement, estimated = make_agreement(mesh), False
    run_name = "" if folder is None or _is_alone() else f"{folder.path.name}: "
    traced = range(start + 3, min(start + 3 + profiled, steps + 1))  # the first ones are not like the others
    doing = "stopping after this step" + (": saving ..." if folder is not None else "")
    with signals.deferred(doing) as signal_came, _bar(start, steps) as progress, contextlib.ExitStack() as tracing:
        if start:
            _print(progress, f"continuing after step {start} of {steps}")
        if profiled and not traced:
            _print(progress, f"profile: {steps - start} steps are left, and the first two are not traced")
        segment_start, segment_step = time.perf_counter(), start
        for step in range(start + 1, steps + 1):
            if folder is not None and traced and step == traced[0]:
                jax.block_until_ready(state)
                tracing.enter_context(jax.profiler.trace(folder.path / "profile"))
            before = time.perf_counter()
            with jax.profiler.TraceAnnotation("data"):
                batch = placed(next(batches), mesh)
            pending["data_seconds"] += time.perf_counter() - before
            with jax.profiler.StepTraceAnnotation("train", step_num=step):
                state = step_function(state, batch)
            progress.update()
            if folder is not None and traced and step == traced[-1]:
                jax.block_until_ready(state)
                tracing.close()
                _print(progress, f"profile of steps {traced[0]} to {step}: {folder.path / 'profile'}")

            last = step == steps
            evaluating = last or step % experiment.evaluate_every == 0
            saving = last or step % experiment.checkpoint_every == 0
            logging = last or step % experiment.log_every == 0
            waiting = logging or evaluating or saving
            stopping = agreement(signal_came() or 0, state.step, now=waiting)
            if not (waiting or stopping):
                continue

            jax.block_until_ready(state)
            pending["seconds"] += time.perf_counter() - segment_start
            pending["items"] += (step - segment_step) * experiment.batch_size * units
            refuse_diverged("loss", _means(state.sums)["loss"], step)
            if logging:
                row = _means(state.sums)
                row |= task.derived(row)
                record({"step": step, "split": "train", **row, **pending})
                speed = pending["items"] / pending["seconds"]
                left = (steps - step) * experiment.batch_size * units / speed
                if progress.disable and left > _WORTH_SAYING and not estimated:
                    _print(progress, f"{run_name}step {step} of {steps}: about {duration(left)} of steps left")
                estimated = True
                progress.set_postfix_str(f"loss {row['loss']:.4f}, {speed:,.0f} {unit}s/s")
                state = state._replace(sums=jax.tree.map(lambda total: total * 0, state.sums))
                pending = dict.fromkeys(_PENDING, 0.0)
            if evaluating:
                before = time.perf_counter()
                metrics = evaluate(experiment, evaluate_function, nn.merge(state.parameters, state.buffers))
                refuse_diverged("validation loss", metrics["loss"], step)
                record({"step": step, "split": "validation", **metrics, "seconds": time.perf_counter() - before})
                _print(progress, f"{run_name}step {step} of {steps}: validation loss {metrics['loss']:.4f}")
            if evaluating and not stopping:  # which took its time
                stopping = agreement(signal_came() or 0, state.step, now=True)
            if folder is not None and (saving or stopping):
                before = time.perf_counter()
                folder.save(step, state, batches, history, pending)
                pending["checkpoint_seconds"] += time.perf_counter() - before
            if last and not stopping:  # nor did saving, and no process is to end alone
                stopping = agreement(signal_came() or 0, state.step, now=True)
            if stopping:
                kept_here = "nothing was kept" if folder is None else f"step {step} is kept in {folder.path}"
                signals.announce(stopping, f"; {kept_here}, and the same command continues")
                signals.stop(stopping)
            segment_start, segment_step = time.perf_counter(), step

    result = _result(history, compile_seconds)
    if folder is not None:
        if isinstance(task, Illustrated):
            _illustrate(task, model, nn.merge(state.parameters, state.buffers), mesh, folder.path, key)
        by_first(functools.partial(folder.finish, history, dataclasses.asdict(result)))
    return result


def batches_of(experiment: Experiment, split: str, mesh: jax.sharding.Mesh) -> grain.IterDataset:
    """Of each batch what this process's devices hold."""
    rows = own_rows(mesh, experiment.batch_size)
    some = () if rows is None else (rows,)
    return experiment.task.batches(split, experiment.batch_size, experiment.seed, *some)


def _illustrate(
    task: Illustrated, model: nnx.Module, values: nn.Parameters, mesh: jax.sharding.Mesh, folder: Path, key: jax.Array
) -> None:
    everywhere = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())
    whole = jax.jit(lambda values: values, out_shardings=everywhere)(values)

    def draw() -> None:
        values = jax.tree.map(lambda value: value.addressable_data(0), whole)
        with store.here(folder / "samples.png") as picture:
            task.illustrate(model, values, picture, key=jax.random.fold_in(key, _SAMPLES), count=64, temperature=1.0)

    by_first(draw)


def restore_values(experiment: Experiment, path: Path, mesh: jax.sharding.Mesh | None = None) -> nn.Parameters:
    """The model's values, buffers too, from the newest checkpoint in the folder of a run of this experiment.

    mesh: over which they lie as in training, each device reading its part; None: one device.

    Raises UserError: there is none, or it cannot be read.
    """
    model, task, batch_size = experiment.model, experiment.task, experiment.batch_size
    optimizer = make_optimizer(experiment.optimizer, experiment.steps)
    state = newest_state(path, state_shapes(model, task, batch_size, optimizer, mesh or Mesh().build()))
    return nn.merge(state.parameters, state.buffers)


def evaluate(
    experiment: Experiment, function: Callable[[nn.Parameters, Batch], dict[str, jax.Array]], values: nn.Parameters
) -> dict[str, float]:
    """Validation metrics: means over examples, the fillers of the last batch left out."""
    totals: dict[str, float] = {}
    weight, mesh = 0.0, experiment.mesh.build()
    for number, own in enumerate(batches_of(experiment, "validation", mesh)):
        if number == experiment.evaluation_batches:
            break
        batch = placed(own, mesh)
        batch_weight = float(jnp.sum(batch["weight"]))
        for name, value in function(values, batch).items():
            totals[name] = totals.get(name, 0.0) + batch_weight * float(value)
        weight += batch_weight
    means = {name: total / weight for name, total in totals.items()}
    return means | experiment.task.derived(means)


def _means(sums: Mapping[str, jax.Array]) -> dict[str, float]:
    """Means over the steps since the last row."""
    return {name: float(value) / float(sums["steps"]) for name, value in sums.items() if name != "steps"}


def _result(history: list[dict[str, Any]], compile_seconds: float) -> Result:
    training = [row for row in history if row["split"] == "train"]
    final = {name: value for name, value in history[-1].items() if name not in ("step", "split", "seconds")}
    return Result(
        final=final,
        history=history,
        items_per_second=sum(row["items"] for row in training) / sum(row["seconds"] for row in training),
        seconds=sum(row["seconds"] for row in history),
        compile_seconds=compile_seconds,
    )


def _bar(start: int, steps: int) -> tqdm:
    """A progress bar on a terminal; nothing elsewhere, where `_print` prints lines, nor where several runs train."""
    hidden = not (is_first() and _is_alone() and sys.stderr.isatty())
    return tqdm(total=steps, initial=start, unit="step", disable=hidden, dynamic_ncols=True, leave=False)


def _is_alone() -> bool:
    """Whether no other run trains in this process: those that do have threads of their own."""
    return threading.current_thread() is threading.main_thread()


def duration(seconds: float) -> str:
    """For people: "40 s", "12 min" or "3.5 h"."""
    if seconds < 100:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 6000 else f"{seconds / 3600:.1f} h"


def _print(progress: tqdm, line: str) -> None:
    if not is_first():
        return
    if progress.disable:
        print(line, file=sys.stderr, flush=True)
    else:
        progress.write(line)
