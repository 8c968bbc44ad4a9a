"""Tests run on the CPU, whatever the machine has; TPUs are only compiled for. Set before jax is imported."""

import ctypes
import gc
import importlib.metadata
import os
import signal
import sys
import tempfile

import pytest

if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:  # of a job in the background, and tests send it to programs
    signal.signal(signal.SIGINT, signal.default_int_handler)
os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")  # libtpu: ask no metadata server
os.environ.setdefault("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")  # several test processes on one machine
# Kernels are simulated by callbacks, which can wait for each other for ever on two threads if dispatch is asynchronous.
os.environ.setdefault("JAX_CPU_ENABLE_ASYNC_DISPATCH", "0")
# Most of the tests' time is LLVM's for the CPU, and their programs are small: a third less without its optimisations.
_QUICK = "--xla_backend_optimization_level=0 --xla_llvm_disable_expensive_passes=true"
_QUICK += " --xla_cpu_parallel_codegen_split_count=1"  # a tenth less: programs of the tests are too small to share out
# These emitters are nearly twice as quick as the newer ones, which are what later versions have.
if importlib.metadata.version("jaxlib").startswith("0.10."):
    _QUICK += " --xla_cpu_use_fusion_emitters=false"
# Meshes have eight devices, which on a busy machine wait for each other longer than XLA's forty seconds.
_DEVICES = "--xla_force_host_platform_device_count=8 --xla_cpu_collective_call_terminate_timeout_seconds=600"
os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {_QUICK} {_DEVICES}".strip()
# Processes share what they compile: the workers of a run, and the commands that tests start. Emptied with the run.
if "JAX_COMPILATION_CACHE_DIR" not in os.environ:
    _compiled = tempfile.TemporaryDirectory(prefix="attnlab-tests-")
    os.environ["JAX_COMPILATION_CACHE_DIR"] = _compiled.name
    os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0"
    os.environ["JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES"] = "-1"
# Tracing makes millions of small objects that live on: looking through them less often saves a twentieth of the time.
gc.set_threshold(100_000, 50, 100)


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config, log):
    """A module's tests share what they compile, so one process runs them all, unless --dist says otherwise."""
    from xdist.scheduler import LoadFileScheduling

    return LoadFileScheduling(config, log) if config.getoption("dist") == "load" else None


def pytest_collection_modifyitems(items):
    """The longest modules first, which are those of commands, so that no process is left with one at the end."""
    items.sort(key=lambda item: len(item.path.parts))


_MOST_RESIDENT = 3 * 2**29  # bytes, at which a test process lets go of what it compiled


@pytest.fixture(autouse=True)
def compiled_programs_end_in_time():
    """A process that keeps all that its tests compile takes more than four gigabytes in the end."""
    yield
    if sys.platform == "linux" and _resident() > _MOST_RESIDENT:
        import jax

        jax.clear_caches()
        gc.collect()
        ctypes.CDLL(None).malloc_trim(0)  # glibc keeps what was freed, in pieces too small for what comes


def _resident():
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * os.sysconf("SC_PAGESIZE")
