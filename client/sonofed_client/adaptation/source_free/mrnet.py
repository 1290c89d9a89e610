"""Uncertainty-rectified pseudo-labels, MRNet (Zheng and Yang, IJCV 2021)."""

from __future__ import annotations

import torch
from torch import Tensor

from sonofed_client.adaptation.source_free.self_training import SelfTraining, divergence
from sonofed_common.models.segmenter import Segmenter


class MRNet(SelfTraining):
    """Let each pixel's label count less where the heads disagree: ``CE exp(-v) + v``.

    v is the divergence KL(main || auxiliary) of the pixel. Source: Zheng and Yang, "Rectifying
    Pseudo Label Learning via Uncertainty Estimation for Domain Adaptive Semantic Segmentation",
    IJCV 2021. Both heads learn by it, with equal weights.
    """

    def loss(self, student: Segmenter, batch: Tensor, labels: Tensor, weights: Tensor) -> Tensor:
        """Return the mean rectified cross-entropy of both heads."""
        main, auxiliary = student(batch)
        return rectified(main, auxiliary, labels, weights)


def rectified(main: Tensor, auxiliary: Tensor, labels: Tensor, weights: Tensor) -> Tensor:
    """Return the mean over pixels and heads of ``weight CE exp(-v) + v``.

    Parameters
    ----------
    main, auxiliary : Tensor (B, C, S, S)
        Logits.
    labels : Tensor of int64 (B, S, S)
        Classes.
    weights : Tensor (B, S, S)
        In [0, 1].
    """
    v = divergence(main, auxiliary)
    loss = torch.nn.functional.cross_entropy
    error = (loss(main, labels, reduction="none") + loss(auxiliary, labels, reduction="none")) / 2
    return (weights * error * (-v).exp() + v).mean()
