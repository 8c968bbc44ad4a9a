"""Pyramid attention: what matters less in the past is seen more coarsely.

Every block of keys has a level for every block of queries: 0 is not seen, l makes each l consecutive keys of the block
one, their mean key and mean value, which counts l times.

    part_l = block-sparse attention to the means over l tokens, of the blocks of level l;  its lse + log l
    out    = merge of the parts

Level 1 everywhere is attention itself. Paper: Pyramid Sparse Attention (Li et al. 2025). A block that is seen and not
full has level 1, and where causal one that does not end before the query block begins, so that no mean crosses the
frontier.
"""

import functools
import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from attnlab.attention import block_selection
from attnlab.attention._cached import at, by_row, counted, filled, put, tokens_at
from attnlab.attention._dispatch.choice import Implementations, dispatch
from attnlab.attention._dispatch.exchange import Parts, given_positions, over_positions, whole_space
from attnlab.attention._dispatch.primitive import primitive
from attnlab.attention._shared.checks import (
    accumulator_dtype,
    check_block,
    check_bool,
    check_dividing_blocks,
    check_dtype,
    check_fractions,
    check_group_sizes,
    check_int,
    check_integers,
    check_position,
    check_prompt,
    check_query_key_value,
    check_sizes,
    check_type,
    default_scale,
    require,
    shape_text,
    shown,
)
from attnlab.attention._shared.finite import spoil, spoiling
from attnlab.attention._shared.heads import repeat_key_heads
from attnlab.attention._shared.softmax import reference_attention, scaled_for_logits, softmax_parts
from attnlab.attention.block_sparse import Blocks, block_sparse_attention, by_heads, check_lists, lists_layout
from attnlab.attention.merge import merge_attention

Array = jax.Array


