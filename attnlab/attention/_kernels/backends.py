"""Kernels of a family that has the same functions on several backends: modules of kernels_pallas by name."""

import functools
import importlib
from collections.abc import Callable, Sequence
from typing import Any

from attnlab.attention._dispatch.choice import Kernel

_BACKENDS = ("tpu", "gpu")  # folders of kernels_pallas


def kernel_module(backend: str, name: str) -> Any:
    """backend: "tpu" or "gpu". name: of a module in its folder."""
    return importlib.import_module(f"kernels_pallas.{backend}.{name}")


def first_refusal(backend: str, names: Sequence[str], *arrays: Any, **options: Any) -> str | None:
    """Why one of these modules cannot be loaded, or cannot serve the arguments; None if all can."""
    try:
        modules = [kernel_module(backend, name) for name in names]
    except ImportError as error:
        missing = (error.name or "").partition(".")[0]
        return "needs absl-py, which jax 0.10 does not bring" if missing == "absl" else f"cannot be loaded: {error}"
    return next(filter(None, (module.refusal(*arrays, **options) for module in modules)), None)


def on_backends(call: Callable[..., Any], refusal: Callable[..., str | None]) -> dict[str, Kernel]:
    """A Kernel for each backend; both functions take its name before the arguments of Kernel's."""
    return {
        f"pallas_{name}": Kernel(functools.partial(call, name), functools.partial(refusal, name)) for name in _BACKENDS
    }
