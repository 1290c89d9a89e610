"""Image codecs: between grey images and what the diffusion network denoises."""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol

import torch
from torch import Tensor, nn
from torch.nn.functional import conv2d, conv_transpose2d

if TYPE_CHECKING:
    from diffusers import AutoencoderKL


class Codec(Protocol):
    """Maps images (B, 1, S, S) in [0, 1] to latents (B, C, S / factor, S / factor) and back."""

    factor: int

    def encode(self, images: Tensor) -> Tensor:
        """Latents of images."""
        ...

    def decode(self, latents: Tensor) -> Tensor:
        """Images of latents, clamped to [0, 1]."""
        ...


MEAN = -2.0
SPREAD = (1.37, 0.52, 0.36, 0.25, 0.19, 0.16, 0.12)


class DctCodec(nn.Module):
    """Lossless patches: the 4 x 4 block DCT of JPEG, its 16 frequencies scaled as channels.

    Notes
    -----
    Raw pixels of a patch repeat each other: noise that hides their mean has long drowned their
    texture, and a loss on them is a loss on the mean. Frequencies do not, so each can have a noise
    of its own size: the spread of breast ultrasound at 64 to 128 px (1.7, 0.34, 0.18, 0.10, 0.06,
    0.045, 0.03 for the sums of both frequencies, 0 to 6) to the power 0.6. The full spread would
    hide mean and speckle at the same time, but then speckle is most of the loss.
    """

    factor = 4
    basis: Tensor
    spread: Tensor

    def __init__(self) -> None:
        super().__init__()
        order = torch.arange(4)
        cosines = torch.cos(torch.pi / 4 * order[:, None] * (order + 0.5)) / 2**0.5
        cosines[0] /= 2**0.5
        basis = torch.einsum("uy,vx->uvyx", cosines, cosines).reshape(16, 1, 4, 4)
        spread = torch.tensor(SPREAD)[(order[:, None] + order).flatten()]
        self.register_buffer("basis", basis, persistent=False)
        self.register_buffer("spread", spread.view(1, 16, 1, 1), persistent=False)

    def encode(self, images: Tensor) -> Tensor:
        """Latents (B, 16, S / 4, S / 4)."""
        with torch.autocast(images.device.type, enabled=False):
            frequencies = conv2d(2 * images - 1, self.basis, stride=self.factor)
            frequencies[:, 0] -= MEAN
            return frequencies / self.spread

    def decode(self, latents: Tensor) -> Tensor:
        """Images, clamped to [0, 1]."""
        with torch.autocast(latents.device.type, enabled=False):
            frequencies = latents.float() * self.spread
            frequencies[:, 0] += MEAN
            images = conv_transpose2d(frequencies, self.basis, stride=self.factor)
        return (images / 2 + 0.5).clamp(0, 1)


class VaeCodec(nn.Module):
    """The frozen autoencoder of a latent diffusion model.

    Parameters
    ----------
    vae : AutoencoderKL
        With 3 image channels: grey is repeated on the way in, averaged on the way out.
    """

    def __init__(self, vae: AutoencoderKL) -> None:
        super().__init__()
        self.vae = vae.requires_grad_(False)
        self.factor = int(2 ** (len(vae.config.block_out_channels) - 1))

    def encode(self, images: Tensor) -> Tensor:
        """Latents, scaled to about unit variance."""
        # The posterior's mode, not a sample: its spread is far below the noise the network sees,
        # and one image has one latent.
        posterior = self.vae.encode((2 * images - 1).expand(-1, 3, -1, -1)).latent_dist
        latents: Tensor = posterior.mode() * self.vae.config.scaling_factor
        return latents

    def decode(self, latents: Tensor) -> Tensor:
        """Images, clamped to [0, 1]."""
        decoded: Tensor = self.vae.decode(latents / self.vae.config.scaling_factor).sample
        return (decoded.mean(1, keepdim=True) / 2 + 0.5).clamp(0, 1)
