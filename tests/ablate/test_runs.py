"""The arms of a sweep: alike in all but what the arm sets; a failing arm does not take the others with it."""

import json
import math
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from importlib import metadata
from pathlib import Path

import jax
import numpy as np
import pytest
import tiny_sweep
from marks import DEEP, short, slow_but

import attnlab
from attnlab import cli, config, nn
from attnlab.ablate import cache, read_rows, run_ablation, runs, write_report
from attnlab.ablate.plan import Plan
from attnlab.errors import OwnedError, RunError, UserError
from attnlab.train import claims
from attnlab.train import mesh as runs_of_training

SWEEP = "experiments/sweeps/quickstart.gin"
ONE_SEED = "ablate.Ablation.seeds = [0]"
_ON_TWO = ("train.Experiment.mesh = @train.Mesh()", "train.Mesh.data = 2")


@pytest.fixture(scope="module")
def arms():
    variants = config.build([SWEEP], root="Ablation").value.variants()
    return {
        arm: config.build([SWEEP, *sources], ["Experiment.seed=1"], root="Experiment")
        for arm, sources in variants.items()
    }


def leaves(parameters):
    return {jax.tree_util.keystr(path): leaf for path, leaf in jax.tree.leaves_with_path(parameters)}


def test_arms_start_from_the_same_bits_where_they_share_a_parameter(arms):
    drawn = {arm: leaves(nn.initialize(built.value.model, jax.random.key(1))) for arm, built in arms.items()}
    assert drawn["softmax"].keys() == drawn["local"].keys()
    assert drawn["softmax"].keys() < drawn["gated_linear"].keys()
    for path, values in drawn["softmax"].items():
        np.testing.assert_array_equal(values, drawn["local"][path])
        np.testing.assert_array_equal(values, drawn["gated_linear"][path])


def test_arms_see_the_same_batches_in_the_same_order(arms):
    experiments = [built.value for built in arms.values()]
    streams = [iter(e.task.batches("train", e.batch_size, e.seed)) for e in experiments]
    for _ in range(4):
        first, *others = (next(stream)["tokens"] for stream in streams)
        for other in others:
            np.testing.assert_array_equal(first, other)


def test_arms_differ_in_nothing_but_the_mixer(arms):
    def shared(values):
        mixers = ("SoftmaxAttention.", "LocalAttention.", "LinearAttention.", "MIXERS", "WINDOW")
        return {name: value for name, value in values.items() if not name.startswith(mixers)}

    first, *others = (shared(built.values) for built in arms.values())
    assert len(first) > 20
    assert all(other == first for other in others)


@pytest.mark.slow
def test_runs_train_at_once_each_on_devices_of_its_own(tmp_path, monkeypatch):
    """And give the rows of the report that they give one after the other."""
    meshes, build = [], runs_of_training.Mesh.build
    monkeypatch.setattr(runs_of_training.Mesh, "build", lambda *given: meshes.append(build(*given)) or meshes[-1])
    rows = {}
    for devices in (None, 4):
        file = tiny_sweep.write(tmp_path, f"ablate.Ablation.devices_per_run = {devices}", *_ON_TWO)
        rows[devices] = run_ablation(file, [], tmp_path / str(devices), report=lambda line: None)
        used = {tuple(device.id for device in mesh.devices.flat) for mesh in meshes} - {(0,)}  # what is drawn after
        assert used == ({(0, 1)} if devices is None else {(0, 1), (4, 5)})
        meshes.clear()
    measured = ("seconds", "compile_seconds", "items_per_second", "history", "config", "folder", "attending")
    for one, other in zip(rows[None], rows[4], strict=True):
        assert one["environment"].pop("device").startswith("8 x")
        assert other["environment"].pop("device").startswith("4 x")
        for row in (one, other):
            for name in measured:
                row.pop(name, None)
        assert one == other


@pytest.mark.long
def test_each_run_has_devices_of_its_own(tmp_path, monkeypatch):
    seen = {}

    def note(experiment, **options):
        seen[options["workdir"].name] = tuple(device.id for device in runs_of_training.devices_of_runs())
        return tiny_sweep.pretend_train(experiment, **options)

    monkeypatch.setattr(runs, "train", note)
    rows = run_ablation(tiny_sweep.write(tmp_path, "ablate.Ablation.devices_per_run = 3"), [], tmp_path / "sweep")
    assert len(seen) == len(rows) == 4
    assert set(seen.values()) == {(0, 1, 2), (3, 4, 5)}
    assert all(row["environment"]["device"].startswith("3 x") for row in rows)


