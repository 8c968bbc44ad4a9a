"""What `attnlab bench --device gpu` measures: by attnlab's forms, and by other libraries that are installed."""

import collections
import functools
import importlib
import math
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

import attnlab
from attnlab.bench.device import Case, Prepared
from attnlab.bench.problems import (
    MOST_ERROR,
    Arrays,
    Problem,
    cached_step,
    calls,
    linear,
    normal,
    numbers,
    of_form,
    prepare,
    softmax,
    state_step,
    timed,
    window_pairs,
)

_HEADS, _HEAD_DIM = 16, 128
CACHE = 50 * 2**20  # bytes of the GPU's second cache


def _agents(name: str, attend: Callable[..., jax.Array], agents: int, tokens: int) -> Problem:
    def make(key: jax.Array, batch: int, tokens: int, heads: int) -> dict[str, jax.Array]:
        keys = jax.random.split(key, 4)
        arrays = {n: normal(k, batch, tokens, heads, _HEAD_DIM) for n, k in zip(("query", "key", "value"), keys)}
        return arrays | {"agents": normal(keys[3], batch, agents, heads, _HEAD_DIM)}

    def call(arrays: Arrays, implementation: str | None) -> jax.Array:
        return attend(**arrays, implementation=implementation)

    return Problem(name, make, call, lambda tokens: 8 * _HEAD_DIM * _HEADS * agents * tokens, tokens)


def _grid(tokens: int) -> tuple[int, int]:
    return math.isqrt(tokens), math.isqrt(tokens)


def _volume(tokens: int) -> tuple[int, int, int]:
    side = round((tokens / 16) ** 0.5)
    return 16, side, side


def problems() -> list[Problem]:
    partial = functools.partial
    dot, local = attnlab.dot_product_attention, attnlab.local_attention
    causal = partial(dot, is_causal=True)
    found = [
        softmax(
            f"dense causal, head dim {head_dim}, 16k",
            causal,
            window_pairs(2**30),
            head_dim=head_dim,
            tokens=2**14,
            facts={"kind": "dense"},
        )
        for head_dim in (64, 128, 256)
    ]
    found += [
        softmax(
            f"window {window}, {tokens // 1024}k",
            partial(local, window=window, is_causal=True),
            window_pairs(window),
            tokens=tokens,
            small=1024 + window,
            facts={"kind": "window", "window": window},
        )
        for tokens in (2**14, 2**16)
        for window in (1024, 4096)
    ]
    found += [
        softmax(
            "2-D 128 x 128, 13 x 13",
            partial(local, window=(13, 13)),
            lambda tokens: 169.0 * tokens,
            tokens=2**14,
            space=_grid,
            facts={"kind": "box", "space": (128, 128), "window": (13, 13)},
        ),
        softmax(
            "3-D 16 x 32 x 32, 5 x 9 x 9",
            partial(local, window=(5, 9, 9)),
            lambda tokens: 405.0 * tokens,
            tokens=2**14,
            space=_volume,
            small=4096,
            facts={"kind": "box", "space": (16, 32, 32), "window": (5, 9, 9)},
        ),
        softmax(
            "axial 128 x 128, last axis",
            partial(attnlab.axial_attention, axis=1),
            lambda tokens: tokens * math.sqrt(tokens),
            tokens=2**14,
            space=_grid,
        ),
        _agents("64 agents, 16k", attnlab.agent_attention, 64, 2**14),
        _agents("16 agents, causal, 16k", attnlab.causal_agent_attention, 16, 2**14),
        linear("linear, 16k", tokens=2**14),
        linear("linear, decay per token, 16k", decay="token", tokens=2**14),
        linear("linear, decay per channel, 16k", decay="channel", tokens=2**14),
        linear("delta rule, 16k", delta=True, tokens=2**14),
        linear("gated delta, 32 heads, 16k", decay="token", delta=True, heads=32, tokens=2**14, facts={"kind": "gdn"}),
        linear("gated delta, batch 2, 16k", decay="token", delta=True, batch=2, tokens=2**14, facts={"kind": "gdn"}),
        linear("delta, decay per channel, 16k", decay="channel", delta=True, tokens=2**14, facts={"kind": "kda"}),
        softmax(
            "Parallax, 16k",
            attnlab.parallax_attention,
            window_pairs(2**30),
            names=("query", "probe", "key", "value"),
            products=2,
            tokens=2**14,
        ),
        softmax(
            "local linear, 8k",
            partial(attnlab.local_linear_attention, ridge=10.0),
            window_pairs(2**30),
            tokens=2**13,
            small=512,
        ),
        cached_step("a step on a cache, 32 x 8k", 32, 2**13),
        cached_step("a step on a cache, 1 x 64k", 1, 2**16),
    ]
    gates: dict[str, dict[str, Any]] = {
        "linear": {},
        "gated delta": {"decay": "token", "delta": True},
        "delta, decay per channel": {"decay": "channel", "delta": True},
    }
    found += [
        state_step(f"a step of {name}, batch 64", linear(name, tokens=1, **options), 64)
        for name, options in gates.items()
    ]
    for power in range(12, 19):  # 256k tokens in all
        tokens, batch = 2**power, 2 ** (18 - power)
        size: Any = {"tokens": tokens, "batch": batch}
        window = partial(local, window=1024, is_causal=True)
        found += [
            softmax(f"window 1024, {batch} x {tokens // 1024}k", window, window_pairs(1024), small=2048, **size),
            linear(f"gated delta, {batch} x {tokens // 1024}k", decay="token", delta=True, **size),
        ]
    return found


