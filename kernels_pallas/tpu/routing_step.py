"""A token of routing attention for TPU: each head's query reads the ring of the cluster that it is in.

    out_n = sum_{s seen} softmax_s(q_n . k_s) v_s          over the slots of head n's cluster

The grid is (batch, heads); which ring a step reads is known before it begins, so that its keys and values are brought
from the cache as it lies, and no other cluster's.

Numerics: float32. Beside a bfloat16 cache the query and the weights are two bfloat16 numbers each, as in
covariance_solve.py.
"""

from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from kernels_pallas.tpu.band import MASKED
from kernels_pallas.tpu.common import LANES, SUBLANES, VMEM_BUDGET, round_up, varying, zero
from kernels_pallas.tpu.covariance_solve import parts, product

Array = jax.Array


def vmem_bytes(window: int, head_dim: int, value_dim: int, dtype: Any) -> int:
    """VMEM that the kernel takes at most: two buffers of a ring, and a step's temporaries."""
    size, rows = jnp.dtype(dtype).itemsize, round_up(window, LANES)
    widths = sum(round_up(width, LANES) for width in (head_dim, value_dim))
    return rows * widths * size * (5 if size == 4 else 3) + 4 * 8 * 2 * SUBLANES * (rows + widths)


def refusal(key: Any, value: Any) -> str | None:
    """Why routing_step cannot serve this cache (arrays or shape structs), or None if it can."""
    if key.dtype not in (jnp.bfloat16, jnp.float32) or key.dtype != value.dtype:
        return f"needs a cache of bfloat16 or of float32, got {key.dtype} and {value.dtype}"
    window = key.shape[3]
    needed = vmem_bytes(window, key.shape[-1], value.shape[-1], key.dtype)
    if needed > VMEM_BUDGET:
        return f"a window of {window} takes {needed / 2**20:.1f} MiB of VMEM, more than {VMEM_BUDGET / 2**20:.0f} MiB"
    return None


def routing_step(query: Array, key: Array, value: Array, cluster: Array, used: Array, hidden: Array) -> Array:
    """Attention of a token to a ring of every head's.

    Args:
      query: [B, N, H] float32, scaled. key: [B, N, c, window, H] and value: [B, N, c, window, V], bfloat16 or float32.
      cluster: int [B, N], the ring that is read. used: int [B, N], how many of its first slots are. hidden: int [B, N],
        a slot that is not seen, or -1.

    Returns:
      [B, N, V] float32; 0 where no slot is seen.

    Raises:
      ValueError: with refusal()'s reason.

    Complexity: O(B N window (H + V)) time; reads one ring per head.
    """
    reason = refusal(key, value)
    if reason is not None:
        raise ValueError(f"routing_step: {reason}")
    batch, heads, _, window, head_dim = key.shape
    value_dim = value.shape[-1]

    def ring(width: int) -> Any:
        return pl.BlockSpec(
            (None, None, None, window, width), lambda b, n, cluster, *_: (b, n, cluster[b, n], zero(), zero())
        )

    def row(width: int) -> Any:
        return pl.BlockSpec((None, None, 1, width), lambda b, n, *_: (b, n, zero(), zero()))

    out = pl.pallas_call(
        _kernel,
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=3,
            grid=(batch, heads),
            in_specs=[row(head_dim), ring(head_dim), ring(value_dim)],
            out_specs=row(value_dim),
        ),
        out_shape=jax.ShapeDtypeStruct(
            (batch, heads, 1, value_dim),
            jnp.float32,
            manual_axis_type=varying(query, key, value, cluster, used, hidden),
        ),
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "parallel"), vmem_limit_bytes=VMEM_BUDGET
        ),
        cost_estimate=pl.CostEstimate(
            flops=2 * batch * heads * window * (head_dim + value_dim),
            transcendentals=batch * heads * window,
            bytes_accessed=batch * heads * window * (head_dim + value_dim) * key.dtype.itemsize,
        ),
        name="routing_step",
    )(*(x.astype(jnp.int32) for x in (cluster, used, hidden)), query[:, :, None], key, value)
    return out[:, :, 0]


def _kernel(_: Any, used_ref: Any, hidden_ref: Any, query_ref: Any, key_ref: Any, value_ref: Any, out_ref: Any) -> None:
    at = pl.program_id(0), pl.program_id(1)
    used, hidden, window = used_ref[at], hidden_ref[at], key_ref.shape[0]

    query = jnp.broadcast_to(query_ref[...], (SUBLANES, query_ref.shape[1]))
    logits = product(parts(query, key_ref.dtype), key_ref[...], (1, 1))
    slot = lax.broadcasted_iota(jnp.int32, logits.shape, 1)
    logits = jnp.where((slot < used) & (slot != hidden), logits, MASKED)
    largest = jnp.max(logits, axis=1, keepdims=True)
    weights = jnp.where(logits > MASKED, jnp.exp(logits - largest), 0)
    total = jnp.sum(weights, axis=1, keepdims=True)
    # What is not in use may be NaN.
    slot = lax.broadcasted_iota(jnp.int32, (window, 1), 0)
    values = jnp.where(slot < used, value_ref[...], jnp.zeros_like(value_ref))
    out = product(parts(weights, values.dtype), values, (1, 0)) / jnp.where(total > 0, total, 1)
    out_ref[...] = out[:1]