def test_more_devices_than_there_are_and_none_are_refused(tmp_path):
    for given, message in ((9, "devices_per_run: got 9, and there are 8 devices"), (0, "devices_per_run: got 0")):
        with pytest.raises(UserError, match=message):
            Plan(tiny_sweep.write(tmp_path, f"ablate.Ablation.devices_per_run = {given}"), [])


@pytest.mark.long
def test_an_arm_that_fails_leaves_the_others_and_the_report(tmp_path, capsys):
    sweep = tmp_path / "sweep.gin"
    sweep.write_text(
        f"""# One arm whose loss is not a number.
from __gin__ import dynamic_registration
from attnlab import ablate
from attnlab import models
from attnlab import train
include '{SWEEP}'
ablate.Ablation.arms = {{
    'softmax': 'experiments/mixers/softmax.gin',
    'wild': ['train.OptimizerOptions.learning_rate = 1e30', 'train.OptimizerOptions.clip_norm = 1e30'],
}}
ablate.Ablation.seeds = [0]
STEPS = 6
models.LanguageModel.features = 16
models.LanguageModel.depth = 1
train.OptimizerOptions.warmup_steps = 2
train.Experiment.batch_size = 2
train.Experiment.evaluation_batches = 1
train.LanguageTask.sequence_length = 32
"""
    )
    assert cli.main(["ablate", str(sweep), "--workdir", str(tmp_path / "out")]) == 1
    rows = [json.loads(line) for line in (tmp_path / "out" / "results.jsonl").read_text().splitlines()]
    assert {row["arm"]: row["status"] for row in rows} == {"softmax": "finished", "wild": "failed"}
    assert "loss is nan at step" in rows[1]["error"]
    page = (tmp_path / "out" / "report.html").read_text()
    assert "wild, seed 0, failed: loss is nan" in page
    assert "| wild | failed |" in (tmp_path / "out" / "results.md").read_text()
    assert "wild-seed0 failed" in capsys.readouterr().out


def run(folder, *bindings, workdir="out", **options):
    return run_ablation(tiny_sweep.write(folder, *bindings), [], folder / workdir, report=lambda line: None, **options)


@pytest.mark.long
def test_a_renamed_arm_and_another_sweep_share_runs_and_rows_say_the_same(pretended, tmp_path):
    first = run(tmp_path, runs=tmp_path / "shared")
    renamed = [
        "ablate.Ablation.arms = {'dense': 'experiments/mixers/softmax.gin', 'new': 'experiments/mixers/linear.gin'}",
        "ablate.Ablation.baseline = 'dense'",
    ]
    second = run(tmp_path, *renamed, workdir="other", runs=tmp_path / "shared")
    trained = tiny_sweep.trained(tmp_path / "shared")
    assert [name.rpartition("-")[0] for name in trained] == [
        *("softmax-seed0", "local-seed0", "softmax-seed1", "local-seed1"),
        *("new-seed0", "new-seed1"),
    ]
    assert [row["arm"] for row in second] == ["dense", "new", "dense", "new"]
    for there, here in ((0, 0), (2, 2)):
        for fact in ("seed", "run", "config", "final", "code", "environment", "implementations"):
            assert first[there][fact] == second[here][fact]


def test_two_arms_with_one_config_are_trained_once(pretended, tmp_path):
    arms = "{'softmax': 'experiments/mixers/softmax.gin', 'twin': ['experiments/mixers/softmax.gin', 'PAIRS = 2']}"
    rows = run(tmp_path, f"ablate.Ablation.arms = {arms}")
    assert len(rows) == 4
    assert len(tiny_sweep.trained(tmp_path / "out" / "runs")) == 2


