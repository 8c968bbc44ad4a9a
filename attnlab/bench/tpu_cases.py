"""What `attnlab bench --device tpu` measures: the rows of `python -m kernels_pallas.aot`, at its shapes of models, by
attnlab's kernels and XLA forms through public calls, and by JAX's own kernels.

Covariances and their solves have no row of their own, as no public call is one: local linear attention calls them.
"""

import collections
import dataclasses
import functools
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

import attnlab
from attnlab.attention import masks
from attnlab.bench.device import Case, Prepared
from attnlab.bench.problems import (
    MOST_ERROR,
    Arrays,
    Problem,
    cached_step,
    calls,
    linear,
    normal,
    prepare,
    routing_step,
    softmax,
    state_step,
    window_pairs,
)
from kernels_pallas.aot import peers
from kernels_pallas.shapes import SHAPES, Shape

_LINEAR: dict[str, dict[str, Any]] = {
    "linear": {},
    "linear, decay": {"decay": "token"},
    "linear, channels": {"decay": "channel"},
    "linear, delta": {"delta": True},
    "linear, gated delta": {"decay": "token", "delta": True},
    "linear, gated delta by channel": {"decay": "channel", "delta": True},
}

_CACHE = 0  # bytes: a TPU has none that holds inputs unasked


def problems(shape: Shape) -> list[Problem]:
    """By the names of the table's rows."""
    heads: Any = {"heads": shape.heads, "group": shape.heads // shape.key_heads, "head_dim": shape.head_dim}
    # The table's kernels of linear attention have a key head per head.
    of_linear: Any = {"heads": shape.heads, "head_dim": shape.head_dim}
    size: Any = {"tokens": shape.length, "small": 1024 + shape.window}
    seen = window_pairs(shape.window)
    window: Any = {"window": shape.window, "is_causal": True}
    partial = functools.partial
    return [
        softmax("banded flash", partial(attnlab.local_attention, **window), seen, **heads, **size),
        softmax(
            "banded flash, softcap", partial(attnlab.local_attention, softcap=50.0, **window), seen, **heads, **size
        ),
        _biased(
            softmax(
                "banded flash, bias",
                partial(attnlab.dot_product_attention, mask=masks.window(shape.window - 1, 0)),
                seen,
                **heads,
                **size,
            )
        ),
        softmax(
            "all earlier",
            partial(attnlab.dot_product_attention, is_causal=True),
            window_pairs(shape.length),
            **heads,
            tokens=shape.length,
        ),
        *(linear(row, **options, **of_linear, tokens=shape.length) for row, options in _LINEAR.items()),
        linear("linear, not causal", is_causal=False, **heads, tokens=shape.length),
        softmax(
            "inline",
            attnlab.inline_attention,
            lambda tokens: shape.head_dim * tokens,  # products of tokens and a state
            **heads,
            tokens=shape.length,
        ),
        softmax(
            "local linear",
            partial(attnlab.local_linear_attention, ridge=10.0, window=shape.window),
            seen,
            **heads,
            **size,
        ),
        softmax(
            "parallax",
            partial(attnlab.parallax_attention, window=shape.window),
            seen,
            names=("query", "probe", "key", "value"),
            products=2,
            **heads,
            **size,
        ),
        cached_step("decode, cache", 1, shape.window, **heads),
        cached_step(
            "decode, local linear", 1, shape.window, step=partial(attnlab.local_linear_step, ridge=10.0), **heads
        ),
        routing_step("decode, routing", 1, shape.window, **of_linear),
        state_step(
            "decode, linear",
            linear("", **_LINEAR["linear, gated delta"], **of_linear, tokens=1),
            1,
            head_dim=shape.head_dim,
        ),
    ]


def _biased(problem: Problem) -> Problem:
    """With a number for every head, query and key."""

    def make(key: jax.Array, batch: int, tokens: int, heads: int) -> dict[str, jax.Array]:
        bias = normal(jax.random.fold_in(key, 0), 1, heads, tokens, tokens)
        return {**problem.make(key, batch, tokens, heads), "bias": bias}

    return dataclasses.replace(problem, make=make)


def _of_jax(problem: Problem, shape: Shape, passes: str) -> Prepared:
    """By JAX's kernel, with arrays in its layout."""
    is_window = problem.name.startswith("banded flash")
    attend, structs = peers.splash_call(shape, backward=passes == "backward") if is_window else peers.flash_call(shape)

    def make(key: jax.Array, batch: int, tokens: int, heads: int) -> dict[str, jax.Array]:
        names = zip(("query", "key", "value"), jax.random.split(key, 3), structs)
        return {name: normal(one, *struct.shape) for name, one, struct in names}

    def call(arrays: Arrays) -> jax.Array:
        return attend(arrays["query"], arrays["key"], arrays["value"])

    return calls(dataclasses.replace(problem, make=make), call, jax.random.key(0), passes, _CACHE), None


def cases() -> list[Case]:
    """Kernels, then XLA's forms, then JAX's kernels, problem by problem, of the shapes in bfloat16."""
    found = []
    theirs = {"banded flash": "jax splash", "all earlier": "jax flash, a key head per head"}
    for name, shape in SHAPES.items():
        for problem in problems(shape) if shape.dtype == jnp.bfloat16 else ():
            named = dataclasses.replace(problem, name=f"{problem.name}, {name}")
            for passes in problem.passes:
                for implementation in ("pallas_tpu", "xla"):
                    ours = functools.partial(prepare, named, implementation, passes, _CACHE)
                    how: Any = {"prepare": ours, "clock": clock, "most_error": MOST_ERROR}
                    found.append(named.case(f"attnlab, {implementation}", passes, **how))
                if problem.name in theirs:
                    its = functools.partial(_of_jax, named, shape, passes)
                    found.append(named.case(theirs[problem.name], passes, prepare=its, clock=clock))
    return found


def clock(function: Callable[..., Any], *arguments: Any) -> tuple[float, dict[str, float]]:
    """Milliseconds on the device of a jitted function, by JAX's profiler; else until the results are there."""
    options = jax.profiler.ProfileOptions()
    options.python_tracer_level = 0
    with tempfile.TemporaryDirectory() as folder:
        jax.profiler.start_trace(folder, profiler_options=options)
        try:
            start = time.perf_counter()
            jax.block_until_ready(function(*arguments))
            waited = 1e3 * (time.perf_counter() - start)
        finally:
            jax.profiler.stop_trace()
        [file] = Path(folder).rglob("*.xplane.pb")
        on_device, kernels = device_times(jax.profiler.ProfileData.from_file(str(file)))
    return (on_device, kernels) if on_device else (waited, {})


def device_times(profile: Any) -> tuple[float, dict[str, float]]:
    """Of jax.profiler.ProfileData, the milliseconds of a TPU's programs, and those of their operations by name."""
    programs, kernels = 0.0, collections.Counter[str]()
    for plane in profile.planes:
        for line in plane.lines if plane.name.startswith("/device:TPU") else ():
            for event in line.events:
                if line.name == "XLA Modules":
                    programs += event.duration_ns / 1e6
                elif line.name == "XLA Ops":
                    kernels[event.name] += event.duration_ns / 1e6
    return programs, dict(kernels)
