"""Denoised pseudo-labelling, DPL (Chen et al., MICCAI 2021)."""

from __future__ import annotations

from typing import cast

import torch
from torch import Tensor, nn
from torch.nn.functional import interpolate
from torch.nn.modules.dropout import _DropoutNd

from sonofed_client.adaptation.source_free.self_training import SelfTraining
from sonofed_common.models.segmenter import ASPPHead, Segmenter

LARGEST_DEVIATION = 0.05
"""Of the class's probability over the dropout passes, as in the paper."""


class DPL(SelfTraining):
    """Learn the pixels that are sure, stable under dropout and near their class's prototype.

    Source: Chen et al., "Source-Free Domain Adaptive Fundus Image Segmentation with Denoised
    Pseudo-Labeling", MICCAI 2021. There each structure has a sigmoid of its own and is background
    below .75; here the classes share a softmax, the label is its argmax, and a pixel counts above
    ``settings.least_probability``. Dropout acts in the heads, on maps that the encoder makes once.
    """

    def judge(self, teacher: Segmenter, batch: Tensor) -> tuple[Tensor, Tensor]:
        """Return the classes, and confidence 1 where a pixel passes all tests, else 0."""
        maps = teacher.encoder(batch)
        passes = self._passes(teacher, maps, batch.shape[-1])
        mean, deviation = passes.mean(dim=0), passes.std(dim=0, correction=0)
        probability, label = mean.max(dim=1)
        stable = deviation.gather(1, label[:, None])[:, 0] < LARGEST_DEVIATION
        features = penultimate(teacher, maps, batch.shape[-1])
        typical = near_own_prototype(features, label, stable * probability, mean.shape[1])
        return label, (stable & typical & (probability > self.settings.least_probability)).float()

    def _passes(self, teacher: Segmenter, maps: list[Tensor], size: int) -> Tensor:
        droppers = [m for m in teacher.heads.modules() if isinstance(m, _DropoutNd)]
        for dropper in droppers:
            dropper.train()
        try:
            passes = []
            for _ in range(self.settings.passes):
                main, auxiliary = teacher.decode(maps, size)
                passes.append((main.softmax(1) + auxiliary.softmax(1)) / 2)
            return torch.stack(passes)
        finally:
            for dropper in droppers:
                dropper.eval()


def penultimate(model: Segmenter, maps: list[Tensor], size: int) -> Tensor:
    """Return what the main head's last convolution sees, brought to full size (B, F, S, S)."""
    head = model.heads[0]
    layers = head.pyramid[0] if isinstance(head, ASPPHead) else head.last
    seen: list[Tensor] = []
    hook = cast(nn.Module, layers).register_forward_pre_hook(
        lambda _, inputs: seen.append(inputs[0])
    )
    try:
        head(maps)
    finally:
        hook.remove()
    return interpolate(seen[0].float(), (size, size), mode="bilinear")


def near_own_prototype(features: Tensor, labels: Tensor, weights: Tensor, classes: int) -> Tensor:
    """Tell which pixels lie at least as near to their own class's prototype as to any other.

    Parameters
    ----------
    features : Tensor (B, F, S, S)
        One vector a pixel.
    labels : Tensor of int64 (B, S, S)
        Classes.
    weights : Tensor (B, S, S)
        Non-negative; a prototype is the weighted mean of its class's features in the batch. A
        class without weight has no prototype, and its pixels are far from it.
    classes : int
        C.

    Returns
    -------
    Tensor of bool (B, S, S)
    """
    distances = []
    for c in range(classes):
        own = (weights * (labels == c))[:, None]
        if not bool(own.any()):
            distances.append(torch.full_like(weights, float("inf")))
            continue
        prototype = (features * own).sum((0, 2, 3), keepdim=True) / own.sum()
        distances.append((features - prototype).square().sum(dim=1))
    stacked = torch.stack(distances, dim=1)
    own_distance = stacked.gather(1, labels[:, None])[:, 0]
    return own_distance.isfinite() & (own_distance <= stacked.amin(dim=1))
