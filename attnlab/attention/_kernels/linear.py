"""Linear attention by the chunked kernels, or over all tokens by those of sums, and its step by the kernel that changes
a state in place."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from attnlab.attention._dispatch.kernel_call import kernel_call, like
from attnlab.attention._kernels import global_linear
from attnlab.attention._kernels.backends import first_refusal, kernel_module, on_backends
from attnlab.attention._shared.chunks import RESET, drop_at_starts
from attnlab.attention._shared.feature_maps import apply_feature_map, normalizer_epsilon
from attnlab.attention._shared.heads import repeat_key_heads
from attnlab.attention._shared.recurrence import LinearInputs, LinearOptions, LinearState

Array = jax.Array
Xla = Callable[[LinearInputs, LinearOptions], tuple[Array, LinearState]]

# What the kernels leave to the mechanism's other forms: a plain recurrence of mapped and scaled tokens.
_PLAIN = LinearOptions(feature_map=None, normalize=False, scale=1.0)
_NO_ERASE = "serves no erase, which reads and writes other vectors than keys"


def _operands(inputs: LinearInputs, options: LinearOptions) -> tuple[Any, ...]:
    """The kernel's query, key, value, log_decay, beta and state. A sum of keys is kept as a value that is always 1."""
    query, key, value, log_decay, beta, state, segment_ids, _ = inputs
    batch, length, heads, _ = query.shape
    dtype, wide = query.dtype, state.kv.dtype
    mapped = apply_feature_map(options.feature_map, query, key, options.scale, wide)
    query, key = (x.astype(dtype) for x in mapped)
    kv = state.kv
    if state.k_sum is not None:
        value = jnp.concatenate([value, jnp.ones_like(value[..., :1])], axis=-1)
        kv = jnp.concatenate([kv, state.k_sum[..., None]], axis=-1)
    if log_decay is not None:
        log_decay = log_decay if log_decay.ndim == 4 else jnp.broadcast_to(log_decay, (batch, length, heads))[..., None]
    if segment_ids is not None:
        log_decay = drop_at_starts(log_decay, segment_ids, heads, wide)
    if log_decay is not None:
        log_decay = jnp.maximum(log_decay.astype(wide), RESET)  # the kernel multiplies it by 0
        log_decay = jnp.broadcast_to(log_decay, (batch, length, heads, log_decay.shape[-1]))
        log_decay = log_decay[..., 0] if log_decay.shape[-1] == 1 else log_decay
    return query, key, value, log_decay, beta, kv


# Of kernels_pallas, by backend: with the kernel, and with that of its gradients.
_MODULES = {"tpu": ("chunked_linear", "chunked_linear"), "gpu": ("chunked_linear", "chunked_linear_backward")}


def _chunked(backend: str, xla: Xla, inputs: LinearInputs, options: LinearOptions) -> tuple[Array, LinearState]:
    if not options.is_causal:
        return global_linear.linear_attention(inputs, options)
    forward, backward = (kernel_module(backend, name) for name in _MODULES[backend])
    out_dtype = inputs.query.dtype
    sums = jnp.float32 if options.normalize else out_dtype

    def kernel(arrays: Any, _: Any, keep: bool) -> tuple[Any, Any]:
        out, state, *kept = forward.chunked_linear_attention(*arrays, out_dtype=sums, keep=keep)
        return (out, state), kept

    def gradients(arrays: Any, _: Any, kept: Any, cotangents: Any) -> Any:
        return backward.chunked_linear_gradients(*arrays[:-1], *kept, *cotangents)

    def blocked(arrays: Any, _: Any) -> Any:
        query, key, value, log_decay, beta, kv = arrays
        plain = _PLAIN._replace(chunk_size=options.chunk_size)
        out, state = xla(LinearInputs(query, key, value, log_decay, beta, LinearState(kv)), plain)
        return out.astype(sums), state.kv

    arrays = _operands(inputs, options)
    query, _, value, log_decay, beta, kv = arrays
    results = (like(query, width=value.shape[-1], dtype=sums), like(kv, dtype=jnp.float32))
    kept = [forward.kept_shapes(query, value, log_decay, beta)]
    gates = (None if log_decay is None else "B.N." if log_decay.ndim == 4 else "B.N", None if beta is None else "B.N")
    of_kept = jax.tree.map(lambda x: "BN" + "." * (len(x.shape) - 2), kept)
    layouts = (("B.N.", "B.K.", "B.K.", *gates, "BN.."), None, ("B.N.", "BN.."), of_kept)
    out, kv = kernel_call(kernel, gradients, blocked, arrays, results=results, kept=kept, layouts=layouts)
    width = inputs.value.shape[-1]
    k_sum = None if inputs.state.k_sum is None else kv[..., width]
    if options.normalize:
        out = out[..., :width] / (out[..., width:] + normalizer_epsilon(options.feature_map))
    return out[..., :width].astype(out_dtype), LinearState(kv[..., :width], k_sum)


