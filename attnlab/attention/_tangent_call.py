"""A linear map with a transpose of one's own: what makes a kernel differentiable in both modes.

jax.custom_vjp rules out jvp, and a call that may run as a kernel on one platform holds that kernel's rule on every
platform, so a jvp on a CPU would fail because of a TPU kernel that does not run there. With a custom_jvp whose tangent
is a `tangent_call`, jvp uses the tangent map (plain JAX) and grad its transpose (a backward kernel, say).
jax.custom_derivatives.linear_call has the same aim but no batching rule (jax 0.12), hence this primitive.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.extend.core import Primitive
from jax.interpreters import ad, batching, mlir

_tangent_call_p = Primitive("tangent_call")
_tangent_call_p.multiple_results = True


def tangent_call(
    tangent: Callable[[Any, Any], Any], transpose: Callable[[Any, Any], Any], residuals: Any, tangents: Any
) -> Any:
    """tangent(residuals, tangents), whose transpose in `tangents` is transpose(residuals, cotangents).

    Args:
      tangent: linear in its second argument. Any pytrees in and out.
      transpose: takes cotangents shaped like tangent's result; gives cotangents shaped like `tangents`.
    """
    residual_leaves, residual_tree = jax.tree.flatten(residuals)
    tangent_leaves, tangent_tree = jax.tree.flatten(tangents)
    out_tree = jax.tree.structure(jax.eval_shape(tangent, residuals, tangents))
    count = len(residual_leaves)

    def flat_tangent(*leaves: jax.Array) -> tuple[jax.Array, ...]:
        out = tangent(
            jax.tree.unflatten(residual_tree, leaves[:count]), jax.tree.unflatten(tangent_tree, leaves[count:])
        )
        return tuple(jax.tree.leaves(out))

    def flat_transpose(*leaves: jax.Array) -> tuple[jax.Array, ...]:
        out = transpose(jax.tree.unflatten(residual_tree, leaves[:count]), jax.tree.unflatten(out_tree, leaves[count:]))
        return tuple(jax.tree.leaves(out))

    out = _tangent_call_p.bind(
        *residual_leaves, *tangent_leaves, tangent=flat_tangent, transpose=flat_transpose, num_residuals=count
    )
    return jax.tree.unflatten(out_tree, out)


@_tangent_call_p.def_impl
def _impl(*leaves: jax.Array, tangent: Callable, **_: Any) -> Any:
    return tangent(*leaves)


@_tangent_call_p.def_abstract_eval
def _abstract_eval(*avals: Any, tangent: Callable, **_: Any) -> Any:
    # Not by eval_shape, whose results lack the mesh axes over which values differ inside shard_map.
    return jax.make_jaxpr(tangent)(*avals).out_avals


def _transpose(cotangents: Any, *leaves: Any, tangent: Callable, transpose: Callable, num_residuals: int) -> Any:
    residuals, tangents = leaves[:num_residuals], leaves[num_residuals:]
    dense = [ad.instantiate_zeros(ct) for ct in cotangents]
    transposed = _tangent_call_p.bind(
        *residuals, *dense, tangent=transpose, transpose=tangent, num_residuals=num_residuals
    )
    wanted = [out if ad.is_undefined_primal(leaf) else None for leaf, out in zip(tangents, transposed)]
    return [None] * num_residuals + wanted


def _jvp(primals: Any, tangents: Any, *, tangent: Callable, **_: Any) -> Any:
    return jax.jvp(tangent, tuple(primals), tuple(ad.instantiate_zeros(t) for t in tangents))


def _batch(leaves: Any, axes: Any, *, tangent: Callable, transpose: Callable, num_residuals: int) -> Any:
    size = next(leaf.shape[axis] for leaf, axis in zip(leaves, axes) if axis is not None)
    front = [
        jnp.broadcast_to(leaf, (size, *leaf.shape)) if axis is None else jnp.moveaxis(leaf, axis, 0)
        for leaf, axis in zip(leaves, axes)
    ]
    out = _tangent_call_p.bind(
        *front, tangent=jax.vmap(tangent), transpose=jax.vmap(transpose), num_residuals=num_residuals
    )
    return out, [0] * len(out)


ad.primitive_transposes[_tangent_call_p] = _transpose
ad.primitive_jvps[_tangent_call_p] = _jvp
batching.primitive_batchers[_tangent_call_p] = _batch
mlir.register_lowering(
    _tangent_call_p, mlir.lower_fun(lambda *leaves, tangent, **_: tangent(*leaves), multiple_results=True)
)
