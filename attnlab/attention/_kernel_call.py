"""A kernel and the kernel of its gradients as one function, differentiable in both modes and to any order."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from attnlab.attention._partition import by_batch
from attnlab.attention._tangent_call import tangent_call


def kernel_call(
    kernel: Callable[..., tuple[Any, Any]],
    gradients: Callable[..., Any] | None,
    blocked: Callable[..., Any],
    arrays: Any,
    fixed: Any = None,
) -> Any:
    """kernel(arrays, fixed)'s results. Kernels give values and gradients; tangents, and derivatives of gradients, are
    the blocked form's, in plain JAX.

    Args:
      kernel: (arrays, fixed, keep) -> (results, what gradients needs of them); with keep=False the second is not used.
      gradients: (arrays, fixed, kept, cotangents of results) -> gradients, a pytree like arrays. None: as the tangents.
      blocked: (arrays, fixed) -> the same results as the kernel's.
      arrays: pytree of floating arrays. fixed: pytree that has no derivative (segment ids).
    """

    batch = jax.tree.leaves(arrays)[0].shape[0]

    @jax.custom_jvp
    def attend(arrays: Any, fixed: Any) -> Any:
        return by_batch(lambda arrays, fixed: kernel(arrays, fixed, False)[0], batch, arrays, fixed)

    @jax.custom_jvp
    def attend_and_keep(arrays: Any, fixed: Any) -> Any:
        return by_batch(lambda arrays, fixed: kernel(arrays, fixed, True), batch, arrays, fixed)

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
        return by_batch(gradients, batch, *residuals, cotangents)

    @transpose.defjvp
    def _(primals: Any, tangents: Any) -> Any:
        return transpose(*primals), jax.jvp(of_blocked, primals, tangents)[1]

    @attend.defjvp
    def _(primals: Any, tangents: Any) -> Any:
        results, kept = attend_and_keep(*primals)
        return results, tangent_call(tangent, transpose, (*primals, kept), tangents[0])

    @attend_and_keep.defjvp
    def _(primals: Any, tangents: Any) -> Any:
        results, kept = attend_and_keep(*primals)
        # What is kept serves values of gradients alone, whose derivatives are the blocked form's.
        unused = jax.tree.map(lambda x: jnp.zeros_like(x), kept)
        return (results, kept), (tangent_call(tangent, transpose, (*primals, kept), tangents[0]), unused)

    return attend(arrays, fixed)
