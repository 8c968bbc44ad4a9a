"""Every mechanism as one row of a table: what it is called with, for tests that hold for all of them."""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import numpy as np

import attnlab

BATCH, HEADS, HEAD_DIM, VALUE_DIM = 2, 4, 8, 6


def no_arrays(rng, shape, key_heads):
    return {}


@dataclasses.dataclass(frozen=True)
class Mechanism:
    """function(query, key, value, **arrays, **options); a space of 13 tokens, or of 4 x 5 places for grids.

    arrays: (rng, (batch, *space), key_heads) -> further array arguments.
    result: what the function returns -> the output.
    """

    function: Callable[..., Any]
    options: dict[str, Any] = dataclasses.field(default_factory=dict)
    arrays: Callable[..., dict[str, Any]] = no_arrays
    grid: bool = False
    result: Callable[[Any], Any] = lambda out: out

    def inputs(self, *, length=13, side=None, key_heads=HEADS, seed=0, batch=BATCH, dtype=np.float32):
        """Query, key, value and further arrays by name. side: of a square grid."""
        rng = np.random.default_rng(seed)
        grid = (4, 5) if side is None else (side, side)
        shape = (batch, *(grid if self.grid else (length,)))
        query = rng.normal(size=(*shape, HEADS, HEAD_DIM))
        key = rng.normal(size=(*shape, key_heads, HEAD_DIM))
        value = rng.normal(size=(*shape, key_heads, VALUE_DIM))
        arrays = {"query": query, "key": key, "value": value, **self.arrays(rng, shape, key_heads)}
        return jax.tree.map(lambda x: np.asarray(x, dtype), arrays)

    def __call__(self, arrays, implementation=None, **options):
        return self.result(self.function(**arrays, **{**self.options, **options}, implementation=implementation))


def agents(rng, shape, key_heads):
    return {"agents": rng.normal(size=(shape[0], 3, HEADS, HEAD_DIM))}


def agents_and_biases(rng, shape, key_heads):
    places = int(np.prod(shape[1:]))
    return {
        **agents(rng, shape, key_heads),
        "gather_bias": rng.normal(size=(HEADS, 3, places)),
        "broadcast_bias": rng.normal(size=(HEADS, places, 3)),
    }


def decay(rng, shape, key_heads):
    return {"log_decay": -rng.exponential(size=(*shape, HEADS))}


def channel_decay(rng, shape, key_heads):
    return {"log_decay": -rng.exponential(size=(*shape, HEADS, HEAD_DIM))}


def strength(rng, shape, key_heads):
    return {"beta": 0.2 * rng.uniform(size=(*shape, HEADS))}


def gates(rng, shape, key_heads):
    return {**decay(rng, shape, key_heads), **strength(rng, shape, key_heads)}


def centroids(rng, shape, key_heads):
    mu = rng.normal(size=(HEADS, 3, HEAD_DIM))
    return {"state": attnlab.RoutingState(mu, np.ones((HEADS, 3)), mu)}


def probe(rng, shape, key_heads):
    return {"probe": 0.5 * rng.normal(size=(*shape, HEADS, HEAD_DIM))}


MECHANISMS = {
    "dot_product": Mechanism(attnlab.dot_product_attention),
    "dot_product, causal": Mechanism(attnlab.dot_product_attention, {"is_causal": True}),
    "local, causal": Mechanism(attnlab.local_attention, {"window": 5, "is_causal": True}),
    "local, grid": Mechanism(attnlab.local_attention, {"window": (3, 4)}, grid=True),
    "dilated": Mechanism(attnlab.dilated_attention, {"window": 3, "dilation": 2}),
    "axial": Mechanism(attnlab.axial_attention, {"axis": 0}, grid=True),
    "agent": Mechanism(attnlab.agent_attention, arrays=agents_and_biases, grid=True),
    "agent, causal": Mechanism(attnlab.causal_agent_attention, arrays=agents),
    "linear": Mechanism(attnlab.linear_attention, {"feature_map": "elu", "normalize": True}),
    "linear, not causal": Mechanism(
        attnlab.linear_attention, {"feature_map": "elu", "normalize": True, "is_causal": False}
    ),
    "linear, taylor2": Mechanism(attnlab.linear_attention, {"feature_map": "taylor2", "normalize": True}),
    "linear, decay": Mechanism(attnlab.linear_attention, arrays=decay),
    "linear, decay per channel": Mechanism(attnlab.linear_attention, arrays=channel_decay),
    "linear, delta rule": Mechanism(attnlab.linear_attention, arrays=strength),
    "linear, gated delta rule": Mechanism(attnlab.linear_attention, arrays=gates),
    "routing, strict": Mechanism(
        attnlab.routing_attention, {"window": 4, "is_causal": True}, arrays=centroids, result=lambda pair: pair[0]
    ),
    "routing, global": Mechanism(
        attnlab.routing_attention,
        {"window": 4, "membership": "global", "normalize": "layer"},
        arrays=centroids,
        result=lambda pair: pair[0],
    ),
    "local-linear": Mechanism(attnlab.local_linear_attention, {"ridge": 2.0}),
    "local-linear, window": Mechanism(attnlab.local_linear_attention, {"ridge": 2.0, "window": 5, "is_causal": False}),
    "parallax": Mechanism(attnlab.parallax_attention, {"window": 5}, arrays=probe),
    "inline": Mechanism(attnlab.inline_attention, grid=True),
}
