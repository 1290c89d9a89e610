"""Contrastive learning on two crops of each image: NT-Xent and BYOL."""

from __future__ import annotations

import copy

import torch
from torch import Tensor, nn
from torch.nn.functional import affine_grid, cross_entropy, grid_sample, normalize

from sonofed_common.models.encoder import Predictor
from sonofed_common.models.encoders import Encoder

DIMENSION = 128
"""Length of a projection, as in SimCLR."""
LEAST_AREA = 0.5
FLIP_PROBABILITY = 0.5
GAIN = (0.8, 1.2)
GAMMA = (0.8, 1.25)


def random_crops(images: Tensor, generator: torch.Generator, flips: bool = True) -> Tensor:
    """Crop, flip and brighten each image at random.

    Parameters
    ----------
    images : Tensor of float32 (B, 1, S, S)
        In [0, 1].
    generator : Generator
        On CPU.
    flips : bool
        Off where classes have a side.

    Returns
    -------
    Tensor of float32 (B, 1, S, S)
        A square of 50 to 100% of the area, brought to the whole size, with flips mirrored left to
        right with p 0.5, and ``gain x^gamma``: black stays black. Never flipped vertically: shadows
        lie below what casts them.
    """
    draws = torch.rand(6, len(images), generator=generator)
    scale = (LEAST_AREA + (1 - LEAST_AREA) * draws[0]).sqrt()
    flip = torch.where(draws[1] < FLIP_PROBABILITY * flips, -1.0, 1.0)
    across, down = ((1 - scale) * (2 * draw - 1) for draw in draws[2:4])
    none = torch.zeros_like(scale)
    theta = torch.stack([flip * scale, none, across, none, scale, down], dim=1).view(-1, 2, 3)
    grid = affine_grid(theta, list(images.shape), align_corners=False).to(images.device)
    # Beyond the border lies at most half a pixel, by interpolation only.
    crops = grid_sample(images, grid, padding_mode="border", align_corners=False)
    gain, gamma = (
        (low + (high - low) * draw).view(-1, 1, 1, 1).to(images.device)
        for (low, high), draw in zip((GAIN, GAMMA), draws[4:], strict=True)
    )
    views: Tensor = (gain * crops.clamp(0, 1).pow(gamma)).clamp(0, 1)
    return views


def nt_xent(one: Tensor, two: Tensor, groups: Tensor, temperature: float) -> Tensor:
    """Normalised temperature-scaled cross-entropy (Chen et al., ICML 2020).

    Parameters
    ----------
    one, two : Tensor (B, d)
        Projections of two views; row i of either is a view of image i.
    groups : Tensor of int (B,)
        Patient or video of each image: images of one group are never negatives of each other.
    temperature : float
        tau.

    Returns
    -------
    Tensor ()
        Mean over all 2 B views.
    """
    count = len(one)
    points = normalize(torch.cat([one, two]).float(), dim=1)
    # In bf16 the cosines would be off by more than a small temperature forgives.
    with torch.autocast(points.device.type, enabled=False):
        likeness = points @ points.T / temperature
    partner = torch.arange(2 * count, device=one.device).roll(count)
    owner = groups.to(one.device).repeat(2)
    left_out = owner[:, None] == owner[None, :]
    left_out[torch.arange(2 * count, device=one.device), partner] = False
    return cross_entropy(likeness.masked_fill(left_out, -torch.inf), partner)


def _projector(features: int) -> nn.Sequential:
    return nn.Sequential(
        nn.Linear(features, 2 * DIMENSION),
        nn.BatchNorm1d(2 * DIMENSION),
        nn.ReLU(inplace=True),
        nn.Linear(2 * DIMENSION, DIMENSION),
    )


class SimCLR(nn.Module):
    """A projector under NT-Xent (Chen et al., ICML 2020).

    Parameters
    ----------
    features : int
        F, length of the encoder's pooled features.
    temperature : float
        tau.
    """

    def __init__(self, features: int, temperature: float) -> None:
        super().__init__()
        self.temperature = temperature
        self.projector = _projector(features)

    def forward(self, encoder: Encoder, one: Tensor, two: Tensor, groups: Tensor) -> Tensor:
        """Return the loss of two views (B, 1, S, S) of images of ``groups`` (B,)."""
        # One batch for both views: normalisation must not tell them apart.
        projected = self.projector(encoder.features(torch.cat([one, two])))
        one, two = projected.chunk(2)
        return nt_xent(one, two, groups, self.temperature)


class BYOL(nn.Module):
    """Bootstrap your own latent (Grill et al., NeurIPS 2020): no negatives.

    The online network predicts the projection that its own moving average makes of the other view.

    Parameters
    ----------
    encoder : Encoder
        The online encoder, copied for the first target.
    seed : int
        Of the predictor's random weights.
    """

    def __init__(self, encoder: Encoder, seed: int) -> None:
        super().__init__()
        self.projector = _projector(encoder.feature_dim)
        self.predictor = Predictor(DIMENSION, seed)
        self.target_encoder = copy.deepcopy(encoder).requires_grad_(False)
        self.target_projector = copy.deepcopy(self.projector).requires_grad_(False)

    def forward(self, encoder: Encoder, one: Tensor, two: Tensor, groups: Tensor) -> Tensor:
        """Return the loss, in [0, 4], of two views (B, 1, S, S); ``groups`` do not matter."""
        predicted = self.predictor(self.projector(encoder.features(torch.cat([one, two]))))
        with torch.no_grad():
            features = self.target_encoder.features(torch.cat([two, one]))
            target = normalize(self.target_projector(features).float(), dim=1)
        likeness: Tensor = (predicted.float() * target).sum(dim=1)
        return (2 - 2 * likeness).mean()

    @torch.no_grad()
    def follow(self, encoder: Encoder, momentum: float) -> None:
        """Move the target towards the online network by ``1 - momentum``."""
        for slow, fast in (
            (self.target_encoder, encoder),
            (self.target_projector, self.projector),
        ):
            for old, new in zip(slow.parameters(), fast.parameters(), strict=True):
                old.lerp_(new, 1 - momentum)
