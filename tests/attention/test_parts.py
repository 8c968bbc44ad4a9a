"""Attention whose positions devices share, beside one device: values, gradients, and what the devices exchange."""

import functools
import importlib.util
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P
from marks import slow_but
from parts import (
    COUNTED,
    SHARED,
    WHOLE,
    Case,
    assert_alike,
    assert_equals_by_exchanges,
    collectives,
    mapped,
    mesh_of,
    normal,
    placed,
    qkv,
    with_gradients,
)

from attnlab import (
    AgentState,
    LinearState,
    agent_attention,
    axial_attention,
    causal_agent_attention,
    dilated_attention,
    dot_product_attention,
    inline_attention,
    linear_attention,
    local_attention,
    local_linear_attention,
    parallax_attention,
    pool_agents,
    positions_over,
)
from attnlab.attention import masks
from attnlab.attention._dispatch import exchange
from attnlab.catalog import MECHANISMS
from kernels_pallas.aot.compile import topology_devices

SUMS, SUMS_OF_POOLED = {"all-reduce": 2}, {"all-reduce": 3}
GATHERED, SWAPPED = {"all-gather": 1}, {"all-to-all": 2}
agents = {"agents": normal(3, 4, 8)}
given = {"agents": WHOLE}
biases = {"gather_bias": normal(2, 4, 3, 64), "broadcast_bias": normal(4, 64, 3)}
of_biases = {"gather_bias": P(None, None, None, "context"), "broadcast_bias": P(None, "context")}
flat_biases = {"gather_bias": normal(4, 3, 96), "broadcast_bias": normal(1, 1, 1, 3)}
hidden = np.zeros((2, 64), bool)
hidden[0, :3] = True  # of the second sequence no key is seen
causal = functools.partial(causal_agent_attention, chunk_size=8)
causal_state = functools.partial(causal, return_state=True)
with_state = (SHARED, AgentState(WHOLE, WHOLE, WHOLE))
state = AgentState(normal(2, 4, 3), 1 + normal(2, 4, 3) ** 2, normal(2, 4, 3, 6))
both = (SHARED, SHARED)
bands = masks.blocks(24) | masks.Mask(lambda query, key: (key[0] + 5 * query[0]) % 7 == 0)


def pooled(query, key, value):
    return agent_attention(query, key, value, pool_agents(query, (3, 4)))


def unit(arrays):
    """Keys and queries of unit length, as delta rules and regressions like them."""
    return arrays | {
        name: arrays[name] / np.linalg.norm(arrays[name], axis=-1, keepdims=True) for name in ("query", "key")
    }


def of_tokens(**more):
    return unit(qkv(64)) | more


segments = np.sort(np.random.default_rng(4).integers(0, 5, (2, 64)), axis=1).astype(np.int32)
ids = {"segment_ids": segments}
decay, per_channel = (-0.1 * np.abs(normal(2, 64, 4, *width, seed=5)) for width in ((), (8,)))
gate = {"beta": np.random.default_rng(6).uniform(size=(2, 64, 4)).astype(np.float32)}
erased = tuple(0.3 * normal(2, 64, 4, 8, seed=7) * x for x in (1, np.random.default_rng(8).uniform(size=(2, 64, 4, 8))))
kv = LinearState(normal(2, 4, 8, 6), normal(2, 4, 8))
with_linear_state = (SHARED, LinearState(WHOLE, WHOLE))
with_kv = (SHARED, LinearState(WHOLE))
HALO, BOTH_SIDES, RING = {"collective-permute": 1}, {"collective-permute": 2}, {"collective-permute": 7}
ids_too = {"collective-permute": 1, "all-gather": 1}


def local(**options):
    return functools.partial(local_attention, **options)


def linear(**options):
    return functools.partial(linear_attention, chunk_size=8, **options)


def regress(**options):
    return functools.partial(local_linear_attention, ridge=1.0, **options)


