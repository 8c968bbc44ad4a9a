"""A step compiled for TPUs that are not there: what is counted of it, and what the command makes of that."""

import dataclasses
import functools
import importlib.util
import json

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import PartitionSpec as P

from attnlab import cli, data, nn
from attnlab.ablate import compiled
from attnlab.attention import local_attention
from attnlab.errors import UserError
from attnlab.models import LanguageModel
from attnlab.train import Experiment, LanguageTask, Mesh, OptimizerOptions
from attnlab.train.compile import CompiledStep, chips, compile_step, described_devices
from attnlab.train.compile.flops import product_flops
from attnlab.train.compile.program import Collective, traffic
from attnlab.train.mesh import described
from attnlab.train.step import batch_shapes, make_optimizer, make_step, state_shapes

needs_libtpu = pytest.mark.skipif(
    importlib.util.find_spec("libtpu") is None, reason="compiling for a TPU needs libtpu (the extra tpu-aot)"
)


# --- FLOPs of the traced program --------------------------------------------------------------------------------------


TWO_BY_TWO = Mesh(data=2, fsdp=2)


def traced_flops(depth, *, mesh=TWO_BY_TWO, length=256, **options):
    """Of a training step on all devices, and of the model's forward pass, as it counts itself."""
    mixers = [functools.partial(nn.LocalAttention, window=64, num_heads=4)]
    given = {"vocabulary": 64, "mixers": mixers, "depth": depth, "features": 256, "dtype": jnp.bfloat16, **options}
    model, task = LanguageModel(**given), LanguageTask(data.random_tokens(64, 4096), sequence_length=length)
    optimizer, devices = make_optimizer(OptimizerOptions(), 1000), mesh.build()
    step = make_step(model, task, optimizer, jax.random.key(0), devices)
    traced = step.trace(state_shapes(model, task, 8, optimizer, devices), batch_shapes(task, 8, devices))
    return product_flops(traced, devices.size) * devices.size, 8 * model.flops(length)


@pytest.mark.parametrize(("remat", "passes"), [(False, 3), (True, 4)])
@pytest.mark.long
def test_flops_grow_with_depth_as_the_models_own_count_does(remat, passes):
    """A backward pass is twice the forward, which remat takes once more; kernels compute logits again, and whole tiles
    where the model counts the window's pairs, a quarter of them here."""
    shallow, deep, deeper = (traced_flops(depth, remat=remat, scan_layers=True) for depth in (2, 4, 6))
    assert deeper[0] - deep[0] == deep[0] - shallow[0]
    assert 1 <= (deep[0] - shallow[0]) / (passes * (deep[1] - shallow[1])) < 1.25


@pytest.mark.long
def test_flops_of_a_loop_over_layers_are_those_of_the_layers():
    assert traced_flops(4, scan_layers=True) == traced_flops(4)


@pytest.mark.long
def test_flops_do_not_depend_on_the_axis_that_shares_examples():
    assert traced_flops(2) == traced_flops(2, mesh=Mesh(data=4)) == traced_flops(2, mesh=Mesh(data=2, tensor=2))


def flops(function, *shapes, devices=1, **options):
    return product_flops(jax.jit(function).trace(*shapes), devices, **options)


X = jax.ShapeDtypeStruct((8, 16, 4, 32), jnp.float32)
MATRIX = jax.ShapeDtypeStruct((8, 8), jnp.float32)
PRODUCT = 2 * 8**3


def shared(function, **options):
    """On a part of the rows per device of a mesh of four."""
    mesh = Mesh(data=4).build()
    return jax.shard_map(function, mesh=mesh, in_specs=P("data"), out_specs=P("data"), **options)


def early(x):
    return jax.lax.while_loop(lambda c: (c[0] < 6) & (c[1][0, 0] < 2.5), lambda c: (c[0] + 1, c[1] @ x), (0, x))[1]


def recomputed(x):
    return jnp.sum(jax.checkpoint(lambda x: jnp.sin(x @ x))(x))


