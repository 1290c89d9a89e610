"""Style augmentation: what it may do to an image, and that it repeats."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sonofed_common.data.style import StyleAugmentation


def batch(count: int, size: int = 32) -> torch.Tensor:
    return torch.rand(count, 1, size, size, generator=torch.Generator().manual_seed(0))


def disc(count: int, size: int = 64) -> torch.Tensor:
    """A bright disc on a grey ground, inside a black frame."""
    y, x = torch.meshgrid(*(torch.arange(size) - size // 2,) * 2, indexing="ij")
    image = torch.where((x - 8) ** 2 + (y + 4) ** 2 < 100, 0.7, 0.3)
    frame = torch.maximum(x.abs(), y.abs()) < size // 2 - 6
    return (image * frame).expand(count, 1, size, size)


def test_same_seed_same_bits_in_call_order() -> None:
    first, second, other = StyleAugmentation(3), StyleAugmentation(3), StyleAugmentation(4)
    images = batch(8)
    a, b = first(images), first(images)
    assert torch.equal(a, second(images)) and torch.equal(b, second(images))
    assert not torch.equal(a, b) and not torch.equal(a, other(images))


@settings(max_examples=20, deadline=None)
@given(
    seed=st.integers(0, 2**31),
    count=st.integers(0, 5),
    size=st.sampled_from([16, 24, 33]),
    level=st.sampled_from([0.0, 0.5, 1.0]),
)
def test_range_shape_and_input_untouched(seed: int, count: int, size: int, level: float) -> None:
    for images in (batch(count, size), torch.full((count, 1, size, size), level)):
        before = images.clone()
        styled = StyleAugmentation(seed)(images)
        assert styled.shape == images.shape and styled.dtype == images.dtype
        assert bool(((styled >= 0) & (styled <= 1)).all())
        assert torch.equal(images, before)


def test_black_stays_black_and_nothing_moves() -> None:
    images = disc(200)
    styled = StyleAugmentation(0)(images)
    assert bool((styled[images == 0] == 0).all())
    inside, ground = images[0, 0] == 0.7, images[0, 0] == 0.3
    # Gain varies with depth, so disc and ground are compared row by row.
    rows = inside.any(dim=1)
    inside, ground = inside[rows].double(), ground[rows].double()
    picture = styled[:, 0, rows].double()
    brighter = (picture * inside).sum(-1) / inside.sum(-1) - (picture * ground).sum(
        -1
    ) / ground.sum(-1)
    assert (brighter.mean(dim=1) > 0).double().mean() > 0.95


def test_a_black_cyst_changes_and_the_border_does_not() -> None:
    images = disc(100).clone()
    images[..., 22:34, 20:32] = 0
    styled = StyleAugmentation(2)(images)
    cyst, middle = styled[..., 22:34, 20:32], styled[..., 27:29, 25:27]
    assert bool((styled[disc(100) == 0] == 0).all())
    assert (cyst.amax(dim=(1, 2, 3)) > 0).double().mean() > 0.2
    assert 0.1 < (middle.amax(dim=(1, 2, 3)) > 0.02).double().mean() < 0.9


def test_appearance_changes_strongly_and_of_each_image_on_its_own() -> None:
    images = disc(100)
    styled = StyleAugmentation(1)(images)
    change = (styled - images).abs().mean(dim=(1, 2, 3))
    assert change.median() > 0.03
    assert len({round(float(c), 6) for c in change}) > 90


def test_smoothing_is_the_gaussian_of_scipy() -> None:
    from scipy.ndimage import gaussian_filter1d

    from sonofed_common.data.style import RADIUS, _kernels, _smooth

    images = batch(3)
    sigmas = torch.tensor([0.5, 1.0, 1.4]).view(3, 1, 1, 1)
    smooth = _smooth(images, _kernels(sigmas))
    for image, sigma, found in zip(images, sigmas.flatten().tolist(), smooth, strict=True):
        expected = image[0].numpy()
        for axis in (0, 1):
            expected = gaussian_filter1d(expected, sigma, axis, mode="nearest", radius=RADIUS)
        assert found[0].numpy() == pytest.approx(expected, abs=1e-5)