CASES = {
    "local": Case(local(window=8, is_causal=True, return_lse=True), qkv(64), HALO, results=both),
    "local, window over parts": Case(local(window=20, is_causal=True), qkv(64), {"collective-permute": 3}),
    "local, both sides": Case(local(window=7, return_lse=True), qkv(64), BOTH_SIDES, results=both),
    "local, cut off": Case(local(window=8, edge="clip"), qkv(64), BOTH_SIDES),
    "local, strides": Case(local(window=7, stride=3), qkv(64), BOTH_SIDES),
    "local, reference": Case(local(window=7, implementation="reference"), qkv(64), BOTH_SIDES),
    "local, softcap and learned sinks": Case(
        local(window=8, is_causal=True, softcap=2.0, return_lse=True),
        qkv(64) | {"sink_logits": normal(4)},
        HALO,
        {"sink_logits": WHOLE},
        both,
    ),
    "local, segments": Case(local(window=8, is_causal=True), qkv(64) | ids, BOTH_SIDES),
    "local, sinks": Case(local(window=6, is_causal=True, sinks=3), qkv(64), HALO | GATHERED),
    "local, many sinks": Case(local(window=6, is_causal=True, sinks=12, stride=2), qkv(64), BOTH_SIDES | GATHERED),
    "local, sinks of frames": Case(
        local(window=(2, 3), is_causal=(True, False), sinks=1, return_lse=True),
        qkv(16, 6),
        HALO | GATHERED,
        results=both,
    ),
    "local, image": Case(local(window=(3, 5), return_lse=True), qkv(16, 6), BOTH_SIDES, results=both),
    "local, video": Case(local(window=3, is_causal=(True, False, False)), qkv(8, 4, 3, batch=1), BOTH_SIDES),
    "local, not finite": Case(local(window=8, is_causal=True), qkv(64, spoilt=True), HALO),
    "dilated": Case(functools.partial(dilated_attention, window=3, dilation=4), qkv(64), BOTH_SIDES),
    "dilated, over parts": Case(
        functools.partial(dilated_attention, window=3, dilation=5, is_causal=True), qkv(64), {"collective-permute": 2}
    ),
    "linear": Case(linear(return_state=True), of_tokens(), GATHERED, results=with_kv),
    "linear, normalized": Case(
        linear(feature_map="elu", normalize=True, return_state=True),
        of_tokens(initial_state=kv, **ids),
        ids_too,
        {"initial_state": WHOLE},
        with_linear_state,
    ),
    "linear, lse": Case(linear(feature_map="elu", normalize=True, return_lse=True), of_tokens(), GATHERED, {}, both),
    "linear, taylor2": Case(linear(feature_map="taylor2", normalize=True), of_tokens(), GATHERED),
    "linear, decay": Case(linear(), of_tokens(log_decay=decay), GATHERED),
    "linear, decay per head": Case(linear(), of_tokens(log_decay=decay[0, 0]), GATHERED, {"log_decay": WHOLE}),
    "linear, decay per channel": Case(linear(), of_tokens(log_decay=per_channel, **ids), ids_too),
    "linear, delta": Case(linear(), of_tokens(**gate), GATHERED),
    "linear, gated delta": Case(
        linear(return_state=True), of_tokens(log_decay=decay, **gate, **ids), ids_too, {}, with_kv
    ),
    "linear, erase": Case(
        linear(return_state=True),
        of_tokens(log_decay=per_channel, erase=erased, **ids),
        ids_too,
        {},
        with_kv,
    ),
    "linear, not finite": Case(linear(), unit(qkv(64)) | {"key": qkv(64, spoilt=True)["key"]} | ids, ids_too),
    "linear, not causal": Case(linear(is_causal=False), of_tokens(), GATHERED),
    "linear, not causal, segments": Case(
        linear(is_causal=False, feature_map="elu", normalize=True, return_state=True),
        of_tokens(initial_state=kv, **ids),
        {"all-gather": 2},
        {"initial_state": WHOLE},
        with_linear_state,
    ),
    "dot product": Case(
        functools.partial(dot_product_attention, is_causal=True, return_lse=True), qkv(64), RING, results=both
    ),
    "dot product, softcap and learned sinks": Case(
        functools.partial(dot_product_attention, is_causal=True, softcap=2.0, return_lse=True),
        qkv(64) | {"sink_logits": normal(4)},
        RING,
        {"sink_logits": WHOLE},
        both,
    ),
    "dot product, reference": Case(functools.partial(dot_product_attention, implementation="reference"), qkv(64), RING),
    "dot product, segments": Case(
        functools.partial(dot_product_attention, is_causal=True), qkv(64) | ids, {"collective-permute": 14}
    ),
    "dot product, bias and mask": Case(
        functools.partial(dot_product_attention, return_lse=True),
        qkv(64) | {"bias": normal(1, 4, 64, 64), "mask": normal(2, 1, 64, 64) < 1},
        RING,
        {"bias": P(None, None, "context"), "mask": P(None, None, "context")},
        both,
    ),
    "dot product, other keys": Case(dot_product_attention, qkv(64, keys=(32,)), RING),
    "dot product, mask": Case(functools.partial(dot_product_attention, mask=bands), qkv(64, keys=(32,)), RING),
    "dot product, not finite": Case(
        functools.partial(dot_product_attention, is_causal=True), qkv(64, spoilt=True), RING
    ),
    "parallax": Case(
        parallax_attention, unit(qkv(64)) | {"probe": 0.3 * normal(2, 64, 4, 8)}, {"collective-permute": 14}
    ),
    "parallax, window": Case(
        functools.partial(parallax_attention, window=9), unit(qkv(64)) | {"probe": 0.3 * normal(2, 64, 4, 8)}, HALO
    ),
    "local linear": Case(regress(), unit(qkv(64)), {"collective-permute": 42, "all-reduce": 2, "all-gather": 1}),
    "local linear, window": Case(regress(window=9), unit(qkv(64)), HALO),
    "agent": Case(agent_attention, qkv(64) | agents, SUMS, given),
    "agent, reference": Case(
        functools.partial(agent_attention, implementation="reference"), qkv(64) | agents, SUMS, given
    ),
    "agent, agents of each sequence": Case(agent_attention, qkv(64) | {"agents": normal(2, 3, 4, 8)}, SUMS, given),
    "agent, keys hidden": Case(agent_attention, qkv(64) | agents | {"key_mask": hidden}, SUMS, given),
    "agent, biases": Case(agent_attention, qkv(64) | agents | biases, SUMS, given | of_biases),
    "agent, image": Case(
        agent_attention,
        qkv(16, 6) | agents | flat_biases,
        SUMS,
        given | {"gather_bias": P(None, None, "context"), "broadcast_bias": WHOLE},
    ),
    "agent, other keys": Case(agent_attention, qkv(64, keys=(32,)) | agents, SUMS, given),
    "agent, not finite": Case(agent_attention, qkv(64, spoilt=True) | agents, SUMS, given),
    "agent, pooled": Case(pooled, qkv(16, 6), SUMS_OF_POOLED),
    "causal agent": Case(causal, qkv(64) | agents, GATHERED, given),
    "causal agent, state": Case(
        causal_state,
        qkv(64, key_heads=4) | agents | {"initial_state": state},
        GATHERED,
        given | {"initial_state": WHOLE},
        with_state,
    ),
    "causal agent, reference": Case(
        functools.partial(causal_state, implementation="reference"), qkv(64) | agents, GATHERED, given, with_state
    ),
    "causal agent, huge logits": Case(
        functools.partial(causal_state, scale=30.0), qkv(64) | agents, GATHERED, given, with_state
    ),
    "causal agent, not finite": Case(causal_state, qkv(64, spoilt=True) | agents, GATHERED, given, with_state),
    "inline": Case(inline_attention, qkv(64), SUMS),
    "inline, reference": Case(functools.partial(inline_attention, implementation="reference"), qkv(64), SUMS),
    "inline, image": Case(inline_attention, qkv(16, 6), SUMS),
    "inline, other keys": Case(inline_attention, qkv(64, keys=(32,)), SUMS),
    "inline, not finite": Case(inline_attention, qkv(64, spoilt=True), SUMS),
    "axial": Case(
        functools.partial(axial_attention, axis=0, is_causal=True, return_lse=True), qkv(16, 3), SWAPPED, results=both
    ),
    "axial, reference": Case(
        functools.partial(axial_attention, axis=0, implementation="reference"), qkv(16, 8), SWAPPED
    ),
    "axial, bias": Case(
        functools.partial(axial_attention, axis=0, return_lse=True),
        qkv(16, 3) | {"bias": normal(4, 16, 16)},
        SWAPPED,
        {"bias": WHOLE},
        both,
    ),
    "axial, bias of keys": Case(
        functools.partial(axial_attention, axis=0), qkv(16, 3) | {"bias": normal(1, 1, 16)}, SWAPPED, {"bias": WHOLE}
    ),
    "axial, bias along another axis": Case(
        functools.partial(axial_attention, axis=1), qkv(16, 3) | {"bias": normal(4, 3, 3)}, {}, {"bias": WHOLE}
    ),
    "axial, sequence": Case(functools.partial(axial_attention, axis=0), qkv(64), SWAPPED),
    "axial, 3 axes": Case(functools.partial(axial_attention, axis=-3), qkv(8, 3, 2, batch=1), SWAPPED),
    "axial, another axis": Case(functools.partial(axial_attention, axis=1, return_lse=True), qkv(16, 3), {}, {}, both),
    "axial, not finite": Case(
        functools.partial(axial_attention, axis=0, is_causal=True), qkv(16, 3, spoilt=True), SWAPPED
    ),
}
_UNEVEN = {  # keys that eight devices do not divide are whole on each
    "agent": Case(agent_attention, qkv(64, keys=(30,)) | agents, SUMS, given | {"key": WHOLE, "value": WHOLE}),
    "inline": Case(inline_attention, qkv(64, keys=(30,)), SUMS, {"key": WHOLE, "value": WHOLE}),
    "dot product, mask": Case(
        functools.partial(dot_product_attention, mask=bands), qkv(64, keys=(30,)), {}, {"key": WHOLE, "value": WHOLE}
    ),
}
_QUICK = {"local", "linear, gated delta", "axial"}


