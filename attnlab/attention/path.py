"""PaTH attention: softmax attention whose positions are products of Householder-like transitions.

    H_r   = I - beta_r w_r w_r^T                             w_r of unit length, beta_r from 0 to 2
    a_ts  = scale q_t^T H_t H_{t-1} ... H_{s+1} k_s + g_{s+1} + ... + g_t          g_r <= 0, the log of a forget gate
    out_t = sum_{s<=t} softmax_s(a_ts) v_s

beta = 0 is causal softmax attention, and with gates the forgetting transformer. beta = 2 reflects: a layer can follow
permutations, which softmax attention cannot. Papers: PaTH Attention (Yang et al. 2025); the gate: Forgetting
Transformer (Lin et al. 2025).

A chunk of C tokens at once, by the inverse of the delta rule:

    A  = (I + tril(beta W W^T, -1))^{-1}       R = A tril(beta W K^T, -1)       U = A beta W
    within the chunk      q_i^T H_i ... H_{j+1} k_j = tril(Q K^T - tril(Q W^T) R)_ij
    back to its start     Q' = Q - tril(Q W^T) U            of rows q_i^T H_i ... H_1
    on to its end         K' = K - R^T W                    of rows H_C ... H_{j+1} k_j
    through it            E  = I - W^T U  =  H_C ... H_1

A chunk's queries then go backwards over the chunks before it: their products are Q' K'^T, and Q' becomes Q' E. Sums of
log gates are sums, never differences.
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from attnlab.attention._cached import by_row, counted, filled, put
from attnlab.attention._dispatch.choice import Implementations, dispatch
from attnlab.attention._dispatch.deferred import vary_alike
from attnlab.attention._dispatch.exchange import Parts, in_whole_sequences, over_positions
from attnlab.attention._dispatch.primitive import primitive
from attnlab.attention._shared.checks import (
    Array,
    accumulator_dtype,
    check_array,
    check_dtype,
    check_floating,
    check_int,
    check_position,
    check_prompt,
    check_query_key_value,
    check_sizes,
    check_step,
    check_type,
    default_scale,
    require,
    shape_text,
)
from attnlab.attention._shared.chunks import inverse_of_unit_lower, sums_between
from attnlab.attention._shared.finite import finite_or_zero, is_spoilt, spoil, spoilt_since, spoilt_tokens
from attnlab.attention._shared.heads import repeat_key_heads
from attnlab.attention._shared.softmax import reference_attention, softmax_parts


class PathCache(NamedTuple):
    """The tokens so far, as the last one sees them.

    key: [B, max_length, N, H], in float32 (float64 for float64 inputs), as every token changes all. value:
    [B, max_length, K, V]. forget: [B, max_length, N], the log gates after each token, added up. length: int32 [], how
    many they are, or [B], of each row.
    """

    key: Array
    value: Array
    forget: Array
    length: Array


class _Inputs(NamedTuple):
    """query [B, T, N, H], key [B, T, K, H], value [B, T, K, V], transition [B, T, N, H], beta and log_forget [B, T, N],
    the latter or None."""

    query: Array
    key: Array
    value: Array
    transition: Array
    beta: Array
    log_forget: Array | None


@primitive("B*N.")
def path_attention(
    query: Array,
    key: Array,
    value: Array,
    transition: Array,
    *,
    beta: Array,
    log_forget: Array | None = None,
    scale: float | None = None,
    chunk_size: int = 64,
    implementation: str | None = None,
) -> Array:
    """Causal softmax attention through transitions; the module's docstring has the formula.

    Args:
      query: [B, T, N, H], floating. key: [B, T, K, H], value: [B, T, K, V]; K divides N.
      transition: w [B, T, N, H], of unit length, which is not checked.
      beta: [B, T, N], 0 to 2. A token's transition acts on the keys before it, not on its own.
      log_forget: g [B, T, N], natural log of the forget gate, <= 0; -inf hides all tokens before. None: no gate.
      scale: factor on q.k, not on log_forget; None means H ** -0.5.
      chunk_size: tokens taken at once by "xla".
      implementation: None, "reference" (a scan over tokens, which changes all keys at each) or "xla" (chunks).

    Returns:
      [B, T, N, V] in query's dtype; computed in float32 (float64 for float64 inputs).

    Raises:
      ValueError, TypeError: at trace time, naming the argument.

    Complexity of "xla", per head with chunks of C: O(T^2 (H + V + H^2 / C)) time, O(T (H + V + H^2 / C)) memory.
    """
    check_query_key_value(query, key, value)
    _check_gates(query.shape, transition, beta, log_forget)
    chunk_size = check_int("chunk_size", chunk_size, least=1)
    attend = functools.partial(
        dispatch,
        "path_attention",
        IMPLEMENTATIONS,
        implementation,
        scale=default_scale(scale, query.shape[-1]),
        chunk_size=chunk_size,
    )

    def whole(*arrays: Any) -> Array:
        inputs = _Inputs(*arrays)
        return spoil(attend(_finite(inputs)), _sees_spoilt(inputs))

    def parted(parts: Parts, *arrays: Any) -> Array:
        def of_share(query: Array, key: Array, value: Array, transition: Array, *gates: Array) -> Array:
            beta, *rest = (x[..., 0] for x in gates)
            return whole(query, key, value, transition, beta, rest[0] if rest else None)

        given = [x if x.ndim == 4 else x[..., None] for x in arrays if x is not None]
        return in_whole_sequences(of_share, given, arrays[1].shape[2], parts)

    layouts = ("B*N.", "B*K.", "B*K.", "B*N.", "B*N", "B*N")
    return over_positions(whole, parted, layouts, "B*N.", query, key, value, transition, beta, log_forget)


def _check_gates(shape: tuple[int, ...], transition: Array, beta: Array, log_forget: Array | None) -> None:
    """shape: of a query."""
    check_array("transition", transition, shape, "[B, T, N, H]")
    check_array("beta", beta, shape[:-1], "[B, T, N]")
    if log_forget is not None:
        check_array("log_forget", log_forget, shape[:-1], "[B, T, N]")
    for name, array in (("transition", transition), ("beta", beta), ("log_forget", log_forget)):
        if array is not None:
            check_floating(name, array)


# --- What is not finite -----------------------------------------------------------------------------------------------


def _finite(inputs: _Inputs) -> _Inputs:
    query, key, value, transition, beta = map(finite_or_zero, inputs[:-1])
    log_forget = None if inputs.log_forget is None else _finite_gate(inputs.log_forget)
    return _Inputs(query, key, value, transition, beta, log_forget)


def _finite_gate(log_forget: Array) -> Array:
    return jnp.where(log_forget < jnp.inf, log_forget, 0)  # not NaN either; -inf stays


def _gates_are_spoilt(transition: Array, beta: Array, log_forget: Array | None) -> Array:
    """bool [B, T, N]: tokens that make NaN of every key before them."""
    spoilt = is_spoilt(transition) | ~jnp.isfinite(beta)
    return spoilt if log_forget is None else spoilt | ~(log_forget < jnp.inf)


def _sees_spoilt(inputs: _Inputs) -> Array:
    """bool [B, T, N]: queries that are not finite, or see what is not, as it was or by a transition."""
    query, key, value, transition, beta, log_forget = inputs
    tokens = spoilt_tokens(key, value, query.shape[2])
    starts = jnp.zeros_like(tokens) if log_forget is None else log_forget == -jnp.inf
    has_keys_before = (jnp.arange(query.shape[1]) > 0)[None, :, None] & ~starts
    tokens = tokens | (_gates_are_spoilt(transition, beta, log_forget) & has_keys_before)
    return spoilt_since(tokens, starts, jnp.zeros_like(tokens[:, 0])) | is_spoilt(query)


# --- Reference --------------------------------------------------------------------------------------------------------


def _reference(inputs: _Inputs, *, scale: Any, chunk_size: int) -> Array:
    query, key, value, transition, beta, log_forget = inputs
    dtype = accumulator_dtype(query, key, value)
    length, heads = query.shape[1:3]
    key, value = (repeat_key_heads(x.astype(dtype), heads) for x in (key, value))
    scaled, transition, beta = scale * query.astype(dtype), transition.astype(dtype), beta.astype(dtype)
    log_forget = jnp.zeros_like(beta) if log_forget is None else log_forget.astype(dtype)

    def token(state: tuple[Array, Array], now: Any) -> tuple[tuple[Array, Array], Array]:
        keys, forget = state
        number, query, transition, beta, log_forget = now
        is_before = (jnp.arange(length) < number)[None, :, None]
        found = jnp.einsum("BSNH,BNH->BSN", keys, transition)
        change = (beta[:, None] * found)[..., None] * transition[:, None]
        keys = jnp.where(is_before[..., None], keys - change, keys)
        forget = jnp.where(is_before, forget + log_forget[:, None], 0)
        logits = jnp.einsum("BNH,BSNH->BNS", query, keys) + jnp.moveaxis(forget, 1, 2)
        numerators, denominator, _ = softmax_parts(logits, jnp.arange(length) <= number)
        return (keys, forget), jnp.einsum("BNS,BSNV->BNV", numerators / denominator, value)

    tokens = jax.tree.map(lambda x: jnp.moveaxis(x, 1, 0), (scaled, transition, beta, log_forget))
    _, out = jax.lax.scan(token, (key, jnp.zeros_like(beta)), (jnp.arange(length), *tokens))
    return jnp.moveaxis(out, 0, 1).astype(query.dtype)


# --- XLA: chunks ------------------------------------------------------------------------------------------------------


class _Carried(NamedTuple):
    """Of chunks: keys carried to the end [.., C, H], the transition through [.., H, H], the log gates after each token
    [.., C] and of all [..]; these two None without gates."""

    key: Array
    through: Array
    after: Array | None
    all_gates: Array | None


def _in_chunks(x: Array, size: int) -> Array:
    """[B, T, N, ...] -> [chunks, B, N, C, ...], the last one filled up with zeros."""
    x = jnp.pad(x, [(0, 0), (0, -x.shape[1] % size), *((0, 0),) * (x.ndim - 2)])
    return jnp.moveaxis(x.reshape(x.shape[0], -1, size, *x.shape[2:]), (1, 3), (0, 2))


def _within(key: Array, transition: Array, beta: Array) -> tuple[Array, Array]:
    """R [B, N, C, C] and U [B, N, C, H] of a chunk."""
    weighed = beta[..., None] * transition
    inverse = inverse_of_unit_lower(jnp.tril(weighed @ transition.mT, -1))
    return inverse @ jnp.tril(weighed @ key.mT, -1), inverse @ weighed


def _carried(chunk: tuple[Array, Array, Array, Array | None]) -> _Carried:
    key, transition, beta, log_forget = chunk
    found, weighed = _within(key, transition, beta)
    through = jnp.eye(key.shape[-1], dtype=key.dtype)[None, None] - transition.mT @ weighed
    key = key - found.mT @ transition
    if log_forget is None:
        return _Carried(key, through, None, None)
    after = jnp.pad(log_forget[..., 1:], ((0, 0), (0, 0), (0, 1)))
    return _Carried(key, through, jax.lax.cumsum(after, axis=2, reverse=True), jnp.sum(log_forget, axis=-1))


class _Softmax(NamedTuple):
    """Over the keys so far: the largest logit [B, N, C, 1], the sum of exp beside it, and the same of the values."""

    largest: Array
    total: Array
    out: Array

    def with_keys(self, logits: Array, value: Array) -> "_Softmax":
        of_these = jax.lax.stop_gradient(jnp.max(logits, axis=-1, keepdims=True))
        largest = jnp.maximum(self.largest, of_these)
        kept, numerators = jnp.exp(self.largest - largest), jnp.exp(logits - largest)
        total = kept * self.total + jnp.sum(numerators, axis=-1, keepdims=True)
        return _Softmax(largest, total, kept * self.out + numerators @ value)


def _xla(inputs: _Inputs, *, scale: Any, chunk_size: int) -> Array:
    dtype, (length, heads) = accumulator_dtype(*inputs[:3]), inputs.query.shape[1:3]
    size = min(chunk_size, length)
    scaled = inputs._replace(query=scale * inputs.query.astype(dtype))
    by_head = (None if x is None else repeat_key_heads(x.astype(dtype), heads) for x in scaled[:4])
    gates = (None if x is None else x.astype(dtype) for x in scaled[4:])
    leaves, tree = jax.tree.flatten(_Inputs(*by_head, *gates))
    chunks = _Inputs(*jax.tree.unflatten(tree, [_in_chunks(x, size) for x in vary_alike(leaves)]))
    remat = functools.partial(jax.checkpoint, prevent_cse=False)
    _, key, value, *transitions = chunks
    carried = jax.lax.map(remat(_carried), (key, *transitions))
    numbers = jnp.arange(len(key))

    @remat
    def row(now: tuple[Array, _Inputs]) -> Array:
        """The queries of a chunk: over its own keys, then over those of the chunks before, the nearest first."""
        number, (query, own_key, own_value, transition, beta, log_forget) = now
        found, weighed = _within(own_key, transition, beta)
        products = jnp.tril(query @ transition.mT)
        logits, forget = query @ own_key.mT - products @ found, None
        if log_forget is not None:
            logits, forget = logits + sums_between(log_forget), jnp.cumsum(log_forget, axis=-1)
        logits = jnp.where(jnp.tri(size, dtype=bool)[None, None], logits, -jnp.inf)
        # A query sees itself, so that the largest logit is a number.
        largest = jax.lax.stop_gradient(jnp.max(logits, axis=-1, keepdims=True))
        numerators = jnp.exp(logits - largest)
        softmax = _Softmax(largest, jnp.sum(numerators, axis=-1, keepdims=True), numerators @ own_value)

        @remat
        def step(state: Any, earlier: tuple[Array, _Carried, Array]) -> tuple[Any, None]:
            at, chunk, value = earlier

            def read(state: Any) -> Any:
                query, forget, softmax = state
                logits = query @ chunk.key.mT
                if chunk.after is not None and chunk.all_gates is not None:
                    logits = logits + forget[..., None] + chunk.after[..., None, :]
                    forget = forget + chunk.all_gates[..., None]
                return query @ chunk.through, forget, softmax.with_keys(logits, value)

            return jax.lax.cond(at < number, read, lambda state: state, state), None

        state = (query - products @ weighed, forget, softmax)
        (_, _, softmax), _ = jax.lax.scan(step, state, (numbers, carried, value), reverse=True)
        return softmax.out / softmax.total

    out = jax.lax.map(row, (numbers, chunks))
    out = jnp.moveaxis(out, (0, 3), (1, 2))  # [B, chunks, C, N, V]
    return out.reshape(out.shape[0], -1, *out.shape[3:])[:, :length].astype(inputs.query.dtype)


IMPLEMENTATIONS: Implementations = {"reference": _reference, "xla": _xla}


# --- Decoding ---------------------------------------------------------------------------------------------------------


def init_path_cache(
    batch: int,
    max_length: int,
    num_heads: int,
    num_key_heads: int,
    head_dim: int,
    *,
    value_dim: int | None = None,
    dtype: Any = jnp.float32,
) -> PathCache:
    """An empty cache for decoding at most max_length tokens.

    num_heads: the query's, of which each has keys of its own. num_key_heads: of the values. value_dim:
      default head_dim.
    """
    value_dim, dtype = head_dim if value_dim is None else value_dim, check_dtype("dtype", dtype)
    batch, max_length, num_heads, num_key_heads, head_dim, value_dim = check_sizes(
        batch=batch,
        max_length=max_length,
        num_heads=num_heads,
        num_key_heads=num_key_heads,
        head_dim=head_dim,
        value_dim=value_dim,
    )
    require(num_heads % num_key_heads == 0, "num_key_heads", num_key_heads, f"must divide num_heads {num_heads}")
    return PathCache(
        key=jnp.zeros((batch, max_length, num_heads, head_dim), dtype),
        value=jnp.zeros((batch, max_length, num_key_heads, value_dim), dtype),
        forget=jnp.zeros((batch, max_length, num_heads), dtype),
        length=jnp.zeros((), jnp.int32),
    )


@primitive(like="cache")
def prefill_path_cache(
    cache: PathCache,
    key: Array,
    value: Array,
    transition: Array,
    *,
    beta: Array,
    log_forget: Array | None = None,
    lengths: Array | None = None,
    chunk_size: int = 64,
) -> PathCache:
    """The cache after a prompt: what path_step leaves of it, token by token.

    Args:
      cache: an empty one, which the prompt fits into.
      key: [B, P, K, H], value: [B, P, K, V], transition: [B, P, N, H], beta, log_forget: [B, P, N], as in the call.
      lengths: integers [B], 0 to P: the row's tokens, padding after them. None: P in all rows.
      chunk_size: tokens taken at once.

    Complexity, per head with chunks of C: O(P (C + H) H) time, O(P H) memory.
    """
    check_type("cache", cache, PathCache, "init_path_cache")
    heads = cache.key.shape[2]
    lengths = check_prompt(key, value, cache.key[:, :, :: heads // cache.value.shape[2]], cache.value, lengths)
    batch, length = key.shape[:2]
    _check_gates((batch, length, heads, key.shape[3]), transition, beta, log_forget)
    chunk_size = check_int("chunk_size", chunk_size, least=1)
    slots, count = cache.key.shape[1], counted(key, lengths)
    require(length <= slots, "key", shape_text(key), f"the cache was made for {slots} tokens")
    dtype, size = cache.key.dtype, min(chunk_size, length)
    is_token = (jnp.arange(length)[None] < by_row(count))[..., None]
    log_forget = jnp.zeros_like(beta) if log_forget is None else log_forget
    beta, log_forget = (jnp.where(is_token, x, 0) for x in (beta, log_forget))
    key, transition = (jnp.where(is_token[..., None], x, 0) for x in (key, transition))
    key = repeat_key_heads(key, heads)
    gates_spoilt = _gates_are_spoilt(transition, beta, log_forget)
    spoilt = is_spoilt(key) | (_sum_after(gates_spoilt.astype(jnp.int32)) > 0)
    inputs = (finite_or_zero(key), finite_or_zero(transition), finite_or_zero(beta), _finite_gate(log_forget))

    def step(state: tuple[Array, Array], chunk: Any) -> tuple[tuple[Array, Array], tuple[Array, Array]]:
        """From the last chunk to the first; the state is what happens to keys after the chunk."""
        through, gates = state
        own = _carried(chunk)
        assert own.after is not None
        assert own.all_gates is not None
        kept = own.key @ through.mT, own.after + gates[..., None]
        return (through @ own.through, gates + own.all_gates), kept

    chunks = [_in_chunks(x.astype(dtype), size) for x in inputs]
    start = jnp.zeros_like(chunks[0], shape=(batch, heads, key.shape[-1], key.shape[-1]))
    start = start + jnp.eye(key.shape[-1], dtype=dtype)[None, None]
    _, (keys, forget) = jax.lax.scan(step, (start, jnp.zeros_like(start[..., 0, 0])), tuple(chunks), reverse=True)

    def joined(x: Array) -> Array:
        """[chunks, B, N, C, ...] -> [B, P, N, ...]"""
        x = jnp.moveaxis(x, (0, 3), (1, 2))
        return x.reshape(batch, -1, *x.shape[3:])[:, :length]

    keys, forget = spoil(joined(keys), spoilt), joined(forget)[..., None]
    forget = filled(cache.forget[..., None], forget, count)[..., 0]
    return PathCache(filled(cache.key, keys, count), filled(cache.value, value, count), forget, count)


def _sum_after(x: Array) -> Array:
    """[B, T, N] -> the sum over later tokens."""
    return jax.lax.cumsum(jnp.pad(x[:, 1:], ((0, 0), (0, 1), (0, 0))), axis=1, reverse=True)


@primitive("B*N.", like="cache")
def path_step(
    cache: PathCache,
    query: Array,
    key: Array,
    value: Array,
    transition: Array,
    *,
    beta: Array,
    log_forget: Array | None = None,
    scale: float | None = None,
) -> tuple[Array, PathCache]:
    """The next token of path_attention: its transition acts on every cached key, k_s <- H_t k_s, then it reads them.

    Args:
      cache: of the tokens before.
      query: [B, 1, N, H]. key: [B, 1, K, H], value: [B, 1, K, V], transition: [B, 1, N, H], beta and log_forget:
        [B, 1, N]. The rest as in the call.

    Returns:
      (out [B, 1, N, V] in query's dtype, the cache with the token added). Past max_length, which a compiled program
      cannot refuse, out is NaN.

    Complexity: O(max_length (H + V)) time per head.
    """
    check_type("cache", cache, PathCache, "init_path_cache")
    check_step(query, key, value)
    check_position("cache.length", cache.length, query.shape[0])
    batch, slots, heads, head_dim = cache.key.shape
    check_array("query", query, (batch, 1, heads, head_dim), "the cache's heads, one token")
    check_array("value", value, (batch, 1, *cache.value.shape[2:]), "the cache's layout, one token")
    check_array("cache.forget", cache.forget, cache.key.shape[:3], "[batch, max_length, heads]")
    check_array("cache.value", cache.value, (batch, slots, None, None), "[batch, max_length, key heads, value_dim]")
    _check_gates(query.shape, transition, beta, log_forget)
    dtype = cache.key.dtype
    log_forget = jnp.zeros_like(beta) if log_forget is None else log_forget
    w, strength = finite_or_zero(transition).astype(dtype), finite_or_zero(beta).astype(dtype)
    found = strength * jnp.einsum("BSNH,BTNH->BSN", cache.key, w)
    is_token = (jnp.arange(slots)[None] < by_row(cache.length))[..., None]
    keys = spoil(cache.key - found[..., None] * w, is_token & _gates_are_spoilt(transition, beta, log_forget))
    forget = jnp.where(is_token, cache.forget + _finite_gate(log_forget).astype(dtype), 0)
    keys = put(keys, repeat_key_heads(key, heads), cache.length)
    values = put(cache.value, value, cache.length)
    forget = put(forget, jnp.zeros_like(beta), cache.length)
    out, _ = reference_attention(
        query,
        keys,
        repeat_key_heads(values, heads),
        visible=(jnp.arange(slots)[None] <= by_row(cache.length))[:, None, None],
        bias=jnp.moveaxis(forget, 1, 2)[:, :, None],
        scale=default_scale(scale, head_dim),
    )
    out = jnp.where(by_row(cache.length)[..., None, None] < slots, out, jnp.nan)
    return out, PathCache(keys, values, forget, cache.length + 1)
