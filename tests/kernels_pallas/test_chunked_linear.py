"""Chunked linear attention: values, states and gradients in TPU interpret mode, and what the kernel refuses."""

import functools
import importlib
import warnings

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from marks import slow_but

from attnlab import LinearState, linear_attention
from kernels_pallas.aot.compile import as_on
from kernels_pallas.tpu import chunk, chunk_call, chunked_linear

TOLERANCE = {jnp.float32: 1e-5, jnp.bfloat16: 2e-2}  # bfloat16: what is multiplied is rounded to it


def draw(
    length,
    *,
    decay=None,
    delta=False,
    segments=False,
    batch=1,
    heads=2,
    key_heads=1,
    head_dim=64,
    value_dim=64,
    **options,
):
    """(arrays of linear_attention by name, its other options)."""
    rng = np.random.default_rng(length)
    dtype, normalize = options.pop("dtype", jnp.float32), options.get("normalize", False)
    shapes = {"query": (heads, head_dim), "key": (key_heads, head_dim), "value": (key_heads, value_dim)}
    arrays = {name: rng.normal(size=(batch, length, *shape)) for name, shape in shapes.items()}
    arrays["key"] /= np.linalg.norm(arrays["key"], axis=-1, keepdims=True)
    arrays = {name: jnp.asarray(x, dtype) for name, x in arrays.items()}
    gates = {"constant": (heads,), "token": (batch, length, heads), "channel": (batch, length, heads, head_dim)}
    if decay:
        arrays["log_decay"] = jnp.asarray(-rng.exponential(0.3, gates[decay]), jnp.float32)
    if delta:
        arrays["beta"] = jnp.asarray(rng.uniform(size=(batch, length, heads)), jnp.float32)
    if "feature_map" not in options:
        kv = jnp.asarray(rng.normal(size=(batch, heads, head_dim, value_dim)), jnp.float32)
        k_sum = jnp.asarray(rng.uniform(1, 2, (batch, heads, head_dim)), jnp.float32) if normalize else None
        arrays["initial_state"] = LinearState(kv, k_sum)
    if segments:
        options["segment_ids"] = jnp.asarray(np.sort(rng.integers(0, 4, (batch, length)), axis=1), jnp.int32)
    return arrays, options


WIDE = {"head_dim": 128, "value_dim": 128}
CASES = {
    "one token": (1, {"decay": "token"}),
    "plain": (300, {"heads": 4, "key_heads": 2}),
    "plain bfloat16": (256, {"dtype": jnp.bfloat16, "value_dim": 40}),
    "elu, normalised": (200, {"feature_map": "elu", "normalize": True}),
    "taylor2, normalised": (140, {"feature_map": "taylor2", "normalize": True, "head_dim": 16}),
    "retention": (300, {"decay": "constant", "head_dim": 128, "value_dim": 128}),
    "decay per token": (257, {"decay": "token", "head_dim": 24, "value_dim": 130}),
    "decay per token, segments": (290, {"decay": "token", "segments": True, "dtype": jnp.bfloat16}),
    "decay per channel": (150, {"decay": "channel"}),
    "decay per channel, segments": (260, {"decay": "channel", "segments": True, "dtype": jnp.bfloat16}),
    "delta": (200, {"delta": True}),
    "gated delta": (260, {"delta": True, "decay": "token", "heads": 3, "key_heads": 3, "dtype": jnp.bfloat16}),
    "gated delta per channel": (140, {"delta": True, "decay": "channel", "segments": True}),
    "five heads": (130, {"heads": 5, "key_heads": 5}),
    "six heads, two of a group": (130, {"decay": "token", "heads": 6, "key_heads": 3, "dtype": jnp.bfloat16}),
    "eight heads of a group": (130, {"delta": True, "heads": 8}),
    # Widths of 128 and blocks of 8 heads: arrays are read as they lie.
    "in place": (140, {"delta": True, "decay": "token", "heads": 16, "key_heads": 4, **WIDE, "dtype": jnp.bfloat16}),
    "in place, eight heads of a group": (130, {"batch": 2, "heads": 8, **WIDE, "dtype": jnp.bfloat16}),
    "in place, own keys": (130, {"decay": "channel", "heads": 16, "key_heads": 16, **WIDE}),
    "in place, few heads": (20, {"decay": "token", "batch": 2, "heads": 4, "key_heads": 2, **WIDE}),
}
QUICK = ("gated delta",)


