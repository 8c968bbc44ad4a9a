"""Cycles of a TPU kernel from the schedule that libtpu compiles, without a TPU.

A TensorCore issues one bundle of instructions per cycle, in order. libtpu can write a kernel's bundles to files; here
they are cut into the parts of a Pallas kernel:

    before          outside the loop over the grid
    every step      inside it: indices, copies to start and to wait for
    regions         inside it, skipped by a branch: the bodies of pl.when, in the order of the source; how often each
                    runs is known from the grid
    holders         regions that have regions in them, without those; in every step once, unless it is known how often
    loops           inside it, without those within them; likewise

so that cycles = before + steps x every step + sum of region, holder or loop x its runs. Not in it: waiting for memory,
and stalls of units that take longer than the schedule assumes. It is a bound from below for kernels that wait for
memory, and close for those that compute. The compiler's scheduler itself expects more: where it knows of a wait it
leaves bundles empty, which a last pass takes out, as the core waits by itself. What it had before that pass is counted
as well: with delays.
"""

import contextlib
import glob
import itertools
import os
import re
import tempfile
from collections.abc import Callable, Collection, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

# Predicated code shorter than this is the pipeline's own, and counted to every step.
_LEAST = 24
_BUNDLE = re.compile(r"^\s*(?:0x)?([0-9a-f]+)\s+(?:L[HBE]|P[BF]|CT)?\s*:")
_BRANCH = re.compile(r"sbr\.rel \(.*?(?:target = \$region|region = )(\d+)")
# Files of bundles, and of the units that they use: at the end, and before the pass that takes delays out.
_FILES = {
    "final": ("final_bundles", "final_hlo"),
    "delays": ("packed-bundles-post-ra", "pre-delay_hlo"),
}


class Schedule(NamedTuple):
    """Bundles of a kernel's parts, and of those the ones that issue a matrix product's instruction; in the order of the
    source. What is in the loops and holders is part of the steps, regions or loops around them as well."""

    before: int
    step: int
    step_matmuls: int
    regions: tuple[int, ...]
    matmuls: tuple[int, ...]
    loops: tuple[tuple[int, int], ...] = ()
    holders: tuple[tuple[int, int], ...] = ()

    def cycles(
        self,
        steps: int,
        runs: Sequence[int],
        products: Collection[int] = (),
        loops: Sequence[int] = (),
        holders: Sequence[int] = (),
    ) -> tuple[int, int]:
        """Cycles of a call of this many grid steps, whose pl.when bodies have these numbers of runs; and how many of
        those cycles issue a matrix product's instruction.

        products: which of the bodies multiply matrices, in order. Those are the regions that do, if there are as many.
        loops: how often the last loops run beside once in each run of what is around them; those before are the
        pipeline's own. holders: likewise.

        Short bodies may be predicated rather than skipped: they are in every step, and there are fewer regions than
        bodies. Which ones is not known; what is returned is the most that it can be. Of more regions than bodies the
        smallest are the pipeline's own, and counted to every step.
        """
        multiplying = [number for number, matmuls in enumerate(self.matmuls) if matmuls]
        known = dict(zip(multiplying, sorted(products))) if len(multiplying) == len(products) else {}
        numbers = [number for number in range(len(self.regions)) if number not in known]
        others = [run for body, run in enumerate(runs) if body not in known.values()]
        by_size = sorted(numbers, key=lambda number: self.regions[number])
        own = by_size[: max(0, len(numbers) - len(others))]
        bodies = [number for number in numbers if number not in own]

        def total(sizes: Sequence[int], some: Sequence[int]) -> int:
            """Of every region, as often as it runs; some: the runs of `bodies`."""
            run = dict(zip(bodies, some)) | {number: runs[body] for number, body in known.items()}
            return sum(size * int(run.get(number, steps)) for number, size in enumerate(sizes))

        choices = itertools.combinations(others, len(bodies))
        bundles, matmuls = max((total(self.regions, some), total(self.matmuls, some)) for some in choices)
        last = self.loops[len(self.loops) - len(loops) :] + self.holders[len(self.holders) - len(holders) :]
        for more, (inside, products_inside) in zip((*loops, *holders), last, strict=True):
            bundles, matmuls = bundles + more * inside, matmuls + more * products_inside
        return self.before + steps * self.step + bundles, steps * self.step_matmuls + matmuls


