from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
from scipy.stats import bootstrap, permutation_test, ttest_ind
from sklearn.metrics import auc, roc_auc_score

from sonofed_simulations.statistics import (
    Contrast,
    PatientDraws,
    budget_area,
    contrast,
    delong,
    effect_of,
    group_effect,
    holm,
    interval,
    leave_one_site_out,
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
    assert paired_effect([0.1, 0.1, 0.1]) is None and paired_effect([0.0, 0.0, 0.0]) is None
    assert paired_effect([1.0, 1.0, 1.0]) is None and paired_effect([1.0, 2.0]) is None
    found = effect_of([1.0, 2.0, -0.5])
    assert (found.higher, found.pairs, found.d) == (2, 3, paired_effect([1.0, 2.0, -0.5]))


def test_effect_of_two_groups_is_students_t_without_their_sizes() -> None:
    draws = np.random.default_rng(5)
    one, two = draws.normal(1, 2, 12), draws.normal(0, 1, 7)
    t = ttest_ind(one, two).statistic
    assert group_effect(one, two) == pytest.approx(t * math.sqrt(1 / 12 + 1 / 7))
    assert group_effect(one, two[:2]) is None and group_effect(np.ones(4), np.ones(3)) is None


def test_a_patient_is_drawn_as_one_in_all_seeds() -> None:
    draws = PatientDraws([("a", ["p", "q"]), ("a", ["q", "r"]), ("b", ["p"])])
    first, second = draws.weights("a", ["p", "q", "q"]), draws.weights("a", ["q", "r"])
    assert first.shape == (2001, 3) and np.all(first[0] == 1)
    assert np.array_equal(first[:, 1], first[:, 2]) and np.array_equal(first[:, 1], second[:, 0])
    assert np.all((first[:, 0] + second.sum(axis=1))[1:] == 3)
    assert first[1:].mean(axis=0) == pytest.approx(1, abs=0.07)
    assert np.all(draws.weights("b", ["p"]) == 1)


def test_holm_by_hand() -> None:
    p = {"a": 0.01, "b": 0.04, "c": 0.03, "d": 0.6}
    tested = {name: Contrast(value=0, low=0, high=0, p=value) for name, value in p.items()}
    # Ordered: 4 x .01, then 3 x .03, then the larger of .09 and 2 x .04, then 1 x .6.
    expected = {"a": 0.04, "c": 0.09, "b": 0.09, "d": 0.6}
    found = {name: value.p_holm for name, value in holm(tested).items()}
    assert found == pytest.approx(expected)
    sure = {"a": tested["a"], "d": tested["d"].model_copy(update={"p": 0.9})}
    assert {n: c.p_holm for n, c in holm(sure).items()} == pytest.approx({"a": 0.02, "d": 0.9})


def test_p_is_two_sided_and_never_zero() -> None:
    values = np.concatenate([[1.0], np.repeat([-1.0, 1.0], [3, 97])])
    assert contrast(values, np.zeros(101)).p == pytest.approx(0.06)
    assert contrast(-values, np.zeros(101)).p == pytest.approx(0.06)
    assert contrast(np.ones(101), np.zeros(101)).p == pytest.approx(2 / 101)
    assert contrast(np.zeros(101), np.zeros(101)).p == 1


def by_patient(values: np.ndarray, patients: list[str]) -> np.ndarray:
    """A mean over images in every sample of patients."""
    weights = PatientDraws([("a", patients)]).weights("a", patients)
    return (weights @ values) / weights.sum(axis=1)


def test_clustered_interval_is_that_of_patient_means_by_scipy() -> None:
    draws = np.random.default_rng(3)
    patients = [f"p{n // 4}" for n in range(160)]
    # Four equal images a patient: forty observations, not 160.
    values = np.repeat(draws.normal(size=40), 4)
    found = interval(by_patient(values, patients))
    reference = bootstrap(
        (values[::4],), np.mean, n_resamples=20_000, method="percentile", rng=draws
    ).confidence_interval
    assert found.value == pytest.approx(values.mean())
    assert (found.low, found.high) == pytest.approx((reference.low, reference.high), abs=0.03)
    by_image = bootstrap(
        (values,), np.mean, n_resamples=2000, method="percentile", rng=draws
    ).confidence_interval
    assert found.high - found.low > 1.7 * (by_image.high - by_image.low)


def test_paired_difference_is_that_of_scipy_on_pairs() -> None:
    draws = np.random.default_rng(4)
    patients = [f"p{n}" for n in range(50)]
    a = draws.normal(size=50)
    b = a - 0.1 + 0.2 * draws.normal(size=50)
    found = contrast(by_patient(a, patients), by_patient(b, patients))
    reference = bootstrap(
        (a - b,), np.mean, n_resamples=20_000, method="percentile", rng=draws
    ).confidence_interval
    assert found.value == pytest.approx(float(np.mean(a - b)))
    assert (found.low, found.high) == pytest.approx((reference.low, reference.high), abs=0.01)


def test_area_is_that_of_scikit_learn() -> None:
    budgets, values = [0.1, 0.2, 0.3, 0.5], [0.7, 0.78, 0.77, 0.81]
    assert budget_area(budgets, values) == pytest.approx(auc(budgets, values) / 0.4)


def test_sites_of_one_hospital_never_decide_for_each_other() -> None:
    hospitals = {"logiq": "rio", "poland": "warsaw", "aplio": "rio", "cairo": "cairo"}
    assert leave_one_site_out(hospitals) == {
        "logiq": ("poland", "cairo"),
        "poland": ("logiq", "aplio", "cairo"),
        "aplio": ("poland", "cairo"),
        "cairo": ("logiq", "poland", "aplio"),
    }
    assert leave_one_site_out({"logiq": "rio", "aplio": "rio"}) == {}
