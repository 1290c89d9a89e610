from __future__ import annotations

import csv
from dataclasses import replace
from pathlib import Path

import cv2
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sonofed_common.contract.errors import ConfigurationError, ParameterError
from sonofed_common.runtime import Event, Events
from sonofed_simulations.phantoms import SCANNERS, SOURCE, Phantom, Scanner, generate, write_dataset
from sonofed_simulations.phantoms.anatomy import Breast
from sonofed_simulations.phantoms.display import Display
from sonofed_simulations.phantoms.lesion import draw_lesion
from sonofed_simulations.phantoms.physics import attenuation_db, compress, echoes
from sonofed_simulations.phantoms.tissue import TissueMap

PLAIN = replace(SOURCE, marks=(), contact_loss=0.0, gain_spread_db=0.0)


def even(shape: tuple[int, int], attenuation: float = 0.0) -> TissueMap:
    return TissueMap(
        np.zeros(shape, np.float32),
        np.full(shape, attenuation, np.float32),
        np.zeros(shape, np.bool_),
    )


def speckle(scanner: Scanner, step_mm: float = 0.02) -> np.ndarray:
    spacing = np.full(512, step_mm, np.float32)
    return echoes(even((512, 512)), scanner, spacing, step_mm, np.random.default_rng(3))


def correlation_length(envelope: np.ndarray, axis: int) -> int:
    signal = envelope - envelope.mean()
    spectrum = np.abs(np.fft.fft(signal, axis=axis)) ** 2
    correlation = np.fft.ifft(spectrum, axis=axis).real.mean(1 - axis)
    return int(np.argmax(correlation < correlation[0] / 2))


def mean_below(phantoms: list[Phantom], label: int) -> float:
    """Mean grey level straight below the lesion relative to the same depths beside it."""
    ratios = []
    for phantom in phantoms:
        rows, columns = np.nonzero(phantom.mask)
        if phantom.label != label or not rows.size:
            continue
        band = phantom.image[rows.max() + 2 : rows.max() + 12].astype(float)
        core = slice(int(np.quantile(columns, 0.25)), int(np.quantile(columns, 0.75)) + 1)
        beside = np.delete(band, np.r_[columns.min() : columns.max() + 1], axis=1)
        ratios.append(band[:, core].mean() / beside.mean())
    return float(np.mean(ratios))


@pytest.mark.parametrize("name", sorted(SCANNERS))
def test_same_seed_same_bits_and_a_longer_run_begins_alike(name: str) -> None:
    short = list(generate(SCANNERS[name], 3, 7, 64))
    long = list(generate(SCANNERS[name], 5, 7, 64))
    other = next(generate(SCANNERS[name], 1, 8, 64))
    for first, second in zip(short, long, strict=False):
        assert np.array_equal(first.image, second.image)
        assert np.array_equal(first.mask, second.mask)
        assert (first.label, first.patient) == (second.label, second.patient)
    assert not np.array_equal(short[0].image, other.image)


@settings(max_examples=8, deadline=None)
@given(
    name=st.sampled_from(sorted(SCANNERS)),
    size=st.integers(32, 200),
    seed=st.integers(0, 2**40),
)
def test_image_and_mask_of_any_size_are_whole(name: str, size: int, seed: int) -> None:
    for phantom in generate(SCANNERS[name], 2, seed, size):
        assert phantom.image.shape == phantom.mask.shape == (size, size)
        assert phantom.image.dtype == phantom.mask.dtype == np.uint8
        assert set(np.unique(phantom.mask)) == {0, 255}
        assert 0.002 < (phantom.mask > 0).mean() < 0.5
        assert phantom.image.std() > 5


def test_lesions_lie_where_there_is_image() -> None:
    scanner = replace(SCANNERS["lakeside"], marks=())
    display = Display(scanner, 128)
    reached = display.show(np.ones(display.shape, np.float32)) > 0.5
    for phantom in generate(scanner, 20, 1):
        assert (reached | (phantom.mask == 0)).all()


