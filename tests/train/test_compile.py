"""The training step of a language model, compiled for four TPUs that are not there, with the kernels inside."""

import importlib.util
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec
from mixers import MIXERS

from attnlab import data
from attnlab.models import LanguageModel
from attnlab.train import LanguageTask, OptimizerOptions
from attnlab.train.step import initial_state, make_optimizer, make_step
from kernels_pallas.aot.compile import topology_devices

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("libtpu") is None, reason="compiling for a TPU needs libtpu (the extra tpu-aot)"
)
QUICK = ("local", "linear")
COMPILED = [name for name, mixer in MIXERS.items() if mixer.kernels is not None]


@pytest.mark.parametrize(
    "mixer", [name if name in QUICK else pytest.param(name, marks=pytest.mark.slow) for name in COMPILED]
)
def test_train_step_runs_the_kernels_on_every_chip(mixer):
    text = data.Corpus("zeros", np.zeros(4000, np.uint8), np.zeros(4000, np.uint8))
    model = LanguageModel(vocabulary=256, mixers=[MIXERS[mixer]], depth=1, features=128, dtype=jnp.bfloat16)
    task = LanguageTask(text, sequence_length=256)
    optimizer, key = make_optimizer(OptimizerOptions(), 1000), jax.random.key(0)
    state = jax.eval_shape(lambda: initial_state(model, task, 8, optimizer, key))
    mesh = jax.sharding.Mesh(np.array(topology_devices("v5p")), ("data",))

    def placed(tree, spec):
        sharding = NamedSharding(mesh, spec)
        return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding), tree)

    batch = task.inputs(8)
    with jax.set_mesh(mesh):
        step = make_step(model, task, optimizer, key)
        compiled = step.lower(placed(state, PartitionSpec()), placed(batch, PartitionSpec("data"))).compile()
    found = set(re.findall(r"(\w+)/pallas_call", compiled.as_text()))
    assert MIXERS[mixer].kernels <= found
