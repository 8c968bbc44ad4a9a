"""What a program that XLA compiled for a TPU moves, read from its text: over the interconnect, and to and from HBM.

    collectives   bytes that a device sends, as a ring would: of an all-gather or a reduce-scatter of `many` devices
                  (many - 1) / many of the whole array, of an all-reduce twice that
    HBM           what instructions and fusions read and write; of a slice, only the slice; kernels by their estimates

Loops count by their trips, which are read from their conditions (TPU programs carry no known trip counts); of a
conditional the branch that moves most counts.
"""

import dataclasses
import math
import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

_BITS = {"pred": 8, "bf16": 16, "s4": 4, "u4": 4, "c64": 64, "c128": 128}
_COLLECTIVES = ("all-gather", "all-reduce", "reduce-scatter", "all-to-all", "collective-permute")
# They move nothing, or what they call is counted.
_FREE = {
    *("parameter", "constant", "tuple", "get-tuple-element", "bitcast", "while", "conditional", "call", "after-all"),
    *("partition-id", "replica-id", "optimization-barrier", "opt-barrier"),
}


class Collective(NamedTuple):
    """kind: as XLA names it, "all-gather". axes: the mesh's, over which it goes."""

    kind: str
    axes: tuple[str, ...]


@dataclasses.dataclass
class Traffic:
    """Of one device in a run of the program.

    times: how often each collective runs. sent: bytes by collective. hbm: bytes read and written. kernels: calls by
    name. unknown_loops: those whose trips are not known, and count once.
    """

    times: Counter[Collective] = dataclasses.field(default_factory=Counter)
    sent: Counter[Collective] = dataclasses.field(default_factory=Counter)
    hbm: int = 0
    kernels: Counter[str] = dataclasses.field(default_factory=Counter)
    unknown_loops: int = 0

    def add(self, other: "Traffic", times: int) -> None:
        pairs: Any = ((self.times, other.times), (self.sent, other.sent), (self.kernels, other.kernels))
        for counts, more in pairs:
            counts.update({name: times * count for name, count in more.items()})
        self.hbm += times * other.hbm
        self.unknown_loops += other.unknown_loops


def traffic(text: str, mesh: Mapping[str, int]) -> Traffic:
    """text: a compiled program's (`jax.stages.Compiled.as_text`). mesh: its axes and their sizes, in order."""
    return _Program(text, mesh).traffic()


class _Instruction(NamedTuple):
    name: str
    shape: str
    kind: str
    operands: tuple[str, ...]
    rest: str


_Computation = dict[str, _Instruction]  # by name, in order; the last one is the root

_HEAD = re.compile(r"(ENTRY )?%?([\w.\-~]+) \(.*\) -> .*\{")
_LINE = re.compile(r"\s*(?:ROOT )?%?([\w.\-~]+) = (.*?) ([a-z][\w\-]*)\(([^)]*)\)(.*)")
_ARRAY = re.compile(r"\b([a-z]\w*)\[([\d,]*)\](?:\{[^{}]*?(?:S\((\d+)\))?\})?")
_CALLED = re.compile(
    r"(?:calls|to_apply|true_computation|false_computation|branch_computations)=(\{[^}]*\}|%?[\w.\-~]+)"
)


