"""Self-training, the common form of the strategies: a teacher labels, the student follows."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from sonofed_common.contract.segmentation import SegmentationFacts
from sonofed_common.contract.study_segmentation import PseudoLabels
from sonofed_common.models.segmenter import Segmenter

LABEL_BATCH = 32


class SelfTraining:
    """Learn every pixel's most probable class; the strategies change one step or another.

    Parameters
    ----------
    settings : PseudoLabels
        The study's settings.
    facts : SegmentationFacts
        What the bundle says of the source.
    """

    def __init__(self, settings: PseudoLabels, facts: SegmentationFacts) -> None:
        self.settings = settings
        self.facts = facts

    def trained(self, student: Segmenter) -> Iterable[nn.Parameter]:
        """Return the parameters that are trained; none for a run that trains nothing."""
        return student.parameters()

    def label(self, teacher: Segmenter, images: Tensor) -> tuple[Tensor, Tensor]:
        """Make the pseudo-labels of all images.

        Parameters
        ----------
        teacher : Segmenter
            In evaluation mode.
        images : Tensor (N, 1, S, S)
            In [0, 1].

        Returns
        -------
        labels : Tensor of uint8 (N, S, S)
        weights : Tensor of float16 (N, S, S)
            In [0, 1]; a pixel of weight 0 is not learned.
        """
        place = next(teacher.parameters()).device
        labels: list[Tensor] = []
        confidences: list[Tensor] = []
        with torch.no_grad():
            for batch in torch.split(images, LABEL_BATCH):
                label, confidence = self.judge(teacher, batch.to(place))
                labels.append(label.to(torch.uint8).cpu())
                confidences.append(confidence.float().cpu())
        whole = torch.cat(labels)
        return whole, self.weigh(whole, torch.cat(confidences)).to(torch.float16)

    def judge(self, teacher: Segmenter, batch: Tensor) -> tuple[Tensor, Tensor]:
        """Map images (B, 1, S, S) to classes and confidences in [0, 1], both (B, S, S)."""
        confidence, label = teacher.probabilities(batch).max(dim=1)
        return label, confidence

    def weigh(self, labels: Tensor, confidence: Tensor) -> Tensor:
        """Map labels and confidences (N, S, S) of all images to the pixels' weights in [0, 1]."""
        return torch.ones_like(confidence)

    def loss(self, student: Segmenter, batch: Tensor, labels: Tensor, weights: Tensor) -> Tensor:
        """Return the loss of views (B, 1, S, S) with labels and weights (B, S, S)."""
        return supervision(student(batch), labels, weights)


def supervision(logits: Iterable[Tensor], labels: Tensor, weights: Tensor) -> Tensor:
    """Mean over heads and pixels of the weighted cross-entropy.

    Parameters
    ----------
    logits : iterable of Tensor (B, C, S, S)
        One a head.
    labels : Tensor of int64 (B, S, S)
        Classes.
    weights : Tensor (B, S, S)
        In [0, 1].
    """
    losses = [(cross_entropy(head, labels, reduction="none") * weights).mean() for head in logits]
    return torch.stack(losses).mean()


def entropy(probabilities: Tensor) -> Tensor:
    """Entropy (B, S, S) in nats of class probabilities (B, C, S, S)."""
    return -torch.xlogy(probabilities, probabilities.clamp_min(1e-12)).sum(dim=1)


def divergence(main: Tensor, auxiliary: Tensor) -> Tensor:
    """Return KL(main || auxiliary) (B, S, S) of two heads' logits (B, C, S, S)."""
    p, q = main.log_softmax(dim=1), auxiliary.log_softmax(dim=1)
    return (p.exp() * (p - q)).sum(dim=1)
