"""Each wait, arrival and commit of a kernel is needed: where one is left out, the simulation of jax 0.12 raises, gives
other numbers, or waits for ever. Products are not asynchronous there, so nothing is asked of what orders them alone."""

import itertools
import multiprocessing
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas import mosaic_gpu as plgpu

from kernels_pallas.gpu import banded_flash, cached_flash, chunked_linear, simulation, tilted
from kernels_pallas.gpu.banded_covariance import banded_covariance
from kernels_pallas.gpu.banded_flash import banded_flash_attention
from kernels_pallas.gpu.banded_flash_backward import banded_flash_gradients
from kernels_pallas.gpu.banded_parallax import banded_parallax
from kernels_pallas.gpu.cached_flash import cached_flash_attention
from kernels_pallas.gpu.chunked_linear import chunked_linear_attention
from kernels_pallas.gpu.linear_step import linear_step
from kernels_pallas.patterns import Intervals

pytestmark = pytest.mark.skipif(
    jax.__version_info__ < (0, 12), reason="jax 0.10 and 0.11 look for fewer races, and wait for ever after an error"
)
LENGTH, WINDOW = 768, 500  # last queries: tiles seen in part, in full, in part, more than there are slots
_LIMIT = 15  # seconds, of which a whole run takes 3 on an idle machine


def flash():
    query, key, value = _tokens(3)
    return banded_flash_attention(query, key, value, pattern=_pattern(), scale=0.1)


def gradients():
    query, key, value, out, out_gradient = _tokens(5)
    lse = jnp.full(query.shape[:3], 7.0, jnp.float32)
    arrays = (query, key, value, out, lse, out_gradient, jnp.zeros_like(lse))
    return banded_flash_gradients(*arrays, pattern=_pattern(), scale=0.1)


def gated_delta():
    """Of four chunks, which are more than there are slots."""
    query, key, value = (x[:, :256] for x in _tokens(3))
    state, gates = jnp.zeros((1, 1, 64, 64)), jnp.full((1, 256, 1), 0.5)
    return chunked_linear_attention(query, key / 8, value, -gates, gates, state)[:2]


def parallax():
    query, key, value, probe = _tokens(4)
    return banded_parallax(query, key, value, probe / 8, pattern=_pattern(), scale=0.1)


def covariance():
    query, key, value, mean = _tokens(4)
    lse, direction = jnp.full(query.shape[:3], 7.0, jnp.float32), mean.astype(jnp.float32) / 8
    return banded_covariance(query, key, value, direction, lse, direction, direction, pattern=_pattern(), scale=0.1)


def decode_cache():
    query, key, value = _tokens(3)
    visible = jnp.ones((1, 1, LENGTH), bool)
    return cached_flash_attention(query[:, :1], key, value, visible, jnp.full(1, LENGTH), scale=0.1)


def decode_linear():
    query, key, value = (x[:, 0].astype(jnp.float32) for x in _tokens(3))
    return linear_step(jnp.ones((1, 1, 64, 64)), query, key, value, key / 9, jnp.full((1, 1), 0.5))


KERNELS = {
    kernel.__name__: kernel
    for kernel in (flash, gradients, gated_delta, parallax, covariance, decode_cache, decode_linear)
}


def _tokens(count):
    rng = np.random.default_rng(0)
    return [jnp.asarray(rng.normal(size=(1, LENGTH, 1, 64)), jnp.bfloat16) for _ in range(count)]


def _pattern():
    return Intervals(lambda query: (query - WINDOW + 1, query + 1), LENGTH, LENGTH)


KINDS = ("barrier_wait", "barrier_arrive", "commit_smem", "wait_smem_to_gmem")


def leave_out(kind, number):
    """Patches Mosaic's function so that its call of this number, in the order of tracing, does nothing; gives the count
    of its calls. A simulated product's own commit is none of the kernel's."""
    original, calls = getattr(plgpu, kind), itertools.count()

    def call(*arguments, **options):
        if sys._getframe(1).f_code.co_name == "_ordered":
            return original(*arguments, **options)
        return None if next(calls) == number else original(*arguments, **options)

    setattr(plgpu, kind, call)
    return lambda: next(calls)


def _run(connection, kernel, kind, number):
    count = leave_out(kind, number)
    for module in (banded_flash, chunked_linear, tilted):
        module._MOST_STAGES = 2
    cached_flash._BLOCKS = 2  # parts of six tiles, which are more than there are slots
    try:
        with simulation.simulated(detect_races=True):
            results = jax.block_until_ready(KERNELS[kernel]())
    except Exception as error:
        connection.send((type(error).__name__, None))
    else:
        connection.send((count(), jax.tree.map(np.asarray, results)))


def _outcome(kernel, kind, number):
    """(number of calls, results) as they come in a process of its own; or why there are none."""
    context = multiprocessing.get_context("spawn")
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=_run, args=(sender, kernel, kind, number), daemon=True)
    process.start()
    sender.close()
    try:
        return receiver.recv() if receiver.poll(_LIMIT) else ("waits for ever", None)
    except EOFError:
        return "its process ended", None
    finally:
        process.kill()
        process.join()


# Kernels without one of a kind: a block of theirs has one warpgroup, which fills its own slots again.
WITHOUT = {("gated_delta", "barrier_arrive"), ("decode_linear", "barrier_arrive")}
# What a simulation does not show, by the number in the order of tracing.
UNSEEN = {
    # The wait for a slot that is not filled again, which jax 0.10 wants.
    ("flash", "barrier_wait"): (6,),
    ("gradients", "barrier_wait"): (4,),
    # A wait for one copy counts as one for all that the warpgroup began before it.
    ("decode_cache", "barrier_wait"): (0,),
    # Commits that the next one covers before the copy.
    ("flash", "commit_smem"): (0,),
    ("gradients", "commit_smem"): (0,),
    ("decode_cache", "commit_smem"): (0, 1),
    # Between what a warpgroup stores and its own product.
    ("gated_delta", "commit_smem"): (1, 2, 3, 4, 5, 6, 8, 9, 12),
    # Between threads of a warpgroup, which are one.
    ("decode_linear", "commit_smem"): (0,),
}


@pytest.mark.slow
@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("kind", KINDS)
def test_a_kernel_without_one_of_them_is_found_out(kernel, kind):
    count, right = _outcome(kernel, kind, -1)
    assert right is not None, count
    assert (count == 0) == ((kernel, kind) in WITHOUT)
    found = {number: _outcome(kernel, kind, number) for number in range(count)}
    unnoticed = [
        number
        for number, (_, results) in found.items()
        if results is not None
        and all(np.array_equal(x, y) for x, y in zip(jax.tree.leaves(results), jax.tree.leaves(right), strict=True))
    ]
    assert tuple(unnoticed) == UNSEEN.get((kernel, kind), ())
