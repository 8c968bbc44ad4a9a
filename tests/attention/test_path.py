"""PaTH attention: its formula, softmax attention and products of reflections as limits, decoding, and devices."""

import functools
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from marks import slow_but
from parts import Case, assert_equals_one_device, qkv
from prompts import ARRAYS, BATCH, HEAD_DIM, HEADS, KEY_HEADS, TOKENS, VALUE_DIM, assert_leaves_what_steps_leave

from attnlab import PathCache, dot_product_attention, init_path_cache, path_attention, path_step, prefill_path_cache

VECTORS = pathlib.Path(__file__).parents[1] / "vectors" / "path"
FORMS = ("reference", "xla")
every_form = pytest.mark.parametrize("form", slow_but(["xla"], FORMS))
attend = jax.jit(path_attention, static_argnames=("chunk_size", "implementation"))


def unit(x):
    return x / np.linalg.norm(x, axis=-1, keepdims=True)


def gates(*shape, head_dim, seed=5):
    rng = np.random.default_rng(seed)
    return {
        "transition": unit(rng.normal(size=(*shape, head_dim))),
        "beta": rng.uniform(0, 2, size=shape),
        "log_forget": -rng.exponential(size=shape) / 4,
    }


def arrays(length=13, dtype=np.float64):
    rng = np.random.default_rng(0)
    shapes = {"query": (2, length, 4, 5), "key": (2, length, 2, 5), "value": (2, length, 2, 3)}
    drawn = {name: rng.normal(size=shape) for name, shape in shapes.items()} | gates(2, length, 4, head_dim=5)
    return {name: x.astype(dtype) for name, x in drawn.items()}


def with_gradients(inputs, **options):
    def call(inputs):
        return path_attention(**inputs, **options)

    out, pull = jax.vjp(call, inputs)
    return out, pull(jnp.cos(out))[0]


def assert_equal(got, want, atol):
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=0, atol=atol), got, want)


@pytest.mark.parametrize("case", slow_but([("xla", 3)], [("reference", 64), ("xla", 1), ("xla", 3), ("xla", 64)]))
@pytest.mark.long
def test_vectors(case):
    form, chunk_size = case
    with jax.enable_x64(True):
        data = np.load(VECTORS / "case1.npz")
        names = ("query", "key", "value", "w", "beta", "log_forget")
        options = {"scale": float(data["opt_scale"]), "chunk_size": chunk_size, "implementation": form}

        def call(query, key, value, w, beta, log_forget):
            return path_attention(query, key, value, w, beta=beta, log_forget=log_forget, **options)

        out, gradients = jax.jit(lambda cot, *a: (call(*a), jax.vjp(call, *a)[1](cot)))(
            data["cot"], *(data[name] for name in names)
        )
        np.testing.assert_allclose(out, data["out"], rtol=0, atol=1e-12)
        for got, name in zip(gradients, names, strict=True):
            np.testing.assert_allclose(got, data[f"d_{name}"], rtol=0, atol=1e-9)


def test_equals_the_product_of_its_transitions():
    """As the paper writes it, pair by pair."""
    with jax.enable_x64(True):
        inputs = arrays(length=9)
        q, k, v, w, beta, g = (np.repeat(x, 2, 2) if x.shape[2] == 2 else x for x in inputs.values())
        out = np.zeros((2, 9, 4, 3))
        for b, n, t in np.ndindex(2, 4, 9):
            logits, transition, forget = np.zeros(t + 1), np.eye(5), 0.0
            for s in range(t, -1, -1):
                logits[s] = 0.3 * q[b, t, n] @ transition @ k[b, s, n] + forget
                transition = transition @ (np.eye(5) - beta[b, s, n] * np.outer(w[b, s, n], w[b, s, n]))
                forget += g[b, s, n]
            weights = np.exp(logits - logits.max())
            out[b, t, n] = weights / weights.sum() @ v[b, : t + 1, n]
        got = attend(**inputs, scale=0.3, chunk_size=4)
        np.testing.assert_allclose(got, out, rtol=0, atol=1e-13)


@pytest.mark.slow
@pytest.mark.parametrize("has_gate", [True, False])
def test_chunks_of_any_size_are_the_scan_over_tokens(has_gate):
    """Values and gradients, of all tokens in one chunk as of chunks far fewer than they."""
    with jax.enable_x64(True):
        inputs = arrays(length=21) | ({} if has_gate else {"log_forget": None})
        inputs = {name: x for name, x in inputs.items() if x is not None}
        want = jax.jit(functools.partial(with_gradients, implementation="reference"))(inputs)
        for size in (1, 2, 4, 8, 21, 64):
            got = jax.jit(functools.partial(with_gradients, chunk_size=size, implementation="xla"))(inputs)
            assert_equal(got, want, 1e-12)


