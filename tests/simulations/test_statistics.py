from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
from scipy.stats import permutation_test
from sklearn.metrics import roc_auc_score

from sonofed_simulations.statistics import (
    budget_area,
    delong,
    needed_budget,
    paired_effect,
    sign_permutation,
)


def scores(seed: int, count: int = 60) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    draws = np.random.default_rng(seed)
    labels = np.arange(count) % 3 == 0
    common = draws.normal(size=count) + labels
    return labels, common.round(1), (common + draws.normal(size=count)).round(1)


def delong_by_pairs(labels: np.ndarray, a: np.ndarray, b: np.ndarray) -> tuple[float, float]:
    """The 1988 formulas as they stand: a kernel over all pairs."""
    gains = []
    for score in (a, b):
        gap = score[labels][:, None] - score[~labels][None, :]
        gains.append((gap > 0) + 0.5 * (gap == 0))
    difference = gains[0] - gains[1]
    by_positive, by_negative = difference.mean(axis=1), difference.mean(axis=0)
    variance = by_positive.var(ddof=1) / len(by_positive) + by_negative.var(ddof=1) / len(
        by_negative
    )
    return float(difference.mean()), math.sqrt(variance)


@pytest.mark.parametrize("seed", range(5))
def test_delong_equals_the_sum_over_all_pairs(seed: int) -> None:
    labels, a, b = scores(seed)
    found = delong(labels, a, b)
    gap, error = delong_by_pairs(labels, a, b)
    assert found.first == pytest.approx(roc_auc_score(labels, a))
    assert found.second == pytest.approx(roc_auc_score(labels, b))
    assert found.first - found.second == pytest.approx(gap)
    assert found.standard_error == pytest.approx(error)
    assert found.p == pytest.approx(math.erfc(abs(gap / error) / math.sqrt(2)))


def test_delong_of_a_score_with_itself_has_no_p() -> None:
    labels, a, _ = scores(0)
    assert delong(labels, a, a).standard_error == 0 and math.isnan(delong(labels, a, a).p)


def test_permutation_agrees_with_all_flips_and_with_scipy() -> None:
    values = np.random.default_rng(0).normal(0.6, 1, 10)
    flips = [
        abs(float(np.dot(signs, values))) >= abs(values.sum()) - 1e-9
        for signs in itertools.product((-1, 1), repeat=10)
    ]
    exact = permutation_test(
        (values,), np.mean, permutation_type="samples", n_resamples=2000, alternative="two-sided"
    )
    assert np.mean(flips) == pytest.approx(exact.pvalue)
    assert sign_permutation(values) == pytest.approx(np.mean(flips), abs=0.015)


def test_permutation_of_equal_methods_is_one_and_counts_the_observed_flip() -> None:
    assert sign_permutation(np.zeros(20)) == 1
    assert sign_permutation(np.ones(60)) == pytest.approx(1 / 10_001)


def test_area_of_a_straight_line_is_its_middle() -> None:
    budgets = [0.1, 0.2, 0.3, 0.5]
    lines = np.array([[2 * b + 1 for b in budgets], [4.0] * 4])
    assert budget_area(budgets, lines) == pytest.approx([2 * 0.3 + 1, 4.0])


def test_needed_budget_is_where_the_curve_first_crosses() -> None:
    budgets = [0.0, 0.2, 1.0]
    curves = [[0.5, 0.7, 0.9], [0.8, 0.7, 0.9], [0.5, 0.6, 0.7]]
    found = needed_budget(budgets, curves, [0.6, 0.8, 0.75])
    assert found[:2] == pytest.approx([0.1, 0.0]) and math.isnan(found[2])


def test_effect_is_mean_by_deviation() -> None:
    assert paired_effect([1.0, 2.0, 3.0]) == pytest.approx(2.0)
    assert paired_effect([1.0, 1.0, 1.0]) is None and paired_effect([1.0, 2.0]) is None
