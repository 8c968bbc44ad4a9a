"""Which GPU a program is for, and whether it and what compiles for it are such as the kernels need."""

import ctypes.util
import importlib.util
import os
import shutil
import sysconfig
from pathlib import Path
from typing import Any

import jax
from jax.extend import backend

CAPABILITY = "9.0"  # of Hopper, whose instructions (sm_90a) no other generation has


def refusal() -> str | None:
    """Why no kernel can be compiled for the GPU that programs are for, or None. Where there is no GPU, None too: a
    program may be lowered on a machine without."""
    if importlib.util.find_spec("absl") is None and jax.__version_info__ < (0, 12):
        return f"needs absl-py, which jax {jax.__version__} imports for GPU kernels and does not bring"
    device = _target()
    if device is None:
        return None
    capability = device.compute_capability
    if capability != CAPABILITY:
        return f"needs a GPU of compute capability {CAPABILITY} (Hopper), and {device.device_kind} has {capability}"
    return None if _has_compiler() else "needs ptxas, or nvJitLink with jax 0.12, and finds neither"


def device_kind() -> str | None:
    """Of the GPU that programs are for, as JAX names it, or None."""
    return getattr(_target(), "device_kind", None)


def _target() -> Any:
    """The GPU that programs are lowered for, as Mosaic finds it: the mesh's, else the default device; None if neither
    is a GPU."""
    devices: list[Any] = [jax.sharding.get_abstract_mesh().abstract_device, backend.get_default_device()]
    return next((device for device in devices if hasattr(device, "compute_capability")), None)


def _has_compiler() -> bool:
    """Mosaic looks for ptxas on the PATH, in ./cuda_sdk_lib and in /usr/local/cuda; jax 0.12 also takes nvJitLink."""
    places = [shutil.which("ptxas"), "cuda_sdk_lib/bin/ptxas", "/usr/local/cuda/bin/ptxas"]
    if any(place is not None and os.access(place, os.X_OK) for place in places):
        return True
    if jax.__version_info__ < (0, 12):
        return False
    wheel = Path(sysconfig.get_path("purelib"), "nvidia", "cu13", "lib", "libnvJitLink.so.13")
    return wheel.exists() or ctypes.util.find_library("nvJitLink") is not None
