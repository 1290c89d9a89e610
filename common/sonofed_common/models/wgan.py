"""Generator and critic of a Wasserstein GAN for grey images, convolutional as in DCGAN."""

from __future__ import annotations

from itertools import pairwise
from typing import cast

import torch
from torch import Tensor, nn
from torch.nn.utils.parametrizations import spectral_norm

from sonofed_common.contract.errors import ConfigurationError

LATENT = 128
FIRST = 4
"""Side of the generator's first maps, and of the critic's last ones, pixels."""
NARROWEST = 16
SIZES = (8, 16, 32, 64, 128)


class WganGenerator(nn.Module):
    """Maps noise to images: maps of 4 x 4 pixels, doubled in side and halved in number.

    Parameters
    ----------
    image_size : int
        S, one of `SIZES`.
    width : int
        Number of the first maps; 512 is DCGAN's (Radford et al., ICLR 2016) for 64 px.
    """

    def __init__(self, image_size: int, width: int = 512) -> None:
        super().__init__()
        widths = _widths(image_size, width)
        self.project = nn.Sequential(
            nn.ConvTranspose2d(LATENT, widths[0], FIRST, bias=False),
            nn.BatchNorm2d(widths[0]),
            nn.ReLU(),
        )
        self.grow = nn.Sequential(
            *(
                nn.Sequential(
                    nn.ConvTranspose2d(before, after, 4, 2, 1, bias=False),
                    nn.BatchNorm2d(after),
                    nn.ReLU(),
                )
                for before, after in pairwise(widths)
            )
        )
        self.draw = nn.ConvTranspose2d(widths[-1], 1, 4, 2, 1)
        _initialise(self)

    def forward(self, z: Tensor) -> Tensor:
        """Map noise (B, 128) to images (B, 1, S, S) in [0, 1]."""
        maps = self.grow(self.project(z[:, :, None, None]))
        return torch.sigmoid(self.draw(maps))


class WganCritic(nn.Module):
    """Scores images, higher for real ones: the generator's mirror image, spectrally normalised.

    Parameters
    ----------
    image_size : int
        S, one of `SIZES`.
    width : int
        Number of the last maps.

    Notes
    -----
    Every layer's largest singular value is 1 (Miyato et al., ICLR 2018), which bounds the critic's
    slope; weights are not clipped on top of it: both together leave it next to no capacity. There
    is no batch normalisation: it would make one image's score depend on the others.
    """

    def __init__(self, image_size: int, width: int = 512) -> None:
        super().__init__()
        widths = _widths(image_size, width)[::-1]
        layers = [nn.Conv2d(1, widths[0], 4, 2, 1)]
        layers += [nn.Conv2d(a, b, 4, 2, 1) for a, b in pairwise(widths)]
        score = nn.Conv2d(widths[-1], 1, FIRST)
        for layer in (*layers, score):
            nn.init.orthogonal_(layer.weight)
        self.shrink = nn.Sequential(
            *(nn.Sequential(spectral_norm(layer), nn.LeakyReLU(0.2)) for layer in layers)
        )
        self.score = spectral_norm(score)

    def forward(self, images: Tensor) -> Tensor:
        """Map images (B, 1, S, S) in [0, 1] to scores (B,)."""
        return cast(Tensor, self.score(self.shrink(images * 2 - 1)).flatten())


def _widths(image_size: int, width: int) -> list[int]:
    """Number of maps at 4, 8, ... S / 2 pixels."""
    if image_size not in SIZES:
        raise ConfigurationError(
            f"a WGAN cannot draw images of {image_size} px; set image_size to one of "
            f"{', '.join(map(str, SIZES))}"
        )
    return [max(width >> n, NARROWEST) for n in range((image_size // FIRST).bit_length() - 1)]


def _initialise(generator: nn.Module) -> None:
    for module in generator.modules():
        if isinstance(module, nn.ConvTranspose2d):
            nn.init.normal_(module.weight, 0.0, 0.02)
