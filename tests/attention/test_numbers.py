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
        if name.startswith(("linear", "dot_product", "local, causal", "local, softcap", "dilated"))
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


def _spoilt(x, hidden, number):
    """An array of tokens with the number in the hidden ones."""
    if getattr(x, "shape", ())[:2] != hidden.shape:
        return x
    return np.where(hidden.reshape(*hidden.shape, *[1] * (x.ndim - 2)), np.float32(number), x)


def _check_gradients_of_what_is_shown(loss, arrays, hidden):
    """loss: arrays -> (number, output) of what is shown. With NaN or infinity in the hidden tokens, the output and the
    gradients of the others are what they were, and those of the hidden are finite."""
    run = jax.jit(jax.grad(loss, has_aux=True, allow_int=True))
    want, expected = run(arrays)
    for number in (np.nan, np.inf):
        got, out = run({argument: _spoilt(x, hidden, number) for argument, x in arrays.items()})
        np.testing.assert_allclose(out, expected, rtol=0, atol=2e-5 * np.abs(expected).max())
        for x, y in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
            if x.dtype == jax.dtypes.float0:
                continue
            assert np.all(np.isfinite(x))
            if x.shape[:2] == hidden.shape:
                x, y = x[~hidden], y[~hidden]
            np.testing.assert_allclose(x, y, rtol=0, atol=5e-5 * max(1, np.abs(y).max()))


@pytest.mark.parametrize("form", slow_but(["xla"], FORMS))
@pytest.mark.parametrize("case", slow_but(_KINDS, HIDDEN))
def test_what_is_not_finite_reaches_nobody_who_does_not_see_it(case, form):
    """NaN and infinities in every array of hidden tokens: outputs and gradients of the others are what they were."""
    name, which, options = HIDDEN[case]
    mechanism, hidden = MECHANISMS[name], OTHERS[which]

    def loss(arrays):
        shown = jnp.where(hidden[:, :, None, None], 0, mechanism(arrays, form, **options))
        return jnp.sum(shown**2), shown

    _check_gradients_of_what_is_shown(loss, mechanism.inputs(), hidden)


@pytest.mark.parametrize("case", slow_but({"dot_product, causal, later"}, HIDDEN))
def test_nor_does_it_by_a_second_derivative(case):
    name, which, options = HIDDEN[case]
    mechanism, hidden = MECHANISMS[name], OTHERS[which]
    arrays, random = mechanism.inputs(), np.random.default_rng(0)
    floating = [argument for argument, x in arrays.items() if getattr(x, "dtype", None) == np.float32]
    tangents = {argument: random.normal(size=arrays[argument].shape).astype(np.float32) for argument in floating}

    def loss(arrays):
        def attend(along):
            return mechanism(arrays | along, "xla", **options)

        along = {argument: arrays[argument] for argument in floating}
        shown = jnp.where(hidden[:, :, None, None], 0, jax.jvp(attend, (along,), (tangents,))[1])
        return jnp.sum(shown**2), shown

    _check_gradients_of_what_is_shown(loss, arrays, hidden)


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


# Of attention by softmax and InLine: their rows, and what holds a NaN. Another key is another cluster in routing.
_SEEN = [
    (name, argument)
    for name, mechanism in MECHANISMS.items()
    if not name.startswith("linear")
    for argument in ("key", "value", "agents")
    if argument in mechanism.inputs() and (argument != "key" or "routing" not in name)
]
_QUICK = {("local, causal", "key"), ("agent", "value"), ("agent, causal", "agents"), ("local-linear, window", "key")}


