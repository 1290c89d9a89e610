from __future__ import annotations

import math

import pytest
import torch

from sonofed_client.adaptation.contrastive import nt_xent, random_crops

torch.set_num_threads(1)

SIZE = 32


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


@pytest.mark.parametrize("temperature", [0.1, 0.5])
def test_nt_xent_of_distinct_groups_is_monais(temperature):
    from monai.losses import ContrastiveLoss

    one, two = torch.randn(2, 6, 5, generator=generator())
    expected = ContrastiveLoss(temperature)(one, two)
    assert torch.allclose(nt_xent(one, two, torch.arange(6), temperature), expected, atol=1e-5)


def test_images_of_one_group_are_no_negatives_of_each_other():
    one, two = torch.randn(2, 5, 4, generator=generator()).double()
    groups = torch.tensor([0, 0, 1, 2, 1])
    views = torch.nn.functional.normalize(torch.cat([one, two]), dim=1)
    losses = []
    for anchor in range(10):
        partner = (anchor + 5) % 10
        seen = [
            v
            for v in range(10)
            if v == partner or groups[v % 5].item() != groups[anchor % 5].item()
        ]
        terms = [math.exp((views[anchor] @ views[v]).item() / 0.2) for v in seen]
        losses.append(math.log(sum(terms)) - (views[anchor] @ views[partner]).item() / 0.2)
    found = nt_xent(one, two, groups, 0.2).item()
    assert found == pytest.approx(sum(losses) / 10, rel=1e-5)


def test_a_same_group_image_does_not_change_the_loss():
    one, two = torch.randn(2, 3, 4, generator=generator())
    alone = nt_xent(one[:1], two[:1], torch.zeros(1), 0.2)
    assert torch.equal(nt_xent(one, two, torch.zeros(3), 0.2), alone)


def test_crops_keep_black_black_the_range_and_the_vertical_order():
    ramp = torch.linspace(0.2, 1, SIZE).view(1, 1, SIZE, 1).expand(50, 1, SIZE, SIZE)
    crops = random_crops(ramp, generator())
    assert crops.min() >= 0 and crops.max() <= 1
    assert bool((crops.diff(dim=2) >= -1e-6).all())
    assert not random_crops(torch.zeros(4, 1, SIZE, SIZE), generator()).any()
    assert torch.equal(crops, random_crops(ramp, generator()))
    columns = torch.arange(SIZE).float().view(1, 1, 1, SIZE).expand(200, 1, SIZE, SIZE) / SIZE
    rising = random_crops(columns, generator())[:, 0, 0].diff(dim=1).mean(dim=1) > 0
    assert 0.3 < rising.float().mean() < 0.7
    kept = random_crops(columns, generator(), flips=False)[:, 0, 0].diff(dim=1).mean(dim=1) > 0
    assert kept.all()


def test_crops_hold_half_to_all_of_the_area():
    stripes = (torch.arange(SIZE) // 2 % 2).float().view(1, 1, SIZE, 1)
    crops = random_crops(stripes.expand(300, 1, SIZE, SIZE), generator())[:, 0, :, 0] > 0.4
    borders = crops.int().diff(dim=1).abs().sum(dim=1)
    # 15 borders lie in the whole height, 15 sqrt(1/2) in the smallest crop.
    assert 10 <= borders.min() <= 11 and borders.max() == 15
