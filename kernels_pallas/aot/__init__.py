"""Kernels compiled for TPUs on a machine without one.

    python -m kernels_pallas.aot            every kernel x TPU x shape: compiles or why not, memory, cycles
    python -m kernels_pallas.aot --help

compile.py compiles any jax function, schedule.py counts cycles, table.py has the rows of our kernels, peers.py others':
JAX's, and those of libraries that are installed. Needs libtpu (the extra `tpu-aot`).
"""
