"""Differences between arms, paired by seed, and which arms are worth their cost."""

import dataclasses
import math
from collections.abc import Mapping, Sequence

import numpy as np
from scipy import stats

# Seeds below which no interval is given: two leave one degree of freedom, and an interval 13 deviations wide.
FEWEST_SEEDS = 3
# With three seeds the bootstrap's interval is from the least to the largest, and far too narrow below about ten.
_FEWEST_TO_RESAMPLE = 10


@dataclasses.dataclass(frozen=True)
class Difference:
    """Mean of (arm - baseline) over the seeds both have.

    low, high: Student's t interval; p: of the two-sided t test of no difference; NaN for fewer than three seeds.
    bootstrap_low, bootstrap_high: from resampled seeds; NaN for fewer than ten. deviation: of the differences; NaN for
    one seed.
    """

    mean: float
    low: float
    high: float
    seeds: int
    bootstrap_low: float
    bootstrap_high: float
    deviation: float
    p: float


def paired_difference(
    arm: Mapping[int, float], baseline: Mapping[int, float], *, confidence: float = 0.95
) -> Difference:
    """Student's t interval of the paired differences, and, of ten seeds and more, a bootstrap interval beside it.

    Pairing removes what a seed gives to both arms (initial values, batches), so that few seeds resolve more than two
    independent means would. With n seeds the interval is mean +- t(n-1) s / sqrt(n); it assumes that differences are
    about normal. The bootstrap (percentiles of the mean over 10,000 resamples of the seeds, always the same ones)
    assumes no shape.

    Args:
      arm, baseline: the metric by seed.
      confidence: coverage of the interval, in (0, 1).
    """
    shared = sorted(set(arm) & set(baseline))
    if not shared:
        raise ValueError(f"arm: got seeds {sorted(arm)}; none of them is among the baseline's, {sorted(baseline)}")
    differences = np.array([arm[seed] - baseline[seed] for seed in shared], dtype=np.float64)
    seeds, mean = len(shared), float(differences.mean())
    deviation = float(differences.std(ddof=1)) if seeds > 1 else math.nan
    low = high = p = bootstrap_low = bootstrap_high = math.nan
    if seeds >= FEWEST_SEEDS:
        error = deviation / math.sqrt(seeds)
        reach = float(stats.t.ppf(0.5 + confidence / 2, seeds - 1)) * error
        low, high = mean - reach, mean + reach
        p = float(2 * stats.t.sf(abs(mean) / error, seeds - 1)) if error > 0 else float(mean == 0)
    if seeds >= _FEWEST_TO_RESAMPLE:
        resampled = np.random.default_rng(0).choice(differences, (10_000, seeds)).mean(axis=1)
        bootstrap_low, bootstrap_high = map(float, np.quantile(resampled, [0.5 - confidence / 2, 0.5 + confidence / 2]))
    return Difference(mean, low, high, seeds, bootstrap_low, bootstrap_high, deviation, p)


def holm(p: Sequence[float]) -> list[float]:
    """The p values of several tests, corrected by Holm: rejecting those up to 0.05 errs anywhere in 5 % of all repeats.

    NaN stays, and counts as no test.
    """
    tests = sum(not math.isnan(value) for value in p)
    corrected, least = [math.nan] * len(p), 0.0
    for rank, index in enumerate(sorted((i for i in range(len(p)) if not math.isnan(p[i])), key=lambda i: p[i])):
        least = max(least, min(1.0, (tests - rank) * p[index]))
        corrected[index] = least
    return corrected


def pareto_front(points: Sequence[tuple[float, float]]) -> list[int]:
    """Indices of the points (cost, loss) that none dominates, by rising cost; equal points are on it together.

    A point dominates another if it is not above it in either number and below it in one.
    """
    front: list[int] = []
    for index in sorted(range(len(points)), key=lambda index: points[index]):
        # In this order only the last of the front so far can be what dominates a point.
        if not front or points[index][1] < points[front[-1]][1] or points[index] == points[front[-1]]:
            front.append(index)
    return front
