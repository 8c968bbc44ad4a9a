"""Kernels of a step of decoding, in TPU interpret mode, against the steps in plain JAX."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from marks import slow_but

import attnlab
from kernels_pallas.tpu import cached_flash
from kernels_pallas.tpu.cached_flash import cached_flash_attention


def draw(*shape, dtype=jnp.float32, seed=0):
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape), dtype)


def token(batch, heads, key_heads, head_dim, value_dim, dtype=jnp.float32, seed=0, tokens=1):
    widths = [(heads, head_dim), (key_heads, head_dim), (key_heads, value_dim)]
    shapes = [(batch, tokens, *width) for width in widths]
    return [draw(*shape, dtype=dtype, seed=seed + number) for number, shape in enumerate(shapes)]


def local(
    fill, *, window, sinks=0, stride=1, heads=4, key_heads=2, dims=(16, 24), dtype=jnp.float32, batch=2, tokens=1
):
    """A step of these tokens after `fill` of them; slots that none has written hold numbers, as they might."""
    cache = attnlab.init_local_cache(
        batch, key_heads, dims[0], window=window, sinks=sinks, value_dim=dims[1], dtype=dtype
    )
    key, value = (draw(*x.shape, dtype=dtype, seed=7) for x in cache[:2])
    step = functools.partial(attnlab.local_step, window=window, sinks=sinks, stride=stride)
    return (
        step,
        cache._replace(key=key, value=value, position=jnp.int32(fill)),
        token(batch, heads, key_heads, *dims, dtype, tokens=tokens),
    )


def capped(case, heads):
    """A step with a softcap and learned sinks."""
    step, *rest = case
    sinks = jnp.linspace(-1, 2, heads).at[0].set(-jnp.inf)
    return functools.partial(step, softcap=0.7, sink_logits=sinks), *rest


def softmax(fill, *, length, heads=4, key_heads=1, dims=(16, 16), dtype=jnp.float32, batch=1, tokens=1):
    cache = attnlab.init_dot_product_cache(batch, length, key_heads, dims[0], value_dim=dims[1], dtype=dtype)
    key, value = (draw(*x.shape, dtype=dtype, seed=7) for x in cache[:2])
    cache = cache._replace(key=key, value=value, length=jnp.int32(fill))
    return attnlab.dot_product_step, cache, token(batch, heads, key_heads, *dims, dtype, tokens=tokens)


def dilated(fill, *, window, dilation):
    cache = attnlab.init_dilated_cache(1, 2, 16, window=window, dilation=dilation)
    key, value = (draw(*x.shape, seed=7) for x in cache[:2])
    step = functools.partial(attnlab.dilated_step, window=window, dilation=dilation)
    return step, cache._replace(key=key, value=value, position=jnp.int32(fill)), token(1, 2, 2, 16, 16)


def local_linear(fill, *, slots, window=None, heads=4, key_heads=2, dims=(16, 24), dtype=jnp.float32, batch=2):
    """Slots that none has written hold NaN."""
    cache = attnlab.init_local_linear_cache(
        batch, slots, key_heads, dims[0], window=window, value_dim=dims[1], dtype=dtype
    )
    is_used = (jnp.arange(slots) < fill)[None, :, None, None]
    key, value = (jnp.where(is_used, draw(*x.shape, dtype=dtype, seed=7) + 1, jnp.nan) for x in cache[:2])
    step = functools.partial(attnlab.local_linear_step, ridge=jnp.linspace(0.5, 2, heads), window=window)
    cache = cache._replace(key=key, value=value, length=jnp.int32(fill))
    return step, cache, token(batch, heads, key_heads, *dims, dtype)


def at_rows(case, fills):
    """A step after prompts of their own lengths."""
    step, cache, tokens = case
    return step, cache._replace(**{cache._fields[-1]: jnp.array(fills, jnp.int32)}), tokens


CACHES = {
    "first token": lambda: local(0, window=40),
    "full, wrapped": lambda: local(300, window=40),
    "sinks": lambda: local(45, window=33, sinks=4),
    "stride": lambda: local(45, window=16, stride=4),
    "many blocks": lambda: local(1000, window=700, key_heads=4, batch=1),
    "blocks unused": lambda: local(300, window=1500, key_heads=2, batch=1),
    "three key heads": lambda: local(1000, window=900, heads=6, key_heads=3, batch=1),
    "bfloat16": lambda: local(300, window=129, dims=(64, 64), dtype=jnp.bfloat16),
    "softmax": lambda: softmax(100, length=3000),
    "softmax, past the end": lambda: softmax(50, length=50),
    "rows of their own": lambda: at_rows(local(0, window=1500, sinks=2), [3, 900]),
    "tokens": lambda: softmax(100, length=1100, key_heads=2, tokens=3),
    "as many tokens as one step takes": lambda: local(7, window=33, sinks=2, batch=1, tokens=16),
    "tokens, bfloat16": lambda: softmax(30, length=130, key_heads=4, dims=(64, 64), dtype=jnp.bfloat16, tokens=8),
    "tokens of rows of their own": lambda: at_rows(softmax(0, length=3000, batch=2, tokens=4), [2990, 5]),
    "softcap and learned sinks": lambda: capped(local(45, window=33, sinks=4, tokens=3), 4),
    "softcap and learned sinks, bfloat16": lambda: capped(softmax(30, length=3000, dtype=jnp.bfloat16), 4),
    "dilated": lambda: dilated(50, window=6, dilation=3),
    "routing": lambda: routing([3, 0, 40], window=9),
    "routing, shared": lambda: routing([0, 1, 7], window=7, share_qk=True, scale=3.0),
    "routing, layer": lambda: routing([200, 140, 0], window=150, heads=3, normalize="layer", dims=(64, 130)),
    "routing, bfloat16": lambda: routing([200, 100], window=150, heads=4, batch=1, dtype=jnp.bfloat16),
    "local linear": lambda: local_linear(30, slots=40),
    "local linear, first token": lambda: local_linear(0, slots=40, heads=2),
    "local linear, full window": lambda: local_linear(700, slots=600, window=600, heads=6, key_heads=3, batch=1),
    "local linear, past the end": lambda: local_linear(9, slots=9, batch=1),
    "local linear, bfloat16": lambda: local_linear(200, slots=300, dims=(64, 64), dtype=jnp.bfloat16, batch=1),
    "local linear, rows of their own": lambda: at_rows(local_linear(2000, slots=2000, key_heads=1), [3, 1700]),
}
QUICK = ("sinks", "softcap and learned sinks", "three key heads", "tokens", "routing", "local linear")


@pytest.mark.parametrize("case", slow_but(QUICK, CACHES))
def test_a_step_equals_plain_jax_s(case, interpreted):
    step, cache, tokens = CACHES[case]()
    out, after = interpreted(step, cache, *tokens, implementation="pallas_tpu")
    want, want_after = step(cache, *tokens, implementation="xla")
    tolerance = 2e-2 if out.dtype == jnp.bfloat16 else 5e-5 if "linear" in case else 1e-5  # of conjugate gradients
    assert out.dtype == want.dtype
    np.testing.assert_allclose(out.astype(jnp.float32), want.astype(jnp.float32), rtol=tolerance, atol=tolerance)
    for x, y in zip(after, want_after, strict=True):
        np.testing.assert_array_equal(x.astype(jnp.float32), y.astype(jnp.float32))


@pytest.mark.long
def test_blocks_past_the_last_slot_in_use_are_not_read_each_row_its_own(interpreted):
    used = jnp.array([1500, 5000])
    query, key, value = draw(2, 1, 2, 16), draw(2, 5000, 1, 16, seed=1), draw(2, 5000, 1, 16, seed=2)
    unused = (jnp.arange(5000) >= 2048) & (used == 1500)[:, None]  # whole blocks
    key, value = (jnp.where(unused[..., None, None], jnp.nan, x) for x in (key, value))
    visible = (jnp.arange(5000) < used[:, None])[:, None]
    out = interpreted(cached_flash_attention, query, key, value, visible, used, scale=0.3)
    for row, count in enumerate(used):
        logits = 0.3 * jnp.einsum("nh,sh->ns", query[row, 0], key[row, :count, 0])
        np.testing.assert_allclose(out[row, 0], jax.nn.softmax(logits) @ value[row, :count, 0], atol=1e-5)


@pytest.mark.parametrize("scale", slow_but([-0.7], [-0.7, 0.0, 30.0]))
def test_any_scale(scale, interpreted):
    step, cache, tokens = CACHES["sinks"]()
    step = functools.partial(step, scale=scale)
    out, _ = interpreted(step, cache, *tokens, implementation="pallas_tpu")
    np.testing.assert_allclose(out, step(cache, *tokens, implementation="xla")[0], rtol=1e-5, atol=1e-5)


@pytest.mark.slow  # the fast tests hold the same seam with a linear step, below
def test_a_step_of_local_attention_has_gradients(interpreted):
    step, cache, tokens = CACHES["sinks"]()

    def gradients(implementation):
        return jax.grad(
            lambda *tokens: jnp.sum(step(cache, *tokens, implementation=implementation)[0] ** 2), (0, 1, 2)
        )(*tokens)

    for got, want in zip(interpreted(gradients, "pallas_tpu"), gradients("xla"), strict=True):
        np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-5)


LINEAR = {
    "plain": lambda: linear(),
    "taylor2, normalised": lambda: linear(feature_map="taylor2", normalize=True, head_dim=8),
    "decay per head": lambda: linear(decay="head"),
    "decay per token, bfloat16": lambda: linear(decay="token", dtype=jnp.bfloat16),
    "decay per channel, delta": lambda: linear(decay="channel", delta=True, value_dim=130),
    "gated delta, one head": lambda: linear(decay="token", delta=True, heads=1, key_heads=1),
    "seven heads": lambda: linear(heads=7, key_heads=7),
    "sixteen heads": lambda: linear(heads=16, key_heads=4, decay="channel"),
    "agents": lambda: agents(9),
    "agents, first token": lambda: agents(0, heads=3, key_heads=1),
    "agents, bfloat16": lambda: agents(40, heads=16, dtype=jnp.bfloat16),
}
QUICK_LINEAR = ("agents", "taylor2, normalised", "decay per token, bfloat16", "decay per channel, delta")


def routing(fills, *, window, heads=2, key_heads=1, dims=(16, 24), dtype=jnp.float32, batch=2, **options):
    """With so many keys in each cluster; slots that none has written hold NaN."""
    centroids = draw(heads, len(fills), dims[0], seed=4)
    state = attnlab.RoutingState(centroids, jnp.ones(centroids.shape[:2]), centroids)
    cache = attnlab.init_routing_cache(batch, heads, len(fills), dims[0], window=window, value_dim=dims[1], dtype=dtype)
    counts = jnp.broadcast_to(jnp.array(fills, jnp.int32), cache.counts.shape)
    is_used = (jnp.arange(window) < counts[..., None])[..., None]
    key, value = (jnp.where(is_used, draw(*x.shape, dtype=dtype, seed=7), jnp.nan) for x in cache[:2])
    step = functools.partial(attnlab.routing_step, state=state, **options)
    cache = attnlab.RoutingCache(key, value, counts)
    return step, cache, token(batch, heads, key_heads, *dims, dtype)


def agents(fill, *, heads=4, key_heads=2, dims=(16, 24), dtype=jnp.float32, batch=2):
    """After `fill` tokens."""
    seen = draw(5, heads, dims[0], seed=4)
    tokens = [draw(batch, fill + 1, *x.shape[2:], dtype=dtype) for x in token(batch, heads, key_heads, *dims)]
    state = attnlab.init_agent_cache(batch, heads, 5, dims[1])
    if fill:
        before = (x[:, :fill] for x in tokens)
        _, state = attnlab.causal_agent_attention(*before, seen, return_state=True, implementation="reference")
    return functools.partial(attnlab.agent_step, agents=seen), state, [x[:, fill:] for x in tokens]


def linear(
    *, heads=4, key_heads=2, head_dim=16, value_dim=24, decay=None, delta=False, dtype=jnp.float32, batch=2, **options
):
    state = attnlab.init_linear_cache(batch, heads, head_dim, value_dim, **options)
    state = jax.tree.map(lambda x: jnp.abs(draw(*x.shape, seed=5)), state)
    query, key, value = token(batch, heads, key_heads, head_dim, value_dim, dtype)
    shape = {"head": (heads,), "token": (batch, 1, heads), "channel": (batch, 1, heads, head_dim)}.get(decay)
    gates = {} if shape is None else {"log_decay": -jnp.abs(draw(*shape, seed=8))}
    gates |= {"beta": jax.nn.sigmoid(draw(batch, 1, heads, seed=9))} if delta else {}
    return functools.partial(attnlab.linear_step, **gates, **options), state, (query, key / 4, value)


@pytest.mark.parametrize("case", slow_but(QUICK_LINEAR, LINEAR))
def test_a_linear_step_equals_plain_jax_s(case, interpreted):
    step, state, tokens = LINEAR[case]()
    got = interpreted(step, state, *tokens, implementation="pallas_tpu")
    want = step(state, *tokens, implementation="xla")
    tolerance = 1e-2 if got[0].dtype == jnp.bfloat16 else 1e-5
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        assert a.dtype == b.dtype
        a, b = np.asarray(a, np.float32), np.asarray(b, np.float32)
        np.testing.assert_allclose(a, b, rtol=tolerance, atol=tolerance * np.abs(b).max())


@pytest.mark.slow  # they are the xla form's, of which the fast tests hold them
def test_a_linear_step_has_gradients(interpreted):
    step, state, tokens = linear(decay="token", delta=True)

    def gradients(implementation):
        def loss(state, tokens):
            out, after = step(state, *tokens, implementation=implementation)
            return jnp.sum(out**2) + jnp.sum(after.kv**3)

        return jax.grad(loss, (0, 1))(state, tokens)

    for got, want in zip(
        jax.tree.leaves(interpreted(gradients, "pallas_tpu")), jax.tree.leaves(gradients("xla")), strict=True
    ):
        np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-4)


def test_what_a_step_cannot_serve_it_names():
    step, cache, tokens = local(3, window=4)
    with pytest.raises(ValueError, match="needs query and cache all bfloat16 or all float32, got float16"):
        step(cache, *(x.astype(jnp.float16) for x in tokens), implementation="pallas_tpu")
    with pytest.raises(ValueError, match="no such name"):
        step(cache, *tokens, implementation="cuda")
    wide = jax.ShapeDtypeStruct((1, 4096, 8, 4096), jnp.float32)
    step, cache, tokens = local(3, window=4, tokens=17)
    with pytest.raises(ValueError, match="serves up to 16 tokens a step, got 17"):
        step(cache, *tokens, implementation="pallas_tpu")
    with pytest.raises(ValueError, match=r"needs query and cache all bfloat16|serves one token a step, got 17"):
        step(cache, *tokens, implementation="pallas_gpu")
    step, cache, tokens = local(3, window=4)
    for option, reason in (({"softcap": 2.0}, "softcap"), ({"sink_logits": jnp.zeros(4)}, "sink_logits in a step")):
        with pytest.raises(ValueError, match=f"has no {reason}"):
            step(cache, *tokens, **option, implementation="pallas_gpu")
    assert "MiB of VMEM" in cached_flash.refusal(jax.ShapeDtypeStruct((1, 1, 64, 4096), jnp.float32), wide, wide)
    step, state, tokens = linear(head_dim=2048, value_dim=2048, heads=1, key_heads=1, batch=1)
    with pytest.raises(ValueError, match="MiB of VMEM"):
        step(state, *tokens, implementation="pallas_tpu")
