"""One chunk of linear attention on TPU, as a function of arrays in VMEM that JAX can differentiate inside a kernel.

With D_ij = g_{j+1} + ... + g_i, the state S_0 before the chunk, and C tokens:

    U   = (I + A)^{-1} beta (V - (e^{D_i0} K) S_0)            A = tril(beta KK^T * e^D, -1)
    O   = tril(QK^T * e^D) U + (e^{D_i0} Q) S_0
    S_C = e^{D_C0} S_0 + (e^{D_Cj} K)^T U

(the chunk form of the delta rule: Yang et al. 2024; without it U = V.)

Numerics: every exponent is a sum of log decays, never a difference of two sums, so it is <= 0 and exact to float32
behind any decay. Products of bfloat16 operands are accumulated in float32, and what is computed from float32 numbers
(states, weights, decayed keys) is rounded to the operands' dtype before it is multiplied. Float32 operands are
multiplied at full precision. Inverses are computed in float32, by blocks.
"""

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from kernels_pallas.tpu import common

Array = jax.Array

CHUNK = 128  # tokens
# Rows that are next to each other in a block of decays per channel, done one by one; pairs of blocks are products.
BLOCK_ROWS = 8


def chunk(
    state: Array, query: Array, key: Array, value: Array, log_decay: Array | None, beta: Array | None
) -> tuple[Array, Array]:
    """C tokens of one head.

    state: [F, V] float32. query, key: [C, F]. value: [C, V]. log_decay: [1, C] or [C, F] float32.
    beta: [1, C] float32. Returns the state after them and their outputs [C, V], float32.
    """
    dtype = query.dtype
    if beta is not None and log_decay is None:
        log_decay = beta * np.float32(0)  # without one, libtpu 0.0.51 fails at some head dims for v6e and tpu7x
    into, from_key, onward, through = query, key, key, None
    if log_decay is not None:
        # Decay from before the chunk to each token, and from each token to the chunk's end.
        if log_decay.shape[0] == 1:
            before = jnp.sum(_where(_until, log_decay), axis=1, keepdims=True)
            after = jnp.sum(_where(_after, log_decay), axis=1, keepdims=True)
            through = jnp.exp(jnp.sum(log_decay, axis=1, keepdims=True))
        else:
            before, after = (_prefix(which, log_decay) for which in (_until, _after))
            total = jnp.sum(log_decay, axis=0, keepdims=True)
            through = jnp.exp(jnp.transpose(jnp.broadcast_to(total, (common.SUBLANES, total.shape[1])))[:, :1])
        into, from_key, onward = (
            _times(x, jnp.exp(sums)) for x, sums in ((query, before), (key, before), (key, after))
        )
    if beta is not None:
        strength = jnp.sum(_where(_same, beta), axis=1, keepdims=True)
        value = strength * (value.astype(jnp.float32) - _dot(from_key, state.astype(dtype), (1, 0)))
        system = strength * _decayed_products(key, key, log_decay, strict=True)
        value = _dot(_inverse(system), value, (1, 0))
    # In this order: with the state last, libtpu 0.0.51 fails at head dim 64 for v6e and tpu7x.
    written = value.astype(dtype)
    state_after = _dot(onward, written, (0, 0)) + (state if through is None else through * state)
    from_state = _dot(into, state.astype(dtype), (1, 0))
    weights = _decayed_products(query, key, log_decay, strict=False)
    return state_after, _dot(weights.astype(dtype), written, (1, 0)) + from_state


def _decayed_products(query: Array, key: Array, log_decay: Array | None, *, strict: bool) -> Array:
    """[C, C] of sum_h q_ih k_jh exp(g_{j+1,h} + ... + g_{i,h}) for j <= i (j < i if strict), 0 elsewhere."""
    keep = _before if strict else _until
    if log_decay is None:
        return _where(keep, _dot(query, key, (1, 1)))
    if log_decay.shape[0] == 1:
        size = log_decay.shape[1]
        exponents = _sums(_where(_until, log_decay), _ones(_before, size))
        return _where(keep, _dot(query, key, (1, 1)) * jnp.exp(exponents))
    return _products_by_channel(query, key, log_decay, strict)


def _products_by_channel(query: Array, key: Array, log_decay: Array, strict: bool) -> Array:
    """Within blocks of a few rows diagonal by diagonal; then pairs of blocks, of twice the rows each time.

    In a pair, query decays from the middle to each row of the later block, and key from each row of the earlier block
    up to the middle.
    """
    size = query.shape[0]
    rows, columns = _indices((size, size))
    later, earlier = query.astype(jnp.float32), key.astype(jnp.float32)
    exponents = jnp.zeros_like(log_decay)
    total = jnp.zeros((size, size), jnp.float32)
    for distance in range(min(BLOCK_ROWS, size)):
        if distance:
            exponents = exponents + _roll(log_decay, distance - 1)
        if distance or not strict:
            numbers = jnp.sum(later * _roll(earlier, distance) * jnp.exp(exponents), axis=1, keepdims=True)
            here = (rows - columns == distance) & (lax.rem(rows, np.int32(BLOCK_ROWS)) >= distance)
            total = jnp.where(here, numbers, total)
    block = BLOCK_ROWS
    before, after = (
        _sums(jnp.where(which(rows, columns) & _share_block(rows, columns, block), *_one_zero()), log_decay)
        for which in (_until, _after)
    )
    while block < size:
        corner = _dot(_times(query, jnp.exp(before)), _times(key, jnp.exp(after)), (1, 1))
        pair = _share_block(rows, columns, 2 * block) & (
            lax.div(rows, np.int32(block)) > lax.div(columns, np.int32(block))
        )
        total = jnp.where(pair, corner, total)
        # A block's total, at all its rows, goes to the rows of its neighbour.
        sums = before + after
        odd = lax.rem(lax.div(lax.broadcasted_iota(jnp.int32, sums.shape, 0), np.int32(block)), np.int32(2)) == 1
        zeros = jnp.zeros_like(sums)
        before, after = (
            before + jnp.where(odd, _roll(sums, block), zeros),
            after + jnp.where(odd, zeros, _roll(sums, -block)),
        )
        block *= 2
    return total


