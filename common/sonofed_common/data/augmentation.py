"""Augmentation of a batch: horizontal flips and small rotations, of images and their masks."""

from __future__ import annotations

import math

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn.functional import affine_grid, grid_sample

FLIP_PROBABILITY = 0.5
LARGEST_ROTATION = math.radians(15)
SCALES = (0.9, 1.1)


class Augmentation:
    """Random horizontal flip (p 0.5) and rotation (uniform in +-15 degrees) of each image.

    Parameters
    ----------
    seed : int
        The same seed and the same order of calls give the same bits on CPU.
    flips : bool
        Off where classes have a side, such as the right and the left kidney: a mirrored right
        kidney would be taught as a right one.

    Notes
    -----
    Flip and rotation of an image are one affine map and the batch is resampled at once, so an
    image is interpolated a single time. Pixels from outside are 0, like the padding. Ultrasound
    is never flipped vertically: shadows and enhancement lie below a lesion.
    """

    def __init__(self, seed: int, flips: bool = True) -> None:
        self._flip_probability = FLIP_PROBABILITY if flips else 0.0
        self._draws = np.random.default_rng(seed)

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
        if len(batch) == 0:
            return batch
        return _warp(batch, self._maps(len(batch)), "bilinear").clamp_(0, 1)

    def with_masks(self, images: Tensor, masks: Tensor) -> tuple[Tensor, Tensor]:
        """Augment each image, and its mask by the same map; they are also scaled by 0.9 to 1.1.

        Parameters
        ----------
        images : Tensor
            Shape (B, 1, S, S), float32 in [0, 1].
        masks : Tensor
            Shape (B, 1, S, S), class numbers of any type; pixels from outside are 0.

        Returns
        -------
        images, masks : Tensor
            As they came; masks take the nearest pixel.
        """
        if len(images) == 0:
            return images, masks
        maps = self._maps(len(images))
        maps = maps / self._draws.uniform(*SCALES, len(images))[:, None, None]
        moved = _warp(masks.to(images.dtype), maps, "nearest")
        return _warp(images, maps, "bilinear").clamp_(0, 1), moved.to(masks.dtype)

    def _maps(self, count: int) -> NDArray[np.float64]:
        flip = np.where(self._draws.random(count) < self._flip_probability, -1.0, 1.0)
        angle = self._draws.uniform(-LARGEST_ROTATION, LARGEST_ROTATION, count)
        cos, sin, zero = np.cos(angle), np.sin(angle), np.zeros(count)
        rows = [[flip * cos, -flip * sin, zero], [sin, cos, zero]]
        return np.moveaxis(np.array(rows), -1, 0)


def _warp(batch: Tensor, maps: NDArray[np.float64], mode: str) -> Tensor:
    theta = torch.as_tensor(maps, dtype=batch.dtype).to(batch.device)
    grid = affine_grid(theta, list(batch.shape), align_corners=False)
    return grid_sample(batch.contiguous(), grid, mode, "zeros", align_corners=False)
