"""The command line in processes of its own, forked from one that has everything imported: a kill hits a real process,
and starting it takes a second, not ten."""

import contextlib
import ctypes
import functools
import json
import multiprocessing
import os
import re
import resource
import socket
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

TRAIN = """
from __gin__ import dynamic_registration
from attnlab import data
from attnlab import models
from attnlab import nn
from attnlab import train
include 'experiments/recall/mqar.gin'
include 'experiments/mixers/softmax.gin'
PAIRS = 2
STEPS = 20
models.LanguageModel.vocabulary = 32
models.LanguageModel.features = 16
models.LanguageModel.depth = 1
models.LanguageModel.dropout_rate = 0.1
data.MultiQueryRecall.length = 16
data.MultiQueryRecall.vocabulary = 32
train.Experiment.batch_size = 4
train.Experiment.log_every = 3
train.Experiment.evaluate_every = 10
train.Experiment.checkpoint_every = 4
train.SequenceTask.validation_examples = 8
train.OptimizerOptions.warmup_steps = 2
train.OptimizerOptions.learning_rate = 1e-3
"""
SWEEP = """
from __gin__ import dynamic_registration
from attnlab import ablate
include 'train.gin'
ablate.Ablation.question = 'Which?'
ablate.Ablation.baseline = 'softmax'
ablate.Ablation.seeds = [0, 1]
ablate.Ablation.arms = {
    'softmax': 'experiments/mixers/softmax.gin',
    'linear': 'experiments/mixers/linear.gin',
}
"""

_context = multiprocessing.get_context("forkserver")
_context.set_forkserver_preload(
    ["attnlab.cli", "attnlab.config", "attnlab.ablate", "attnlab.train", "matplotlib.pyplot"]
)


def write_configs(folder: Path) -> None:
    (folder / "train.gin").write_text(TRAIN)
    (folder / "hosts.gin").write_text(HOSTS)
    (folder / "sweep.gin").write_text(SWEEP)
    (folder / "hosts_sweep.gin").write_text(SWEEP.replace("train.gin", "hosts.gin"))


HOSTS = """
from __gin__ import dynamic_registration
from attnlab import train
include 'train.gin'
train.Experiment.mesh = @train.Mesh()
train.Mesh.fsdp = -1
"""


class Command:
    """`attnlab *arguments` in `folder`, begun. printed: to standard error, standard output in front."""

    def __init__(self, folder: Path, *arguments: str, prepare=None):
        self._log = folder / f"printed-{time.monotonic_ns()}.txt"
        self._log.touch()
        self._log.chmod(0o666)
        self.process = _context.Process(target=_run, args=(str(folder), str(self._log), arguments, prepare))
        self.process.start()
        while not self._log.stat().st_size and self.process.is_alive():  # until the command itself begins
            time.sleep(0.001)

    @property
    def pid(self) -> int:
        return self.process.pid

    @property
    def printed(self) -> str:
        return self._log.read_text(errors="replace")

    @property
    def lines(self) -> list[str]:
        """What attnlab itself says, without its answer at once to a signal, which a line on what was saved follows."""
        said = [line for line in self.printed.splitlines() if line.startswith("attnlab:")]
        return [line for line in said if not line.endswith("; stopping after this step: saving ...")]

    def is_running(self) -> bool:
        return self.process.exitcode is None

    def send(self, number: int) -> None:
        with contextlib.suppress(ProcessLookupError):
            os.kill(self.pid, number)

    def wait(self, seconds: float = 300) -> int:
        """The exit status; minus the signal's number of one that was killed."""
        self.process.join(seconds)
        if self.is_running():
            self.process.kill()
            raise AssertionError(f"hangs:\n{self.printed}")
        return self.process.exitcode

    def check(self, status: int, *words: str) -> None:
        """It ended with the status and one line with these words, and no traceback."""
        code, printed = self.wait(), self.printed
        assert code == status, printed
        assert "Traceback" not in printed, printed
        if words:
            assert len(self.lines) == 1, printed
            assert all(word in self.lines[0] for word in words), printed


def run(folder: Path, *arguments: str, **options) -> Command:
    command = Command(folder, *arguments, **options)
    command.wait()
    return command


def _run(folder, log, arguments, prepare):
    file = os.open(log, os.O_WRONLY | os.O_APPEND)
    os.dup2(file, 1)
    os.dup2(file, 2)
    sys.stdout, sys.stderr = (os.fdopen(number, "w", buffering=1, closefd=False) for number in (1, 2))
    os.chdir(folder)
    import jax

    from attnlab import cli

    # What others compiled is taken; nothing is written, of which a kill could leave half.
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 1e9)
    if prepare is not None:
        prepare()
    print("begun", file=sys.stderr)
    sys.argv = ["attnlab", *arguments]
    cli.run()


