"""DMA: its vectors, what it keeps, decoding with no more keys than a query sees, what is not finite, and exchanges."""

import functools
import itertools
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import parts
import prompts
import pytest
from marks import slow_but

import attnlab as A

VECTORS = Path(__file__).parents[1] / "vectors" / "block_sparse"
FORMS = ("reference", "xla")
every_form = pytest.mark.parametrize("form", slow_but(["xla"], FORMS))
BATCH, LENGTH, HEADS, KEY_HEADS = 2, 19, 4, 2
_rng = np.random.default_rng(0)
QUERY, KEY = _rng.normal(size=(BATCH, LENGTH, HEADS, 8)), _rng.normal(size=(BATCH, LENGTH, KEY_HEADS, 8))
VALUE = _rng.normal(size=(BATCH, LENGTH, KEY_HEADS, 5))
# Whole numbers, so that many are equal.
BIAS = _rng.integers(-2, 3, size=(BATCH, LENGTH, KEY_HEADS)).astype(np.float64)
TOKENS = QUERY, KEY, VALUE, BIAS


@pytest.fixture(autouse=True, scope="module")
def _wide():
    with jax.enable_x64(True):
        yield


def by_loops(query, key, value, bias, width):
    """Token by token, by sorting the pairs (largest bias, earliest token) of those so far."""
    batch, length, heads, _ = query.shape
    out = np.zeros((batch, length, heads, value.shape[-1]))
    for row, t, head in itertools.product(range(batch), range(length), range(heads)):
        of = head // (heads // key.shape[2])
        kept = sorted(range(t + 1), key=lambda s: (-bias[row, s, of], s))[:width]
        logits = key[row, kept, of] @ query[row, t, head] * query.shape[-1] ** -0.5 + bias[row, kept, of]
        weights = np.exp(logits - logits.max())
        out[row, t, head] = weights / weights.sum() @ value[row, kept, of]
    return out


@every_form
@pytest.mark.parametrize("width", slow_but([4], [1, 4, 30]))
def test_equals_loops_with_ties(width, form):
    got = A.dynamic_mask_attention(*TOKENS, width=width, implementation=form)
    np.testing.assert_allclose(got, by_loops(*TOKENS, width), atol=1e-12)


@every_form
def test_vectors(form):
    """With the gradients of the weights that the bias is made with."""
    data = {name: x if x.ndim else x.item() for name, x in np.load(VECTORS / "dynamic_mask.npz").items()}

    def loss(given):
        values = given["value"].reshape(*given["value"].shape[:2], -1)
        bias = jnp.exp(given["a"] * jax.nn.softplus(values @ given["weight"]))
        out, lse = A.dynamic_mask_attention(
            *(given[name] for name in ("query", "key", "value")),
            bias,
            width=data["width"],
            return_lse=True,
            implementation=form,
        )
        return (out * data["cotangent_out"]).sum(), (bias, out, lse)

    given = {name: data[name] for name in ("query", "key", "value", "weight", "a")}
    gradients, (bias, out, lse) = jax.jit(jax.grad(loss, has_aux=True))(given)
    np.testing.assert_allclose(jnp.moveaxis(bias, 1, 2)[:, :, None], data["key_bias"], atol=1e-12)
    np.testing.assert_allclose(out, data["out"], atol=1e-12)
    np.testing.assert_allclose(lse, data["lse"], atol=1e-12)
    for name, gradient in gradients.items():
        np.testing.assert_allclose(gradient, data[f"grad_{name}"], atol=1e-10, err_msg=name)


@every_form
def test_the_bias_gets_a_gradient_where_a_query_sees_its_key(form):
    """A key that was never among the largest has none."""
    bias = np.where(np.arange(LENGTH)[None, :, None] == 9, -9.0, BIAS)
    gradient = jax.grad(
        lambda bias: (A.dynamic_mask_attention(*TOKENS[:3], bias, width=4, implementation=form) ** 2).sum()
    )
    got = np.asarray(gradient(bias))
    assert (got[:, 9] == 0).all()
    assert (np.abs(got[:, :4]).max((0, 2)) > 1e-6).all()


@every_form
@pytest.mark.parametrize("what", slow_but(["key"], ["key", "value", "bias"]))
def test_what_is_not_finite_spoils_the_queries_that_see_it(what, form):
    """Token 6 is seen until four later biases are larger; one that is NaN is the smallest."""
    bias = np.asarray(np.arange(LENGTH), np.float64)[None, :, None] + np.zeros_like(BIAS)
    given = dict(zip(("query", "key", "value", "bias"), (QUERY, KEY, VALUE, bias)))
    given[what] = given[what].copy()
    given[what][1, 6, 1, ...] = np.nan
    seen = np.zeros((BATCH, LENGTH, HEADS), bool)
    seen[1, 6 : 6 if what == "bias" else 10, 2:] = True
    if what == "bias":  # with four keys before it there is no place for it
        given["bias"][1, 1, 1] = np.nan
        seen[1, 1:4, 2:] = True
    out, lse = A.dynamic_mask_attention(*given.values(), width=4, return_lse=True, implementation=form)
    np.testing.assert_array_equal(np.isnan(out).all(-1), seen)
    np.testing.assert_array_equal(np.isnan(lse), seen)
    assert np.isfinite(np.asarray(out)[~seen]).all()
    assert_steps_give(out, 4, *given.values())


