"""Which implementation serves a call: a name given by the caller, or a choice by platform made at lowering."""

import contextlib
import contextvars
import dataclasses
import functools
import itertools
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Literal

import jax
from jax.experimental.xla_metadata import set_xla_metadata

from attnlab.attention._dispatch.deferred import deferring, vary_alike
from attnlab.attention._dispatch.mesh import BATCH_AXES, HEAD_AXES, POSITION_AXES, unknown_axes

Implementation = Literal["reference", "xla", "pallas_tpu", "pallas_gpu"]
IMPLEMENTATIONS: tuple[Implementation, ...] = ("reference", "xla", "pallas_tpu", "pallas_gpu")
# The platform names of lax.platform_dependent.
_KERNEL_PLATFORM = {"pallas_tpu": "tpu", "pallas_gpu": "cuda"}
# (primitive, version of jax) whose GPU kernels, as they are now, `attnlab bench --device gpu` has checked on a card and
# found faster than XLA. None: those that an H100 checked (experiments/results/bench/h100.md) have changed since, and a
# simulation does not model everything. The others run when they are asked for by name.
_CHECKED_ON_A_CARD: frozenset[tuple[str, str]] = frozenset()


@dataclasses.dataclass(frozen=True)
class Kernel:
    """A kernel as one of a primitive's implementations.

    call: takes the mechanism's "xla" form, whose derivatives serve where kernels have none, then the same arrays and
      options as the other implementations.
    refusal: with these arrays, or shape structs, and options: why the kernel cannot serve, or None if it can.
    """

    call: Callable[..., Any]
    refusal: Callable[..., str | None]


# A mechanism's forms by name: "reference" and "xla" as functions, kernels as Kernel; of a step, "xla" and kernels.
Implementations = Mapping[str, Callable[..., Any] | Kernel]


@dataclasses.dataclass(frozen=True)
class Choice:
    """What one call of a primitive would run: an implementation for each platform, why others cannot serve, and why
    some that may be able to are not chosen unless they are named."""

    primitive: str
    by_platform: Mapping[str, str]
    refused: Mapping[str, str]
    no_default: Mapping[str, str] = dataclasses.field(default_factory=dict)

    def __str__(self) -> str:
        names = {"elsewhere": "elsewhere", "every platform": "on every platform"}
        runs = ", ".join(f"{name} {names.get(where, f'on {where}')}" for where, name in self.by_platform.items())
        refused = "".join(f"\n  {name} cannot serve: {reason}" for name, reason in self.refused.items())
        no_default = "".join(f"\n  {name} is not a default: {reason}" for name, reason in self.no_default.items())
        return f"{self.primitive}: {runs}{refused}{no_default}"


_number = itertools.count()
_recorder: contextvars.ContextVar[list[Choice] | None] = contextvars.ContextVar("attnlab_choices", default=None)


def is_recording() -> bool:
    """Whether `explain` is at work."""
    return _recorder.get() is not None


@contextlib.contextmanager
def _recording() -> Iterator[list[Choice]]:
    choices: list[Choice] = []
    token = _recorder.set(choices)
    try:
        # What was traced before is traced again under metadata that it was not traced under.
        with set_xla_metadata(attnlab_explain=str(next(_number))):
            yield choices
    finally:
        _recorder.reset(token)


def explain(function: Callable[..., Any], *args: Any, **kwargs: Any) -> list[Choice]:
    """Which implementation every attention call inside function(*args, **kwargs) would run, by platform, and why.

    Nothing is computed: the function is traced on shapes. Options such as window= go in as keyword arguments.

        print(*attnlab.explain(attnlab.local_attention, q, k, v, window=128), sep="\\n")
    """
    is_array = [hasattr(leaf, "shape") and hasattr(leaf, "dtype") for leaf in jax.tree.leaves((args, kwargs))]
    leaves, tree = jax.tree.flatten((args, kwargs))

    def on_arrays(arrays: list[Any]) -> Any:
        arrays_left = iter(arrays)
        filled = [next(arrays_left) if flag else leaf for leaf, flag in zip(leaves, is_array, strict=True)]
        inner_args, inner_kwargs = jax.tree.unflatten(tree, filled)
        return function(*inner_args, **inner_kwargs)

    with _recording() as choices:
        jax.eval_shape(on_arrays, [leaf for leaf, flag in zip(leaves, is_array, strict=True) if flag])
    return choices


