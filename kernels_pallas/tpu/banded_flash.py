"""Banded flash attention for TPU: every query sees a box of keys, in 1, 2 or 3 axes, and the first `sinks` keys.

    out_t = sum_{s visible to t} softmax_s(scale q_t . k_s) v_s        visible: starts[t] <= s < ends[t], or
    lse_t = log sum_{s visible to t} exp(scale q_t . k_s)                       s < min(sinks, ends[t])

With a softcap c the logits are c tanh(scale / c q_t . k_s): a tanh of the products, whose factor is then c. A bias
b_ts, if there is one, is added to the logits: a step reads the tile of its pair, or of one row of keys a row.

Queries and keys are cut into tiles. A list, made before the kernel runs, has the pairs of a query tile and a key tile
in which some query sees some key, and no other key tile is read from memory. The grid is (batch, heads, pairs): one
step adds one key tile to the running softmax of one query tile (FlashAttention, Dao et al. 2022; the running maximum:
Milakov & Gimelshein 2018).

                  key tiles
                0 1 2 3 4 5
    query     0 # .                  pairs: 00 01, 10 11 12, 21 22 23       #: full, no element mask
    tiles     1 . # .                                                       .: partly seen
              2   . # .

The list comes by scalar prefetch, so that the pipeline knows the next tiles early. With several axes the caller orders
the tokens so that a box of space is one tile (patterns.Boxes), and every key brings its coordinates.

The softmax of one head is a chain (product, maximum, exponential, product) in which the matrix unit waits. So a step
has up to four heads, those of one key head or with their own, as independent chains: the next product or two are
written before this one's softmax. A query's sum is kept per lane and added up at the end; its first step sets what the
others rescale. Of a pair of tiles that is partly seen only the quarters that some query sees are computed, and elements
are masked only in cells of 128 x 128 that are partly seen. A row of the list begins with the tile of keys that the row
before ended with, which then is not read again.

Numerics: products of bfloat16 operands are accumulated in float32; float32 operands are multiplied at full float32
precision (Precision.HIGHEST, six passes of the matrix unit: a float32 call is about as accurate as XLA's at that
setting, and several times slower than a bfloat16 one). The running maximum, sum and output are float32. Weights are
rounded to the values' dtype before they multiply them. Two runs give the same bits. Gradients are in
banded_flash_backward.py.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from kernels_pallas.patterns import Pattern
from kernels_pallas.tpu.band import (
    MASKED,
    Band,
    Body,
    Call,
    Piece,
    Step,
    add_by_lane,
    biased,
    block_bytes,
    blocks_of,
    capped_in_base_2,
    hide,
    in_base_2,
    is_last,
    lse_of,
    one_ahead,
    over_lanes,
    save_bounds,
    visit_anew,
)
from kernels_pallas.tpu.band import heads_of_a_step as band_heads
from kernels_pallas.tpu.band import refusal as band_refusal
from kernels_pallas.tpu.common import LANES, SUBLANES, dot, round_up, tokens_first

Array = jax.Array

# (queries in a tile, keys in a tile), by bytes of an element and padded head dim. Of tiles that fit, 512 x 512 takes
# the fewest cycles for a window of 1024 (kernels_pallas.aot): smaller ones issue more steps, larger ones see less.
_BLOCKS = {
    (2, 64): (512, 512),
    (2, 128): (512, 512),
    (2, 256): (512, 512),
    (4, 64): (512, 512),
    (4, 128): (512, 512),
    (4, 256): (256, 512),
}
_DEFAULT_BLOCKS = (256, 256)  # at other widths
# Constants in the kernel have dtypes: a Python float would be a float64 under jax_enable_x64.
_ONE, _LOG_2 = np.float32(1), np.float32(np.log(2))


def default_blocks(query: Any, key: Any, value: Any) -> tuple[int, int]:
    """(block_q, block_k) for arrays of these shapes and dtype, from a frozen table."""
    return blocks_of(_BLOCKS, _DEFAULT_BLOCKS, query, key, value)


def vmem_bytes(
    block_q: int,
    block_k: int,
    head_dim: int,
    value_dim: int,
    dtype: Any,
    *,
    tables: int = 1,
    heads: int = 1,
    key_heads: int = 1,
    bias: Any = None,
) -> int:
    """VMEM that the kernel takes at most: two buffers for every block, the running state, and a step's temporaries.

    tables: 2 with a table of keys beside that of queries. heads, key_heads: of a step. bias: as bias_block gives it.
    """
    size = jnp.dtype(dtype).itemsize
    key_lanes, value_lanes = (round_up(width, LANES) for width in (head_dim, value_dim))
    blocks = size * (heads * block_q + key_heads * block_k) * (key_lanes + value_lanes)
    # The tables of queries and of keys, and lse.
    rows = 4 * SUBLANES * ((1 + heads) * block_q + (block_k if tables > 1 else 0))
    state = 4 * heads * block_q * (2 * LANES + value_lanes)
    # Logits (a tanh takes their place), those of the next head with them, weights, weights in the values' dtype.
    logits = (4 * min(heads, 2) + 4 + size) * block_q * block_k
    columns = 4 * block_q * LANES * 8  # which keys a query sees, one query per sublane
    product = 4 * block_q * value_lanes  # of weights and values, before it is added to the output
    # At full precision the operands of the logits are split into bfloat16 parts and remainders.
    splits = 2 * size * (block_q + block_k) * key_lanes if size == 4 else 0
    of_bias = 2 * block_bytes(bias) + (0 if bias is None else 4 * bias.shape[1] * block_k)  # a head's, in float32
    return 2 * (blocks + rows) + state + logits + columns + product + splits + of_bias


def refusal(
    query: Any, key: Any, value: Any, *, pattern: Pattern, segment_ids: Any = None, bias: Any = None
) -> str | None:
    """Why banded_flash_attention cannot serve these arguments (arrays may be shape structs), or None if it can."""
    settings: Any = {"pattern": pattern, "segment_ids": segment_ids, "bias": bias}
    return band_refusal(query, key, value, **settings, default_blocks=default_blocks, footprint=vmem_bytes)


def heads_of_a_step(
    query: Any, key: Any, value: Any, *, pattern: Pattern, segment_ids: Any = None, bias: Any = None
) -> int:
    """How many query heads a step takes (arrays may be shape structs)."""
    settings: Any = {"pattern": pattern, "segment_ids": segment_ids, "bias": bias}
    return band_heads(query, key, value, **settings, default_blocks=default_blocks, footprint=vmem_bytes)


def banded_flash_attention(
    query: Array,
    key: Array,
    value: Array,
    *,
    pattern: Pattern,
    segment_ids: tuple[Array, Array] | None = None,
    bias: Array | None = None,
    scale: float | Array,
    softcap: float | None = None,
) -> tuple[Array, Array]:
    """Attention of every query to the keys that the pattern gives it.

    Args:
      query: [B, T, N, H], bfloat16 or float32.
      key: [B, S, K, H] of the same dtype. K divides N: query head n reads key head n // (N / K).
      value: [B, S, K, V] of the same dtype.
      pattern: of T queries and S keys.
      segment_ids: integers ([B, T], [B, S]); a query sees keys of its own segment only.
      bias: [B|1, N|1, T|1, S], bfloat16 or float32, added to the logits. One of -inf hides the key; a finite one
        below -1e38 counts as -1e38.
      scale: factor on the logits, may be traced.
      softcap: what their tanh is multiplied by, a number above 0; None: no tanh.

    Returns:
      out [B, T, N, V] in query's dtype, lse [B, T, N] float32. A query that sees no key: 0 and -inf.

    Raises:
      ValueError: with refusal()'s reason.

    Complexity: O(B N H x pairs x block_q x block_k) time. Memory beside the arguments: copies of them with heads
    first, padded to whole tiles, and to 64 or a multiple of 128 in head dim.
    """
    reason = refusal(query, key, value, pattern=pattern, segment_ids=segment_ids, bias=bias)
    if reason is not None:
        raise ValueError(f"banded_flash_attention: {reason}")
    heads = heads_of_a_step(query, key, value, pattern=pattern, segment_ids=segment_ids, bias=bias)
    tiling = pattern.tiled(*pattern.blocks(default_blocks(query, key, value)))
    band = Band(query, key, value, tiling, segment_ids, bias)
    if softcap is not None:
        scale = scale / softcap
    elif bias is not None:
        scale = jnp.asarray(scale, jnp.float32) / _LOG_2
    else:
        query, scale = in_base_2(query, scale)
    out, lse = Call(band, by_key=False, heads=heads).run(
        functools.partial(_kernel, band=band, softcap=softcap),
        "banded_flash_attention",
        scale=scale,
        tokens=[band.queries(query), band.keys(key), band.keys(value)],
        out=[(band.value_width, query.dtype)],
        rows=1,
        scratch=[
            *[pltpu.VMEM((heads, band.block_q, width), jnp.float32) for width in (LANES, LANES, band.value_width)],
            *band.bounds_scratch(),
        ],
        products=(band.key_width, band.value_width),
    )
    lse = lse.reshape(band.batch, band.heads, -1)
    return tokens_first(out, query.shape[1], value.shape[-1]), jnp.swapaxes(lse[:, :, : query.shape[1]], 1, 2)


def _kernel(step: Step, scale_ref: Any, *refs: Any, band: Band, softcap: float | None) -> None:
    """One visit of a query tile to a key tile, of several heads. The maximum of a query is repeated over the lanes;
    each lane has a sum of its own, over the keys at its place."""
    query_ref, key_ref, value_ref, out_ref, lse_ref, maximum_ref, sum_ref, acc_ref, *bounds = refs
    heads = query_ref.shape[0]
    per_key = heads // key_ref.shape[0]
    # Of products, or their tanh, for exponents of 2; a bias is added to what they are then, of which the maxima are.
    of_products: Any = scale_ref[0, 0] if softcap is None else capped_in_base_2(softcap)
    factor: Any = of_products if step.bias is None else _ONE

    save_bounds(band, step, bounds)

    def start(queries: slice) -> None:
        for ref, number in ((maximum_ref, MASKED), (sum_ref, 0), (acc_ref, 0)):
            ref[:, queries] = jnp.full_like(ref[:, queries], number)

    def accumulate(body: Body, is_new: bool) -> None:
        def product(head: int, piece: Piece) -> Array:
            products = dot(query_ref[head, piece.queries], key_ref[head // per_key, piece.keys], contract=(1, 1))
            if softcap is not None:
                products = jnp.tanh(scale_ref[0, 0] * products)
            if step.bias is not None:
                products = biased(step, head, piece, of_products * products)
            return hide(band, step, piece, products, bounds)

        def use(head: int, piece: Piece, products: Array) -> None:
            queries, num_keys = (head, piece.queries), products.shape[1]
            old_maximum = jnp.full((products.shape[0], LANES), MASKED) if is_new else maximum_ref[queries]
            maximum = jnp.maximum(old_maximum, jnp.max(products, axis=1, keepdims=True))
            maximum_ref[queries] = maximum
            # Where a query has seen no key yet the maximum is MASKED and the weights are 1, not 0; the first key that
            # it does see multiplies what they gave by `decay` = 0.
            weights = jnp.exp2(factor * (products - over_lanes(maximum, num_keys)))
            values = value_ref[head // per_key, piece.keys]
            of_sum, of_values = add_by_lane(weights), dot(weights.astype(values.dtype), values, contract=(1, 0))
            if not is_new:
                decay = jnp.exp2(factor * (old_maximum - maximum))
                of_sum += decay * sum_ref[queries]
                of_values += over_lanes(decay, acc_ref.shape[2]) * acc_ref[queries]
            sum_ref[queries], acc_ref[queries] = of_sum, of_values

        one_ahead(heads, body, product, use)

    visit_anew(band, step, start, accumulate)

    @pl.when(is_last(step))
    def _() -> None:
        # Maxima and sums of all heads side by side, so that they become rows in one transposition.
        lanes = lax.broadcasted_iota(jnp.int32, maximum_ref.shape[1:], 1)
        columns = jnp.zeros(maximum_ref.shape[1:], jnp.float32)
        for head in range(heads):
            maximum, total = maximum_ref[head], jnp.sum(sum_ref[head], axis=1, keepdims=True)
            total = jnp.where(maximum <= MASKED, np.float32(np.inf), total)  # of a query that has seen no key
            out_ref[head] = (acc_ref[head] * over_lanes(_ONE / total, acc_ref.shape[2])).astype(out_ref.dtype)
            columns = jnp.where(lanes == head, maximum, jnp.where(lanes == heads + head, total, columns))
        rows = jnp.transpose(columns)
        maxima, totals = rows[:heads], rows[heads : 2 * heads]
        lse_ref[...] = lse_of(factor, maxima, totals)
