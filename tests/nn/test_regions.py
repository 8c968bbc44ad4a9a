"""Regions of images that choose regions: BiFormer's vectors. The mixers' suite has the rest."""

from pathlib import Path

import jax
import numpy as np
import pytest

from attnlab import nn

BIFORMER = Path(__file__).parents[1] / "vectors" / "block_sparse" / "biformer.npz"


def test_vectors_of_bi_level_routing():
    data = np.load(BIFORMER)
    heads, width = data["query"].shape[3:]
    with jax.enable_x64(True):
        mixer = nn.RegionAttention(
            heads * width,
            is_causal=False,
            num_heads=heads,
            regions=tuple(data["regions"].tolist()),
            count=data["topk"].item(),
            rotary=False,
            dtype=np.float64,
        )
        factor = data["scale"] * width**0.5  # the published scale on the mixer's own

        @jax.jit
        def mixed(query, key, value):
            return mixer.mix(factor * query, key, value, query, None)

        out = mixed(*(data[name] for name in ("query", "key", "value")))
    np.testing.assert_allclose(out, data["out"], atol=1e-12)


def test_regions_divide_the_image():
    mixer = nn.RegionAttention(16, is_causal=False, regions=(2, 3), count=2)
    with pytest.raises(ValueError, match=r"regions: got \(2, 3\); must divide the space \(4, 4\)"):
        mixer.flops((4, 4))
    # 6 regions of 2 x 1 positions, of which each sees 2: 4 keys a query, and the products of the regions.
    projections, choosing = 2 * 12 * 16 * 4 * 16, 2 * 6**2 * 16
    assert mixer.flops((4, 3)) - projections - choosing == 4 * 16 * 12 * 4
