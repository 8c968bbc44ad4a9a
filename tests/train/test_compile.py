"""The training step of a language model, compiled for four TPUs that are not there, with the kernels inside."""

import importlib.util
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from mixers import MIXERS

from attnlab import data
from attnlab.models import LanguageModel
from attnlab.train import LanguageTask, Mesh, OptimizerOptions
from attnlab.train.step import batch_shapes, make_optimizer, make_step, state_shapes
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
    mesh = Mesh(data=-1).build(topology_devices("v5p"))
    state, batch = state_shapes(model, task, 8, optimizer, mesh), batch_shapes(task, 8, mesh)
    compiled = make_step(model, task, optimizer, key, mesh).lower(state, batch).compile()
    found = set(re.findall(r"(\w+)/pallas_call", compiled.as_text()))
    assert MIXERS[mixer].kernels <= found
