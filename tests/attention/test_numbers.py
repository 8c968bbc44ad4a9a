"""Numbers at their ends: NaN and infinities where nobody looks, huge logits that are equal, counts beyond int32."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from marks import slow_but

import attnlab as A
from attnlab.attention._shared.clusters import strict_ranges
from attnlab.catalog import MECHANISMS

FORMS = ("reference", "xla")
LENGTH = 13
IDS = np.repeat(np.arange(3, dtype=np.int32), (5, 3, 5))[None].repeat(2, 0)
REAL = np.arange(LENGTH)[None].repeat(2, 0) < 9
OTHERS = {"own": IDS == 1, "later": np.arange(LENGTH)[None].repeat(2, 0) >= 9, "masked": ~REAL}


# A mechanism, which tokens nobody else sees, and by what.
HIDDEN = {
    **{f"{name}, later": (name, "later", {}) for name, row in MECHANISMS.items() if row.is_causal and not row.grid},
    **{
        f"{name}, own segment": (name, "own", {"segment_ids": IDS})
        for name in MECHANISMS
        if name.startswith(("linear", "dot_product", "local, causal", "dilated"))
    },
    "dot_product, mask": ("dot_product", "masked", {"mask": REAL[:, None, None]}),
    "dot_product, bias": (
        "dot_product",
        "masked",
        {"bias": np.where(REAL[:, None, None], np.float32(0), np.float32(-np.inf))},
    ),
    "routing, strict, key mask": ("routing, strict", "masked", {"key_mask": REAL}),
    "routing, global, key mask": ("routing, global", "masked", {"key_mask": REAL}),
}
_KINDS = {"dot_product, causal, later", "local, causal, own segment", "linear, gated delta rule, own segment"}


@pytest.mark.parametrize("form", slow_but(["xla"], FORMS))
@pytest.mark.parametrize("case", slow_but(_KINDS, HIDDEN))
def test_what_is_not_finite_reaches_nobody_who_does_not_see_it(case, form):
    """NaN and infinities in every array of hidden tokens: outputs and gradients of the others are what they were."""
    name, which, options = HIDDEN[case]
    mechanism, hidden = MECHANISMS[name], OTHERS[which]
    arrays = mechanism.inputs()

    def spoilt(x, number):
        if getattr(x, "shape", ())[:2] != hidden.shape:
            return x
        return np.where(hidden.reshape(*hidden.shape, *[1] * (x.ndim - 2)), np.float32(number), x)

    def loss(arrays):
        out = mechanism(arrays, form, **options)
        shown = jnp.where(hidden[:, :, None, None], 0, out)
        return jnp.sum(shown**2), shown

    run = jax.jit(jax.grad(loss, has_aux=True))
    want, expected = run(arrays)
    for number in (np.nan, np.inf):
        got, out = run({argument: spoilt(x, number) for argument, x in arrays.items()})
        np.testing.assert_allclose(out, expected, rtol=0, atol=2e-5 * np.abs(expected).max())
        for x, y in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
            assert np.all(np.isfinite(x))
            if x.shape[:2] == hidden.shape:
                x, y = x[~hidden], y[~hidden]
            np.testing.assert_allclose(x, y, rtol=0, atol=5e-5 * max(1, np.abs(y).max()))


@pytest.mark.parametrize("form", FORMS)
def test_what_sees_nan_is_nan(form):
    query = np.random.default_rng(0).normal(size=(1, 8, 1, 4)).astype(np.float32)
    spoilt = query.copy()
    spoilt[:, 3, :, 1] = np.nan
    out = A.local_attention(query, query, spoilt, window=2, is_causal=True, implementation=form)
    assert np.isnan(out).any((0, 2, 3)).tolist() == [False] * 3 + [True] * 2 + [False] * 3
    out, state = A.linear_attention(query, spoilt, query, return_state=True, implementation=form)
    assert np.isnan(out).all((0, 2, 3)).tolist() == [False] * 3 + [True] * 5
    assert np.isnan(state.kv).all()


@pytest.mark.parametrize("number", [np.nan, np.inf])
def test_a_step_sees_no_nan_of_a_token_before_its_window(number):
    query, key, value = (np.random.default_rng(0).normal(size=(1, 12, 1, 4)).astype(np.float32) for _ in range(3))
    key[:, 5], value[:, 2] = number, number
    expected = A.local_attention(query, key, value, window=4, stride=4, is_causal=True, edge="clip")
    step = jax.jit(functools.partial(A.local_step, window=4, stride=4))
    cache, outs = A.init_local_cache(1, 1, 4, window=4), []
    for t in range(12):
        out, cache = step(cache, *(x[:, t : t + 1] for x in (query, key, value)))
        outs.append(out[0, 0, 0])
    np.testing.assert_allclose(outs, expected[0, :, 0], rtol=0, atol=2e-6)
    assert np.isfinite(outs).all(1).any()
    assert not np.isfinite(outs).all()


SOFTMAX = {
    "dot_product": lambda x, v, form: A.dot_product_attention(x, x, v, implementation=form),
    "dot_product, causal": lambda x, v, form: A.dot_product_attention(x, x, v, is_causal=True, implementation=form),
    "local": lambda x, v, form: A.local_attention(x, x, v, window=9, implementation=form),
    "dilated": lambda x, v, form: A.dilated_attention(x, x, v, window=3, dilation=3, implementation=form),
    "axial": lambda x, v, form: A.axial_attention(x, x, v, axis=0, implementation=form),
    "agent": lambda x, v, form: A.agent_attention(x, x, v, x[:, :3], implementation=form),
    "causal agent": lambda x, v, form: A.causal_agent_attention(x, x, v, x[:, :3], implementation=form),
    "routing": lambda x, v, form: A.routing_attention(x, x, v, _ones(x), window=5, implementation=form)[0],
    "routing, global": lambda x, v, form: A.routing_attention(
        x, x, v, _ones(x), window=40, membership="global", implementation=form
    )[0],
}


def _ones(x):
    ones = jnp.ones((x.shape[2], 1, x.shape[3]), jnp.float32)
    return A.RoutingState(ones, ones[..., 0], ones)


_HUGE = (
    (133120.0, jnp.bfloat16, 96),
    (6e4, jnp.float16, 8),
    (1e5, jnp.float32, 8),
    (3e4, jnp.float32, 10),
    (1e6, jnp.float32, 1),
)


@pytest.mark.parametrize("form", slow_but(["xla"], FORMS))
@pytest.mark.parametrize("name", slow_but({"dot_product, causal"}, SOFTMAX))
def test_identical_tokens_share_their_weight_however_large_they_are(name, form):
    """The mean of equal values is the value; XLA may contract scale * (q . k) - max into one rounding, and did."""
    for value, dtype, width in _HUGE:
        x, ones = jnp.full((1, 40, 1, width), value, dtype), jnp.ones((1, 40, 1, 4), dtype)

        def loss(x, ones, name=name):
            out = SOFTMAX[name](x, ones, form).astype(jnp.float32)
            return jnp.sum(out), out

        gradient, out = jax.jit(jax.grad(loss, has_aux=True))(x, ones)
        np.testing.assert_allclose(out, 1, rtol=0.01)
        assert np.all(np.isfinite(np.asarray(gradient, np.float32)))


@pytest.mark.slow
def test_clusters_times_length_may_pass_int32():
    length, clusters = 2**20, 3000
    cluster = np.random.default_rng(0).integers(0, clusters, length).astype(np.int32)
    ranges = jax.jit(lambda c: strict_ranges(c, c, None, num_clusters=clusters, window=16, is_causal=True))(cluster)
    assert np.all(ranges.first <= ranges.rank_k)
    assert np.all(ranges.rank_k == ranges.end - 1)
