"""The training step and what it works on, as pure functions of a model and a task; the loop has files and signals."""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from flax import nnx
from jax.sharding import NamedSharding, PartitionSpec

from attnlab import nn
from attnlab.attention._shared.checks import check_float, check_int, keep, require
from attnlab.nn.layers import gradients_in
from attnlab.train.mesh import batch_sharding, state_shardings
from attnlab.train.tasks.base import Batch, Task

# Folded into the seed's key, one number per purpose; the loop folds in 2 to draw samples.
_INITIAL_VALUES, _DROPOUT = 0, 1


@dataclasses.dataclass(frozen=True)
class OptimizerOptions:
    """AdamW after global-norm clipping, with linear warm-up and cosine decay.

    Args:
      learning_rate: its peak.
      warmup_steps: steps from 0 to the peak; fewer than those of the run.
      final_fraction: the last step's share of the peak.
      weight_decay: on matrices (parameters of two and more axes), decoupled, times the learning rate.
      clip_norm: largest norm of the whole gradient.
      b1, b2: Adam's decay rates.
    """

    learning_rate: float = 1e-3
    warmup_steps: int = 100
    final_fraction: float = 0.1
    weight_decay: float = 0.1
    clip_norm: float = 1.0
    b1: float = 0.9
    b2: float = 0.99

    def __post_init__(self) -> None:
        keep(
            self,
            learning_rate=check_float("learning_rate", self.learning_rate, above=0),
            warmup_steps=check_int("warmup_steps", self.warmup_steps, least=0),
            final_fraction=check_float("final_fraction", self.final_fraction, least=0, most=1),
            weight_decay=check_float("weight_decay", self.weight_decay, least=0),
            clip_norm=check_float("clip_norm", self.clip_norm, above=0),
        )
        for name in ("b1", "b2"):
            rate = check_float(name, getattr(self, name), least=0)
            require(rate < 1, name, rate, "need at least 0 and below 1")
            keep(self, **{name: rate})


class State(NamedTuple):
    """All that a step changes. buffers: what layers learn by themselves. sums: metrics added up since the last row."""

    parameters: nn.Parameters
    buffers: nn.Parameters
    optimizer: optax.OptState
    step: jax.Array
    sums: dict[str, jax.Array]


class _Learned(NamedTuple):
    """Of some examples. buffers: after them."""

    gradients: nn.Parameters
    metrics: dict[str, jax.Array]
    buffers: nn.Parameters


def make_optimizer(options: OptimizerOptions, steps: int) -> optax.GradientTransformation:
    schedule = optax.schedules.warmup_cosine_decay_schedule(
        init_value=0.0,
        peak_value=options.learning_rate,
        warmup_steps=options.warmup_steps,
        decay_steps=steps,
        end_value=options.learning_rate * options.final_fraction,
    )
    return optax.chain(
        optax.clip_by_global_norm(options.clip_norm),
        optax.adamw(
            schedule,
            b1=options.b1,
            b2=options.b2,
            weight_decay=options.weight_decay,
            mask=lambda parameters: jax.tree.map(lambda leaf: leaf.ndim >= 2, parameters),
        ),
    )


def state_shapes(
    model: nnx.Module,
    task: Task,
    batch_size: int,
    optimizer: optax.GradientTransformation,
    mesh: jax.sharding.Mesh,
) -> State:
    """Shapes, dtypes and shardings of the state; nothing is computed."""

    def start() -> State:
        parameters, buffers = nn.split(model, nn.initialize(model, jax.random.key(0)))
        return _first(model, task, batch_size, optimizer, parameters, buffers)

    shapes = jax.eval_shape(start)
    return jax.tree.map(_on, shapes, state_shardings(mesh, shapes))


def batch_shapes(task: Task, batch_size: int, mesh: jax.sharding.Mesh) -> Batch:
    """Shapes, dtypes and shardings of a training batch."""
    return jax.tree.map(lambda shape: _on(shape, batch_sharding(mesh)), task.inputs(batch_size))


def _on(shape: jax.ShapeDtypeStruct, sharding: jax.sharding.Sharding) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(shape.shape, shape.dtype, sharding=sharding)


def initial_state(
    model: nnx.Module,
    task: Task,
    batch_size: int,
    optimizer: optax.GradientTransformation,
    key: jax.Array,
    mesh: jax.sharding.Mesh,
) -> State:
    """The state before the first step. model: without values; the seed's key decides them, whatever the mesh is."""
    shapes = state_shapes(model, task, batch_size, optimizer, mesh)
    shardings = jax.tree.map(lambda shape: shape.sharding, shapes)
    places = nn.merge(shardings.parameters, shardings.buffers)
    values = nn.initialize(model, jax.random.fold_in(key, _INITIAL_VALUES), places)
    parameters, buffers = nn.split(model, values)
    start = functools.partial(_first, model, task, batch_size, optimizer)
    return jax.jit(start, out_shardings=shardings, donate_argnums=(0, 1))(parameters, buffers)


def _first(
    model: nnx.Module,
    task: Task,
    batch_size: int,
    optimizer: optax.GradientTransformation,
    parameters: nn.Parameters,
    buffers: nn.Parameters,
) -> State:
    zeros = {name: jnp.zeros((), jnp.float32) for name in (*loss_shapes(model, task, batch_size)[1], "steps")}
    return State(parameters, buffers, optimizer.init(parameters), jnp.zeros((), jnp.int32), zeros)


