import jax
import pytest
from jax._src.pallas.mosaic_gpu.interpret import interpret_pallas_call

from kernels_pallas.gpu import simulation


@pytest.fixture
def simulated():
    """(function, *args, **options) -> what it gives with the GPU kernels in interpret mode, where races are looked for
    and memory begins as NaN."""

    def run(function, *args, **options):
        with simulation.simulated(detect_races=True):
            results = jax.block_until_ready(function(*args, **options))
            races = interpret_pallas_call.get_races()  # jax 0.10 tells of them, later ones raise
            assert not getattr(races, "races_found", False)
            return results

    return run
