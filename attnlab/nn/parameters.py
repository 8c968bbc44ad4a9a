"""Parameters by path: a model is built without values, and each value is drawn from a key that its path alone decides.

So two models that share a parameter's path, shape and initialiser share its bits under one seed, whatever else they
hold and in whatever order they were built: the first condition of a controlled ablation. A model without values also
costs nothing, so parameters and FLOPs are counted before anything runs.
"""

import functools
import hashlib
import math
from collections.abc import Callable, Iterator
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
from flax import nnx

Initializer = Callable[[jax.Array, tuple[int, ...], Any], jax.Array]
Model = TypeVar("Model", bound=nnx.Module)
# A nested dict of arrays, keyed by attribute names and by positions in lists (as strings).
Parameters = dict[str, Any]


@functools.cache  # equal initialisers are one object, so that drawing compiles once
def normal(stddev: float) -> Initializer:
    def normal_initializer(key: jax.Array, shape: tuple[int, ...], dtype: Any) -> jax.Array:
        return stddev * jax.random.normal(key, shape, dtype)

    return normal_initializer


def zeros(key: jax.Array, shape: tuple[int, ...], dtype: Any) -> jax.Array:
    return jnp.zeros(shape, dtype)


def ones(key: jax.Array, shape: tuple[int, ...], dtype: Any) -> jax.Array:
    return jnp.ones(shape, dtype)


def parameter(shape: tuple[int, ...], initializer: Initializer) -> nnx.Param:
    """A float32 parameter without a value; `initialize` draws it."""
    return nnx.Param(jax.ShapeDtypeStruct(shape, jnp.float32), initializer=initializer)


def _parameters(model: nnx.Module) -> Iterator[tuple[tuple[str, ...], nnx.Param]]:
    for path, variable in nnx.to_flat_state(nnx.state(model, nnx.Param)):
        yield tuple(map(str, path)), variable


def initialize(model: nnx.Module, key: jax.Array) -> Parameters:
    """Draws every parameter of a model from fold_in(key, sha256 of its path)."""
    parameters: Parameters = {}
    for path, variable in _parameters(model):
        digest = hashlib.sha256("/".join(path).encode()).digest()
        path_key = jax.random.fold_in(key, int.from_bytes(digest[:4], "big"))
        place = parameters
        for name in path[:-1]:
            place = place.setdefault(name, {})
        struct = variable.get_value()
        place[path[-1]] = _draw(variable.get_metadata("initializer"), path_key, struct.shape, struct.dtype)
    return parameters


# One program a parameter: in one program for all, how XLA fuses its neighbours could change a parameter's last bit.
@functools.partial(jax.jit, static_argnums=(0, 2, 3))
def _draw(initializer: Initializer, key: jax.Array, shape: tuple[int, ...], dtype: Any) -> jax.Array:
    return initializer(key, shape, dtype)


def bind(model: Model, parameters: Parameters) -> Model:
    """The model with these values, ready to call. `model` itself stays as it is."""
    graph, state = nnx.split(model)
    flat = []
    for path, variable in nnx.to_flat_state(state):
        value: Any = parameters
        for name in path:
            value = value[str(name)]
        flat.append((path, variable.replace(value)))
    return nnx.merge(graph, nnx.from_flat_state(flat))


def parameter_shapes(model: nnx.Module) -> dict[str, tuple[int, ...]]:
    """Shapes by path, such as {"layers/0/mixer/query/kernel": (128, 128)}."""
    return {"/".join(path): variable.get_value().shape for path, variable in _parameters(model)}


def count_parameters(model: nnx.Module) -> int:
    return sum(math.prod(shape) for shape in parameter_shapes(model).values())