@pytest.mark.long
def test_other_code_trains_anew_beside_the_old_runs(pretended, tmp_path, monkeypatch):
    old = run(tmp_path, ONE_SEED)
    kept = {path: path.stat().st_mtime_ns for path in (tmp_path / "out" / "runs").glob("*/result.json")}
    monkeypatch.setattr(cache, "code_version", lambda modules: "edited")
    new = run(tmp_path, ONE_SEED)
    assert {row["code"] for row in new} == {"edited"}
    assert not {row["run"] for row in new} & {row["run"] for row in old}
    assert len(tiny_sweep.trained(tmp_path / "out" / "runs")) == 4
    assert {path: path.stat().st_mtime_ns for path in kept} == kept


MODULES = ("attnlab.nn.mixers.softmax", "attnlab.train.loop")


def version(*modules):
    cache.code_version.cache_clear()
    return cache.code_version(modules)


@pytest.fixture
def copied(tmp_path, monkeypatch):
    """A copy of attnlab and kernels_pallas that code versions are of, to be edited."""
    root = Path(attnlab.__file__).parents[1]
    for package in ("attnlab", "kernels_pallas"):
        shutil.copytree(root / package, tmp_path / package, ignore=shutil.ignore_patterns("__pycache__"))
    path_of = cache._path

    def path_in_copy(name):
        path = path_of(name)
        if name.partition(".")[0] not in ("attnlab", "kernels_pallas"):
            return path
        module = tmp_path.joinpath(*name.split("."))
        return next((file for file in (module / "__init__.py", module.with_suffix(".py")) if file.is_file()), None)

    monkeypatch.setattr(cache, "_path", path_in_copy)
    yield tmp_path
    cache.code_version.cache_clear()


def append(file, text):
    file.write_text(f"{file.read_text()}\n{text}\n")


@pytest.mark.parametrize(
    "file",
    [
        "attnlab/nn/mixers/softmax.py",
        "attnlab/nn/layers.py",
        "attnlab/attention/masks.py",
        "attnlab/models/lm.py",
        "attnlab/data/text.py",
        "attnlab/train/step.py",
        "attnlab/train/tasks/base.py",
        "kernels_pallas/tpu/banded_flash_backward.py",  # which a function of attention imports
        "kernels_pallas/gpu/common.py",
    ],
)
def test_code_version_follows_an_edit_of_what_a_run_executes(copied, file):
    before = version(*MODULES)
    assert version(*MODULES) == before
    append(copied / file, "A = 1")
    assert version(*MODULES) != before


def test_code_version_stays_with_edits_of_what_no_run_executes(copied):
    before = version(*MODULES)
    for file in ("cli.py", "config.py", "show.py", "bench/lengths.py", "ablate/report.py", "ablate/runs.py"):
        append(copied / "attnlab" / file, "A = 1")
    assert version(*MODULES) == before


def test_a_package_that_is_added_counts_once_it_is_imported(copied):
    before = version(*MODULES)
    added = copied / "attnlab" / "added"
    added.mkdir()
    (added / "__init__.py").write_text("")
    (added / "deep.py").write_text("A = 1")
    assert version(*MODULES) == before
    append(copied / "attnlab" / "nn" / "layers.py", "def later():\n    from attnlab.added import deep")
    imported = version(*MODULES)
    append(added / "deep.py", "A = 2")
    assert len({before, imported, version(*MODULES)}) == 3


def test_code_version_follows_ones_own_modules_and_what_lies_beside_them(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(tmp_path)
    package = tmp_path / "own_package"
    package.mkdir()
    (package / "__init__.py").write_text("from . import inner\nimport numpy, json")
    (package / "inner.py").write_text("from ..nothing import at_all\n")
    (tmp_path / "own_module.py").write_text("def late():\n    import own_package\n")
    (tmp_path / "beside.py").write_text("A = 1")
    assert set(cache.reached(["own_module"])) == {"own_module", "own_package", "own_package.inner"}
    versions = {version(*MODULES), version(*MODULES, "own_module")}
    append(tmp_path / "beside.py", "A = 2")
    assert version(*MODULES, "own_module") in versions
    append(package / "inner.py", "A = 2")
    versions.add(version(*MODULES, "own_module"))
    append(tmp_path / "own_module.py", "A = 2")
    versions.add(version(*MODULES, "own_module"))
    assert len(versions) == 4
    assert "own_package" not in sys.modules


def test_versions_are_those_of_what_is_imported(tmp_path, monkeypatch):
    """No list of packages has to be kept for a run's numbers to follow a new version of one."""
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "own_module.py").write_text("def late():\n    import scipy.linalg, json\n")
    own = cache.versions(cache.reached(["own_module"]))
    assert own == {name: metadata.version(name) for name in ("jaxlib", "scipy")}
    of_model = cache.versions(cache.reached(MODULES))
    assert {"jax", "jaxlib", "flax", "numpy", "einops"} <= set(of_model)
    assert not {"matplotlib-inline", "pytest", "gin-config"} & set(of_model)


