"""Abdominal phantoms: four organs, as real scanners would show them."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sonofed_common.data.decoding import read_mask
from sonofed_common.data.readers import read
from sonofed_simulations.phantoms import SCANNERS, SOURCE, Phantom, generate, write_dataset
from sonofed_simulations.phantoms.abdomen import (
    LEFT_KIDNEY,
    LIVER,
    RIGHT_KIDNEY,
    SPLEEN,
    Flank,
)
from sonofed_simulations.phantoms.organ import Organ
from sonofed_simulations.phantoms.scanner import abdominal

RIGHT, LEFT = {LIVER, RIGHT_KIDNEY}, {LEFT_KIDNEY, SPLEEN}


def draw(count: int, size: int = 64, seed: int = 2, scanner: str = "source") -> list[Phantom]:
    return list(generate(SCANNERS[scanner], count, seed, size, anatomy="abdomen"))


def organs(phantom: Phantom) -> set[int]:
    return set(np.unique(phantom.mask).tolist()) - {0}


@pytest.mark.parametrize("name", sorted(SCANNERS))
def test_a_view_shows_one_or_two_organs_of_one_side(name: str) -> None:
    seen = [organs(phantom) for phantom in draw(20, scanner=name)]
    assert all(found and (found <= RIGHT or found <= LEFT) for found in seen)
    assert set.union(*seen) == RIGHT | LEFT
    assert {len(found) for found in seen} == {1, 2}


def test_the_liver_is_the_largest_and_kidneys_lie_deepest() -> None:
    sizes: dict[int, list[float]] = {}
    depths: dict[int, list[float]] = {}
    for phantom in draw(24):
        for organ in organs(phantom):
            inside = phantom.mask == organ
            sizes.setdefault(organ, []).append(float(inside.mean()))
            depths.setdefault(organ, []).append(float(np.nonzero(inside)[0].mean()))
    size = {organ: np.mean(values) for organ, values in sizes.items()}
    depth = {organ: np.mean(values) for organ, values in depths.items()}
    assert size[LIVER] > 1.5 * max(size[SPLEEN], size[RIGHT_KIDNEY], size[LEFT_KIDNEY])
    assert min(depth[RIGHT_KIDNEY], depth[LEFT_KIDNEY]) > 5 + max(depth[LIVER], depth[SPLEEN])


def test_grey_alone_does_not_tell_the_organs_apart() -> None:
    grey: dict[int, list[float]] = {}
    for phantom in draw(32):
        for organ in organs(phantom):
            grey.setdefault(organ, []).append(float(phantom.image[phantom.mask == organ].mean()))
    for first, second in ((LIVER, SPLEEN), (LIVER, RIGHT_KIDNEY), (RIGHT_KIDNEY, LEFT_KIDNEY)):
        assert np.quantile(grey[first], 0.9) > np.quantile(grey[second], 0.1)
        assert np.quantile(grey[second], 0.9) > np.quantile(grey[first], 0.1)


def test_a_kidney_has_a_bright_sinus_in_a_darker_cortex() -> None:
    rng = np.random.default_rng(4)
    x, z = np.meshgrid(np.linspace(-57, 57, 160), np.linspace(0, 114, 320))
    found = 0
    for _ in range(6):
        flank = Flank(rng, "right")
        tissue = flank.tissue(x.astype(np.float32), z.astype(np.float32))
        for organ in flank.organs:
            if organ.number == RIGHT_KIDNEY:
                distance, _ = organ.polar(x.astype(np.float32), z.astype(np.float32))
                cortex = tissue.echogenicity_db[(distance > 0.75) & (distance < 0.9)].mean()
                assert tissue.echogenicity_db[distance < 0.3].mean() > cortex + 6
                found += 1
    assert found


def test_an_even_outline_has_the_area_of_an_ellipse_however_bent() -> None:
    even = Organ(1, 3.0, 50.0, 30.0, 15.0, 0.4, 0.5, 0.0, np.ones(181), 0.0, 0.5)
    axis = np.linspace(-60, 60, 1201, dtype=np.float32)
    x, z = np.meshgrid(axis, axis + 50)
    area = (even.polar(x, z)[0] < 1).sum() * 0.1**2
    assert area == pytest.approx(np.pi * 30 * 15, rel=0.01)


def test_another_scanner_changes_the_image_and_not_the_anatomy() -> None:
    knobs = replace(SOURCE, dynamic_range_db=42.0, gamma=1.4, tgc=0.75, noise_db=-50.0, marks=())
    ours, theirs = (
        list(generate(scanner, 12, 1, 64, anatomy="abdomen")) for scanner in (SOURCE, knobs)
    )
    for first, second in zip(ours, theirs, strict=True):
        assert np.array_equal(first.mask, second.mask)
        assert np.abs(first.image.astype(float) - second.image).mean() > 5


@settings(max_examples=6, deadline=None)
@given(
    name=st.sampled_from(sorted(SCANNERS)), size=st.integers(32, 140), seed=st.integers(0, 2**40)
)
def test_same_seed_same_bits_and_a_longer_run_begins_alike(name: str, size: int, seed: int) -> None:
    short, long = draw(2, size, seed, name), draw(4, size, seed, name)
    for first, second in zip(short, long, strict=False):
        assert np.array_equal(first.image, second.image)
        assert np.array_equal(first.mask, second.mask)
        assert first.patient == second.patient and first.label is None
        assert first.image.shape == first.mask.shape == (size, size)


def test_an_abdominal_probe_keeps_the_losses_and_the_resolution_in_pixels() -> None:
    breast, abdomen = SCANNERS["lakeside"], abdominal(SCANNERS["lakeside"])
    assert abdomen.frequency_mhz * abdomen.depth_mm == pytest.approx(
        breast.frequency_mhz * breast.depth_mm
    )
    assert abdomen.depth_mm > 100 and 2 < abdomen.frequency_mhz < 5
    assert abdomen.name == breast.name


def test_a_written_set_is_read_back_with_its_class_numbers(tmp_path: Path) -> None:
    folder = write_dataset(tmp_path / "site", SCANNERS["riverside"], 8, 3, 64, anatomy="abdomen")
    reading = read("table", folder)
    assert not reading.skipped
    for sample, phantom in zip(reading.samples, draw(8, 64, 3, "riverside"), strict=True):
        assert np.array_equal(read_mask(sample.masks[0]), phantom.mask)
        assert (sample.label, sample.group, sample.device) == (None, phantom.patient, "riverside")
    breast = write_dataset(folder, SCANNERS["riverside"], 2, 3, 64)
    assert {s.label for s in read("table", breast).samples} <= {0, 1}
    assert set(np.unique(read_mask(read("table", breast).samples[0].masks[0]))) <= {0, 1}
