"""Whether a run fits into memory: an estimate from shapes, beside what there is, before anything is allocated."""

import ctypes
import inspect
import math
import os
import sys
from pathlib import Path
from typing import Any

import jax
from flax import nnx

from attnlab import nn
from attnlab.train.mesh import Mesh, devices_of_runs
from attnlab.train.tasks.base import Task

# Parameters, their gradients and two moments of Adam, all float32.
_STATE_BYTES = 4 * 4
# A batch as it is drawn, those that are drawn ahead, and the one on the device.
_BATCHES = 6
# Where batches and state take smaller shares of the memory than these, the backward pass is not looked at.
_LOOKED_AT = {"batches": 2**-10, "state": 2**-6}


# mallopt's numbers of them, and bytes; the last is the most that glibc takes.
_TRIM_THRESHOLD, _TOP_PAD, _MMAP_THRESHOLD = (-1, 2**30), (-2, 2**26), (-3, 2**25)


def keep_freed_memory() -> None:
    """Has the process keep host memory that it frees, for what it allocates next. Only where the C library is glibc.

    On a CPU XLA allocates a step's buffers anew for each step. Of these glibc gives some back to the system at once,
    how many depends on where in the heap they happen to lie: of twelve processes that ran the same training step, some
    met 40 page faults per step and others 4000, which took a fifth of their time. It is of the whole process: for a
    program of ours, not for a library's call.
    """
    if sys.platform == "linux" and hasattr(c := ctypes.CDLL(None), "mallopt"):
        for option, value in (_MMAP_THRESHOLD, _TOP_PAD, _TRIM_THRESHOLD):
            c.mallopt(option, value)


def check_memory(model: nnx.Module, task: Task, batch_size: int, mesh: Mesh) -> None:
    """Raises ValueError where a step needs more memory than there is, by an estimate that is rather too low.

    It is of one device: its part of the state, which fsdp and tensor share, and of the batch, which data, fsdp and
    context share. The estimate is the state, batches of the task's inputs, and, where these two are not small beside
    the memory, what the backward pass keeps of the forward pass. For the quickstart's model with batches of 400 that
    last part is 1.5 GiB, and 3.1 with a gated delta rule; on a CPU these runs took 1.7 and 3.1 GiB more than one with a
    batch of 16.
    """
    sizes = mesh.sizes(len(devices_of_runs()))
    of_state, of_batch = sizes["fsdp"] * sizes["tensor"], sizes["data"] * sizes["fsdp"] * sizes["context"]
    there = memory(math.prod(sizes.values()) // jax.process_count())
    variables = nnx.state(model, nnx.Any(nnx.Param, nn.Buffer))
    parameters = sum(math.prod(leaf.get_value().shape) for _, leaf in nnx.to_flat_state(variables))
    state = _STATE_BYTES * parameters // of_state
    parts = {"parameters, gradients and moments": state}
    if state > there:
        numbers = f"a model of {parameters:,} parameters, buffers among them,"
        _refuse(_largest_option(model), numbers, parts, there)
    parts["batches"] = _BATCHES * _size(task.inputs(batch_size)) // of_batch
    is_large = state > _LOOKED_AT["state"] * there or parts["batches"] > _LOOKED_AT["batches"] * there
    if is_large and sum(parts.values()) <= there:
        parts["what the backward pass keeps"] = _kept(model, task, batch_size) // of_batch
    if sum(parts.values()) > there:
        name, struct = next(iter(task.inputs(batch_size).items()))
        example = f"{name} {list(struct.shape[1:])}"
        if sum(parts.values()) > batch_size * there and struct.ndim == 2:
            _refuse(f"length: got {struct.shape[1]}", f"a batch of {batch_size} of {example}", parts, there)
        _refuse(f"batch_size: got {batch_size}", f"a batch of so many {example}", parts, there)


def memory(devices: int = 1) -> int:
    """Bytes that each of so many devices can have: an accelerator's, or a share of the machine's or the container's."""
    limits = [(device.memory_stats() or {}).get("bytes_limit", 0) for device in jax.local_devices()]
    if jax.default_backend() != "cpu" and all(limits):
        return min(limits)
    machine = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    for file in ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes"):
        text = Path(file).read_text().strip() if Path(file).is_file() else "max"
        machine = min(machine, int(text)) if text.isdigit() else machine
    return machine // devices


def _kept(model: nnx.Module, task: Task, batch_size: int) -> int:
    """Bytes that the forward pass of the training loss leaves to the backward pass; nothing is computed."""

    def loss(values: nn.Parameters, batch: dict[str, Any]) -> jax.Array:
        return task.loss(nn.bind(model, values), batch, key=jax.random.key(0))[0]

    values = jax.eval_shape(lambda: nn.initialize(model, jax.random.key(0)))
    kept = jax.eval_shape(
        lambda values, batch: jax.vjp(lambda values: loss(values, batch), values)[1], values, task.inputs(batch_size)
    )
    return _size(kept)


def _size(structs: Any) -> int:
    return sum(math.prod(leaf.shape) * leaf.dtype.itemsize for leaf in jax.tree.leaves(structs))


def _largest_option(model: nnx.Module) -> str:
    """The option that makes the largest parameter as large as it is, "features: got 10000000"; or the parameter."""
    variables = nnx.to_flat_state(nnx.state(model, nnx.Any(nnx.Param, nn.Buffer)))
    path, shape = max(
        ((path, leaf.get_value().shape) for path, leaf in variables), key=lambda found: math.prod(found[1])
    )
    modules = sorted(nnx.iter_modules(model), key=lambda found: len(found[0]))  # the model itself first
    for _, module in modules:
        for name in inspect.signature(type(module).__init__).parameters:
            # An option of the model may decide another one's default, so the first that is about the largest.
            value = getattr(module, name, None)
            if type(value) is int and value in shape and 4 * value >= max(shape):
                return f"{name}: got {value}"
    return f"{'/'.join(map(str, path))}: got {list(shape)}"


def _refuse(given: str, what: str, parts: dict[str, int], there: int) -> None:
    shown = ", ".join(f"{part} {_bytes(count)}" for part, count in parts.items())
    needed = _bytes(sum(parts.values()))
    raise ValueError(f"{given}; {what} needs about {needed} of memory ({shown}), and there is {_bytes(there)}")


def _bytes(count: int) -> str:
    return f"{count / 2**30:,.1f} GiB"
