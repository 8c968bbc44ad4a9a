"""Attention through a few agents."""

import math
from typing import Any

import jax
import jax.numpy as jnp

import attnlab.attention as attention
from attnlab.attention._shared.checks import check_int, check_ints
from attnlab.nn.mixers.base import Attention
from attnlab.nn.parameters import normal, parameter

Array = jax.Array

_TABLE = 7  # Side of the tables that the position biases are resized from, as published.


class AgentAttention(Attention):
    """A few agents gather from all positions, every position reads the agents: attention.agent_attention.

    Causal, the agents are learned and have gathered from a token and those before it. A depthwise convolution of the
    values is added unless residual_convolution=0: 3 x 3 on images, over 3 tokens on sequences.

    Args:
      agents: (p, r) pools the agents from the queries of an image on a grid of p x r; a number m learns m agents.
      bias_grid: (Y, X), the grid of the inputs: adds learned position biases to both steps, as published for images
        with pooled agents. None: no biases.
    """

    segments_refusal = "has agents that gather from all documents, so packed ones cannot be kept apart"

    def __init__(
        self,
        features: int,
        *,
        is_causal: bool,
        agents: int | tuple[int, int],
        bias_grid: tuple[int, int] | None = None,
        rotary: bool = False,
        residual_convolution: int | tuple[int, ...] | None = None,
        **shared: Any,
    ):
        if residual_convolution is None:
            residual_convolution = 3 if is_causal else (3, 3)
        super().__init__(
            features, is_causal=is_causal, rotary=rotary, residual_convolution=residual_convolution, **shared
        )
        self.grid: tuple[int, int] | None = None
        if isinstance(agents, (tuple, list)):
            if is_causal:
                raise ValueError(
                    f"agents: got {agents} with is_causal=True; pooling sees later tokens, so give a number"
                )
            rows, columns = check_ints("agents", agents, layout=("rows", "columns"))
            self.grid, count = (rows, columns), rows * columns
        else:
            count = check_int("agents", agents, least=1)
        if bias_grid is not None and is_causal:
            raise ValueError(f"bias_grid: got {bias_grid} with is_causal=True; the biases are for images")
        self.count, heads = count, self.num_heads
        # Like queries, whose channels have a variance of about 1 at first.
        self.agents = parameter((count, heads, self.head_dim), normal(1.0)) if self.grid is None else None
        self.has_biases = bias_grid is not None
        if bias_grid is not None:
            height, width = check_ints("bias_grid", bias_grid, layout=("height", "width"))
            small = normal(0.02)
            self.gather_table = parameter((heads, count, _TABLE, _TABLE), small)
            self.gather_rows = parameter((1, heads, count, height, 1), small)
            self.gather_columns = parameter((1, heads, count, 1, width), small)
            self.broadcast_table = parameter((heads, count, _TABLE, _TABLE), small)
            self.broadcast_rows = parameter((1, heads, height, 1, count), small)
            self.broadcast_columns = parameter((1, heads, 1, width, count), small)

    def _agents(self, query: Array) -> Array:
        if self.grid is not None:
            if query.ndim != 5:
                raise ValueError(f"agents: got the grid {self.grid} for {query.ndim - 3} space axes; pooling needs 2")
            return attention.pool_agents(query, self.grid)
        assert self.agents is not None
        return self.agents[...].astype(query.dtype)

    def mix(self, query: Array, key: Array, value: Array, x: Array, segment_ids: Array | None) -> Array:
        agents = self._agents(query)
        if self.is_causal:
            return attention.causal_agent_attention(query, key, value, agents, implementation=self.implementation)
        gather = broadcast = None
        if self.has_biases:
            gather, broadcast = attention.agent_bias(
                self.gather_table[...],
                self.gather_rows[...],
                self.gather_columns[...],
                self.broadcast_table[...],
                self.broadcast_rows[...],
                self.broadcast_columns[...],
            )
        return attention.agent_attention(
            query,
            key,
            value,
            agents,
            gather_bias=gather,
            broadcast_bias=broadcast,
            implementation=self.implementation,
        )

    def init_mechanism_cache(self, batch: int, max_length: int) -> Any:
        dtype = jnp.promote_types(self.dtype, jnp.float32)
        return attention.init_agent_cache(batch, self.num_heads, self.count, self.value_dim, dtype=dtype)

    def mechanism_prefill(
        self, cache: Any, query: Array, key: Array, value: Array, x: Array, lengths: Array | None
    ) -> tuple[Array, Any]:
        return attention.causal_agent_attention(
            query,
            key,
            value,
            self._agents(query),
            initial_state=cache,
            return_state=True,
            lengths=lengths,
            implementation=self.implementation,
        )

    def mechanism_step(self, cache: Any, query: Array, key: Array, value: Array, x: Array) -> tuple[Array, Any]:
        return attention.agent_step(cache, query, key, value, self._agents(query))

    def mechanism_flops(self, space: tuple[int, ...]) -> int:
        return self.pair_flops(2 * math.prod(space) * self.count)
