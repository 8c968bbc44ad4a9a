"""Parameters: drawn by path, so that what two models share starts from the same bits."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from marks import slow_but

from attnlab import nn
from attnlab.models import LanguageModel


def make(mixer, **options):
    return LanguageModel(vocabulary=32, mixers=[mixer], **{"depth": 2, "features": 32, **options})


def flat(parameters):
    return {
        jax.tree_util.keystr(path, simple=True, separator="/"): leaf
        for path, leaf in jax.tree.leaves_with_path(parameters)
    }


def test_arms_that_share_a_parameter_share_its_bits():
    key = jax.random.key(3)
    softmax = flat(nn.initialize(make(nn.SoftmaxAttention), key))
    gated = flat(nn.initialize(make(lambda *a, **k: nn.LinearAttention(*a, decay="data", **k), depth=3), key))
    shared = set(softmax) & set(gated)
    assert shared == set(softmax), "the gated arm has more parameters, not other ones"
    assert len(gated) > len(shared)
    for path in shared:
        np.testing.assert_array_equal(softmax[path], gated[path], err_msg=path)


def test_another_seed_or_another_path_draws_other_values():
    first, second = (flat(nn.initialize(make(nn.SoftmaxAttention), jax.random.key(seed))) for seed in (0, 1))
    kernels = [path for path in first if path.endswith("kernel")]
    assert all(np.any(first[path] != second[path]) for path in kernels)
    same_shape = [np.asarray(first[path]).tobytes() for path in kernels]
    assert len(set(same_shape)) == len(same_shape), "two paths drew the same values"


def test_a_model_is_built_without_values_and_counts_what_it_would_hold():
    model = make(nn.SoftmaxAttention)
    drawn = nn.initialize(model, jax.random.key(0))
    assert nn.count_parameters(model) == sum(leaf.size for leaf in jax.tree.leaves(drawn))
    assert {path: leaf.shape for path, leaf in flat(drawn).items()} == nn.parameter_shapes(model)


def test_bind_leaves_the_model_without_values():
    model = make(nn.SoftmaxAttention)
    bound = nn.bind(model, nn.initialize(model, jax.random.key(0)))
    assert bound(jnp.zeros((1, 4), jnp.int32)).shape == (1, 4, 32)
    assert isinstance(model.embedding.get_value(), jax.ShapeDtypeStruct)


class Counting(nn.SoftmaxAttention):
    """Counts the batches that it was trained on, and adds 1 to the loss."""

    def __init__(self, features, **options):
        super().__init__(features, **options)
        self.batches = nn.buffer((), jax.nn.initializers.zeros)
        self.loss = nn.auxiliary_loss()

    def mix_and_learn(self, *arguments):
        self.batches.set_value(self.batches.get_value() + 1)
        self.loss.set_value(jnp.ones(()))
        return self.mix(*arguments)


@pytest.mark.parametrize("remat", slow_but([True], [False, True]))
@pytest.mark.long
def test_buffers_learn_in_training_alone(remat):
    model = make(Counting, remat=remat)
    values = nn.initialize(model, jax.random.key(0))
    parameters, buffers = nn.split(model, values)
    assert nn.count_parameters(model) == sum(leaf.size for leaf in jax.tree.leaves(parameters))
    assert jax.tree.structure(nn.merge(parameters, buffers)) == jax.tree.structure(values)

    def loss(parameters, key):
        bound = nn.bind(model, nn.merge(parameters, buffers))
        out = bound(jnp.zeros((1, 4), jnp.int32), key=key)
        learned, auxiliary = nn.learned(bound)
        return jnp.mean(out**2) + auxiliary, (learned, auxiliary)

    gradients, (learned, auxiliary) = jax.jit(jax.grad(loss, has_aux=True))(parameters, jax.random.key(1))
    assert jax.tree.structure(gradients) == jax.tree.structure(parameters)
    assert jax.tree.leaves(learned) == [1, 1]
    assert auxiliary == 2
    _, (learned, auxiliary) = jax.jit(lambda parameters: loss(parameters, None))(parameters)
    assert jax.tree.leaves(learned) == [0, 0]
    assert auxiliary == 0