@pytest.mark.parametrize(("count", "size", "fraction"), [(0, 64, 0.4), (4, 8, 0.4), (4, 64, 1.5)])
def test_numbers_out_of_range_are_refused(count: int, size: int, fraction: float) -> None:
    with pytest.raises(ParameterError):
        next(generate(SOURCE, count, 0, size, fraction))


def test_speckle_is_rayleigh() -> None:
    envelope = speckle(replace(PLAIN, noise_db=-200.0))
    assert envelope.mean() / envelope.std() == pytest.approx(1.91, rel=0.05)
    assert np.mean(envelope.astype(float) ** 2) == pytest.approx(1, rel=0.1)


def test_speckle_grows_as_frequency_falls() -> None:
    high, low = (speckle(replace(PLAIN, frequency_mhz=f, focus_mm=5.0)) for f in (12.0, 5.0))
    for axis in (0, 1):
        assert correlation_length(low, axis) > 1.5 * correlation_length(high, axis)


def test_speckle_widens_away_from_the_focus() -> None:
    envelope = speckle(replace(PLAIN, focus_mm=2.0, f_number=1.0), step_mm=0.05)
    near, far = envelope[20:60], envelope[-60:]
    assert correlation_length(far, 1) > 1.5 * correlation_length(near, 1)


def test_attenuation_is_the_closed_form_in_even_tissue() -> None:
    scanner = replace(PLAIN, frequency_mhz=8.0)
    loss = attenuation_db(even((400, 2), 0.5), scanner, 0.1)
    assert loss[-1] == pytest.approx(2 * 0.5 * 8.0 * 4.0, rel=1e-3)


def test_matched_compensation_levels_the_depths() -> None:
    scanner = replace(PLAIN, tgc=0.5, noise_db=-200.0)
    spacing = np.full(400, 0.2, np.float32)
    envelope = echoes(even((400, 200), 0.5), scanner, spacing, 0.1, np.random.default_rng(0))
    grey = compress(envelope, scanner, 0.1, 0.0)
    assert grey[40:120].mean() == pytest.approx(grey[-120:-40].mean(), abs=0.02)


def test_dynamic_range_and_gain_do_what_they_say() -> None:
    envelope = 10 ** np.linspace(-1.5, 0.5, 50, dtype=np.float32)[None]
    narrow, wide = (replace(PLAIN, dynamic_range_db=db) for db in (40.0, 80.0))
    assert np.ptp(compress(envelope, wide, 0.1, 0.0)) == pytest.approx(0.5, abs=0.01)
    assert compress(envelope, narrow, 0.1, 0.0).std() > compress(envelope, wide, 0.1, 0.0).std()
    lift = compress(envelope, wide, 0.1, 8.0) - compress(envelope, wide, 0.1, 0.0)
    assert lift == pytest.approx(0.1, abs=1e-4)


def test_noise_rules_where_echoes_are_lost() -> None:
    image = np.mean([p.image for p in generate(replace(PLAIN, noise_db=-30.0), 6, 4, 64)], axis=0)
    clean = np.mean([p.image for p in generate(PLAIN, 6, 4, 64)], axis=0)
    assert image[-8:].mean() > clean[-8:].mean() + 20
    assert image[4:8].mean() == pytest.approx(clean[4:8].mean(), abs=5)


def test_malignant_lesions_are_taller_with_overlap() -> None:
    rng = np.random.default_rng(0)
    benign, malignant = (
        np.array([draw_lesion(rng, label).elongation for _ in range(300)])
        for label in (False, True)
    )
    assert malignant.mean() > benign.mean() + 0.15
    assert np.quantile(benign, 0.95) > np.quantile(malignant, 0.25)


