"""A call of chunked linear attention on TPU: which heads a step takes, its arrays and their blocks, and the kernel.

The grid is (batch, blocks of heads, chunks, steps of a block). A step is one chunk of a few heads; the states of a
block's heads stay in VMEM from the first chunk to the last. Arrays of tokens are read and written as they are,
[B, T, N, W], where Mosaic cuts blocks of their heads, a multiple of 8 or all: VMEM then has the block once more, as
rows of 32 bits (two heads of 16 bits a row), of which a head's are read and written by strides. Others are copied heads
first.
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from kernels_pallas.tpu import common
from kernels_pallas.tpu.chunk import BLOCK, CHUNK, exact_sums, is_mild
from kernels_pallas.tpu.common import LANES, SUBLANES, VMEM_BUDGET, round_up

Array = jax.Array


class Plan(NamedTuple):
    """Heads of a block and of a step, and key heads that they read; whether arrays of tokens are read as they lie."""

    block: int
    key_block: int
    heads: int
    key_heads: int
    in_place: bool


# Arrays that a head keeps in VMEM beside the registers: squares of a chunk, and chunks of a head's width. By the decay
# and the delta rule, of values and of gradients: what libtpu spills for v5p at widths of 128 and 256, and a tenth more.
_TEMPORARIES = {
    (None, False): ((1, 3), (2, 4)),
    ("token", False): ((2, 4), (4, 7)),
    (None, True): ((4, 8), (6, 15)),
    ("token", True): ((4, 8), (6, 15)),
    ("channel", False): ((2, 14), (1, 19)),
    ("channel", True): ((4, 20), (6, 42)),
}
# Of float32, which is multiplied in several passes, where it differs.
_TEMPORARIES_FLOAT32 = _TEMPORARIES | {("channel", False): ((2, 14), (2, 28))}


# And of gradients, what a step keeps for each of its key heads, which is most where every head has its own: chunks of a
# head's width, by the decay.
_OF_KEY_HEADS = {None: 0, "token": 3, "channel": 11}
# VMEM that a kernel may take, by the decay and the delta rule, of values and of gradients. Two heads of the gradients
# with decays per channel leave the units idle, and four may take more than libtpu's own limit.
_BUDGETS: dict[tuple[str | None, bool], tuple[int, int]] = {
    ("channel", False): (VMEM_BUDGET, 20 * 2**20),
    ("channel", True): (VMEM_BUDGET, 23 * 2**20),
}


def budget_of(log_decay: Any, beta: Any, *, backwards: bool) -> int:
    """VMEM that the kernel for these arguments may take."""
    return _BUDGETS.get((_kind(log_decay), beta is not None), (VMEM_BUDGET,) * 2)[backwards]


def _kind(log_decay: Any) -> str | None:
    return None if log_decay is None else "token" if log_decay.ndim == 3 else "channel"


def vmem_bytes(
    plan: Plan,
    features: int,
    value_dim: int,
    dtype: Any,
    *,
    decay: str | None = None,
    delta: bool = False,
    backwards: bool = False,
) -> int:
    """VMEM that the kernel of values, or backwards that of gradients, takes at most.

    features, value_dim: before padding. decay: None, "token" or "channel".
    """
    size = jnp.dtype(dtype).itemsize
    keys, values = (round_up(width, LANES) for width in (features, value_dim))
    rows = SUBLANES if plan.in_place else 1
    block, key_block = round_up(plan.block, rows), round_up(plan.key_block, rows)
    # Query and output, or its gradient; then query's gradient.
    tokens = size * block * (keys + values + (keys if backwards else 0))
    tokens += 4 * block * keys * (2 if backwards else 1) if decay == "channel" else 0
    tokens = CHUNK * (tokens + size * key_block * (keys + values))
    state = round_up(features, SUBLANES) * values
    of_step = size * state + 4 * CHUNK * (BLOCK + 2 * SUBLANES)  # kept, and rows of gates
    of_keys = 4 * CHUNK * (keys + values) if backwards else 0  # gradients
    blocks = plan.block * 2 * 4 * state + plan.heads * of_step + plan.key_heads * of_keys
    squares, wide = (_TEMPORARIES_FLOAT32 if size == 4 else _TEMPORARIES)[decay, delta][backwards]
    of_heads = plan.heads * (squares * CHUNK + wide * max(keys, values))
    of_key_heads = plan.key_heads * _OF_KEY_HEADS[decay] * max(keys, values) if backwards else 0
    temporaries = 2 * size * CHUNK * (of_heads + of_key_heads)
    return (3 if plan.in_place else 2) * tokens + 2 * blocks + plan.block * 4 * state + temporaries


def plan_of(
    query: Any, key: Any, value: Any, log_decay: Any = None, beta: Any = None, *, backwards: bool
) -> tuple[Plan, int]:
    """The first plan that VMEM holds, else the smallest one; and the bytes that it takes.

    A step takes up to four heads: with more, libtpu spills. Blocks are two at least: two cores of a v5p share them.
    """
    batch, _, heads, _ = query.shape
    key_heads = key.shape[2]
    group = heads // key_heads
    in_place, copied = [], []
    for most in (4, 2, 1):
        of_group = max(n for n in range(1, most + 1) if group % n == 0)
        keys = max(n for n in range(1, most // of_group + 1) if key_heads % n == 0) if of_group == group else 1
        step = of_group * keys
        copied.append(Plan(step, keys, step, keys, False))
        for block in (2 * SUBLANES, SUBLANES, heads):
            if step > 1 and heads % block == 0 and block % step == 0 and batch * heads > block:
                key_block = block // group if block % group == 0 and block // group % SUBLANES == 0 else key_heads
                # All key heads for each block: read more than twice, a copy of them is cheaper.
                key_block = key_block if key_block * group <= 2 * block else keys
                in_place.append(Plan(block, key_block, step, keys, True))
    of_call: Any = {"decay": _kind(log_decay), "delta": beta is not None, "backwards": backwards}
    budget = budget_of(log_decay, beta, backwards=backwards)
    found = None
    for plan in (*in_place, *copied):
        size = vmem_bytes(plan, query.shape[-1], value.shape[-1], query.dtype, **of_call)
        found = plan, size
        if size <= budget:
            break
    assert found is not None
    return found


class Part(NamedTuple):
    """An array of which every step reads or writes a part.

    rows: VMEM for its block's rows, if it lies as [B, T, N, W]. start: of a block and its step, the first head there.
    """

    whole: jax.ShapeDtypeStruct
    spec: Any
    rows: Any = None
    heads: int = 0
    start: Callable[[Any, Any], Any] = lambda block, step: step


class Call:
    """A call's sizes, padded to whole chunks and lanes, and its arrays."""

    def __init__(
        self,
        query: Array,
        key: Array,
        value: Array,
        log_decay: Array | None,
        beta: Array | None,
        state: Array,
        backwards: bool = False,
    ):
        self.batch, self.length, self.heads, self.key_width = query.shape
        self.key_heads, self.value_width = value.shape[2:]
        self.group = self.heads // self.key_heads
        self.plan, _ = plan_of(query, key, value, log_decay, beta, backwards=backwards)
        self.budget = budget_of(log_decay, beta, backwards=backwards)
        self.steps = self.plan.block // self.plan.heads
        self.features, self.value_dim = (common.padded_width(x.shape[-1]) for x in (query, value))
        self.padded = round_up(self.length, CHUNK)
        self.chunks = self.padded // CHUNK
        self.dtype, self.backwards = query.dtype, backwards
        self.by_channel = log_decay is not None and log_decay.ndim == 4
        self.by_token = log_decay is not None and log_decay.ndim == 3
        self.delta = beta is not None
        self.over = common.varying(*(x for x in (query, key, value, log_decay, beta, state) if x is not None))

    # --- Arrays, and their parts ---

    def inputs(
        self, query: Array, key: Array, value: Array, log_decay: Array | None, beta: Array | None
    ) -> list[tuple[Part, Array]]:
        """What `given` finds again in a kernel."""
        arrays = [
            (self.queries(self.features, self.dtype), query),
            (self.keys(self.features), key),
            (self.keys(self.value_dim), value),
        ]
        if log_decay is not None and self.by_channel:
            arrays.append((self.queries(self.features, jnp.float32), log_decay.astype(jnp.float32)))
        found = [(part, self.laid_out(part, x)) for part, x in arrays]
        if log_decay is not None and self.by_token:
            found.append(self._rows_of(exact_sums(self._by_chunk(log_decay))))
        if beta is not None:
            found.append(self._rows_of(self._by_chunk(beta)[..., None, :]))
        return found

    def given(self, arrays: Sequence[Any]) -> tuple[tuple[Any, ...], list[Any]]:
        """Of the arrays of a step: query, key, value, decay and beta, None if the call has none; and those after."""
        rest = list(arrays[3:])
        decay = rest.pop(0) if self.by_channel or self.by_token else None
        beta = rest.pop(0) if self.delta else None
        return (*arrays[:3], decay, beta), rest

    def gradients(self) -> list[Part]:
        """Of the gradients with respect to the inputs."""
        decays = [self.queries(self.features, jnp.float32)] if self.by_channel else []
        decays += [self.rows(2)] if self.by_token else []
        betas = [self.rows(1)] if self.delta else []
        keys, values = (self._shares_of_keys(width) for width in (self.features, self.value_dim))
        return [self.queries(self.features, self.dtype), keys, values, *decays, *betas]

    def queries(self, width: int, dtype: Any) -> Part:
        return self._tokens(width, dtype, (self.heads, self.plan.block, self.plan.heads))

    def keys(self, width: int) -> Part:
        heads = (self.key_heads, self.plan.key_block, self.plan.key_heads)
        sharing = self.group * self.plan.key_heads // self.plan.heads
        return self._tokens(width, self.dtype, heads, sharing, is_written=False)

    def _shares_of_keys(self, width: int) -> Part:
        """Gradients of keys or values, a step's share each: all where a step has all heads that read a key head."""
        plan = self.plan
        whole = plan.heads == plan.key_heads * self.group
        heads = (self.heads // plan.heads * plan.key_heads, self.steps * plan.key_heads, plan.key_heads)
        return self._tokens(width, self.dtype if whole else jnp.float32, heads)

    def _tokens(
        self, width: int, dtype: Any, heads: tuple[int, int, int], sharing: int = 1, is_written: bool = True
    ) -> Part:
        """heads: in all, of a block and of a step. sharing: steps that read the same ones."""
        many, in_block, of_step = heads

        def number(n: Any, s: Any) -> Any:
            return lax.div(n * np.int32(self.steps) + s, np.int32(sharing))

        def by_head(b: Any, n: Any, c: Any, s: Any) -> tuple[Any, ...]:
            return b, number(n, s), self._chunk(c), common.zero()

        def as_it_lies(b: Any, n: Any, c: Any, s: Any) -> tuple[Any, ...]:
            return (
                b,
                self._chunk(c),
                lax.div(number(n, common.zero()) * np.int32(of_step), np.int32(in_block)),
                common.zero(),
            )

        is_cut = self.plan.in_place and (in_block == many or in_block % SUBLANES == 0)
        in_row = 4 // jnp.dtype(dtype).itemsize
        if not is_cut or width != LANES or in_block % in_row or (is_written and of_step % in_row):
            return Part(self._whole(dtype, many, self.padded, width), _block((of_step, CHUNK, width), by_head))
        return Part(
            self._whole(dtype, self.padded, many, width),
            _block((CHUNK, in_block, width), as_it_lies),
            pltpu.VMEM((CHUNK * in_block // in_row, width), jnp.uint32 if in_row == 2 else jnp.float32),
            of_step,
            lambda n, s: lax.rem(number(n, s) * np.int32(of_step), np.int32(in_block)),
        )

    def rows(self, many: int) -> Part:
        """Rows of a head's tokens."""

        def index(b: Any, n: Any, c: Any, s: Any) -> tuple[Any, ...]:
            return b, n * np.int32(self.steps) + s, common.zero(), self._chunk(c)

        whole = self._whole(jnp.float32, self.heads, many, self.padded)
        return Part(whole, _block((self.plan.heads, many, CHUNK), index))

    def kept(self, shapes: list[Any]) -> list[Part]:
        """Of what the forward keeps, as kept_shapes() has it: states, and inverses."""

        def index(b: Any, n: Any, c: Any, s: Any) -> tuple[Any, ...]:
            return b, n * np.int32(self.steps) + s, self._chunk(c), common.zero(), common.zero()

        states = self._whole(shapes[0].dtype, *shapes[0].shape[1:])
        block = _block((self.plan.heads, None, self.features, self.value_dim), index)
        return [Part(states, block), *(self.rows(x.shape[2]) for x in shapes[1:])]

    def _state(self) -> Part:
        shape = (self.features, self.value_dim)
        whole = self._whole(jnp.float32, self.heads, *shape)
        return Part(whole, _block((self.plan.block, *shape), lambda b, n, c, s: (b, n, common.zero(), common.zero())))

    def _whole(self, dtype: Any, *shape: int) -> Any:
        return jax.ShapeDtypeStruct((self.batch, *shape), dtype, manual_axis_type=self.over)

    def _chunk(self, chunk: Any) -> Any:
        return np.int32(self.chunks - 1) - chunk if self.backwards else chunk

    # --- Before and after the kernel ---

    def laid_out(self, part: Part, x: Array) -> Array:
        """[B, T, N, W], padded and in the part's order."""
        width = part.whole.shape[-1]
        if part.rows is None:
            return common.heads_first(x, self.padded, width)
        return jnp.pad(x, ((0, 0), (0, self.padded - self.length), (0, 0), (0, width - x.shape[-1])))

    def tokens(self, part: Part, x: Array, width: int) -> Array:
        """The inverse of laid_out, [B, T, N, width]."""
        return common.tokens_first(x, self.length, width) if part.rows is None else x[:, : self.length, :, :width]

    def to_keys(self, part: Part, x: Array, like: Array) -> Array:
        """Gradients of keys or values, the shares of a key head added up."""
        x = self.tokens(part, x, like.shape[-1])
        return jnp.sum(x.reshape(*like.shape[:3], -1, like.shape[-1]), axis=3).astype(like.dtype)

    def to_decay(self, part: Part, x: Array, like: Array) -> Array:
        """Gradients of log decays. A token's is in the sums from it to its chunk's end."""
        if self.by_channel:
            return self.tokens(part, x, like.shape[-1]).astype(like.dtype)
        sums = x[:, :, 0].reshape(self.batch, self.heads, self.chunks, CHUNK)
        later = jnp.asarray(np.tri(CHUNK, dtype=np.float32))
        sums = jnp.einsum("BNkC,CD->BNkD", sums, later, precision=lax.Precision.HIGHEST)
        return self.to_row(sums.reshape(self.batch, self.heads, 1, self.padded), like)

    def to_row(self, x: Array, like: Array) -> Array:
        """[B, N, 1, T'] -> [B, T, N]"""
        return jnp.swapaxes(x[:, :, 0, : self.length], 1, 2).astype(like.dtype)

    def _by_chunk(self, gate: Array) -> Array:
        """[B, T, N] -> [B, N, chunks, C] float32, 0 in the padding, which then does nothing."""
        gate = jnp.pad(gate.astype(jnp.float32), ((0, 0), (0, self.padded - self.length), (0, 0)))
        return jnp.swapaxes(gate, 1, 2).reshape(self.batch, self.heads, self.chunks, CHUNK)

    def _rows_of(self, x: Array) -> tuple[Part, Array]:
        """[B, N, chunks, rows, C]"""
        part = self.rows(x.shape[3])
        return part, jnp.swapaxes(x, 2, 3).reshape(part.whole.shape)

    # --- The kernel ---

    def run(
        self,
        name: str,
        function: Callable[..., Any],
        given: Sequence[tuple[Part, Array]],
        state: Array,
        results: list[Part],
    ) -> tuple[list[Array], Array]:
        """The results, and the state after the last step.

        function: (a step's parts of given, float32, and state) -> (the state after it, the step's parts of results).
        With decays per channel it takes mild=, for a step whose decays are, or not. state: [B, N, F, V].
        """
        of_state = self._state()
        widths = [(0, self.features - state.shape[2]), (0, self.value_dim - state.shape[3])]
        first = jnp.pad(state.astype(jnp.float32), [(0, 0), (0, 0), *widths])
        parts_in, parts_out = [part for part, _ in given], results
        arrays = [*(x for _, x in given), first]
        running = pltpu.VMEM((self.plan.block, self.features, self.value_dim), jnp.float32)
        rows = [part.rows for part in (*parts_in, *parts_out) if part.rows is not None]

        def kernel(*refs: Any) -> None:
            (*in_refs, first_ref), refs = refs[: len(arrays)], refs[len(arrays) :]
            (*out_refs, last_ref), (running_ref, *row_refs) = refs[: len(results) + 1], refs[len(results) + 1 :]
            scratch = iter(row_refs)
            read, written = (
                [(part, ref, None if part.rows is None else next(scratch)) for part, ref in zip(parts, refs)]
                for parts, refs in ((parts_in, in_refs), (parts_out, out_refs))
            )
            block, at, step = (pl.program_id(axis) for axis in (1, 2, 3))
            heads = pl.ds(step * np.int32(self.plan.heads), self.plan.heads)

            @pl.when(at == 0)
            def _() -> None:
                running_ref[heads] = first_ref[heads]

            @pl.when(step == 0)
            def _() -> None:
                for _, ref, own in read:
                    if own is not None:
                        own[...] = _as_rows(ref[...])

            def value_of(part: Part, ref: Any, own: Any) -> Array:
                if own is None:
                    return ref[...].astype(jnp.float32)
                return _heads_of(own, part.start(block, step), part.heads)

            def compute(**options: bool) -> None:
                after, found = function([value_of(*each) for each in read], running_ref[heads], **options)
                running_ref[heads] = after
                for (part, ref, own), x in zip(written, found, strict=True):
                    if own is None:
                        ref[...] = x.astype(ref.dtype)
                    else:
                        _put_heads(own, part.start(block, step), x)

            if self.by_channel:
                mild = is_mild(self.dtype, value_of(*read[3]))
                pl.when(mild)(functools.partial(compute, mild=True))
                pl.when(jnp.logical_not(mild))(compute)
            else:
                compute()

            @pl.when(step == self.steps - 1)
            def _() -> None:
                for _, ref, own in written:
                    if own is not None:
                        ref[...] = _from_rows(own[...], ref.shape, ref.dtype)

            @pl.when(at == self.chunks - 1)
            def _() -> None:
                last_ref[heads] = running_ref[heads]

        both, states = self.features + self.value_dim, 2 * self.features * self.value_dim
        products = CHUNK * (CHUNK * both + states)
        products += CHUNK * CHUNK * (self.features + 3 * self.value_dim) if self.delta else 0
        chunks = self.batch * self.heads * self.chunks
        decays = CHUNK * (self.features * 9 if self.by_channel else CHUNK if self.by_token else 0)
        shapes: list[Any] = [part.whole for part in (*results, of_state)]
        *found, last = pl.pallas_call(
            kernel,
            grid=(self.batch, self.heads // self.plan.block, self.chunks, self.steps),
            in_specs=[part.spec for part in (*parts_in, of_state)],
            out_specs=[part.spec for part in (*results, of_state)],
            out_shape=shapes,
            scratch_shapes=[running, *rows],
            compiler_params=pltpu.CompilerParams(
                dimension_semantics=("parallel", "parallel", "arbitrary", "arbitrary"), vmem_limit_bytes=self.budget
            ),
            cost_estimate=pl.CostEstimate(
                flops=2 * chunks * products * (3 if self.backwards else 1),
                transcendentals=chunks * decays,
                bytes_accessed=sum(x.size * x.dtype.itemsize for x in (*arrays, *shapes)),
            ),
            name=name,
        )(*arrays)
        return found, last[:, :, : self.key_width, : self.value_width]


def _block(shape: tuple[int | None, ...], index: Callable[..., Any]) -> Any:
    return pl.BlockSpec((None, *shape), index)


_LATER_HEAD = np.uint32(0xFFFF0000)  # of a row of two; bfloat16 is the upper half of a float32


def _as_rows(x: Array) -> Array:
    """[C, N, W] -> [C N / heads of a row, W]"""
    x = x if x.dtype == jnp.float32 else pltpu.bitcast(x, jnp.uint32)
    return x.reshape(-1, x.shape[2])


def _from_rows(rows: Array, shape: tuple[int, ...], dtype: Any) -> Array:
    """The inverse of _as_rows."""
    rows = rows.reshape(CHUNK, -1, shape[2])
    return rows if dtype == jnp.float32 else pltpu.bitcast(rows, dtype)


def _heads_of(rows: Any, first: Array, many: int) -> Array:
    """[many, C, W] float32, from a ref of rows."""
    stride = rows.shape[0] // CHUNK
    heads = [first + np.int32(n) for n in range(many)]
    if rows.dtype == jnp.float32:
        return jnp.stack([rows[pl.ds(head, CHUNK, stride=stride)] for head in heads])
    found = []
    for head in heads:
        both = rows[pl.ds(lax.div(head, np.int32(2)), CHUNK, stride=stride)]
        shift = (np.int32(1) - lax.rem(head, np.int32(2))) * np.int32(16)
        found.append(lax.shift_left(both, jnp.broadcast_to(shift.astype(jnp.uint32), both.shape)) & _LATER_HEAD)
    return lax.bitcast_convert_type(jnp.stack(found), jnp.float32)


def _put_heads(rows: Any, first: Array, x: Array) -> None:
    """x, [N, C, W], to a ref of rows; of 16 bits in pairs."""
    stride = rows.shape[0] // CHUNK
    if rows.dtype == jnp.float32:
        for n, head in enumerate(x):
            rows[pl.ds(first + np.int32(n), CHUNK, stride=stride)] = head
        return
    bits = lax.bitcast_convert_type(x.astype(jnp.bfloat16).astype(jnp.float32), jnp.uint32)
    for n in range(0, len(bits), 2):
        row = lax.div(first, np.int32(2)) + np.int32(n // 2)
        rows[pl.ds(row, CHUNK, stride=stride)] = (bits[n] >> np.uint32(16)) | bits[n + 1]
