"""Every parameter of every public function with one wrong value: served, or refused in one line that names it."""

import functools
import inspect
import warnings

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from calls import BATCH, HEAD_DIM, HEADS, KEY_HEADS, VALUE_DIM
from marks import slow_but

import attnlab as A
from attnlab.attention import _public

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
_AGENTS = _normal(3, HEADS, HEAD_DIM)
_XLA = {"scale": 0.5, "implementation": "xla"}
_CACHED = {"batch": BATCH, "num_key_heads": KEY_HEADS, "head_dim": HEAD_DIM, "value_dim": VALUE_DIM}
_OF_HEADS = {"batch": BATCH, "num_heads": HEADS, "head_dim": HEAD_DIM, "value_dim": VALUE_DIM}
_SINGLE = {"dtype": jnp.float32}
_WINDOWS = {**_LINE, "stride": 1, "is_causal": True, "edge": "clip", "segment_ids": _IDS, "return_lse": False, **_XLA}
_GATES = {"log_decay": -np.abs(_normal(BATCH, 6, HEADS)), "beta": np.abs(_normal(BATCH, 6, HEADS))}
_GATE = {name: gate[:, :1] for name, gate in _GATES.items()}

# Right calls, with every parameter that the function has.
RIGHT = {
    "dot_product_attention": {
        **_LINE,
        "bias": _normal(1, 1, 6, 6),
        "mask": np.ones((1, 1, 6, 6), bool),
        "is_causal": True,
        "segment_ids": _IDS,
        "return_lse": False,
        **_XLA,
    },
    "local_attention": {**_WINDOWS, "window": 3, "sinks": 1},
    "dilated_attention": {**_WINDOWS, "window": 2, "dilation": 2},
    "axial_attention": {**_IMAGE, "axis": 1, "is_causal": True, "return_lse": False, **_XLA},
    "agent_attention": {
        **_LINE,
        "agents": _AGENTS,
        "gather_bias": _normal(HEADS, 3, 6),
        "broadcast_bias": _normal(HEADS, 6, 3),
        "key_mask": _REAL,
        **_XLA,
    },
    "causal_agent_attention": {
        **_LINE,
        "agents": _AGENTS,
        "initial_state": A.init_agent_cache(BATCH, HEADS, 3, VALUE_DIM),
        "return_state": False,
        "chunk_size": 4,
        **_XLA,
    },
    "pool_agents": {"query": _IMAGE["query"], "grid": (2, 2)},
    "routing_attention": {
        **_LINE,
        "state": _STATE,
        "window": 3,
        "is_causal": True,
        "membership": "strict",
        "normalize": "unit",
        "share_qk": False,
        "key_mask": _REAL,
        **_XLA,
    },
    "linear_attention": {
        **_LINE,
        **_GATES,
        "is_causal": True,
        "feature_map": "elu",
        "normalize": False,
        "initial_state": A.init_linear_cache(BATCH, HEADS, HEAD_DIM, VALUE_DIM),
        "return_state": False,
        "segment_ids": _IDS,
        "chunk_size": 4,
        **_XLA,
    },
    "local_linear_attention": {
        **_LINE,
        "ridge": 2.0,
        "is_causal": True,
        "window": 3,
        "tolerance": 1e-6,
        "max_iterations": 4,
        "return_residuals": False,
        **_XLA,
    },
    "parallax_attention": {
        **_LINE,
        "probe": _normal(BATCH, 6, HEADS, HEAD_DIM),
        "is_causal": True,
        "window": 3,
        **_XLA,
    },
    "inline_attention": {**_IMAGE, **_XLA},
    "merge_attention": {
        "outputs": [_normal(BATCH, 6, HEADS, VALUE_DIM)] * 2,
        "lses": [_normal(BATCH, 6, HEADS)] * 2,
    },
    "init_routing": {"rng": jax.random.key(0), "num_heads": HEADS, "num_clusters": 3, "head_dim": HEAD_DIM},
    "fit_routing": {"tokens": _LINE["query"], "state": _STATE, "iterations": 2, "normalize": "unit"},
    "update_routing": {
        "state": _STATE,
        "stats": A.RoutingStatistics(_STATE.counts, _STATE.sums),
        "decay": 0.9,
        "rule": "ema",
    },
    "init_dot_product_cache": {**_CACHED, "max_length": 4, **_SINGLE},
    "init_local_cache": {**_CACHED, "window": 3, "sinks": 1, **_SINGLE},
    "init_dilated_cache": {**_CACHED, "window": 3, "dilation": 2, **_SINGLE},
    "init_linear_cache": {**_OF_HEADS, "feature_map": "elu", "normalize": True, **_SINGLE},
    "init_agent_cache": {"batch": BATCH, "num_heads": HEADS, "num_agents": 3, "value_dim": VALUE_DIM, **_SINGLE},
    "init_routing_cache": {**_OF_HEADS, "num_clusters": 3, "window": 3, **_SINGLE},
    "init_local_linear_cache": {**_CACHED, "max_length": 4, "window": 3, **_SINGLE},
    "dot_product_step": {"cache": A.init_dot_product_cache(max_length=4, **_CACHED), **_TOKEN, **_XLA},
    "local_step": {
        "cache": A.init_local_cache(window=3, sinks=1, **_CACHED),
        **_TOKEN,
        "window": 3,
        "sinks": 1,
        "stride": 2,
        **_XLA,
    },
    "dilated_step": {
        "cache": A.init_dilated_cache(window=3, dilation=2, **_CACHED),
        **_TOKEN,
        "window": 3,
        "dilation": 2,
        "stride": 1,
        **_XLA,
    },
    "linear_step": {
        "state": A.init_linear_cache(BATCH, HEADS, HEAD_DIM, VALUE_DIM),
        **_TOKEN,
        **_GATE,
        "feature_map": "elu",
        "normalize": False,
        **_XLA,
    },
    "agent_step": {
        "state": A.init_agent_cache(BATCH, HEADS, 3, VALUE_DIM),
        **_TOKEN,
        "agents": _AGENTS,
        "scale": 0.5,
    },
    "routing_step": {
        "cache": A.init_routing_cache(num_clusters=3, window=3, **_OF_HEADS),
        **_TOKEN,
        "state": _STATE,
        "normalize": "unit",
        "share_qk": False,
        "scale": 0.5,
    },
    "local_linear_step": {
        "cache": A.init_local_linear_cache(max_length=4, **_CACHED),
        **_TOKEN,
        "ridge": 2.0,
        "window": None,
        "scale": 0.5,
        "tolerance": 1e-6,
        "max_iterations": 3,
    },
    "parallax_step": {
        "cache": A.init_local_linear_cache(max_length=4, **_CACHED),
        "probe": _normal(BATCH, 1, HEADS, HEAD_DIM),
        **_TOKEN,
        "window": None,
        "scale": 0.5,
    },
    "retention_log_decay": {"num_heads": HEADS, **_SINGLE},
    "lightning_log_decay": {"num_heads": HEADS, "layer": 0, "num_layers": 2, "form": "code", **_SINGLE},
}
# agent_bias takes tables under published names, which test_agent.py tries; explain takes any function.
_ELSEWHERE = {"agent_bias", "explain"}