@primitive("B*N.", "B*N")
def pyramid_attention(
    query: Array,
    key: Array,
    value: Array,
    levels: Array,
    *,
    query_block: int,
    key_block: int,
    sizes: Sequence[int] = (1, 2, 4, 8),
    places: Sequence[int] | None = None,
    is_causal: bool = False,
    scale: float | None = None,
    return_lse: bool = False,
    implementation: str | None = None,
) -> Any:
    """Attention of blocks of queries to blocks of keys, or of their means; the module's docstring has the formula.

    Args:
      query: [B, T, N, H], floating. key: [B, S, K, H], K divides N. value: [B, S, K, V].
      levels: integers [B|1, N|K|1, nq, nk], one of `sizes` for every query and key block, or another number, such as
        0: not seen. nq is ceil(T / query_block), nk is ceil(S / key_block). No gradient. Of a block that is not full,
        and where causal of one that does not end before the query block begins, other sizes than 1 count as 1.
      query_block, key_block: tokens in a block, from 1; the last one may be cut short.
      sizes: how many keys are seen as one: 1 first, growing, and each divides key_block.
      places: at most how many blocks of each size a query block sees; of more the first are kept. None: nk, which
        costs as much as all keys do. `block_selection.pyramid_places` says it for levels of pyramid_levels.
      is_causal: query t sees keys s <= t.
      scale: factor on the logits; None means H ** -0.5.
      return_lse: return (out, lse).
      implementation: None, "reference" or "xla".

    Returns:
      out [B, T, N, V] in query's dtype; with return_lse also lse [B, T, N], float32 (float64 for float64 inputs),
      differentiable. A query that sees no key gives 0 and lse = -inf, with zero gradients.

    Raises:
      ValueError, TypeError: naming the argument.

    Complexity, of "xla": O(T sum_l places_l key_block / l (H + V)) time a head, forward and back; memory O(T + S)
    beside the levels.
    """
    check_query_key_value(query, key, value, same_space=False)
    batch, _, heads, head_dim = query.shape
    key_heads = key.shape[2]
    (all_queries,), (all_keys,) = whole_space(query.shape[1:2]), whole_space(key.shape[1:2])
    query_block, key_block = check_block("query_block", query_block), check_block("key_block", key_block)
    sizes = check_group_sizes(sizes, key_block)
    query_blocks, key_blocks = -(-all_queries // query_block), -(-all_keys // key_block)
    check_lists("levels", levels, (batch, (heads, key_heads), query_blocks))
    require(levels.shape[-1] == key_blocks, "levels", shape_text(levels), f"need levels of {key_blocks} key blocks")
    check_integers("levels", levels)
    most = _check_places(places, len(sizes), key_blocks)
    is_causal, return_lse = check_bool("is_causal", is_causal), check_bool("return_lse", return_lse)
    starts, ends = np.arange(query_blocks) * query_block, (np.arange(key_blocks) + 1) * key_block
    may_be_coarse = np.broadcast_to(ends <= all_keys, (query_blocks, key_blocks))
    if is_causal:
        may_be_coarse = may_be_coarse & (ends <= starts[:, None])
    attend = functools.partial(
        dispatch,
        "pyramid_attention",
        IMPLEMENTATIONS,
        implementation,
        blocks=Blocks(query_block, key_block),
        groups=tuple(zip(sizes, most)),
        is_causal=is_causal,
        scale=default_scale(scale, head_dim),
    )
    levels = levels.astype(jnp.int32)
    is_size = functools.reduce(jnp.logical_or, (levels == size for size in sizes))
    levels = jnp.where(is_size, jnp.where(may_be_coarse[None, None], levels, 1), 0)
    whole_keys = key.shape[1] if given_positions() is None else None

    def parted(parts: Parts, query: Array, key: Array, value: Array, levels: Array) -> tuple[Array, Array]:
        return by_heads(lambda *arrays: attend(*arrays[:4]), whole_keys, parts, query, key, value, levels, None, None)

    layouts = ["B*N.", "B+K.", "B+K.", lists_layout(levels, key)]
    out, lse = over_positions(attend, parted, layouts, ("B*N.", "B*N"), query, key, value, levels)
    return (out, lse) if return_lse else out


def _check_places(places: Any, sizes: int, key_blocks: int) -> tuple[int, ...]:
    if places is None:
        return (key_blocks,) * sizes
    if not isinstance(places, (tuple, list)):
        raise TypeError(f"places: got {shown(places)}; need a tuple of ints")
    require(len(places) == sizes, "places", shown(places), f"need one for each of {sizes} sizes")
    return tuple(min(check_int("places", count, least=0, of=places), key_blocks) for count in places)


# --- Forms ------------------------------------------------------------------------------------------------------------


def _reference(
    query: Array,
    key: Array,
    value: Array,
    levels: Array,
    *,
    blocks: Blocks,
    groups: tuple[tuple[int, int], ...],
    is_causal: bool,
    scale: Any,
) -> tuple[Array, Array]:
    """Every token in place, with the mean key and value of its group."""
    queries, keys, heads = query.shape[1], key.shape[1], query.shape[2]
    dtype = accumulator_dtype(query, key, value)
    kept = jnp.zeros_like(levels)
    for size, places in groups:
        is_size = levels == size
        kept = jnp.where(is_size & (jnp.cumsum(is_size, axis=-1) <= places), size, kept)
    by_block = jnp.repeat(kept, heads // levels.shape[1], axis=1)
    level = jnp.repeat(jnp.repeat(by_block, blocks.query, 2), blocks.key, 3)[:, :, :queries, :keys]
    scaled, whole = scaled_for_logits(query, key, scale, dtype)

    def of_groups(x: Array, size: int) -> Array:
        means = block_selection.pool_blocks(x.astype(dtype), size, "mean")
        return repeat_key_heads(jnp.repeat(means, size, 1)[:, :keys], heads)

    logits: Any = 0
    for size, _ in groups:
        products = jnp.einsum("BTNH,BSNH->BNTS", scaled, of_groups(whole, size))
        logits = jnp.where(level == size, products, logits)
    visible = level > 0
    if is_causal:
        visible = visible & (jnp.arange(keys)[None] <= jnp.arange(queries)[:, None])[None, None]
    numerators, denominator, lse = softmax_parts(logits, visible)
    weights = numerators / denominator
    out = sum(
        jnp.einsum("BNTS,BSNV->BTNV", jnp.where(level == size, weights, 0), of_groups(value, size))
        for size, _ in groups
    )
    return jnp.asarray(out).astype(query.dtype), jnp.swapaxes(lse, 1, 2)


def _xla(
    query: Array,
    key: Array,
    value: Array,
    levels: Array,
    *,
    blocks: Blocks,
    groups: tuple[tuple[int, int], ...],
    is_causal: bool,
    scale: Any,
) -> tuple[Array, Array]:
    """A part for every size. What is not finite is in the means of its group, and spoils the part that sees them."""
    dtype = accumulator_dtype(query, key, value)
    full = key.shape[1] // blocks.key
    parts = []
    for size, places in groups:
        is_fine = size == 1
        seen = key.shape[1] if is_fine else full * blocks.key
        of_size = (levels == size)[..., : -(-seen // blocks.key)]
        if min(places, of_size.shape[-1]) == 0 and not is_fine:
            continue
        keys, values = (
            x if is_fine else block_selection.pool_blocks(x[:, :seen].astype(dtype), size, "mean") for x in (key, value)
        )
        out, lse = block_sparse_attention(
            query.astype(dtype),
            keys,
            values,
            block_selection.lists_of(of_size, min(places, of_size.shape[-1])),
            query_block=blocks.query,
            key_block=blocks.key // size,
            is_causal=is_causal and is_fine,  # what is coarse ends before the query block
            scale=scale,
            return_lse=True,
            implementation="xla",
        )
        parts.append((out, lse + math.log(size)))
    # Merged without it, or its gradients would not be finite either.
    spoilt = functools.reduce(jnp.logical_or, (jnp.isnan(lse) for _, lse in parts))
    finite = ((jnp.where(spoilt[..., None], 0, out), jnp.where(spoilt, 0, lse)) for out, lse in parts)
    out, lse = merge_attention(*zip(*finite))
    return spoil(out.astype(query.dtype), spoilt), spoil(lse, spoilt)


IMPLEMENTATIONS: Implementations = {"reference": spoiling(_reference), "xla": _xla}


# --- Decoding ---------------------------------------------------------------------------------------------------------


class PyramidCache(NamedTuple):
    """What the tokens so far have left, to decode with levels by `block_selection.pooled_levels`.

    key: [B, nk, R, K, H], value: [B, nk, R, K, V]: of each block its tokens, and then for each further size the means
    of its groups, R in all. representative: [B, nk, K, H], the blocks' mean keys. What is to come counts as zeros.
    levels: int32 [B, K, nk], what the current query block has ranked. length: int32 [], how many tokens they are, or
    [B], of each row.
    """

    key: Array
    value: Array
    representative: Array
    levels: Array
    length: Array


def init_pyramid_cache(
    batch: int,
    max_length: int,
    num_key_heads: int,
    head_dim: int,
    *,
    key_block: int,
    sizes: Sequence[int] = (1, 2, 4, 8),
    value_dim: int | None = None,
    dtype: Any = jnp.float32,
) -> PyramidCache:
    """An empty cache for causal decoding of at most max_length tokens, and then to the end of a block.

    key_block, sizes: as in `block_selection.pooled_levels`. value_dim=None means head_dim.
    """
    value_dim, dtype = head_dim if value_dim is None else value_dim, check_dtype("dtype", dtype)
    counts = {"batch": batch, "max_length": max_length, "num_key_heads": num_key_heads, "head_dim": head_dim}
    checked = check_sizes(**counts, value_dim=value_dim, key_block=key_block)
    batch, max_length, key_heads, head_dim, value_dim, key_block = checked
    rows = sum(key_block // size for size in check_group_sizes(sizes, key_block))
    key_blocks = -(-max_length // key_block)
    return PyramidCache(
        key=jnp.zeros((batch, key_blocks, rows, key_heads, head_dim), dtype),
        value=jnp.zeros((batch, key_blocks, rows, key_heads, value_dim), dtype),
        representative=jnp.zeros((batch, key_blocks, key_heads, head_dim), dtype),
        levels=jnp.zeros((batch, key_heads, key_blocks), jnp.int32),
        length=jnp.zeros((), jnp.int32),
    )


class _Rule(NamedTuple):
    """A step's checked options: sizes and fractions of pyramid_levels, and tokens in blocks."""

    query_block: int
    key_block: int
    sizes: tuple[int, ...]
    fractions: tuple[float, ...]
    first: int


def _check_rule(cache: PyramidCache, query_block: Any, sizes: Any, fractions: Any, first: Any) -> _Rule:
    check_type("cache", cache, PyramidCache, "init_pyramid_cache")
    sizes = check_group_sizes(sizes)
    fractions = check_fractions(fractions, len(sizes))
    rows, multiple = cache.key.shape[2], math.lcm(*sizes)
    key_block = rows * multiple // sum(multiple // size for size in sizes)
    fits = key_block % multiple == 0 and rows == sum(key_block // size for size in sizes)
    require(fits, "sizes", shown(sizes), f"the cache was made for others, with {rows} rows a block")
    query_block, _ = check_dividing_blocks(query_block, key_block)
    return _Rule(query_block, key_block, sizes, fractions, check_int("first", first, least=0, most=2**31 - 1))


def _rows(tokens: Array, sizes: tuple[int, ...]) -> Array:
    """Blocks [..., key_block, K, H] with the means of their groups, [..., R, K, H]."""
    dtype, block = accumulator_dtype(tokens), tokens.shape[-3]

    def of_groups(size: int) -> Array:
        grouped = tokens.reshape(*tokens.shape[:-3], block // size, size, *tokens.shape[-2:])
        return tokens if size == 1 else grouped.astype(dtype).mean(-3).astype(tokens.dtype)

    return jnp.concatenate([of_groups(size) for size in sizes], axis=-3)


@primitive(like="cache")
def prefill_pyramid_cache(
    cache: PyramidCache,
    query: Array,
    key: Array,
    value: Array,
    *,
    query_block: int,
    fractions: Sequence[float],
    sizes: Sequence[int] = (1, 2, 4, 8),
    first: int = 1,
    lengths: Array | None = None,
) -> PyramidCache:
    """The cache after a prompt: what pyramid_step leaves of it, token by token.

    Args:
      cache: an empty one, which the prompt fits into.
      query: [B, P, N, H], key: [B, P, K, H], value: [B, P, K, V]. Attention over the prompt is pyramid_attention with
        the levels of `block_selection.pooled_levels`.
      query_block, fractions, sizes, first: as there.
      lengths: integers [B], 0 to P: the row's tokens, padding after them. None: P in all rows.
    """
    rule = _check_rule(cache, query_block, sizes, fractions, first)
    lengths = check_prompt(key, value, cache.key, cache.value, lengths)
    check_query_key_value(query, key, value)
    key_blocks, count = cache.key.shape[1], counted(key, lengths)
    slots = key_blocks * rule.key_block
    require(key.shape[1] <= slots, "key", shape_text(key), f"the cache was made for {slots} tokens")

    def in_blocks(x: Array, like: Array) -> Array:
        x = filled(jnp.zeros((x.shape[0], slots, *x.shape[2:]), like.dtype), x, count)
        return x.reshape(x.shape[0], key_blocks, rule.key_block, *x.shape[2:])

    keys, values = in_blocks(key, cache.key), in_blocks(value, cache.value)
    representative = _rows(keys, (rule.key_block,))[:, :, 0]
    start = jnp.maximum(by_row(count) - 1, 0) // rule.query_block * rule.query_block  # of the last query block
    ranked = _ranked(tokens_at(query, jnp.broadcast_to(start, (query.shape[0], 1))), representative, start, rule)
    levels = jnp.where((by_row(count) > 0)[..., None], ranked, cache.levels)
    return PyramidCache(_rows(keys, rule.sizes), _rows(values, rule.sizes), representative, levels, count)


def _ranked(query: Array, representative: Array, start: Array, rule: _Rule) -> Array:
    """int32 [B, K, nk]: the levels that the query [B, 1, N, H] at start [B or 1, 1] gives the blocks before it."""
    scores = block_selection.scores_by_group(query, representative)
    ends = (jnp.arange(representative.shape[1]) + 1)[None] * rule.key_block
    eligible = (ends <= start)[:, None, None]
    options: dict[str, Any] = {"fractions": rule.fractions, "sizes": rule.sizes, "first": rule.first}
    return block_selection.pyramid_levels(scores, eligible=eligible, **options)[:, :, 0]


@primitive("B*N.", like="cache")
def pyramid_step(
    cache: PyramidCache,
    query: Array,
    key: Array,
    value: Array,
    *,
    query_block: int,
    fractions: Sequence[float],
    sizes: Sequence[int] = (1, 2, 4, 8),
    first: int = 1,
    scale: float | None = None,
) -> tuple[Array, PyramidCache]:
    """The next tokens of causal pyramid attention: their rows of pyramid_attention(..., is_causal=True) with the levels
    of `block_selection.pooled_levels`, however a sequence is cut into steps.

    Args:
      cache: of the tokens before.
      query, key, value: of T >= 1 tokens, [B, T, N, H], [B, T, K, H], [B, T, K, V].
      query_block, fractions, sizes, first: as in pooled_levels, whose key_block the cache has.

    Returns:
      (out [B, T, N, V], the cache with the tokens added). Past the cache's slots, out is NaN.

    Complexity, a token: O(nk H + (sum_l places_l key_block / l + max(query_block, key_block)) (H + V)) a head.
    """
    rule = _check_rule(cache, query_block, sizes, fractions, first)
    check_query_key_value(query, key, value)
    check_prompt(key, value, cache.key, cache.value, None)
    check_position("cache.length", cache.length, query.shape[0])
    key_blocks, block = cache.key.shape[1], rule.key_block
    factor, heads = default_scale(scale, query.shape[-1]), query.shape[2]
    own_blocks = max(1, rule.query_block // block)
    places = block_selection.pyramid_places(key_blocks, fractions=rule.fractions, listed=rule.first + own_blocks)

    def token(cache: PyramidCache, now: tuple[Array, ...]) -> tuple[PyramidCache, Array]:
        query, key, value = (x[:, None] for x in now)
        number, position = cache.length // block, by_row(cache.length)

        def added(old: Array, new: Array) -> tuple[Array, Array]:
            """The cache with the token's block anew, and that block's tokens."""
            tokens = put(at(old, number)[:, :block], new, cache.length % block)
            return put(old, _rows(tokens, rule.sizes)[:, None], number), tokens

        keys, own_keys = added(cache.key, key)
        values, _ = added(cache.value, value)
        representative = put(cache.representative, _rows(own_keys, (block,)), number)
        start = position // rule.query_block * rule.query_block
        is_new = (position == start)[..., None]
        levels = jnp.where(is_new, _ranked(query, representative, start, rule), cache.levels)
        blocks = jnp.arange(key_blocks)[None]
        is_own = (blocks >= start // block) & (blocks < start // block + own_blocks)
        seen = _seen(jnp.where(is_own[:, None], 1, levels), position, rule, places)
        visible = jnp.repeat(seen.visible[:, :, None], heads // levels.shape[1], axis=1)
        bias = jnp.broadcast_to(seen.bias, visible.shape)
        out, _ = reference_attention(query, *map(seen.rows, (keys, values)), visible=visible, bias=bias, scale=factor)
        out = jnp.where((position < key_blocks * block)[..., None, None], out, jnp.nan)
        return PyramidCache(keys, values, representative, levels, cache.length + 1), out[:, 0]

    cache, out = lax.scan(token, cache, tuple(jnp.moveaxis(x, 1, 0) for x in (query, key, value)))
    return jnp.moveaxis(out, 0, 1), cache


class _Seen(NamedTuple):
    """Rows of a cache that a token sees: their numbers among all of a key head's, int [B, K, M], what of them is
    visible, bool [B, K, M], and log of how often each counts, [M]."""

    number: Array
    visible: Array
    bias: np.ndarray

    def rows(self, cache: Array) -> Array:
        """[B, nk, R, K, H] -> [B, M, K, H]."""
        by_head = jnp.moveaxis(cache, 3, 1).reshape(cache.shape[0], cache.shape[3], -1, cache.shape[-1])
        return jnp.moveaxis(jnp.take_along_axis(by_head, self.number[..., None], axis=2), 1, 2)


def _seen(levels: Array, position: Array, rule: _Rule, places: tuple[int, ...]) -> _Seen:
    """levels: [B, K, nk]. position: [B or 1, 1]."""
    block, rows_of_block = rule.key_block, sum(rule.key_block // size for size in rule.sizes)
    numbers, visible, bias, offset = [], [], [], 0
    for size, count in zip(rule.sizes, places):
        lists = block_selection.lists_of(levels[:, :, None] == size, count)[:, :, 0]  # [B, K, count]
        inside = jnp.arange(block // size)[None, None, None]
        listed, is_listed = jnp.maximum(lists, 0)[..., None], (lists >= 0)[..., None]
        last = listed * block + (inside + 1) * size - 1  # of a group's tokens
        numbers.append((listed * rows_of_block + offset + inside).reshape(*lists.shape[:2], -1))
        visible.append((is_listed & (last <= position[..., None, None])).reshape(*lists.shape[:2], -1))
        bias.append(np.full(count * (block // size), math.log(size)))
        offset += block // size
    return _Seen(jnp.concatenate(numbers, -1), jnp.concatenate(visible, -1), np.concatenate(bias))
