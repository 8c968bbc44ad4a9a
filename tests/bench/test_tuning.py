"""The sweep of block sizes, without a card: what it tries, and what it makes of the times."""

import ast

import pytest

from attnlab import cli
from attnlab.bench import gpu_cases, problems, tuning
from attnlab.bench.tuning import Trial
from kernels_pallas.gpu import blocks

PROBLEMS = {problem.name: problem for problem in gpu_cases.problems()}
FLASH, STATES = ("banded_flash_attention", (64, 64, 0)), ("linear_states", (128, "token", True))


@pytest.mark.long
def test_every_size_of_every_kernel_is_tried_once():
    found = tuning.trials([PROBLEMS["dense causal, head dim 64, 16k"]] * 2)
    assert len(set(found)) == len(found)
    forward = [trial for trial in found if trial.passes == "forward"]
    assert {trial.kernel for trial in forward} == {FLASH}
    assert [trial.sizes for trial in forward] == [(step, slots) for step in (128, 64) for slots in (4, 3, 2)]
    assert len({trial.kernel for trial in found if trial.passes == "backward"}) == 2
    cases = tuning.cases(found)
    assert len({case.key for case in cases}) == len(found)
    assert all(case.most_error == problems.MOST_ERROR for case in cases)


def test_a_trial_s_kernel_has_its_sizes_where_it_is_prepared_checked_and_timed(monkeypatch):
    seen = []

    def see(*_):
        seen.append(blocks.chosen(*FLASH, [(128, 4), (64, 2)]))

    def prepare(*_):
        see()
        return [], see

    monkeypatch.setattr(tuning, "prepare", prepare)
    monkeypatch.setattr(gpu_cases, "clock", see)
    [case] = tuning.cases([Trial("dense causal, head dim 64, 16k", "forward", FLASH, (64, 2))])
    _, errors = case.prepare()
    errors()
    case.clock()
    see()
    assert seen == [(64, 2)] * 3 + [(128, 4)]


def rows(*times):
    """Of the trials below, (ms, low, high) each, or None where it failed."""
    for trial, each in zip(TRIALS, times, strict=True):
        timed = dict(zip(("ms", "low", "high"), each)) if each else {"error": "it is off"}
        yield {"library": trial.library, **timed}


TRIALS = [Trial("a", "forward", FLASH, (step, 2)) for step in (128, 64, 32)]
TRIALS += [Trial("b", "forward", STATES, (slots,)) for slots in (4, 3)]


@pytest.mark.parametrize(
    ("times", "chosen"),
    [
        ([(2, 1.9, 2.1), (1.5, 1.4, 1.6), (1.4, 1.3, 1.5), (1, 1, 1), (0.8, 0.7, 0.9)], {FLASH: (32, 2), STATES: (3,)}),
        ([(2, 1.9, 2.1), (1.8, 1.7, 1.9), (1.8, 1.7, 2.0), (1, 1, 1), None], {}),
        ([None, (1.8, 1.7, 1.8), (1.8, 1.7, 1.8), (1, 0.9, 1), (2, 2, 2)], {}),
    ],
    ids=["clearly faster", "about as fast", "nothing to compare with"],
)
def test_what_is_clearly_faster_than_the_first_is_taken(times, chosen):
    assert tuning.fastest(TRIALS, rows(*times)) == chosen


def test_the_table_is_a_part_of_the_code():
    chosen = {FLASH: (64, 2), STATES: (3,)}
    assert ast.literal_eval(f"{{{tuning.frozen('NVIDIA H100', chosen)}}}") == {"NVIDIA H100": chosen}
    assert tuning.frozen("NVIDIA H100", {}).endswith("nothing is clearly faster than what kernels take by themselves")


def test_without_its_device_it_is_a_line(capsys):
    assert cli.main(["bench", "--tune"]) == 2
    assert "tune: got it without --device gpu" in capsys.readouterr().err
