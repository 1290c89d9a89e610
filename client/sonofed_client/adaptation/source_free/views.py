"""Augmented views of images together with their pseudo-labels."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import conv2d, pad

FLIP_PROBABILITY = 0.5
GAMMA = 0.3
"""Largest |log gamma|."""
CONTRAST = 0.2
NOISE = 0.03
"""Largest standard deviation of the noise, over the range of the image."""


class Views:
    """Random horizontal flip, gamma, contrast, blur and noise of each image.

    Parameters
    ----------
    seed : int
        The same seed and the same order of calls give the same bits.
    flips : bool
        Off where classes have a side.

    Notes
    -----
    Labels and weights follow the flip. Pixels are never resampled: a label made on a rotated
    border would be one nobody predicted.
    """

    def __init__(self, seed: int, flips: bool = True) -> None:
        self._flip_probability = FLIP_PROBABILITY if flips else 0.0
        self._generator = torch.Generator().manual_seed(seed)

    def __call__(
        self, images: Tensor, labels: Tensor, weights: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Make one view of each image.

        Parameters
        ----------
        images : Tensor of float32 (B, 1, S, S)
            In [0, 1], on CPU.
        labels, weights : Tensor (B, S, S)
            Of each pixel, on CPU.

        Returns
        -------
        tuple of Tensor
            Of the same shapes; images in [0, 1].
        """
        flip = self._uniform(len(images)) < self._flip_probability
        images, labels, weights = (
            torch.where(flip.view(-1, *[1] * (x.ndim - 1)), x.flip(-1), x)
            for x in (images, labels, weights)
        )
        return self._intensity(images), labels, weights

    def _intensity(self, images: Tensor) -> Tensor:
        gamma = (GAMMA * self._symmetric(images)).exp()
        x = images.clamp_min(1e-6) ** gamma
        mean = x.mean(dim=(1, 2, 3), keepdim=True)
        x = mean + (1 + CONTRAST * self._symmetric(images)) * (x - mean)
        row = torch.tensor([0.25, 0.5, 0.25])
        blurred = conv2d(pad(x, (1, 1, 1, 1), mode="reflect"), torch.outer(row, row)[None, None])
        x = torch.lerp(x, blurred, self._uniform(len(x)).view(-1, 1, 1, 1))
        noise = torch.randn(x.shape, generator=self._generator)
        level = NOISE * self._uniform(len(x)).view(-1, 1, 1, 1)
        return (x + level * noise).clamp(0, 1)

    def _uniform(self, count: int) -> Tensor:
        return torch.rand(count, generator=self._generator)

    def _symmetric(self, images: Tensor) -> Tensor:
        return 2 * self._uniform(len(images)).view(-1, 1, 1, 1) - 1
