"""Chunked linear attention for Hopper: values, states and gradients in simulation, and that every variant lowers."""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from marks import slow_but

from attnlab import linear_attention
from kernels_pallas.gpu import chunk, common
from kernels_pallas.gpu.chunked_linear import chunked_linear_attention, kept_shapes, refusal, smem_bytes
from kernels_pallas.gpu.chunked_linear_backward import chunked_linear_gradients

RESET = -1e30  # how segments come: attnlab.attention._shared.chunks.RESET
# Root mean square of the error beside that of the numbers: what the field asks of bfloat16 kernels (forward,
# gradients); float16 has three bits more.
TOLERANCE = {jnp.bfloat16: (6e-3, 8e-3), jnp.float16: (6e-3 / 8, 8e-3 / 8)}
# With the same keys again and again, updates of a chunk cancel and their roundings do not: they grow as the root of C.
# The chunked form in numpy, its operands rounded to bfloat16 and sums in float64, is off by 1e-2 (betas to 1) or 2e-2.
REPEATED = 64**0.5 / 2
VARIANTS = list(itertools.product((None, "token", "channel"), (False, True)))


def draw(
    length=130, *, heads=2, key_heads=2, features=64, value_dim=64, decay=None, delta=False, dtype=jnp.bfloat16, **more
):
    """query, key, value, log_decay, beta and state; the gradients of the output and of the last state.

    resets: tokens at which the state is dropped. mean: of log decays. strongest: of betas. keys: how many differ.
    """
    rng = np.random.default_rng(length)
    key = rng.normal(size=(1, length, key_heads, features))
    key /= np.linalg.norm(key, axis=-1, keepdims=True)
    key = np.resize(key[:, : more.get("keys", length)], key.shape)
    log_decay = beta = None
    if decay:
        log_decay = -rng.exponential(
            more.get("mean", 0.3), (1, length, heads, *((features,) if decay == "channel" else ()))
        )
        log_decay[:, list(more.get("resets", ()))] = RESET
    if delta:
        beta = rng.uniform(0, more.get("strongest", 1.0), (1, length, heads))
    tokens = (
        rng.normal(size=(1, length, heads, features)),
        key,
        rng.normal(size=(1, length, key_heads, value_dim)),
        rng.normal(size=(1, length, heads, value_dim)),
    )
    query, key, value, out_gradient = (jnp.asarray(x, dtype) for x in tokens)
    log_decay, beta, *states = (
        None if x is None else jnp.asarray(x, jnp.float32)
        for x in (log_decay, beta, *(rng.normal(size=(2, 1, heads, features, value_dim))))
    )
    return (query, key, value, log_decay, beta, states[0]), (out_gradient, states[1])


