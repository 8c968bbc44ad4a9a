"""Agent attention by two calls of banded flash attention: what is not to be seen is another segment, and agents gather
in query's dtype."""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from attnlab.attention._dispatch.choice import Kernel
from attnlab.attention._kernels import dot_product
from attnlab.attention._kernels.backends import on_backends

Array = jax.Array
# (what agents have gathered [B, m, N, V], its lse [B, m, N]), of the keys of a device -> those of the keys of all.
Merge = Callable[[Array, Array], tuple[Array, Array]]


def kernels(blocked: Callable[..., Any]) -> dict[str, Kernel]:
    """blocked: the xla form of dot_product_attention, of which both steps are calls."""

    def call(
        backend: str,
        xla: Any,
        query: Array,
        key: Array,
        value: Array,
        agents: Array,
        gather_bias: Array | None,
        broadcast_bias: Array | None,
        key_mask: Array | None,
        *,
        scale: Any,
        merge: Merge | None,
    ) -> Array:
        attend = functools.partial(dot_product.KERNELS[f"pallas_{backend}"].call, blocked)
        agents = agents.astype(query.dtype)
        gathers, reads = None, None
        if key_mask is not None:
            gathers = (jnp.zeros(agents.shape[:2], jnp.int32), (~key_mask[:, 0, 0]).astype(jnp.int32))
        gathered, lse = attend(agents, key, value, gather_bias, None, gathers, is_causal=False, scale=scale)
        if merge is not None:
            gathered, lse = merge(gathered, lse)
        if key_mask is not None:
            is_empty = lse[..., 0] == -jnp.inf  # of an agent, in every head alike
            reads = (jnp.zeros(query.shape[:2], jnp.int32), is_empty.astype(jnp.int32))
        out, _ = attend(query, agents, gathered, broadcast_bias, None, reads, is_causal=False, scale=scale)
        return out

    return on_backends(call, _refusal)


def _refusal(
    backend: str,
    query: Array,
    key: Array,
    value: Array,
    agents: Array,
    gather_bias: Array | None,
    broadcast_bias: Array | None,
    key_mask: Array | None,
    *,
    scale: Any,
    merge: Merge | None,
) -> str | None:
    for name, given in (("gather_bias", gather_bias), ("broadcast_bias", broadcast_bias)):
        if given is not None and backend == "gpu":
            return f"has no {name}"
    rounded = jax.ShapeDtypeStruct(agents.shape, query.dtype)
    gathered = jax.ShapeDtypeStruct((*agents.shape[:-1], value.shape[-1]), query.dtype)
    steps = ((rounded, key, value, gather_bias), (query, rounded, gathered, broadcast_bias))
    refusal = dot_product.KERNELS[f"pallas_{backend}"].refusal
    reasons = (refusal(*step, None, None, is_causal=False, scale=scale) for step in steps)
    return next(filter(None, reasons), None)
