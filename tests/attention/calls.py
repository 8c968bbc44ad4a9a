"""Calls of every public function that computes, with the options that the catalog's rows leave out.

CALLS: name -> (function, arrays). Steps are scanned, five tokens alike, from an empty cache.
"""

import functools

import jax
import numpy as np
from right_calls import BATCH, FUNCTIONS, HEAD_DIM, HEADS, KEY_HEADS, VALUE_DIM, right_call, state_of

import attnlab as A
from attnlab.catalog import MECHANISMS

LENGTH = 16
_rng = np.random.default_rng(0)


def _normal(*shape):
    return _rng.normal(size=shape).astype(np.float32)


def _tokens(*space):
    heads = ((HEADS, HEAD_DIM), (KEY_HEADS, HEAD_DIM), (KEY_HEADS, VALUE_DIM))
    return tuple(_normal(BATCH, *space, *shape) for shape in heads)


_LINE, _IMAGE, _TOKEN = _tokens(LENGTH), _tokens(4, 4), _tokens(1)
_IDS = np.repeat(np.arange(4, dtype=np.int32), 4)[None].repeat(BATCH, 0)
_REAL = np.arange(LENGTH)[None] < np.array([16, 9, 12, 3, 5, 16])[:, None]
_LENGTHS = _REAL.sum(1).astype(np.int32)
_DECAY = -np.abs(_normal(BATCH, LENGTH, HEADS))
_BETA = np.abs(_normal(BATCH, LENGTH, HEADS)).clip(0, 1) / HEAD_DIM
_AGENTS = _normal(3, HEADS, HEAD_DIM)
_LISTS = _rng.integers(-1, 6, size=(1, KEY_HEADS, 8, 3), dtype=np.int32)
_centroids = _normal(HEADS, 3, HEAD_DIM)
_STATE = A.RoutingState(_centroids, np.ones_like(_centroids[..., 0]), _centroids)


def _merged(query, key, value):
    parts = [A.dot_product_attention(query, key[:, i::2], value[:, i::2], return_lse=True) for i in (0, 1)]
    return A.merge_attention(*zip(*parts))


def _updated(query, key, value):
    return A.update_routing(_STATE, A.routing_attention(query, key, value, _STATE, window=4)[1].statistics)


