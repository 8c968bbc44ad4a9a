"""Tasks: what a loss and an accuracy are of, and what a task draws."""

import functools
import itertools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from attnlab import data, models, nn
from attnlab.train import (
    AxialImageTask,
    ImageClassificationTask,
    LanguageTask,
    RasterImageTask,
    RegressionTask,
    SequenceTask,
)
from attnlab.train.tasks import Illustrated

SOURCE = data.MultiQueryRecall(length=16, pairs=(1, 2, 4), vocabulary=32)


@pytest.fixture(scope="module")
def evaluated():
    """A task, a model, a batch of validation, and the task's metrics."""
    task = SequenceTask(SOURCE, validation_examples=10)
    model = models.LanguageModel(vocabulary=32, mixers=[nn.SoftmaxAttention], depth=1, features=16)
    model = nn.bind(model, nn.initialize(model, jax.random.key(0)))
    batch = list(task.batches("validation", 6, 0))[-1]
    return task, model, batch, jax.jit(lambda batch: task.loss(model, batch, key=None)[1])(batch)


def test_places_pick_rows_of_the_logits(evaluated):
    _, model, batch, _ = evaluated
    places = jnp.asarray(np.random.default_rng(0).integers(16, size=(6, 3)))
    picked = model(batch["inputs"], places=places)
    everywhere = model(batch["inputs"])
    np.testing.assert_allclose(picked, jnp.take_along_axis(everywhere, places[..., None], 1), rtol=1e-5, atol=1e-6)


def test_metrics_of_sequences_are_means_over_what_is_asked(evaluated):
    """In numpy, over all places, with the last batch's fillers left out."""
    _, model, batch, metrics = evaluated
    logits = np.asarray(model(batch["inputs"]), np.float64)
    logits -= logits.max(-1, keepdims=True)
    losses, right, solved = [], [], []
    for row, targets, weight in zip(logits, batch["targets"], batch["weight"], strict=True):
        asked = np.flatnonzero(targets != data.IGNORED)
        chance = row[asked] - np.log(np.exp(row[asked]).sum(-1, keepdims=True))
        hits = row[asked].argmax(-1) == targets[asked]
        if weight:
            losses.append(-np.mean(chance[np.arange(len(asked)), targets[asked]]))
            right.append(hits.mean())
            solved.append(hits.all())
    assert 0 < len(losses) < 6
    np.testing.assert_allclose(metrics["loss"], np.mean(losses), rtol=1e-5)
    np.testing.assert_allclose(metrics["accuracy"], np.mean(right), rtol=1e-6)
    np.testing.assert_allclose(metrics["solved"], np.mean(solved), rtol=1e-6)
    groups = np.asarray(batch["group"])[: len(right)]
    for number, name in enumerate(SOURCE.groups):
        wanted = np.mean(np.array(right)[groups == number]) if np.any(groups == number) else 0
        np.testing.assert_allclose(metrics[f"accuracy, {name}"], wanted, rtol=1e-6)


def test_a_vocabulary_that_does_not_hold_the_source_s_is_named():
    model = models.LanguageModel(vocabulary=31, mixers=[nn.SoftmaxAttention], depth=1, features=16)
    with pytest.raises(ValueError, match="vocabulary: got 31; the tokens of MultiQueryRecall need 32"):
        SequenceTask(SOURCE).loss(model, SequenceTask(SOURCE).inputs(2), key=None)


def test_a_task_describes_its_source():
    described = SequenceTask(SOURCE).describe()
    assert described["source"] == "MultiQueryRecall"
    assert described["pairs"] == (1, 2, 4)
    assert SequenceTask(SOURCE).inputs(5)["group"].shape == (5,)


def test_training_moves_each_image_by_what_the_key_draws_and_lets_zeros_in():
    pixels, labels = np.zeros((1, 5, 5, 1), np.uint8), np.zeros(1, np.int32)
    task = ImageClassificationTask(data.LabelledImages("dot", 2, pixels, labels, pixels, labels), shift=1)
    dots = jnp.zeros((200, 5, 5, 1)).at[:100, 2, 2].set(1.0).at[100:, 0, 3].set(1.0)
    batch = {"image": dots, "label": jnp.zeros(200, jnp.int32)}

    def seen(key):
        images = []
        task.loss(lambda given, *, key: images.append(given) or jnp.zeros((200, 2)), batch, key=key)
        return np.asarray(images[0])

    moved = seen(jax.random.key(0))
    assert {tuple(place) for place in np.argwhere(moved[:100])[:, 1:3].tolist()} == set(
        itertools.product((1, 2, 3), repeat=2)
    )
    np.testing.assert_array_equal(moved[:100].sum((1, 2, 3)), 1)
    assert set(moved[100:].sum((1, 2, 3)).tolist()) == {0, 1}  # some leave by the upper edge, and none comes in below
    assert np.argwhere(moved[100:])[:, 1].max() == 1
    np.testing.assert_array_equal(seen(jax.random.key(0)), moved)
    assert np.any(seen(jax.random.key(1)) != moved)
    np.testing.assert_array_equal(seen(None), dots)
    with pytest.raises(ValueError, match="shift: got 5; need 0 to 4 for images of 5 pixels"):
        ImageClassificationTask(task.images, shift=5)


