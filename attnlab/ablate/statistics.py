"""Differences between arms, paired by seed."""

import dataclasses
import math
from collections.abc import Mapping

import numpy as np
from scipy import stats


@dataclasses.dataclass(frozen=True)
class Difference:
    """Mean of (arm - baseline) over the seeds both have, and its two-sided interval; NaN bounds for one seed."""

    mean: float
    low: float
    high: float
    seeds: int


def paired_difference(
    arm: Mapping[int, float], baseline: Mapping[int, float], *, confidence: float = 0.95
) -> Difference:
    """Student's t interval of the paired differences.

    Pairing removes what a seed gives to both arms (initial values, batches), so that few seeds tell more than two
    independent means would. With n seeds the interval is mean +- t(n-1) s / sqrt(n); it assumes that differences are
    about normal.

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
        return Difference(mean, math.nan, math.nan, 1)
    error = float(differences.std(ddof=1)) / math.sqrt(len(shared))
    reach = float(stats.t.ppf(0.5 + confidence / 2, len(shared) - 1)) * error
    return Difference(mean, mean - reach, mean + reach, len(shared))
