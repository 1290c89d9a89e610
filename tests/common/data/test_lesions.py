import numpy as np
import pytest
import torch

from sonofed_common.data.lesions import LEAST, MARGIN, cut_out, lesion_boxes


def mask(*blocks, side=40):
    found = torch.zeros(1, side, side)
    for rows, columns in blocks:
        found[0, slice(*rows), slice(*columns)] = 1
    return found


def test_the_square_is_around_the_largest_lesion():
    boxes = lesion_boxes(mask(((10, 20), (4, 10)), ((30, 32), (30, 32))))
    assert boxes[0].tolist() == pytest.approx([7 / 40, 15 / 40, MARGIN * 10 / 40])


def test_without_a_lesion_it_is_the_whole_image():
    image = torch.rand(1, 1, 80, 80, generator=torch.Generator().manual_seed(0))
    boxes = lesion_boxes(torch.full((1, 40, 40), 0.4))
    assert boxes.tolist() == [[0.5, 0.5, 1.0]]
    torch.testing.assert_close(cut_out(image, boxes, 80), image, atol=1e-4, rtol=0)


def test_small_and_large_lesions_are_bounded():
    small, large = lesion_boxes(torch.cat([mask(((5, 6), (5, 6))), mask(((0, 40), (0, 40)))]))
    assert float(small[2]) == pytest.approx(LEAST)
    assert float(large[2]) == 1.0


def test_what_is_cut_out_is_that_part_of_the_image():
    image = torch.zeros(1, 1, 80, 80)
    image[0, 0, 20:40, 8:20] = torch.arange(240.0).reshape(20, 12) / 240
    # Centre (14, 30) of 80, side 20: pixels 4 to 24 and 20 to 40, at their own size.
    cut = cut_out(image, torch.tensor([[14 / 80, 30 / 80, 20 / 80]]), 20)
    np.testing.assert_allclose(cut[0, 0].numpy(), image[0, 0, 20:40, 4:24].numpy(), atol=1e-5)


def test_beyond_the_image_is_black():
    image = torch.ones(1, 1, 40, 40)
    cut = cut_out(image, torch.tensor([[0.0, 0.0, 0.5]]), 20)
    assert float(cut[0, 0, :9, :9].max()) == 0
    assert float(cut[0, 0, 11:, 11:].min()) == 1


def test_no_image_has_no_square():
    assert lesion_boxes(torch.zeros(0, 8, 8)).shape == (0, 3)