def assert_close(got, want, tolerance):
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        assert a.dtype == b.dtype
        a, b = np.asarray(a, np.float32), np.asarray(b, np.float32)
        np.testing.assert_allclose(a, b, rtol=0, atol=tolerance * max(1, np.abs(b).max()))


@pytest.mark.parametrize("case", slow_but(QUICK, CASES))
@pytest.mark.long
def test_values_states_and_gradients_equal_the_reference_s(case, interpreted):
    length, drawn = CASES[case]
    arrays, options = draw(length, **drawn)
    rng = np.random.default_rng(1)
    shapes = jax.eval_shape(lambda a: linear_attention(**a, return_state=True, **options), arrays)
    weights = jax.tree.map(lambda x: jnp.asarray(rng.normal(size=x.shape), jnp.float32), shapes)

    def run(arrays, implementation):
        def loss(arrays):
            results = linear_attention(**arrays, return_state=True, implementation=implementation, **options)
            products = jax.tree.map(lambda x, w: jnp.sum(x.astype(jnp.float32) * w), results, weights)
            return sum(jax.tree.leaves(products)), results

        return jax.grad(loss, has_aux=True)(arrays)

    got = interpreted(run, arrays, "pallas_tpu")
    want = jax.jit(functools.partial(run, implementation="reference"))(arrays)
    assert_close(got, want, TOLERANCE[drawn.get("dtype", jnp.float32)])


@pytest.mark.slow
def test_runs_give_the_same_bits(interpreted):
    arrays, _ = draw(70, delta=True, dtype=jnp.bfloat16)

    def run(arrays):
        loss = lambda arrays: linear_attention(**arrays, implementation="pallas_tpu").astype(jnp.float32).sum()  # noqa: E731
        return jax.value_and_grad(loss)(arrays)

    for a, b in zip(*(jax.tree.leaves(interpreted(run, arrays)) for _ in range(2)), strict=True):
        np.testing.assert_array_equal(a, b)


@pytest.mark.parametrize("decay", slow_but(["channel"], ["token", "channel"]))
@pytest.mark.long
def test_strong_decays_and_repeated_keys_stay_exact(decay, interpreted):
    """Decays that drop the state, -inf among them, and one key over and over, where inverses by powers fail."""
    arrays, _ = draw(160, decay=decay, delta=True)
    arrays["key"] = jnp.broadcast_to(arrays["key"][:, :1], arrays["key"].shape)
    arrays["beta"] = jnp.ones_like(arrays["beta"])
    strong = arrays["log_decay"].at[:, 40].set(-1000.0).at[:, 90].set(-jnp.inf)
    arrays["log_decay"] = jnp.where(jnp.arange(160).reshape(1, -1, *(1,) * (strong.ndim - 2)) < 20, 0.0, strong)
    got, want = (
        run(jax.jit(functools.partial(linear_attention, implementation=form)), **arrays)
        for run, form in ((interpreted, "pallas_tpu"), (lambda f, **a: f(**a), "reference"))
    )
    assert_close(got, want, 1e-5)


@pytest.mark.slow  # compiles for 20 s; the same seam is held by test_banded_flash.py
def test_tangents_and_second_derivatives_are_the_blocked_form_s(interpreted):
    arrays, _ = draw(130, decay="token", head_dim=8, value_dim=8)

    def derivatives(arrays, implementation):
        loss = lambda arrays: (linear_attention(**arrays, implementation=implementation) ** 2).sum()  # noqa: E731
        gradient = jax.grad(loss)
        return jax.jvp(loss, (arrays,), (arrays,)), jax.jvp(gradient, (arrays,), (arrays,))[1]

    got = interpreted(derivatives, arrays, "pallas_tpu")
    assert_close(got, derivatives(arrays, "xla"), 1e-4)


