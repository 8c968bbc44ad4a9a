"""What all mixers share: layers that move information between positions, [B, *space, D] -> [B, *space, D].

Every mixer is projections to query, key and value, a mechanism of attnlab.attention between the heads, and a projection
back. A mechanism is one subclass of Attention: what it computes, what it keeps to decode, and what that costs.
"""

import functools
import math
from abc import abstractmethod
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from einops import rearrange
from flax import nnx

from attnlab.attention import masks
from attnlab.attention._shared.checks import (
    check_bool,
    check_dtype,
    check_float,
    check_int,
    check_ints,
    check_lengths,
    check_segment_ids,
    check_text,
    require,
    shape_text,
    shown,
)
from attnlab.nn.layers import (
    DepthwiseConvolution,
    Linear,
    RMSNorm,
    document_numbers,
    document_positions,
    grid_positions,
    rotary_embedding,
)
from attnlab.nn.parameters import Parameter, parameter, zeros
from attnlab.nn.sharding import spec_of, specs_of, under_auto_axes
from attnlab.nn.signatures import show_shared_options

Array = jax.Array


class MixerCache(NamedTuple):
    """What a mixer keeps between decoding steps.

    position: int32 [], the next token's, or [B], of each row. mechanism: the mechanism's own cache. convolved: the last
    inputs of each convolution, [B, width - 1, channels], by its name.
    """

    position: Array
    mechanism: Any
    convolved: dict[str, Array]


class Pattern(NamedTuple):
    """Who sees whom in a sequence, which a caller gives in place of the mixers' own pattern.

    mask: of one axis, by the numbers of the tokens. positions: int [T], numpy's, where each token stands, for rotary
    and learned positions; None: by its number.
    """

    mask: masks.Mask
    positions: np.ndarray | None = None

    def places(self, length: int) -> np.ndarray:
        """int [length]: where each token stands. Raises for a pattern of other lengths, or of other kinds."""
        require(isinstance(self.mask, masks.Mask), "pattern.mask", shown(self.mask), "need a masks.Mask of one axis")
        if self.positions is None:
            return np.arange(length)
        positions = self.positions
        is_array = isinstance(positions, np.ndarray)
        fits = is_array and positions.shape == (length,) and np.issubdtype(positions.dtype, np.integer)
        given = shape_text(positions) if is_array else shown(positions)
        require(fits, "pattern.positions", given, f"need numpy integers [{length}], of every token")
        return positions


def given(**options: Any) -> dict[str, Any]:
    """Those that are not None: a mixer of one's own need not know the others."""
    return {name: value for name, value in options.items() if value is not None}


def sink_logits(learned: Any, heads: int) -> Parameter | None:
    """A learned logit of each head's sink, zeros at first, if the option learned_sinks says so."""
    return parameter((heads,), zeros) if check_bool("learned_sinks", learned) else None


def on_logits(mixer: Any) -> dict[str, Any]:
    """The options of its mechanism that a mixer has as softcap and sink_logits."""
    sinks = mixer.sink_logits
    return {"softcap": mixer.softcap, "sink_logits": None if sinks is None else sinks[...]}


# By which share of the largest output the values times the weights may miss it: rounding misses by far less.
_LINEAR = 0.05
# What a mixer that lacks a method says.
_UNDECODABLE = {
    "init_mechanism_cache": "{}: it has no cache to decode from",
    "mechanism_step": "{}: it has no mechanism_step to decode with",
}