# --- attnlab ----------------------------------------------------------------------------------------------------------


def lower(problem: Problem, passes: str) -> None:
    """Of attnlab's kernels for a GPU, also where there is none."""
    arrays = jax.eval_shape(functools.partial(timed, problem), jax.random.key(0))
    jax.jit(of_form(problem, "pallas_gpu", passes)).trace(arrays).lower(lowering_platforms=("cuda",))


@functools.cache
def _profiler() -> Any:
    """JAX's measure of the time that kernels take on the device, or None where CUPTI does not serve."""
    try:
        from jax.experimental.mosaic.gpu import profiler

        _, milliseconds = profiler.measure(jax.jit(lambda x: x + 1))(jnp.zeros(8))
    except Exception:
        return None
    return None if milliseconds is None else profiler.measure


def clock(function: Callable[..., Any], *arguments: Any) -> tuple[float, dict[str, float]]:
    """Milliseconds on the device of a jitted function, by CUPTI, which knows its kernels; else until the results are
    there."""
    measure = _profiler()
    if measure is not None:
        kernels: collections.Counter[str] = collections.Counter()
        for name, milliseconds in measure(function, aggregate=False)(*arguments)[1]:
            kernels[name] += milliseconds
        return kernels.total(), dict(kernels)
    start = time.perf_counter()
    jax.block_until_ready(function(*arguments))
    return 1e3 * (time.perf_counter() - start), {}


# --- Other libraries --------------------------------------------------------------------------------------------------


def _jax_nn(problem: Problem, implementation: str, passes: str) -> Prepared:
    options: dict[str, Any] = {"is_causal": True, "implementation": implementation}
    if problem.facts["kind"] == "window":
        options["local_window_size"] = (problem.facts["window"] - 1, 0)

    def attend(arrays: Arrays) -> jax.Array:
        return jax.nn.dot_product_attention(*(arrays[name] for name in ("query", "key", "value")), **options)

    return _of_jax(problem, attend, passes)


def _tokamax(problem: Problem, passes: str) -> Prepared:
    tokamax: Any = importlib.import_module("tokamax")
    options: dict[str, Any] = {"is_causal": True, "implementation": "mosaic_gpu"}
    if problem.facts["kind"] == "window":
        options["local_window_size"] = (problem.facts["window"] - 1, 0)

    def attend(arrays: Arrays) -> jax.Array:
        return tokamax.dot_product_attention(*(arrays[name] for name in ("query", "key", "value")), **options)

    return _of_jax(problem, attend, passes)


_GATED_DELTA = ("query", "key", "value", "log_decay", "beta")


def _jax_linear_attention(problem: Problem, passes: str) -> Prepared:
    library: Any = importlib.import_module("jla.ops.mosaic_gpu.gated_delta_rule")

    def attend(arrays: Arrays) -> jax.Array:
        return library.gated_delta_rule(*(arrays[name] for name in _GATED_DELTA))[0]

    return _of_jax(problem, attend, passes)


def _of_jax(problem: Problem, attend: Callable[[Arrays], jax.Array], passes: str) -> Prepared:
    return calls(problem, attend, jax.random.key(0), passes, CACHE), None


def _torch_sets(problem: Problem, passes: str) -> tuple[Any, list[list[Any]]]:
    """torch, and tensors [B, N, T, H] of the problem's shapes."""
    torch: Any = importlib.import_module("torch")
    shapes = jax.eval_shape(functools.partial(timed, problem), jax.random.key(0))

    def tensor(shape: Any) -> Any:
        batch, heads, head_dim = shape.shape[0], shape.shape[-2], shape.shape[-1]
        size = (batch, heads, math.prod(shape.shape[1:-2]), head_dim)
        return torch.randn(size, device="cuda", dtype=torch.bfloat16, requires_grad=passes == "backward")

    names = ("query", "key", "value")
    return torch, [[tensor(shapes[name]) for name in names] for _ in range(numbers(problem, CACHE))]


def _of_torch(attend: Callable[..., Any], sets: list[list[Any]], passes: str) -> Prepared:
    if passes == "forward":
        return [(attend, *tensors) for tensors in sets], None
    torch: Any = importlib.import_module("torch")
    backward = functools.partial(torch.autograd.grad, retain_graph=True)
    outs = [attend(*tensors) for tensors in sets]
    return [(backward, out, tensors, out.detach()) for out, tensors in zip(outs, sets)], None


