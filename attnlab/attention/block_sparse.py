"""Softmax attention of blocks of queries to the blocks of keys in their lists.

    out_t = sum_{s in A(t)} softmax_s(scale q_t . k_s + c_ts) v_s
    lse_t = log sum_{s in A(t)} exp(scale q_t . k_s + c_ts)
    A(t) = {s : s div key_block is listed for t div query_block, and mask, causality and segments let t see s}
    c_ts = block_bias at the place where the block is listed

What chooses the blocks is in block_selection.py; attention itself is the same for all of it (BiFormer, SeerAttention,
HiP and others). The blocked form takes a few query blocks at a time, gathers the keys and values that their lists have,
and attends to these; its gradient gathers them once more and adds what they get to their places.
"""

import functools
from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from attnlab.attention import block_selection, masks
from attnlab.attention._cached import at, by_row, counted, filled, put, tokens_at
from attnlab.attention._dispatch.choice import Implementations, dispatch
from attnlab.attention._dispatch.deferred import tangent_call
from attnlab.attention._dispatch.exchange import (
    Parts,
    as_one,
    given_positions,
    over_positions,
    own_heads,
    rows_of_heads,
    whole_positions,
    whole_space,
)
from attnlab.attention._dispatch.primitive import primitive
from attnlab.attention._kernels import block_sparse as kernels
from attnlab.attention._shared.checks import (
    accumulator_dtype,
    check_array,
    check_block,
    check_bool,
    check_choice,
    check_dividing_blocks,
    check_dtype,
    check_floating,
    check_int,
    check_integers,
    check_position,
    check_prompt,
    check_query_key_value,
    check_segment_pair,
    check_sizes,
    check_type,
    default_scale,
    require,
    shape_text,
    shown,
)
from attnlab.attention._shared.finite import spoiling
from attnlab.attention._shared.heads import repeat_key_heads
from attnlab.attention._shared.softmax import (
    dense_attention,
    reference_attention,
    scaled_for_logits,
    softmax_parts,
)

Array = jax.Array
_GATHERED = 2**20  # numbers of keys and values that are gathered at once, about


