"""Differences between arms, paired by seed, and which arms are worth their cost."""

import bisect
import dataclasses
import math
from collections.abc import Mapping, Sequence

import numpy as np
from scipy import stats


@dataclasses.dataclass(frozen=True)
class Difference:
    """Mean of (arm - baseline) over the seeds both have, and its two-sided intervals; NaN bounds for one seed.

    low, high: Student's t. bootstrap_low, bootstrap_high: from resampled seeds. deviation: of the differences.
    """

    mean: float
    low: float
    high: float
    seeds: int
    bootstrap_low: float
    bootstrap_high: float
    deviation: float


def paired_difference(
    arm: Mapping[int, float], baseline: Mapping[int, float], *, confidence: float = 0.95
) -> Difference:
    """Student's t interval of the paired differences, and a bootstrap interval beside it.

    Pairing removes what a seed gives to both arms (initial values, batches), so that few seeds resolve more than two
    independent means would. With n seeds the interval is mean +- t(n-1) s / sqrt(n); it assumes that differences are
    about normal. The bootstrap (percentiles of the mean over 10,000 resamples of the seeds, always the same ones)
    assumes no shape, but is too narrow for few seeds; below about ten the t interval is the one to read.

    Args:
      arm, baseline: the metric by seed.
      confidence: coverage of the interval, in (0, 1).
    """
    shared = sorted(set(arm) & set(baseline))
    if not shared:
        raise ValueError(f"arm: got seeds {sorted(arm)}; none of them is among the baseline's, {sorted(baseline)}")
    differences = np.array([arm[seed] - baseline[seed] for seed in shared], dtype=np.float64)
    mean = float(differences.mean())
    if len(shared) == 1:
        return Difference(mean, math.nan, math.nan, 1, math.nan, math.nan, math.nan)
    deviation = float(differences.std(ddof=1))
    reach = float(stats.t.ppf(0.5 + confidence / 2, len(shared) - 1)) * deviation / math.sqrt(len(shared))
    resampled = np.random.default_rng(0).choice(differences, (10_000, len(shared))).mean(axis=1)
    low, high = np.quantile(resampled, [0.5 - confidence / 2, 0.5 + confidence / 2])
    return Difference(mean, mean - reach, mean + reach, len(shared), float(low), float(high), deviation)


def seeds_needed(deviation: float, difference: float, *, power: float = 0.8, confidence: float = 0.95) -> int:
    """Seeds with which a paired t test finds a true difference of this size, in `power` of all repeats.

    deviation: of the paired differences between seeds, as measured or guessed.
    """
    if not (deviation >= 0 and math.isfinite(deviation) and math.isfinite(difference)) or difference == 0:
        raise ValueError(f"difference: got {difference} with deviation {deviation}; need finite ones, and not 0")
    if deviation == 0:
        return 2
    effect = abs(difference) / deviation

    def chance(seeds: int) -> float:
        limit = stats.t.ppf(0.5 + confidence / 2, seeds - 1)
        shift = effect * math.sqrt(seeds)
        return float(stats.nct.sf(limit, seeds - 1, shift) + stats.nct.cdf(-limit, seeds - 1, shift))

    most = 2
    while chance(most) < power:
        most *= 2
    return 2 + bisect.bisect_left(range(2, most), power, key=chance)


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
