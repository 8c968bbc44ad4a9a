"""EMA sinks: reference vectors, the limits in which they are a mask, what is not finite, decoding, and exchanges."""

import functools
import re
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import parts
import prompts
import pytest
from marks import slow_but

import attnlab as A

VECTORS = Path(__file__).parents[1] / "vectors" / "ema_sinks"
FORMS = ("reference", "xla")
every_form = pytest.mark.parametrize("form", slow_but(["xla"], FORMS))
LENGTH, HEADS, KEY_HEADS = 20, 4, 2
_rng = np.random.default_rng(0)
QUERY, KEY = _rng.normal(size=(2, LENGTH, HEADS, 8)), _rng.normal(size=(2, LENGTH, KEY_HEADS, 8))
VALUE = _rng.normal(size=(2, LENGTH, KEY_HEADS, 5))


@every_form
@pytest.mark.parametrize("what", slow_but(["values"], ["values", "gradients"]))
def test_vectors(what, form):
    data = np.load(VECTORS / "case1.npz")
    options = {name: data[name].item() for name in ("chunk", "chunks_kept", "decay")}

    def call(given):
        return A.ema_sinks_attention(**given, **options, return_lse=True, implementation=form)

    def loss(given):
        out, lse = call(given)
        return (out * data["cotangent_out"]).sum() + (lse * data["cotangent_lse"]).sum()

    with jax.enable_x64(True):
        given = {name: data[name] for name in ("query", "key", "value")}
        if what == "values":
            out, lse = jax.jit(call)(given)
            np.testing.assert_allclose(out, data["out"], atol=1e-12)
            np.testing.assert_allclose(lse, data["lse"], atol=1e-12)
        else:
            for argument, gradient in jax.jit(jax.grad(loss))(given).items():
                np.testing.assert_allclose(gradient, data[f"grad_{argument}"], atol=1e-12, err_msg=argument)


@pytest.mark.slow
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize(
    ("space", "window"),
    [((LENGTH,), {"window": (5,), "is_causal": True}), ((5, 4), {"window": (2, 4), "is_causal": (True, False)})],
)
def test_a_sink_that_stays_is_local_attention_with_it(space, window, form):
    """Of single tokens on one axis; of chunks whose own tokens are the second axis (MotionStream)."""
    options = {"chunk": (*space, 1)[1], "chunks_kept": 1 + window["window"][0], "decay": 1.0, "implementation": form}
    got = A.ema_sinks_attention(QUERY, KEY, VALUE, **options)
    line = (x.reshape(2, *space, *x.shape[2:]) for x in (QUERY, KEY, VALUE))
    want = A.local_attention(*line, **window, sinks=1)
    np.testing.assert_allclose(got, want.reshape(got.shape), atol=2e-6)


def sees_the_first_the_own_and_the_last_chunk(query, key):
    own, seen = query[0] // 4, key[0] // 4
    return (seen == 0) | ((seen <= own) & (own - seen <= 1))


ALL = A.masks.blocks(LENGTH)
MASKS = {
    "the first chunk stays": (
        {"chunks_kept": 3, "decay": 1.0},
        A.masks.Mask(sees_the_first_the_own_and_the_last_chunk),
    ),
    "none has left": ({"chunks_kept": 5, "decay": 0.3}, A.masks.block_causal(4)),
    "one chunk": ({"chunk": LENGTH, "chunks_kept": 2, "decay": 0.3}, ALL),
    "a chunk longer than all": ({"chunk": 30, "chunks_kept": 2, "decay": 0.3}, ALL),
}