def recurrence(arrays, cotangents):
    """(out, state), and the gradients of `arrays`: token by token in float64."""
    query, key, value, log_decay, beta, state = (None if x is None else np.asarray(x, np.float64) for x in arrays)
    out_gradient, gradient = (np.asarray(x, np.float64) for x in cotangents)
    batch, length, heads, _ = query.shape
    group = heads // key.shape[2]
    key, value = (np.repeat(x, group, axis=2) for x in (key, value))
    decay = np.ones((batch, length, heads, 1)) if log_decay is None else np.exp(log_decay.reshape(*query.shape[:3], -1))
    strength = np.ones((batch, length, heads)) if beta is None else beta
    out, steps = [], []
    for t in range(length):
        decayed = decay[:, t, ..., None] * state
        error = value[:, t] - (0 if beta is None else np.einsum("bnfv,bnf->bnv", decayed, key[:, t]))
        update = strength[:, t, :, None] * error
        state = decayed + key[:, t, ..., None] * update[..., None, :]
        out.append(np.einsum("bnfv,bnf->bnv", state, query[:, t]))
        steps.append((decayed, error, update, state))
    last, found = state, [[] for _ in range(5)]
    for t in reversed(range(length)):
        decayed, error, update, state = steps[t]
        gradient = gradient + query[:, t, ..., None] * out_gradient[:, t, ..., None, :]
        of_update = np.einsum("bnfv,bnf->bnv", gradient, key[:, t])
        of_error = strength[:, t, :, None] * of_update
        of_key, of_decayed = np.einsum("bnfv,bnv->bnf", gradient, update), gradient
        if beta is not None:
            of_key = of_key - np.einsum("bnfv,bnv->bnf", decayed, of_error)
            of_decayed = gradient - key[:, t, ..., None] * of_error[..., None, :]
        of_decay = np.sum(of_decayed * decayed, axis=-1)
        if log_decay is not None and log_decay.ndim == 3:
            of_decay = of_decay.sum(axis=-1)
        of_query = np.einsum("bnfv,bnv->bnf", state, out_gradient[:, t])
        now = (of_query, of_key, of_error, of_decay, np.sum(of_update * error, axis=-1))
        for rows, x in zip(found, now, strict=True):
            rows.insert(0, x)
        gradient = decay[:, t, ..., None] * of_decayed
    found = [np.stack(rows, axis=1) for rows in found]
    for i in (1, 2):
        found[i] = found[i].reshape(batch, length, heads // group, group, -1).sum(axis=3)
    found = [None if x is None else y for x, y in zip(arrays, (*found, gradient), strict=True)]
    return (np.stack(out, axis=1), last), found


def values_and_gradients(arrays, cotangents):
    out, state, kept = chunked_linear_attention(*arrays, keep=True)
    return (out, state), chunked_linear_gradients(*arrays[:-1], kept, *cotangents)


def assert_near(got, want, tolerance):
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        assert a.shape == b.shape
        error, size = (np.sqrt(np.mean(x**2)) for x in (np.asarray(a, np.float64) - b, b))
        assert error <= tolerance * size, (error / size, b.shape)


CASES = {
    "one token": {"length": 1, "decay": "token"},
    "plain": {"heads": 4},
    "plain, widths": {"length": 70, "features": 40, "value_dim": 200, "heads": 1, "key_heads": 1},
    "plain, float16": {"dtype": jnp.float16, "key_heads": 1},
    "token": {"decay": "token", "key_heads": 1, "features": 100},
    "token, resets": {"decay": "token", "resets": (0, 10, 63, 64, 100)},
    "token, strong": {"decay": "token", "mean": 30.0},
    "token, float16": {"decay": "token", "dtype": jnp.float16, "value_dim": 130},
    "channel": {"decay": "channel", "key_heads": 1},
    "channel, resets": {"decay": "channel", "resets": (5, 64, 127)},
    "channel, strong": {"decay": "channel", "mean": 30.0},
    "channel, widths": {"length": 70, "decay": "channel", "features": 130, "value_dim": 40, "dtype": jnp.float16},
    "delta": {"delta": True, "length": 192},
    "delta, one key, strong": {"delta": True, "keys": 1, "strongest": 2.0},
    "delta, few keys": {"delta": True, "keys": 3, "key_heads": 1},
    "delta, widths": {"delta": True, "length": 70, "features": 256, "value_dim": 256, "heads": 1, "key_heads": 1},
    "gated delta": {"delta": True, "decay": "token", "length": 70, "heads": 1, "key_heads": 1},
    "gated delta, groups": {"delta": True, "decay": "token", "heads": 4, "key_heads": 2, "features": 128},
    "gated delta, resets": {"delta": True, "decay": "token", "resets": (20, 64), "strongest": 2.0},
    "gated delta, float16": {"delta": True, "decay": "token", "dtype": jnp.float16, "value_dim": 128},
    "gated delta per channel": {"delta": True, "decay": "channel", "key_heads": 1},
    "gated delta per channel, resets": {"delta": True, "decay": "channel", "resets": (33, 90), "features": 128},
}


@pytest.mark.parametrize("case", slow_but(("gated delta",), CASES))
@pytest.mark.long
def test_values_states_and_gradients_equal_the_recurrence_s(case, on_gpu):
    arrays, cotangents = draw(**CASES[case])
    got, gradients = on_gpu(jax.jit(values_and_gradients), arrays, cotangents)
    want, wanted = recurrence(arrays, cotangents)
    forward, backward = (x * (REPEATED if "keys" in CASES[case] else 1) for x in TOLERANCE[arrays[0].dtype.type])
    assert got[0].dtype == arrays[0].dtype
    assert_near(got, want, forward)
    assert_near(gradients, wanted, backward)


STRETCHES = {
    "plain": {"heads": 1, "key_heads": 1, "length": 257},
    "token, resets": {"decay": "token", "resets": (10, 64, 100), "key_heads": 1},
    "channel": {"decay": "channel", "heads": 1, "key_heads": 1, "features": 128},
    "delta, widths": {"delta": True, "heads": 1, "key_heads": 1, "features": 256, "length": 70},
    "gated delta": {"delta": True, "decay": "token", "length": 70, "heads": 1, "key_heads": 1},
    "gated delta, five chunks": {"delta": True, "decay": "token", "length": 300, "heads": 1, "key_heads": 1},
    "gated delta, resets": {"delta": True, "decay": "token", "resets": (64, 150), "length": 192, "key_heads": 1},
    "gated delta per channel": {"delta": True, "decay": "channel", "key_heads": 1},
}


@pytest.mark.parametrize("case", slow_but(("gated delta",), STRETCHES))
@pytest.mark.long
def test_stretches_side_by_side_give_the_recurrence_s_values_and_gradients(case, on_gpu, monkeypatch):
    monkeypatch.setattr(chunk, "stretches", lambda chunks, *_: min(chunks, 3))
    arrays, cotangents = draw(**STRETCHES[case])
    assert chunk.Call(*arrays[:5]).stretches > 1
    got, gradients = on_gpu(jax.jit(values_and_gradients), arrays, cotangents)
    want, wanted = recurrence(arrays, cotangents)
    assert_near(got, want, TOLERANCE[jnp.bfloat16][0])
    assert_near(gradients, wanted, TOLERANCE[jnp.bfloat16][1])


def test_long_sequences_of_few_heads_have_stretches():
    """Blocks of both passes fit on the GPU at once, and where one pass fills half of it there is no second one."""
    assert chunk.stretches(4096, 32, 0) == 4
    assert chunk.stretches(4096, 32, 32) == 3
    assert chunk.stretches(4096, 1, 1) == 67
    for few in ((4096, 64, 64), (4096, 200, 200), (95, 1, 0), (1, 1, 1)):
        assert chunk.stretches(*few) == 1
    for chunks, heads in itertools.product((96, 97, 4095), (1, 5, 16)):
        arrays, _ = structs(64 * chunks, heads=heads, key_heads=heads, delta=True)
        call = chunk.Call(*arrays[:5])
        spans = call.spans(0, call.stretches)
        assert spans[:, 1].min() > 0
        np.testing.assert_array_equal(spans[:, 0] + spans[:, 1], [*spans[1:, 0], chunks])


@pytest.mark.slow
def test_states_are_dropped_exactly(on_gpu):
    """Behind a reset nothing is left of what came before, not even where that is huge."""
    for decay, delta in VARIANTS[2:]:
        arrays, _ = draw(140, decay=decay, delta=delta, resets=(30, 64, 100), heads=1, key_heads=1)
        query, key, value, *rest, state = arrays
        before = jnp.arange(140)[:, None, None] < 100
        huge = (query, key, jnp.where(before, 2.0**40 * value, value), *rest, 2.0**40 * state)
        (out, last), (large_out, large_last) = (on_gpu(chunked_linear_attention, *each) for each in (arrays, huge))
        np.testing.assert_array_equal(out[:, 100:], large_out[:, 100:])
        np.testing.assert_array_equal(last, large_last)


@pytest.mark.slow
def test_two_runs_give_the_same_bits(on_gpu):
    arrays, cotangents = draw(70, decay="channel", delta=True, heads=2, key_heads=1)
    runs = [on_gpu(jax.jit(values_and_gradients), arrays, cotangents) for _ in range(2)]
    for a, b in zip(*map(jax.tree.leaves, runs), strict=True):
        np.testing.assert_array_equal(a, b)


@pytest.mark.slow
def test_a_split_sequence_gives_what_the_whole_gives(on_gpu):
    arrays, _ = draw(128, decay="token", delta=True, heads=1, key_heads=1)
    *tokens, state = arrays
    first, second = ([x[:, part] for x in tokens] for part in (slice(0, 64), slice(64, 128)))
    out, last = on_gpu(chunked_linear_attention, *arrays)
    before, middle = on_gpu(chunked_linear_attention, *first, state)
    after, resumed = on_gpu(chunked_linear_attention, *second, middle)
    np.testing.assert_array_equal(out, jnp.concatenate([before, after], axis=1))
    np.testing.assert_array_equal(last, resumed)


@pytest.mark.slow
def test_outputs_may_be_float32(on_gpu):
    arrays, cotangents = draw(70, heads=1, key_heads=1)
    out, _ = on_gpu(functools.partial(chunked_linear_attention, out_dtype=jnp.float32), *arrays)
    (want, _), _ = recurrence(arrays, cotangents)
    assert out.dtype == jnp.float32
    assert_near(out, want, TOLERANCE[jnp.bfloat16][0])


def mechanism(length=100, **drawn):
    arrays, _ = draw(length, heads=2, key_heads=1, **drawn)
    names = ("query", "key", "value", "log_decay", "beta")
    return {name: x for name, x in zip(names, arrays, strict=False) if x is not None}


MECHANISM = {
    "segments": (mechanism(decay="token"), {"segment_ids": jnp.arange(100)[None] // 30}),
    "segments, per channel, delta": (
        mechanism(decay="channel", delta=True),
        {"segment_ids": jnp.arange(100)[None] // 70},
    ),
    "segments, no decay": (mechanism(delta=True), {"segment_ids": jnp.arange(100)[None] // 50}),
    "elu, normalised": (mechanism(), {"feature_map": "elu", "normalize": True}),
}


@pytest.mark.slow
@pytest.mark.parametrize("case", MECHANISM)
def test_the_mechanism_gives_the_reference_s_values_and_gradients(case, on_gpu):
    arrays, options = MECHANISM[case]
    weights = jnp.asarray(np.random.default_rng(1).normal(size=arrays["query"].shape), jnp.float32)

    def run(arrays, implementation):
        def loss(arrays):
            out = linear_attention(**arrays, implementation=implementation, **options)
            return jnp.sum(out.astype(jnp.float32) * weights), out

        return jax.grad(loss, has_aux=True)(arrays)

    got = on_gpu(run, arrays, "pallas_gpu")
    want = jax.jit(functools.partial(run, implementation="reference"))(arrays)
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        a, b = (np.asarray(x, np.float32) for x in (a, b))
        np.testing.assert_allclose(a, b, rtol=0, atol=2e-2 * max(1, np.abs(b).max()))  # as in test_mechanisms.py


def loss(arrays):
    return jnp.sum(linear_attention(**arrays, implementation="pallas_gpu").astype(jnp.float32) ** 2)


def stacked():
    return jax.tree.map(lambda x: jnp.stack([x, 2 * x]), mechanism(64, decay="token"))


@pytest.mark.slow
def test_vmap_remat_and_scan_lower():
    """Simulations have effects, which none of them takes."""
    gradient = jax.grad(jax.checkpoint(loss))
    for transformed in (jax.vmap(gradient), lambda xs: jax.lax.map(gradient, xs)):
        assert b"linear_token_gradients" in lower(transformed, stacked())


def structs(length=256, features=64, value_dim=64, decay=None, delta=False, dtype=jnp.bfloat16, heads=4, key_heads=2):
    """Shapes of the arguments, and of the cotangents."""
    sizes = ((heads, features), (key_heads, features), (key_heads, value_dim))
    tokens = [jax.ShapeDtypeStruct((2, length, *size), dtype) for size in sizes]
    gates = {None: None, "token": (2, length, heads), "channel": (2, length, heads, features)}
    log_decay = None if decay is None else jax.ShapeDtypeStruct(gates[decay], jnp.float32)
    beta = jax.ShapeDtypeStruct((2, length, heads), jnp.float32) if delta else None
    state = jax.ShapeDtypeStruct((2, heads, features, value_dim), jnp.float32)
    return [*tokens, log_decay, beta, state], [jax.ShapeDtypeStruct((2, length, heads, value_dim), dtype), state]


def lower(function, *arguments):
    return jax.export.export(jax.jit(function), platforms=["cuda"])(*arguments).mlir_module_serialized


LOWERED = list(itertools.product(VARIANTS, (jnp.bfloat16, jnp.float16), (64, 128, 192, 256)))


# CI lowers the slow ones too.
QUICK_LOWERED = [(variant, jnp.bfloat16, 128) for variant in (("token", True), ("channel", True))]


@pytest.mark.parametrize("call", slow_but(QUICK_LOWERED, LOWERED))
@pytest.mark.long
def test_kernels_and_gradients_lower_for_hopper(call):
    variant, dtype, width = call
    arrays, cotangents = structs(features=width, value_dim=width, decay=variant[0], delta=variant[1], dtype=dtype)
    assert b"linear_states" in lower(chunked_linear_attention, *arrays)
    kept = kept_shapes(arrays[0], arrays[2], *arrays[3:5])
    assert b"linear_token_gradients" in lower(chunked_linear_gradients, *arrays[:-1], kept, *cotangents)


@pytest.mark.parametrize("variant", slow_but([("token", True)], VARIANTS))
@pytest.mark.long
def test_stretches_lower_for_hopper(variant):
    arrays, cotangents = structs(6144, decay=variant[0], delta=variant[1])
    assert chunk.Call(*arrays[:5]).stretches > 2
    assert lower(chunked_linear_attention, *arrays).count(b"linear_states") > 1
    kept = kept_shapes(arrays[0], arrays[2], *arrays[3:5])
    assert b"linear_token_gradients" in lower(chunked_linear_gradients, *arrays[:-1], kept, *cotangents)


@pytest.mark.slow
def test_traces_with_64_bit_numbers():
    for decay, delta in VARIANTS:
        arrays, cotangents = structs(6144, decay=decay, delta=delta)
        with jax.enable_x64(True):
            lower(chunked_linear_attention, *arrays)
            kept = kept_shapes(arrays[0], arrays[2], *arrays[3:5])
            lower(chunked_linear_gradients, *arrays[:-1], kept, *cotangents)


def test_kept_shapes_are_what_is_kept():
    for decay, delta in VARIANTS:
        arrays, _ = structs(70, features=40, value_dim=100, decay=decay, delta=delta)
        kept = jax.eval_shape(functools.partial(chunked_linear_attention, keep=True), *arrays)[2]
        assert kept == kept_shapes(arrays[0], arrays[2], *arrays[3:5])


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        ({"dtype": jnp.float32}, "all bfloat16 or all float16, got float32"),
        ({"features": 257}, "up to 256 features and value channels, got 257 and 64"),
        ({"length": 0}, "arrays that are not empty"),
    ],
)
def test_refuses_with_the_reason(arguments, reason):
    arrays, cotangents = structs(**arguments)
    with pytest.raises(ValueError, match=reason):
        jax.eval_shape(chunked_linear_attention, *arrays)
    with pytest.raises(ValueError, match=reason):
        jax.eval_shape(chunked_linear_gradients, *arrays[:-1], [], *cotangents)


def test_serves_every_variant_and_width():
    for (decay, delta), *widths in itertools.product(VARIANTS, (1, 64, 80, 128, 256), (1, 64, 129, 256)):
        arrays, _ = structs(features=widths[0], value_dim=widths[1], decay=decay, delta=delta)
        assert refusal(*arrays[:-1]) is None
        assert smem_bytes(*widths, decay=decay, delta=delta) <= common.SMEM_BUDGET


def test_refuses_what_is_not_causal():
    arrays, _ = draw(9)
    with pytest.raises(ValueError, match="serves causal calls"):
        linear_attention(*arrays[:3], is_causal=False, implementation="pallas_gpu")
