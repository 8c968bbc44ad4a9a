"""Softmax attention in float64 numpy, one query at a time: what every implementation is measured against."""

import numpy as np


def attention_oracle(query, key, value, sees, *, scale=None, bias=None):
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
        if seen.size == 0:
            continue
        k = n // (heads // key_heads)
        logits = scale * key[b, seen, k] @ query[b, t, n] + bias[b, n, t, seen]
        lse[b, t, n] = np.logaddexp.reduce(logits)
        out[b, t, n] = np.exp(logits - lse[b, t, n]) @ value[b, seen, k]
    return out, lse


def window_by_definition(query, length, window, *, dilation=1, stride=1, is_causal=False, edge="shift"):
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
