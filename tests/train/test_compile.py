"""The training step of a language model, compiled for four TPUs that are not there, with the kernels inside."""

import collections
import importlib.util
import math
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from marks import slow_but
from mixers import MIXERS

from attnlab import data
from attnlab.models import LanguageModel
from attnlab.train import LanguageTask, Mesh, OptimizerOptions
from attnlab.train.step import batch_shapes, make_optimizer, make_step, state_shapes
from kernels_pallas.aot.compile import topology_devices

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("libtpu") is None, reason="compiling for a TPU needs libtpu (the extra tpu-aot)"
)
QUICK = ("local",)
COMPILED = [name for name, mixer in MIXERS.items() if mixer.kernels is not None]


def compiled_step(mixer, mesh, gradient_dtype=None):
    """The program's text."""
    text = data.Corpus("zeros", np.zeros(4000, np.uint8), np.zeros(4000, np.uint8))
    model = LanguageModel(vocabulary=256, mixers=[MIXERS[mixer]], depth=1, features=128, dtype=jnp.bfloat16)
    task = LanguageTask(text, sequence_length=256)
    optimizer, key = make_optimizer(OptimizerOptions(), 1000), jax.random.key(0)
    mesh = mesh.build(topology_devices("v5p"))
    state, batch = state_shapes(model, task, 8, optimizer, mesh), batch_shapes(task, 8, mesh)
    step = make_step(model, task, optimizer, key, mesh, gradient_dtype=gradient_dtype)
    return step.lower(state, batch).compile().as_text()


@pytest.mark.parametrize(
    "mixer", [name if name in QUICK else pytest.param(name, marks=pytest.mark.slow) for name in COMPILED]
)
@pytest.mark.long
def test_train_step_runs_the_kernels_on_every_chip(mixer):
    assert MIXERS[mixer].kernels <= set(re.findall(r"(\w+)/pallas_call", compiled_step(mixer, Mesh(data=-1))))


@pytest.mark.parametrize("mesh", slow_but([Mesh(data=4)], [Mesh(data=4), Mesh(fsdp=4)]), ids=str)
@pytest.mark.parametrize("dtype", slow_but(["bfloat16"], ["bfloat16", None]))
@pytest.mark.long
def test_devices_add_up_gradients_of_matrices_in_the_dtype_asked_for(dtype, mesh):
    """A CPU's program would not show it: it adds up float32 alone."""
    reduced = re.findall(r"= (.*?) all-reduce(?:-start)?\(", compiled_step("softmax", mesh, dtype))
    numbers = collections.Counter()
    for kind, shape in re.findall(r"(f32|bf16)\[([\d,]+)\]", "".join(reduced)):
        numbers[kind] += math.prod(map(int, shape.split(",")))
    matrices, looked_up = 4 * 128 * 128 + 3 * 128 * 344 + 256 * 128, 256 * 128
    wanted, other = ("f32", "bf16") if dtype is None else ("bf16", "f32")
    assert numbers[wanted] >= matrices
    assert numbers[other] < (1 if dtype is None else looked_up + 1000)
