"""A right call of every public function, by the names of its parameters, which mean the same in all of them."""

import functools
import inspect
import operator

import jax
import jax.numpy as jnp
import numpy as np

import attnlab as A
from attnlab.attention import _public

BATCH, HEADS, KEY_HEADS, HEAD_DIM, VALUE_DIM = 6, 4, 2, 8, 7
_rng = np.random.default_rng(0)


def _normal(*shape):
    return _rng.normal(size=shape).astype(np.float32)


def _tokens(*space):
    heads = {"query": (HEADS, HEAD_DIM), "key": (KEY_HEADS, HEAD_DIM), "value": (KEY_HEADS, VALUE_DIM)}
    return {name: _normal(BATCH, *space, *shape) for name, shape in heads.items()}


_LINE, _IMAGE, _TOKEN = _tokens(6), _tokens(4, 5), _tokens(1)
_IDS, _REAL = np.zeros((BATCH, 6), np.int32), np.ones((BATCH, 6), bool)
_centroids = _normal(HEADS, 3, HEAD_DIM)
_STATE = A.RoutingState(_centroids, np.ones((HEADS, 3), np.float32), _centroids)
_GATES = {"log_decay": -np.abs(_normal(BATCH, 6, HEADS)), "beta": np.abs(_normal(BATCH, 6, HEADS))}

_transition = _normal(BATCH, 6, HEADS, HEAD_DIM)
# Of unit length, and beta up to 2: others magnify, and rounding with it.
_TRANSITIONS = {
    "transition": _transition / np.linalg.norm(_transition, axis=-1, keepdims=True),
    "beta": np.minimum(_GATES["beta"], 2),
    "log_forget": _GATES["log_decay"],
}
_PATH_CACHE = A.init_path_cache(BATCH, 7, HEADS, KEY_HEADS, HEAD_DIM, value_dim=VALUE_DIM)
_MEMORY = {"weights": {"w": _normal(HEADS, HEAD_DIM, VALUE_DIM)}, "objective": "huber"}

