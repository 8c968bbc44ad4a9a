"""Controlled ablations: arms that share all they can, statistics paired by seed, and a report."""

from attnlab.ablate.report import write_report
from attnlab.ablate.runs import Ablation, read_rows, run_ablation
from attnlab.ablate.statistics import Difference, paired_difference, pareto_front, seeds_needed

__all__ = [
    "Ablation",
    "Difference",
    "paired_difference",
    "pareto_front",
    "read_rows",
    "run_ablation",
    "seeds_needed",
    "write_report",
]
