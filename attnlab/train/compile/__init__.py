"""A run's training step compiled for a pod on a machine without one: memory, FLOPs, traffic, and a roofline."""

from attnlab.train.compile.chips import described_devices, peak_flops
from attnlab.train.compile.step import CompiledStep, compile_step
