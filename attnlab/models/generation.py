"""Drawing tokens from a language model: all at once, or as a stream."""

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from attnlab.attention._shared.checks import check_float, check_int, check_lengths, require, shape_text, shown
from attnlab.models.lm import LanguageModel, check_tokens
from attnlab.nn.mixers.base import MixerCache
from attnlab.nn.parameters import as_function
from attnlab.nn.sharding import spec_of, under_auto_axes, varying_as

_ENDED = -1  # what stands after the end of a row


class Draws(NamedTuple):
    """How a token is drawn, and what ends a row; see `generate`. tokens: how many there are to draw of."""

    temperature: float
    top_k: int | None
    top_p: float | None
    stop: tuple[int, ...]
    tokens: int


class _Rows(NamedTuple):
    """After a draw: the cache of what was read, the token drawn of each row, int32 [B], its position, int32 [] or [B],
    and whether the row has ended, bool [B]."""

    cache: list[MixerCache]
    token: jax.Array
    position: jax.Array
    ended: jax.Array


@under_auto_axes(lambda model, prompt, **_: spec_of(prompt, 1))
def generate(
    model: LanguageModel,
    prompt: jax.Array,
    *,
    length: int,
    key: jax.Array,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float | None = None,
    stop: int | Sequence[int] = (),
    lengths: jax.Array | None = None,
    below: int | None = None,
) -> jax.Array:
    """Continues prompts: int [B, P] -> tokens int [B, P + length], each row its prompt and up to `length` tokens more.

    The prompts are read at once, then a token of all rows per step, until all rows have ended. After a row's end comes
    -1: after a token of `stop`, or where its prompt is shorter than P.

    Args:
      key: of the draws. A row's depend on its number and on the position, not on the other rows.
      temperature: divides the logits; 0 takes the likeliest token.
      top_k: draw of the likeliest k alone; of equals, lower ones first.
      top_p: draw of the likeliest alone, as many as have this much probability together, 0 to 1 (Holtzman et al. 2019),
        after temperature and top_k; at least one.
      stop: tokens that end a row; they stand in it.
      lengths: integers [B], 1 to P: the prompts' tokens, padding after them. None: P in all rows.
      below: draw only tokens below this number; None draws of all.
    """
    draws = _checked(model, prompt, key, length, temperature, top_k, top_p, stop, below)
    batch, width = prompt.shape
    lengths = check_lengths(lengths, batch, most=width)
    prompt = prompt.astype(jnp.promote_types(prompt.dtype, jnp.int32))
    column = jnp.arange(width + length)[None] - (width if lengths is None else lengths[:, None])  # of what is drawn
    given = jnp.pad(prompt, ((0, 0), (0, length)))
    if length == 0:
        return jnp.where(column < 0, given, _ENDED)

    def unfinished(carry: tuple[Any, ...]) -> jax.Array:
        number, rows, _ = carry
        return (number < length) & ~jnp.all(rows.ended)

    def step(carry: tuple[Any, ...]) -> tuple[Any, ...]:
        number, rows, drawn = carry
        rows = _next(model, rows, key, draws)
        return number + 1, rows, jax.lax.dynamic_update_index_in_dim(drawn, rows.token, number, axis=1)

    rows = _first(model, prompt, lengths, key, draws, length)
    drawn = jnp.full((batch, length), _ENDED, jnp.int32).at[:, 0].set(rows.token)
    start = varying_as((jnp.ones((), jnp.int32), rows, drawn), (nnx.state(model), prompt, key, lengths))
    _, _, drawn = jax.lax.while_loop(unfinished, step, start)
    after = jnp.take_along_axis(drawn, jnp.clip(column, 0, length - 1), axis=1).astype(prompt.dtype)
    return jnp.where(column < 0, given, jnp.where(column < length, after, _ENDED))


def stream(
    model: LanguageModel,
    prompt: jax.Array,
    *,
    length: int,
    key: jax.Array,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float | None = None,
    stop: int | Sequence[int] = (),
    lengths: jax.Array | None = None,
    below: int | None = None,
) -> Iterator[np.ndarray]:
    """The tokens that `generate` draws, as they are drawn: yields int32 [B], -1 of rows that have ended. Not in jit."""
    draws = _checked(model, prompt, key, length, temperature, top_k, top_p, stop, below)
    lengths = check_lengths(lengths, prompt.shape[0], most=prompt.shape[1])

    def begin(model: LanguageModel, prompt: jax.Array, lengths: jax.Array | None, key: jax.Array) -> _Rows:
        return _first(model, prompt, lengths, key, draws, length)

    def proceed(model: LanguageModel, rows: _Rows, key: jax.Array) -> _Rows:
        return _next(model, rows, key, draws)

    first, state = as_function(begin, model)
    following, _ = as_function(proceed, model)

    def drawn() -> Iterator[np.ndarray]:
        next_rows = jax.jit(following, donate_argnums=1)
        rows, _ = jax.jit(first)(state, prompt, lengths, key)
        yield np.asarray(rows.token)
        for _ in range(length - 1):
            if np.all(rows.ended):
                return
            rows, _ = next_rows(state, rows, key)
            yield np.asarray(rows.token)

    return drawn() if length else iter(())


