"""Pixels: what a loss is of, what it costs, and what a task draws."""

import itertools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from marks import slow_but

from attnlab import data, masks, models, nn
from attnlab.train import AxialImageTask, NextBlockImageTask, RasterImageTask
from attnlab.train.tasks.base import Illustrated


def images(channels, levels=5):
    """7 images for training and 3 for validation, 3 x 4."""
    rng = np.random.default_rng(0)
    train, validation = (rng.integers(levels, size=(count, 3, 4, channels), dtype=np.uint8) for count in (7, 3))
    labels = np.zeros(7, np.int32), np.zeros(3, np.int32)
    return data.LabelledImages("noise", 1, train, labels[0], validation, labels[1], levels=levels)


def axial(channels, **options):
    task = AxialImageTask(images(channels))
    return task, models.AxialTransformer(
        image_size=(3, 4, channels), **{"levels": 5, "features": 8, "heads": 2, "outer_layers": 1, **options}
    )


def raster(channels, **options):
    task = RasterImageTask(images(channels))
    return task, models.LanguageModel(
        **{"vocabulary": 6, "mixers": [nn.SoftmaxAttention], "max_length": 12 * channels, "depth": 1, **options}
    )


def cross_entropy(logits, targets):
    """In numpy: nats by position."""
    logits = np.asarray(logits, np.float64)
    return np.log(np.exp(logits).sum(-1)) - np.take_along_axis(logits, np.asarray(targets)[..., None], -1)[..., 0]


def values_of(model):
    """Larger than a model starts with, so that its logits are far from even."""
    return jax.tree.map(lambda x: 3 * x, nn.initialize(model, jax.random.key(0)))


@pytest.mark.parametrize("channels", [pytest.param(1, marks=pytest.mark.slow), 3])
def test_loss_in_raster_order_is_the_cross_entropy_of_each_sub_pixel_after_those_before(channels):
    task, model = raster(channels)
    bound = nn.bind(model, values_of(model))
    (batch,) = task.batches("validation", 4, 0)  # with one filler
    loss, metrics = jax.jit(lambda batch: task.loss(bound, batch, key=None))(batch)
    call, losses = jax.jit(lambda tokens: bound(tokens)), []
    for image in task.images.validation_images:
        tokens = [int(level) for row in image for pixel in row for level in pixel]  # channels innermost
        logits = call(jnp.array([[5, *tokens[:-1]]]))[0, :, :5]  # the start token is never an answer
        losses.append(cross_entropy(logits, tokens))
    np.testing.assert_allclose(loss, np.mean(losses), rtol=1e-5)
    assert metrics["loss"] == loss
    assert task.derived({"loss": float(loss)})["bits_per_dim"] == pytest.approx(np.mean(losses) / math.log(2))


@pytest.fixture(scope="module")
def colour():
    """Task, model bound, its evaluation of the validation batch, and its logits [3, Y, X, C, levels]."""
    task, model = axial(3)
    bound = nn.bind(model, values_of(model))
    (batch,) = task.batches("validation", 4, 0)
    loss, _ = jax.jit(lambda batch: task.loss(bound, batch, key=None))(batch)
    logits = jax.jit(lambda pixels: bound(pixels))(jnp.asarray(task.images.validation_images, jnp.int32))
    return task, bound, float(loss), logits


@pytest.mark.long
def test_axial_evaluation_is_exact_over_every_channel(colour):
    task, _, loss, logits = colour
    np.testing.assert_allclose(loss, np.mean(cross_entropy(logits, task.images.validation_images)), rtol=1e-5)


@pytest.mark.long
def test_axial_training_takes_a_channel_of_each_image_that_the_key_draws(colour):
    task, bound, _, logits = colour
    one = jax.jit(lambda pixels, seed: task.loss(bound, {"pixels": pixels}, key=jax.random.key(seed))[0])
    pixels = jnp.asarray(task.images.validation_images[:1], jnp.int32)
    of_first = cross_entropy(logits[:1], task.images.validation_images[:1]).mean(axis=(0, 1, 2))
    assert len(set(np.round(of_first, 4))) == 3
    drawn = [int(np.argmin(np.abs(of_first - one(pixels, seed)))) for seed in range(16)]
    np.testing.assert_allclose([one(pixels, seed) for seed in range(16)], of_first[drawn], rtol=1e-4)
    assert set(drawn) == {0, 1, 2}


@pytest.mark.parametrize("make", [axial, raster])
@pytest.mark.parametrize("channels", [pytest.param(1, marks=pytest.mark.slow), 3])
def test_a_model_that_knows_nothing_needs_the_logarithm_of_the_levels(make, channels):
    task, model = make(channels)
    zeros = jax.tree.map(jnp.zeros_like, nn.initialize(model, jax.random.key(0)))
    (batch,) = task.batches("validation", 3, 0)
    loss, _ = jax.jit(lambda batch: task.loss(nn.bind(model, zeros), batch, key=None))(batch)
    assert task.derived({"loss": float(loss)})["bits_per_dim"] == pytest.approx(math.log2(5), rel=1e-6)


def test_costs_are_of_a_sub_pixel():
    for make, channels, unit, units in (
        (axial, 1, "pixel", 12),
        (axial, 3, "sub-pixel", 12),
        (raster, 3, "sub-pixel", 36),
    ):
        task, model = make(channels)
        costs = task.costs(model)
        assert (costs["unit"], costs["units"], costs["length"]) == (unit, units, 12 * channels)
        whole = model.flops() if make is axial else model.flops(36)
        assert costs["flops"] * 12 * channels == pytest.approx(whole)
        assert costs["state_size"] > 0
        assert next(iter(task.batches("train", 2, 0)))["pixels"].shape == task.inputs(2)["pixels"].shape


