"""Test-time entropy minimisation, TENT (Wang et al., ICLR 2021)."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase
from torch.nn.modules.dropout import _DropoutNd

from sonofed_client.adaptation.source_free.self_training import SelfTraining, entropy
from sonofed_common.models.segmenter import Segmenter


class Tent(SelfTraining):
    """Make the mean prediction of both heads sure of itself by its normalisation layers alone.

    Source: Wang et al., "Tent: Fully Test-Time Adaptation by Entropy Minimization", ICLR 2021.
    There one pass is made over the images as they come; here the study's epochs over augmented
    views. Only scales and shifts are trained. There are no pseudo-labels: every pixel counts. As
    there, the network predicts without dropout, from the statistics of the batch.
    """

    def trained(self, student: Segmenter) -> Iterable[nn.Parameter]:
        """Return the scales and shifts of the normalisation layers."""
        for module in student.modules():
            if isinstance(module, (_NormBase, nn.LayerNorm, nn.GroupNorm)):
                yield from module.parameters(recurse=False)

    def label(self, teacher: Segmenter, images: Tensor) -> tuple[Tensor, Tensor]:
        """Weigh all pixels 1, under a label that is not used."""
        shape = (len(images), *images.shape[2:])
        return torch.zeros(shape, dtype=torch.uint8), torch.ones(shape, dtype=torch.float16)

    def loss(self, student: Segmenter, batch: Tensor, labels: Tensor, weights: Tensor) -> Tensor:
        """Return the mean entropy, nats."""
        for module in student.modules():
            if isinstance(module, _DropoutNd):
                module.eval()
        return entropy(student.probabilities(batch)).mean()
