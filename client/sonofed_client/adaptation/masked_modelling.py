"""Masked image modelling inside the ultrasound sector: SimMIM and MAE."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn.functional import avg_pool2d, fold, unfold

from sonofed_common.contract.errors import ConfigurationError
from sonofed_common.models.encoders import Encoder

MOSTLY = 0.5
MAE_LAYERS = 2
"""Of the decoder: He et al. find that a single one serves fine-tuning as well as eight."""
PATCH_VARIANCE = 1e-6
"""Keeps the normalisation of a constant patch finite, as in MAE."""


def draw_masks(
    sectors: Tensor, patch_size: int, ratio: float, generator: torch.Generator
) -> Tensor:
    """Draw which patches of each image are masked.

    Parameters
    ----------
    sectors : Tensor of bool (B, 1, S, S)
        True inside the ultrasound sector.
    patch_size : int
        Side of a patch, pixels; patches at the far borders may be cut off.
    ratio : float
        Share, in (0, 1), of the patches that lie mostly inside the sector.
    generator : Generator
        On CPU.

    Returns
    -------
    Tensor of bool (B, P, P)
        P = ceil(S / patch_size); at least one patch of an image is masked. In a sector that fills
        no patch by half, the patches that it fills most stand for those inside.
    """
    share = avg_pool2d(sectors.float().cpu(), patch_size, ceil_mode=True)[:, 0].flatten(1)
    inside = share > MOSTLY
    fullest = share == share.amax(dim=1, keepdim=True)
    inside |= fullest & ~inside.any(dim=1, keepdim=True)
    count = (ratio * inside.sum(dim=1, keepdim=True)).round().clamp(min=1)
    order = torch.rand(share.shape, generator=generator).masked_fill(~inside, 2.0)
    masked = order.argsort(dim=1).argsort(dim=1) < count
    side = math.isqrt(masked.shape[1])
    return masked.view(-1, side, side).to(sectors.device)


def pixels_of(masks: Tensor, patch_size: int, image_size: int) -> Tensor:
    """Spread masks of patches (B, P, P) over the pixels (B, 1, S, S)."""
    pixels = masks.repeat_interleave(patch_size, dim=1).repeat_interleave(patch_size, dim=2)
    return pixels[:, None, :image_size, :image_size]


def masked_mean(errors: Tensor, where: Tensor) -> Tensor:
    """Mean of errors (B, 1, S, S) over the pixels ``where`` (bool); 0 where there is none."""
    return torch.where(where, errors, 0.0).sum() / where.sum().clamp(min=1)


class SimMIM(nn.Module):
    """SimMIM (Xie et al., CVPR 2022): the encoder sees all patches, the masked ones blank.

    Masked pixels take one learned value, so that convolutional encoders serve as well as ViTs; a
    1x1 convolution of the deepest map and a pixel shuffle predict the image.

    Parameters
    ----------
    channels, stride : int
        Of the encoder's deepest map.
    patch_size : int
        Side of a masked square, pixels.
    """

    def __init__(self, channels: int, stride: int, patch_size: int) -> None:
        super().__init__()
        self.patch_size = patch_size
        self.value = nn.Parameter(torch.tensor(0.5))
        self.head = nn.Sequential(nn.Conv2d(channels, stride**2, 1), nn.PixelShuffle(stride))

    def forward(self, encoder: Encoder, images: Tensor, masks: Tensor) -> Tensor:
        """Return each pixel's absolute error (B, 1, S, S), masked or not.

        Parameters
        ----------
        encoder : Encoder
            Sees the images with the masked patches blanked.
        images : Tensor (B, 1, S, S)
            In [0, 1].
        masks : Tensor of bool (B, P, P)
            Masked patches.
        """
        hidden = pixels_of(masks, self.patch_size, images.shape[-1])
        maps: list[Tensor] = encoder(torch.where(hidden, self.value, images))
        prediction: Tensor = self.head(maps[-1])
        return (prediction.float() - images).abs()


class MAE(nn.Module):
    """Masked autoencoder (He et al., CVPR 2022): the ViT sees the visible patches only.

    transformers' MAE decoder, two layers of half the encoder's width, predicts each patch
    normalised by its own mean and variance. The encoder's own ViT is run on the visible tokens, so
    the trained weights need no conversion.

    Parameters
    ----------
    encoder : Encoder
        The one named ``vit``.
    image_size : int
        S, pixels.

    Raises
    ------
    ConfigurationError
        The encoder is no ViT.
    """

    def __init__(self, encoder: Encoder, image_size: int) -> None:
        from transformers import ViTMAEConfig, ViTModel
        from transformers.models.vit_mae.modeling_vit_mae import ViTMAEDecoder

        super().__init__()
        network = getattr(encoder.backbone, "network", None)
        if not isinstance(network, ViTModel):
            raise ConfigurationError(
                "pretraining of form 'mae' needs the encoder 'vit'; choose 'simmim', or train the "
                "source's segmenter with that encoder"
            )
        self.patch_size = encoder.strides[-1]
        width = network.config.hidden_size
        config = ViTMAEConfig(
            hidden_size=width,
            patch_size=self.patch_size,
            num_channels=1,
            decoder_hidden_size=width // 2,
            decoder_num_hidden_layers=MAE_LAYERS,
            decoder_num_attention_heads=network.config.num_attention_heads,
            decoder_intermediate_size=2 * width,
            attn_implementation="sdpa",
        )
        self.decoder = ViTMAEDecoder(config, (image_size // self.patch_size) ** 2)

    def forward(self, encoder: Encoder, images: Tensor, masks: Tensor) -> Tensor:
        """Return each pixel's squared error (B, 1, S, S) in units of its patch's variance.

        Parameters
        ----------
        encoder : Encoder
            The one named ``vit``; its tokens of masked patches are dropped after the embedding.
        images : Tensor (B, 1, S, S)
            In [0, 1].
        masks : Tensor of bool (B, P, P)
            Masked patches, at least one in each image.
        """
        masked = masks.flatten(1)
        hidden, place = self._encode(encoder, images, masked)
        prediction: Tensor = self.decoder(hidden, place).logits
        patches = unfold(images, self.patch_size, stride=self.patch_size).transpose(1, 2)
        mean = patches.mean(dim=2, keepdim=True)
        variance = patches.var(dim=2, keepdim=True)
        target = (patches - mean) / (variance + PATCH_VARIANCE).sqrt()
        errors = (prediction.float() - target).square().transpose(1, 2)
        return fold(errors, images.shape[-2:], self.patch_size, stride=self.patch_size)

    def _encode(self, encoder: Encoder, images: Tensor, masked: Tensor) -> tuple[Tensor, Tensor]:
        """Return the visible tokens (B, 1 + V, D), and each patch's index among them (B, T)."""
        from transformers.masking_utils import create_bidirectional_mask

        network = encoder.backbone.network
        normalised = (images - encoder.mean) / encoder.std
        tokens = network.embeddings(  # type: ignore[operator,union-attr]
            normalised.contiguous(), interpolate_pos_encoding=True
        )
        # Sectors differ in size, so images differ in visible patches: all are brought to the
        # largest number V, and what fills the rest is hidden from attention and decoder.
        order = masked.int().argsort(dim=1, stable=True)
        visible = int((~masked).sum(dim=1).max())
        kept = order[:, :visible]
        index = torch.cat([torch.zeros_like(order[:, :1]), kept + 1], dim=1)
        hidden: Tensor = tokens.gather(1, index[:, :, None].expand(-1, -1, tokens.shape[2]))
        seen = torch.cat([torch.ones_like(masked[:, :1]), ~masked.gather(1, kept)], dim=1)
        attention = create_bidirectional_mask(
            config=network.config,  # type: ignore[union-attr]
            inputs_embeds=hidden,
            attention_mask=seen,
        )
        for layer in network.layers:  # type: ignore[union-attr]
            hidden = layer(hidden, attention)
        # The decoder appends mask tokens from index V on; any of them serves.
        place = order.argsort(dim=1).masked_fill(masked, visible)
        return network.layernorm(hidden), place  # type: ignore[operator,union-attr]