def test_the_table_has_every_parameter_of_every_public_function():
    functions = {name: thing for name, thing in vars(_public).items() if inspect.isfunction(thing)}
    assert set(functions) - _ELSEWHERE == set(RIGHT)
    for name, function in functions.items():
        if name not in _ELSEWHERE:
            left = set(inspect.signature(function).parameters) - set(RIGHT[name])
            assert left <= {"axis_name"}, f"{name}: {left}"


class _Odd:
    pass


def _values():
    yield from (None, 0, -1, 10**12, 2.5, float("nan"), float("inf"), True, "x", b"x", _Odd(), jnp.int32)
    yield from (np.int64(2), np.int64(-3), np.float32(2), np.float32("nan"), np.bool_(True))
    yield from ((), (1, 2, 3, 4), [None], {})


def _wrong(right):
    if isinstance(right, np.ndarray):
        yield from (None, "x", 2.0, right.tolist(), right[..., 0], right[None], right.take([], axis=-1))
        yield from (right.astype(kind) for kind in (np.complex64, np.int32, bool, np.float32, object))
        for axis, length in enumerate(right.shape):
            yield right.take(np.arange(length + 1) % length, axis=axis)
        return
    yield from _values()
    if hasattr(right, "_fields"):
        yield type(right)(*(leaf[:-1] if getattr(leaf, "ndim", 0) else leaf for leaf in right))
    elif isinstance(right, list):
        yield right[:1]


@pytest.mark.parametrize("name", slow_but({"local_attention", "linear_step", "init_routing_cache"}, RIGHT))
def test_a_wrong_value_is_refused_in_one_line_that_names_it(name):
    function, right = getattr(A, name), RIGHT[name]
    jax.eval_shape(functools.partial(function, **right))
    refused, wrong = 0, []
    for parameter, value in right.items():
        for other in _wrong(value):
            given = f"{parameter}={_text(other)}"
            try:
                with warnings.catch_warnings(action="ignore"):
                    jax.eval_shape(functools.partial(function, **{**right, parameter: other}))
            except (ValueError, TypeError) as error:
                refused += 1
                # Two arrays that do not fit each other: either may be the one that is named.
                is_array = hasattr(other, "ndim") or hasattr(other, "_fields")
                names = list(right) if is_array else [parameter]
                if "\n" in str(error) or not any(one in str(error) for one in names):
                    wrong.append(f"{given}: {error}")
            except Exception as error:
                wrong.append(f"{given}: {type(error).__name__}: {error}")
    assert not wrong, "\n".join(line[:200] for line in wrong)
    assert refused > 5 * len(right)


def _text(value):
    return f"{value.dtype}{list(value.shape)}" if isinstance(value, np.ndarray) else repr(value)
