"""Images and masks in memory, against MONAI's transforms and by hand."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from sonofed_common.contract.errors import DataUnreadableError
from sonofed_common.data.decoding import read_grey
from sonofed_common.data.images import decodable_masks, load_images, load_masks
from sonofed_common.data.sample import Sample


def sample(image: Path, *masks: Path) -> Sample:
    return Sample(image.stem, image, masks, 0, image.stem)


def save(path: Path, pixels: np.ndarray) -> Path:
    Image.fromarray(pixels).save(path)
    return path


def truncate(path: Path) -> Path:
    data = path.read_bytes()
    path.write_bytes(data[: len(data) // 2])
    return path


@pytest.mark.parametrize("shape", [(100, 60), (60, 100), (33, 64), (64, 64), (20, 13)])
def test_equals_monai(shape: tuple[int, int], tmp_path: Path) -> None:
    from monai.transforms import Compose, Resize, SpatialPad

    pixels = np.random.default_rng(1).integers(0, 256, shape, dtype=np.uint8)
    images, _, _ = load_images([sample(save(tmp_path / "a.png", pixels))], 32)
    mode = "area" if max(shape) > 32 else "bilinear"
    reference = Compose([Resize(32, size_mode="longest", mode=mode), SpatialPad((32, 32))])
    expected = reference(torch.from_numpy(pixels / 255.0).float()[None])
    assert images.shape == (1, 1, 32, 32)
    assert images.dtype == torch.float32
    torch.testing.assert_close(images[0], expected.as_tensor(), atol=1e-6, rtol=0)


def test_padding_is_symmetric_and_zero(tmp_path: Path) -> None:
    path = save(tmp_path / "white.png", np.full((50, 100), 255, dtype=np.uint8))
    image = load_images([sample(path)], 64)[0][0, 0]
    expected = torch.zeros(64, 64)
    expected[16:48] = 1
    assert torch.equal(image, expected)


def test_corrupt_images_are_skipped_and_the_rest_stay_in_order(tmp_path: Path) -> None:
    grey = [np.full((20, 20), value, dtype=np.uint8) for value in (0, 51, 102, 204)]
    samples = [sample(save(tmp_path / f"{i}.png", pixels)) for i, pixels in enumerate(grey)]
    noise = np.random.default_rng(0).integers(0, 256, (64, 64), dtype=np.uint8)
    truncate(save(tmp_path / "1.png", noise))
    images, kept, skipped = load_images(samples, 16)
    assert [s.name for s in kept] == ["0", "2", "3"]
    assert [s.name for s in skipped] == ["1"]
    torch.testing.assert_close(images.mean((1, 2, 3)), torch.tensor([0.0, 0.4, 0.8]))


def test_nothing_decodes(tmp_path: Path) -> None:
    (tmp_path / "a.png").write_bytes(b"")
    with pytest.raises(DataUnreadableError):
        load_images([sample(tmp_path / "a.png"), sample(tmp_path / "b.png")], 16)


def test_no_samples() -> None:
    images, kept, skipped = load_images([], 16)
    assert images.shape == (0, 1, 16, 16)
    assert kept == skipped == []


def test_sixteen_bit_and_colour(tmp_path: Path) -> None:
    deep = save(tmp_path / "deep.png", np.array([[0, 32768], [65535, 16384]], dtype=np.uint16))
    np.testing.assert_allclose(read_grey(deep), [[0, 0.5], [1, 0.25]], atol=1e-4)
    colour = save(tmp_path / "colour.png", np.full((2, 2, 3), 128, dtype=np.uint8))
    np.testing.assert_allclose(read_grey(colour), 128 / 255)


def test_masks_are_united_and_lie_over_the_image(tmp_path: Path) -> None:
    image = save(tmp_path / "image.png", np.zeros((32, 64), dtype=np.uint8))
    left, right = np.zeros((32, 64), dtype=np.uint8), np.zeros((64, 128), dtype=np.uint8)
    left[:, :8], right[:, 112:] = 255, 1
    masks = load_masks(
        [
            sample(image, save(tmp_path / "l.png", left), save(tmp_path / "r.png", right)),
            sample(image),
        ],
        64,
    )
    expected = torch.zeros(64, 64, dtype=torch.uint8)
    expected[16:48, :8] = expected[16:48, 56:] = 1
    assert masks.dtype == torch.uint8
    assert torch.equal(masks[0, 0], expected)
    assert not masks[1].any()


def test_palette_masks_keep_their_classes(tmp_path: Path) -> None:
    image = save(tmp_path / "image.png", np.zeros((16, 16), dtype=np.uint8))
    classes = np.zeros((16, 16), dtype=np.uint8)
    classes[:4], classes[8:] = 1, 2
    palette = Image.fromarray(classes).convert("P")
    palette.putdata(classes.ravel().tolist())
    palette.putpalette([0, 0, 0, 128, 0, 0, 0, 128, 0])
    palette.save(tmp_path / "mask.png")
    masks = load_masks([sample(image, tmp_path / "mask.png")], 16)
    assert torch.equal(masks[0, 0], torch.from_numpy(classes))


def test_corrupt_masks(tmp_path: Path) -> None:
    noise = np.random.default_rng(0).integers(0, 256, (64, 64), dtype=np.uint8)
    image = save(tmp_path / "image.png", noise)
    good = sample(image, save(tmp_path / "good.png", noise))
    bad = sample(image, truncate(save(tmp_path / "bad.png", noise)))
    with pytest.raises(DataUnreadableError):
        load_masks([good, bad], 16)
    kept, skipped = decodable_masks([good, bad, sample(image)])
    assert kept == [good]
    assert [s.reason for s in skipped] == ["a mask cannot be decoded", "the image has no mask"]
