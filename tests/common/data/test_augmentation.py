"""Augmentation: what it may do to an image, and that it repeats."""

from __future__ import annotations

import math

import cv2
import numpy as np
import pytest
import torch

from sonofed_common.data import augmentation
from sonofed_common.data.augmentation import LARGEST_ROTATION, Augmentation


def batch(count: int, size: int = 32) -> torch.Tensor:
    return torch.rand(count, 1, size, size, generator=torch.Generator().manual_seed(0))


def test_same_seed_same_bits_in_call_order() -> None:
    first, second, other = Augmentation(3), Augmentation(3), Augmentation(4)
    images = batch(8)
    a, b = first(images), first(images)
    assert torch.equal(a, second(images))
    assert torch.equal(b, second(images))
    assert not torch.equal(a, b)
    assert not torch.equal(a, other(images))


def test_shape_range_and_input_untouched() -> None:
    images = batch(16)
    before = images.clone()
    augmented = Augmentation(0)(images)
    assert augmented.shape == images.shape
    assert augmented.dtype == images.dtype
    assert augmented.min() >= 0 and augmented.max() <= 1
    assert torch.equal(images, before)
    assert Augmentation(0)(images[:0]).shape == (0, 1, 32, 32)


def test_angles_flips_and_centre() -> None:
    """Two dots, one bright to the right: their line tells the rotation, their order the flip."""
    size, reach = 65, 20
    image = torch.zeros(1, 1, size, size)
    image[..., 32, 32 + reach], image[..., 32, 32 - reach] = 1.0, 0.5
    image = torch.nn.functional.avg_pool2d(image, 3, 1, 1)
    augmented = Augmentation(0)(image.expand(400, -1, -1, -1))[:, 0].double()
    y, x = torch.meshgrid(*(torch.arange(size).double() - 32,) * 2, indexing="ij")
    right, left = augmented * (x > 0), augmented * (x < 0)
    flipped = left.sum((1, 2)) > right.sum((1, 2))
    assert 0.4 < flipped.double().mean() < 0.6
    bright = torch.where(flipped[:, None, None], left, right)
    mass = bright.sum((1, 2))
    centre_x, centre_y = (bright * x).sum((1, 2)) / mass, (bright * y).sum((1, 2)) / mass
    assert torch.hypot(centre_x, centre_y) == pytest.approx(reach, abs=0.5)
    angle = torch.atan2(centre_y, centre_x.abs())
    assert angle.abs().max() <= LARGEST_ROTATION + 0.02
    assert angle.min() < -0.8 * LARGEST_ROTATION and angle.max() > 0.8 * LARGEST_ROTATION


def test_flip_alone_is_exact(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(augmentation, "LARGEST_ROTATION", 0.0)
    images = batch(20)
    augmented = Augmentation(0)(images)
    for before, after in zip(images, augmented, strict=True):
        same = torch.allclose(after, before, atol=1e-5)
        assert same != torch.allclose(after, before.flip(-1), atol=1e-5)


def test_rotation_equals_opencv(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(augmentation, "FLIP_PROBABILITY", 0.0)
    smooth = cv2.GaussianBlur(batch(1, 64)[0, 0].numpy(), (0, 0), 3)
    augmented = Augmentation(1)(torch.from_numpy(smooth)[None, None])[0, 0].numpy()
    draws = np.random.default_rng(1)
    draws.random(1)
    angle = math.degrees(draws.uniform(-LARGEST_ROTATION, LARGEST_ROTATION, 1)[0])
    rotation = cv2.getRotationMatrix2D((31.5, 31.5), angle, 1.0)
    expected = cv2.warpAffine(smooth, rotation, (64, 64))
    # OpenCV quantises the interpolation to 1/32 pixel.
    assert np.abs(augmented - expected).max() < 0.02


def test_masks_move_with_their_images() -> None:
    images = torch.zeros(60, 1, 64, 64)
    images[..., 12:30, 34:50] = 1.0
    masks = (images * 3).to(torch.uint8)
    moved, moved_masks = Augmentation(5).with_masks(images, masks)
    assert moved_masks.dtype == torch.uint8 and set(moved_masks.unique().tolist()) == {0, 3}
    bright, marked = moved > 0.5, moved_masks == 3
    overlap = (bright & marked).sum((1, 2, 3)) / (bright | marked).sum((1, 2, 3))
    assert overlap.min() > 0.9
    assert sum(torch.equal(a, b) for a, b in zip(moved_masks, masks, strict=True)) < 5
    areas = marked.sum((1, 2, 3)) / (masks[0] == 3).sum()
    assert 0.75 < areas.min() < 0.9 and 1.1 < areas.max() < 1.3
    empty, none = Augmentation(5).with_masks(images[:0], masks[:0])
    assert len(empty) == len(none) == 0


def test_sides_survive_without_flips() -> None:
    images, masks = torch.zeros(60, 1, 64, 64), torch.zeros(60, 1, 64, 64, dtype=torch.uint8)
    masks[..., 20:44, 6:22], masks[..., 20:44, 42:58] = 1, 2
    images[masks == 1] = 1.0
    moved, moved_masks = Augmentation(5, flips=False).with_masks(images, masks)
    assert moved[..., 32:].max() == 0 == Augmentation(5, flips=False)(images)[..., 32:].max()
    assert (moved_masks == 1)[..., :32].flatten(1).any(1).all()
    assert not (moved_masks == 1)[..., 32:].any() and not (moved_masks == 2)[..., :32].any()
    assert (Augmentation(5).with_masks(images, masks)[1] == 1)[..., 32:].any()


def test_images_with_masks_are_flipped_and_turned_as_without(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(augmentation, "SCALES", (1.0, 1.0))
    images = batch(8)
    with_masks, _ = Augmentation(2).with_masks(images, torch.zeros(8, 1, 32, 32))
    assert torch.allclose(with_masks, Augmentation(2)(images), atol=1e-6)
