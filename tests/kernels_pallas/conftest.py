import jax
import pytest
from jax.experimental.pallas import tpu as pltpu


@pytest.fixture
def interpreted():
    """(function, *args, **options) -> what it gives in TPU interpret mode, which simulates the TPU's memories on the
    CPU: buffers start as NaN, and races are looked for."""

    def run(function, *args, **options):
        with pltpu.force_tpu_interpret_mode(pltpu.InterpretParams(detect_races=True, uninitialized_memory="nan")):
            return jax.block_until_ready(function(*args, **options))

    return run
