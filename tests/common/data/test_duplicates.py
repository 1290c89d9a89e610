"""Near-duplicates: copies are found whatever was done to them, strangers are not."""

from __future__ import annotations

from pathlib import Path

import cv2
import numpy as np
import pytest
from PIL import Image

from sonofed_common.contract.errors import DataUnreadableError
from sonofed_common.data.duplicates import duplicate_groups
from sonofed_common.data.sample import Sample


def speckle(seed: int) -> np.ndarray:
    """Rayleigh speckle under one shading that all images share: their hashes come close."""
    random = np.random.default_rng(seed)
    field = random.normal(size=(200, 240)) + 1j * random.normal(size=(200, 240))
    smooth = cv2.GaussianBlur(field.real, (0, 0), 2.5) ** 2
    smooth += cv2.GaussianBlur(field.imag, (0, 0), 2.5) ** 2
    depth = np.linspace(1, 0.3, 200)[:, None]
    return np.clip(255 * depth * np.sqrt(smooth) / np.sqrt(smooth).max(), 0, 255).astype(np.uint8)


def sample(folder: Path, name: str, pixels: np.ndarray, label: int | None = 0) -> Sample:
    path = folder / f"{name}.png"
    Image.fromarray(pixels).save(path)
    return Sample(name, path, (), label, name)


def copies(pixels: np.ndarray) -> list[np.ndarray]:
    rotation = cv2.getRotationMatrix2D((120, 100), 1.0, 1.0)
    marked = pixels.copy()
    cv2.putText(marked, "+", (60, 90), cv2.FONT_HERSHEY_SIMPLEX, 0.6, 255)
    return [
        pixels.copy(),
        pixels[3:-3, 2:-4],
        cv2.resize(pixels, (300, 260)),
        np.clip(pixels * 1.15 + 5, 0, 255).astype(np.uint8),
        cv2.warpAffine(pixels, rotation, (240, 200), borderMode=cv2.BORDER_REPLICATE),
        marked,
    ]


def test_copies_share_a_group_and_strangers_do_not(tmp_path: Path) -> None:
    samples = []
    for source in range(4):
        versions = copies(speckle(source))
        samples += [sample(tmp_path, f"{source}-{i}", v) for i, v in enumerate(versions)]
    grouped, skipped = duplicate_groups(samples)
    assert not skipped
    assert [s.name for s in grouped] == [s.name for s in samples]
    assert [s.group for s in grouped] == [f"{s.name[0]}-0" for s in samples]


def test_candidates_are_judged_by_registration(tmp_path: Path) -> None:
    samples = [sample(tmp_path, str(i), speckle(i)) for i in range(8)]
    grouped, _ = duplicate_groups(samples, distance=256)
    assert [s.group for s in grouped] == [s.name for s in samples]


def test_contradicting_labels_are_dropped(tmp_path: Path) -> None:
    samples = [
        sample(tmp_path, "a", speckle(0), 0),
        sample(tmp_path, "b", speckle(0)[2:, 2:], 1),
        sample(tmp_path, "c", speckle(1), 1),
    ]
    kept, skipped = duplicate_groups(samples)
    assert [s.name for s in kept] == ["c"]
    assert [s.name for s in skipped] == ["a", "b"]


def test_constant_images(tmp_path: Path) -> None:
    samples = [
        sample(tmp_path, "black", np.zeros((50, 50), dtype=np.uint8)),
        sample(tmp_path, "black too", np.zeros((50, 50), dtype=np.uint8)),
        sample(tmp_path, "speckle", speckle(0)),
    ]
    kept, _ = duplicate_groups(samples)
    assert [s.group for s in kept] == ["black", "black", "speckle"]


def test_corrupt_images(tmp_path: Path) -> None:
    good, bad = sample(tmp_path, "a", speckle(0)), sample(tmp_path, "b", speckle(1))
    bad.image.write_bytes(bad.image.read_bytes()[:2000])
    kept, skipped = duplicate_groups([bad, good])
    assert kept == [good]
    assert [s.name for s in skipped] == ["b"]
    with pytest.raises(DataUnreadableError):
        duplicate_groups([bad])


def test_nothing() -> None:
    assert duplicate_groups([]) == ([], [])
