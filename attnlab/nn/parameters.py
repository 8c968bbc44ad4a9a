"""Parameters by path: a model is built without values, and each value is drawn from a key that its path alone decides.

So two models that share a parameter's path, shape and initialiser share its bits under one seed, whatever else they
hold and in whatever order they were built: the first condition of a controlled ablation. A model without values also
costs nothing, so parameters and FLOPs are counted before anything runs.
"""

import functools
import hashlib
import math
from collections.abc import Callable, Iterable, Iterator
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
from flax import nnx

# (key, shape, dtype) -> array.
Initializer = Callable[[jax.Array, tuple[int, ...], Any], jax.Array]
Model = TypeVar("Model", bound=nnx.Module)
# A nested dict of arrays, keyed by attribute names and by positions in lists (as strings).
Parameters = dict[str, Any]


class _Drawn(nnx.Variable):
    """What `initialize` draws, and nobody can read before `bind` gave it a value."""

    def __getitem__(self, key: Any) -> Any:
        if isinstance(self.get_value(), jax.ShapeDtypeStruct):
            raise ValueError(
                "model: got one without values; call attnlab.nn.bind(model, attnlab.nn.initialize(model, key)) first"
            )
        return super().__getitem__(key)


class Parameter(_Drawn, nnx.Param):
    """What gradients train. Float32, drawn by path."""


class Buffer(_Drawn):
    """What a layer learns in training without a gradient, such as centroids; the training loop keeps what it becomes.

    Float32, drawn by path as parameters are.
    """


class AuxiliaryLoss(nnx.Variable):
    """What a layer adds to the loss in training; 0 until it does."""


@functools.cache  # equal initialisers are one object, so that drawing compiles once
def normal(stddev: float) -> Initializer:
    def normal_initializer(key: jax.Array, shape: tuple[int, ...], dtype: Any) -> jax.Array:
        return stddev * jax.random.normal(key, shape, dtype)

    return normal_initializer


def zeros(key: jax.Array, shape: tuple[int, ...], dtype: Any) -> jax.Array:
    return jnp.zeros(shape, dtype)


def ones(key: jax.Array, shape: tuple[int, ...], dtype: Any) -> jax.Array:
    return jnp.ones(shape, dtype)


def parameter(shape: tuple[int, ...], initializer: Initializer) -> Parameter:
    """A float32 parameter without a value; `initialize` draws it."""
    return Parameter(jax.ShapeDtypeStruct(shape, jnp.float32), initializer=initializer)


def buffer(shape: tuple[int, ...], initializer: Initializer) -> Buffer:
    """A Buffer without a value; `initialize` draws it."""
    return Buffer(jax.ShapeDtypeStruct(shape, jnp.float32), initializer=initializer)


def auxiliary_loss() -> AuxiliaryLoss:
    """An AuxiliaryLoss without a value; `bind` makes it 0."""
    return AuxiliaryLoss(jax.ShapeDtypeStruct((), jnp.float32))


def _variables(model: nnx.Module, *kinds: type[nnx.Variable]) -> Iterator[tuple[tuple[str, ...], nnx.Variable]]:
    for path, variable in nnx.to_flat_state(nnx.state(model, nnx.Any(*kinds))):
        yield tuple(map(str, path)), variable


def _nested(flat: Iterable[tuple[tuple[str, ...], Any]]) -> Parameters:
    nested: Parameters = {}
    for path, value in flat:
        node = nested
        for name in path[:-1]:
            node = node.setdefault(name, {})
        node[path[-1]] = value
    return nested


def _at(values: Parameters, path: tuple[str, ...]) -> Any:
    return functools.reduce(lambda node, name: node[name], path, values)


def initialize(model: nnx.Module, key: jax.Array, shardings: Parameters | None = None) -> Parameters:
    """Draws every parameter and buffer of a model from fold_in(key, sha256 of its path).

    shardings: where each lies, a jax.sharding.Sharding per value, of which each device draws its part; None is one
    device. The values are the same.
    """

    def draw(path: tuple[str, ...], variable: nnx.Variable) -> jax.Array:
        digest = hashlib.sha256("/".join(path).encode()).digest()
        path_key = jax.random.fold_in(key, int.from_bytes(digest[:4], "big"))
        struct = variable.get_value()
        sharding = None if shardings is None else _at(shardings, path)
        return _draw(variable.get_metadata("initializer"), path_key, struct.shape, struct.dtype, sharding)

    return _nested((path, draw(path, variable)) for path, variable in _variables(model, nnx.Param, Buffer))


