"""Which blocks of keys a block of queries sees: scores of blocks, and the lists that are made of them.

    scores [B, N, nq, nk]  ->  select_blocks  ->  lists int [B, N, nq, M]  ->  block_sparse_attention

T queries come in nq = ceil(T / query_block) blocks, S keys in nk = ceil(S / key_block). A list has the numbers of key
blocks, ascending, and -1 behind them. Lists carry no gradients.

Strictness is decided once, by `causal_blocks`: blocks whose keys all come before the first query of a block compete, by
scores of that query and of the block's own keys; the blocks that a query block touches itself are listed in any case,
outside the count and under attention's element mask, so that nothing of a later token enters a list.
"""

from collections.abc import Callable, Sequence
from typing import Any, Literal, get_args

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from attnlab.attention._dispatch.deferred import vary_alike
from attnlab.attention._dispatch.primitive import primitive
from attnlab.attention._shared.checks import (
    accumulator_dtype,
    check_array,
    check_block,
    check_bool,
    check_choice,
    check_dividing_blocks,
    check_float,
    check_floating,
    check_fractions,
    check_group_sizes,
    check_int,
    check_integers,
    check_items,
    check_key_heads,
    check_queries_keys,
    check_query_key_value,
    default_scale,
    known_values,
    require,
    shape_text,
    shown,
)
from attnlab.attention._shared.heads import repeat_key_heads
from attnlab.attention._shared.softmax import softmax_parts

Array = jax.Array
GateTurns = tuple[Callable[[Array], Array], Callable[[Array], Array]]
Pooling = Literal["mean", "max", "min", "first", "last", "centre"]

_MOST = 2**31 - 1  # of what int32 counts
_COMPARED = 512  # blocks of a row that are compared with each other; more are sorted
_AT_ONCE = 8  # that all are compared with in one pass


# --- Lists ------------------------------------------------------------------------------------------------------------


def causal_blocks(
    query_blocks: int, key_blocks: int, query_block: int, key_block: int
) -> tuple[np.ndarray, np.ndarray]:
    """(complete, own), bool [query_blocks, key_blocks]: blocks that end before the first query of a query block, which
    may compete, and those that hold a key at or before one of its queries and are not complete.

    One of query_block and key_block must divide the other: then a query block has max(1, query_block / key_block) own
    blocks at most.
    """
    counts = {"query_blocks": query_blocks, "key_blocks": key_blocks}
    query_blocks, key_blocks = (check_int(name, count, least=0, most=_MOST) for name, count in counts.items())
    query_block, key_block = check_dividing_blocks(query_block, key_block)
    first_query, first_key = np.arange(query_blocks)[:, None] * query_block, np.arange(key_blocks)[None] * key_block
    complete = first_key + key_block <= first_query
    return complete, (first_key < first_query + query_block) & ~complete


def lists_of(block_mask: Array | np.ndarray, width: int | None = None) -> Array:
    """bool [..., nq, nk] -> int32 [..., nq, width]: the blocks of each row, ascending, and -1 behind.

    width: None means as many as the fullest row has, of a mask that is known. Of more blocks the first are kept.
    """
    block_mask = _check_block_mask(block_mask)
    if width is None:
        if isinstance(block_mask, jax.core.Tracer):
            raise TypeError("width: got None; need an int where block_mask is traced")
        width = int(np.asarray(block_mask).sum(-1).max(initial=0))
    width, blocks = check_int("width", width, least=0, most=_MOST), block_mask.shape[-1]
    numbers = jnp.where(block_mask, lax.broadcasted_iota(jnp.int32, block_mask.shape, block_mask.ndim - 1), blocks)
    first = jnp.sort(numbers, axis=-1)[..., :width]
    lists = jnp.where(first < blocks, first, -1)
    return jnp.pad(lists, [(0, 0)] * (lists.ndim - 1) + [(0, width - lists.shape[-1])], constant_values=-1)


def _check_block_mask(block_mask: Any) -> Any:
    if not hasattr(block_mask, "dtype") or block_mask.dtype != bool or block_mask.ndim < 2:
        given = shape_text(block_mask) if hasattr(block_mask, "dtype") else shown(block_mask)
        raise TypeError(f"block_mask: got {given}; need a bool array [..., query blocks, key blocks]")
    return block_mask


def block_mask_of(blocks: Array, key_blocks: int) -> Array:
    """int [..., nq, M] -> bool [..., nq, key_blocks]: whether a list has the block. Others than there are, are none."""
    check_array("blocks", blocks, (None,) * max(getattr(blocks, "ndim", 2), 2), "[..., query blocks, places]")
    check_integers("blocks", blocks)
    key_blocks = check_int("key_blocks", key_blocks, least=0, most=_MOST)
    dtype = blocks.dtype if blocks.dtype.itemsize >= 4 else jnp.int32  # which counts further than 8 bits do
    numbers = lax.broadcasted_iota(dtype, (*blocks.shape, key_blocks), blocks.ndim)
    return (blocks[..., None].astype(dtype) == numbers).any(-2)


