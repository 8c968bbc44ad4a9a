"""One chunk of linear attention on TPU, as a function of arrays in VMEM that JAX can differentiate inside a kernel.

With D_ij = g_{j+1} + ... + g_i, the state S_0 before the chunk, and C tokens:

    U   = (I + A)^{-1} beta (V - e^{D_i0} K S_0)              A = tril(beta KK^T * e^D, -1)
    O   = tril(QK^T * e^D) U + e^{D_i0} Q S_0
    S_C = e^{D_C0} S_0 + (e^{D_Cj} K)^T U

(the chunk form of the delta rule: Yang et al. 2024; without it U = V.) Several heads at once, [heads, ...] each: their
products are next to each other in the program and fill each other's waits. Keys and values may be of fewer heads, and
are then read by several in a row.

Numerics: decays between tokens are exact to float32. Of decays per token they are of a difference of exact sums; per
channel, of a sum of log decays, or where HALF tokens decay by less than a limit (is_mild) of a difference of two sums,
which are then small. Without that every exponent is <= 0. Products are of operands in the inputs' dtype,
accumulated in float32: what is float32 (states, weights, decayed keys) is rounded to it before. The delta rule's system
is solved to 16 bits: its blocks on the diagonal are inverted, and with bfloat16 a number is then multiplied as two.
Float32 inputs are multiplied at full precision throughout.
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.experimental.pallas import tpu as pltpu

from kernels_pallas.tpu import common
from kernels_pallas.tpu.common import SUBLANES

Array = jax.Array
Results = tuple[tuple[Array, Array], Array | None]

CHUNK = 128  # tokens
# Tokens of the blocks on the system's diagonal that are inverted. From block to block it is solved by substitution: of
# 16, 32 and 64 this takes the fewest cycles.
BLOCK = 32
HALF = CHUNK // 2
# Of HALF tokens' log decays per channel, negative: the most at which a decay is one of a query times one of a key, from
# a middle. Their exponents are of half the size, which float32 and bfloat16 hold, and of which float32 inputs shall
# lose no digits in a difference.
MILD = {"bfloat16": 140.0, "float32": 32.0}


def is_mild(dtype: Any, log_decay: Array) -> Array:
    """bool: whether chunk() may take log decays per channel [N, C, F] as mild ones."""
    heads, _, width = log_decay.shape
    sums = jnp.sum(log_decay.reshape(heads, 2, HALF, width), axis=2)
    return jnp.min(sums) >= np.float32(-MILD[jnp.dtype(dtype).name])


def chunk(
    dtype: Any,
    state: Array,
    query: Array,
    key: Array,
    value: Array,
    decay: Array | None,
    beta: Array | None,
    inverses: Array | None = None,
    *,
    mild: bool = False,
) -> Results:
    """C tokens of N heads, which read K key heads. All arrays are float32; dtype is what products are of.

    state: [N, F, V]. query: [N, C, F]. key: [K, C, F]. value: [K, C, V]. decay: sums of log decays up to each token,
    [N, 2, C] of exact_sums(), or log decays per channel [N, C, F], all mild or not. beta: [N, 1, C]. inverses: what an
    earlier call gave, or None to compute them.

    Returns the state after them and their outputs [N, C, V]; and with the delta rule inverses [N, BLOCK, C].
    """
    heads, size, _ = query.shape
    dot = functools.partial(_dot, dtype)
    by_channel = decay is not None and decay.shape[1] == size
    into, onward, through, exponents = None, None, None, None
    if decay is not None and by_channel:
        query, key, value = (_spread(x, heads) for x in (query, key, value))
        channels = (_mild_channels if mild else _channels)(dtype, decay, key)
        through, query = channels.through, channels.reads(query)
        reading = channels.reads(key) if beta is not None else key
    else:
        reading = key
        if decay is not None:
            exponents, into, onward, through = _by_token(decay)
            decays = jnp.exp(lax.stop_gradient(exponents))

    def products(x: Array, is_system: bool) -> Array:
        """Of queries, or for the system of keys, with keys, and the decays between them; 0 for later ones.

        Hidden before they are used: what a later token gives may not be finite, nor then the gradients.
        """
        is_seen = _where(_before if is_system else _until, size)
        if by_channel:
            return jnp.where(is_seen, channels.products(x, is_system), np.float32(0))
        found = _spread(dot(x, key, (1, 1)), heads)
        if exponents is None:
            return jnp.where(is_seen, found, np.float32(0))
        return _decayed_products(found, exponents, decays, is_seen)

    def from_state(x: Array) -> Array:
        return dot(x * channels.into, state, (1, 0)) if by_channel else _times(dot(x, state, (1, 0)), into)

    if beta is not None:
        strength = _in_every_lane(_column(beta), size)
        value = _times(_spread(value, heads) - from_state(reading), strength)
        system = strength * products(reading, True)
        if inverses is None:
            inverses = _inverses(dtype, system)
        value = _solve(dtype, inverses, system, value)
    if by_channel:
        written = dot(channels.onward(), value, (0, 0))
    else:
        written = _spread(dot(key, value if onward is None else _times(_spread(value, heads), onward), (0, 0)), heads)
    out = dot(products(query, False), value, (1, 0)) + from_state(query)
    return (_times(state, through) + written, out), inverses


# --- Decays -----------------------------------------------------------------------------------------------------------


def exact_sums(log_decay: Array) -> Array:
    """Log decays [..., C] -> [..., 2, C]: sums up to each token in two parts, of whose differences no error counts.

    The first is of multiples of 2^-9, which float32 adds exactly; the second of what is left of each number, less than
    2^-9. A log decay below -128 leaves nothing, as -128 does. Gradients are the first's.
    """
    log_decay = jnp.maximum(log_decay, np.float32(-128))
    coarse = jnp.round(log_decay * 512) / 512
    # XLA's own sums move more bytes on a TPU than the kernel does; this product of float32 is exact where they are.
    parts = jnp.stack([coarse, log_decay - coarse], axis=-2)
    until = jnp.asarray(np.tri(log_decay.shape[-1], dtype=np.float32))
    return jnp.einsum("...C,DC->...D", parts, until, precision=lax.Precision.HIGHEST)


def _by_token(sums: Array) -> tuple[Array, Array, Array, Array]:
    """exact_sums() -> D_ij, large and negative above the diagonal, e^{D_i0} and e^{D_Ci}, all [N, C, C], and e^{D_C0}
    [N, 1, 1]."""
    size = sums.shape[2]
    rows = sums[:, :1], lax.stop_gradient(sums[:, 1:])
    columns, last = [_in_every_lane(_column(x), size) for x in rows], [x[:, :, -1:] for x in rows]

    def decay(later: Sequence[Array], earlier: Sequence[Array]) -> Array:
        return (later[0] - earlier[0]) + (later[1] - earlier[1])

    exponents = jnp.where(_where(_until, size), decay(columns, rows), np.float32(-1e30))  # before exp
    return exponents, jnp.exp(sum(columns)), jnp.exp(decay(last, columns)), jnp.exp(sum(last))


@jax.custom_vjp
def _decayed_products(products: Array, exponents: Array, decays: Array, is_seen: Array) -> Array:
    """products e^exponents where seen, else 0. decays: e^exponents. The exponents' gradient is of the whole, which
    takes one multiplication of matrices where that of the decays takes two."""
    return jnp.where(is_seen, products * decays, np.float32(0))


def _decayed_products_forward(
    products: Array, exponents: Array, decays: Array, is_seen: Array
) -> tuple[Array, tuple[Array, Array, Array]]:
    out = _decayed_products(products, exponents, decays, is_seen)
    return out, (out, decays, is_seen)


def _decayed_products_backward(kept: tuple[Array, Array, Array], gradient: Array) -> tuple[Array, Array, None, None]:
    out, decays, is_seen = kept
    gradient = jnp.where(is_seen, gradient, np.float32(0))
    return gradient * decays, gradient * out, None, None


_decayed_products.defvjp(_decayed_products_forward, _decayed_products_backward)


class Channels(NamedTuple):
    """Decays per channel, with the chunk's keys.

    reads: [N, C, F] of queries, or keys as queries -> what products and from_state take. products: that, and whether it
    is the delta rule's system -> [N, C, C]. into: what reads() is to be multiplied by for e^{D_i0}. onward: keys with
    e^{D_Cj}. through: e^{D_C0}, [N, F, 1].
    """

    reads: Callable[[Array], Array]
    products: Callable[[Array, bool], Array]
    into: Array
    onward: Callable[[], Array]
    through: Array


def _channels(dtype: Any, log_decay: Array, key: Array) -> Channels:
    """Of any log decays: of blocks of 1, 2, 4, ... C / 2 tokens, which are joined in pairs, those between each token
    and its pair's middle."""
    size = log_decay.shape[1]
    before, after = log_decay, jnp.zeros_like(log_decay)  # of a token from its block's start, and to its end
    exponents, block = [], 1
    while block < size:
        is_later = lax.rem(lax.div(lax.broadcasted_iota(jnp.int32, before.shape, 1), np.int32(block)), np.int32(2)) == 1
        exponents.append(jnp.where(is_later, before, after))
        other = _exchanged(before + after, block)
        zero = jnp.zeros_like(other)
        before, after = before + jnp.where(is_later, other, zero), after + jnp.where(is_later, zero, other)
        block *= 2
    factors = [jnp.exp(x) for x in exponents]
    keys = [key * x for x in factors]

    def products(x: Array, is_system: bool) -> Array:
        return _level_products(dtype, is_system, x, key, factors, keys)

    through = jnp.exp(_column(before[:, -1:]))
    return Channels(lambda x: x, products, jnp.exp(before), lambda: key * jnp.exp(after), through)


