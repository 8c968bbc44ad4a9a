"""Softmax attention to blocks of keys that a gate, a search down a tree, or learned maps choose."""

import functools
import math
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np

import attnlab.attention as attention
from attnlab.attention import block_selection
from attnlab.attention._shared.checks import check_choice, check_float, check_int, require
from attnlab.nn.layers import grid_positions, rotary_embedding
from attnlab.nn.mixers.base import flat
from attnlab.nn.mixers.block_sparse import ChosenBlocks, StrictBlocks
from attnlab.nn.parameters import auxiliary_loss, normal, parameter

Array = jax.Array


def _weights_of(query: Array, key: Array, query_block: int, key_block: int, is_causal: bool) -> Array:
    """[B, N, query blocks, key blocks], the largest weight that softmax attention has in each; without a gradient."""
    query, key = jax.lax.stop_gradient((query, key))
    _, lse = attention.dot_product_attention(query, key, key, is_causal=is_causal, return_lse=True)
    return attention.block_statistics(
        query, key, lse, query_block=query_block, key_block=key_block, reduce="max", is_causal=is_causal
    )


def _rotated(x: Array, positions: Array) -> Array:
    """x [B, T, heads, H] by positions [B|1, T] of a sequence."""
    return rotary_embedding(x, positions[..., None])


class GateBlockAttention(StrictBlocks):
    """Blocks of queries attend to the blocks of keys that a gate scores highest, which learns beside the model where
    softmax attention puts its weights: SeerAttention (Gao et al. 2024) and SeerAttention-R (Gao et al. 2025), with
    strict lists.

    The gate, block_selection.gate_scores, reads a block's first query (not causal: the mean one) and the mean, largest
    and smallest keys of blocks, without their positions, and turns what it makes of them by where the blocks start: so
    its scores depend on how far apart blocks are, not on where they are. Its loss in training,
    block_selection.gate_loss, takes the weights of dense attention, so training takes a dense pass more, which `flops`
    leaves out.

    Args:
      query_block, key_block, count, first: as in BlockSparseAttention.
      per: what chooses. "group": each key head, by the mean query of its group, for which lists serve all heads of the
        group, as kernels take them (SeerAttention-R). "head": each query head (SeerAttention).
      gate_dim: width of the gate; with rotary positions a multiple of twice the space axes.
      distillation: weight of the gate's loss, averaged over rows, beside the model's. It alone trains the gate, and
        trains nothing else.
    """

    def __init__(
        self,
        features: int,
        *,
        query_block: int = 1,
        key_block: int,
        count: int,
        first: int = 1,
        per: Literal["group", "head"] = "group",
        gate_dim: int = 16,
        distillation: float = 1.0,
        **shared: Any,
    ):
        super().__init__(features, **shared)
        self.choose_blocks(query_block, key_block, count)
        is_grouped = check_choice("per", per, ("group", "head")) == "group"
        self.list_heads = self.num_key_heads if is_grouped else self.num_heads
        self.first = check_int("first", first, least=0)
        self.gate_dim = check_int("gate_dim", gate_dim, least=1)
        self.distillation = check_float("distillation", distillation, least=0)
        width = self.head_dim
        self.query_gate = parameter((self.list_heads, width, self.gate_dim), normal(width**-0.5))
        self.key_gate = parameter((self.num_key_heads, 3 * width, self.gate_dim), normal((3 * width) ** -0.5))
        self.gate_loss = auxiliary_loss()

    def _gate(self, query: Array, key: Array, space: tuple[int, ...]) -> tuple[tuple[Array, Array, Array, Array], Any]:
        """What block_selection.gate_scores takes: queries and keys of blocks with the weights of both, and `turns`."""
        turns = None
        if self.rotary:
            multiple = 2 * len(space)
            allowed = f"rotary positions on {len(space)} axes need a multiple of {multiple}"
            require(self.gate_dim % multiple == 0, "gate_dim", self.gate_dim, allowed)
            positions = grid_positions(space).reshape(-1, len(space))
            query, key = (rotary_embedding(x, -positions) for x in (query, key))
            starts = (positions[::size] for size in (self.query_block, self.key_block))
            turns = tuple(functools.partial(rotary_embedding, positions=of_blocks) for of_blocks in starts)
        queries, keys = self.queries_of_blocks(query), block_selection.gate_keys(key, self.key_block)
        return (queries, keys, self.query_gate[...], self.key_gate[...]), turns

    def _eligible(self, query_blocks: int, key_blocks: int) -> tuple[np.ndarray, np.ndarray | None]:
        """(who competes, what is listed besides)."""
        if not self.is_causal:
            return np.ones((1, 1), bool), None
        return block_selection.causal_blocks(query_blocks, key_blocks, self.query_block, self.key_block)

    def lists(self, query: Array, key: Array, space: tuple[int, ...]) -> Array:
        given, turns = self._gate(query, key, space)
        scores = block_selection.gate_scores(*given, turns=turns)
        eligible, own = self._eligible(*scores.shape[-2:])
        return block_selection.select_blocks(scores, eligible=eligible, count=self.count, first=self.first, own=own)

    def mix_and_learn(self, query: Array, key: Array, value: Array, x: Array, segment_ids: Array | None) -> Array:
        flat_query, flat_key = flat(query), flat(key)
        weights = _weights_of(flat_query, flat_key, self.query_block, self.key_block, self.is_causal)
        eligible, _ = self._eligible(*weights.shape[-2:])
        given, turns = self._gate(flat_query, flat_key, query.shape[1:-2])
        loss = block_selection.gate_loss(*given, weights, eligible=eligible, turns=turns)
        self.gate_loss.set_value(self.distillation * loss.astype(jnp.float32))
        return self.mix(query, key, value, x, segment_ids)

    def choosing_flops(self, query_blocks: int, key_blocks: int) -> int:
        queries = self.list_heads * query_blocks * (self.head_dim + key_blocks)
        return 2 * self.gate_dim * (queries + 3 * self.num_key_heads * key_blocks * self.head_dim)

    def rule(self) -> dict[str, Any]:
        weights = self.query_gate[...], self.key_gate[...]
        return {"rule": (*weights, _rotated) if self.rotary else weights, "first": self.first}

    def cache_sizes(self) -> dict[str, int]:
        return {"list_heads": self.list_heads, "representative_dim": self.gate_dim}


