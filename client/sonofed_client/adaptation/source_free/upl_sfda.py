"""Uncertainty-aware pseudo-labels, UPL-SFDA (Wu et al., IEEE TMI 2023)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn.functional import dropout2d, interpolate

from sonofed_client.adaptation.source_free.self_training import (
    SelfTraining,
    entropy,
    supervision,
)
from sonofed_common.models.segmenter import Segmenter

DROPPED = 0.5
"""Share of the channels that each copy of the head does not see."""
NOISE = 0.1
"""Standard deviation of the noise, over that of the map."""


class UPLSFDA(SelfTraining):
    """Let perturbed copies of the main head vote; learn where their mean is sure.

    Source: Wu et al., "UPL-SFDA: Uncertainty-Aware Pseudo Label Guided Source-Free Domain
    Adaptation for Medical Image Segmentation", IEEE TMI 2023. Simplified: the
    ``settings.perturbed_heads`` copies share the main head's weights, since sites exchange one
    head, and differ in what they see (channel dropout and noise on the encoder's maps; no spatial
    transformation); labels are renewed each epoch, not each step; cross-entropy stands in place of
    Dice. The entropy of the copies' mean is minimised beside. The auxiliary head, which the paper
    does not have, learns the same labels from the unperturbed maps.
    """

    def judge(self, teacher: Segmenter, batch: Tensor) -> tuple[Tensor, Tensor]:
        """Return class and probability of the copies' mean prediction."""
        logits = self._votes(teacher, teacher.encoder(batch), batch.shape[-1])
        confidence, label = _mean(logits).max(dim=1)
        return label, confidence

    def weigh(self, labels: Tensor, confidence: Tensor) -> Tensor:
        """Weigh pixels above the threshold 1, all others 0."""
        return (confidence > self.settings.least_probability).float()

    def loss(self, student: Segmenter, batch: Tensor, labels: Tensor, weights: Tensor) -> Tensor:
        """Return the cross-entropy of the copies and of the auxiliary head, plus the entropy."""
        maps = student.encoder(batch)
        votes = self._votes(student, maps, batch.shape[-1])
        auxiliary = _logits(student, 1, maps, batch.shape[-1])
        learned = supervision(votes, labels, weights) + supervision([auxiliary], labels, weights)
        return learned / 2 + entropy(_mean(votes)).mean()

    def _votes(self, model: Segmenter, maps: Sequence[Tensor], size: int) -> list[Tensor]:
        return [
            _logits(model, 0, [perturbed(m) for m in maps], size)
            for _ in range(self.settings.perturbed_heads)
        ]


def perturbed(features: Tensor) -> Tensor:
    """Drop channels of a map (B, F, h, w) and add noise; drawn from the global generator."""
    noise = torch.randn_like(features) * (NOISE * features.detach().std())
    return dropout2d(features + noise, DROPPED, training=True)


def _logits(model: Segmenter, head: int, maps: Sequence[Tensor], size: int) -> Tensor:
    return interpolate(model.heads[head](maps), (size, size), mode="bilinear")


def _mean(logits: Sequence[Tensor]) -> Tensor:
    return torch.stack([head.softmax(dim=1) for head in logits]).mean(dim=0)
