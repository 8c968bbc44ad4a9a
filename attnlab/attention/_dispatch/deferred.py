"""Functions that are one operation of a traced program, and are traced themselves only where it is lowered.

`deferred_call`: a kernel among several. A call that names no implementation holds the kernels of all platforms; traced
as usual, each would cost every program on every platform its tracing time, and its tables of tiles the host's memory.
Lowering for a platform drops the other platforms' branches, and so never traces what is in them.

`tangent_call`: a linear map with a transpose of its own, which makes a kernel differentiable in both modes.
jax.custom_vjp rules out jvp, and a call that may run as a kernel on one platform holds that kernel's rule on every
platform, so a jvp on a CPU would fail because of a TPU kernel that does not run there. With a custom_jvp whose tangent
is a `tangent_call`, jvp uses the tangent map (plain JAX) and grad its transpose (a backward kernel, say).
jax.custom_derivatives.linear_call has the same aim but no batching rule (jax 0.12), hence this primitive.
"""

import contextlib
import contextvars
import functools
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.extend.core import Primitive
from jax.interpreters import ad, batching, mlir
from jax.sharding import AxisType, NamedSharding, PartitionSpec

_call_p = Primitive("deferred_call")
_call_p.multiple_results = True
_deferring: contextvars.ContextVar[bool] = contextvars.ContextVar("attnlab_deferring", default=False)


_effectful: contextvars.ContextVar[bool] = contextvars.ContextVar("attnlab_effectful", default=False)


@contextlib.contextmanager
def with_effects() -> Iterator[None]:
    """In the block, calls state the effects of their functions, which therefore are traced at once: kernels that are
    simulated on a CPU have some, their callbacks. Tangents and transposes of these calls do, too."""
    token = _effectful.set(True)
    try:
        yield
    finally:
        _effectful.reset(token)


def is_deferring() -> bool:
    """Whether what is traced now stands for one platform of several, so that kernels should be deferred."""
    return _deferring.get()


def deferring(function: Callable[..., Any]) -> Callable[..., Any]:
    """function, with kernels deferred while it is traced."""

    @functools.wraps(function)
    def traced(*args: Any) -> Any:
        token = _deferring.set(True)
        try:
            return function(*args)
        finally:
            _deferring.reset(token)

    return traced


def deferred_call(function: Callable[..., Any], results: Any, *operands: Any) -> Any:
    """function(*operands), traced only where the call is lowered.

    results: a pytree of arrays or shape structs, of the structure, shapes and dtypes of what function returns.
    """
    leaves, tree = jax.tree.flatten(operands)

    def flat(*leaves: jax.Array) -> tuple[jax.Array, ...]:
        return tuple(jax.tree.leaves(function(*jax.tree.unflatten(tree, leaves))))

    return _bind(leaves, results, function=flat, transpose=None, num_residuals=len(leaves))


def tangent_call(
    tangent: Callable[[Any, Any], Any],
    transpose: Callable[[Any, Any], Any],
    results: Any,
    residuals: Any,
    tangents: Any,
) -> Any:
    """tangent(residuals, tangents), whose transpose in `tangents` is transpose(residuals, cotangents).

    Args:
      tangent: linear in its second argument. Any pytrees in and out.
      transpose: takes cotangents shaped like tangent's result; gives cotangents shaped like `tangents`.
      results: a pytree of floating arrays or shape structs, shaped like tangent's result.
    """
    residual_leaves, residual_tree = jax.tree.flatten(residuals)
    tangent_leaves, tangent_tree = jax.tree.flatten(tangents)
    out_tree, count = jax.tree.structure(results), len(residual_leaves)

    def flat(function: Callable[[Any, Any], Any], second: Any) -> Callable[..., tuple[jax.Array, ...]]:
        def run(*leaves: jax.Array) -> tuple[jax.Array, ...]:
            first = jax.tree.unflatten(residual_tree, leaves[:count])
            return tuple(jax.tree.leaves(function(first, jax.tree.unflatten(second, leaves[count:]))))

        return run

    return _bind(
        [*residual_leaves, *tangent_leaves],
        results,
        function=flat(tangent, tangent_tree),
        transpose=flat(transpose, out_tree),
        num_residuals=count,
    )


