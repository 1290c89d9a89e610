"""Adaptation of a classifier on site: normalisation statistics and fine-tuning."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.nn.modules.batchnorm import _BatchNorm

from sonofed_common.contract.study import Finetuning
from sonofed_common.data.augmentation import Augmentation
from sonofed_common.runtime import SILENT, Events, derive_seed
from sonofed_common.training import Training, fit


def adapt_batch_norm(model: nn.Module, images: Tensor, batch_size: int = 32) -> None:
    """Re-estimate batch-normalisation statistics on a site's images, without labels.

    After AdaBN (Li et al., 2018): running means and variances become the averages over batches of
    the site's images; no weight changes.

    Parameters
    ----------
    model : Module
        Changed in place. Modes and momenta are restored.
    images : Tensor (N, 1, S, S)
        In [0, 1]. Fewer than two images estimate nothing and change nothing.
    batch_size : int
        Least number of images of a batch where there are that many; a batch holds less than twice
        as many.
    """
    layers = [m for m in model.modules() if isinstance(m, _BatchNorm) and m.track_running_stats]
    if len(images) < 2 or not layers:
        return
    device = next(model.parameters()).device
    modes = {module: module.training for module in model.modules()}
    momenta = [layer.momentum for layer in layers]
    model.eval()
    for layer in layers:
        layer.reset_running_stats()
        layer.momentum = None
        layer.train()
    try:
        # Strides mix the batches: images often come sorted by class or scanner.
        count = max(len(images) // max(batch_size, 2), 1)
        with torch.no_grad():
            for start in range(count):
                model(images[start::count].to(device))
    finally:
        for layer, momentum in zip(layers, momenta, strict=True):
            layer.momentum = momentum
        for module, mode in modes.items():
            module.training = mode


def finetune_round(
    model: nn.Module,
    images: Tensor,
    labels: Tensor,
    settings: Finetuning,
    round: int,
    seed: int,
    events: Events = SILENT,
) -> dict[str, float]:
    """Train a classifier in place for one federated round.

    Parameters
    ----------
    model : Module
        Maps (B, 1, S, S) to logits (B, C).
    images : Tensor (N, 1, S, S)
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

    Returns
    -------
    dict of str to float
        ``examples`` and, where there are any, ``loss``: the mean over the last epoch.

    Raises
    ------
    DivergenceError
        A loss or weight is not finite.
    """
    if not len(images):
        return {"examples": 0.0}
    device = next(model.parameters()).device
    labels = labels.long()
    weights = _class_weights(labels) if settings.balanced else torch.ones(len(labels))
    norms = [m for m in model.modules() if isinstance(m, _BatchNorm)]
    augmentation = Augmentation(seed)

    def renew_augmentation(epoch: int) -> None:
        nonlocal augmentation
        augmentation = Augmentation(derive_seed(seed, "augmentation", epoch))

    def loss_of_batch(indices: Tensor) -> Tensor:
        if len(indices) == 1:
            for norm in norms:
                norm.eval()
        logits = model(augmentation(images[indices]).to(device))
        losses = cross_entropy(logits, labels[indices].to(device), reduction="none")
        return (losses * weights[indices].to(device)).mean()

    training = Training(
        epochs=settings.local_epochs,
        learning_rate=settings.learning_rate,
        batch_size=settings.batch_size,
        seed=seed,
        first_epoch=round * settings.local_epochs,
        last_epoch=settings.rounds * settings.local_epochs,
    )
    losses = fit(
        model,
        len(images),
        loss_of_batch,
        training,
        events=events,
        task="fine-tuning",
        before_epoch=renew_augmentation,
    )
    return {"examples": float(len(images)), "loss": losses[-1]}


def _class_weights(labels: Tensor) -> Tensor:
    _, members, counts = torch.unique(labels, return_inverse=True, return_counts=True)
    weights: Tensor = len(labels) / (len(counts) * counts.float())
    return weights[members]
