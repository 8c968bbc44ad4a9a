"""Attention kernels in Pallas, by backend: tpu/, gpu/. aot/ compiles them for TPUs and GPUs without one.

Plain functions on arrays that know nothing of attnlab, which loads them when it chooses them.
"""
