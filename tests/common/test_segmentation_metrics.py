import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn.functional import one_hot

from sonofed_common.contract.results import SEGMENTATION_METRICS
from sonofed_common.segmentation_metrics import (
    ImageScores,
    image_dice,
    score_images,
    segmentation_intervals,
    segmentation_metrics,
)

SIZE = 32
DIAGONAL = math.hypot(SIZE, SIZE)


def certain(classes, count=2):
    """Probabilities (1, C, S, S) that are sure of a class map (S, S)."""
    return one_hot(torch.as_tensor(classes).long(), count).permute(2, 0, 1)[None].float()


def square(top, left, side, size=SIZE):
    classes = torch.zeros(size, size, dtype=torch.uint8)
    classes[top : top + side, left : left + side] = 1
    return classes


def blob(seed, size=SIZE, reach=0.3):
    """An ellipse with a ragged edge, somewhere in the image, often cut by its border."""
    generator = np.random.default_rng(seed)
    y, x = np.mgrid[:size, :size]
    cy, cx = generator.uniform(0, size, 2)
    ry, rx = generator.uniform(0.1 * size, reach * size, 2)
    distance = ((y - cy) / ry) ** 2 + ((x - cx) / rx) ** 2
    return torch.from_numpy(distance + generator.normal(0, 0.2, distance.shape) < 1).byte()


def boundary(mask):
    """Pixels of a mask with a 4-neighbour outside of it; beyond the image is outside."""
    padded = np.pad(mask, 1)
    inner = padded[:-2, 1:-1] & padded[2:, 1:-1] & padded[1:-1, :-2] & padded[1:-1, 2:]
    return np.argwhere(mask & ~inner)


def reference(found, true, tolerance):
    """Dice, NSD and HD95 of two masks by all pairs of boundary pixels."""
    dice = 2 * (found & true).sum() / (found.sum() + true.sum())
    one, other = boundary(found), boundary(true)
    pairs = np.sqrt(((one[:, None] - other[None]) ** 2).sum(-1))
    there, back = pairs.min(1), pairs.min(0)
    near = (there <= tolerance).sum() + (back <= tolerance).sum()
    hd95 = max(np.percentile(there, 95), np.percentile(back, 95))
    return dice, near / (len(there) + len(back)), hd95


def values(classes, truth, count=2):
    scores = score_images(certain(classes, count), truth[None, None])
    return scores.dice[0], scores.nsd[0], scores.hd95[0]


@given(st.integers(0, 10_000), st.sampled_from([32, 64, 128]))
@settings(max_examples=25, deadline=None)
def test_agrees_with_all_pairs_of_boundary_pixels(seed, size):
    found, true = blob(seed, size), blob(seed + 1, size)
    if not (found.any() and true.any()):
        return
    expected = reference(found.numpy() > 0, true.numpy() > 0, size / 64)
    assert values(found, true) == pytest.approx(expected, rel=1e-5)


@given(st.integers(0, 10_000), st.integers(1, 40))
@settings(max_examples=15, deadline=None)
def test_empty_space_around_changes_neither_dice_nor_hd95(seed, margin):
    found, true = blob(seed), blob(seed + 7)
    if not (found.any() and true.any()):
        return
    wide = [torch.nn.functional.pad(m, (margin,) * 4) for m in (found, true)]
    near, far = values(found, true), values(*wide)
    assert (near[0], near[2]) == pytest.approx((far[0], far[2]))


def test_a_shifted_square():
    dice, nsd, hd95 = values(square(4, 4, 10, 128), square(4, 7, 10, 128))
    assert dice == pytest.approx(70 / 100)
    assert hd95 == 3
    # Of 36 boundary pixels, 8 of the far side and 2 corners lie farther than 2 pixels.
    expected = reference(square(4, 4, 10).numpy() > 0, square(4, 7, 10).numpy() > 0, 2)[1]
    assert nsd == pytest.approx(expected) and 0.5 < nsd < 1
    assert values(square(4, 4, 10, 128), square(4, 6, 10, 128))[1] == 1


