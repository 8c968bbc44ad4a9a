"""Kills at random moments, from a fixed seed: what is continued ends bit for bit as if nothing had happened.

`pytest -m slow` has 129; the fast tests have a few.
"""

import random
import signal
import time

import commands
import pytest

# Status of a command that a signal ended.
ENDED = {signal.SIGKILL: -signal.SIGKILL, signal.SIGTERM: 143, signal.SIGINT: 130}
TRAIN = ("train", "train.gin", "--workdir", "run")
SWEEP = ("ablate", "sweep.gin", "--workdir", "run")


def moment(generator, command, folder):
    """Waits for a moment: while it starts, while a checkpoint is written, or at any other."""
    kind = generator.choice(["starting", "checkpoint", "anywhere"])
    if kind == "starting":
        time.sleep(generator.uniform(0, 1.5))
        return kind
    count = generator.randrange(1, 4)
    seen = set()
    while command.is_running():
        names = commands.checkpoints(folder / "run")
        seen |= {name.partition(".")[0] for name in names if kind == "anywhere" or "tmp" in name}
        if len(seen) >= count:
            break
        time.sleep(0.004)
    time.sleep(generator.uniform(0, 0.05 if kind == "checkpoint" else 0.5))
    return kind


def kill_and_continue(folder, generator, arguments, kills, compare, number_of=None):
    """Starts, kills and starts again, in a new workdir once one is over, until `kills` have hit."""
    hit = []
    while len(hit) < kills:
        command = commands.Command(folder, *arguments)
        kind = moment(generator, command, folder)
        number = generator.choice(list(ENDED)) if number_of is None else number_of
        was_running = command.is_running()
        command.send(number)
        status, printed = command.wait(), command.printed
        assert not any(word in printed for word in ("Traceback", "Segmentation", "Error")), printed
        if was_running and status != 0:
            assert status == ENDED[number], printed
            assert len(command.lines) == (number != signal.SIGKILL), printed
            hit.append((kind, number.name))
        if status == 0:
            compare()
            (folder / "run").rename(folder / f"run-{len(hit)}-{time.monotonic_ns()}")
    commands.run(folder, *arguments).check(0)
    compare()
    print(f"{len(hit)} kills:", {pair: hit.count(pair) for pair in sorted(set(hit))})


def compare_sweeps(folder, untouched):
    for path in sorted((folder / "run" / "runs").glob("*-seed*")):
        commands.assert_equal_runs(path, untouched / "sweep" / "runs" / path.name)
    assert len(list((folder / "run" / "runs").glob("*-seed*"))) == 4
    assert not list((folder / "run" / "runs" / "claims").iterdir())


@pytest.mark.long
def test_a_train_run(folder, untouched):
    kill_and_continue(
        folder, random.Random(1), TRAIN, 3, lambda: commands.assert_equal_runs(folder / "run", untouched / "train")
    )


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(5))
def test_train_runs(folder, untouched, seed):
    kill_and_continue(
        folder,
        random.Random(100 + seed),
        TRAIN,
        12,
        lambda: commands.assert_equal_runs(folder / "run", untouched / "train"),
    )


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(4))
def test_sweeps(folder, untouched_sweep, seed):
    kill_and_continue(folder, random.Random(200 + seed), SWEEP, 12, lambda: compare_sweeps(folder, untouched_sweep))


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(3))
def test_sweeps_of_several_processes(folder, untouched_sweep, seed):
    """Helpers are ended with their parent, by a SIGKILL too."""
    kill_and_continue(
        folder,
        random.Random(300 + seed),
        (*SWEEP, "--processes", "2"),
        7,
        lambda: compare_sweeps(folder, untouched_sweep),
    )
