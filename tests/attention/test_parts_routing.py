"""Routing and convolutions of sequences that devices share: what one device computes, and what they exchange for it."""

import collections
import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec
from marks import slow_but

import attnlab
from attnlab import nn, train
from attnlab.attention._dispatch.exchange import positions_over
from attnlab.attention.centroids import RoutingState
from attnlab.models import LanguageModel
from attnlab.nn.layers import depthwise_convolution

RNG = np.random.default_rng(0)
WHOLE = PartitionSpec()


def normal(*shape):
    return RNG.normal(size=shape).astype(np.float32)


def segments(batch, length):
    return np.sort(RNG.integers(0, 4, (batch, length)), axis=1).astype(np.int32)


def routed(heads=8, key_heads=None, length=32, value_dim=3, **more):
    key_heads, clusters = key_heads or heads, 3
    return {
        "query": normal(2, length, heads, 4),
        "key": normal(2, length, key_heads, 4),
        "value": normal(2, length, key_heads, value_dim),
        "state": RoutingState(normal(heads, clusters, 4), *map(np.ones, ((heads, clusters), (heads, clusters, 4)))),
        **more,
    }


def routing(**options):
    return functools.partial(attnlab.routing_attention, window=6, **options)


def fitting(**options):
    return functools.partial(attnlab.fit_routing, iterations=3, **options)


def convolution(is_causal):
    return functools.partial(depthwise_convolution, is_causal=is_causal)


MASK = RNG.uniform(size=(2, 32)) < 0.8
EXCHANGES = {"all-to-all": 3, "all-reduce": 1}  # there; back, outputs and integers; sums of heads
HALO, BOTH_SIDES, SUMS = {"collective-permute": 1}, {"collective-permute": 2}, {"all-reduce": 2}

# The call, its arrays, and what it exchanges on eight devices.
CASES = {
    "routing, causal": (routing(is_causal=True), routed(), EXCHANGES),
    "routing, not causal": (routing(), routed(), EXCHANGES),
    "routing, shared queries": (routing(is_causal=True, share_qk=True), routed(), EXCHANGES),
    "routing, global": (routing(membership="global", normalize="layer"), routed(), EXCHANGES),
    "routing, grouped heads": (routing(is_causal=True), routed(8, 2), EXCHANGES),
    "routing, six heads of two": (routing(is_causal=True), routed(6, 2), EXCHANGES),
    "routing, three heads": (routing(), routed(3), EXCHANGES),
    "routing, masked": (routing(is_causal=True), routed(key_mask=MASK), {**EXCHANGES, "all-gather": 1}),
    "routing, global, masked": (
        routing(membership="global"),
        routed(12, 4, key_mask=MASK),
        {**EXCHANGES, "all-gather": 1},
    ),
    "fitting": (fitting(), {"tokens": normal(2, 32, 3, 4), "state": routed(3)["state"]}, SUMS),
    "fitting, layer norm": (
        fitting(normalize="layer"),
        {"tokens": normal(2, 32, 3, 4), "state": routed(3)["state"]},
        SUMS,
    ),
    "convolution, causal": (convolution(True), {"x": normal(2, 32, 5), "kernel": normal(4, 5)}, HALO),
    "convolution, causal, segments": (
        convolution(True),
        {"x": normal(2, 32, 5), "kernel": normal(4, 5), "segment_ids": segments(2, 32)},
        {"collective-permute": 2},
    ),
    "convolution, centred": (convolution(False), {"x": normal(2, 32, 5), "kernel": normal(5, 5)}, BOTH_SIDES),
    "convolution, even": (convolution(False), {"x": normal(2, 32, 5), "kernel": normal(2, 5)}, HALO),
    "convolution of one tap": (convolution(False), {"x": normal(2, 32, 5), "kernel": normal(1, 5)}, {}),
    "convolution over three parts": (
        convolution(True),
        {"x": normal(2, 32, 5), "kernel": normal(12, 5)},
        {"collective-permute": 3},
    ),
    "convolution, longer than the sequence": (
        convolution(False),
        {"x": normal(2, 16, 5), "kernel": normal(39, 5)},
        {"collective-permute": 14},
    ),
    "convolution of images, by example": (
        convolution(False),
        {"x": normal(2, 16, 5, 3), "kernel": normal(2, 3, 5, 3)},
        BOTH_SIDES,
    ),
    "convolution of videos": (
        convolution(False),
        {"x": normal(2, 8, 3, 4, 3), "kernel": normal(3, 3, 3, 3)},
        BOTH_SIDES,
    ),
}
every_case = functools.partial(pytest.mark.parametrize, "name")


