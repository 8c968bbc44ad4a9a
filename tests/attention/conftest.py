"""What tests of several mechanisms measure against: softmax attention in float64 numpy, one query at a time, and the
window's definition. Fixtures are the functions themselves."""

import jax
import numpy as np
import pytest


@pytest.fixture(scope="session")
def attention_oracle():
    return _attention_oracle


@pytest.fixture(scope="session")
def window_by_definition():
    return _window_by_definition


@pytest.fixture(scope="session")
def assert_close():
    return _assert_close


def _assert_close(got, want, tolerance):
    """Pytrees alike; every number to this tolerance, of itself or of 1."""
    jax.tree.map(
        lambda x, y: np.testing.assert_allclose(np.float64(x), np.float64(y), rtol=tolerance, atol=tolerance), got, want
    )


def _attention_oracle(query, key, value, sees, *, scale=None, bias=None, softcap=None, sink_logits=None):
    """query [B,T,N,H], key [B,S,K,H], value [B,S,K,V], sees bool [B,N,T,S] (broadcast) -> (out, lse) in float64."""
    query, key, value = (np.asarray(x, np.float64) for x in (query, key, value))
    batch, queries, heads, head_dim = query.shape
    keys, key_heads = key.shape[1:3]
    scale = head_dim**-0.5 if scale is None else scale
    sees = np.broadcast_to(sees, (batch, heads, queries, keys))
    bias = np.broadcast_to(0.0 if bias is None else np.asarray(bias, np.float64), sees.shape)
    out = np.zeros((batch, queries, heads, value.shape[-1]))
    lse = np.full((batch, queries, heads), -np.inf)
    for b, n, t in np.ndindex(batch, heads, queries):
        seen = np.flatnonzero(sees[b, n, t])
        if seen.size == 0 and sink_logits is None:
            continue
        k = n // (heads // key_heads)
        logits = scale * key[b, seen, k] @ query[b, t, n]
        logits = (logits if softcap is None else softcap * np.tanh(logits / softcap)) + bias[b, n, t, seen]
        sinks = [] if sink_logits is None else [np.float64(sink_logits[n])]
        lse[b, t, n] = np.logaddexp.reduce([*logits, *sinks])
        out[b, t, n] = np.exp(logits - lse[b, t, n]) @ value[b, seen, k]
    return out, lse


def _window_by_definition(query, length, window, *, dilation=1, stride=1, is_causal=False, edge="shift"):
    """The keys that one query of one axis sees, as a set, from the definition and not from attnlab's arithmetic."""
    group = [token for token in range(length) if token % dilation == query % dilation]
    index = group.index(query)
    block = [i for i in range(len(group) + stride) if i // stride == index // stride]
    if edge == "shift":
        block_leader = min(block[0] + (stride - 1 if is_causal else stride // 2), len(group) - 1)
    else:
        block_leader = block[0] + (stride - 1 if is_causal else stride // 2)
    if is_causal:
        return {group[i] for i in range(index + 1) if i > block_leader - window}
    first = block_leader - window // 2
    if edge == "shift":
        first = max(0, min(first, len(group) - window))
    return {group[i] for i in range(first, first + window) if 0 <= i < len(group)}
