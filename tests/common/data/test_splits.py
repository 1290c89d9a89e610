"""Splits: no patient on both sides, nothing lost, classes held, repeatable."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sonofed_common.contract.errors import ConfigurationError
from sonofed_common.data.sample import Sample
from sonofed_common.data.splits import Split, check_no_leak, folds_by_group, split_by_group


def sample(index: int, group: str, label: int | None) -> Sample:
    return Sample(f"{index:04d}", Path(f"{index:04d}.png"), (), label, group)


@st.composite
def sets(draw: st.DrawFn) -> list[Sample]:
    rows = draw(
        st.lists(
            st.tuples(st.integers(0, 30), st.sampled_from([0, 1, 2, None])), min_size=2, max_size=80
        ).filter(lambda rows: len({group for group, _ in rows}) > 1)
    )
    return [sample(i, f"p{group}", label) for i, (group, label) in enumerate(rows)]


@given(sets(), st.floats(0.05, 0.95), st.integers(0, 2**32))
def test_invariants(samples: list[Sample], fraction: float, seed: int) -> None:
    split = split_by_group(samples, fraction, seed)
    assert {s.group for s in split.pool}.isdisjoint(s.group for s in split.test)
    assert sorted(s.name for s in split.pool + split.test) == [s.name for s in samples]
    assert split.pool and split.test
    assert split == split_by_group(samples, fraction, seed)
    check_no_leak(split)


@given(
    st.lists(st.tuples(st.integers(0, 2), st.integers(1, 6)), min_size=2, max_size=60),
    st.floats(0.1, 0.9),
    st.integers(0, 1000),
)
def test_every_class_of_two_patients_is_on_both_sides(
    patients: list[tuple[int, int]], fraction: float, seed: int
) -> None:
    samples = [
        sample(100 * i + j, f"p{i}", label)
        for i, (label, count) in enumerate(patients)
        for j in range(count)
    ]
    split = split_by_group(samples, fraction, seed)
    for label, count in Counter(label for label, _ in patients).items():
        if count > 1:
            assert any(s.label == label for s in split.pool)
            assert any(s.label == label for s in split.test)


@pytest.mark.parametrize("fraction", [0.1, 0.2, 0.33, 0.5])
@pytest.mark.parametrize("seed", range(5))
def test_the_test_part_is_stratified(fraction: float, seed: int) -> None:
    labels = [0] * 240 + [1] * 110
    samples = [
        sample(3 * i + j, f"p{i}", label)
        for i, label in enumerate(labels)
        for j in range(1 + i % 3)
    ]
    split = split_by_group(samples, fraction, seed)
    totals = Counter(s.label for s in samples)
    held = Counter(s.label for s in split.test)
    for label in (0, 1):
        assert held[label] == pytest.approx(fraction * totals[label], abs=2)
    # Patients with many images are neither sought nor avoided.
    patients = len({s.group for s in split.test}) / len(labels)
    assert patients == pytest.approx(fraction, abs=0.1)


def test_seeds_differ() -> None:
    samples = [sample(i, f"p{i}", i % 2) for i in range(100)]
    assert split_by_group(samples, 0.2, 0) != split_by_group(samples, 0.2, 1)


@pytest.mark.parametrize("fraction", [-0.1, 0.0, 1.0, 2.0, float("nan")])
def test_fraction_out_of_range(fraction: float) -> None:
    with pytest.raises(ConfigurationError):
        split_by_group([sample(0, "a", 0), sample(1, "b", 1)], fraction, 0)


def test_one_patient_cannot_be_split() -> None:
    with pytest.raises(ConfigurationError):
        split_by_group([sample(0, "a", 0), sample(1, "a", 1)], 0.5, 0)


def test_a_leak_is_caught_without_naming_the_patient() -> None:
    split = Split((sample(0, "anna", 0), sample(1, "b", 1)), (sample(2, "anna", 0),))
    with pytest.raises(ConfigurationError) as caught:
        check_no_leak(split)
    assert "anna" not in str(caught.value)


@given(st.integers(2, 5), st.integers(0, 1000), st.integers(10, 40))
def test_folds_hold_every_image_once_and_no_patient_twice(
    folds: int, seed: int, patients: int
) -> None:
    samples = [
        sample(10 * patient + image, f"p{patient}", patient % 2)
        for patient in range(patients)
        for image in range(1 + patient % 3)
    ]
    splits = folds_by_group(samples, folds, seed)
    assert splits == folds_by_group(samples, folds, seed)
    for split in splits:
        check_no_leak(split)
        assert len(split.pool) + len(split.test) == len(samples)
        assert {s.label for s in split.test} == {0, 1}
    assert sorted(s.name for split in splits for s in split.test) == [s.name for s in samples]


def test_more_folds_than_patients_are_refused() -> None:
    samples = [sample(n, f"p{n // 2}", n % 2) for n in range(6)]
    with pytest.raises(ConfigurationError, match="3 patients"):
        folds_by_group(samples, 4, 0)


def test_more_folds_than_images_of_either_class_are_refused() -> None:
    samples = [sample(n, f"p{n}", n % 2) for n in range(6)]
    with pytest.raises(ConfigurationError, match="3 images of the larger class"):
        folds_by_group(samples, 4, 0)
