"""Memories whose weights are written as they are read: what they compute, what they are to fit, what the weights are
held to."""

from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp

from attnlab.attention._shared.checks import (
    Array,
    check_array,
    check_choice,
    check_float,
    check_floating,
    require,
    shape_text,
    shown,
)

Weights = dict[str, Array]
# (name, x [..., in]) -> x times the fast weight of this name.
Linear = Callable[[str, Array], Array]
Memory = str | Callable[[Linear, Array], Array]
Objective = str | tuple[str, float] | Callable[[Array, Array], Array]
Project = str | tuple[str, float] | Callable[[Array, Array], Array] | None


def _normalized(x: Array) -> Array:
    centred = x - jnp.mean(x, axis=-1, keepdims=True)
    return centred * jax.lax.rsqrt(jnp.mean(centred * centred, axis=-1, keepdims=True) + 1e-6)


MEMORIES: Mapping[str, Callable[[Linear, Array], Array]] = {
    "linear": lambda linear, x: linear("w", x),
    "mlp": lambda linear, x: x + _normalized(linear("w2", jax.nn.gelu(linear("w1", x)))),
    "swiglu": lambda linear, x: linear("down", jax.nn.silu(linear("gate", x)) * linear("up", x)),
}
_NEED_THRESHOLD = ("huber", "huber_norm")


def remember(memory: Memory, product: Linear, x: Array) -> Array:
    """memory of x [B, N, C, H]; product: of [B, N, C, in]. A function of the caller's sees [B, C, N, H]."""
    if isinstance(memory, str):
        return MEMORIES[memory](product, x)

    def swapped(x: Array) -> Array:
        return jnp.swapaxes(x, 1, 2)

    return swapped(memory(lambda name, x: swapped(product(name, swapped(x))), swapped(x)))


# --- Objectives -------------------------------------------------------------------------------------------------------


def loss(objective: Objective, prediction: Array, value: Array, threshold: Array | None) -> Array:
    """[..., V] twice, and [...] -> [...]: what the memory is to make small."""
    if callable(objective):
        return objective(prediction, value)
    if objective == "dot":
        return -jnp.sum(prediction * value, axis=-1)
    error = prediction - value
    if isinstance(objective, tuple):
        return jnp.sum(jnp.abs(error) ** objective[1], axis=-1) / objective[1]
    if objective == "l2":
        return jnp.sum(error * error, axis=-1) / 2
    assert threshold is not None
    if objective == "huber":
        size, limit = jnp.abs(error), threshold[..., None]
        return jnp.sum(jnp.where(size <= limit, size * size / 2, limit * (size - limit / 2)), axis=-1)
    size, square = _norm_beyond(error, threshold)
    return jnp.where(square <= threshold**2, square / 2, threshold * (size - threshold / 2))


def gradient(objective: Objective, prediction: Array, value: Array, threshold: Array | None) -> Array:
    """The loss's in the prediction: [..., V]."""
    if callable(objective):
        return jax.grad(lambda prediction: jnp.sum(objective(prediction, value)))(prediction)
    if objective == "dot":
        return -value
    error = prediction - value
    if isinstance(objective, tuple):
        return error if objective[1] == 2 else _signed_power(error, objective[1] - 1)
    if objective == "l2":
        return error
    assert threshold is not None
    if objective == "huber":
        return jnp.clip(error, -threshold[..., None], threshold[..., None])
    size, square = _norm_beyond(error, threshold)
    return error * jnp.where(square <= threshold**2, 1, threshold / size)[..., None]


def _norm_beyond(error: Array, threshold: Array) -> tuple[Array, Array]:
    """|e|, where it is above the threshold (else 1, as a norm has no derivative at 0), and |e|^2."""
    square = jnp.sum(error * error, axis=-1)
    return jnp.sqrt(jnp.where(square <= threshold**2, 1, square)), square


def _signed_power(x: Array, exponent: float) -> Array:
    """sign(x) |x|^exponent, and its derivatives; at 0 they are 0."""
    size = jnp.where(x == 0, 1, jnp.abs(x))
    return jnp.where(x == 0, 0, jnp.sign(x) * size**exponent)


# --- Projections ------------------------------------------------------------------------------------------------------


def projected(project: Project, weights: Weights, starts: Weights | None) -> Weights:
    """The weights [B, N, in, out] that are used, from the sums of writes. starts: [N, in, out]."""
    if project is None or starts is None:
        return weights
    return {name: _projected(project, weight, starts[name][None]) for name, weight in weights.items()}


def _projected(project: Project, weight: Array, start: Array) -> Array:
    if callable(project):
        return project(weight, start)
    if project == "norm":

        def lengths(weight: Array) -> Array:
            square = jnp.sum(weight * weight, axis=-2, keepdims=True)
            return jnp.sqrt(square + jnp.finfo(weight.dtype).tiny)

        # Published code begins with the weights as they are, and takes the projection after each write.
        is_written = (weight != start).any(-2, keepdims=True)
        return jnp.where(is_written, weight * (lengths(start) / (lengths(weight) + 1e-5)), weight)
    assert isinstance(project, tuple)
    power = project[1]
    total = jnp.sum(jnp.abs(_signed_power(weight, power)), axis=(-2, -1), keepdims=True)
    size = jnp.where(total == 0, 1, total) ** (1 / power)
    return _signed_power(weight / size, power - 1) * size


# --- Checks -----------------------------------------------------------------------------------------------------------


