"""Pyramid attention: reference vectors, the limits in which it is attention, decoding, its exchanges."""

import functools
import itertools
from pathlib import Path

import jax
import numpy as np
import parts
import prompts
import pytest
from marks import slow_but

import attnlab as A
from attnlab.attention import block_selection

VECTORS = Path(__file__).parents[1] / "vectors" / "pyramid"
FORMS = ("reference", "xla")
LENGTH, HEADS, KEY_HEADS = 19, 4, 2
_rng = np.random.default_rng(0)
QUERY = _rng.normal(size=(2, LENGTH, HEADS, 8))
KEY = _rng.normal(size=(2, LENGTH, KEY_HEADS, 8))
VALUE = _rng.normal(size=(2, LENGTH, KEY_HEADS, 5))


def vectors(name):
    return {key: x if x.ndim else x.item() for key, x in np.load(VECTORS / f"{name}.npz").items()}


VECTOR_CASES = list(itertools.product(["given", "causal"], ["values", "gradients"]))


@pytest.mark.parametrize("form", slow_but(["xla"], FORMS))
@pytest.mark.parametrize("case", slow_but([("causal", "values")], VECTOR_CASES))
@pytest.mark.long
def test_vectors(case, form):
    name, what = case
    data = vectors(name)
    is_causal, fractions = bool(data["is_causal"]), data["fractions"].tolist()
    given = {name: data[name] for name in ("query", "key", "value")}
    rule = {"eligible": np.ones((1, 1), bool)}
    if is_causal:
        complete, own = block_selection.causal_blocks(*data["scores"].shape[2:], data["query_block"], data["key_block"])
        rule = {"eligible": complete, "own": own, "first": 1}
    places = block_selection.pyramid_places(data["scores"].shape[3], fractions=fractions, listed=2 * is_causal)

    def loss(given, levels):
        out, lse = A.pyramid_attention(
            **given,
            levels=levels,
            query_block=data["query_block"],
            key_block=data["key_block"],
            places=places,
            is_causal=is_causal,
            return_lse=True,
            implementation=form,
        )
        return (out * data["cotangent_out"]).sum() + (lse * data["cotangent_lse"]).sum(), (out, lse)

    with jax.enable_x64(True):
        levels = block_selection.pyramid_levels(data["scores"], fractions=fractions, **rule)
        np.testing.assert_array_equal(levels, data["levels"])
        if what == "values":
            _, (out, lse) = jax.jit(loss)(given, levels)
            np.testing.assert_allclose(out, data["out"], atol=1e-12)
            np.testing.assert_allclose(lse, data["lse"], atol=1e-12)
            return
        gradients, _ = jax.jit(jax.grad(loss, has_aux=True))(given, levels)
        for argument, gradient in gradients.items():
            np.testing.assert_allclose(gradient, data[f"grad_{argument}"], atol=1e-11, err_msg=argument)


@pytest.mark.slow
@pytest.mark.parametrize("form", FORMS)
def test_level_1_is_block_sparse_attention(form):
    listed = np.random.default_rng(1).random((2, KEY_HEADS, 5, 5)) < 0.6
    listed[:, 0, 1] = False  # a block of queries that sees nothing
    sizes = {"query_block": 4, "key_block": 4, "return_lse": True, "implementation": form}
    got = A.pyramid_attention(QUERY, KEY, VALUE, listed.astype(int), **sizes, sizes=(1, 2))
    want = A.block_sparse_attention(QUERY, KEY, VALUE, block_selection.lists_of(listed), **sizes)
    for x, y in zip(got, want):
        np.testing.assert_allclose(x, y, atol=2e-6)


@pytest.mark.slow
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("is_causal", [False, True])
def test_means_of_equal_keys_and_values_are_attention(form, is_causal):
    """Keys and values constant in groups of 4; causal, also with levels that would reach over the frontier."""
    key, value = (np.repeat(x[:, :5], 4, axis=1)[:, :LENGTH] for x in (KEY, VALUE))
    levels = np.random.default_rng(2).choice([1, 2, 4], size=(1, HEADS, 7, 5))
    options = {"is_causal": is_causal, "return_lse": True, "implementation": form}
    with jax.enable_x64(True):
        got = A.pyramid_attention(QUERY, key, value, levels, query_block=3, key_block=4, sizes=(1, 2, 4), **options)
        want = A.dot_product_attention(QUERY, key, value, **options)
        for x, y in zip(got, want):
            np.testing.assert_allclose(x, y, atol=1e-12)


