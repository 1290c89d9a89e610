"""A few of many images."""

from __future__ import annotations

import torch
from torch import Tensor

BATCH_NORM_IMAGES = 128
"""Most images that normalisation statistics and the predicted foreground are estimated on."""


def evenly_spaced(images: Tensor, count: int) -> Tensor:
    """Return up to ``count`` images, evenly spaced: neighbours are often of one patient."""
    count = min(count, len(images))
    return images[torch.arange(count) * len(images) // max(count, 1)]
