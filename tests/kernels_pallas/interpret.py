"""TPU interpret mode: simulates the TPU's memories on the CPU. Buffers start as NaN, and races are looked for."""

import jax
from jax.experimental.pallas import tpu as pltpu


def interpreted(function, *args, **options):
    with pltpu.force_tpu_interpret_mode(pltpu.InterpretParams(detect_races=True, uninitialized_memory="nan")):
        return jax.block_until_ready(function(*args, **options))