def devices(
    count: int,
    keep: bool = False,
    environment: Mapping[str, str] | None = None,
    then: Callable[[], None] = lambda: None,
) -> None:
    """Of a CPU. keep: what is compiled. then: further preparation."""
    import jax

    os.environ.update(environment or {})
    os.environ["XLA_FLAGS"] = re.sub(r"--xla_force_host_platform_device_count=\d+", "", os.environ["XLA_FLAGS"])
    jax.config.update("jax_num_cpu_devices", count)
    if keep:
        keep_compiled()
    then()


def free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


class Pair:
    """The command in two processes of two devices, begun."""

    def __init__(self, folder: Path, *arguments: str, **options: Any):
        shared = ("--coordinator", f"127.0.0.1:{free_port()}", "--processes", "2", "--heartbeat", "10")
        prepare = functools.partial(devices, 2, **options)
        self.both = [
            Command(folder, *arguments, *shared, "--process", str(number), prepare=prepare) for number in range(2)
        ]

    def is_running(self) -> bool:
        return any(command.is_running() for command in self.both)

    def wait(self, seconds: float = 300) -> tuple[int, ...]:
        return tuple(command.wait(seconds) for command in self.both)

    def check(self, status: int, *words: str) -> None:
        """Both ended as Command.check has it."""
        for command in self.both:
            command.check(status, *words)


def rows(path: Path) -> list[dict]:
    """metrics.jsonl without times."""
    return [
        {name: value for name, value in json.loads(line).items() if not name.endswith("seconds")}
        for line in (path / "metrics.jsonl").read_text().splitlines()
    ]


def checkpoints(folder: Path) -> list[str]:
    """Names in the folders of checkpoints of a run or of a sweep's runs, those being written too."""
    names = []
    for run in (folder, *folder.glob("runs/*")):
        with contextlib.suppress(FileNotFoundError, NotADirectoryError):
            names += os.listdir(run / "checkpoints")
    return names


def sums(path: Path) -> tuple[str, dict]:
    """The last checkpoint's step and the sums of its arrays, which are of their bits."""
    newest = max((path / "checkpoints").iterdir(), key=lambda step: int(step.name))
    return newest.name, json.loads((newest / "facts" / "metadata").read_text())["sums"]


def assert_equal_runs(path: Path, other: Path) -> None:
    assert rows(path) == rows(other)
    assert sums(path) == sums(other)
    results = [json.loads((folder / "result.json").read_text())["final"] for folder in (path, other)]
    assert results[0] == results[1]


def keep_compiled() -> None:
    """For a command that is not killed: keeps what it compiles for the others."""
    import jax

    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)


def small_files(size: int) -> None:
    """No file grows beyond this: what is written then fails, at every writer alike, as on a full disk."""
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, size))


def powerless() -> None:
    """Takes from root what makes permissions void: CAP_DAC_OVERRIDE and CAP_DAC_READ_SEARCH."""
    if os.geteuid() == 0:
        header, sets = (ctypes.c_uint32 * 2)(0x20080522, 0), (ctypes.c_uint32 * 6)()
        library = ctypes.CDLL(None)
        assert library.capget(header, sets) == 0
        for index in (0, 1):  # effective and permitted, of the first 32
            sets[index] &= ~0b110
        assert library.capset(header, sets) == 0


def clock_set(days: float) -> None:
    """The clock jumps by this much once training has begun."""
    true_time, begun = time.time, time.monotonic()
    time.time = lambda: true_time() + (86400 * days if time.monotonic() - begun > 1 else 0)


def no_room(what: str, process: int) -> None:
    """A "row" or "checkpoint" of the arm `linear` with seed 0 cannot be written by this process."""
    import jax
    import orbax.checkpoint as ocp

    from attnlab.train.workdir import Workdir

    owner, name = (Workdir, "write_row") if what == "row" else (ocp.CompositeCheckpointHandler, "save")
    write = getattr(owner, name)

    def fail(self, *arguments, **options):
        write(self, *arguments, **options)
        path = str(self.path if what == "row" else arguments[0])
        if "linear-seed0" in path and jax.process_index() == process:
            raise OSError(28, "No space left on device", path)

    setattr(owner, name, fail)


def one_that_fails(error: BaseException, process: int | None = None) -> None:
    """Every training of the arm `linear` raises this, of several processes in this one alone."""
    import jax

    from attnlab.ablate import runs
    from attnlab.train import hosts

    train, hosts._TOGETHER = runs.train, 3

    def fail(experiment, *, workdir, **options):
        if workdir.name.startswith("linear") and process in (None, jax.process_index()):
            raise error
        return train(experiment, workdir=workdir, **options)

    runs.train = fail
