"""Tasks on drawn sequences: what a loss and an accuracy are of."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from attnlab import data, models, nn
from attnlab.train import RegressionTask, SequenceTask

SOURCE = data.MultiQueryRecall(length=16, pairs=(1, 2, 4), vocabulary=32)


@pytest.fixture(scope="module")
def evaluated():
    """A task, a model, a batch of validation, and the task's metrics."""
    task = SequenceTask(SOURCE, validation_examples=10)
    model = models.LanguageModel(vocabulary=32, mixers=[nn.SoftmaxAttention], depth=1, features=16)
    model = nn.bind(model, nn.initialize(model, jax.random.key(0)))
    batch = list(task.batches("validation", 6, 0))[-1]
    return task, model, batch, jax.jit(lambda batch: task.loss(model, batch, key=None)[1])(batch)


@pytest.mark.long
def test_output_positions_pick_rows_of_the_logits(evaluated):
    _, model, batch, _ = evaluated
    positions = jnp.asarray(np.random.default_rng(0).integers(16, size=(6, 3)))
    picked = model(batch["inputs"], output_positions=positions)
    everywhere = model(batch["inputs"])
    np.testing.assert_allclose(picked, jnp.take_along_axis(everywhere, positions[..., None], 1), rtol=1e-5, atol=1e-6)


@pytest.mark.long
def test_metrics_of_sequences_are_means_over_what_is_asked(evaluated):
    """In numpy, over all positions, with the last batch's fillers left out."""
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


@pytest.mark.long
def test_a_regression_s_error_is_the_squared_one_over_dim(regressed):
    _, batch, metrics = regressed
    np.testing.assert_allclose(metrics["loss"], np.mean((batch["targets"] - 0.5) ** 2) / 3, rtol=1e-5)
    np.testing.assert_allclose(metrics["error, 4 pairs"], np.mean((batch["targets"][:, 4] - 0.5) ** 2) / 3, rtol=1e-5)


@pytest.mark.long
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
    """The model gets dim numbers per pair and never the map: its inputs have the shapes that the task states."""
    task = RegressionTask(data.LinearRegressions(dim=3, pairs=10))
    batch = next(iter(task.batches("train", 5, 0)))
    assert {name: (x.shape, x.dtype) for name, x in batch.items()} == {
        name: (x.shape, x.dtype) for name, x in task.inputs(5).items()
    }
