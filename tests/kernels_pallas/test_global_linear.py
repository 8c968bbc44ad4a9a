"""Linear attention that is not causal, and InLine: values and gradients of the kernels of sums in TPU interpret mode,
and what they refuse."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from marks import slow_but

from attnlab import LinearState, inline_attention, linear_attention
from kernels_pallas.aot.compile import compile_for_tpu, topology_devices
from kernels_pallas.tpu import global_linear
from kernels_pallas.tpu.common import VMEM_BUDGET

TOLERANCE = {jnp.float32: 1e-5, jnp.bfloat16: 2e-2}  # bfloat16: what is multiplied is rounded to it
linear = functools.partial(linear_attention, is_causal=False, return_state=True)
normalised = functools.partial(linear, feature_map="elu", normalize=True)


def draw(length, keys=None, *, heads=2, key_heads=1, head_dim=64, value_dim=64, dtype=jnp.float32, state=False):
    rng = np.random.default_rng(length)
    shapes = (length, heads, head_dim), (keys or length, key_heads, head_dim), (keys or length, key_heads, value_dim)
    arrays = {
        name: jnp.asarray(rng.normal(size=(2, *shape)), dtype) for name, shape in zip(("query", "key", "value"), shapes)
    }
    if state:
        kv, k_sum = (rng.uniform(1, 2, (2, heads, head_dim, *more)) for more in ((value_dim,), ()))
        arrays["initial_state"] = LinearState(jnp.asarray(kv, jnp.float32), jnp.asarray(k_sum, jnp.float32))
    return arrays


WIDE = {"heads": 16, "key_heads": 8, "head_dim": 128, "value_dim": 128}  # arrays are read as they lie
CASES = {
    "linear": (linear, draw(300, heads=4, key_heads=2)),
    "linear, bfloat16": (linear, draw(600, value_dim=40, dtype=jnp.bfloat16)),
    "linear, one token": (linear, draw(1, head_dim=3, value_dim=5)),
    "linear, taylor2": (functools.partial(linear, feature_map="taylor2"), draw(140, head_dim=16)),
    "normalised": (normalised, draw(300, state=True, heads=4, key_heads=2)),
    "normalised, as it lies": (normalised, draw(520, dtype=jnp.bfloat16, **WIDE)),
    "inline": (inline_attention, draw(300, 270, heads=4, key_heads=2, value_dim=24)),
    "inline, as it lies": (inline_attention, draw(100, 530, dtype=jnp.bfloat16, **WIDE)),
    "inline, float32 as it lies": (inline_attention, draw(260, **{**WIDE, "value_dim": 256})),
    "inline, one key": (inline_attention, draw(9, 1, dtype=jnp.bfloat16)),
}
QUICK = ("normalised", "inline, as it lies")


@pytest.mark.parametrize("case", slow_but(QUICK, CASES))
@pytest.mark.long
def test_values_states_and_gradients_equal_the_reference_s(case, interpreted):
    """The dense reference in float64, of the same numbers."""
    attend, arrays = CASES[case]
    rng = np.random.default_rng(1)
    shapes = jax.tree.leaves(jax.eval_shape(lambda arrays: attend(**arrays), arrays))
    weights = [rng.normal(size=x.shape) for x in shapes]

    def run(arrays, implementation):
        def loss(arrays):
            results = jax.tree.leaves(attend(**arrays, implementation=implementation))
            wide = jnp.promote_types(arrays["query"].dtype, jnp.float32)
            return sum(jnp.sum(x.astype(wide) * jnp.asarray(w, wide)) for x, w in zip(results, weights)), results

        return jax.grad(loss, has_aux=True)(arrays)

    got = interpreted(run, arrays, "pallas_tpu")
    with jax.enable_x64(True):
        exact = jax.tree.map(lambda x: jnp.asarray(np.asarray(x, np.float64)), arrays)
        want = jax.tree.map(np.asarray, run(exact, "reference"))
    dtypes = [x.dtype for x in (*jax.tree.leaves(arrays), *shapes)]
    tolerance = TOLERANCE[arrays["query"].dtype.type]
    for a, b, dtype in zip(jax.tree.leaves(got), jax.tree.leaves(want), dtypes, strict=True):
        assert a.dtype == dtype
        np.testing.assert_allclose(np.asarray(a, np.float64), b, rtol=0, atol=tolerance * max(1, np.abs(b).max()))


@pytest.mark.long
def test_runs_give_the_same_bits(interpreted):
    def run(arrays):
        def loss(arrays):
            return inline_attention(**arrays, implementation="pallas_tpu").astype(jnp.float32).sum()

        return jax.value_and_grad(loss)(arrays)

    arrays = draw(70, dtype=jnp.bfloat16, head_dim=16, value_dim=16)
    for a, b in zip(*(jax.tree.leaves(interpreted(run, arrays)) for _ in range(2)), strict=True):
        np.testing.assert_array_equal(a, b)


@pytest.mark.long
def test_keys_far_from_zero_lose_nothing(interpreted):
    """As the sums are of centred keys, only float32's rounding of the keys themselves is left."""
    arrays = draw(130, head_dim=16, value_dim=16)
    want = inline_attention(**arrays, implementation="reference")
    arrays["key"] += 100
    got = interpreted(jax.jit(functools.partial(inline_attention, implementation="pallas_tpu")), **arrays)
    np.testing.assert_allclose(got, want, atol=1e-5)


