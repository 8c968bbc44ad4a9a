"""`attnlab bench --device gpu --tune`: of each GPU kernel that has a choice, which sizes of its blocks are fastest.

A kernel is tried with each of its sizes in turn, the others as they are, on the first problem of gpu_cases that calls
it with these shapes. What is clearly faster than the first sizes is named as it stands in kernels_pallas/gpu/blocks.py.
"""

import functools
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import jax

from attnlab.attention._kernels.backends import kernel_module
from attnlab.bench import gpu_cases
from attnlab.bench.device import Case, Prepared
from attnlab.bench.problems import MOST_ERROR, Problem, prepare

Kernel = tuple[str, tuple[Any, ...]]


class Trial(NamedTuple):
    """problem, passes: which case of gpu_cases. kernel: its name and shapes. sizes: those that it is given."""

    problem: str
    passes: str
    kernel: Kernel
    sizes: tuple[int, ...]

    @property
    def library(self) -> str:
        """What the row says."""
        name, shapes = self.kernel
        return f"{name} {shapes}: {tuple(map(int, self.sizes))}"


def trials(problems: Iterable[Problem]) -> list[Trial]:
    """Lowers the problems for a GPU, which takes a minute for all, and notes between which sizes kernels choose. The
    first trial of a kernel has those that it takes by itself."""
    found: dict[Kernel, list[Trial]] = {}
    for problem in problems:
        for passes in problem.passes:
            with kernel_module("gpu", "blocks").noting() as noted:
                gpu_cases.lower(problem, passes)
            for kernel, fitting in noted.items():
                if kernel not in found and len(fitting) > 1:
                    found[kernel] = [Trial(problem.name, passes, kernel, tuple(sizes)) for sizes in fitting]
    return [trial for each in found.values() for trial in each]


def cases(trials: Sequence[Trial]) -> list[Case]:
    """A case for each, whose times are those of the whole call."""
    problems = {problem.name: problem for problem in gpu_cases.problems()}
    found = []
    for trial in trials:
        problem = problems[trial.problem]

        found.append(
            Case(
                f"{problem.name}, {trial.passes}",
                trial.library,
                trial.passes,
                flops=problem.passes[trial.passes] * problem.flops(problem.tokens),
                tokens=problem.batch * problem.tokens,
                prepare=functools.partial(_prepare, trial, problem),
                clock=_within(trial, gpu_cases.clock),
                most_error=MOST_ERROR,
            )
        )
    return found


def _prepare(trial: Trial, problem: Problem) -> Prepared:
    jax.clear_caches()  # they know nothing of sizes
    calls, errors = _within(trial, prepare)(problem, "pallas_gpu", trial.passes, gpu_cases.CACHE)
    return calls, errors and _within(trial, errors)


def _within(trial: Trial, function: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(function)
    def run(*args: Any) -> Any:
        with kernel_module("gpu", "blocks").trying({trial.kernel: trial.sizes}):
            return function(*args)

    return run


def fastest(trials: Sequence[Trial], rows: Iterable[Mapping[str, Any]]) -> dict[Kernel, tuple[int, ...]]:
    """Of each kernel, the sizes of the smallest median, if all but a quarter of their times are below all but a quarter
    of those of its first sizes."""
    timed = {row["library"]: row for row in rows if "ms" in row}
    first: dict[Kernel, Mapping[str, Any] | None] = {}
    best: dict[Kernel, tuple[float, tuple[int, ...]]] = {}
    for trial in trials:
        row = timed.get(trial.library)
        first.setdefault(trial.kernel, row)
        own = first[trial.kernel]
        if row is None or own is None or not row["high"] < own["low"]:
            continue
        best[trial.kernel] = min(best.get(trial.kernel, (float("inf"), ())), (row["ms"], trial.sizes))
    return {kernel: sizes for kernel, (_, sizes) in best.items()}


def frozen(device: str, chosen: Mapping[Kernel, tuple[int, ...]]) -> str:
    """As it stands in blocks.py."""
    if not chosen:
        return f"{device}: nothing is clearly faster than what kernels take by themselves"
    lines = [f"        {kernel!r}: {tuple(map(int, sizes))!r}," for kernel, sizes in chosen.items()]
    return "\n".join([f"    {device!r}: {{", *lines, "    },"])
