"""What the kernels of chunked linear attention share: a call's arrays, decays between tokens, the delta rule's inverse.

With D_ij = g_{j+1} + ... + g_i, the state S_0 before the chunk, and C tokens:

    U   = X beta (V - (e^{D_i0} K) S_0)                       X = (I + A)^{-1}, A = tril(beta KK^T * e^D, -1)
    O   = tril(QK^T * e^D) U + (e^{D_i0} Q) S_0
    S_C = e^{D_C0} S_0 + (e^{D_Cj} K)^T U

(the chunk form of the delta rule: Yang et al. 2024; without it U = V.)

Decays of one number per token come as vectors of sums, and are multiplied with products. Decays per channel do not come
out of a product: queries and keys that are decayed to the chunk's ends are made before the kernels, and the products
within a chunk are made level by level, from pairs of blocks of 1, 2, 4, ... 32 tokens: the later block's queries decay
from the middle of the pair, the earlier one's keys up to it.

Numerics: every exponent is <= 0. Per channel it is a sum of log decays. Per token it is a difference of two sums, of
which those that drop a state altogether (below float32's exp) are left out: they are boundaries that no decay crosses.
"""

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from kernels_pallas.gpu.band import padded_width
from kernels_pallas.gpu.common import (
    COLUMN,
    ROW,
    ROWS,
    Product,
    by_column,
    by_row,
    dot,
    iota,
    launch,
    load,
    store,
)

Array = jax.Array

CHUNK = ROWS  # tokens
SQUARE = (CHUNK, CHUNK)
LEVELS = 6  # blocks of 1, 2, 4, ... 32 tokens are joined in pairs
WIDEST = 256  # of keys and values
_MULTIPROCESSORS = 132  # of a Hopper GPU
_LEAST_CHUNKS = 32  # of a stretch
_LEAST_STRETCHES = 3  # two take as long as one
_LEAST = np.float32(-104)  # float32's exp of less is 0
# Vectors of a head's tokens, as far as the call has them.
SUMS, START, INTO, ONWARD, BETA = "sums", "start", "into", "onward", "beta"