def grouped(x):
    layout = ("NWC", "OIW", "NWC")
    return jax.lax.conv_general_dilated(x[None], x[:, :2, None], (1,), "SAME", None, None, layout, 4)


COUNTED = {
    "a product": (lambda x: x @ x, PRODUCT),
    "a scan": (lambda x: jax.lax.scan(lambda y, _: (y @ x, None), x, length=5)[0], 5 * PRODUCT),
    "a loop that may end early": (early, 6 * PRODUCT),
    "the costliest branch": (
        lambda x: jax.lax.switch(jnp.int32(x[0, 0]), [lambda x: x, lambda x: x @ x @ x, lambda x: x @ x], x),
        2 * PRODUCT,
    ),
    "a gradient of what is recomputed": (jax.grad(recomputed), 4 * PRODUCT),
    "a convolution of 4 groups": (grouped, 2 * 8 * 8 * 2),
}


@pytest.mark.parametrize("case", COUNTED)
def test_flops_of(case):
    function, expected = COUNTED[case]
    assert flops(function, MATRIX) == expected


def test_flops_inside_shard_map_are_those_of_a_device():
    assert flops(shared(lambda x: x @ x.T), MATRIX, devices=4) == 2 * 2 * 8 * 2
    assert flops(lambda x: x @ x, MATRIX, devices=4) == PRODUCT / 4


def test_a_kernel_counts_by_its_estimate_on_its_platform():
    attend = functools.partial(local_attention, window=4, is_causal=True)
    assert flops(attend, X, X, X) != flops(attend, X, X, X, platform="cpu") > 0


# --- Traffic of the compiled program ----------------------------------------------------------------------------------

MESH = {"data": 2, "fsdp": 4}
LOOP = """
%body (c: (s32[], f32[8,64], f32[3,8,64])) -> (s32[], f32[8,64], f32[3,8,64]) {
  %c = (s32[]{:T(128)}, f32[8,64]{1,0:T(8,128)}, f32[3,8,64]{2,1,0:T(8,128)}) parameter(0)
  %i = s32[]{:T(128)} get-tuple-element(%c), index=0
  %one = s32[] constant(1)
  %next = s32[]{:T(128)} add(%i, %one)
  %x = f32[8,64]{1,0:T(8,128)} get-tuple-element(%c), index=1
  %layers = f32[3,8,64]{2,1,0:T(8,128)} get-tuple-element(%c), index=2
  %y = f32[8,64]{1,0:T(8,128)} fusion(%x, %layers, %i), kind=kLoop, calls=%sliced
  ROOT %r = (s32[]{:T(128)}, f32[8,64]{1,0:T(8,128)}, f32[3,8,64]{2,1,0:T(8,128)}) tuple(%next, %y, %layers)
}

%sliced (a: f32[8,64], b: f32[3,8,64], i: s32[]) -> f32[8,64] {
  %a = f32[8,64]{1,0} parameter(0)
  %b = f32[3,8,64]{2,1,0} parameter(1)
  %i.1 = s32[] parameter(2)
  %zero = s32[] constant(0)
  %slice = f32[1,8,64]{2,1,0} dynamic-slice(%b, %i.1, %zero, %zero), dynamic_slice_sizes={1,8,64}
  %flat = f32[8,64]{1,0} bitcast(%slice)
  ROOT %sum = f32[8,64]{1,0} add(%a, %flat)
}

%until (c.1: (s32[], f32[8,64], f32[3,8,64])) -> pred[] {
  %c.1 = (s32[]{:T(128)}, f32[8,64]{1,0:T(8,128)}, f32[3,8,64]{2,1,0:T(8,128)}) parameter(0)
  %i.2 = s32[]{:T(128)} get-tuple-element(%c.1), index=0
  %last = s32[]{:T(128)} constant(3)
  ROOT %less = pred[]{:T(512)} compare(%i.2, %last), direction=LT
}

ENTRY %main (p: f32[8,64], q: f32[3,8,64]) -> f32[8,64] {
  %p = f32[8,64]{1,0:T(8,128)} parameter(0)
  %q = f32[3,8,64]{2,1,0:T(8,128)} parameter(1)
  %start = s32[]{:T(128)} constant(0)
  %t = (s32[]{:T(128)}, f32[8,64]{1,0:T(8,128)}, f32[3,8,64]{2,1,0:T(8,128)}) tuple(%start, %p, %q)
  %w = (s32[]{:T(128)}, f32[8,64]{1,0:T(8,128)}, f32[3,8,64]{2,1,0:T(8,128)}) while(%t), condition=%until, body=%body
  ROOT %out = f32[8,64]{1,0:T(8,128)} get-tuple-element(%w), index=1
}
"""
ARRAY, COUNTER = 4 * 8 * 64, 4 * 4  # the counter is read by the fusion, and counted up


