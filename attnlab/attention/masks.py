"""Who sees whom, as index arithmetic: predicates on (query, key) coordinates, joined with &, | and ~.

One definition of the neighbourhood window, `window_bounds`, serves every form: the dense mask of the references
(`dense_mask`), the tiles that a kernel visits (`block_map`), the pictures (`draw`), and the blocked forms, which
evaluate it on traced indices. All of it takes Python ints, numpy and jax arrays.

Per axis, with dilation d, a coordinate c belongs to the residue group c mod d and has the index c div d in it. A query
sees keys of its own group alone; `window_bounds` works inside a group, `AxisWindow` on token coordinates.

    causal = Mask(lambda query, key: key[0] <= query[0])
    window = neighborhood((1024,), window=128, is_causal=True)
    dense_mask(window | (causal & first_keys(4)), (1024,))

Window arithmetic: NATTEN (Hassani et al. 2023, 2024), with the strides of Generalized Neighborhood Attention (2025).
"""

import contextlib
import dataclasses
import functools
import math
import operator
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal, NamedTuple, get_args

import jax
import jax.numpy as jnp
import numpy as np

from attnlab.attention._shared.checks import (
    check_array,
    check_block,
    check_choice,
    check_float,
    check_int,
    check_ints,
    kind_text,
    per_axis,
    require,
    shape_text,
    shown,
)

# Pairs of tokens of which a block map is made in numpy, which compiles nothing.
_MOST_IN_NUMPY = 2**24
# What a mask raises that reads numpy's arrays by traced indices.
_NEEDS_NUMPY = (jax.errors.TracerArrayConversionError, jax.errors.TracerBoolConversionError)
Edge = Literal["shift", "clip"]
# One integer (array) for each space axis.
Coordinates = tuple[Any, ...]


def _minimum(a: Any, b: Any) -> Any:
    return (jnp if isinstance(a, jax.Array) or isinstance(b, jax.Array) else np).minimum(a, b)


def _maximum(a: Any, b: Any) -> Any:
    return (jnp if isinstance(a, jax.Array) or isinstance(b, jax.Array) else np).maximum(a, b)


