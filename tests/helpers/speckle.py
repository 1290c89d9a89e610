"""Small images like ultrasound, for what compares images."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

SIZE = 32


def scans(count: int, seed: int = 0, size: int = SIZE) -> Tensor:
    """Speckled images with a dark lesion of random place and size."""
    draws = np.random.default_rng(seed)
    y, x = np.mgrid[:size, :size] / size
    images = []
    for _ in range(count):
        row, column, radius = (
            draws.uniform(0.3, 0.7),
            draws.uniform(0.2, 0.8),
            draws.uniform(0.1, 0.25),
        )
        lesion = (y - row) ** 2 + (x - column) ** 2 < radius**2
        tissue = 0.7 - 0.3 * y + draws.uniform(-0.2, 0.2)
        images.append(np.where(lesion, 0.15, tissue) * draws.rayleigh(0.8, (size, size)))
    return torch.from_numpy(np.stack(images)[:, None]).float().clamp(0, 1)
