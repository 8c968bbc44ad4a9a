"""What `attnlab bench --device gpu` measures: problems, by attnlab's forms and by other libraries that are installed.

All are bfloat16 on one GPU. FLOPs are those of the products that a problem needs: 4 H of a pair of a query and a key
that it sees, 2.5 times that of its gradients; of a token of a recurrence 4 H V, 6 H V with the delta rule. Visited
tiles, recomputed logits and inverses of chunks are not in them, so that shares of the peak compare forms of all kinds.
Steps of decoding, which wait for memory, are the next token of every row of a batch.
"""

import collections
import dataclasses
import functools
import importlib
import math
import os
import time
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp

import attnlab
from attnlab.bench.device import Case, Prepared

Arrays = Mapping[str, jax.Array]
_HEADS, _HEAD_DIM = 16, 128
_CACHE = 50 * 2**20  # bytes of the GPU's second cache
_SMALL = 1024  # tokens, at which values and gradients are compared with float64
# Of the largest number of each array: results are rounded to 8 bits, and sums of many rounded terms lose some more.
MOST_ERROR = 3e-2


@dataclasses.dataclass(frozen=True)
class Problem:
    """make(key, batch, tokens, heads) -> arrays. attend(arrays, implementation) -> the output. flops(tokens): of a
    forward.

    batch, tokens, heads: as it is timed. small: tokens of two heads, by which it is checked. facts: what other
    libraries are told of it. is_step: `tokens` are those before the one that is computed.
    """

    name: str
    make: Callable[[jax.Array, int, int, int], dict[str, jax.Array]]
    attend: Callable[[Arrays, str | None], jax.Array]
    flops: Callable[[int], float]
    tokens: int
    batch: int = 1
    heads: int = _HEADS
    small: int = _SMALL
    facts: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    is_step: bool = False

    @property
    def passes(self) -> dict[str, float]:
        """By what a pass needs, in FLOPs of a forward."""
        return {"forward": 1.0} if self.is_step else {"forward": 1.0, "backward": 2.5}


def _normal(key: jax.Array, *shape: int) -> jax.Array:
    return jax.random.normal(key, shape, jnp.bfloat16)


def _softmax(name: str, attend: Callable[..., jax.Array], pairs: Callable[[int], float], **options: Any) -> Problem:
    """pairs(tokens): of a query and a key that it sees, of one head."""
    head_dim = options.pop("head_dim", _HEAD_DIM)
    names, space = options.pop("names", ("query", "key", "value")), options.pop("space", None)
    products = options.pop("products", 1)

    def make(key: jax.Array, batch: int, tokens: int, heads: int) -> dict[str, jax.Array]:
        axes = (tokens,) if space is None else space(tokens)
        keys = jax.random.split(key, len(names))
        return {name: _normal(one, batch, *axes, heads, head_dim) for name, one in zip(names, keys)}

    def call(arrays: Arrays, implementation: str | None) -> jax.Array:
        return attend(**arrays, implementation=implementation)

    each = 4 * products * head_dim * _HEADS * options.get("batch", 1)
    return Problem(name, make, call, lambda tokens: each * pairs(tokens), **options)


def _window_pairs(window: int) -> Callable[[int], float]:
    return lambda tokens: min(window, tokens) * (tokens - (min(window, tokens) - 1) / 2)


def _linear(name: str, *, decay: str | None = None, delta: bool = False, **options: Any) -> Problem:
    def make(key: jax.Array, batch: int, tokens: int, heads: int) -> dict[str, jax.Array]:
        keys = jax.random.split(key, 5)
        query, key_, value = (_normal(one, batch, tokens, heads, _HEAD_DIM) for one in keys[:3])
        # Keys of length one, with which the delta rule is stable.
        unit = key_ / jnp.linalg.norm(key_.astype(jnp.float32), axis=-1, keepdims=True)
        arrays = {"query": query, "key": unit.astype(jnp.bfloat16), "value": value}
        gates = {"token": (batch, tokens, heads), "channel": (batch, tokens, heads, _HEAD_DIM)}
        if decay is not None:
            arrays["log_decay"] = -jax.random.exponential(keys[3], gates[decay]) / 16
        if delta:
            arrays["beta"] = jax.random.uniform(keys[4], gates["token"])
        return arrays

    def attend(arrays: Arrays, implementation: str | None) -> jax.Array:
        given: Any = arrays
        return attnlab.linear_attention(**given, implementation=implementation)

    each = (6 if delta else 4) * _HEAD_DIM**2 * options.get("heads", _HEADS) * options.get("batch", 1)
    return Problem(name, make, attend, lambda tokens: each * tokens, **options)