def select_blocks(
    scores: Array,
    *,
    eligible: Array | np.ndarray,
    count: int | None = None,
    mass: float | None = None,
    threshold: float | None = None,
    first: int = 0,
    own: np.ndarray | None = None,
) -> Array:
    """Of the blocks that may compete, the first ones and those of the highest scores.

    Args:
      scores: floating [..., nq, nk]; read where eligible, and without a gradient.
      eligible: bool, broadcasts to scores: who competes.
      count: how many are taken in all. None: as many as there are.
      mass: until the softmax over the eligible scores of what is taken reaches this; the block that crosses it is in.
      threshold: while the score is above it.
      first: so many eligible blocks are taken before the others, the lowest numbers first.
      own: bool, broadcasts to [nq, nk], known when traced: listed in any case, outside the count.

    Returns:
      int32 [..., nq, M], ascending, -1 behind. M is count (nk without one) and the most own blocks of a row. Of equal
      scores the lower number is taken.

    Complexity: O(nk log nk) a row.
    """
    check_array("scores", scores, (None,) * max(getattr(scores, "ndim", 2), 2), "[..., query blocks, key blocks]")
    check_floating("scores", scores)
    blocks, first = scores.shape[-1], check_int("first", first, least=0, most=_MOST)
    _check_broadcasts("eligible", eligible, scores.shape)
    count = None if count is None else check_int("count", count, least=0, most=_MOST)
    require(mass is None or threshold is None, "threshold", threshold, "give mass or threshold, not both")
    xp: Any = np if isinstance(eligible, np.ndarray) else jnp
    eligible = xp.broadcast_to(eligible, (*eligible.shape[:-1], blocks))
    is_first = eligible & (xp.cumsum(eligible, axis=-1) <= first)
    scores = lax.stop_gradient(scores)
    eligible, is_first = (jnp.broadcast_to(x, scores.shape) for x in (eligible, is_first))
    rank = _ranks(jnp.where(is_first, 0, jnp.where(eligible, 1, 2)), jnp.where(is_first, 0, scores))
    chosen = eligible
    if count is not None:
        chosen &= rank < count
    if mass is not None and check_float("mass", mass, least=0, most=1) < 1:
        numerators, denominator, _ = softmax_parts(scores, eligible)
        _, shares = lax.sort((rank, numerators / denominator), num_keys=1)
        before = jnp.take_along_axis(jnp.cumsum(shares, axis=-1) - shares, rank, -1)
        chosen &= is_first | (before < mass)
    if threshold is not None:
        chosen &= is_first | (scores > check_float("threshold", threshold))
    width = blocks if count is None else count
    if own is not None:
        if isinstance(own, jax.core.Tracer):
            raise TypeError("own: got a traced array; need one that is known, as the lists' width depends on it")
        _check_broadcasts("own", own, scores.shape)
        chosen |= jnp.broadcast_to(own, chosen.shape)
        width += int(np.asarray(own).sum(-1).max(initial=0))
    return lists_of(chosen, width)


