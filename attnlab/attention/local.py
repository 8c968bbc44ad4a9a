"""Local attention: every query sees the keys of a window around itself, in 1, 2 or 3 space axes.

    out_t = sum_{s in window(t)} softmax_s(scale q_t . k_s) v_s

`softcap` and `sink_logits` are dot_product.py's; the latter, learned, are not the `sinks`, which are the first keys.

The window is NATTEN's, per axis (masks.window_bounds): at a border it moves inward, so that every query sees exactly
prod(window) keys; `stride` neighbouring queries share their leader's window (stride 1: sliding window; stride =
window: attention in blocks; between them: the strided window of Generalized Neighborhood Attention). Causal axes see
the window's past half only. Papers: Neighborhood Attention (Hassani et al. 2023), Faster Neighborhood Attention (2024),
Generalized Neighborhood Attention (2025); attention sinks: StreamingLLM (Xiao et al. 2024).

The blocked form cuts the queries' space into tiles. The windows of a tile's queries lie in one box of keys, of a size
known at trace time; the tile attends to its box in one dense step under the mask of masks.window_bounds.

    tile    | q q q q |                  queries
    box   | k k k k k k k |              keys from the first query's window to the last one's

With dilation the tokens are reordered by residue group first, and each group has tiles of its own.
"""

import functools
import math
import operator
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from attnlab.attention import masks
from attnlab.attention._cached import attend_to_cache, by_row, counted, newest, put, tokens_at
from attnlab.attention._dispatch.choice import Implementations, dispatch
from attnlab.attention._dispatch.exchange import (
    Parts,
    by_device,
    first_positions,
    over_positions,
    whole_space,
    with_halo,
)
from attnlab.attention._dispatch.primitive import primitive
from attnlab.attention._kernels import local as kernels
from attnlab.attention._shared.checks import (
    accumulator_dtype,
    check_bool,
    check_cached_steps,
    check_dtype,
    check_int,
    check_position,
    check_prompt,
    check_query_key_value,
    check_segment_ids,
    check_sink_logits,
    check_sizes,
    check_softcap,
    check_type,
    default_scale,
    per_axis,
    require,
)
from attnlab.attention._shared.finite import spoiling
from attnlab.attention._shared.softmax import (
    reference_attention,
    scaled_for_logits,
    softcapped,
    softmax_parts,
    with_sink_logits,
)
from attnlab.attention._shared.tiles import Tiles, cut_tiles, group_residues, join_tiles

Array = jax.Array

# Queries along one axis of a tile, at least and at most, by number of space axes.
_TILE_RANGE = {1: (64, 256), 2: (8, 16), 3: (4, 8)}
# Tiles are computed together while their logits take no more than this.
_GROUP_BYTES = 2 * 2**20