@pytest.mark.long
def test_a_rate_is_chosen_for_each_arm_and_no_run_is_trained_twice(pretended, tmp_path):
    arms = (
        "ablate.Ablation.arms = {'softmax': 'experiments/mixers/softmax.gin', "
        "'short': ['experiments/mixers/softmax.gin', 'models.LanguageModel.depth = 2']}"
    )
    rows = run(tmp_path, arms, "ablate.Ablation.learning_rates = [1e-3, 1e-2, 10.0]", "ablate.Ablation.seeds = [3, 4]")
    assert [(row["arm"], row["seed"], row["learning_rate"]) for row in rows] == [
        (arm, seed, 0.01) for seed in (3, 4) for arm in ("softmax", "short")
    ]
    assert rows[0]["searched_rates"] == [[0.001, 11.0], [0.01, 10.0], [10.0, None]]
    trained = tiny_sweep.trained(tmp_path / "out" / "runs")
    assert len(trained) == len(set(trained)) == 2 * (3 + 2)
    searched = [json.loads(line) for line in (tmp_path / "out" / "search.jsonl").read_text().splitlines()]
    assert [(row["arm"], row["seed"], row["learning_rate"], row["status"]) for row in searched] == [
        (arm, 1000, rate, "failed" if rate > 1 else "finished")
        for arm in ("softmax", "short")
        for rate in (0.001, 0.01, 10.0)
    ]
    write_report(rows, tmp_path / "out")
    text = (tmp_path / "out" / "results.md").read_text()
    chosen = (
        "among 0.001, 0.01, 10 with seed 1000, which is in no mean: softmax 0.01 (failed: 10), short 0.01 (failed: 10)."
    )
    assert chosen in text
    assert "Warning" not in text


@pytest.mark.slow
def test_a_rate_at_the_edge_is_warned_of_and_higher_may_be_better(pretended, tmp_path):
    rows = run(tmp_path, "ablate.Ablation.learning_rates = [1e-3, 3e-3]", ONE_SEED)
    assert {row["learning_rate"] for row in rows} == {0.003}
    write_report(rows, tmp_path / "out")
    warning = "Warning: at the edge of what was tried for softmax, local; a rate beyond may be better."
    assert warning in (tmp_path / "out" / "results.md").read_text()
    assert warning in (tmp_path / "out" / "report.html").read_text()
    up = ("ablate.Ablation.higher_is_better = True", ONE_SEED)
    rows = run(tmp_path, "ablate.Ablation.learning_rates = [1e-3, 3e-3]", *up)
    assert {row["learning_rate"] for row in rows} == {0.001}


def test_rates_are_searched_with_a_seed_that_is_not_compared(tmp_path):
    rates = "ablate.Ablation.learning_rates = [1e-3, 1e-2]"
    plan = Plan(tiny_sweep.write(tmp_path, rates, "ablate.Ablation.seeds = [1000, 0]"), [])
    searches = plan.searches("local")
    tried = [(run.experiment.seed, run.experiment.optimizer.learning_rate) for run in searches]
    assert tried == [(1001, 1e-3), (1001, 1e-2)]
    outcomes = {run.digest: {"final": {"loss": run.experiment.optimizer.learning_rate}} for run in searches}
    compared = [(run.experiment.seed, run.experiment.optimizer.learning_rate) for run in plan.compared(outcomes)]
    assert compared == [(1000, 1e-3), (0, 1e-3)]
    assert plan.size == 2 * (2 + 2)


@pytest.mark.long
def test_one_rate_is_not_searched(pretended, tmp_path):
    rows = run(tmp_path, "ablate.Ablation.learning_rates = [1e-3]")
    assert {row["learning_rate"] for row in rows} == {1e-3}
    assert len(tiny_sweep.trained(tmp_path / "out" / "runs")) == len(rows) == 4
    assert not (tmp_path / "out" / "search.jsonl").exists()


