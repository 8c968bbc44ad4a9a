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
_GATES = {"log_decay": -np.abs(_normal(BATCH, 6, HEADS)), "beta": np.abs(_normal(BATCH, 6, HEADS))}

# Right values of parameters, which mean the same in every function.
_BY_NAME = {
    "batch": BATCH,
    "num_heads": HEADS,
    "num_key_heads": KEY_HEADS,
    "head_dim": HEAD_DIM,
    "value_dim": VALUE_DIM,
    "max_length": 4,
    "num_agents": 3,
    "num_clusters": 3,
    "window": 3,
    "sinks": 1,
    "dilation": 2,
    "edge": "clip",
    "chunk_size": 4,
    "scale": 0.5,
    "feature_map": "elu",
    "implementation": "xla",
    "dtype": jnp.float32,
    "segment_ids": _IDS,
    "key_mask": _REAL,
    "agents": _normal(3, HEADS, HEAD_DIM),
    "state": _STATE,
}
_LINEAR_STATE = A.init_linear_cache(BATCH, HEADS, HEAD_DIM, VALUE_DIM)
_AGENT_STATE = A.init_agent_cache(BATCH, HEADS, 3, VALUE_DIM)
# What is a function's own, or better another value there.
_OWN = {
    "dot_product_attention": {"bias": _normal(1, 1, 6, 6), "mask": np.ones((1, 1, 6, 6), bool)},
    "local_attention": {"is_causal": True},
    "dilated_attention": {"window": 2},
    "axial_attention": {**_IMAGE, "axis": 1},
    "agent_attention": {"gather_bias": _normal(HEADS, 3, 6), "broadcast_bias": _normal(HEADS, 6, 3)},
    "causal_agent_attention": {"initial_state": _AGENT_STATE},
    "pool_agents": {**_IMAGE, "grid": (2, 2)},
    "linear_attention": {**_GATES, "initial_state": _LINEAR_STATE},
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
    "linear_step": {"state": _LINEAR_STATE, **{name: gate[:, :1] for name, gate in _GATES.items()}},
    "agent_step": {"state": _AGENT_STATE},
    "local_step": {"stride": 2},
    "local_linear_step": {"ridge": 2.0},
    "parallax_step": {
        "probe": _normal(BATCH, 1, HEADS, HEAD_DIM),
        "cache": A.init_local_linear_cache(BATCH, 4, KEY_HEADS, HEAD_DIM, value_dim=VALUE_DIM, window=3),
    },
    "lightning_log_decay": {"layer": 0, "num_layers": 2, "form": "code"},
}
# agent_bias takes tables under published names, which test_agent.py tries; explain takes any function.
_FUNCTIONS = {name for name, thing in vars(_public).items() if inspect.isfunction(thing)} - {"agent_bias", "explain"}


@functools.cache
def _right(name):
    """A right call, with every parameter that the function has: its own, by name, or its default."""
    known = {**_BY_NAME, **(_TOKEN if name.endswith("_step") else _LINE), **_OWN.get(name, {})}
    parameters = inspect.signature(getattr(A, name)).parameters
    if "cache" in parameters and "cache" not in known:
        start = f"init_{name.removesuffix('_step')}_cache"
        known["cache"] = getattr(A, start)(**_right(start))
    wanted = [parameter for parameter in parameters if parameter != "axis_name"]
    unknown = [x for x in wanted if x not in known and parameters[x].default is inspect.Parameter.empty]
    assert not unknown, f"{name}: give {unknown} a right value in _BY_NAME or _OWN"
    return {x: known[x] if x in known else parameters[x].default for x in wanted}


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


@pytest.mark.parametrize("name", slow_but({"local_attention", "linear_step", "init_routing_cache"}, sorted(_FUNCTIONS)))
def test_a_wrong_value_is_refused_in_one_line_that_names_it(name):
    function, right = getattr(A, name), _right(name)
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