def positions_of(arrays, heads=None, batch=None):
    """The specs of a case's arrays: positions over "context", and heads or channels and the batch over these axes."""

    def spec(name, x):
        if name in ("state", "kernel"):
            return jax.tree.map(lambda _: WHOLE, x)
        entries = [batch, "context", *[None] * (x.ndim - 2)]
        if heads and name != "segment_ids" and name != "key_mask":
            entries[-1 if name == "x" else -2] = heads
        return PartitionSpec(*entries)

    return {name: spec(name, x) for name, x in arrays.items()}


def results_of(name, results):
    """The specs of a case's results in shard_map: what has positions, and sums."""
    positions = PartitionSpec(None, "context")
    if name.startswith("routing"):
        out, aux = jax.tree.map(lambda _: positions, results)
        return out, aux._replace(loss=WHOLE, statistics=jax.tree.map(lambda _: WHOLE, aux.statistics))
    return jax.tree.map(lambda _: WHOLE if name.startswith("fitting") else positions, results)


@functools.cache
def with_gradient(name, call=None):
    """arrays -> results, and the gradient of their sum with weights in those that are floats."""
    call = call or CASES[name][0]

    def both(arrays):
        def total(some):
            results = call(**{**arrays, **some})
            weights = (
                np.random.default_rng(1).normal(size=x.shape).astype(np.float32) for x in jax.tree.leaves(results)
            )
            return sum(jnp.sum(x * weight) for x, weight in zip(jax.tree.leaves(results), weights)), results

        floats = {key: x for key, x in arrays.items() if getattr(x, "dtype", None) == np.float32}
        gradients, results = jax.grad(total, has_aux=True)(floats)
        return results, gradients

    return both


@functools.cache
def expected(name):
    return jax.jit(with_gradient(name))(CASES[name][1])


def collectives(compiled):
    kinds = "all-gather|all-reduce|all-to-all|collective-permute|reduce-scatter"
    return dict(collections.Counter(re.findall(rf" ({kinds})(?:-start)?\(", compiled.as_text())))


def placed(mesh, arrays, specs):
    return {
        name: jax.tree.map(lambda x, spec: jax.device_put(x, NamedSharding(mesh, spec)), x, specs[name])
        for name, x in arrays.items()
    }


def over(count, kind=AxisType.Auto):
    return jax.make_mesh((count,), ("context",), axis_types=(kind,), devices=jax.devices()[:count])


QUICK = ["convolution, causal, segments"]


@every_case(slow_but(QUICK, CASES))
def test_eight_devices_compute_what_one_does_and_exchange_no_more_than_they_must(name, assert_close):
    call, arrays, exchanged = CASES[name]
    mesh = over(8)
    with jax.set_mesh(mesh):
        arrays = placed(mesh, arrays, positions_of(arrays))
        assert_close(jax.jit(with_gradient(name))(arrays), expected(name), 2e-5)
        assert collectives(jax.jit(lambda arrays: call(**arrays)).lower(arrays).compile()) == exchanged


@pytest.mark.slow
@pytest.mark.parametrize("check_vma", [True, False])
@pytest.mark.parametrize("count", [2, 8])
@every_case(CASES)
def test_positions_over_computes_so_in_shard_map(name, count, check_vma, assert_close):
    call, arrays, _ = CASES[name]
    specs, results = positions_of(arrays), results_of(name, jax.eval_shape(lambda: call(**arrays)))

    def of_part(arrays):
        with positions_over("context"):
            return call(**arrays)

    mapped = jax.shard_map(of_part, mesh=over(count), in_specs=(specs,), out_specs=results, check_vma=check_vma)
    assert_close(jax.jit(with_gradient(name, lambda **arrays: mapped(arrays)))(arrays), expected(name), 2e-5)