class _Program:
    def __init__(self, text: str, mesh: Mapping[str, int]):
        self.mesh = mesh
        self.computations: dict[str, _Computation] = {}
        self.entry = ""
        self._known: dict[str, Traffic] = {}
        current: _Computation = {}
        for line in text.splitlines():
            if (head := _HEAD.match(line)) is not None:
                current = self.computations[head[2]] = {}
                self.entry = head[2] if head[1] else self.entry
            elif (found := _LINE.match(line)) is not None:
                operands = tuple(re.findall(r"%([\w.\-~]+)", found[4]))
                # A constant's value stands where the operands of others do.
                rest = found[4] if found[3] in ("constant", "parameter") else found[5]
                current[found[1]] = _Instruction(found[1], found[2], found[3], operands, rest)

    def traffic(self, name: str = "") -> Traffic:
        """Of a computation, by default the whole program."""
        if name not in self._known:
            self._known[name] = self._counted(self.computations[name or self.entry])
        return self._known[name]

    def _counted(self, inside: _Computation) -> Traffic:
        total, chains = Traffic(), set[str]()
        for instruction in inside.values():
            called = list(self._called(instruction))
            if instruction.kind == "while":
                trips = self._trips(instruction, inside)
                total.unknown_loops += trips is None
                total.add(self.traffic(_attribute(instruction, "body")), 1 if trips is None else trips)
            elif instruction.kind == "conditional":
                total.add(max(map(self.traffic, called), key=lambda branch: branch.hbm), 1)
            elif instruction.kind in ("call", "async-start"):
                for name in called:
                    total.add(self.traffic(name), 1)
            for place, each in self._collectives(instruction, inside):
                # One that XLA splits into a start, pieces among other work and an end is a chain.
                if (chain := re.search(r'chain_id="(\w+)"', each.rest)) is not None:
                    if chain[1] in chains:
                        continue
                    chains.add(chain[1])
                key, sent = self._collective(each, place, instruction)
                total.times[key] += 1
                total.sent[key] += sent
            total.hbm += self._hbm_bytes(instruction, inside)
            if (kernel := _kernel(instruction)) is not None:
                total.kernels[kernel] += 1
        return total

    def _called(self, instruction: _Instruction) -> Iterator[str]:
        for names in _CALLED.findall(instruction.rest):
            yield from (name.strip().lstrip("%") for name in names.strip("{}").split(","))

    # --- Loops ---

    def _trips(self, loop: _Instruction, around: _Computation) -> int | None:
        """How often a loop runs that counts up to a number."""
        if (known := re.search(r'"known_trip_count":\{"n":"(\d+)"', loop.rest)) is not None:
            return int(known[1])
        condition = self.computations[_attribute(loop, "condition")]
        body = self.computations[_attribute(loop, "body")]
        for compared in condition.values():
            if compared.kind != "compare" or "direction=LT" not in compared.rest:
                continue
            counter, bound = (condition[operand] for operand in compared.operands)
            limit, number = _constant(bound, condition), _element(counter)
            if number is None:
                continue
            start = _constant(_operand(_operand(loop, 0, around), number, around), around)
            step = self._step(_operand(_last(body), number, body), body)
            if limit is None and (hoisted := _element(bound)) is not None:
                limit = _constant(_operand(_operand(loop, 0, around), hoisted, around), around)
            if limit is not None and start is not None and step:
                return max(0, -((start - limit) // step))
        return None

    def _step(self, counted: _Instruction, body: _Computation) -> int | None:
        """By how much an iteration counts up."""
        if counted.kind == "fusion":
            inside = self.computations[next(self._called(counted))]
            return self._step(_last(inside), inside)
        if counted.kind != "add":
            return None
        return next((value for name in counted.operands if (value := _constant(body[name], body)) is not None), None)

    # --- Collectives ---

    def _collectives(
        self, instruction: _Instruction, around: _Computation
    ) -> Iterator[tuple[_Computation, _Instruction]]:
        """The collective that an instruction is, or those inside a fusion."""
        if instruction.kind.removesuffix("-start") in _COLLECTIVES:
            yield around, instruction
        elif instruction.kind == "fusion":
            inside = self.computations[next(self._called(instruction))]
            for each in inside.values():
                yield from self._collectives(each, inside)

    def _collective(
        self, instruction: _Instruction, around: _Computation, outer: _Instruction
    ) -> tuple[Collective, int]:
        """Over what it goes, and bytes that a device sends."""
        kind = instruction.kind.removesuffix("-start")
        given = sum(_bytes(around[operand].shape) for operand in instruction.operands)
        if kind == "collective-permute":
            pairs = re.search(r"source_target_pairs=\{(.*?)\}\}", instruction.rest)
            ids = [int(number) for number in re.findall(r"\d+", pairs[1])[:2]] if pairs else []
            return Collective(kind, self._axes(ids)), given
        group = self._group(instruction.rest)
        many = len(group)
        if kind == "all-reduce" and "all-reduce-scatter" in next(self._called(outer), ""):
            kind = "reduce-scatter"
        whole = {"all-gather": many * given, "all-reduce": 2 * given}.get(kind, given)
        return Collective(kind, self._axes(group)), whole * (many - 1) // many

    def _group(self, rest: str) -> Sequence[int]:
        """The first group of devices."""
        if listed := re.search(r"replica_groups=\{\{([\d,]*)\}", rest):
            return [int(number) for number in listed[1].split(",")]
        everyone = np.arange(math.prod(self.mesh.values()))
        if counted := re.search(r"replica_groups=\[([\d,]+)\](<=\S*)", rest):
            return _arranged(everyone, counted[2]).reshape(_numbers(counted[1]))[0].tolist()
        if named := re.search(r"replica_groups=mesh\[(.*?)\](?:, device_ids=\((.*?)\))? \{(.*?)\}", rest):
            sizes = {name: int(size) for name, size in re.findall(r"'(\w+)'=(\d+)", named[1])}
            ids = _arranged(everyone, named[2] or "").reshape(list(sizes.values()))
            over = re.findall(r"'(\w+)'", named[3])
            return ids[tuple(slice(None) if name in over else 0 for name in sizes)].ravel().tolist()
        return everyone.tolist()

    def _axes(self, ids: Sequence[int]) -> tuple[str, ...]:
        """The mesh axes along which these devices differ."""
        places = np.unravel_index(ids, tuple(self.mesh.values()))
        return tuple(axis for axis, numbers in zip(self.mesh, places) if len(set(numbers.tolist())) > 1)

    # --- HBM ---

    def _hbm_bytes(self, instruction: _Instruction, around: _Computation) -> int:
        kind = instruction.kind
        if kind in _FREE or kind.endswith("-done") or kind == "async-start":
            return 0
        if kind == "custom-call":
            estimate = re.search(r'"bytes_accessed":"(\d+)"', instruction.rest)
            return int(estimate[1]) if estimate else 0
        operands = [around[operand] for operand in instruction.operands]
        if kind == "fusion":
            inside = self.computations[next(self._called(instruction))]
            parameters = {int(each.rest): each for each in inside.values() if each.kind == "parameter"}
            read = sum(
                _read(parameters[number], inside, _in_hbm(operand.shape)) for number, operand in enumerate(operands)
            )
            return read + _written(_last(inside), inside, instruction.shape)
        if kind in _SLICED:
            return 2 * _sliced(instruction, around)
        if kind == "copy-start":  # the result is (destination, source, flag)
            return _in_hbm(operands[0].shape) + _in_hbm(instruction.shape.split("}, ")[0] + "}")
        if kind == "slice-start":  # ((source), destination, flag)
            made = instruction.shape.partition("), ")[2]
            return _bytes(made) + _in_hbm(made)
        if kind.endswith("-start"):  # the result holds the operands too
            return _in_hbm(instruction.shape)
        return sum(_in_hbm(operand.shape) for operand in operands) + _in_hbm(instruction.shape)


# Of these, operands are read or written in part: {kind: the operand that has the part's size; None: the result has}.
_SLICED = {"dynamic-slice": None, "slice": None, "gather": None, "dynamic-update-slice": 1, "scatter": 2}


def _sliced(instruction: _Instruction, around: _Computation) -> int:
    number = _SLICED[instruction.kind]
    return _in_hbm(instruction.shape if number is None else around[instruction.operands[number]].shape)


def _read(parameter: _Instruction, inside: _Computation, whole: int) -> int:
    """Bytes that a fusion reads of an operand: of one that it only slices, the slices."""
    if not whole:
        return 0
    users = [each for each in inside.values() if parameter.name in each.operands]
    read = 0
    for user in users:
        if user.kind == "bitcast":
            read += _read(user, inside, whole)
        elif user.kind in _SLICED and user.operands[0] == parameter.name and user.operands.count(parameter.name) == 1:
            # The shapes inside name no memory.
            read += 0 if _SLICED[user.kind] else _bytes(user.shape)
        else:
            return whole
    return min(read, whole)


def _written(root: _Instruction, inside: _Computation, shape: str) -> int:
    """Bytes that a fusion writes: of an array that it changes in place, what it changes."""
    parts = [inside[operand] for operand in root.operands] if root.kind == "tuple" else [root]
    arrays = list(_arrays(shape))
    if len(arrays) != len(parts):
        return _in_hbm(shape)
    total = 0
    for part, (size, memory) in zip(parts, arrays):
        while part.kind == "bitcast":
            part = inside[part.operands[0]]
        changed = _SLICED.get(part.kind)
        if not memory:
            total += size if changed is None else min(size, _bytes(inside[part.operands[changed]].shape))
    return total


# --- Text -------------------------------------------------------------------------------------------------------------


def _arrays(shape: str) -> Iterator[tuple[int, str]]:
    """Bytes of a shape's arrays, and the memory in which each lies: HBM has no number, VMEM 1; others hold flags."""
    for dtype, sizes, memory in _ARRAY.findall(shape):
        bits = _BITS.get(dtype) or (int(width[0]) if (width := re.findall(r"\d+", dtype)) else 0)
        yield -(-math.prod(_numbers(sizes)) * bits // 8), memory


def _bytes(shape: str) -> int:
    return sum(size for size, memory in _arrays(shape) if memory in ("", "1"))


def _in_hbm(shape: str) -> int:
    return sum(size for size, memory in _arrays(shape) if not memory)


def _numbers(text: str) -> list[int]:
    return [int(number) for number in re.findall(r"\d+", text)]


def _arranged(ids: np.ndarray, how: str) -> np.ndarray:
    """As XLA writes it, "<=[2,4]T(1,0)" or "[2,4]T(1,0)": the numbers in this shape, their axes in this order."""
    shape, order = re.search(r"\[([\d,]+)\]", how), re.search(r"T\(([\d,]+)\)", how)
    ids = ids.reshape(_numbers(shape[1])) if shape else ids
    return ids.transpose(_numbers(order[1])) if order else ids


def _attribute(instruction: _Instruction, name: str) -> str:
    found = re.search(rf"\b{name}=%?([\w.\-~]+)", instruction.rest)
    return found[1] if found else ""


def _last(computation: _Computation) -> _Instruction:
    return computation[next(reversed(computation))]


def _operand(instruction: _Instruction, number: int, around: _Computation) -> _Instruction:
    return around[instruction.operands[number]]


_SAME = ("copy", "bitcast", "convert", "reshape", "copy-start", "copy-done")


def _constant(instruction: _Instruction, around: _Computation) -> int | None:
    while instruction.kind in _SAME:
        instruction = _operand(instruction, 0, around)
    return int(instruction.rest) if instruction.kind == "constant" and instruction.rest.isdigit() else None


def _element(instruction: _Instruction) -> int | None:
    """Which element of the loop's carry this is."""
    return int(_attribute(instruction, "index")) if instruction.kind == "get-tuple-element" else None


def _kernel(instruction: _Instruction) -> str | None:
    if instruction.kind != "custom-call" or 'custom_call_target="tpu_custom_call"' not in instruction.rest:
        return None
    named = re.search(r"(\w+)/pallas_call", instruction.rest)
    return named[1] if named else instruction.name.partition(".")[0]
