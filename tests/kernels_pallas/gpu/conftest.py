import jax
import pytest
from jax._src.pallas.mosaic_gpu.interpret import interpret_pallas_call

from kernels_pallas.gpu import simulation


@pytest.fixture
def on_gpu():
    """(function, *args, **options) -> what it gives with the GPU kernels inside: on a card, where JAX has one
    (JAX_PLATFORMS=cuda,cpu), else in interpret mode, where races are looked for and memory begins as NaN."""

    def simulated(function, *args, **options):
        with simulation.simulated(detect_races=True):
            results = jax.block_until_ready(function(*args, **options))
            races = interpret_pallas_call.get_races()  # jax 0.10 tells of them, later ones raise
            assert not getattr(races, "races_found", False)
            return results

    def on_a_card(function, *args, **options):
        return jax.block_until_ready(function(*args, **options))

    return on_a_card if jax.default_backend() == "gpu" else simulated
