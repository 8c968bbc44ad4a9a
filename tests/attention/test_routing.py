"""Routing attention: the published vectors, its two memberships, its centroids, and step-by-step decoding."""

from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from marks import slow_but

from attnlab import (
    RoutingState,
    dot_product_attention,
    fit_routing,
    init_routing,
    init_routing_cache,
    routing_attention,
    routing_step,
    update_routing,
)

VECTORS = sorted((Path(__file__).parents[1] / "vectors" / "routing").glob("*.npz"))
FORMS = ("reference", "xla")
every_form = pytest.mark.parametrize("form", slow_but(["xla"], FORMS))
OPTIONS = ("window", "is_causal", "membership", "normalize", "share_qk", "implementation")
route = jax.jit(routing_attention, static_argnames=OPTIONS)


def arrays(length=24, heads=2, key_heads=2, clusters=3, batch=2, seed=0, shared=False):
    rng = np.random.default_rng(seed)
    query = jnp.asarray(rng.normal(size=(batch, length, heads, 8)), jnp.float32)
    key = query if shared else jnp.asarray(rng.normal(size=(batch, length, key_heads, 8)), jnp.float32)
    value = jnp.asarray(rng.normal(size=(batch, length, heads if shared else key_heads, 6)), jnp.float32)
    return query, key, value, init_routing(jax.random.key(seed), heads, clusters, 8)


@pytest.mark.parametrize("path", VECTORS, ids=lambda path: path.stem)
@every_form
@pytest.mark.parametrize(("wide", "tolerance"), [(True, 1e-9), pytest.param(False, 2e-5, marks=pytest.mark.slow)])
def test_vectors(path, form, wide, tolerance):
    with jax.enable_x64(wide):
        data = np.load(path)
        dtype = jnp.float64 if wide else jnp.float32
        query, key, value = (jnp.asarray(data[name].swapaxes(1, 2), dtype) for name in "qkv")
        means = jnp.asarray(data["means"], dtype)
        state = RoutingState(means, jnp.ones(means.shape[:2]), means)
        options = {"window": int(data["window_size"]), "is_causal": bool(data["causal"])}
        out, aux = route(
            query,
            key,
            value,
            state,
            membership="global",
            share_qk=bool(data["shared_qk"]),
            implementation=form,
            **options,
        )
        np.testing.assert_allclose(out.swapaxes(1, 2), data["out"], atol=tolerance)
        np.testing.assert_array_equal(aux.taken.swapaxes(1, 2), data["write_count"])
        nearest = aux.query_cluster if data["shared_qk"] else jnp.concatenate([aux.query_cluster, aux.key_cluster], 1)
        np.testing.assert_array_equal(nearest.swapaxes(1, 2), data["hard_assignment"])
        np.testing.assert_allclose(aux.loss * data["commitment"], data["aux_loss"], rtol=1e-9 if wide else 1e-5)
        np.testing.assert_array_equal(aux.statistics.counts, data["cluster_counts"])
        updated = update_routing(state, aux.statistics, decay=float(data["ema_decay"]), rule="unit")
        np.testing.assert_allclose(updated.centroids, data["updated_means"], atol=tolerance)


def layer_norm(x):
    centred = x - x.mean(-1, keepdims=True)
    return centred / np.sqrt((centred**2).mean(-1, keepdims=True) + 1e-6)


