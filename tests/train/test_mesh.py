"""Runs on meshes of the eight devices that tests have: the same numbers, each device with its part."""

import functools
import importlib.util
import json
import types

import jax
import numpy as np
import pytest
import runs
from marks import slow_but
from mixers import MIXERS

from attnlab import nn
from attnlab.errors import UserError
from attnlab.models import AxialTransformer, LanguageModel
from attnlab.train import Mesh, OptimizerOptions, train
from attnlab.train.mesh import described, placed
from attnlab.train.step import initial_state, make_optimizer, make_step, state_shapes
from kernels_pallas.aot.compile import topology_devices

MESHES = {
    "data 8": Mesh(data=8),
    "data 2 x fsdp 4": Mesh(data=2, fsdp=4),
    "data 2 x tensor 2 x context 2": Mesh(data=2, tensor=2, context=2),
}


@pytest.mark.parametrize(
    ("mesh", "sizes"),
    [
        (Mesh(), (1, 1, 1, 1)),
        (Mesh(data=-1), (8, 1, 1, 1)),
        (Mesh(fsdp=2, data=-1), (4, 2, 1, 1)),
        (Mesh(tensor=3), (1, 1, 3, 1)),
        (Mesh(tensor=8, context=-1), (1, 1, 8, 1)),
    ],
    ids=str,
)
def test_one_axis_takes_what_the_rest_leaves(mesh, sizes):
    assert tuple(mesh.sizes(8).values()) == sizes
    assert mesh.build().axis_sizes == sizes


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"data": 16}, UserError, "mesh: got data 16, and there are 8 devices; on a CPU the environment's JAX_NUM"),
        ({"fsdp": 3, "data": -1}, UserError, "mesh: got data -1 x fsdp 3, and there are 8 devices"),
        ({"tensor": 0}, ValueError, "tensor: got 0; need at least 1, or -1 for what the rest leaves"),
        ({"context": -2}, ValueError, "context: got -2"),
        ({"context": 2.0}, TypeError, "context: got 2.0; need an int"),
        ({"data": -1, "fsdp": -1}, ValueError, "fsdp: got -1; data is -1 already"),
    ],
)
def test_a_mesh_that_cannot_be_is_refused(options, error, message):
    with pytest.raises(error, match=message):
        Mesh(**options).sizes(8)


def test_runs_are_built_for_devices_that_are_described():
    mesh = Mesh(fsdp=-1, context=4)
    with described([types.SimpleNamespace(platform="tpu")] * 64):
        assert str(mesh) == "fsdp 16 x context 4"
        with pytest.raises(UserError, match=r"there are 64 devices$"):
            str(Mesh(data=128))
    assert str(mesh) == "fsdp 2 x context 4"


@pytest.mark.skipif(importlib.util.find_spec("libtpu") is None, reason="describing a TPU needs libtpu")
@pytest.mark.long
def test_axes_of_a_mesh_may_share_one_of_a_torus():
    mesh = Mesh(data=2, fsdp=8, context=8).build(topology_devices("v5p:4x4x8"))
    parts = mesh.devices.reshape(16, 8)
    assert all(len({tuple(device.coords[:2]) for device in part}) == 1 for part in parts)  # a context along one axis


def test_a_batch_is_not_cut_within_an_example():
    with pytest.raises(ValueError, match="batch_size: got 4; need a multiple of 8, data 2 x fsdp 4"):
        runs.experiment(mesh=Mesh(data=2, fsdp=4))
    with pytest.raises(ValueError, match="batch_size: got 4; need a multiple of 6, data 2 x accumulation 3"):
        runs.experiment(mesh=Mesh(data=2), accumulation=3)


def language_model(mixer="softmax", **options):
    settings = {"vocabulary": 256, "depth": 2, "features": 32, "dropout_rate": 0.1}
    return LanguageModel(mixers=[MIXERS[mixer]], **{**settings, **options})


def start(model, mesh, *, batch_size=8, learning_rate=1e-3, accumulation=1):
    """(state, step, batches) of a run that is about to begin."""
    task, key = runs.experiment().task, jax.random.key(0)
    optimizer = make_optimizer(OptimizerOptions(learning_rate=learning_rate, warmup_steps=4), 20)
    state = initial_state(model, task, batch_size, optimizer, key, mesh)
    return state, make_step(model, task, optimizer, key, mesh, accumulation), iter(task.batches("train", batch_size, 0))