@pytest.mark.slow
@every_case([name for name in CASES if not name.startswith("convolution")])
def test_explicit_axes_compute_so(name, assert_close):
    call, arrays, exchanged = CASES[name]
    mesh = over(8, AxisType.Explicit)
    with jax.set_mesh(mesh):
        compiled = jax.jit(lambda arrays: call(**arrays)).lower(placed(mesh, arrays, positions_of(arrays))).compile()
        assert_close(compiled(placed(mesh, arrays, positions_of(arrays))), expected(name)[0], 2e-5)
        assert collectives(compiled) == exchanged


@pytest.mark.slow
@pytest.mark.parametrize("sizes", [{"data": 2, "context": 4}, {"data": 2, "tensor": 2, "context": 2}])
@every_case(["routing, masked", "routing, three heads", "fitting", "convolution, causal, segments"])
def test_devices_that_share_batch_and_heads_too_compute_so(name, sizes, assert_close):
    arrays = CASES[name][1]
    mesh = train.Mesh(**sizes).build()
    heads = "tensor" if "tensor" in sizes and name == "routing, masked" else None
    with jax.set_mesh(mesh):
        arrays = placed(mesh, arrays, positions_of(arrays, heads, "data"))
        assert_close(jax.jit(with_gradient(name))(arrays), expected(name), 2e-5)


@pytest.mark.slow
@every_case(["routing, causal", "routing, global", "routing, shared queries", "convolution, causal, segments"])
def test_what_is_not_finite_reaches_who_sees_it_and_nobody_else(name):
    arrays = {**CASES[name][1]}
    for key, where in {"query": (0, 3, 1, 0), "key": (1, 20, 5, 1), "value": (0, 9, 2, 1), "x": (0, 15, 2)}.items():
        if key in arrays:
            arrays[key] = arrays[key].copy()
            arrays[key][where] = np.nan
    mesh = over(8)
    want = jax.jit(with_gradient(name))(arrays)
    assert any(np.isnan(x).any() for x in jax.tree.leaves(want[0]))
    with jax.set_mesh(mesh):
        got = jax.jit(with_gradient(name))(placed(mesh, arrays, positions_of(arrays)))
    jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=2e-5, atol=2e-5), got, want)


@pytest.mark.slow
def test_memory_of_routing_falls_with_the_number_of_devices():
    call, arrays = routing(is_causal=True), routed(length=4096)

    def temporary(count):
        mesh = over(count)
        with jax.set_mesh(mesh):
            lowered = jax.jit(lambda arrays: call(**arrays)).lower(placed(mesh, arrays, positions_of(arrays)))
        return lowered.compile().memory_analysis().temp_size_in_bytes

    assert temporary(8) < 0.3 * temporary(2)  # which exchange alike; one device does not


@pytest.mark.slow
def test_a_block_gathers_no_activations(assert_close):
    """Its three convolutions take halos, of tokens and of documents, and linear attention what parts leave."""
    mixer = functools.partial(nn.LinearAttention, num_heads=2, convolution=4, decay="data", rotary=True)
    model = LanguageModel(vocabulary=16, mixers=[mixer], depth=1, features=16, mlp_hidden=16)
    values = nn.initialize(model, jax.random.key(0))
    tokens, ids = RNG.integers(0, 16, (1, 64)), segments(1, 64)

    def run(values, tokens, ids):
        return nn.bind(model, values)(tokens, segment_ids=ids)

    with jax.set_mesh(train.Mesh(context=8).build()):
        compiled = jax.jit(run).lower(values, tokens, ids).compile()
        got = compiled(values, tokens, ids)
    assert collectives(compiled) == {"collective-permute": 5, "all-gather": 1}
    assert_close(got, jax.jit(run)(values, tokens, ids), 2e-5)


def test_a_decoding_step_of_a_convolution_exchanges_nothing():
    layer = nn.layers.DepthwiseConvolution((8,), 4, is_causal=True, use_bias=True)
    values = nn.initialize(layer, jax.random.key(0))
    with jax.set_mesh(over(8)):
        step = jax.jit(lambda values, cache, x: nn.bind(layer, values).step(cache, x))
        compiled = step.lower(values, jnp.zeros((2, 7, 4)), jnp.zeros((2, 1, 4))).compile()
    assert collectives(compiled) == {}