def _torch_sdpa(problem: Problem, passes: str) -> Prepared:
    torch, sets = _torch_sets(problem, passes)
    attend = functools.partial(torch.nn.functional.scaled_dot_product_attention, is_causal=True)
    return _of_torch(attend, sets, passes)


def _torch_flex(problem: Problem, passes: str) -> Prepared:
    torch, sets = _torch_sets(problem, passes)
    flex: Any = importlib.import_module("torch.nn.attention.flex_attention")
    window = problem.facts["window"]

    def in_window(batch: Any, head: Any, query: Any, key: Any) -> Any:
        return (query >= key) & (query - key < window)

    def in_box(batch: Any, head: Any, query: Any, key: Any) -> Any:
        sees: Any = True
        stride = problem.tokens
        for side, width in zip(problem.facts["space"], window):
            stride //= side
            at_query, at_key = query // stride % side, key // stride % side
            first = torch.clamp(at_query - (width - 1) // 2, 0, side - width)
            sees = sees & (at_key >= first) & (at_key < first + width)
        return sees

    sees = in_box if problem.facts["kind"] == "box" else in_window
    mask = flex.create_block_mask(sees, None, None, problem.tokens, problem.tokens, device="cuda", _compile=True)
    compiled = torch.compile(flex.flex_attention)
    return _of_torch(lambda *tensors: compiled(*tensors, block_mask=mask), sets, passes)


def _fla(problem: Problem, passes: str, module: str, function: str) -> Prepared:
    torch: Any = importlib.import_module("torch")
    attend: Any = getattr(importlib.import_module(module), function)
    shapes = jax.eval_shape(functools.partial(timed, problem), jax.random.key(0))

    def tensors() -> list[Any]:
        found = []
        for name in _GATED_DELTA:
            shape = shapes[name]
            dtype = torch.bfloat16 if shape.dtype == jnp.bfloat16 else torch.float32
            x = torch.randn(shape.shape, device="cuda", dtype=torch.float32)
            if name == "key":
                x = torch.nn.functional.normalize(x, dim=-1)
            elif name == "log_decay":
                x = -x.abs() / 16
            elif name == "beta":
                x = x.sigmoid()
            found.append(x.to(dtype).requires_grad_(passes == "backward"))
        return found

    return _of_torch(lambda *x: attend(*x)[0], [tensors() for _ in range(numbers(problem, CACHE))], passes)


def torch_clock(function: Callable[..., Any], *arguments: Any) -> tuple[float, dict[str, float]]:
    """Milliseconds between two events on the device."""
    torch: Any = importlib.import_module("torch")
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda.synchronize()
    start.record()
    function(*arguments)
    end.record()
    torch.cuda.synchronize()
    return float(start.elapsed_time(end)), {}


# (library, the kinds of problems that it serves, (problem, passes) -> what a Case prepares, its clock)
_OTHERS: list[tuple[str, set[str], Callable[[Problem, str], Prepared], Callable[..., Any]]] = [
    ("jax.nn, cudnn", {"dense", "window"}, lambda problem, passes: _jax_nn(problem, "cudnn", passes), clock),
    ("jax.nn, xla", {"dense"}, lambda problem, passes: _jax_nn(problem, "xla", passes), clock),
    ("tokamax", {"dense", "window"}, _tokamax, clock),
    ("jax-linear-attention", {"gdn"}, _jax_linear_attention, clock),
    ("PyTorch SDPA", {"dense"}, _torch_sdpa, torch_clock),
    ("PyTorch FlexAttention", {"window", "box"}, _torch_flex, torch_clock),
    (
        "flash-linear-attention",
        {"gdn"},
        lambda problem, passes: _fla(problem, passes, "fla.ops.gated_delta_rule", "chunk_gated_delta_rule"),
        torch_clock,
    ),
    (
        "FlashQLA",
        {"gdn"},
        lambda problem, passes: _fla(problem, passes, "flash_qla", "chunk_gated_delta_rule"),
        torch_clock,
    ),
]


def cases() -> list[Case]:
    """Kernels, then XLA's forms, then other libraries, problem by problem."""
    found = []
    for problem in problems():
        for passes in problem.passes:
            for implementation in ("pallas_gpu", "xla"):
                ours = functools.partial(prepare, problem, implementation, passes, CACHE)
                how: Any = {"prepare": ours, "clock": clock, "most_error": MOST_ERROR}
                found.append(problem.case(f"attnlab, {implementation}", passes, **how))
            for library, kinds, prepared, its_clock in _OTHERS:
                if problem.facts.get("kind") in kinds:
                    theirs = functools.partial(prepared, problem, passes)
                    found.append(problem.case(library, passes, prepare=theirs, clock=its_clock))
    return found
