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
    """Why one of these modules cannot serve the arguments, or none can serve on this machine; None if all can."""
    if backend == "gpu" and (reason := gpu_refusal()) is not None:
        return reason
    modules = (kernel_module(backend, name) for name in names)
    return next(filter(None, (module.refusal(*arrays, **options) for module in modules)), None)


def gpu_refusal() -> str | None:
    """Why no GPU kernel can be compiled for the GPU that programs are for, if there is one; None if they can."""
    return importlib.import_module("kernels_pallas.gpu.target").refusal()


def on_backends(call: Callable[..., Any], refusal: Callable[..., str | None]) -> dict[str, Kernel]:
    """A Kernel for each backend; both functions take its name before the arguments of Kernel's."""
    return {
        f"pallas_{name}": Kernel(functools.partial(call, name), functools.partial(refusal, name)) for name in _BACKENDS
    }