def window_bounds(
    query: Any,
    length: Any,
    *,
    window: int | tuple[int, int],
    stride: int = 1,
    is_causal: bool = False,
    edge: Edge = "shift",
) -> tuple[Any, Any]:
    """The keys that a query sees on one axis: start <= key < end, in the coordinates of its residue group.

    `stride` consecutive queries share the window of their leader.

        not causal   leader = min((query div stride) stride + stride div 2, length - 1)
                     window div 2 keys before it (an even window reaches one further left), window keys in all;
                     at a border the window moves inward
        causal       leader = min((query div stride) stride + stride - 1, length - 1)
                     keys with leader - window < key <= query
        edge="clip"  the window never moves: neither the leader nor the window follows the border, which cuts it
        (l, r)       as the window: l keys before the leader and r after it; not causal, and with edge="clip"

    Both bounds grow with the query. Needs window <= length and stride <= window, so that a query sees itself.
    """
    group = query // stride * stride
    if is_causal:
        assert not isinstance(window, tuple), "a pair is not causal"
        leader = group + (stride - 1)
        if edge == "shift":
            leader = _minimum(leader, length - 1)
        return _maximum(leader - (window - 1), 0), query + 1
    left, right = window if isinstance(window, tuple) else (window // 2, window - 1 - window // 2)
    leader = group + stride // 2
    if edge == "clip":
        return _maximum(leader - left, 0), _minimum(leader + (right + 1), length)
    centre = _minimum(_maximum(_minimum(leader, length - 1), left), length - 1 - right)
    return centre - left, centre + (right + 1)


@dataclasses.dataclass(frozen=True)
class AxisWindow:
    """The neighbourhood on one space axis, in token coordinates. Hashable; all fields are static."""

    length: int
    window: int | tuple[int, int]
    stride: int = 1
    dilation: int = 1
    is_causal: bool = False
    edge: Edge = "shift"

    def group_length(self, residue: Any) -> Any:
        """Number of tokens whose coordinate is `residue` modulo the dilation."""
        return (self.length - residue + self.dilation - 1) // self.dilation

    def group_bounds(self, query: Any, length: Any) -> tuple[Any, Any]:
        """window_bounds with this axis' settings, in a residue group of this length."""
        return window_bounds(
            query, length, window=self.window, stride=self.stride, is_causal=self.is_causal, edge=self.edge
        )

    def bounds(self, query: Any) -> tuple[Any, Any]:
        """A query sees the keys start <= key < end of its own residue class, key = query modulo dilation."""
        residue = query % self.dilation
        start, end = self.group_bounds(query // self.dilation, self.group_length(residue))
        return start * self.dilation + residue, (end - 1) * self.dilation + residue + 1

    def sees(self, query: Any, key: Any) -> Any:
        start, end = self.bounds(query)
        return (start <= key) & (key < end) & ((key - query) % self.dilation == 0)


@dataclasses.dataclass(frozen=True)
class Mask:
    """A predicate on coordinates: sees(query, key) is True where the query attends to the key.

    query, key: tuples with one integer (array) for each space axis; arrays broadcast against each other.
    keys: of how many keys, on the first axis, it has something to say, such as a label; None: of any number.
    """

    sees: Callable[[Coordinates, Coordinates], Any]
    keys: int | None = None

    def __and__(self, other: "Mask") -> "Mask":
        return Mask(lambda query, key: self.sees(query, key) & other.sees(query, key), _fewer(self.keys, other.keys))

    def __or__(self, other: "Mask") -> "Mask":
        return Mask(lambda query, key: self.sees(query, key) | other.sees(query, key), _fewer(self.keys, other.keys))

    def __invert__(self) -> "Mask":
        return Mask(lambda query, key: self.sees(query, key) ^ True, self.keys)  # ~ of Python's True is -2


def _fewer(*counts: int | None) -> int | None:
    return min((count for count in counts if count is not None), default=None)


def check_mask(mask: Any, key_shape: Sequence[int]) -> None:
    """Requires a Mask of as many axes as the keys have, which has something to say of all of them."""
    axes = f"{len(key_shape)} axes" if len(key_shape) > 1 else "one axis"
    if not isinstance(mask, Mask):
        raise TypeError(f"mask: got {kind_text(mask)}; need a masks.Mask of {axes}")
    if 0 in key_shape:
        return
    knows = mask.keys is None or mask.keys >= key_shape[0]
    require(knows, "mask", f"one with labels of {mask.keys} keys", f"need labels of all {key_shape[0]}")
    first = tuple(np.zeros((1, 1), np.int32) for _ in key_shape)
    try:
        mask.sees(first, first)
    except (IndexError, ValueError) as error:
        given = f"one that raises {type(error).__name__} for tokens of {axes}"
        raise ValueError(f"mask: got {given}; need a masks.Mask of {axes}") from error
    except (AttributeError, TypeError):
        pass  # one of the caller's own may take JAX's arrays alone, and says so where it is used


def axis_windows(
    shape: Sequence[int],
    *,
    window: Sequence[Any],
    stride: Sequence[int],
    dilation: Sequence[int],
    is_causal: Sequence[bool],
    edge: Edge,
) -> tuple[AxisWindow, ...]:
    """One AxisWindow for each space axis, from settings per axis."""
    return tuple(
        AxisWindow(*settings, edge=edge) for settings in zip(shape, window, stride, dilation, is_causal, strict=True)
    )


def neighborhood(
    shape: Sequence[int],
    window: int | Sequence[int],
    *,
    stride: int | Sequence[int] = 1,
    dilation: int | Sequence[int] = 1,
    is_causal: bool | Sequence[bool] = False,
    edge: Edge = "shift",
) -> Mask:
    """The mask of local_attention and dilated_attention on a space of this shape; the axes combine by AND."""
    shape, rank = _shape("shape", shape), len(shape)
    windows = tuple(window) if isinstance(window, (tuple, list)) else (window,) * rank
    require(len(windows) == rank, "window", shown(window), f"need one value or {rank}, one per space axis")
    strides, dilations = per_axis("stride", stride, rank), per_axis("dilation", dilation, rank)
    for length, size, s, d in zip(shape, windows, strides, dilations):
        require(d >= 1, "dilation", shown(dilation), "need at least 1")
        require(s >= 1, "stride", shown(stride), "need at least 1")
        if isinstance(size, (tuple, list)):  # a pair: what lies before and after the leader
            check_ints("window", size, least=0, layout=("left", "right"))
            continue
        check_int("window", size, least=1, of=window)
        fits = f"at most {length // d} fits the shape {shape} with dilation {d}"
        require(size * d <= length, "window", shown(window), fits)
        require(s <= size, "stride", shown(stride), f"need 1 to the window, {size}")
    check_choice("edge", edge, get_args(Edge))
    axes = axis_windows(
        shape,
        window=windows,
        stride=strides,
        dilation=dilations,
        is_causal=per_axis("is_causal", is_causal, rank, bool),
        edge=edge,
    )
    return Mask(
        lambda query, key: functools.reduce(
            operator.and_, (axis.sees(q, k) for axis, q, k in zip(axes, query, key, strict=True))
        )
    )


def causal(axis: int = 0) -> Mask:
    """Keys at or before the query on one axis."""
    axis = check_int("axis", axis)
    return Mask(lambda query, key: key[axis] <= query[axis])


def window(left: int, right: int, *, axis: int = 0) -> Mask:
    """Keys from `left` before the query to `right` after it on one axis, the query's own among them."""
    left, right, axis = check_int("left", left, least=0), check_int("right", right, least=0), check_int("axis", axis)

    def sees(query: Coordinates, key: Coordinates) -> Any:
        back = query[axis] - key[axis]
        return (back <= left) & (back >= -right)

    return Mask(sees)


def first_keys(count: int, *, axis: int = 0) -> Mask:
    """The first `count` keys on one axis, for every query."""
    count, axis = check_int("count", count, least=0), check_int("axis", axis)
    return Mask(lambda query, key: (key[axis] < count) & (query[axis] >= 0))


def blocks(size: int, *, shift: int = 0, axis: int = 0) -> Mask:
    """Keys of the query's own block on one axis; the first block has `shift` tokens, and nothing wraps around.

    On every axis, without and with a shift in alternate layers: Swin Transformer (Liu et al. 2021).
    """
    size, shift, axis = check_block("size", size), check_int("shift", shift), check_int("axis", axis)
    return Mask(lambda query, key: (query[axis] - shift) // size == (key[axis] - shift) // size)


def block_causal(size: int, *, prefix: int = 0) -> Mask:
    """Keys of the query's own block and of earlier ones; the first `prefix` tokens are a block of their own.

    (Next-block prediction, Ren et al. 2025; a prompt as the prefix.)
    """
    size, prefix = check_block("size", size), check_int("prefix", prefix, least=0)

    def number(token: Any) -> Any:
        return _maximum(token - prefix, -1) // size

    return Mask(lambda query, key: number(key[0]) <= number(query[0]))


def block_diffusion(length: int, size: int) -> Mask:
    """Of `length` noisy tokens, and then the same tokens clean: noisy ones see their own block and, clean, the blocks
    before it; clean ones see clean blocks up to their own (Block Diffusion, Arriola et al. 2025)."""
    length, size = check_block("length", length), check_block("size", size)

    def sees(query: Coordinates, key: Coordinates) -> Any:
        own, other = (x % length // size for x in (query[0], key[0]))
        are_alike = (query[0] < length) == (key[0] < length)
        return (are_alike & (own == other)) | ((key[0] >= length) & (other < own))

    return Mask(sees)


def kinds(labels: Any, by_kind: Mapping[int, Mask]) -> Mask:
    """Every key by the mask of its kind; keys of other kinds are not seen.

    labels: int [S], a constant: the kind of each key of a sequence, or of a longer one.
    by_kind: at least one.
    """
    if isinstance(labels, jax.core.Tracer):
        raise TypeError("labels: got a traced array; need one that is known")
    labels = np.asarray(labels)
    check_array("labels", labels, (None,), "[keys]")
    if not np.issubdtype(labels.dtype, np.integer):
        raise TypeError(f"labels: got {shape_text(labels)}; need integers")
    if not isinstance(by_kind, Mapping) or not all(isinstance(mask, Mask) for mask in by_kind.values()):
        raise TypeError(f"by_kind: got {shown(by_kind)}; need a dict of masks.Mask by kind")
    require(len(by_kind) > 0, "by_kind", shown(by_kind), "need at least one kind")

    def sees(query: Coordinates, key: Coordinates) -> Any:
        kind = (jnp.asarray(labels) if isinstance(key[0], jax.Array) else labels)[key[0]]
        return functools.reduce(
            operator.or_, ((kind == name) & mask.sees(query, key) for name, mask in by_kind.items())
        )

    return Mask(sees, _fewer(len(labels), *(mask.keys for mask in by_kind.values())))


def aligned(shape: Sequence[int], radius: int, *, offset: int) -> Mask:
    """Keys of a condition image within `radius`, along every axis, of the place that the query has in its own image.

    The tokens are an image of this shape, in row-major order, and from `offset` on its condition, of the same shape.
    Queries of both see the condition; what else they see, other masks say.
    """
    shape, radius = _shape("shape", shape), check_int("radius", radius, least=0)
    offset = check_int("offset", offset, least=0)
    tokens = math.prod(shape)

    def sees(query: Coordinates, key: Coordinates) -> Any:
        near = (key[0] >= offset) & (key[0] < offset + tokens)
        query_place, key_place = (t - offset * (t >= offset) for t in (query[0], key[0]))
        for axis, length in enumerate(shape):
            later = math.prod(shape[axis + 1 :])
            near = near & (abs(query_place // later % length - key_place // later % length) <= radius)
        return near

    return Mask(sees)


def power_blocks(size: int) -> Mask:
    """Keys of the query's own block and of those 1, 2, 4, 8, ... blocks before it (PowerAttention, Chen et al. 2025).

    Published: causal() & (power_blocks(256) | a window | first_keys(n)).
    """
    size = check_block("size", size)

    def sees(query: Coordinates, key: Coordinates) -> Any:
        back = query[0] // size - key[0] // size
        return (back >= 0) & (back & (back - 1) == 0)

    return Mask(sees)


def radial(frame_tokens: int, *, decay_factor: float = 1.0, block: int = 128) -> Mask:
    """Radial attention over a video's tokens in raster order, frame after frame (Li et al. 2025). Not causal.

    The same and the next frames are seen whole, and frame 0 by all. Further off, with f frames between and n tokens per
    frame, a query sees the tokens within max(decay * decay_factor, block) of its own position in the frame, where
    decay = 2^(bits of n - bits of f); where decay < block, this in every floor(block / decay)-th frame alone.
    """
    frame_tokens, block = check_block("frame_tokens", frame_tokens), check_block("block", block)
    decay_factor = check_float("decay_factor", decay_factor, least=0)
    bits = frame_tokens.bit_length()

    def sees(query: Coordinates, key: Coordinates) -> Any:
        frames = abs(query[0] // frame_tokens - key[0] // frame_tokens)
        apart = _bit_length(frames)
        distance = abs(query[0] % frame_tokens - key[0] % frame_tokens)
        # In integers: decay = 2^(bits - apart) may be a fraction.
        near = (distance <= block) | (distance * (1 << apart) <= decay_factor * (1 << bits))
        every = _maximum(block * (1 << apart) >> bits, 1)
        # Floats divide four times as fast as integers take a remainder, and exactly where the quotient is whole (2^24).
        kept = every * (frames / every + 0.5).astype(every.dtype) == frames
        return (frames <= 1) | (near & kept) | (key[0] < frame_tokens)

    return Mask(sees)


def _bit_length(x: Any) -> Any:
    """Of integers from 0."""
    if isinstance(x, jax.Array):
        return jnp.iinfo(x.dtype).bits - jax.lax.clz(x)
    return np.frexp(x)[1]


def _coordinates(shape: Sequence[int], xp: Any) -> Coordinates:
    """Coordinates of all tokens in row-major order: a [prod(shape)] array for each axis."""
    index = xp.arange(math.prod(shape))
    return tuple(
        index // math.prod(shape[axis + 1 :]) % length  # row-major: later axes run faster
        for axis, length in enumerate(shape)
    )


def _shape(name: str, shape: Any) -> tuple[Any, ...]:
    """Tokens on each axis."""
    if not isinstance(shape, (tuple, list)):
        raise TypeError(f"{name}: got {shown(shape)}; need a tuple of ints")
    return tuple(size if jax.export.is_symbolic_dim(size) else check_int(name, size, least=0) for size in shape)


def _shapes(mask: Any, query_shape: Any, key_shape: Any) -> tuple[tuple[Any, ...], tuple[Any, ...]]:
    """Of queries and of keys, for which the mask is."""
    queries = _shape("query_shape", query_shape)
    keys = queries if key_shape is None else _shape("key_shape", key_shape)
    require(len(keys) == len(queries), "key_shape", shown(keys), f"need as many axes as query_shape, {queries}")
    check_mask(mask, keys)
    return queries, keys


def dense_mask(mask: Mask, query_shape: Sequence[int], key_shape: Sequence[int] | None = None) -> jax.Array:
    """bool [T, S], True where query t sees key s; tokens of a space are numbered in row-major order."""
    query_shape, key_shape = _shapes(mask, query_shape, key_shape)
    query = tuple(c[:, None] for c in _coordinates(query_shape, jnp))
    key = tuple(c[None, :] for c in _coordinates(key_shape, jnp))
    return mask.sees(query, key)


class BlockMap(NamedTuple):
    """bool [query tiles, key tiles], tiles in row-major order over the grid of tiles.

    visited: some query of the tile sees some key of the other. full: every query sees every key, so that no element
    mask is needed; tokens past the end of an axis, in a last tile that is not full, do not count.
    """

    visited: np.ndarray
    full: np.ndarray


def block_map(
    mask: Mask,
    query_shape: Sequence[int],
    query_tile: Sequence[int],
    key_tile: Sequence[int],
    key_shape: Sequence[int] | None = None,
) -> BlockMap:
    """Which key tiles each query tile visits, exactly. O(T S) time, O(tile S) memory.

    Of many pairs the mask is asked in a compiled program (of 65,536 x 65,536 that takes a second or two of two cores),
    unless it reads what only numpy can.
    """
    query_shape, key_shape = _shapes(mask, query_shape, key_shape)
    for name, tile in (("query_tile", query_tile), ("key_tile", key_tile)):
        check_ints(name, tile, layout=("tokens",) * len(query_shape))
    for name, shape in (("query_shape", query_shape), ("key_shape", key_shape)):
        require(0 not in shape, name, shown(shape), "need at least one token")

    def tile_of_token(shape: Sequence[int], tile: Sequence[int]) -> tuple[np.ndarray, int]:
        grid = tuple(-(-length // size) for length, size in zip(shape, tile, strict=True))
        tiles = tuple(c // size for c, size in zip(_coordinates(shape, np), tile, strict=True))
        return np.ravel_multi_index(tiles, grid), math.prod(grid)

    query_tiles, _ = tile_of_token(query_shape, query_tile)
    key_tiles, num_key_tiles = tile_of_token(key_shape, key_tile)
    keys_in_tile = np.bincount(key_tiles, minlength=num_key_tiles)
    counts = np.bincount(query_tiles)
    of_tile = np.split(np.argsort(query_tiles, kind="stable"), np.cumsum(counts)[:-1])
    # The tokens of every tile; the last one of a smaller tile once more, which changes nothing.
    tokens = np.stack([np.pad(numbers, (0, counts.max() - len(numbers)), mode="edge") for numbers in of_tile])
    queries, keys = (_coordinates(shape, np) for shape in (query_shape, key_shape))
    some, every = _seen_by_tile(mask, [c[tokens] for c in queries], [c[None, :] for c in keys])

    def tiles_of(seen: np.ndarray) -> np.ndarray:
        return np.stack([np.bincount(key_tiles, weights=row, minlength=num_key_tiles) for row in seen])

    visited, full = tiles_of(some) > 0, tiles_of(every) == keys_in_tile[None]
    return BlockMap(visited, full)


def _seen_by_tile(mask: Mask, queries: list[np.ndarray], key: list[np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
    """bool [tiles, S]: whether some query of a tile sees the key, and whether every one does. queries: [tiles, n]."""

    def of_tile(query: Any) -> tuple[Any, Any]:
        sees = mask.sees(tuple(c[:, None] for c in query), tuple(key))
        return sees.any(0), sees.all(0)

    def compiled(queries: Any) -> Any:
        return jax.lax.map(lambda query: of_tile(query), queries)

    if queries[0].size * key[0].size > _MOST_IN_NUMPY:
        cpu = jax.local_devices(backend="cpu")[0]
        with jax.ensure_compile_time_eval(), jax.default_device(cpu), contextlib.suppress(*_NEEDS_NUMPY):
            key = [c.astype(np.int32) for c in key]
            return tuple(map(np.asarray, jax.jit(compiled)([c.astype(np.int32) for c in queries])))  # type: ignore
    some, every = zip(*(of_tile([c[row] for c in queries]) for row in range(len(queries[0]))))
    return np.stack(some), np.stack(every)


def draw(mask: Mask, shape: Sequence[int], query: Sequence[int] | None = None, axes: Any = None) -> Any:
    """Draws who sees whom with matplotlib and returns the axes drawn on.

    query=None: all queries (rows) against all keys (columns). query: the coordinates of one query of a 1-D or 2-D
    space; its keys are shown in place.
    """
    import matplotlib.pyplot as plt

    shape, _ = _shapes(mask, shape, None)
    axes = plt.subplots()[1] if axes is None else axes
    if query is None:
        axes.imshow(np.asarray(dense_mask(mask, shape)), cmap="Blues", vmin=0, vmax=1, interpolation="nearest")
        axes.set(xlabel="key", ylabel="query")
        return axes
    seen = np.asarray(mask.sees(tuple(query), _coordinates(shape, np))).reshape(shape)
    axes.imshow(np.atleast_2d(seen), cmap="Blues", vmin=0, vmax=1, interpolation="nearest")
    row, column = (0, *query)[-2:]
    axes.plot(column, row, marker="o", color="tab:red")
    axes.set(xlabel="x", ylabel="y" if len(shape) > 1 else "", title=f"keys seen by query {tuple(query)}")
    return axes
