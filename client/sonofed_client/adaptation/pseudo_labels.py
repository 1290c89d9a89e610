"""Source-free adaptation of a segmenter by pseudo-labels: the loop that all strategies share."""

from __future__ import annotations

import copy
from pathlib import Path

import torch
from torch import Tensor, nn

from sonofed_client.adaptation.source_free.apl import APL
from sonofed_client.adaptation.source_free.batch_norm import BatchNorm
from sonofed_client.adaptation.source_free.cbst import CBST
from sonofed_client.adaptation.source_free.dpl import DPL
from sonofed_client.adaptation.source_free.mrnet import MRNet
from sonofed_client.adaptation.source_free.self_training import LABEL_BATCH, SelfTraining
from sonofed_client.adaptation.source_free.tent import Tent
from sonofed_client.adaptation.source_free.threshold import Threshold
from sonofed_client.adaptation.source_free.upl_sfda import UPLSFDA
from sonofed_client.adaptation.source_free.views import Views
from sonofed_client.adaptation.spacing import BATCH_NORM_IMAGES, evenly_spaced
from sonofed_common.batch_norm import Statistics, adapt_batch_norm, set_statistics, statistics_of
from sonofed_common.contract.errors import CollapseError, SiteEmptyError
from sonofed_common.contract.segmentation import SegmentationFacts
from sonofed_common.contract.study_segmentation import PseudoLabels, SiteNorm, Strategy
from sonofed_common.models.segmenter import Segmenter
from sonofed_common.runtime import SILENT, Events, derive_seed
from sonofed_common.training import Training, fit

LEAST_KEPT = 1 / 4
"""Of the foreground's and of the background's share; a round that keeps less has collapsed."""

LEAST_CLASS_KEPT = 1 / 10
"""Of the share of each single class, which is rarer than the foreground and moves more."""

PRESENT = 1 / 10
"""Of the source's share of a class; a site that holds less of it may lose it in a round."""

REMEDY = "lower the learning rate of [pseudo_labels] or raise its class_prior"

STRATEGIES: dict[Strategy, type[SelfTraining]] = {
    "apl": APL,
    "threshold": Threshold,
    "cbst": CBST,
    "mrnet": MRNet,
    "batch_norm": BatchNorm,
    "tent": Tent,
    "dpl": DPL,
    "upl_sfda": UPLSFDA,
}
"""Every strategy of a study file."""


def adapt_round(
    model: Segmenter,
    images: Tensor,
    settings: PseudoLabels,
    facts: SegmentationFacts,
    round: int,
    seed: int,
    checkpoint: Path | None = None,
    events: Events = SILENT,
    batch_norm: SiteNorm = "site",
    first: Tensor | None = None,
) -> dict[str, float]:
    """Adapt a segmenter in place to unlabelled images for one federated round.

    Parameters
    ----------
    model : Segmenter
        Its incoming weights are also the teacher's first ones in this round.
    images : Tensor of float32 (N, 1, S, S)
        In [0, 1]. With a single one nothing is trained: normalisation needs two.
    settings : PseudoLabels
        The study's settings. The cosine schedule spans all its rounds.
    facts : SegmentationFacts
        What the bundle says of the source.
    round : int
        Number of the round, from 0.
    seed : int
        Seed of this site, branch and round.
    checkpoint : Path or None
        Written after every epoch; where it exists, training goes on from it.
    events : Events
        Gets the progress.
    batch_norm : {"site", "mixed"}
        ``site``: normalisation statistics are the images' own, and the model keeps them. ``mixed``:
        the mean of those and of the model's; it keeps those that it came with, for every site mixes
        its own.
    first : Tensor (C,), optional
        `starting_shares` of the weights that the first round of all began with, where this is not
        that round: many small steps must not do what one is refused.

    Returns
    -------
    dict of str to float
        ``loss``: mean of the last epoch. ``foreground``: mean predicted share of pixels that are
        not background, after the round, of up to `BATCH_NORM_IMAGES` images. ``kept``: share of
        pixels that the last epoch learned from. A round that trains nothing has loss and kept 0.

    Raises
    ------
    SiteEmptyError
        There is no image.
    CollapseError
        Since it began, or since the first round did, a class or the source's range of foreground
        was lost; see `check_collapse`.
    DivergenceError
        A loss or a weight is not finite.

    Notes
    -----
    Over rounds the federation's average is the teacher: a round's first labels are those of the
    weights that came. Before each further local epoch a moving average of the student labels anew.

    Normalisation statistics are re-estimated on the images before the round, for the teacher
    before each epoch, and after the round: those that training leaves behind are of augmented
    views and of weights that have moved on.
    """
    if not len(images):
        raise SiteEmptyError("source-free adaptation has no image; add images to the pool")
    sample = evenly_spaced(images, BATCH_NORM_IMAGES)
    prior = statistics_of(model) if batch_norm == "mixed" else None
    before = starting_shares(model, images, batch_norm)
    strategy = STRATEGIES[settings.strategy](settings, facts)
    if len(images) == 1 or not list(strategy.trained(model)):
        if prior is not None:
            set_statistics(model, prior)
        return {"loss": 0.0, "foreground": before[1:].sum().item(), "kept": 0.0}
    loss, kept = _train(strategy, model, images, round, seed, checkpoint, events, prior)
    adapt_batch_norm(model, sample, prior=prior)
    after = class_shares(model, sample)
    for start in (before, *([] if first is None else [first])):
        check_collapse(start, after, facts)
    if prior is not None:
        set_statistics(model, prior)
    return {"loss": loss, "foreground": after[1:].sum().item(), "kept": kept}


