"""Memories that learn as they read."""

import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

import attnlab.attention as attention
from attnlab.attention._shared.checks import check_bool, check_choice, check_float, check_int
from attnlab.nn.layers import Linear, RMSNorm, along, unit_length
from attnlab.nn.mixers.base import Attention, Pattern
from attnlab.nn.parameters import normal, parameter

Array = jax.Array

# Of the weights of each memory: widths in and out, by key, value and hidden; and whether the writes need the product's
# gradient in what it is given, as another weight comes before it.
_WEIGHTS = {
    "linear": {"w": ("key", "value", False)},
    "mlp": {"w1": ("key", "hidden", False), "w2": ("hidden", "value", True)},
    "swiglu": {
        "gate": ("key", "hidden", False),
        "up": ("key", "hidden", False),
        "down": ("hidden", "value", True),
    },
}


class _ChunkCache(NamedTuple):
    """Per chunk. gates: [B, N], sums over the tokens of a chunk that is not full; None where there is no such gate."""

    memory: attention.MemoryState
    momentum: Array | None
    log_decay: Array | None


class MemoryAttention(Attention):
    """A small network per head whose weights learn at every token: attention.memory_attention. Causal.

    Queries and keys are of unit length after a silu, and the heads' outputs are RMS-normalised. The rate, the momentum
    and the decay of a token follow from x.

    Args:
      memory: "linear", "mlp" or "swiglu". The weights that each sequence starts from are learned.
      hidden: the width within "mlp" and "swiglu", default head_dim.
      objective: "dot", "l2", ("lp", p), "huber" or "huber_norm".
      threshold: of the two huber objectives.
      per, chunk_size, project: as in memory_attention. Per chunk, gates are means over the chunk.
      rate: the largest step: a token's rate is rate / chunk_size sigmoid(w x), as the steps of a chunk are taken at the
        same weights and add up.
      momentum: whether steps go on, by sigmoid(w x).
      decay: whether weights decay, by a log decay of -softplus(w x + b), b being -4 at first.
    """

    segments_refusal = "keeps what earlier documents wrote, so packed ones cannot be kept apart"

    def __init__(
        self,
        features: int,
        *,
        memory: str = "mlp",
        hidden: int | None = None,
        objective: str | tuple[str, float] = "l2",
        threshold: float | None = None,
        per: str = "token",
        chunk_size: int = 16,
        project: str | tuple[str, float] | None = None,
        rate: float = 1.0,
        momentum: bool = True,
        decay: bool = True,
        rotary: bool = False,
        **shared: Any,
    ):
        super().__init__(features, rotary=rotary, **shared)
        if not self.is_causal:
            raise ValueError("is_causal: got False; a memory reads what the tokens before have written")
        check_choice("memory", memory, list(_WEIGHTS))
        if memory == "mlp" and self.value_dim != self.head_dim:
            allowed = f"must be head_dim {self.head_dim} with memory='mlp', which adds its input"
            raise ValueError(f"value_dim: got {self.value_dim}; {allowed}")
        if hidden is not None and memory == "linear":
            raise ValueError(f"hidden: got {hidden}; must be None with memory='linear', which has no such width")
        hidden = self.head_dim if hidden is None else check_int("hidden", hidden, least=1)
        self.threshold = None if threshold is None else check_float("threshold", threshold, above=0)
        self.rate = check_float("rate", rate, above=0)
        self.memory, self.objective, self.per, self.project = memory, objective, per, project
        self.chunk_size = check_int("chunk_size", chunk_size, least=1)
        self.momentum, self.decay = check_bool("momentum", momentum), check_bool("decay", decay)
        widths = {"key": self.head_dim, "value": self.value_dim, "hidden": hidden}
        self.shapes = {name: (widths[i], widths[o]) for name, (i, o, _) in _WEIGHTS[memory].items()}
        for name, shape in self.shapes.items():
            setattr(self, f"start_{name}", parameter((self.num_heads, *shape), normal(shape[0] ** -0.5)))
        self.strength = Linear(features, self.num_heads, initializer=normal(0.02))
        self.speed = Linear(features, self.num_heads, initializer=normal(0.02)) if momentum else None
        self.gate = Linear(features, self.num_heads, initializer=normal(0.02)) if decay else None
        self.gate_bias = parameter((self.num_heads,), slow_decay) if decay else None
        self.output_norm = RMSNorm(self.value_dim)
        # Refuses what the call would refuse, now that the options are known.
        token = jax.ShapeDtypeStruct((1, 1, self.num_heads, self.head_dim), jnp.float32)
        value = jax.ShapeDtypeStruct((1, 1, self.num_heads, self.value_dim), jnp.float32)
        starts = {
            name: jax.ShapeDtypeStruct((self.num_heads, *shape), jnp.float32) for name, shape in self.shapes.items()
        }
        given = jax.ShapeDtypeStruct((1, 1, self.num_heads), jnp.float32)
        jax.eval_shape(
            lambda token, value, starts, given: attention.memory_attention(
                token, token, value, starts, rate=given, **self._options(given), implementation="xla"
            ),
            token,
            value,
            starts,
            given,
        )

    def _options(self, like: Array) -> dict[str, Any]:
        """like: [B, T, N]."""
        threshold = None if self.threshold is None else jnp.full_like(like, self.threshold)
        return {
            "memory": self.memory,
            "objective": self.objective,
            "threshold": threshold,
            "per": self.per,
            "chunk_size": self.chunk_size,
            "project": self.project,
        }

    @property
    def _starts(self) -> dict[str, Array]:
        return {name: getattr(self, f"start_{name}")[...] for name in self.shapes}

    def _gates(self, x: Array) -> tuple[Array, Array | None, Array | None]:
        """Rate, momentum and log decay of tokens x [B, T, D]: [B, T, N]."""
        x = x.astype(jnp.float32)
        rate = self.rate / self.chunk_size * jax.nn.sigmoid(self.strength(x))
        momentum = None if self.speed is None else jax.nn.sigmoid(self.speed(x))
        log_decay: Array | None = None
        if self.gate is not None and self.gate_bias is not None:
            steps = self.gate(x)
            log_decay = -jax.nn.softplus(steps + along(self.gate_bias[...], steps))
        return rate, momentum, log_decay

    def _of_chunks(self, gate: Array | None) -> Array | None:
        """Means over chunks, [B, ceil(T / C), N]; that of a chunk that is not full is not used."""
        if gate is None or self.per == "token":
            return gate
        past = -gate.shape[1] % self.chunk_size
        chunks = jnp.pad(gate, ((0, 0), (0, past), (0, 0)))
        return chunks.reshape(gate.shape[0], -1, self.chunk_size, gate.shape[2]).mean(2)

    def _attend(self, query: Array, key: Array, value: Array, x: Array, **options: Any) -> Any:
        rate, momentum, log_decay = self._gates(x)
        return attention.memory_attention(
            unit_silu(query),
            unit_silu(key),
            value,
            self._starts,
            rate=rate,
            momentum=self._of_chunks(momentum),
            log_decay=self._of_chunks(log_decay),
            implementation=self.implementation,
            **self._options(rate),
            **options,
        )

    def mix(self, query: Array, key: Array, value: Array, x: Array, segment_ids: Array | None) -> Array:
        return self._attend(query, key, value, x)

    def finish(self, out: Array, value: Array, x: Array) -> Array:
        return self.output_norm(out)

    def attention_weights(self, x: Array, *, pattern: Pattern | None = None) -> Array:
        """NaN: what is read is not linear in the values, as a memory has weights before the first of them."""
        return jnp.full((x.shape[0], self.num_heads, x.shape[1], x.shape[1]), jnp.nan, self.dtype)

    def init_mechanism_cache(self, batch: int, max_length: int) -> Any:
        # Zeros, as a model without values has a cache too: the first step takes the weights to start from.
        dtype = jnp.promote_types(self.dtype, jnp.float32)
        nothing = {name: jnp.zeros((self.num_heads, *shape), dtype) for name, shape in self.shapes.items()}
        memory = attention.init_memory_cache(
            batch, nothing, momentum=self.momentum, per=self.per, chunk_size=self.chunk_size, dtype=dtype
        )
        if self.per == "token":
            return memory
        zeros = jnp.zeros((batch, self.num_heads), dtype)
        return _ChunkCache(memory, zeros if self.momentum else None, zeros if self.decay else None)

    def mechanism_prefill(
        self, cache: Any, query: Array, key: Array, value: Array, x: Array, lengths: Array | None
    ) -> tuple[Array, Any]:
        out, memory = self._attend(query, key, value, x, return_state=True, lengths=lengths)
        if self.per == "token":
            return out, memory
        count = jnp.full(x.shape[:1], x.shape[1]) if lengths is None else lengths
        position = jnp.arange(x.shape[1])[None]
        within = (position >= (count // self.chunk_size * self.chunk_size)[:, None]) & (position < count[:, None])
        _, *gates = self._gates(x)
        sums = (None if gate is None else jnp.sum(jnp.where(within[..., None], gate, 0), axis=1) for gate in gates)
        return out, _ChunkCache(memory, *sums)

    def mechanism_step(self, cache: Any, query: Array, key: Array, value: Array, x: Array) -> tuple[Array, Any]:
        rate, momentum, log_decay = self._gates(x)
        memory, sums = cache, None
        if self.per == "chunk":
            memory, *before = cache
            gates = zip(before, (momentum, log_decay))
            sums = [None if old is None or new is None else old + new[:, 0] for old, new in gates]
            momentum, log_decay = (None if total is None else total[:, None] / self.chunk_size for total in sums)
        is_first = jnp.broadcast_to(memory.position == 0, x.shape[:1])[:, None, None, None]

        def started(weights: dict[str, Array]) -> dict[str, Array]:
            return {name: jnp.where(is_first, self._starts[name][None], weight) for name, weight in weights.items()}

        memory = memory._replace(
            weights=started(memory.weights), start=None if memory.start is None else started(memory.start)
        )
        out, after = attention.memory_step(
            memory,
            unit_silu(query),
            unit_silu(key),
            value,
            self._starts,
            rate=rate,
            momentum=momentum,
            log_decay=log_decay,
            **self._options(rate),
        )
        if sums is None:
            return out, after
        closes = (after.position % self.chunk_size == 0).reshape(-1, 1)
        return out, _ChunkCache(after, *(None if total is None else jnp.where(closes, 0, total) for total in sums))

    def mechanism_flops(self, space: tuple[int, ...]) -> int:
        # The keys' product, the write and the read, and where another weight comes before, the gradient passed to it.
        tokens, total = math.prod(space), 0
        for name, (inputs, outputs) in self.shapes.items():
            total += (8 if _WEIGHTS[self.memory][name][2] else 6) * inputs * outputs
        return tokens * self.num_heads * total


def unit_silu(heads: Array) -> Array:
    """silu(heads) of unit length."""
    return unit_length(jax.nn.silu(heads.astype(jnp.float32))).astype(heads.dtype)


def slow_decay(key: Array, shape: tuple[int, ...], dtype: Any) -> Array:
    """The bias b of a log decay -softplus(w x + b) at first: about -0.02."""
    return jnp.full(shape, -4, dtype)
