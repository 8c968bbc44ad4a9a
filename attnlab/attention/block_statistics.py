"""How much of attention falls on each block of keys, for each block of queries.

    p_ts = exp(scale q_t . k_s - lse_t) of visible pairs        out_ij = reduce of p_ts over t in block i, s in block j

What selectors are trained on (SeerAttention: "max"), static patterns are found by (SparseD: "mean"), and models are
looked at with. The weights of a few query blocks are held at a time.
"""

from typing import Literal, get_args

import jax
import jax.numpy as jnp
from jax import lax

from attnlab.attention import masks
from attnlab.attention._dispatch.exchange import given_positions
from attnlab.attention._dispatch.primitive import primitive
from attnlab.attention._shared.checks import (
    accumulator_dtype,
    check_array,
    check_block,
    check_bool,
    check_choice,
    check_floating,
    check_query_key_value,
    default_scale,
    require,
)
from attnlab.attention._shared.softmax import scaled_for_logits

Array = jax.Array
Reduction = Literal["max", "sum", "mean"]
_ROWS = 128  # queries at a time, about


@primitive("BN..")
def block_statistics(
    query: Array,
    key: Array,
    lse: Array,
    *,
    query_block: int,
    key_block: int,
    reduce: Reduction,
    is_causal: bool = False,
    mask: masks.Mask | None = None,
    scale: float | None = None,
) -> Array:
    """The largest weight, the sum, or the mean of the weights of attention in each pair of blocks.

    Args:
      query: [B, T, N, H], floating. key: [B, S, K, H], K divides N.
      lse: [B, T, N], which dot_product_attention(..., return_lse=True) gives of the same query, key and options.
      query_block, key_block: tokens in a block, from 1; the last one may be cut short.
      reduce: "max", "sum" or "mean", the last over the pairs of tokens that there are; those not visible count as 0.
      is_causal, mask, scale: as in dot_product_attention; mask is a masks.Mask.

    Returns:
      [B, N, ceil(T / query_block), ceil(S / key_block)], float32 (float64 for float64 inputs), without a gradient.

    Raises:
      ValueError, TypeError: naming the argument.

    Complexity: O(T S H) time, O(S) memory beside the result.
    """
    check_query_key_value(query, key, key, same_space=False)
    batch, queries, heads, _ = query.shape
    keys, key_heads = key.shape[1:3]
    check_array("lse", lse, (batch, queries, heads), "[batch, T, heads]")
    check_floating("lse", lse)
    query_block = min(check_block("query_block", query_block), queries)  # a longer one is all of the sequence
    key_block = min(check_block("key_block", key_block), max(keys, 1))
    check_choice("reduce", reduce, get_args(Reduction))
    is_causal = check_bool("is_causal", is_causal)
    if mask is not None:
        masks.check_mask(mask, (keys,))
    shared = given_positions()
    require(shared is None, "query", f"parts of a sequence, over {shared}", "block_statistics needs whole sequences")

    dtype = accumulator_dtype(query, key, lse)
    scaled, key = scaled_for_logits(query, key, default_scale(scale, query.shape[-1]), dtype)
    query_blocks, key_blocks = -(-queries // query_block), -(-keys // key_block)
    at_once = min(max(_ROWS // query_block, 1), query_blocks)
    steps = -(-query_blocks // at_once)
    rows = at_once * query_block

    def in_steps(x: Array) -> Array:
        """[B, T, N, ...] -> [steps, B, K, G, rows, ...]."""
        x = jnp.pad(x, [(0, 0), (0, steps * rows - queries)] + [(0, 0)] * (x.ndim - 2))
        x = x.reshape(batch, steps, rows, key_heads, heads // key_heads, *x.shape[3:])
        return jnp.moveaxis(jnp.moveaxis(x, 1, 0), 2, 4)

    def some(step: tuple[Array, Array, Array]) -> Array:
        first, query, lse = step
        query_number, key_number = (first + jnp.arange(rows))[:, None], jnp.arange(keys)[None]
        visible = (query_number < queries) & (key_number >= 0)
        if is_causal:
            visible = visible & (key_number <= query_number)
        if mask is not None:
            visible = visible & mask.sees((query_number,), (key_number,))
        exponents = jnp.einsum("BKGTH,BSKH->BKGTS", query, key) - jnp.where(lse == -jnp.inf, 0, lse)[..., None]
        weights = jnp.exp(jnp.where(visible[None, None, None], exponents, -jnp.inf))
        weights = jnp.pad(weights, [(0, 0)] * 4 + [(0, key_blocks * key_block - keys)])
        weights = weights.reshape(batch, heads, at_once, query_block, key_blocks, key_block)
        return weights.max((3, 5)) if reduce == "max" else weights.sum((3, 5))

    first = jnp.arange(steps) * rows
    found = lax.map(some, (first, in_steps(scaled), in_steps(lse.astype(dtype))))
    found = jnp.moveaxis(found, 0, 2).reshape(batch, heads, steps * at_once, key_blocks)[:, :, :query_blocks]
    if reduce == "mean":

        def real(length: int, size: int, blocks: int) -> Array:
            return jnp.minimum(size, length - size * jnp.arange(blocks)).astype(dtype)

        pairs = real(queries, query_block, query_blocks)[:, None] * real(keys, key_block, key_blocks)[None]
        found = found / pairs[None, None]
    return lax.stop_gradient(found)