@pytest.mark.parametrize("make", [axial, raster])
def test_models_of_other_levels_are_refused(make):
    task, model = make(1, **({"levels": 6} if make is axial else {"vocabulary": 5}))
    batch = task.inputs(2)
    with pytest.raises(ValueError, match=r"levels: got 6; noise have 5|vocabulary: got 5; noise need 6"):
        jax.eval_shape(lambda: task.loss(nn.bind(model, nn.initialize(model, jax.random.key(0))), batch, key=None))


@pytest.mark.parametrize("make", slow_but([raster], [axial, raster]))
@pytest.mark.long
def test_a_picture_has_validation_images_over_samples(make, tmp_path):
    from matplotlib.image import imread

    task, model = make(3)
    assert isinstance(task, Illustrated)
    values = values_of(model)
    path, again, other = (tmp_path / f"{number}.png" for number in range(3))
    for file, seed in ((path, 0), (again, 0), (other, 1)):
        task.illustrate(model, values, file, key=jax.random.key(seed), count=9)
    assert path.read_bytes() == again.read_bytes()
    assert path.read_bytes() != other.read_bytes()
    picture = np.round(imread(path)[..., :3] * 255)
    # Tiles of 24 screen pixels per pixel: the first validation image, wherever it is, and as many samples as asked for.
    first = np.round(task.images.validation_images[0] * (255 / 4)).repeat(24, axis=0).repeat(24, axis=1)
    found = [
        (y, x)
        for y in range(picture.shape[0] - first.shape[0] + 1)
        for x in range(20)
        if np.array_equal(picture[y : y + first.shape[0], x : x + first.shape[1]], first)
    ]
    assert len(found) == 1
    assert picture.shape[1] > 8 * first.shape[1]
    assert picture.shape[0] > 3 * first.shape[0]  # a row of validation images, 8 samples, and one more


def in_blocks(block, levels=2):
    """Of 2 x 2 pixels: task, model, and all 16 images of two levels."""
    every = np.array(list(itertools.product(range(levels), repeat=4)), np.uint8).reshape(-1, 2, 2, 1)
    labels = np.zeros(len(every), np.int32)
    task = NextBlockImageTask(data.LabelledImages("all", 1, every, labels, every, labels, levels=levels), block=block)
    model = models.LanguageModel(
        vocabulary=levels + 1, mixers=[nn.SoftmaxAttention], max_length=4, depth=1, features=16
    )
    return task, model, jnp.asarray(every, jnp.int32)


def losses_of(task, bound, images):
    one = jax.vmap(lambda image: task.loss(bound, {"pixels": image[None]}, key=None)[0])
    return np.asarray(jax.jit(one)(images), np.float64)


@pytest.mark.slow
def test_blocks_of_one_sub_pixel_are_raster_order():
    task, model, images = in_blocks(1)
    bound = nn.bind(model, values_of(model))
    np.testing.assert_allclose(losses_of(task, bound, images), losses_of(RasterImageTask(task.images), bound, images))


@pytest.mark.long
def test_the_likelihoods_of_blocks_sum_to_one_and_are_those_of_what_is_drawn():
    """A row at a time: each pixel from the rows before alone, and 4,000 samples within 5 standard errors."""
    task, model, images = in_blocks(2)
    bound = nn.bind(model, values_of(model))
    likelihood = np.exp(-4 * losses_of(task, bound, images))
    assert likelihood.sum() == pytest.approx(1, rel=1e-5)
    pattern = nn.Pattern(masks.block_causal(2))
    read = np.pad(np.array([[2, 2]] * 4), ((0, 0), (0, 2)))
    read[:, 2:] = [[0, 0], [0, 1], [1, 0], [1, 1]]
    logits = np.asarray(jax.jit(lambda tokens: bound(tokens, pattern=pattern))(read), np.float64)[..., :2]
    p = np.exp(logits) / np.exp(logits).sum(-1, keepdims=True)
    np.testing.assert_array_equal(p[:, :2], p[:1, :2].repeat(4, axis=0))  # the row that is drawn is not read
    expected = [
        np.prod([p[0, place, pixel] for place, pixel in enumerate(first)])
        * np.prod([p[2 * first[0] + first[1], 2 + place, pixel] for place, pixel in enumerate(second)])
        for first, second in np.asarray(images)[..., 0]
    ]
    np.testing.assert_allclose(likelihood, expected, rtol=1e-5)
    drawn = jax.jit(lambda key: task.sample(bound, count=4000, temperature=1.0, key=key))(jax.random.key(0))
    number = np.asarray(drawn).reshape(-1, 4) @ [8, 4, 2, 1]
    frequency = np.bincount(number, minlength=16) / 4000
    assert np.all(np.abs(frequency - likelihood) < 5 * np.sqrt(likelihood / 4000))
    assert task.derived({"loss": 1.0}) == {"bits_per_dim": pytest.approx(1 / math.log(2))}


def test_blocks_are_counted_by_their_pairs_and_divide_an_image():
    task, model, _ = in_blocks(2)
    pairs = int(masks.dense_mask(task.pattern.mask, (4,)).sum())
    assert task.costs(model)["flops"] * 4 == model.flops(4, pairs=pairs)
    assert task.costs(model)["state_size"] is None
    with pytest.raises(ValueError, match=r"^block: got 3; must divide the 4 sub-pixels of an image"):
        in_blocks(3)