_WITH_OPTIONS = {
    "dot_product, everything": (
        lambda q, k, v, bias, mask, ids: A.dot_product_attention(
            q, k, v, bias=bias, mask=mask, segment_ids=ids, is_causal=True, return_lse=True
        ),
        (*_LINE, _normal(1, HEADS, LENGTH, LENGTH), _rng.random((BATCH, 1, 1, LENGTH)) < 0.7, _IDS),
    ),
    "dot_product, two lengths, array of scale": (
        lambda q, k, v, ids, others, scale: A.dot_product_attention(q, k, v, segment_ids=(ids, others), scale=scale),
        (_LINE[0], _LINE[1][:, :9], _LINE[2][:, :9], _IDS, _IDS[:, :9], np.float32(0.3)),
    ),
    "block-sparse, everything": (
        lambda q, k, v, bias, ids: A.block_sparse_attention(
            q,
            k,
            v,
            _LISTS,
            query_block=2,
            key_block=3,
            block_bias=bias,
            mask=A.masks.window(9, 2),
            segment_ids=ids,
            return_lse=True,
        ),
        (*_LINE, _normal(BATCH, KEY_HEADS, 8, 3), _IDS),
    ),
    "block-sparse, lists per head": (
        lambda q, k, v: A.block_sparse_attention(
            q, k, v, _LISTS.repeat(2, 1), query_block=2, key_block=3, is_causal=True
        ),
        _LINE,
    ),
    "block-sparse, pooled": (
        lambda q, k, v: A.block_sparse_attention(
            q,
            k,
            v,
            A.block_selection.pooled_blocks(q, k, query_block=2, key_block=4, count=2),
            query_block=2,
            key_block=4,
            is_causal=True,
        ),
        _LINE,
    ),
    "block statistics": (
        lambda q, k, lse: A.block_statistics(
            q, k, lse, query_block=3, key_block=4, reduce="mean", mask=A.masks.causal()
        ),
        (*_LINE[:2], _normal(BATCH, LENGTH, HEADS)),
    ),
    "local, sinks and segments": (
        lambda q, k, v, ids: A.local_attention(
            q, k, v, window=4, sinks=2, is_causal=True, segment_ids=ids, return_lse=True
        ),
        (*_LINE, _IDS),
    ),
    "local, strided and clipped": (
        functools.partial(A.local_attention, window=4, stride=2, edge="clip"),
        _LINE,
    ),
    "local, more before than after": (
        lambda q, k, v, ids: A.local_attention(q, k, v, window=((5, 2),), edge="clip", segment_ids=ids),
        (*_LINE, _IDS),
    ),
    "local, grid with segments": (
        lambda q, k, v, ids: A.local_attention(q, k, v, window=3, is_causal=(True, False), segment_ids=ids),
        (*_IMAGE, _IDS.reshape(BATCH, 4, 4)),
    ),
    "dilated, causal segments": (
        lambda q, k, v, ids: A.dilated_attention(q, k, v, window=3, dilation=3, is_causal=True, segment_ids=ids),
        (*_LINE, _IDS),
    ),
    "axial, causal": (functools.partial(A.axial_attention, axis=-1, is_causal=True, return_lse=True), _IMAGE),
    "axial, bias": (
        lambda q, k, v, bias: A.axial_attention(q, k, v, axis=0, bias=bias),
        (*_IMAGE, _normal(HEADS, 4, 4)),
    ),
    "agent, key mask": (
        lambda q, k, v, agents, real: A.agent_attention(q, k, v, agents, key_mask=real),
        (*_LINE, _AGENTS, _REAL),
    ),
    "agent, pooled": (lambda q, k, v: A.agent_attention(q, k, v, A.pool_agents(q, (2, 3))), _IMAGE),
    "causal agent, state": (
        lambda q, k, v, agents: A.causal_agent_attention(q, k, v, agents, return_state=True, chunk_size=4),
        (*_LINE, _AGENTS),
    ),
    "linear, segments and state": (
        lambda q, k, v, ids: A.linear_attention(
            q, k, v, segment_ids=ids, return_state=True, feature_map="elu", normalize=True, chunk_size=4
        ),
        (*_LINE, _IDS),
    ),
    "linear, not causal segments": (
        lambda q, k, v, ids: A.linear_attention(
            q, k, v, segment_ids=ids, is_causal=False, return_state=True, feature_map="relu"
        ),
        (*_LINE, _IDS),
    ),
    "linear, constant decay": (
        lambda q, k, v, decay: A.linear_attention(q, k, v, log_decay=decay),
        (*_LINE, -(2.0 ** -np.arange(5, 5 + HEADS, dtype=np.float32))),
    ),
    "linear, a function and an initial state": (
        lambda q, k, v, kv: A.linear_attention(
            q, k, v, feature_map=jax.nn.softplus, initial_state=A.LinearState(kv), return_state=True
        ),
        (*_LINE, _normal(BATCH, HEADS, HEAD_DIM, VALUE_DIM)),
    ),
    "linear, gated delta segments": (
        lambda q, k, v, decay, beta, ids: A.linear_attention(
            q, k, v, log_decay=decay, beta=beta, segment_ids=ids, return_state=True, chunk_size=4
        ),
        (*_LINE, _DECAY, _BETA, _IDS),
    ),
    "routing, all results": (
        lambda q, k, v, real: A.routing_attention(q, k, v, _STATE, window=4, key_mask=real),
        (*_LINE, _REAL),
    ),
    "routing, shared": (
        lambda q, v: A.routing_attention(q, q, v, _STATE, window=4, is_causal=True, share_qk=True)[0],
        (_LINE[0], _normal(BATCH, LENGTH, HEADS, VALUE_DIM)),
    ),
    "routing, global with a mask": (
        lambda q, k, v, real: A.routing_attention(
            q, k, v, _STATE, window=4, membership="global", normalize="layer", key_mask=real, is_causal=True
        )[0],
        (*_LINE, _REAL),
    ),
    "fit_routing": (lambda q: A.fit_routing(q, _STATE, 3), _LINE[:1]),
    "update_routing": (_updated, _LINE),
    "local-linear, residuals": (
        lambda q, k, v, ridge: A.local_linear_attention(q, k, v, ridge=ridge, return_residuals=True)[0],
        (*_LINE, np.full(HEADS, 2, np.float32)),
    ),
    "local-linear, not causal": (functools.partial(A.local_linear_attention, ridge=2.0, is_causal=False), _LINE),
    "parallax, not causal": (
        lambda q, probe, k, v: A.parallax_attention(q, probe, k, v, is_causal=False),
        (_LINE[0], _normal(BATCH, LENGTH, HEADS, HEAD_DIM), *_LINE[1:]),
    ),
    "merge": (_merged, _LINE),
    "linear, lengths": (
        lambda q, k, v, lengths: A.linear_attention(
            q, k, v, lengths=lengths, return_state=True, feature_map="elu", normalize=True, chunk_size=4
        ),
        (*_LINE, _LENGTHS),
    ),
    "linear, lengths of gated delta": (
        lambda q, k, v, decay, beta, lengths: A.linear_attention(
            q, k, v, log_decay=decay, beta=beta, lengths=lengths, return_state=True, chunk_size=4
        ),
        (*_LINE, _DECAY, _BETA, _LENGTHS),
    ),
    "causal agent, lengths": (
        lambda q, k, v, agents, lengths: A.causal_agent_attention(
            q, k, v, agents, lengths=lengths, return_state=True, chunk_size=4
        ),
        (*_LINE, _AGENTS, _LENGTHS),
    ),
}


