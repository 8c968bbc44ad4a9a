"""Several mixers of one input, added."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from attnlab.attention._shared.checks import check_bool, check_dtype, check_int
from attnlab.nn.layers import Linear
from attnlab.nn.mixers.base import Attention, MixerCache, MixerFactory, Pattern, check_mixers, given, make_mixer
from attnlab.nn.sharding import spec_of, specs_of, under_auto_axes

Array = jax.Array


class Sum(Attention):
    """y = sum_i mixer_i(x), or with gates sum_i sigmoid(w_i . x) mixer_i(x): a window beside a memory (AllMem).

    Each mixer has projections, heads and options of its own; Sum has none of those that other mixers share.

    Args:
      features: D, the width in and out.
      is_causal: of all mixers.
      mixers: mixer factories, as models take them.
      gate: whether each mixer's output is multiplied by a number of 0 to 1 for each token.
      dtype: what is computed in (parameters stay float32).
    """

    def __init__(
        self,
        features: int,
        *,
        is_causal: bool,
        mixers: Sequence[MixerFactory],
        gate: bool = False,
        dtype: Any = jnp.float32,
    ):
        check_mixers(mixers, "to be added")
        self.features, self.is_causal = check_int("features", features, least=1), check_bool("is_causal", is_causal)
        self.dtype, self.implementation = check_dtype("dtype", dtype), None
        self.mixers = nnx.List(make_mixer(mixer, features, is_causal=is_causal, dtype=dtype) for mixer in mixers)
        self.gate = Linear(features, len(mixers), dtype=dtype) if check_bool("gate", gate) else None

    @property
    def segments_refusal(self) -> str:  # type: ignore[override]
        return next((mixer.segments_refusal for mixer in self.mixers if mixer.segments_refusal), "")

    @property
    def pattern_refusal(self) -> str:
        return next((mixer.pattern_refusal for mixer in self.mixers if mixer.pattern_refusal), "")

    @property
    def decoding_refusal(self) -> str:
        return next((mixer.decoding_refusal for mixer in self.mixers if not mixer.decodes), "")

    @classmethod
    def is_for_grids(cls, options: Mapping[str, Any]) -> bool:
        """Its mixers are asked themselves."""
        return False

    def _gates(self, x: Array) -> list[Array] | None:
        """For each mixer [B, *space, 1]."""
        return None if self.gate is None else jnp.split(jax.nn.sigmoid(self.gate(x)), len(self.mixers), axis=-1)

    def _added(self, outputs: Sequence[Array], x: Array) -> Array:
        if (gates := self._gates(x)) is not None:
            outputs = [gate * out for gate, out in zip(gates, outputs, strict=True)]
        return sum(outputs[1:], outputs[0])

    @under_auto_axes(lambda self, x, **_: spec_of(x))
    def __call__(
        self,
        x: Array,
        *,
        segment_ids: Array | None = None,
        pattern: Pattern | None = None,
        is_training: bool = False,
    ) -> Array:
        options: dict[str, Any] = {"segment_ids": segment_ids, "is_training": is_training, **given(pattern=pattern)}
        outputs = [mixer(x, **options) for mixer in self.mixers]
        return self._added(outputs, x)

    def attention_weights(self, x: Array, *, pattern: Pattern | None = None) -> Array:
        """Of the mixers' heads, one mixer's after another's, times the gates: [B, sum of N, T, S]."""
        weights = [mixer.attention_weights(x, **given(pattern=pattern)) for mixer in self.mixers]
        if (gates := self._gates(x)) is not None:
            weights = [gate.reshape(x.shape[0], 1, -1, 1) * weight for gate, weight in zip(gates, weights)]
        return jnp.concatenate(weights, axis=1)

    def init_cache(self, batch: int, max_length: int) -> MixerCache:
        caches = [mixer.init_cache(batch, max_length) for mixer in self.mixers]
        return MixerCache(caches[0].position, caches, {})

    @under_auto_axes(lambda self, cache, x: (spec_of(x), specs_of(cache)))
    def step(self, cache: MixerCache, x: Array) -> tuple[Array, MixerCache]:
        steps = (mixer.step(own, x) for mixer, own in zip(self.mixers, cache.mechanism, strict=True))
        outputs, caches = zip(*steps)
        return self._added(outputs, x), MixerCache(caches[0].position, list(caches), {})

    @under_auto_axes(lambda self, cache, x, lengths=None: (spec_of(x), specs_of(cache)))
    def prefill(self, cache: MixerCache, x: Array, lengths: Array | None = None) -> tuple[Array, MixerCache]:
        read = (mixer.prefill(own, x, lengths) for mixer, own in zip(self.mixers, cache.mechanism, strict=True))
        outputs, caches = zip(*read)
        return self._added(outputs, x), MixerCache(caches[0].position, list(caches), {})

    def flops(self, space: tuple[int, ...], *, pairs: int | None = None) -> int:
        of_gates = 0 if self.gate is None else 2 * math.prod(space) * self.features * len(self.mixers)
        return sum(mixer.flops(space, **given(pairs=pairs)) for mixer in self.mixers) + of_gates

    def mix(self, query: Array, key: Array, value: Array, x: Array, segment_ids: Array | None) -> Array:
        raise NotImplementedError("Sum: its mixers have heads of their own")

    def mechanism_flops(self, space: tuple[int, ...]) -> int:
        raise NotImplementedError("Sum: its mixers have heads of their own")
