"""What every public function is given: one compilation per kind of call, and a place in meshes.

A call outside jit would trace its loops anew each time, and XLA would compile them anew. `primitive` puts the function
into a jit of its own, as a call of which it also stands in larger programs.
"""

import difflib
import functools
import inspect
from collections.abc import Callable, Collection
from typing import Any, NamedTuple, ParamSpec, TypeVar

import jax
import numpy as np

from attnlab.attention._dispatch.choice import is_recording
from attnlab.attention._dispatch.exchange import given_positions
from attnlab.attention._dispatch.mesh import over_explicit_axes

P = ParamSpec("P")
R = TypeVar("R")

# Values that stand for themselves. Functions do not: what they close over may change, or be traced.
_CONSTANTS = (bool, int, float, complex, str, np.generic)


class _Call(NamedTuple):
    """What a call is beside its arrays. kinds: the leaves' types, as True == 1 == 1.0, and one of them is no window.
    positions: how they lie, where the caller says so."""

    tree: Any
    leaves: tuple[Any, ...]
    kinds: tuple[type, ...]
    positions: tuple[str, int] | None


def primitive(*layouts: str, like: str = "") -> Callable[[Callable[P, R]], Callable[P, R]]:
    """Decorates a public function of arrays, one of which is its `query`, and of options.

    layouts: of the arrays that it returns, in their order, the last one of all that are left: B, * and N for the batch,
      the space axes and the heads of the query, dots for axes that are whole on every device; " if OPTION" after one
      that only comes with this option. like: the argument that further results are like.
    """

    def decorate(function: Callable[P, R]) -> Callable[P, R]:
        signature = inspect.signature(function)

        def run(call: _Call, *arrays: Any) -> Any:
            def on_arrays(*arrays: Any) -> Any:
                left = iter(arrays)
                leaves = [next(left) if kind is _Array else leaf for leaf, kind in zip(call.leaves, call.kinds)]
                return jax.tree.unflatten(call.tree, leaves)

            def called(*arrays: Any) -> Any:
                args, kwargs = on_arrays(*arrays)
                return function(*args, **kwargs)

            args, kwargs = on_arrays(*arrays)
            given = signature.bind(*args, **kwargs).arguments
            asked = (layout.partition(" if ") for layout in layouts)
            returned = [layout for layout, _, option in asked if not option or given.get(option)]
            return over_explicit_axes(called, arrays, given.get("query"), returned, given.get(like))

        run.__name__ = function.__name__  # in profiles
        compiled = jax.jit(run, static_argnums=0)

        @functools.wraps(function)
        def call(*args: P.args, **kwargs: P.kwargs) -> R:
            check_names(function.__name__, kwargs, signature.parameters)
            leaves, tree = jax.tree.flatten((args, kwargs))
            kinds = tuple(_Array if _is_array(leaf) else type(leaf) for leaf in leaves)
            arrays = [leaf for leaf, kind in zip(leaves, kinds) if kind is _Array]
            constants = tuple(None if kind is _Array else leaf for leaf, kind in zip(leaves, kinds))
            rest = _Call(tree, constants, kinds, given_positions())
            is_constant = all(kind is _Array or issubclass(kind, _CONSTANTS) for kind in kinds)
            # Choices are recorded while a call is traced; and a kernel that is simulated has effects in their order,
            # which a jit inside another one loses.
            is_inner = any(isinstance(x, jax.core.Tracer) for x in arrays)
            is_kernel = str(kwargs.get("implementation")).startswith("pallas")
            is_direct = not is_constant or is_recording() or (is_inner and is_kernel)
            return (run if is_direct else compiled)(rest, *arrays)

        return call

    return decorate


def check_names(owner: str, given: Collection[str], known: Collection[str]) -> None:
    """Raises TypeError for an option that the owner has not, before one is missed that it was meant for."""
    for name in given:
        if name not in known:
            close = difflib.get_close_matches(name, known, n=1)
            raise TypeError(f"{owner} has no option {name!r}" + "".join(f"; did you mean {one!r}?" for one in close))


def _is_array(leaf: Any) -> bool:
    """Not of objects or strings, which JAX does not take."""
    return isinstance(leaf, jax.Array) or (isinstance(leaf, np.ndarray) and leaf.dtype.kind not in "OSUMm")


class _Array:
    """The kind of a leaf that is an array."""