@pytest.mark.parametrize("form", slow_but(["xla"], FORMS))
@pytest.mark.parametrize("row", slow_but(_QUICK, _SEEN), ids=", ".join)
def test_what_sees_nan_is_nan_however_small_its_weight(row, form):
    name, argument = row
    arrays = {key: jnp.asarray(x) if key != "state" else x for key, x in MECHANISMS[name].inputs().items()}
    arrays |= {key: 30 * arrays[key] for key in ("query", "key")}
    run = jax.jit(lambda arrays: MECHANISMS[name](arrays, form))
    whole = np.asarray(run(arrays))
    spoilt = np.asarray(run(arrays | {argument: arrays[argument].at[0, 2].set(jnp.nan)}))
    assert np.isnan(spoilt[0]).any()
    same = np.isclose(spoilt, whole, rtol=1e-3, atol=1e-3 * np.abs(whole).max())
    assert (same | np.isnan(spoilt)).all()
    assert same[1:].all()


REGRESSED = {
    "dot_product": lambda q, k, v, form: A.dot_product_attention(q, k, v, is_causal=True, implementation=form),
    "local-linear": lambda q, k, v, form: A.local_linear_attention(q, k, v, ridge=2.0, implementation=form),
    "local-linear, window": lambda q, k, v, form: A.local_linear_attention(
        q, k, v, ridge=2.0, window=4, implementation=form
    ),
    "parallax": lambda q, k, v, form: A.parallax_attention(q, q, k, v, implementation=form),
    "linear": lambda q, k, v, form: A.linear_attention(q, k, v, implementation=form),
    "causal agent": lambda q, k, v, form: A.causal_agent_attention(q, k, v, jnp.ones((3, 1, 4)), implementation=form),
}


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("name", slow_but({"local-linear"}, REGRESSED))
def test_gradients_of_what_sees_no_nan_are_finite(name, form):
    """The loss takes the tokens before the NaN alone; later ones, which are NaN, see the same keys."""
    q, k, v = (jnp.asarray(np.random.default_rng(0).normal(size=(1, 6, 1, 4)), jnp.float32) for _ in range(3))
    k = k.at[0, 2].set(jnp.nan)

    def loss(q, k, v):
        return jnp.sum(jnp.where(jnp.arange(6)[None, :, None, None] < 2, REGRESSED[name](q, k, v, form), 0) ** 2)

    gradients = jax.grad(loss, argnums=(0, 1, 2))(q, k, v)
    assert all(np.isfinite(x).all() for x in gradients)
    assert all(np.any(x[:, :2]) and not np.any(x[:, 2:]) for x in gradients)


@pytest.mark.parametrize("form", FORMS)
def test_nan_of_one_head_of_inline_attention_is_no_gradient_of_another(form):
    q, k, v = (jnp.asarray(np.random.default_rng(0).normal(size=(1, 6, 2, 4)), jnp.float32) for _ in range(3))
    q, k, v = (x.at[0, 2, 0].set(jnp.nan) for x in (q, k, v))

    def loss(*arrays):
        return jnp.sum(A.inline_attention(*arrays, implementation=form)[:, :, 1] ** 2)

    assert all(np.isfinite(x).all() for x in jax.grad(loss, argnums=(0, 1, 2))(q, k, v))


@pytest.mark.parametrize("per_channel", [False, True])
def test_a_decay_of_minus_infinity_drops_nan_of_the_state(per_channel):
    q, k, v, decay = (np.random.default_rng(0).normal(size=(1, 6, 1, 4)).astype(np.float32) for _ in range(4))
    k[0, 1], decay = np.nan, -np.abs(decay)
    decay[0, 3] = -np.inf
    decay = decay if per_channel else decay[..., 0]
    whole = A.linear_attention(q, k, v, log_decay=decay)
    state, outs = A.init_linear_cache(1, 1, 4), []
    for t in range(6):
        out, state = A.linear_step(state, *(x[:, t : t + 1] for x in (q, k, v)), log_decay=decay[:, t : t + 1])
        outs.append(out[0, 0])
    np.testing.assert_allclose(outs, whole[0], rtol=1e-5, atol=1e-6)
    assert np.isnan(whole[0, :, 0, 0]).tolist() == [False, True, True, False, False, False]


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
@pytest.mark.long
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
