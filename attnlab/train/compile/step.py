"""A run's training step, compiled for devices that are not there: whether it fits, and what bounds its speed."""

import dataclasses
import math
import time
from collections.abc import Mapping
from importlib import metadata
from typing import Any

import jax
import numpy as np

from attnlab import nn
from attnlab.errors import RunError, UserError, out_of_memory
from attnlab.train.compile.chips import CHIPS, Chip
from attnlab.train.compile.flops import product_flops
from attnlab.train.compile.program import traffic
from attnlab.train.loop import Experiment
from attnlab.train.mesh import shown_sizes
from attnlab.train.step import batch_shapes, make_optimizer, make_step, state_shapes

_GIB = 2**30


@dataclasses.dataclass(frozen=True)
class CompiledStep:
    """What is known of a step; all numbers are of one device and one step.

    Args:
      topology, devices, mesh: what it is compiled for; sizes of the mesh by axis.
      parameters, batch_size, units, unit: of the model, of a batch, and in an example ("token").
      hbm: bytes that a program may take.
      memory: bytes by what takes them, "arguments" (the state, updated in place, and the batch), "temporaries", "code";
        None where the compiler found that it does not fit, and `refusal` says why.
      flops: of matrix products and kernels; model_flops: of the model, three times its forward.
      hbm_bytes: read and written.
      collectives: {"kind", "axes", "times", "bytes": sent by a device}.
      kernels: calls by name.
      seconds: the roofline's bounds, "compute", "HBM" and "interconnect".
      unknown_loops: loops that are counted once, since their trips are not known.
      cpu_seconds: what tracing and compiling took. versions: of what compiled it.
      effort: XLA's optimization level, "O0" to "O3"; "UNKNOWN" is its usual one.
    """

    topology: str
    devices: int
    mesh: dict[str, int]
    parameters: int
    batch_size: int
    units: int
    unit: str
    hbm: float
    memory: dict[str, int] | None
    refusal: str = ""
    flops: float = 0.0
    model_flops: float = 0.0
    hbm_bytes: int = 0
    collectives: list[dict[str, Any]] = dataclasses.field(default_factory=list)
    kernels: dict[str, int] = dataclasses.field(default_factory=dict)
    seconds: dict[str, float] = dataclasses.field(default_factory=dict)
    unknown_loops: int = 0
    cpu_seconds: float = 0.0
    versions: dict[str, str] = dataclasses.field(default_factory=dict)
    effort: str = "UNKNOWN"

    @property
    def fits(self) -> bool:
        return self.memory is not None and sum(self.memory.values()) <= self.hbm

    @property
    def shown_memory(self) -> str:
        if self.memory is None:
            return f"does not fit: {self.refusal}"
        amount = f"{sum(self.memory.values()) / _GIB:.2f} of {self.hbm / _GIB:.2f} GiB"
        return amount if self.fits else f"{amount}: does not fit"

    @property
    def sent(self) -> int:
        """Bytes over the interconnect."""
        return sum(each["bytes"] for each in self.collectives)

    def __str__(self) -> str:
        lines = [
            f"{self.topology}: {self.devices} devices, {shown_sizes(self.mesh)}",
            f"{self.parameters / 1e6:,.1f} M parameters; {self.batch_size} x {self.units:,} {self.unit}s a step",
        ]
        if self.memory is None:
            return "\n".join([*lines, self.shown_memory])
        parts = ", ".join(f"{name} {size / _GIB:.2f}" for name, size in self.memory.items())
        compute, hbm, interconnect = (self.seconds[name] for name in ("compute", "HBM", "interconnect"))
        least, most = max(self.seconds.values()), sum(self.seconds.values())
        peak = self.seconds["compute"] / self.flops * self.model_flops if self.flops else 0.0
        lines += [
            "of one device and one step:",
            f"  memory        {self.shown_memory} ({parts})" + ", fits" * self.fits,
            f"  FLOPs         {self.flops:.3g} of products and kernels; {self.model_flops:.3g} of the model",
            f"  HBM           {self.hbm_bytes / 1e9:,.1f} GB read and written",
            f"  interconnect  {self.sent / 1e9:,.2f} GB sent",
        ]
        for each in self.collectives:
            axes = " x ".join(each["axes"]) or "none"
            lines.append(f"    {axes:<24} {each['kind']:<19} {each['times']:>6} times {each['bytes'] / 1e6:>12,.2f} MB")
        shown = ", ".join(f"{name} {count}" for name, count in self.kernels.items()) or "none"
        lines += [
            f"  kernels       {shown}",
            f"roofline, an estimate: {compute * 1e3:,.1f} ms of products, {hbm * 1e3:,.1f} ms of HBM, "
            f"{interconnect * 1e3:,.1f} ms of interconnect;",
            f"  a step takes {least * 1e3:,.1f} ms if they all overlap and {most * 1e3:,.1f} ms if nothing does; the "
            f"model's FLOPs are {peak / least:.0%} to {peak / most:.0%} of the peak",
        ]
        if self.unknown_loops:
            lines.append(f"  {self.unknown_loops} loops are counted once: their trips are not known")
        versions = ", ".join(f"{name} {version}" for name, version in self.versions.items())
        at = f" at {self.effort}" * (self.effort != "UNKNOWN")
        return "\n".join([*lines, f"compiled in {self.cpu_seconds:.0f} CPU seconds by {versions}{at}"])


