"""Class-balanced self-training (Zou et al., ECCV 2018)."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from sonofed_client.adaptation.source_free.self_training import SelfTraining


class CBST(SelfTraining):
    """Learn, of each predicted class, the most confident ``settings.quantile`` of its pixels.

    Source: Zou et al., "Unsupervised Domain Adaptation for Semantic Segmentation via
    Class-Balanced Self-Training", ECCV 2018. There the share grows from round to round, with the
    source's labelled images beside; here it is fixed, without a source. There the label of a pixel
    is the class of largest ``p_c / border_c``, which lets rare classes win pixels; here it is the
    class of largest p, and the borders choose among the pixels of each class alone.
    """

    def weigh(self, labels: Tensor, confidence: Tensor) -> Tensor:
        """Weigh the most confident pixels of each class 1; ties at the border count as above it."""
        weights = torch.zeros_like(confidence)
        for c in range(self.facts.classes):
            own = labels == c
            values = confidence[own].numpy()
            if len(values):
                border = np.quantile(values, 1 - self.settings.quantile, method="lower")
                weights[own] = torch.from_numpy((values >= border).astype(np.float32))
        return weights
