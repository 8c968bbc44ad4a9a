"""Several processes that train a run together, by jax.distributed: how they come together, agree and part.

All of them compute, and write their shards of a checkpoint. The first (jax.process_index() 0) alone owns the run's
folder, writes everything else there, and prints. What it decides it tells the others, so that all do the same.
"""

import collections
import contextvars
import itertools
import json
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
from jax.experimental import multihost_utils
from jax.sharding import NamedSharding, PartitionSpec

from attnlab.errors import OwnedError, RunError, UserError

_LONGEST = 7 * 86400  # seconds that the first process may take for something, such as waiting for another run's end
_DELAY = 2  # steps that the devices may be behind the host
_TOGETHER = 60  # seconds within which processes fail that fail alike
_KINDS = {kind.__name__: kind for kind in (OwnedError, UserError)}
_barriers, _failures = itertools.count(), itertools.count()
# Whether the first process acts for all, who wait for what it gives: nothing that it calls there may wait for them.
_acting: contextvars.ContextVar[bool] = contextvars.ContextVar("attnlab_acting", default=False)


def join(coordinator: str | None, processes: int | None, process: int | None, heartbeat: int) -> None:
    """Joins the other processes, before anything uses a device.

    Args:
      coordinator: HOST:PORT of the first process, where it will listen. processes: how many there are. process: which
        of them this is, from 0. None for all three: the cluster's environment says it (TPU pods, SLURM, Open MPI, ...).
      heartbeat: seconds after which a process that has died is noticed, and the others end.

    Raises:
      UserError: no cluster's environment is there.
      RunError: the others cannot be reached.
    """
    # It takes SIGTERM away from attnlab.signals and knows no SIGINT; `make_agreement` serves both.
    jax.config.update("jax_enable_preemption_service", False)
    try:
        jax.distributed.initialize(
            coordinator,
            processes,
            process,
            heartbeat_timeout_seconds=heartbeat,
            shutdown_timeout_seconds=heartbeat,
        )
    except ValueError as error:
        reason = str(error).rstrip(".")
        raise UserError(
            f"distributed: no cluster's environment is here ({reason}); give --coordinator, --processes and --process"
        ) from error
    except jax.errors.JaxRuntimeError as error:
        raise RunError(f"distributed: the other processes are not reached ({_first_line(error)})") from error


def leave() -> None:
    """Waits until all processes are through, so that none takes another's end for a failure."""
    if jax.distributed.is_initialized():
        jax.distributed.shutdown()


def is_first() -> bool:
    """Whether this is the process that writes and prints."""
    return jax.process_index() == 0


def lost_process(error: Exception) -> str | None:
    """In a few words, an error that another process's end has caused; None for any other."""
    signs = ("Gloo", "NCCL", "UNAVAILABLE", "DEADLINE_EXCEEDED", "Barrier")
    is_one = jax.distributed.is_initialized() and isinstance(error, jax.errors.JaxRuntimeError)
    return _first_line(error) if is_one and any(sign in str(error) for sign in signs) else None


def _first_line(error: Exception) -> str:
    line = str(error).strip().partition("\n")[0]
    return line if len(line) <= 100 else f"{line[:97].rstrip()}..."


def by_first(action: Callable[[], Any]) -> Any:
    """What `action` gives, as JSON, called by the first process alone; what it raises is raised by all."""
    if _is_alone():
        return action()
    answer: dict[str, Any] = {}
    failure: Exception | None = None
    if is_first():
        token = _acting.set(True)
        try:
            answer = {"result": action()}
        except Exception as error:
            failure = error
            answer = {"error": str(error), "kind": type(error).__name__}
        finally:
            _acting.reset(token)
    answer = _told(answer)
    if failure is not None:
        raise failure
    if "error" in answer:
        raise _KINDS.get(answer["kind"], RunError)(answer["error"])
    return answer["result"]


def _is_alone() -> bool:
    """Whether there is no other process to ask or to wait for."""
    return jax.process_count() == 1 or _acting.get()


def _told(value: Any) -> Any:
    """The first process's value, as JSON."""
    meet()
    text = np.frombuffer(json.dumps(value).encode(), np.uint8)
    size = int(multihost_utils.broadcast_one_to_all(np.int32(len(text))))
    room = 1 << (size - 1).bit_length()  # so that few sizes are compiled
    sent = np.resize(text, room) if is_first() else np.zeros(room, np.uint8)
    return json.loads(bytes(multihost_utils.broadcast_one_to_all(sent)[:size]))


def meet() -> None:
    """Waits for the other processes, however long they take; a collective of their devices may not wait long."""
    if not _is_alone():
        ocp.multihost.get_barrier_sync_fn()(key=f"attnlab {next(_barriers)}", timeout_ms=1000 * _LONGEST)


def all_failed() -> bool:
    """Whether what failed here has failed in the other processes too, so that all can go on with something else.

    The others come here within _TOGETHER then; else they wait for this process where nothing but its end ends that.
    """
    if _is_alone():
        return True
    try:
        ocp.multihost.get_barrier_sync_fn()(key=f"attnlab failure {next(_failures)}", timeout_ms=1000 * _TOGETHER)
    except jax.errors.JaxRuntimeError:
        return False
    return True


def first_failure(failure: str | None) -> str | None:
    """What failed in the first of the processes in which something did; None if nothing did anywhere."""
    if _is_alone():
        return failure
    meet()
    text = np.frombuffer((failure or "").encode()[:200], np.uint8)
    padded = np.zeros(200, np.uint8)
    padded[: len(text)] = text
    for row in multihost_utils.process_allgather(padded):
        if row.any():
            return bytes(row[row > 0]).decode(errors="replace")
    return None


def make_agreement(mesh: jax.sharding.Mesh) -> Callable[..., int]:
    """A function (number, step, now) that gives the largest number that any process gave, to all of them the same.

    Every process calls it after every step, whose number on the devices is `step`. With `now` this call's numbers
    count; else, so that the devices need not be waited for, those of _DELAY calls before, if there were any.
    """
    if jax.process_count() == 1:
        return lambda number, step, *, now: number
    everywhere, apart = NamedSharding(mesh, PartitionSpec()), NamedSharding(mesh, PartitionSpec(mesh.axis_names))
    largest = jax.jit(lambda numbers, step: jnp.max(numbers), out_shardings=everywhere, keep_unused=True)
    # CPUs of several processes block for ever where two programs with collectives overlap.
    delay = 0 if jax.default_backend() == "cpu" else _DELAY
    computed: collections.deque[jax.Array] = collections.deque()

    def agreement(number: int, step: jax.Array, *, now: bool) -> int:
        own = np.full(mesh.local_mesh.size, number, np.int32)
        computed.append(largest(jax.make_array_from_process_local_data(apart, own, (mesh.size,)), step))
        found = 0
        while len(computed) > (0 if now else delay):
            found = max(found, int(computed.popleft()))
        return found

    return agreement
