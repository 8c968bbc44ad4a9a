"""Every mechanism once: what it is called with, on inputs of any size. Suites of tests, the benchmark and galleries go
over this table, so that a mechanism that has a row is in all of them.

    for name, mechanism in catalog.MECHANISMS.items():
        arrays = mechanism.inputs()
        out = mechanism(arrays, implementation="xla")
"""

import dataclasses
import functools
import math
from collections.abc import Callable, Mapping
from typing import Any

import jax
import numpy as np

import attnlab


@dataclasses.dataclass(frozen=True)
class Sizes:
    """Of a row's inputs: a batch of sequences or grids with this space, and counts of agents and of clusters."""

    batch: int
    space: tuple[int, ...]
    heads: int
    key_heads: int
    head_dim: int
    value_dim: int
    agents: int
    clusters: int


@dataclasses.dataclass(frozen=True)
class Mechanism:
    """One row: function(**arrays, **options).

    options: for inputs of the default sizes. large: for realistic ones, of so many positions; over the options.
    arrays: (rng, sizes) -> arguments beside query, key and value.
    result: what the function returns -> the output [B, *space, N, V].
    grid: takes images; else sequences. is_causal: no position sees a later one.
    """

    function: Callable[..., Any]
    options: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    large: Callable[[int], Mapping[str, Any]] = lambda length: {}
    arrays: Callable[[np.random.Generator, Sizes], dict[str, Any]] = lambda rng, sizes: {}
    result: Callable[[Any], Any] = lambda out: out
    grid: bool = False
    is_causal: bool = False

    def inputs(
        self,
        length: int | None = None,
        *,
        seed: int = 0,
        batch: int = 2,
        heads: int = 4,
        key_heads: int | None = None,
        head_dim: int = 8,
        value_dim: int = 6,
        agents: int = 3,
        clusters: int = 3,
        dtype: Any = np.float32,
    ) -> dict[str, Any]:
        """Query, key, value and further arrays by name, drawn from the seed. length: positions, 13 or a grid of 4 x 5
        by default; else a grid is as square as its length allows."""
        space: tuple[int, ...] = (13 if length is None else length,)
        if self.grid:
            space = (4, 5) if length is None else _near_square(length)
        key_heads = heads if key_heads is None else key_heads
        sizes = Sizes(batch, space, heads, key_heads, head_dim, value_dim, agents, clusters)
        rng = np.random.default_rng(seed)
        shapes = {"query": (heads, head_dim), "key": (key_heads, head_dim), "value": (key_heads, value_dim)}
        drawn = {name: rng.normal(size=(batch, *space, *shape)) for name, shape in shapes.items()}
        return jax.tree.map(lambda x: np.asarray(x, dtype), {**drawn, **self.arrays(rng, sizes)})

    def __call__(self, arrays: Mapping[str, Any], implementation: str | None = None, **options: Any) -> Any:
        """The output [B, *space, N, V]; options over the row's own."""
        return self.result(self.function(**arrays, **{**self.options, **options}, implementation=implementation))


def _near_square(length: int) -> tuple[int, int]:
    rows = max(n for n in range(1, math.isqrt(length) + 1) if length % n == 0)
    return rows, length // rows


def _agents(rng: np.random.Generator, sizes: Sizes) -> dict[str, Any]:
    return {"agents": rng.normal(size=(sizes.batch, sizes.agents, sizes.heads, sizes.head_dim))}


def _agents_and_biases(rng: np.random.Generator, sizes: Sizes) -> dict[str, Any]:
    positions = math.prod(sizes.space)
    return {
        **_agents(rng, sizes),
        "gather_bias": rng.normal(size=(sizes.heads, sizes.agents, positions)),
        "broadcast_bias": rng.normal(size=(sizes.heads, positions, sizes.agents)),
    }


def _sink_logits(rng: np.random.Generator, sizes: Sizes) -> dict[str, Any]:
    return {"sink_logits": rng.normal(size=sizes.heads)}


def _decay(rng: np.random.Generator, sizes: Sizes) -> dict[str, Any]:
    return {"log_decay": -rng.exponential(size=(sizes.batch, *sizes.space, sizes.heads))}


def _channel_decay(rng: np.random.Generator, sizes: Sizes) -> dict[str, Any]:
    return {"log_decay": -rng.exponential(size=(sizes.batch, *sizes.space, sizes.heads, sizes.head_dim))}