@primitive("B*N.", "B*N")
def block_sparse_attention(
    query: Array,
    key: Array,
    value: Array,
    blocks: Array,
    *,
    query_block: int,
    key_block: int,
    block_bias: Array | None = None,
    mask: masks.Mask | None = None,
    is_causal: bool = False,
    scale: float | None = None,
    segment_ids: Array | tuple[Array, Array] | None = None,
    return_lse: bool = False,
    implementation: str | None = None,
) -> Any:
    """Attention of blocks of queries to listed blocks of keys.

    Args:
      query: [B, T, N, H], floating. key: [B, S, K, H], K divides N. value: [B, S, K, V].
      blocks: integers [B|1, N|K|1, nq, M], the numbers of the key blocks that a query block sees, in any order. Others
        than there are, such as -1, are none, and no error, as a call would have to wait for the device to know; of one
        that is listed twice the first place counts. nq is ceil(T / query_block), M may be 0. Lists for K heads serve
        the group, whose keys are then read once. No gradient.
      query_block, key_block: tokens in a block, from 1; the last one may be cut short.
      block_bias: floating, [B|1] and blocks' other axes: added to all logits of the block. -inf hides it.
      mask: a masks.Mask of one axis, of the numbers of queries and keys, inside the blocks.
      is_causal: query t sees keys s <= t, of its blocks.
      scale: factor on the logits; None means H ** -0.5.
      segment_ids: integers [B, T] when T = S, or a pair ([B, T], [B, S]). Queries see keys of their own segment.
      return_lse: return (out, lse).
      implementation: None, "reference", "xla", "pallas_tpu" (bfloat16 or float32) or "pallas_gpu" (bfloat16 or
        float16); both take blocks of multiples of 128 tokens, lists of key heads, and no block_bias.

    Returns:
      out [B, T, N, V] in query's dtype; with return_lse also lse [B, T, N], float32 (float64 for float64 inputs),
      differentiable. A query that sees no key gives 0 and lse = -inf, with zero gradients.

    Raises:
      ValueError, TypeError: naming the argument.

    Complexity, of "xla": O(T M key_block (H + V)) time a head, forward and back; memory O(T + S) beside the lists.
    """
    check_query_key_value(query, key, value, same_space=False)
    batch, queries, heads, head_dim = query.shape
    keys, key_heads = key.shape[1:3]
    (all_queries,) = whole_space((queries,))  # where devices share positions, each has the lists of all
    # A block longer than the sequence is all of it.
    query_block, key_block = check_block("query_block", query_block), check_block("key_block", key_block)
    sizes = Blocks(min(query_block, all_queries), min(key_block, max(*whole_space((keys,)), 1)))
    check_lists("blocks", blocks, (batch, (heads, key_heads), -(-all_queries // sizes.query)))
    check_integers("blocks", blocks)
    if block_bias is not None:
        check_array("block_bias", block_bias, (None, *blocks.shape[1:]), "[batch|1] and blocks' other axes")
        require(block_bias.shape[0] in (1, batch), "block_bias", shape_text(block_bias), f"need batch 1 or {batch}")
        check_floating("block_bias", block_bias)
    if mask is not None:
        masks.check_mask(mask, whole_space((keys,)))
    segments = check_segment_pair(segment_ids, batch, queries, keys)
    is_causal, return_lse = check_bool("is_causal", is_causal), check_bool("return_lse", return_lse)
    settings: dict[str, Any] = {
        "sizes": sizes,
        "is_causal": is_causal,
        "mask": mask,
        "scale": default_scale(scale, head_dim),
    }
    attend = functools.partial(dispatch, "block_sparse_attention", IMPLEMENTATIONS, implementation, **settings)
    all_keys = keys if given_positions() is None else None
    of_bias = None if block_bias is None else lists_layout(block_bias, key)
    layouts: list[Any] = ["B*N.", "B+K.", "B+K.", lists_layout(blocks, key), of_bias, None]
    if segments is not None:
        layouts[5] = ("B*", "B+")
    parted = functools.partial(by_heads, attend, all_keys)
    arrays = query, key, value, blocks.astype(jnp.int32), block_bias, segments
    out, lse = over_positions(attend, parted, layouts, ("B*N.", "B*N"), *arrays)
    return (out, lse) if return_lse else out


class Blocks(NamedTuple):
    """Tokens in a block of queries and of keys."""

    query: int
    key: int


def by_heads(
    attend: Callable[..., tuple[Array, Array]],
    all_keys: int | None,
    parts: Parts,
    query: Array,
    key: Array,
    value: Array,
    blocks: Array,
    block_bias: Array | None,
    segments: tuple[Array, Array] | None,
) -> tuple[Array, Array]:
    """Each device attends in whole sequences, of its share of the batch and the key heads.

    all_keys: where the key has so many, it is whole already. Lists are whole on every device.
    """
    batch, key_heads = query.shape[0], key.shape[2]
    rows = batch * key_heads  # independent sequences
    share = -(-rows // parts.many)

    def of_share(x: Array) -> Array:
        """[B x K, ...] -> [share, ...]."""
        x = jnp.pad(x, [(0, share * parts.many - rows)] + [(0, 0)] * (x.ndim - 1))
        return lax.dynamic_slice_in_dim(x, share * parts.number(), share)

    def of_lists(x: Array) -> Array:
        """[B|1, N|K|1, nq, M] -> [share, N / K or 1, nq, M]."""
        of_group = -(-x.shape[1] // key_heads)
        x = jnp.broadcast_to(x, (batch, key_heads * of_group, *x.shape[2:]))
        return of_share(x.reshape(rows, of_group, *x.shape[2:]))

    def of_ids(x: Array, is_whole: bool) -> Array:
        x = x if is_whole else lax.all_gather(x, parts.names, axis=1, tiled=True)
        return of_share(jnp.repeat(x, key_heads, axis=0))

    are_whole = key.shape[1] == all_keys
    sent = [rows_of_heads(x, key_heads) for x in (query, key, value)]
    gathered = functools.partial(whole_positions, parts=parts)
    if are_whole:
        sent = [gathered(sent[0]), *map(of_share, sent[1:])]
    else:
        sent = [x for arrays in ([sent[0]], sent[1:]) for x in as_one(gathered, arrays)]
    ids = None if segments is None else (of_ids(segments[0], False), of_ids(segments[1], are_whole))
    query, key, value = (
        x.reshape(*x.shape[:2], -1, width) for x, width in zip(sent, (query.shape[-1], key.shape[-1], value.shape[-1]))
    )
    bias = None if block_bias is None else of_lists(block_bias)
    out, lse = attend(query, key, value, of_lists(blocks), bias, ids)

    back = functools.partial(own_heads, batch=batch, key_heads=key_heads, parts=parts)
    return back(out), back(lse[..., None])[..., 0]


def lists_layout(lists: Array, key: Array) -> str:
    """The layout of lists [B|1, N|K|1, nq, M], for `over_positions`."""
    batch, key_heads = key.shape[0], key.shape[2]
    head = "." if lists.shape[1] == 1 else "K" if lists.shape[1] == key_heads else "N"
    return ("B" if lists.shape[0] == batch else ".") + head + ".."


def check_lists(name: str, lists: Any, sizes: tuple[int, tuple[int, ...], int]) -> None:
    batch, heads, query_blocks = sizes
    check_array(name, lists, (None, None, query_blocks, None), "[batch|1, heads|key heads|1, query blocks, places]")
    fits = lists.shape[0] in (1, batch) and lists.shape[1] in (1, *heads)
    require(fits, name, shape_text(lists), f"need batch 1 or {batch}, and heads 1 or {' or '.join(map(str, heads))}")


def first_places(blocks: Array, key_blocks: int) -> tuple[Array, Array]:
    """Of lists [..., M]: the block at each place, 0 where there is none, and bool, whether the place counts."""
    is_block = (blocks >= 0) & (blocks < key_blocks)
    number = jnp.where(is_block, blocks, key_blocks)
    order = jnp.argsort(number, axis=-1, stable=True)
    by_number = jnp.take_along_axis(number, order, -1)
    is_first = jnp.concatenate([jnp.ones_like(is_block[..., :1]), by_number[..., 1:] != by_number[..., :-1]], -1)
    counts = is_block & jnp.take_along_axis(is_first, jnp.argsort(order, axis=-1), -1)
    return jnp.where(counts, number, 0), counts


def _within_blocks(
    visible: Array, query: Array, key: Array, *, is_causal: bool, mask: masks.Mask | None, same: Array | None
) -> Array:
    """visible, of queries and keys with these numbers, which broadcast, without what is hidden inside the blocks."""
    if is_causal:
        visible = visible & (key <= query)
    if mask is not None:
        visible = visible & mask.sees((query,), (key,))
    return visible if same is None else visible & same


# --- Reference --------------------------------------------------------------------------------------------------------


def _reference(
    query: Array,
    key: Array,
    value: Array,
    blocks: Array,
    block_bias: Array | None,
    segments: tuple[Array, Array] | None,
    *,
    sizes: Blocks,
    is_causal: bool,
    mask: masks.Mask | None,
    scale: Any,
) -> tuple[Array, Array]:
    queries, keys, heads = query.shape[1], key.shape[1], query.shape[2]
    key_blocks = -(-keys // sizes.key)
    number, counts = first_places(jnp.broadcast_to(blocks, (query.shape[0], *blocks.shape[1:])), key_blocks)
    is_at = (number[..., None] == jnp.arange(key_blocks)) & counts[..., None]  # [b, n, nq, M, nk]

    def dense(x: Array) -> Array:
        """Of each pair of blocks [b, n, nq, nk] -> of each pair of tokens [b, N, T, S]."""
        of_tokens = jnp.repeat(jnp.repeat(x, sizes.query, 2), sizes.key, 3)[:, :, :queries, :keys]
        return jnp.swapaxes(repeat_key_heads(jnp.swapaxes(of_tokens, 1, 2), heads), 1, 2)

    same = None if segments is None else segments[0][:, None, :, None] == segments[1][:, None, None, :]
    query_number, key_number = jnp.arange(queries)[:, None], jnp.arange(keys)[None]
    listed = dense(is_at.any(-2))
    visible = _within_blocks(listed, query_number, key_number, is_causal=is_causal, mask=mask, same=same)
    bias = None
    if block_bias is not None:  # not by a product with zeros and ones: a bias may be -inf
        of_places = jnp.broadcast_to(block_bias, number.shape)[..., None]
        bias = dense(jnp.where(is_at, of_places, 0).sum(-2))
    return dense_attention(query, key, value, visible=visible, bias=bias, scale=scale)


# --- A few query blocks at a time -------------------------------------------------------------------------------------


class _Inputs(NamedTuple):
    """By heads U that have lists of their own, N or K of them, of which R rows are the queries of a block, those of a
    group's heads one behind the other: query [B, U, nq, R, H], scaled; key [B, K, nk, key_block, H]; value
    [B, K, nk, key_block, V]; bias [B, U, nq, M] or None. Of one dtype, in which all is computed."""

    query: Array
    key: Array
    value: Array
    bias: Array | None


class _Fixed(NamedTuple):
    """Lists [B, U, nq, M]: number, counts as in first_places. Segment ids of queries [B, nq, R], of keys [B, nk,
    key_block], or None."""

    number: Array
    counts: Array
    query_ids: Array | None
    key_ids: Array | None


class _Settings(NamedTuple):
    keys: int
    query_block: int
    is_causal: bool
    mask: masks.Mask | None


def _xla(
    query: Array,
    key: Array,
    value: Array,
    blocks: Array,
    block_bias: Array | None,
    segments: tuple[Array, Array] | None,
    *,
    sizes: Blocks,
    is_causal: bool,
    mask: masks.Mask | None,
    scale: Any,
) -> tuple[Array, Array]:
    batch, queries, heads, _ = query.shape
    keys, key_heads = key.shape[1:3]
    own = heads if blocks.shape[1] == heads else key_heads  # heads with lists of their own
    dtype = accumulator_dtype(query, key, value)
    scaled, key = scaled_for_logits(query, key, scale, dtype)
    past = -queries % sizes.query

    def of_queries(x: Array) -> Array:
        """[B, T, N, H] -> [B, U, nq, R, H]."""
        x = jnp.pad(x, ((0, 0), (0, past), (0, 0), (0, 0)))
        x = x.reshape(batch, -1, sizes.query, own, heads // own, x.shape[-1])
        return x.transpose(0, 3, 1, 4, 2, 5).reshape(batch, own, -1, heads // own * sizes.query, x.shape[-1])

    def of_keys(x: Array, by_head: bool = True) -> Array:
        """[B, S, ...] -> [B, nk, key_block, ...], with the key heads K in front of nk. Of no keys there is one block,
        which no list has."""
        missing = sizes.key if keys == 0 else -keys % sizes.key
        x = jnp.pad(x, [(0, 0), (0, missing)] + [(0, 0)] * (x.ndim - 2))
        x = x.reshape(batch, -1, sizes.key, *x.shape[2:])
        return jnp.moveaxis(x, 3, 1) if by_head else x

    def of_lists(x: Array) -> Array:
        return jnp.broadcast_to(x, (batch, own, *x.shape[2:]))

    number, counts = first_places(blocks, -(-keys // sizes.key))
    bias = None if block_bias is None else of_lists(block_bias.astype(dtype))
    query_ids, key_ids = None, None
    if segments is not None:
        query_ids = jnp.pad(segments[0], ((0, 0), (0, past))).reshape(batch, -1, sizes.query)
        query_ids, key_ids = jnp.tile(query_ids, heads // own), of_keys(segments[1], by_head=False)
    inputs = _Inputs(of_queries(scaled), of_keys(key), of_keys(value.astype(dtype)), bias)
    fixed = _Fixed(of_lists(number), of_lists(counts), query_ids, key_ids)
    out, lse = _attend(inputs, fixed, _Settings(keys, sizes.query, is_causal, mask))

    def of_tokens(x: Array) -> Array:
        """[B, U, nq, R, V] -> [B, T, N, V]."""
        x = x.reshape(batch, own, -1, heads // own, sizes.query, x.shape[-1])
        return x.transpose(0, 2, 4, 1, 3, 5).reshape(batch, -1, heads, x.shape[-1])[:, :queries]

    return of_tokens(out).astype(query.dtype), of_tokens(lse[..., None])[..., 0]


def _attend(inputs: _Inputs, fixed: _Fixed, settings: _Settings) -> tuple[Array, Array]:
    """(out [B, U, nq, R, V], lse [B, U, nq, R]), whose gradients are _transpose's, and other derivatives _forward's."""

    def blocked(inputs: _Inputs, fixed: _Fixed) -> tuple[Array, Array]:
        return _forward(inputs, fixed, settings)

    def tangent(residuals: Any, tangents: Any) -> Any:
        inputs, fixed, _ = residuals
        return jax.jvp(lambda inputs: blocked(inputs, fixed), (inputs,), (tangents,))[1]

    def of_blocked(residuals: Any, cotangents: Any) -> Any:
        inputs, fixed, _ = residuals
        return jax.vjp(lambda inputs: blocked(inputs, fixed), inputs)[1](cotangents)[0]

    @jax.custom_jvp
    def transpose(residuals: Any, cotangents: Any) -> Any:
        inputs, fixed, results = residuals
        return _transpose(inputs, fixed, results, cotangents, settings)

    @transpose.defjvp
    def _(primals: Any, tangents: Any) -> Any:
        return transpose(*primals), jax.jvp(of_blocked, primals, tangents)[1]

    attend = jax.custom_jvp(blocked)

    @attend.defjvp
    def _(primals: Any, tangents: Any) -> Any:
        results = attend(*primals)
        return results, tangent_call(tangent, transpose, results, (*primals, results), tangents[0])

    return attend(inputs, fixed)


def _steps(inputs: _Inputs, fixed: _Fixed) -> tuple[int, int]:
    """Query blocks that are taken at once, and how often."""
    batch, own, query_blocks, places = fixed.number.shape
    batch = 1 if jax.export.is_symbolic_dim(batch) else batch
    gathered = batch * own * places * inputs.key.shape[3] * (inputs.key.shape[-1] + inputs.value.shape[-1])
    at_once = min(max(_GATHERED // max(gathered, 1), 1), query_blocks)
    return at_once, -(-query_blocks // at_once)


def _in_steps(x: Any, at_once: int, steps: int, axis: int = 2) -> Any:
    """[.., nq, ...] -> [steps, .., at_once, ...]."""

    def cut(x: Array) -> Array:
        widths = [(0, 0)] * x.ndim
        widths[axis] = (0, at_once * steps - x.shape[axis])
        x = jnp.pad(x, widths)
        return jnp.moveaxis(x.reshape(*x.shape[:axis], steps, at_once, *x.shape[axis + 1 :]), axis, 0)

    return jax.tree.map(cut, x)


def _joined(x: Array, query_blocks: int) -> Array:
    """[steps, B, U, at_once, ...] -> [B, U, nq, ...]."""
    x = jnp.moveaxis(x, 0, 2)
    return x.reshape(*x.shape[:2], x.shape[2] * x.shape[3], *x.shape[4:])[:, :, :query_blocks]


class _Gathered(NamedTuple):
    """Of g query blocks: their places in an example's key and value, [U, 1, 1] and [B, U, g, M]; these' keys and values
    [B, U, g, M key_block, .]; logits and what is visible, [B, U, g, R, M key_block]."""

    head: Array
    number: Array
    key: Array
    value: Array
    logits: Array
    visible: Array


def _gathered(inputs: _Inputs, settings: _Settings, step: Any) -> _Gathered:
    """step: (first query block, query, bias, number, counts, query_ids), the arrays of these blocks."""
    (first, query, bias, number, counts, query_ids), key_ids = step
    own, blocks, rows, _ = query.shape[1:]
    key_heads, _, size, _ = inputs.key.shape[1:]
    head = (jnp.arange(own) // (own // key_heads))[:, None, None]

    def flat(x: Array) -> Array:
        """[B, U, g, M, key_block, ...] -> [B, U, g, M key_block, ...]."""
        return x.reshape(*x.shape[:3], -1, *x.shape[5:])

    # Example by example, as devices that share a batch have their own examples' alone.
    taken = jax.vmap(lambda x, number: x[head, number])
    key, value = flat(taken(inputs.key, number)), flat(taken(inputs.value, number))
    logits = jnp.einsum("BUGRH,BUGSH->BUGRS", query, key)
    if bias is not None:
        logits = logits + jnp.repeat(bias, size, axis=-1)[..., None, :]
    within = jnp.arange(rows) % settings.query_block
    query_number = (first + jnp.arange(blocks))[:, None] * settings.query_block + within[None]
    in_block = lax.broadcasted_iota(number.dtype, (1, 1, 1, 1, size), 4)
    key_number = flat(number[..., None] * size + in_block)[..., None, :]
    same = None
    if query_ids is not None:
        same = (
            query_ids[:, None, :, :, None]
            == flat(jax.vmap(lambda ids, number: ids[number])(key_ids, number))[..., None, :]
        )
    listed = jnp.repeat(counts, size, axis=-1)[..., None, :]
    if settings.keys % size:
        listed = listed & (key_number < settings.keys)
    query_number = query_number[None, None, :, :, None]
    visible = _within_blocks(
        listed, query_number, key_number, is_causal=settings.is_causal, mask=settings.mask, same=same
    )
    return _Gathered(head, number, key, value, logits, visible)


def _over_steps(inputs: _Inputs, fixed: _Fixed, *more: Array) -> tuple[int, Any]:
    """(query blocks, what a loop goes over): per step the first block's number, arrays of its blocks, and `more`'s."""
    at_once, steps = _steps(inputs, fixed)
    first = jnp.arange(steps, dtype=jnp.int32) * at_once
    of_lists = _in_steps((inputs.query, inputs.bias, fixed.number, fixed.counts), at_once, steps)
    ids = _in_steps(fixed.query_ids, at_once, steps, axis=1)
    return inputs.query.shape[2], ((first, *of_lists, ids), _in_steps(more, at_once, steps))


def _forward(inputs: _Inputs, fixed: _Fixed, settings: _Settings) -> tuple[Array, Array]:
    query_blocks, (blocks, _) = _over_steps(inputs, fixed)

    @functools.partial(jax.checkpoint, prevent_cse=False)
    def some(step: Any) -> tuple[Array, Array]:
        seen = _gathered(inputs, settings, (step, fixed.key_ids))
        numerators, denominator, lse = softmax_parts(seen.logits, seen.visible)
        return jnp.einsum("BUGRS,BUGSV->BUGRV", numerators, seen.value) / denominator, lse

    out, lse = lax.map(some, blocks)
    return _joined(out, query_blocks), _joined(lse, query_blocks)


def _transpose(
    inputs: _Inputs, fixed: _Fixed, results: tuple[Array, Array], cotangents: tuple[Array, Array], settings: _Settings
) -> _Inputs:
    """w = p (dout . v - dout . out + dlse)   dq = w k   dk = w^T q   dv = p^T dout   dbias = sum of a block's w"""
    out, lse = results
    of_out, of_lse = cotangents
    reference = jnp.where(lse == -jnp.inf, 0, lse)
    minus = jnp.where(lse == -jnp.inf, 0, of_lse - (of_out * out).sum(-1))
    query_blocks, (blocks, more) = _over_steps(inputs, fixed, reference, of_out, minus)
    size = inputs.key.shape[3]

    def some(sums: tuple[Array, Array], step: Any) -> tuple[tuple[Array, Array], tuple[Array, Array | None]]:
        step, (reference, of_out, minus) = step
        query, bias = step[1:3]
        seen = _gathered(inputs, settings, (step, fixed.key_ids))
        weights = jnp.exp(jnp.where(seen.visible, seen.logits - reference[..., None], -jnp.inf))
        changes = weights * (jnp.einsum("BUGRV,BUGSV->BUGRS", of_out, seen.value) + minus[..., None])
        to_query = jnp.einsum("BUGRS,BUGSH->BUGRH", changes, seen.key)
        to_key = jnp.einsum("BUGRS,BUGRH->BUGSH", changes, query)
        to_value = jnp.einsum("BUGRS,BUGRV->BUGSV", weights, of_out)
        to_bias = None if bias is None else changes.sum(3).reshape(*bias.shape, size).sum(-1)
        add = jax.vmap(lambda total, number, x: total.at[seen.head, number].add(x))
        added = (
            add(total, seen.number, x.reshape(*x.shape[:3], -1, size, x.shape[-1]))
            for total, x in zip(sums, (to_key, to_value))
        )
        return tuple(added), (to_query, to_bias)

    zeros = jnp.zeros_like(inputs.key), jnp.zeros_like(inputs.value)
    (to_key, to_value), by_step = lax.scan(some, zeros, (blocks, more))
    to_query, to_bias = by_step
    to_bias = None if to_bias is None else _joined(to_bias, query_blocks)
    return _Inputs(_joined(to_query, query_blocks), to_key, to_value, to_bias)


IMPLEMENTATIONS: Implementations = {"reference": spoiling(_reference), "xla": spoiling(_xla), **kernels.KERNELS}


# --- Decoding ---------------------------------------------------------------------------------------------------------


Turn = Callable[[Array, Array], Array]  # (x [B, n, heads, H], positions int [B|1, n]) -> x with these positions
# How a query block's lists are chosen: by mean keys, down a tree, or by the weights of a gate and how it turns.
Rule = Literal["mean", "tree"] | tuple[Array, Array] | tuple[Array, Array, Turn]


class BlockSparseCache(NamedTuple):
    """What the tokens so far have left, to decode.

    key: [B, nk key_block, K, H], value: [B, nk key_block, K, V]. representative: [B, nk, K, R], what the rule reads of
    blocks: their mean keys, R = H; what a gate makes of them; or nothing, R = 0, of a tree, which reads the keys. Zeros
    for blocks to come. blocks: int32 [B, K | N, count], what the current query block has chosen. length: int32 [], how
    many tokens they are, or [B], of each row.
    """

    key: Array
    value: Array
    representative: Array
    blocks: Array
    length: Array


def init_block_sparse_cache(
    batch: int,
    max_length: int,
    num_key_heads: int,
    head_dim: int,
    *,
    key_block: int,
    count: int,
    list_heads: int | None = None,
    representative_dim: int | None = None,
    value_dim: int | None = None,
    dtype: Any = jnp.float32,
) -> BlockSparseCache:
    """An empty cache for causal decoding of at most max_length tokens, and then to the end of a block.

    Args:
      key_block: tokens in a block of keys. count: blocks that a query block chooses besides its own.
      list_heads: heads with lists of their own. None: num_key_heads, whose lists serve the group. For a tree and a gate
        they may be all heads; of a gate as many as its query weights have.
      representative_dim: None: head_dim, for the rule "mean". For a gate its width, kept in float32 at least, as gates
        compute. 0 for the rule "tree".
      value_dim: None means head_dim.
    """
    value_dim, dtype = head_dim if value_dim is None else value_dim, check_dtype("dtype", dtype)
    list_heads = num_key_heads if list_heads is None else list_heads
    sizes = {"batch": batch, "max_length": max_length, "num_key_heads": num_key_heads, "head_dim": head_dim}
    checked = check_sizes(**sizes, value_dim=value_dim, key_block=key_block, count=count, list_heads=list_heads)
    batch, max_length, key_heads, head_dim, value_dim, key_block, count, list_heads = checked
    fits = list_heads % key_heads == 0
    require(fits, "list_heads", list_heads, f"need a multiple of num_key_heads, {key_heads}")
    kept, kept_dtype = head_dim, dtype
    if representative_dim is not None:
        kept = check_int("representative_dim", representative_dim, least=0)
        kept_dtype = jnp.promote_types(dtype, jnp.float32)
    key_blocks = -(-max_length // key_block)
    slots = key_blocks * key_block
    return BlockSparseCache(
        key=jnp.zeros((batch, slots, key_heads, head_dim), dtype),
        value=jnp.zeros((batch, slots, key_heads, value_dim), dtype),
        representative=jnp.zeros((batch, key_blocks, key_heads, kept), kept_dtype),
        blocks=jnp.full((batch, list_heads, count), -1, jnp.int32),
        length=jnp.zeros((), jnp.int32),
    )


@primitive(like="cache")
def prefill_block_sparse_cache(
    cache: BlockSparseCache,
    query: Array,
    key: Array,
    value: Array,
    *,
    query_block: int,
    rule: Rule = "mean",
    first: int | None = None,
    lengths: Array | None = None,
) -> BlockSparseCache:
    """The cache after a prompt: what block_sparse_step leaves of it, token by token.

    Args:
      cache: an empty one, which the prompt fits into.
      query: [B, P, N, H], key: [B, P, K, H], value: [B, P, K, V]. Attention over the prompt is block_sparse_attention
        with the rule's lists.
      query_block, rule, first: as in block_sparse_step.
      lengths: integers [B], 0 to P: the row's tokens, padding after them. None: P in all rows.
    """
    check_type("cache", cache, BlockSparseCache, "init_block_sparse_cache")
    lengths = check_prompt(key, value, cache.key, cache.value, lengths)
    check_query_key_value(query, key, value)
    query_block, first = check_block("query_block", query_block), _check_rule(rule, first, cache, query.shape[2])
    slots, count = cache.key.shape[1], counted(key, lengths)
    require(key.shape[1] <= slots, "key", shape_text(key), f"the cache was made for {slots} tokens")
    key, value = filled(cache.key, key, count), filled(cache.value, value, count)
    representative = _represented(key, _key_block(cache), rule, 0).astype(cache.representative.dtype)
    start = jnp.maximum(by_row(count) - 1, 0) // query_block * query_block  # of the last query block
    filled_cache = BlockSparseCache(key, value, representative, cache.blocks, count)
    query = tokens_at(query, jnp.broadcast_to(start, (query.shape[0], 1)))
    blocks = jnp.where((by_row(count) > 0)[..., None], _chosen(filled_cache, query, start, rule, first), cache.blocks)
    return filled_cache._replace(blocks=blocks)


def _key_block(cache: BlockSparseCache) -> int:
    return cache.key.shape[1] // cache.representative.shape[1]


def _check_rule(rule: Any, first: Any, cache: BlockSparseCache, heads: int) -> int:
    """`first`, after checks that the cache was made for the rule."""
    key_heads, head_dim = cache.key.shape[2:]
    if isinstance(rule, str):
        check_choice("rule", rule, ("mean", "tree"))
        of_tree = cache.blocks.shape[1] if cache.blocks.shape[1] == heads else key_heads
        needed = (key_heads, head_dim) if rule == "mean" else (of_tree, 0)
    else:
        if not isinstance(rule, tuple) or len(rule) not in (2, 3) or not all(map(callable, rule[2:])):
            allowed = '"mean", "tree", or the two weights of a gate, and what turns them'
            raise TypeError(f"rule: got {shown(rule)}; need {allowed}")
        check_array("rule[0]", rule[0], (None, head_dim, None), "[heads or key heads, head_dim, width]")
        of_gate, _, width = rule[0].shape
        require(of_gate in (heads, key_heads), "rule[0]", shape_text(rule[0]), f"need {heads} heads or {key_heads}")
        check_array("rule[1]", rule[1], (key_heads, 3 * head_dim, width), "[key heads, 3 head_dim, width]")
        needed = (of_gate, width)
    made_for = cache.blocks.shape[1], cache.representative.shape[-1]
    sizes = "list_heads={}, representative_dim={}"
    require(made_for == needed, "cache", f"one of {sizes.format(*made_for)}", f"the rule needs {sizes.format(*needed)}")
    require(first is None or rule != "tree", "first", first, "a tree has none")
    return 1 if first is None else check_int("first", first, least=0, most=2**31 - 1)


def _turned(x: Array, positions: Any, rule: Rule) -> Array:
    return x if len(rule) == 2 else rule[2](x, positions)  # type: ignore[operator]


def _represented(key: Array, key_block: int, rule: Rule, start: Any) -> Array:
    """[B, S, K, H] -> [B, nk, K, R], what the rule keeps of blocks. start: int [B|1, 1] or 0, the first position."""
    if rule == "tree":
        return key[:, ::key_block, :, :0]
    if rule == "mean":
        return block_selection.pool_blocks(key, key_block, "mean")
    positions = start + jnp.arange(key.shape[1])[None]
    of_blocks = block_selection.gate_keys(_turned(key, -positions, rule), key_block)
    return _turned(block_selection.to_gate(of_blocks, rule[1]), positions[:, ::key_block], rule)


def _chosen(cache: BlockSparseCache, query: Array, start: Array, rule: Rule, first: int) -> Array:
    """int32 [B, K | N, count]: what the query [B, 1, N, H] at start [B or 1, 1] chooses of the blocks before it."""
    key_block, count = _key_block(cache), cache.blocks.shape[-1]
    complete = start // key_block
    if rule == "tree":
        query = block_selection.mean_of_groups(query, cache.blocks.shape[1])
        found = block_selection.tree_blocks(
            query[:, :, None], cache.key, count, key_block=key_block, candidates=complete
        )
        return found[:, :, 0]
    if rule == "mean":
        scores = block_selection.scores_by_group(query, cache.representative)
    else:
        projected = block_selection.to_gate(_turned(query, -start, rule), rule[0])
        scores = block_selection.pooled_scores(_turned(projected, start, rule), cache.representative)
    eligible = (jnp.arange(scores.shape[-1])[None] < complete)[:, None, None]
    return block_selection.select_blocks(scores, eligible=eligible, count=count, first=first)[:, :, 0]


@primitive("B*N.", like="cache")
def block_sparse_step(
    cache: BlockSparseCache,
    query: Array,
    key: Array,
    value: Array,
    *,
    query_block: int,
    rule: Rule = "mean",
    first: int | None = None,
    scale: float | None = None,
) -> tuple[Array, BlockSparseCache]:
    """The next tokens of causal block-sparse attention: their rows of block_sparse_attention(..., is_causal=True) with
    the rule's lists and own blocks, however a sequence is cut into steps.

    Args:
      cache: of the tokens before, made for the rule.
      query, key, value: of T >= 1 tokens, [B, T, N, H], [B, T, K, H], [B, T, K, V].
      query_block: tokens in a block of queries; it divides the cache's key_block, or that divides it.
      rule: how a block's first query chooses `count` of the blocks that are complete before it. "mean":
        `block_selection.pooled_blocks`. "tree": `block_selection.tree_blocks`, by centre keys. A gate's (query_weights
        [N | K, H, D], key_weights [K, 3 H, D]): `block_selection.gate_scores` of `block_selection.gate_keys`. A third
        of these is what turned queries and keys, turn(x [B, n, heads, .], positions int [B|1, n]) -> x, such as rotary
        positions: the gate reads them turned back, and turns what it makes of them by the blocks' starts. Lists of key
        heads, by "mean" and where the cache has them, are those of the mean queries of groups.
      first: how many of the chosen are the sequence's first; None means 1. A tree has none.

    Returns:
      (out [B, T, N, V], the cache with the tokens added). Past the cache's slots, out is NaN.

    Complexity, a token: O((count key_block + max(query_block, key_block)) (H + V)) a head, and to choose O(nk H), of a
    gate O(nk D), of a tree O(count log(nk / count) H).
    """
    check_type("cache", cache, BlockSparseCache, "init_block_sparse_cache")
    check_query_key_value(query, key, value)
    check_prompt(key, value, cache.key, cache.value, None)
    check_position("cache.length", cache.length, query.shape[0])
    key_block, slots = _key_block(cache), cache.key.shape[1]
    query_block, _ = check_dividing_blocks(query_block, key_block)
    first = _check_rule(rule, first, cache, query.shape[2])
    factor, heads = default_scale(scale, query.shape[-1]), query.shape[2]
    own_blocks = jnp.arange(min(max(1, query_block // key_block), cache.representative.shape[1]))
    list_heads = cache.blocks.shape[1]
    head = (jnp.arange(list_heads) // (list_heads // key.shape[2]))[:, None]  # the key head that each list reads

    def token(cache: BlockSparseCache, now: tuple[Array, ...]) -> tuple[BlockSparseCache, Array]:
        query, key, value = (x[:, None] for x in now)
        position = by_row(cache.length)
        keys, values = put(cache.key, key, cache.length), put(cache.value, value, cache.length)

        def in_blocks(x: Array) -> Array:
            return x.reshape(x.shape[0], -1, key_block, *x.shape[2:])

        own_keys = at(in_blocks(keys), cache.length // key_block)
        own_kept = _represented(own_keys, key_block, rule, position // key_block * key_block)
        representative = put(cache.representative, own_kept, cache.length // key_block)
        cache = cache._replace(key=keys, value=values, representative=representative)
        start = position // query_block * query_block
        blocks = jnp.where((position == start)[..., None], _chosen(cache, query, start, rule, first), cache.blocks)
        own = jnp.broadcast_to((start // key_block + own_blocks[None])[:, None], (*blocks.shape[:2], own_blocks.size))
        number, counts = first_places(jnp.concatenate([blocks, own], -1), slots // key_block)

        def gathered(x: Array) -> Array:
            """[B, slots, K, H] -> [B, M key_block, K | N, H], of the blocks that each list has."""
            taken = jax.vmap(lambda x, number: x[number, :, head])(in_blocks(x), number)
            return jnp.moveaxis(taken.reshape(*taken.shape[:2], -1, x.shape[-1]), 1, 2)

        tokens = number[..., None] * key_block + jnp.arange(key_block)[None, None, None]
        visible = counts[..., None] & (tokens <= position[..., None, None])
        visible = jnp.repeat(visible.reshape(*number.shape[:2], 1, -1), heads // list_heads, axis=1)
        out, _ = reference_attention(query, gathered(keys), gathered(values), visible=visible, scale=factor)
        out = jnp.where((position < slots)[..., None, None], out, jnp.nan)
        return cache._replace(blocks=blocks, length=cache.length + 1), out[:, 0]

    cache, out = lax.scan(token, cache, tuple(jnp.moveaxis(x, 1, 0) for x in (query, key, value)))
    return jnp.moveaxis(out, 0, 1), cache