@pytest.mark.long
def test_tangents_and_second_derivatives_are_the_xla_form_s(interpreted):
    arrays = draw(20, heads=4, key_heads=2, head_dim=8, value_dim=8)

    def derivatives(arrays, implementation):
        loss = lambda arrays: (inline_attention(**arrays, implementation=implementation) ** 2).sum()  # noqa: E731
        return jax.jvp(loss, (arrays,), (arrays,)), jax.jvp(jax.grad(loss), (arrays,), (arrays,))[1]

    got, want = interpreted(derivatives, arrays, "pallas_tpu"), derivatives(arrays, "xla")
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        np.testing.assert_allclose(a, b, rtol=0, atol=1e-5 * max(1, np.abs(b).max()))


MODELS = {
    "linear": lambda *tokens: linear_attention(*tokens, is_causal=False, feature_map="elu", normalize=True),
    "inline": inline_attention,
}


@pytest.mark.parametrize("tpu", slow_but(["v6e"], ["v5e", "v5p", "v6e", "tpu7x"]))
@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("mapped", [False, pytest.param(True, marks=pytest.mark.slow)])
@pytest.mark.long
def test_none_takes_the_kernels_on_a_tpu(name, tpu, mapped):
    def gradients(*arrays):
        out, pull = jax.vjp(jax.vmap(MODELS[name]) if mapped else MODELS[name], *arrays)
        return out, pull(out)

    tokens = [jax.ShapeDtypeStruct((3, 2, 300, n, 128), jnp.bfloat16) for n in (16, 8, 8)]
    tokens = tokens if mapped else [x.update(shape=x.shape[1:]) for x in tokens]
    compiled = compile_for_tpu(gradients, *tokens, tpu=tpu).as_text()
    # Two of values; the sums of queries, and three of tokens and a state.
    assert compiled.count('custom_call_target="tpu_custom_call"') == 6


@pytest.mark.parametrize(
    ("axes", "spec"), [(("data", "tensor"), P("data", None, "tensor")), (("data", "context"), P("data", "context"))]
)
@pytest.mark.slow
def test_devices_share_batch_heads_and_positions(axes, spec):
    """Each computes its own part, of positions with sums over all: no array of tokens is gathered."""

    def gradients(*tokens):
        out, pull = jax.vjp(inline_attention, *tokens)
        return out, pull(out)

    mesh = Mesh(np.array(topology_devices("v5e:2x2")).reshape(2, 2), axes)
    tokens = jax.ShapeDtypeStruct((2, 1024, 16, 128), jnp.bfloat16, sharding=NamedSharding(mesh, spec))
    with jax.set_mesh(mesh):
        compiled = jax.jit(gradients).lower(tokens, tokens, tokens).compile().as_text()
    assert compiled.count('custom_call_target="tpu_custom_call"') == 6
    assert "all-gather" not in compiled
    assert ("all-reduce" in compiled) == ("context" in axes)


# query heads, widths, tokens, dtype: tokens of a tile, heads of a block, as it lies
PLANS = [
    ((32, 128, 128, 8192, jnp.bfloat16), (512, 8, True)),
    ((16, 256, 256, 8192, jnp.bfloat16), (256, 8, True)),
    ((12, 64, 64, 196, jnp.bfloat16), (196, 4, False)),
    ((4, 80, 80, 1000, jnp.float32), (256, 4, False)),
    ((2, 2145, 64, 300, jnp.bfloat16), (128, 2, False)),
]


@pytest.mark.parametrize(("call", "plan"), PLANS)
def test_a_step_takes_the_largest_blocks_that_vmem_holds(call, plan):
    heads, features, value_dim, length, dtype = call
    found, size = global_linear.plan_of(jax.ShapeDtypeStruct((1, length, heads, features), dtype), value_dim)
    assert found == plan
    assert size <= VMEM_BUDGET


@pytest.mark.parametrize(
    ("attend", "dtype", "head_dim", "reason"),
    [
        (inline_attention, jnp.float16, 64, "all bfloat16 or all float32, got float16"),
        (functools.partial(linear, feature_map="taylor2"), jnp.float32, 128, "8385 features and .* of VMEM"),
        (functools.partial(linear, segment_ids=np.zeros((2, 9), np.int32)), jnp.float32, 8, "serves segment_ids where"),
    ],
)
def test_refuses_with_the_reason(attend, dtype, head_dim, reason):
    with pytest.raises(ValueError, match=reason):
        attend(**draw(9, head_dim=head_dim, dtype=dtype), implementation="pallas_tpu")