@every_form
@pytest.mark.parametrize("is_causal", [False, True])
def test_layer_normalisation_is_googles_formula(form, is_causal):
    """By loops in numpy, shared queries and keys: rank and position order are one."""
    query, key, value, state = arrays(shared=True)
    window, clusters = 7, 3
    out, aux = route(
        query,
        key,
        value,
        state,
        window=window,
        is_causal=is_causal,
        membership="global",
        normalize="layer",
        share_qk=True,
        implementation=form,
    )
    x = layer_norm(np.asarray(query, np.float64) * 8**-0.5)
    mu, v = np.asarray(state.centroids, np.float64), np.asarray(value, np.float64)
    want, count, loss = np.zeros(v.shape), np.zeros(v.shape[:3]), 0.0
    for b, n in np.ndindex(2, 2):
        similarity = x[b, :, n] @ mu[n].T
        loss += 2 * ((x[b, :, n] - mu[n, similarity.argmax(-1)]) ** 2).sum()
        for c in range(clusters):
            taken = np.sort(np.argsort(-similarity[:, c])[:window])
            logits = x[b, taken, n] @ x[b, taken, n].T
            logits = np.where(np.tri(window, dtype=bool) | (not is_causal), logits, -np.inf)
            weights = np.exp(logits - logits.max(-1, keepdims=True))
            want[b, taken, n] += weights / weights.sum(-1, keepdims=True) @ v[b, taken, n]
            count[b, taken, n] += 1
    np.testing.assert_allclose(out, want / (count + 1e-2)[..., None], atol=2e-5)
    np.testing.assert_array_equal(aux.taken, count)
    np.testing.assert_allclose(aux.loss, loss / x.size, rtol=1e-5)


def strict_by_loops(query, key, value, state, *, window, is_causal, normalize, share_qk):
    """One query at a time, from the definition."""
    query, key, value = (np.asarray(x, np.float64) for x in (query, key, value))
    group = query.shape[2] // key.shape[2]
    key, value = np.repeat(key, group, 2), np.repeat(value, group, 2)
    if normalize == "layer":
        logits_q = route_q = layer_norm(query * query.shape[-1] ** -0.5)
        logits_k = route_k = route_q if share_qk else layer_norm(key)
        scale = 1.0
    else:
        route_q = query / np.linalg.norm(query, axis=-1, keepdims=True)
        route_k = route_q if share_qk else key / np.linalg.norm(key, axis=-1, keepdims=True)
        logits_q, logits_k = query, route_q if share_qk else key
        scale = query.shape[-1] ** -0.5
    mu = np.asarray(state.centroids, np.float64)
    out = np.zeros((*query.shape[:3], value.shape[-1]))
    for b, t, n in np.ndindex(*query.shape[:3]):
        cluster = (route_q[b, t, n] @ mu[n].T).argmax()
        members = np.flatnonzero((route_k[b, :, n] @ mu[n].T).argmax(-1) == cluster)
        now = np.sum(members <= t)
        ahead = 0 if is_causal else window // 2
        seen = members[max(now - (window - ahead), 0) : now + ahead]
        if share_qk and normalize == "unit" and len(seen) > 1:
            seen = seen[seen != t]
        if len(seen):
            logits = scale * logits_k[b, seen, n] @ logits_q[b, t, n]
            weights = np.exp(logits - logits.max())
            out[b, t, n] = weights / weights.sum() @ value[b, seen, n]
    return out


SHAPES = st.fixed_dictionaries(
    {
        "length": st.sampled_from([1, 7, 45]),
        "clusters": st.sampled_from([1, 3]),
        "window": st.sampled_from([1, 4, 5, 20]),
        "is_causal": st.booleans(),
        "normalize": st.sampled_from(["unit", "layer"]),
        "share_qk": st.booleans(),
        "key_heads": st.sampled_from([1, 2]),
        "seed": st.integers(0, 99),
    }
)


MANY = {"length": 45, "clusters": 3, "window": 4, "is_causal": True, "normalize": "unit", "share_qk": True}
MANY |= {"key_heads": 2, "seed": 0}


@settings(deadline=None, max_examples=2)
@example(shape=MANY)
@given(shape=SHAPES)
@pytest.mark.slow
def test_strict_is_its_definition(shape):
    query, key, value, state = arrays(
        shape["length"],
        key_heads=shape["key_heads"],
        clusters=shape["clusters"],
        shared=shape["share_qk"],
        seed=shape["seed"],
        batch=1,
    )
    options = {name: shape[name] for name in ("is_causal", "normalize", "share_qk")}
    options["window"] = min(shape["window"], shape["length"])
    want = strict_by_loops(query, key, value, state, **options)
    for form in FORMS:
        out, aux = route(query, key, value, state, implementation=form, **options)
        np.testing.assert_allclose(out, want, atol=2e-5, err_msg=form)
        np.testing.assert_array_equal(aux.taken, 1)


