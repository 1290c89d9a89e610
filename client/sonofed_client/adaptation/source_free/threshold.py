"""Pseudo-labels above a fixed probability (Lee, ICML workshop 2013, with FixMatch's threshold)."""

from __future__ import annotations

from torch import Tensor

from sonofed_client.adaptation.source_free.self_training import SelfTraining


class Threshold(SelfTraining):
    """Learn the pixels whose mean probability is at least ``settings.least_probability``.

    Sources: Lee, "Pseudo-Label", ICML workshop 2013; Sohn et al., "FixMatch", NeurIPS 2020.
    """

    def weigh(self, labels: Tensor, confidence: Tensor) -> Tensor:
        """Weigh pixels at or above the threshold 1, all others 0."""
        return (confidence >= self.settings.least_probability).float()
