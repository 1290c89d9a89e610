"""Supervised training and testing of the source's segmenter, and of its target-informed kin."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sonofed_common.contract.errors import ConfigurationError
from sonofed_common.contract.segmentation import SegmentationFacts
from sonofed_common.data.augmentation import Augmentation
from sonofed_common.data.style import StyleAugmentation
from sonofed_common.models.infusion import fit_temperature, lattice
from sonofed_common.models.segmenter import Segmenter, build_segmenter
from sonofed_common.runtime import SILENT, Events, derive_seed, device
from sonofed_common.segmentation_metrics import ImageScores, score_images, segmentation_metrics
from sonofed_common.training import Training, fit
from sonofed_server.source.segmentation_data import SegmentationPart
from sonofed_server.source.settings import SegmenterTraining

BATCH = 32
_TINY = 1e-8


def train_segmenter(
    pool: SegmentationPart,
    settings: SegmenterTraining,
    seed: int,
    encoder_weights: Mapping[str, Tensor] | None = None,
    start: Mapping[str, Tensor] | None = None,
    checkpoint: Path | None = None,
    events: Events = SILENT,
    task: str = "train segmenter",
) -> Segmenter:
    """Train a segmenter with Dice and cross-entropy, the mean over both heads.

    Parameters
    ----------
    pool : SegmentationPart
        Images with masks.
    settings : SegmenterTraining
        Network, length, step size, batch and augmentation.
    seed : int
        Of the heads' weights, the order and the augmentation.
    encoder_weights : mapping of str to Tensor, optional
        State of the encoder to start from; default: ImageNet weights where an installed package
        has them, else random ones.
    start : mapping of str to Tensor, optional
        State of a whole segmenter to train on from.
    checkpoint : Path or None
        See `training.fit`.
    events : Events
        Gets the progress.
    task : str
        Name of the work in events and errors.

    Returns
    -------
    Segmenter
        In evaluation mode.

    Raises
    ------
    ConfigurationError
        The images' side is no multiple of the encoder's last stride, or the weights are those of
        another encoder.
    DivergenceError
        A loss or a weight is not finite.
    """
    from sonofed_common.monai import DiceCELoss

    image_size = pool.images.shape[-1]
    model = build_segmenter(
        settings.encoder,
        settings.classes,
        image_size,
        settings.heads,
        pretrained=encoder_weights is None and start is None,
        seed=derive_seed(seed, "weights"),
    )
    stride = model.encoder.strides[-1]
    if image_size % stride:
        raise ConfigurationError(
            f"encoder '{settings.encoder}' needs images whose side is a multiple of {stride} "
            f"pixels, not {image_size}; change image_size"
        )
    if start is not None:
        model.load_state_dict(start)
    if encoder_weights is not None:
        _start_from(model, encoder_weights)
    model.to(device())
    criterion = DiceCELoss(include_background=False, to_onehot_y=True, softmax=True)
    augmentation, style = Augmentation(seed, settings.flips), StyleAugmentation(seed)

    def renew(epoch: int) -> None:
        nonlocal augmentation, style
        augmentation = Augmentation(derive_seed(seed, "augmentation", epoch), settings.flips)
        style = StyleAugmentation(derive_seed(seed, "style", epoch))

    def loss(indices: Tensor) -> Tensor:
        images, masks = augmentation.with_masks(pool.images[indices], pool.masks[indices])
        if settings.style_augmentation:
            images = style(images)
        targets = masks.to(device())
        losses = [criterion(logits, targets) for logits in model(images.to(device()))]
        return torch.stack(losses).mean()

    training = Training(settings.epochs, settings.learning_rate, settings.batch_size, seed)
    fit(model, len(pool.images), loss, training, checkpoint, events, task, before_epoch=renew)
    return model.eval()


def segmentation_facts(settings: SegmenterTraining, pool: SegmentationPart) -> SegmentationFacts:
    """Describe the segmenter and what it was trained on.

    Notes
    -----
    The range of the foreground's share is over the images that have any: normal images among them
    would bring its low end to 0, and a collapsed segmenter would go unnoticed.
    """
    flat = pool.masks.flatten(1).long()
    shares = torch.stack([(flat == c).double().mean(1) for c in range(settings.classes)], dim=1)
    foreground = 1 - shares[:, 0]
    low, high = foreground[foreground > 0].quantile(torch.tensor([0.05, 0.95]).double()).tolist()
    return SegmentationFacts(
        encoder=settings.encoder,
        classes=settings.classes,
        heads=settings.heads,
        class_ratio=tuple(shares.mean(0).tolist()),
        foreground_range=(low, high),
        flips=settings.flips,
    )


def segmenter_facts(model: Segmenter, test: SegmentationPart) -> dict[str, Any]:
    """Test a segmenter on held-out source images and calibrate it there.

    Parameters
    ----------
    model : Segmenter
        In evaluation mode.
    test : SegmentationPart
        Held-out images.

    Returns
    -------
    dict
        ``temperature`` (float) and ``metrics`` (dict, see `segmentation_metrics`; None where a
        metric is undefined).
    """
    scores = [score_images(p, masks) for p, masks in _predictions(model, test)]
    metrics = segmentation_metrics(ImageScores.join(scores))
    return {
        "temperature": source_temperature(model, test),
        "metrics": {k: v if math.isfinite(v) else None for k, v in metrics.items()},
    }


def source_temperature(model: Segmenter, test: SegmentationPart) -> float:
    """Find a segmenter's temperature on held-out source images; it must be in evaluation mode."""
    pixels, targets = [], []
    for p, masks in _predictions(model, test):
        pixels.append(lattice(p).clamp(min=_TINY).log().permute(0, 2, 3, 1).flatten(0, 2))
        targets.append(lattice(masks).flatten())
    return fit_temperature(torch.cat(pixels), torch.cat(targets))


@torch.inference_mode()
def _predictions(model: Segmenter, part: SegmentationPart) -> Iterator[tuple[Tensor, Tensor]]:
    batches = zip(torch.split(part.images, BATCH), torch.split(part.masks, BATCH), strict=True)
    for images, masks in batches:
        yield model.probabilities(images.to(device())).cpu(), masks


def _start_from(model: Segmenter, encoder_weights: Mapping[str, Tensor]) -> None:
    try:
        model.encoder.load_state_dict(encoder_weights)
    except RuntimeError:
        raise ConfigurationError(
            "the encoder's weights are those of another encoder; pretrain the one that the source "
            "settings name in segmentation.encoder"
        ) from None
