"""Every mechanism of the catalog by its kernels, and calls with more options: values and gradients in TPU interpret
mode against the references."""

import functools
import pathlib
import re
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import kernels_pallas
from attnlab import (
    agent_attention,
    dot_product_attention,
    init_routing,
    local_linear_attention,
    parallax_attention,
    routing_attention,
)
from attnlab.catalog import MECHANISMS

# Rows of mechanisms that have kernels which do not serve them, and why: a table of kernels_pallas/README.md.
_README = pathlib.Path(kernels_pallas.__file__).with_name("README.md").read_text()
_TABLE = _README.partition("| row | reason |\n|---|---|\n")[2].partition("\n\n")[0]
REFUSED = dict(line.strip("| ").split(" | ") for line in _TABLE.splitlines())
# Rows whose kernels are another row's too: more of the same.
SLOW = {
    *("dot_product", "dot_product, causal", "local, causal", "local, grid", "dilated", "axial"),
    *("dot_product, softcap and learned sinks",),
    *("agent, causal", "linear", "linear, decay", "linear, decay per channel", "linear, delta rule"),
    *("linear, gated delta rule", "routing, strict", "routing, global", "local-linear", "local-linear, window"),
}


def has_kernels(mechanism):
    """Whether its module's table has any; axial attention is dot-product attention's, and has no table."""
    module = sys.modules[mechanism.function.__module__]
    return "pallas_tpu" in getattr(module, "IMPLEMENTATIONS", ("pallas_tpu",))


SERVED = [name for name, mechanism in MECHANISMS.items() if has_kernels(mechanism) and name not in REFUSED]


def catalog_inputs(name):
    arrays = MECHANISMS[name].inputs(196, batch=1, heads=2, key_heads=1, head_dim=64, value_dim=64)
    return jax.tree.map(jnp.asarray, arrays)


def draw(query_shape, key_shape=None, agents=None, dtype=jnp.float32):
    """Arrays [1, *space, N, 64] of query, key and value, and agents."""
    rng = np.random.default_rng(7)
    key_shape = key_shape or query_shape
    shapes = {"query": query_shape, "key": key_shape, "value": key_shape}
    shapes |= {"agents": (agents, query_shape[-1])} if agents else {}
    return {name: jnp.asarray(rng.normal(size=(1, *shape, 64)), dtype) for name, shape in shapes.items()}


def routed(window, clusters=4, **options):
    def attend(query, key, value, **more):
        state = init_routing(jax.random.key(0), query.shape[2], clusters, query.shape[3])
        return routing_attention(query, key, value, state, window=window, **options, **more)[0]

    return attend


def tilted(query, key, value, **options):
    """Parallax, with a probe of the queries and keys far from 0."""
    return parallax_attention(query, query[:, ::-1], key + 2, value, **options)


HIDDEN = jnp.arange(300)[None] % 3 > 0
CASES = {  # function of the arrays, the arrays
    "softmax": (dot_product_attention, draw((300, 4), (200, 2))),
    "softmax, causal": (functools.partial(dot_product_attention, is_causal=True), draw((140, 2), (270, 2))),
    "softmax, segments": (
        functools.partial(dot_product_attention, segment_ids=jnp.arange(300)[None] // 70),
        draw((300, 2), (300, 1), dtype=jnp.bfloat16),
    ),
    "agent": (agent_attention, draw((300, 2), (200, 1), agents=9)),
    "agent, keys hidden": (
        functools.partial(agent_attention, key_mask=HIDDEN),
        draw((200, 2), (300, 2), agents=9, dtype=jnp.bfloat16),
    ),
    "agent, no key": (functools.partial(agent_attention, key_mask=HIDDEN & False), draw((9, 1), (300, 1), agents=3)),
    "routing": (routed(40, is_causal=True), draw((300, 2), (300, 1))),
    "routing, not causal": (routed(200, clusters=2, key_mask=HIDDEN), draw((300, 2), dtype=jnp.bfloat16)),
    "routing, shared": (
        routed(130, is_causal=True, share_qk=True, key_mask=HIDDEN, clusters=3),
        draw((300, 2), dtype=jnp.float32),
    ),
    "routing, global": (routed(90, membership="global", normalize="layer", key_mask=HIDDEN), draw((300, 2), (300, 1))),
    "routing, global, shared": (routed(140, membership="global", is_causal=True, share_qk=True), draw((300, 2))),
    "local-linear, window": (
        functools.partial(local_linear_attention, ridge=10.0, window=40),
        draw((200, 2), (200, 1), dtype=jnp.bfloat16),
    ),
    "parallax, all keys": (functools.partial(tilted, is_causal=False), draw((300, 3))),
    "parallax, negative scale": (functools.partial(tilted, scale=-0.1, window=150), draw((300, 4), (300, 2))),
    "parallax, window": (functools.partial(tilted, window=40), draw((200, 8), (200, 2), dtype=jnp.bfloat16)),
}


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=pytest.mark.slow) if name in SLOW else name for name in SERVED]
)
@pytest.mark.long
def test_the_catalog_s_values_and_gradients_equal_the_reference_s(name, interpreted):
    mechanism = MECHANISMS[name]
    assert_equals_the_reference(mechanism, catalog_inputs(name), interpreted, tolerance_of(name))


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES)
def test_values_and_gradients_with_more_options_equal_the_reference_s(case, interpreted):
    attend, arrays = CASES[case]
    assert_equals_the_reference(
        lambda arrays, implementation: attend(**arrays, implementation=implementation),
        arrays,
        interpreted,
        tolerance_of(case),
    )


def tolerance_of(name):
    """What comes of conjugate gradients that stop at 1e-6 has a few digits less."""
    return 5e-5 if "local-linear" in name else 1e-5


def assert_equals_the_reference(attend, arrays, interpreted, tolerance=1e-5):
    """Within this share of the largest number of each array, in bfloat16 2e-2."""
    shape = jax.eval_shape(lambda arrays: attend(arrays, "reference"), arrays).shape
    weights = jnp.asarray(np.random.default_rng(1).normal(size=shape), jnp.float32)

    def run(arrays, implementation):
        def loss(arrays):
            out = attend(arrays, implementation)
            return jnp.sum(out.astype(jnp.float32) * weights), out

        return jax.grad(loss, has_aux=True)(arrays)

    got, want = interpreted(run, arrays, "pallas_tpu"), jax.jit(run, static_argnums=1)(arrays, "reference")
    tolerance = {jnp.float32: tolerance, jnp.bfloat16: 2e-2}[arrays["query"].dtype.type]
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        assert a.dtype == b.dtype
        a, b = np.asarray(a, np.float32), np.asarray(b, np.float32)
        np.testing.assert_allclose(a, b, rtol=0, atol=tolerance * max(1, np.abs(b).max()))


@pytest.mark.parametrize("name", REFUSED)
def test_rows_that_kernels_refuse_say_so(name):
    with pytest.raises(ValueError, match=re.escape(REFUSED[name])):
        jax.eval_shape(lambda arrays: MECHANISMS[name](arrays, "pallas_tpu"), catalog_inputs(name))


@pytest.mark.parametrize(
    ("attend", "options", "reason"),
    [
        (dot_product_attention, {"mask": jnp.ones((1, 1, 9, 9), bool)}, "has no mask that is an array"),
        (routed(4, share_qk=True), {}, "serves share_qk where it is causal"),
    ],
)
def test_refuses_with_the_reason(attend, options, reason):
    with pytest.raises(ValueError, match=reason):
        attend(**draw((9, 2)), **options, implementation="pallas_tpu")