@settings(deadline=None, max_examples=2)
@example(shape=MANY | {"share_qk": False}, membership="strict", padded=True)
@given(shape=SHAPES, membership=st.sampled_from(["strict", "global"]), padded=st.booleans())
@pytest.mark.slow
def test_forms_agree_in_values_gradients_and_tangents(shape, membership, padded):
    query, key, value, state = arrays(
        shape["length"], key_heads=shape["key_heads"], clusters=shape["clusters"], shared=shape["share_qk"]
    )
    mask = jnp.arange(shape["length"]) < jnp.array([[shape["length"]], [max(1, shape["length"] - 3)]])
    options = {name: shape[name] for name in ("is_causal", "normalize", "share_qk")}
    options |= {"window": min(shape["window"], shape["length"]), "membership": membership}

    def derivatives(form):
        def loss(query, key, value):
            if shape["share_qk"]:
                key = query
            out, aux = routing_attention(
                query, key, value, state, key_mask=mask if padded else None, implementation=form, **options
            )
            return jnp.sum(jnp.sin(out)) + aux.loss, (out, aux)

        def run(*inputs):
            gradients, both = jax.grad(loss, (0, 1, 2), has_aux=True)(*inputs)
            return both, gradients, jax.jvp(lambda *x: loss(*x)[1][0], inputs, inputs)[1]

        return jax.jit(run)(query, key, value)

    for got, want in zip(jax.tree.leaves(derivatives("xla")), jax.tree.leaves(derivatives("reference")), strict=True):
        np.testing.assert_allclose(got, want, atol=3e-5, rtol=1e-4)


@every_form
@pytest.mark.parametrize("share_qk", [False, True])
@pytest.mark.long
def test_one_cluster_with_a_window_of_all_is_full_attention(form, share_qk):
    query, key, value, state = arrays(clusters=1, shared=share_qk)
    full = dot_product_attention(query, key, value, is_causal=True)
    options = {"window": 24, "is_causal": True, "implementation": form}
    if share_qk:  # "layer" has no rule that hides a shared token from itself
        normalized = jnp.asarray(layer_norm(np.asarray(query) * 8**-0.5))
        full = dot_product_attention(normalized, normalized, value, is_causal=True, scale=1.0)
        options |= {"normalize": "layer", "share_qk": True}
    strict, _ = route(query, key, value, state, membership="strict", **options)
    np.testing.assert_allclose(strict, full, atol=2e-5)
    everything, _ = route(query, key, value, state, membership="global", **options)
    epsilon = 1e-2 if share_qk else 1e-5
    np.testing.assert_allclose(everything * (1 + epsilon), full, atol=2e-5)


@every_form
@pytest.mark.long
def test_strict_does_not_change_before_a_perturbation_and_global_does(form):
    query, key, value, state = arrays(length=60, clusters=4)
    later = jnp.arange(60) >= 40
    changed = [jnp.where(later[None, :, None, None], 3 * x[::-1], x) for x in (query, key, value)]
    for membership in ("strict", "global"):
        options = {"window": 15, "is_causal": True, "membership": membership, "implementation": form}
        before, _ = route(query, key, value, state, **options)
        after, _ = route(*changed, state, **options)
        difference = np.max(np.abs(before[:, :40] - after[:, :40]))
        assert (difference < 1e-6) == (membership == "strict"), difference
        assert np.any(before[:, 40:] != after[:, 40:])


@pytest.mark.long
def test_global_leaks_though_its_gradient_does_not():
    query, key, value, state = arrays(length=60, clusters=4)

    def early(value, key):
        out, _ = routing_attention(query, key, value, state, window=15, is_causal=True, membership="global")
        return jnp.sum(out[:, :40] ** 2)

    by_value, by_key = jax.jit(jax.grad(early, (0, 1)))(value, key)
    assert np.all(by_value[:, 40:] == 0)
    assert np.all(by_key[:, 40:] == 0)
    assert early(value, key) != early(value, key.at[:, 40:].multiply(-2))