@pytest.mark.slow
def test_gradients_are_those_of_finite_differences():
    with jax.enable_x64(True):
        inputs, along = arrays(length=7), jax.tree.map(np.sin, arrays(length=7))

        @jax.jit
        def loss(inputs):
            return jnp.sum(jnp.cos(path_attention(**inputs, chunk_size=3)))

        @jax.jit
        def slope(inputs):
            return sum(jnp.vdot(x, along[name]) for name, x in jax.grad(loss)(inputs).items())

        step = 1e-5
        ahead, behind = (
            loss(jax.tree.map(lambda x, y, sign=sign: x + sign * step * y, inputs, along)) for sign in (1, -1)
        )
        np.testing.assert_allclose(slope(inputs), (ahead - behind) / (2 * step), rtol=1e-8)


@pytest.mark.slow
@pytest.mark.parametrize("form", FORMS)
def test_strengths_of_nothing_are_softmax_attention(form):
    with jax.enable_x64(True):
        inputs = arrays()
        del inputs["log_forget"]
        inputs["beta"] = np.zeros_like(inputs["beta"])
        out = attend(**inputs, chunk_size=4, implementation=form)
        want = dot_product_attention(*(inputs[name] for name in ("query", "key", "value")), is_causal=True)
        np.testing.assert_allclose(out, want, rtol=0, atol=1e-13)


@every_form
def test_a_gate_of_nothing_hides_what_is_before(form):
    """As if the row began there, and what is not finite before it harms nothing after it."""
    with jax.enable_x64(True):
        inputs = arrays()
        inputs["log_forget"][:, 6] = -np.inf
        inputs["value"][:, 2] = np.nan
        inputs["beta"][:, 4] = np.nan
        out = attend(**inputs, chunk_size=4, implementation=form)
        assert np.isnan(out).all((0, 2, 3)).tolist() == [False] * 2 + [True] * 4 + [False] * 7
        alone = attend(**{name: x[:, 6:] for name, x in inputs.items()}, chunk_size=4, implementation=form)
        np.testing.assert_allclose(out[:, 6:], alone, rtol=0, atol=1e-13)


@pytest.mark.slow
@pytest.mark.parametrize("prompt", [1, 5, 12])
def test_steps_after_a_prompt_are_the_parallel_form(prompt):
    with jax.enable_x64(True):
        inputs = arrays()
        want = attend(**inputs, chunk_size=4)
        cache = init_path_cache(2, 13, 4, 2, 5, value_dim=3, dtype=jnp.float64)
        read = {name: x[:, :prompt] for name, x in inputs.items() if name != "query"}
        cache = prefill_path_cache(cache, **read, chunk_size=4)
        step = jax.jit(path_step)
        for t in range(prompt, 13):
            out, cache = step(cache, **{name: x[:, t : t + 1] for name, x in inputs.items()})
            np.testing.assert_allclose(out, want[:, t : t + 1], rtol=0, atol=1e-13)
        out, _ = step(cache, **{name: x[:, :1] for name, x in inputs.items()})
        assert np.isnan(out).all()  # past what the cache is for


@pytest.mark.slow
def test_a_prompt_leaves_what_steps_leave():
    """Keys to rounding, as they are changed by products of many tokens at once."""
    with jax.enable_x64(True):
        cache = init_path_cache(BATCH, TOKENS + 2, HEADS, KEY_HEADS, HEAD_DIM, value_dim=VALUE_DIM, dtype=jnp.float64)
        cache = cache._replace(length=jnp.zeros(BATCH, jnp.int32))
        more = gates(BATCH, TOKENS, HEADS, head_dim=HEAD_DIM)

        def fill(cache, lengths, query, **arrays):
            out = path_attention(query, **arrays, chunk_size=4)
            return out, prefill_path_cache(cache, **arrays, lengths=lengths, chunk_size=4)

        assert_leaves_what_steps_leave(cache, fill, path_step, ARRAYS | more)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["key", "value", "transition", "beta", "log_forget"])