def test_lesion_area_is_kept_by_elongation() -> None:
    breast = Breast(np.random.default_rng(1), malignant=False)
    smooth = replace(breast.lesion, outline=np.ones(361))
    axis = np.linspace(-40, 40, 801, dtype=np.float32)
    x, z = np.meshgrid(axis, axis + np.float32(smooth.z_mm))
    area = (smooth.distance(x, z) < 1).sum() * 0.1**2
    assert area == pytest.approx(np.pi * smooth.radius_mm**2, rel=0.01)


def test_malignant_shadows_and_benign_enhances() -> None:
    phantoms = list(generate(PLAIN, 60, 11, malignant_fraction=0.5))
    benign, malignant = mean_below(phantoms, 0), mean_below(phantoms, 1)
    assert malignant < benign - 0.1
    assert malignant < 1 < benign


def test_convex_images_have_black_corners_and_linear_ones_do_not() -> None:
    convex = next(generate(replace(SCANNERS["lakeside"], marks=()), 1, 2))
    linear = next(generate(PLAIN, 1, 2))
    assert not convex.image[:12, :12].any() and not convex.image[-12:, :12].any()
    assert not convex.image[:12, -12:].any() and not convex.image[-12:, -12:].any()
    assert linear.image[:12, :12].mean() > 50


def test_marks_are_burnt_in() -> None:
    marked = replace(PLAIN, marks=("text", "logo", "ruler", "calipers"))
    changed = [
        (ours.image != plain.image).mean()
        for ours, plain in zip(generate(marked, 4, 9), generate(PLAIN, 4, 9), strict=True)
    ]
    assert 0.005 < changed[0] < 0.1


@given(fraction=st.floats(0.1, 0.9))
@settings(max_examples=5, deadline=None)
def test_patients_keep_their_label_and_the_hospital_its_mix(fraction: float) -> None:
    labels: dict[str, set[int]] = {}
    sizes: dict[str, int] = {}
    for phantom in generate(SOURCE, 12, 5, 32, fraction):
        labels.setdefault(phantom.patient, set()).add(phantom.label)
        sizes[phantom.patient] = sizes.get(phantom.patient, 0) + 1
    assert all(len(found) == 1 for found in labels.values())
    assert set(sizes.values()) <= {1, 2}
    malignant = sum(found == {1} for found in labels.values())
    assert abs(malignant - fraction * len(labels)) <= 1


def test_dataset_is_written_once_and_read_by_csv(tmp_path: Path) -> None:
    heard: list[Event] = []
    events = Events(listeners=[heard.append])
    folder = write_dataset(tmp_path / "site", SOURCE, 4, 3, 64, events=events)
    assert [(e["task"], e["done"]) for e in heard] == [("phantoms site", n) for n in range(5)]
    with (folder / "table.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    for row, phantom in zip(rows, generate(SOURCE, 4, 3, 64), strict=True):
        image = cv2.imread(str(folder / row["image"]), cv2.IMREAD_GRAYSCALE)
        mask = cv2.imread(str(folder / row["mask"]), cv2.IMREAD_GRAYSCALE)
        assert np.array_equal(image, phantom.image) and np.array_equal(mask, phantom.mask)
        assert int(row["label"]) == phantom.label
        assert (row["patient"], row["device"]) == (phantom.patient, "source")
    before = {path: path.stat().st_mtime_ns for path in folder.rglob("*")}
    write_dataset(folder, SOURCE, 4, 3, 64)
    assert before == {path: path.stat().st_mtime_ns for path in folder.rglob("*")}
    write_dataset(folder, SOURCE, 2, 3, 64)
    assert len(list((folder / "images").iterdir())) == 2
    assert [path.name for path in tmp_path.iterdir()] == ["site"]


def test_other_files_are_never_replaced(tmp_path: Path) -> None:
    (tmp_path / "thesis.txt").write_text("precious")
    with pytest.raises(ConfigurationError):
        write_dataset(tmp_path, SOURCE, 1, 0, 64)
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.txt"]