class Call:
    """A call's sizes, padded to whole chunks and to widths of 64, and its arrays as the kernels read them.

    Tokens are [B, T', K or N, width], vectors (`gates`) [B, N, rows, T'], states [B, N, V, F]: transposed.
    """

    def __init__(self, query: Any, key: Any, value: Any, log_decay: Any, beta: Any):
        self.batch, self.length, self.heads, self.key_width = query.shape
        self.key_heads, self.value_width = value.shape[2:]
        self.group, self.dtype = self.heads // self.key_heads, jnp.dtype(query.dtype)
        self.features, self.values = padded_width(self.key_width), padded_width(self.value_width)
        self.chunks = -(-self.length // CHUNK)
        self.padded = self.chunks * CHUNK
        self.part_dtype = self.dtype if self.group == 1 else jnp.float32  # of what is added up over a group's heads
        self.delta = beta is not None
        self.per_token = log_decay is not None and log_decay.ndim == 3
        self.per_channel = log_decay is not None and log_decay.ndim == 4
        self.rows = ([SUMS, START, INTO, ONWARD] if self.per_token else []) + ([BETA] if self.delta else [])
        blocks, transitions = (self.batch * self.heads * width // ROWS for width in (self.values, self.features))
        self.stretch = -(-self.chunks // stretches(self.chunks, blocks, transitions if self.delta else 0))  # chunks
        self.stretches = -(-self.chunks // self.stretch)

    # --- Before and after the kernels ---

    def tokens(self, x: Array, width: int, dtype: Any = None) -> Array:
        """[B, T, K, W] -> [B, T', K, width]."""
        x = x.astype(dtype or self.dtype)
        return jnp.pad(x, ((0, 0), (0, self.padded - x.shape[1]), (0, 0), (0, width - x.shape[-1])))

    def state(self, x: Array) -> Array:
        """[B, N, F, V] -> [B, N, V', F'] float32."""
        x = jnp.pad(x, ((0, 0), (0, 0), (0, self.features - x.shape[2]), (0, self.values - x.shape[3])))
        return jnp.swapaxes(x, 2, 3).astype(jnp.float32)

    def from_state(self, x: Array) -> Array:
        return jnp.swapaxes(x, 2, 3)[:, :, : self.key_width, : self.value_width]

    def by_chunk(self, gate: Array) -> Array:
        """[B, T, N] -> [B, N, chunks, C] float32, 0 in the padding, which then does nothing."""
        gate = jnp.pad(gate.astype(jnp.float32), ((0, 0), (0, self.padded - gate.shape[1]), (0, 0)))
        return jnp.swapaxes(gate, 1, 2).reshape(self.batch, self.heads, self.chunks, CHUNK)

    def from_chunks(self, x: Array, like: Array) -> Array:
        x = x.reshape(self.batch, self.heads, self.padded)[:, :, : self.length]
        return jnp.swapaxes(x, 1, 2).astype(like.dtype)

    def gates(self, log_decay: Array | None, beta: Array | None) -> Array | None:
        """The vectors [B, N, rows, T'] float32."""
        found = []
        if log_decay is not None and self.per_token:
            decay = self.by_chunk(log_decay)
            drops = decay < _LEAST
            decay = jnp.where(drops, 0, decay)
            number = jnp.cumsum(drops, axis=-1)
            place = lax.broadcasted_iota(jnp.int32, decay.shape, 3)
            sums = jnp.cumsum(decay, axis=-1)
            after = _sums_after(decay)
            found += [
                sums,
                lax.cummax(jnp.where(drops, place, 0), axis=3).astype(jnp.float32),
                jnp.where(number == 0, jnp.exp(sums), 0),
                jnp.where(number == number[..., -1:], jnp.exp(after), 0),
            ]
        if beta is not None:
            found.append(self.by_chunk(beta))
        if not found:
            return None
        return jnp.stack(found, axis=2).reshape(self.batch, self.heads, len(found), self.padded)

    def decayed(self, query: Array, key: Array, log_decay: Array) -> tuple[Array, Array, Array, Array]:
        """With decays per channel: queries and keys that decay from before the chunk, keys that decay to its end, all
        [B, T', N, F'], and the decay over each chunk, [B, N, chunks, F']. The arguments are tokens()."""
        shape = (self.batch, self.chunks, CHUNK, self.heads, self.features)
        decay = log_decay.reshape(shape)
        # Sums as products of float32: XLA's own sums take its GPU several times as long as all that is made of them.
        earlier = jnp.tri(CHUNK, dtype=jnp.float32)
        sums, after = (
            jnp.einsum("CD,BkDNF->BkCNF", ones, decay, precision=lax.Precision.HIGHEST)
            for ones in (earlier, 1 - earlier)
        )
        into, onward = (jnp.exp(x).reshape(query.shape) for x in (sums, after))
        key = jnp.repeat(key, self.group, axis=2)
        arrays = [
            (x.astype(jnp.float32) * factor).astype(self.dtype)
            for x, factor in ((query, into), (key, into), (key, onward))
        ]
        return arrays[0], arrays[1], arrays[2], jnp.moveaxis(jnp.exp(sums[:, :, -1]), 1, 2)

    def by_stretch(self, through: Array) -> Array:
        """[B, N, chunks, W], a decay over each chunk -> [B, N, stretches, 1, W], over each stretch."""
        missing = self.stretches * self.stretch - self.chunks
        through = jnp.pad(through, ((0, 0), (0, 0), (0, missing), (0, 0)), constant_values=1)
        shape = (self.batch, self.heads, self.stretches, self.stretch, through.shape[-1])
        return jnp.prod(through.reshape(shape), axis=3, keepdims=True)

    def spans(self, first: int, many: int) -> np.ndarray:
        """int32 [many, 2]: the first chunk of the stretches from `first` on, and how many it has. Kernels read it from
        memory, see in_loop."""
        begin = np.arange(first, first + many) * self.stretch
        return np.stack([begin, np.minimum(self.chunks - begin, self.stretch)], axis=1).astype(np.int32)

    def row(self, gates: Array, name: str) -> Array:
        """One of the vectors, [B, N, T']."""
        return gates[:, :, self.rows.index(name)]

    def to_key_heads(self, x: Array) -> Array:
        """[B, T', N, W] -> [B, T', K, W], added up over each group of heads."""
        if self.group == 1:
            return x
        return jnp.sum(x.reshape(*x.shape[:2], self.key_heads, self.group, x.shape[-1]), axis=3)

    # --- Inside a kernel ---

    def head_of(self, ref: Any, head: Array) -> Array:
        """The head of tokens [B, T', K or N, width] that a query head reads."""
        return head if ref.shape[2] == self.heads else lax.div(head, np.int32(self.group))

    def vector(self, gates: Any, name: str, layout: Any) -> Array:
        """One of the chunk's vectors. gates: ref of [rows, C]."""
        return load(gates.at[self.rows.index(name)], layout)

    def decays(self, gates: Any, transposed: bool = False) -> Array:
        """e^{D_ij} at row i and column j <= i, 0 above; or its transpose. 1 without decays per token."""
        late, early = (iota(SQUARE, axis) for axis in ((1, 0) if transposed else (0, 1)))
        keep = early <= late
        if not self.per_token:
            return jnp.where(keep, np.float32(1), np.float32(0))
        spread = {ROW: by_row, COLUMN: by_column}
        of_late, of_early = (COLUMN, ROW) if transposed else (ROW, COLUMN)
        sums_late = spread[of_late](self.vector(gates, SUMS, of_late), SQUARE)
        sums_early = spread[of_early](self.vector(gates, SUMS, of_early), SQUARE)
        start = spread[of_late](self.vector(gates, START, of_late), SQUARE)
        keep &= early.astype(jnp.float32) >= start
        return jnp.exp(jnp.where(keep, sums_late - sums_early, np.float32(-np.inf)))


def stretches(chunks: int, blocks: int, transitions: int) -> int:
    """Into how many stretches, side by side, a sequence's chunks are cut where states go from one to the next.

    blocks: of the states' kernel without stretches. transitions: as many for the delta rule's matrices, else 0.

    A multiprocessor has one block at a time: few of them leave the others idle. Two passes over n stretches then take
    2 / n of the time of one: all stretches but the last from a state of zeros (with the delta rule also from the
    identity and without values: the matrix that multiplies states); and, with the state before each from these, all of
    them again. Only the second pass stores more than the ends. Inverses, weights, outputs and token gradients, of every
    chunk at once anyway, are computed once. To join two stretches takes as long as some chunks.
    """
    most = min(chunks // _LEAST_CHUNKS, _MULTIPROCESSORS // blocks, _MULTIPROCESSORS // (blocks + transitions) + 1)
    return most if most >= _LEAST_STRETCHES else 1


def states_before(start: Array, own: Array, transitions: Array) -> Array:
    """The state before each of n + 1 stretches, [B, N, n + 1, V, F], all transposed.

    start: before the first, [B, N, V, F]. own: what each of the n others makes of zeros, [B, N, n, V, F]. transitions:
    what it multiplies a state by, [B, N, n, 1, 1 or F] or matrices [B, N, n, F, F].
    """

    def after(state: Array, stretch: tuple[Array, Array]) -> tuple[Array, Array]:
        own, by = stretch
        state = jnp.matmul(state, by, precision=lax.Precision.HIGHEST) if by.shape[2] > 1 else state * by
        return state + own, state + own

    each = jnp.moveaxis(own, 2, 0), jnp.moveaxis(transitions, 2, 0)
    return jnp.moveaxis(jnp.concatenate([start[None], lax.scan(after, start, each)[1]]), 0, 2)


def _sums_after(x: Array) -> Array:
    """Of each number along the last axis, the sum of those after it."""
    later = jnp.concatenate([x[..., 1:], jnp.zeros_like(x[..., :1])], axis=-1)
    return lax.cumsum(later, axis=x.ndim - 1, reverse=True)


def run(
    body: Callable[[Any], None],
    name: str,
    inputs: dict[str, Array | None],
    *,
    out: dict[str, tuple[tuple[int, ...], Any]],
    grid: dict[str, int],
    scratch: dict[str, Any],
) -> dict[str, Array]:
    """Launches body(refs by name) with one warpgroup per block. Inputs that are None have no ref."""
    given = {key: x for key, x in inputs.items() if x is not None}
    names = [*given, *out, *scratch]

    def by_name(*refs: Any) -> None:
        body(SimpleNamespace(**dict(zip(names, refs, strict=True))))

    results = launch(
        by_name,
        name,
        *given.values(),
        out=list(out.values()),
        grid=grid,
        scratch=list(scratch.values()),
        warpgroups=1,
    )
    return dict(zip(out, results, strict=True))


def place_of(*names: str) -> list[Array]:
    return [lax.axis_index(name) for name in names]


# Masks of a level are intervals of columns, whose ends depend on the row alone: that takes few registers.
def pairs(block: Any) -> Array:
    """bool [C, C]: where a later block's row meets a column of the earlier block of its pair. block: a power of two."""
    row, column = iota(SQUARE, 0), iota(SQUARE, 1)
    start = row & (-2 * block)
    return (column >= start) & (column < start + (row & block))


def ones_to_middle(block: Any, dtype: Any, transposed: bool = False) -> Array:
    """[C, C] of 0 and 1: row i sums what lies between i and its pair's middle, before which i itself is left out."""
    token, other = (iota(SQUARE, axis) for axis in ((1, 0) if transposed else (0, 1)))
    first, next_token = token & -block, token + np.int32(1)
    is_late = (token & block) != 0
    start, end = jnp.where(is_late, first, next_token), jnp.where(is_late, next_token, first + block)
    return jnp.where((other >= start) & (other < end), np.float32(1), np.float32(0)).astype(dtype)


def over_levels(body: Callable[[Array, Any], Any], carry: Any, count: Any = LEVELS) -> Any:
    """body(tokens of a block, carry) -> carry for each level: a loop, as masks of all levels would take registers."""

    def level(number: Array, carry: Any) -> Any:
        return body(jnp.int32(1) << number, carry)

    return lax.fori_loop(jnp.int32(0), jnp.int32(count), level, carry)


def split(x: Array, dtype: Any, parts: int) -> list[Array]:
    """Numbers of that dtype that add up to x as nearly as so many can."""
    found = []
    for _ in range(parts):
        found.append(x.astype(dtype))
        x = x - found[-1].astype(jnp.float32)
    return found


def inverse(system: Array, system_s: Any, inverse_s: Any) -> Array:
    """(I + A)^{-1} [C, C] float32 of a strictly lower A, float32 in registers.

    With X the inverse of the diagonal blocks, block by block, and L the part of A that leads from the earlier to the
    later block of each pair: X - X L X is the inverse of the blocks of pairs. Factors are hi + lo in float16, products
    hi hi + hi lo + lo hi: 22 bits, of numbers up to 65504.

    system_s, inverse_s: scratch [2, C, C] float16.
    """

    def put(ref: Any, x: Array) -> None:
        high, low = split(x, jnp.float16, 2)
        ref[0] = high
        store(ref.at[1], low)

    def times(x: Array, ref: Any) -> Array:
        high, low = split(x, jnp.float16, 2)
        products = [Product(high, ref.at[0]), Product(high, ref.at[1]), Product(low, ref.at[0])]
        return dot(*products, shape=SQUARE)

    put(system_s, system)
    zero = np.float32(0)
    unit = jnp.where(iota(SQUARE, 0) == iota(SQUARE, 1), np.float32(1), zero)
    result = unit - jnp.where(pairs(np.int32(1)), system, zero)
    for level in range(1, LEVELS):
        put(inverse_s, result)
        leads = jnp.where(
            pairs(np.int32(1 << level)), times(result, system_s), zero
        )  # X A at the pairs is X L: X is block diagonal
        result = result - times(leads, inverse_s)
    return result
