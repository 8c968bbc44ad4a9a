"""Linear recurrences, chunked: a scan that carries the state, products decayed between two tokens, and the inverse that
the delta rule takes."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from attnlab.attention._shared.checks import Array

RESET = -1e30  # Finite, so that no rewriting of a sum into a product can make 0 * inf of it.


def segment_starts(segment_ids: Array) -> Array:
    """[B, T], True where a segment other than the row's first begins."""
    starts = jnp.pad(segment_ids[:, 1:] != segment_ids[:, :-1], ((0, 0), (1, 0)))
    return starts[:, : segment_ids.shape[1]]  # of no tokens none


def drop_at_starts(log_decay: Array | None, segment_ids: Array, heads: int, dtype: Any) -> Array:
    """log_decay [B,T,N,1 or F], or none, with a decay to nothing where a segment starts."""
    starts = segment_starts(segment_ids)[..., None, None]
    return jnp.where(starts, RESET, jnp.zeros((1, 1, heads, 1), dtype) if log_decay is None else log_decay)


def scan_chunks(step: Callable[..., Any], state: Any, tokens: Any, chunk_size: int) -> tuple[Any, Any]:
    """Scans step(state, chunk) -> (state, out) over axis 1 of `tokens` and of `out`; the last chunk may be shorter.

    Rematerialised: the backward pass keeps the state before each chunk and computes all else anew.
    """
    length = jax.tree.leaves(tokens)[0].shape[1]
    size = max(1, min(chunk_size, length))
    count = length // size
    step = jax.checkpoint(step, prevent_cse=False)

    def split(x: Array) -> Array:
        return jnp.moveaxis(x[:, : count * size].reshape(x.shape[0], count, size, *x.shape[2:]), 1, 0)

    def join(x: Array) -> Array:
        return jnp.moveaxis(x, 0, 1).reshape(x.shape[1], count * size, *x.shape[3:])

    state, outs = jax.lax.scan(step, state, jax.tree.map(split, tokens))
    outs = jax.tree.map(join, outs)
    if count * size < length:
        state, rest = step(state, jax.tree.map(lambda x: x[:, count * size :], tokens))
        outs = jax.tree.map(lambda x, y: jnp.concatenate([x, y], axis=1), outs, rest)
    return state, outs


def decays_of_chunk(log_decay: Array) -> tuple[Array, Array]:
    """Of [B,N,C,1 or H]: the decay from before the chunk to each token, the last one's being the chunk's, and from
    each token to the chunk's end. Exponents are sums, never differences."""
    before = jnp.cumsum(log_decay, axis=-2)
    after = jax.lax.cumsum(jnp.pad(log_decay[..., 1:, :], ((0, 0), (0, 0), (0, 1), (0, 0))), axis=2, reverse=True)
    return jnp.exp(before), jnp.exp(after)


def decayed_products(query: Array, key: Array, log_decay: Array | None) -> Array:
    """[B,N,C,C] whose ij, j <= i, is sum_h q_ih k_jh exp(g_{j+1,h} + ... + g_{i,h}). Above the diagonal: any number.

    query, key: [B, N, C, H]. log_decay g: [B, N, C, 1 or H] or None.
    """
    if log_decay is None:
        return query @ key.mT
    if log_decay.shape[-1] == 1:
        return (query @ key.mT) * jnp.exp(sums_between(log_decay[..., 0]))

    # Per channel the decay does not come out of the product: query decays from the block's middle, key up to it.
    def across(before: Array, after: Array) -> Array:
        blocks, size = before.shape[-3:-1]
        later, earlier = (_pad(x, 2 * blocks * size).reshape(*after.shape[:-2], 2 * size, -1) for x in (query, key))
        return (later[..., size:, :] * jnp.exp(before)) @ (earlier[..., :size, :] * jnp.exp(after)).mT

    return _by_doubling(log_decay, jnp.sum(query * key, axis=-1, keepdims=True), across)


def sums_between(gates: Array) -> Array:
    """[B,N,C] -> [B,N,C,C] whose ij, j <= i, is g_{j+1} + ... + g_i. Above the diagonal: zeros."""
    zeros = jnp.zeros_like(gates)[..., None]
    return _by_doubling(gates[..., None], zeros, lambda before, after: before + after.mT)


