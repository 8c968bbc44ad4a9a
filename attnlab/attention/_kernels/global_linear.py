"""Linear attention over all tokens by two kernels, a sum over tokens and tokens times a state: each is linear in every
argument, and its gradients are calls of the two."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from attnlab.attention._dispatch.choice import Kernel
from attnlab.attention._dispatch.kernel_call import kernel_call, like
from attnlab.attention._kernels.backends import first_refusal, kernel_module
from attnlab.attention._shared.feature_maps import apply_feature_map, normalizer_epsilon
from attnlab.attention._shared.recurrence import LinearInputs, LinearOptions, LinearState

Array = jax.Array


def kernels(by_sums: Callable[..., Array]) -> dict[str, Kernel]:
    """by_sums(token_sums, times_state, query, key, value, ...): a mechanism."""

    def call(xla: Any, *arrays: Array, **options: Any) -> Array:
        return by_sums(token_sums, times_state, *arrays, **options)

    return {"pallas_tpu": Kernel(call, lambda *arrays, **_: refusal(*arrays))}


def linear_attention(inputs: LinearInputs, options: LinearOptions) -> tuple[Array, LinearState]:
    """Not causal, of one segment."""
    query, key, value, state = inputs.query, inputs.key, inputs.value, inputs.state
    dtype, group = query.dtype, query.shape[2] // key.shape[2]
    query, key = apply_feature_map(options.feature_map, query, key, options.scale, state.kv.dtype)
    own, _ = token_sums(key.astype(dtype), value, sums=False)
    kv, k_sum = state.kv + jnp.repeat(own, group, axis=1), state.k_sum
    if k_sum is not None:
        k_sum = k_sum + jnp.repeat(jnp.sum(key, axis=1), group, axis=1)
    if options.normalize and k_sum is not None:
        # Of the query, which is written anyway: a divided output would be one more array. No dot, of float32 exact.
        total = jnp.sum(query * k_sum[:, None], axis=-1, keepdims=True)
        query = query / (total + normalizer_epsilon(options.feature_map))
    return times_state(query.astype(dtype), kv), LinearState(kv, k_sum)


def linear_refusal(inputs: LinearInputs, options: LinearOptions) -> str | None:
    if inputs.segment_ids is not None:
        return "serves segment_ids where calls are causal"
    query, key = jax.eval_shape(
        lambda q, k: apply_feature_map(options.feature_map, q, k, 1.0, jnp.float32), inputs.query, inputs.key
    )
    return refusal(like(query, dtype=inputs.query.dtype), like(key, dtype=inputs.key.dtype), inputs.value)


def refusal(query: Any, key: Any, value: Any) -> str | None:
    """Why the kernels cannot serve these arrays, or None if they can."""
    reasons = (first_refusal("tpu", ["global_linear"], x, value) for x in (query, key))
    return next(filter(None, reasons), None)


def token_sums(x: Array, y: Array, *, sums: bool = True) -> tuple[Array, Array | None]:
    """[B, T, K, F] and [B, T, K, V] -> the sum over T of x y^T, [B, K, F, V], and with sums that of y, [B, K, V]."""
    module = kernel_module("tpu", "global_linear")

    def kernel(arrays: Any, _: Any, keep: bool) -> tuple[Any, Any]:
        return module.token_sums(*arrays, sums=sums), ()

    def gradients(arrays: Any, _: Any, kept: Any, cotangents: Any) -> Any:
        (x, y), (of_products, of_sum) = arrays, cotangents
        return module.times_state(y, of_products.mT), module.times_state(x, of_products, of_sum)

    def blocked(arrays: Any, _: Any) -> Any:
        x, y = (x.astype(jnp.float32) for x in arrays)
        return jnp.einsum("BTKF,BTKV->BKFV", x, y), jnp.sum(y, axis=1) if sums else None

    (batch, _, heads, features), value_dim = x.shape, y.shape[-1]
    shapes = [(batch, heads, features, value_dim), (batch, heads, value_dim)]
    results: Any = [jax.ShapeDtypeStruct(shape, jnp.float32) for shape in shapes]
    results = (results[0], results[1] if sums else None)
    layouts = (("B.K.", "B.K."), None, ("BK..", "BK." if sums else None), ())
    return kernel_call(kernel, gradients, blocked, (x.astype(y.dtype), y), results=results, layouts=layouts)


def times_state(x: Array, state: Array, offset: Array | None = None) -> Array:
    """Tokens [B, T, N, F] times their key head's state [B, K, F, V], plus an offset [B, K, V]; in x's dtype."""
    module = kernel_module("tpu", "global_linear")

    def kernel(arrays: Any, _: Any, keep: bool) -> tuple[Any, Any]:
        return module.times_state(*arrays), ()

    def gradients(arrays: Any, _: Any, kept: Any, cotangent: Any) -> Any:
        x, state, offset = arrays
        to_state, to_offset = module.token_sums(x, cotangent, sums=offset is not None)
        return module.times_state(cotangent, state.mT), to_state, to_offset

    def blocked(arrays: Any, _: Any) -> Any:
        x, state, offset = arrays
        out = jnp.einsum("BTNF,BNFV->BTNV", x.astype(jnp.float32), state)
        return (out if offset is None else out + offset[:, None]).astype(x.dtype)

    group = x.shape[2] // state.shape[1]
    state, offset = jax.tree.map(lambda each: jnp.repeat(each, group, axis=1), (state, offset))
    layouts = (("B.N.", "BN..", None if offset is None else "BN."), None, "B.N.", ())
    results = like(x, width=state.shape[-1])
    return kernel_call(kernel, gradients, blocked, (x, state, offset), results=results, layouts=layouts)