@functools.cache
def of_one_device(name):
    case = CASES[name]
    return jax.jit(with_gradients(case.call))(case.arrays)


@pytest.mark.parametrize(
    ("name", "space_axis", "message"),
    [
        ("data", 0, r"name: got 'data'; need one of context\b"),
        (None, 0, r"name: got None; need one of context\b"),
        ("context", 3, r"space_axis: got 3; need 0, 1 or 2\b"),
        ("context", True, r"space_axis: got True; need 0, 1 or 2\b"),
        ("context", "0", r"space_axis: got '0'; need 0, 1 or 2\b"),
    ],
)
def test_a_wrong_axis_is_named(name, space_axis, message):
    def own_part(x):
        with positions_over(name, space_axis=space_axis):
            return x

    axis = P("context")
    with pytest.raises(ValueError, match=message):
        jax.shard_map(own_part, mesh=mesh_of(2), in_specs=axis, out_specs=axis)(np.zeros(2))


def test_without_a_shard_map_no_axis_is_shared():
    with (
        pytest.raises(ValueError, match=r"name: got 'context'; no jax.shard_map is around it$"),
        positions_over("context"),
    ):
        pass


@pytest.mark.parametrize("name", slow_but(_QUICK, CASES))
@pytest.mark.long
def test_equals_one_device_by_these_exchanges(name):
    assert_equals_by_exchanges(CASES[name], of_one_device(name))