# Right values of parameters, which mean the same in every function.
_BY_NAME = {
    "batch": BATCH,
    "num_heads": HEADS,
    "num_key_heads": KEY_HEADS,
    "head_dim": HEAD_DIM,
    "value_dim": VALUE_DIM,
    "max_length": 4,
    "num_agents": 3,
    "num_levels": 4,
    "num_clusters": 3,
    "window": 3,
    "sinks": 1,
    "dilation": 2,
    "edge": "clip",
    "chunk_size": 4,
    "query_block": 2,
    "key_block": 4,
    "count": 2,
    "first": 1,
    "chunk": 3,
    "chunks_kept": 2,
    "decay": 0.5,
    "sizes": (1, 2),
    "fractions": (0.5, 1.0),
    "reduce": "sum",
    "lengths": np.array([6, 0, 1, 4, 6, 3], np.int32),
    "scale": 0.5,
    "softcap": 3.0,
    "sink_logits": _normal(HEADS),
    "ratio": 0.5,
    "feature_map": "elu",
    "implementation": "xla",
    "dtype": jnp.float32,
    "segment_ids": _IDS,
    "key_mask": _REAL,
    "agents": _normal(3, HEADS, HEAD_DIM),
    "state": _STATE,
    # Of selection, which has 3 blocks of queries and 2 of keys, and of masks.
    "query_blocks": 3,
    "key_blocks": 2,
    "queries": _normal(BATCH, 3, HEADS, HEAD_DIM),
    "keys": _normal(BATCH, 2, KEY_HEADS, HEAD_DIM),
    "scores": _normal(BATCH, HEADS, 3, 2),
    "eligible": np.ones((3, 2), bool),
    "own": np.eye(3, 2, dtype=bool),
    "block_mask": np.eye(3, 2, dtype=bool),
    "blocks": np.array([[[[0, -1], [1, 0], [1, 1]]]], np.int32),
    "width": 2,
    "mass": 0.5,
    "x": _normal(BATCH, 6, HEADS, HEAD_DIM),
    "size": 4,
    "kind": "mean",
    "query_weights": _normal(HEADS, HEAD_DIM, 5),
    "key_weights": _normal(KEY_HEADS, HEAD_DIM, 5),
    "statistics": np.abs(_normal(BATCH, HEADS, 3, 2)),
    "mask": A.masks.causal(),
    "shape": (6,),
    "query_shape": (6,),
    "key_shape": (7,),
    "query_tile": (2,),
    "key_tile": (4,),
    "left": 2,
    "right": 1,
    "length": 6,
}
# What is a function's own, or better another value there.
_OWN = {
    "dot_product_attention": {"bias": _normal(1, 1, 6, 6), "mask": np.ones((1, 1, 6, 6), bool)},
    "pointwise_attention": {
        "activation": "relu",
        "bias": _normal(1, 1, 6, 6),
        "mask": np.ones((1, 1, 6, 6), bool),
    },
    "path_attention": _TRANSITIONS,
    "path_step": {"cache": _PATH_CACHE, **{name: x[:, :1] for name, x in _TRANSITIONS.items()}},
    "prefill_path_cache": {"cache": _PATH_CACHE, **_TRANSITIONS},
    "landmark_attention": {
        **_IMAGE,
        "landmarks": _normal(BATCH, 3, HEADS, HEAD_DIM),
        "kernel": "softmax",
        "inverse": "newton",
    },
    "pointwise_step": {
        "bias": _normal(1, HEADS, 1, 7),
        "cache": A.init_dot_product_cache(BATCH, 7, KEY_HEADS, HEAD_DIM, value_dim=VALUE_DIM),
    },
    "local_attention": {"is_causal": True},
    "block_sparse_attention": {
        "blocks": np.array([[[[0, -1], [1, 0], [1, 1]]]], np.int32),
        "block_bias": _normal(1, 1, 3, 2),
        "mask": A.masks.causal(),
    },
    "pyramid_attention": {"levels": np.array([[[[1, 0], [2, 1], [2, 1]]]], np.int32), "places": (2, 1)},
    "block_statistics": {"lse": _normal(BATCH, 6, HEADS)},
    **{
        name: {"key_bias": _normal(BATCH, 6, KEY_HEADS)}
        for name in ("dynamic_mask_attention", "prefill_dynamic_mask_cache")
    },
    "dynamic_mask_step": {"key_bias": _normal(BATCH, 1, KEY_HEADS)},
    "dilated_attention": {"window": 2},
    "axial_attention": {**_IMAGE, "axis": 1, "bias": _normal(HEADS, 5, 5)},
    "agent_attention": {"gather_bias": _normal(HEADS, 3, 6), "broadcast_bias": _normal(HEADS, 6, 3)},
    "causal_agent_attention": {"initial_state": A.init_agent_cache(BATCH, HEADS, 3, VALUE_DIM)},
    "pool_agents": {**_IMAGE, "grid": (2, 2)},
    "linear_attention": {**_GATES, "initial_state": A.init_linear_cache(BATCH, HEADS, HEAD_DIM, VALUE_DIM)},
    "log_linear_attention": {
        "level_scales": np.abs(_normal(BATCH, 6, HEADS, 4)),
        "log_decay": _GATES["log_decay"],
        "initial_state": A.init_log_linear_cache(BATCH, HEADS, 4, HEAD_DIM, VALUE_DIM),
    },
    "local_linear_attention": {"ridge": 2.0},
    "parallax_attention": {"probe": _normal(BATCH, 6, HEADS, HEAD_DIM)},
    "inline_attention": _IMAGE,
    "merge_attention": {
        "outputs": [_normal(BATCH, 6, HEADS, VALUE_DIM)] * 2,
        "lses": [_normal(BATCH, 6, HEADS)] * 2,
    },
    "init_routing": {"rng": jax.random.key(0)},
    "fit_routing": {"tokens": _LINE["query"], "iterations": 2},
    "update_routing": {"stats": A.RoutingStatistics(_STATE.counts, _STATE.sums)},
    "linear_step": {name: gate[:, :1] for name, gate in _GATES.items()},
    "log_linear_step": {
        "level_scales": np.abs(_normal(BATCH, 1, HEADS, 4)),
        "log_decay": _GATES["log_decay"][:, :1],
    },
    "local_step": {"stride": 2},
    "local_linear_step": {"ridge": 2.0},
    "parallax_step": {
        "probe": _normal(BATCH, 1, HEADS, HEAD_DIM),
        "cache": A.init_local_linear_cache(BATCH, 4, KEY_HEADS, HEAD_DIM, value_dim=VALUE_DIM, window=3),
    },
    "prefill_dot_product_cache": {
        "cache": A.init_dot_product_cache(BATCH, 7, KEY_HEADS, HEAD_DIM, value_dim=VALUE_DIM)
    },
    "prefill_block_sparse_cache": {
        "cache": A.init_block_sparse_cache(BATCH, 7, KEY_HEADS, HEAD_DIM, key_block=4, count=2, value_dim=VALUE_DIM)
    },
    "prefill_pyramid_cache": {
        "cache": A.init_pyramid_cache(BATCH, 7, KEY_HEADS, HEAD_DIM, key_block=4, sizes=(1, 2), value_dim=VALUE_DIM)
    },
    "prefill_local_linear_cache": {
        "cache": A.init_local_linear_cache(BATCH, 4, KEY_HEADS, HEAD_DIM, value_dim=VALUE_DIM, window=6),
        "window": 6,
    },
    "memory_attention": {
        **_MEMORY,
        "rate": np.full((BATCH, 6, HEADS), 0.1, np.float32),
        "momentum": np.full((BATCH, 6, HEADS), 0.5, np.float32),
        "log_decay": _GATES["log_decay"],
        "threshold": np.ones((BATCH, 6, HEADS), np.float32),
        "initial_state": A.init_memory_cache(BATCH, _MEMORY["weights"], momentum=True, chunk_size=4),
    },
    "init_memory_cache": {"weights": _MEMORY["weights"]},
    "memory_step": {
        **_MEMORY,
        **{name: np.full((BATCH, 1, HEADS), x, np.float32) for name, x in (("rate", 0.1), ("threshold", 1.0))},
    },
    "sparse_cache_step": {
        "cache": A.init_sparse_cache(BATCH, 4, KEY_HEADS, HEAD_DIM, ratio=0.5, value_dim=VALUE_DIM),
    },
    "lightning_log_decay": {"layer": 0, "num_layers": 2, "form": "code"},
    "block_selection.rectify": {
        "out": _normal(BATCH, 6, HEADS, VALUE_DIM),
        "probabilities": np.abs(_normal(BATCH, HEADS, 3, 2)),
        "chosen": np.eye(3, 2, dtype=bool),
        "gain": np.ones((3, 2), bool),
        "values": _normal(BATCH, 2, KEY_HEADS, VALUE_DIM),
    },
    "block_selection.chunk_sparsities": {
        "chunk_tokens": (2, 3),
        "target": 0.5,
        "base": 0.6,
        "alphas": (1.0, 0.5),
    },
    "block_selection.axis_order": {"space": (2, 3), "orders": ((0, 1), (1, 0))},
    "block_selection.in_order": {"index": np.arange(6)[None]},
    "block_selection.mean_of_groups": {"heads": KEY_HEADS},
    "block_selection.to_gate": {"weights": _normal(HEADS, HEAD_DIM, 5)},
    "block_selection.chunk_scores": {"starts": np.array([0, 2, 5])},
    "block_selection.connectivity_scores": {
        "down": _normal(2, 3),
        "up": _normal(2, 3),
        "coefficients": 2,
        "threshold": 0.5,
    },
    "block_selection.tree_blocks": {
        "queries": _normal(BATCH, 3, 1, HEADS, HEAD_DIM),
        "candidates": np.array([0, 1, 2]),
    },
    "masks.kinds": {"labels": np.zeros(6, int), "by_kind": {0: A.masks.causal()}},
    "masks.aligned": {"radius": 1, "offset": 6},
    "masks.radial": {"frame_tokens": 3},
}
# agent_bias takes tables under published names, which test_agent.py tries; explain takes any function; positions_over
# is the context of a shard_map, which test_parts.py tries.
_OTHERS = {"agent_bias", "explain", "positions_over"}
FUNCTIONS = {name for name, thing in vars(_public).items() if inspect.isfunction(thing)} - _OTHERS
# What the public modules define. draw needs matplotlib; checked calls are made of axis_windows, window_bounds and
# check_mask.
_OF_MASKS = {f"masks.{name}" for name in ("draw", "axis_windows", "window_bounds", "check_mask")}
IN_MODULES = {
    f"{module.__name__.rpartition('.')[2]}.{name}"
    for module in filter(inspect.ismodule, vars(_public).values())
    for name, thing in vars(module).items()
    if inspect.isfunction(thing) and thing.__module__ == module.__name__ and not name.startswith("_")
} - _OF_MASKS


def function_of(name):
    return operator.attrgetter(name)(A)


@functools.cache
def right_call(name):
    """A right call, with every parameter that the function has: its own, by name, or its default."""
    known = {**_BY_NAME, **(_TOKEN if name.endswith("_step") else _LINE)}
    parameters = inspect.signature(function_of(name)).parameters
    cache = state_of(name)
    if cache is not None and cache not in _OWN.get(name, {}):
        start = f"init_{name.removesuffix('_step').removeprefix('prefill_').removesuffix('_cache')}_cache"
        known[cache] = getattr(A, start)(**right_call(start))
    known |= _OWN.get(name, {})
    wanted = [parameter for parameter in parameters if parameter != "axis_name"]
    unknown = [x for x in wanted if x not in known and parameters[x].default is inspect.Parameter.empty]
    assert not unknown, f"{name}: give {unknown} a right value in _BY_NAME or _OWN"
    return {x: known[x] if x in known else parameters[x].default for x in wanted}


def state_of(name):
    """The argument of a step, or of what reads a prompt, that comes back changed: its first. None of others."""
    changes = name.endswith("_step") or name.startswith("prefill_")
    return next(iter(inspect.signature(function_of(name)).parameters)) if changes else None
