"""The step: what the optimizer does to which parameters."""

import functools

import jax
import numpy as np
import optax
import pytest
import runs

from attnlab import data, models, nn
from attnlab.train import Mesh, OptimizerOptions, SequenceTask, memory
from attnlab.train.loop import evaluate
from attnlab.train.step import make_evaluation, make_optimizer, validation_metrics


def test_weight_decay_is_for_matrices_alone():
    parameters = {"matrix": np.ones((2, 2), np.float32), "vector": np.ones(2, np.float32)}
    optimizer = make_optimizer(OptimizerOptions(learning_rate=0.1, warmup_steps=0, weight_decay=0.5), 10)
    zeros = jax.tree.map(np.zeros_like, parameters)
    updates, _ = optimizer.update(zeros, optimizer.init(parameters), parameters)
    decayed = optax.apply_updates(parameters, updates)
    np.testing.assert_allclose(decayed["matrix"], 0.95)
    np.testing.assert_array_equal(decayed["vector"], 1)


@pytest.mark.long
def test_validation_metrics_are_those_that_an_evaluation_gives():
    experiment = runs.experiment()
    values = nn.initialize(experiment.model, jax.random.key(0))
    given = evaluate(experiment, make_evaluation(experiment.model, experiment.task, experiment.mesh.build()), values)
    assert set(validation_metrics(experiment.model, experiment.task, experiment.batch_size)) == set(given)


def test_a_run_without_any_of_its_activations_learns_nothing_and_stays_finite():
    model = models.LanguageModel(
        vocabulary=256,
        mixers=[functools.partial(nn.SoftmaxAttention, num_heads=2)],
        depth=1,
        features=8,
        dropout_rate=1.0,
    )
    task = runs.experiment().task
    values = nn.initialize(model, jax.random.key(0))
    batch = next(iter(task.batches("train", 2, 0)))
    loss = jax.jit(
        jax.value_and_grad(lambda values: task.loss(nn.bind(model, values), batch, key=jax.random.key(1))[0])
    )
    value, gradients = loss(values)
    np.testing.assert_allclose(value, np.log(256), rtol=1e-6)
    assert all(np.all(np.asarray(leaf) == 0) for leaf in jax.tree.leaves(gradients))


GIBIBYTE = 2**30


@pytest.mark.parametrize(
    ("options", "batch_size", "message"),
    [
        (
            {"features": 10**7},
            4,
            r"features: got 10000000; a model of [\d,]+ parameters, buffers among them, needs about [\d,.]+ GiB",
        ),
        ({"vocabulary": 10**12}, 4, "vocabulary: got 1000000000000; a model of"),
        ({"mlp_hidden": 10**9}, 4, "mlp_hidden: got 1000000000; a model of"),
        ({"max_length": 10**9}, 4, "max_length: got 1000000000; a model of"),
        ({}, 10**7, r"batch_size: got 10000000; a batch of so many tokens \[33\] needs about"),
        ({}, 20_000, r"batch_size: got 20000; .*what the backward pass keeps [\d.]+ GiB\), and there is 1.0 GiB"),
    ],
)
def test_what_cannot_fit_is_refused_beside_what_is_there(options, batch_size, message, monkeypatch):
    monkeypatch.setattr(memory, "memory", lambda devices: GIBIBYTE)
    mixer = functools.partial(nn.SoftmaxAttention, num_heads=2)
    model = models.LanguageModel(**{"vocabulary": 256, "mixers": [mixer], "depth": 1, "features": 8, **options})
    with pytest.raises(ValueError, match=message):
        memory.check_memory(model, runs.experiment().task, batch_size, Mesh())


def test_a_long_sequence_is_named_by_its_length(monkeypatch):
    monkeypatch.setattr(memory, "memory", lambda devices: GIBIBYTE)
    model = models.LanguageModel(vocabulary=32, mixers=[nn.SoftmaxAttention], depth=1, features=8)
    task = SequenceTask(data.Copy(length=10**9))
    with pytest.raises(ValueError, match=r"length: got 1000000000; a batch of 2 of inputs \[1000000000\] needs about"):
        memory.check_memory(model, task, 2, Mesh())


def test_the_memory_of_this_machine_is_some():
    assert GIBIBYTE // 4 < memory.memory() < 2**50
