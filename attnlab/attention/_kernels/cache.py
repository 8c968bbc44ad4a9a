"""A token's attention to a cache as a kernel."""

from collections.abc import Callable
from typing import Any

import jax

from attnlab.attention._dispatch.choice import Kernel
from attnlab.attention._dispatch.kernel_call import kernel_call, like

Array = jax.Array


def _pallas_tpu(
    xla: Callable[..., Array], query: Array, key: Array, value: Array, visible: Array, used: Array, scale: Array
) -> Array:
    from kernels_pallas.tpu.cached_flash import cached_flash_attention

    def kernel(arrays: Any, fixed: Any, _: bool) -> tuple[Array, Any]:
        *tokens, scale = arrays
        return cached_flash_attention(*tokens, *fixed, scale=scale), ()

    def plain(arrays: Any, fixed: Any) -> Array:
        query, key, value, scale = arrays
        return xla(query, key, value, *fixed, scale)

    results = like(query, width=value.shape[-1])
    arrays, fixed = (query, key, value, scale), (visible, used)
    layouts = (("B.N.", "B.K.", "B.K.", ""), ("B.", ""), "B.N.", ())
    return kernel_call(kernel, None, plain, arrays, fixed, results=results, layouts=layouts)


def _refusal(query: Any, key: Any, value: Any, *_: Any) -> str | None:
    from kernels_pallas.tpu.cached_flash import refusal

    return refusal(query, key, value)


KERNELS = {"pallas_tpu": Kernel(_pallas_tpu, _refusal)}
