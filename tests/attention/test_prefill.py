"""What reads a prompt leaves the cache that steps leave, row by row, whatever stands in the padding."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from marks import slow_but
from prompts import (
    ARRAYS,
    BATCH,
    HEAD_DIM,
    HEADS,
    KEY_HEADS,
    TOKENS,
    VALUE_DIM,
    assert_leaves_what_steps_leave,
    normal,
)

import attnlab as A

GATES = {
    "log_decay": -np.abs(normal(BATCH, TOKENS, HEADS)),
    "beta": np.abs(normal(BATCH, TOKENS, HEADS)).clip(0, 1) / HEAD_DIM,
    "erase": tuple(0.3 * normal(BATCH, TOKENS, HEADS, HEAD_DIM) for _ in range(2)),
}
AGENTS = normal(3, HEADS, HEAD_DIM)
CENTROIDS = normal(HEADS, 3, HEAD_DIM)
STATE = A.RoutingState(CENTROIDS, np.ones((HEADS, 3)), CENTROIDS)


def key_values(name, **options):
    """An empty cache, what fills it and its step, both of arrays by name."""
    sizes = {"max_length": TOKENS + 2} if name in ("dot_product", "local_linear") else {}
    init, prefill = getattr(A, f"init_{name}_cache"), getattr(A, f"prefill_{name}_cache")
    cache = init(
        BATCH, num_key_heads=KEY_HEADS, head_dim=HEAD_DIM, value_dim=VALUE_DIM, dtype=np.float64, **sizes, **options
    )
    of_fill = {option: value for option, value in options.items() if (name, option) != ("dilated", "window")}
    of_step = options | ({"ridge": 1.0} if name == "local_linear" else {})

    def fill(cache, query, key, value, lengths):
        return prefill(cache, key, value, lengths=lengths, **of_fill)

    return cache, fill, functools.partial(getattr(A, f"{name}_step"), **of_step), {}


def routing(window, **options):
    cache = A.init_routing_cache(BATCH, HEADS, 3, HEAD_DIM, window=window, value_dim=VALUE_DIM, dtype=np.float64)
    fill = functools.partial(A.prefill_routing_cache, state=STATE, **options)
    return cache, fill, functools.partial(A.routing_step, state=STATE, **options), {}


def linear(gates=(), fixed=None, **options):
    """From a state that is not empty."""
    state = A.init_linear_cache(BATCH, HEADS, HEAD_DIM, VALUE_DIM, **options, dtype=np.float64)
    state = jax.tree.map(lambda x: np.abs(normal(*x.shape)), state)
    options = {**options, **(fixed or {})}

    def fill(state, lengths, **arrays):
        return A.linear_attention(
            **arrays, **options, initial_state=state, return_state=True, lengths=lengths, chunk_size=4
        )

    return state, fill, functools.partial(A.linear_step, **options), {name: GATES[name] for name in gates}


def agent(implementation):
    state = A.init_agent_cache(BATCH, HEADS, len(AGENTS), VALUE_DIM, dtype=np.float64)

    def fill(state, lengths, **arrays):
        options = {"chunk_size": 4, "implementation": implementation}
        return A.causal_agent_attention(
            **arrays, agents=AGENTS, initial_state=state, return_state=True, lengths=lengths, **options
        )

    return state, fill, functools.partial(A.agent_step, agents=AGENTS), {}


CACHES = {
    "dot product": lambda: key_values("dot_product"),
    "local": lambda: key_values("local", window=4),
    "local, sinks": lambda: key_values("local", window=3, sinks=2),
    "local, longer than the prompt": lambda: key_values("local", window=9, sinks=7),
    "dilated": lambda: key_values("dilated", window=2, dilation=3),
    "dilated, longer than the prompt": lambda: key_values("dilated", window=3, dilation=8),
    "local linear": lambda: key_values("local_linear"),
    "local linear, window": lambda: key_values("local_linear", window=4),
    "routing": lambda: routing(2),
    "routing, shared": lambda: routing(3, share_qk=True),
    "routing, layer": lambda: routing(99, normalize="layer"),
    "linear": lambda: linear(),
    "linear, elu": lambda: linear(feature_map="elu", normalize=True),
    "linear, taylor2 with decays": lambda: linear(["log_decay"], feature_map="taylor2", normalize=True),
    "linear, constant decays": lambda: linear(fixed={"log_decay": A.retention_log_decay(HEADS)}),
    "linear, erase": lambda: linear(["log_decay", "erase"]),
    "linear, gated delta": lambda: linear(["log_decay", "beta"]),
    "agent": lambda: agent("xla"),
    "agent, token by token": lambda: agent("reference"),
}
QUICK = {"local, sinks", "dilated"}


@pytest.mark.parametrize("case", slow_but(QUICK, CACHES))
def test_a_prompt_leaves_the_cache_that_steps_leave(case):
    with jax.enable_x64(True):
        cache, fill, step, gates = CACHES[case]()
        assert_leaves_what_steps_leave(cache, fill, step, ARRAYS | gates)


@pytest.mark.parametrize("case", slow_but({"agent"}, ["agent", "linear", "linear, elu"]))
def test_a_row_without_tokens_goes_on_from_the_state_before(case):
    with jax.enable_x64(True):
        cache, fill, step, gates = CACHES[case]()
        arrays = ARRAYS | gates
        _, state = jax.jit(fill)(cache, **arrays, lengths=np.zeros(BATCH, np.int32))
        first = {name: x[:, :1] for name, x in arrays.items()}
        for got, want in zip(*map(jax.tree.leaves, (step(state, **first), step(cache, **first))), strict=True):
            np.testing.assert_allclose(got, want, rtol=1e-12, atol=1e-12)


SEVERAL = {  # whose steps take several tokens
    "dot product": lambda: key_values("dot_product"),
    "local": CACHES["local"],
    "local, sinks": CACHES["local, sinks"],
    "local, more slots than tokens": CACHES["local, longer than the prompt"],
    "local, a leader for three": lambda: strided(window=5, stride=3),
}


def strided(stride, **options):
    cache, fill, step, gates = key_values("local", **options)
    return cache, fill, functools.partial(step, stride=stride), gates


@pytest.mark.parametrize("case", slow_but({"local, sinks"}, SEVERAL))
@pytest.mark.parametrize("lengths", [None, np.array([3, 0, 1, 2])], ids=["alike", "rows of their own"])
def test_any_cutting_into_steps_gives_what_single_tokens_give(case, lengths):
    with jax.enable_x64(True):
        empty, fill, step, _ = SEVERAL[case]()
        start = empty if lengths is None else fill(empty, **{n: x[:, :3] for n, x in ARRAYS.items()}, lengths=lengths)

        def by_parts(sizes):
            cache, outs, first = start, [], 0
            for size in sizes:
                out, cache = step(cache, **{name: x[:, first : first + size] for name, x in ARRAYS.items()})
                outs.append(out)
                first += size
            return np.concatenate(outs, axis=1), cache

        want, after = by_parts([1] * 8)
        for sizes in ([8], [3, 5], [1, 2, 1, 4]):
            got, cache = by_parts(sizes)
            np.testing.assert_allclose(got, want, rtol=1e-12, atol=1e-12)
            jax.tree.map(np.testing.assert_array_equal, cache, after)


def test_tokens_that_do_not_all_fit_give_nan():
    cache = A.init_dot_product_cache(BATCH, 4, KEY_HEADS, HEAD_DIM, value_dim=VALUE_DIM)
    cache = cache._replace(length=jnp.array([0, 1, 2, 4], jnp.int32))
    out, _ = A.dot_product_step(cache, *(x[:, :3] for x in ARRAYS.values()))
    np.testing.assert_array_equal(np.isnan(out).all((1, 2, 3)), [False, False, True, True])
    np.testing.assert_array_equal(np.isnan(out).any((1, 2, 3)), [False, False, True, True])


@pytest.mark.long
def test_steps_after_prompts_are_at_the_positions_of_their_rows():
    cache = A.init_dot_product_cache(BATCH, TOKENS, KEY_HEADS, HEAD_DIM, value_dim=VALUE_DIM)
    query, key, value = (jnp.asarray(x, jnp.float32) for x in ARRAYS.values())
    cache = A.prefill_dot_product_cache(cache, key[:, :6], value[:, :6], lengths=np.array([6, 0, 1, 5]))
    out, cache = A.dot_product_step(cache, query[:, 6:7], key[:, 6:7], value[:, 6:7])
    np.testing.assert_array_equal(cache.length, [7, 1, 2, 6])
    for row, count in enumerate([6, 0, 1, 5]):
        seen = np.r_[0:count, 6]
        want = A.dot_product_attention(query[row][None, 6:7], key[row][seen][None], value[row][seen][None])
        np.testing.assert_allclose(out[row], want[0], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda cache, k, v: A.prefill_dot_product_cache(cache, k, v), r"key: got .*; the cache was made for 9 tokens"),
        (
            lambda cache, k, v: A.prefill_dot_product_cache(cache, k[:, :4], v[:, :5]),
            "value: got .*; need key's tokens, 4",
        ),
        (
            lambda cache, k, v: A.prefill_dot_product_cache(cache, k[:, :0], v[:, :0]),
            "key: got .*; need at least one token",
        ),
        (
            lambda cache, k, v: A.dot_product_step(
                cache._replace(length=jnp.zeros(3, jnp.int32)), k[:, :1], k[:, :1], v[:, :1]
            ),
            r"cache.length: got int32\[3\]; need integers \[\], or \[batch\] = \[4\]",
        ),
    ],
)
def test_wrong_prompts_are_named(call, message):
    cache = A.init_dot_product_cache(BATCH, 9, KEY_HEADS, HEAD_DIM, value_dim=VALUE_DIM)
    key, value = (jnp.asarray(ARRAYS[name], jnp.float32) for name in ("key", "value"))
    with pytest.raises(ValueError, match=f"^{message}"):
        call(cache, key, value)
