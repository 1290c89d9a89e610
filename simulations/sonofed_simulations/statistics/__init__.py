"""Splits and statistics of every table: one place for how a number is judged.

Splits are by patient or group of duplicates, with one seed for all methods that are compared;
intervals and paired differences come of one bootstrap of patients, clustered in their sites.
"""

from sonofed_common.data.splits import Split, check_no_leak, folds_by_group, split_by_group
from sonofed_simulations.statistics.bootstrap import (
    LEVEL,
    REPLICATES,
    Contrast,
    Floats,
    Interval,
    PatientDraws,
    contrast,
    holm,
    interval,
    is_told,
)
from sonofed_simulations.statistics.budget_curves import budget_area, needed_budget
from sonofed_simulations.statistics.effects import (
    Effect,
    effect_of,
    group_effect,
    paired_effect,
)
from sonofed_simulations.statistics.hypothesis_tests import (
    PERMUTATIONS,
    DeLong,
    delong,
    sign_permutation,
)
from sonofed_simulations.statistics.left_out import leave_one_site_out

__all__ = [
    "LEVEL",
    "PERMUTATIONS",
    "REPLICATES",
    "Contrast",
    "DeLong",
    "Effect",
    "Floats",
    "Interval",
    "PatientDraws",
    "Split",
    "budget_area",
    "check_no_leak",
    "contrast",
    "delong",
    "effect_of",
    "folds_by_group",
    "group_effect",
    "holm",
    "interval",
    "is_told",
    "leave_one_site_out",
    "needed_budget",
    "paired_effect",
    "sign_permutation",
    "split_by_group",
]
