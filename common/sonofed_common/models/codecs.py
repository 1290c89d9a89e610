"""Image codecs: between grey images and what the diffusion network denoises."""

from __future__ import annotations

from typing import Protocol

from diffusers import AutoencoderKL
from torch import Tensor, nn
from torch.nn.functional import pixel_shuffle, pixel_unshuffle


class Codec(Protocol):
    """Maps images (B, 1, S, S) in [0, 1] to latents (B, C, S / factor, S / factor) and back."""

    factor: int

    def encode(self, images: Tensor) -> Tensor:
        """Latents of images."""
        ...

    def decode(self, latents: Tensor) -> Tensor:
        """Images of latents, clamped to [0, 1]."""
        ...


class PatchCodec(nn.Module):
    """Lossless space-to-depth: each square of pixels becomes channels in [-1, 1].

    Parameters
    ----------
    factor : int
        Side of a square in pixels.
    """

    def __init__(self, factor: int = 4) -> None:
        super().__init__()
        self.factor = factor

    def encode(self, images: Tensor) -> Tensor:
        """Latents (B, factor ** 2, S / factor, S / factor)."""
        return pixel_unshuffle(2 * images - 1, self.factor)

    def decode(self, latents: Tensor) -> Tensor:
        """Images, clamped to [0, 1]."""
        return (pixel_shuffle(latents, self.factor) / 2 + 0.5).clamp(0, 1)


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