@pytest.mark.slow
def test_what_finds_no_place_is_not_seen():
    levels = np.array([[[[1, 2, 2, 1, 1]]]]).repeat(5, 2)
    kept = np.array([[[[1, 2, 0, 1, 0]]]]).repeat(5, 2)
    call = functools.partial(A.pyramid_attention, QUERY, KEY, VALUE, query_block=4, key_block=4, sizes=(1, 2))
    np.testing.assert_array_equal(call(levels=levels, places=(2, 1)), call(levels=kept, places=(2, 1)))
    np.testing.assert_allclose(
        call(levels=levels, places=(2, 1)), call(levels=kept, implementation="reference"), atol=2e-6
    )


def by_definition(levels, sizes, is_causal):
    """(out, lse), of a query at a time: a row of each token, or of each group of tokens that is one mean."""
    out, lse = np.zeros((2, LENGTH, HEADS, 5)), np.full((2, LENGTH, HEADS), -np.inf)
    for b, t, n in np.ndindex(2, LENGTH, HEADS):
        groups = []
        for block, level in enumerate(levels[b, n // 2, t // 4]):
            tokens = np.arange(4 * block, min(4 * block + 4, LENGTH))
            is_fine = len(tokens) < 4 or (is_causal and tokens[-1] >= t // 4 * 4)
            groups += np.split(tokens, 4 // level) if level in sizes and not is_fine else []
            groups += [[s] for s in tokens if level in sizes and is_fine and not (is_causal and s > t)]
        if groups:
            keys, values = (np.stack([x[b, g, n // 2].mean(0) for g in groups]) for x in (KEY, VALUE))
            logits = keys @ QUERY[b, t, n] / np.sqrt(8) + np.log([len(g) for g in groups])
            lse[b, t, n] = np.logaddexp.reduce(logits)
            out[b, t, n] = np.exp(logits - lse[b, t, n]) @ values
    return out, lse


@pytest.mark.parametrize("is_causal", [False, True])
@pytest.mark.parametrize("form", FORMS)
def test_a_number_that_is_no_size_is_not_seen(form, is_causal):
    """In no block: not in one cut short, nor in the query block's own."""
    levels = np.random.default_rng(5).choice([-3, 0, 1, 2, 3, 4, 7, 300], size=(2, KEY_HEADS, 5, 5))
    levels[0, 0, :] = 7
    options = {"query_block": 4, "key_block": 4, "sizes": (1, 2, 4), "is_causal": is_causal, "return_lse": True}
    with jax.enable_x64(True):
        got = jax.jit(functools.partial(A.pyramid_attention, **options, implementation=form))(QUERY, KEY, VALUE, levels)
    for x, y in zip(got, by_definition(levels, (1, 2, 4), is_causal)):
        np.testing.assert_allclose(x, y, atol=1e-12)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize(("keys", "places"), [(0, None), (LENGTH, (0, 0)), (3, (0, 0))])
def test_without_places_or_keys_nothing_is_seen(keys, places, form):
    levels = np.ones((1, 1, 5, -(-keys // 4)), int)
    options = {"query_block": 4, "key_block": 4, "sizes": (1, 2), "places": places, "return_lse": True}
    out, lse = A.pyramid_attention(QUERY, KEY[:, :keys], VALUE[:, :keys], levels, **options, implementation=form)
    np.testing.assert_array_equal(out, np.zeros((2, LENGTH, HEADS, 5)))
    np.testing.assert_array_equal(lse, np.full((2, LENGTH, HEADS), -np.inf))


# --- Levels -----------------------------------------------------------------------------------------------------------


def test_levels_by_rank():
    """Of 10 blocks, with the lower number first of equal scores; a fraction's rounding gives no block more."""
    scores = np.array([[3, 1, 3, 2, 9, 8, 7, 6, 5, 4]], np.float32)
    levels = block_selection.pyramid_levels(
        scores, eligible=np.ones((1, 1), bool), fractions=(0.1, 0.7, 0.8), sizes=(1, 2, 8)
    )
    np.testing.assert_array_equal(levels, [[2, 0, 8, 0, 1, 2, 2, 2, 2, 2]])
    assert block_selection.pyramid_places(10, fractions=(0.1, 0.7, 0.8), listed=2) == (3, 6, 1)


@pytest.mark.parametrize("fractions", [(0.2, 0.55, 0.9), (0.0, 0.3, 0.3), (1.0, 1.0, 1.0)], ids=str)
def test_places_are_enough_for_every_row(fractions):
    complete, own = block_selection.causal_blocks(14, 7, 2, 4)
    scores = np.random.default_rng(3).normal(size=(14, 7))
    levels = np.asarray(
        block_selection.pyramid_levels(
            scores, eligible=complete, own=own, fractions=fractions, sizes=(1, 2, 4), first=1
        )
    )
    most = [(levels == size).sum(-1).max() for size in (1, 2, 4)]
    places = block_selection.pyramid_places(7, fractions=fractions, listed=2)
    assert all(x <= y for x, y in zip(most, places))
    assert (levels[own] == 1).all()
    assert (levels[~(complete | own)] == 0).all()


RULE = {"query_block": 2, "sizes": (1, 2), "fractions": (0.4, 0.8), "first": 1}


# --- Decoding ---------------------------------------------------------------------------------------------------------

RULES = [
    {"query_block": q, "key_block": k, "sizes": sizes, "fractions": fractions, "first": first}
    for (q, k), (sizes, fractions), first in itertools.product(
        [(1, 4), (2, 4), (4, 4), (8, 4), (1, 8)], [((1, 2), (0.4, 0.8)), ((1, 2, 4), (0.2, 0.6, 1.0))], (0, 1)
    )
]
CUTS = [(1, 2, 3, 12, LENGTH), (LENGTH,)]


@pytest.mark.slow
@pytest.mark.parametrize("cuts", CUTS, ids=str)
@pytest.mark.parametrize("number", range(len(RULES)))
def test_decoding_is_the_parallel_form_however_it_is_cut(number, cuts):
    key_block, rule = RULES[number]["key_block"], {k: x for k, x in RULES[number].items() if k != "key_block"}
    with jax.enable_x64(True):
        levels = block_selection.pooled_levels(QUERY, KEY, **RULES[number])
        want = A.pyramid_attention(
            QUERY,
            KEY,
            VALUE,
            levels,
            query_block=rule["query_block"],
            key_block=key_block,
            sizes=rule["sizes"],
            is_causal=True,
            implementation="reference",
        )
        cache = A.init_pyramid_cache(
            2, LENGTH, KEY_HEADS, 8, key_block=key_block, sizes=rule["sizes"], value_dim=5, dtype="float64"
        )
        outs = []
        for start, end in itertools.pairwise((0, *cuts)):
            out, cache = A.pyramid_step(cache, *(x[:, start:end] for x in (QUERY, KEY, VALUE)), **rule)
            outs.append(out)
        np.testing.assert_allclose(np.concatenate(outs, 1), want, atol=1e-12)
        assert len(cuts) == 1 or _is_nan_past_the_last_slot(cache, cache.key.shape[1] * key_block, rule)


def _is_nan_past_the_last_slot(cache, slots, rule):
    past = [x[:, : slots - LENGTH + 1] for x in (QUERY, KEY, VALUE)]
    out, _ = A.pyramid_step(cache, *past, **rule)
    return np.isnan(out[:, -1]).all() and np.isfinite(out[:, :-1]).all()


@pytest.mark.long
def test_a_step_sees_its_own_blocks_where_no_other_gets_a_level():
    rule = {"query_block": 4, "sizes": (1, 2), "fractions": (0.0, 0.0), "first": 0}
    cache = A.init_pyramid_cache(2, LENGTH, KEY_HEADS, 8, key_block=4, sizes=(1, 2), value_dim=5, dtype="float32")
    out, _ = A.pyramid_step(cache, *map(np.float32, (QUERY, KEY, VALUE)), **rule)
    want = A.dot_product_attention(
        QUERY, KEY, VALUE, mask=A.masks.blocks(4), is_causal=True, implementation="reference"
    )
    np.testing.assert_allclose(out, want, atol=2e-6)


@pytest.mark.slow
@pytest.mark.parametrize("number", range(len(RULES)))
def test_a_prompt_leaves_what_steps_leave(number):
    key_block, rule = RULES[number]["key_block"], {k: x for k, x in RULES[number].items() if k != "key_block"}
    with jax.enable_x64(True):
        cache = A.init_pyramid_cache(
            prompts.BATCH,
            13,
            prompts.KEY_HEADS,
            prompts.HEAD_DIM,
            value_dim=prompts.VALUE_DIM,
            dtype="float64",
            key_block=key_block,
            sizes=rule["sizes"],
        )
        fill, step = (functools.partial(f, **rule) for f in (A.prefill_pyramid_cache, A.pyramid_step))
        prompts.assert_leaves_what_steps_leave(cache, fill, step, prompts.ARRAYS)


# --- Devices ----------------------------------------------------------------------------------------------------------

_LEVELS = np.random.default_rng(4).choice([0, 1, 2, 4], size=(2, 2, 16, 8))


def by_levels(**options):
    return functools.partial(
        A.pyramid_attention, levels=_LEVELS, query_block=4, key_block=8, sizes=(1, 2, 4), return_lse=True, **options
    )


CASES = {
    "causal": parts.Case(
        by_levels(is_causal=True), parts.qkv(64), {"all-to-all": 4}, results=(parts.SHARED, parts.SHARED)
    ),
    "not finite": parts.Case(
        by_levels(), parts.qkv(64, spoilt=True), {"all-to-all": 4}, results=(parts.SHARED, parts.SHARED)
    ),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", CASES)
def test_devices_exchange_their_sequence_for_heads(name):
    parts.assert_equals_one_device(CASES[name])


# --- Wrong calls ------------------------------------------------------------------------------------------------------

ONES = np.ones((1, 1, 5, 5), int)
CALL = {"levels": ONES, "query_block": 4, "key_block": 4, "sizes": (1, 2)}
WRONG = {
    "levels: got int32[1,1,5,4]; need levels of 5 key blocks": {"levels": ONES[..., 1:]},
    "levels: got int32[1,3,5,5]; need batch 1 or 2, and heads": {"levels": ONES.repeat(3, 1)},
    "levels: got dtype float32; need an integer dtype": {"levels": ONES.astype(float)},
    "sizes: got (1, 3); need divisors of key_block, 4": {"sizes": (1, 3)},
    "sizes: got (2, 4); need 1 first, and growing numbers": {"sizes": (2, 4)},
    "sizes: got (1, 2, 2); need 1 first": {"sizes": (1, 2, 2)},
    "sizes: got 2; need a tuple of ints": {"sizes": 2},
    "places: got (5,); need one for each of 2 sizes": {"places": (5,)},
    "places: got 5; need a tuple of ints": {"places": 5},
    "places: got (5, -1); need at least 0": {"places": (5, -1)},
}


@pytest.mark.parametrize("message", WRONG)
def test_wrong_arguments_are_named(message):
    with pytest.raises((ValueError, TypeError)) as error:
        A.pyramid_attention(QUERY, KEY, VALUE, **CALL | WRONG[message])
    assert str(error.value).startswith(message)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        ({"fractions": (0.5,)}, "fractions: got (0.5,); need one for each of 2 sizes"),
        ({"fractions": (0.5, 0.4)}, "fractions: got (0.5, 0.4); need numbers that do not fall"),
        ({"fractions": (0.5, 1.5)}, "fractions: got 1.5"),
        ({"fractions": 0.5}, "fractions: got 0.5; need a tuple of numbers"),
        ({"sizes": (1, 4)}, "sizes: got (1, 4); the cache was made for others, with 6 rows a block"),
        ({"query_block": 3}, "query_block: got 3; need one of it and key_block, 4, to divide the other"),
    ],
)
def test_wrong_rules_are_named(call, message):
    cache = A.init_pyramid_cache(2, LENGTH, KEY_HEADS, 8, key_block=4, sizes=(1, 2), value_dim=5)
    with pytest.raises((ValueError, TypeError)) as error:
        A.pyramid_step(cache, QUERY[:, :1], KEY[:, :1], VALUE[:, :1], **RULE | call)
    assert str(error.value).startswith(message)
