"""Attention mechanisms in JAX, each in forms that agree, and controlled ablations of them.

The primitives are attributes of this package and need jax and einops alone. The layers, models, data, training and
ablations (attnlab.nn, .models, .data, .train, .ablate) need the extra "experiments".
"""

from attnlab.attention import (
    Choice,
    DotProductCache,
    LinearState,
    LocalCache,
    axial_attention,
    dilated_attention,
    dilated_step,
    dot_product_attention,
    dot_product_step,
    explain,
    init_dilated_cache,
    init_dot_product_cache,
    init_linear_cache,
    init_local_cache,
    inline_attention,
    lightning_log_decay,
    linear_attention,
    linear_step,
    local_attention,
    local_step,
    masks,
    merge_attention,
    retention_log_decay,
)

__all__ = [
    "Choice",
    "DotProductCache",
    "LinearState",
    "LocalCache",
    "axial_attention",
    "dilated_attention",
    "dilated_step",
    "dot_product_attention",
    "dot_product_step",
    "explain",
    "init_dilated_cache",
    "init_dot_product_cache",
    "init_linear_cache",
    "init_local_cache",
    "inline_attention",
    "lightning_log_decay",
    "linear_attention",
    "linear_step",
    "local_attention",
    "local_step",
    "masks",
    "merge_attention",
    "retention_log_decay",
]