def test_what_is_not_finite_reaches_the_same_queries_in_steps_and_after_a_prompt(name):
    """At the first token, where a transition acts on nothing, and later; the parallel form agrees."""
    for at in (0, 4):
        inputs = arrays(dtype=np.float32)
        inputs["log_forget"][:, 9] = -np.inf
        inputs[name][:, at] = np.nan
        seen = np.isnan(attend(**inputs, chunk_size=4)).all((0, 2, 3))
        starts = at if name in ("key", "value") or at > 0 else 9
        assert seen.tolist() == [starts <= t < 9 for t in range(13)]
        for prompt in (0, 6):
            cache = init_path_cache(2, 13, 4, 2, 5, value_dim=3)
            if prompt:
                read = {name: x[:, :prompt] for name, x in inputs.items() if name != "query"}
                cache = prefill_path_cache(cache, **read, chunk_size=4)
            for t in range(prompt, 13):
                out, cache = path_step(cache, **{name: x[:, t : t + 1] for name, x in inputs.items()})
                assert np.isnan(out).all() == seen[t]
                assert np.isnan(out).any() == seen[t]


@pytest.mark.slow
def test_a_layer_of_reflections_follows_a_permutation():
    """Swaps of the first two of three things: the parity of their number decides which key the query meets."""
    swap = unit(np.array([1.0, -1.0, 0.0]))
    moves = np.array([0, 1, 0, 1, 1, 0, 1])
    query = np.zeros((1, 7, 1, 3), np.float32)
    query[..., 0], query[..., 2] = 40.0, 20.0
    key = np.tile(np.array([0.0, 0.0, 1.0], np.float32), (1, 7, 1, 1))
    key[0, 0, 0] = [1.0, 0.0, 0.0]  # the thing that moves
    value = np.zeros((1, 7, 1, 1), np.float32)
    value[0, 0] = 1
    out = path_attention(
        query,
        key,
        value,
        np.tile(swap, (1, 7, 1, 1)).astype(np.float32),
        beta=2.0 * moves[None, :, None].astype(np.float32),
        chunk_size=3,
    )
    is_first = np.cumsum(moves) % 2 == 0
    np.testing.assert_allclose(out[0, :, 0, 0], is_first, rtol=0, atol=1e-3)


_DRAWN = {name: x.astype(np.float32) for name, x in gates(2, 48, 4, head_dim=8).items()}
_UNGATED = {name: x for name, x in _DRAWN.items() if name != "log_forget"}
CASES = {
    "gates": Case(functools.partial(path_attention, chunk_size=4), qkv(48) | _DRAWN, {"all-to-all": 2}),
    "not finite": Case(
        functools.partial(path_attention, chunk_size=4), qkv(48, spoilt=True) | _UNGATED, {"all-to-all": 2}
    ),
    "more devices than heads": Case(
        functools.partial(path_attention, implementation="reference"),
        {name: x[:1] for name, x in (qkv(48, key_heads=4) | _DRAWN).items()},
        {"all-to-all": 2},
    ),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", CASES)
def test_devices_exchange_the_sequence_for_heads_and_back(name):
    assert_equals_one_device(CASES[name])


@pytest.mark.slow
def test_memory_does_not_grow_with_the_length_squared():
    def temporary(length):
        shapes = {
            name: jax.ShapeDtypeStruct((1, length, 1, *rest), jnp.float32)
            for name, rest in {**dict.fromkeys(("query", "key", "value", "transition"), (16,)), "beta": ()}.items()
        }

        def loss(inputs):
            return jnp.sum(path_attention(**inputs) ** 2)

        return jax.jit(jax.grad(loss)).lower(shapes).compile().memory_analysis().temp_size_in_bytes

    assert temporary(8192) < 2.5 * temporary(4096)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"transition": np.zeros((2, 13, 2, 5), np.float32)}, ValueError, "transition: "),
        ({"beta": np.zeros((2, 13, 4), np.int32)}, TypeError, "beta: "),
        ({"log_forget": np.zeros(4, np.float32)}, ValueError, "log_forget: "),
        ({"chunk_size": 0}, ValueError, "chunk_size: "),
        ({"implementation": "pallas_gpu"}, ValueError, "implementation: .*path_attention has no such form"),
    ],
)
def test_wrong_calls_are_named(change, error, message):
    with pytest.raises(error, match=message):
        path_attention(**arrays(dtype=np.float32) | change)


def test_a_cache_of_another_kind_is_named():
    with pytest.raises(TypeError, match=r"cache: got .*; need a PathCache"):
        path_step(np.zeros(3), **{name: x[:, :1] for name, x in arrays().items()})
    cache = init_path_cache(2, 13, 4, 2, 5, value_dim=3)
    with pytest.raises(ValueError, match=r"cache\.forget"):
        path_step(
            PathCache(*cache[:2], cache.forget[:, :3], cache.length),
            **{name: x[:, :1] for name, x in arrays(dtype=np.float32).items()},
        )
