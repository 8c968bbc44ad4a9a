"""Problems that the benchmarks of accelerators time: arrays, a call of attnlab, and the FLOPs that it needs.

All are bfloat16. FLOPs are those of the products that a problem needs: 4 H of a pair of a query and a key that it sees,
2.5 times that of its gradients; of a token of a recurrence 4 H V, 6 H V with the delta rule. Visited tiles, recomputed
logits and inverses of chunks are not in them, so that shares of the peak compare forms of all kinds. Steps of decoding,
which wait for memory, are the next token of every row of a batch.
"""

import dataclasses
import functools
import os
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp

import attnlab
from attnlab.bench.device import Case, Prepared

Arrays = Mapping[str, jax.Array]
_SMALL = 1024  # tokens, at which values and gradients are compared with float64
# Of the largest number of each array: results are rounded to 8 bits, and sums of many rounded terms lose some more.
MOST_ERROR = 3e-2


@dataclasses.dataclass(frozen=True)
class Problem:
    """make(key, batch, tokens, heads) -> arrays. attend(arrays, implementation) -> the output. flops(tokens): of a
    forward.

    batch, tokens, heads: as it is timed. small, small_heads: tokens and heads by which it is checked. facts: what other
    libraries are told of it. is_step: `tokens` are those before the one that is computed.
    """

    name: str
    make: Callable[[jax.Array, int, int, int], dict[str, jax.Array]]
    attend: Callable[[Arrays, str | None], jax.Array]
    flops: Callable[[int], float]
    tokens: int
    batch: int = 1
    heads: int = 16
    small: int = _SMALL
    small_heads: int = 2
    facts: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    is_step: bool = False

    @property
    def passes(self) -> dict[str, float]:
        """By what a pass needs, in FLOPs of a forward."""
        return {"forward": 1.0} if self.is_step else {"forward": 1.0, "backward": 2.5}

    def case(self, library: str, passes: str, **how: Any) -> Case:
        """Of one pass, by a library. how: prepare, clock, most_error."""
        tokens = self.batch * (1 if self.is_step else self.tokens)
        flops = self.passes[passes] * self.flops(self.tokens)
        return Case(self.name, library, passes, flops=flops, tokens=tokens, **how)


def normal(key: jax.Array, *shape: int) -> jax.Array:
    return jax.random.normal(key, shape, jnp.bfloat16)


