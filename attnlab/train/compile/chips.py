"""What a chip of each TPU generation has, and the devices of a topology that is not there."""

import importlib.util
import math
import re
from typing import NamedTuple

import jax

from attnlab.errors import UserError, missing_package
from kernels_pallas.aot.compile import TOPOLOGIES, topology_devices

_GIB = 2**30


class Chip(NamedTuple):
    """Of one of JAX's devices.

    hbm: bytes that libtpu leaves to a program. flops, bandwidth: per second, peak, of bfloat16 products and of HBM.
    link: bytes per second that one of its links sends, of `links`. pod: the most chips.
    """

    hbm: float
    flops: float
    bandwidth: float
    link: float
    links: int
    pod: int


# docs.cloud.google.com/tpu/docs/v5e, v5p, v6e and tpu7x, which give the interconnect of a chip in both directions
# together; hbm is what libtpu 0.0.42 says is available when a program needs more. A chip of tpu7x is two devices.
CHIPS = {
    "v5e": Chip(15.75 * _GIB, 197e12, 819e9, 400e9 / 2 / 4, 4, 256),
    "v5p": Chip(95.74 * _GIB, 459e12, 2765e9, 1200e9 / 2 / 6, 6, 8960),
    "v6e": Chip(31.25 * _GIB, 918e12, 1638e9, 800e9 / 2 / 4, 4, 256),
    "tpu7x": Chip(94.75 * _GIB, 2307e12 / 2, 7380e9 / 2, 1200e9 / 2 / 6 / 2, 6, 9216),
}


_KINDS = {"TPU v5 lite": "v5e", "TPU v5": "v5p", "TPU v6 lite": "v6e", "TPU7x": "tpu7x"}
# Of dense bfloat16 products, from NVIDIA's data sheets.
_GPU_FLOPS = {
    "NVIDIA A100-SXM4-40GB": 312e12,
    "NVIDIA A100-SXM4-80GB": 312e12,
    "NVIDIA H100 PCIe": 756e12,
    "NVIDIA H100 80GB HBM3": 989e12,
    "NVIDIA H200": 989e12,
    "NVIDIA B200": 2250e12,
}


def peak_flops(kind: str) -> float | None:
    """Of a device of this jax.Device.device_kind, per second, in bfloat16; None where it is not known."""
    return CHIPS[_KINDS[kind]].flops if kind in _KINDS else _GPU_FLOPS.get(kind)


def described_devices(topology: str) -> tuple[jax.Device, ...]:
    """The devices of "v5p:4x4x8" or the like, or of the smallest topology of a generation, "v5p".

    Raises UserError: there is none of this name, or libtpu, which describes them, is not installed.
    """
    generation, colon, sizes = topology.partition(":")
    axes = TOPOLOGIES.get(generation, "").count("x", len(generation)) + 1
    if generation not in CHIPS or (colon and not re.fullmatch(rf"[1-9]\d*(x[1-9]\d*){{{axes - 1}}}", sizes)):
        raise UserError(f"topology: got {topology!r}; need one such as {', '.join(TOPOLOGIES.values())}")
    if (chips := math.prod(map(int, sizes.split("x"))) if sizes else 1) > (most := CHIPS[generation].pod):
        raise UserError(f"topology: got {topology!r}, which has {chips} chips; a pod has at most {most}")
    if importlib.util.find_spec("libtpu") is None:
        raise UserError(missing_package("libtpu").replace("[experiments]", "[experiments,tpu-aot]"))
    try:
        return topology_devices(topology)
    except Exception as error:  # libtpu's, of several types
        raise UserError(f"topology: got {topology!r}; libtpu: {' '.join(str(error).split())[:200]}") from error