# Recurrences without a norm, in which the rounding of one step grows: at 0.001, 20 of them move the losses by 1e-5 to
# 1e-2, and by a thirtieth of that where they compute in float64.
_GROWING = {"retention", "gated", "gla", "delta", "gated_delta", "memory", "memory_per_chunk"}
# The first steps alone are compared, in which the first gradients are: rounding of an MLP that learns at every token
# grows so fast that on one device, too, parameters which differ by 1e-7 move the losses of 20 such steps by 6e-3; and
# it decides between blocks that a gate scores alike.
_STEPS = {"memory": 2, "gate_block": 6}
_SEQUENCES = [name for name, row in MIXERS.items() if not row.is_grid]


@functools.cache
def losses(mixer, mesh):
    """Of 20 steps."""
    built = mesh.build()
    rate = 1e-4 if mixer in _GROWING else 1e-3
    state, step, batches = start(language_model(mixer), built, learning_rate=rate)
    sums = [0.0]
    for _ in range(20):
        state = step(state, placed(next(batches), built))
        sums.append(float(state.sums["loss"]))
    return np.diff(sums)


_ALL_AXES = "data 2 x tensor 2 x context 2"


@pytest.mark.parametrize("name", slow_but({_ALL_AXES}, MESHES))
@pytest.mark.parametrize("mixer", slow_but({"softmax"}, _SEQUENCES))
@pytest.mark.long
def test_losses_do_not_depend_on_the_mesh(mixer, name):
    first = slice(_STEPS.get(mixer))
    np.testing.assert_allclose(losses(mixer, MESHES[name])[first], losses(mixer, Mesh())[first], rtol=0, atol=1e-5)


@pytest.mark.parametrize("mesh", slow_but([Mesh(data=2)], [Mesh(), Mesh(data=2), Mesh(fsdp=2, tensor=4)]), ids=str)
@pytest.mark.long
def test_accumulated_gradients_are_those_of_the_whole_batch(mesh):
    model, mesh, found = language_model(dropout_rate=0.0, depth=1), mesh.build(), []
    for accumulation in (1, 4):
        state, step, batches = start(model, mesh, accumulation=accumulation)
        for _ in range(5):
            state = step(state, placed(next(batches), mesh))
        found.append(state)
    np.testing.assert_allclose(found[1].sums["loss"], found[0].sums["loss"], rtol=0, atol=1e-5)
    assert found[1].sums["steps"] == 5
    for x, y in zip(*(jax.tree.leaves(state.parameters) for state in found), strict=True):
        np.testing.assert_allclose(x, y, rtol=0, atol=1e-5)


@pytest.mark.parametrize("name", slow_but({_ALL_AXES}, MESHES))
@pytest.mark.long
def test_initial_values_are_those_of_one_device_bit_for_bit(name):
    model, key = language_model("parallax"), jax.random.key(3)
    task, optimizer = runs.experiment().task, make_optimizer(OptimizerOptions(), 1000)
    one, many = (initial_state(model, task, 8, optimizer, key, mesh.build()) for mesh in (Mesh(), MESHES[name]))
    for x, y in zip(jax.tree.leaves(one), jax.tree.leaves(many), strict=True):
        np.testing.assert_array_equal(x, y)


def specs(model, mesh):
    task, optimizer = runs.experiment().task, make_optimizer(OptimizerOptions(), 1000)
    state = state_shapes(model, task, 8, optimizer, mesh.build())
    return {
        jax.tree_util.keystr(path, simple=True, separator="/"): (*leaf.sharding.spec, *[None] * leaf.ndim)[: leaf.ndim]
        for path, leaf in jax.tree.leaves_with_path(state)
    }


