"""A token's attention to a cache as a kernel."""

import functools
import importlib
from collections.abc import Callable
from typing import Any

import jax

from attnlab.attention._dispatch.choice import Kernel
from attnlab.attention._dispatch.kernel_call import kernel_call, like

Array = jax.Array


def _module(backend: str) -> Any:
    return importlib.import_module(f"kernels_pallas.{backend}.cached_flash")


def _attend(
    backend: str,
    xla: Callable[..., Array],
    query: Array,
    key: Array,
    value: Array,
    visible: Array,
    used: Array,
    scale: Array,
) -> Array:
    module = _module(backend)

    def kernel(arrays: Any, fixed: Any, _: bool) -> tuple[Array, Any]:
        *tokens, scale = arrays
        return module.cached_flash_attention(*tokens, *fixed, scale=scale), ()

    def plain(arrays: Any, fixed: Any) -> Array:
        query, key, value, scale = arrays
        return xla(query, key, value, *fixed, scale)

    results = like(query, width=value.shape[-1])
    arrays, fixed = (query, key, value, scale), (visible, used)
    layouts = (("B.N.", "B.K.", "B.K.", ""), ("B.", ""), "B.N.", ())
    return kernel_call(kernel, None, plain, arrays, fixed, results=results, layouts=layouts)


def _refusal(backend: str, query: Any, key: Any, value: Any, *_: Any) -> str | None:
    try:
        module = _module(backend)
    except ImportError as error:  # jax 0.10's Mosaic GPU needs it
        return f"needs absl-py ({error})"
    return module.refusal(query, key, value)


def _kernel(backend: str) -> Kernel:
    return Kernel(functools.partial(_attend, backend), functools.partial(_refusal, backend))


KERNELS = {"pallas_tpu": _kernel("tpu"), "pallas_gpu": _kernel("gpu")}
