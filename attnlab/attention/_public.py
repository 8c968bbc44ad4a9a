"""The public names of the primitives, once: they are attributes of attnlab and of attnlab.attention alike."""

from attnlab.attention import block_selection, masks
from attnlab.attention._dispatch.choice import Choice, explain
from attnlab.attention._dispatch.exchange import positions_over
from attnlab.attention.agent import agent_attention, agent_bias, pool_agents
from attnlab.attention.axial import axial_attention
from attnlab.attention.block_sparse import (
    BlockSparseCache,
    block_sparse_attention,
    block_sparse_step,
    init_block_sparse_cache,
    prefill_block_sparse_cache,
)
from attnlab.attention.block_statistics import block_statistics
from attnlab.attention.causal_agent import AgentState, agent_step, causal_agent_attention, init_agent_cache
from attnlab.attention.centroids import RoutingState, RoutingStatistics, fit_routing, init_routing, update_routing
from attnlab.attention.dilated import dilated_attention, dilated_step, init_dilated_cache, prefill_dilated_cache
from attnlab.attention.dot_product import (
    DotProductCache,
    dot_product_attention,
    dot_product_step,
    init_dot_product_cache,
    prefill_dot_product_cache,
)
from attnlab.attention.dynamic_mask import (
    DynamicMaskCache,
    dynamic_mask_attention,
    dynamic_mask_step,
    init_dynamic_mask_cache,
    prefill_dynamic_mask_cache,
)
from attnlab.attention.ema_sinks import (
    EmaSinksCache,
    ema_sinks_attention,
    ema_sinks_step,
    init_ema_sinks_cache,
    prefill_ema_sinks_cache,
)
from attnlab.attention.inline import inline_attention
from attnlab.attention.landmark import landmark_attention
from attnlab.attention.linear import (
    LinearState,
    init_linear_cache,
    lightning_log_decay,
    linear_attention,
    linear_step,
    retention_log_decay,
)
from attnlab.attention.local import LocalCache, init_local_cache, local_attention, local_step, prefill_local_cache
from attnlab.attention.local_linear import (
    LocalLinearResiduals,
    init_local_linear_cache,
    local_linear_attention,
    local_linear_step,
    prefill_local_linear_cache,
)
from attnlab.attention.log_linear import (
    LogLinearState,
    init_log_linear_cache,
    log_linear_attention,
    log_linear_step,
)
from attnlab.attention.memora import MemoraState, init_memora_cache, memora_attention, memora_step
from attnlab.attention.memory import MemoryState, init_memory_cache, memory_attention, memory_step
from attnlab.attention.merge import merge_attention
from attnlab.attention.parallax import parallax_attention, parallax_step
from attnlab.attention.path import PathCache, init_path_cache, path_attention, path_step, prefill_path_cache
from attnlab.attention.pointwise import pointwise_attention, pointwise_step
from attnlab.attention.pyramid import (
    PyramidCache,
    init_pyramid_cache,
    prefill_pyramid_cache,
    pyramid_attention,
    pyramid_step,
)
from attnlab.attention.routing import (
    RoutingAux,
    RoutingCache,
    init_routing_cache,
    prefill_routing_cache,
    routing_attention,
    routing_step,
)
from attnlab.attention.sparse_cache import SparseCache, init_sparse_cache, sparse_cache_step