def test_a_loop_counts_by_its_trips_and_a_slice_by_its_size():
    found = traffic(LOOP, MESH)
    assert found.unknown_loops == 0
    assert found.hbm == 3 * (3 * ARRAY + COUNTER)  # per trip: x and a layer read, y written


def test_a_loop_whose_end_is_not_a_number_counts_once_and_is_told():
    unknown = LOOP.replace("constant(3)", "get-tuple-element(%c.1), index=1")
    found = traffic(unknown, MESH)
    assert (found.unknown_loops, found.hbm) == (1, 3 * ARRAY + COUNTER)


def test_what_lies_in_vmem_takes_nothing_of_hbm():
    found = traffic(LOOP.replace("%x = f32[8,64]{1,0:T(8,128)}", "%x = f32[8,64]{1,0:T(8,128)S(1)}"), MESH)
    assert found.hbm == 3 * (2 * ARRAY + COUNTER)


def program(*lines):
    inside = "".join(f"  {line}\n" for line in lines)
    return f"ENTRY %main (p: f32[8,64]) -> f32[8,64] {{\n  %p = f32[8,64]{{1,0:T(8,128)}} parameter(0)\n{inside}}}\n"


# As XLA writes it: the collective, its kind, over which axes, the bytes that a device sends of an array of 2048.
COLLECTIVES = {
    "listed groups": (
        "%g = f32[32,64]{1,0} all-gather(%p), channel_id=1, replica_groups={{0,1,2,3},{4,5,6,7}}, dimensions={0}",
        ("all-gather", ("fsdp",), 3 * ARRAY),
    ),
    "counted groups": (
        "%g = f32[8,64]{1,0} all-reduce(%p), channel_id=1, replica_groups=[4,2]<=[2,4]T(1,0), to_apply=%add",
        ("all-reduce", ("data",), ARRAY),
    ),
    "groups of a mesh": (
        "%g = f32[8,64]{1,0} all-to-all(%p), channel_id=1, replica_groups=mesh['a'=2,'b'=4] {'b'}, dimensions={0}",
        ("all-to-all", ("fsdp",), 3 * ARRAY / 4),
    ),
    "a mesh of other order": (
        "%g = f32[2,64]{1,0} reduce-scatter(%p), channel_id=1, "
        "replica_groups=mesh['a'=4,'b'=2], device_ids=([2,4]T(1,0)) {'b'}, dimensions={0}",
        ("reduce-scatter", ("data",), ARRAY / 2),
    ),
    "all devices": (
        "%g = f32[8,64]{1,0} all-reduce(%p), channel_id=1, replica_groups=mesh['a'=2,'b'=4] {'a','b'}, to_apply=%add",
        ("all-reduce", ("data", "fsdp"), 7 * ARRAY / 4),
    ),
    "a start": (
        "%g = (f32[8,64]{1,0}, f32[8,64]{1,0}, u32[]{:S(2)}) collective-permute-start(%p), channel_id=1, "
        "source_target_pairs={{0,1},{1,2},{2,3}}",
        ("collective-permute", ("fsdp",), ARRAY),
    ),
}


