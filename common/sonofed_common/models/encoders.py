"""Encoders: the backbones of the classifiers and of segmentation behind one interface."""

from __future__ import annotations

import difflib
import itertools
from collections.abc import Callable
from typing import cast

import torch
from torch import Tensor, nn
from torch.nn.functional import interpolate

from sonofed_common.contract.errors import ConfigurationError
from sonofed_common.models.classifiers import IMAGENET_MEAN, IMAGENET_STD, build_backbone


class Encoder(nn.Module):
    """Maps images to feature maps, finest first.

    Attributes
    ----------
    backbone : Module
        The network; for names that are classifiers too, a classifier's ``backbone`` has the same
        parameters, so the weights of either fit the other.
    channels : tuple of int
        Channels of each map.
    strides : tuple of int
        Pixels of the image per pixel of each map; each is twice the one before it.
    """

    mean: Tensor
    std: Tensor

    def __init__(
        self, backbone: nn.Module, channels: tuple[int, ...], strides: tuple[int, ...]
    ) -> None:
        super().__init__()
        self.backbone = backbone
        self.channels = channels
        self.strides = strides
        self.register_buffer("mean", torch.tensor(IMAGENET_MEAN).view(1, 3, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(IMAGENET_STD).view(1, 3, 1, 1), persistent=False)
        self.to(memory_format=torch.channels_last)  # type: ignore[call-overload]

    @property
    def feature_dim(self) -> int:
        """Length of the pooled features."""
        return self.channels[-1]

    def forward(self, x: Tensor) -> list[Tensor]:
        """Map images (B, 1, S, S) in [0, 1] to maps (B, channels[i], S / strides[i], ...)."""
        x = ((x - self.mean) / self.std).contiguous(memory_format=torch.channels_last)
        return self.maps(x)

    def maps(self, x: Tensor) -> list[Tensor]:
        """Map normalised RGB images (B, 3, S, S) to the feature maps."""
        raise NotImplementedError

    def features(self, x: Tensor) -> Tensor:
        """Map images (B, 1, S, S) in [0, 1] to pooled features (B, F) of the deepest map."""
        maps: list[Tensor] = self(x)
        return maps[-1].mean(dim=(2, 3))


class _ResNet(Encoder):
    def maps(self, x: Tensor) -> list[Tensor]:
        net = self.backbone
        finest = net.act(net.bn1(net.conv1(x)))  # type: ignore[operator]
        maps = [finest, net.layer1(net.maxpool(finest))]  # type: ignore[operator]
        for layer in (net.layer2, net.layer3, net.layer4):
            maps.append(layer(maps[-1]))  # type: ignore[operator]
        return maps


class _EfficientNetLite(Encoder):
    def maps(self, x: Tensor) -> list[Tensor]:
        net = self.backbone.network
        x = net._swish(net._bn0(net._conv_stem(x)))  # type: ignore[operator,union-attr]
        blocks = cast(nn.ModuleList, net._blocks)  # type: ignore[union-attr]
        maps: list[Tensor] = []
        for block in blocks:
            smaller = block(x)
            if smaller.shape[-1] < x.shape[-1]:
                maps.append(x)
            x = smaller
        return [*maps, x]


class _UNet(Encoder):
    def maps(self, x: Tensor) -> list[Tensor]:
        maps: list[Tensor] = []
        for stage in cast(nn.ModuleList, self.backbone):
            x = stage(x)
            maps.append(x)
        return maps


class _ViT(Encoder):
    """A plain ViT; coarser and finer maps are resampled from its one map (Li et al., ECCV 2022)."""

    def maps(self, x: Tensor) -> list[Tensor]:
        network = self.backbone.network
        tokens: Tensor = network(  # type: ignore[operator]
            x.contiguous(), interpolate_pos_encoding=True
        ).last_hidden_state[:, 1:]
        side = x.shape[-1] // self.strides[-1]
        middle = tokens.transpose(1, 2).reshape(len(x), -1, side, side)
        finer = cast(nn.ModuleDict, self.backbone.finer)
        return [
            project(interpolate(middle, scale_factor=self.strides[-1] / stride, mode="bilinear"))
            for project, stride in zip(finer.values(), self.strides[:-1], strict=True)
        ] + [middle]


def _resnet18(pretrained: bool) -> Encoder:
    return _ResNet(
        build_backbone("resnet18", pretrained), (64, 64, 128, 256, 512), (2, 4, 8, 16, 32)
    )


def _resnet50(pretrained: bool) -> Encoder:
    return _ResNet(
        build_backbone("resnet50", pretrained), (64, 256, 512, 1024, 2048), (2, 4, 8, 16, 32)
    )


def _efficientnet_lite0(pretrained: bool) -> Encoder:
    backbone = build_backbone("efficientnet_lite0", pretrained)
    return _EfficientNetLite(backbone, (16, 24, 40, 112, 320), (2, 4, 8, 16, 32))


def _unet(pretrained: bool) -> Encoder:
    from sonofed_common.monai import Down, TwoConv

    channels = (16, 32, 64, 128, 256)
    act, norm = ("relu", {"inplace": True}), "batch"
    stages = [TwoConv(2, 3, channels[0], act, norm, bias=True)]
    stages += [
        Down(2, inner, outer, act, norm, bias=True) for inner, outer in itertools.pairwise(channels)
    ]
    return _UNet(nn.ModuleList(stages), channels, (1, 2, 4, 8, 16))


def _vit(pretrained: bool) -> Encoder:
    from transformers import ViTConfig, ViTModel

    backbone = nn.Module()
    backbone.network = ViTModel(
        ViTConfig(
            hidden_size=192,
            num_hidden_layers=12,
            num_attention_heads=3,
            intermediate_size=768,
            image_size=224,
            patch_size=16,
        ),
        add_pooling_layer=False,
    )
    channels, strides = (24, 48, 96, 192), (2, 4, 8, 16)
    backbone.finer = nn.ModuleDict(
        {
            str(stride): nn.Sequential(nn.Conv2d(192, c, 1), nn.BatchNorm2d(c), nn.ReLU())
            for c, stride in zip(channels[:-1], strides[:-1], strict=True)
        }
    )
    return _ViT(backbone, channels, strides)


_ENCODERS: dict[str, Callable[[bool], Encoder]] = {
    "resnet18": _resnet18,
    "resnet50": _resnet50,
    "efficientnet_lite0": _efficientnet_lite0,
    "unet": _unet,
    "vit": _vit,
}

ENCODERS: tuple[str, ...] = tuple(_ENCODERS)
"""Names that `build_encoder` knows."""


def build_encoder(name: str, pretrained: bool = True, seed: int = 0) -> Encoder:
    """Build an encoder.

    Parameters
    ----------
    name : str
        One of `ENCODERS`: MONAI's ResNets and U-Net, EfficientNet-Lite0, transformers' ViT (tiny,
        16-pixel patches). Image sides must be multiples of the last stride.
    pretrained : bool
        Start from ImageNet weights where an installed package holds them (``efficientnet_lite0``).
    seed : int
        Seed of the random weights; the global generators are left alone.

    Raises
    ------
    ConfigurationError
        Unknown name; the nearest known one is given.
    """
    if name not in _ENCODERS:
        nearest = difflib.get_close_matches(name, ENCODERS, n=1, cutoff=0.4)
        hint = f"did you mean '{nearest[0]}'?" if nearest else f"known: {', '.join(ENCODERS)}"
        raise ConfigurationError(f"unknown encoder '{name}'; {hint}")
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return _ENCODERS[name](pretrained)
