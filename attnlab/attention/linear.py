"""Linear attention: a state of fixed size in place of the keys seen so far.

With q_t, k_t after the feature map, log decay g_t <= 0 and scale s, token t does

    S~  = e^{g_t} S_{t-1}                     z_t = e^{g_t} z_{t-1} + k_t
    u_t = v_t                                 or, with the delta rule,  u_t = beta_t (v_t - S~^T k_t)
    S_t = S~ + k_t u_t^T                      or, with erase (r, w),    S_t = S~ - w_t (r_t^T S~) + k_t v_t^T
    o_t = s q_t^T S_t                         or, normalised,           o_t = s q_t^T S_t / (s q_t^T z_t + eps)

g_t is a number per head or one per channel of the key. Published cases: linear transformers (Katharopoulos et al. 2020:
no decay, "elu", normalised), RetNet (Sun et al. 2023) and Lightning Attention (Qin et al. 2024) (constant decay),
Mamba-2 (Dao and Gu 2024) (decay per token), GLA (Yang et al. 2023) (per channel), Based (Arora et al. 2024) ("taylor2",
normalised), DeltaNet (Yang et al. 2024) (beta), Gated DeltaNet (Yang et al. 2024) (beta and decay), Kimi Delta
Attention (Zhang et al. 2025) (beta and decay per channel), RWKV-7 (Peng et al. 2025) (erase: r = kappa e^-g,
w = a kappa).

A chunk of C tokens at once, with D_ij = g_{j+1} + ... + g_i and the state S_0 before the chunk:

    U   = (I + tril(beta KK^T * e^D, -1))^{-1} beta (V - (e^{D_i0} K) S_0)     (U = V without the delta rule)
    O   = s [ tril(QK^T * e^D) U + (e^{D_i0} Q) S_0 ]
    S_C = e^{D_C0} S_0 + (e^{D_Cj} K)^T U

and with erase, of which the delta rule is r = k, w = beta k, v = beta v:

    Z   = (I + tril(RW^T * e^D, -1))^{-1} (tril(RK^T * e^D, -1) V + (e^{D_i0} R) S_0)
    O   = s [ tril(QK^T * e^D) V - tril(QW^T * e^D) Z + (e^{D_i0} Q) S_0 ]
    S_C = e^{D_C0} S_0 + (e^{D_Cj} K)^T V - (e^{D_Cj} W)^T Z

Every exponent is computed as a sum of log decays, never as a difference of two cumulative sums: it is <= 0 as it
stands, loses no digits behind a strong decay, and a segment's first token drops the state by a decay of e^-1e30 = 0.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from attnlab.attention._dispatch.choice import Implementations, dispatch
from attnlab.attention._dispatch.exchange import (
    Parts,
    alike,
    as_one,
    moved,
    over_positions,
    positions_below,
    states_before,
)
from attnlab.attention._dispatch.primitive import primitive
from attnlab.attention._kernels import linear as kernels
from attnlab.attention._shared.checks import (
    Array,
    accumulator_dtype,
    check_array,
    check_bool,
    check_dtype,
    check_floating,
    check_int,
    check_lengths,
    check_query_key_value,
    check_segment_ids,
    check_sizes,
    check_step,
    check_type,
    default_scale,
    require,
    shape_text,
    shown,
)
from attnlab.attention._shared.chunks import (
    decayed_products,
    decays_of_chunk,
    drop_at_starts,
    inverse_of_unit_lower,
    scan_chunks,
    segment_starts,
)
from attnlab.attention._shared.feature_maps import FeatureMap, apply_feature_map, feature_width, normalizer_epsilon
from attnlab.attention._shared.finite import (
    finite_or_zero,
    is_spoilt,
    spoil,
    spoilt_since,
    spoilt_tokens,
    state_is_spoilt,
)
from attnlab.attention._shared.heads import repeat_key_heads
from attnlab.attention._shared.passage import dropped, entered, from_state, joined, passage_of, to_state
from attnlab.attention._shared.recurrence import LinearInputs, LinearOptions, LinearState

# (inputs, options=) -> (out, the state after it), of finite arrays.
_Attend = Callable[..., tuple[Array, LinearState]]


@primitive("B*N.", "B*N if return_lse", "BN..", "BN.")
def linear_attention(
    query: Array,
    key: Array,
    value: Array,
    *,
    is_causal: bool = True,
    log_decay: Array | None = None,
    beta: Array | None = None,
    erase: tuple[Array, Array] | None = None,
    feature_map: FeatureMap = None,
    normalize: bool = False,
    scale: float | None = None,
    initial_state: LinearState | None = None,
    return_state: bool = False,
    return_lse: bool = False,
    lengths: Array | None = None,
    segment_ids: Array | None = None,
    chunk_size: int = 64,
    implementation: str | None = None,
) -> Any:
    """Linear attention in all its published recurrences; the module's docstring has the formulas.

    Args:
      query: [B, T, N, H], floating.
      key: [B, T, K, H]; N a multiple of K, and key head n // (N/K) serves query head n.
      value: [B, T, K, V].
      is_causal: False sums over all tokens of the sequence (of the segment); decay and beta then mean nothing and are
        refused, as is erase.
      log_decay: natural log of the decay, <= 0: [N] constant, [B, T, N] per token, [B, T, N, F] per channel. Applied
        before the token writes, so token t's own key does not decay at t. Positive values cannot be seen at trace time;
        they let the state grow without bound. -inf drops the state.
      beta: [B, T, N], strength of the delta rule's correction, usually in [0, 1] with keys of unit length.
      erase: (read, write), [B, T, N, F] each: before the token writes, what `read` finds in the decayed state is taken
        out along `write`. The state stays bounded where I - write read^T shrinks, as with 0 <= write . read <= 2 of
        parallel vectors. Not mapped by feature_map; not with beta or normalize, nor a state with a sum of keys.
      feature_map: applied to query and key in float32, before the scale. None: identity; "elu": elu(x) + 1; "relu";
        "taylor2": features whose product is 1 + x + x^2/2 at x = scale q.k (here alone the scale goes inside); or a
        function [..., H] -> [..., F] that treats tokens alike.
      normalize: divide by s q.z + eps, z the decayed sum of keys, eps 1e-10 (1e-6 for "taylor2"). Sensible for
        features >= 0; not with beta or erase.
      scale: of the output, default H ** -0.5 with H of the query as given.
      initial_state: state before the first token (see init_linear_cache). Default zeros.
      return_state: also return the state after the last token.
      return_lse: also return log(s q.z), with which `merge_attention` puts keys of other forms under one denominator.
        Needs normalize. Query and sums are then float32: "pallas_gpu" refuses them.
      lengths: [B] integers, 0 to T: the row's tokens, padding after them, which leaves the state alone. Outputs of
        padding mean nothing. Default: T in all rows.
      segment_ids: [B, T] integers for packed sequences, each segment one run of equal ids: the state is dropped where
        the id changes. The initial state goes into the row's first segment, the returned state is the last segment's.
      chunk_size: tokens taken at once by "xla".
      implementation: "reference" (a scan over tokens; where not causal, dense weights), "xla" (a scan over chunks),
        "pallas_tpu" (bfloat16 or float32; chunks of 128; not causal without segment_ids), "pallas_gpu" (Hopper; causal;
        bfloat16 or float16; up to 256 features and value channels; chunks of 64) or None to choose by platform. Kernels
        serve no erase.

    Returns:
      [B, T, N, V] in query's dtype; with return_lse then [B, T, N] in float32 (float64 for float64), -inf where a query
      has seen no key and NaN where its weights add up to less than 0; with return_state then a LinearState. A token
      that is not finite makes NaN of what sees it, and of nothing else: outputs before it and of other segments, and
      their gradients, are finite.

    Raises:
      ValueError, TypeError: at trace time, naming the argument.

    Complexity of "xla", per head: O(T (C (F + V) + F V)) time; O(T (H + V)) memory, and for gradients one state per
    chunk more, O(T F V / C); no T x T buffer.
    """
    check_query_key_value(query, key, value, needs_tokens=not is_causal)  # none leave the state alone
    batch, length, heads, head_dim = query.shape
    is_causal, normalize = check_bool("is_causal", is_causal), check_bool("normalize", normalize)
    return_state, return_lse = check_bool("return_state", return_state), check_bool("return_lse", return_lse)
    require(normalize or not return_lse, "return_lse", True, "needs normalize=True: there is no sum of weights")
    _check_options(query, log_decay, beta, erase, feature_map, normalize, initial_state, value.shape[-1])
    if not is_causal:
        for name, given in (("log_decay", log_decay), ("beta", beta), ("erase", erase)):
            require(given is None, name, "some", "must be None with is_causal=False, which has no order of tokens")
    if segment_ids is not None:
        check_segment_ids("segment_ids", segment_ids, (batch, length), "[B, T]")
    chunk_size = check_int("chunk_size", chunk_size, least=1)

    dtype = accumulator_dtype(query, key, value)
    if initial_state is None:
        initial_state = init_linear_cache(
            batch, heads, head_dim, value.shape[-1], feature_map=feature_map, normalize=normalize
        )
        # Made like query: inside shard_map a scan's carry must vary over the mesh axes that its inputs vary over.
        initial_state = jax.tree.map(lambda leaf: jnp.zeros_like(query, shape=leaf.shape), initial_state)
    initial_state = jax.tree.map(lambda leaf: leaf.astype(dtype), initial_state)
    options = LinearOptions(feature_map, normalize, default_scale(scale, head_dim), is_causal, chunk_size)
    out_dtype = query.dtype
    query = query.astype(dtype) if return_lse else query  # what is returned of it is then not rounded
    inputs = LinearInputs(query, key, value, log_decay, beta, initial_state, segment_ids, erase)
    lengths = check_lengths(lengths, batch)
    # A sum of keys as one more channel: padding must not add to it, and it is returned.
    sums_apart = initial_state.k_sum is not None and (lengths is not None or return_lse)
    if sums_apart:
        inputs, options = _with_sums(inputs), options._replace(normalize=False)
    if lengths is not None:
        inputs = _without_padding(inputs, lengths)
    attend = functools.partial(dispatch, "linear_attention", IMPLEMENTATIONS, implementation)
    of_decay = None if inputs.log_decay is None else {1: "N", 3: "B*N", 4: "B*N."}[inputs.log_decay.ndim]
    of_state = LinearState("BN..", None if inputs.state.k_sum is None else "BN.")  # type: ignore[arg-type]
    out, state = over_positions(
        functools.partial(_whole, attend, options),
        functools.partial(_parted if is_causal else _parted_sums, attend, options),
        ("B*N.", "B*K.", "B*K.", of_decay, "B*N", of_state, "B*", None if erase is None else ("B*N.", "B*N.")),
        ("B*N.", of_state),
        *inputs,
    )
    lse: Array | None = None
    if sums_apart:
        state = LinearState(state.kv[..., :-1], state.kv[..., -1])
        total = out[..., -1:] + normalizer_epsilon(feature_map) if normalize else 1
        if return_lse:
            is_none = out[..., -1] == 0
            lse = jnp.where(is_none, -jnp.inf, jnp.log(jnp.where(is_none, 1, out[..., -1])))
        out = (out[..., :-1] / total).astype(out_dtype)
    results = (out, *((lse,) if return_lse else ()), *((state,) if return_state else ()))
    return results if len(results) > 1 else out


def _whole(attend: _Attend, options: LinearOptions, *arrays: Any) -> tuple[Array, LinearState]:
    inputs = LinearInputs(*arrays)
    out, state = attend(_finite(inputs), options=options)
    at_tokens, at_end = _spoilt(inputs, state_is_spoilt(inputs.state), options.is_causal)
    return spoil(out, at_tokens), jax.tree.map(lambda leaf: spoil(leaf, at_end), state)


def init_linear_cache(
    batch: int,
    num_heads: int,
    head_dim: int,
    value_dim: int | None = None,
    *,
    feature_map: FeatureMap = None,
    normalize: bool = False,
    dtype: Any = jnp.float32,
) -> LinearState:
    """The empty state for linear_step and linear_attention's initial_state; feature_map and normalize as in the call.

    num_heads: the query's. head_dim: of query and key before the feature map. value_dim: default head_dim.
    """
    value_dim, dtype = head_dim if value_dim is None else value_dim, check_dtype("dtype", dtype)
    batch, num_heads, head_dim, value_dim = check_sizes(
        batch=batch, num_heads=num_heads, head_dim=head_dim, value_dim=value_dim
    )
    normalize = check_bool("normalize", normalize)
    features = feature_width(feature_map, head_dim)
    kv = jnp.zeros((batch, num_heads, features, value_dim), dtype)
    return LinearState(kv, jnp.zeros((batch, num_heads, features), dtype) if normalize else None)


@primitive("B*N.", like="state")
def linear_step(
    state: LinearState,
    query: Array,
    key: Array,
    value: Array,
    *,
    log_decay: Array | None = None,
    beta: Array | None = None,
    erase: tuple[Array, Array] | None = None,
    feature_map: FeatureMap = None,
    normalize: bool = False,
    scale: float | None = None,
    implementation: str | None = None,
) -> tuple[Array, LinearState]:
    """One more token: linear_attention's next output and state, in O(F V) per head.

    Args:
      state: from init_linear_cache, an earlier step, or linear_attention(..., return_state=True).
      query, key, value: [B, 1, N, H], [B, 1, K, H], [B, 1, K, V].
      log_decay: [N], [B, 1, N] or [B, 1, N, F]. beta: [B, 1, N]. erase: [B, 1, N, F] each. The rest
        as in linear_attention.
      implementation: "xla", "pallas_tpu", "pallas_gpu" or None.

    Returns:
      ([B, 1, N, V] in query's dtype, the state after this token).
    """
    check_step(query, key, value)
    normalize = check_bool("normalize", normalize)
    check_type("state", state, LinearState, "init_linear_cache")
    _check_options(query, log_decay, beta, erase, feature_map, normalize, state, value.shape[-1], state_name="state")
    state = jax.tree.map(lambda leaf: leaf.astype(accumulator_dtype(query, key, value)), state)
    state = _dropped(state, log_decay)
    return dispatch(
        "linear_step",
        STEP_IMPLEMENTATIONS,
        implementation,
        LinearInputs(query, key, value, log_decay, beta, state, erase=erase),
        options=LinearOptions(feature_map, normalize, default_scale(scale, query.shape[-1])),
    )


def _dropped(state: LinearState, log_decay: Array | None) -> LinearState:
    """The state without what a log decay of -inf, [N], [B, 1, N] or [B, 1, N, F], drops of it, NaN too."""
    if log_decay is None:
        return state
    of_heads = log_decay[None, None] if log_decay.ndim == 1 else log_decay
    drops = (of_heads[:, 0] == -jnp.inf).reshape(*of_heads.shape[:1], of_heads.shape[2], -1)
    k_sum = None if state.k_sum is None else jnp.where(drops, 0, state.k_sum)
    return LinearState(jnp.where(drops[..., None], 0, state.kv), k_sum)


def retention_log_decay(num_heads: int, dtype: Any = jnp.float32) -> Array:
    """RetNet's constant decays: [N] of log(1 - 2^(-5-h)), h = 0 .. N-1 (Sun et al. 2023)."""
    (num_heads,), dtype = check_sizes(num_heads=num_heads), check_dtype("dtype", dtype)
    return jnp.log1p(-jnp.exp2(-5.0 - jnp.arange(num_heads, dtype=dtype)))


def lightning_log_decay(num_heads: int, *, layer: int, num_layers: int, form: str, dtype: Any = jnp.float32) -> Array:
    """Lightning Attention's constant decays, [N], in one of the two published forms, which disagree.

    form "code": -2^(-8(h+1)/N) (1 - l/(L-1) + 1e-5), as in the released models;
    form "paper": -(8h/N) (1 - l/L); with h = 0 .. N-1 and layers l = 0 .. L-1.
    """
    num_layers, layer = check_int("num_layers", num_layers, least=1), check_int("layer", layer, least=0)
    (num_heads,), dtype = check_sizes(num_heads=num_heads), check_dtype("dtype", dtype)
    require(layer < num_layers, "layer", layer, f"need 0 <= layer < num_layers = {num_layers}")
    require(form in ("code", "paper"), "form", repr(form), 'need "code" or "paper"')
    head = jnp.arange(num_heads, dtype=dtype)
    if form == "code":
        return -jnp.exp2(-8 * (head + 1) / num_heads) * (1 - layer / max(num_layers - 1, 1) + 1e-5)
    return -(8 * head / num_heads) * (1 - layer / num_layers)


# --- What the forms share ---------------------------------------------------------------------------------------------


def _check_options(
    query: Array,
    log_decay: Array | None,
    beta: Array | None,
    erase: tuple[Array, Array] | None,
    feature_map: FeatureMap,
    normalize: bool,
    state: LinearState | None,
    value_dim: int,
    state_name: str = "initial_state",
) -> None:
    batch, length, heads, head_dim = query.shape
    features = feature_width(feature_map, head_dim)
    for name, given in (("log_decay", log_decay), ("beta", beta)):
        dtype = getattr(given, "dtype", jnp.float32)
        if not (jnp.issubdtype(dtype, jnp.floating) or jnp.issubdtype(dtype, jnp.integer)):
            raise TypeError(f"{name}: got dtype {dtype}; need real numbers")
    if log_decay is not None:
        if not hasattr(log_decay, "shape"):
            raise TypeError(f"log_decay: got {type(log_decay).__name__}; need an array [N], [B, T, N] or [B, T, N, F]")
        shapes = {1: (heads,), 3: (batch, length, heads), 4: (batch, length, heads, features)}
        require(
            log_decay.shape == shapes.get(len(log_decay.shape)),
            "log_decay",
            shape_text(log_decay),
            f"need [N] = {shapes[1]}, [B, T, N] = {shapes[3]} or [B, T, N, F] = {shapes[4]}",
        )
    if beta is not None:
        check_array("beta", beta, (batch, length, heads), "[B, T, N]")
        require(not normalize, "normalize", True, "must be False with beta: the delta rule has no sum of weights")
    if erase is not None:
        if not isinstance(erase, tuple) or len(erase) != 2:
            raise TypeError(f"erase: got {shown(erase)}; need a pair of arrays, (read, write)")
        for name, vectors in zip(("read", "write"), erase):
            check_array(f"erase, {name}", vectors, (batch, length, heads, features), "[B, T, N, F]")
            check_floating(f"erase, {name}", vectors)
        require(beta is None, "beta", "an array", "must be None with erase, which holds the delta rule")
        require(not normalize, "normalize", True, "must be False with erase, which has no sum of weights")
    if state is not None:
        check_type(state_name, state, LinearState, "init_linear_cache")
        check_array(f"{state_name}.kv", state.kv, (batch, heads, features, value_dim), "[B, N, F, V]")
        if state.k_sum is not None:
            require(erase is None, f"{state_name}.k_sum", "an array", "must be None with erase")
            check_array(f"{state_name}.k_sum", state.k_sum, (batch, heads, features), "[B, N, F]")
        require(
            state.k_sum is not None or not normalize,
            f"{state_name}.k_sum",
            None,
            "need [B, N, F] with normalize=True: init_linear_cache(..., normalize=True)",
        )


def _with_sums(inputs: LinearInputs) -> LinearInputs:
    """The sum of keys as one more channel of the values, which is 1 of tokens, and of the state."""
    value, state = inputs.value, inputs.state
    assert state.k_sum is not None
    value = jnp.concatenate([value, jnp.ones_like(value[..., :1])], axis=-1)
    state = LinearState(jnp.concatenate([state.kv, state.k_sum[..., None]], axis=-1))
    return inputs._replace(value=value, state=state)


def _without_padding(inputs: LinearInputs, lengths: Array) -> LinearInputs:
    """With zeros for padding, which do not decay. A feature map of zeros may be another number, so no sum of keys."""
    query, key, value, log_decay, beta, state, segment_ids, erase = inputs
    is_token = positions_below(lengths, query.shape[1])

    def kept(x: Array) -> Array:
        return jnp.where(is_token.reshape(*is_token.shape, *(1,) * (x.ndim - 2)), x, 0)

    if log_decay is not None:
        log_decay = kept(log_decay[None, None] if log_decay.ndim == 1 else log_decay)
    beta, erase = jax.tree.map(kept, (beta, erase))
    return LinearInputs(query, kept(key), kept(value), log_decay, beta, state, segment_ids, erase)


def _finite(inputs: LinearInputs) -> LinearInputs:
    """Zeros in place of what is not finite; a decay may be -inf."""
    query, key, value, log_decay, beta, state, segment_ids, erase = inputs
    query, key, value, beta, state, erase = jax.tree.map(finite_or_zero, (query, key, value, beta, state, erase))
    log_decay = None if log_decay is None else jnp.where(log_decay < jnp.inf, log_decay, 0)  # not NaN either
    return LinearInputs(query, key, value, log_decay, beta, state, segment_ids, erase)


def _spoilt(inputs: LinearInputs, before: Array, is_causal: bool) -> tuple[Array, Array]:
    """bool [B, T, N] and [B, N]: outputs, and the state after them, that have seen what is not finite. before: bool
    [B, N], of the state before them."""
    tokens, starts = _marks(inputs)
    seen = spoilt_since(tokens, starts, before)
    if not is_causal:
        ends = jnp.pad(starts[:, 1:], ((0, 0), (0, 1), (0, 0)))  # a segment's last token is its first one backwards
        seen = seen | spoilt_since(tokens[:, ::-1], ends[:, ::-1], jnp.zeros_like(before))[:, ::-1]
    return seen | is_spoilt(inputs.query), seen[:, -1] if seen.shape[1] else before


def _marks(inputs: LinearInputs) -> tuple[Array, Array]:
    """bool [B, T, N]: tokens that are not finite, and tokens that drop the state before them."""
    query, key, value, log_decay, beta, _, segment_ids, erase = inputs
    tokens = spoilt_tokens(key, value, query.shape[2])
    starts = jnp.zeros_like(tokens)
    if log_decay is not None:
        gates = log_decay[None, None] if log_decay.ndim == 1 else log_decay
        gates = gates if gates.ndim == 4 else gates[..., None]
        tokens, starts = tokens | (~(gates < jnp.inf)).any(-1), starts | (gates == -jnp.inf).all(-1)
    if beta is not None:
        tokens = tokens | ~jnp.isfinite(beta)
    if erase is not None:
        tokens = tokens | is_spoilt(erase[0]) | is_spoilt(erase[1])
    if segment_ids is not None:
        starts = starts | segment_starts(segment_ids)[..., None]
    return tokens, starts


# --- Over devices -----------------------------------------------------------------------------------------------------


def _parted(attend: _Attend, options: LinearOptions, parts: Parts, *arrays: Any) -> tuple[Array, LinearState]:
    """Each device's part, from the state that the parts before it leave."""
    inputs = LinearInputs(*arrays)
    finite, of_part = _finite(inputs), functools.partial(attend, options=options)
    _, starts = _marks(inputs)
    _, at_end = _spoilt(inputs, jnp.zeros_like(starts[:, 0]), options.is_causal)
    continues = None  # whether the part begins within a segment of the part before
    if (ids := inputs.segment_ids) is not None:
        continues = (moved(ids[:, -1], 1, parts) == ids[:, 0]) | (parts.number() == 0)
    own = entered(passage_of(finite, options, of_part, keeps=~starts.any(1), spoilt=at_end), continues)
    start = from_state(finite.state, state_is_spoilt(inputs.state), own)
    before, after = states_before(joined, start, own, parts)
    before = dropped(before, continues)
    out, _ = of_part(finite._replace(state=to_state(before, finite.state)))
    at_tokens, _ = _spoilt(inputs, before.spoilt > 0, options.is_causal)
    end = after()
    state = jax.tree.map(lambda leaf: spoil(leaf, end.spoilt > 0), to_state(end, finite.state))
    return spoil(out, at_tokens), state


class _Sums(NamedTuple):
    """state: [B, N, F, V], the sum of keys as one more column if there is one. wild: [B, N], how many tokens are not
    finite."""

    state: Array
    wild: Array


def _parted_sums(attend: _Attend, options: LinearOptions, parts: Parts, *arrays: Any) -> tuple[Array, LinearState]:
    """Not causal: what other parts have of the part's first segment and of its last one is added to what it has."""
    inputs = LinearInputs(*arrays)
    finite, segment_ids = _finite(inputs), inputs.segment_ids
    dtype, heads = finite.state.kv.dtype, inputs.query.shape[2]
    query, key = apply_feature_map(options.feature_map, finite.query, finite.key, options.scale, dtype)
    key, value = (repeat_key_heads(x, heads) for x in (key, finite.value.astype(dtype)))
    of_state = finite.state.kv
    if finite.state.k_sum is not None:
        value = jnp.concatenate([value, jnp.ones_like(value[..., :1])], axis=-1)
        of_state = jnp.concatenate([of_state, finite.state.k_sum[..., None]], axis=-1)
    wild = _marks(inputs)[0].astype(dtype)

    def tokens(where: Array) -> _Sums:
        """Over the tokens bool [B, T]."""
        weights = where.astype(dtype)
        return _Sums(jnp.einsum("BT,BTNF,BTNV->BNFV", weights, key, value), jnp.einsum("BT,BTN->BN", weights, wild))

    def weighed(sums: _Sums, where: Array) -> _Sums:
        """The sum over the first axis, where bool [P, B]."""
        return jax.tree.map(lambda x: jnp.einsum("PB,PB...->B...", where.astype(dtype), x), sums)

    ids = jnp.zeros_like(wild[..., 0], jnp.int32) if segment_ids is None else segment_ids
    in_first, in_last = ids == ids[:, :1], ids == ids[:, -1:]
    ends = jnp.zeros((parts.many, 2, len(ids)), ids.dtype)
    if segment_ids is not None:
        ends = jax.lax.all_gather(jnp.stack([ids[:, 0], ids[:, -1]]), parts.names)
    firsts, lasts = as_one(lambda x: jax.lax.all_gather(x, parts.names), (tokens(in_first), tokens(in_last)))
    start = jax.tree.map(lambda x: x[None], _Sums(of_state, state_is_spoilt(inputs.state).astype(dtype)))
    number, others = parts.number(), jnp.arange(parts.many)[:, None]
    before = weighed(lasts, (others < number) & (ends[:, 1] == ids[:, 0]))
    before = jax.tree.map(jnp.add, before, weighed(start, (ends[0, 0] == ids[:, 0])[None]))
    after = weighed(firsts, (others > number) & (ends[:, 0] == ids[:, -1]))
    end = weighed(lasts, ends[:, 1] == ends[-1, 1])
    end = alike(jax.tree.map(jnp.add, end, weighed(start, (ends[0, 0] == ends[-1, 1])[None])), parts)

    own = LinearInputs(query, key, value, None, None, LinearState(before.state), segment_ids)
    out, _ = attend(own, options=options._replace(feature_map=None, normalize=False, scale=1.0))
    out += jnp.einsum("BTNF,BNFV,BT->BTNV", query, after.state, in_last.astype(dtype))
    if options.normalize:
        out = out / (out[..., -1:] + normalizer_epsilon(options.feature_map))
    out = out[..., : inputs.value.shape[-1]].astype(inputs.query.dtype)
    at_tokens, _ = _spoilt(inputs, before.wild > 0, options.is_causal)
    at_tokens = at_tokens | (in_last[..., None] & (after.wild > 0)[:, None])
    width = finite.state.kv.shape[-1]
    k_sum = None if finite.state.k_sum is None else end.state[..., width]
    state = LinearState(end.state[..., :width], k_sum)
    return spoil(out, at_tokens), jax.tree.map(lambda leaf: spoil(leaf, end.wild > 0), state)


# --- Reference --------------------------------------------------------------------------------------------------------


def _reference(inputs: LinearInputs, options: LinearOptions) -> tuple[Array, LinearState]:
    query, key, value, log_decay, beta, state, segment_ids, erase = inputs
    dtype = state.kv.dtype
    batch, length, heads, _ = query.shape
    mapped_query, key = apply_feature_map(options.feature_map, query, key, options.scale, dtype)
    key, value = (repeat_key_heads(x, heads) for x in (key, value.astype(dtype)))
    if segment_ids is None:
        segment_ids = jnp.zeros((batch, length), jnp.int32)
    eps = normalizer_epsilon(options.feature_map)

    if not options.is_causal:
        out, state = _dense(mapped_query, key, value, state, segment_ids, eps if options.normalize else None)
        return out.astype(query.dtype), state

    if log_decay is None:
        log_decay = jnp.zeros(heads, dtype)
    decay = jnp.exp(log_decay.astype(dtype))
    decay = jnp.broadcast_to(decay[..., None], (batch, length, heads, 1)) if decay.ndim < 4 else decay

    def token(state: LinearState, now: Any) -> tuple[LinearState, Array]:
        query, key, value, decay, beta, erase, start = now
        state = jax.tree.map(lambda leaf: jnp.where(jnp.expand_dims(start, range(1, leaf.ndim)), 0, leaf), state)
        kv = decay[..., None] * state.kv
        if beta is not None:
            value = beta.astype(dtype)[..., None] * (value - jnp.einsum("BNHV,BNH->BNV", kv, key))
        if erase is not None:
            read, write = (x.astype(dtype) for x in erase)
            kv = kv - jnp.einsum("BNH,BNG,BNGV->BNHV", write, read, kv)
        kv = kv + key[..., None] * value[..., None, :]
        k_sum = None if state.k_sum is None else decay * state.k_sum + key
        out = jnp.einsum("BNH,BNHV->BNV", query, kv)
        if options.normalize:
            out = out / (jnp.einsum("BNH,BNH->BN", query, k_sum)[..., None] + eps)
        return LinearState(kv, k_sum), out

    tokens = (mapped_query, key, value, decay, beta, erase, segment_starts(segment_ids))
    state, out = jax.lax.scan(token, state, jax.tree.map(lambda x: jnp.moveaxis(x, 1, 0), tokens))
    return jnp.moveaxis(out, 0, 1).astype(query.dtype), state


def _dense(
    query: Array, key: Array, value: Array, state: LinearState, segment_ids: Array, eps: float | None
) -> tuple[Array, LinearState]:
    """Not causal: all weights at once. The state given stands for tokens of the first segment. eps: to normalise."""
    same = segment_ids[:, :, None] == segment_ids[:, None, :]
    first, last = same[:, 0], same[:, -1]
    weights = jnp.einsum("BTNH,BSNH->BNTS", query, key) * same[:, None]
    out = jnp.einsum("BNTS,BSNV->BTNV", weights, value)
    out += jnp.einsum("BTNH,BNHV,BT->BTNV", query, state.kv, first)
    kv = jnp.einsum("BT,BTNH,BTNV->BNHV", last, key, value) + state.kv * first[:, -1, None, None, None]
    k_sum = None
    if state.k_sum is not None:
        k_sum = jnp.einsum("BT,BTNH->BNH", last, key) + state.k_sum * first[:, -1, None, None]
    if eps is not None:
        total = jnp.einsum("BNTS->BTN", weights) + jnp.einsum("BTNH,BNH,BT->BTN", query, state.k_sum, first)
        out = out / (total[..., None] + eps)
    return out, LinearState(kv, k_sum)


# --- XLA: a scan over chunks ------------------------------------------------------------------------------------------


def _xla(inputs: LinearInputs, options: LinearOptions) -> tuple[Array, LinearState]:
    query, key, value, log_decay, beta, state, segment_ids, erase = inputs
    batch, length, heads, _ = query.shape
    dtype = state.kv.dtype
    if log_decay is not None:
        log_decay = log_decay.astype(dtype)
        log_decay = log_decay if log_decay.ndim == 4 else jnp.broadcast_to(log_decay, (batch, length, heads))[..., None]
    beta, erase = jax.tree.map(lambda x: x.astype(dtype), (beta, erase))
    if segment_ids is not None:
        log_decay = drop_at_starts(log_decay, segment_ids, heads, dtype)
    eps = normalizer_epsilon(options.feature_map)

    def finish(out: Array, total: Array | None) -> Array:
        return out / (total[..., None] + eps) if options.normalize and total is not None else out

    def by_head(tokens: Any) -> Any:
        query, key, value, *gates = tokens
        query, key = apply_feature_map(options.feature_map, query, key, options.scale, dtype)
        key, value = (repeat_key_heads(x, heads) for x in (key, value.astype(dtype)))
        return jax.tree.map(lambda x: jnp.moveaxis(x, 2, 1), (query, key, value, *gates))

    def causal(state: LinearState, tokens: Any) -> tuple[LinearState, Array]:
        state, sums = _chunk(state, *by_head(tokens))
        return state, jnp.moveaxis(finish(*sums), 1, 2).astype(query.dtype)

    def sums_before(state: LinearState, tokens: Any, strict: bool = False) -> tuple[LinearState, Any]:
        state, sums = _chunk(state, *by_head(tokens), strict=strict)
        return state, jax.tree.map(lambda x: jnp.moveaxis(x, 1, 2), sums)

    tokens = (query, key, value, log_decay, beta, erase)
    if options.is_causal:
        state, out = scan_chunks(causal, state, tokens, options.chunk_size)
        return out, state
    if segment_ids is None:
        queries, keys, values, *_ = by_head(tokens)
        kv = state.kv + keys.mT @ values
        k_sum = None if state.k_sum is None else state.k_sum + jnp.sum(keys, axis=-2)
        out = finish(queries @ kv, None if k_sum is None else jnp.einsum("BNTH,BNH->BNT", queries, k_sum))
        return jnp.moveaxis(out, 1, 2).astype(query.dtype), LinearState(kv, k_sum)
    # A segment's sum is that of the tokens up to this one and that of the later ones, which come first backwards.
    nothing = jax.tree.map(jnp.zeros_like, state)
    state, until = scan_chunks(sums_before, state, tokens, options.chunk_size)
    resets = drop_at_starts(None, segment_ids[:, ::-1], heads, dtype)
    backwards = (*(x[:, ::-1] for x in (query, key, value)), resets, None, None)
    _, later = scan_chunks(functools.partial(sums_before, strict=True), nothing, backwards, options.chunk_size)
    return finish(*jax.tree.map(lambda x, y: x + y[:, ::-1], until, later)).astype(query.dtype), state


def _chunk(
    state: LinearState,
    query: Array,
    key: Array,
    value: Array,
    log_decay: Array | None,
    beta: Array | None,
    erase: tuple[Array, Array] | None,
    *,
    strict: bool = False,
) -> tuple[LinearState, tuple[Array, Array | None]]:
    """C tokens of every head, [B,N,C,...], log_decay [B,N,C,1 or F] -> state, (q^T S [B,N,C,V], q^T z [B,N,C])."""
    into, onward, through = query, key, None
    key_into = key
    if log_decay is not None:
        into_decay, onward_decay = decays_of_chunk(log_decay)
        into, key_into, onward = query * into_decay, key * into_decay, key * onward_decay
        through = into_decay[..., -1, :]
    if beta is not None:
        value = beta[..., None] * (value - key_into @ state.kv)
        system = jnp.tril(beta[..., None] * decayed_products(key, key, log_decay), -1)
        value = inverse_of_unit_lower(system) @ value
    weights = jnp.tril(decayed_products(query, key, log_decay), -1 if strict else 0)
    out = weights @ value + into @ state.kv
    kv = jnp.einsum("BNCH,BNCV->BNHV", onward, value)
    if erase is not None:
        read, write = erase
        read_into, write_onward = (read, write) if log_decay is None else (read * into_decay, write * onward_decay)
        found = jnp.tril(decayed_products(read, key, log_decay), -1) @ value + read_into @ state.kv
        found = inverse_of_unit_lower(jnp.tril(decayed_products(read, write, log_decay), -1)) @ found
        out -= jnp.tril(decayed_products(query, write, log_decay)) @ found
        kv -= jnp.einsum("BNCH,BNCV->BNHV", write_onward, found)
    kv += state.kv if through is None else through[..., None] * state.kv
    if state.k_sum is None:
        return LinearState(kv), (out, None)
    total = jnp.sum(weights, axis=-1) + jnp.einsum("BNCH,BNH->BNC", into, state.k_sum)
    k_sum = jnp.sum(onward, axis=-2) + (state.k_sum if through is None else through * state.k_sum)
    return LinearState(kv, k_sum), (out, total)


IMPLEMENTATIONS: Implementations = {"reference": _reference, "xla": _xla, **kernels.KERNELS}
# A step is one token of the recurrence.
STEP_IMPLEMENTATIONS: Implementations = {"xla": _reference, **kernels.STEP_KERNELS}
