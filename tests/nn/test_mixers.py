"""Mixers: one table over mechanisms; decode equals the parallel form, costs are what is done and kept."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from marks import slow_but
from mixers import DECODING, MIXERS, Mixer

from attnlab import attention, nn
from attnlab.attention import masks
from attnlab.nn.mixers.base import check_weights

FEATURES, LENGTH, BATCH = 16, 13, 2
# Rows that share most of their code with another one.
VARIANTS = {
    *("grouped", "local_stride", "dilated_stride", "taylor", "retention", "gated", "delta", "kda", "delta_product"),
    *("agent_grouped", "routing_layer", "local_linear_window", "parallax_window", "memory_linear", "path", "pointwise"),
    *("softmax_sinks", "sum", "checkpoints", "block_hybrid", "affine_scaled", "regions"),
}
# Rows whose projections and mechanism are in other ones, with more to them.
PARTS = {"softmax", "local", "linear", "gla"}
GRIDS = [name for name, mixer in MIXERS.items() if mixer.is_grid]


@functools.cache
def causal(name):
    """A causal mixer, its parameters, an input, and what it gives for all of it at once."""
    mixer = MIXERS[name](FEATURES)
    parameters = nn.initialize(mixer, jax.random.key(0))
    x = jax.random.normal(jax.random.key(1), (BATCH, LENGTH, FEATURES))
    call = jax.jit(lambda parameters, x: nn.bind(mixer, parameters)(x))
    return mixer, parameters, x, call


@pytest.mark.parametrize("name", slow_but(set(DECODING) - VARIANTS - PARTS, DECODING))
def test_decoding_step_by_step_equals_the_call(name):
    mixer, parameters, x, call = causal(name)

    @jax.jit
    def decode(parameters, x):
        bound = nn.bind(mixer, parameters)

        def step(cache, token):
            y, cache = bound.step(cache, token[:, None])
            return cache, y[:, 0]

        _, y = jax.lax.scan(step, bound.init_cache(BATCH, LENGTH), jnp.swapaxes(x, 0, 1))
        return jnp.swapaxes(y, 0, 1)

    np.testing.assert_allclose(decode(parameters, x), call(parameters, x), atol=2e-5, rtol=2e-5)


@pytest.mark.parametrize("name", slow_but(set(DECODING) - VARIANTS - PARTS, DECODING))
def test_a_later_token_changes_nothing_before_it(name):
    _, parameters, x, call = causal(name)
    changed = call(parameters, x.at[:, 7].add(3.0))
    unchanged = call(parameters, x)
    # Routing's blocks depend on all tokens, and with them how sums are rounded.
    tolerance = 1e-6 if name.startswith("routing") else 0
    np.testing.assert_allclose(changed[:, :7], unchanged[:, :7], rtol=0, atol=tolerance)
    assert np.all(np.any(changed[:, 7:8] != unchanged[:, 7:8], axis=-1))


# What is read of a memory is not linear in the values, and a sum has no values of its own.
WEIGHTED = [name for name in DECODING if not name.startswith(("memory", "sum"))]


@pytest.mark.parametrize("name", slow_but(set(WEIGHTED) - VARIANTS - PARTS - {"path_forget"}, WEIGHTED))
def test_attention_weights_are_what_the_mechanism_applies_to_the_values(name):
    mixer, parameters, x, _ = causal(name)

    @jax.jit
    def both(parameters, x):
        bound = nn.bind(mixer, parameters)
        query, key, value, *_ = bound._heads(x, jnp.arange(LENGTH)[:, None], None)
        return bound.attention_weights(x), value, bound.mix(query, key, value, x, None)

    weights, value, want = both(parameters, x)
    if getattr(mixer, "writes", 1) > 1:  # several values a token, each with shares of its own
        assert np.all(np.isnan(weights))
        return
    value = jnp.repeat(value, mixer.num_heads // mixer.num_key_heads, axis=2)
    np.testing.assert_allclose(jnp.einsum("BNTS,BSNV->BTNV", weights, value), want, atol=1e-5)
    assert np.all(weights[:, :, *np.triu_indices(LENGTH, 1)] == 0)


def test_a_mixer_that_is_not_linear_in_its_values_has_no_weights():
    class Bounded(nn.SoftmaxAttention):
        def mix(self, query, key, value, x, segment_ids):
            return jnp.tanh(super().mix(query, key, 3 * value, x, segment_ids))

    mixer = Bounded(FEATURES, is_causal=True)
    bound = nn.bind(mixer, nn.initialize(mixer, jax.random.key(0)))
    inputs = jax.random.normal(jax.random.key(1), (BATCH, LENGTH, FEATURES))
    weights = bound.attention_weights(inputs)
    assert np.all(np.isnan(weights))
    memory, parameters, *_ = causal("memory")
    assert np.all(np.isnan(nn.bind(memory, parameters).attention_weights(inputs)))
    with pytest.raises(ValueError, match="mixers: got Bounded, which is not linear in its values; so no weights say"):
        check_weights("Bounded", weights)


# L2ViT's, without its convolution of images.
FLOORED = Mixer(nn.LinearAttention, {"feature_map": "relu", "normalizer_floor": 0.5}, is_grid=True)
PACKED = {name: row for name, row in MIXERS.items() if name != "l2vit"} | {"floored": FLOORED}


@pytest.mark.parametrize(
    "name",
    slow_but(set(PACKED) - VARIANTS - PARTS - {"softmax, grid", "linear, grid", "floored", "path_forget"}, PACKED),
)
def test_packed_documents_give_what_each_gives_alone(name):
    """The mixers that cannot say why."""
    mixer = PACKED[name](FEATURES)
    parameters = nn.initialize(mixer, jax.random.key(0))
    x = jax.random.normal(jax.random.key(1), (BATCH, 21, FEATURES))
    ids = jnp.broadcast_to(jnp.repeat(jnp.array([3, 0, 3]), 7), (BATCH, 21))
    if mixer.segments_refusal:
        with pytest.raises(ValueError, match=f"^segment_ids: got some; .*{re.escape(mixer.segments_refusal)}$"):
            nn.bind(mixer, parameters)(x, segment_ids=ids)
        return
    packed = jax.jit(lambda x: nn.bind(mixer, parameters)(x, segment_ids=ids))(x)
    alone = jax.jit(lambda x: nn.bind(mixer, parameters)(x))(x.reshape(-1, 7, FEATURES))
    np.testing.assert_allclose(packed, alone.reshape(x.shape), atol=2e-5, rtol=2e-5)


@pytest.mark.parametrize("name", DECODING)
def test_state_size_is_what_the_cache_holds(name):
    mixer = causal(name)[0]
    cache = mixer.init_cache(1, LENGTH)
    held = sum(leaf.size for leaf in jax.tree.leaves(cache) if jnp.issubdtype(leaf.dtype, jnp.floating))
    assert mixer.state_size(LENGTH) == held
    assert tuple(mixer.state_size(length) for length in (3, LENGTH, 64)) == MIXERS[name].state_sizes


def test_every_mixer_has_a_row():
    offered = {thing for thing in vars(nn).values() if isinstance(thing, type)}
    assert {row.mixer for row in MIXERS.values()} == {
        thing for thing in offered if issubclass(thing, nn.Attention) and thing is not nn.Attention
    }


@pytest.mark.parametrize("name", MIXERS)
def test_a_mixer_states_whether_it_decodes(name):
    row = MIXERS[name]
    mixer = row(FEATURES)
    assert mixer.decodes == row.decodes == (not mixer.decoding_refusal)
    if row.decodes:
        mixer.init_cache(1, 4)
    else:
        assert mixer.state_size(LENGTH) is None
        with pytest.raises(ValueError, match=f"^{re.escape(mixer.decoding_refusal)}$"):
            mixer.init_cache(1, 4)


def test_a_mixer_without_a_cache_does_not_decode():
    class Mine(nn.Attention):
        def mix(self, query, key, value, x, segment_ids):
            return value

        def mechanism_flops(self, space):
            return 0

    mixer = Mine(FEATURES, is_causal=True)
    assert mixer.decoding_refusal == "Mine: it has no cache to decode from"
    assert mixer.state_size(4) is None


@pytest.mark.parametrize("name", MIXERS)
def test_a_mixer_for_grids_is_known_by_its_options(name):
    """Of those that are tried on grids, the ones that have no causal form with these options."""
    row = MIXERS[name]
    assert row.mixer.is_for_grids(row.options) == row.needs_grid


@pytest.mark.parametrize(
    "options",
    [
        pytest.param({"window": 5}, marks=pytest.mark.slow),
        pytest.param({"window": 4, "sinks": 2}, marks=pytest.mark.slow),
        pytest.param({"window": 3, "sinks": 6}, marks=pytest.mark.slow),
        pytest.param({"window": 6, "stride": 3, "edge": "clip"}, marks=pytest.mark.slow),
        {"window": 6, "stride": 3, "edge": "clip", "sinks": 2},
        pytest.param({"window": 4, "stride": 4, "edge": "clip", "sinks": 9}, marks=pytest.mark.slow),
    ],
)
@pytest.mark.long
def test_a_local_cache_for_few_tokens_decodes_them_as_one_for_many(options):
    mixer = nn.LocalAttention(FEATURES, is_causal=True, **options)
    bound = nn.bind(mixer, nn.initialize(mixer, jax.random.key(0)))
    x = jax.random.normal(jax.random.key(1), (1, 9, FEATURES))
    step = jax.jit(bound.step)

    def decode(length, max_length):
        cache, outputs = bound.init_cache(1, max_length), []
        for token in range(length):
            y, cache = step(cache, x[:, token : token + 1])
            outputs.append(y)
        return jnp.concatenate(outputs, axis=1)

    want = decode(9, 99)
    for length in range(1, 10):
        np.testing.assert_allclose(decode(length, length), want[:, :length], atol=1e-5)


@pytest.mark.parametrize("name", slow_but({"softmax_convolved", "gated_delta"}, DECODING))
def test_bfloat16_is_computed_in_and_given_back(name):
    mixer = MIXERS[name](FEATURES, dtype=jnp.bfloat16)
    _, parameters, x, call = causal(name)
    y = jax.jit(lambda parameters, x: nn.bind(mixer, parameters)(x))(parameters, x.astype(jnp.bfloat16))
    assert y.dtype == jnp.bfloat16
    np.testing.assert_allclose(y.astype(jnp.float32), call(parameters, x), atol=0.08, rtol=0.08)


@pytest.mark.parametrize(
    "name", slow_but(set(GRIDS) - {"softmax, grid", "linear, grid", "agent_learned", "dilated, grid"}, GRIDS)
)
def test_a_grid_keeps_its_shape(name):
    mixer = MIXERS[name](FEATURES)
    x = jax.random.normal(jax.random.key(0), (BATCH, 5, 6, FEATURES))
    y = jax.jit(lambda x: nn.bind(mixer, nn.initialize(mixer, jax.random.key(0)))(x))(x)
    assert y.shape == x.shape
    assert np.all(np.isfinite(y))


def test_l2vit_is_its_formula():
    mixer = nn.LinearAttention(
        FEATURES, is_causal=False, feature_map="relu", normalizer_floor=40.0, num_heads=2, rotary=False
    )
    x = 3 * jax.random.normal(jax.random.key(0), (1, 4, 5, FEATURES))
    parameters = nn.initialize(mixer, jax.random.key(0))
    parameters["temperature"] = jnp.array([1.5, -2.0])
    bound = nn.bind(mixer, parameters)
    query, key, value, *_ = bound._heads(x, jnp.zeros((4, 5, 2)), None)
    q, k, v = (np.asarray(heads, np.float64).reshape(20, 2, 8) for heads in (query, key, value))
    weights = np.einsum("tnh,snh->nts", np.maximum(q, 0), np.maximum(k, 0))
    total = weights.sum(-1, keepdims=True)
    assert np.any(total < 40)
    assert np.any(total > 40)
    want = np.einsum("nts,snh->tnh", weights / np.maximum(total, 40.0), v) * np.array([1.5, -2.0])[:, None]
    np.testing.assert_allclose(bound.mix(query, key, value, x, None).reshape(20, 2, 8), want, rtol=1e-4, atol=1e-4)


@pytest.mark.long
def test_inline_adds_a_convolution_of_the_values_that_depends_on_the_image():
    mixer = nn.InlineAttention(FEATURES, is_causal=False, num_heads=2)
    bound = nn.bind(mixer, nn.initialize(mixer, jax.random.key(0)))
    x = jax.random.normal(jax.random.key(1), (2, 4, 5, FEATURES))
    value = jnp.zeros((2, 4, 5, 2, 8)).at[:, 1, 2].set(1.0)
    near = np.any(bound.finish(jnp.zeros_like(value), value, x) != 0, axis=(-1, -2))
    want = np.zeros((4, 5), bool)
    want[0:3, 1:4] = True
    np.testing.assert_array_equal(near, np.stack([want, want]))
    kernels = bound.finish(jnp.zeros_like(value), value, x)
    assert np.any(kernels[0] != kernels[1])


def test_a_window_longer_than_the_axis_is_cut_to_it():
    local, softmax = (
        nn.LocalAttention(FEATURES, is_causal=False, window=99),
        nn.SoftmaxAttention(FEATURES, is_causal=False),
    )
    parameters = nn.initialize(softmax, jax.random.key(0))
    x = jax.random.normal(jax.random.key(0), (1, 9, FEATURES))
    out, want = (jax.jit(nn.bind(mixer, parameters))(x) for mixer in (local, softmax))
    np.testing.assert_allclose(out, want, atol=1e-5)


@pytest.mark.slow
def test_routing_does_not_learn_from_a_part_of_the_batch_alone():
    model = nn.RoutingAttention(16, is_causal=True, num_heads=2, clusters=2, window=4)
    values = nn.initialize(model, jax.random.key(0))

    def learn(values, x):
        return nn.bind(model, values)(x, is_training=True)

    mesh, spec = jax.sharding.Mesh(jax.devices()[:2], ("data",)), jax.sharding.PartitionSpec
    part = jax.shard_map(learn, mesh=mesh, in_specs=(spec(), spec("data")), out_specs=spec("data"))
    with pytest.raises(ValueError, match=r"is_training: got True over the manual axes data; .*train under jax\.jit"):
        part(values, jnp.ones((2, 8, 16)))


@pytest.mark.parametrize("normalize", ["unit", "layer"])
@pytest.mark.long
def test_routing_starts_from_k_means_of_the_first_batch_and_then_averages(normalize):
    mixer = nn.RoutingAttention(
        FEATURES, is_causal=True, clusters=4, window=5, normalize=normalize, decay=0.9, num_heads=2, rotary=False
    )
    values = nn.initialize(mixer, jax.random.key(0))
    x = jax.random.normal(jax.random.key(1), (BATCH, 64, FEATURES))

    @jax.jit
    def train(values, x):
        bound = nn.bind(mixer, values)
        bound(x, is_training=True)
        return nn.learned(bound)

    parameters, _ = nn.split(mixer, values)
    first, loss = train(values, x)
    assert first["batches"] == 1
    query, key, *_ = nn.bind(mixer, values)._heads(x, jnp.arange(64)[:, None], None)
    tokens = jnp.concatenate([query, key], axis=1)
    fitted = attention.fit_routing(tokens, nn.bind(mixer, values)._state(), normalize=normalize)
    # One average of the very batch that the centroids were fitted to.
    assert np.linalg.norm(first["centroids"] - fitted.centroids) < 0.2 * np.linalg.norm(fitted.centroids)
    second, later_loss = train(nn.merge(parameters, first), x)
    assert second["batches"] == 2
    assert 0 < np.linalg.norm(second["centroids"] - first["centroids"]) < 0.2 * np.linalg.norm(first["centroids"])
    assert 0 < later_loss < 1.1 * loss


def test_routing_learns_nothing_in_evaluation():
    mixer, parameters, x, _ = causal("routing")

    @jax.jit
    def learned_from(parameters, x):
        bound = nn.bind(mixer, parameters)
        bound(x)
        return nn.learned(bound)

    learned, loss = learned_from(parameters, x)
    assert loss == 0
    assert jax.tree.all(jax.tree.map(lambda a, b: np.array_equal(a, b), learned, nn.split(mixer, parameters)[1]))


def test_flops_count_the_pairs_that_are_seen():
    options = {"is_causal": True, "num_heads": 4}
    projections = 2 * LENGTH * FEATURES * 4 * FEATURES
    softmax = nn.SoftmaxAttention(FEATURES, **options)
    assert softmax.flops((LENGTH,)) - projections == 4 * FEATURES * LENGTH * (LENGTH + 1) // 2
    local = nn.LocalAttention(FEATURES, window=5, **options)
    assert local.flops((LENGTH,)) - projections == 4 * FEATURES * sum(min(i + 1, 5) for i in range(LENGTH))
    sinks = nn.LocalAttention(FEATURES, window=5, sinks=2, **options)
    seen = sum(len({*range(max(i - 4, 0), i + 1), *range(min(2, i + 1))}) for i in range(LENGTH))
    assert sinks.flops((LENGTH,)) - projections == 4 * FEATURES * seen
    dilated = nn.DilatedAttention(FEATURES, window=3, dilation=4, **options)
    assert dilated.flops((LENGTH,)) - projections == 4 * FEATURES * sum(min(i // 4 + 1, 3) for i in range(LENGTH))
    linear = nn.LinearAttention(FEATURES, **options)
    assert linear.flops((LENGTH,)) - projections == 4 * LENGTH * 4 * (FEATURES // 4) ** 2
    parallax = nn.ParallaxAttention(FEATURES, window=5, **options)
    pairs = sum(min(i + 1, 5) for i in range(LENGTH))
    assert parallax.flops((LENGTH,)) - projections == 8 * FEATURES * pairs + 2 * LENGTH * FEATURES**2
    memory = nn.MemoryAttention(FEATURES, hidden=5, **options)
    assert memory.flops((LENGTH,)) - projections == (6 + 8) * LENGTH * 4 * (FEATURES // 4) * 5
    agent = nn.AgentAttention(FEATURES, agents=3, residual_convolution=0, **options)
    assert agent.flops((LENGTH,)) - projections == 2 * 4 * FEATURES * 3 * LENGTH
    axial = nn.AxialAttention(FEATURES, axis=-1, is_causal=False)
    assert axial.flops((6, 7)) - 2 * 42 * FEATURES * 4 * FEATURES == 4 * FEATURES * 42 * 7
    grid = nn.LocalAttention(FEATURES, window=(3, 5), is_causal=False)
    assert grid.flops((6, 7)) - 2 * 42 * FEATURES * 4 * FEATURES == 4 * FEATURES * 42 * 15
    video = nn.LocalAttention(FEATURES, window=(2, 3), sinks=3, is_causal=True)
    past = masks.causal() & masks.causal(axis=1)
    mask = masks.neighborhood((6, 7), (2, 3), is_causal=True) | (past & masks.first_keys(3))
    seen = int(masks.dense_mask(mask, (6, 7)).sum())
    assert video.flops((6, 7)) - 2 * 42 * FEATURES * 4 * FEATURES == 4 * FEATURES * seen
    ema = nn.EmaSinksAttention(FEATURES, chunk=3, chunks_kept=4, decay=0.5, **options)
    seen = sum(min(i // 3, 3) * 3 + i % 3 + 1 for i in range(LENGTH))
    assert ema.flops((LENGTH,)) - projections == 4 * FEATURES * seen
    pyramid = nn.PyramidAttention(FEATURES, key_block=4, sizes=(1, 2), fractions=(0.5, 1.0), **options)
    ranked = [max(i // 4 - 1, 0) for i in range(LENGTH)]  # but the first block
    seen = sum(i % 4 + 1 + 4 * (i >= 4) + 4 * -(-m // 2) + 2 * (m // 2) for i, m in enumerate(ranked))
    choosing = 2 * LENGTH * -(-LENGTH // 4) * FEATURES
    assert pyramid.flops((LENGTH,)) - projections == 4 * FEATURES * seen + choosing


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: nn.SoftmaxAttention(10, is_causal=True, num_heads=4), "num_heads: got 4; must divide features 10"),
        (lambda: nn.SoftmaxAttention(16, is_causal=True, num_key_heads=3), "num_key_heads: got 3"),
        (lambda: nn.SoftmaxAttention(16, is_causal=True, num_heads=0), "num_heads: got 0; need at least 1"),
        (lambda: nn.LinearAttention(16, is_causal=True, decay="slow"), "decay: got 'slow'"),
        (lambda: nn.LinearAttention(16, is_causal=False, decay="data"), "is_causal=False"),
        (lambda: nn.LinearAttention(16, is_causal=False, beta=1.0), "beta: got 1.0 with is_causal=False"),
        (lambda: nn.LinearAttention(16, is_causal=True, normalizer_floor=1.0), "normalizer_floor"),
        (lambda: nn.LinearAttention(16, is_causal=True, writes=2), "writes: got 2; needs beta"),
        (lambda: nn.LinearAttention(16, is_causal=True, output_gate="tanh"), "output_gate: got 'tanh'"),
        (
            lambda: nn.LinearAttention(16, is_causal=True, beta=1.0, writes=2, residual_convolution=3),
            "residual_convolution: got some; must be 0 with writes > 1",
        ),
        (lambda: nn.Mamba3Attention(16, is_causal=False), "is_causal: got False; Mamba3Attention takes tokens in"),
        (lambda: nn.Mamba3Attention(12, is_causal=True), "head_dim: got 3; must be even"),
        (lambda: nn.RWKV7Attention(16, is_causal=False), "is_causal: got False; RWKV7Attention takes tokens in"),
        (lambda: nn.AgentAttention(16, is_causal=True, agents=(2, 2)), "pooling sees later tokens"),
        (lambda: nn.AgentAttention(16, is_causal=True, agents=0), "agents: got 0"),
        (lambda: nn.RoutingAttention(16, is_causal=True, clusters=2, window=2, local_heads=4), "local_heads: got 4"),
        (
            lambda: nn.RoutingAttention(16, is_causal=True, clusters=2, window=2, membership="global").init_cache(1, 4),
            'only "strict" decodes',
        ),
        (lambda: nn.MemoryAttention(16, is_causal=False), "is_causal: got False; a memory reads"),
        (lambda: nn.MemoryAttention(16, is_causal=True, value_dim=3), "value_dim: got 3; must be head_dim 4"),
        (lambda: nn.MemoryAttention(16, is_causal=True, memory="linear", hidden=3), "hidden: got 3; must be None"),
        (lambda: nn.MemoryAttention(16, is_causal=True, objective="huber"), "threshold: got None; need"),
        (lambda: nn.MemoryAttention(16, is_causal=True, project="norm"), "project: got 'norm'; need per='chunk'"),
        (lambda: nn.AxialAttention(16, is_causal=True, axis=0), "has no causal form"),
        (lambda: nn.InlineAttention(16, is_causal=True), "has no causal form"),
        (lambda: nn.SoftmaxAttention(16, is_causal=False, convolution=4), "convolution: got 4 with is_causal=False"),
        (lambda: nn.SoftmaxAttention(16, is_causal=True, residual_convolution=(3, 3)), "one width"),
        (lambda: nn.SoftmaxAttention(16, is_causal=False).init_cache(1, 4), "only a causal mixer decodes"),
    ],
)
def test_bad_options_are_named(make, message):
    with pytest.raises(ValueError, match=message):
        make()


@pytest.mark.parametrize("given", [True, 2.0, "2"])
def test_counts_are_integers_and_numpy_s_count(given):
    for mixer, name in ((nn.SoftmaxAttention, "num_heads"), (nn.AgentAttention, "agents")):
        with pytest.raises(TypeError, match=f"^{name}: got {given!r}; need an int"):
            mixer(FEATURES, is_causal=True, **{name: given})
        assert mixer(FEATURES, is_causal=True, **{name: np.int64(2)}).flops((3,)) > 0


def test_rotary_needs_room_for_every_axis():
    mixer = nn.SoftmaxAttention(12, is_causal=False, num_heads=2)
    with pytest.raises(ValueError, match=r"head_dim: got 6; rotary positions on 2 axes need a multiple of 4"):
        nn.bind(mixer, nn.initialize(mixer, jax.random.key(0)))(jnp.zeros((1, 2, 2, 12)))


class Undecodable(nn.Attention):
    def mix(self, query, key, value, x, segment_ids):
        return value

    def mechanism_flops(self, space):
        return 0


class Half(Undecodable):
    def init_mechanism_cache(self, batch, max_length):
        return ()


@pytest.mark.parametrize(
    ("mixer", "reason"),
    [(Undecodable, "it has no cache to decode from"), (Half, "it has no mechanism_step to decode with")],
)
def test_a_mixer_of_ones_own_that_cannot_decode_says_what_it_has_not(mixer, reason):
    made = mixer(16, is_causal=True)
    assert made.decoding_refusal == f"{mixer.__name__}: {reason}"
    assert made.state_size(8) is None
    for call in (lambda: made.init_cache(1, 8), lambda: Undecodable.mechanism_step(made, (), *[jnp.ones(1)] * 4)):
        with pytest.raises((ValueError, NotImplementedError), match="to decode"):
            call()


@pytest.mark.slow
def test_a_mixer_on_explicit_axes_lies_as_its_input_does_and_learns():
    """What jax.make_mesh gives by default; models are tried in tests/models."""
    mixer, values = MIXERS["routing"](FEATURES), causal("routing")[1]
    sharding = jax.sharding.NamedSharding(jax.make_mesh((2,), ("data",)), jax.sharding.PartitionSpec("data"))
    x = jax.device_put(jax.random.normal(jax.random.key(1), (4, LENGTH, FEATURES)), sharding)

    def train(values, x):
        bound = nn.bind(mixer, values)
        y = bound(x, is_training=True)
        return y, bound.step(bound.init_cache(4, LENGTH), x[:, :1])[0], nn.learned(bound)

    y, step, (buffers, loss) = jax.jit(train)(values, x)
    assert jax.typeof(y).sharding.spec[0] == jax.typeof(step).sharding.spec[0] == "data"
    want, _, (want_buffers, want_loss) = jax.jit(train)(values, np.asarray(x))
    for got, expected in ((y, want), (buffers, want_buffers), (loss, want_loss)):
        jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-4, atol=2e-5), got, expected)
    assert buffers["batches"] == 1


@pytest.mark.parametrize("dtype", slow_but([jnp.bfloat16], [jnp.bfloat16, jnp.float16]))
@pytest.mark.parametrize("name", slow_but({"local_sinks"}, MIXERS))
@pytest.mark.long
def test_gradients_in_16_bits_are_about_those_in_32(name, dtype):
    space = (5, 6) if name in GRIDS else (LENGTH,)
    x, weights = (jax.random.normal(jax.random.key(seed), (BATCH, *space, FEATURES)) for seed in (1, 2))

    def gradients(dtype):
        mixer = MIXERS[name](FEATURES, dtype=dtype)
        values = nn.initialize(mixer, jax.random.key(0))
        loss = jax.jit(lambda values, x: jnp.sum(weights * nn.bind(mixer, values)(x)))
        return jax.grad(loss, (0, 1))(values, x.astype(dtype))

    def flat(tree):
        return np.concatenate([np.ravel(leaf).astype(np.float64) for leaf in jax.tree.leaves(tree)])

    narrow, wide = flat(gradients(dtype)), flat(gradients(jnp.float32))
    assert np.isfinite(narrow).all()
    # Rounded tokens may be nearest to another centroid, and a rounded sum of weights below its floor.
    if name != "l2vit" and not name.startswith("routing"):
        assert np.linalg.norm(narrow - wide) < 0.1 * np.linalg.norm(wide)