@pytest.mark.parametrize(
    ("normalize", "share_qk"),
    [
        pytest.param("unit", False, marks=pytest.mark.slow),
        ("unit", True),
        pytest.param("layer", True, marks=pytest.mark.slow),
    ],
)
@pytest.mark.long
def test_decoding_equals_the_strict_form(normalize, share_qk):
    query, key, value, state = arrays(length=30, heads=4, key_heads=2, clusters=3, shared=share_qk)
    options = {"normalize": normalize, "share_qk": share_qk}
    want, _ = route(query, key, value, state, window=5, is_causal=True, **options)

    @jax.jit
    def decode(query, key, value):
        def step(cache, token):
            out, cache = routing_step(cache, *(x[:, None] for x in token), state, **options)
            return cache, out[:, 0]

        cache = init_routing_cache(2, 4, 3, 8, window=5, value_dim=6)
        return jax.lax.scan(step, cache, tuple(jnp.swapaxes(x, 0, 1) for x in (query, key, value)))[1]

    np.testing.assert_allclose(jnp.swapaxes(decode(query, key, value), 0, 1), want, atol=2e-5)


@every_form
def test_an_unrouted_token_has_no_output_and_no_gradient(form):
    query, key, value, state = arrays(clusters=2)

    def run(query, key, value):
        out, aux = routing_attention(
            query, key, value, state, window=4, membership="global", normalize="layer", implementation=form
        )
        return jnp.sum(out**3), (out, aux.taken)

    gradient, (out, taken) = jax.jit(jax.grad(run, has_aux=True))(query, key, value)
    unrouted = np.asarray(taken) == 0
    assert 0.2 < unrouted.mean() < 0.9
    assert np.all(np.asarray(out)[unrouted] == 0)
    assert np.all(np.asarray(gradient)[unrouted] == 0)
    np.testing.assert_array_equal(jnp.sum(taken, axis=1), 2 * 4)  # clusters x window, in every head


@every_form
@pytest.mark.parametrize("membership", ["strict", "global"])
@pytest.mark.long
def test_the_order_of_centroids_does_not_matter(form, membership):
    query, key, value, state = arrays(clusters=5)
    options = {"window": 6, "membership": membership, "implementation": form}
    out, aux = route(query, key, value, state, **options)
    order = np.array([3, 1, 4, 0, 2])
    other, other_aux = route(query, key, value, jax.tree.map(lambda x: x[:, order], state), **options)
    np.testing.assert_allclose(out, other, atol=1e-5)
    np.testing.assert_allclose(aux.statistics.sums[:, order], other_aux.statistics.sums, atol=1e-5)


@every_form
def test_global_membership_ignores_the_length_of_a_centroid(form):
    query, key, value, state = arrays(clusters=3)
    longer = state._replace(centroids=state.centroids * jnp.array([1.0, 7.0, 0.1])[:, None])
    options = {"window": 6, "membership": "global", "implementation": form}
    np.testing.assert_allclose(
        route(query, key, value, state, **options)[0], route(query, key, value, longer, **options)[0], atol=1e-6
    )


@every_form
@pytest.mark.parametrize("membership", ["strict", "global"])
@pytest.mark.long
def test_padding_is_never_selected_and_never_counted(form, membership):
    query, key, value, state = arrays(length=30)
    mask = jnp.arange(30) < jnp.array([[30], [21]])
    options = {"window": 9, "is_causal": True, "membership": membership, "implementation": form}
    out, aux = route(query, key, value, state, key_mask=mask, **options)
    apart = [
        route(query[b : b + 1, :n], key[b : b + 1, :n], value[b : b + 1, :n], state, **options)
        for b, n in ((0, 30), (1, 21))
    ]
    np.testing.assert_allclose(out[0], apart[0][0][0], atol=1e-5)
    np.testing.assert_allclose(out[1, :21], apart[1][0][0], atol=1e-5)
    assert np.all(out[1, 21:] == 0)
    assert np.all(aux.taken[1, 21:] == 0)
    total = jax.tree.map(jnp.add, apart[0][1].statistics, apart[1][1].statistics)
    for got, want in zip(aux.statistics, total):
        np.testing.assert_allclose(got, want, atol=1e-5)


