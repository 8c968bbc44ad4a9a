"""Paired differences and their interval."""

import math

import numpy as np
import pytest
from scipy import stats

from attnlab.ablate import paired_difference


def test_equals_the_paired_t_test_of_scipy():
    random = np.random.default_rng(0)
    arm, baseline = random.normal(size=(2, 6))
    got = paired_difference(dict(enumerate(arm)), dict(enumerate(baseline)), confidence=0.9)
    want = stats.ttest_rel(arm, baseline).confidence_interval(0.9)
    np.testing.assert_allclose([got.low, got.high], want)
    assert got.seeds == 6


def test_pairs_by_seed_and_drops_seeds_that_one_side_lacks():
    got = paired_difference({0: 1.0, 2: 5.0, 7: 9.0}, {2: 4.0, 0: 3.0})
    assert (got.mean, got.seeds) == (-0.5, 2)


def test_what_a_seed_gives_to_both_arms_cancels():
    difference = paired_difference({0: 10.0, 1: 20.5}, {0: 9.9, 1: 20.4})
    np.testing.assert_allclose([difference.low, difference.high], 0.1, rtol=1e-9)


def test_one_seed_has_no_interval():
    got = paired_difference({0: 1.0}, {0: 2.0})
    assert got.mean == -1.0
    assert math.isnan(got.low)
    assert math.isnan(got.high)


def test_no_seed_in_common_is_an_error():
    with pytest.raises(ValueError, match="none of them is among the baseline's"):
        paired_difference({0: 1.0}, {1: 1.0})


def test_the_interval_covers_as_often_as_it_says():
    random = np.random.default_rng(1)
    covered = 0
    for _ in range(2000):
        samples = random.normal(0.3, 1.0, size=4)
        got = paired_difference(dict(enumerate(samples)), dict.fromkeys(range(4), 0.0))
        covered += got.low <= 0.3 <= got.high
    assert 0.93 < covered / 2000 < 0.97