@contextlib.contextmanager
def dumping() -> Iterator[Callable[[Collection[str]], dict[str, dict[str, Schedule]]]]:
    """Has libtpu write schedules: to be entered before the process first compiles for a TPU.

    Yields a function: names of Pallas kernels -> the schedules, "final" and with "delays", of those compiled since it
    was last called, by name.
    """
    with tempfile.TemporaryDirectory() as folder:
        flags = f"--xla_jf_dump_to={folder} --xla_jf_dump_llo_text=true"
        os.environ["LIBTPU_INIT_ARGS"] = f"{os.environ.get('LIBTPU_INIT_ARGS', '')} {flags}".strip()

        def collect(names: Collection[str]) -> dict[str, dict[str, Schedule]]:
            found: dict[str, dict[str, Schedule]] = {}
            for file, (which, (bundles, units)) in itertools.product(Path(folder).iterdir(), _FILES.items()):
                match = re.fullmatch(rf"(\d+-(.*?)(?:\.\d+)?)-\d+-{bundles}\.txt", file.name)
                if match is not None and match[2] in names:
                    used = Path(folder).glob(f"{glob.escape(match[1])}-*-{units}-static-per-bundle-utilization.txt")
                    found.setdefault(match[2], {})[which] = parse(file.read_text(), next(used).read_text())
            for file in Path(folder).iterdir():
                file.unlink()
            return found

        yield collect


def parse(bundles: str, units: str) -> Schedule:
    """bundles: the text of a final_bundles file. units: of its static-per-bundle-utilization file."""
    lines = [line for line in bundles.splitlines() if _BUNDLE.match(line)]
    rows = [row.split() for row in units.split("UTILIZATION:")[1].splitlines() if row.strip()]
    matmul = [int(row[0]) > 0 for row in rows]
    matmul += [False] * (len(lines) - len(matmul))
    # The loop over the grid: from its mark to the branch back.
    start = next((i for i, line in enumerate(lines) if " LB:" in line.split("{")[0]), None)
    if start is None:
        return Schedule(0, len(lines), sum(matmul), (), ())
    ends = {int(n): i for i, line in enumerate(lines) for n in re.findall(r"(?<!Start )(?:empty )region (\d+)", line)}
    branches = [i for i, line in enumerate(lines) if "sbr.rel" in line]
    end = max((i for i, line in enumerate(lines) if re.search(r"loop exit test", line)), default=branches[-1])
    owner = [-1] * len(lines)
    regions = []
    for i in range(start, end):
        for target in map(int, _BRANCH.findall(lines[i])):
            if ends.get(target, -1) > i:
                regions.append((i + 1, ends[target]))
    # The one that holds others is the body of all steps but the pipeline's own; those in it are pl.when's, and those
    # outside the pipeline's, counted to every step.
    holding = [(a, b) for a, b in regions if any(a < c and d <= b for c, d in regions)]
    body = max(holding, key=lambda region: region[1] - region[0], default=(start, end))
    inner = [(a, b) for a, b in regions if b - a >= _LEAST and (a, b) not in holding]
    kept = [(a, b) for a, b in inner if body[0] <= a and b <= body[1]]
    for number, (a, b) in enumerate(kept):
        for i in range(a, b):
            owner[i] = number
    inside = range(start, len(lines))
    size = tuple(sum(owner[i] == number for i in inside) for number in range(len(kept)))
    products = tuple(sum(owner[i] == number and matmul[i] for i in inside) for number in range(len(kept)))
    last = next((i for i in range(end, len(lines)) if "sbr.rel" in lines[i]), end)
    every = [i for i in range(start, last + 1) if owner[i] == -1]
    loops = tuple((len(loop), sum(matmul[i] for i in loop)) for loop in _loops(lines[: last + 1]))
    held = [[i for i in range(a, b) if owner[i] == -1] for a, b in holding if body[0] < a and b < body[1]]
    holders = tuple((len(own), sum(matmul[i] for i in own)) for own in held)
    before, matmuls = start + len(lines) - last - 1, sum(matmul[i] for i in every)
    return Schedule(before, len(every), matmuls, size, products, loops, holders)


def _loops(lines: Sequence[str]) -> list[list[int]]:
    """The lines of each loop inside the loop over the grid, without those of loops within it."""
    loops: list[list[int]] = []
    newest: dict[int, list[int]] = {}  # by depth: a loop's last lines may stand among those around it
    nested = ""
    for number, line in enumerate(lines):
        mark, own = re.findall(r"(LB)?\s*: (>*)", line)[0]
        nested = nested if line.rstrip().endswith(" {}") else own  # delays do not say their depth
        if mark and len(nested) > 1:
            newest[len(nested)] = []
            loops.append(newest[len(nested)])
        newest.get(len(nested), []).append(number)
    return loops
