"""The training step of a language model, compiled for four TPUs that are not there, with the kernels inside."""

import functools
import importlib.util
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from attnlab import data, nn
from attnlab.models import LanguageModel
from attnlab.train import LanguageTask, OptimizerOptions
from attnlab.train.step import initial_state, make_optimizer, make_step
from kernels_pallas import aot

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("libtpu") is None, reason="compiling for a TPU needs libtpu (the extra tpu-aot)"
)
FLASH = {"banded_flash_attention", "banded_flash_query_gradient", "banded_flash_key_value_gradients"}
LINEAR = {"chunked_linear_attention", "chunked_linear_gradients"}
COVARIANCE = {"banded_covariance", "banded_covariance_query_gradients", "banded_covariance_key_value_gradients"}
MIXERS = {
    "softmax": (nn.SoftmaxAttention, FLASH),
    "local": (functools.partial(nn.LocalAttention, window=64), FLASH),
    "dilated": (functools.partial(nn.DilatedAttention, window=32, dilation=4), FLASH),
    "linear": (functools.partial(nn.LinearAttention, feature_map="elu", normalize=True), LINEAR),
    "retention": (functools.partial(nn.LinearAttention, decay="retention"), LINEAR),
    "gated linear": (functools.partial(nn.LinearAttention, decay="channel"), LINEAR),
    "gated delta": (functools.partial(nn.LinearAttention, decay="data", beta=1.0), LINEAR),
    "agent": (functools.partial(nn.AgentAttention, agents=16), LINEAR),
    "routing": (functools.partial(nn.RoutingAttention, clusters=4, window=64), FLASH),
    "local-linear": (nn.LocalLinearAttention, FLASH | COVARIANCE),
    "parallax": (nn.ParallaxAttention, FLASH | COVARIANCE),
}
QUICK = ("local", "gated delta")


@pytest.mark.parametrize(
    "mixer", [name if name in QUICK else pytest.param(name, marks=pytest.mark.slow) for name in MIXERS]
)
def test_train_step_runs_the_kernels_on_every_chip(mixer):
    make, kernels = MIXERS[mixer]
    text = data.Corpus("zeros", np.zeros(4000, np.uint8), np.zeros(4000, np.uint8))
    model = LanguageModel(vocabulary=256, mixers=[make], depth=1, features=128, dtype=jnp.bfloat16)
    task, optimizer, key = (
        LanguageTask(text, sequence_length=256),
        make_optimizer(OptimizerOptions(), 1000),
        jax.random.key(0),
    )
    state = jax.eval_shape(lambda: initial_state(model, task, 8, optimizer, key))
    mesh = jax.sharding.Mesh(np.array(aot.topology_devices("v5p")), ("data",))

    def placed(tree, spec):
        sharding = NamedSharding(mesh, spec)
        return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding), tree)

    batch = task.inputs(8)
    with jax.set_mesh(mesh):
        step = make_step(model, task, optimizer, key)
        compiled = step.lower(placed(state, PartitionSpec()), placed(batch, PartitionSpec("data"))).compile()
    found = set(re.findall(r"(\w+)/pallas_call", compiled.as_text()))
    assert kernels <= found
