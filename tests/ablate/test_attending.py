"""What a trained model attends to: exact where it is known, kept in the run's folder, skipped with a reason."""

import functools
import math
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from attnlab import data, nn
from attnlab.ablate import attending
from attnlab.models import ImageClassifier, LanguageModel, SequenceRegressor
from attnlab.train import (
    Experiment,
    ImageClassificationTask,
    LanguageTask,
    OptimizerOptions,
    RegressionTask,
    SequenceTask,
    train,
)

LENGTH, WINDOW = 16, 4
MIXERS = [functools.partial(nn.LocalAttention, window=WINDOW, edge="clip"), nn.SoftmaxAttention]


def language(length=LENGTH, **options):
    text = np.frombuffer(b"the cat sat on the mat. " * 60, np.uint8)
    model = LanguageModel(vocabulary=256, **{"mixers": MIXERS, "depth": 2, "features": 16, **options})
    task = LanguageTask(data.Corpus("cats", text[:720], text[720:]), sequence_length=length)
    return Experiment(model=model, task=task, steps=1, batch_size=2, optimizer=OptimizerOptions(warmup_steps=0))


def images():
    pixels = np.random.default_rng(0).integers(256, size=(8, 4, 4, 1), dtype=np.uint8)
    labels = np.arange(8, dtype=np.int32) % 2
    model = ImageClassifier(image_size=(4, 4, 1), classes=2, mixers=[nn.SoftmaxAttention], depth=1, features=16)
    task = ImageClassificationTask(data.LabelledImages("noise", 2, pixels, labels, pixels, labels))
    return Experiment(model=model, task=task, steps=1, batch_size=2, optimizer=OptimizerOptions(warmup_steps=0))


def without_queries(values):
    """So that all scores are 0 and weights are uniform over what is visible."""
    return jax.tree_util.tree_map_with_path(
        lambda path, value: jnp.zeros_like(value) if "'query'" in jax.tree_util.keystr(path) else value, values
    )


def first_batch(experiment):
    return jax.tree.map(jnp.asarray, next(iter(experiment.task.batches("validation", 1, 0))))


@pytest.mark.parametrize("remat", [False, True])
@pytest.mark.long
def test_uniform_weights_have_the_distance_and_entropy_of_their_window(remat):
    experiment = language(remat=remat)
    values = without_queries(nn.initialize(experiment.model, jax.random.key(0)))
    local, softmax = attending.layer_weights(experiment, values, first_batch(experiment))
    assert local[:2] == ("LocalAttention", (LENGTH,))
    for (_, space, weights), window in ((local, WINDOW), (softmax, LENGTH)):
        visible = np.minimum(np.arange(1, LENGTH + 1), window)
        distance, entropy = attending.summarize(weights, space)
        np.testing.assert_allclose(distance, np.mean((visible - 1) / 2), rtol=1e-5)  # one number per head
        np.testing.assert_allclose(entropy, np.mean(np.log(visible)), rtol=1e-5)


def test_on_a_grid_distance_is_euclidean():
    distance, entropy = attending.summarize(np.stack([np.eye(6), np.full((6, 6), 1 / 6)]), (2, 3))
    rows, columns = np.divmod(np.arange(6), 3)
    between = np.hypot(rows[:, None] - rows, columns[:, None] - columns)
    np.testing.assert_allclose(distance, [0, between.mean()])
    np.testing.assert_allclose(entropy, [0, math.log(6)], atol=1e-12)


def test_negative_weights_count_by_size_and_queries_that_see_nothing_not_at_all():
    weights = np.array([[[0.0, 0.0, 0.0], [-1.0, 0.0, 3.0], [0.0, 0.0, 0.0]], np.zeros((3, 3))])
    distance, entropy = attending.summarize(weights, (3,))
    np.testing.assert_allclose(distance, [1.0, np.nan])
    np.testing.assert_allclose(entropy, [-0.25 * math.log(0.25) - 0.75 * math.log(0.75), np.nan])


def test_a_map_is_pooled_and_keeps_what_is_not_seen_apart_from_what_is_hardly_seen():
    weights = np.tril(np.full((1, 150, 150), 1e-6)) + np.eye(150)
    layer = attending.describe_layer("SoftmaxAttention", (150,), weights)
    pooled = attending.unpacked(layer["map"])
    assert pooled.shape == (50, 50)
    assert np.all(np.diag(pooled) == 255)
    assert np.all(pooled[np.tril_indices(50, -1)] == 1)
    assert np.all(pooled[np.triu_indices(50, 1)] == 0)
    assert not layer["is_signed"]


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    folder = tmp_path_factory.mktemp("run")
    train(language(), workdir=folder)
    return folder, attending.attend(language(), folder)