def _bind(leaves: Sequence[Any], results: Any, **rules: Any) -> Any:
    shapes, tree = jax.tree.flatten(results)
    rules |= {"results": tuple((x.shape, jnp.dtype(x.dtype)) for x in shapes), "effectful": _effectful.get()}
    out = _call_p.bind(*vary_alike(leaves), **rules)
    return jax.tree.unflatten(tree, out)


def vary_alike(leaves: Sequence[Any]) -> list[Any]:
    """Arrays that, inside shard_map, all vary over the mesh axes over which any does: a cotangent then has its
    tangent's type, and JAX sums that of an operand that did not vary over the axes."""
    over = [jax.typeof(leaf).manual_axis_type.varying for leaf in leaves]
    every = frozenset[Any]().union(*over)
    return [
        jax.lax.pcast(leaf, tuple(sorted(every - own)), to="varying") if every - own else leaf
        for leaf, own in zip(leaves, over)
    ]


@_call_p.def_impl
def _impl(*leaves: jax.Array, function: Callable, **_: Any) -> Any:
    return function(*leaves)


@_call_p.def_effectful_abstract_eval
def _abstract_eval(*avals: Any, function: Callable, results: Any, effectful: bool, **_: Any) -> Any:
    if effectful:
        traced = jax.make_jaxpr(function)(*avals)
        return traced.out_avals, traced.effects
    return _result_types(avals, function, results), frozenset()


def _result_types(avals: Any, function: Callable, results: Any) -> Any:
    if AxisType.Explicit in jax.sharding.get_abstract_mesh().axis_types:
        return jax.make_jaxpr(function)(*avals).out_avals  # how results are sharded follows from the function alone
    # Like an operand: inside shard_map all vary alike, over axes of the one mesh.
    like = avals[0]
    return [
        like.update(
            shape=shape,
            dtype=dtype,
            weak_type=False,
            sharding=NamedSharding(like.sharding.mesh, PartitionSpec(*[None] * len(shape))),
        )
        for shape, dtype in results
    ]


def _shapes(avals: Any) -> tuple[tuple[tuple[int, ...], Any], ...]:
    return tuple((aval.shape, aval.dtype) for aval in avals)


def _transpose(
    cotangents: Any,
    *leaves: Any,
    function: Callable,
    transpose: Callable,
    num_residuals: int,
    results: Any,
    effectful: bool,
) -> Any:
    residuals, tangents = leaves[:num_residuals], leaves[num_residuals:]
    dense = [ad.instantiate_zeros(ct) for ct in cotangents]
    transposed = _call_p.bind(
        *residuals,
        *dense,
        function=transpose,
        transpose=function,
        num_residuals=num_residuals,
        effectful=effectful,
        results=_shapes(leaf.aval if ad.is_undefined_primal(leaf) else jax.typeof(leaf) for leaf in tangents),
    )
    wanted = [out if ad.is_undefined_primal(leaf) else None for leaf, out in zip(tangents, transposed)]
    return [None] * num_residuals + wanted


def _jvp(primals: Any, tangents: Any, *, function: Callable, **_: Any) -> Any:
    return jax.jvp(function, tuple(primals), tuple(ad.instantiate_zeros(t) for t in tangents))


def _batch(leaves: Any, axes: Any, *, function: Callable, transpose: Any, results: Any, **others: Any) -> Any:
    size = next(leaf.shape[axis] for leaf, axis in zip(leaves, axes) if axis is not None)
    front = [
        jnp.broadcast_to(leaf, (size, *leaf.shape)) if axis is None else jnp.moveaxis(leaf, axis, 0)
        for leaf, axis in zip(leaves, axes)
    ]
    out = _call_p.bind(
        *front,
        function=jax.vmap(function),
        transpose=None if transpose is None else jax.vmap(transpose),
        **others,
        results=tuple(((size, *shape), dtype) for shape, dtype in results),
    )
    return out, [0] * len(out)


ad.primitive_transposes[_call_p] = _transpose
ad.primitive_jvps[_call_p] = _jvp
batching.primitive_batchers[_call_p] = _batch
mlir.register_lowering(_call_p, mlir.lower_fun(lambda *leaves, function, **_: function(*leaves), multiple_results=True))
