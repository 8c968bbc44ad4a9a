"""The benchmark of an accelerator, without one: what is checked, kept, continued and lost. The cases here are this
machine's; those of a GPU are built, and their forms run on small inputs."""

import dataclasses
import json
import os
import time

import jax
import pytest

from attnlab import cli
from attnlab.bench import device, gpu_cases
from attnlab.bench.device import Case, measured, time_cases

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
    monkeypatch.setattr(device, "_MOST_SECONDS", 5.0)
    assert time_cases(slow_cases, FACTS, tmp_path, budget=60, report=lambda line: None) == 0
    lost, timed = device.rows_of(tmp_path / "device.jsonl", FACTS)
    assert lost["error"] == "no answer in 5 seconds"
    assert timed["ms"] == 2.5


def test_after_the_budget_no_case_is_begun(tmp_path):
    assert time_cases(cases, FACTS, tmp_path, budget=0, report=lambda line: None) == 5
    assert not (tmp_path / "device.jsonl").exists()


def test_without_a_gpu_it_is_a_line(tmp_path, capsys):
    assert cli.main(["bench", "--device", "gpu", "--workdir", str(tmp_path)]) == 2
    assert "device: JAX finds no GPU (cpu alone)" in capsys.readouterr().err
    assert cli.main(["bench", "--device", "gpu", "--prompts", "--workdir", str(tmp_path)]) == 2
    assert cli.main(["bench", "--device", "gpu", "--budget", "0", "--workdir", str(tmp_path)]) == 2


@pytest.fixture(scope="module")
def of_a_gpu():
    return gpu_cases.cases()


def test_cases_have_names_of_their_own(of_a_gpu):
    assert len({case.key for case in of_a_gpu}) == len(of_a_gpu)
    assert all(case.flops > 0 and case.tokens > 0 for case in of_a_gpu)


def test_pairs_are_those_that_are_seen():
    assert gpu_cases._window_pairs(3)(5) == 1 + 2 + 3 + 3 + 3
    assert gpu_cases._window_pairs(100)(5) == 15


# As many tokens as a window has at least; those of 4096 would take gigabytes here.
PROBLEMS = {problem.name: problem for problem in gpu_cases.problems() if problem.facts.get("window") != 4096}
QUICK = "linear, 16k", "a step of gated delta, batch 64"
PASSES = [
    pytest.param(name, passes, marks=[] if name in QUICK else pytest.mark.slow)
    for name, problem in PROBLEMS.items()
    for passes in problem.passes
]


@pytest.mark.parametrize(("name", "passes"), PASSES)
def test_the_check_passes_what_is_right_and_sees_what_is_not(name, passes):
    """By the XLA form, in bfloat16."""
    small = {"2-D": 256, "3-D": 16**3, "window": 1024}  # boxes are no wider than the space
    sizes = [tokens for kind, tokens in small.items() if name.startswith(kind)]
    problem = dataclasses.replace(PROBLEMS[name], small=sizes[0] if sizes else 144)
    errors = gpu_cases._errors(problem, "xla", jax.random.key(0), passes)
    assert set(errors) == ({"out"} if passes == "forward" else set(problem.make(jax.random.key(0), 1, 256, 2)))
    assert max(errors.values()) < gpu_cases.MOST_ERROR

    def halved(arrays, implementation):
        out = problem.attend(arrays, implementation)
        return out if implementation == "reference" else out / 2

    other = dataclasses.replace(problem, attend=halved)
    assert max(gpu_cases._errors(other, "xla", jax.random.key(0), passes).values()) > gpu_cases.MOST_ERROR