def _agents(name: str, attend: Callable[..., jax.Array], agents: int, tokens: int) -> Problem:
    def make(key: jax.Array, batch: int, tokens: int, heads: int) -> dict[str, jax.Array]:
        keys = jax.random.split(key, 4)
        arrays = {n: _normal(k, batch, tokens, heads, _HEAD_DIM) for n, k in zip(("query", "key", "value"), keys)}
        return arrays | {"agents": _normal(keys[3], batch, agents, heads, _HEAD_DIM)}

    def call(arrays: Arrays, implementation: str | None) -> jax.Array:
        return attend(**arrays, implementation=implementation)

    return Problem(name, make, call, lambda tokens: 8 * _HEAD_DIM * _HEADS * agents * tokens, tokens)


def _cached_step(name: str, batch: int, tokens: int) -> Problem:
    def make(key: jax.Array, batch: int, tokens: int, heads: int) -> dict[str, jax.Array]:
        keys = jax.random.split(key, 5)
        arrays = {n: _normal(k, batch, 1, heads, _HEAD_DIM) for n, k in zip(("query", "key", "value"), keys)}
        return arrays | {n: _normal(k, batch, tokens, heads, _HEAD_DIM) for n, k in zip(("keys", "values"), keys[3:])}

    def attend(arrays: Arrays, implementation: str | None) -> jax.Array:
        query, key, value, keys, values = (arrays[name] for name in ("query", "key", "value", "keys", "values"))
        cache = attnlab.DotProductCache(keys, values, jnp.asarray(keys.shape[1] - 1, jnp.int32))
        return attnlab.dot_product_step(cache, query, key, value, implementation=_of_steps(implementation))[0]

    each = 4 * _HEAD_DIM * _HEADS * batch
    return Problem(name, make, attend, lambda tokens: each * tokens, tokens, batch, is_step=True)


def _state_step(name: str, linear: Problem, batch: int) -> Problem:
    def make(key: jax.Array, batch: int, tokens: int, heads: int) -> dict[str, jax.Array]:
        state = jax.random.normal(jax.random.fold_in(key, 0), (batch, heads, _HEAD_DIM, _HEAD_DIM))
        return linear.make(key, batch, 1, heads) | {"state": state}

    def attend(arrays: Arrays, implementation: str | None) -> jax.Array:
        given: Any = {key: x for key, x in arrays.items() if key != "state"}
        state = attnlab.LinearState(arrays["state"], None)
        return attnlab.linear_step(state, **given, implementation=_of_steps(implementation))[0]

    each = linear.flops(1) * batch
    return Problem(name, make, attend, lambda tokens: each, 1, batch, is_step=True)


