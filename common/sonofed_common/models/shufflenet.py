"""ShuffleNetV2 (Ma et al., ECCV 2018), width 1.0."""

from __future__ import annotations

import torch
from torch import Tensor, nn


class _Unit(nn.Module):
    """One basic unit: split, transform one half, concatenate, shuffle channels."""

    def __init__(self, channels_in: int, channels_out: int, stride: int) -> None:
        super().__init__()
        self.stride = stride
        half = channels_out // 2
        if stride > 1:
            self.branch1: nn.Module = nn.Sequential(
                *_depthwise(channels_in, stride), *_pointwise(channels_in, half)
            )
        else:
            self.branch1 = nn.Sequential()
        self.branch2 = nn.Sequential(
            *_pointwise(channels_in if stride > 1 else half, half),
            *_depthwise(half, stride),
            *_pointwise(half, half),
        )

    def forward(self, x: Tensor) -> Tensor:
        if self.stride == 1:
            kept, x = x.chunk(2, dim=1)
        else:
            kept = self.branch1(x)
        x = torch.cat((kept, self.branch2(x)), dim=1)
        batch, channels, height, width = x.shape
        return x.view(batch, 2, channels // 2, height, width).transpose(1, 2).reshape(x.shape)


def _depthwise(channels: int, stride: int) -> list[nn.Module]:
    convolution = nn.Conv2d(channels, channels, 3, stride, 1, groups=channels, bias=False)
    return [convolution, nn.BatchNorm2d(channels)]


def _pointwise(channels_in: int, channels_out: int) -> list[nn.Module]:
    convolution = nn.Conv2d(channels_in, channels_out, 1, bias=False)
    return [convolution, nn.BatchNorm2d(channels_out), nn.ReLU(inplace=True)]


class ShuffleNetV2(nn.Module):
    """ShuffleNetV2 x1.0.

    Parameters
    ----------
    classes : int
        Number of logits.

    Notes
    -----
    Parameter names and shapes are torchvision's ``shufflenet_v2_x1_0``, so weights that a hospital
    already owns in that format load as they are.
    """

    def __init__(self, classes: int = 1000) -> None:
        super().__init__()
        self.conv1 = nn.Sequential(
            nn.Conv2d(3, 24, 3, 2, 1, bias=False), nn.BatchNorm2d(24), nn.ReLU(inplace=True)
        )
        self.maxpool = nn.MaxPool2d(3, 2, 1)
        self.stage2 = _stage(24, 116, 4)
        self.stage3 = _stage(116, 232, 8)
        self.stage4 = _stage(232, 464, 4)
        self.conv5 = nn.Sequential(*_pointwise(464, 1024))
        self.fc: nn.Module = nn.Linear(1024, classes)

    def forward(self, x: Tensor) -> Tensor:
        """Map RGB images (B, 3, H, W) to logits (B, classes)."""
        x = self.maxpool(self.conv1(x))
        x = self.conv5(self.stage4(self.stage3(self.stage2(x))))
        logits: Tensor = self.fc(x.mean(dim=(2, 3)))
        return logits


def _stage(channels_in: int, channels_out: int, units: int) -> nn.Sequential:
    rest = [_Unit(channels_out, channels_out, 1) for _ in range(units - 1)]
    return nn.Sequential(_Unit(channels_in, channels_out, 2), *rest)