def test_empty_masks():
    empty, full = square(0, 0, 0), square(8, 8, 5)
    assert values(empty, empty) == (1, 1, 0)
    assert values(full, full) == (1, 1, 0)
    assert values(empty, full) == pytest.approx((0, 0, DIAGONAL))
    assert values(full, empty) == pytest.approx((0, 0, DIAGONAL))


def test_a_class_in_neither_is_left_out_of_the_mean():
    truth, found = square(4, 4, 6), square(4, 4, 6)
    assert values(found, truth, count=5) == (1, 1, 0)
    truth[20:24, 20:24] = 3
    assert values(found, truth, count=5) == pytest.approx((0.5, 0.5, DIAGONAL / 2))
    found[20:24, 20:24] = 3
    assert values(found, truth, count=5) == (1, 1, 0)
    found[0, 31] = 2
    assert values(found, truth, count=5) == pytest.approx((2 / 3, 2 / 3, DIAGONAL / 3))


def test_calibration_error_is_that_of_all_pixels_in_fifteen_bins():
    generator = torch.Generator().manual_seed(0)
    p = (2 * torch.randn(6, 3, SIZE, SIZE, generator=generator)).softmax(1)
    masks = torch.randint(0, 3, (6, 1, SIZE, SIZE), generator=generator).byte()
    confidence, predicted = (t.flatten().numpy() for t in p.max(1))
    correct = predicted == masks.flatten().numpy()
    expected = 0.0
    for low in np.arange(15) / 15:
        inside = (confidence >= low) & (confidence < low + 1 / 15)
        if inside.any():
            expected += inside.mean() * abs(confidence[inside].mean() - correct[inside].mean())
    assert segmentation_metrics(score_images(p, masks))["ece"] == pytest.approx(expected, rel=1e-4)


def sample(count=12, seed=3):
    generator = torch.Generator().manual_seed(seed)
    masks = torch.stack([blob(n, reach=0.5) for n in range(count)])[:, None]
    foreground = (masks + 0.8 * torch.randn(masks.shape, generator=generator)).clamp(0.01, 0.99)
    return torch.cat([1 - foreground, foreground], 1), masks


def test_batches_join_to_the_whole():
    p, masks = sample()
    whole = score_images(p, masks)
    parts = [score_images(p[n : n + 5], masks[n : n + 5]) for n in range(0, len(p), 5)]
    joined = ImageScores.join(parts)
    assert len(joined) == len(p)
    assert segmentation_metrics(joined) == segmentation_metrics(whole)
    means = segmentation_metrics(whole)
    assert tuple(means) == SEGMENTATION_METRICS
    assert means["dice"] == pytest.approx(whole.dice.mean())
    assert np.array_equal(image_dice(p, masks), whole.dice)


def test_intervals_draw_whole_patients():
    scores = score_images(*sample())
    groups = ["a"] * 5 + ["b"] * 3 + ["c"] * 4
    intervals = segmentation_intervals(scores, groups, 400, 1)
    assert intervals == segmentation_intervals(scores, groups, 400, 1)
    assert intervals != segmentation_intervals(scores, groups, 400, 2)
    generator = np.random.default_rng(9)
    index = {name: np.flatnonzero(np.array(groups) == name) for name in "abc"}
    draws = [
        np.concatenate([index[n] for n in generator.choice(list("abc"), 3)]) for _ in range(4000)
    ]
    means = [scores.hd95[d].mean() for d in draws]
    eces = [np.abs(scores.residuals[d].sum(0)).sum() / scores.pixels[d].sum() for d in draws]
    for name, drawn in (("hd95", means), ("ece", eces)):
        expected = np.percentile(drawn, [2.5, 97.5])
        assert intervals[name] == pytest.approx(expected, rel=0.03)
    one = segmentation_intervals(scores, ["a"] * 12, 50, 0)
    for name, value in segmentation_metrics(scores).items():
        assert one[name] == pytest.approx((value, value))


def test_without_images_nothing_is_known():
    nothing = score_images(torch.zeros(0, 2, SIZE, SIZE), torch.zeros(0, 1, SIZE, SIZE).byte())
    assert all(math.isnan(value) for value in segmentation_metrics(nothing).values())
    for ends in segmentation_intervals(nothing, [], 10, 0).values():
        assert all(math.isnan(end) for end in ends)
