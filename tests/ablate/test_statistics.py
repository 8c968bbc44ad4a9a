"""Paired differences and their interval."""

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from attnlab.ablate import holm, paired_difference, pareto_front


def test_equals_the_paired_t_test_of_scipy():
    random = np.random.default_rng(0)
    arm, baseline = random.normal(size=(2, 6))
    got = paired_difference(dict(enumerate(arm)), dict(enumerate(baseline)), confidence=0.9)
    want = stats.ttest_rel(arm, baseline).confidence_interval(0.9)
    np.testing.assert_allclose([got.low, got.high], want)
    np.testing.assert_allclose(got.p, stats.ttest_rel(arm, baseline).pvalue)
    assert got.seeds == 6


def test_pairs_by_seed_and_drops_seeds_that_one_side_lacks():
    got = paired_difference({0: 1.0, 2: 5.0, 7: 9.0}, {2: 4.0, 0: 3.0})
    assert (got.mean, got.seeds) == (-0.5, 2)


def test_what_a_seed_gives_to_both_arms_cancels():
    difference = paired_difference({0: 10.0, 1: 20.5, 2: 7.0}, {0: 9.9, 1: 20.4, 2: 6.9})
    np.testing.assert_allclose([difference.low, difference.high], 0.1, rtol=1e-9)


@pytest.mark.parametrize("seeds", [1, 2])
def test_fewer_than_three_seeds_have_neither_interval_nor_test(seeds):
    got = paired_difference(dict.fromkeys(range(seeds), 1.0), {0: 2.0, 1: 3.0, 2: 4.0})
    assert got.mean == -0.5 - 0.5 * seeds
    assert np.isnan([got.low, got.high, got.p, got.bootstrap_low, got.bootstrap_high]).all()


def test_fewer_than_ten_seeds_are_not_resampled():
    got = paired_difference(dict(enumerate([1.0, 2.0, 4.0])), dict.fromkeys(range(3), 0.0))
    assert np.isfinite([got.low, got.high, got.p]).all()
    assert np.isnan([got.bootstrap_low, got.bootstrap_high]).all()


@pytest.mark.parametrize(("difference", "p"), [(0.5, 0.0), (0.0, 1.0)])
def test_differences_without_any_spread_are_certain(difference, p):
    got = paired_difference(dict.fromkeys(range(3), difference), dict.fromkeys(range(3), 0.0))
    assert (got.low, got.high, got.p) == (difference, difference, p)


def test_no_seed_in_common_is_an_error():
    with pytest.raises(ValueError, match="none of them is among the baseline's"):
        paired_difference({0: 1.0}, {1: 1.0})


def test_the_interval_covers_as_often_as_it_states():
    random = np.random.default_rng(1)
    covered = 0
    for _ in range(2000):
        samples = random.normal(0.3, 1.0, size=4)
        got = paired_difference(dict(enumerate(samples)), dict.fromkeys(range(4), 0.0))
        covered += got.low <= 0.3 <= got.high
    assert 0.93 < covered / 2000 < 0.97


def test_the_bootstrap_is_near_the_t_interval_with_many_seeds_and_the_same_every_time():
    samples = dict(enumerate(np.random.default_rng(2).normal(0.3, 1.0, size=200)))
    got, again = (paired_difference(samples, dict.fromkeys(samples, 0.0)) for _ in range(2))
    assert got == again
    np.testing.assert_allclose([got.bootstrap_low, got.bootstrap_high], [got.low, got.high], atol=0.02)
    np.testing.assert_allclose(got.deviation, np.std(list(samples.values()), ddof=1))


def test_holm_equals_the_definition_and_skips_what_has_no_test():
    assert holm([0.03, math.nan, 0.01, 0.04]) == pytest.approx([0.06, math.nan, 0.03, 0.06], nan_ok=True)
    assert holm([0.9, 0.8]) == [1.0, 1.0]
    assert holm([0.02]) == [0.02]
    assert holm([]) == []


@pytest.mark.long
def test_holm_errs_anywhere_as_often_as_it_states():
    """Ten arms that are like the baseline: without correction a third of all sweeps would name one."""
    random = np.random.default_rng(4)
    named = 0
    for _ in range(1000):
        base, arms = dict(enumerate(random.normal(size=4))), random.normal(size=(10, 4))
        named += min(holm([paired_difference(dict(enumerate(arm)), base).p for arm in arms])) < 0.05
    assert named / 1000 < 0.07


def dominates(one, other):
    return one[0] <= other[0] and one[1] <= other[1] and one != other


# Few values, so that ties and equal points are common.
coordinates = st.integers(0, 6).map(float)


@given(st.lists(st.tuples(coordinates, coordinates), max_size=12))
def test_no_point_dominates_one_of_the_front_and_every_other_is_dominated_by_one_of_it(points):
    front = pareto_front(points)
    assert [points[index] for index in front] == sorted(points[index] for index in front)
    assert len(set(front)) == len(front)
    for index, point in enumerate(points):
        if index in front:
            assert not any(dominates(other, point) for other in points)
        else:
            assert any(dominates(points[other], point) for other in front)