@pytest.mark.slow
@pytest.mark.parametrize("count", [2, 8])
@pytest.mark.parametrize("name", CASES)
def test_equals_one_device_on_explicit_axes(name, count):
    case, mesh = CASES[name], mesh_of(count, AxisType.Explicit)
    arrays = placed(case, mesh)
    with jax.set_mesh(mesh):
        got = jax.jit(with_gradients(case.call))(arrays)
        if count == 8:
            assert collectives(case.call, arrays) == case.exchanged
    assert_alike(got, of_one_device(name))


@pytest.mark.parametrize("check_vma", [pytest.param(False, marks=pytest.mark.slow), True])
@pytest.mark.parametrize("count", [2, pytest.param(8, marks=pytest.mark.slow)])
@pytest.mark.parametrize("name", slow_but(["linear"], CASES))
@pytest.mark.long
def test_equals_one_device_in_shard_map(name, count, check_vma):
    case, mesh = CASES[name], mesh_of(count)
    arrays = placed(case, mesh)
    call = mapped(case, mesh, check_vma)
    got = jax.jit(with_gradients(call))(arrays)
    assert_alike(got, of_one_device(name))
    # A sum shows shard_map that what is returned of the last part is the same on every device.
    shown = {"all-reduce": 1} if check_vma and case.results is not both and case.results != SHARED else {}
    if count == 8:
        assert collectives(call, arrays) == case.exchanged | shown


