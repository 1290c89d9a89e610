"""usgra-seg: images told apart by how the scanner was set."""

from __future__ import annotations

import os
from collections import Counter, defaultdict
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from sonofed_common.data.readers import read
from sonofed_common.data.readers.usgra_seg import DEVICE, display_style


def canvas(level: float, margin: int = 0) -> np.ndarray:
    """A sector of speckle whose brighter half is lit, between black margins."""
    grey = np.zeros((90, 100), np.float32)
    sector = np.full((80, 100 - margin), level, np.float32)
    sector[:, ::2] = 0.5
    grey[5:85, : 100 - margin] = sector
    return grey


def test_styles_follow_the_black_share_and_the_sector_width() -> None:
    assert display_style(canvas(0.3)) == "bright"
    assert display_style(canvas(0.0)) == "dark wide"
    assert display_style(canvas(0.0, margin=8)) == "dark narrow"
    assert display_style(canvas(0.3, margin=8)) == "bright"
    assert display_style(np.zeros((90, 100), np.float32)) == "dark narrow"


def test_a_style_does_not_depend_on_the_resolution() -> None:
    for grey in (canvas(0.3), canvas(0.0), canvas(0.0, margin=8)):
        assert display_style(np.kron(grey, np.ones((3, 3), np.float32))) == display_style(grey)


def test_near_duplicates_share_one_style(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    frame = np.kron(rng.uniform(30, 200, (16, 16)), np.ones((16, 16)))
    frame[:, :8] = 0
    frame += rng.normal(0, 8, frame.shape)
    dark = np.where(frame < 110, 0, frame)
    for name, pixels in (("0000", frame), ("0001", frame), ("0002", dark[::-1, ::-1])):
        for folder in ("images", "masks"):
            (tmp_path / folder).mkdir(exist_ok=True)
        Image.fromarray(np.clip(pixels, 0, 255).astype(np.uint8)).save(
            tmp_path / "images" / f"{name}.png"
        )
        Image.new("P", (256, 256)).save(tmp_path / "masks" / f"{name}.png")
    devices = {s.name: (s.group, s.device) for s in read("usgra_seg", tmp_path).samples}
    assert devices["0000"] == devices["0001"] == ("0000", f"{DEVICE} bright")
    assert devices["0002"][1].startswith(f"{DEVICE} dark")


@pytest.mark.data
def test_styles_of_the_real_set() -> None:
    if "SONOFED_DATA" not in os.environ:
        pytest.skip("set SONOFED_DATA to the folder of the public sets")
    samples = read("usgra_seg", Path(os.environ["SONOFED_DATA"])).samples
    assert Counter(s.device for s in samples) == {
        f"{DEVICE} bright": 127,
        f"{DEVICE} dark narrow": 72,
        f"{DEVICE} dark wide": 45,
    }
    styles = defaultdict(set)
    for sample in samples:
        styles[sample.group].add(sample.device)
    assert all(len(found) == 1 for found in styles.values())