@primitive("B*N.", "B*N")
def local_attention(
    query: Array,
    key: Array,
    value: Array,
    *,
    window: int | tuple[int, ...] | tuple[tuple[int, int]],
    stride: int | tuple[int, ...] = 1,
    is_causal: bool | tuple[bool, ...] = False,
    edge: masks.Edge = "shift",
    sinks: int = 0,
    scale: float | None = None,
    softcap: float | None = None,
    sink_logits: Array | None = None,
    segment_ids: Array | None = None,
    return_lse: bool = False,
    implementation: str | None = None,
) -> Any:
    """Attention within a window around each query. Space has 1, 2 or 3 axes; options marked * take one value or one
    per axis.

    Args:
      query: [B, *space, N, H], floating.
      key: [B, *space, K, H]. K divides N: query head n reads key head n // (N / K).
      value: [B, *space, K, V].
      window*: number of keys seen along the axis, the query's own included. An even window reaches one key further
        back than forward. At most the axis' length. Or ((left, right),), for one axis that is not causal, stride=1 and
        edge="clip": so many keys before the query's own, and after it.
      stride*: this many neighbouring queries share one window. At most the window.
      is_causal*: keys after the query, along the axis, are not seen; axes combine by AND. The window then ends at its
        leader, the last query of the stride group, and early queries see fewer keys.
      edge: what a window does at a border. "shift": moves inward, always exactly `window` keys if not causal. "clip":
        is cut off, as in jax.nn.dot_product_attention(local_window_size=(window // 2, (window - 1) // 2)).
      sinks: keys whose index on the first causal axis is below this stay visible, whatever the window, to every query
        that is not before them on a causal axis: the first tokens of a text, the first frames of a video.
      scale: factor on the logits; None means H ** -0.5.
      softcap: a number above 0; logits l become softcap tanh(l / softcap). None: they stay.
      sink_logits: floating [N], learned: each head has one key more, of this logit and no value, in the softmax of
        every query and in lse. Unlike `sinks`, which are keys of the input.
      segment_ids: integers [B, *space]; a query sees keys of its own segment. Windows do not move for segments.
      return_lse: return (out, lse).
      implementation: None, "reference", "xla", "pallas_tpu" (bfloat16 or float32) or "pallas_gpu" (bfloat16 or
        float16, no softcap).

    Returns:
      out [B, *space, N, V] in query's dtype; with return_lse also lse [B, *space, N], float32 (float64 for float64
      inputs), differentiable. A query that sees no key gives 0 and lse = -inf, with zero gradients.

    Raises:
      ValueError, TypeError: naming the argument, for shapes, dtypes and settings other than these.

    Complexity, with n positions: "xla" O(n prod(window)) time (times a constant for windows smaller than a tile) and
    O(n) memory; "reference" O(n^2).
    """
    return_lse = check_bool("return_lse", return_lse)
    out, lse = windowed_attention(
        "local_attention",
        query,
        key,
        value,
        segment_ids,
        window=window,
        stride=stride,
        dilation=1,
        is_causal=is_causal,
        edge=edge,
        sinks=sinks,
        scale=scale,
        softcap=softcap,
        sink_logits=sink_logits,
        implementation=implementation,
    )
    return (out, lse) if return_lse else out


def windowed_attention(
    primitive: str,
    query: Array,
    key: Array,
    value: Array,
    segment_ids: Array | None,
    *,
    window: Any,
    stride: Any,
    dilation: Any,
    is_causal: Any,
    edge: masks.Edge,
    sinks: int,
    scale: float | None,
    softcap: float | None = None,
    sink_logits: Array | None = None,
    implementation: str | None,
) -> tuple[Array, Array]:
    """Checks the arguments of local and dilated attention and dispatches: (out, lse)."""
    check_query_key_value(query, key, value, space_ranks=(1, 2, 3))
    space = whole_space(query.shape[1:-2])
    strides, dilations = (
        per_axis(name, given, len(space)) for name, given in (("stride", stride), ("dilation", dilation))
    )
    causal = per_axis("is_causal", is_causal, len(space), bool)
    if (sides := _sides(window)) is None:
        windows = lengths = per_axis("window", window, len(space))
    else:
        fits = (len(space), causal, strides, dilations, edge) == (1, (False,), (1,), (1,), "clip")
        needs = 'a pair needs one axis, is_causal=False, stride=1, dilation=1 and edge="clip"'
        require(fits, "window", window, needs)
        windows, lengths = ((min(sides[0], space[0]), min(sides[1], space[0])),), (1,)
    for axis, (length, k, s, d) in enumerate(zip(space, lengths, strides, dilations, strict=True)):
        where = f"on axis {axis} of the space {space}"
        require(d >= 1, "dilation", dilation, f"must be at least 1 {where}")
        most = length if d == 1 else f"{length // d} = {length} // {d} (dilation)"
        require(k >= 1, "window", window, f"must be at least 1 {where}")
        require(k * d <= length, "window", window, f"at most {most} fits {where}")
        require(1 <= s <= k, "stride", stride, f"must be from 1 to the window, {k}, {where}")
    require(edge in ("shift", "clip"), "edge", repr(edge), "need 'shift' or 'clip'")
    sinks = check_int("sinks", sinks, least=0)
    require(sinks == 0 or any(causal), "sinks", sinks, "needs a causal axis; else must be 0")
    assert sinks == 0 or dilation == 1, "no primitive offers sinks with dilation, and the blocked form has none"
    if segment_ids is not None:
        check_segment_ids("segment_ids", segment_ids, query.shape[:-2], "[batch, *space]")
    check_sink_logits(sink_logits, query.shape[-2])
    settings: dict[str, Any] = {
        "window": windows,
        "stride": strides,
        "dilation": dilations,
        "is_causal": causal,
        "edge": edge,
    }
    attend = functools.partial(
        dispatch,
        primitive,
        IMPLEMENTATIONS,
        implementation,
        sinks=sinks,
        scale=default_scale(scale, query.shape[-1]),
        softcap=check_softcap(softcap),
        **settings,
    )

    def parted(
        parts: Parts, query: Array, key: Array, value: Array, segment_ids: Array | None, sink_logits: Array | None
    ) -> Any:
        axis = masks.axis_windows(whole_space(query.shape[1:-2], parts), **settings)[parts.axis]
        fits = sinks == 0 or parts.axis == causal.index(True)
        require(fits, "sinks", sinks, f"must be 0 where devices share axis {parts.axis}, not the first causal one")
        out, lse = in_stretches(attend, axis, parts, (query,), (key, value, segment_ids), sinks=sinks)
        return with_sink_logits(out, lse, sink_logits)

    layouts = ("B*N.", "B*K.", "B*K.", "B*", "N")
    return over_positions(attend, parted, layouts, ("B*N.", "B*N"), query, key, value, segment_ids, sink_logits)