def _ranks(group: Array, scores: Array) -> Array:
    """int32 [..., nk]: how many blocks of the row come before each one, of lower groups, then of higher scores, then of
    lower numbers. NaN is the lowest score."""
    numbers = lax.broadcasted_iota(jnp.int32, scores.shape, scores.ndim - 1)
    if scores.shape[-1] == 0:
        return numbers
    if scores.shape[-1] > _COMPARED:
        _, _, order = lax.sort((group, -scores, numbers), num_keys=3)
        return lax.sort((order, numbers), num_keys=1)[1]
    group = (2 * group + jnp.isnan(scores)).astype(jnp.int32)
    scores = jnp.where(jnp.isnan(scores), 0, scores)

    def passed(first: Any, rank: Array) -> Array:
        for other in range(_AT_ONCE):
            number = jnp.minimum(first + other, scores.shape[-1] - 1)
            before, score = (lax.dynamic_slice_in_dim(x, number, 1, axis=-1) for x in (group, scores))
            is_before = (score > scores) | ((score == scores) & (number < numbers))
            is_before = (before < group) | ((before == group) & is_before)
            rank += (is_before & (first + other < scores.shape[-1])).astype(jnp.int32)
        return rank

    passes = -(-scores.shape[-1] // _AT_ONCE)
    return lax.fori_loop(0, passes, lambda at, rank: passed(at * _AT_ONCE, rank), jnp.zeros_like(group))


def _check_broadcasts(name: str, mask: Any, shape: tuple[int, ...]) -> None:
    is_mask = hasattr(mask, "dtype") and mask.dtype == bool
    fits = is_mask and mask.ndim <= len(shape) and all(a in (1, b) for a, b in zip(mask.shape[::-1], shape[::-1]))
    if not fits:
        given = shape_text(mask) if hasattr(mask, "dtype") else shown(mask)
        raise (ValueError if is_mask else TypeError)(f"{name}: got {given}; need bool that broadcasts to {list(shape)}")


def chunk_sparsities(
    chunk_tokens: Sequence[int], *, target: float, base: float, alphas: Sequence[float]
) -> tuple[np.ndarray, float]:
    """The share of its keys that each chunk leaves out, later chunks more (Light Forcing): (sparsities, beta).

        s_0 = 0        s_c = base - alpha_c beta        sum_c n_c m_c s_c = target sum_c n_c m_c

    of chunks of n_c tokens, which see the m_c = n_0 + ... + n_c tokens up to their ends. The first chunk sees all. beta
    is what gives `target` over all pairs of a query and a key.

    Args:
      chunk_tokens: n_c, from 1.
      target, base: 0 to 1. alphas: one a chunk, growing smaller; that of the first is not read.

    Float64. A target that base and alphas cannot reach gives sparsities below 0 or above 1: none is cut off.
    """
    counts = check_items("chunk_tokens", chunk_tokens, "chunk")
    tokens = np.asarray([check_int("chunk_tokens", count, least=1, most=_MOST, of=chunk_tokens) for count in counts])
    weights = np.asarray([check_float("alphas", alpha) for alpha in check_items("alphas", alphas, "chunk")])
    require(len(weights) == len(tokens), "alphas", shown(alphas), f"need one for each of {len(tokens)} chunk_tokens")
    target, base = check_float("target", target, least=0, most=1), check_float("base", base, least=0, most=1)
    pairs = tokens * np.cumsum(tokens)
    by_alpha = float((pairs * weights)[1:].sum())
    require(by_alpha != 0, "alphas", shown(alphas), "need some that move the chunks after the first")
    beta = float(base * pairs[1:].sum() - target * pairs.sum()) / by_alpha
    return np.append(0.0, base - beta * weights[1:]), beta


# --- Orders -----------------------------------------------------------------------------------------------------------


def axis_order(space: Sequence[int], orders: Sequence[Sequence[int]]) -> tuple[np.ndarray, np.ndarray]:
    """(index, inverse), int32 [heads, T]: the tokens of a grid with its axes in an order of each head's own (PARO), in
    which what the head attends to may lie in fewer blocks.

    Args:
      space: of T tokens in raster order, such as (frames, rows, columns).
      orders: of each head the axes, the slowest one first; (0, 1, 2) leaves them as they are.

    Place i of a head's order has token index[head, i], and token t has place inverse[head, t]: `in_order` by the one
    and then by the other gives what was. Attention that sees all does not depend on the order.
    """
    lengths = check_items("space", space, "axis")
    space = tuple(check_int("space", length, least=1, most=_MOST, of=space) for length in lengths)
    axes, tokens = list(range(len(space))), np.arange(int(np.prod(space)), dtype=np.int32).reshape(space)
    index = []
    for order in check_items("orders", orders, "head"):
        fits = isinstance(order, (tuple, list)) and {type(axis) for axis in order} == {int} and sorted(order) == axes
        require(fits, "orders", shown(order), f"need all axes of space, {axes}, for every head")
        index.append(tokens.transpose(order).ravel())
    return np.stack(index), np.argsort(np.stack(index), axis=-1).astype(np.int32)


def in_order(x: Array, index: Array | np.ndarray) -> Array:
    """[B, T, N, H] -> [B, T, N, H] with the tokens of each head in an order: place i has token index[head, i].

    index: int [K|1, T], such as `axis_order`'s or that of a roll; K divides N, and the heads of a group have one order.
    """
    check_array("x", x, (None,) * 4, "[batch, tokens, heads, head_dim]")
    check_array("index", index, (None, x.shape[1]), "[heads, tokens]")
    check_floating("x", x)
    check_integers("index", index)
    heads = index.shape[0]
    require(
        heads > 0 and x.shape[2] % heads == 0, "index", shape_text(index), f"need orders that divide {x.shape[2]} heads"
    )
    of_heads = jnp.repeat(jnp.asarray(index), x.shape[2] // heads, axis=0)
    return jnp.take_along_axis(x, of_heads.T[None, :, :, None], axis=1)


# --- Levels -----------------------------------------------------------------------------------------------------------


def pyramid_levels(
    scores: Array,
    *,
    eligible: Array | np.ndarray,
    fractions: Sequence[float],
    sizes: Sequence[int] = (1, 2, 4, 8),
    first: int = 0,
    own: Array | np.ndarray | None = None,
) -> Array:
    """The higher a block's score among those that compete, the finer its keys (Pyramid Sparse Attention, Li et al.
    2025): of m blocks, the one of rank r = 0, 1, ... gets the first size whose fraction F has r < ceil(F m).

    Args:
      scores: floating [..., nq, nk]; read where eligible, and without a gradient.
      eligible: bool, broadcasts to scores: who competes.
      fractions: 0 to 1, growing, one per size: the share of blocks that get this size or a smaller one.
      sizes: growing, the first one 1: so many keys are seen as one. As in pyramid_attention.
      first: so many eligible blocks, the lowest numbers first, have level 1 and do not compete.
      own: bool, broadcasts to scores: these have level 1 in any case.

    Returns:
      int32 [..., nq, nk] of sizes, 0 for blocks that are not seen. Of equal scores the lower number comes first.

    Complexity: O(nk log nk) a row.
    """
    check_array("scores", scores, (None,) * max(getattr(scores, "ndim", 2), 2), "[..., query blocks, key blocks]")
    check_floating("scores", scores)
    _check_broadcasts("eligible", eligible, scores.shape)
    sizes = check_group_sizes(sizes)
    fractions = check_fractions(fractions, len(sizes))
    first, blocks = check_int("first", first, least=0, most=_MOST), scores.shape[-1]
    xp: Any = np if isinstance(eligible, np.ndarray) else jnp  # what is known is not computed
    eligible = xp.broadcast_to(eligible, (*eligible.shape[:-1], blocks))
    is_first = eligible & (xp.cumsum(eligible, axis=-1) <= first)
    competes = eligible & ~is_first
    ends = jnp.asarray(_rank_ends(blocks, fractions))[competes.sum(-1)]  # [..., nq, sizes]
    is_first, competes = (jnp.broadcast_to(x, scores.shape) for x in (is_first, competes))
    rank = _ranks(jnp.where(competes, 0, 1), lax.stop_gradient(scores))
    levels = jnp.zeros(scores.shape, jnp.int32)
    for number, size in reversed(list(enumerate(sizes))):
        levels = jnp.where(rank < ends[..., number, None], size, levels)
    levels = jnp.where(is_first, 1, jnp.where(competes, levels, 0))
    if own is None:
        return levels
    _check_broadcasts("own", own, scores.shape)
    return jnp.where(jnp.broadcast_to(own, scores.shape), 1, levels)


def pyramid_places(key_blocks: int, *, fractions: Sequence[float], listed: int = 0) -> tuple[int, ...]:
    """How many blocks of each size a row of `pyramid_levels` has at most, of up to key_blocks that compete; listed: the
    first and own ones, of size 1, besides."""
    counts = {"key_blocks": key_blocks, "listed": listed}
    key_blocks, listed = (check_int(name, count, least=0, most=_MOST) for name, count in counts.items())
    most = np.diff(_rank_ends(key_blocks, check_fractions(fractions)), axis=1, prepend=0).max(0).tolist()
    return tuple(min(count + (listed if number == 0 else 0), key_blocks) for number, count in enumerate(most))


def _rank_ends(blocks: int, fractions: Sequence[float]) -> np.ndarray:
    """int32 [blocks + 1, sizes]: ceil(F m) of m = 0, 1, ... blocks, a fraction's rounding aside."""
    return np.ceil(np.arange(blocks + 1)[:, None] * np.asarray(fractions)[None] - 1e-9).astype(np.int32)


@primitive("B...")
def pooled_levels(
    query: Array,
    key: Array,
    *,
    query_block: int,
    key_block: int,
    fractions: Sequence[float],
    sizes: Sequence[int] = (1, 2, 4, 8),
    first: int = 1,
    is_causal: bool = True,
) -> Array:
    """Levels by the products of one query and the mean key of each block, for every key head.

    Args:
      query: [B, T, N, H], of which the heads of a group are averaged. key: [B, S, K, H], K divides N.
      fractions, sizes, first: as in `pyramid_levels`.
      is_causal: a block's first query ranks the complete blocks, and its own have level 1. Else its queries' mean ranks
        all.

    Returns int32 [B, K, nq, nk], for pyramid_attention with the same blocks, sizes and is_causal.
    """
    sizes = check_group_sizes(sizes, check_block("key_block", key_block))
    scores = _scores_of_means(query, key, query_block, key_block, is_causal)
    options: dict[str, Any] = {"fractions": fractions, "sizes": sizes, "first": first}
    if not is_causal:
        return pyramid_levels(scores, eligible=np.ones((1, 1), bool), **options)
    complete, own = causal_blocks(scores.shape[-2], scores.shape[-1], query_block, key_block)
    return pyramid_levels(scores, eligible=complete, **options, own=own)


# --- What is not listed -----------------------------------------------------------------------------------------------


def rectify(out: Array, probabilities: Array, chosen: Array, gain: Array, values: Array, *, query_block: int) -> Array:
    """Attention to the chosen blocks, with the mean values of others in it (Rectified SpaAttn, Liu et al. 2025):

        R_i out_t + sum_j [j not chosen, gain_ij] P_ij vbar_j        R_i = sum of P_ij over the other j

    The chosen blocks have their share of the pooled softmax P, which mixes two normalisations. pyramid_attention with
    the sizes 1 and key_block is the consistent form: level 1 of chosen blocks, key_block of the others.

    Args:
      out: [B, T, N, V], block_sparse_attention to the chosen blocks.
      probabilities: P, [B, N, nq, nk], a softmax of pooled_scores over the blocks, such as by their means.
      chosen, gain: bool, broadcast to P: `pooling_gain` says which blocks are well enough seen by their means.
      values: [B, nk, K, V], the blocks' mean values. K divides N.
      query_block: tokens of a block of queries.

    Returns [B, T, N, V] in out's dtype. Not causal: a block's mean has all of its tokens.
    """
    check_array("out", out, (None,) * 4, "[batch, T, heads, V]")
    batch, length, heads, width = out.shape
    query_blocks = -(-length // check_block("query_block", query_block))
    check_array("values", values, (batch, None, None, width), "[batch, key blocks, key heads, V]")
    shape = (batch, heads, query_blocks, values.shape[1])
    check_array("probabilities", probabilities, shape, "[batch, heads, query blocks, key blocks]")
    for name, array in (("out", out), ("probabilities", probabilities), ("values", values)):
        check_floating(name, array)
    check_key_heads("values", values, heads)
    for name, mask in (("chosen", chosen), ("gain", gain)):
        _check_broadcasts(name, mask, shape)
    dtype = accumulator_dtype(out, probabilities, values)
    is_added = jnp.broadcast_to(~jnp.asarray(chosen), shape) & jnp.broadcast_to(gain, shape)
    added = jnp.where(is_added, probabilities, 0).astype(dtype)
    kept = jnp.where(is_added, 0, probabilities).astype(dtype).sum(-1)

    def of_tokens(x: Array) -> Array:
        """[B, N, nq, ...] -> [B, T, N, ...]."""
        return jnp.moveaxis(jnp.repeat(x, query_block, axis=2)[:, :, :length], 1, 2)

    means = jnp.einsum("BNTS,BSNV->BNTV", added, repeat_key_heads(values.astype(dtype), heads))
    return (of_tokens(kept)[..., None] * out + of_tokens(means)).astype(out.dtype)


def pooling_gain(query: Array, key: Array, *, query_block: int, key_block: int) -> Array:
    """bool [B, N, nq, nk]: whether the product of a query block's and a key block's means is larger than what the
    tokens' distances from their means make of it, for `rectify`:

        |qbar_i . kbar_j| > |mean |q - qbar|_i . kbar_j| + |qbar_i . mean |k - kbar|_j|

    query: [B, T, N, H]. key: [B, S, K, H], K divides N.
    """
    check_query_key_value(query, key, key, same_space=False)
    query_block, key_block = check_block("query_block", query_block), check_block("key_block", key_block)

    def pooled(x: Array, size: int) -> tuple[Array, Array]:
        x = x.astype(accumulator_dtype(query, key))
        mean = pool_blocks(x, size, "mean")
        return mean, pool_blocks(jnp.abs(x - jnp.repeat(mean, size, axis=1)[:, : x.shape[1]]), size, "mean")

    (queries, of_queries), (keys, of_keys) = pooled(query, query_block), pooled(key, key_block)
    errors = jnp.abs(pooled_scores(of_queries, keys, 1.0)) + jnp.abs(pooled_scores(queries, of_keys, 1.0))
    return jnp.abs(pooled_scores(queries, keys, 1.0)) > errors


# --- Scores -----------------------------------------------------------------------------------------------------------


def pool_blocks(x: Array, size: int, kind: Pooling) -> Array:
    """[B, T, N, H] -> [B, ceil(T / size), N, H]: one token for the real tokens of each block. x: floating.

    kind: their "mean", "max" or "min", channel by channel, or the "first", "last" or "centre" one, m // 2 of m.
    """
    check_array("x", x, (None,) * 4, "[batch, tokens, heads, head_dim]")
    check_floating("x", x)
    size = min(check_block("size", size), max(x.shape[1], 1))
    check_choice("kind", kind, get_args(Pooling))
    length = x.shape[1]
    starts = np.arange(0, length, size)
    real = np.minimum(starts + size, length) - starts
    places = {"first": starts, "last": starts + real - 1, "centre": starts + real // 2}
    if kind in places:
        return x[:, places[kind]]
    fill = {"mean": 0, "max": -jnp.inf, "min": jnp.inf}[kind]
    padded = jnp.pad(x, ((0, 0), (0, -length % size), (0, 0), (0, 0)), constant_values=fill)
    in_blocks = padded.reshape(x.shape[0], len(starts), size, *x.shape[2:])
    if kind == "mean":
        dtype = accumulator_dtype(x)
        return (in_blocks.astype(dtype).sum(2) / jnp.asarray(real, dtype)[None, :, None, None]).astype(x.dtype)
    return in_blocks.max(2) if kind == "max" else in_blocks.min(2)


def pooled_scores(queries: Array, keys: Array, scale: float | Array | None = None) -> Array:
    """[B, N, nq, nk] of scale q_i . k_j: queries [B, nq, N, H], keys [B, nk, K, H] of the blocks, K divides N.

    Queries averaged over the heads of a group, N = K, give lists that serve the group. scale: None means H ** -0.5.
    """
    check_queries_keys(queries, keys)
    batch, blocks, heads, width = queries.shape
    key_blocks, key_heads = keys.shape[1:3]
    dtype = accumulator_dtype(queries, keys)
    grouped = queries.astype(dtype).reshape(batch, blocks, key_heads, heads // key_heads, width)
    products = jnp.einsum("BTKGH,BSKH->BKGTS", grouped, keys.astype(dtype))
    products = products.reshape(batch, heads, blocks, key_blocks)
    return jnp.asarray(default_scale(scale, queries.shape[-1]), dtype) * products


@primitive("B...")
def pooled_blocks(
    query: Array,
    key: Array,
    *,
    query_block: int,
    key_block: int,
    count: int,
    first: int = 1,
    is_causal: bool = True,
) -> Array:
    """Lists by the products of one query and the mean key of each block, for every key head.

    Args:
      query: [B, T, N, H], of which the heads of a group are averaged. key: [B, S, K, H], K divides N.
      count, first: how many blocks are taken, the first ones among them; as in `select_blocks`.
      is_causal: a block's first query chooses among complete blocks, and its own are listed besides. Else its queries'
        mean chooses among all.

    Returns int32 [B, K, nq, M], for block_sparse_attention with the same blocks and is_causal.
    """
    scores = _scores_of_means(query, key, query_block, key_block, is_causal)
    if not is_causal:
        return select_blocks(scores, eligible=np.ones((1, 1), bool), count=count, first=first)
    complete, own = causal_blocks(scores.shape[-2], scores.shape[-1], query_block, key_block)
    return select_blocks(scores, eligible=complete, count=count, first=first, own=own)


def _scores_of_means(query: Array, key: Array, query_block: Any, key_block: Any, is_causal: bool) -> Array:
    """[B, K, nq, nk]: scores_by_group of the blocks' mean keys, and of their first queries where causal, else the mean
    ones."""
    check_query_key_value(query, key, key, same_space=False)
    query_block, key_block = check_block("query_block", query_block), check_block("key_block", key_block)
    queries = pool_blocks(query, query_block, "first" if check_bool("is_causal", is_causal) else "mean")
    return scores_by_group(queries, pool_blocks(key, key_block, "mean"))


def scores_by_group(queries: Array, keys: Array) -> Array:
    """[B, K, nq, nk]: pooled_scores of queries [B, nq, N, H], averaged over the heads that read a key head."""
    check_queries_keys(queries, keys)
    return pooled_scores(mean_of_groups(queries, keys.shape[2]), keys)


def mean_of_groups(queries: Array, heads: int) -> Array:
    """[B, nq, N, H] -> [B, nq, heads, H], the mean of the heads of each group; of N heads what they are."""
    check_array("queries", queries, (None,) * 4, "[batch, blocks, heads, head_dim]")
    check_floating("queries", queries)
    heads = check_int("heads", heads, least=1, most=_MOST)
    require(0 not in queries.shape[2:], "queries", shape_text(queries), "need heads and width of at least 1")
    require(queries.shape[2] % heads == 0, "heads", heads, f"need a divisor of {queries.shape[2]} heads")
    if heads == queries.shape[2]:
        return queries
    grouped = queries.reshape(*queries.shape[:2], heads, -1, queries.shape[-1])
    return grouped.astype(accumulator_dtype(queries)).mean(3)


def gate_scores(
    queries: Array, keys: Array, query_weights: Array, key_weights: Array, *, turns: GateTurns | None = None
) -> Array:
    """[B, N, nq, nk] of D^-1/2 (q_i W) . (k_j W'), the gate of SeerAttention (Gao et al. 2024); or [B, K, nq, nk], of
    the mean queries of groups, that of SeerAttention-R, whose lists serve the group.

    Args:
      queries: [B, nq, N, F], such as the blocks' means; keys: [B, nk, K, F'], such as `gate_keys`, of tokens without
        positions: the largest of turned keys says little. K divides N.
      query_weights: [N, F, D], or [K, F, D] for groups. key_weights: [K, F', D].
      turns: what gives q_i W and k_j W', [B, n, heads, D], their positions, those of the blocks' starts as published,
        so that scores depend on how far apart blocks are. None: no positions.

    Differentiable; trained by `gate_loss`.
    """
    _check_gate(queries, keys, query_weights, key_weights)
    if turns is not None and not (isinstance(turns, tuple) and len(turns) == 2 and all(map(callable, turns))):
        raise TypeError(f"turns: got {shown(turns)}; need None, or a function for queries and one for keys")
    projected = to_gate(queries, query_weights), to_gate(keys, key_weights)
    return pooled_scores(*(turn(x) for turn, x in zip(turns, projected)) if turns else projected)


def _check_gate(queries: Any, keys: Any, query_weights: Any, key_weights: Any) -> None:
    arrays = {"queries": queries, "keys": keys}
    for name, array in arrays.items():
        check_array(name, array, (None,) * 4, "[batch, blocks, heads, features]")
    layout = "[heads or key heads, features, width] of queries"
    check_array("query_weights", query_weights, (None, queries.shape[3], None), layout)
    is_known = query_weights.shape[0] in (queries.shape[2], keys.shape[2])
    require(is_known, "query_weights", shape_text(query_weights), f"need {layout}")
    check_array("key_weights", key_weights, (*keys.shape[2:], None), "[heads, features, width] of keys")
    for name, array in {**arrays, "query_weights": query_weights, "key_weights": key_weights}.items():
        check_floating(name, array)
    width = query_weights.shape[2]
    check_array("key_weights", key_weights, (None, None, width), "[key heads, features, query_weights' width]")
    require(width > 0, "query_weights", shape_text(query_weights), "need a width of at least 1")
    require(keys.shape[0] == queries.shape[0], "keys", shape_text(keys), f"need queries' batch, {queries.shape[0]}")
    check_key_heads("keys", keys, queries.shape[2])


def gate_keys(key: Array, size: int) -> Array:
    """[B, S, K, H] -> [B, ceil(S / size), K, 3 H]: the mean, largest and smallest key of each block, side by side."""
    check_array("key", key, (None,) * 4, "[batch, tokens, key heads, head_dim]")
    check_floating("key", key)
    kinds: tuple[Pooling, ...] = ("mean", "max", "min")
    return jnp.concatenate([pool_blocks(key, size, kind) for kind in kinds], axis=-1)


def to_gate(x: Array, weights: Array) -> Array:
    """[B, n, N, F] by weights [N, F, D] -> [B, n, N, D], head by head; of weights of fewer heads, the groups' means."""
    check_array("x", x, (None,) * 4, "[batch, blocks, heads, features]")
    check_array("weights", weights, (None, x.shape[3], None), "[heads, features, width]")
    fits = weights.shape[0] > 0 and x.shape[2] % weights.shape[0] == 0
    require(fits, "weights", shape_text(weights), f"need heads that divide {x.shape[2]}")
    for name, array in (("x", x), ("weights", weights)):
        check_floating(name, array)
    return jnp.einsum("BTNF,NFD->BTND", mean_of_groups(x, weights.shape[0]), weights)


def gate_loss(
    queries: Array,
    keys: Array,
    query_weights: Array,
    key_weights: Array,
    statistics: Array,
    *,
    eligible: Array | np.ndarray,
    turns: GateTurns | None = None,
) -> Array:
    """What the gate of `gate_scores` is trained by, beside the model: its divergence from what attention does, [].

        target_ij = statistics_ij / sum over eligible j        mean over rows of KL(target_i | softmax over eligible j)

    Only the weights get a gradient. The model, which attends by lists, gives the gate none: add the two losses.

    Args:
      queries, keys, query_weights, key_weights, turns: as in `gate_scores`.
      statistics: [B, N, nq, nk], the largest weight of each block: `block_statistics(..., reduce="max")`. For groups
        the largest of these over the group's heads is taken.
      eligible: bool, broadcasts to them: who competes. Rows without such a block have nothing to learn, and count not.
    """
    _check_gate(queries, keys, query_weights, key_weights)
    queries, keys = lax.stop_gradient((queries, keys))
    scores = gate_scores(queries, keys, query_weights, key_weights, turns=turns)
    batch, of_lists, *blocks = scores.shape
    check_array(
        "statistics", statistics, (batch, queries.shape[2], *blocks), "[batch, heads, query blocks, key blocks]"
    )
    check_floating("statistics", statistics)
    _check_broadcasts("eligible", eligible, scores.shape)
    of_groups = statistics.astype(scores.dtype).reshape(batch, of_lists, -1, *blocks).max(2)
    largest = lax.stop_gradient(jnp.where(eligible, of_groups, 0))
    total = largest.sum(-1, keepdims=True)
    targets = largest / jnp.where(total > 0, total, 1)
    *_, lse = softmax_parts(scores, jnp.broadcast_to(eligible, scores.shape))
    of_gate = scores - jnp.where(lse == -jnp.inf, 0, lse)[..., None]
    has_target = targets > 0
    terms = jnp.where(has_target, targets * (jnp.log(jnp.where(has_target, targets, 1)) - of_gate), 0)
    return terms.sum() / jnp.maximum(jnp.sum(total > 0), 1)


def chunk_scores(query: Array, key: Array, starts: Array) -> Array:
    """[B, T, C] of sqrt(m) sum_n q_n . mean(k_n) over the m keys of each chunk, all heads together (DHSA, 2025).

    Args:
      query: [B, T, N, H]. key: [B, S, K, H], K divides N.
      starts: int [C] or [B, C], growing from 0 to S: where chunks begin; those that begin at S have no keys, and score
        0. What is not known before the call is not checked. Keys before the first start are in no chunk.

    Complexity: O(S H + T C N H).
    """
    check_query_key_value(query, key, key, same_space=False)
    batch, _, heads, _ = query.shape
    length, key_heads = key.shape[1:3]
    of_rows = getattr(starts, "ndim", 1) == 2
    check_array("starts", starts, (batch, None) if of_rows else (None,), "[chunks] or [batch, chunks]")
    check_integers("starts", starts)
    if (known := known_values(starts)) is not None and known.size:
        grows = known.min() >= 0 and known.max() <= length and (np.diff(known.astype(np.int64)) >= 0).all()
        require(bool(grows), "starts", shown(known.tolist()), f"need numbers from 0 to {length} that do not fall")
    dtype = accumulator_dtype(query, key)
    starts = jnp.broadcast_to(starts, (batch, starts.shape[-1]))
    chunk_of = jax.vmap(lambda starts: jnp.searchsorted(starts, jnp.arange(length), side="right") - 1)(starts)

    def sums(key: Array, chunk_of: Array) -> Array:
        return jax.ops.segment_sum(key, chunk_of, num_segments=starts.shape[1])

    sizes = jnp.diff(starts, append=jnp.full((batch, 1), length)).astype(dtype)
    summed = jax.vmap(sums)(key.astype(dtype), chunk_of) / jnp.sqrt(jnp.maximum(sizes, 1))[..., None, None]
    grouped = query.astype(dtype).reshape(*query.shape[:2], key_heads, heads // key_heads, -1)
    return jnp.einsum("BTKGH,BCKH->BTC", grouped, summed)


def connectivity_scores(
    queries: Array,
    keys: Array,
    down: Array,
    up: Array,
    *,
    coefficients: int,
    threshold: float,
    scale: float | Array | None = None,
) -> Array:
    """[B, N, T, S] of (top(softmax_r(scale q_t . sum_s k_s P_sr)) |W|^T)_ts, sums of a few learned maps of weights.

    Sparsifiner (Wei et al. 2023): a budget of keys a query is `select_blocks` of these, in blocks of one token.

    Args:
      queries: [B, T, N, D]; keys: [B, S, K, D], such as projections to few channels. K divides N.
      down: P, [S, R]. up: W, [S, R], whose numbers of at most `threshold` in size count as 0. Both tie S to one length.
      coefficients: of the R maps, how many a query takes; the others count 0.
      scale: default D ** -0.5; the released code has the number of heads ** -0.5.

    Differentiable, but for which coefficients are taken. Not causal.

    Complexity: O((T + S) R D) time a head for the coefficients, O(T S R) for the maps.
    """
    check_queries_keys(queries, keys)
    check_array("down", down, (keys.shape[1], None), "[keys, maps]")
    check_array("up", up, (keys.shape[1], down.shape[1]), "[keys, maps]")
    for name, array in (("down", down), ("up", up)):
        check_floating(name, array)
    coefficients = check_int("coefficients", coefficients, least=1, most=down.shape[1])
    threshold = check_float("threshold", threshold, least=0)
    dtype = accumulator_dtype(queries, keys, down, up)
    maps = jnp.einsum("BSKD,SR->BRKD", keys.astype(dtype), down)
    shares = jax.nn.softmax(pooled_scores(queries, maps, scale), axis=-1)
    _, taken = lax.top_k(lax.stop_gradient(shares), coefficients)
    is_taken = jax.nn.one_hot(taken, shares.shape[-1], dtype=dtype).sum(-2)
    size = jnp.abs(up)
    return jnp.einsum("BNTR,SR->BNTS", shares * is_taken, jnp.where(size > threshold, size, 0))


def tree_blocks(
    queries: Array,
    key: Array,
    count: int,
    *,
    key_block: int,
    candidates: Array | np.ndarray,
    representative: Literal["centre", "block"] = "centre",
) -> Array:
    """The blocks that a search down a tree finds for each query block, in O(count log(nk / count)) products a head
    (HiP attention, Lee et al. 2024).

    The candidates are cut into `count` cells. Each is halved until all cells are single blocks, and after each halving
    the `count` cells of the highest scores stay, of equal ones the earlier. A cell's score is that of its first block:
    the largest product of a query and the block's centre key, or any of its keys.

    Args:
      queries: [B, nq, R, N, H], the R rows that stand for a block of queries.
      key: [B, S, K, H], K divides N.
      candidates: int [nq] or [B|1, nq]: block i chooses among the first candidates[i] key blocks. Of a causal model
        these are complete before the block's first query (R = 1), see `causal_blocks`. Of a jax.Array, which need not
        be known when traced, none is above nk, and the halvings are as many as nk blocks take.
      representative: "centre" or "block".

    Returns: int32 [B, N, nq, count], ascending, -1 behind. All candidates where there are no more than count.
    """
    count, key_block = check_int("count", count, least=1, most=_MOST), check_block("key_block", key_block)
    check_choice("representative", representative, ("centre", "block"))
    check_array("queries", queries, (None,) * 5, "[batch, query blocks, rows, heads, head_dim]")
    check_array("key", key, (queries.shape[0], None, None, queries.shape[4]), "[batch, keys, key heads, head_dim]")
    for name, array in (("queries", queries), ("key", key)):
        check_floating(name, array)
    require(0 not in queries.shape, "queries", shape_text(queries), "need at least one of each")
    check_key_heads("key", key, queries.shape[3])
    candidates = candidates if isinstance(candidates, jax.Array) else np.asarray(candidates)
    rows = (None,) * (candidates.ndim - 1) + (queries.shape[1],)
    check_array("candidates", candidates, rows[-2:], "[query blocks] or [batch|1, query blocks]")
    check_integers("candidates", candidates)
    by_row = candidates.reshape(-1, queries.shape[1])
    require(by_row.shape[0] in (1, queries.shape[0]), "candidates", shape_text(candidates), "need batch 1 or queries'")
    queries, key = lax.stop_gradient((queries, key))
    batch, query_blocks, _, heads, _ = queries.shape
    length, key_heads = key.shape[1:3]
    key_blocks = -(-length // key_block)
    if (known := known_values(candidates)) is not None:
        outside = known[(known < 0) | (known > key_blocks)].tolist()
        require(not outside, "candidates", shown(outside[:1])[1:-1], f"need 0 to {key_blocks}")
    if key_blocks == 0:  # nothing to find
        return jnp.full((batch, heads, query_blocks, count), -1, jnp.int32)
    most = key_blocks if isinstance(candidates, jax.Array) else candidates.max(initial=0)
    dtype = accumulator_dtype(queries, key)
    grouped = queries.astype(dtype).reshape(batch, query_blocks, -1, key_heads, heads // key_heads, queries.shape[-1])
    by_head = jnp.moveaxis(key, 2, 1)

    def scores(blocks: Array) -> Array:
        """[B, K, G, nq, C] of the first blocks [B, K, G, nq, C] of cells."""
        size = jnp.minimum(key_block, length - blocks * key_block)[..., None]
        offsets = (
            size // 2 if representative == "centre" else lax.broadcasted_iota(jnp.int32, (1,) * 5 + (key_block,), 5)
        )
        tokens = blocks[..., None] * key_block + offsets
        there = tokens < length
        rows = jax.vmap(jax.vmap(lambda key, at: key[at]))(by_head, jnp.where(there, tokens, 0))
        products = jnp.einsum("BTRKGH,BKGTCMH->BKGTRCM", grouped, rows.astype(dtype))
        return jnp.where(there[:, :, :, :, None], products, -jnp.inf).max((4, 6))

    ends = (np.arange(count + 1)[None, None] * by_row[..., None] // count)[:, None, None]
    shape = (batch, key_heads, heads // key_heads, query_blocks, count)
    start, end = (jnp.broadcast_to(x, shape).astype(jnp.int32) for x in (ends[..., :-1], ends[..., 1:]))

    def halve(_: Any, cells: tuple[Array, Array, Array]) -> tuple[Array, Array, Array]:
        start, end, score = cells
        middle = start + (end - start) // 2
        # An earlier half begins where its cell does, so it has the cell's score; a single block is its later half.
        of_later = scores(jnp.minimum(middle, key_blocks - 1))
        starts, ends = jnp.stack([start, middle], -1), jnp.stack([middle, end], -1)
        both = jnp.stack([score, of_later], -1)
        starts, ends, both = (x.reshape(*shape[:-1], -1) for x in (starts, ends, both))
        is_empty = (starts == ends).astype(jnp.int32)
        _, _, starts, ends, both = lax.sort((is_empty, -both, starts, ends, both), num_keys=3)
        # In the order of their places again, by which ties are decided.
        starts, ends, both = (x[..., :count] for x in (starts, ends, both))
        past = jnp.where(starts == ends, key_blocks, starts)
        return tuple(lax.sort((past, starts, ends, both), num_keys=1)[1:])  # type: ignore[return-value]

    rounds = int(np.ceil(np.log2(max(most / count, 1))))
    cells = tuple(vary_alike((start, end, scores(jnp.minimum(start, key_blocks - 1)))))
    start, end, _ = lax.fori_loop(0, rounds, halve, cells)
    found = jnp.sort(jnp.where(start < end, start, key_blocks), -1).reshape(batch, heads, query_blocks, count)
    return jnp.where(found < key_blocks, found, -1)