@pytest.mark.parametrize("case", COLLECTIVES)
def test_collectives_are_told_by_kind_and_axes(case):
    line, (kind, axes, sent) = COLLECTIVES[case]
    found = traffic(program(line), MESH)
    assert found.times == {Collective(kind, axes): 1}
    assert found.sent == {Collective(kind, axes): sent}


FUSED = """
%NAME (i: f32[8,64]) -> f32[8,64] {
  %i = f32[8,64]{1,0} parameter(0)
  ROOT %r.NAME = f32[8,64]{1,0} all-reduce(%i), channel_id=1, replica_groups={{0,1,2,3},{4,5,6,7}}, EXTRA
}
"""


def test_an_all_reduce_in_a_scatter_fusion_is_a_reduce_scatter():
    fused = FUSED.replace("NAME", "all-reduce-scatter.1").replace("EXTRA", "to_apply=%add")
    called = "%f = f32[2,64]{1,0} fusion(%p), kind=kCustom, calls=%all-reduce-scatter.1"
    assert traffic(fused + program(called), MESH).sent == {Collective("reduce-scatter", ("fsdp",)): 3 * ARRAY / 4}


def test_pieces_of_one_collective_count_once():
    pieces = [FUSED.replace("NAME", name).replace("EXTRA", 'frontend_attributes={chain_id="4"}') for name in "abc"]
    calls = [f"%f.{name} = f32[8,64]{{1,0}} fusion(%p), kind=kCustom, calls=%{name}" for name in "abc"]
    assert list(traffic("".join(pieces) + program(*calls), MESH).times.values()) == [1]


# --- The step ---------------------------------------------------------------------------------------------------------


def experiment(devices, **options):
    with described(devices):
        model = LanguageModel(
            vocabulary=256,
            mixers=[functools.partial(nn.LocalAttention, window=64)],
            depth=4,
            features=128,
            scan_layers=True,
            dtype=jnp.bfloat16,
        )
        task = LanguageTask(data.random_tokens(256, 4096), sequence_length=256)
        given = {"steps": 1000, "batch_size": 8, "mesh": Mesh(data=2, fsdp=-1), **options}
        return Experiment(model, task, **given)


@needs_libtpu
@pytest.mark.long
def test_a_step_for_chips_that_are_not_there():
    devices = described_devices("v5e:2x2")
    step = compile_step(experiment(devices), "v5e:2x2", devices)
    assert step.fits
    assert step.mesh == {"data": 2, "fsdp": 2, "tensor": 1, "context": 1}
    assert step.memory["arguments"] > 12 * step.parameters / 2  # parameters and moments, of which a device has half
    assert step.unknown_loops == 0
    assert "banded_flash_attention" in step.kernels
    assert set(step.kernels.values()) == {4}  # one per layer
    sent = {(each["kind"], *each["axes"]): each for each in step.collectives}
    assert sent["all-gather", "fsdp"]["times"] >= 4 * 7  # each layer's matrices
    assert sum(each["times"] for each in step.collectives if "data" in each["axes"]) >= 4  # each layer's gradients
    assert step.model_flops < step.flops < 2 * step.model_flops
    assert not dataclasses.replace(step, hbm=1e6).fits
    assert "does not fit" in str(dataclasses.replace(step, hbm=1e6))


@needs_libtpu
def test_a_mesh_over_some_of_the_devices_is_refused():
    devices = described_devices("v5e:2x2")
    with pytest.raises(UserError, match="mesh: got 2 devices; need all 4 of v5e:2x2"):
        compile_step(experiment(devices, mesh=Mesh(data=2)), "v5e:2x2", devices)


# --- The command ------------------------------------------------------------------------------------------------------