@pytest.mark.slow
@pytest.mark.parametrize("name", _UNEVEN)
def test_keys_that_the_devices_do_not_divide_are_whole(name):
    case, mesh = _UNEVEN[name], mesh_of(8)
    with jax.set_mesh(mesh):
        got = jax.jit(with_gradients(case.call))(placed(case, mesh))
        assert collectives(case.call, placed(case, mesh)) == case.exchanged
    assert_alike(got, jax.jit(with_gradients(case.call))(case.arrays))


AXES = ["data", "tensor", "context", "data tensor", "data context", "tensor context", "data tensor context"]


def of_catalog(name):
    mechanism = MECHANISMS[name]
    options = dict(mechanism.options)
    options |= {"chunk_size": 4} if name.startswith("linear") else {}
    options |= {"chunk": 2} if name.startswith("ema-sinks") else {}  # a part has whole chunks
    arrays = mechanism.inputs(16)
    return lambda **arrays: mechanism(arrays, **options), unit(arrays) if "beta" in arrays else arrays


def on_axes(names, arrays):
    """Arrays of the catalog: batch over data, positions over context, heads over tensor, as far as there are such."""

    def spec(array, x):
        axes: list[str | None] = []
        if array in ("query", "key", "value", "probe", "level_scales", "transition"):
            axes = ["data", "context", *[None] * (x.ndim - 4), "tensor"]
        elif array in ("log_decay", "beta", "log_forget"):
            axes = ["data", "context", "tensor"]
        elif array in ("agents", "landmarks"):
            axes = ["data", None, "tensor"]
        return P(*(axis if axis in names else None for axis in axes))

    return {array: jax.tree.map(functools.partial(spec, array), x) for array, x in arrays.items()}