def _mild_channels(dtype: Any, log_decay: Array, key: Array) -> Channels:
    """Of each half of the chunk the sums up to each token, and a middle m of them: the decay from j to i is
    e^{sum_i - m} of a query times e^{m - sum_j} of a key. What is written for the second half's queries has its m."""
    heads, size, width = log_decay.shape
    sums, total = _sums(log_decay)
    middle = lax.stop_gradient(total) * np.float32(0.5)  # any number gives the same
    (sums_1, sums_2), (total_1, total_2), (middle_1, middle_2) = (
        jnp.split(x, 2, axis=1) for x in (sums, total, middle)
    )
    later = jnp.concatenate([sums_1 - middle_1, sums_2 - middle_2], axis=1)
    own = _decayed(dtype, key[:, :HALF], middle_1 - sums_1)
    for_second = _decayed(dtype, key, jnp.concatenate([(total_1 - sums_1) + middle_2, middle_2 - sums_2], axis=1))

    def products(x: Array, is_system: bool) -> Array:
        multiply = functools.partial(_near_dot if is_system else _dot, dtype)
        first = multiply(x[:, :HALF], own, (1, 1))
        first = jnp.concatenate([first, jnp.zeros_like(first)], axis=2)
        return jnp.concatenate([first, multiply(x[:, HALF:], for_second, (1, 1))], axis=1)

    rows = jnp.exp(jnp.concatenate([middle_1, middle_2 + total_1], axis=1))
    into = jnp.broadcast_to(rows[:, :, None], (heads, 2, HALF, width)).reshape(heads, size, width)
    return Channels(
        lambda x: _decayed(dtype, x, later),
        products,
        into,
        lambda: for_second * jnp.exp(total_2 - middle_2),
        jnp.exp(_column(total_1 + total_2)),
    )


