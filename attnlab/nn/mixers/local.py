"""Windows, plain and dilated."""

import math
from typing import Any, get_args

import jax
import numpy as np

import attnlab.attention as attention
from attnlab.attention import masks
from attnlab.attention._shared.checks import check_choice, check_int, check_ints, per_axis
from attnlab.nn.mixers.base import Attention

Array = jax.Array


class LocalAttention(Attention):
    """Every position sees the `window` positions around it (or up to it, if causal), per axis:
    attention.local_attention.

    A window longer than an axis is cut to it, so that one config serves short inputs too.
    """

    def __init__(
        self,
        features: int,
        *,
        window: int | tuple[int, ...],
        stride: int | tuple[int, ...] = 1,
        edge: masks.Edge = "shift",
        sinks: int = 0,
        **shared: Any,
    ):
        super().__init__(features, **shared)
        self.window, self.stride = check_ints("window", window), check_ints("stride", stride)
        self.edge: Any = check_choice("edge", edge, get_args(masks.Edge))
        self.sinks = check_int("sinks", sinks, least=0)

    def _dilation(self, space: tuple[int, ...]) -> tuple[int, ...]:
        return (1,) * len(space)

    def _window(self, space: tuple[int, ...]) -> tuple[int, ...]:
        return tuple(min(pair) for pair in zip(per_axis("window", self.window, len(space)), space))

    def mix(self, query: Array, key: Array, value: Array, x: Array, segment_ids: Array | None) -> Array:
        return attention.local_attention(
            query,
            key,
            value,
            window=self._window(x.shape[1:-1]),
            stride=self.stride,
            is_causal=self.is_causal,
            edge=self.edge,
            sinks=self.sinks,
            segment_ids=segment_ids,
            implementation=self.implementation,
        )

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

    def mechanism_step(self, cache: Any, query: Array, key: Array, value: Array, x: Array) -> tuple[Array, Any]:
        slots, (stride,) = cache.key.shape[1], per_axis("stride", self.stride, 1)
        sinks = min(self.sinks, slots - stride)
        return attention.local_step(cache, query, key, value, window=slots - sinks, sinks=sinks, stride=stride)

    def mechanism_flops(self, space: tuple[int, ...]) -> int:
        rank = len(space)
        axes = masks.axis_windows(
            space,
            window=self._window(space),
            stride=per_axis("stride", self.stride, rank),
            dilation=self._dilation(space),
            is_causal=(self.is_causal,) * rank,
            edge=self.edge,
        )
        bounds = [axis.bounds(np.arange(axis.length)) for axis in axes]
        seen = (np.sum(-(-(end - start) // axis.dilation)) for axis, (start, end) in zip(axes, bounds))
        pairs = math.prod(map(int, seen))
        if self.sinks:
            pairs += int(np.sum(np.minimum(bounds[0][0], self.sinks)))
        return self.pair_flops(pairs)


class DilatedAttention(LocalAttention):
    """Every position sees a window of every `dilation`-th position: attention.dilated_attention.

    Where the dilated window is longer than an axis, the dilation is lowered until it fits, then the window.
    """

    def __init__(self, features: int, *, dilation: int | tuple[int, ...], **local: Any):
        super().__init__(features, **local)
        if self.sinks:
            raise ValueError(f"sinks: got {self.sinks}; dilated attention has none")
        self.dilation = check_ints("dilation", dilation)

    def _dilation(self, space: tuple[int, ...]) -> tuple[int, ...]:
        dilation, window = per_axis("dilation", self.dilation, len(space)), self._window(space)
        return tuple(min(d, length // k) for d, k, length in zip(dilation, window, space))

    def mix(self, query: Array, key: Array, value: Array, x: Array, segment_ids: Array | None) -> Array:
        return attention.dilated_attention(
            query,
            key,
            value,
            window=self._window(x.shape[1:-1]),
            dilation=self._dilation(x.shape[1:-1]),
            stride=self.stride,
            is_causal=self.is_causal,
            edge=self.edge,
            segment_ids=segment_ids,
            implementation=self.implementation,
        )

    def init_mechanism_cache(self, batch: int, max_length: int) -> Any:
        (window,), (dilation,) = self._window((max_length,)), self._dilation((max_length,))
        return attention.init_dilated_cache(
            batch,
            self.num_key_heads,
            self.head_dim,
            window=window,
            dilation=dilation,
            value_dim=self.value_dim,
            dtype=self.dtype,
        )

    def mechanism_step(self, cache: Any, query: Array, key: Array, value: Array, x: Array) -> tuple[Array, Any]:
        _, dilation, window = cache.key.shape[:3]
        (stride,) = per_axis("stride", self.stride, 1)
        return attention.dilated_step(cache, query, key, value, window=window, dilation=dilation, stride=stride)
