"""The step: what the optimizer does to which parameters."""

import jax
import numpy as np
import optax

from attnlab.train import OptimizerOptions
from attnlab.train.step import make_optimizer


def test_weight_decay_is_for_matrices_alone():
    parameters = {"matrix": np.ones((2, 2), np.float32), "vector": np.ones(2, np.float32)}
    optimizer = make_optimizer(OptimizerOptions(learning_rate=0.1, warmup_steps=0, weight_decay=0.5), 10)
    zeros = jax.tree.map(np.zeros_like, parameters)
    updates, _ = optimizer.update(zeros, optimizer.init(parameters), parameters)
    decayed = optax.apply_updates(parameters, updates)
    np.testing.assert_allclose(decayed["matrix"], 0.95)
    np.testing.assert_array_equal(decayed["vector"], 1)
