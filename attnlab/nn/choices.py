"""Choices as numbers that gradients reach: of heads, of one branch, and of a token by additive scores."""

import jax
import jax.numpy as jnp
from jax import lax

from attnlab.attention._shared.checks import (
    accumulator_dtype,
    check_array,
    check_bool,
    check_float,
    check_floating,
    check_int,
)

Array = jax.Array


def head_gates(
    x: Array, routed: Array, shared: Array, mixing: Array, *, count: int, code_factors: bool = False
) -> tuple[Array, Array]:
    """Factors for heads' outputs, of which a token takes some (MoH, Jin et al. 2024): with a = softmax(x mixing),

        gate_i = a_0 softmax(x shared)_i                          of shared heads
        gate_i = a_1 softmax(x routed)_i if among the `count` largest, else 0        of the R routed heads
        balance = R^2 mean_i(mean_t softmax(x_t routed)_i  mean_t [t takes i])

    All heads are computed all the same: this is for what heads are worth, and saves no time.

    Args:
      x: [*tokens, D], floating. Each token's gates follow from it alone.
      routed, shared, mixing: [D, R], [D, heads], [D, 2].
      count: routed heads that a token takes; of equal ones the first.
      code_factors: as the released code for images has it, not the paper: softmax(x routed) is made to sum to 1 over
        the heads taken, routed gates are multiplied by 2 `count`, and shared ones by 2 times their number.

    Returns:
      gates [*tokens, shared heads, then routed]; balance [], to be added to a loss with a small factor: 1 where heads
      are taken equally often and count = 1. float32 (float64 for float64). What is taken has no gradient.
    """
    check_floating("x", x)
    heads = {"routed": (routed, None), "shared": (shared, None), "mixing": (mixing, 2)}
    for name, (weights, width) in heads.items():
        check_array(name, weights, (x.shape[-1], width), "[features, heads]")
        check_floating(name, weights)
    choices = routed.shape[1]
    count = check_int("count", count, least=1, most=choices)
    dtype = accumulator_dtype(x, routed, shared, mixing)
    of_routed, of_shared, parts = (
        jax.nn.softmax(jnp.matmul(x, weights, preferred_element_type=dtype)) for weights, _ in heads.values()
    )
    _, taken = lax.top_k(lax.stop_gradient(of_routed), count)
    is_taken = jax.nn.one_hot(taken, choices, dtype=dtype).sum(-2)
    among = of_routed * is_taken
    if check_bool("code_factors", code_factors):
        among = 2 * count * among / jnp.sum(among, axis=-1, keepdims=True)
        of_shared = 2 * shared.shape[1] * of_shared
    gates = jnp.concatenate([parts[..., :1] * of_shared, parts[..., 1:] * among], axis=-1)
    tokens = tuple(range(x.ndim - 1))
    return gates, choices**2 * jnp.mean(jnp.mean(of_routed, axis=tokens) * jnp.mean(is_taken, axis=tokens))


def straight_through_choice(logits: Array, gumbel: Array, temperature: float) -> Array:
    """One-hot of the largest of (logits + gumbel) / temperature, with the gradient of their softmax (Jang et al. 2017).

    Args:
      logits: [..., C], floating. gumbel: of the same shape, such as jax.random.gumbel draws it; zeros to evaluate.
      temperature: above 0; of the gradient alone.

    Returns [..., C], exactly 0 and 1: the sum of branches times these is one branch, which alone gets its gradient; the
    logits get what the mixture by the softmax would give them. Flux attention (Qiu et al. 2026) routes layers so.
    """
    check_floating("logits", logits)
    check_array("gumbel", gumbel, logits.shape, "logits' shape")
    soft = jax.nn.softmax((logits + gumbel) / check_float("temperature", temperature, above=0))
    hard = jax.nn.one_hot(jnp.argmax(soft, axis=-1), logits.shape[-1], dtype=soft.dtype)
    return hard + (soft - lax.stop_gradient(soft))


_QUERIES = 16  # at a time


def additive_logits(query: Array, key: Array, weight: Array) -> Array:
    """[B, N, T, S] of sum_h w_h tanh(q_th + k_sh), per head (Bahdanau et al. 2015).

    Their softmax over the keys is the output of a pointer network (Vinyals et al. 2015), or, times values, attention.

    Args:
      query: [B, T, N, H]; key: [B, S, N, H]; weight: [N, H], all floating. float32 (float64 for float64) is given back.

    Complexity: O(T S N H) time; memory for the logits and O(S N H), also for gradients.
    """
    check_array("query", query, (None,) * 4, "[batch, tokens, heads, head_dim]")
    batch, _, heads, width = query.shape
    check_array("key", key, (batch, None, heads, width), "[batch, keys, heads, head_dim]")
    check_array("weight", weight, (heads, width), "[heads, head_dim]")
    for name, array in (("query", query), ("key", key), ("weight", weight)):
        check_floating(name, array)
    dtype = accumulator_dtype(query, key, weight)

    @jax.checkpoint
    def of_one(query: Array) -> Array:
        return jnp.einsum("BSNH,NH->BNS", jnp.tanh(query[:, None].astype(dtype) + key), weight.astype(dtype))

    return jnp.moveaxis(lax.map(of_one, jnp.moveaxis(query, 1, 0), batch_size=_QUERIES), 0, 2)