@pytest.mark.slow
def test_an_arm_whose_every_rate_fails_is_reported(pretended, tmp_path):
    rows = run(tmp_path, "ablate.Ablation.learning_rates = [20.0, 10.0]", ONE_SEED)
    assert {(row["learning_rate"], row["status"]) for row in rows} == {(10.0, "failed")}
    assert len(rows) == 2


def test_rates_need_an_optimizer_in_the_config(tmp_path):
    base = config.find("experiments/recall/mqar.gin").read_text()
    (tmp_path / "base.gin").write_text(base.replace("train.Experiment.optimizer = @train.OptimizerOptions()", ""))
    sweep = tiny_sweep.TEXT.replace("experiments/recall/mqar.gin", str(tmp_path / "base.gin"))
    (tmp_path / "sweep.gin").write_text(f"{sweep}\nSTEPS = 200\nablate.Ablation.learning_rates = [1e-4]\n")
    with pytest.raises(UserError, match=r"learning_rates: the config leaves Experiment\.optimizer at its default"):
        run_ablation(str(tmp_path / "sweep.gin"), [], tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_misspelled_metric_is_named(pretended, tmp_path):
    with pytest.raises(UserError, match="metric: got 'acuracy'; softmax has accuracy, loss"):
        run(tmp_path, "ablate.Ablation.metric = 'acuracy'")


FAILURES = {
    "the run's own": (ValueError("heads: got 3; need 2"), "ValueError: heads: got 3; need 2", True),
    "divergence": (FloatingPointError("loss is nan at step 2"), "loss is nan at step 2", True),
    "memory": (MemoryError("no more"), "MemoryError: no more", False),
    "a device's memory": (
        jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: out"),
        "JaxRuntimeError: RESOURCE_EXH",
        False,
    ),
    "a full disk": (OSError(28, "No space left on device"), "No space left on device", False),
    "a damaged file": (UserError("checkpoint: x cannot be read"), "checkpoint: x cannot be read", False),
    "a write": (RunError("checkpoint: x cannot be written"), "checkpoint: x cannot be written", False),
    "without a word": (AssertionError(), "AssertionError: no message", True),
    "an exit of its own": (SystemExit(3), "RuntimeError: it called sys.exit(3)", True),
}


@pytest.mark.parametrize(
    "name", slow_but(["the run's own", "divergence", "a device's memory", "a full disk"], FAILURES)
)
@pytest.mark.long
def test_a_run_that_fails_is_a_row_and_tried_again_unless_it_fails_by_itself(pretended, tmp_path, monkeypatch, name):
    error, shown, is_final = FAILURES[name]

    def fail(experiment, *, workdir, **options):
        if workdir.name.startswith("softmax"):
            raise error
        tiny_sweep.pretend_train(experiment, workdir=workdir, **options)

    with monkeypatch.context() as patched:
        patched.setattr(runs, "train", fail)
        rows = run(tmp_path, ONE_SEED)
    assert [(row["arm"], row["status"]) for row in rows] == [("softmax", "failed"), ("local", "finished")]
    assert all(row["error"].startswith(shown) or shown in row["error"] for row in rows if row["arm"] == "softmax")
    assert all("\n" not in row.get("error", "") and row["environment"] and row["implementations"] for row in rows)
    write_report(rows, tmp_path / "out")
    assert {row["status"] for row in run(tmp_path, ONE_SEED)} == ({"failed", "finished"} if is_final else {"finished"})


@pytest.mark.long
def test_a_run_of_a_live_owner_is_waited_for(pretended, tmp_path, monkeypatch):
    """Its folder is in use, as by `attnlab train`; then no more."""
    monkeypatch.setattr(runs, "_LOOK_AGAIN_AFTER", 0.01)
    refused = iter([True, True])

    def owned(experiment, **options):
        if next(refused, False):
            raise OwnedError("workdir: in use")
        tiny_sweep.pretend_train(experiment, **options)

    monkeypatch.setattr(runs, "train", owned)
    assert {row["status"] for row in run(tmp_path)} == {"finished"}


@pytest.mark.parametrize("text", slow_but([DEEP, "[]", None], ["", "{}", "[]", '{"environ', DEEP, None]), ids=short)
@pytest.mark.parametrize("name", ["machine.json", "failed.json", "attending.json"])
def test_a_damaged_file_of_facts_is_written_again(pretended, tmp_path, name, text, capsys):
    before = run(tmp_path, ONE_SEED)
    path = next((tmp_path / "out" / "runs").glob("softmax-*")) / name
    if text is None:
        path.unlink(missing_ok=True)
    else:
        path.write_text(text)
    assert run(tmp_path, ONE_SEED) == before
    assert len(tiny_sweep.trained(tmp_path / "out" / "runs")) == 2
    assert (f"{path} is lost" in capsys.readouterr().err) == (name == "machine.json")


@pytest.mark.long
def test_a_damaged_result_is_named_in_its_row(pretended, tmp_path):
    run(tmp_path)
    path = next((tmp_path / "out" / "runs").glob("softmax-seed0-*")) / "result.json"
    path.write_text("{}")
    rows = run(tmp_path)
    assert [row["status"] for row in rows] == ["failed", "finished", "finished", "finished"]
    assert rows[0]["error"].startswith(f"workdir: {path} is no run's result; move it away")
    path.unlink()
    assert {row["status"] for row in run(tmp_path)} == {"finished"}


@pytest.mark.parametrize("text", ["", "{}", "[]", "3", '{"arm"', "\udcff", DEEP], ids=short)
def test_damaged_results_are_named(tmp_path, text):
    (tmp_path / "results.jsonl").write_bytes(text.encode(errors="surrogateescape"))
    with pytest.raises(UserError, match=r"report: .*results\.jsonl .*; run the ablation again to write it anew"):
        read_rows(tmp_path)


def test_a_row_without_a_field_or_with_another_type_is_named(pretended, tmp_path):
    rows = run(tmp_path, ONE_SEED)
    assert read_rows(tmp_path / "out") == rows
    for field in ("question", "final", "history", "flops", "environment", "baseline"):
        for damaged in ({name: value for name, value in rows[1].items() if name != field}, {**rows[1], field: [1]}):
            runs.write_rows(tmp_path / "out" / "results.jsonl", [rows[0], damaged])
            with pytest.raises(UserError, match=r"results\.jsonl has no rows of runs; run the ablation again"):
                read_rows(tmp_path / "out")


DAMAGED = {
    "searched_rates": ["x", [1], math.nan, -1, [[1, "x"]], [[1, 2, 3]]],
    "match": ["x", [1], math.nan, {}, {"cost": 1}],
    "parameter_shapes": [{}, None, {"a": 1}],
    "flops": [10**400, "x", True],
    "state_size": [10**400, -1, "x", True],
    "seconds": [None, "x", [1], {}, 10**400, math.nan],
    "implementations": [[1], None, "x"],
    "folder": [None, [1], 1],
    "attending": [None, "x", [1], {"distance": [1]}, {"skipped": 1}],
}


@pytest.mark.parametrize("field", DAMAGED)
def test_a_field_with_a_wrong_value_is_refused(pretended, tmp_path, field):
    rows = run(tmp_path, ONE_SEED)
    for value in DAMAGED[field]:
        runs.write_rows(tmp_path / "out" / "results.jsonl", [{**rows[0], field: value}, *rows[1:]])
        with pytest.raises(UserError, match=r"results\.jsonl has no rows of runs"):
            read_rows(tmp_path / "out")


@pytest.mark.long
def test_what_a_dead_process_left_of_a_claim_goes(pretended, tmp_path):
    run(tmp_path)
    digest = next((tmp_path / "out" / "runs").glob("softmax-seed0-*")).name.rpartition("-")[2]
    left = tmp_path / "out" / "runs" / "claims" / f"{digest}.1"
    left.write_text(json.dumps({"machine": claims._machine(), "host": "h", "pid": os.getpid(), "started": 1}))
    run(tmp_path)
    assert not left.exists()


@pytest.mark.long
def test_processes_share_the_runs(tmp_path):
    bindings = ["ablate.Ablation.learning_rates = [1e-3, 1e-2]", "ablate.Ablation.seeds = [0, 1, 2]"]
    command = [sys.executable, tiny_sweep.__file__, tiny_sweep.write(tmp_path, *bindings), str(tmp_path / "out")]
    here = {**os.environ, "PYTHONPATH": str(Path(attnlab.__file__).parents[1])}
    processes = [subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=here) for _ in range(2)]
    printed = [process.communicate(timeout=120)[0] for process in processes]
    assert [process.returncode for process in processes] == [0, 0]
    trained = tiny_sweep.trained(tmp_path / "out" / "runs")
    assert len(trained) == len(set(trained)) == 2 * (2 + 3)
    rows = [json.loads(line) for line in (tmp_path / "out" / "results.jsonl").read_text().splitlines()]
    assert [(row["arm"], row["seed"]) for row in rows] == [(a, s) for s in (0, 1, 2) for a in ("softmax", "local")]
    assert all("[10/10] " in lines for lines in printed)
    assert not list((tmp_path / "out" / "runs" / "claims").iterdir())