SWEEP = "experiments/sweeps/pods_8k.gin"
STEP = CompiledStep(
    topology="v5e:2x2",
    devices=4,
    mesh={"data": 2, "fsdp": 2, "tensor": 1, "context": 1},
    parameters=10**6,
    batch_size=8,
    units=128,
    unit="token",
    hbm=16 * 2**30,
    memory={"arguments": 2**30, "temporaries": 2**31, "code": 2**20},
    flops=4e9,
    model_flops=2.4e9,
    hbm_bytes=1e9,
    collectives=[{"kind": "all-gather", "axes": ["fsdp"], "times": 4, "bytes": 1e6}],
    kernels={"banded_flash_attention": 8},
    seconds={"compute": 0.2, "HBM": 0.1, "interconnect": 0.1},
    cpu_seconds=12.0,
    versions={"jax": "1", "libtpu": "2"},
)
ALONE = ["compile", "experiments/pods/lm_125m_8k.gin", "--topology", "v5e:2x2", "--gin.Mesh.fsdp=2"]


@pytest.mark.parametrize(
    ("step", "status", "said"),
    [
        (STEP, 0, "3.00 of 16.00 GiB (arguments 1.00, temporaries 2.00, code 0.00)"),
        (dataclasses.replace(STEP, hbm=2**30), 1, "does not fit"),
        (dataclasses.replace(STEP, memory=None, refusal="Ran out of memory"), 1, "does not fit: Ran out of memory"),
    ],
)
@needs_libtpu
def test_the_status_says_whether_it_fits(step, status, said, monkeypatch, capsys):
    monkeypatch.setattr("attnlab.train.compile.compile_step", lambda *_: step)
    assert cli.main(ALONE) == status
    assert said in capsys.readouterr().out


def test_the_roofline_has_both_ends():
    assert "200.0 ms if they all overlap and 400.0 ms if nothing does; the model's FLOPs are 60% to 30%" in str(STEP)


@needs_libtpu
@pytest.mark.parametrize("name", ["", "v5p:4x4", "v5e:0x2", "v5e:2x2x2", "v5e:64x64", "v5e:3x5", "h100:8", "v5e:"])
def test_a_topology_that_is_none_is_one_line(name, capsys):
    assert cli.main([*ALONE[:3], name]) == 2
    assert capsys.readouterr().err.strip().splitlines()[-1].startswith(f"attnlab: topology: got {name!r}")


@needs_libtpu
def test_a_generation_alone_is_its_smallest_topology():
    assert len(described_devices("v5p")) == len(described_devices("v5p:2x2x1"))


@pytest.fixture
def compilations(monkeypatch):
    """The configs that were compiled, without compiling them."""
    seen = []

    def compiled_apart(text, topology, effort):
        seen.append(text)
        return {"error": "", **dataclasses.asdict(STEP), "topology": topology, "effort": effort}

    monkeypatch.setattr(compiled, "_compiled_apart", compiled_apart)
    return seen


@needs_libtpu
@pytest.mark.long
def test_a_sweep_is_compiled_row_by_row_and_continues(tmp_path, compilations, monkeypatch):
    sweep = ["compile", SWEEP, "--topology", "v5e:2x2", "--workdir", str(tmp_path), "--gin.Mesh.fsdp=2"]
    arms = "--gin.Ablation.arms={'softmax': 'experiments/mixers/softmax.gin', 'local': 'experiments/mixers/local.gin'}"
    more = arms.replace("}", ", 'linear': 'experiments/mixers/linear.gin'}")
    small = ["--gin.LanguageModel.depth=1", "--gin.LanguageModel.features=64", "--gin.LanguageTask.sequence_length=64"]
    assert cli.main([*sweep, *small, arms]) == 0
    assert len(compilations) == 2
    assert cli.main([*sweep, *small, more]) == 0
    assert len(compilations) == 3
    assert cli.main([*sweep, *small, more, "--gin.Mesh.fsdp=1", "--gin.Mesh.data=4"]) == 0
    assert len(compilations) == 6  # another mesh is another program
    rows = [json.loads(line) for line in (tmp_path / "compiled.jsonl").read_text().splitlines()]
    assert [row["arm"] for row in rows] == ["softmax", "local", "linear"]
    assert (tmp_path / "compiled.md").read_text().count("\n") == 2 + 3
    assert {row["effort"] for row in rows} == {"O0"}
    monkeypatch.setenv("JAX_OPTIMIZATION_LEVEL", "O2")
    assert cli.main([*sweep, *small, arms]) == 0
    assert len(compilations) == 8


