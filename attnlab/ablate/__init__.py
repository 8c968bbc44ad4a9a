"""Controlled ablations: arms that share all they can, statistics paired by seed, and a report."""

from attnlab.ablate.compiled import compile_arms
from attnlab.ablate.dry_run import dry_run
from attnlab.ablate.report import write_report
from attnlab.ablate.runs import read_rows, run_ablation
from attnlab.ablate.speed import measure_speed
from attnlab.ablate.statistics import Difference, holm, paired_difference, pareto_front
from attnlab.ablate.sweep import Ablation
