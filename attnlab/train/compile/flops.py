"""Floating-point operations of a traced program, on one device of its mesh.

XLA counts the body of a loop once, and nothing of what a kernel does; here loops count by their trips, and kernels by
their own estimates.
"""

import functools
import math
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
from jax.extend.core import ClosedJaxpr, Jaxpr, Literal


def product_flops(traced: jax.stages.Traced, devices: int, platform: str = "tpu") -> float:
    """Operations of matrix products and kernels (2 per multiply-add), on the device that has most to do.

    What XLA partitions counts as evenly shared by all devices; what is inside shard_map, as each of them does it. Of a
    conditional the costliest branch counts, of a loop that may end early all trips that it may make.
    """
    return _of_jaxpr(traced.jaxpr.jaxpr, 1 / devices, platform)


def _of_jaxpr(jaxpr: Jaxpr, share: float, platform: str) -> float:
    """share: of a device, in what the program as written does."""
    return math.fsum(_of_equation(equation, share, platform) for equation in jaxpr.eqns)


def _of_equation(equation: Any, share: float, platform: str) -> float:
    name, params = equation.primitive.name, equation.params
    if (count := _COUNTED.get(name)) is not None:
        return share * count(equation)
    inside = functools.partial(_of_jaxpr, share=share, platform=platform)
    if name == "scan":
        return params["length"] * inside(params["jaxpr"].jaxpr)
    if name == "while":
        return _most_trips(params["cond_jaxpr"].jaxpr) * inside(params["body_jaxpr"].jaxpr)
    if name == "cond":
        branches = params["branches"]
        if (platforms := params.get("branches_platforms")) is not None:  # of lax.platform_dependent
            chosen = next(number for number, names in enumerate(platforms) if names is None or platform in names)
            branches = branches[chosen : chosen + 1]
        return max(inside(branch.jaxpr) for branch in branches)
    if name == "shard_map":
        sizes = params["mesh"].shape
        share *= math.prod(sizes[axis] for axis in params["newly_manual_axes"])
        return _of_jaxpr(params["jaxpr"], share, platform)
    if name == "deferred_call":  # of attention._dispatch.deferred, traced only where it is lowered
        with equation.ctx.manager:
            traced = jax.make_jaxpr(params["function"])(*(variable.aval for variable in equation.invars))
        return inside(traced.jaxpr)
    if name == "custom_linear_solve":
        return inside(params["jaxprs"].solve.jaxpr)
    return math.fsum(map(inside, _inner(params.values())))


def _inner(values: Any) -> Iterator[Jaxpr]:
    for value in values:
        if isinstance(value, ClosedJaxpr):
            yield value.jaxpr
        elif isinstance(value, Jaxpr):
            yield value
        elif isinstance(value, (tuple, list)):
            yield from _inner(value)


def _most_trips(condition: Jaxpr) -> int:
    """Of a loop that counts from 0 and whose condition compares with a number; 1 where no number is seen."""
    bounds = [
        operand.val
        for equation in condition.eqns
        if equation.primitive.name == "lt"
        for operand in equation.invars[1:]
        if isinstance(operand, Literal) and jnp.issubdtype(jnp.result_type(operand.val), jnp.integer)
    ]
    return int(min(bounds, default=1))


def _of_product(equation: Any) -> int:
    (contracted, _), _ = equation.params["dimension_numbers"]
    left = equation.invars[0].aval.shape
    return 2 * equation.outvars[0].aval.size * math.prod(left[axis] for axis in contracted)


def _of_convolution(equation: Any) -> int:
    kernel = equation.invars[1].aval
    outputs = kernel.shape[equation.params["dimension_numbers"].rhs_spec[0]]
    return 2 * equation.outvars[0].aval.size * (kernel.size // outputs)


def _of_kernel(equation: Any) -> int:
    estimate = equation.params["cost_estimate"]
    return 0 if estimate is None else estimate.flops


_COUNTED: dict[str, Callable[[Any], int]] = {
    "dot_general": _of_product,
    "conv_general_dilated": _of_convolution,
    "pallas_call": _of_kernel,
}
