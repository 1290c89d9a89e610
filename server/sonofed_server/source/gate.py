"""Training of the infusion's gate on source labels; recalibration of adapted branches."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from sonofed_common.batch_norm import adapt_batch_norm
from sonofed_common.data.augmentation import Augmentation
from sonofed_common.data.style import StyleAugmentation
from sonofed_common.models.infusion import InfusionHead, gate_loss
from sonofed_common.models.segmenter import Segmenter
from sonofed_common.runtime import SILENT, Events, derive_seed, device
from sonofed_common.training import Training, fit
from sonofed_server.source.segmentation_data import SegmentationPart

EPOCHS = 3
LEARNING_RATE = 1e-2
BATCH = 8


def train_gate(
    head: InfusionHead,
    models: Sequence[Segmenter],
    pool: SegmentationPart,
    seed: int,
    events: Events = SILENT,
    flips: bool = True,
) -> None:
    """Train a gate in place on source labels under style augmentation (see `gate_loss`).

    Parameters
    ----------
    head : InfusionHead
        With the rule ``gate`` and the branches' temperatures.
    models : sequence of Segmenter
        The branches, in evaluation mode; they stay as they are.
    pool : SegmentationPart
        Images that the branches were trained on.
    seed : int
        Of the order and the augmentation.
    events : Events
        Gets the progress.
    flips : bool
        As the branches were trained.
    """
    head.to(device())
    augmentation, style = Augmentation(seed, flips), StyleAugmentation(seed)

    def renew(epoch: int) -> None:
        nonlocal augmentation, style
        augmentation = Augmentation(derive_seed(seed, "augmentation", epoch), flips)
        style = StyleAugmentation(derive_seed(seed, "style", epoch))

    def loss(indices: Tensor) -> Tensor:
        images, masks = augmentation.with_masks(pool.images[indices], pool.masks[indices])
        images = style(images).to(device())
        with torch.no_grad():
            stacked = torch.stack([model.probabilities(images) for model in models])
        return gate_loss(head, stacked, masks.to(device()))

    training = Training(EPOCHS, LEARNING_RATE, BATCH, seed)
    fit(head, len(pool.images), loss, training, events=events, task="gate", before_epoch=renew)
    head.cpu()


def bring_home(model: Segmenter, pool: SegmentationPart) -> None:
    """Re-estimate an adapted branch's normalisation statistics on source images, in place.

    Notes
    -----
    Every site re-estimates them on its own images before it predicts; so does the source before it
    calibrates a branch whose statistics are averages over the sites.
    """
    adapt_batch_norm(model, pool.images)
    model.eval()