@pytest.mark.parametrize(("membership", "leaks"), [("strict", False), ("global", True)])
def test_another_future_moves_the_past_of_leaking_models_alone(membership, leaks):
    text = np.random.default_rng(0).integers(16, size=2000).astype(np.uint8)
    task = LanguageTask(data.Corpus("noise", text[:1000], text[1000:]), sequence_length=32, probe_future=True)
    mixer = functools.partial(nn.RoutingAttention, clusters=4, window=8, membership=membership)
    model = models.LanguageModel(vocabulary=256, mixers=[mixer], depth=2, features=32)
    bound = nn.bind(model, nn.initialize(model, jax.random.key(0)))
    batch = next(iter(task.batches("validation", 8, 0)))
    both = jax.jit(lambda batch: (task.loss(bound, batch, key=None)[1], bound(batch["tokens"][:, :-1])))
    metrics, logits = both(batch)
    own, other = metrics["first half, own future"], metrics["first half, other future"]
    assert (metrics["leak"] > 0.05) == (abs(own - other) > 1e-5) == leaks
    assert leaks or metrics["leak"] == 0
    logits = np.asarray(logits, np.float64)[:, :15]
    picked = np.take_along_axis(logits, batch["tokens"][:, 1:16, None], axis=-1)[..., 0]
    np.testing.assert_allclose(own, np.mean(np.log(np.exp(logits).sum(-1)) - picked), rtol=1e-5)


@pytest.fixture(scope="module")
def regressed():
    """A regression task, a model that answers 0.5 everywhere, and the metrics of a batch of many examples."""
    task = RegressionTask(data.LinearRegressions(dim=3, pairs=10), validation_examples=4096)
    model = models.SequenceRegressor(channels=4, mixers=[nn.SoftmaxAttention], depth=1, features=16)
    values = jax.tree.map(jnp.zeros_like, nn.initialize(model, jax.random.key(0)))
    values["head"]["bias"] += 0.5
    (batch,) = task.batches("validation", 4096, 0)
    # Values are arguments: jax 0.12 on CPUs may read memory that was never written where weights are constant zeros.
    metrics = jax.jit(lambda values, batch: task.loss(nn.bind(model, values), batch, key=None)[1])(values, batch)
    return task, batch, metrics


def test_a_regression_s_error_is_the_squared_one_over_dim(regressed):
    _, batch, metrics = regressed
    np.testing.assert_allclose(metrics["loss"], np.mean((batch["targets"] - 0.5) ** 2) / 3, rtol=1e-5)
    np.testing.assert_allclose(metrics["error, 4 pairs"], np.mean((batch["targets"][:, 4] - 0.5) ** 2) / 3, rtol=1e-5)


def test_a_regression_stands_beside_ridge_and_one_step_of_gradient_descent(regressed):
    """Ridge: what numpy's least squares leaves. One step: (dim + 1) / (pairs + dim + 1), which is exact on average."""
    _, batch, metrics = regressed
    x, y = batch["inputs"][:, ::2, :-1].astype(float), batch["targets"].astype(float)
    for seen in (1, 2, 4, 8, 9):
        w = np.stack([np.linalg.lstsq(x[i, :seen], y[i, :seen], rcond=None)[0] for i in range(len(x))])
        left = np.mean((np.einsum("bd,bd->b", w, x[:, seen]) - y[:, seen]) ** 2) / 3
        np.testing.assert_allclose(metrics[f"ridge, {seen} pairs"], left, rtol=2e-2, atol=2e-3)
        assert metrics[f"one step, {seen} pairs"] == pytest.approx(4 / (seen + 4), rel=0.15)


def test_a_regression_is_learned_in_context_alone():
    """The model gets dim numbers a pair and never the map: its inputs are of the shapes the task says."""
    task = RegressionTask(data.LinearRegressions(dim=3, pairs=10))
    batch = next(iter(task.batches("train", 5, 0)))
    assert {name: (x.shape, x.dtype) for name, x in batch.items()} == {
        name: (x.shape, x.dtype) for name, x in task.inputs(5).items()
    }


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
    """In numpy: nats by place."""
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
    losses = []
    for image in task.images.validation_images:
        tokens = [int(level) for row in image for pixel in row for level in pixel]  # channels innermost
        logits = bound(jnp.array([[5, *tokens[:-1]]]))[0, :, :5]  # the start token is never an answer
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
    return task, bound, float(loss), bound(jnp.asarray(task.images.validation_images, jnp.int32))


def test_axial_evaluation_is_exact_over_every_channel(colour):
    task, _, loss, logits = colour
    np.testing.assert_allclose(loss, np.mean(cross_entropy(logits, task.images.validation_images)), rtol=1e-5)


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
    loss, _ = task.loss(nn.bind(model, zeros), batch, key=None)
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


@pytest.mark.parametrize("make", [axial, raster])
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
    # Tiles of 24 screen pixels a pixel: the first validation image, wherever it is, and as many samples as asked for.
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