def _scanned(step, cache, *arrays):
    def run(cache, *arrays):
        def token(cache, _):
            out, cache = step(cache, *arrays)
            return cache, out

        return jax.lax.scan(token, cache, None, length=5)

    return run, (cache, *arrays)


_CACHED = (KEY_HEADS, HEAD_DIM)
_GATE = tuple(np.full(shape, 0.5, np.float32) for shape in ((HEADS, HEAD_DIM, 3), (KEY_HEADS, 3 * HEAD_DIM, 3)))
_STEPS = {
    "dot_product step": _scanned(
        A.dot_product_step, A.init_dot_product_cache(BATCH, 6, *_CACHED, value_dim=VALUE_DIM), *_TOKEN
    ),
    "local step": _scanned(
        functools.partial(A.local_step, window=4, sinks=2),
        A.init_local_cache(BATCH, *_CACHED, window=4, sinks=2, value_dim=VALUE_DIM),
        *_TOKEN,
    ),
    "block_sparse step": _scanned(
        functools.partial(A.block_sparse_step, query_block=2),
        A.init_block_sparse_cache(BATCH, 6, *_CACHED, key_block=2, count=2, value_dim=VALUE_DIM),
        *_TOKEN,
    ),
    "block_sparse step, tree": _scanned(
        functools.partial(A.block_sparse_step, query_block=2, rule="tree"),
        A.init_block_sparse_cache(
            BATCH, 6, *_CACHED, key_block=2, count=1, list_heads=HEADS, representative_dim=0, value_dim=VALUE_DIM
        ),
        *_TOKEN,
    ),
    "block_sparse step, gate": _scanned(
        functools.partial(A.block_sparse_step, query_block=2, rule=_GATE),
        A.init_block_sparse_cache(
            BATCH, 6, *_CACHED, key_block=2, count=1, list_heads=HEADS, representative_dim=3, value_dim=VALUE_DIM
        ),
        *_TOKEN,
    ),
    "pyramid step": _scanned(
        functools.partial(A.pyramid_step, query_block=2, sizes=(1, 2), fractions=(0.5, 1.0)),
        A.init_pyramid_cache(BATCH, 6, *_CACHED, key_block=2, sizes=(1, 2), value_dim=VALUE_DIM),
        *_TOKEN,
    ),
    "dilated step": _scanned(
        functools.partial(A.dilated_step, window=3, dilation=2),
        A.init_dilated_cache(BATCH, *_CACHED, window=3, dilation=2, value_dim=VALUE_DIM),
        *_TOKEN,
    ),
    "linear step": _scanned(
        functools.partial(A.linear_step, feature_map="elu", normalize=True),
        A.init_linear_cache(BATCH, HEADS, HEAD_DIM, VALUE_DIM, feature_map="elu", normalize=True),
        *_TOKEN,
    ),
    "linear step, gated delta": _scanned(
        lambda cache, q, k, v, decay, beta: A.linear_step(cache, q, k, v, log_decay=decay, beta=beta),
        A.init_linear_cache(BATCH, HEADS, HEAD_DIM, VALUE_DIM),
        *_TOKEN,
        _DECAY[:, :1],
        _BETA[:, :1],
    ),
    "agent step": _scanned(
        lambda cache, *token: A.agent_step(cache, *token, _AGENTS),
        A.init_agent_cache(BATCH, HEADS, len(_AGENTS), VALUE_DIM),
        *_TOKEN,
    ),
    "routing step": _scanned(
        lambda cache, *token: A.routing_step(cache, *token, _STATE),
        A.init_routing_cache(BATCH, HEADS, 3, HEAD_DIM, window=4, value_dim=VALUE_DIM),
        *_TOKEN,
    ),
    # Well conditioned: of a solve that ends at a residual, rounding decides what is left.
    "local-linear step": _scanned(
        functools.partial(A.local_linear_step, ridge=10.0),
        A.init_local_linear_cache(BATCH, 6, *_CACHED, value_dim=VALUE_DIM),
        *_TOKEN,
    ),
    "local-linear step, window": _scanned(
        functools.partial(A.local_linear_step, ridge=10.0, window=3),
        A.init_local_linear_cache(BATCH, 6, *_CACHED, window=3, value_dim=VALUE_DIM),
        *_TOKEN,
    ),
    "parallax step": _scanned(
        lambda cache, q, k, v, probe: A.parallax_step(cache, q, probe, k, v),
        A.init_local_linear_cache(BATCH, 6, *_CACHED, value_dim=VALUE_DIM),
        *_TOKEN,
        _normal(BATCH, 1, HEADS, HEAD_DIM),
    ),
}

