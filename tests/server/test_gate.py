"""The gate and the statistics that adapted branches get at the source."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from sonofed_common.contract.study_segmentation import Infusion
from sonofed_common.models.infusion import InfusionHead, gate_loss
from sonofed_common.models.segmenter import build_segmenter
from sonofed_server.source.gate import bring_home, train_gate
from sonofed_server.source.segmentation_data import SegmentationPart

SIZE = 32


def pool(count: int = 24) -> SegmentationPart:
    """Bright grounds with a dark square somewhere, which the mask outlines."""
    draws = torch.Generator().manual_seed(3)
    images = 0.8 + 0.1 * torch.rand(count, 1, SIZE, SIZE, generator=draws)
    masks = torch.zeros(count, 1, SIZE, SIZE, dtype=torch.uint8)
    for mask, (y, x) in zip(masks, torch.randint(0, 20, (count, 2), generator=draws), strict=True):
        mask[:, y : y + 12, x : x + 12] = 1
    return SegmentationPart((), images - 0.7 * masks, masks)


def test_statistics_become_those_of_the_source_images_without_dropout() -> None:
    source = pool(20)
    model = build_segmenter("unet", 2, SIZE, ("unet", "aspp"), pretrained=False).eval()
    norms = [m for m in model.modules() if isinstance(m, nn.BatchNorm2d)]
    dropping: list[bool] = []
    for module in model.modules():
        if isinstance(module, nn.Dropout2d):
            module.register_forward_hook(lambda layer, *_: dropping.append(layer.training))
    seen: list[torch.Tensor] = []
    with torch.inference_mode():
        hook = norms[0].register_forward_hook(lambda _, given, __: seen.append(given[0]))
        model.probabilities(source.images)
        hook.remove()
    weights = {name: value.clone() for name, value in model.named_parameters()}
    for norm in norms:
        norm.running_mean.fill_(7.0)
    dropping.clear()
    bring_home(model, source)
    torch.testing.assert_close(norms[0].running_mean, seen[0].mean((0, 2, 3)))
    torch.testing.assert_close(norms[0].running_var, seen[0].var((0, 2, 3)))
    # Sites keep dropout off where they estimate theirs.
    assert dropping and not any(dropping) and not model.training
    assert all(torch.equal(value, weights[name]) for name, value in model.named_parameters())


class Reader(nn.Module):
    """A branch that takes what is darker than its image's mean for the lesion, or for ground."""

    def __init__(self, sure: float, right: bool) -> None:
        super().__init__()
        self.sure, self.right = sure, right

    def probabilities(self, images: torch.Tensor) -> torch.Tensor:
        lesion = (images < images.mean((2, 3), keepdim=True)) == self.right
        p = torch.where(lesion, self.sure, 1 - self.sure)
        return torch.cat([1 - p, p], 1)


def test_a_gate_learns_which_branch_to_trust() -> None:
    source = pool()
    models = [Reader(0.55, right=False), Reader(0.95, right=True)]
    heads = [InfusionHead(2, Infusion(rule="gate"), 2, seed=0) for _ in range(2)]
    stacked = torch.stack([model.probabilities(source.images) for model in models])
    with torch.no_grad():
        before = float(gate_loss(heads[0], stacked, source.masks))
        assert heads[0](stacked)[1].unique().tolist() == pytest.approx([0.5])
    for head in heads:
        train_gate(head, models, source, 5)
    with torch.no_grad():
        _, weights = heads[0](stacked)
        assert float(gate_loss(heads[0], stacked, source.masks)) < before
    assert float(weights[1].mean()) > 0.6
    for name, value in heads[0].state_dict().items():
        assert torch.equal(value, heads[1].state_dict()[name]), name


class Onlooker(nn.Module):
    """A branch that knows nothing, and keeps what it is asked about."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[torch.Tensor] = []

    def probabilities(self, images: torch.Tensor) -> torch.Tensor:
        self.seen.append(images)
        return torch.full((len(images), 2, *images.shape[2:]), 0.5)


def test_a_gate_learns_from_appearances_that_the_source_does_not_have() -> None:
    source, branch = pool(), Onlooker()
    # Two greys alone, which turning and scaling leave as they are.
    plain = SegmentationPart((), 0.8 - 0.6 * source.masks, source.masks)
    train_gate(InfusionHead(1, Infusion(rule="gate"), 2, seed=0), [branch], plain, 5)
    middles = torch.cat(branch.seen)[:, 0, 8:24, 8:24].flatten(1).median(dim=1).values
    greys = torch.tensor([0.2, 0.8])
    known = ((middles[:, None] - greys).abs() < 0.01).any(dim=1)
    assert known.float().mean() < 0.5
