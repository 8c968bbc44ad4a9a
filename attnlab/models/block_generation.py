"""Drawing tokens from a language model whose blocks of tokens see all of their own block: masked ones, or the next.

Both read the whole sequence anew for every forward pass, under masks.block_causal; there is no cache.
"""

from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from attnlab.attention import masks
from attnlab.attention._shared.checks import check_int, require
from attnlab.models.generation import Draws, check_draws, draw_token
from attnlab.models.lm import LanguageModel, check_tokens
from attnlab.nn.mixers.base import Pattern
from attnlab.nn.sharding import spec_of, under_auto_axes, varying_as


@under_auto_axes(lambda model, tokens, **_: spec_of(tokens))
def fill_blocks(
    model: LanguageModel,
    tokens: jax.Array,
    *,
    block: int,
    steps: int | None = None,
    key: jax.Array,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float | None = None,
) -> jax.Array:
    """Draws what a sequence lacks: int [B, T] -> the same with tokens where it had the mask, vocabulary - 1.

    For models of train.BlockDiffusionTask. Blocks are filled one after another, each in steps: a forward pass predicts
    all masked tokens of the block, and those that a random order has next are kept, drawn independently of each other.

    Args:
      block: tokens in a block; of the last one, what T lacks of it is drawn too and left out.
      steps: passes per block; None is one for each of its tokens, so that each is drawn given all that are there.
      key: of the order and of the draws. A row's depend on its number, not on the other rows.
      temperature, top_k, top_p: as generate takes them. With a temperature of 0 the order is still random.
    """
    check_tokens("tokens", tokens)
    draws, block = _checked(model, key, temperature, top_k, top_p), check_int("block", block, least=1)
    steps = block if steps is None else check_int("steps", steps, least=1, most=block)
    batch, length = tokens.shape
    masked, blocks = model.vocabulary - 1, -(-length // block)
    canvas = jnp.pad(tokens.astype(jnp.int32), ((0, 0), (0, blocks * block - length)), constant_values=masked)
    token_key, order_key = jax.random.split(key)

    def rank(row: jax.Array, number: jax.Array) -> jax.Array:
        noise = jax.random.uniform(jax.random.fold_in(jax.random.fold_in(order_key, row), number), (block,))
        return jnp.argsort(jnp.argsort(noise))

    def step(number: jax.Array, canvas: jax.Array) -> jax.Array:
        of_block, done = number // steps, number % steps + 1
        first = of_block * block
        drawn = _drawn(model, canvas, first, block, token_key, draws)
        own = jax.lax.dynamic_slice_in_dim(canvas, first, block, axis=1)
        ranks = jax.vmap(rank, (0, None))(jnp.arange(batch), of_block)
        shown = (own == masked) & (ranks * steps < done * block)
        return jax.lax.dynamic_update_slice_in_dim(canvas, jnp.where(shown, drawn, own), first, axis=1)

    canvas = varying_as(canvas, (nnx.state(model), tokens, key))
    # Blocks before the first masked token are there already.
    first = jnp.argmax(jnp.any(canvas == masked, axis=0)) // block
    return jax.lax.fori_loop(first * steps, blocks * steps, step, canvas)[:, :length].astype(tokens.dtype)


def next_blocks(
    model: LanguageModel, *, count: int, length: int, block: int, key: jax.Array, temperature: float = 1.0
) -> jax.Array:
    """Draws sequences a block at a time: tokens int32 [count, length].

    For models of train.NextBlockImageTask: after a block of start tokens, vocabulary - 1, the logits at a block predict
    the tokens of the next one, which are drawn independently of each other. block divides length.
    """
    count, length, block = (
        check_int(name, value, least=1) for name, value in (("count", count), ("length", length), ("block", block))
    )
    require(length % block == 0, "block", block, f"must divide length {length}")
    draws = _checked(model, key, temperature, None, None)

    def step(number: jax.Array, canvas: jax.Array) -> jax.Array:
        drawn = _drawn(model, canvas[:, :length], number * block, block, key, draws)
        return jax.lax.dynamic_update_slice_in_dim(canvas, drawn, (number + 1) * block, axis=1)

    canvas = jnp.full((count, length + block), model.vocabulary - 1, jnp.int32)
    canvas = jax.lax.fori_loop(0, length // block, step, varying_as(canvas, (nnx.state(model), key)))
    return canvas[:, block:]


def _checked(model: LanguageModel, key: Any, temperature: Any, top_k: Any, top_p: Any) -> Draws:
    """Of all tokens but the last, which stands for none."""
    require(model.vocabulary > 1, "vocabulary", model.vocabulary, "need a token besides the mask")
    return check_draws(model, key, temperature, top_k, top_p, (), model.vocabulary - 1)


def _drawn(
    model: LanguageModel, tokens: jax.Array, first: jax.Array, block: int, key: jax.Array, draws: Draws
) -> jax.Array:
    """Tokens int32 [B, block] by the logits at the block from `first` on."""
    positions = first + jnp.arange(block)
    wanted = jnp.broadcast_to(positions, (len(tokens), block))
    logits = model(tokens, pattern=Pattern(masks.block_causal(block)), output_positions=wanted)
    return jax.vmap(draw_token, (1, 0, None, None), 1)(logits, positions, key, draws)