# Of rows that have had prompts of their own lengths.
_AT_ROWS = np.array([0, 1, 2, 3, 1, 0], np.int32)
_TOKENS = [x[:, :3] for x in _LINE]
_STEPS |= {
    "dot_product step, rows": _scanned(
        A.dot_product_step,
        A.init_dot_product_cache(BATCH, 8, *_CACHED, value_dim=VALUE_DIM)._replace(length=_AT_ROWS),
        *_TOKEN,
    ),
    "local step, rows": _scanned(
        functools.partial(A.local_step, window=4, sinks=2, stride=2),
        A.init_local_cache(BATCH, *_CACHED, window=4, sinks=2, value_dim=VALUE_DIM)._replace(position=_AT_ROWS),
        *_TOKEN,
    ),
    "dilated step, rows": _scanned(
        functools.partial(A.dilated_step, window=3, dilation=2),
        A.init_dilated_cache(BATCH, *_CACHED, window=3, dilation=2, value_dim=VALUE_DIM)._replace(position=_AT_ROWS),
        *_TOKEN,
    ),
    "dot_product step, several tokens": _scanned(
        A.dot_product_step,
        A.init_dot_product_cache(BATCH, 18, *_CACHED, value_dim=VALUE_DIM)._replace(length=_AT_ROWS),
        *_TOKENS,
    ),
    "local step, several tokens": _scanned(
        functools.partial(A.local_step, window=4, sinks=2, stride=2),
        A.init_local_cache(BATCH, *_CACHED, window=4, sinks=2, value_dim=VALUE_DIM)._replace(position=_AT_ROWS),
        *_TOKENS,
    ),
    "local-linear step, rows": _scanned(
        functools.partial(A.local_linear_step, ridge=10.0, window=3),
        A.init_local_linear_cache(BATCH, 6, *_CACHED, window=3, value_dim=VALUE_DIM)._replace(length=_AT_ROWS),
        *_TOKEN,
    ),
}


def _called(name):
    """A step that has no row above, or what reads a prompt, by the names of its arguments."""
    right, cache = right_call(name), state_of(name)
    arrays = {key: x for key, x in right.items() if key != cache and _is_arrays(x)}
    options = {key: x for key, x in right.items() if key not in arrays and key != cache}

    def step(cache, *given):
        return getattr(A, name)(cache, **dict(zip(arrays, given)), **options)

    return (
        (step, (right[cache], *arrays.values()))
        if name.startswith("prefill_")
        else _scanned(step, right[cache], *arrays.values())
    )


def _is_arrays(x):
    leaves = jax.tree.leaves(x)
    return bool(leaves) and all(isinstance(leaf, (np.ndarray, jax.Array)) for leaf in leaves)


for _name in sorted(FUNCTIONS):
    _label = _name.removesuffix("_step").replace("local_linear", "local-linear") + " step"
    if _name.endswith("_step") and _label not in _STEPS:
        _STEPS[_label] = _called(_name)
    if _name.startswith("prefill_"):
        _STEPS[_name] = _called(_name)


def _row(name):
    mechanism = MECHANISMS[name]
    arrays = mechanism.inputs(
        LENGTH, batch=BATCH, heads=HEADS, key_heads=KEY_HEADS, head_dim=HEAD_DIM, value_dim=VALUE_DIM
    )
    return lambda *leaves: mechanism(dict(zip(arrays, leaves))), tuple(arrays.values())


CALLS = {**{name: _row(name) for name in MECHANISMS}, **_WITH_OPTIONS, **_STEPS}
