"""Strong augmentation of appearance: one anatomy as many scanners would show it."""

from __future__ import annotations

import cv2
import numpy as np
import torch
from torch import Generator, Tensor
from torch.nn.functional import interpolate, pad

from sonofed_common.data.sector import sectors

PROBABILITY = 0.5
"""Of each change, for each image on its own."""
COARSER = (0.75, 0.5, 0.35)
"""Shares of the image's side that a coarser scanner would resolve."""
BLUR_SIGMAS = (0.4, 1.5)
SHARPENING = 1.5
GRAIN_SIGMAS = (0.2, 2.0)
SPECKLE = 0.35
GAIN_OCTAVES = 0.8
GAIN_KNOTS = 5
GAMMA_OCTAVES = 1.0
CONTRAST = (0.6, 1.4)
BRIGHTNESS = 0.15
LEVELS = 256
RADIUS = 4
"""Of the smoothing kernels, pixels."""


class StyleAugmentation:
    """Random appearance; what is where stays, so that masks stay right.

    Each image gets, each with probability 0.5: a coarser resolution, blur or sharpening,
    multiplicative speckle of random grain, a gain that varies with depth, and a smooth intensity
    curve made of gamma, contrast, brightness and a random monotone cubic.

    Parameters
    ----------
    seed : int
        The same seed and the same order of calls give the same bits on CPU.

    Notes
    -----
    Widening the source's appearance after BigAug (Zhang et al., TMI 2020) and Models Genesis (Zhou
    et al., MedIA 2021; its Bezier curve, here with evenly spaced abscissae). Zeros around the
    ultrasound sector stay 0; a black cyst inside changes like all else.
    """

    def __init__(self, seed: int) -> None:
        self._draws = Generator().manual_seed(seed)

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
        x = self._coarser(batch)
        x = self._blur_or_sharpen(x)
        x = x * self._speckle(x) * self._gain(x)
        return torch.where(_surroundings(batch), 0, self._curve(x.clamp_(0, 1)))

    def _uniform(self, x: Tensor, low: float, high: float, *shape: int) -> Tensor:
        values = torch.rand((len(x), *(shape or (1, 1, 1))), generator=self._draws)
        return values.to(x.device) * (high - low) + low

    def _chosen(self, x: Tensor) -> Tensor:
        return self._uniform(x, 0, 1) < PROBABILITY

    def _coarser(self, x: Tensor) -> Tensor:
        level = torch.randint(len(COARSER), (len(x),), generator=self._draws).to(x.device)
        level[~self._chosen(x).flatten()] = -1
        x = x.clone()
        for number, share in enumerate(COARSER):
            members = level == number
            if members.any():
                small = interpolate(x[members], scale_factor=share, mode="area")
                x[members] = interpolate(small, x.shape[-2:], mode="bilinear")
        return x

    def _blur_or_sharpen(self, x: Tensor) -> Tensor:
        sigmas = self._uniform(x, *BLUR_SIGMAS)
        amount = self._uniform(x, -SHARPENING, 1) * self._chosen(x)
        return torch.lerp(x, _smooth(x, _kernels(sigmas)), amount)

    def _speckle(self, x: Tensor) -> Tensor:
        kernels = _kernels(self._uniform(x, *GRAIN_SIGMAS))
        noise = torch.randn(x.shape, generator=self._draws).to(x)
        # Smoothing along both axes shrinks the deviation by the kernel's norm twice.
        noise = _smooth(noise, kernels) / kernels.square().sum(-1).view(-1, 1, 1, 1)
        return 1 + noise * self._uniform(x, 0, SPECKLE) * self._chosen(x)

    def _gain(self, x: Tensor) -> Tensor:
        knots = (
            self._uniform(x, -GAIN_OCTAVES, GAIN_OCTAVES, 1, GAIN_KNOTS) * self._chosen(x)[..., 0]
        )
        octaves = interpolate(knots, x.shape[-2], mode="linear", align_corners=True)
        return torch.exp2(octaves).unsqueeze(-1)

    def _curve(self, x: Tensor) -> Tensor:
        """Apply all changes of intensity as one curve an image, linear between its levels."""
        image = x.flatten(1)
        one = (1,)
        levels = torch.linspace(0, 1, LEVELS, device=x.device).expand(len(x), -1)
        chosen = [self._chosen(x).flatten(1) for _ in range(3)]
        gamma = torch.exp2(self._uniform(x, -GAMMA_OCTAVES, GAMMA_OCTAVES, *one))
        y = torch.where(chosen[0], levels**gamma, levels)
        first, second = self._uniform(x, 0, 1, *one), self._uniform(x, 0, 1, *one)
        cubic = 3 * (1 - y) ** 2 * y * first + 3 * (1 - y) * y**2 * second + y**3
        y = torch.where(chosen[1], cubic, y)
        contrast = self._uniform(x, *CONTRAST, *one)
        brightness = self._uniform(x, -BRIGHTNESS, BRIGHTNESS, *one)
        y = torch.where(chosen[2], (y - 0.5) * contrast + 0.5 + brightness, y).clamp_(0, 1)
        position = image * (LEVELS - 1)
        below = position.long().clamp_(max=LEVELS - 2)
        low, high = y.gather(1, below), y.gather(1, below + 1)
        return torch.lerp(low, high, position - below).view_as(x)


def _surroundings(images: Tensor) -> Tensor:
    """Pixels (N, 1, S, S) that are exactly 0 outside of the sector, or joined to the border."""
    black = (images == 0).cpu()
    found = black & ~sectors(images).cpu()
    for place, zeros in zip(found[:, 0], black[:, 0], strict=True):
        _, labels = cv2.connectedComponents(zeros.numpy().astype(np.uint8), connectivity=4)
        edges = (labels[0], labels[-1], labels[:, 0], labels[:, -1])
        reaching = np.unique(np.concatenate(edges))
        place |= torch.from_numpy(np.isin(labels, reaching[reaching > 0]))
    return found.to(images.device)


def _kernels(sigmas: Tensor) -> Tensor:
    """Normalised Gaussian kernels (B, 2 RADIUS + 1) of sigmas (B, 1, 1, 1), pixels."""
    offsets = torch.arange(-RADIUS, RADIUS + 1, device=sigmas.device)
    weights = torch.exp(-0.5 * (offsets / sigmas.flatten(1)) ** 2)
    return weights / weights.sum(1, keepdim=True)


def _smooth(x: Tensor, kernels: Tensor) -> Tensor:
    """Convolve each image of (B, 1, S, S) along both axes with its own kernel (B, K)."""
    count, taps = kernels.shape
    radius = taps // 2
    columns = kernels.to(x.dtype).view(count, 1, taps, 1)
    stacked = pad(x.transpose(0, 1), (radius,) * 4, mode="replicate")
    stacked = torch.conv2d(stacked, columns, groups=count)
    stacked = torch.conv2d(stacked, columns.transpose(2, 3), groups=count)
    return stacked.transpose(0, 1)