def _of_steps(implementation: str | None) -> str | None:
    """They have no reference: in float64 their xla form is it."""
    return "xla" if implementation == "reference" else implementation


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
        _softmax(
            f"dense causal, head dim {head_dim}, 16k",
            causal,
            _window_pairs(2**30),
            head_dim=head_dim,
            tokens=2**14,
            facts={"kind": "dense"},
        )
        for head_dim in (64, 128, 256)
    ]
    found += [
        _softmax(
            f"window {window}, {tokens // 1024}k",
            partial(local, window=window, is_causal=True),
            _window_pairs(window),
            tokens=tokens,
            small=1024 + window,
            facts={"kind": "window", "window": window},
        )
        for tokens in (2**14, 2**16)
        for window in (1024, 4096)
    ]
    found += [
        _softmax(
            "2-D 128 x 128, 13 x 13",
            partial(local, window=(13, 13)),
            lambda tokens: 169.0 * tokens,
            tokens=2**14,
            space=_grid,
            facts={"kind": "box", "space": (128, 128), "window": (13, 13)},
        ),
        _softmax(
            "3-D 16 x 32 x 32, 5 x 9 x 9",
            partial(local, window=(5, 9, 9)),
            lambda tokens: 405.0 * tokens,
            tokens=2**14,
            space=_volume,
            small=4096,
            facts={"kind": "box", "space": (16, 32, 32), "window": (5, 9, 9)},
        ),
        _softmax(
            "axial 128 x 128, last axis",
            partial(attnlab.axial_attention, axis=1),
            lambda tokens: tokens * math.sqrt(tokens),
            tokens=2**14,
            space=_grid,
        ),
        _agents("64 agents, 16k", attnlab.agent_attention, 64, 2**14),
        _agents("16 agents, causal, 16k", attnlab.causal_agent_attention, 16, 2**14),
        _linear("linear, 16k", tokens=2**14),
        _linear("linear, decay per token, 16k", decay="token", tokens=2**14),
        _linear("linear, decay per channel, 16k", decay="channel", tokens=2**14),
        _linear("delta rule, 16k", delta=True, tokens=2**14),
        _linear("gated delta, 32 heads, 16k", decay="token", delta=True, heads=32, tokens=2**14, facts={"kind": "gdn"}),
        _linear("gated delta, batch 2, 16k", decay="token", delta=True, batch=2, tokens=2**14, facts={"kind": "gdn"}),
        _linear("delta, decay per channel, 16k", decay="channel", delta=True, tokens=2**14, facts={"kind": "kda"}),
        _softmax(
            "Parallax, 16k",
            attnlab.parallax_attention,
            _window_pairs(2**30),
            names=("query", "probe", "key", "value"),
            products=2,
            tokens=2**14,
        ),
        _softmax(
            "local linear, 8k",
            partial(attnlab.local_linear_attention, ridge=10.0),
            _window_pairs(2**30),
            tokens=2**13,
            small=512,
        ),
        _cached_step("a step on a cache, 32 x 8k", 32, 2**13),
        _cached_step("a step on a cache, 1 x 64k", 1, 2**16),
    ]
    gates: dict[str, dict[str, Any]] = {
        "linear": {},
        "gated delta": {"decay": "token", "delta": True},
        "delta, decay per channel": {"decay": "channel", "delta": True},
    }
    found += [
        _state_step(f"a step of {name}, batch 64", _linear(name, tokens=1, **options), 64)
        for name, options in gates.items()
    ]
    for power in range(12, 19):  # 256k tokens in all
        tokens, batch = 2**power, 2 ** (18 - power)
        size: Any = {"tokens": tokens, "batch": batch}
        window = partial(local, window=1024, is_causal=True)
        found += [
            _softmax(f"window 1024, {batch} x {tokens // 1024}k", window, _window_pairs(1024), small=2048, **size),
            _linear(f"gated delta, {batch} x {tokens // 1024}k", decay="token", delta=True, **size),
        ]
    return found


# --- attnlab ----------------------------------------------------------------------------------------------------------


def prepare(problem: Problem, implementation: str, passes: str) -> Prepared:
    key = jax.random.key(int.from_bytes(os.urandom(4), "little"))
    calls = _calls(problem, lambda arrays: problem.attend(arrays, implementation), key, passes)
    return calls, lambda: _errors(problem, implementation, jax.random.fold_in(key, 1), passes)


def _timed(problem: Problem, key: jax.Array) -> dict[str, jax.Array]:
    return problem.make(key, problem.batch, problem.tokens, problem.heads)


def _calls(problem: Problem, attend: Callable[[Arrays], jax.Array], key: jax.Array, passes: str) -> list[Any]:
    make = jax.jit(functools.partial(_timed, problem))
    sets = [make(one) for one in jax.random.split(key, _numbers(problem))]
    if passes == "forward":
        compiled = jax.jit(attend)
        return [(compiled, arrays) for arrays in sets]
    # Of vjp's function, all that the forward keeps are arrays, so that it can be an argument.
    pull, backward = jax.jit(lambda arrays: jax.vjp(attend, arrays)), jax.jit(lambda pull, cotangent: pull(cotangent))
    return [(backward, transpose, out) for out, transpose in map(pull, sets)]