@needs_libtpu
@pytest.mark.parametrize("text", ["no JSON", "[1]", '{"arm": "softmax"}', "7"])
def test_a_folder_of_something_else_is_refused(text, tmp_path, compilations, capsys):
    (tmp_path / "compiled.jsonl").write_text(text + "\n")
    small = ["--gin.LanguageModel.depth=1", "--gin.LanguageModel.features=64", "--gin.LanguageTask.sequence_length=64"]
    arms = "--gin.Ablation.arms={'softmax': 'experiments/mixers/softmax.gin'}"
    sweep = ["compile", SWEEP, "--topology", "v5e:2x2", "--workdir", str(tmp_path), "--gin.Mesh.fsdp=2"]
    assert cli.main([*sweep, arms, *small]) == 2
    assert "attnlab: workdir: " in capsys.readouterr().err
    assert (tmp_path / "compiled.jsonl").read_text() == text + "\n"


@needs_libtpu
def test_an_arm_that_cannot_be_compiled_leaves_its_line_and_the_others_continue(tmp_path, monkeypatch, capsys):
    def refused(text, topology, effort):
        return {"error": "NotImplementedError: no such thing"} if "window" in text else dataclasses.asdict(STEP)

    monkeypatch.setattr(compiled, "_compiled_apart", refused)
    arms = "--gin.Ablation.arms={'local': 'experiments/mixers/local.gin', 'softmax': 'experiments/mixers/softmax.gin'}"
    small = ["--gin.LanguageModel.depth=1", "--gin.LanguageModel.features=64", "--gin.LanguageTask.sequence_length=64"]
    sweep = ["compile", SWEEP, "--topology", "v5e:2x2", "--workdir", str(tmp_path), "--gin.Mesh.fsdp=2"]
    assert cli.main([*sweep, arms, *small]) == 1
    assert "local: NotImplementedError: no such thing" in capsys.readouterr().out
    assert "| softmax | v5e:2x2 |" in (tmp_path / "compiled.md").read_text()


@needs_libtpu
@pytest.mark.slow
def test_rows_are_compiled_in_processes_of_their_own(tmp_path):
    arms = "--gin.Ablation.arms={'local': 'experiments/mixers/local.gin'}"
    small = ["LanguageModel.depth=2", "LanguageModel.features=128", "LanguageTask.sequence_length=128", "HEADS=2"]
    sweep = ["compile", SWEEP, "--topology", "v5e:2x2", "--workdir", str(tmp_path), "--gin.Mesh.fsdp=2", arms]
    given = [*sweep, *(f"--gin.{each}" for each in small), "--gin.Ablation.baseline=local"]
    assert cli.main(given) == 0
    [row] = [json.loads(line) for line in (tmp_path / "compiled.jsonl").read_text().splitlines()]
    assert row["error"] == ""
    assert compiled.step_of(row).fits
    assert compiled.step_of(row).cpu_seconds > 0
    assert compiled.step_of(row).effort == "O0"


@needs_libtpu
@pytest.mark.slow
def test_what_the_compiler_finds_too_large_does_not_fit(monkeypatch):
    devices = described_devices("v5e:2x2")
    step = compile_step(experiment(devices, batch_size=2**16), "v5e:2x2", devices)
    assert step.memory is None
    assert not step.fits
    assert "memory" in step.refusal


def test_chips_are_those_that_kernels_are_compiled_for():
    assert list(chips.CHIPS) == list(chips.TOPOLOGIES)


def test_peaks_are_known_by_the_kind_of_the_device():
    assert chips.peak_flops("TPU v5") == chips.CHIPS["v5p"].flops
    assert chips.peak_flops("NVIDIA H100 80GB HBM3") == 989e12
    assert chips.peak_flops("cpu") is None
