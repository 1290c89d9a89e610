"""Augmentation of a batch: horizontal flips and small rotations."""

from __future__ import annotations

import math

import numpy as np
import torch
from monai.networks.layers import AffineTransform
from torch import Tensor

FLIP_PROBABILITY = 0.5
LARGEST_ROTATION = math.radians(15)


class Augmentation:
    """Random horizontal flip (p 0.5) and rotation (uniform in +-15 degrees) of each image.

    Parameters
    ----------
    seed : int
        The same seed and the same order of calls give the same bits on CPU.

    Notes
    -----
    Flip and rotation of an image are one affine map and the batch is resampled at once, so an
    image is interpolated a single time. Pixels from outside are 0, like the padding. Ultrasound
    is never flipped vertically: shadows and enhancement lie below a lesion.
    """

    def __init__(self, seed: int) -> None:
        self._draws = np.random.default_rng(seed)
        self._warp = AffineTransform(
            normalized=True,
            mode="bilinear",
            padding_mode="zeros",
            align_corners=False,
            reverse_indexing=False,
        )

    def __call__(self, batch: Tensor) -> Tensor:
        """Augment each image on its own.

        Parameters
        ----------
        batch : Tensor
            Shape (B, 1, S, S), float32 in [0, 1], on any device.

        Returns
        -------
        Tensor
            Shape (B, 1, S, S), float32 in [0, 1].
        """
        count = len(batch)
        if count == 0:
            return batch
        flip = np.where(self._draws.random(count) < FLIP_PROBABILITY, -1.0, 1.0)
        angle = self._draws.uniform(-LARGEST_ROTATION, LARGEST_ROTATION, count)
        cos, sin, zero = np.cos(angle), np.sin(angle), np.zeros(count)
        rows = [[flip * cos, -flip * sin, zero], [sin, cos, zero]]
        theta = torch.as_tensor(np.moveaxis(np.array(rows), -1, 0), dtype=batch.dtype)
        warped: Tensor = self._warp(batch, theta.to(batch.device), batch.shape[-2:])
        return warped.clamp_(0, 1)