def _sides(window: Any) -> tuple[int, int] | None:
    """(left, right) of ((left, right),), None of other windows."""
    if not (isinstance(window, (tuple, list)) and len(window) == 1 and isinstance(window[0], (tuple, list))):
        return None
    require(len(window[0]) == 2, "window", window, "need ((left, right),)")
    left, right = (check_int("window", side, least=0, most=2**31 - 1, of=window) for side in window[0])
    return left, right


class _Stretch(NamedTuple):
    """Of the whole sequence, what the queries of a part need: so many positions before and after the part. is_cut: it
    begins later than the sequence."""

    before: int
    after: int
    is_cut: bool


def in_stretches(
    attend: Callable[..., Any],
    axis: masks.AxisWindow,
    parts: Parts,
    own: Sequence[Array],
    keys: Sequence[Array | None],
    *,
    sinks: int = 0,
) -> Any:
    """Each device's part of attend(*own, *keys), which attends within windows of `axis`, of the whole sequence.

    A device attends in a stretch around its part, which ends where the sequence does or far enough from the part. What
    queries have of their own is ones in the stretch where they are not the part's, and results are dropped there.
    """
    dim, size = 1 + parts.axis, own[0].shape[1 + parts.axis]
    group = axis.stride * axis.dilation
    stretches = [_stretch(axis, size, number, sinks) for number in range(parts.many)]
    before, after = max(s.before for s in stretches), max(s.after for s in stretches)
    # A cut stretch has the sinks before it, in whole stride groups.
    shown = -(-sinks // group) * group if any(s.is_cut for s in stretches) else 0
    extended = with_halo(keys, before, after, parts, dim)
    first = first_positions(keys, shown, parts, dim)

    def of_stretch(stretch: _Stretch, own: Sequence[Array], extended: Any, first: Any) -> Any:
        start, end = before - stretch.before, before + size + stretch.after
        within = jax.tree.map(lambda x: lax.slice_in_dim(x, start, end, axis=dim), extended)
        put_before = shown if stretch.is_cut else 0
        if put_before:
            within = jax.tree.map(lambda *pair: jnp.concatenate(pair, axis=dim), first, within)
        skipped = put_before + stretch.before

        def filled(x: Array) -> Array:
            widths = [(skipped, stretch.after) if a == dim else (0, 0) for a in range(x.ndim)]
            return jnp.pad(x, widths, constant_values=1)

        results = attend(*map(filled, own), *within)
        return jax.tree.map(lambda x: lax.slice_in_dim(x, skipped, skipped + size, axis=dim), results)

    return by_device(stretches, of_stretch, parts, own, extended, first)


def _stretch(axis: masks.AxisWindow, size: int, number: int, sinks: int) -> _Stretch:
    """Of part `number`. Windows and stride groups of its queries end where those of the whole sequence do."""
    first, last = number * size, (number + 1) * size
    starts, ends = axis.bounds(np.arange(first, last))
    group = axis.stride * axis.dilation
    start = min(first, int(starts.min())) // group * group
    start = 0 if start < sinks else start  # a sink is in the stretch or before it, not both
    end = min(axis.length, max(last + group - axis.dilation, int(ends.max())))
    return _Stretch(first - start, end - last, start > 0)


def _reference(
    query: Array,
    key: Array,
    value: Array,
    segment_ids: Array | None,
    sink_logits: Array | None = None,
    *,
    sinks: int,
    scale: Any,
    softcap: float | None = None,
    **settings: Any,
) -> tuple[Array, Array]:
    batch, *space, _, _ = query.shape
    mask = masks.neighborhood(space, **settings)
    if sinks:
        causal = [axis for axis, is_causal in enumerate(settings["is_causal"]) if is_causal]
        mask = mask | functools.reduce(
            operator.and_, map(masks.causal, causal), masks.first_keys(sinks, axis=causal[0])
        )
    visible = masks.dense_mask(mask, space)[None, None]
    if segment_ids is not None:
        ids = segment_ids.reshape(batch, -1)
        visible = visible & (ids[:, None, :, None] == ids[:, None, None, :])
    flat = (x.reshape(batch, -1, *x.shape[-2:]) for x in (query, key, value))
    out, lse = reference_attention(*flat, visible=visible, scale=scale, softcap=softcap, sink_logits=sink_logits)
    return out.reshape(batch, *space, *out.shape[-2:]), lse.reshape(batch, *space, -1)


def _xla(
    query: Array,
    key: Array,
    value: Array,
    segment_ids: Array | None,
    sink_logits: Array | None = None,
    **settings: Any,
) -> tuple[Array, Array]:
    return with_sink_logits(*_in_tiles(query, key, value, segment_ids, **settings), sink_logits)


def _tile_axis(axis: masks.AxisWindow, rank: int) -> Tiles:
    group_length = axis.group_length(0)
    # Half the window balances the box's overhang against small matrix products; a multiple of the stride lets a
    # stride group, which shares one window, stay in one tile.
    smallest, largest = _TILE_RANGE[rank]
    window = sum(axis.window) + 1 if isinstance(axis.window, tuple) else axis.window
    size = min(max(window // 2, smallest), largest, group_length)
    size = -(-group_length // -(-group_length // size))  # tiles of equal size
    size = min(-(-size // axis.stride) * axis.stride, group_length)
    in_group = np.arange(-(-group_length // size)) * size
    residue = np.repeat(np.arange(axis.dilation), len(in_group))
    query = np.tile(in_group, axis.dilation)
    length = axis.group_length(residue)
    start, _ = axis.group_bounds(np.minimum(query, length - 1), length)
    _, end = axis.group_bounds(np.minimum(query + size - 1, length - 1), length)
    box = int(np.max(end - start))
    return Tiles(size, box, axis.dilation, group_length, length, residue, query, np.minimum(start, group_length - box))


class _Part(NamedTuple):
    """One tile: query [B, K, G, tile, H], ids [B, tile], and per axis, int32 [rank], the length of the tile's residue
    group, the numbers of its first query and of its box's first key in the group, and where the box begins on the
    reordered axis."""

    query: Array
    ids: Array | None
    length: Array
    first_query: Array
    first_key: Array
    box_start: Array


class _Keys(NamedTuple):
    """[B, K, *space, H], [B, K, *space, V] and ids [B, *space], or of sinks with one axis in place of space."""

    key: Array
    value: Array
    ids: Array | None


@spoiling
def _in_tiles(
    query: Array,
    key: Array,
    value: Array,
    segment_ids: Array | None,
    *,
    sinks: int,
    scale: Any,
    softcap: float | None = None,
    **settings: Any,
) -> tuple[Array, Array]:
    batch, *space, heads, _ = query.shape
    dtype = accumulator_dtype(query, key, value)
    axes = masks.axis_windows(space, **settings)
    tiles = [_tile_axis(axis, len(space)) for axis in axes]
    keys, values = (jnp.moveaxis(x, -2, 1) for x in (key, value))
    first = None
    if sinks:
        axis = settings["is_causal"].index(True)

        def of_sinks(x: Array, before: int) -> Array:
            """x [.., *space, ..], whose space axes begin at `before`, with one axis of the sinks for them."""
            x = lax.slice_in_dim(x, 0, min(sinks, space[axis]), axis=before + axis)
            return x.reshape(*x.shape[:before], -1, *x.shape[before + len(space) :])

        ids = None if segment_ids is None else of_sinks(segment_ids, 1)
        first = _Keys(of_sinks(keys, 2), of_sinks(values, 2), ids)
    reordered = _Keys(
        group_residues(keys, tiles, first=2),
        group_residues(values, tiles, first=2),
        None if segment_ids is None else group_residues(segment_ids, tiles, first=1),
    )
    parts = _parts(query, segment_ids, key.shape[-2], tiles)

    def attend(part: _Part) -> tuple[Array, Array]:
        out, lse = _attend(part, reordered, first, sinks, axes, tiles, scale, softcap, dtype)
        return out.astype(query.dtype), lse

    # Logits are recomputed in the backward: what is kept for it is linear in the number of positions.
    sequences = 1 if jax.export.is_symbolic_dim(batch) else batch
    logit_bytes = sequences * heads * math.prod(t.size * t.box for t in tiles) * jnp.dtype(dtype).itemsize
    count = len(parts.box_start)
    most = min(max(1, _GROUP_BYTES // logit_bytes), count)
    # Groups of equal size, if one fits, spare the compilation of a smaller last one.
    together = max((n for n in range(-(-most // 2), most + 1) if count % n == 0), default=most)
    out, lse = lax.map(jax.checkpoint(attend, prevent_cse=False), parts, batch_size=together)

    out = join_tiles(jnp.moveaxis(out, 4, 2), tiles, space).reshape(batch, *space, heads, value.shape[-1])
    return out, join_tiles(jnp.moveaxis(lse, 4, 2), tiles, space).reshape(batch, *space, heads)


def _parts(query: Array, segment_ids: Array | None, key_heads: int, tiles: list[Tiles]) -> _Part:
    """All tiles, in front of every array."""
    batch, *space, heads, head_dim = query.shape
    query_tiles = cut_tiles(query.reshape(batch, *space, key_heads, heads // key_heads, head_dim), tiles)

    def table(field: str) -> np.ndarray:
        """A field of all axes, for the product of their tiles: int32 [tiles, rank]."""
        grids = np.meshgrid(*(getattr(t, field) for t in tiles), indexing="ij")
        return np.stack([grid.ravel() for grid in grids], axis=-1).astype(np.int32)

    length, residue, first_query, first_key = (table(name) for name in ("length", "residue", "query", "key"))
    box_start: Any = residue * np.array([t.group_length for t in tiles], np.int32) + first_key
    ids = None if segment_ids is None else cut_tiles(segment_ids, tiles)
    return _Part(jnp.moveaxis(query_tiles, 2, 4), ids, *map(jnp.asarray, (length, first_query, first_key, box_start)))


def _attend(
    part: _Part,
    keys: _Keys,
    first: _Keys | None,
    sinks: int,
    axes: tuple[masks.AxisWindow, ...],
    tiles: list[Tiles],
    scale: Any,
    softcap: float | None,
    dtype: Any,
) -> tuple[Array, Array]:
    """One tile to its box of keys and to the sinks: out [B, K, G, tile, V] and lse [B, K, G, tile]."""
    box = tuple(t.box for t in tiles)

    def take_box(x: Array, first: int) -> Array:
        """The box of x [.., *space, ..], whose space axes begin at `first`, flattened to one axis."""
        start: list[Any] = [np.int32(0)] * x.ndim  # of one dtype with box_start, also under jax_enable_x64
        rest = first + len(box)
        start[first:rest] = list(part.box_start)
        sizes = (*x.shape[:first], *box, *x.shape[rest:])
        return lax.dynamic_slice(x, start, sizes).reshape(*x.shape[:first], -1, *x.shape[rest:])

    visible = _sees(part, axes, tiles)
    key, value = take_box(keys.key, 2), take_box(keys.value, 2)
    ids = None if keys.ids is None else take_box(keys.ids, 1)
    if first is not None:
        key, value = jnp.concatenate([first.key, key], axis=2), jnp.concatenate([first.value, value], axis=2)
        visible = jnp.concatenate([_sees_sinks(part, sinks, axes, tiles), visible], axis=1)
        ids = None if ids is None or first.ids is None else jnp.concatenate([first.ids, ids], axis=1)
    if part.ids is not None and ids is not None:
        visible = visible[None, None, None] & (part.ids[:, :, None] == ids[:, None, :])[:, None, None]
    query, key = scaled_for_logits(part.query, key, scale, dtype)
    logits = softcapped(jnp.einsum("BKGTH,BKSH->BKGTS", query, key), softcap)
    numerators, denominator, lse = softmax_parts(logits, visible)
    out = jnp.einsum("BKGTS,BKSV->BKGTV", numerators, value.astype(dtype), preferred_element_type=dtype)
    return out / denominator, lse


def _sees(part: _Part, axes: tuple[masks.AxisWindow, ...], tiles: list[Tiles]) -> Array:
    """bool [tile, box]."""
    keys = [part.first_key[a] + jnp.arange(t.box) for a, t in enumerate(tiles)]
    return _on_all_axes((start <= key) & (key < end) for _, start, end, key in _bounds(part, axes, tiles, keys))


def _sees_sinks(part: _Part, sinks: int, axes: tuple[masks.AxisWindow, ...], tiles: list[Tiles]) -> Array:
    """bool [tile, sinks]. A sink inside the window is counted there. No axis is dilated."""
    which = [axis.is_causal for axis in axes].index(True)
    keys = [jnp.arange(min(axis.length, sinks) if a == which else axis.length) for a, axis in enumerate(axes)]
    in_window, may_see = [], []
    for axis, (query, start, end, key) in zip(axes, _bounds(part, axes, tiles, keys)):
        in_window.append((start <= key) & (key < end))
        may_see.append((key <= query) | (not axis.is_causal))
    return _on_all_axes(may_see) & ~_on_all_axes(in_window)


def _bounds(
    part: _Part, axes: tuple[masks.AxisWindow, ...], tiles: list[Tiles], keys: list[Array]
) -> Iterator[tuple[Array, Array, Array, Array]]:
    """Per axis: a tile's queries, where their windows start and end, [tile, 1] each, and the keys as [1, keys]."""
    for a, (axis, t, key) in enumerate(zip(axes, tiles, keys, strict=True)):
        # Queries in the padding copy the group's last one; they are dropped afterwards.
        query = jnp.minimum(part.first_query[a] + jnp.arange(t.size), part.length[a] - 1)[:, None]
        yield query, *axis.group_bounds(query, part.length[a]), key[None]


def _on_all_axes(per_axis: Iterable[Array]) -> Array:
    """bool [queries, keys] of each axis -> of all queries and keys, in row-major order."""
    whole = jnp.ones((1, 1), bool)
    for seen in per_axis:
        both = whole[:, None, :, None] & seen[None, :, None, :]
        whole = both.reshape(whole.shape[0] * seen.shape[0], -1)
    return whole


# All take (query, key, value, segment_ids, sink_logits) and the options of _in_tiles, settings per axis as tuples; all
# give (out, lse).
IMPLEMENTATIONS: Implementations = {"reference": _reference, "xla": _xla, **kernels.KERNELS}


class LocalCache(NamedTuple):
    """The keys and values that later tokens can see: key [B, sinks + window, K, H], value [B, sinks + window, K, V].

    Token p lies in slot sinks + p mod window until it is overwritten, and the first `sinks` tokens in slots of their
    own too. position: int32 [], the number of tokens so far, or [B], of each row.
    """

    key: Array
    value: Array
    position: Array


def init_local_cache(
    batch: int,
    num_key_heads: int,
    head_dim: int,
    *,
    window: int,
    sinks: int = 0,
    value_dim: int | None = None,
    dtype: Any = jnp.float32,
) -> LocalCache:
    """An empty cache for causal decoding, of any number of tokens. value_dim=None means head_dim."""
    slots = check_int("sinks", sinks, least=0) + check_int("window", window, least=1)
    value_dim, dtype = head_dim if value_dim is None else value_dim, check_dtype("dtype", dtype)
    batch, num_key_heads, head_dim, value_dim = check_sizes(
        batch=batch, num_key_heads=num_key_heads, head_dim=head_dim, value_dim=value_dim
    )
    shape = (batch, slots, num_key_heads)
    return LocalCache(
        key=jnp.zeros((*shape, head_dim), dtype),
        value=jnp.zeros((*shape, value_dim), dtype),
        position=jnp.zeros((), jnp.int32),
    )


@primitive(like="cache")
def prefill_local_cache(
    cache: LocalCache, key: Array, value: Array, *, window: int, sinks: int = 0, lengths: Array | None = None
) -> LocalCache:
    """The cache after a prompt: what local_step leaves of it, token by token.

    Args:
      cache: from init_local_cache with the same window and sinks.
      key: [B, P, K, H], value: [B, P, K, V]. Attention over the prompt is local_attention(..., is_causal=True).
      lengths: integers [B], 0 to P: the row's tokens, padding after them. None: P in all rows.
    """
    check_type("cache", cache, LocalCache, "init_local_cache")
    lengths = check_prompt(key, value, cache.key, cache.value, lengths)
    window, sinks = _check_slots(cache, window, sinks)
    count = counted(key, lengths)
    index = jnp.concatenate([newest(jnp.minimum(by_row(count), sinks), sinks), newest(by_row(count), window)], axis=1)
    keys, values = (tokens_at(x, index).astype(old.dtype) for x, old in ((key, cache.key), (value, cache.value)))
    return LocalCache(keys, values, count)


def _check_slots(cache: LocalCache, window: Any, sinks: Any) -> tuple[int, int]:
    window, sinks = check_int("window", window, least=1), check_int("sinks", sinks, least=0)
    slots = cache.key.shape[1]
    require(window + sinks == slots, "window", f"{window} + {sinks} sinks", f"the cache was made for {slots} together")
    return window, sinks


@primitive("B*N.", like="cache")
def local_step(
    cache: LocalCache,
    query: Array,
    key: Array,
    value: Array,
    *,
    window: int,
    sinks: int = 0,
    stride: int = 1,
    scale: float | None = None,
    softcap: float | None = None,
    sink_logits: Array | None = None,
    implementation: str | None = None,
) -> tuple[Array, LocalCache]:
    """The next tokens of causal local attention: their rows of local_attention(..., is_causal=True).

    With stride > 1 it equals edge="clip", and edge="shift" in all stride groups but an incomplete last one, whose
    leader depends on where the sequence ends.

    Args:
      cache: from init_local_cache with the same window and sinks.
      query, key, value: the tokens', [B, T, N, H], [B, T, K, H], [B, T, K, V]; T is 1, or more where they are known
        at once, as parts of a prompt are, or a draft to be verified.
      softcap, sink_logits: as in local_attention.
      implementation: "xla", "pallas_tpu" (T up to 16), "pallas_gpu" (T = 1, neither of these two) or None.

    Returns:
      (out [B, T, N, V], the cache with the tokens added).

    Complexity: O(T (window + sinks + T)) time. Several tokens copy the cache, as the first of them see what the last
    ones overwrite.
    """
    check_type("cache", cache, LocalCache, "init_local_cache")
    check_cached_steps(query, key, value, cache.key, cache.value)
    window, sinks = _check_slots(cache, window, sinks)
    stride = check_int("stride", stride)
    require(1 <= stride <= window, "stride", stride, f"must be from 1 to the window, {window}")
    check_position("cache.position", cache.position, query.shape[0])
    put_in = _with_token if query.shape[1] == 1 else _with_tokens
    after, keys, values, visible, used = put_in(cache, key, value, window, sinks, stride)
    out = attend_to_cache(
        "local_step",
        query,
        keys,
        values,
        visible=visible,
        used=used,
        scale=default_scale(scale, query.shape[-1]),
        softcap=softcap,
        sink_logits=sink_logits,
        implementation=implementation,
    )
    return out, after


def _first_seen(now: Array, window: int, stride: int) -> Array:
    # edge="clip": a leader past the end of the sequence, which is not known here.
    return masks.window_bounds(now, now + 1, window=window, stride=stride, is_causal=True, edge="clip")[0]


def _with_token(
    cache: LocalCache, key: Array, value: Array, window: int, sinks: int, stride: int
) -> tuple[LocalCache, Array, Array, Array, Array]:
    """The cache with a token's key and value [B, 1, K, H|V], the keys and values to attend to, which are its own, which
    of them the token sees, bool [B or 1, 1, S], and how many slots are in use."""
    position = cache.position
    slot = sinks + position % window

    def store(old: Array, new: Array) -> Array:
        stored = put(old, new, slot)
        return stored if sinks == 0 else put(stored, new, jnp.where(position < sinks, position, slot))

    keys, values = store(cache.key, key), store(cache.value, value)
    now = by_row(position)
    start = _first_seen(now, window, stride)
    visible = jnp.concatenate([jnp.arange(sinks)[None] < start, newest(now + 1, window) >= start], axis=1)
    after = LocalCache(keys, values, position + 1)
    return after, keys, values, visible[:, None], sinks + jnp.minimum(position + 1, window)


def _with_tokens(
    cache: LocalCache, key: Array, value: Array, window: int, sinks: int, stride: int
) -> tuple[LocalCache, Array, Array, Array, Array]:
    """The same of tokens [B, T, K, H|V], which attend to the cache before them with themselves behind it."""
    tokens, position = key.shape[1], cache.position
    before = by_row(position)
    now = before + jnp.arange(tokens)[None]
    start = _first_seen(now, window, stride)[..., None]  # [B or 1, T, 1]
    of_sinks, of_window = jnp.arange(sinks)[None], newest(before, window)
    own = now[:, None]
    parts = [
        of_sinks[:, None] < jnp.minimum(start, before[..., None]),
        of_window[:, None] >= start,
        (own <= now[..., None]) & ((own >= start) | (own < sinks)),
    ]
    visible = jnp.concatenate([jnp.broadcast_to(x, (*now.shape, x.shape[-1])) for x in parts], axis=2)
    # Of each slot, which of the tokens it holds now; none of them if it is negative, or past the last.
    index = jnp.concatenate([of_sinks - before, newest(before + tokens, window) - before], axis=1)
    is_new = ((index >= 0) & (index < tokens))[..., None, None]
    rows = jnp.minimum(index, tokens - 1)

    def store(old: Array, new: Array) -> Array:
        return jnp.where(is_new, tokens_at(new.astype(old.dtype), rows), old)

    after = LocalCache(store(cache.key, key), store(cache.value, value), position + tokens)
    keys, values = (
        jnp.concatenate([old, new.astype(old.dtype)], axis=1) for old, new in ((cache.key, key), (cache.value, value))
    )
    return after, keys, values, visible, jnp.full_like(position, keys.shape[1])
