"""Target-informed pretraining of a segmenter's encoder on unlabelled images.

After the abstract of arXiv 2605.29122, in our reading: ``L = L_MIM + lambda L_CL``, masked image
modelling inside the ultrasound sector and contrastive learning on two crops.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor, nn

from sonofed_client.adaptation.contrastive import BYOL, SimCLR, random_crops
from sonofed_client.adaptation.embedding import teacher_momentum
from sonofed_client.adaptation.masked_modelling import (
    MAE,
    SimMIM,
    draw_masks,
    masked_mean,
    pixels_of,
)
from sonofed_common.batch_norm import adapt_batch_norm
from sonofed_common.contract.errors import ConfigurationError, SiteEmptyError
from sonofed_common.contract.study_segmentation import Pretraining
from sonofed_common.models.encoders import Encoder
from sonofed_common.runtime import SILENT, Events, derive_seed
from sonofed_common.training import Training, batches, fit

TARGET_MOMENTUM = 0.99
"""Start of the cosine to 1 (BYOL): a hospital's few hundred steps need a faster target than the
paper's 0.996."""


class PretrainingModel(nn.Module):
    """An encoder with what its pretraining needs.

    Parameters
    ----------
    encoder : Encoder
        Trained in place.
    settings : Pretraining
        The study's settings.
    image_size : int
        S, pixels.
    seed : int
        Of the new parts' random weights: the same at every site, so that first rounds agree.
    flips : bool
        Whether crops may be mirrored; off where classes have a side.

    Attributes
    ----------
    encoder : Encoder
        What later phases use.
    modelling : SimMIM or MAE
        Decoder of the masked image modelling.
    contrast : SimCLR, BYOL or None
        Projector and loss; BYOL's moving target is inside, so that a checkpoint holds it.

    Raises
    ------
    ConfigurationError
        Form ``mae`` without the encoder ``vit``, or an image size that the encoder does not divide.
    """

    def __init__(
        self,
        encoder: Encoder,
        settings: Pretraining,
        image_size: int,
        seed: int = 0,
        flips: bool = True,
    ) -> None:
        super().__init__()
        stride = encoder.strides[-1]
        if image_size % stride:
            raise ConfigurationError(
                f"pretraining needs images whose side is a multiple of {stride} pixels for this "
                f"encoder, not {image_size}; change the study's image_size"
            )
        self.settings = settings
        self.flips = flips
        self.encoder = encoder
        self.modelling: SimMIM | MAE
        self.contrast: SimCLR | BYOL | None = None
        with torch.random.fork_rng():
            torch.manual_seed(derive_seed(seed, "pretraining"))
            if settings.form == "mae":
                self.modelling = MAE(encoder, image_size)
            else:
                self.modelling = SimMIM(encoder.channels[-1], stride, settings.patch_size)
            if settings.contrastive == "nt_xent":
                self.contrast = SimCLR(encoder.feature_dim, settings.temperature)
            elif settings.contrastive == "byol":
                self.contrast = BYOL(encoder, derive_seed(seed, "predictor"))

    def mim(self, images: Tensor, sectors: Tensor, generator: torch.Generator) -> Tensor:
        """Loss of masked image modelling, on masked pixels inside the sector only.

        Parameters
        ----------
        images : Tensor (B, 1, S, S)
            In [0, 1].
        sectors : Tensor of bool (B, 1, S, S)
            True inside the ultrasound sector.
        generator : Generator
            Draws the masks.
        """
        patch = self.modelling.patch_size
        masks = draw_masks(sectors, patch, self.settings.masked_share, generator)
        errors = self.modelling(self.encoder, images, masks)
        return masked_mean(errors, pixels_of(masks, patch, images.shape[-1]) & sectors)

    def contrastive(self, images: Tensor, groups: Tensor, generator: torch.Generator) -> Tensor:
        """Contrastive loss of two random crops of images (B, 1, S, S) of ``groups`` (B,)."""
        if self.contrast is None:
            return images.new_zeros(())
        one, two = (random_crops(images, generator, self.flips) for _ in range(2))
        loss: Tensor = self.contrast(self.encoder, one, two, groups)
        return loss


