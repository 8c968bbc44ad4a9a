"""The benchmark of an accelerator, without one: what is checked, kept, continued and lost. The cases here are this
machine's; those of a GPU are built, and their forms run on small inputs."""

import dataclasses
import functools
import json
import os
import time
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import pytest

from attnlab import cli
from attnlab.bench import device, gpu_cases, problems, tpu_cases
from attnlab.bench.device import Case, measured, time_cases
from kernels_pallas.aot.compile import compile_for_tpu
from kernels_pallas.aot.table import KERNELS
from kernels_pallas.shapes import SHAPES, Shape

FACTS = {"device": "this", "code": "1"}


def clock(milliseconds):
    return milliseconds, {"kernel": milliseconds}


def case(name, prepare, library="ours"):
    return Case(name, library, "forward", flops=1e9, tokens=1000, prepare=prepare, clock=clock, most_error=0.1)


def right():
    return [(2.0,), (3.0,)], lambda: {"out": 0.01}


def wrong():
    return [(1.0,)], lambda: {"out": 0.01, "query": float("nan")}


def missing():
    raise ImportError("No module named 'other'", name="other")


def ends():
    os._exit(7)


def hangs():
    time.sleep(1000)


def cases():
    return [case("a", right), case("b", wrong), case("c", missing, "other"), case("d", ends), case("e", right)]


def slow_cases():
    return [case("a", hangs), case("b", right)]


def test_a_case_is_timed_after_it_is_checked():
    row = measured(case("a", right))
    assert (row["ms"], row["low"], row["high"]) == (2.5, 2.0, 3.0)
    assert row["runs"] >= 20
    assert row["errors"] == {"out": 0.01}
    assert row["kernels"] in ({"kernel": 2.0}, {"kernel": 3.0})


def test_what_is_wrong_or_missing_has_no_time():
    assert measured(case("b", wrong)) == {"error": "Wrong: query is off by nan"}
    assert measured(case("c", missing)) == {"error": "missing: other"}


@pytest.mark.long
def test_rows_are_kept_and_the_others_continue_after_a_crash(tmp_path):
    said = []
    assert time_cases(cases, FACTS, tmp_path, budget=60, report=said.append) == 0
    rows = [json.loads(line) for line in (tmp_path / "device.jsonl").read_text().splitlines()]
    assert [row["name"] for row in rows] == list("abcde")
    assert [row.get("error") for row in rows] == [
        None,
        "Wrong: query is off by nan",
        "missing: other",
        "its process ended with 7",
        None,
    ]
    assert said[0] == "[1/5] a, forward, ours: 2.500 ms"
    assert time_cases(cases, FACTS, tmp_path, budget=60, report=said.append) == 0
    assert len(said) == 5
    assert device.rows_of(tmp_path / "device.jsonl", FACTS) == rows
    assert device.rows_of(tmp_path / "device.jsonl", FACTS | {"code": "2"}) == []
    shown = device.table(rows, cases(), peak=1e13)
    assert "| a | forward | ours | 2.500 | 2.000 to 3.000 | 0 | 4% | 0.40 |" in shown
    device.draw(rows, tmp_path / "device.png", "a title")
    assert (tmp_path / "device.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.long
def test_what_gives_no_answer_is_ended(tmp_path, monkeypatch):
    monkeypatch.setattr(device, "_MOST_SECONDS", 15.0)
    assert time_cases(slow_cases, FACTS, tmp_path, budget=60, report=lambda line: None) == 0
    lost, timed = device.rows_of(tmp_path / "device.jsonl", FACTS)
    assert lost["error"] == "no answer in 15 seconds"
    assert timed["ms"] == 2.5


def test_after_the_budget_no_case_is_begun(tmp_path):
    assert time_cases(cases, FACTS, tmp_path, budget=0, report=lambda line: None) == 5
    assert not (tmp_path / "device.jsonl").exists()


@pytest.mark.long
@pytest.mark.parametrize("platform", ["gpu", "tpu"])
def test_without_an_accelerator_it_is_a_line(platform, tmp_path, capsys):
    assert cli.main(["bench", "--device", platform, "--workdir", str(tmp_path)]) == 2
    assert f"device: JAX finds no {platform.upper()}; install jax[" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("options", "named"),
    [
        (["gpu", "--prompts"], "device"),
        (["tpu", "--backward"], "device"),
        (["gpu", "--budget", "0"], "budget"),
        (["tpu", "--tune"], "tune"),
    ],
)
def test_what_does_not_go_with_a_device_is_refused(options, named, tmp_path, capsys):
    assert cli.main(["bench", "--device", *options, "--workdir", str(tmp_path)]) == 2
    assert capsys.readouterr().err.startswith(f"attnlab: {named}: got ")


@pytest.mark.parametrize("of", [gpu_cases, tpu_cases])
def test_cases_have_names_of_their_own(of):
    found = of.cases()
    assert len({case.key for case in found}) == len(found)
    assert all(case.flops > 0 and case.tokens > 0 for case in found)


