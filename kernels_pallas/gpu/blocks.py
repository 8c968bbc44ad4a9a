"""Sizes of the kernels' blocks, where a kernel has a choice of what fits into shared memory and registers.

Which is fastest only a card can tell. `attnlab bench --device gpu --tune` tries them all, one kernel at a time, and
prints what to write here; what is not here takes the first that fits.
"""

import contextlib
import contextvars
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, TypeVar

from kernels_pallas.gpu import target

Sizes = tuple[int, ...]  # what they count, the kernel says
_Fitting = TypeVar("_Fitting", bound=Sizes)
Kernel = tuple[str, tuple[Any, ...]]  # its name, and the shapes that its choice depends on

# By device kind, as JAX names it. Empty until a sweep has run on a card.
FROZEN: dict[str, dict[Kernel, Sizes]] = {}

_tried: contextvars.ContextVar[Mapping[Kernel, Sizes] | None] = contextvars.ContextVar("tried", default=None)
_noted: contextvars.ContextVar[dict[Kernel, list[Sizes]] | None] = contextvars.ContextVar("noted", default=None)


def chosen(name: str, shapes: tuple[Any, ...], fitting: Sequence[_Fitting]) -> _Fitting:
    """Of the sizes that fit, the table's for the GPU that programs are for, or those that are tried; else the first."""
    kernel = name, shapes
    if (noted := _noted.get()) is not None:
        noted[kernel] = list(fitting)
    if (tried := _tried.get()) is None:
        tried = FROZEN.get(target.device_kind() or "", {})
    return next((sizes for sizes in fitting if sizes == tried.get(kernel)), fitting[0])


@contextlib.contextmanager
def trying(sizes: Mapping[Kernel, Sizes]) -> Iterator[None]:
    """What is lowered meanwhile takes these sizes. JAX's caches know nothing of it: clear them before."""
    token = _tried.set(sizes)
    try:
        yield
    finally:
        _tried.reset(token)


@contextlib.contextmanager
def noting() -> Iterator[dict[Kernel, list[Sizes]]]:
    """The choices of the kernels that are lowered meanwhile, the first of each being what it takes by itself."""
    found: dict[Kernel, list[Sizes]] = {}
    token = _noted.set(found)
    try:
        yield found
    finally:
        _noted.reset(token)
