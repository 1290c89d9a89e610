from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as npst
from scipy.stats import mannwhitneyu
from sklearn import metrics as reference

from sonofed_common.contract.errors import OneClassError
from sonofed_common.metrics import (
    classification_metrics,
    clustered_intervals,
    threshold_at_specificity,
)


@st.composite
def predictions(draw, classes=2):
    count = draw(st.integers(classes, 60))
    labels = draw(npst.arrays(np.int64, count, elements=st.integers(0, classes - 1)))
    if classes == 2:
        labels[:2] = [0, 1]
    coarse = draw(npst.arrays(np.int64, count, elements=st.integers(0, 12)))
    return labels, coarse / 12


@given(predictions())
@settings(max_examples=60, deadline=None)
def test_metrics_agree_with_scikit_learn_and_scipy(data):
    labels, p = data
    ours = classification_metrics(labels, p, 0.4)
    called = (p >= 0.5).astype(int)
    assert ours["auroc"] == pytest.approx(reference.roc_auc_score(labels, p))
    u = mannwhitneyu(p[labels == 1], p[labels == 0]).statistic
    assert ours["auroc"] == pytest.approx(u / (labels.sum() * (1 - labels).sum()))
    assert ours["accuracy"] == pytest.approx(reference.accuracy_score(labels, called))
    assert ours["balanced_accuracy"] == pytest.approx(
        reference.balanced_accuracy_score(labels, called)
    )
    assert ours["sensitivity"] == pytest.approx(reference.recall_score(labels, called))
    assert ours["specificity"] == pytest.approx(reference.recall_score(labels, called, pos_label=0))
    assert ours["sensitivity_at_specificity_90"] == pytest.approx(
        reference.recall_score(labels, p >= 0.4)
    )
    assert ours["brier"] == pytest.approx(reference.brier_score_loss(labels, p))


@given(predictions())
@settings(max_examples=40, deadline=None)
def test_ece_is_the_mean_gap_of_ten_bins(data):
    labels, p = data
    expected = 0.0
    for b in range(10):
        low, high = b / 10, (b + 1) / 10
        inside = (p >= low) & ((p < high) | (b == 9))
        if inside.any():
            expected += inside.mean() * abs(p[inside].mean() - labels[inside].mean())
    assert classification_metrics(labels, p, None)["ece"] == pytest.approx(expected)


@given(predictions(), st.floats(0.01, 1.0))
@settings(max_examples=60, deadline=None)
def test_threshold_is_the_lowest_that_keeps_the_specificity(data, specificity):
    labels, p = data
    benign = p[labels == 0]
    threshold = threshold_at_specificity(labels, p, specificity)
    assert np.mean(benign < threshold) >= specificity - 1e-9
    lower = np.nextafter(threshold, -np.inf)
    assert np.mean(benign < lower) < specificity


def test_what_one_class_cannot_tell_is_nan():
    metrics = classification_metrics([1, 1, 1], [0.2, 0.7, 0.9], None)
    undefined = {name for name, value in metrics.items() if math.isnan(value)}
    assert undefined == {
        "auroc",
        "balanced_accuracy",
        "specificity",
        "sensitivity_at_specificity_90",
    }
    assert metrics["accuracy"] == pytest.approx(2 / 3)
    with pytest.raises(OneClassError):
        threshold_at_specificity([1, 1], [0.1, 0.2])


def test_nothing_to_measure_is_nan_not_a_crash():
    assert all(math.isnan(v) for v in classification_metrics([], [], 0.5).values())
    intervals = clustered_intervals([], [], [], 100, 0, 0.5)
    assert all(math.isnan(end) for pair in intervals.values() for end in pair)


def cohort(count, patients, seed=0):
    generator = np.random.default_rng(seed)
    groups = generator.integers(0, patients, count)
    labels = generator.integers(0, 2, patients)[groups]
    p = np.clip(0.3 + 0.3 * labels + 0.2 * generator.standard_normal(count), 0, 1)
    return labels, p.round(2), [f"patient {g}" for g in groups]


def test_intervals_agree_with_a_plain_bootstrap_over_patients():
    labels, p, groups = cohort(120, 40)
    groups = np.array(groups)
    names = np.unique(groups)
    ours = clustered_intervals(labels, p, groups, 1500, seed=3, threshold=0.5)
    generator = np.random.default_rng(99)
    aurocs, accuracies = [], []
    for _ in range(400):
        drawn = generator.choice(names, len(names))
        rows = np.concatenate([np.flatnonzero(groups == name) for name in drawn])
        if len(set(labels[rows])) == 2:
            aurocs.append(reference.roc_auc_score(labels[rows], p[rows]))
        accuracies.append(reference.accuracy_score(labels[rows], p[rows] >= 0.5))
    for name, values in (("auroc", aurocs), ("accuracy", accuracies)):
        low, high = np.percentile(values, [2.5, 97.5])
        assert ours[name][0] == pytest.approx(low, abs=0.025)
        assert ours[name][1] == pytest.approx(high, abs=0.025)


def test_intervals_are_wider_when_images_of_a_patient_move_together():
    labels, p, _ = cohort(30, 30)
    repeated = np.repeat(np.arange(30), 10)
    labels, p = np.repeat(labels, 10), np.repeat(p, 10)
    by_patient = clustered_intervals(labels, p, repeated, 500, 0, None)["accuracy"]
    by_image = clustered_intervals(labels, p, np.arange(300), 500, 0, None)["accuracy"]
    assert by_patient[1] - by_patient[0] > 2 * (by_image[1] - by_image[0])


def test_intervals_are_seeded_and_hold_the_estimate():
    labels, p, groups = cohort(400, 300)
    first = clustered_intervals(labels, p, groups, 2000, 1, 0.6)
    assert first == clustered_intervals(labels, p, groups, 2000, 1, 0.6)
    assert first != clustered_intervals(labels, p, groups, 2000, 2, 0.6)
    for name, value in classification_metrics(labels, p, 0.6).items():
        # Resampling adds noise to every bin, so the bootstrap of the calibration error lies high.
        if name != "ece":
            assert first[name][0] <= value <= first[name][1]


def test_intervals_of_one_class_are_nan_where_undefined():
    intervals = clustered_intervals([0, 0], [0.2, 0.6], ["a", "b"], 50, 0, None)
    assert math.isnan(intervals["auroc"][0])
    assert intervals["accuracy"] == (0.0, 1.0)