def test_a_tpu_is_asked_for_the_rows_of_the_table():
    """All but those of covariances, in all shapes that are bfloat16."""
    rows = {(case.name, case.passes) for case in tpu_cases.cases() if case.library == "attnlab, pallas_tpu"}
    shapes = [name for name, shape in SHAPES.items() if shape.dtype == jnp.bfloat16]
    for kernel in KERNELS.keys() - {"covariance", "covariance gradients", "covariance solve"}:
        name = kernel.removesuffix(" gradients")
        assert {(f"{name}, {shape}", "forward" if name == kernel else "backward") for shape in shapes} <= rows


def test_times_of_a_tpu_are_those_of_its_programs():
    """What JAX's profiler tells of one: lines of programs, of their operations, and of copies beside these."""

    def line(name, **nanoseconds):
        return SimpleNamespace(
            name=name, events=[SimpleNamespace(name=n, duration_ns=ns) for n, ns in nanoseconds.items()]
        )

    lines = [line("XLA Modules", jit_call=3e6), line("XLA Ops", kernel=2e6, copy=5e5), line("Async XLA Ops", copy=9e6)]
    planes = [SimpleNamespace(name=name, lines=lines) for name in ("/device:TPU:0", "/host:CPU")]
    assert tpu_cases.device_times(SimpleNamespace(planes=planes)) == (3.0, {"kernel": 2.0, "copy": 0.5})


def test_where_the_profiler_sees_no_tpu_a_call_is_waited_for():
    milliseconds, kernels = tpu_cases.clock(jax.jit(lambda x: x @ x), jnp.ones((8, 8)))
    assert milliseconds > 0
    assert kernels == {}


def test_pairs_are_those_that_are_seen():
    assert problems.window_pairs(3)(5) == 1 + 2 + 3 + 3 + 3
    assert problems.window_pairs(100)(5) == 15


# As many tokens as a window has at least; those of 4096 would take gigabytes here.
PROBLEMS = {problem.name: problem for problem in gpu_cases.problems() if problem.facts.get("window") != 4096}
QUICK = "linear, 16k", "a step of gated delta, batch 64"
SMALL = tpu_cases.problems(Shape(length=64, window=16, heads=4, key_heads=2, head_dim=16))
PROBLEMS |= {f"of a TPU, {problem.name}": dataclasses.replace(problem, small=64) for problem in SMALL}
PASSES = [
    pytest.param(name, passes, marks=[] if name in QUICK else pytest.mark.slow)
    for name, problem in PROBLEMS.items()
    for passes in problem.passes
]


@pytest.mark.parametrize(("name", "passes"), PASSES)
def test_the_check_passes_what_is_right_and_sees_what_is_not(name, passes):
    """By the XLA form, in bfloat16."""
    small = {"2-D": 256, "3-D": 16**3, "window": 1024}  # boxes are no wider than the space
    sizes = [tokens for kind, tokens in small.items() if name.startswith(kind)] + [144]
    problem = dataclasses.replace(PROBLEMS[name], small=min(sizes[0], PROBLEMS[name].small))
    errors = problems.errors(problem, "xla", jax.random.key(0), passes)
    assert set(errors) == ({"out"} if passes == "forward" else set(problem.make(jax.random.key(0), 1, 256, 2)))
    assert max(errors.values()) < problems.MOST_ERROR

    def halved(arrays, implementation):
        out = problem.attend(arrays, implementation)
        return out if implementation == "reference" else out / 2

    other = dataclasses.replace(problem, attend=halved)
    assert max(problems.errors(other, "xla", jax.random.key(0), passes).values()) > problems.MOST_ERROR


CASES = [(problem.name, passes) for problem in SMALL for passes in problem.passes]


@pytest.mark.parametrize(("name", "passes"), CASES)
@pytest.mark.slow
def test_what_a_tpu_is_given_compiles_for_it(name, passes):
    shape = SHAPES["small model 2k"]
    [problem] = (problem for problem in tpu_cases.problems(shape) if problem.name == name)
    arrays = jax.eval_shape(functools.partial(problems.timed, problem), jax.random.key(0))
    compiled = compile_for_tpu(problems.of_form(problem, "pallas_tpu", passes), arrays, tpu="v5e")
    assert "tpu_custom_call" in compiled.as_text()


@pytest.mark.parametrize("passes", ["forward", "backward"])
@pytest.mark.parametrize("name", ["banded flash", "all earlier"])
@pytest.mark.slow
def test_what_jax_has_compiles_for_a_tpu(name, passes, monkeypatch):
    """What its row calls, at the row's shapes."""
    shape, asked = SHAPES["small model 2k"], []
    monkeypatch.setattr(tpu_cases, "calls", lambda problem, call, *_: asked.append((problem, call)))
    [case] = (
        case
        for case in tpu_cases.cases()
        if case.key[0] == f"{name}, small model 2k" and case.library.startswith("jax") and case.passes == passes
    )
    case.prepare()
    [(problem, call)] = asked
    arrays = jax.eval_shape(functools.partial(problems.timed, problem), jax.random.key(0))
    theirs = dataclasses.replace(problem, attend=lambda arrays, _: call(arrays))
    assert arrays["key"].shape[-3 if name == "all earlier" else 0] == shape.heads
    assert "tpu_custom_call" in compile_for_tpu(problems.of_form(theirs, "", passes), arrays, tpu="v5e").as_text()
