"""Tests run on the CPU, whatever the machine has; TPUs are only compiled for. Set before jax is imported."""

import os

os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")  # libtpu: ask no metadata server
os.environ.setdefault("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")  # several test processes on one machine
# Kernels are simulated by callbacks, which can wait for each other for ever on two threads if dispatch is asynchronous.
os.environ.setdefault("JAX_CPU_ENABLE_ASYNC_DISPATCH", "0")
# Most of the tests' time is LLVM's for the CPU, and their programs are small: a third less without its optimisations.
_QUICK = "--xla_backend_optimization_level=0 --xla_llvm_disable_expensive_passes=true"
os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {_QUICK}".strip()
