"""The kernels of kernels_pallas as implementations of the mechanisms: one file per family or mechanism, both backends.

A mechanism's table of implementations takes in KERNELS, or kernels(...) where the kernels are made of another
mechanism's. Each entry is called with the mechanism's own xla form first, whose derivatives serve where kernels have
none; so nothing here imports a mechanism.
"""
