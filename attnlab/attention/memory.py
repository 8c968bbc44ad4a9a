"""Memories that learn as they read: a small network per head whose weights take a gradient step at every token.

With a memory M(W, x), an objective, rates r_t > 0, momentum m_t and log decay g_t, and W_c the weights before token t's
chunk of C tokens (C = 1: before the token),

    G_t = gradient in W of objective(M(W_c, k_t), v_t)
    S_t = m_t S_{t-1} - r_t G_t        A_t = e^{g_t} A_{t-1} + S_t        W_t = project(A_t)        o_t = M(W_t, q_t)

or, per chunk, the tokens of a chunk read the weights before it, o_t = M(W_c, q_t), and one step follows it:

    S <- m_c S - sum_t r_t G_t         A <- e^{g_c} A + S                 W = project(A)

Published cases: Titans (Behrouz et al. 2024) ("l2", momentum, decay), TTT (Sun et al. 2024) ("l2", chunks of 16), Miras
(Behrouz et al. 2025) (Moneta: ("lp", 3) and ("lq", 4), C = 1; Yaad: "huber_norm"), LaCT (Zhang et al. 2025) ("swiglu",
"dot", per chunk, project "norm"). Linear, "l2" and C = 1 is the delta rule.

Each weight only enters as x W. So within a chunk W_t = a_t A_0 + b_t S_0 - sum_{j<=t} c_tj r_j x_j g_j^T, where x_j is
what the product was given of token j, and g_j the objective's gradient in what it gave, with numbers

    E_ti = prod_{i<u<=t} e^{g_u}     F_ij = prod_{j<u<=i} m_u     c = E F     a_t = prod_{u<=t} e^{g_u}
    b = E (prod_{u<=i} m_u)_i

and a read is y_t = a_t x_t A_0 + b_t x_t S_0 - (c * (x X^T)) (r G): no token's weights are ever formed.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from attnlab.attention._dispatch.choice import Implementations, dispatch
from attnlab.attention._dispatch.exchange import Parts, in_turn, over_positions, positions_below, whole_space
from attnlab.attention._dispatch.primitive import primitive
from attnlab.attention._shared import fast_weights
from attnlab.attention._shared.checks import (
    Array,
    accumulator_dtype,
    check_array,
    check_bool,
    check_choice,
    check_dtype,
    check_floating,
    check_int,
    check_lengths,
    check_position,
    check_query_key_value,
    check_sizes,
    check_step,
    check_type,
    require,
    shown,
)
from attnlab.attention._shared.chunks import products_between, scan_chunks
from attnlab.attention._shared.fast_weights import Memory, Objective, Project, Weights
from attnlab.attention._shared.finite import (
    finite_or_zero,
    is_spoilt,
    spoil,
    spoilt_since,
    spoilt_tokens,
    state_is_spoilt,
)
from attnlab.attention._shared.heads import repeat_key_heads


class MemoryState(NamedTuple):
    """What the tokens so far have written, in float32 (float64 for float64 inputs): dicts of [B, N, in, out].

    position: int32 [], the next token's, or [B], of each row.
    weights: A. momentum: S, or None without momentum.
    start: the weights before the next token's chunk; None per chunk, whose weights stay, and with chunks of one token.
    pending: per chunk, the sum of -r G over the tokens of a chunk that is not full; else None.
    """

    position: Array
    weights: Weights
    momentum: Weights | None
    start: Weights | None
    pending: Weights | None


class _Inputs(NamedTuple):
    """momentum, log_decay: [B, T, N], per chunk those of the chunk at its last token, neutral at others. is_token: bool
    [B, T], False of padding; None where there is none. state: without its position. starts: what `project` takes."""

    query: Array
    key: Array
    value: Array
    rate: Weights
    momentum: Array | None
    log_decay: Array | None
    threshold: Array | None
    is_token: Array | None
    state: MemoryState
    starts: Weights | None


class _Options(NamedTuple):
    memory: Memory
    objective: Objective
    per: str
    chunk_size: int
    decay_first: bool
    project: Project


# (inputs, options=) -> (out, the state after it), of finite arrays.
_Attend = Callable[..., tuple[Array, MemoryState]]


@primitive("B*N.", "", "BN..")
def memory_attention(
    query: Array,
    key: Array,
    value: Array,
    weights: Weights,
    *,
    rate: Array | Weights,
    memory: Memory = "linear",
    objective: Objective = "l2",
    momentum: Array | None = None,
    log_decay: Array | None = None,
    threshold: Array | None = None,
    per: str = "token",
    chunk_size: int = 16,
    decay_first: bool = False,
    project: Project = None,
    initial_state: MemoryState | None = None,
    return_state: bool = False,
    lengths: Array | None = None,
    implementation: str | None = None,
) -> Any:
    """A memory that is written at every token, and read; the module's docstring has the formulas. Causal.

    Args:
      query: [B, T, N, H], floating. key: [B, T, K, H], value: [B, T, K, V]; K divides N.
      weights: the fast weights that every row starts from, by name, [N, in, out] each. Gradients flow to them.
      rate: [B, T, N] > 0, of all weights; or a dict of such by weight. With keys of unit length, linear "l2" forgets a
        key's old value wholly at 1, and diverges above 2.
      memory: "linear" (weight w: x w), "mlp" (w1, w2: x + norm(gelu(x w1) w2), with V = H), "swiglu" (gate, up, down:
        (silu(x gate) * x up) down), or a function memory(linear, x) of x [B, C, N, H] -> [B, C, N, V] that uses each
        fast weight once, as linear(name, x [B, C, N, in]), and treats tokens alike. All else in it is plain JAX, whose
        own arrays get gradients; a bias is linear("b", ones [B, C, N, 1]).
      objective: of a prediction m = M(W, k): "dot" -m.v; "l2" |m - v|^2 / 2; ("lp", p) sum |m - v|^p / p, p >= 1;
        "huber" per channel and "huber_norm" of |m - v|: quadratic up to the threshold, linear beyond; or a function
        [..., V], [..., V] -> [...].
      momentum: m, [B, T, N], or per chunk [B, ceil(T / C), N]. None: 0, and the state keeps no S.
      log_decay: g <= 0, of the same shape. None: no decay. An unfinished chunk's last gates are not used.
      threshold: [B, T, N] > 0, of the two huber objectives.
      per: "token" or "chunk", which is strictly causal by chunk: tokens do not read what their own chunk writes.
      chunk_size: C, which the result depends on: all gradients of a chunk are taken at the weights before it.
      decay_first: take gradients at e^g A, as gated delta rules do, instead of at A as in Titans. With C = 1 per token.
      project: what the weights are held to, for C = 1 or per chunk: "norm" (every column of a weight, an output's
        inputs, gets the length that it had in `weights`), ("lq", q) (sign(A) |A|^(q-1) / |A|_q^(q-2), q >= 2) or a
        function project(weight [B, N, in, out], start [1, N, in, out]) -> weight. None: nothing.
      initial_state: of the tokens before the first (see init_memory_cache), which has to end a chunk: rows in which it
        does not are NaN. Default: there are none.
      return_state: also return the MemoryState after the last token.
      lengths: [B] integers, 0 to T: the row's tokens, padding after them, which leaves the state alone. Outputs of
        padding mean nothing. Default: T in all rows.
      implementation: "reference" (a scan over tokens), "xla" (a scan over chunks) or None.

    Returns:
      [B, T, N, V] in query's dtype, or (that, MemoryState) with return_state. A token that is not finite makes NaN of
      what sees it, and of nothing else.

    Raises:
      ValueError, TypeError: at trace time, naming the argument.

    Complexity of "xla", per head: O(T (C (in + out) + in out)) time, summed over the weights; O(T) memory, and for
    gradients one state per chunk more, O(T in out / C); no T x T buffer. Devices that share the positions wait for each
    other: the state passes from part to part, as two parts' writes do not join. A part holds whole chunks.
    """
    check_query_key_value(query, key, value)
    batch, length = query.shape[:2]
    dtype = accumulator_dtype(query, key, value)
    options = _checked(query, value, weights, memory, objective, threshold, per, chunk_size, decay_first, project)
    rates = _check_gates(query, weights, rate, momentum, log_decay, options)
    return_state = check_bool("return_state", return_state)
    weights = {name: weight.astype(dtype) for name, weight in weights.items()}
    if initial_state is None:
        state = _first(weights, batch, options, momentum is not None, query)
    else:
        _check_state("initial_state", initial_state, weights, batch, options, momentum is not None)
        state = jax.tree.map(lambda x: x if jnp.issubdtype(x.dtype, jnp.integer) else x.astype(dtype), initial_state)
    is_token = None
    if (lengths := check_lengths(lengths, batch)) is not None:
        is_token = positions_below(lengths, length)
        query, key, value, rates, threshold = jax.tree.map(
            functools.partial(_where_token, is_token, 0), (query, key, value, rates, threshold)
        )
    momentum = _by_token(momentum, 1, length, is_token, options)
    log_decay = _by_token(log_decay, 0, length, is_token, options)
    inputs = _Inputs(
        query,
        key,
        value,
        rates,
        momentum,
        log_decay,
        threshold,
        is_token,
        state._replace(position=None),  # type: ignore[arg-type]
        None if project is None else weights,
    )
    attend = functools.partial(dispatch, "memory_attention", IMPLEMENTATIONS, implementation, options=options)
    layouts = _layouts(inputs, options)
    out, after = over_positions(
        functools.partial(_whole, attend, options),
        functools.partial(_parted, attend, options),
        layouts,
        (layouts[0], layouts.state),
        *inputs,
    )
    if initial_state is not None and options.chunk_size > 1:
        within = jnp.broadcast_to(state.position % options.chunk_size != 0, (batch,))
        out, after = jax.tree.map(lambda x: spoil(x, within), (out, after))
    position = state.position + (whole_space((length,))[0] if lengths is None else lengths)
    return (out, after._replace(position=position)) if return_state else out


def init_memory_cache(
    batch: int,
    weights: Weights,
    *,
    momentum: bool = False,
    per: str = "token",
    chunk_size: int = 16,
    dtype: Any = jnp.float32,
) -> MemoryState:
    """The state before the first token, for memory_step and initial_state: `weights` [N, in, out] in every row.

    momentum: whether the calls have momentum. per, chunk_size: as in the call.
    """
    (batch,), dtype, momentum = check_sizes(batch=batch), check_dtype("dtype", dtype), check_bool("momentum", momentum)
    fast_weights.check_weights(weights)
    options = _Options("linear", "l2", *_check_chunks(per, chunk_size), False, None)
    weights = {name: weight.astype(dtype) for name, weight in weights.items()}
    return _first(weights, batch, options, momentum, next(iter(weights.values())))


@primitive("B*N.", like="state")
def memory_step(
    state: MemoryState,
    query: Array,
    key: Array,
    value: Array,
    weights: Weights,
    *,
    rate: Array | Weights,
    memory: Memory = "linear",
    objective: Objective = "l2",
    momentum: Array | None = None,
    log_decay: Array | None = None,
    threshold: Array | None = None,
    per: str = "token",
    chunk_size: int = 16,
    decay_first: bool = False,
    project: Project = None,
) -> tuple[Array, MemoryState]:
    """One more token: memory_attention's next output and state, in O(in out) per head, summed over the weights.

    Args:
      state: from init_memory_cache, an earlier step, or memory_attention(..., return_state=True).
      query, key, value: [B, 1, N, H], [B, 1, K, H], [B, 1, K, V].
      weights: as in the call; the state has those in use, and `project` is what sees these.
      rate, momentum, log_decay, threshold: [B, 1, N]. Per chunk, the gates are used by the chunk's last token alone.
      The rest as in memory_attention.

    Returns:
      ([B, 1, N, V] in query's dtype, the state after this token).
    """
    check_step(query, key, value)
    batch = query.shape[0]
    dtype = accumulator_dtype(query, key, value)
    options = _checked(query, value, weights, memory, objective, threshold, per, chunk_size, decay_first, project)
    rate = _check_gates(query, weights, rate, momentum, log_decay, options)
    _check_state("state", state, weights, batch, options, momentum is not None)
    weights = {name: weight.astype(dtype) for name, weight in weights.items()}
    state = jax.tree.map(lambda x: x if jnp.issubdtype(x.dtype, jnp.integer) else x.astype(dtype), state)
    closes = jnp.broadcast_to((state.position + 1) % options.chunk_size == 0, (batch,))
    tokens = jax.tree.map(lambda x: x[:, 0], (query, key, value, rate, momentum, log_decay, threshold))
    before = _with_start(state._replace(position=None), weights, options)  # type: ignore[arg-type]
    after, out = _token(options, weights, before, (*tokens, None, closes))
    after = after._replace(position=state.position + 1, start=None if state.start is None else after.start)
    return out[:, None].astype(query.dtype), after


# --- What the forms share ---------------------------------------------------------------------------------------------


def _check_chunks(per: Any, chunk_size: Any) -> tuple[str, int]:
    return check_choice("per", per, ("token", "chunk")), check_int("chunk_size", chunk_size, least=1, most=2**31 - 1)


def _checked(
    query: Array,
    value: Array,
    weights: Any,
    memory: Any,
    objective: Any,
    threshold: Any,
    per: Any,
    chunk_size: Any,
    decay_first: Any,
    project: Any,
) -> _Options:
    dtype = accumulator_dtype(query, value)
    per, chunk_size = _check_chunks(per, chunk_size)
    decay_first = check_bool("decay_first", decay_first)
    fast_weights.check_weights(weights, query.shape[2])
    fast_weights.check_memory(memory, weights, query, value, dtype)
    objective = fast_weights.check_objective(objective, threshold, value)
    if threshold is not None:
        check_array("threshold", threshold, query.shape[:3], "[B, T, N]")
    project = fast_weights.check_project(project, weights, query.shape[0], dtype)
    of_chunks = f"need per='chunk' or chunk_size=1, not {chunk_size}: within a chunk, weights are sums of its writes"
    require(project is None or per == "chunk" or chunk_size == 1, "project", shown(project), of_chunks)
    allowed = f"needs per='token' and chunk_size=1, not {per!r} and {chunk_size}"
    require(not decay_first or (per == "token" and chunk_size == 1), "decay_first", True, allowed)
    return _Options(memory, objective, per, chunk_size, decay_first, project)


def _check_gates(
    query: Array, weights: Weights, rate: Any, momentum: Any, log_decay: Any, options: _Options
) -> Weights:
    """The rates by weight."""
    batch, length, heads, _ = query.shape
    if not isinstance(rate, dict):
        check_array("rate", rate, query.shape[:3], "[B, T, N]")
        rate = dict.fromkeys(weights, rate)
    require(set(rate) == set(weights), "rate", f"a dict of {sorted(map(str, rate))}", f"need {sorted(weights)}")
    for name, one in rate.items():
        check_array(f"rate[{name!r}]", one, query.shape[:3], "[B, T, N]")
        check_floating("rate", one)
    require(not options.decay_first or log_decay is not None, "log_decay", None, "need an array with decay_first=True")
    count, layout = length, "[B, T, N]"
    if options.per == "chunk":
        count, layout = -(-length // options.chunk_size), "[B, ceil(T / chunk_size), N]"
    for name, gate in (("momentum", momentum), ("log_decay", log_decay)):
        if gate is not None:
            check_array(name, gate, (batch, count, heads), layout)
            check_floating(name, gate)
    return rate


def _check_state(name: str, state: Any, weights: Weights, batch: int, options: _Options, has_momentum: bool) -> None:
    check_type(name, state, MemoryState, "init_memory_cache")
    check_position(f"{name}.position", state.position, batch)
    per_chunk, has_start = options.per == "chunk", options.per == "token" and options.chunk_size > 1
    needs = {"weights": True, "momentum": has_momentum, "start": has_start, "pending": per_chunk}
    for field, needed in needs.items():
        arrays, where = getattr(state, field), f"{name}.{field}"
        of_call = f"need {'a dict by weight' if needed else 'None'}, as init_memory_cache gives it with this call's"
        require((arrays is not None) == needed, where, type(arrays).__name__, f"{of_call} options")
        if needed:
            is_dict = isinstance(arrays, dict) and set(arrays) == set(weights)
            require(is_dict, where, type(arrays).__name__, f"need a dict of {sorted(weights)}")
            for key, weight in weights.items():
                check_array(f"{where}[{key!r}]", arrays[key], (batch, *weight.shape), "[B, N, in, out]")


def _first(weights: Weights, batch: int, options: _Options, has_momentum: bool, like: Array) -> MemoryState:
    # Made like a token: inside shard_map a scan's carry must vary over the mesh axes that its inputs vary over.
    def zeros(weight: Array) -> Array:
        return jnp.zeros_like(like, shape=(batch, *weight.shape), dtype=weight.dtype)

    written = {name: weight[None] + zeros(weight) for name, weight in weights.items()}
    nothing = {name: zeros(weight) for name, weight in weights.items()}
    is_chunked = options.per == "token" and options.chunk_size > 1
    return MemoryState(
        jnp.zeros((), jnp.int32),
        written,
        nothing if has_momentum else None,
        written if is_chunked else None,
        nothing if options.per == "chunk" else None,
    )


def _where_token(is_token: Array, other: float, x: Array) -> Array:
    return jnp.where(is_token.reshape(*is_token.shape, *(1,) * (x.ndim - 2)), x, other)


def _by_token(
    gate: Array | None, neutral: float, length: int, is_token: Array | None, options: _Options
) -> Array | None:
    """A gate [B, T, N], neutral at padding; of chunks also at all tokens but the last one of a full chunk."""
    if gate is None:
        return None
    if options.per == "chunk":
        gate = jnp.repeat(gate, min(options.chunk_size, length), axis=1)[:, :length]
        closes = (jnp.arange(length) + 1) % options.chunk_size == 0
        gate = jnp.where(closes[None, :, None], gate, neutral)
    return gate if is_token is None else _where_token(is_token, neutral, gate)


def _layouts(inputs: _Inputs, options: _Options) -> _Inputs:
    def like(tree: Any, layout: str) -> Any:
        return jax.tree.map(lambda _: layout, tree)

    own = (like(inputs.rate, "B*N"), "B*N", "B*N", "B*N", "B*", like(inputs.state, "BN.."), like(inputs.starts, "N.."))
    layouts = _Inputs("B*N.", "B*K.", "B*K.", *own)  # type: ignore[arg-type]
    functions = (options.memory, options.objective, options.project)
    if any(map(callable, functions)):  # whose own arrays have all heads
        layouts = jax.tree.map(lambda layout: layout.replace("N", ".").replace("K", "."), layouts)
    return layouts


def _whole(attend: _Attend, options: _Options, *arrays: Any) -> tuple[Array, MemoryState]:
    inputs = _Inputs(*arrays)
    out, state = attend(_finite(inputs))
    at_tokens, at_end = _spoilt(inputs, state_is_spoilt(inputs.state), options)
    return spoil(out, at_tokens), jax.tree.map(lambda leaf: spoil(leaf, at_end), state)


def _finite(inputs: _Inputs) -> _Inputs:
    """Zeros in place of what is not finite; a decay may be -inf."""
    log_decay, is_token = inputs.log_decay, inputs.is_token
    finite = jax.tree.map(finite_or_zero, inputs._replace(log_decay=None, is_token=None))
    log_decay = None if log_decay is None else jnp.where(log_decay < jnp.inf, log_decay, 0)  # not NaN either
    return finite._replace(log_decay=log_decay, is_token=is_token)


def _spoilt(inputs: _Inputs, before: Array, options: _Options) -> tuple[Array, Array]:
    """bool [B, T, N] and [B, N]: outputs, and the state after them, that have seen what is not finite. before: bool
    [B, N], of the state before them."""
    query, key, value, rate, momentum, log_decay, threshold, *_ = inputs
    tokens = spoilt_tokens(key, value, query.shape[2])
    for gate in (*rate.values(), momentum, threshold):
        tokens = tokens if gate is None else tokens | ~jnp.isfinite(gate)
    tokens = tokens if log_decay is None else tokens | ~(log_decay < jnp.inf)
    written = read = spoilt_since(tokens, jnp.zeros_like(tokens), before)
    if options.per == "chunk":
        size, length = options.chunk_size, query.shape[1]
        ends = jnp.concatenate([before[:, None], written[:, size - 1 :: size]], axis=1)
        read = jnp.repeat(ends, min(size, length), axis=1)[:, :length]
    return read | is_spoilt(query), written[:, -1]


class _Before(NamedTuple):
    """What the tokens before a part leave. spoilt: [B, N], 1 where one of them is not finite, else 0."""

    state: MemoryState
    spoilt: Array


def _parted(attend: _Attend, options: _Options, parts: Parts, *arrays: Any) -> tuple[Array, MemoryState]:
    """Each device's part, in turn."""
    inputs = _Inputs(*arrays)
    length = inputs.query.shape[1]
    allowed = f"must divide the {length} tokens that each of {parts.many} devices has"
    require(length % options.chunk_size == 0, "chunk_size", options.chunk_size, allowed)
    finite = _finite(inputs)
    dtype = jax.tree.leaves(finite.state)[0].dtype

    def passed_on(before: _Before) -> _Before:
        _, state = attend(finite._replace(state=before.state))
        return _Before(state, _spoilt(inputs, before.spoilt > 0, options)[1].astype(dtype))

    start = _Before(finite.state, state_is_spoilt(inputs.state).astype(dtype))
    before, end = in_turn(passed_on, start, parts)
    out, _ = attend(finite._replace(state=before.state))
    at_tokens, _ = _spoilt(inputs, before.spoilt > 0, options)
    return spoil(out, at_tokens), jax.tree.map(lambda leaf: spoil(leaf, end.spoilt > 0), end.state)


def _sums(factor: Array | None, old: Weights, new: Weights) -> Weights:
    """factor [B, N] old + new; None: 1."""
    if factor is None:
        return jax.tree.map(jnp.add, old, new)
    return jax.tree.map(lambda x, y: factor[..., None, None] * x + y, old, new)


def _chosen(condition: Array, one: Any, other: Any) -> Any:
    """By row: condition bool [B]."""
    return jax.tree.map(lambda x, y: jnp.where(condition[:, None, None, None], x, y), one, other)


def _stepped(
    state: MemoryState, writes: Weights, momentum: Array | None, decay: Array | None
) -> tuple[Weights, Weights | None]:
    """A and S after a step of these writes, sums of -r G. momentum, decay e^g: [B, N]."""
    if state.momentum is None:
        return _sums(decay, state.weights, writes), None
    speed = _sums(momentum, state.momentum, writes)
    return _sums(decay, state.weights, speed), speed


# --- Reference --------------------------------------------------------------------------------------------------------


def _with_start(state: MemoryState, starts: Weights | None, options: _Options) -> MemoryState:
    """With the weights before the chunk, where they are those before the token."""
    if state.start is not None:
        return state
    return state._replace(start=fast_weights.projected(options.project, state.weights, starts))


def _token(options: _Options, starts: Weights | None, state: MemoryState, now: Any) -> tuple[MemoryState, Array]:
    """state: without its position. now: the token's arrays [B, N, ...]; is_token, closes: bool [B], whether it is the
    last one of its chunk."""
    query, key, value, rate, momentum, log_decay, threshold, is_token, closes = now
    dtype, heads = jax.tree.leaves(state.weights)[0].dtype, query.shape[1]
    query, key, value = (x.astype(dtype)[:, :, None] for x in (query, key, value))  # [B, N, 1, H]
    key, value = (jnp.swapaxes(repeat_key_heads(jnp.swapaxes(x, 1, 2), heads), 1, 2) for x in (key, value))
    momentum = None if momentum is None else momentum.astype(dtype)
    decay = None if log_decay is None else jnp.exp(log_decay.astype(dtype))
    threshold = None if threshold is None else threshold.astype(dtype)[..., None]
    assert state.start is not None

    def remembered(weights: Weights, x: Array) -> Array:
        return fast_weights.remember(options.memory, lambda name, x: x @ weights[name], x)

    def loss(weights: Weights) -> Array:
        return jnp.sum(fast_weights.loss(options.objective, remembered(weights, key), value, threshold))

    at = state.start
    if options.decay_first and decay is not None:
        decayed = {name: decay[..., None, None] * weight for name, weight in state.weights.items()}
        at = fast_weights.projected(options.project, decayed, starts)
    writes = {
        name: -rate[name].astype(dtype)[..., None, None] * gradient for name, gradient in jax.grad(loss)(at).items()
    }
    if options.per == "token":
        weights, speed = _stepped(state, writes, momentum, decay)
        read = fast_weights.projected(options.project, weights, starts)
        after = MemoryState(state.position, weights, speed, _chosen(closes, read, state.start), None)
    else:
        assert state.pending is not None
        read, pending = state.start, _sums(None, state.pending, writes)
        weights, speed = _stepped(state, pending, momentum, decay)
        start, nothing = fast_weights.projected(options.project, weights, starts), jax.tree.map(jnp.zeros_like, pending)
        after = _chosen(
            closes, MemoryState(state.position, weights, speed, start, nothing), state._replace(pending=pending)
        )
    if is_token is not None:
        after = _chosen(is_token, after, state)
    return after, remembered(read, query)[:, :, 0]


def _reference(inputs: _Inputs, options: _Options) -> tuple[Array, MemoryState]:
    batch, length = inputs.query.shape[:2]
    closes = jnp.broadcast_to((jnp.arange(length) + 1)[None] % options.chunk_size == 0, (batch, length))
    tokens = jax.tree.map(lambda x: jnp.moveaxis(x, 1, 0), (*inputs[:8], closes))
    state = _with_start(inputs.state, inputs.starts, options)
    after, out = jax.lax.scan(functools.partial(_token, options, inputs.starts), state, tokens)
    after = after if inputs.state.start is not None else after._replace(start=None)
    return jnp.moveaxis(out, 0, 1).astype(inputs.query.dtype), after


# --- XLA: a scan over chunks ------------------------------------------------------------------------------------------


def _xla(inputs: _Inputs, options: _Options) -> tuple[Array, MemoryState]:
    length, size, state = inputs.query.shape[1], options.chunk_size, inputs.state
    whole = length - length % size
    is_ragged = inputs.is_token is not None
    chunk, outs = functools.partial(_chunk, options, inputs.starts), []
    if whole:
        # Where all rows end alike, what a full chunk leaves of these two needs no array.
        carry = state if is_ragged else state._replace(start=None, pending=None)
        tokens = jax.tree.map(lambda x: x[:, :whole], inputs[:8])
        after, out = scan_chunks(functools.partial(chunk, True), carry, tokens, size)
        outs.append(out)
        if not is_ragged:
            start = None if state.start is None else after.weights
            after = after._replace(start=start, pending=jax.tree.map(jnp.zeros_like, state.pending))
        state = after
    if whole < length:
        tokens = jax.tree.map(lambda x: x[:, whole:], inputs[:8])
        state, out = scan_chunks(functools.partial(chunk, False), state, tokens, size)
        outs.append(out)
    return jnp.concatenate(outs, axis=1) if len(outs) > 1 else outs[0], state


def _chunk(
    options: _Options, starts: Weights | None, is_full: bool, state: MemoryState, tokens: Any
) -> tuple[MemoryState, Array]:
    """Up to C tokens of every head. state.start, state.pending: None where the chunk is full in all rows."""
    query, key, value, rate, momentum, log_decay, threshold, is_token = tokens
    given, heads, dtype = query.dtype, query.shape[2], jax.tree.leaves(state.weights)[0].dtype
    key, value = (repeat_key_heads(x, heads) for x in (key, value))
    query, key, value, rate, momentum, log_decay, threshold = jax.tree.map(
        lambda x: jnp.moveaxis(x.astype(dtype), 2, 1), (query, key, value, rate, momentum, log_decay, threshold)
    )  # [B, N, C, ...]
    decay = None if log_decay is None else jnp.exp(log_decay)
    done = None if is_token is None else is_token[:, -1] & is_full

    if options.per == "token" and options.chunk_size > 1:
        given_to, gradients = _gradients(options, state.weights, key, value, threshold)
        gradients = {name: rate[name][..., None] * gradient for name, gradient in gradients.items()}
        after, linear = _within(state, given_to, gradients, momentum, decay, is_token)
        if state.start is not None:
            start = state.weights
            if is_token is not None and done is not None:  # all of it may be padding
                start = _chosen(is_token[:, 0], start, state.start)
                start = _chosen(done, after.weights, start)
            after = after._replace(start=start)
        out = fast_weights.remember(options.memory, linear, query)
        return after, jnp.moveaxis(out, 1, 2).astype(given)

    before = state.weights
    if options.decay_first and decay is not None:
        before = {name: decay[..., None] * weight for name, weight in before.items()}
    at = fast_weights.projected(options.project, before, starts)
    given_to, gradients = _gradients(options, at, key, value, threshold)
    writes = {name: (given_to[name] * -rate[name][..., None]).mT @ gradients[name] for name in gradients}
    if state.pending is not None:
        writes = _sums(None, state.pending, writes)
    weights, speed = _stepped(state, writes, *(None if x is None else x[..., -1] for x in (momentum, decay)))
    stepped = MemoryState(state.position, weights, speed, None, jax.tree.map(jnp.zeros_like, state.pending))
    kept = state._replace(pending=None if state.pending is None else writes)
    after = stepped if is_full else kept
    if is_full and done is not None:
        after = _chosen(done, stepped, kept)
    read = at if options.per == "chunk" else fast_weights.projected(options.project, after.weights, starts)
    out = fast_weights.remember(options.memory, lambda name, x: x @ read[name], query)
    return after, jnp.moveaxis(out, 1, 2).astype(given)


def _gradients(
    options: _Options, weights: Weights, key: Array, value: Array, threshold: Array | None
) -> tuple[Weights, Weights]:
    """What each product is given of the keys, [B, N, C, in], and the objective's gradient in what it gives, [.., out]:
    that in a zero which is added to it."""

    def predict(taps: Weights) -> tuple[Array, Weights]:
        given_to = {}

        def linear(name: str, x: Array) -> Array:
            given_to[name] = x
            return x @ weights[name] + taps[name]

        return fast_weights.remember(options.memory, linear, key), given_to

    taps = {name: jnp.zeros_like(key, shape=(*key.shape[:3], weight.shape[-1])) for name, weight in weights.items()}
    prediction, pull, given_to = jax.vjp(predict, taps, has_aux=True)
    return given_to, pull(fast_weights.gradient(options.objective, prediction, value, threshold))[0]


def _within(
    state: MemoryState,
    given_to: Weights,
    gradients: Weights,
    momentum: Array | None,
    decay: Array | None,
    is_token: Array | None,
) -> tuple[MemoryState, fast_weights.Linear]:
    """The state after a chunk per token, and what products with each token's own weights are. gradients: times the
    rates. momentum, decay e^g: [B, N, C]."""
    fall = None if decay is None else products_between(decay)  # E; also how long a write stays, without momentum
    spread, from_speed = fall, None  # c and b
    kept = None if decay is None else jnp.cumprod(decay, axis=-1)  # a
    speed = None
    if momentum is not None and state.momentum is not None:
        ran = products_between(momentum)  # F
        carried = jnp.cumprod(momentum, axis=-1)
        adds = jnp.tril(jnp.ones_like(ran)) if fall is None else fall
        adds = adds if is_token is None else adds * is_token[:, None, None].astype(adds.dtype)
        spread, from_speed = adds @ ran, (adds @ carried[..., None])[..., 0]
        speed = {
            name: carried[..., -1, None, None] * old - given_to[name].mT @ (ran[..., -1, :, None] * gradients[name])
            for name, old in state.momentum.items()
        }
    last = {}
    for name, old in state.weights.items():
        ends = gradients[name] if spread is None else spread[..., -1, :, None] * gradients[name]
        new = -(given_to[name].mT @ ends) + (old if kept is None else kept[..., -1, None, None] * old)
        if from_speed is not None and state.momentum is not None:
            new += from_speed[..., -1, None, None] * state.momentum[name]
        last[name] = new

    def linear(name: str, x: Array) -> Array:
        scores = jnp.tril(x @ given_to[name].mT)
        y = x @ state.weights[name]
        y = y if kept is None else kept[..., None] * y
        if from_speed is not None and state.momentum is not None:
            y += from_speed[..., None] * (x @ state.momentum[name])
        return y - (scores if spread is None else spread * scores) @ gradients[name]

    return MemoryState(state.position, last, speed, None, None), linear


IMPLEMENTATIONS: Implementations = {"reference": _reference, "xla": _xla}