class _Tally(nn.Module):
    """Sums of both losses over an epoch; a module, so that a checkpoint holds them."""

    sums: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("sums", torch.zeros(2, dtype=torch.float64))


def contrastive_weight(settings: Pretraining, step: int, steps: int) -> float:
    """Return lambda at a step (from 0) of all steps: linear from 0 over the warm-up."""
    warm = settings.warmup * steps
    return settings.contrastive_weight * (min(step / warm, 1.0) if warm > 0 else 1.0)


def pretrain_round(
    model: PretrainingModel,
    images: Tensor,
    sectors: Tensor,
    groups: Sequence[str],
    settings: Pretraining,
    round: int,
    seed: int,
    checkpoint: Path | None = None,
    events: Events = SILENT,
) -> dict[str, float]:
    """Pretrain a model in place for one federated round.

    Parameters
    ----------
    model : PretrainingModel
        Afterwards its encoder's normalisation statistics are those of the whole images: masked and
        cropped ones would spoil them for later phases.
    images : Tensor of float32 (N, 1, S, S)
        Unlabelled images in [0, 1].
    sectors : Tensor of bool (N, 1, S, S)
        Their ultrasound sectors.
    groups : sequence of str (N,)
        Patient or video of each image.
    settings : Pretraining
        The study's settings. Learning rate, warm-up of lambda and BYOL's momentum span all rounds.
    round : int
        Number of the round, from 0.
    seed : int
        Seed of the site in this round.
    checkpoint : Path or None
        See `fit`.
    events : Events
        Gets the progress.

    Returns
    -------
    dict of str to float
        ``loss``, ``mim`` and ``contrastive``: means over the last epoch.

    Raises
    ------
    SiteEmptyError
        Fewer than two images: normalisation needs two.
    DivergenceError
        A loss or a weight is not finite.
    """
    count = len(images)
    if count < 2:
        raise SiteEmptyError(
            f"pretraining needs two images or more, and this site's pool has {count}; add images"
        )
    device = next(model.parameters()).device
    numbers = {group: number for number, group in enumerate(dict.fromkeys(groups))}
    owners = torch.tensor([numbers[group] for group in groups])
    steps = len(batches(count, settings.batch_size, 0))
    all_steps = settings.rounds * settings.local_epochs * steps
    generator = torch.Generator()
    step = 0
    tally = _Tally()

    def before_epoch(epoch: int) -> None:
        nonlocal step
        step = epoch * steps
        generator.manual_seed(derive_seed(seed, "pretraining", epoch))
        tally.sums.zero_()

    def loss_of_batch(indices: Tensor) -> Tensor:
        batch = images[indices].to(device)
        mim = model.mim(batch, sectors[indices].to(device), generator)
        contrastive = model.contrastive(batch, owners[indices], generator)
        tally.sums += len(indices) * torch.tensor([mim.item(), contrastive.item()])
        return mim + contrastive_weight(settings, step, all_steps) * contrastive

    def after_step(done: int, total: int) -> None:
        nonlocal step
        step = done
        if isinstance(model.contrast, BYOL):
            model.contrast.follow(model.encoder, teacher_momentum(TARGET_MOMENTUM, done / total))

    losses = fit(
        nn.ModuleList([model, tally]),
        count,
        loss_of_batch,
        Training(
            epochs=settings.local_epochs,
            learning_rate=settings.learning_rate,
            batch_size=settings.batch_size,
            seed=seed,
            first_epoch=round * settings.local_epochs,
            last_epoch=settings.rounds * settings.local_epochs,
        ),
        checkpoint,
        events,
        "pretraining",
        parameters=model,
        before_epoch=before_epoch,
        after_step=after_step,
        saves_last=False,
    )
    adapt_batch_norm(model.encoder, images)
    mim, contrastive = (tally.sums / count).tolist()
    return {"loss": losses[-1], "mim": mim, "contrastive": contrastive}
