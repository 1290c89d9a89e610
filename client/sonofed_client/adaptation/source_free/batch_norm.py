"""Adaptive batch normalisation alone, AdaBN (Li et al., Pattern Recognition 2018)."""

from __future__ import annotations

from collections.abc import Iterable

from torch import nn

from sonofed_client.adaptation.source_free.self_training import SelfTraining
from sonofed_common.models.segmenter import Segmenter


class BatchNorm(SelfTraining):
    """Train nothing: the re-estimated statistics, with which every round starts, are all.

    Source: Li et al., "Adaptive Batch Normalization for practical domain adaptation", Pattern
    Recognition 2018.
    """

    def trained(self, student: Segmenter) -> Iterable[nn.Parameter]:
        """Return no parameter."""
        return ()