@pytest.mark.long
def test_a_run_of_another_process_is_waited_for(pretended, tmp_path, monkeypatch):
    """The other one has the first run and gives it up while we wait."""
    monkeypatch.setattr(runs, "_LOOK_AGAIN_AFTER", 0.01)
    file, lines = tiny_sweep.write(tmp_path), []
    folder = tmp_path / "out" / "runs" / "claims"
    folder.mkdir(parents=True)
    other = folder / f"{Plan(file, []).run('softmax', 0, None).digest}.1"
    other.write_text(json.dumps({"machine": "another", "host": "h", "pid": 1}))

    def report(line):
        lines.append(line)
        if line.startswith("waiting"):
            other.unlink()

    rows = run_ablation(file, [], tmp_path / "out", report=report)
    assert [row["arm"] for row in rows] == ["softmax", "local"] * 2
    assert lines.count("waiting for other processes, which have the runs that are left: 1") == 1
    assert tiny_sweep.trained(tmp_path / "out" / "runs")[-1].startswith("softmax-seed0")


@pytest.mark.slow  # the fast tests hold its numbers in train/test_loop.py, and its report in test_cli.py
def test_one_sweep_gives_one_table(tmp_path):
    """Trained for good, twice: all that the table has is the same."""
    tables = []
    for workdir in ("one", "two"):
        write_report(run(tmp_path, ONE_SEED, workdir=workdir), tmp_path / workdir)
        table = (tmp_path / workdir / "results.md").read_text().split("\n\n")[1]
        tables.append([line.split(" | ") for line in table.splitlines()])
    assert tables[0] == tables[1]
    assert [cells[0] for cells in tables[0][2:]] == ["| softmax", "| local"]
    assert "failed" not in str(tables)