@jax.custom_vjp
def _sums(x: Array) -> tuple[Array, Array]:
    """[N, C, F] -> of each half the sums up to each token, [N, C, F], and all, [N, 2, F]."""
    return _running(x, is_reversed=False)


def _running(x: Array, is_reversed: bool) -> tuple[Array, Array]:
    """_sums, or of each token and those after it."""
    size, width = x.shape[1:]
    tiles = x.reshape(-1, SUBLANES, width)
    row = lax.broadcasted_iota(jnp.int32, tiles.shape, 1)
    for distance in (1, 2, 4):
        is_inside = row < SUBLANES - distance if is_reversed else row >= distance
        moved = _rolled(tiles, SUBLANES - distance if is_reversed else distance, 1)
        tiles = tiles + jnp.where(is_inside, moved, np.float32(0))
    tiles = tiles.reshape(x.shape)
    found: list[Array] = []
    ends: list[Array] = []
    starts = range(0, size, SUBLANES)
    for start in reversed(starts) if is_reversed else starts:
        tile = tiles[:, start : start + SUBLANES]
        if len(found) % (HALF // SUBLANES):
            tile = tile + ends[-1]
        found.append(tile)
        ends.append(tile[:, :1] if is_reversed else tile[:, -1:])
    step = -1 if is_reversed else 1
    of_halves = ends[HALF // SUBLANES - 1 :: HALF // SUBLANES]
    return jnp.concatenate(found[::step], axis=1), jnp.concatenate(of_halves[::step], axis=1)


def _sums_backward(_: None, gradients: tuple[Array, Array]) -> tuple[Array]:
    to_sums, to_total = gradients
    heads, width = to_sums.shape[0], to_sums.shape[2]
    to_total = jnp.broadcast_to(to_total[:, :, None], (heads, 2, HALF, width)).reshape(to_sums.shape)
    return (_running(to_sums, is_reversed=True)[0] + to_total,)


_sums.defvjp(lambda x: (_sums(x), None), _sums_backward)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _decayed(dtype: Any, x: Array, exponent: Array) -> Array:
    """x e^exponent. The exponent's gradient is of the product as it is rounded for a matrix product: what a pair of
    tokens gives to one exponent and takes from another is then the same, and vanishes where it must."""
    return x * jnp.exp(exponent)


def _decayed_forward(dtype: Any, x: Array, exponent: Array) -> tuple[Array, tuple[Array, Array]]:
    factor = jnp.exp(exponent)
    product = x * factor
    return product, (factor, product.astype(dtype))


def _decayed_backward(dtype: Any, kept: tuple[Array, Array], gradient: Array) -> tuple[Array, Array]:
    factor, product = kept
    return gradient * factor, gradient * product.astype(jnp.float32)


_decayed.defvjp(_decayed_forward, _decayed_backward)


@functools.partial(jax.custom_vjp, nondiff_argnums=(1,))
def _exchanged(x: Array, block: int) -> Array:
    """[N, C, F] with each block of tokens in the place of its neighbour in a pair."""
    heads, size, width = x.shape
    if block >= SUBLANES:
        pairs = x.reshape(heads, size // (2 * block), 2, block, width)
        return jnp.stack([pairs[:, :, 1], pairs[:, :, 0]], axis=2).reshape(x.shape)
    tiles = x.reshape(-1, SUBLANES, width)
    is_later = lax.rem(lax.div(lax.broadcasted_iota(jnp.int32, tiles.shape, 1), np.int32(block)), np.int32(2)) == 1
    from_before, from_after = (_rolled(tiles, shift, 1) for shift in (block, SUBLANES - block))
    return jnp.where(is_later, from_before, from_after).reshape(x.shape)


_exchanged.defvjp(
    lambda x, block: (_exchanged(x, block), None), lambda block, _, gradient: (_exchanged(gradient, block),)
)


def _level_products(
    dtype: Any, is_system: bool, query: Array, key: Array, factors: list[Array], keys: list[Array]
) -> Array:
    """[N, C, C] of sum_h q_ih k_jh e^{D_ij,h} for j <= i: of tokens in the later block of a pair with those in the
    earlier one, each size of blocks in its place. factors: of decays to the middle of pairs; keys: with them.

    The delta rule's system of keys that are alike magnifies what is rounded between close tokens: those are products to
    more digits.
    """
    total = jnp.where(_where(_same, query.shape[1]), jnp.sum(query * key, axis=2, keepdims=True), np.float32(0))
    for level, (factor, decayed) in enumerate(zip(factors, keys, strict=True)):
        block = 2**level
        total = total + _pair_products(dtype, block, is_system and block < SUBLANES, query * factor, decayed)
    return total


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1, 2))
def _pair_products(dtype: Any, block: int, is_wide: bool, query: Array, key: Array) -> Array:
    """[N, C, C] of query and key, where query's token is in the later block of a pair and key's in the earlier one; 0
    elsewhere."""
    return _pair_products_forward(dtype, block, is_wide, query, key)[0]


def _pair_products_forward(
    dtype: Any, block: int, is_wide: bool, query: Array, key: Array
) -> tuple[Array, tuple[Array, Array]]:
    query = _later(query, block)
    rounded = query.astype(dtype), key.astype(dtype)
    products = _wide_dot(dtype, query, key, (1, 1)) if is_wide else _dots(*rounded, (1, 1))
    return _among_earlier(jnp.where(_is_in_pair(key.shape[1], block), products, np.float32(0)), block), rounded


def _pair_products_backward(
    dtype: Any, block: int, is_wide: bool, operands: tuple[Array, Array], gradient: Array
) -> tuple[Array, Array]:
    query, key = operands
    is_in_pair = _is_in_pair(key.shape[1], block)
    gradient = jnp.where(is_in_pair, _later(gradient, block), np.float32(0)).astype(dtype)
    return _among_earlier(_dots(gradient, key, (1, 0)), block), _dots(gradient, query, (0, 0))


_pair_products.defvjp(_pair_products_forward, _pair_products_backward)


def _is_pair(size: int, block: int) -> Array:
    """[C, C], whether the row is in the later block of a pair and the column in the earlier one."""
    row, column = (lax.div(x, np.int32(block)) for x in _indices((size, size)))
    return (row == column + np.int32(1)) & (lax.rem(row, np.int32(2)) == 1)


def _is_in_pair(size: int, block: int) -> Array:
    """The rows of _is_pair that _later takes."""
    if block < SUBLANES:
        return _is_pair(size, block)
    row, column = (lax.div(x, np.int32(block)) for x in _indices((size // 2, size)))
    return column == row * np.int32(2)


def _later(x: Array, block: int) -> Array:
    """[N, C, W] -> [N, C / 2, W], the rows of later blocks; all rows where those are within a register's."""
    if block < SUBLANES:
        return x
    heads, size, width = x.shape
    return x.reshape(heads, size // (2 * block), 2, block, width)[:, :, 1].reshape(heads, size // 2, width)


def _among_earlier(x: Array, block: int) -> Array:
    """The inverse of _later, with 0 in the rows of earlier blocks."""
    if block < SUBLANES:
        return x
    heads, half, width = x.shape
    later = x.reshape(heads, half // block, block, width)
    return jnp.stack([jnp.zeros_like(later), later], axis=2).reshape(heads, 2 * half, width)


# --- The delta rule's system ------------------------------------------------------------------------------------------


def _inverses(dtype: Any, system: Array) -> Array:
    """Of I + A's blocks on the diagonal, side by side: [N, BLOCK, C], of A = system [N, C, C], strictly lower.

    First of blocks of 8 rows, which lie in one register: by substitution. Then in pairs, with L the part of A that
    leads from the earlier block of a pair to the later one: X_later L X_earlier is what is missing.
    """
    heads, size, _ = system.shape
    rows, columns = _indices((size, size))
    zero = np.float32(0)

    def on_diagonal(block: int) -> Array:
        return lax.div(rows, np.int32(block)) == lax.div(columns, np.int32(block))

    row, column = _indices((SUBLANES, size))
    column = lax.rem(column, np.int32(SUBLANES))
    blocks = jnp.where(on_diagonal(SUBLANES), system, zero)
    blocks = jnp.sum(blocks.reshape(heads, size // SUBLANES, SUBLANES, size), axis=1)
    inverses = jnp.broadcast_to(jnp.where(row == column, np.float32(1), zero), blocks.shape)
    for n in range(SUBLANES - 1):
        # Column n of every block at all its columns, times row n of the inverse.
        lane = _rolled(jnp.where(column == n, blocks, zero), (size - n) % size, 2)
        for distance in (1, 2, 4):
            lane = lane + _rolled(lane, distance, 2)
        inverses = inverses - lane * inverses[:, n : n + 1]
    block = SUBLANES
    while block < BLOCK:
        is_later = lax.rem(lax.div(_indices((block, size))[1], np.int32(block)), np.int32(2)) == 1
        later, earlier = jnp.where(is_later, inverses, zero), jnp.where(is_later, zero, inverses)
        whole = jnp.where(on_diagonal(block), jnp.concatenate([inverses] * (size // block), axis=1), zero)
        leads = jnp.where(_is_pair(size, block), system, zero)
        missing = _wide_dot(dtype, _wide_dot(dtype, later, leads, (1, 0)), whole, (1, 0))
        inverses = jnp.concatenate([earlier, later - missing], axis=1)
        block *= 2
    return inverses


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _solve(dtype: Any, inverses: Array, system: Array, right: Array) -> Array:
    """(I + A)^{-1} right, block after block: of a block A's product with those before is taken away first."""
    solved: list[Array] = []
    for start in range(0, right.shape[1], BLOCK):
        block = slice(start, start + BLOCK)
        rest = right[:, block]
        if solved:
            rest = rest - _wide_dot(dtype, system[:, block, :start], jnp.concatenate(solved, axis=1), (1, 0))
        solved.append(_wide_dot(dtype, inverses[:, :, block], rest, (1, 0)))
    return jnp.concatenate(solved, axis=1)


def _solve_forward(dtype: Any, inverses: Array, system: Array, right: Array) -> tuple[Array, tuple[Array, ...]]:
    solution = _solve(dtype, inverses, system, right)
    return solution, (inverses, system, solution)


def _solve_backward(dtype: Any, kept: tuple[Array, ...], gradient: Array) -> tuple[Array, Array, Array]:
    """The transposed system, last block first. The inverses are the system's: no gradient is theirs."""
    inverses, system, solution = kept
    size = gradient.shape[1]
    solved: list[Array] = []
    for start in range(size - BLOCK, -1, -BLOCK):
        block = slice(start, start + BLOCK)
        rest = gradient[:, block]
        if solved:
            rest = rest - _wide_dot(dtype, system[:, start + BLOCK :, block], jnp.concatenate(solved, axis=1), (0, 0))
        solved.insert(0, _wide_dot(dtype, inverses[:, :, block], rest, (0, 0)))
    to_right = jnp.concatenate(solved, axis=1)
    to_system = -_dots(to_right.astype(dtype), solution.astype(dtype), (1, 1))
    return jnp.zeros_like(inverses), jnp.where(_where(_before, size), to_system, np.float32(0)), to_right


_solve.defvjp(_solve_forward, _solve_backward)


# --- Products ---------------------------------------------------------------------------------------------------------


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 3))
def _dot(dtype: Any, a: Array, b: Array, contract: tuple[int, int]) -> Array:
    """Products of float32 matrices rounded to dtype, of every head; cotangents are rounded as well."""
    return _dots(a.astype(dtype), b.astype(dtype), contract)


def _dot_forward(dtype: Any, a: Array, b: Array, contract: tuple[int, int]) -> tuple[Array, tuple[Array, Array]]:
    a, b = a.astype(dtype), b.astype(dtype)
    return _dots(a, b, contract), (a, b)


def _dot_backward(
    dtype: Any, contract: tuple[int, int], operands: tuple[Array, Array], gradient: Array
) -> tuple[Array, Array]:
    a, b = operands
    of_a, of_b = contract
    gradient = gradient.astype(dtype)
    to_a = _dots(gradient, b, (1, 1 - of_b)) if of_a == 1 else _dots(b, gradient, (1 - of_b, 1))
    to_b = _dots(a, gradient, (1 - of_a, 0)) if of_b == 0 else _dots(gradient, a, (0, 1 - of_a))
    return _added(to_a, len(a)), _added(to_b, len(b))


_dot.defvjp(_dot_forward, _dot_backward)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 3))
def _near_dot(dtype: Any, a: Array, b: Array, contract: tuple[int, int]) -> Array:
    """_wide_dot, with the gradient of _dot."""
    return _wide_dot(dtype, a, b, contract)


def _near_dot_forward(dtype: Any, a: Array, b: Array, contract: tuple[int, int]) -> tuple[Array, tuple[Array, Array]]:
    return _wide_dot(dtype, a, b, contract), (a.astype(dtype), b.astype(dtype))


_near_dot.defvjp(_near_dot_forward, _dot_backward)


def _wide_dot(dtype: Any, a: Array, b: Array, contract: tuple[int, int]) -> Array:
    """Products of float32 matrices to twice the digits of dtype; float32 has enough of its own."""
    if dtype == jnp.float32:
        return _dots(a, b, contract)
    (a_high, a_low), (b_high, b_low) = (common.in_two(x, dtype) for x in (a, b))
    both = _dots(jnp.concatenate([a_high, a_low], axis=2 - contract[0]), b_high, contract)
    high, low = jnp.split(both, 2, axis=1)
    return high + (low + _dots(a_high, b_low, contract))


def _dots(a: Array, b: Array, contract: tuple[int, int]) -> Array:
    """Of [N, ...] or [K, ...] each: as many products as the larger has heads."""
    heads = max(len(a), len(b))
    return jnp.stack([common.dot(a[n * len(a) // heads], b[n * len(b) // heads], contract) for n in range(heads)])


@functools.partial(jax.custom_vjp, nondiff_argnums=(1,))
def _spread(x: Array, heads: int) -> Array:
    """Every head's, of what several in a row share."""
    return x if len(x) == heads else jnp.stack([x[n * len(x) // heads] for n in range(heads)])


_spread.defvjp(lambda x, heads: (_spread(x, heads), len(x)), lambda heads, own, gradient: (_added(gradient, own),))


def _added(x: Array, heads: int) -> Array:
    """The transpose of _spread."""
    return x if len(x) == heads else jnp.sum(x.reshape(heads, len(x) // heads, *x.shape[1:]), axis=1)


def _times(x: Array, factor: Array | None) -> Array:
    """x [N, R, W] times a factor [N, 1, 1], or [N, R, C] that is the same in every lane."""
    if factor is None:
        return x
    width, lanes = x.shape[2], factor.shape[2]
    if lanes > 1 and lanes < width:
        factor = jnp.concatenate([factor] * -(-width // lanes), axis=2)
    return x * (factor[:, :, :width] if factor.shape[2] > width else factor)


def _rolled(x: Array, shift: int, axis: int) -> Array:
    number: Any = np.int32(shift)  # a Python int would be an int64 under jax_enable_x64
    return pltpu.roll(x, number, axis)


# --- Indices ----------------------------------------------------------------------------------------------------------


def _column(row: Array) -> Array:
    """[N, 1, C] -> [N, C, 1]"""
    return jnp.sum(jnp.where(_where(_same, row.shape[2]), row, np.float32(0)), axis=2, keepdims=True)


def _in_every_lane(column: Array, lanes: int) -> Array:
    """[N, C, 1] -> [N, C, lanes]. Gradients of several products with it are then added up before their lanes are, which
    is what takes long."""
    return jnp.broadcast_to(column, (*column.shape[:2], lanes))


def _where(which: Callable[[Array, Array], Array], size: int) -> Array:
    """bool [C, C]: of a row and a column."""
    return which(*_indices((size, size)))


def _indices(shape: tuple[int, int]) -> tuple[Array, Array]:
    return lax.broadcasted_iota(jnp.int32, shape, 0), lax.broadcasted_iota(jnp.int32, shape, 1)


def _until(row: Array, column: Array) -> Array:
    return column <= row


def _before(row: Array, column: Array) -> Array:
    return column < row


def _same(row: Array, column: Array) -> Array:
    return column == row
