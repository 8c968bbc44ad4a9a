"""Kernels of a family that has the same functions on several backends: modules of kernels_pallas by name."""

import contextlib
import functools
from collections.abc import Callable, Sequence
from typing import Any

from attnlab.attention._dispatch.choice import Kernel
from attnlab.attention._dispatch.deferred import with_effects


def kernel_module(backend: str, name: str) -> Any:
    """backend: "tpu" or "gpu". name: of a module in its folder."""
    return (_tpu_modules if backend == "tpu" else _gpu_modules)()[name]


# Imported by statements, from which an ablation knows the code that a run executes.
def _tpu_modules() -> dict[str, Any]:
    from kernels_pallas.tpu import (
        banded_covariance,
        banded_flash,
        banded_flash_backward,
        banded_parallax,
        cached_flash,
        chunked_linear,
        covariance_solve,
        global_linear,
        linear_step,
        local_linear_step,
        routing_step,
    )

    banded = banded_covariance, banded_flash, banded_flash_backward, banded_parallax, covariance_solve
    of_linear = chunked_linear, global_linear, linear_step
    return _by_name(*banded, *of_linear, cached_flash, local_linear_step, routing_step)


def _gpu_modules() -> dict[str, Any]:
    from kernels_pallas.gpu import (
        banded_covariance,
        banded_flash,
        banded_flash_backward,
        banded_parallax,
        blocks,
        cached_flash,
        chunked_linear,
        chunked_linear_backward,
        linear_step,
    )

    banded = banded_covariance, banded_flash, banded_flash_backward, banded_parallax
    of_linear = chunked_linear, chunked_linear_backward, linear_step
    return _by_name(*banded, blocks, cached_flash, *of_linear)


def _by_name(*modules: Any) -> dict[str, Any]:
    return {module.__name__.rpartition(".")[2]: module for module in modules}


def first_refusal(backend: str, names: Sequence[str], *arrays: Any, **options: Any) -> str | None:
    """Why one of these modules cannot serve the arguments, or none can serve on this machine; None if all can."""
    if backend == "gpu" and (reason := gpu_refusal()) is not None:
        return reason
    modules = (kernel_module(backend, name) for name in names)
    return next(filter(None, (module.refusal(*arrays, **options) for module in modules)), None)


def gpu_refusal() -> str | None:
    """Why no GPU kernel can be compiled for the GPU that programs are for, if there is one; None if they can."""
    from kernels_pallas.gpu import target

    return target.refusal()


def on_backends(call: Callable[..., Any], refusal: Callable[..., str | None]) -> dict[str, Kernel]:
    """A Kernel for each backend; both functions take its name before the arguments of Kernel's."""
    of_tpu, of_gpu = ((functools.partial(call, name), functools.partial(refusal, name)) for name in ("tpu", "gpu"))
    return {"pallas_tpu": Kernel(*of_tpu), "pallas_gpu": on_gpu(*of_gpu)}


def on_gpu(call: Callable[..., Any], refusal: Callable[..., str | None]) -> Kernel:
    """A Kernel for GPUs, which may be simulated."""

    @functools.wraps(call)
    def run(*arguments: Any, **options: Any) -> Any:
        from kernels_pallas.gpu.simulation import is_simulated

        with with_effects() if is_simulated() else contextlib.nullcontext():
            return call(*arguments, **options)

    return Kernel(run, refusal)
