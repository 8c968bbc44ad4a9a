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
    sink_logits: Array | None,
    *,
    softcap: float | None,
) -> Array:
    module = kernel_module(backend, "cached_flash")
    of_softcap = {} if softcap is None else {"softcap": softcap}

    def kernel(arrays: Any, fixed: Any, _: bool) -> tuple[Array, Any]:
        *tokens, scale, sink_logits = arrays
        options = of_softcap if sink_logits is None else {**of_softcap, "sink_logits": sink_logits}
        return module.cached_flash_attention(*tokens, *fixed, scale=scale, **options), ()

    def plain(arrays: Any, fixed: Any) -> Array:
        query, key, value, scale, sink_logits = arrays
        return xla(query, key, value, *fixed, scale, sink_logits, softcap=softcap)

    results = like(query, width=value.shape[-1])
    arrays, fixed = (query, key, value, scale, sink_logits), (visible, used)
    layouts = (("B.N.", "B.K.", "B.K.", "", "N"), ("B..", "B"), "B.N.", ())
    return kernel_call(kernel, None, plain, arrays, fixed, results=results, layouts=layouts)


def _refusal(
    backend: str,
    query: Any,
    key: Any,
    value: Any,
    visible: Any,
    used: Any,
    scale: Any,
    sink_logits: Any,
    *,
    softcap: float | None,
) -> str | None:
    if backend == "gpu" and softcap is not None:
        return "has no softcap"
    if backend == "gpu" and sink_logits is not None:
        return "has no sink_logits in a step"
    return first_refusal(backend, ["cached_flash"], query, key, value)


KERNELS = on_backends(_call, _refusal)
