"""Attention primitives: pure functions, one module a mechanism. Needs jax and einops alone."""

from attnlab.attention import masks
from attnlab.attention._dispatch import Choice, explain
from attnlab.attention.agent import (
    AgentState,
    agent_attention,
    agent_bias,
    agent_step,
    causal_agent_attention,
    init_agent_cache,
    pool_agents,
)
from attnlab.attention.axial import axial_attention
from attnlab.attention.dilated import dilated_attention, dilated_step, init_dilated_cache
from attnlab.attention.dot_product import (
    DotProductCache,
    dot_product_attention,
    dot_product_step,
    init_dot_product_cache,
)
from attnlab.attention.inline import inline_attention
from attnlab.attention.linear import (
    LinearState,
    init_linear_cache,
    lightning_log_decay,
    linear_attention,
    linear_step,
    retention_log_decay,
)
from attnlab.attention.local import (
    LocalCache,
    init_local_cache,
    local_attention,
    local_step,
)
from attnlab.attention.local_linear import (
    LocalLinearResiduals,
    init_local_linear_cache,
    local_linear_attention,
    local_linear_step,
)
from attnlab.attention.merge import merge_attention
from attnlab.attention.parallax import parallax_attention, parallax_step
from attnlab.attention.routing import (
    RoutingAux,
    RoutingCache,
    RoutingState,
    RoutingStatistics,
    fit_routing,
    init_routing,
    init_routing_cache,
    routing_attention,
    routing_step,
    update_routing,
)

__all__ = [
    "AgentState",
    "Choice",
    "DotProductCache",
    "LinearState",
    "LocalCache",
    "LocalLinearResiduals",
    "RoutingAux",
    "RoutingCache",
    "RoutingState",
    "RoutingStatistics",
    "agent_attention",
    "agent_bias",
    "agent_step",
    "axial_attention",
    "causal_agent_attention",
    "dilated_attention",
    "dilated_step",
    "dot_product_attention",
    "dot_product_step",
    "explain",
    "fit_routing",
    "init_agent_cache",
    "init_dilated_cache",
    "init_dot_product_cache",
    "init_linear_cache",
    "init_local_cache",
    "init_local_linear_cache",
    "init_routing",
    "init_routing_cache",
    "inline_attention",
    "lightning_log_decay",
    "linear_attention",
    "linear_step",
    "local_attention",
    "local_linear_attention",
    "local_linear_step",
    "local_step",
    "masks",
    "merge_attention",
    "parallax_attention",
    "parallax_step",
    "pool_agents",
    "retention_log_decay",
    "routing_attention",
    "routing_step",
    "update_routing",
]