class Attention(nnx.Module):
    """The part that all mixers share; a subclass is a mechanism.

    Args:
      features: D, the width in and out.
      is_causal: whether a position may only see itself and those before it.
      num_heads, num_key_heads: N query heads and K key heads (default N); N must be a multiple of K.
      head_dim: H of queries and keys (default D / N).
      value_dim: V of values (default H).
      rotary: rotate queries and keys by position (each space axis turns its own share of H).
      normalize_qk: RMS-normalise queries and keys over H, with learned gains.
      convolution: width of a depthwise convolution with SiLU of queries, keys and values each, over a token and those
        just before it (causal mixers; usual with linear attention, width 4); 0 is none.
      residual_convolution: widths per space axis, (3, 3) for images or 3 for sequences, of a depthwise convolution of
        the values that is added to the mechanism's output; of earlier tokens alone where causal. 0 is none.
      implementation: passed to the primitive; None picks by platform.
      dtype: what is computed in (parameters stay float32).
    """

    has_causal_form = True
    # Why packed documents would not be what each is alone; "" where they are.
    segments_refusal = ""

    def __init__(
        self,
        features: int,
        *,
        is_causal: bool,
        num_heads: int = 4,
        num_key_heads: int | None = None,
        head_dim: int | None = None,
        value_dim: int | None = None,
        rotary: bool = True,
        normalize_qk: bool = False,
        convolution: int = 0,
        residual_convolution: int | tuple[int, ...] = 0,
        implementation: str | None = None,
        dtype: Any = jnp.float32,
    ):
        features, is_causal = check_int("features", features, least=1), check_bool("is_causal", is_causal)
        if is_causal and not self.has_causal_form:
            raise ValueError(f"is_causal: got True; {type(self).__name__} has no causal form")
        num_heads = check_int("num_heads", num_heads, least=1)
        if head_dim is None and features % num_heads:
            raise ValueError(f"num_heads: got {num_heads}; must divide features {features}, or give head_dim")
        num_key_heads = num_heads if num_key_heads is None else check_int("num_key_heads", num_key_heads, least=1)
        if num_heads % num_key_heads:
            raise ValueError(f"num_key_heads: got {num_key_heads}; must divide num_heads {num_heads}")
        self.features, self.is_causal, self.dtype = features, is_causal, check_dtype("dtype", dtype)
        self.num_heads, self.num_key_heads = num_heads, num_key_heads
        self.head_dim = features // num_heads if head_dim is None else check_int("head_dim", head_dim, least=1)
        self.value_dim = self.head_dim if value_dim is None else check_int("value_dim", value_dim, least=1)
        self.rotary, normalize_qk = check_bool("rotary", rotary), check_bool("normalize_qk", normalize_qk)
        self.implementation = None if implementation is None else check_text("implementation", implementation)
        self.query = Linear(features, (num_heads, self.head_dim), dtype=dtype)
        self.key = Linear(features, (num_key_heads, self.head_dim), dtype=dtype)
        self.value = Linear(features, (num_key_heads, self.value_dim), dtype=dtype)
        self.output = Linear((num_heads, self.value_dim), features, dtype=dtype)
        self.query_norm = RMSNorm(self.head_dim) if normalize_qk else None
        self.key_norm = RMSNorm(self.head_dim) if normalize_qk else None
        convolution = check_int("convolution", convolution, least=0)
        residual_convolution = check_ints("residual_convolution", residual_convolution, least=0)
        if convolution and not is_causal:
            raise ValueError(f"convolution: got {convolution} with is_causal=False; it is over earlier tokens")
        values = num_key_heads * self.value_dim
        self.query_convolution = self._convolution(convolution, num_heads * self.head_dim)
        self.key_convolution = self._convolution(convolution, num_key_heads * self.head_dim)
        self.value_convolution = self._convolution(convolution, values)
        self.residual_convolution = self._convolution(residual_convolution, values, use_bias=True)

    def _convolution(
        self, widths: int | tuple[int, ...], channels: int, *, use_bias: bool = False
    ) -> DepthwiseConvolution | None:
        if widths == 0:
            return None
        widths = tuple(widths) if isinstance(widths, (tuple, list)) else (widths,)
        return DepthwiseConvolution(widths, channels, is_causal=self.is_causal, use_bias=use_bias, dtype=self.dtype)

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        show_shared_options(cls)

    @abstractmethod
    def mix(self, query: Array, key: Array, value: Array, x: Array, segment_ids: Array | None) -> Array:
        """Heads [B, *space, N|K, H] -> [B, *space, N, V]; linear in value, of any width V. x: the input, for gates."""

    @abstractmethod
    def mechanism_flops(self, space: tuple[int, ...]) -> int:
        """Floating-point operations (2 per multiply-add) between the heads, for one example, forward."""

    def mix_masked(self, query: Array, key: Array, value: Array, mask: masks.Mask) -> Array:
        """As mix, each query with the keys that the mask lets it see: for mechanisms that take any pattern."""
        raise NotImplementedError(f"{type(self).__name__}: it has no mix_masked")

    @property
    def pattern_refusal(self) -> str:
        """Why it takes no pattern but its own; "" where it takes any."""
        if type(self).mix_masked is Attention.mix_masked:
            return f"{type(self).__name__} sees what its own options say"
        if self._convolutions():
            return f"{type(self).__name__} has convolutions, which follow none"
        return ""

    # To decode; mechanisms without a causal form have neither a cache nor a step.

    def init_mechanism_cache(self, batch: int, max_length: int) -> Any:
        """What the mechanism keeps to decode up to max_length tokens; no more than these need."""
        raise NotImplementedError(_UNDECODABLE["init_mechanism_cache"].format(type(self).__name__))

    def mechanism_step(self, cache: Any, query: Array, key: Array, value: Array, x: Array) -> tuple[Array, Any]:
        """One token [B, 1, N|K, H] -> (out [B, 1, N, V], cache)."""
        raise NotImplementedError(_UNDECODABLE["mechanism_step"].format(type(self).__name__))

    def mechanism_prefill(
        self, cache: Any, query: Array, key: Array, value: Array, x: Array, lengths: Array | None
    ) -> tuple[Array, Any]:
        """A prompt [B, P, N|K, H] into an empty cache -> (out [B, P, N, V], cache), as so many steps give them.

        lengths: int32 [B], the row's tokens, padding after them; None: P in all rows. Unless a mechanism has a faster
        way, here it takes the steps, which do not know of rows of their own lengths.
        """
        own = f"{type(self).__name__} has no mechanism_prefill, so all prompts of a batch must have one length"
        require(lengths is None, "lengths", "some", own)

        def token(cache: Any, now: tuple[Array, ...]) -> tuple[Any, Array]:
            out, cache = self.mechanism_step(cache, *(x[:, None] for x in now))
            return cache, out[:, 0]

        tokens = tuple(jnp.moveaxis(x, 1, 0) for x in (query, key, value, x))
        cache, out = jax.lax.scan(token, cache, tokens)
        return jnp.moveaxis(out, 0, 1), cache

    def mechanism_capacity(self, cache: Any) -> int | None:
        """Tokens that a mechanism's cache can decode, if what it keeps was cut to them; the ones after give NaN."""
        return None

    @property
    def decoding_refusal(self) -> str:
        """Why it does not decode; "" where it does. A mechanism adds what else it refuses."""
        if not self.is_causal:
            return f"{type(self).__name__}: only a causal mixer decodes; this one has is_causal=False"
        for method, refusal in _UNDECODABLE.items():
            if getattr(type(self), method) is getattr(Attention, method):
                return refusal.format(type(self).__name__)
        return ""

    @property
    def decodes(self) -> bool:
        return not self.decoding_refusal

    @classmethod
    def is_for_grids(cls, options: Mapping[str, Any]) -> bool:
        """Whether a mixer of these options is for grids alone: not causal, or with an option per space axis."""
        per_axis = (isinstance(value, (tuple, list)) and len(value) > 1 for value in options.values())
        return not cls.has_causal_form or any(per_axis)

    def _heads(
        self,
        x: Array,
        positions: Array,
        segment_ids: Array | None,
        convolution: Callable[[str, Array], Array] | None = None,
    ) -> tuple[Array, Array, Array, Array | float]:
        """Query, key, value, and what the convolution of the values adds to the output.

        convolution: (name of one, its inputs) -> its outputs, where tokens come before x or after it.
        """

        def convolve(name: str, heads: Array) -> Array:
            channels = rearrange(heads, "... K H -> ... (K H)")
            if convolution is None:
                return getattr(self, name)(channels, segment_ids=segment_ids).reshape(heads.shape)
            return convolution(name, channels).reshape(heads.shape)

        query, key, value = self.query(x), self.key(x), self.value(x)
        if self.query_convolution is not None:
            query = jax.nn.silu(convolve("query_convolution", query))
            key = jax.nn.silu(convolve("key_convolution", key))
            value = jax.nn.silu(convolve("value_convolution", value))
        if self.query_norm is not None and self.key_norm is not None:
            query, key = self.query_norm(query), self.key_norm(key)
        if self.rotary:
            axes = positions.shape[-1]
            if self.head_dim % (2 * axes):
                raise ValueError(
                    f"head_dim: got {self.head_dim}; rotary positions on {axes} axes need a multiple of {2 * axes}"
                )
            query, key = rotary_embedding(query, positions), rotary_embedding(key, positions)
        added: Array | float = 0.0
        if self.residual_convolution is not None:
            added = jnp.repeat(convolve("residual_convolution", value), self.num_heads // self.num_key_heads, axis=-2)
        return query, key, value, added

    @under_auto_axes(lambda self, x, **_: spec_of(x))
    def __call__(
        self,
        x: Array,
        *,
        segment_ids: Array | None = None,
        pattern: Pattern | None = None,
        is_training: bool = False,
    ) -> Array:
        """x [B, *space, D] -> [B, *space, D].

        segment_ids: int [B, T], documents packed one after another, each a run of equal ids: they give what each gives
          alone. pattern: who sees whom, of a sequence, instead of what is_causal says. is_training: buffers learn
          from x.
        """
        if pattern is not None:
            require(segment_ids is None, "pattern", "some beside segment_ids", "need one of them")
            query, key, value = self._patterned_heads(x, pattern)
            out = self.mix_masked(query, key, value, pattern.mask)
            self._check_heads("mix_masked", out, query, value)
            return self.output(self.finish(out, value, x))
        positions = grid_positions(x.shape[1:-1])
        if segment_ids is not None:
            if self.segments_refusal:
                raise ValueError(f"segment_ids: got some; {type(self).__name__} {self.segments_refusal}")
            check_segment_ids("segment_ids", segment_ids, x.shape[:-1], "[batch, length]")
            require(x.ndim == 3, "segment_ids", f"some for {x.ndim - 2} space axes", "packed documents are sequences")
            positions, segment_ids = document_positions(segment_ids)[..., None], document_numbers(segment_ids)
        query, key, value, added = self._heads(x, positions, segment_ids)
        mix = self.mix_and_learn if is_training else self.mix
        out = mix(query, key, value, x, segment_ids)
        self._check_heads("mix", out, query, value)
        return self.output(self.finish(out, value, x) + added)

    def _patterned_heads(self, x: Array, pattern: Pattern) -> tuple[Array, Array, Array]:
        """Query, key, value."""
        require(not self.pattern_refusal, "pattern", "one", f"but {self.pattern_refusal}")
        require(x.ndim == 3, "pattern", f"one for {x.ndim - 2} space axes", "patterns are of sequences")
        return self._heads(x, jnp.asarray(pattern.places(x.shape[1]))[:, None], None)[:3]

    def _check_heads(self, method: str, out: Any, query: Array, value: Array) -> None:
        """Refuses what a mixer of one's own gives unless it is [B, *space, N, V], V as wide as the value."""
        shape = (*query.shape[:-2], self.num_heads, value.shape[-1])
        given = shape_text(out) if isinstance(out, jax.Array) else shown(out)
        require(
            isinstance(out, jax.Array) and out.shape == shape,
            f"{type(self).__name__}.{method}",
            given,
            f"need an array {list(shape)}, as wide as the value",
        )

    def mix_and_learn(self, query: Array, key: Array, value: Array, x: Array, segment_ids: Array | None) -> Array:
        """mix in training: a mechanism with buffers sets them, and its auxiliary loss, to what follows from x."""
        return self.mix(query, key, value, x, segment_ids)

    def finish(self, out: Array, value: Array, x: Array) -> Array:
        """Between the mechanism's output [B, *space, N, V] and the projection: nothing, unless a mechanism needs it."""
        return out

    def attention_weights(self, x: Array, *, pattern: Pattern | None = None) -> Array:
        """What each query takes of each value: x [B, *space, D] -> [B, N, T, S], positions in raster order.

        Read off the mechanism itself, which is linear in the values, by giving key s the s-th unit vector as its value.
        NaN of one that is not: what it gives of its values is then not the values times these. Convolutions of the
        values and what `finish` does are not in it.
        """
        if pattern is None:
            query, key, value, _ = self._heads(x, grid_positions(x.shape[1:-1]), None)
        else:
            query, key, value = self._patterned_heads(x, pattern)

        def mix(value: Array) -> Array:
            if pattern is None:
                return self.mix(query, key, value, x, None)
            return self.mix_masked(query, key, value, pattern.mask)

        positions = math.prod(x.shape[1:-1])
        unit = jnp.eye(positions, dtype=self.dtype).reshape(1, *x.shape[1:-1], 1, positions)
        weights = flat(mix(jnp.broadcast_to(unit, (*key.shape[:-1], positions))))
        out = flat(mix(value)).astype(jnp.float32)
        values = jnp.repeat(flat(value), self.num_heads // self.num_key_heads, axis=2)
        expected = jnp.einsum("BTNS,BSNV->BTNV", weights, values, preferred_element_type=jnp.float32)
        is_linear = jnp.max(jnp.abs(out - expected)) <= _LINEAR * jnp.max(jnp.abs(out))
        return jnp.where(is_linear, rearrange(weights, "B T N S -> B N T S"), jnp.nan)

    def init_cache(self, batch: int, max_length: int) -> MixerCache:
        """An empty cache for decoding up to max_length tokens. Raises ValueError with its decoding_refusal."""
        if not self.decodes:
            raise ValueError(self.decoding_refusal)
        max_length = check_int("max_length", max_length, least=1)
        convolved = {name: layer.init_cache(batch) for name, layer in self._convolutions().items()}
        return MixerCache(jnp.zeros((), jnp.int32), self.init_mechanism_cache(batch, max_length), convolved)

    @under_auto_axes(lambda self, cache, x: (spec_of(x), specs_of(cache)))
    def step(self, cache: MixerCache, x: Array) -> tuple[Array, MixerCache]:
        """The next token x [B, 1, D] -> (y [B, 1, D], cache). Equals the call on the whole sequence there.

        A token past what the cache is for gives NaN, unless the cache keeps no less for it: a state, or a whole window.
        """
        convolved: dict[str, Array] = {}

        def convolve(name: str, channels: Array) -> Array:
            out, convolved[name] = getattr(self, name).step(cache.convolved[name], channels)
            return out

        query, key, value, added = self._heads(x, cache.position[..., None, None], None, convolve)
        out, mechanism = self.mechanism_step(cache.mechanism, query, key, value, x)
        self._check_heads("mechanism_step", out, query, value)
        out, capacity = self.finish(out, value, x) + added, self.mechanism_capacity(cache.mechanism)
        if capacity is not None:
            out = jnp.where(cache.position.reshape(-1, 1, 1, 1) < capacity, out, jnp.nan)
        return self.output(out), MixerCache(cache.position + 1, mechanism, convolved)

    @under_auto_axes(lambda self, cache, x, lengths=None: (spec_of(x), specs_of(cache)))
    def prefill(self, cache: MixerCache, x: Array, lengths: Array | None = None) -> tuple[Array, MixerCache]:
        """A prompt x [B, P, D] at once -> (y [B, P, D], cache), as step gives them of it token by token.

        cache: an empty one, which the prompt fits into. lengths: integers [B], 1 to P: the row's tokens, padding after
          them, for which y means nothing; the next step then is at position lengths. None: P in all rows.
        """
        batch, length, _ = x.shape
        lengths = check_lengths(lengths, batch, most=length)
        convolved: dict[str, Array] = {}

        def convolve(name: str, channels: Array) -> Array:
            out, convolved[name] = getattr(self, name).prefill(channels, lengths)
            return out

        query, key, value, added = self._heads(x, grid_positions((length,)), None, convolve)
        capacity = self.mechanism_capacity(cache.mechanism)
        require(capacity is None or length <= capacity, "x", shape_text(x), f"the cache was made for {capacity} tokens")
        out, mechanism = self._prefill(cache.mechanism, query, key, value, x, lengths)
        self._check_heads("mechanism_prefill", out, query, value)
        position = jnp.asarray(length, jnp.int32) if lengths is None else lengths
        return self.output(self.finish(out, value, x) + added), MixerCache(position, mechanism, convolved)

    @property
    def _prefill(self) -> Callable[..., tuple[Array, Any]]:
        """mechanism_prefill, unless it is another class's than the steps are: it would not know of their cache."""
        parts = ("mechanism_prefill", "mechanism_step", "init_mechanism_cache")
        depths = [next(i for i, cls in enumerate(type(self).__mro__) if part in vars(cls)) for part in parts]
        if depths[0] > min(depths):
            return functools.partial(Attention.mechanism_prefill, self)
        return self.mechanism_prefill

    def _convolutions(self) -> dict[str, DepthwiseConvolution]:
        names = ("query_convolution", "key_convolution", "value_convolution", "residual_convolution")
        return {name: layer for name in names if (layer := getattr(self, name)) is not None}

    def state_size(self, length: int) -> int | None:
        """Numbers kept per example to decode the token after `length` tokens; None if it does not decode."""
        if not self.decodes:
            return None
        kept = jax.tree.leaves(jax.eval_shape(lambda: self.init_cache(1, length)))
        return sum(leaf.size for leaf in kept if jnp.issubdtype(leaf.dtype, jnp.floating))

    def flops(self, space: tuple[int, ...], *, pairs: int | None = None) -> int:
        """Floating-point operations of matrix products (2 per multiply-add) for one example of this space, forward.

        pairs: of a query and a key that it sees, where a pattern is given.
        """
        # Query and output, key and value.
        channels = (self.num_heads + self.num_key_heads) * (self.head_dim + self.value_dim)
        convolutions = sum(layer.taps * layer.features for layer in self._convolutions().values())
        positions = math.prod(space)
        if pairs is None:
            mechanism = check_float(f"{type(self).__name__}.mechanism_flops", self.mechanism_flops(space), least=0)
        else:
            require(not self.pattern_refusal, "pattern", "one", f"but {self.pattern_refusal}")
            mechanism = self.pair_flops(pairs)
        return 2 * positions * (self.features * channels + convolutions) + int(mechanism)

    def pair_flops(self, pairs: int) -> int:
        """Scores and weighted values for this many (query, key) pairs in every head."""
        return 2 * pairs * self.num_heads * (self.head_dim + self.value_dim)


# A mixer as models take it: a class above with its options bound, called as mixer(features, is_causal=..., dtype=...).
MixerFactory = Callable[..., Attention]


def check_mixers(mixers: Any, use: str) -> None:
    """Raises TypeError or ValueError for what is no list of mixer factories; use: what becomes of them."""
    if not isinstance(mixers, (list, tuple)) or not all(map(_makes_mixers, mixers)):
        raise TypeError(f"mixers: got {shown(mixers)}; need a list of mixers, which are called to make the layers")
    require(len(mixers) > 0, "mixers", "an empty list", f"need at least one mixer, {use}")


def _makes_mixers(factory: Any) -> bool:
    """Whether it may be a mixer's class, or a function that makes one."""
    made = getattr(factory, "func", factory)  # of a partial
    return issubclass(made, Attention) if isinstance(made, type) else callable(made)


def make_mixer(factory: MixerFactory, features: int, *, is_causal: bool, dtype: Any) -> Attention:
    mixer = factory(features, is_causal=is_causal, dtype=dtype)
    if not isinstance(mixer, Attention):
        raise TypeError(f"mixers: got what makes {shown(mixer)}; need subclasses of attnlab.nn.Attention")
    return mixer


def check_weights(mixer: str, weights: Array) -> None:
    """Raises ValueError for attention_weights, computed, of a mixer of this name that has none."""
    given = f"{mixer}, which is not linear in its values"
    require(not bool(jnp.isnan(weights).any()), "mixers", given, "so no weights say what a query takes of each")


def flat(heads: Array) -> Array:
    """[B, *space, N, H] -> [B, T, N, H] in raster order."""
    return heads.reshape(heads.shape[0], -1, *heads.shape[-2:])