def one_strong(rng, shape, mild):
    """Of HALF tokens one that decays nearly by the most at which decays per channel are taken as mild ones."""
    decays = -rng.exponential(1e-3, (1, -(-shape[1] // chunk.HALF), chunk.HALF, *shape[2:]))
    which = rng.integers(chunk.HALF, size=decays[:, :, :1].shape)
    np.put_along_axis(decays, which, 0.5 - mild, axis=2)
    return decays.reshape(1, -1, *shape[2:])[:, : shape[1]]


REGIMES = {  # log decays of a token, and strengths of the delta rule
    "usual gates": (lambda rng, shape, mild: -rng.exponential(0.05, shape), (0.0, 1.0)),
    "strong gates": (lambda rng, shape, mild: -rng.exponential(3.0, shape), (0.0, 1.0)),
    "resets": (
        lambda rng, shape, mild: np.where(rng.random(shape) < 0.05, -50.0, -rng.exponential(0.05, shape)),
        (0.0, 1.0),
    ),
    "one strong": (one_strong, (0.0, 1.0)),
    "repeated keys": (lambda rng, shape, mild: np.full(shape, -1e-3), (1.0, 1.0)),
}
FORMS = {
    "decay": {"decay": "token"},
    "channels": {"decay": "channel"},
    "gated delta": {"decay": "token", "delta": True},
    "gated delta by channel": {"decay": "channel", "delta": True},
}


def in_regime(form, regime, dtype):
    """(arrays by name, weights of the outputs in a loss, the generator that drew them)."""
    arrays, _ = draw(300, heads=2, dtype=dtype, **FORMS[form])
    rng = np.random.default_rng(3)
    decays, (least, most) = REGIMES[regime]
    mild = chunk.MILD[jnp.dtype(dtype).name]
    arrays["log_decay"] = jnp.asarray(decays(rng, arrays["log_decay"].shape, mild), jnp.float32)
    if "beta" in arrays:
        arrays["beta"] = jnp.asarray(rng.uniform(least, most, arrays["beta"].shape), jnp.float32)
    if regime == "repeated keys":
        noise = 0.02 / 8 * rng.normal(size=arrays["key"].shape)
        arrays["key"] = (arrays["key"][:, :1].astype(jnp.float32) + noise).astype(dtype)
    return arrays, rng.normal(size=(1, 300, 2, 64)), rng


def gradients_and_results(attend, weights, arrays, **options):
    """(gradients of the weighted outputs, (outputs, state))"""

    def loss(arrays):
        out, state = attend(**arrays, return_state=True, **options)
        return jnp.sum(out * weights.astype(arrays["initial_state"].kv.dtype)), (out, state)

    return jax.grad(loss, has_aux=True)(arrays)


def in_float64(arrays):
    return jax.tree.map(lambda x: jnp.asarray(np.asarray(x, np.float64)), arrays)


@pytest.mark.parametrize("dtype", slow_but([jnp.float32], [jnp.bfloat16, jnp.float32]))
@pytest.mark.parametrize("regime", slow_but(["repeated keys"], REGIMES))
@pytest.mark.parametrize("form", slow_but(["gated delta"], FORMS))
@pytest.mark.long
def test_errors_against_float64_are_those_of_rounded_inputs(form, regime, dtype, interpreted):
    """Outputs, states and gradients, in shares of the largest number of each: bfloat16 within 2^-6, or four times what
    comes of rounding query, key and value once more; float32 within 1e-5. With -s it prints them: the table of
    kernels_pallas/README.md."""
    arrays, weights, rng = in_regime(form, regime, dtype)
    run = functools.partial(gradients_and_results, linear_attention, weights)
    got = interpreted(run, arrays, implementation="pallas_tpu")
    with jax.enable_x64(True):
        exact = in_float64(arrays)
        tokens = {name: exact[name] * (1 + 2**-9 * rng.uniform(-1, 1, exact[name].shape)) for name in TOKENS}
        want, rounded = (jax.tree.leaves(run(given, implementation="reference")) for given in (exact, exact | tokens))
    errors, allowed = (shares_of_largest(found, want) for found in (jax.tree.leaves(got), rounded))
    *of_gradients, of_out, of_state = errors
    print(f"\n| {form} | {regime} | {jnp.dtype(dtype)} | {of_out:.0e} | {of_state:.0e} | {max(of_gradients):.0e} |")
    limits = np.maximum(2**-6, 4 * allowed) if dtype == jnp.bfloat16 else 1e-5
    np.testing.assert_array_less(errors, limits)


TOKENS = ("query", "key", "value")


def shares_of_largest(found, want):
    pairs = [[np.asarray(x, np.float64) for x in pair] for pair in zip(found, want, strict=True)]
    return np.array([np.abs(a - b).max() / np.abs(b).max() for a, b in pairs])


def deltanet(query, key, value, log_decay, beta, initial_state, *, return_state):
    """deltanet-tpu's kernels, which take heads of 128 and as many of queries as of keys."""
    library = pytest.importorskip("deltanet_tpu", reason="deltanet_tpu is not installed")
    width = query.shape[-1]
    rule = library.chunk_kda if log_decay.ndim == 4 else library.chunk_gdn
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # it says that there is no TPU
        out, state = rule(
            *(widened(x) for x in of_every_head(query, key, value)),
            widened(log_decay) if log_decay.ndim == 4 else log_decay,
            beta,
            initial_state=jnp.swapaxes(widened(jnp.swapaxes(widened(initial_state.kv), 2, 3)), 2, 3),
            output_final_state=return_state,
            precision="bf16" if query.dtype == jnp.bfloat16 else "fp32",
            scale=width**-0.5,
        )
    return out[..., :width], state[..., :width, :width]


def widened(x):
    return jnp.pad(x, [(0, 0)] * (x.ndim - 1) + [(0, 128 - x.shape[-1])])


def of_every_head(query, *keys_and_values):
    return query, *(jnp.repeat(x, query.shape[2] // x.shape[2], axis=2) for x in keys_and_values)


def tokamax(query, key, value, log_decay, beta, initial_state, *, return_state):
    """tokamax's kernels, of whole chunks of 64 tokens, heads first."""
    pytest.importorskip("tokamax", reason="tokamax is not installed")
    kda = importlib.import_module("tokamax._src.ops.kda.pallas_mosaic_tpu")
    rule = kda.PallasMosaicTpuKimiDeltaAttention(bypass_device_check=True)
    length, scale = query.shape[1], query.shape[-1] ** -0.5
    arrays = [
        jnp.pad(jnp.moveaxis(x, 2, 0), [(0, 0), (0, 0), (0, -length % 64)] + [(0, 0)] * (x.ndim - 3))
        for x in (*of_every_head(query, key, value), log_decay, beta)
    ]
    with as_on("v6e"):
        state = initial_state.kv[:, None]
        out, state = rule(*arrays, scale=scale, initial_state=state, output_final_state=return_state)
    return jnp.moveaxis(out, 0, 2)[:, :length], state[:, 0]


PEERS = {"deltanet-tpu": deltanet, "tokamax": tokamax}
PEERS_FORMS = [
    ("deltanet-tpu", "gated delta"),
    ("deltanet-tpu", "gated delta by channel"),
    ("tokamax", "gated delta by channel"),
]


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float32])
@pytest.mark.parametrize("regime", REGIMES)
@pytest.mark.parametrize(("peer", "form"), PEERS_FORMS)
@pytest.mark.slow
def test_errors_of_others_kernels(peer, form, regime, dtype, interpreted):
    """As those of ours above; with -s it prints them."""
    arrays, weights, _ = in_regime(form, regime, dtype)
    got = interpreted(gradients_and_results, PEERS[peer], weights, arrays)
    with jax.enable_x64(True):
        want = gradients_and_results(linear_attention, weights, in_float64(arrays), implementation="reference")
    errors = shares_of_largest(*map(jax.tree.leaves, (got, want)))
    *of_gradients, of_out, of_state = errors
    shares = f"{of_out:.0e} | {of_state:.0e} | {max(of_gradients):.0e}"
    print(f"\n| {peer}: {form} | {regime} | {jnp.dtype(dtype)} | {shares} |")
    if regime == "usual gates":  # what is compared is the same
        assert errors.max() < 0.05


# query and key heads, width, float32, decay, delta: heads of a block, heads and key heads of a step, in place
PLANS = [
    ((32, 8, 128, False, "token", True), (8, 4, 1, True)),
    ((32, 32, 128, False, None, False), (16, 4, 4, True)),
    ((6, 3, 128, False, "token", False), (2, 2, 1, False)),
    ((5, 5, 128, False, "token", False), (1, 1, 1, False)),
    ((32, 8, 128, False, "channel", False), (8, 4, 1, True)),
    ((32, 8, 128, True, "channel", False), (2, 2, 1, False)),
    ((32, 8, 128, False, "channel", True), (8, 4, 1, True)),
    ((32, 8, 256, True, "channel", True), (1, 1, 1, False)),
]


@pytest.mark.parametrize(("call", "plan"), PLANS)
def test_a_step_takes_as_many_heads_as_vmem_holds(call, plan):
    arrays = call_of(*call)
    found, size = chunk_call.plan_of(*arrays, backwards=True)
    budget = chunk_call.budget_of(*arrays[3:], backwards=True)
    assert (found.block, found.heads, found.key_heads, found.in_place) == plan
    assert size <= budget


def call_of(heads, key_heads, width, is_float32, decay, delta):
    dtype = jnp.float32 if is_float32 else jnp.bfloat16
    query, key, value = (jax.ShapeDtypeStruct((1, 512, n, width), dtype) for n in (heads, key_heads, key_heads))
    gate = jax.ShapeDtypeStruct((1, 512, heads, width), jnp.float32)
    log_decay = {None: None, "token": gate.update(shape=gate.shape[:3]), "channel": gate}[decay]
    return query, key, value, log_decay, gate.update(shape=gate.shape[:3]) if delta else None


def structs(dtype=jnp.bfloat16, head_dim=64, value_dim=64, length=256):
    return [jax.ShapeDtypeStruct((1, length, 2, width), dtype) for width in (head_dim, head_dim, value_dim)]


@pytest.mark.parametrize(
    ("arguments", "options", "reason"),
    [
        ({"dtype": jnp.float16}, {}, "all bfloat16 or all float32, got float16"),
        ({"head_dim": 128}, {"feature_map": "taylor2"}, "8385 features and 64 value channels take .* of VMEM"),
    ],
)
def test_refuses_with_the_reason(arguments, options, reason):
    with pytest.raises(ValueError, match=reason):
        jax.eval_shape(
            functools.partial(linear_attention, implementation="pallas_tpu", **options), *structs(**arguments)
        )


def test_serves_the_head_dims_of_models():
    for width in (1, 64, 80, 128, 256):
        for dtype in (jnp.bfloat16, jnp.float32):
            query, key, value = structs(dtype, width, width)
            gates = jax.ShapeDtypeStruct(query.shape, jnp.float32), jax.ShapeDtypeStruct(query.shape[:3], jnp.float32)
            for given in ((None, None), (None, gates[1]), gates):
                assert chunked_linear.refusal(query, key, value, *given) is None, (width, dtype)
