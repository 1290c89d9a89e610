from __future__ import annotations

import itertools
import math

import torch
from hypothesis import given
from hypothesis import settings as examples
from hypothesis import strategies as st

from sonofed_client.adaptation.masked_modelling import draw_masks, masked_mean, pixels_of

torch.set_num_threads(1)

SIZE = 32


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


@examples(max_examples=40, deadline=None)
@given(
    patch=st.sampled_from([2, 5, 8, 16]),
    ratio=st.floats(0.05, 0.95),
    seed=st.integers(0, 1000),
    left=st.integers(0, 28),
    top=st.integers(0, 28),
)
def test_masks_lie_in_the_sector_and_hold_their_share_of_it(patch, ratio, seed, left, top):
    inside = torch.zeros(2, 1, SIZE, SIZE, dtype=torch.bool)
    inside[0] = True
    inside[1, :, top:, left:] = True
    masks = draw_masks(inside, patch, ratio, generator(seed))
    for image, mask in zip(inside[:, 0], masks, strict=True):
        tiles = [
            (row, column, image[row * patch :, column * patch :][:patch, :patch].float().mean())
            for row, column in itertools.product(range(math.ceil(SIZE / patch)), repeat=2)
        ]
        most = {(r, c) for r, c, share in tiles if share > 0.5}
        most = most or {(r, c) for r, c, s in tiles if s == max(t[2] for t in tiles)}
        chosen = {tuple(place) for place in mask.nonzero().tolist()}
        assert chosen <= most
        assert len(chosen) == max(1, round(ratio * len(most)))
    pixels = pixels_of(masks, patch, SIZE)
    rows, columns = torch.meshgrid(torch.arange(SIZE), torch.arange(SIZE), indexing="ij")
    assert torch.equal(pixels[:, 0], masks[:, rows // patch, columns // patch])


def test_masks_are_drawn_evenly():
    inside = torch.ones(2000, 1, SIZE, SIZE, dtype=torch.bool)
    shares = draw_masks(inside, 8, 0.6, generator()).float().mean(dim=0)
    assert torch.allclose(shares, torch.full((4, 4), 10 / 16), atol=0.05)


def test_errors_elsewhere_change_nothing_whatever_they_are():
    errors, where = torch.rand(2, 1, 8, 8), torch.rand(2, 1, 8, 8) < 0.4
    spoilt = torch.where(where, errors, torch.inf)
    assert torch.equal(masked_mean(errors, where), masked_mean(spoilt, where))
    assert masked_mean(errors, torch.zeros_like(where)) == 0
