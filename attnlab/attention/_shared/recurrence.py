"""What every form of linear attention takes and gives."""

from typing import Any, NamedTuple

from attnlab.attention._shared.checks import Array
from attnlab.attention._shared.feature_maps import FeatureMap


class LinearState(NamedTuple):
    """What linear attention remembers of the tokens so far, in float32 (float64 for float64 inputs).

    F is the width of the keys after the feature map: head_dim H, or 1 + H + H(H+1)/2 for "taylor2".

    kv: [B, N, F, V], the decayed sum of k v^T (k u^T with the delta rule).
    k_sum: [B, N, F], the decayed sum of k. None where nobody needs it: a call keeps it when normalize=True or when the
      state passed in has it, so that the state out always has the structure of the state in.
    """

    kv: Array
    k_sum: Array | None = None


class LinearInputs(NamedTuple):
    """The arrays of a call: query [B, T, N, H], key [B, T, K, H], value [B, T, K, V]; log_decay [N], [B, T, N] or
    [B, T, N, F]; beta [B, T, N]; the state before the first token; segment_ids [B, T]; read and
    write of erase, [B, T, N, F] each."""

    query: Array
    key: Array
    value: Array
    log_decay: Array | None
    beta: Array | None
    state: LinearState
    segment_ids: Array | None = None
    erase: tuple[Array, Array] | None = None


class LinearOptions(NamedTuple):
    """The rest of a call. scale: a number or an array []. chunk_size: of "xla" alone."""

    feature_map: FeatureMap
    normalize: bool
    scale: Any
    is_causal: bool = True
    chunk_size: int = 64
