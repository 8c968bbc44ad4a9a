"""The Axial Transformer: the published model in numpy, what may see what, and a sampler that equals the slow one."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from marks import slow_but

from attnlab import nn
from attnlab.models import AxialTransformer, axial, sample

LEVELS = 7
OPTIONS = {"levels": LEVELS, "features": 16, "heads": 2, "outer_layers": 1, "inner_layers": 2, "mlp_factor": 2}
SIZES = {"gray": (4, 5, 1), "colour": (3, 4, 3)}


def build(size, **options):
    """A model, and values in which no scale is 1 and no bias 0."""
    model = AxialTransformer(image_size=size, **{**OPTIONS, "exterior_layers": int(size[-1] > 1), **options})
    rng = np.random.default_rng(0)
    values = nn.initialize(model, jax.random.key(0))
    return model, jax.tree.map(lambda x: x + 0.3 * rng.standard_normal(x.shape).astype(np.float32), values)


def draw(size, count):
    return np.random.default_rng(1).integers(LEVELS, size=(count, *size), dtype=np.int32)


@pytest.fixture(scope="module", params=SIZES)
def case(request):
    """(image size, model, values, jitted logits of images)."""
    size = SIZES[request.param]
    model, values = build(size)
    return size, model, values, jax.jit(lambda images: nn.bind(model, values)(images))


# The published model in numpy, float64, from its description: one image [Y, X], loops over lines and heads.


def oracle_norm(x, p):
    return (x - x.mean(-1, keepdims=True)) / np.sqrt(x.var(-1, keepdims=True) + 1e-5) * p["scale"] + p["bias"]


def oracle_dense(x, p):
    """Kernels [in, out], head-major where there are heads."""
    outs = p["bias"].size
    return x @ p["kernel"].reshape(-1, outs) + p["bias"].reshape(outs)


def oracle_attention(x, p, *, axis, is_causal, heads=OPTIONS["heads"]):
    if axis == 0:
        return oracle_attention(x.swapaxes(0, 1), p, axis=1, is_causal=is_causal).swapaxes(0, 1)
    head_dim = x.shape[-1] // heads
    out = np.zeros_like(x)
    for number, line in enumerate(x):
        query, key, value = (oracle_dense(line, p[name]) for name in ("query", "key", "value"))
        for head in range(heads):
            own = slice(head * head_dim, (head + 1) * head_dim)
            for position in range(len(line)):
                seen = slice(0, position + 1 if is_causal else len(line))
                logits = key[seen, own] @ query[position, own] * head_dim**-0.5
                weights = np.exp(logits - logits.max())
                out[number, position, own] = weights @ value[seen, own] / weights.sum()
    return oracle_dense(out, p["output"])


def oracle_block(x, p, **options):
    x = x + oracle_attention(oracle_norm(x, p["attention_norm"]), p, **options)
    hidden = oracle_dense(oracle_norm(x, p["mlp_norm"]), p["mlp_in"])
    return x + oracle_dense(hidden / (1 + np.exp(-1.702 * hidden)), p["mlp_out"])


def oracle_positions(p):
    return p["rows"][:, None] + p["columns"][None]


def oracle_decoder(tokens, conditioning, p):
    embedded, context = p["embedding"][tokens], oracle_positions(p["positions"]) + conditioning
    u = embedded + context
    for pair in range(len(p["outer"]) // 2):
        u = oracle_block(u, p["outer"][str(2 * pair)], axis=1, is_causal=False)
        u = oracle_block(u, p["outer"][str(2 * pair + 1)], axis=0, is_causal=True)
    down, right = np.zeros_like(u), np.zeros_like(u)
    down[1:], right[:, 1:] = u[:-1], embedded[:, :-1]
    r = right + down + context
    for number in range(len(p["inner"])):
        r = oracle_block(r, p["inner"][str(number)], axis=1, is_causal=True)
    return oracle_dense(oracle_norm(r, p["norm"]), p["head"])


def oracle_conditioning(image, channel, p):
    height, width, channels = image.shape
    inputs = np.zeros((height + 2, width + 2, 2 * channels))  # zeros around the image
    inputs[1:-1, 1:-1, :channel] = image[..., :channel] / (LEVELS - 1)
    inputs[1:-1, 1:-1, channels + channel] = 1
    x = p["bias"] + oracle_positions(p["positions"])
    for dy, dx in np.ndindex(3, 3):
        x = x + inputs[dy : dy + height, dx : dx + width] @ p["kernel"][dy, dx]
    for pair in range(len(p["layers"]) // 2):
        x = oracle_block(x, p["layers"][str(2 * pair)], axis=1, is_causal=False)
        x = oracle_block(x, p["layers"][str(2 * pair + 1)], axis=0, is_causal=False)
    return x


@pytest.mark.parametrize(("wide", "tolerance"), [(True, 1e-9), pytest.param(False, 1e-5, marks=pytest.mark.slow)])
@pytest.mark.parametrize("name", slow_but(["colour"], SIZES))
@pytest.mark.long
def test_equals_the_published_model_in_numpy(name, wide, tolerance):
    size = SIZES[name]
    with jax.enable_x64(wide):
        model, values = build(size, outer_layers=2, dtype=jnp.float64 if wide else jnp.float32)
        images = draw(size, 2)
        values = jax.tree.map(np.float64, values)
        given = jax.tree.map(lambda x: jnp.asarray(x, jnp.float64 if wide else jnp.float32), values)
        logits = jax.jit(lambda values, images: nn.bind(model, values)(images))(given, images)
    assert logits.shape == (2, *size, LEVELS)
    for image, got in zip(images, logits):
        for channel in range(size[-1]):
            conditioning = 0.0 if size[-1] == 1 else oracle_conditioning(image, channel, values["conditioner"])
            want = oracle_decoder(image[..., channel], conditioning, values["decoder"])
            np.testing.assert_allclose(got[:, :, channel], want, atol=tolerance, rtol=tolerance)


@pytest.mark.long
def test_one_slice_an_image_is_its_part_of_all(case):
    size, model, values, logits = case
    images, slices = draw(size, 4), np.arange(4) % size[-1]
    some = jax.jit(lambda images, slices: nn.bind(model, values)(images, slices=slices))(images, slices)
    every = logits(images)
    np.testing.assert_allclose(some, every[np.arange(4), :, :, slices], atol=1e-5)


@pytest.mark.long
def test_a_logit_depends_on_every_earlier_sub_pixel_and_on_no_other(case):
    """Each sub-pixel changed in turn, channel by channel in raster order; exactly equal where nothing may change."""
    size, _, _, logits = case
    count = np.prod(size)
    order = [(y, x, c) for c in range(size[2]) for y in range(size[0]) for x in range(size[1])]
    images = np.repeat(draw(size, 1), count + 1, axis=0)
    for number, position in enumerate(order):
        images[(number, *position)] = (images[(number, *position)] + 1) % LEVELS
    out = np.asarray(logits(images))
    changed = np.any(out[:-1] != out[-1], axis=-1)  # [changed sub-pixel, Y, X, C]
    reached = changed.transpose(0, 3, 1, 2).reshape(count, count)
    np.testing.assert_array_equal(reached, np.triu(np.ones((count, count), bool), k=1))


@pytest.mark.parametrize(
    ("case", "temperature"),
    [
        ("gray", 0),
        ("colour", 1.0),
        *(
            pytest.param(*pair, marks=pytest.mark.slow)
            for pair in (("gray", 1.0), ("gray", 0.5), ("colour", 0.5), ("colour", 0))
        ),
    ],
    indirect=["case"],
)
@pytest.mark.long
def test_sampling_equals_recomputing_everything_for_each_sub_pixel(case, temperature):
    size, model, values, logits = case
    key, count = jax.random.key(5), 3

    @jax.jit
    def fast():
        return sample(nn.bind(model, values), count=count, key=key, temperature=temperature)

    slow = np.zeros((count, *size), np.int32)
    for number in range(np.prod(size)):
        channel, row, column = np.unravel_index(number, (size[2], *size[:2]))
        here = logits(slow)[:, row, column, channel]
        noise = jax.random.gumbel(jax.random.fold_in(key, number), here.shape)
        slow[:, row, column, channel] = np.argmax(here / temperature + noise if temperature else here, axis=-1)
    np.testing.assert_array_equal(fast(), slow)
    assert len(np.unique(slow)) > 1


@pytest.mark.long
def test_sampling_takes_a_pass_a_row_outside_and_a_pass_a_place_inside(case, monkeypatch):
    size, model, values, _ = case
    height, width, channels = size
    passes = {"outer": 0, "inner": 0, "exterior": 0}

    def counted(name, function, shape):
        def call(self, *arguments):
            def count():
                passes[name] += 1

            assert arguments[-1 if name != "exterior" else 0].shape == shape
            jax.debug.callback(count)
            return function(self, *arguments)

        return call

    features, batch = OPTIONS["features"], 2
    for owner, method, name, shape in (
        (axial.AxialDecoder, "_outer_step", "outer", (batch, width, features)),
        (axial.AxialDecoder, "_inner_step", "inner", (batch, features)),
        (axial.AxialConditioner, "__call__", "exterior", (batch, *size)),
    ):
        monkeypatch.setattr(owner, method, counted(name, getattr(owner, method), shape))
    jax.jit(lambda: sample(nn.bind(model, values), count=batch, key=jax.random.key(0)))().block_until_ready()
    jax.effects_barrier()
    exterior = channels if channels > 1 else 0
    assert passes == {"outer": channels * height, "inner": channels * height * width, "exterior": exterior}


@pytest.mark.long
def test_dropout_is_decided_by_the_key():
    model, values = build(SIZES["gray"], dropout_rate=0.3)
    images = draw(SIZES["gray"], 2)
    dropped = jax.jit(lambda seed: nn.bind(model, values)(images, slices=jnp.zeros(2, int), key=jax.random.key(seed)))
    np.testing.assert_array_equal(dropped(0), dropped(0))
    assert np.mean(np.abs(dropped(0) - dropped(1))) > 0.01


@pytest.mark.slow  # the fast tests hold it of the language model, in test_models.py
def test_recomputing_changes_no_gradient():
    images = draw(SIZES["gray"], 2)

    def gradient(remat):
        model, values = build(SIZES["gray"], inner_layers=1, remat=remat)
        return jax.jit(jax.grad(lambda values: jnp.mean(nn.bind(model, values)(images) ** 2)))(values)

    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-6), gradient(False), gradient(True))


@pytest.mark.slow
def test_bfloat16_computes_and_samples_with_float32_logits():
    model, values = build(SIZES["colour"], dtype=jnp.bfloat16)
    images = jax.jit(lambda: sample(nn.bind(model, values), count=2, key=jax.random.key(0)))()
    logits = jax.jit(lambda images: nn.bind(model, values)(images))(images)
    assert images.dtype == jnp.int32
    assert logits.dtype == jnp.float32
    assert np.all(np.isfinite(logits))


@pytest.mark.parametrize("channels", slow_but([2], [1, 2]))
def test_flops_agree_with_the_compiler_where_it_counts_the_same(channels):
    """A slice of an image; attention is small beside the products."""
    options = {"features": 128, "inner_layers": 1, "exterior_layers": channels - 1, "levels": 256}
    model = AxialTransformer(image_size=(4, 8, channels), **{**OPTIONS, **options})
    shapes = jax.eval_shape(lambda: nn.initialize(model, jax.random.key(0)))
    images = jax.ShapeDtypeStruct((1, 4, 8, channels), jnp.int32)
    slices = jnp.zeros(1, int)
    lowered = jax.jit(lambda values, images: nn.bind(model, values)(images, slices=slices)).lower(shapes, images)
    counted = lowered.compile().cost_analysis()["flops"]
    assert model.flops() / channels == pytest.approx(counted, rel=0.05)


def test_state_is_what_decoding_keeps():
    """Keys and values of a row in every inner layer, and of the whole map in every masked outer one."""
    model = build(SIZES["colour"], outer_layers=3)[0]
    assert model.state_size() == 2 * OPTIONS["features"] * (2 * 4 + 3 * 3 * 4)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"image_size": (4, 5)}, r"image_size: got \(4, 5\); need \(height, width, channels\)"),
        ({"image_size": (4, 0, 1)}, "image_size: got"),
        ({"levels": 1}, "levels: got 1; need at least 2"),
        ({"heads": 3}, "heads: got 3; must divide features 16"),
        ({"heads": 0}, "heads: got 0"),
        ({"outer_layers": 0}, "outer_layers: got 0; need 1 to 256"),
        ({"inner_layers": 0}, "inner_layers: got 0"),
        ({"mlp_factor": 0}, "mlp_factor: got 0"),
        ({"exterior_layers": 1}, "exterior_layers: got 1; need 0"),
        ({"image_size": (4, 4, 3), "exterior_layers": -1}, "exterior_layers: got -1; need 0 to 256"),
    ],
)
def test_bad_options_are_named(options, message):
    with pytest.raises(ValueError, match=message):
        AxialTransformer(**{"image_size": (4, 5, 1), **OPTIONS, **options})


def test_bad_inputs_are_named(case):
    size, model, values, _ = case
    bound = nn.bind(model, values)
    with pytest.raises(ValueError, match=r"images: got float32\[2,.*need integers \[batch, "):
        bound(jnp.zeros((2, *size)))
    with pytest.raises(ValueError, match="images: got int32"):
        bound(jnp.zeros((2, 9, *size[1:]), jnp.int32))
    with pytest.raises(ValueError, match=r"slices: got \[3\]; need \[2\]"):
        bound(jnp.zeros((2, *size), jnp.int32), slices=jnp.zeros(3, int))