def test_parameters_lie_where_the_rules_say_and_their_moments_beside_them():
    found = specs(language_model("softmax", max_length=64), Mesh(data=2, fsdp=2, tensor=2))
    layer = "parameters/layers/0"
    assert found["parameters/embedding"] == ("tensor", "fsdp")
    assert found["parameters/positions"] == ("fsdp", None)
    assert found[f"{layer}/mixer/query/kernel"] == ("fsdp", "tensor", None)
    assert found[f"{layer}/mixer/output/kernel"] == ("tensor", None, "fsdp")
    assert found[f"{layer}/mlp/gate/kernel"] == ("fsdp", "tensor")
    assert found[f"{layer}/mlp/down/kernel"] == ("tensor", "fsdp")
    assert found[f"{layer}/mlp_norm/scale"] == (None,)
    for path, spec in found.items():
        name = path.removeprefix("parameters")
        if name != path:
            assert found[f"optimizer/1/0/mu{name}"] == found[f"optimizer/1/0/nu{name}"] == spec


def test_an_axis_that_the_mesh_does_not_divide_stays_whole():
    found = specs(language_model("grouped", vocabulary=257), Mesh(tensor=4, fsdp=2))
    assert found["parameters/embedding"] == (None, "fsdp")
    assert found["parameters/layers/0/mixer/query/kernel"] == ("fsdp", "tensor", None)
    assert found["parameters/layers/0/mixer/key/kernel"] == ("fsdp", None, None), "two key heads"


@pytest.mark.long
def test_a_step_leaves_the_state_where_it_lay_and_no_device_holds_all_of_it():
    mesh = Mesh(fsdp=8).build()
    state, step, batches = start(language_model(), mesh)
    before = [x.sharding for x in jax.tree.leaves(state)]
    after = step(state, placed(next(batches), mesh))
    same = [x.sharding.is_equivalent_to(y, x.ndim) for x, y in zip(jax.tree.leaves(after), before, strict=True)]
    assert all(same)
    sizes = [(x.addressable_shards[0].data.size, x.size) for x in jax.tree.leaves(after.parameters) if x.ndim > 1]
    assert all(8 * part == whole for part, whole in sizes)


@pytest.mark.slow
def test_gradients_are_all_that_devices_exchange_over_data():
    mesh = Mesh(data=8).build()
    state, step, batches = start(language_model(), mesh)
    text = step.lower(state, placed(next(batches), mesh)).compile().as_text()
    assert "all-reduce" in text
    assert not any(name in text for name in ("all-gather", "all-to-all", "collective-permute"))


def experiment(mesh):
    return runs.experiment(batch_size=8, mesh=mesh)


@pytest.mark.slow
def test_a_run_continues_over_another_mesh(tmp_path, capfd, monkeypatch):
    """To rounding; and its folder says once that the numbers may differ."""
    whole = train(experiment(Mesh()), workdir=tmp_path / "whole")
    placing, left = train.__globals__["placed"], iter(range(20))
    monkeypatch.setitem(train.__globals__, "placed", lambda *batch: (next(left), placing(*batch))[1])
    with pytest.raises(StopIteration):
        train(experiment(Mesh(data=4)), workdir=tmp_path / "cut", fingerprint={"Mesh.data": "4", "a": "1"})
    monkeypatch.undo()
    options = {"train/Mesh.data": "2", "Mesh.fsdp": "4", "a": "1", "Experiment.mesh": "@Mesh()"}
    rest = train(experiment(Mesh(data=2, fsdp=4)), workdir=tmp_path / "cut", fingerprint=options)
    assert "was started with mesh data 4, now data 2 x fsdp 4; its numbers may differ" in capfd.readouterr().err
    assert json.loads((tmp_path / "cut" / "run.json").read_text())["mesh"] == "data 4"
    for one, other in zip(rest.history, whole.history, strict=True):
        np.testing.assert_allclose(one["loss"], other["loss"], rtol=0, atol=1e-5)


@pytest.mark.slow
def test_models_of_images_take_a_mesh():
    """Rows of the image over context."""
    model = AxialTransformer(image_size=(8, 4, 3), levels=4, features=16)
    values = nn.initialize(model, jax.random.key(0))
    images = np.random.default_rng(0).integers(0, 4, (2, 8, 4, 3))
    call = jax.jit(lambda values, images: nn.bind(model, values)(images, key=None))
    expected = call(values, images)
    with jax.set_mesh(Mesh(data=2, context=4).build()):
        out = call(values, images)
    np.testing.assert_allclose(out, expected, rtol=0, atol=1e-5)
    assert tuple(out.sharding.spec[:2]) == ("data", "context")
