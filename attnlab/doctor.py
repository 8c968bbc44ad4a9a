"""What of attnlab works on this machine, and of the rest, what it needs."""

import importlib.util
import platform
import shutil
from collections.abc import Callable
from importlib import metadata
from typing import NamedTuple

import attnlab


class Finding(NamedTuple):
    """what: a part. reason: why it does not work here, or None. note: what there is, where it works."""

    what: str
    reason: str | None
    note: str = ""


def findings() -> list[Finding]:
    """Devices first, then kernels, then what needs packages or programs beside attnlab's own."""
    import jax

    python = f"{platform.python_version()} on {platform.system()} {platform.machine()}"
    found = [Finding(f"attnlab {attnlab.__version__}", None, f"Python {python}")]
    needed = ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "grain", "gin-config")
    missing = [name for name in needed if _version(name) is None]
    versions = ", ".join(f"{name} {_version(name)}" for name in needed if name not in missing)
    reason = f"needs {', '.join(missing)}: pip install 'attnlab[experiments]'" if missing else None
    found.append(Finding("training and ablations", reason, versions))
    devices = jax.devices()
    found.append(Finding(f"devices: {len(devices)} x {devices[0].device_kind}", None, jax.default_backend()))
    found += [Finding(name, _attempt(refusal), note) for name, refusal, note in _KERNELS]
    found += [_part(*part) for part in _PARTS]
    return found


def shown(found: list[Finding]) -> str:
    """A line each."""
    lines = []
    for finding in found:
        tail = finding.reason if finding.reason is not None else finding.note
        lines.append(f"{'no ' if finding.reason is not None else 'yes'}  {finding.what}{': ' if tail else ''}{tail}")
    return "\n".join(lines)


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def _attempt(refusal: Callable[[], str | None]) -> str | None:
    try:
        return refusal()
    except Exception as error:  # whatever is wrong with a machine is what is asked for
        return f"{type(error).__name__}: {' '.join(str(error).split())[:120]}"


def _tpu_refusal() -> str | None:
    import jax

    return None if jax.default_backend() == "tpu" else "needs a TPU; elsewhere XLA's forms run"


def _gpu_refusal() -> str | None:
    import jax

    from attnlab.attention._kernels.backends import gpu_refusal

    if jax.default_backend() != "gpu":
        return "needs a GPU of compute capability 9.0 (Hopper); elsewhere XLA's forms run"
    return gpu_refusal()


_KERNELS = [
    ("TPU kernels", _tpu_refusal, ""),
    ("GPU kernels", _gpu_refusal, "by implementation='pallas_gpu'"),
]
# (what, the packages and programs that it needs, how they come)
_PARTS = [
    ("runs in an object store, --workdir gs://", ("gcsfs",), "pip install 'attnlab[gcs]'"),
    ("attnlab tokenize", ("tokenizers",), "pip install 'attnlab[tokenizers]'"),
    ("attnlab compile, for TPUs that are not here", ("libtpu",), "pip install 'attnlab[tpu-aot]'"),
    ("kernels_pallas.aot --gpu", ("jax_cuda13_plugin",), "pip install 'attnlab[gpu-aot]'"),
    ("notebooks", ("ipykernel", "jupytext", "nbclient", "nbformat"), "pip install 'attnlab[colab]'"),
    ("attnlab.peers beside PyTorch", ("torch",), "pip install torch"),
]


def _part(what: str, needs: tuple[str, ...], comes_by: str) -> Finding:
    missing = [name for name in needs if importlib.util.find_spec(name) is None and shutil.which(name) is None]
    return Finding(what, f"needs {', '.join(missing)}: {comes_by}" if missing else None)
