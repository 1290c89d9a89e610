from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from speckle import SIZE, scans
from torch import Tensor

from sonofed_common.synthesis.memorisation import (
    CERTAINTY,
    MEMBERSHIP,
    WINDOW,
    MemorisationGate,
    RefusedError,
    dissimilarity,
    membership_auroc,
    tells_members,
)

torch.set_num_threads(1)


def names(count: int) -> list[str]:
    return [f"patient {n}" for n in range(count)]


@pytest.fixture(scope="module")
def real() -> Tensor:
    return scans(40)


@pytest.mark.parametrize("shown", [lambda x: x, lambda x: x.flip(-1)], ids=["same", "mirrored"])
def test_copies_are_refused_even_mirrored_brighter_or_noisier(real: Tensor, shown):
    gate = MemorisationGate(real, names(40))
    noise = 0.02 * torch.randn(SIZE, SIZE, generator=torch.Generator().manual_seed(0))
    for image in shown(real[:8]):
        assert not gate.admit(image)
        assert not gate.admit(0.9 * image + 0.05)
        assert not gate.admit((image + noise).clamp(0, 1))
    assert gate.nearest == []


def test_fresh_noise_and_other_patients_are_admitted_once(real: Tensor):
    gate = MemorisationGate(real, names(40))
    noise = torch.rand(5, 1, SIZE, SIZE, generator=torch.Generator().manual_seed(1))
    assert all(gate.admit(image) for image in noise)
    assert not any(gate.admit(image) for image in noise)
    others = [gate.admit(image) for image in scans(20, seed=9)]
    # By the limits' definition about 5% of other patients lie below each.
    assert sum(others) >= 15
    assert len(gate.nearest) == 5 + sum(others)
    assert min(gate.nearest) >= gate.limit


def test_what_is_no_number_is_refused_and_lets_no_copy_pass_after_it(real: Tensor):
    gate = MemorisationGate(real, names(40))
    assert not gate.admit(torch.full_like(real[0], torch.nan))
    assert not gate.admit(real[0])
    noise = torch.rand(real[0].shape, generator=torch.Generator().manual_seed(0))
    assert gate.admit(noise) and not gate.admit(noise)
    assert gate.duplicates == 1


def test_the_limit_is_the_quantile_over_other_patients(real: Tensor):
    views = torch.cat((real[:20], (real[:20] * 0.97 + 0.01)))
    of_patients = MemorisationGate(views, names(20) * 2).limit
    expected = dissimilarity(real[:20], views)
    own = torch.arange(40) % 20 == torch.arange(20)[:, None]
    nearest = expected.masked_fill(own, 2).amin(1)
    assert of_patients == pytest.approx(float(nearest.quantile(0.05)), abs=0.03)


def test_duplicates_in_other_groups_are_of_one_patient(real: Tensor):
    twice = torch.cat((real[:20], (real[:20] * 0.97 + 0.01)))
    known, unknown = MemorisationGate(twice, names(20) * 2), MemorisationGate(twice, names(40))
    assert unknown.limit == known.limit > 0.3
    assert unknown.coarse_limit == known.coarse_limit > 0
    noise = 0.07 * torch.randn(20, 1, SIZE, SIZE, generator=torch.Generator().manual_seed(0))
    assert not any(unknown.admit(image) for image in (real[:20] + noise).clamp(0, 1))


@pytest.mark.parametrize("size", [32, 64, 128])
def test_copies_under_noise_or_shifted_are_refused(size: int):
    real = scans(40, size=size)
    gate = MemorisationGate(real, names(40))
    draws, kept = torch.Generator().manual_seed(0), min(size, 64)
    for strength in (0.05, 0.1, 0.15):
        noise = strength * size / kept * torch.randn(real.shape, generator=draws)
        passed = [gate.admit(image) for image in (real + noise).clamp(0, 1)]
        assert sum(passed) <= 2, strength
    for shift in (1, 2, 4) if kept == 64 else (1,):
        moved = real.roll(shift * size // kept, -1)
        assert sum(gate.admit(image) for image in moved) <= 4, shift


@pytest.mark.parametrize("copies", [False, True])
def test_one_patient_sets_no_limit(real: Tensor, copies: bool):
    images, groups = (real[:1].repeat(40, 1, 1, 1), names(40)) if copies else (real, ["one"] * 40)
    with pytest.raises(RefusedError, match="at least two patients"):
        MemorisationGate(images, groups)


def test_dissimilarity_is_one_minus_ssim():
    images = scans(4)
    from sonofed_common.monai import SSIMMetric

    metric = SSIMMetric(2, data_range=1.0, kernel_type="uniform", win_size=WINDOW)
    ours = dissimilarity(images[:2], images[2:])
    for i in range(2):
        for j in range(2):
            views = torch.stack((images[i], images[i].flip(-1)))
            theirs = 1 - float(metric(views, images[2 + j].expand(2, -1, -1, -1)).max())
            # Ours takes every third window.
            assert float(ours[i, j]) == pytest.approx(theirs, abs=0.05)


@settings(max_examples=8, deadline=None)
@given(seed=st.integers(0, 1000), size=st.sampled_from([16, 31, 32, 80]))
def test_dissimilarity_of_itself_is_zero_and_of_others_is_not(seed: int, size: int):
    images = scans(3, seed, size)
    distances = dissimilarity(images, torch.cat((images, images.flip(-1))))
    assert distances.shape == (3, 6)
    for half in distances.split(3, dim=1):
        assert torch.allclose(half.diag(), torch.zeros(3), atol=1e-5)
    assert (distances >= -1e-5).all() and (distances <= 2).all()
    assert dissimilarity(images[:1], images[1:2]).item() > 0.1


def test_membership_is_told_where_images_are_memorised_and_not_where_they_are_new():
    training, held_out = scans(30, seed=2), scans(30, seed=3)
    copies = (training + 0.05 * torch.rand(training.shape)).clamp(0, 1)
    assert membership_auroc(training, held_out, copies) == 1
    assert membership_auroc(training, held_out, scans(30, seed=4)) == pytest.approx(0.5, abs=0.2)
    # The standard error of a score of chance, from the Mann-Whitney statistic's variance.
    draws = np.random.default_rng(0)
    scores = draws.normal(size=(4000, 75))
    chance = [(s[:60, None] > s[None, 60:]).mean() for s in scores]
    edge = MEMBERSHIP + CERTAINTY * np.std(chance)
    assert tells_members(edge + 0.005, 60, 15) and not tells_members(edge - 0.005, 60, 15)
    # All right on five images proves nothing.
    assert not tells_members(1.0, 3, 2)