def softmax(
    name: str,
    attend: Callable[..., jax.Array],
    pairs: Callable[[int], float],
    *,
    heads: int = 16,
    group: int = 1,
    head_dim: int = 128,
    names: tuple[str, ...] = ("query", "key", "value"),
    space: Callable[[int], tuple[int, ...]] | None = None,
    products: int = 1,
    **options: Any,
) -> Problem:
    """pairs(tokens): of a query and a key that it sees, of one head. group: heads that share a key head. space: of
    tokens, by their number. products: as many pairs of products as softmax attention has."""

    def make(key: jax.Array, batch: int, tokens: int, heads: int) -> dict[str, jax.Array]:
        axes = (tokens,) if space is None else space(tokens)
        keys = jax.random.split(key, len(names))
        of = {name: heads // group if name in ("key", "value") else heads for name in names}
        return {name: normal(one, batch, *axes, of[name], head_dim) for name, one in zip(names, keys)}

    def call(arrays: Arrays, implementation: str | None) -> jax.Array:
        return attend(**arrays, implementation=implementation)

    each = 4 * products * head_dim * heads * options.get("batch", 1)
    of_heads: Any = {"heads": heads, "small_heads": max(2, group)}
    return Problem(name, make, call, lambda tokens: each * pairs(tokens), **of_heads, **options)


def window_pairs(window: int) -> Callable[[int], float]:
    return lambda tokens: min(window, tokens) * (tokens - (min(window, tokens) - 1) / 2)


def linear(
    name: str,
    *,
    decay: str | None = None,
    delta: bool = False,
    is_causal: bool = True,
    heads: int = 16,
    group: int = 1,
    head_dim: int = 128,
    **options: Any,
) -> Problem:
    def make(key: jax.Array, batch: int, tokens: int, heads: int) -> dict[str, jax.Array]:
        keys, key_heads = jax.random.split(key, 5), heads // group
        query = normal(keys[0], batch, tokens, heads, head_dim)
        key_, value = (normal(one, batch, tokens, key_heads, head_dim) for one in keys[1:3])
        # Keys of length one, with which the delta rule is stable.
        unit = key_ / jnp.linalg.norm(key_.astype(jnp.float32), axis=-1, keepdims=True)
        arrays = {"query": query, "key": unit.astype(jnp.bfloat16), "value": value}
        gates = {"token": (batch, tokens, heads), "channel": (batch, tokens, heads, head_dim)}
        if decay is not None:
            arrays["log_decay"] = -jax.random.exponential(keys[3], gates[decay]) / 16
        if delta:
            arrays["beta"] = jax.random.uniform(keys[4], gates["token"])
        return arrays

    def attend(arrays: Arrays, implementation: str | None) -> jax.Array:
        given: Any = arrays
        return attnlab.linear_attention(**given, is_causal=is_causal, implementation=implementation)

    each = (6 if delta else 4) * head_dim**2 * heads * options.get("batch", 1)
    of_heads: Any = {"heads": heads, "small_heads": max(2, group)}
    return Problem(name, make, attend, lambda tokens: each * tokens, **of_heads, **options)


def cached_step(
    name: str,
    batch: int,
    tokens: int,
    *,
    step: Callable[..., Any] = attnlab.dot_product_step,
    heads: int = 16,
    group: int = 1,
    head_dim: int = 128,
    **options: Any,
) -> Problem:
    def make(key: jax.Array, batch: int, tokens: int, heads: int) -> dict[str, jax.Array]:
        lengths = {"query": 1, "key": 1, "value": 1, "keys": tokens, "values": tokens}
        of = {name: heads if name == "query" else heads // group for name in lengths}
        keys = jax.random.split(key, len(lengths))
        return {n: normal(k, batch, length, of[n], head_dim) for k, (n, length) in zip(keys, lengths.items())}

    def attend(arrays: Arrays, implementation: str | None) -> jax.Array:
        query, key, value, keys, values = (arrays[name] for name in ("query", "key", "value", "keys", "values"))
        cache = attnlab.DotProductCache(keys, values, jnp.asarray(keys.shape[1] - 1, jnp.int32))
        return step(cache, query, key, value, implementation=_of_steps(implementation))[0]

    each = 4 * head_dim * heads * batch
    of_heads: Any = {"heads": heads, "small_heads": max(2, group)}
    return Problem(name, make, attend, lambda tokens: each * tokens, tokens, batch, **of_heads, is_step=True, **options)


def routing_step(
    name: str, batch: int, window: int, *, clusters: int = 8, heads: int = 16, head_dim: int = 128
) -> Problem:
    """With full rings of this many tokens, which problems have as `tokens`."""

    def make(key: jax.Array, batch: int, tokens: int, heads: int) -> dict[str, jax.Array]:
        token, ring = (batch, 1, heads, head_dim), (batch, heads, clusters, tokens, head_dim)
        shapes = {"query": token, "key": token, "value": token, "keys": ring, "values": ring}
        keys = jax.random.split(key, len(shapes))
        arrays = {n: normal(k, *shape) for k, (n, shape) in zip(keys, shapes.items())}
        return arrays | {"centroids": jax.random.normal(key, (heads, clusters, head_dim))}

    def attend(arrays: Arrays, implementation: str | None) -> jax.Array:
        token: Any = {name: arrays[name] for name in ("query", "key", "value")}
        keys, values, centroids = (arrays[name] for name in ("keys", "values", "centroids"))
        cache = attnlab.RoutingCache(keys, values, jnp.full(keys.shape[:3], keys.shape[3], jnp.int32))
        state = attnlab.RoutingState(centroids, jnp.ones(centroids.shape[:2]), centroids)
        return attnlab.routing_step(cache, **token, state=state, implementation=_of_steps(implementation))[0]

    each = 4 * head_dim * heads * batch
    return Problem(name, make, attend, lambda tokens: each * tokens, window, batch, heads, is_step=True)


def state_step(name: str, of: Problem, batch: int, *, head_dim: int = 128) -> Problem:
    def make(key: jax.Array, batch: int, tokens: int, heads: int) -> dict[str, jax.Array]:
        state = jax.random.normal(jax.random.fold_in(key, 0), (batch, heads, head_dim, head_dim))
        return of.make(key, batch, 1, heads) | {"state": state}

    def attend(arrays: Arrays, implementation: str | None) -> jax.Array:
        given: Any = {key: x for key, x in arrays.items() if key != "state"}
        state = attnlab.LinearState(arrays["state"], None)
        return attnlab.linear_step(state, **given, implementation=_of_steps(implementation))[0]

    each = of.flops(1) * batch
    return Problem(name, make, attend, lambda tokens: each, 1, batch, of.heads, is_step=True)


def _of_steps(implementation: str | None) -> str | None:
    """They have no reference: in float64 their xla form is it."""
    return "xla" if implementation == "reference" else implementation


# --- Calls ------------------------------------------------------------------------------------------------------------


def prepare(problem: Problem, implementation: str, passes: str, cache: int) -> Prepared:
    """Calls of attnlab, and their check. cache: bytes of the device's, out of which inputs are kept."""
    key = jax.random.key(int.from_bytes(os.urandom(4), "little"))
    sets = calls(problem, lambda arrays: problem.attend(arrays, implementation), key, passes, cache)
    return sets, lambda: errors(problem, implementation, jax.random.fold_in(key, 1), passes)


def timed(problem: Problem, key: jax.Array) -> dict[str, jax.Array]:
    """The arrays with which it is timed."""
    return problem.make(key, problem.batch, problem.tokens, problem.heads)


def calls(
    problem: Problem, attend: Callable[[Arrays], jax.Array], key: jax.Array, passes: str, cache: int
) -> list[Any]:
    """Jitted functions with their arguments."""
    make = jax.jit(functools.partial(timed, problem))
    sets = [make(one) for one in jax.random.split(key, numbers(problem, cache))]
    if passes == "forward":
        compiled = jax.jit(attend)
        return [(compiled, arrays) for arrays in sets]
    # Of vjp's function, all that the forward keeps are arrays, so that it can be an argument.
    pull, backward = jax.jit(lambda arrays: jax.vjp(attend, arrays)), jax.jit(lambda pull, cotangent: pull(cotangent))
    return [(backward, transpose, out) for out, transpose in map(pull, sets)]


def of_form(problem: Problem, implementation: str, passes: str) -> Callable[[Arrays], Any]:
    """The forward of an implementation, or it and its gradients."""

    def call(arrays: Arrays) -> Any:
        out, pull = jax.vjp(lambda arrays: problem.attend(arrays, implementation), arrays)
        return out if passes == "forward" else pull(out)

    return call


def numbers(problem: Problem, cache: int) -> int:
    """Sets of inputs that are together twice as large as the cache."""
    shapes = jax.eval_shape(functools.partial(timed, problem), jax.random.key(0))
    size = sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(shapes))
    return max(1, min(8, -(-2 * cache // size)))


def errors(problem: Problem, implementation: str, key: jax.Array, passes: str) -> dict[str, float]:
    """Values, or gradients, beside the reference in float64 on the same inputs: on a GPU or a CPU; a TPU has none, so
    that for it the CPU of its host computes the reference."""
    arrays = problem.make(key, 1, problem.small, problem.small_heads)

    def results(arrays: Arrays, implementation: str) -> dict[str, jax.Array]:
        if passes == "forward":
            return {"out": problem.attend(arrays, implementation)}
        out, pull = jax.vjp(lambda arrays: problem.attend(arrays, implementation), arrays)
        cotangent = jnp.cos(jnp.arange(out.size, dtype=jnp.float32)).reshape(out.shape)
        return dict(pull(cotangent.astype(jnp.bfloat16).astype(out.dtype))[0])

    got = jax.jit(results, static_argnums=1)(arrays, implementation)
    device = jax.devices("cpu")[0] if jax.default_backend() == "tpu" else jax.devices()[0]
    got, arrays = jax.device_put((got, arrays), device)
    with jax.enable_x64(True):
        wide = {name: x.astype(jnp.float64) for name, x in arrays.items()}
        want = jax.jit(results, static_argnums=1)(wide, "reference")
        return {
            name: float(jnp.max(jnp.abs(got[name].astype(jnp.float64) - x)) / jnp.max(jnp.abs(x)))
            for name, x in want.items()
        }