def _train(
    strategy: SelfTraining,
    model: Segmenter,
    images: Tensor,
    round: int,
    seed: int,
    checkpoint: Path | None,
    events: Events,
    prior: Statistics | None,
) -> tuple[float, float]:
    settings = strategy.settings
    place = next(model.parameters()).device
    teacher = copy.deepcopy(model).requires_grad_(False).eval()
    # The checkpoint holds what a resumed run cannot make again.
    whole = nn.ModuleDict({"student": model, "teacher": teacher})
    kept = torch.zeros(())
    whole.register_buffer("kept", kept)
    labels, weights = torch.empty(0), torch.empty(0)
    views = Views(seed, strategy.facts.flips)
    sample = evenly_spaced(images, BATCH_NORM_IMAGES)

    def before_epoch(epoch: int) -> None:
        nonlocal labels, weights, views
        views = Views(derive_seed(seed, "views", epoch), strategy.facts.flips)
        adapt_batch_norm(teacher, sample, prior=prior)
        labels, weights = strategy.label(teacher, images)
        kept.fill_((weights > 0).float().mean().item())

    def loss_of_batch(indices: Tensor) -> Tensor:
        batch = views(images[indices], labels[indices].long(), weights[indices].float())
        return strategy.loss(model, *(part.to(place) for part in batch))

    def after_step(done: int, total: int) -> None:
        with torch.no_grad():
            for old, new in zip(teacher.parameters(), model.parameters(), strict=True):
                old.lerp_(new, 1 - settings.teacher_momentum)

    trains = {parameter: parameter.requires_grad for parameter in model.parameters()}
    model.requires_grad_(False)
    for parameter in strategy.trained(model):
        parameter.requires_grad_(True)
    try:
        losses = fit(
            whole,
            len(images),
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
            f"adaptation by {settings.strategy}",
            parameters=model,
            before_epoch=before_epoch,
            after_step=after_step,
            saves_last=False,
        )
    finally:
        for parameter, flag in trains.items():
            parameter.requires_grad_(flag)
    return losses[-1], kept.item()


def starting_shares(model: Segmenter, images: Tensor, batch_norm: SiteNorm = "site") -> Tensor:
    """`class_shares` of up to `BATCH_NORM_IMAGES` images, after statistics are re-estimated there.

    The model keeps these statistics; see `adapt_round` for ``batch_norm``.
    """
    sample = evenly_spaced(images, BATCH_NORM_IMAGES)
    prior = statistics_of(model) if batch_norm == "mixed" else None
    adapt_batch_norm(model, sample, prior=prior)
    return class_shares(model, sample)


def class_shares(model: Segmenter, images: Tensor) -> Tensor:
    """Mean share (C,), float64, of the pixels of images (N, 1, S, S), N > 0, predicted as a class.

    The model's mode (training or evaluation) is restored.
    """
    place = next(model.parameters()).device
    was_training = model.training
    model.eval()
    counts: list[Tensor] = []
    try:
        with torch.inference_mode():
            for batch in torch.split(images, LABEL_BATCH):
                p = model.probabilities(batch.to(place))
                counts.append(p.argmax(dim=1).flatten().bincount(minlength=p.shape[1]).cpu())
    finally:
        model.train(was_training)
    return torch.stack(counts).sum(dim=0).double() / images.numel()


def check_collapse(before: Tensor, after: Tensor, facts: SegmentationFacts) -> None:
    """Fail where rounds took most of a class away, or the foreground out of the source's range.

    The range is widened, to half its lower end and to the nearer of twice its upper end and half of
    the background beyond it: a site's true mean may lie somewhat outside, and a step over the
    border is no collapse. What already started outside is not held to it: that site's images may
    really hold far less or more foreground, and the range says nothing of them.

    Parameters
    ----------
    before, after : Tensor (C,)
        Predicted share of each class, before and after one round or several.
    facts : SegmentationFacts
        Of the source: the 5% and 95% quantile of its foreground's share, and its class ratio.

    Raises
    ------
    CollapseError
        The foreground or the background fell below `LEAST_KEPT` of its share, wherever it started;
        or, with more than two classes, one that the site clearly held (`PRESENT` of the source's
        share of it) below `LEAST_CLASS_KEPT`; or the foreground left the widened range.
    """
    old, new = before[1:].sum().item(), after[1:].sum().item()
    source = facts.foreground_range
    low, high = source[0] / 2, min(2 * source[1], (1 + source[1]) / 2)
    left = low <= old <= high and not low <= new <= high
    gone = new < LEAST_KEPT * old or 1 - new < LEAST_KEPT * (1 - old)
    if left or gone:
        raise CollapseError(
            f"source-free adaptation collapsed: its predicted foreground went from {old:.2%} to "
            f"{new:.2%} of the pixels; the source's is {source[0]:.2%} to {source[1]:.2%}; {REMEDY}"
        )
    held = before > PRESENT * before.new_tensor(facts.class_ratio)
    lost = torch.nonzero(held & (after < LEAST_CLASS_KEPT * before)).flatten().tolist()
    if lost:
        raise CollapseError(
            f"source-free adaptation collapsed: its predicted share of class {lost[0]} went from "
            f"{before[lost[0]]:.2%} to {after[lost[0]]:.2%} of the pixels; {REMEDY}"
        )
