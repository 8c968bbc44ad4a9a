"""Attention by chunks to the newest chunks and to a sink, into which chunks go as they leave the window.

The tokens come in chunks of C. With W chunks kept, the sink among them, queries of chunk c see

    the chunks max(1, c - W + 2), ..., c and the sink;  of chunk 0 themselves alone
    sink = (k, v) of chunk 0;  as chunk e >= 1 leaves, which is seen by c = e + W - 1 as the first:
    sink <- decay sink + (1 - decay) (k_e, v_e), token by token of the chunk

decay 1 is a sink that stays chunk 0. Papers: Reward Forcing (Lu et al. 2025); MotionStream (Shin et al. 2025), decay 1.

The sinks that all chunks see are a linear recurrence, a chunk at a time. They are put before the keys, so that
attention is block-sparse, every chunk with a list of its own sink and of its window.
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from attnlab.attention import masks
from attnlab.attention._cached import at, by_row, counted, newest, put, tokens_at
from attnlab.attention._dispatch.choice import Implementations, dispatch
from attnlab.attention._dispatch.exchange import Parts, first_positions, over_positions, states_before, with_halo
from attnlab.attention._dispatch.primitive import primitive
from attnlab.attention._shared.checks import (
    accumulator_dtype,
    check_bool,
    check_dtype,
    check_float,
    check_int,
    check_position,
    check_prompt,
    check_query_key_value,
    check_sizes,
    check_type,
    default_scale,
    require,
    shape_text,
)
from attnlab.attention._shared.softmax import reference_attention
from attnlab.attention.block_sparse import block_sparse_attention

Array = jax.Array


class _Window(NamedTuple):
    """Checked options. chunk: tokens in one. kept: chunks, the sink among them. is_causal: also inside a chunk."""

    chunk: int
    kept: int
    decay: float
    is_causal: bool = False

    @property
    def before(self) -> int:
        """Tokens before a chunk that it sees, or that have just left the window."""
        return (self.kept - 1) * self.chunk


@primitive("B*N.", "B*N")
def ema_sinks_attention(
    query: Array,
    key: Array,
    value: Array,
    *,
    chunk: int,
    chunks_kept: int,
    decay: float,
    is_causal: bool = False,
    scale: float | None = None,
    return_lse: bool = False,
    implementation: str | None = None,
) -> Any:
    """Attention to a window of chunks and to the moving average of those before it; the module's docstring has the
    formula.

    Args:
      query: [B, T, N, H], floating. key: [B, T, K, H], K divides N. value: [B, T, K, V].
      chunk: tokens in a chunk, from 1; the last one may be cut short.
      chunks_kept: chunks that are seen, the sink and the own one among them; at least 2.
      decay: 0 to 1, what stays of the sink when a chunk goes into it.
      is_causal: a query sees the keys of its own chunk up to its own. Else all of these, later ones too, as the papers
        have it, which generate a chunk at once.
      scale: factor on the logits; None means H ** -0.5.
      return_lse: return (out, lse).
      implementation: None, "reference" or "xla".

    Returns:
      out [B, T, N, V] in query's dtype; with return_lse also lse [B, T, N], float32 (float64 for float64 inputs),
      differentiable.

    Raises:
      ValueError, TypeError: naming the argument. Where devices share the tokens, chunk must divide those of each.

    Complexity, of "xla": O(T chunks_kept chunk (H + V)) time a head, forward and back; O(T) memory.
    """
    check_query_key_value(query, key, value)
    window = _check_window(chunk, chunks_kept, decay, is_causal)
    return_lse = check_bool("return_lse", return_lse)
    factor = default_scale(scale, query.shape[-1])

    def attend(window: _Window, *arrays: Array) -> tuple[Array, Array]:
        return dispatch("ema_sinks_attention", IMPLEMENTATIONS, implementation, *arrays, window=window, scale=factor)

    whole, parted = functools.partial(_whole, attend, window), functools.partial(_parted, attend, window)
    out, lse = over_positions(whole, parted, ("B*N.", "B*K.", "B*K."), ("B*N.", "B*N"), query, key, value)
    return (out, lse) if return_lse else out


def _check_window(chunk: Any, chunks_kept: Any, decay: Any, is_causal: Any = False) -> _Window:
    return _Window(
        check_int("chunk", chunk, least=1, most=2**31 - 1),
        check_int("chunks_kept", chunks_kept, least=2, most=2**31 - 1),
        check_float("decay", decay, least=0, most=1),
        check_bool("is_causal", is_causal),
    )


def _whole(attend: Any, window: _Window, query: Array, key: Array, value: Array) -> tuple[Array, Array]:
    # No chunk leaves a window of all.
    window = window._replace(kept=min(window.kept, max(-(-query.shape[1] // window.chunk), 2)))
    start = [x[:, : window.chunk] for x in (key, value)]
    short = window.chunk - start[0].shape[1]
    sink_key, sink_value = (jnp.pad(x, ((0, 0), (0, short), (0, 0), (0, 0))) for x in start)
    key, value = (jnp.pad(x, ((0, 0), (window.before, 0), (0, 0), (0, 0))) for x in (key, value))
    return attend(window, query, key, value, sink_key, sink_value, jnp.zeros((), jnp.int32))


# --- Over devices -----------------------------------------------------------------------------------------------------


class _Sink(NamedTuple):
    """What chunks one after the other make of a sink: decay times it, [B, C, 1], and key [B, C, K, H], value."""

    decay: Array
    key: Array
    value: Array


def _joined(earlier: _Sink, later: _Sink) -> _Sink:
    parts = (_scaled(later.decay[..., None], x) + y for x, y in zip(earlier[1:], later[1:]))
    return _Sink(earlier.decay * later.decay, *parts)


def _scaled(factor: Array, x: Array) -> Array:
    """factor x, in which 0 forgets what is not finite too."""
    return jnp.where(factor > 0, factor * x, 0)


def _parted(attend: Any, window: _Window, parts: Parts, query: Array, key: Array, value: Array) -> tuple[Array, Array]:
    """Each device's part: with the chunks before it, and the sink that those before these make."""
    length, dtype = query.shape[1], accumulator_dtype(query, key, value)
    allowed = f"must divide the {length} tokens that each of {parts.many} devices has"
    require(length % window.chunk == 0, "chunk", window.chunk, allowed)
    window = window._replace(kept=min(window.kept, max(parts.many * length // window.chunk, 2)))
    first = (parts.number() * (length // window.chunk)).astype(jnp.int32)
    start = first_positions((key, value), window.chunk, parts, 1)
    key, value = with_halo((key, value), window.before, 0, parts, 1)
    left = [_chunks(x[:, :length].astype(dtype), window.chunk) for x in (key, value)]
    leaves = _leaves(first, left[0].shape[0], window)
    ones = jnp.ones_like(left[0][0, :, :, :1, 0])
    made = [_sinks_in_turn(x, jnp.zeros_like(x[0]), leaves, window.decay)[-1] for x in left]
    of_part = _Sink(ones * window.decay ** leaves.sum().astype(dtype), *made)
    before, _ = states_before(_joined, _Sink(ones, *(x.astype(dtype) for x in start)), of_part, parts)
    return attend(window, query, key, value, before.key, before.value, first)


# --- Sinks ------------------------------------------------------------------------------------------------------------


def _chunks(x: Array, chunk: int) -> Array:
    """[B, T, ...] -> [chunks, B, C, ...], with zeros where the last one is cut short."""
    x = jnp.pad(x, [(0, 0), (0, -x.shape[1] % chunk)] + [(0, 0)] * (x.ndim - 2))
    return jnp.moveaxis(x.reshape(x.shape[0], -1, chunk, *x.shape[2:]), 1, 0)


def _leaves(first: Array, count: int, window: _Window) -> Array:
    """bool [count]: of the chunks from W - 1 before chunk `first` on, which go into the sink as their turn comes."""
    return first - (window.kept - 1) + jnp.arange(count) >= 1


def _folded(sink: Array, left: Array, decay: float) -> Array:
    """A sink into which a chunk goes. What does not count is not read: it may be not finite."""
    if decay in (0.0, 1.0):
        return sink if decay == 1 else left
    return decay * sink + (1 - decay) * left


def _sinks_in_turn(left: Array, sink: Array, leaves: Array, decay: float) -> Array:
    """The sink [B, C, ...] after each of the chunks [chunks, B, C, ...] has gone into it."""

    def step(sink: Array, now: tuple[Array, Array]) -> tuple[Array, Array]:
        left, leaves = now
        sink = jnp.where(leaves, _folded(sink, left, decay), sink)
        return sink, sink

    return lax.scan(step, sink, (left, leaves))[1]


# --- Forms ------------------------------------------------------------------------------------------------------------

# All take query [B, T, N, H]; key and value of W - 1 chunks before it, and its own; the sink [B, C, K, H|V] before the
# first of these chunks goes into it; and the number of the query's first chunk. They give (out, lse).


def _sinks_of(x: Array, sink: Array, leaves: Array, window: _Window) -> Array:
    """[B, chunks C, K, H|V], every chunk's sink."""
    chunks = len(leaves)
    left = _chunks(x[:, : chunks * window.chunk], window.chunk)[:chunks]
    sinks = _sinks_in_turn(left, sink.astype(x.dtype), leaves, window.decay)
    return jnp.moveaxis(sinks, 0, 1).reshape(x.shape[0], chunks * window.chunk, *x.shape[2:])


def _reference(
    query: Array,
    key: Array,
    value: Array,
    sink_key: Array,
    sink_value: Array,
    first: Array,
    *,
    window: _Window,
    scale: Any,
) -> tuple[Array, Array]:
    """Keys are the sinks of all chunks and then the tokens."""
    length, chunk, dtype = query.shape[1], window.chunk, accumulator_dtype(query, key, value)
    chunks = -(-length // chunk)

    def with_sinks(x: Array, sink: Array) -> Array:
        x = x.astype(dtype)
        sinks = _sinks_of(x, sink, _leaves(first, chunks, window), window)
        return jnp.concatenate([sinks, x], axis=1)

    token, place = jnp.arange(length)[:, None], jnp.arange(key.shape[1])[None] - window.before
    own, seen = first + token // chunk, first + place // chunk
    in_window = (seen <= own) & (seen >= jnp.where(own == 0, 0, jnp.maximum(1, own - window.kept + 2)))
    if window.is_causal:
        in_window = in_window & (place <= token)
    of_sinks = (token // chunk == jnp.arange(chunks * chunk)[None] // chunk) & (own >= 1)
    visible = jnp.concatenate([of_sinks, in_window], axis=1)[None, None]
    return reference_attention(
        query, with_sinks(key, sink_key), with_sinks(value, sink_value), visible=visible, scale=scale
    )


def _xla(
    query: Array,
    key: Array,
    value: Array,
    sink_key: Array,
    sink_value: Array,
    first: Array,
    *,
    window: _Window,
    scale: Any,
) -> tuple[Array, Array]:
    length, chunk, dtype = query.shape[1], window.chunk, accumulator_dtype(query, key, value)
    chunks = -(-length // chunk)

    def with_sinks(x: Array, sink: Array) -> Array:
        x = x.astype(dtype)
        sinks = _sinks_of(x, sink, _leaves(first, chunks, window), window)
        return jnp.concatenate([sinks, x[:, chunk:]], axis=1)  # the window begins a chunk later

    own = jnp.arange(chunks)[:, None]
    places = own + jnp.arange(window.kept - 1)[None]  # of the window's chunks, among the tokens'
    seen = first + places - (window.kept - 2)
    listed = jnp.where((seen >= 1) | ((seen == 0) & (first + own == 0)), chunks + places, -1)
    lists = jnp.concatenate([jnp.where(first + own >= 1, own, -1), listed], axis=1)
    up_to_own = masks.Mask(
        lambda query, key: key[0] - query[0] <= chunks * chunk + window.before - chunk  # sinks are before all tokens
    )
    return block_sparse_attention(
        query,
        with_sinks(key, sink_key),
        with_sinks(value, sink_value),
        lists[None, None].astype(jnp.int32),
        query_block=chunk,
        key_block=chunk,
        mask=up_to_own if window.is_causal and chunk > 1 else None,
        scale=scale,
        return_lse=True,
        implementation="xla",
    )


IMPLEMENTATIONS: Implementations = {"reference": _reference, "xla": _xla}


# --- Decoding ---------------------------------------------------------------------------------------------------------


class EmaSinksCache(NamedTuple):
    """W chunks of keys and values, key [B, W C, K, H] and value [B, W C, K, V]: the sink, and then the window.

    Token p of a chunk from 1 on lies in slot C + (p - C) mod ((W - 1) C) until it is overwritten. position: int32 [],
    the number of tokens so far, or [B], of each row.
    """

    key: Array
    value: Array
    position: Array


def init_ema_sinks_cache(
    batch: int,
    num_key_heads: int,
    head_dim: int,
    *,
    chunk: int,
    chunks_kept: int,
    value_dim: int | None = None,
    dtype: Any = jnp.float32,
) -> EmaSinksCache:
    """An empty cache, for any number of tokens. value_dim=None means head_dim.

    dtype: in a narrow one, a sink does not move by what is less than its rounding.
    """
    window = _check_window(chunk, chunks_kept, 1.0)
    value_dim, dtype = head_dim if value_dim is None else value_dim, check_dtype("dtype", dtype)
    sizes = {"batch": batch, "chunk": window.chunk * window.kept, "num_key_heads": num_key_heads}
    *shape, head_dim, value_dim = check_sizes(**sizes, head_dim=head_dim, value_dim=value_dim)
    return EmaSinksCache(
        key=jnp.zeros((*shape, head_dim), dtype),
        value=jnp.zeros((*shape, value_dim), dtype),
        position=jnp.zeros((), jnp.int32),
    )


def _check_cache(cache: Any, chunk: Any, chunks_kept: Any, decay: Any, is_causal: Any = False) -> _Window:
    check_type("cache", cache, EmaSinksCache, "init_ema_sinks_cache")
    window, slots = _check_window(chunk, chunks_kept, decay, is_causal), cache.key.shape[1]
    given = f"{window.chunk} in {window.kept} chunks"
    require(window.chunk * window.kept == slots, "chunk", given, f"the cache was made for {slots} tokens")
    return window


@primitive(like="cache")
def prefill_ema_sinks_cache(
    cache: EmaSinksCache,
    key: Array,
    value: Array,
    *,
    chunk: int,
    chunks_kept: int,
    decay: float,
    lengths: Array | None = None,
) -> EmaSinksCache:
    """The cache after a prompt: what ema_sinks_step leaves of it.

    Args:
      cache: an empty one, from init_ema_sinks_cache with the same chunk and chunks_kept.
      key: [B, P, K, H], value: [B, P, K, V]. Attention over the prompt is ema_sinks_attention.
      lengths: integers [B], 0 to P: the row's tokens, padding after them. None: P in all rows.
    """
    window = _check_cache(cache, chunk, chunks_kept, decay)
    lengths = check_prompt(key, value, cache.key, cache.value, lengths)
    count = counted(key, lengths)
    in_sink = newest(jnp.minimum(by_row(count), window.chunk), window.chunk)
    in_window = newest(by_row(count) - window.chunk, window.before)
    index = jnp.concatenate([in_sink, jnp.where(in_window < 0, -1, in_window + window.chunk)], axis=1)
    last_out = (by_row(count) - 1) // window.chunk - (window.kept - 1)  # the last chunk that has left

    def read(prompt: Array, old: Array) -> Array:
        slots = tokens_at(prompt, index).astype(old.dtype)
        left = _chunks(prompt, window.chunk)[1:].astype(old.dtype)
        leaves = (jnp.arange(1, len(left) + 1)[:, None, None] <= last_out[None])[..., None, None]

        def step(sink: Array, now: tuple[Array, Array]) -> tuple[Array, None]:
            left, leaves = now
            return jnp.where(leaves, _moved(sink, left, window.decay), sink), None

        sink, _ = lax.scan(step, slots[:, : window.chunk], (left, leaves))
        return jnp.concatenate([sink, slots[:, window.chunk :]], axis=1)

    return EmaSinksCache(read(key, cache.key), read(value, cache.value), count)


def _moved(sink: Array, left: Array, decay: float) -> Array:
    """_folded, of a cache's numbers."""
    dtype = accumulator_dtype(sink)
    return _folded(sink.astype(dtype), left.astype(dtype), decay).astype(sink.dtype)


@primitive("B*N.", like="cache")
def ema_sinks_step(
    cache: EmaSinksCache,
    query: Array,
    key: Array,
    value: Array,
    *,
    chunk: int,
    chunks_kept: int,
    decay: float,
    is_causal: bool = True,
    scale: float | None = None,
) -> tuple[Array, EmaSinksCache]:
    """The next token, or the next whole chunk: its rows of ema_sinks_attention.

    Args:
      cache: from init_ema_sinks_cache with the same chunk and chunks_kept, after whole chunks if is_causal=False.
      query, key, value: of one token, [B, 1, N, H], [B, 1, K, H], [B, 1, K, V]; with is_causal=False of a chunk.
      decay, is_causal, scale: as in ema_sinks_attention.

    Returns:
      (out [B, 1, N, V], or of a chunk, the cache with it added).

    Complexity: O(chunks_kept chunk) time and memory a token.
    """
    window = _check_cache(cache, chunk, chunks_kept, decay, is_causal)
    check_query_key_value(query, key, value)
    check_prompt(key, value, cache.key, cache.value, None)
    tokens = 1 if window.is_causal else window.chunk
    require(query.shape[1] == tokens, "query", shape_text(query), f"a step takes {tokens} tokens with this is_causal")
    check_position("cache.position", cache.position, query.shape[0])
    position, chunk = cache.position, window.chunk
    number = position // chunk
    slot = jnp.where(number == 0, 0, chunk + (number - 1) % (window.kept - 1) * chunk)
    goes = ((by_row(position) % chunk == 0) & (by_row(number) >= window.kept))[..., None, None]

    def store(old: Array, new: Array) -> Array:
        sink, block = old[:, :chunk], at(old.reshape(old.shape[0], -1, chunk, *old.shape[2:]), slot // chunk)
        sink = jnp.where(goes, _moved(sink, block, window.decay), sink)
        return put(jnp.concatenate([sink, old[:, chunk:]], axis=1), new, slot + position % chunk)

    keys, values = store(cache.key, key), store(cache.value, value)
    now = by_row(position) + tokens
    in_sink = jnp.arange(chunk)[None] < now
    token = newest(now - chunk, window.before) + chunk  # that each slot of the window holds, below chunk of none
    in_window = (token >= chunk) & (token // chunk >= by_row(number) - window.kept + 2)
    visible = jnp.concatenate([in_sink, in_window], axis=1)[:, None, None]
    out, _ = reference_attention(query, keys, values, visible=visible, scale=default_scale(scale, query.shape[-1]))
    return out, EmaSinksCache(keys, values, position + tokens)