def dispatch(
    primitive: str,
    implementations: Implementations,
    implementation: str | None,
    *arrays: Any,
    **options: Any,
) -> Any:
    """Calls the implementation named, or with None the fastest that serves on the platform it is lowered for.

    Args:
      primitive: name for messages.
      implementations: all take (*arrays, **options), kernels with the "xla" form before them.
      arrays: pytrees of arrays. options: static.
    """
    if implementation is not None and implementation not in list(implementations):  # a list takes any type
        allowed = [name for name in IMPLEMENTATIONS if name in implementations]
        known = f"{primitive} has no such form" if implementation in IMPLEMENTATIONS else "no such name"
        raise ValueError(f"implementation: got {implementation!r} ({known}); need None or one of {allowed}")

    leaves, tree = jax.tree.flatten(arrays)
    arrays = jax.tree.unflatten(tree, vary_alike(leaves))
    unplaced = _unplaced(leaves)
    kernels = {name: entry for name, entry in implementations.items() if isinstance(entry, Kernel)}
    no_default = {name: reason for name in kernels if (reason := _no_default(primitive, name)) is not None}
    asked = [implementation] if implementation is not None else [name for name in kernels if name not in no_default]
    refused = {
        name: reason
        for name, kernel in kernels.items()
        if name in asked and (reason := unplaced or kernel.refusal(*arrays, **options)) is not None
    }
    if implementation is not None:
        if implementation in refused:
            raise ValueError(
                f"implementation: {implementation!r} cannot serve this {primitive} call: {refused[implementation]}"
            )
        _record(Choice(primitive, {"every platform": implementation}, {}))
        return form_of(implementations, implementation)(*arrays, **options)

    serving = {_KERNEL_PLATFORM[name]: name for name in asked if name not in refused}
    by_platform = {**serving, "elsewhere" if serving else "every platform": "xla"}
    _record(Choice(primitive, by_platform, refused, no_default))
    _warn_of_fallback(primitive, refused)

    def bound(name: str) -> Callable[..., Any]:
        form = form_of(implementations, name)
        return lambda *arrays: form(*arrays, **options)

    if not serving:
        return bound("xla")(*arrays)
    # platform_dependent picks when the program is lowered, so compiling for a TPU on a CPU host takes the TPU kernel.
    forms = {platform: deferring(bound(name)) for platform, name in serving.items()}
    return jax.lax.platform_dependent(*arrays, default=bound("xla"), **forms)


def _no_default(primitive: str, name: str) -> str | None:
    """Why a kernel runs only if it is named."""
    if name != "pallas_gpu" or (primitive, jax.__version__) in _CHECKED_ON_A_CARD:
        return None
    return f"bench --device gpu has not checked it on a card with jax {jax.__version__}"


def _unplaced(arrays: Sequence[Any]) -> str | None:
    """Why no kernel can take arrays like these, as they lie."""
    if any(jax.export.is_symbolic_dim(size) for x in arrays for size in x.shape):
        return "needs sizes that are numbers, and the program is exported for any"
    if unknown := unknown_axes():
        known = ", ".join(BATCH_AXES), ", ".join(HEAD_AXES), ", ".join(POSITION_AXES)
        return "knows mesh axes by their names, {} (batch), {} (heads) and {} (positions), not {}".format(
            *known, ", ".join(unknown)
        )
    return None


def form_of(implementations: Implementations, name: str) -> Callable[..., Any]:
    """The implementation of this name as a function of arrays and options."""
    entry = implementations[name]
    return functools.partial(entry.call, implementations["xla"]) if isinstance(entry, Kernel) else entry


def _record(choice: Choice) -> None:
    choices = _recorder.get()
    if choices is not None:
        choices.append(choice)


_warned: set[tuple[str, str]] = set()


def _warn_of_fallback(primitive: str, refused: Mapping[str, str]) -> None:
    """Warns once per primitive and reason that the kernel of the machine at hand cannot serve and XLA runs instead."""
    for name, reason in refused.items():
        here = jax.default_backend().replace("gpu", "cuda") == _KERNEL_PLATFORM[name]
        if here and (primitive, reason) not in _warned:
            _warned.add((primitive, reason))
            warnings.warn(f"{primitive} runs as 'xla', not {name!r}: {reason}", stacklevel=4)
