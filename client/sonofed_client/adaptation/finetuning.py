"""Fine-tuning of a classifier on site."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from torch import Generator, Tensor, nn
from torch.nn.functional import cross_entropy
from torch.nn.modules.batchnorm import _BatchNorm

from sonofed_common.contract.study import Finetuning
from sonofed_common.data.augmentation import Augmentation
from sonofed_common.runtime import SILENT, Events, derive_seed
from sonofed_common.training import Training, batches, fit

LOSS_BATCH = 64


def finetune_round(
    model: nn.Module,
    images: Tensor,
    labels: Tensor,
    settings: Finetuning,
    round: int,
    seed: int,
    events: Events = SILENT,
    replay: tuple[Tensor, Tensor] | None = None,
    checkpoint: Path | None = None,
    correct: Callable[[], None] | None = None,
) -> dict[str, float]:
    """Train a classifier in place for one federated round.

    Parameters
    ----------
    model : Module
        Maps (B, 1, S, S) to logits (B, C).
    images : Tensor (N, V, S, S)
        Labelled images in [0, 1]. Without any nothing is trained; with a single one the
        normalisation statistics are kept.
    labels : Tensor (N,)
        Class indices.
    settings : Finetuning
        The study's settings. The cosine schedule spans all its rounds; ``balanced`` weighs each
        image by ``N / (K N_c)``, with K classes present and N_c images in its class.
    round : int
        Number of the round, from 0.
    seed : int
        Seed of the site in this study.
    events : Events
        Gets the progress.
    replay : tuple of Tensor, optional
        Synthetic source images (M, 1, S, S) in [0, 1] and their class indices (M,). Every epoch
        spreads them evenly over the batches of labelled images, to whose loss they add; N and N_c
        count them.
    checkpoint : Path or None
        Written after every epoch; where it exists the round goes on from it, on CPU bit for bit.
    correct : callable, optional
        Corrects the gradients before every step (see `drift`).

    Returns
    -------
    dict of str to float
        ``examples``, without replayed ones, and, where there are any, ``loss``: the mean over the
        last epoch, and ``total_rate``: the sum of the steps' learning rates.

    Raises
    ------
    DivergenceError
        A loss or weight is not finite.

    Notes
    -----
    Normalisation statistics are of the site's own images only: replayed images go through the
    network apart, normalised by the running statistics, which they leave as they are. Mixed
    batches would give statistics that are neither the site's nor the source's.
    """
    if not len(images):
        return {"examples": 0.0}
    device = next(model.parameters()).device
    labels = labels.long()
    replayed, classes = replay or (images[:0], labels[:0])
    all_labels = torch.cat((labels, classes.long()))
    weights = class_weights(all_labels) if settings.balanced else torch.ones(len(all_labels))
    norms = [m for m in model.modules() if isinstance(m, _BatchNorm)]
    # Apart, so that replay changes nothing about how the site's own images are shown.
    augmentation = replay_augmentation = Augmentation(seed)
    steps = len(batches(len(images), settings.batch_size, seed))
    shares: Iterator[Tensor] = iter(())

    def renew_draws(epoch: int) -> None:
        nonlocal augmentation, replay_augmentation, shares
        augmentation = Augmentation(derive_seed(seed, "augmentation", epoch))
        replay_augmentation = Augmentation(derive_seed(seed, "replay augmentation", epoch))
        draws = Generator().manual_seed(derive_seed(seed, "replay", epoch))
        shares = iter(torch.randperm(len(replayed), generator=draws).tensor_split(steps))

    def losses_of(shown: Tensor, indices: Tensor) -> Tensor:
        logits = model(shown.to(device))
        losses = cross_entropy(logits, all_labels[indices].to(device), reduction="none")
        return losses * weights[indices].to(device)

    def loss_of_batch(indices: Tensor) -> Tensor:
        for norm in norms:
            norm.train(len(indices) > 1)
        losses = losses_of(augmentation(images[indices]), indices)
        share = next(shares)
        if len(share):
            for norm in norms:
                norm.eval()
            shown = replay_augmentation(replayed[share])
            losses = torch.cat((losses, losses_of(shown, len(images) + share)))
        return losses.mean()

    training = Training(
        epochs=settings.local_epochs,
        learning_rate=settings.learning_rate,
        batch_size=settings.batch_size,
        seed=seed,
        optimizer=settings.optimizer,
        first_epoch=round * settings.local_epochs,
        last_epoch=settings.rounds * settings.local_epochs,
    )
    losses = fit(
        model,
        len(images),
        loss_of_batch,
        training,
        checkpoint,
        events,
        "fine-tuning",
        before_epoch=renew_draws,
        before_step=correct,
        saves_last=False,
    )
    total_rate = training.total_rate(len(images))
    return {"examples": float(len(images)), "loss": losses[-1], "total_rate": total_rate}


@torch.inference_mode()
def mean_loss(model: nn.Module, images: Tensor, labels: Tensor, balanced: bool) -> float:
    """Mean cross-entropy of labelled images as they are, weighed as `finetune_round` does.

    Parameters
    ----------
    model : Module
        Maps (B, 1, S, S) to logits (B, C); its mode is restored.
    images : Tensor (N, 1, S, S)
        In [0, 1]; at least one.
    labels : Tensor (N,)
        Class indices.
    balanced : bool
        Weigh classes inversely to their frequency.
    """
    was_training = model.training
    model.eval()
    device = next(model.parameters()).device
    logits = torch.cat([model(part.to(device)).cpu() for part in torch.split(images, LOSS_BATCH)])
    model.train(was_training)
    losses = cross_entropy(logits.double(), labels.long(), reduction="none")
    weights = class_weights(labels) if balanced else torch.ones(len(labels))
    return float((losses * weights).mean())


def draw_replay(labels: Tensor, count: int, seed: int) -> Tensor:
    """Draw images to replay, as many of each class as of any other, give or take one.

    Parameters
    ----------
    labels : Tensor (M,)
        Class indices of the images to draw from.
    count : int
        How many to draw.
    seed : int
        Of the draw.

    Returns
    -------
    Tensor (count,)
        Indices into ``labels``. No image comes twice before each of its class came once.
    """
    draws = Generator().manual_seed(seed)
    classes = torch.unique(labels)
    # Chance decides which classes get one more, or a small site would never see some.
    order = torch.randperm(len(classes), generator=draws)
    chosen = []
    for place, label in enumerate(classes[order]):
        members = (labels == label).nonzero().flatten()
        wanted = len(range(place, count, len(classes)))
        passes = range(0, wanted, len(members))
        again = [members[torch.randperm(len(members), generator=draws)] for _ in passes]
        chosen.append(torch.cat((members[:0], *again))[:wanted])
    return torch.cat((labels.new_empty(0), *chosen))


def class_weights(labels: Tensor) -> Tensor:
    """Weight of each image (N,): ``N / (K N_c)`` with K classes present, N_c images in its own."""
    _, members, counts = torch.unique(labels, return_inverse=True, return_counts=True)
    weights: Tensor = len(labels) / (len(counts) * counts.float())
    return weights[members]
