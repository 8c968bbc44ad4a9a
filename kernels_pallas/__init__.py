"""Attention kernels in Pallas, by backend: tpu/. aot/ compiles them for TPUs without one.

Plain functions on arrays that know nothing of attnlab, which loads them when it chooses them.
"""
