"""Windows, plain and dilated."""

import math
from typing import Any, get_args

import jax
import jax.numpy as jnp
import numpy as np
from einops import rearrange

import attnlab.attention as attention
from attnlab.attention import masks
from attnlab.attention._shared.checks import check_choice, check_int, check_ints, check_softcap, per_axis, require
from attnlab.attention._shared.softmax import softcapped, softmax_parts
from attnlab.nn.layers import document_positions
from attnlab.nn.mixers.base import Attention, on_logits, sink_logits

Array = jax.Array


class LocalAttention(Attention):
    """Every position sees the `window` positions around it (or up to it, if causal), per axis:
    attention.local_attention.

    A window longer than an axis sees all of it, so that one config serves short inputs too. Of packed documents every
    one has its own sinks, the first of its keys. Learned sinks are none of the input's keys: each head has one, of a
    learned logit and no value.
    """

    def __init__(
        self,
        features: int,
        *,
        window: int | tuple[int, ...],
        stride: int | tuple[int, ...] = 1,
        edge: masks.Edge = "shift",
        sinks: int = 0,
        softcap: float | None = None,
        learned_sinks: bool = False,
        **shared: Any,
    ):
        super().__init__(features, **shared)
        self.window, self.stride = check_ints("window", window), check_ints("stride", stride)
        self.edge: Any = check_choice("edge", edge, get_args(masks.Edge))
        self.sinks = check_int("sinks", sinks, least=0)
        self.softcap = check_softcap(softcap)
        self.sink_logits = sink_logits(learned_sinks, self.num_heads)

    @property
    def segments_refusal(self) -> str:  # type: ignore[override]
        if not self.is_causal:
            return "has windows that move at the borders of the whole input, so packed documents need is_causal=True"
        if np.max(self.stride) > 1:
            return f"has stride {self.stride}, which counts from the whole input's start; packed documents need 1"
        return ""

    def _dilation(self, space: tuple[int, ...]) -> tuple[int, ...]:
        return (1,) * len(space)

    def _fit(self, space: tuple[int, ...]) -> list[tuple[int, int, int]]:
        """(window, stride, dilation) per axis, of this space.

        Causal, they give what the options mean for any length; some of them only if the axis has window * dilation
        positions, so that positions after its end have to be added.
        """
        rank, fitted = len(space), []
        options = (per_axis("window", self.window, rank), per_axis("stride", self.stride, rank), self._dilation(space))
        for length, window, stride, dilation in zip(space, *options):
            if self.is_causal:
                group = -(-length // dilation)
                if window >= (group if self.edge == "shift" else -(-group // stride) * stride):
                    window, stride = group, 1  # all that came before
            elif window > length:
                window, stride = length, min(stride, length)
            fitted.append((window, stride, dilation))
        return fitted

    def _windows(self, query: Array, key: Array, value: Array, *, dilation: tuple[int, ...], **options: Any) -> Any:
        return attention.local_attention(query, key, value, **options, **on_logits(self))

    def _attend(self, query: Array, key: Array, value: Array, segment_ids: Array | None, **sinks: int) -> Any:
        """Out and lse of the windows."""
        space = query.shape[1:-2]
        window, stride, dilation = zip(*self._fit(space))
        missing = [max(w * d - length, 0) for w, d, length in zip(window, dilation, space)]
        if any(missing):  # nothing before the end sees what is after it
            after = [(0, 0), *((0, count) for count in missing)]
            query, key, value = (jnp.pad(x, [*after, (0, 0), (0, 0)]) for x in (query, key, value))
            segment_ids = None if segment_ids is None else jnp.pad(segment_ids, after)
        out, lse = self._windows(
            query,
            key,
            value,
            window=window,
            stride=stride,
            dilation=dilation,
            is_causal=self.is_causal,
            edge=self.edge,
            segment_ids=segment_ids,
            return_lse=True,
            implementation=self.implementation,
            **sinks,
        )
        within = (slice(None), *map(slice, space))
        return out[within], lse[within]

    def mix(self, query: Array, key: Array, value: Array, x: Array, segment_ids: Array | None) -> Array:
        if not self.sinks:
            return self._attend(query, key, value, segment_ids)[0]
        if segment_ids is None:
            return self._attend(query, key, value, None, sinks=self.sinks)[0]
        near = self._attend(query, key, value, segment_ids)
        (window,) = per_axis("window", self.window, 1)
        first_keys = jax.checkpoint(_first_keys, static_argnums=(4, 5, 6))
        far = first_keys(query, key, value, segment_ids, self.sinks, window, self.softcap)
        return attention.merge_attention(*zip(near, far))[0]

    def init_mechanism_cache(self, batch: int, max_length: int) -> Any:
        (window,), (stride,) = per_axis("window", self.window, 1), per_axis("stride", self.stride, 1)
        # A window that reaches back to the sinks from the end of the last stride group sees all of max_length tokens.
        sinks = min(self.sinks, max_length - 1)
        window = min(window, max(-(-max_length // stride) * stride - sinks, stride))
        return attention.init_local_cache(
            batch,
            self.num_key_heads,
            self.head_dim,
            window=window,
            sinks=sinks,
            value_dim=self.value_dim,
            dtype=self.dtype,
        )

    @property
    def decoding_refusal(self) -> str:
        if self.is_causal and self.edge == "shift" and np.max(self.stride) > 1:
            return (
                'edge: got "shift" with a stride; the last window would depend on where the sequence ends, so decoding '
                'needs edge="clip"'
            )
        return super().decoding_refusal

    def mechanism_capacity(self, cache: Any) -> int | None:
        slots, (window,) = cache.key.shape[1], per_axis("window", self.window, 1)
        return slots if slots < window + self.sinks else None

    def _cached(self, cache: Any) -> tuple[int, int]:
        """Window and sinks of a cache, which may be for fewer tokens than they reach."""
        slots, (stride,) = cache.key.shape[1], per_axis("stride", self.stride, 1)
        sinks = min(self.sinks, slots - stride)
        return slots - sinks, sinks

    def mechanism_prefill(
        self, cache: Any, query: Array, key: Array, value: Array, x: Array, lengths: Array | None
    ) -> tuple[Array, Any]:
        window, sinks = self._cached(cache)
        cache = attention.prefill_local_cache(cache, key, value, window=window, sinks=sinks, lengths=lengths)
        return self.mix(query, key, value, x, None), cache

    def mechanism_step(self, cache: Any, query: Array, key: Array, value: Array, x: Array) -> tuple[Array, Any]:
        (window, sinks), (stride,) = self._cached(cache), per_axis("stride", self.stride, 1)
        settings: Any = {"window": window, "sinks": sinks, "stride": stride}
        return attention.local_step(cache, query, key, value, **settings, **on_logits(self))

    def mechanism_flops(self, space: tuple[int, ...]) -> int:
        window, stride, dilation = zip(*self._fit(space))
        axes = masks.axis_windows(
            space,
            window=window,
            stride=stride,
            dilation=dilation,
            is_causal=(self.is_causal,) * len(space),
            edge=self.edge,
        )
        bounds = [axis.bounds(np.arange(axis.length)) for axis in axes]
        seen = (np.sum(-(-(end - start) // axis.dilation)) for axis, (start, end) in zip(axes, bounds))
        pairs = math.prod(map(int, seen))
        if self.sinks:  # those that queries are not before, without those in their windows
            past = [np.arange(1, length + 1) for length in space]
            (start, end), *others = bounds
            sinks = [np.minimum(past[0], self.sinks), *past[1:]]
            within = [np.maximum(np.minimum(end, self.sinks) - start, 0), *(e - s for s, e in others)]
            pairs += math.prod(int(x.sum()) for x in sinks) - math.prod(int(x.sum()) for x in within)
        return self.pair_flops(pairs)


def _first_keys(
    query: Array, key: Array, value: Array, segment_ids: Array, sinks: int, window: int, softcap: float | None
) -> tuple[Array, Array]:
    """Every query's attention to the first `sinks` keys of its document that its window has left: out and lse."""
    position = document_positions(segment_ids)
    now, number = jnp.arange(position.shape[1])[None, :, None], jnp.arange(sinks)[None, None]
    # No key past the query, which might be another document's; those in the window's reach are not visible here.
    index = jnp.minimum(now - position[..., None] + number, now)
    keys, values = (jax.vmap(lambda x, index: x[index])(x, index) for x in (key, value))  # [B, T, sinks, K, H|V]
    dtype = jnp.promote_types(query.dtype, jnp.float32)
    grouped = rearrange(query, "B T (K G) H -> B T K G H", K=key.shape[2])
    logits = query.shape[-1] ** -0.5 * jnp.einsum("BTKGH,BTSKH->BTKGS", grouped, keys, preferred_element_type=dtype)
    logits = softcapped(logits, softcap)
    visible = (number <= position[..., None] - window)[:, :, None, None]
    numerators, denominator, lse = softmax_parts(logits, visible)
    out = jnp.einsum("BTKGS,BTSKV->BTKGV", numerators / denominator, values.astype(dtype))
    return out.reshape(*query.shape[:-1], -1).astype(query.dtype), lse.reshape(query.shape[:-1])


class DilatedAttention(LocalAttention):
    """Every position sees a window of every `dilation`-th position: attention.dilated_attention.

    Causal, the dilation holds for inputs of any length, of which the window sees what there is. Else, where the dilated
    window is longer than an axis, the dilation is lowered until it fits, then the window.
    """

    def __init__(self, features: int, *, dilation: int | tuple[int, ...], **local: Any):
        super().__init__(features, **local)
        options = {"sinks": self.sinks, "softcap": self.softcap, "learned_sinks": self.sink_logits is not None}
        for name, given in options.items():
            require(not given, name, given, "dilated attention has none")
        self.dilation = check_ints("dilation", dilation)

    def _dilation(self, space: tuple[int, ...]) -> tuple[int, ...]:
        dilations = per_axis("dilation", self.dilation, len(space))
        if self.is_causal:
            return tuple(map(min, dilations, space))  # one of the length and one beyond it leave a position to itself
        windows = map(min, per_axis("window", self.window, len(space)), space)
        return tuple(min(d, length // k) for d, k, length in zip(dilations, windows, space))

    def _windows(self, query: Array, key: Array, value: Array, **options: Any) -> Any:
        return attention.dilated_attention(query, key, value, **options)

    def init_mechanism_cache(self, batch: int, max_length: int) -> Any:
        ((window, _, dilation),) = self._fit((max_length,))
        return attention.init_dilated_cache(
            batch,
            self.num_key_heads,
            self.head_dim,
            window=window,
            dilation=dilation,
            value_dim=self.value_dim,
            dtype=self.dtype,
        )

    def mechanism_capacity(self, cache: Any) -> int | None:
        _, dilation, window = cache.key.shape[:3]
        whole = *per_axis("window", self.window, 1), *per_axis("dilation", self.dilation, 1)
        return window * dilation if (window, dilation) != whole else None

    def mechanism_prefill(
        self, cache: Any, query: Array, key: Array, value: Array, x: Array, lengths: Array | None
    ) -> tuple[Array, Any]:
        cache = attention.prefill_dilated_cache(cache, key, value, dilation=cache.key.shape[1], lengths=lengths)
        return self.mix(query, key, value, x, None), cache

    def mechanism_step(self, cache: Any, query: Array, key: Array, value: Array, x: Array) -> tuple[Array, Any]:
        _, dilation, window = cache.key.shape[:3]
        (whole,), (stride,) = per_axis("window", self.window, 1), per_axis("stride", self.stride, 1)
        # A shorter window is all of the tokens that the cache is for.
        stride = stride if window == whole else 1
        return attention.dilated_step(cache, query, key, value, window=window, dilation=dilation, stride=stride)