def _strength(rng: np.random.Generator, sizes: Sizes) -> dict[str, Any]:
    # Keys here have a squared length of about head_dim, and the delta rule diverges where beta times it is above 2.
    return {"beta": 1.6 / sizes.head_dim * rng.uniform(size=(sizes.batch, *sizes.space, sizes.heads))}


def _gates(rng: np.random.Generator, sizes: Sizes) -> dict[str, Any]:
    return {**_decay(rng, sizes), **_strength(rng, sizes)}


def _erase(rng: np.random.Generator, sizes: Sizes) -> dict[str, Any]:
    """As RWKV-7 has it: of vectors of unit length, up to all of what each finds, channel by channel."""
    read = rng.normal(size=(sizes.batch, *sizes.space, sizes.heads, sizes.head_dim))
    read = read / np.linalg.norm(read, axis=-1, keepdims=True)
    return {**_channel_decay(rng, sizes), "erase": (read, rng.uniform(size=read.shape) * read)}


def _levels(rng: np.random.Generator, sizes: Sizes) -> dict[str, Any]:
    shape = (sizes.batch, *sizes.space, sizes.heads, 1 + (math.prod(sizes.space) - 1).bit_length())
    return {"level_scales": rng.uniform(size=shape), **_decay(rng, sizes)}


def _landmarks(rng: np.random.Generator, sizes: Sizes) -> dict[str, Any]:
    return {"landmarks": rng.normal(size=(sizes.batch, sizes.agents, sizes.heads, sizes.head_dim))}


def _transitions(rng: np.random.Generator, sizes: Sizes) -> dict[str, Any]:
    shape = (sizes.batch, *sizes.space, sizes.heads)
    transition = rng.normal(size=(*shape, sizes.head_dim))
    transition = transition / np.linalg.norm(transition, axis=-1, keepdims=True)
    return {"transition": transition, "beta": rng.uniform(0, 2, size=shape)}


def _gated_transitions(rng: np.random.Generator, sizes: Sizes) -> dict[str, Any]:
    gates = {"log_forget": -rng.exponential(size=(sizes.batch, *sizes.space, sizes.heads)) / 4}
    return {**_transitions(rng, sizes), **gates}


def _centroids(rng: np.random.Generator, sizes: Sizes) -> dict[str, Any]:
    centroids: Any = rng.normal(size=(sizes.heads, sizes.clusters, sizes.head_dim))
    return {"state": attnlab.RoutingState(centroids, np.ones_like(centroids[..., 0]), centroids)}


def _probe(rng: np.random.Generator, sizes: Sizes) -> dict[str, Any]:
    return {"probe": 0.5 * rng.normal(size=(sizes.batch, *sizes.space, sizes.heads, sizes.head_dim))}


