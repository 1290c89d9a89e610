from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sonofed_common.data.sector import sectors

SIZE = 64
rows, columns = np.mgrid[:SIZE, :SIZE] + 0.5


def speckled(inside, seed=0, level=0.3):
    noise = np.random.default_rng(seed).rayleigh(level, (SIZE, SIZE)).clip(0, 1)
    return np.where(inside, noise, 0).astype(np.float32)


def found(*images):
    return sectors(torch.from_numpy(np.stack(images))[:, None])[:, 0].numpy()


def overlap(one, other):
    return (one & other).sum() / (one | other).sum()


def rectangle(top, left, bottom, right):
    return (rows > top) & (rows < bottom) & (columns > left) & (columns < right)


def fan():
    """A convex array's sector: apex above the image, near field along an arc."""
    depth = np.hypot(rows + 10, columns - SIZE / 2)
    angle = np.abs(np.arctan2(columns - SIZE / 2, rows + 10))
    return (depth > 16) & (depth < 70) & (angle < 0.45)


@settings(max_examples=20, deadline=None)
@given(
    top=st.integers(0, 15),
    left=st.integers(0, 15),
    bottom=st.integers(45, SIZE),
    right=st.integers(45, SIZE),
    seed=st.integers(0, 99),
)
def test_a_linear_sector_in_its_padding_is_found(top, left, bottom, right, seed):
    inside = rectangle(top, left, bottom, right)
    (sector,) = found(speckled(inside, seed))
    assert sector[inside].mean() > 0.99
    assert overlap(sector, inside) > 0.8


def test_a_convex_sector_is_found():
    (sector,) = found(speckled(fan()))
    assert sector[fan()].mean() > 0.99
    assert overlap(sector, fan()) > 0.85
    assert not sector[[40, 40], [2, SIZE - 3]].any()


@pytest.mark.parametrize("top", [6, 20])
def test_a_dark_shadow_down_to_the_lower_border_stays_inside(top):
    inside = rectangle(4, 4, 60, 60)
    shadow = rectangle(top, 24, 60, 40)
    (sector,) = found(speckled(inside & ~shadow))
    assert sector[shadow].all()


def test_a_shadow_over_the_whole_depth_cuts_nothing_off():
    inside = rectangle(0, 0, SIZE, SIZE)
    (sector,) = found(speckled(inside & ~rectangle(0, 40, SIZE, 50)))
    assert sector.mean() > 0.98


def test_text_beside_the_sector_is_left_out():
    inside = rectangle(16, 4, 60, 60)
    text = rectangle(2, 2, 6, 14)
    (sector,) = found(np.where(text, 1, speckled(inside)).astype(np.float32))
    assert not sector[text].any()
    assert overlap(sector, inside) > 0.85


def test_borders_with_compression_noise_are_borders():
    inside = rectangle(0, 16, SIZE, 48)
    noise = np.random.default_rng(1).uniform(0, 0.02, (SIZE, SIZE))
    (sector,) = found(np.maximum(speckled(inside), noise).astype(np.float32))
    assert overlap(sector, inside) > 0.85


def test_a_black_image_is_all_sector_and_each_image_stands_alone():
    black, lit = np.zeros((SIZE, SIZE), np.float32), speckled(fan())
    both = found(black, lit)
    assert both[0].all()
    assert np.array_equal(both[1], found(lit)[0])
    assert sectors(torch.empty(0, 1, SIZE, SIZE)).shape == (0, 1, SIZE, SIZE)