def check_weights(weights: Any, heads: int | None = None) -> None:
    """A dict of [N, in, out], all of N heads."""
    if not isinstance(weights, dict):
        raise TypeError(f"weights: got {type(weights).__name__}; need a dict of arrays [N, in, out] by name")
    require(bool(weights), "weights", "an empty dict", "need at least one array [N, in, out]")
    for name, weight in weights.items():
        if not isinstance(name, str):
            raise TypeError(f"weights: got the name {shown(name)}; need strings")
        of_name = f"weights[{name!r}]"
        check_array(of_name, weight, (heads, None, None), "[N, in, out]")
        check_floating(of_name, weight)
        require(0 not in weight.shape, of_name, shape_text(weight), "no axis may be empty")
        heads = weight.shape[0]


def check_memory(memory: Any, weights: Weights, query: Array, value: Array, dtype: Any) -> None:
    """A name, or a function that uses each weight once and predicts as many channels as the value has."""
    if isinstance(memory, str):
        require(memory in MEMORIES, "memory", repr(memory), f"need a function or one of {', '.join(MEMORIES)}")
        is_wide = memory != "mlp" or query.shape[-1] == value.shape[-1]
        of_both = f"{value.shape[-1]} channels with 'mlp'"
        require(is_wide, "value", of_both, f"need key's, {query.shape[-1]}, which the memory adds")
    elif not callable(memory):
        raise TypeError(f"memory: got {shown(memory)}; need a function or one of {', '.join(MEMORIES)}")
    batch, _, heads, width = query.shape
    used: list[str] = []

    def product(name: Any, x: Any) -> Array:
        require(name in weights, "weights", f"the names {', '.join(weights)}", f"the memory uses {name!r}")
        require(name not in used, "memory", f"one that uses {name!r} twice", "need each weight used once")
        used.append(name)
        weight = weights[name]
        check_array(f"memory: x of linear({name!r}, x)", x, (batch, heads, 1, weight.shape[1]), "[B, N, 1, in]")
        return jnp.zeros((*x.shape[:-1], weight.shape[-1]), dtype)

    token = jax.ShapeDtypeStruct((batch, heads, 1, width), dtype)
    shape = tried("memory", lambda x: remember(memory, product, x), token).shape
    left = [name for name in weights if name not in used]
    require(not left, "weights", f"{', '.join(left)} too", "which the memory does not use")
    wanted = (batch, heads, 1, value.shape[-1])
    given = f"one that gives {list(shape)} of [B, N, 1, H]" if isinstance(memory, str) else "one that gives others"
    require(shape == wanted, "memory", given, f"need predictions as wide as value, {list(wanted)}")


def check_objective(objective: Any, threshold: Any, value: Array) -> Objective:
    names = ("dot", "l2", *_NEED_THRESHOLD)
    if isinstance(objective, (tuple, list)):
        kind_and_power = len(objective) == 2 and objective[0] == "lp"
        require(kind_and_power, "objective", shown(objective), f'need ("lp", p), a function or one of {names}')
        objective = ("lp", check_float("objective", objective[1], least=1))
    elif not callable(objective):
        check_choice("objective", objective, names)
    else:
        heads = jax.ShapeDtypeStruct((*value.shape[:1], value.shape[2], 1, value.shape[-1]), value.dtype)
        shape = tried("objective", objective, heads, heads).shape
        require(shape == heads.shape[:-1], "objective", f"one that gives {list(shape)}", "need [..., V] twice -> [...]")
    needs = isinstance(objective, str) and objective in _NEED_THRESHOLD
    if threshold is None:
        require(not needs, "threshold", None, f"need [B, T, N] with objective={objective!r}")
    else:
        require(needs, "threshold", "an array", "must be None unless objective is huber or huber_norm")
        check_array("threshold", threshold, (*value.shape[:2], None), "[B, T, N]")
        check_floating("threshold", threshold)
    return objective


def check_project(project: Any, weights: Weights, batch: int, dtype: Any) -> Project:
    if project is None or (isinstance(project, str) and project == "norm"):
        return project
    if isinstance(project, (tuple, list)):
        require(len(project) == 2 and project[0] == "lq", "project", shown(project), 'need ("lq", q)')
        return ("lq", check_float("project", project[1], least=2))
    require(not isinstance(project, str), "project", shown(project), 'need None, "norm", ("lq", q) or a function')
    if not callable(project):
        raise TypeError(f'project: got {shown(project)}; need None, "norm", ("lq", q) or a function')
    for weight in weights.values():
        sums, start = (jax.ShapeDtypeStruct((size, *weight.shape), dtype) for size in (batch, 1))
        shape = tried("project", project, sums, start).shape
        require(shape == sums.shape, "project", f"one that gives {list(shape)}", f"need {list(sums.shape)} as given")
    return project


def tried(name: str, function: Callable[..., Any], *arrays: Any) -> Any:
    """The shape of what an option that is a function gives."""
    try:
        out = jax.eval_shape(function, *arrays)
    except Exception as error:
        text = " ".join(str(error).split())
        if isinstance(error, (ValueError, TypeError)) and text.startswith((name, "weights:")):
            raise
        raise TypeError(f"{name}: got a function that raises {type(error).__name__}: {shown(text)}") from error
    if not isinstance(out, jax.ShapeDtypeStruct):
        raise TypeError(f"{name}: got a function that gives {type(out).__name__}; need one that gives an array")
    return out