@functools.wraps(attnlab.block_sparse_attention)
def _block_sparse(query: Any, key: Any, value: Any, blocks: Any = None, *, places: int = 3, **options: Any) -> Any:
    """With lists, unless some are given, of so many places: the first, the last and the own key block, and those before
    it."""
    sizes = [options[name] for name in ("query_block", "key_block")]
    if blocks is None and all(isinstance(size, (int, np.integer)) and size > 0 for size in sizes):
        query_block, key_block = sizes
        (queries,), (keys,) = (np.shape(x)[1:2] or (1,) for x in (query, key))
        own = np.arange(0, queries, query_block) // key_block
        columns = [0 * own, own, 0 * own + (keys - 1) // key_block, *(own - back for back in range(1, places - 2))]
        blocks = np.stack(columns[:places], axis=-1)[None, None].astype(np.int32)
    return attnlab.block_sparse_attention(query, key, value, blocks, **options)


@functools.wraps(attnlab.pyramid_attention)
def _pyramid(query: Any, key: Any, value: Any, levels: Any = None, **options: Any) -> Any:
    """With levels, unless some are given, by the distance in blocks: sizes[0] of the own block, sizes[1] at 1, sizes[2]
    at 2 and 3, and so on, up to the last one."""
    counts = [options[name] for name in ("query_block", "key_block")]
    sizes = options.get("sizes", (1, 2, 4, 8))
    are_known = isinstance(sizes, (tuple, list)) and all(isinstance(size, (int, np.integer)) for size in sizes)
    if levels is None and are_known and all(isinstance(size, (int, np.integer)) and size > 0 for size in counts):
        query_block, key_block = counts
        (queries,), (keys,) = (np.shape(x)[1:2] or (1,) for x in (query, key))
        own = np.arange(0, queries, query_block)[:, None] // key_block
        away = np.abs(own - np.arange(-(-keys // key_block)))
        levels = np.array([*sizes, 0], np.int32)[np.minimum(np.frexp(away)[1], len(sizes))][None, None]
    return attnlab.pyramid_attention(query, key, value, levels, **options)


def _memory_gates(rng: np.random.Generator, sizes: Sizes) -> dict[str, Any]:
    # Keys here have a squared length of about head_dim, and chunks of them diverge where their rates are larger.
    gates = (sizes.batch, *sizes.space, sizes.heads)
    rate = 0.2 / sizes.head_dim * rng.uniform(size=gates)
    # From nothing the memory is linear in the values.
    weights = np.zeros((sizes.heads, sizes.head_dim, sizes.value_dim))
    return {"weights": weights, "rate": rate, "momentum": 0.8 * rng.uniform(size=gates), **_decay(rng, sizes)}


def _memory_rate(rng: np.random.Generator, sizes: Sizes) -> dict[str, Any]:
    return {name: x for name, x in _memory_gates(rng, sizes).items() if name in ("weights", "rate")}


@functools.wraps(attnlab.memory_attention)
def _memory(query: Any, key: Any, value: Any, weights: Any, **options: Any) -> Any:
    """With the one weight of a linear memory."""
    weights = {"w": weights} if hasattr(weights, "shape") else weights
    return attnlab.memory_attention(query, key, value, weights, **options)


def _linear(**row: Any) -> Mechanism:
    return Mechanism(attnlab.linear_attention, **{"is_causal": True, **row})


_ELU = {"feature_map": "elu", "normalize": True}
WINDOW = 256  # of large inputs on one axis

MECHANISMS: dict[str, Mechanism] = {
    "dot_product": Mechanism(attnlab.dot_product_attention),
    "dot_product, causal": Mechanism(attnlab.dot_product_attention, {"is_causal": True}, is_causal=True),
    "dot_product, softcap and learned sinks": Mechanism(
        attnlab.dot_product_attention, {"is_causal": True, "softcap": 2.0}, arrays=_sink_logits, is_causal=True
    ),
    "local, causal": Mechanism(
        attnlab.local_attention,
        {"window": 5, "is_causal": True},
        large=lambda length: {"window": WINDOW},
        is_causal=True,
    ),
    "local, softcap and learned sinks": Mechanism(
        attnlab.local_attention,
        {"window": 5, "is_causal": True, "softcap": 2.0},
        large=lambda length: {"window": WINDOW},
        arrays=_sink_logits,
        is_causal=True,
    ),
    "local, grid": Mechanism(
        attnlab.local_attention, {"window": (3, 4)}, large=lambda length: {"window": 13}, grid=True
    ),
    "dilated": Mechanism(
        attnlab.dilated_attention,
        {"window": 3, "dilation": 2},
        large=lambda length: {"window": WINDOW // 4, "dilation": 4},
    ),
    "block-sparse": Mechanism(
        _block_sparse,
        {"query_block": 3, "key_block": 3},
        large=lambda length: {"query_block": 128, "key_block": 128, "places": 8},
    ),
    "block-sparse, causal": Mechanism(
        _block_sparse,
        {"query_block": 2, "key_block": 4, "is_causal": True},
        large=lambda length: {"query_block": 128, "key_block": 128, "places": 8},
        is_causal=True,
    ),
    "pyramid": Mechanism(
        _pyramid,
        {"query_block": 3, "key_block": 4, "sizes": (1, 4)},
        large=lambda length: {
            "query_block": 128,
            "key_block": 128,
            "sizes": (1, 2, 4, 8),
            "places": (1, 2, 4, 8),
        },
    ),
    "pyramid, causal": Mechanism(
        _pyramid,
        {"query_block": 2, "key_block": 4, "sizes": (1, 2), "is_causal": True},
        large=lambda length: {
            "query_block": 128,
            "key_block": 128,
            "sizes": (1, 2, 4, 8),
            "places": (1, 1, 2, 4),
        },
        is_causal=True,
    ),
    "ema-sinks": Mechanism(
        attnlab.ema_sinks_attention,
        {"chunk": 3, "chunks_kept": 3, "decay": 0.5},
        large=lambda length: {"chunk": 64, "chunks_kept": 5},
    ),
    "ema-sinks, causal": Mechanism(
        attnlab.ema_sinks_attention,
        {"chunk": 2, "chunks_kept": 3, "decay": 0.5, "is_causal": True},
        large=lambda length: {"chunk": 64, "chunks_kept": 5},
        is_causal=True,
    ),
    "dynamic-mask": Mechanism(
        attnlab.dynamic_mask_attention,
        {"width": 5},
        large=lambda length: {"width": WINDOW // 4},
        arrays=lambda rng, sizes: {"key_bias": rng.normal(size=(sizes.batch, *sizes.space, sizes.key_heads))},
        is_causal=True,
    ),
    "axial": Mechanism(attnlab.axial_attention, {"axis": 0}, grid=True),
    "agent": Mechanism(attnlab.agent_attention, arrays=_agents_and_biases, grid=True),
    "agent, causal": Mechanism(attnlab.causal_agent_attention, arrays=_agents, is_causal=True),
    "linear": _linear(options=_ELU),
    "linear, not causal": _linear(options={**_ELU, "is_causal": False}, is_causal=False),
    "linear, taylor2": _linear(options={"feature_map": "taylor2", "normalize": True}),
    "linear, decay": _linear(arrays=_decay),
    "linear, decay per channel": _linear(arrays=_channel_decay),
    "linear, delta rule": _linear(arrays=_strength),
    "linear, gated delta rule": _linear(arrays=_gates),
    "linear, erase": _linear(arrays=_erase),
    "memory": Mechanism(
        _memory,
        {"chunk_size": 4},
        large=lambda length: {"chunk_size": 64},
        arrays=_memory_gates,
        is_causal=True,
    ),
    "memory, per chunk": Mechanism(
        _memory,
        {"objective": "dot", "per": "chunk", "chunk_size": 4},
        large=lambda length: {"chunk_size": 64},
        arrays=_memory_rate,
        is_causal=True,
    ),
    "memora": Mechanism(attnlab.memora_attention, arrays=_gates, is_causal=True),
    "log-linear": Mechanism(attnlab.log_linear_attention, arrays=_levels, is_causal=True),
    "routing, strict": Mechanism(
        attnlab.routing_attention,
        {"window": 4, "is_causal": True},
        large=lambda length: {"window": math.isqrt(length)},
        arrays=_centroids,
        result=lambda pair: pair[0],
        is_causal=True,
    ),
    "routing, global": Mechanism(
        attnlab.routing_attention,
        {"window": 4, "membership": "global", "normalize": "layer"},
        large=lambda length: {"window": math.isqrt(length)},
        arrays=_centroids,
        result=lambda pair: pair[0],
    ),
    "local-linear": Mechanism(attnlab.local_linear_attention, {"ridge": 2.0}, is_causal=True),
    "local-linear, window": Mechanism(
        attnlab.local_linear_attention,
        {"ridge": 2.0, "window": 5, "is_causal": False},
        large=lambda length: {"window": WINDOW, "ridge": 10.0},
    ),
    "parallax": Mechanism(
        attnlab.parallax_attention,
        {"window": 5},
        large=lambda length: {"window": WINDOW},
        arrays=_probe,
        is_causal=True,
    ),
    "path": Mechanism(attnlab.path_attention, arrays=_transitions, is_causal=True),
    "path, forget gates": Mechanism(
        attnlab.path_attention,
        {"chunk_size": 4},
        large=lambda length: {"chunk_size": 64},
        arrays=_gated_transitions,
        is_causal=True,
    ),
    "pointwise": Mechanism(attnlab.pointwise_attention, {"activation": "relu"}),
    "pointwise, causal": Mechanism(attnlab.pointwise_attention, {"is_causal": True, "divide": True}, is_causal=True),
    "landmark": Mechanism(attnlab.landmark_attention, {"ridge": 0.1}, arrays=_landmarks, grid=True),
    "landmark, softmax": Mechanism(
        attnlab.landmark_attention, {"kernel": "softmax", "ridge": 0.1}, arrays=_landmarks, grid=True
    ),
    "inline": Mechanism(attnlab.inline_attention, grid=True),
}