def chunked_refusal(
    backend: str, query: Any, key: Any, value: Any, log_decay: Any = None, beta: Any = None
) -> str | None:
    """Why the kernel cannot serve operands of these shapes, or None if it can."""
    return first_refusal(backend, ["chunked_linear"], query, key, value, log_decay, beta)


def _refusal(backend: str, inputs: LinearInputs, options: LinearOptions) -> str | None:
    if not options.is_causal:
        if backend == "gpu":
            return "serves causal calls; the others are two products of XLA"
        return global_linear.linear_refusal(inputs, options)
    if inputs.erase is not None:
        return _NO_ERASE
    # The scale may be traced with the call, and no shape depends on it.
    options = options._replace(scale=1.0)
    return chunked_refusal(backend, *jax.eval_shape(lambda inputs: _operands(inputs, options), inputs)[:-1])


KERNELS = on_backends(_chunked, _refusal)


def _step(backend: str, xla: Xla, inputs: LinearInputs, options: LinearOptions) -> tuple[Array, LinearState]:
    query, key, value, log_decay, beta, state, *_ = inputs
    out_dtype, heads = query.dtype, query.shape[2]
    query, key = (x[:, 0] for x in apply_feature_map(options.feature_map, query, key, options.scale, jnp.float32))
    key, value = (repeat_key_heads(x, heads) for x in (key, value[:, 0].astype(jnp.float32)))
    if log_decay is not None:
        log_decay = log_decay.astype(jnp.float32)
        log_decay = log_decay[:, 0] if log_decay.ndim > 1 else log_decay
        log_decay = jnp.broadcast_to(log_decay if log_decay.ndim == 3 else log_decay[..., None], key.shape)
    beta = None if beta is None else beta[:, 0].astype(jnp.float32)

    def plain(arrays: Any, _: Any) -> Any:
        kv, *now = arrays
        query, key, value, log_decay, beta = jax.tree.map(lambda x: x[:, None], now)
        out, state = xla(LinearInputs(query, key, value, log_decay, beta, LinearState(kv)), _PLAIN)
        return out[:, 0], state.kv

    def kernel(arrays: Any, _: Any, keep: bool) -> Any:
        kv, query, key, value, log_decay, beta = arrays
        decay = None if log_decay is None else jnp.exp(log_decay)
        return kernel_module(backend, "linear_step").linear_step(kv, query, key, value, decay, beta), ()

    arrays = (state.kv, query, key, value, log_decay, beta)
    gates = (None if log_decay is None else "BN.", None if beta is None else "BN")
    layouts = (("BN..", "BN.", "BN.", "BN.", *gates), None, ("BN.", "BN.."), ())
    out, kv = kernel_call(kernel, None, plain, arrays, results=(like(value), like(state.kv)), layouts=layouts)
    k_sum = state.k_sum
    if k_sum is not None:
        k_sum = (k_sum if log_decay is None else jnp.exp(log_decay) * k_sum) + key
    if options.normalize:
        total = jnp.einsum("BNH,BNH->BN", query, k_sum)[..., None]
        out = out / (total + normalizer_epsilon(options.feature_map))
    return out[:, None].astype(out_dtype), LinearState(kv, k_sum)


def _step_refusal(backend: str, inputs: LinearInputs, options: LinearOptions) -> str | None:
    if inputs.erase is not None:
        return _NO_ERASE
    return first_refusal(backend, ["linear_step"], inputs.state.kv)


STEP_KERNELS = on_backends(_step, _step_refusal)


def _state_step(backend: str, xla: Callable[..., Any], *arrays: Array) -> Any:
    """(state [B, N, F, V], query, key [B, N, F], value [B, N, V], decay [B, N, F]) -> (out, state), float32."""

    def kernel(arrays: Any, _: Any, keep: bool) -> Any:
        return kernel_module(backend, "linear_step").linear_step(*arrays), ()

    layouts = (("BN..", "BN.", "BN.", "BN.", "BN."), None, ("BN.", "BN.."), ())
    results = (like(arrays[3]), like(arrays[0]))
    return kernel_call(kernel, None, lambda arrays, _: xla(*arrays), arrays, results=results, layouts=layouts)


def _state_refusal(backend: str, state: Array, *_: Array) -> str | None:
    return first_refusal(backend, ["linear_step"], state)


STATE_KERNELS = on_backends(_state_step, _state_refusal)