def compile_step(experiment: Experiment, topology: str, devices: tuple[jax.Device, ...]) -> CompiledStep:
    """Compiles the training step that a run of this experiment would take.

    experiment: built inside `mesh.described(devices)`. devices: of the topology (`described_devices`).

    Raises:
      UserError: the mesh is not over all of the devices.
      RunError: the compiler refuses the program for another reason than its size.
    """
    start = time.process_time()
    model, task, batch_size = experiment.model, experiment.task, experiment.batch_size
    mesh = experiment.mesh.build(devices)
    if mesh.size != len(devices):
        allowed = f"need all {len(devices)} of {topology}; an axis of -1 takes what the rest leaves"
        raise UserError(f"mesh: got {mesh.size} devices; {allowed}")
    chip, costs = CHIPS[topology.partition(":")[0]], task.costs(model)
    optimizer = make_optimizer(experiment.optimizer, experiment.steps)
    key, parts, dtype = jax.random.key(experiment.seed), experiment.accumulation, experiment.gradient_dtype
    step = make_step(model, task, optimizer, key, mesh, parts, dtype)
    traced = step.trace(state_shapes(model, task, batch_size, optimizer, mesh), batch_shapes(task, batch_size, mesh))
    facts = {
        "topology": topology,
        "devices": mesh.size,
        "mesh": dict(mesh.shape),
        "parameters": nn.count_parameters(model),
        "batch_size": batch_size,
        "units": costs["units"],
        "unit": costs["unit"],
        "hbm": chip.hbm,
        "versions": {name: metadata.version(name) for name in ("jax", "libtpu")},
        "effort": jax.config.values["jax_optimization_level"],
    }
    try:
        compiled = traced.lower().compile()
    except jax.errors.JaxRuntimeError as error:
        line = " ".join(str(error).split())[:300]
        if not out_of_memory(error):
            raise RunError(f"{topology}: the compiler refuses the step: {line}") from error
        return CompiledStep(**facts, memory=None, refusal=line, cpu_seconds=time.process_time() - start)
    moved, sizes = traffic(compiled.as_text(), mesh.shape), compiled.memory_analysis()
    flops = product_flops(traced, mesh.size)
    collectives = [
        {"kind": each.kind, "axes": list(each.axes), "times": moved.times[each], "bytes": moved.sent[each]}
        for each in sorted(moved.times, key=lambda each: (each.axes, each.kind))
    ]
    return CompiledStep(
        **facts,
        memory={
            "arguments": sizes.argument_size_in_bytes,
            "temporaries": sizes.temp_size_in_bytes + sizes.output_size_in_bytes - sizes.alias_size_in_bytes,
            "code": sizes.generated_code_size_in_bytes,
        },
        flops=flops,
        model_flops=3 * costs["flops"] * costs["units"] * batch_size / mesh.size,
        hbm_bytes=moved.hbm,
        collectives=collectives,
        kernels=dict(sorted(moved.kernels.items())),
        seconds={
            "compute": flops / chip.flops,
            "HBM": moved.hbm / chip.bandwidth,
            "interconnect": math.fsum(_seconds(mesh, chip, each) for each in collectives),
        },
        unknown_loops=moved.unknown_loops,
        cpu_seconds=time.process_time() - start,
    )


def _seconds(mesh: jax.sharding.Mesh, chip: Chip, collective: Mapping[str, Any]) -> float:
    """As long as the links take to send it, both of every axis of the torus along which its mesh axes lie."""
    along = [number for number, axis in enumerate(mesh.axis_names) if axis in collective["axes"]]
    if not along:
        return 0.0
    group = mesh.devices[tuple(slice(None) if number in along else 0 for number in range(mesh.devices.ndim))]
    places: Any = np.array([device.coords for device in group.flat])
    torus_axes = sum(len(set(numbers)) > 1 for numbers in places.T.tolist())
    return collective["bytes"] / (chip.link * min(chip.links, 2 * max(torus_axes, 1)))