class TreeBlockAttention(StrictBlocks):
    """Blocks of queries attend to the blocks of keys that a search down a tree finds by their centre keys, in a number
    of products that grows with the logarithm of the length: HiP attention (Lee et al. 2024), with strict lists.

    Causal, a block's first query searches the blocks that end before it, and the block's own are seen besides. Not
    causal, a block's mean query searches all. Queries are the mean of those that read a key head, as its lists serve
    them all. See block_selection.tree_blocks.

    Args:
      query_block, key_block, count: as in BlockSparseAttention.
    """

    def __init__(self, features: int, *, query_block: int = 1, key_block: int, count: int, **shared: Any):
        super().__init__(features, **shared)
        self.choose_blocks(query_block, key_block, count)

    def lists(self, query: Array, key: Array, space: tuple[int, ...]) -> Array:
        queries = block_selection.mean_of_groups(self.queries_of_blocks(query), self.num_key_heads)
        rows, blocks = queries.shape[1], -(-key.shape[1] // self.key_block)
        options: dict[str, Any] = {"key_block": self.key_block}
        if not self.is_causal:
            candidates = np.full(rows, blocks)
            return block_selection.tree_blocks(queries[:, :, None], key, self.count, candidates=candidates, **options)
        complete, own = block_selection.causal_blocks(rows, blocks, self.query_block, self.key_block)
        candidates = complete.sum(-1)
        found = block_selection.tree_blocks(queries[:, :, None], key, self.count, candidates=candidates, **options)
        besides = block_selection.lists_of(own, int(own.sum(-1).max()))
        return jnp.concatenate([found, jnp.broadcast_to(besides, (*found.shape[:-1], besides.shape[-1]))], axis=-1)

    def choosing_flops(self, query_blocks: int, key_blocks: int) -> int:
        halvings = math.ceil(math.log2(max(key_blocks / self.count, 1)))
        return 2 * query_blocks * self.num_key_heads * self.head_dim * self.count * (1 + halvings)

    def rule(self) -> dict[str, Any]:
        return {"rule": "tree"}

    def cache_sizes(self) -> dict[str, int]:
        return {"list_heads": self.num_key_heads, "representative_dim": 0}


class ConnectivityAttention(ChosenBlocks):
    """Every token attends to the keys that learned maps of weights expect it to attend to, of inputs of one length:
    Sparsifiner (Wei et al. 2023), by block_selection.connectivity_scores of the queries and keys.

    In training the maps learn from the squared error to the weights of dense attention, which takes a dense pass more,
    which `flops` leaves out. The released model scores by projections of its own.

    Args:
      tokens: how many an input has.
      count: keys that a token attends to.
      maps: R, how many maps of weights are learned.
      coefficients: how many of them a query takes; default all.
      threshold: numbers of the maps of at most this size count as 0.
      distillation: weight of the squared error, summed over keys and averaged over queries. It trains the maps alone.
    """

    has_causal_form = False

    def __init__(
        self,
        features: int,
        *,
        tokens: int,
        count: int,
        maps: int,
        coefficients: int | None = None,
        threshold: float = 0.0,
        distillation: float = 1.0,
        **shared: Any,
    ):
        super().__init__(features, **shared)
        self.choose_blocks(1, 1, count)
        self.tokens, self.maps = check_int("tokens", tokens, least=1), check_int("maps", maps, least=1)
        coefficients = self.maps if coefficients is None else coefficients
        self.coefficients = check_int("coefficients", coefficients, least=1, most=self.maps)
        self.threshold = check_float("threshold", threshold, least=0)
        self.distillation = check_float("distillation", distillation, least=0)
        self.down = parameter((self.tokens, self.maps), normal(self.tokens**-0.5))
        self.up = parameter((self.tokens, self.maps), normal(self.tokens**-0.5))
        self.map_loss = auxiliary_loss()

    def _scores(self, query: Array, key: Array) -> Array:
        """[B, N, T, T], whose gradient reaches the maps alone."""
        require(key.shape[1] == self.tokens, "tokens", self.tokens, f"need the input's {key.shape[1]}")
        query, key = jax.lax.stop_gradient((query, key))
        options: dict[str, Any] = {"coefficients": self.coefficients, "threshold": self.threshold}
        return block_selection.connectivity_scores(query, key, self.down[...], self.up[...], **options)

    def lists(self, query: Array, key: Array, space: tuple[int, ...]) -> Array:
        return block_selection.select_blocks(
            self._scores(query, key), eligible=np.ones((1, 1), bool), count=min(self.count, self.tokens)
        )

    def mix_and_learn(self, query: Array, key: Array, value: Array, x: Array, segment_ids: Array | None) -> Array:
        flat_query, flat_key = flat(query), flat(key)
        error = self._scores(flat_query, flat_key) - _weights_of(flat_query, flat_key, 1, 1, is_causal=False)
        self.map_loss.set_value(self.distillation * jnp.square(error).sum(-1).mean().astype(jnp.float32))
        return self.mix(query, key, value, x, segment_ids)

    def choosing_flops(self, query_blocks: int, key_blocks: int) -> int:
        pooling = self.num_key_heads * key_blocks * self.head_dim
        return 2 * self.maps * (pooling + self.num_heads * query_blocks * (self.head_dim + key_blocks))