@pytest.mark.slow
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("is_causal", [False, True])
@pytest.mark.parametrize("name", MASKS)
def test_where_nothing_is_averaged_it_is_a_mask(name, is_causal, form):
    options, mask = MASKS[name]
    mask = mask & A.masks.causal() if is_causal else mask
    given = {"chunk": 4, "is_causal": is_causal, "implementation": form} | options
    dense = A.masks.dense_mask(mask, (LENGTH,))[None, None]
    with jax.enable_x64(True):
        got = A.ema_sinks_attention(QUERY, KEY, VALUE, **given, return_lse=True)
        want = A.dot_product_attention(QUERY, KEY, VALUE, mask=dense, return_lse=True, implementation="reference")
        for x, y in zip(got, want):
            np.testing.assert_allclose(x, y, atol=1e-12)


@pytest.mark.slow
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize(("decay", "last"), [(0.0, 4), (0.5, 6), (1.0, 3)])
def test_what_is_not_finite_is_seen_in_the_window_and_as_long_as_the_sink_has_it(decay, last, form):
    """A key of chunk 2 of seven, of which three are kept: chunk 4 is the first that has it in its sink, if at all."""
    key = KEY.copy()
    key[1, 7, 1, 3] = np.nan
    out = A.ema_sinks_attention(
        QUERY, key, VALUE, chunk=3, chunks_kept=3, decay=decay, is_causal=True, implementation=form
    )
    chunks = np.isnan(np.asarray(out)).all(-1)
    seen = np.zeros_like(chunks)
    seen[1, 7 : 3 * last + 3, 2:] = True
    np.testing.assert_array_equal(chunks, seen)
    assert np.isfinite(np.asarray(out)[~seen]).all()


# --- Decoding ---------------------------------------------------------------------------------------------------------

CALLS = [
    {"chunk": chunk, "chunks_kept": kept, "decay": decay, "is_causal": is_causal}
    for chunk, kept, decay, is_causal in [
        (1, 4, 0.5, True),
        (3, 3, 0.75, True),
        (4, 2, 0.5, True),
        (4, 3, 0.25, False),
        (5, 9, 0.5, True),
        (2, 3, 0.0, True),
        (2, 3, 1.0, False),
        (30, 3, 0.5, True),
    ]
]


@pytest.mark.slow
@pytest.mark.parametrize("number", range(len(CALLS)))
def test_decoding_is_the_parallel_form(number):
    """Token by token, or chunk by chunk where chunks are seen whole."""
    options = CALLS[number]
    tokens = 1 if options["is_causal"] else options["chunk"]
    sizes = {name: options[name] for name in ("chunk", "chunks_kept")}
    with jax.enable_x64(True):
        want = A.ema_sinks_attention(QUERY, KEY, VALUE, **options, implementation="reference")
        cache = A.init_ema_sinks_cache(2, KEY_HEADS, 8, **sizes, value_dim=5, dtype="float64")
        step = jax.jit(functools.partial(A.ema_sinks_step, **options))
        for start in range(0, LENGTH, tokens):
            now = (x[:, start : start + tokens] for x in (QUERY, KEY, VALUE))
            out, cache = step(cache, *now)
            np.testing.assert_allclose(out, want[:, start : start + tokens], atol=1e-12)


@pytest.mark.slow
@pytest.mark.parametrize("number", [0, 2, 4, 5])  # halves are exact, so that products and sums round alike in one
def test_a_prompt_leaves_what_steps_leave(number):
    options = CALLS[number]
    window = {name: options[name] for name in ("chunk", "chunks_kept", "decay")}
    sizes = {name: options[name] for name in ("chunk", "chunks_kept")}

    def fill(cache, query, **prompt):
        return A.prefill_ema_sinks_cache(cache, **prompt, **window)

    with jax.enable_x64(True):
        cache = A.init_ema_sinks_cache(
            prompts.BATCH,
            prompts.KEY_HEADS,
            prompts.HEAD_DIM,
            **sizes,
            value_dim=prompts.VALUE_DIM,
            dtype="float64",
        )
        prompts.assert_leaves_what_steps_leave(
            cache, fill, functools.partial(A.ema_sinks_step, **window), prompts.ARRAYS
        )


