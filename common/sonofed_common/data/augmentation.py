"""Augmentation of a batch: horizontal flips and small rotations, of images and their masks."""

from __future__ import annotations

import math

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

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
        from sonofed_common.monai import AffineTransform

        self._flip_probability = FLIP_PROBABILITY if flips else 0.0
        self._draws = np.random.default_rng(seed)
        self._warp, self._warp_nearest = (
            AffineTransform(
                normalized=True,
                mode=mode,
                padding_mode="zeros",
                align_corners=False,
                reverse_indexing=False,
            )
            for mode in ("bilinear", "nearest")
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
        if len(batch) == 0:
            return batch
        return self._resample(batch, self._maps(len(batch)))

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
        moved = self._warp_nearest(masks.to(images.dtype), *self._arguments(images, maps))
        return self._resample(images, maps), moved.to(masks.dtype)

    def _maps(self, count: int) -> NDArray[np.float64]:
        flip = np.where(self._draws.random(count) < self._flip_probability, -1.0, 1.0)
        angle = self._draws.uniform(-LARGEST_ROTATION, LARGEST_ROTATION, count)
        cos, sin, zero = np.cos(angle), np.sin(angle), np.zeros(count)
        rows = [[flip * cos, -flip * sin, zero], [sin, cos, zero]]
        return np.moveaxis(np.array(rows), -1, 0)

    def _resample(self, batch: Tensor, maps: NDArray[np.float64]) -> Tensor:
        warped: Tensor = self._warp(batch, *self._arguments(batch, maps))
        return warped.clamp_(0, 1)

    @staticmethod
    def _arguments(batch: Tensor, maps: NDArray[np.float64]) -> tuple[Tensor, torch.Size]:
        theta = torch.as_tensor(maps, dtype=batch.dtype)
        return theta.to(batch.device), batch.shape[-2:]