def make_step(
    model: nnx.Module,
    task: Task,
    optimizer: optax.GradientTransformation,
    key: jax.Array,
    mesh: jax.sharding.Mesh,
    accumulation: int = 1,
    gradient_dtype: Any = None,
) -> Any:
    """The jitted training step, (state, batch) -> state. It takes the old state's memory.

    key: the seed's. accumulation: parts of the batch whose gradients are taken one after the other, and added.
    gradient_dtype: in which devices add them up, see `nn.layers.gradients_in`.
    """

    def pinned(tree: Any) -> Any:
        return jax.lax.with_sharding_constraint(tree, state_shardings(mesh, tree))

    def step(state: State, batch: Batch) -> State:
        with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
            return pinned(following(state, batch))

    def following(state: State, batch: Batch) -> State:
        dropout_key = jax.random.fold_in(jax.random.fold_in(key, _DROPOUT), state.step)
        learn_all = learn if accumulation == 1 else learn_by_parts
        gradients, metrics, buffers = learn_all(state.parameters, state.buffers, batch, dropout_key)
        updates, optimizer_state = optimizer.update(gradients, state.optimizer, state.parameters)
        added = {**metrics, "steps": jnp.ones(())}
        sums = {name: value + added.get(name, 0.0) for name, value in state.sums.items()}
        parameters = optax.apply_updates(state.parameters, updates)
        return State(parameters, buffers, optimizer_state, state.step + 1, sums)

    def learn(parameters: nn.Parameters, buffers: nn.Parameters, batch: Batch, dropout_key: jax.Array) -> _Learned:
        def loss(parameters: nn.Parameters) -> tuple[jax.Array, tuple[dict[str, jax.Array], nn.Parameters]]:
            return _loss(model, task, nn.merge(parameters, buffers), batch, dropout_key)

        with gradients_in(gradient_dtype):
            gradients, (metrics, buffers) = jax.grad(loss, has_aux=True)(parameters)
        return _Learned(gradients, metrics, buffers)

    def learn_by_parts(
        parameters: nn.Parameters, buffers: nn.Parameters, batch: Batch, dropout_key: jax.Array
    ) -> _Learned:
        """Means of gradients and metrics. Each part has examples of every device, so that none is moved."""
        whole = batch_sharding(mesh).spec
        of_parts = NamedSharding(mesh, PartitionSpec(None, *whole))

        def split(x: jax.Array) -> jax.Array:
            parts = jnp.moveaxis(x.reshape(-1, accumulation, *x.shape[1:]), 1, 0)
            return jax.lax.with_sharding_constraint(parts, of_parts)

        def add(so_far: _Learned, part: tuple[jax.Array, Batch]) -> tuple[_Learned, None]:
            number, examples = part
            more = learn(parameters, so_far.buffers, examples, jax.random.fold_in(dropout_key, number))
            gradients, metrics = jax.tree.map(lambda x, y: x + y / accumulation, so_far[:2], more[:2])
            return _Learned(pinned(gradients), metrics, more.buffers), None

        parts = jnp.arange(accumulation), jax.tree.map(split, batch)
        shapes = jax.eval_shape(learn, parameters, buffers, jax.tree.map(lambda x: x[0], parts[1]), dropout_key)
        zeros = jax.tree.map(lambda shape: jnp.zeros(shape.shape, shape.dtype), shapes)
        return jax.lax.scan(add, zeros._replace(buffers=buffers), parts)[0]

    return jax.jit(step, donate_argnums=0)


def make_evaluation(
    model: nnx.Module, task: Task, mesh: jax.sharding.Mesh
) -> Callable[[nn.Parameters, Batch], dict[str, jax.Array]]:
    """The jitted evaluation of a batch: all values of the model, batch -> metrics."""

    def evaluation(values: nn.Parameters, batch: Batch) -> dict[str, jax.Array]:
        with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
            return _loss(model, task, values, batch, None)[1][0]

    return jax.jit(evaluation)


def loss_shapes(model: nnx.Module, task: Task, batch_size: int) -> tuple[Any, dict[str, Any]]:
    """Shapes of the training loss and its metrics; nothing is computed."""
    values = jax.eval_shape(lambda: nn.initialize(model, jax.random.key(0)))
    loss, (metrics, _) = jax.eval_shape(
        lambda values, batch: _loss(model, task, values, batch, jax.random.key(0)), values, task.inputs(batch_size)
    )
    return loss, metrics


def validation_metrics(model: nnx.Module, task: Task, batch_size: int) -> list[str]:
    """Names of what an evaluation gives; nothing is computed."""
    inputs = task.inputs(batch_size)
    values = jax.eval_shape(lambda: nn.initialize(model, jax.random.key(0)))
    evaluation = jax.eval_shape(lambda values, batch: _loss(model, task, values, batch, None)[1][0], values, inputs)
    return [*evaluation, *task.derived(dict.fromkeys(evaluation, 1.0))]


def _loss(
    model: nnx.Module, task: Task, values: nn.Parameters, batch: Batch, key: jax.Array | None
) -> tuple[jax.Array, tuple[dict[str, jax.Array], nn.Parameters]]:
    """The loss with what layers add to it, the metrics, and the buffers after this batch."""
    bound = nn.bind(model, values)
    loss, metrics = task.loss(bound, batch, key=key)
    buffers, auxiliary = nn.learned(bound)
    return loss + auxiliary, (metrics, buffers)