def products_between(factors: Array) -> Array:
    """[B,N,C] -> [B,N,C,C] whose ij, j <= i, is f_{j+1} ... f_i, 1 on the diagonal, 0 above it. Nothing is divided, so
    that factors of 0 have their derivatives."""
    ones = jnp.ones_like(factors)[..., None]
    return _by_doubling(factors[..., None], ones, lambda before, after: before * after.mT, join=jnp.multiply)


@jax.custom_jvp
def inverse_of_unit_lower(system: Array) -> Array:
    """(I + A)^-1 of strictly lower triangular A [B,N,C,C], by products of matrices: C^3 / 3 multiply-adds.

    In log2 C steps, each of which joins pairs of inverted blocks X1 and X2, between which A leads by L:

        (I + [[A1, 0], [L, A2]])^-1  =  [[X1, 0], [-X2 L X1, X2]]

    LAPACK's triangular solve does less, but blocks a thread of its own pool until another one is free, which on several
    forced host devices is never (jax 0.10.2).
    """
    length = system.shape[-1]
    padded = 1 << (length - 1).bit_length() if length else 0
    past = padded - length
    system = jnp.pad(system, ((0, 0), (0, 0), (0, past), (0, past)))
    batch, heads = system.shape[:2]
    inverse = jnp.ones((batch, heads, padded, 1, 1), system.dtype)
    while inverse.shape[2] > 1:
        first, second = _pairs(inverse)
        count, size = first.shape[2:4]
        # [B,N, pair,half,row, pair,half,column] -> its second half's rows and first half's columns, pair by pair.
        corners = system.reshape(batch, heads, count, 2, size, count, 2, size)[:, :, :, 1, :, :, 0, :]
        own = jnp.eye(count, dtype=bool)[:, None, :, None]
        leads = jnp.sum(jnp.where(own, corners, 0), axis=4)
        inverse = _join_blocks(first, -(second @ leads @ first), second)
    return inverse.reshape(batch, heads, padded, padded)[..., :length, :length]


@inverse_of_unit_lower.defjvp
def _(primals: tuple[Array], tangents: tuple[Array]) -> tuple[Array, Array]:
    # Two products in place of the derivatives of every step, which would take several times as long to compile.
    inverse = inverse_of_unit_lower(*primals)
    return inverse, -(inverse @ tangents[0] @ inverse)


def _by_doubling(
    gates: Array,
    diagonal: Array,
    across: Callable[[Array, Array], Array],
    *,
    join: Callable[[Array, Array], Array] = jnp.add,
) -> Array:
    """A lower triangle [B,N,C,C] from its diagonal [B,N,C,1] in log2 C steps, each of which joins pairs of blocks.

    The joint block's lower left corner is across(before, after) [B,N,pairs,m,m], with sums of gates [B,N,pairs,m,F]
    from the pair's middle up to each token of its second half, and from each token of its first half up to the middle;
    with products of them, where `join` is a product. Sums within blocks are all there is, so the cost is that of the
    last step, and nothing is subtracted.
    """
    length = gates.shape[-2]
    padded = 1 << (length - 1).bit_length() if length else 0
    before = _pad(gates, padded)[..., None, :]
    after = jnp.zeros_like(before) if join is jnp.add else jnp.ones_like(before)
    square = _pad(diagonal, padded)[..., None, :]
    while square.shape[-1] < padded:
        (before1, before2), (after1, after2), (square1, square2) = map(_pairs, (before, after, square))
        square = _join_blocks(square1, across(before2, after1), square2)
        before = jnp.concatenate([before1, join(before1[..., -1:, :], before2)], axis=-2)
        after = jnp.concatenate([join(after1, before2[..., -1:, :]), after2], axis=-2)
    return square.reshape(*diagonal.shape[:-2], padded, padded)[..., :length, :length]


def _pad(x: Array, length: int) -> Array:
    return jnp.pad(x, ((0, 0), (0, 0), (0, length - x.shape[2]), (0, 0)))


def _pairs(blocks: Array) -> tuple[Array, Array]:
    """[B, N, blocks, ...] -> the even and the odd blocks."""
    return blocks[:, :, 0::2], blocks[:, :, 1::2]


def _join_blocks(upper: Array, corner: Array, lower: Array) -> Array:
    """[[upper, 0], [corner, lower]], blocks of one size [..., m, m]."""
    above = jnp.concatenate([upper, jnp.zeros_like(corner)], axis=-1)
    return jnp.concatenate([above, jnp.concatenate([corner, lower], axis=-1)], axis=-2)