@jax.custom_vjp
def _inverse(system: Array) -> Array:
    """(I + A)^{-1}, float32 [C, C], of A's strict lower triangle: blocks of twice the rows each time.

    With L the part of A that leads from the earlier block of a pair to the later one, and X the inverse so far, block
    by block: X - X L X.
    """
    size = system.shape[0]
    rows, columns = _indices(system.shape)
    one, nothing = _one_zero()
    result = jnp.where(rows == columns, one, nothing)
    block = 1
    while block < size:
        pair = _share_block(rows, columns, 2 * block) & (
            lax.div(rows, np.int32(block)) > lax.div(columns, np.int32(block))
        )
        leads = jnp.where(pair, system, nothing)
        # X is the identity at first.
        change = leads if block == 1 else common.dot(common.dot(result, leads, (1, 0)), result, (1, 0))
        result = result - change
        block *= 2
    return result


def _inverse_forward(system: Array) -> tuple[Array, Array]:
    result = _inverse(system)
    return result, result


def _inverse_backward(result: Array, gradient: Array) -> tuple[Array]:
    inner = common.dot(result, gradient, (0, 0))
    return (_where(_before, -common.dot(inner, result, (1, 1))),)


_inverse.defvjp(_inverse_forward, _inverse_backward)


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def _dot(a: Array, b: Array, contract: tuple[int, int]) -> Array:
    """common.dot, whose gradients round the cotangent to the operands' dtype as it does its operands."""
    return common.dot(a, b, contract)


def _dot_forward(a: Array, b: Array, contract: tuple[int, int]) -> tuple[Array, tuple[Array, Array]]:
    return common.dot(a, b, contract), (a, b)


def _dot_backward(contract: tuple[int, int], operands: tuple[Array, Array], gradient: Array) -> tuple[Array, Array]:
    a, b = operands
    of_a, of_b = contract
    gradient = gradient.astype(a.dtype)
    to_a = common.dot(gradient, b, (1, 1 - of_b)) if of_a == 1 else common.dot(b, gradient, (1 - of_b, 1))
    to_b = common.dot(a, gradient, (1 - of_a, 0)) if of_b == 0 else common.dot(gradient, a, (0, 1 - of_a))
    return to_a.astype(a.dtype), to_b.astype(b.dtype)


_dot.defvjp(_dot_forward, _dot_backward)


@functools.partial(jax.custom_vjp, nondiff_argnums=(1,))
def _roll(x: Array, rows: int) -> Array:
    """Row i of the result is row i - rows of x, around the ends."""
    rows %= x.shape[0]
    return jnp.concatenate([x[x.shape[0] - rows :], x[: x.shape[0] - rows]], axis=0) if rows else x


_roll.defvjp(lambda x, rows: (_roll(x, rows), None), lambda rows, _, gradient: (_roll(gradient, -rows),))


def _times(x: Array, factor: Array) -> Array:
    return (x.astype(jnp.float32) * factor).astype(x.dtype)


def _prefix(which: Callable[[Array, Array], Array], x: Array) -> Array:
    """[C, F]: at each row the sum of the rows that `which` takes."""
    return _sums(_ones(which, x.shape[0]), x)


def _sums(a: Array, b: Array) -> Array:
    return _dot(a, b, (1, 0))


def _ones(which: Callable[[Array, Array], Array], size: int) -> Array:
    return jnp.where(which(*_indices((size, size))), *_one_zero())


def _where(which: Callable[[Array, Array], Array], x: Array) -> Array:
    """x, [C, C] or one row of it, at the positions that `which` takes, 0 elsewhere."""
    size = x.shape[1]
    return jnp.where(which(*_indices((size, size))), jnp.broadcast_to(x, (size, size)), np.float32(0))


def _indices(shape: tuple[int, ...]) -> tuple[Array, Array]:
    return lax.broadcasted_iota(jnp.int32, shape, 0), lax.broadcasted_iota(jnp.int32, shape, 1)


def _share_block(rows: Array, columns: Array, block: int) -> Array:
    return lax.div(rows, np.int32(block)) == lax.div(columns, np.int32(block))


def _one_zero() -> tuple[np.float32, np.float32]:
    return np.float32(1), np.float32(0)


def _until(row: Array, column: Array) -> Array:
    return column <= row


def _before(row: Array, column: Array) -> Array:
    return column < row


def _after(row: Array, column: Array) -> Array:
    return column > row


def _same(row: Array, column: Array) -> Array:
    return column == row