@pytest.mark.slow
def test_statistics_of_microbatches_add_up_also_over_devices():
    query, key, value, state = arrays(batch=4)
    whole = route(query, key, value, state, window=6)[1].statistics
    halves = [route(query[s], key[s], value[s], state, window=6)[1].statistics for s in (slice(2), slice(2, 4))]
    added = jax.tree.map(jnp.add, *halves)
    want = update_routing(state, whole, decay=0.9)
    stacked = jax.tree.map(lambda *leaves: jnp.stack(leaves), *halves)
    mapped = jax.vmap(lambda half: update_routing(state, half, decay=0.9, axis_name="devices"), axis_name="devices")
    for got in (update_routing(state, added, decay=0.9), jax.tree.map(lambda x: x[1], mapped(stacked))):
        for ours, theirs in zip(got, want):
            np.testing.assert_allclose(ours, theirs, atol=1e-6)


@pytest.mark.long
def test_the_average_is_googles_formula():
    query, key, value, state = arrays(clusters=3, shared=True)
    state = state._replace(counts=jnp.full((2, 3), 5.0), sums=5.0 * state.centroids)
    statistics = route(query, key, value, state, window=6, normalize="layer", share_qk=True)[1].statistics
    updated = update_routing(state, statistics, decay=0.9)
    x = layer_norm(np.asarray(query, np.float64) * 8**-0.5)
    for n in range(2):
        cluster = (x[:, :, n] @ np.asarray(state.centroids[n]).T).argmax(-1)
        count = 0.9 * 5 + 0.1 * np.array([(cluster == c).sum() for c in range(3)])
        total = 0.9 * 5 * np.asarray(state.centroids[n]) + 0.1 * np.array(
            [x[:, :, n][cluster == c].sum(0) for c in range(3)]
        )
        smoothed = (count + 1e-5) / (count.sum() + 3e-5) * count.sum()
        np.testing.assert_allclose(updated.counts[n], count, rtol=1e-6)
        np.testing.assert_allclose(updated.centroids[n], total / smoothed[:, None], rtol=1e-5, atol=1e-6)


@pytest.mark.long
def test_an_empty_cluster_keeps_its_centroid_under_unit_and_stays_finite_under_ema():
    query, key, value, state = arrays(clusters=3)
    # The second centroid points away from every token.
    query, key = jnp.abs(query), jnp.abs(key)
    far = state._replace(centroids=jnp.abs(state.centroids).at[:, 1].multiply(-1))
    statistics = route(query, key, value, far, window=6)[1].statistics
    assert np.any(statistics.counts == 0)
    unit = update_routing(far, statistics, rule="unit", decay=0.5)
    empty = np.asarray(statistics.counts) == 0
    np.testing.assert_array_equal(unit.centroids[empty], far.centroids[empty])
    state = far
    for _ in range(200):
        state = update_routing(state, statistics, decay=0.5)
    assert np.all(np.isfinite(state.centroids))


@pytest.mark.slow
def test_fitting_finds_separated_clusters_and_one_update_hardly_moves_them():
    rng = np.random.default_rng(0)
    centres = np.linalg.qr(rng.normal(size=(8, 8)))[0][:4]
    labels = rng.integers(0, 4, size=(3, 50))
    tokens = jnp.asarray(centres[labels] + 0.05 * rng.normal(size=(3, 50, 8)), jnp.float32)[:, :, None]
    state = init_routing(jax.random.key(0), 1, 4, 8)
    _, aux = route(tokens, tokens, tokens, state, window=10)
    fitted = fit_routing(tokens, state)
    similarity = np.abs(np.asarray(fitted.centroids[0]) @ centres.T)
    np.testing.assert_allclose(similarity.max(axis=1), 1, atol=0.01)
    assert len(set(similarity.argmax(axis=1))) == 4
    fitted_loss = route(tokens, tokens, tokens, fitted, window=10)[1].loss
    assert fitted_loss < 0.1 * aux.loss
    statistics = route(tokens, tokens, tokens, fitted, window=10, share_qk=True)[1].statistics
    for rule in ("ema", "unit"):
        moved = update_routing(fitted, statistics, rule=rule)
        np.testing.assert_allclose(moved.centroids, fitted.centroids, atol=1e-3)


