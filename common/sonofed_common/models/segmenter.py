"""The segmenter: one encoder, two heads of different kinds."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn.functional import interpolate

from sonofed_common.models.encoders import Encoder, build_encoder

Head = Literal["unet", "aspp"]
HEADS: tuple[Head, Head] = ("unet", "aspp")
"""Main and auxiliary head."""

UNET_CHANNELS = 16
ASPP_STRIDE = 8
ASPP_CHANNELS = 64
ASPP_REACH = (0.15, 0.3, 0.45, 0.6)
"""Dilations as shares of the map's side: DeepLabV2's 6, 12, 18, 24 on maps of 41 pixels."""


class UNetHead(nn.Module):
    """U-Net decoder (Ronneberger et al., MICCAI 2015) of MONAI's blocks.

    Parameters
    ----------
    channels : sequence of int
        Channels of the encoder's maps, finest first.
    classes : int
        C.
    dropout : float
        Share of channels dropped before the last convolution.
    """

    def __init__(self, channels: Sequence[int], classes: int, dropout: float) -> None:
        from sonofed_common.monai import UpCat

        super().__init__()
        below = channels[-1]
        blocks = []
        for level in reversed(range(len(channels) - 1)):
            width = UNET_CHANNELS * 2**level
            blocks.append(
                UpCat(
                    2,
                    below,
                    channels[level],
                    width,
                    act=("relu", {"inplace": True}),
                    norm="batch",
                    bias=True,
                    upsample="nontrainable",
                    align_corners=False,
                    halves=below > channels[level],
                )
            )
            below = width
        self.blocks = nn.ModuleList(blocks)
        self.dropout = nn.Dropout2d(dropout)
        self.last = nn.Conv2d(below, classes, 1)

    def forward(self, maps: Sequence[Tensor]) -> Tensor:
        """Map feature maps, finest first, to logits (B, C, h, w) at the finest map's size."""
        x = maps[-1]
        for block, skip in zip(self.blocks, reversed(maps[:-1]), strict=True):
            x = block(x, skip)
        logits: Tensor = self.last(self.dropout(x))
        return logits


class ASPPHead(nn.Module):
    """Atrous spatial pyramid pooling after DeepLabV2 (Chen et al., TPAMI 2018).

    Parameters
    ----------
    channels, strides : sequence of int
        Of the encoder's maps, finest first. Maps of stride 8 and more are projected, brought to
        the finest of them and summed: DeepLab dilates its encoder to that stride instead.
    classes : int
        C.
    dropout : float
        Share of channels dropped before the pyramid.
    image_size : int
        S, pixels; the dilations grow with it.
    """

    def __init__(
        self,
        channels: Sequence[int],
        strides: Sequence[int],
        classes: int,
        dropout: float,
        image_size: int,
    ) -> None:
        super().__init__()
        self.levels = [i for i, stride in enumerate(strides) if stride >= ASPP_STRIDE]
        self.project = nn.ModuleList(
            nn.Conv2d(channels[i], ASPP_CHANNELS, 1, bias=False) for i in self.levels
        )
        self.norm = nn.Sequential(nn.BatchNorm2d(ASPP_CHANNELS), nn.ReLU(), nn.Dropout2d(dropout))
        side = image_size / strides[self.levels[0]]
        dilations = [max(1, round(reach * side)) for reach in ASPP_REACH]
        self.pyramid = nn.ModuleList(
            nn.Conv2d(ASPP_CHANNELS, classes, 3, padding=d, dilation=d) for d in dilations
        )

    def forward(self, maps: Sequence[Tensor]) -> Tensor:
        """Map feature maps, finest first, to logits (B, C, S / 8, S / 8)."""
        size = maps[self.levels[0]].shape[-2:]
        projected = [
            interpolate(project(maps[i]), size, mode="bilinear")
            for project, i in zip(self.project, self.levels, strict=True)
        ]
        x = self.norm(torch.stack(projected).sum(0))
        return torch.stack([layer(x) for layer in self.pyramid]).sum(0)


class Segmenter(nn.Module):
    """An encoder with a main and an auxiliary head.

    Parameters
    ----------
    encoder : Encoder
        Shared by both heads.
    classes : int
        C, background included.
    image_size : int
        S, pixels.
    heads : pair of {"unet", "aspp"}
        Main and auxiliary head; two of one kind differ in their random weights.
    dropout : float
        Of both heads.
    seed : int
        Of the heads' random weights.
    """

    def __init__(
        self,
        encoder: Encoder,
        classes: int = 2,
        image_size: int = 128,
        heads: tuple[Head, Head] = HEADS,
        dropout: float = 0.1,
        seed: int = 0,
    ) -> None:
        super().__init__()
        self.encoder = encoder
        self.classes = classes
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            self.heads = nn.ModuleList(
                UNetHead(encoder.channels, classes, dropout)
                if kind == "unet"
                else ASPPHead(encoder.channels, encoder.strides, classes, dropout, image_size)
                for kind in heads
            )
        self.to(memory_format=torch.channels_last)  # type: ignore[call-overload]

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Map images (B, 1, S, S) in [0, 1] to the logits (B, C, S, S) of both heads."""
        return self.decode(self.encoder(x), x.shape[-1])

    def decode(self, maps: Sequence[Tensor], image_size: int) -> tuple[Tensor, Tensor]:
        """Map the encoder's maps to the logits (B, C, S, S) of both heads."""
        main, auxiliary = (
            interpolate(head(maps), (image_size, image_size), mode="bilinear")
            for head in self.heads
        )
        return main, auxiliary

    def probabilities(self, x: Tensor, mirrored: bool = False) -> Tensor:
        """Map images to the mean class probabilities of both heads.

        Parameters
        ----------
        x : Tensor (B, 1, S, S)
            In [0, 1].
        mirrored : bool
            Take the mean over each image and the image mirrored left to right.

        Returns
        -------
        Tensor (B, C, S, S)
        """
        main, auxiliary = self(x)
        mean: Tensor = (main.softmax(1) + auxiliary.softmax(1)) / 2
        if not mirrored:
            return mean
        return (mean + self.probabilities(x.flip(-1)).flip(-1)) / 2


def build_segmenter(
    encoder: str,
    classes: int = 2,
    image_size: int = 128,
    heads: tuple[Head, Head] = HEADS,
    pretrained: bool = True,
    seed: int = 0,
) -> Segmenter:
    """Build a segmenter with the encoder of a name.

    Parameters
    ----------
    encoder : str
        One of `ENCODERS`.
    classes, image_size, heads
        See `Segmenter`.
    pretrained : bool
        See `build_encoder`.
    seed : int
        Of all random weights.

    Raises
    ------
    ConfigurationError
        Unknown encoder.
    """
    network = build_encoder(encoder, pretrained, seed)
    return Segmenter(network, classes, image_size, heads, seed=seed)