def test_a_cache_is_as_large_as_its_window():
    cache = jax.eval_shape(lambda: A.init_ema_sinks_cache(2, KEY_HEADS, 8, chunk=3, chunks_kept=4))
    assert cache.key.shape == cache.value.shape == (2, 12, KEY_HEADS, 8)


# --- Devices ----------------------------------------------------------------------------------------------------------


def sinks(**options):
    return functools.partial(A.ema_sinks_attention, **{"return_lse": True, "is_causal": True} | options)


BOTH = (parts.SHARED, parts.SHARED)
CASES = {
    "halo and carry": parts.Case(
        sinks(chunk=4, chunks_kept=3, decay=0.5),
        parts.qkv(64),
        {"collective-permute": 1, "all-gather": 2},
        results=BOTH,
    ),
    "window over parts": parts.Case(
        sinks(chunk=2, chunks_kept=7, decay=0.75, is_causal=False),
        parts.qkv(64),
        {"collective-permute": 2, "all-gather": 2},
        results=BOTH,
    ),
    "chunk by chunk": parts.Case(
        sinks(chunk=8, chunks_kept=2, decay=0.0, implementation="reference"),
        parts.qkv(64),
        {"collective-permute": 1, "all-gather": 2},
        results=BOTH,
    ),
    "window of all": parts.Case(
        sinks(chunk=8, chunks_kept=30, decay=0.5),
        parts.qkv(64),
        {"collective-permute": 7, "all-gather": 2},
        results=BOTH,
    ),
    "not finite": parts.Case(
        sinks(chunk=4, chunks_kept=3, decay=0.5),
        parts.qkv(64, spoilt=True),
        {"collective-permute": 1, "all-gather": 2},
        results=BOTH,
    ),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", CASES)
def test_devices_exchange_a_halo_and_a_sink(name):
    parts.assert_equals_one_device(CASES[name])


def test_a_part_holds_whole_chunks():
    case = CASES["halo and carry"]._replace(call=sinks(chunk=3, chunks_kept=3, decay=0.5))
    mesh = parts.mesh_of(8)
    with jax.set_mesh(mesh), pytest.raises(ValueError, match="chunk: got 3; must divide the 8 tokens"):
        jax.eval_shape(lambda arrays: case.call(**arrays), parts.placed(case, mesh))


# --- Wrong calls ------------------------------------------------------------------------------------------------------

CALL = {"chunk": 4, "chunks_kept": 3, "decay": 0.5}
WRONG = {
    "chunk: got 0; need": {"chunk": 0},
    "chunks_kept: got 1; need": {"chunks_kept": 1},
    "decay: got 1.5; need": {"decay": 1.5},
    "decay: got -0.5; need": {"decay": -0.5},
    "is_causal: got 1; need True or False": {"is_causal": 1},
    "scale: got 'a'; need": {"scale": "a"},
}


@pytest.mark.parametrize("message", WRONG)
def test_wrong_arguments_are_named(message):
    with pytest.raises((ValueError, TypeError)) as error:
        A.ema_sinks_attention(QUERY, KEY, VALUE, **CALL | WRONG[message])
    assert str(error.value).startswith(message)


@pytest.mark.parametrize(
    ("options", "tokens", "message"),
    [
        ({"chunk": 3}, 1, "chunk: got 3 in 3 chunks; the cache was made for 12 tokens"),
        ({}, 4, "query: got float32[2,4,4,8]; a step takes 1 tokens with this is_causal"),
        ({"is_causal": False}, 1, "query: got float32[2,1,4,8]; a step takes 4 tokens with this is_causal"),
    ],
)
def test_wrong_steps_are_named(options, tokens, message):
    cache = A.init_ema_sinks_cache(2, KEY_HEADS, 8, chunk=4, chunks_kept=3, value_dim=5)
    token = (jnp.asarray(x[:, :tokens], jnp.float32) for x in (QUERY, KEY, VALUE))
    with pytest.raises(ValueError, match=re.escape(message)):
        A.ema_sinks_step(cache, *token, **CALL | options)
