"""GPU kernels on a CPU, in Pallas's interpret mode."""

import contextlib
import contextvars
from collections.abc import Callable, Iterator
from typing import Any

from jax.experimental.xla_metadata import set_xla_metadata

_simulation: contextvars.ContextVar[Any] = contextvars.ContextVar("simulation", default=None)


@contextlib.contextmanager
def simulated(**options: Any) -> Iterator[None]:
    """Kernels that are traced inside run in interpret mode. options: of InterpretGPUParams, such as detect_races=True.

    After an exception inside a kernel the simulation is reset, so that the next one starts clean.
    """
    params, reset = _interpreter()
    token = _simulation.set(params(**options))
    try:
        # What was traced for a GPU is traced again under metadata that it was not traced under.
        with set_xla_metadata(kernels_simulated="gpu"):
            yield
    except BaseException:
        reset()
        raise
    finally:
        _simulation.reset(token)


def interpretation() -> Any:
    """What kernels that are traced now are told of it; None: they are compiled."""
    return _simulation.get()


def is_simulated() -> bool:
    return _simulation.get() is not None


def _interpreter() -> tuple[Any, Callable[[], None]]:
    from jax._src.pallas.mosaic_gpu.interpret import interpret_pallas_call, params

    return params.InterpretGPUParams, interpret_pallas_call.reset_gpu_interpret_mode_state
