"""A kernel and the kernel of its gradients as one function, differentiable in both modes and to any order."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from attnlab.attention._dispatch.deferred import is_deferring, tangent_call
from attnlab.attention._dispatch.mesh import partitioned, placement


def kernel_call(
    kernel: Callable[..., tuple[Any, Any]],
    gradients: Callable[..., Any] | None,
    blocked: Callable[..., Any],
    arrays: Any,
    fixed: Any = None,
    *,
    results: Any,
    kept: Any = (),
    layouts: Any,
) -> Any:
    """kernel(arrays, fixed)'s results. Kernels give values and gradients; tangents, and derivatives of gradients, are
    the blocked form's, in plain JAX.

    Args:
      kernel: (arrays, fixed, keep) -> (results, what gradients needs of them); with keep=False the second is not used.
      gradients: (arrays, fixed, kept, cotangents of results) -> gradients, a pytree like arrays. None: as the tangents.
      blocked: (arrays, fixed) -> the same results as the kernel's.
      arrays: pytree of floating arrays, all that kernel and blocked read: what they close over would not be spread over
        devices. fixed: pytree that has no derivative (segment ids).
      results, kept: shape structs of what the kernel returns, floating.
      layouts: of (arrays, fixed, results, kept), see `partitioned`.
    """
    of_arrays, of_fixed, of_results, of_kept = layouts
    place, defer = placement(), is_deferring()

    def spread(function: Callable[..., Any], layouts: Any, results: Any, *arguments: Any) -> Any:
        return partitioned(function, place, layouts, results, *arguments, defer=defer)

    @jax.custom_jvp
    def attend(arrays: Any, fixed: Any) -> Any:
        layouts = (of_results, of_arrays, of_fixed)
        return spread(lambda arrays, fixed: kernel(arrays, fixed, False)[0], layouts, results, arrays, fixed)

    @jax.custom_jvp
    def attend_and_keep(arrays: Any, fixed: Any) -> Any:
        layouts = ((of_results, of_kept), of_arrays, of_fixed)
        return spread(lambda arrays, fixed: kernel(arrays, fixed, True), layouts, (results, kept), arrays, fixed)

    def tangent(residuals: Any, tangents: Any) -> Any:
        arrays, fixed, _ = residuals
        return jax.jvp(lambda arrays: blocked(arrays, fixed), (arrays,), (tangents,))[1]

    def of_blocked(residuals: Any, cotangents: Any) -> Any:
        arrays, fixed, _ = residuals
        return jax.vjp(lambda arrays: blocked(arrays, fixed), arrays)[1](cotangents)[0]

    @jax.custom_jvp
    def transpose(residuals: Any, cotangents: Any) -> Any:
        if gradients is None:
            return of_blocked(residuals, cotangents)
        layouts = (of_arrays, of_arrays, of_fixed, of_kept, of_results)
        return spread(gradients, layouts, residuals[0], *residuals, cotangents)

    @transpose.defjvp
    def _(primals: Any, tangents: Any) -> Any:
        return transpose(*primals), jax.jvp(of_blocked, primals, tangents)[1]

    @attend.defjvp
    def _(primals: Any, tangents: Any) -> Any:
        out, kept = attend_and_keep(*primals)
        return out, tangent_call(tangent, transpose, results, (*primals, kept), tangents[0])

    @attend_and_keep.defjvp
    def _(primals: Any, tangents: Any) -> Any:
        out, kept = attend_and_keep(*primals)
        # What is kept serves values of gradients alone, whose derivatives are the blocked form's.
        unused = jax.tree.map(jnp.zeros_like, kept)
        return (out, kept), (tangent_call(tangent, transpose, results, (*primals, kept), tangents[0]), unused)

    return attend(arrays, fixed)


def like(x: Any, *, width: int | None = None, dtype: Any = None) -> jax.ShapeDtypeStruct:
    """The shape struct of an array, with another last axis or dtype if given."""
    return jax.ShapeDtypeStruct(x.shape if width is None else (*x.shape[:-1], width), dtype or x.dtype)