@pytest.mark.parametrize("kind", [AxisType.Auto, pytest.param(AxisType.Explicit, marks=pytest.mark.slow)], ids=str)
@pytest.mark.parametrize("axes", slow_but({"data tensor context"}, AXES))
@pytest.mark.parametrize("name", slow_but({"local, causal"}, MECHANISMS))
@pytest.mark.long
def test_the_catalog_on_axes_of_two_devices_each(name, axes, kind):
    """Batch, heads and positions, alone and together."""
    call, arrays = of_catalog(name)
    names = tuple(axes.split())
    kinds, devices = (kind,) * len(names), jax.devices()[: 2 ** len(names)]
    mesh = jax.make_mesh((2,) * len(names), names, axis_types=kinds, devices=devices)
    shared = jax.tree.map(lambda x, spec: jax.device_put(x, NamedSharding(mesh, spec)), arrays, on_axes(names, arrays))
    with jax.set_mesh(mesh):
        got = jax.jit(with_gradients(call))(shared)
    assert_alike(got, catalog_on_one_device(name))


@pytest.mark.slow
def test_conjugate_gradients_pass_keys_and_values_round_once_an_iteration():
    case, mesh = CASES["local linear"], mesh_of(8)
    with jax.set_mesh(mesh):
        text = jax.jit(lambda arrays: case.call(**arrays)).lower(placed(case, mesh)).compile().as_text()
    (loop,) = re.findall(r"while\(.*?body=(\S+?)[,\s]", text)
    of_loop = text.partition(f"\n{loop} (")[2].partition("\n}")[0]
    assert re.findall(COUNTED, of_loop).count("collective-permute") == 2 * 7


@functools.cache
def catalog_on_one_device(name):
    call, arrays = of_catalog(name)
    return jax.jit(with_gradients(call))(arrays)


@pytest.mark.slow
@pytest.mark.parametrize("spoilt", [False, True])
def test_states_of_many_parts_go_from_device_to_device(spoilt, monkeypatch):
    """By log2 of the devices + 1 permutes, as where there are too many for one all-gather."""
    monkeypatch.setattr(exchange, "_MOST_GATHERED", 1)
    mesh = mesh_of(8)
    arrays = qkv(72, spoilt=spoilt) | agents | {"initial_state": state}  # of its own length: nothing is traced yet
    case = CASES["causal agent, state"]._replace(arrays=arrays)
    with jax.set_mesh(mesh):
        got = jax.jit(with_gradients(case.call))(placed(case, mesh))
        assert collectives(causal, placed(case, mesh)) == {"collective-permute": 4}
    assert_alike(got, jax.jit(with_gradients(case.call))(arrays))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("call", "arrays"),
    [
        (local(window=64, is_causal=True), qkv(2**17)),  # whose tiles take as much of any length
        (linear_attention, qkv(2**14)),
        (linear_attention, unit(qkv(2**14)) | {"beta": 0.5 * np.ones((2, 2**14, 4), np.float32)}),
        (agent_attention, qkv(4096) | agents),
        (causal, qkv(4096) | agents),
        (inline_attention, qkv(4096)),
        (functools.partial(axial_attention, axis=0), qkv(64, 64)),
    ],
)
def test_memory_per_device_falls_with_their_number(call, arrays):
    case = Case(call, arrays, {}, given)

    def temporary(count):
        mesh = mesh_of(count)
        with jax.set_mesh(mesh):
            compiled = jax.jit(with_gradients(call)).lower(placed(case, mesh)).compile()
        return compiled.memory_analysis().temp_size_in_bytes

    assert temporary(8) < temporary(1) / 4


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("libtpu") is None, reason="compiling for a TPU needs libtpu")
def test_memory_of_rings_falls_with_the_number_of_tpus():
    """On a CPU a form's tiles outweigh what it passes on."""

    def temporary(count):
        mesh = jax.sharding.Mesh(np.array(topology_devices("v5e:2x4")[:count]), ("context",))
        sharding = NamedSharding(mesh, SHARED)
        shapes = [jax.ShapeDtypeStruct((1, 2**18, heads, 128), jnp.bfloat16, sharding=sharding) for heads in (4, 2, 2)]
        with jax.set_mesh(mesh):
            return jax.jit(dot_product_attention).lower(*shapes).compile().memory_analysis().temp_size_in_bytes

    assert temporary(8) < temporary(2) / 3