# One program per parameter: in one program for all, how XLA fuses its neighbours could change a parameter's last bit.
@functools.partial(jax.jit, static_argnums=(0, 2, 3, 4))
def _draw(
    initializer: Initializer, key: jax.Array, shape: tuple[int, ...], dtype: Any, sharding: jax.sharding.Sharding | None
) -> jax.Array:
    value = initializer(key, shape, dtype)
    return value if sharding is None else jax.lax.with_sharding_constraint(value, sharding)


def bind(model: Model, values: Parameters) -> Model:
    """The model with these values, ready to call. `model` itself stays as it is."""
    graph, state = nnx.split(model)
    flat = []
    for path, variable in nnx.to_flat_state(state):
        is_loss = isinstance(variable, AuxiliaryLoss)
        value = jnp.zeros((), jnp.float32) if is_loss else _at(values, tuple(map(str, path)))
        flat.append((path, variable.replace(value)))
    return nnx.merge(graph, nnx.from_flat_state(flat))


def split(model: nnx.Module, values: Parameters) -> tuple[Parameters, Parameters]:
    """Values -> (parameters, to be trained by gradients; buffers)."""
    parameters, buffers = (
        _nested((path, _at(values, path)) for path, _ in _variables(model, kind)) for kind in (nnx.Param, Buffer)
    )
    return parameters, buffers


def merge(parameters: Parameters, buffers: Parameters) -> Parameters:
    """The inverse of split."""
    merged = dict(parameters)
    for name, value in buffers.items():
        merged[name] = merge(merged[name], value) if name in merged else value
    return merged


def learned(bound: nnx.Module) -> tuple[Parameters, jax.Array]:
    """After a call of a bound model in training: its buffers, and the sum of its auxiliary losses, float32 []."""
    buffers = _nested((path, variable.get_value()) for path, variable in _variables(bound, Buffer))
    losses = (variable.get_value() for _, variable in _variables(bound, AuxiliaryLoss))
    return buffers, sum(losses, jnp.zeros((), jnp.float32))


# What a call has set, by the paths of Buffers and AuxiliaryLosses.
Learned = dict[tuple[Any, ...], jax.Array]


def as_function(call: Callable[..., Any], bound: nnx.Module) -> tuple[Callable[..., tuple[Any, Learned]], nnx.State]:
    """call(bound, ...) for JAX's transformations: function(state, ...) -> (its result, what it learned), and the state.

    The function touches nothing but its arguments; `absorb` sets what it learned.
    """
    graph, state = nnx.split(bound)

    def learnable(module: nnx.Module) -> Learned:
        flat = nnx.to_flat_state(nnx.state(module, nnx.Any(Buffer, AuxiliaryLoss)))
        return {path: variable.get_value() for path, variable in flat}

    def function(state: nnx.State, *arguments: Any) -> tuple[Any, Learned]:
        module = nnx.merge(graph, state)
        before = learnable(module)
        result = call(module, *arguments)
        return result, {path: value for path, value in learnable(module).items() if value is not before[path]}

    return function, state


def absorb(bound: nnx.Module, learned: Learned) -> None:
    """Sets in a module what a call of it as a function has learned."""
    if learned:
        variables = dict(nnx.to_flat_state(nnx.state(bound)))
        changed = [(path, variables[path].replace(value)) for path, value in learned.items()]
        nnx.update(bound, nnx.from_flat_state(changed))


def parameter_shapes(model: nnx.Module) -> dict[str, tuple[int, ...]]:
    """Shapes by path, such as {"layers/0/mixer/query/kernel": (128, 128)}."""
    return {"/".join(path): variable.get_value().shape for path, variable in _variables(model, nnx.Param)}


def count_parameters(model: nnx.Module) -> int:
    return sum(math.prod(shape) for shape in parameter_shapes(model).values())