@pytest.mark.long
def test_a_run_leaves_maps_and_a_continuation_in_its_folder(trained):
    folder, summary = trained
    kept = attending.read_attending(folder)
    assert kept["example"] == {"text": "the cat sat on t"}
    assert kept["prompt"] == "the "  # a quarter of the sequence
    assert [layer["mixer"] for layer in kept["layers"]] == ["LocalAttention", "SoftmaxAttention"]
    assert (folder / "samples.txt").read_text()
    assert len(summary["distance"]) == len(summary["entropy"]) == 2
    assert summary["distance"][0] < WINDOW - 1
    assert summary["entropy"][0] <= math.log(WINDOW)
    assert summary["distance"][0] == pytest.approx(np.mean(kept["layers"][0]["distance"]), abs=1e-4)
    assert (folder / "attending.json").stat().st_size < 10_000


@pytest.mark.slow
def test_a_model_that_does_not_decode_has_maps_and_a_reason_for_no_text(tmp_path):
    experiment = language(mixers=[functools.partial(nn.LocalAttention, window=4, stride=2)], depth=1)
    train(experiment, workdir=tmp_path)
    assert attending.attend(experiment, tmp_path)["distance"]
    assert (tmp_path / "samples.txt").read_text().startswith('(nothing: edge: got "shift" with a stride; ')
    assert "prompt" not in attending.read_attending(tmp_path)


@pytest.mark.long
def test_what_is_there_is_not_made_again(trained):
    folder, summary = trained
    before = {path: path.stat().st_mtime_ns for path in folder.iterdir()}
    assert attending.attend(language(), folder) == summary
    assert {path: path.stat().st_mtime_ns for path in folder.iterdir()} == before


@pytest.mark.slow
def test_an_image_has_maps_from_its_middle(tmp_path):
    train(images(), workdir=tmp_path)
    attending.attend(images(), tmp_path)
    kept = attending.read_attending(tmp_path)
    assert attending.unpacked(kept["example"]["pixels"]).shape == (4, 4, 1)
    assert attending.unpacked(kept["layers"][0]["middle"]).shape == (4, 4)
    assert attending.unpacked(kept["layers"][0]["map"]).shape == (16, 16)
    assert not (tmp_path / "samples.txt").exists()


def test_examples_of_numbers_are_shown_as_they_are():
    options = {"mixers": MIXERS, "depth": 1, "features": 16}
    rest = {"steps": 1, "batch_size": 2, "optimizer": OptimizerOptions(warmup_steps=0)}
    recall = Experiment(
        model=LanguageModel(vocabulary=8, **options), task=SequenceTask(data.Copy(length=4, vocabulary=8)), **rest
    )
    tokens = attending.show_example(recall, first_batch(recall))["text"].split(" ")
    assert [int(token) for token in tokens] == first_batch(recall)["inputs"][0].tolist()
    source = data.LinearRegressions(dim=2, pairs=3)
    regression = Experiment(model=SequenceRegressor(channels=3, **options), task=RegressionTask(source), **rest)
    lines = attending.show_example(regression, first_batch(regression))["text"].splitlines()
    assert [len(line.split(" ")) for line in lines] == [3] * source.length


class Bounded(nn.SoftmaxAttention):
    """Not linear in its values."""

    def mix(self, query, key, value, x, segment_ids):
        return jnp.tanh(super().mix(query, key, 3 * value, x, segment_ids))


@pytest.mark.long
def test_long_examples_and_other_models_are_skipped_with_the_reason(tmp_path):
    experiment = language(length=600)
    values = nn.initialize(experiment.model, jax.random.key(0))
    with pytest.raises(ValueError, match="length: an example has 600 positions; weights are shown of at most 512"):
        attending.layer_weights(experiment, values, first_batch(experiment))
    bounded = language(mixers=[nn.SoftmaxAttention, Bounded])
    values = nn.initialize(bounded.model, jax.random.key(0))
    with pytest.raises(ValueError, match="mixers: got Bounded, which is not linear in its values"):
        attending.layer_weights(bounded, values, first_batch(bounded))
    without = types.SimpleNamespace(
        model=LanguageModel(vocabulary=8, mixers=MIXERS, depth=1, features=8).norm,
        task=types.SimpleNamespace(loss=lambda model, batch, key: None),
    )
    with pytest.raises(ValueError, match="model: it has no blocks with a mixer"):
        attending.layer_weights(without, nn.initialize(without.model, jax.random.key(0)), {})
    assert attending.attend(experiment, tmp_path) == {"skipped": "the run's folder has no checkpoint"}
    assert not (tmp_path / "attending.json").exists()