def test_the_loss_moves_tokens_and_not_centroids():
    query, key, value, state = arrays()

    def loss(query, centroids):
        return routing_attention(query, key, value, state._replace(centroids=centroids), window=6)[1].loss

    by_query, by_centroids = jax.jit(jax.grad(loss, (0, 1)))(query, state.centroids)
    assert np.any(by_query != 0)
    assert np.all(by_centroids == 0)


@pytest.mark.slow  # the fast tests hold it to n^1.5 in test_contract.py
@pytest.mark.parametrize("membership", ["strict", "global"])
def test_memory_is_far_from_length_squared(membership):
    """Temporary memory of the gradient: four times the length takes at most n^1.5's eight times, with some slack."""

    def temporary(length):
        clusters = window = int(length**0.5)
        shape = jax.ShapeDtypeStruct((1, length, 1, 16), jnp.float32)
        state = jax.eval_shape(lambda: init_routing(jax.random.key(0), 1, clusters, 16))

        def loss(query, key, value, state):
            out, _ = routing_attention(query, key, value, state, window=window, is_causal=True, membership=membership)
            return jnp.sum(out**2)

        compiled = jax.jit(jax.grad(loss, (0, 1, 2))).lower(shape, shape, shape, state).compile()
        return compiled.memory_analysis().temp_size_in_bytes

    small, large = temporary(1024), temporary(4096)
    assert large < 9 * small
    assert large < 4096**2 * 4 / 2


EDGES = {
    "identical tokens": lambda x: jnp.broadcast_to(x[:, :1], x.shape),
    "zeros": jnp.zeros_like,
    "huge": lambda x: 1e4 * x,
}


@pytest.mark.parametrize("edge", EDGES)
@pytest.mark.parametrize("membership", ["strict", "global"])
@pytest.mark.parametrize("normalize", slow_but(["unit"], ["unit", "layer"]))
def test_values_and_gradients_are_finite_at_the_edges(edge, membership, normalize):
    query, key, value, state = arrays()

    @jax.jit
    def run(query, key, value):
        def loss(query, key, value):
            out, aux = routing_attention(
                query, key, value, state, window=6, is_causal=True, membership=membership, normalize=normalize
            )
            return jnp.sum(out) + aux.loss, update_routing(state, aux.statistics)

        return jax.value_and_grad(loss, (0, 1, 2), has_aux=True)(query, key, value)

    for leaf in jax.tree.leaves(run(EDGES[edge](query), EDGES[edge](key), value)):
        assert np.all(np.isfinite(leaf))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"window": 0}, "window: got 0"),
        ({"window": 25}, "window: got 25; need 1 to the length, 24"),
        ({"window": 2.0}, "window: got 2.0"),
        ({"membership": "soft"}, "membership: got 'soft'"),
        ({"normalize": "l2"}, "normalize: got 'l2'"),
        ({"key_mask": jnp.ones((2, 23), bool)}, "key_mask"),
        ({"key_mask": jnp.ones((2, 24))}, "key_mask: got dtype float32"),
        ({"share_qk": True, "key_heads": 1}, "key: got"),
        ({"state": None}, "state: got NoneType"),
        ({"state": init_routing(jax.random.key(0), 3, 2, 8)}, "state.centroids"),
    ],
)
def test_bad_arguments_are_named(change, message):
    query, key, value, state = arrays(key_heads=change.pop("key_heads", 2))
    state = change.pop("state", state)
    with pytest.raises((ValueError, TypeError), match=message):
        routing_attention(query, key, value, state, **{"window": 6, **change})