@pytest.mark.slow
def test_a_rate_that_diverges_in_training_loses(tmp_path):
    wild = ("ablate.Ablation.learning_rates = [1e-2, 1e30]", "train.OptimizerOptions.clip_norm = 1e30")
    rows = run(tmp_path, *wild, ONE_SEED)
    assert {(row["learning_rate"], row["status"]) for row in rows} == {(0.01, "finished")}


@pytest.mark.slow
def test_a_signal_saves_every_run_that_trains(tmp_path):
    settings = ("STEPS = 100000", "ablate.Ablation.devices_per_run = 4", *_ON_TWO)
    command = [sys.executable, "-m", "attnlab.cli", "ablate", tiny_sweep.write(tmp_path, *settings)]
    program = subprocess.Popen([*command, "--workdir", str(tmp_path / "sweep")], stderr=subprocess.PIPE, text=True)
    try:
        deadline = time.monotonic() + 120
        while len({path.parents[1] for path in (tmp_path / "sweep" / "runs").glob("*/checkpoints/[0-9]*")}) < 2:
            assert time.monotonic() < deadline
            time.sleep(0.1)
        program.send_signal(signal.SIGTERM)
        errors = program.communicate(timeout=60)[1]
    finally:
        program.kill()
    assert program.returncode == 143
    kept = re.findall(r"terminated; step (\d+) is kept in \S+/(\w+)-seed\d-", errors)
    assert {arm for _, arm in kept} == {"softmax", "local"}
    for step, arm in kept:
        assert list((tmp_path / "sweep" / "runs").glob(f"{arm}-seed0-*/checkpoints/{step}"))
