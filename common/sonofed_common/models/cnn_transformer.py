"""Convolutional maps read by a transformer, after TransMed (Dai et al., Diagnostics 2021)."""

from __future__ import annotations

from typing import Literal, cast

import torch
from torch import Tensor, nn

SIDE = 32
"""Side of the maps that become tokens, pixels, whatever the image's."""
CHANNELS = 64
DEPTH = 2
HEADS = 4


class CnnTransformer(nn.Module):
    """Maps images to the class token of a transformer over 64 maps of 32 x 32.

    Parameters
    ----------
    tokens : {"spatial", "channel"}
        ``spatial``: 1024 places of 64 values each. ``channel``: 64 maps of 1024 values each, as the
        study that we rebuild says it.
    """

    def __init__(self, tokens: Literal["spatial", "channel"]) -> None:
        super().__init__()
        self.by_place = tokens == "spatial"
        count, self.dimension = (
            (SIDE * SIDE, CHANNELS) if self.by_place else (CHANNELS, SIDE * SIDE)
        )
        self.encoder = nn.Sequential(
            _convolution(3, CHANNELS // 2, 2),
            _convolution(CHANNELS // 2, CHANNELS, 1),
            _convolution(CHANNELS, CHANNELS, 1),
            nn.AdaptiveAvgPool2d(SIDE),
        )
        self.class_token = nn.Parameter(torch.zeros(1, 1, self.dimension))
        self.positions = nn.Parameter(torch.zeros(1, count + 1, self.dimension))
        nn.init.trunc_normal_(self.class_token, std=0.02)
        nn.init.trunc_normal_(self.positions, std=0.02)
        self.layers = nn.Sequential(
            *(
                nn.TransformerEncoderLayer(
                    self.dimension,
                    HEADS,
                    2 * self.dimension,
                    # Attention without dropout has a fast kernel, on CPU and GPU.
                    dropout=0.0,
                    activation="gelu",
                    batch_first=True,
                    norm_first=True,
                )
                for _ in range(DEPTH)
            )
        )
        self.norm = nn.LayerNorm(self.dimension)

    def forward(self, x: Tensor) -> Tensor:
        """Map RGB images (B, 3, S, S) to features (B, 64), or (B, 1024) of channel tokens."""
        maps: Tensor = self.encoder(x).flatten(2)
        tokens = maps.transpose(1, 2) if self.by_place else maps
        tokens = torch.cat((self.class_token.expand(len(x), -1, -1), tokens), dim=1)
        return cast(Tensor, self.norm(self.layers(tokens + self.positions)[:, 0]))


def _convolution(before: int, after: int, stride: int) -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(before, after, 3, stride, 1, bias=False), nn.BatchNorm2d(after), nn.ReLU()
    )