@every_form
def test_a_key_of_bias_minus_infinity_is_hidden_and_has_its_place(form):
    bias = BIAS.copy()
    bias[:, :2] = -np.inf
    out, lse = A.dynamic_mask_attention(*TOKENS[:3], bias, width=4, return_lse=True, implementation=form)
    assert (np.asarray(out)[:, :2] == 0).all()
    assert (np.asarray(lse)[:, :2] == -np.inf).all()
    rest = A.dynamic_mask_attention(*(x[:, 2:] for x in (*TOKENS[:3], bias)), width=4, implementation="reference")
    np.testing.assert_allclose(out[:, 2:], rest, atol=1e-12)
    assert_steps_give(out, 4, *TOKENS[:3], bias)


# --- Decoding ---------------------------------------------------------------------------------------------------------


def assert_steps_give(want, width, *tokens, cuts=(1, 2, 3, 12, LENGTH)):
    cache = A.init_dynamic_mask_cache(BATCH, KEY_HEADS, 8, width=width, value_dim=5, dtype="float64")
    outs = []
    for start, end in itertools.pairwise((0, *cuts)):
        out, cache = A.dynamic_mask_step(cache, *(x[:, start:end] for x in tokens))
        outs.append(out)
    np.testing.assert_allclose(np.concatenate(outs, 1), want, atol=1e-12)
    assert cache.position == LENGTH
    return cache


@pytest.mark.parametrize("cuts", slow_but([(1, 2, 3, 12, LENGTH)], [(1, 2, 3, 12, LENGTH), (LENGTH,)]), ids=str)
@pytest.mark.parametrize("width", slow_but([4], [1, 4, 30]))
def test_a_cache_of_as_many_keys_as_a_query_sees_is_the_parallel_form(width, cuts):
    """A key that drops out never returns."""
    want = A.dynamic_mask_attention(*TOKENS, width=width, implementation="reference")
    cache = assert_steps_give(want, width, *TOKENS, cuts=cuts)
    assert cache.key.shape == (BATCH, width, KEY_HEADS, 8)
    assert cache.value.shape == (BATCH, width, KEY_HEADS, 5)


def test_a_smaller_cache_is_not():
    """The test above can fail: one key fewer gives other outputs from the token on that has one more to see."""
    want = A.dynamic_mask_attention(*TOKENS, width=4, implementation="reference")
    got = A.dynamic_mask_attention(*TOKENS, width=3, implementation="reference")
    differs = (np.abs(np.asarray(got - want)) > 1e-6).any((0, 2, 3))
    assert not differs[:3].any()
    assert differs[3:].all()


@pytest.mark.parametrize("width", slow_but([4], [4, 20]))
def test_a_prompt_leaves_what_steps_leave(width):
    shape = (prompts.BATCH, prompts.TOKENS, prompts.KEY_HEADS)
    arrays = prompts.ARRAYS | {"key_bias": np.random.default_rng(1).integers(-2, 3, size=shape).astype(np.float64)}
    cache = A.init_dynamic_mask_cache(
        prompts.BATCH, prompts.KEY_HEADS, prompts.HEAD_DIM, width=width, value_dim=prompts.VALUE_DIM, dtype="float64"
    )

    def fill(cache, query, **prompt):
        return A.prefill_dynamic_mask_cache(cache, **prompt)

    prompts.assert_leaves_what_steps_leave(cache, fill, A.dynamic_mask_step, arrays)


# --- Devices ----------------------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("spoilt", [False, True])
def test_devices_exchange_the_sequence_for_heads(form, spoilt):
    with jax.enable_x64(False):
        arrays = parts.qkv(64, spoilt=spoilt)
        case = parts.Case(
            functools.partial(A.dynamic_mask_attention, width=7, return_lse=True, implementation=form),
            arrays | {"key_bias": parts.normal(2, 64, 2, seed=4)},
            {"all-to-all": 2},
            results=(parts.SHARED, parts.SHARED),
        )
        parts.assert_equals_one_device(case)


# --- Wrong calls ------------------------------------------------------------------------------------------------------

WRONG = {
    "width: got 0; need": {"width": 0},
    "key_bias: got float64[2,19]; need [batch, tokens, key heads] = [2,19,2]": {"key_bias": BIAS[..., 0]},
    "key_bias: got dtype int64; need a floating dtype": {"key_bias": BIAS.astype(np.int64)},
    "return_lse: got 1; need True or False": {"return_lse": 1},
}


@pytest.mark.parametrize("message", WRONG)
def test_wrong_arguments_are_named(message):
    options = {"key_bias": BIAS, "width": 3} | WRONG[message]
    with pytest.raises((ValueError, TypeError)) as error:
        A.dynamic_mask_attention(*TOKENS[:3], **options)
    assert str(error.value).startswith(message)
