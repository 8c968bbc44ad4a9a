"""A few tokens' attention to a cache as a kernel."""

from collections.abc import Callable
from typing import Any

import jax

from attnlab.attention._dispatch.kernel_call import kernel_call, like
from attnlab.attention._kernels.backends import first_refusal, kernel_module, on_backends

Array = jax.Array


def _call(
    backend: str,
    xla: Callable[..., Array],
    query: Array,
    key: Array,
    value: Array,
    visible: Array,
    used: Array,
    scale: Array,
) -> Array:
    module = kernel_module(backend, "cached_flash")

    def kernel(arrays: Any, fixed: Any, _: bool) -> tuple[Array, Any]:
        *tokens, scale = arrays
        return module.cached_flash_attention(*tokens, *fixed, scale=scale), ()

    def plain(arrays: Any, fixed: Any) -> Array:
        query, key, value, scale = arrays
        return xla(query, key, value, *fixed, scale)

    results = like(query, width=value.shape[-1])
    arrays, fixed = (query, key, value, scale), (visible, used)
    layouts = (("B.N.", "B.K.", "B.K.", ""), ("B..", "B"), "B.N.", ())
    return kernel_call(kernel, None, plain, arrays, fixed, results=results, layouts=layouts)


def _refusal(backend: str, query: Any, key: Any, value: Any, *_: Any) -> str | None:
    return first_refusal(backend, ["cached_flash"], query, key, value)


KERNELS = on_backends(_call, _refusal)