def _checked(
    model: LanguageModel,
    prompt: Any,
    key: Any,
    length: Any,
    temperature: Any,
    top_k: Any,
    top_p: Any,
    stop: Any,
    below: Any,
) -> Draws:
    check_tokens("prompt", prompt)
    require(0 not in prompt.shape, "prompt", shape_text(prompt), "need at least one token")
    check_int("length", length, least=0)
    return check_draws(model, key, temperature, top_k, top_p, stop, below)


def check_draws(
    model: LanguageModel, key: Any, temperature: Any, top_k: Any, top_p: Any, stop: Any, below: Any
) -> Draws:
    require(_is_key(key), "key", shown(key), "need one key, as jax.random.key gives it")
    below = model.vocabulary if below is None else check_int("below", below, least=1)
    stop = stop if isinstance(stop, (tuple, list)) else (stop,)
    return Draws(
        check_float("temperature", temperature, least=0),
        None if top_k is None else check_int("top_k", top_k, least=1),
        None if top_p is None else check_float("top_p", top_p, above=0, most=1),
        tuple(check_int("stop", token, least=0, most=model.vocabulary - 1) for token in stop),
        min(below, model.vocabulary),
    )


def _is_key(key: Any) -> bool:
    if not hasattr(key, "shape") or not hasattr(key, "dtype"):
        return False
    axes = 0 if jnp.issubdtype(key.dtype, jax.dtypes.prng_key) else 1
    return len(key.shape) == axes and (axes == 0 or key.dtype == jnp.uint32)


def _first(
    model: LanguageModel, prompt: jax.Array, lengths: jax.Array | None, key: jax.Array, draws: Draws, length: int
) -> _Rows:
    batch, width = prompt.shape
    logits, cache = model.prefill(prompt, lengths, max_length=width + length - 1)  # the last token drawn is not read
    position = jnp.asarray(width, jnp.int32) if lengths is None else lengths
    return _drawn(cache, logits, position, jnp.zeros(batch, bool), key, draws)


def _next(model: LanguageModel, rows: _Rows, key: jax.Array, draws: Draws) -> _Rows:
    logits, cache = model.step(rows.cache, jnp.maximum(rows.token, 0))
    return _drawn(cache, logits, rows.position + 1, rows.ended, key, draws)


def _drawn(
    cache: list[MixerCache], logits: jax.Array, position: jax.Array, ended: jax.Array, key: jax.Array, draws: Draws
) -> _Rows:
    token = jnp.where(ended, _ENDED, draw_token(logits, position, key, draws))
    if draws.stop:
        ended = ended | jnp.isin(token, jnp.asarray(draws.stop))
    return _Rows(cache, token, position, ended)


def draw_token(logits: jax.Array, position: jax.Array, key: jax.Array, draws: Draws) -> jax.Array:
    """Logits [B, vocabulary] of the tokens at a position, int [] or [B] -> tokens int32 [B]."""
    logits = logits[:, : draws.tokens]
    if draws.temperature == 0:
        return jnp.argmax(logits, axis=-1).astype(jnp.int32)
    batch, tokens = logits.shape
    logits = (logits - jnp.max(logits, axis=-1, keepdims=True)) / draws.temperature

    def noise(row: jax.Array, position: jax.Array) -> jax.Array:
        """By token, so that what top_k and top_p leave out does not change the noise of the others."""
        return jax.random.gumbel(jax.random.fold_in(jax.random.fold_in(key, row), position), (tokens,), logits.dtype)

    noises = jax.vmap(noise)(jnp.arange(batch), jnp.broadcast_to(position, (batch,)))
    if draws.top_k is None and draws.top_p is None:
        return jnp.argmax(logits + noises, axis=-1).astype(jnp.int32)
    logits, order = jax.lax.top_k(logits, min(draws.top_k or tokens, tokens))
    if draws.top_p is not None and draws.top_p < 1:
        total = jnp.cumsum(jax.nn.softmax(logits, axis=-1), axis=-1)
        before = jnp.pad(total[:, :-1], ((0, 0), (1, 0)))
        logits = jnp.where(before < draws.top_p, logits, -jnp.inf)
    chosen = jnp.argmax(logits + jnp.take_along_axis(noises, order, axis=1), axis=-1)
    return jnp.take_along_axis(order, chosen[:, None], axis=1)[:, 0].astype(jnp.int32)