def lower(problem: Problem, passes: str) -> None:
    """Of attnlab's kernels for a GPU, also where there is none."""
    arrays = jax.eval_shape(functools.partial(_timed, problem), jax.random.key(0))

    def call(arrays: Arrays) -> Any:
        out, pull = jax.vjp(lambda arrays: problem.attend(arrays, "pallas_gpu"), arrays)
        return out if passes == "forward" else pull(out)

    jax.jit(call).trace(arrays).lower(lowering_platforms=("cuda",))


def _errors(problem: Problem, implementation: str, key: jax.Array, passes: str) -> dict[str, float]:
    """Values, or gradients, beside the reference in float64 on the same inputs."""
    arrays = problem.make(key, 1, problem.small, 2)

    def results(arrays: Arrays, implementation: str) -> dict[str, jax.Array]:
        if passes == "forward":
            return {"out": problem.attend(arrays, implementation)}
        out, pull = jax.vjp(lambda arrays: problem.attend(arrays, implementation), arrays)
        cotangent = jnp.cos(jnp.arange(out.size, dtype=jnp.float32)).reshape(out.shape)
        return dict(pull(cotangent.astype(jnp.bfloat16).astype(out.dtype))[0])

    got = jax.jit(results, static_argnums=1)(arrays, implementation)
    with jax.enable_x64(True):
        wide = {name: x.astype(jnp.float64) for name, x in arrays.items()}
        want = jax.jit(results, static_argnums=1)(wide, "reference")
        return {
            name: float(jnp.max(jnp.abs(got[name].astype(jnp.float64) - x)) / jnp.max(jnp.abs(x)))
            for name, x in want.items()
        }


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


def _numbers(problem: Problem) -> int:
    """Sets of inputs that are together twice as large as the cache."""
    shapes = jax.eval_shape(functools.partial(_timed, problem), jax.random.key(0))
    size = sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(shapes))
    return min(8, -(-2 * _CACHE // size))


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
    return _calls(problem, attend, jax.random.key(0), passes), None


def _torch_sets(problem: Problem, passes: str) -> tuple[Any, list[list[Any]]]:
    """torch, and tensors [B, N, T, H] of the problem's shapes."""
    torch: Any = importlib.import_module("torch")
    shapes = jax.eval_shape(functools.partial(_timed, problem), jax.random.key(0))

    def tensor(shape: Any) -> Any:
        batch, heads, head_dim = shape.shape[0], shape.shape[-2], shape.shape[-1]
        size = (batch, heads, math.prod(shape.shape[1:-2]), head_dim)
        return torch.randn(size, device="cuda", dtype=torch.bfloat16, requires_grad=passes == "backward")

    names = ("query", "key", "value")
    return torch, [[tensor(shapes[name]) for name in names] for _ in range(_numbers(problem))]


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
    shapes = jax.eval_shape(functools.partial(_timed, problem), jax.random.key(0))

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

    return _of_torch(lambda *x: attend(*x)[0], [tensors() for _ in range(_numbers(problem))], passes)


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
        tokens = problem.batch * (1 if problem.is_step else problem.tokens)
        for passes, times in problem.passes.items():
            size: Any = {"flops": times * problem.flops(problem.tokens), "tokens": tokens, "passes": passes}
            for implementation in ("pallas_gpu", "xla"):
                ours = functools.partial(prepare, problem, implementation, passes)
                library = f"attnlab, {implementation}"
                found.append(Case(problem.name, library, prepare=ours, clock=clock, most_error=MOST_ERROR, **size))
            for library, kinds, prepared, its_clock in _OTHERS:
                if problem.facts.get("kind") in kinds:
                    theirs = functools.partial(prepared, problem, passes)
                    found.append(Case(problem.name, library, prepare=theirs, clock=its_clock, **size))
    return found
