"""Attention primitives: pure functions, one module a mechanism. Needs jax and einops alone."""

from attnlab.attention import masks
from attnlab.attention._dispatch import Choice, explain
from attnlab.attention.dilated import dilated_attention
from attnlab.attention.dot_product import (
    DotProductCache,
    dot_product_attention,
    dot_product_step,
    init_dot_product_cache,
)
from attnlab.attention.local import (
    LocalCache,
    init_local_cache,
    local_attention,
    local_step,
)
from attnlab.attention.merge import merge_attention

__all__ = [
    "Choice",
    "DotProductCache",
    "LocalCache",
    "dilated_attention",
    "dot_product_attention",
    "dot_product_step",
    "explain",
    "init_dot_product_cache",
    "init_local_cache",
    "local_attention",
    "local_step",
    "masks",
    "merge_attention",
]
