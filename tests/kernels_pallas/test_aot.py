"""Kernels compile for TPUs on a machine without one, and a call that names no implementation takes them there."""

import importlib.util
import subprocess
import sys

import jax
import jax.numpy as jnp
import pytest

from attnlab import local_attention
from kernels_pallas import aot

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("libtpu") is None, reason="compiling for a TPU needs libtpu (the extra tpu-aot)"
)
KERNEL = "tpu_custom_call"
QUERY, KEY = (jax.ShapeDtypeStruct((2, 300, heads, 80), jnp.bfloat16) for heads in (4, 2))
SEGMENTS = jax.ShapeDtypeStruct((2, 300), jnp.int32)


def loss(query, key, value, segment_ids=None):
    out = local_attention(query, key, value, window=70, is_causal=True, segment_ids=segment_ids)
    return (out.astype(jnp.float32) ** 2).sum()


@pytest.mark.parametrize("tpu", ["v5e", "v5p"])
def test_none_takes_the_kernel_on_a_tpu(tpu):
    forward = aot.compile_for_tpu(
        lambda *a: local_attention(*a, window=70, sinks=4, is_causal=True), QUERY, KEY, KEY, tpu=tpu
    )
    assert KERNEL in forward.as_text()
    gradient = aot.compile_for_tpu(jax.grad(loss, argnums=(0, 1, 2)), QUERY, KEY, KEY, SEGMENTS, tpu=tpu)
    calls = [line for line in gradient.as_text().splitlines() if KERNEL in line]
    for name in ("banded_flash_attention", "banded_flash_query_gradient", "banded_flash_key_value_gradients"):
        assert any(name in line for line in calls), name


def test_vmap_and_x64_compile():
    batched = [jax.ShapeDtypeStruct((3, *x.shape), x.dtype) for x in (QUERY, KEY, KEY)]
    assert KERNEL in aot.compile_for_tpu(jax.vmap(loss), *batched, tpu="v5e").as_text()
    scaled = jax.vmap(lambda x, scale: local_attention(x, x, x, window=9, scale=scale))
    scales = jax.ShapeDtypeStruct((3,), jnp.float32)
    assert KERNEL in aot.compile_for_tpu(scaled, batched[0], scales, tpu="v5e").as_text()
    with jax.enable_x64(True):
        assert KERNEL in aot.compile_for_tpu(loss, QUERY, KEY, KEY, SEGMENTS, tpu="v5e").as_text()


def test_a_name_overrides_the_choice():
    blocked = aot.compile_for_tpu(
        lambda *a: local_attention(*a, window=70, implementation="xla"), QUERY, KEY, KEY, tpu="v5e"
    )
    assert KERNEL not in blocked.as_text()


@pytest.mark.parametrize("kernel", [name for name in aot.KERNELS if name.startswith("banded_flash")])
@pytest.mark.parametrize(
    "tpu", ["v5e", *(pytest.param(tpu, marks=pytest.mark.slow) for tpu in aot.TOPOLOGIES if tpu != "v5e")]
)
def test_frozen_blocks_compile_in_every_shape_of_the_table(kernel, tpu):
    for shape in aot.SHAPES:
        function, arrays, _ = aot.KERNELS[kernel](aot.SHAPES[shape])
        assert KERNEL in aot.compile_for_tpu(function, *arrays, tpu=tpu).as_text(), shape


def test_the_command_prints_a_table():
    command = [sys.executable, "-m", "kernels_pallas.aot", "--tpu", "v5e", "--shape", "ragged float32"]
    lines = subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines()
    assert [line.split("|")[4].strip()[:10] for line in lines[2:]] == [
        "yes",
        "yes",
        "ValueError",
    ]  # splash takes no ragged length
