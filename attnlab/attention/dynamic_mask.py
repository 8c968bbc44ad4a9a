"""Causal softmax attention to the keys of the largest bias, which a key has for all queries alike.

    A(t) = the `width` keys s <= t of the largest bias b_s, of equal ones the earlier
    out_t = sum_{s in A(t)} softmax_s(scale q_t . k_s + b_s) v_s
    lse_t = log sum_{s in A(t)} exp(scale q_t . k_s + b_s)

A key that drops out never returns, so decoding keeps `width` keys and no more. Paper: Trainable Dynamic Mask Sparse
Attention (DMA, Shi et al. 2025), where b_s = exp(a softplus(w . v_s)), which this takes as it is given.

The kept keys are in falling order of their biases. A token goes in where its own belongs and the last one drops out: so
the blocked form makes lists for all tokens, which are those of block-sparse attention in blocks of one token.
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from attnlab.attention import block_selection
from attnlab.attention._cached import by_row, counted
from attnlab.attention._dispatch.choice import Implementations, dispatch
from attnlab.attention._dispatch.deferred import vary_alike
from attnlab.attention._dispatch.exchange import Parts, in_whole_sequences, over_positions
from attnlab.attention._dispatch.primitive import primitive
from attnlab.attention._shared.checks import (
    check_array,
    check_bool,
    check_cached_steps,
    check_dtype,
    check_floating,
    check_int,
    check_position,
    check_prompt,
    check_query_key_value,
    check_sizes,
    check_type,
    default_scale,
)
from attnlab.attention._shared.finite import finite_or_zero, is_spoilt, spoil, spoilt_tokens
from attnlab.attention._shared.heads import repeat_key_heads
from attnlab.attention._shared.softmax import dense_attention, reference_attention
from attnlab.attention.block_sparse import block_sparse_attention

Array = jax.Array


@primitive("B*N.", "B*N")
def dynamic_mask_attention(
    query: Array,
    key: Array,
    value: Array,
    key_bias: Array,
    *,
    width: int,
    scale: float | None = None,
    return_lse: bool = False,
    implementation: str | None = None,
) -> Any:
    """Causal attention to the keys of the largest bias; the module's docstring has the formula.

    Args:
      query: [B, T, N, H], floating. key: [B, T, K, H], K divides N. value: [B, T, K, V].
      key_bias: [B, T, K], floating: a key's bias in all its logits, by which it is chosen. -inf hides a key, which
        takes a place all the same. Its gradient is that of the logits; which keys are chosen has none.
      width: how many keys a query sees at most, its own only if it is among them.
      scale: factor on q.k; None means H ** -0.5.
      return_lse: return (out, lse).
      implementation: None, "reference" or "xla".

    Returns:
      out [B, T, N, V] in query's dtype; with return_lse also lse [B, T, N], float32 (float64 for float64 inputs),
      differentiable.

    Raises:
      ValueError, TypeError: naming the argument.

    Complexity, of "xla": O(T width (H + V)) time a head, forward and back; O(T width) memory a key head. The lists take
    T steps, one after the other.
    """
    check_query_key_value(query, key, value)
    _check_key_bias(key_bias, key)
    width = check_int("width", width, least=1, most=2**31 - 1)
    return_lse = check_bool("return_lse", return_lse)
    factor = default_scale(scale, query.shape[-1])
    attend = functools.partial(dispatch, "dynamic_mask_attention", IMPLEMENTATIONS, implementation, scale=factor)
    whole = functools.partial(_whole, attend, width)

    def parted(parts: Parts, query: Array, key: Array, value: Array, key_bias: Array) -> tuple[Array, Array]:
        def of_share(query: Array, key: Array, value: Array, key_bias: Array) -> Array:
            out, lse = whole(query, key, value, key_bias[..., 0])
            return jnp.concatenate([out.astype(lse.dtype), lse[..., None]], axis=-1)

        both = in_whole_sequences(of_share, (query, key, value, key_bias[..., None]), key.shape[2], parts)
        return both[..., :-1].astype(query.dtype), both[..., -1]

    layouts = ("B*N.", "B*K.", "B*K.", "B*K")
    out, lse = over_positions(whole, parted, layouts, ("B*N.", "B*N"), query, key, value, key_bias)
    return (out, lse) if return_lse else out


def _check_key_bias(key_bias: Any, key: Array) -> None:
    check_array("key_bias", key_bias, key.shape[:-1], "[batch, tokens, key heads]")
    check_floating("key_bias", key_bias)


def _whole(attend: Any, width: int, query: Array, key: Array, value: Array, key_bias: Array) -> tuple[Array, Array]:
    """With a key that is not finite, or whose bias is none, in all queries that see it, and in no others."""
    if not jax.export.is_symbolic_dim(key.shape[1]):
        width = min(width, max(key.shape[1], 1))
    is_bias = key_bias < jnp.inf
    spoilt = spoilt_tokens(key, value, key.shape[2]) | ~is_bias
    added = jnp.where(is_bias, key_bias, 0)
    out, lse = attend(*map(finite_or_zero, (query, key, value)), lax.stop_gradient(key_bias), added, width=width)

    def seen() -> Array:
        number, counts = _lists(lax.stop_gradient(key_bias), width)
        by_list = (_of_lists(spoilt, number) & counts).any(-1)  # [B, K, T]
        return repeat_key_heads(jnp.moveaxis(by_list, 1, 2)[..., None], query.shape[2])[..., 0]

    where = lax.cond(spoilt.any(), seen, lambda: jnp.zeros_like(lse, bool)) | is_spoilt(query)
    return spoil(out, where), spoil(lse, where)


# --- Lists ------------------------------------------------------------------------------------------------------------


def _place(biases: Array, count: Array, bias: Array) -> Array:
    """int [B, K]: before how many of the kept, of which there are `count`, [B or 1], a new key's bias [B, K] goes.

    biases: [B, width, K], falling, NaN last; of equal ones the earlier key comes first.
    """
    is_before = (biases >= bias[:, None]) | jnp.isnan(bias)[:, None]
    is_kept = jnp.arange(biases.shape[1])[None] < count[:, None]
    return (is_kept[..., None] & is_before).sum(1)


def _inserted(kept: Array, new: Array, place: Array) -> Array:
    """kept [B, width, K, ...] with new [B, K, ...] at the place [B, K], and those from there on one later."""
    rest = (1,) * (kept.ndim - 3)
    slot, place = (
        jnp.arange(kept.shape[1]).reshape(1, -1, 1, *rest),
        place[:, None].reshape(*place.shape[:1], 1, -1, *rest),
    )
    later = jnp.concatenate([kept[:, :1], kept[:, :-1]], axis=1)
    return jnp.where(slot < place, kept, jnp.where(slot == place, new[:, None].astype(kept.dtype), later))


def _lists(key_bias: Array, width: int) -> tuple[Array, Array]:
    """Of biases [B, T, K]: int32 [B, K, T, width], the keys that every token sees, and bool [1, 1, T, width], which of
    these places hold one."""
    batch, length, key_heads = key_bias.shape
    empty = [jnp.zeros((batch, width, key_heads), dtype) for dtype in (key_bias.dtype, jnp.int32)]

    def token(kept: list[Array], now: tuple[Array, Array]) -> tuple[list[Array], Array]:
        bias, number = now
        place = _place(kept[0], number[None], bias)
        news = bias, jnp.full_like(place, number, jnp.int32)
        kept = [_inserted(old, new, place) for old, new in zip(kept, news)]
        return kept, kept[1]

    *empty, by_token, numbers = vary_alike([*empty, jnp.moveaxis(key_bias, 1, 0), jnp.arange(length, dtype=jnp.int32)])
    _, lists = lax.scan(token, empty, (by_token, numbers))
    counts = jnp.arange(width)[None] <= jnp.arange(length)[:, None]
    return jnp.moveaxis(lists, (0, 3), (2, 1)), counts[None, None]


def _of_lists(x: Array, number: Array) -> Array:
    """x [B, T, K] at the keys [B, K, T, width]."""
    by_head = jnp.moveaxis(x, 2, 1)
    return jnp.take_along_axis(by_head, number.reshape(*number.shape[:2], -1), axis=2).reshape(number.shape)


# --- Forms ------------------------------------------------------------------------------------------------------------

# All take query [B, T, N, H], key, value, and biases [B, T, K]: by which keys are chosen, and which are added.


def _of_queries(key_bias: Array, heads: int) -> Array:
    """[B, S, K] -> [B, N, 1, S], as logits are laid out."""
    return jnp.moveaxis(repeat_key_heads(key_bias[..., None], heads)[..., 0], 2, 1)[:, :, None]


def _reference(
    query: Array, key: Array, value: Array, chosen_by: Array, added: Array, *, width: int, scale: Any
) -> tuple[Array, Array]:
    length, heads = query.shape[1:3]
    causal = jnp.tril(jnp.ones((length, length), bool))
    scores = jnp.broadcast_to(_of_queries(chosen_by, heads), (query.shape[0], heads, length, length))
    lists = block_selection.select_blocks(scores, eligible=causal, count=width)
    visible = block_selection.block_mask_of(lists, length)
    return dense_attention(query, key, value, visible=visible, bias=_of_queries(added, heads), scale=scale)


def _xla(
    query: Array, key: Array, value: Array, chosen_by: Array, added: Array, *, width: int, scale: Any
) -> tuple[Array, Array]:
    number, counts = _lists(chosen_by, width)
    return block_sparse_attention(
        query,
        key,
        value,
        jnp.where(counts, number, -1),
        query_block=1,
        key_block=1,
        block_bias=_of_lists(added, number),
        scale=scale,
        return_lse=True,
        implementation="xla",
    )


IMPLEMENTATIONS: Implementations = {"reference": _reference, "xla": _xla}


# --- Decoding ---------------------------------------------------------------------------------------------------------


class DynamicMaskCache(NamedTuple):
    """The keys of the largest biases so far, these falling, of every key head.

    key: [B, width, K, H], value: [B, width, K, V], bias: [B, width, K], zeros where none is yet. position: int32 [],
    the number of tokens so far, or [B], of each row.
    """

    key: Array
    value: Array
    bias: Array
    position: Array


def init_dynamic_mask_cache(
    batch: int,
    num_key_heads: int,
    head_dim: int,
    *,
    width: int,
    value_dim: int | None = None,
    dtype: Any = jnp.float32,
) -> DynamicMaskCache:
    """An empty cache, for any number of tokens. value_dim=None means head_dim. Biases are kept in float32 at least."""
    value_dim, dtype = head_dim if value_dim is None else value_dim, check_dtype("dtype", dtype)
    sizes = {"batch": batch, "width": width, "num_key_heads": num_key_heads, "head_dim": head_dim}
    *shape, head_dim, value_dim = check_sizes(**sizes, value_dim=value_dim)
    return DynamicMaskCache(
        key=jnp.zeros((*shape, head_dim), dtype),
        value=jnp.zeros((*shape, value_dim), dtype),
        bias=jnp.zeros(shape, jnp.promote_types(dtype, jnp.float32)),
        position=jnp.zeros((), jnp.int32),
    )


@primitive(like="cache")
def prefill_dynamic_mask_cache(
    cache: DynamicMaskCache, key: Array, value: Array, key_bias: Array, *, lengths: Array | None = None
) -> DynamicMaskCache:
    """The cache after a prompt: what dynamic_mask_step leaves of it.

    Args:
      cache: an empty one.
      key: [B, P, K, H], value: [B, P, K, V], key_bias: [B, P, K]. Attention over the prompt is dynamic_mask_attention.
      lengths: integers [B], 0 to P: the row's tokens, padding after them. None: P in all rows.
    """
    check_type("cache", cache, DynamicMaskCache, "init_dynamic_mask_cache")
    lengths = check_prompt(key, value, cache.key, cache.value, lengths)
    _check_key_bias(key_bias, key)
    count, width = counted(key, lengths), cache.key.shape[1]
    is_token = jnp.broadcast_to(jnp.arange(key.shape[1])[None] < by_row(count), key.shape[:2])[..., None]
    bias = key_bias.astype(cache.bias.dtype)
    is_number = ~jnp.isnan(bias)
    kind = jnp.where(is_token, jnp.where(is_number, 0, 1), 2)
    number = lax.broadcasted_iota(jnp.int32, bias.shape, 1)
    *_, order = lax.sort((kind, jnp.where(is_number, -bias, 0), number), dimension=1, num_keys=3)

    def kept(prompt: Array, old: Array) -> Array:
        index = order[:, :width].reshape(*order[:, :width].shape, *(1,) * (prompt.ndim - 3))
        taken = jnp.take_along_axis(prompt, index, axis=1).astype(old.dtype)
        taken = jnp.pad(taken, [(0, 0), (0, width - taken.shape[1])] + [(0, 0)] * (taken.ndim - 2))
        is_kept = jnp.arange(width)[None] < by_row(count)
        return jnp.where(is_kept.reshape(*is_kept.shape, *(1,) * (taken.ndim - 2)), taken, 0)

    return DynamicMaskCache(kept(key, cache.key), kept(value, cache.value), kept(bias, cache.bias), count)


@primitive("B*N.", like="cache")
def dynamic_mask_step(
    cache: DynamicMaskCache, query: Array, key: Array, value: Array, key_bias: Array, *, scale: float | None = None
) -> tuple[Array, DynamicMaskCache]:
    """The next tokens: their rows of dynamic_mask_attention, however a sequence is cut into steps.

    Args:
      cache: of the tokens before, with as many slots as queries see keys.
      query, key, value, key_bias: of T >= 1 tokens, [B, T, N, H], [B, T, K, H], [B, T, K, V], [B, T, K].
      scale: as in dynamic_mask_attention.

    Returns:
      (out [B, T, N, V], the cache with the tokens added).

    Complexity: O(width (H + V)) time a token and head, and memory.
    """
    check_type("cache", cache, DynamicMaskCache, "init_dynamic_mask_cache")
    check_cached_steps(query, key, value, cache.key, cache.value)
    _check_key_bias(key_bias, key)
    check_position("cache.position", cache.position, query.shape[0])
    factor, heads, width = default_scale(scale, query.shape[-1]), query.shape[2], cache.key.shape[1]

    def token(cache: DynamicMaskCache, now: tuple[Array, ...]) -> tuple[DynamicMaskCache, Array]:
        query, *news = now
        place = _place(cache.bias, by_row(cache.position)[:, 0], news[-1].astype(cache.bias.dtype))
        keys, values, biases = (_inserted(old, new, place) for old, new in zip(cache[:3], news))
        visible = (jnp.arange(width)[None] <= by_row(cache.position))[:, None, None]
        bias = _of_queries(biases, heads)
        out, _ = reference_attention(query[:, None], keys, values, visible=visible, bias=bias, scale=factor)
        return DynamicMaskCache(keys, values, biases, cache.position + 1), out[:, 0]

    cache, out = lax.scan(token, cache, tuple(jnp.moveaxis(x, 1, 0) for x in (query, key, value, key_bias)))
    return jnp.moveaxis(out, 0, 1), cache
