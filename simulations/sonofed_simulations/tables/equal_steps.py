"""Training of a classifier by a count of optimiser steps, however many images there are."""

from __future__ import annotations

from collections.abc import Callable

import torch
from pydantic import Field
from torch import Tensor
from torch.nn.functional import cross_entropy

from sonofed_common.contract.configuration import Model
from sonofed_common.models.classifiers import Classifier, build_classifier
from sonofed_common.runtime import SILENT, Events, derive_seed, device
from sonofed_common.training import Training, fit
from sonofed_server.source.classifiers import class_weights

TRANSFORMER_RATE = 3e-5
"""At the others' rate ViT-16 from random weights names one class, at the source already."""

TRANSFORMER_NOTE = f"ViT-16 {TRANSFORMER_RATE:g}, chosen on held-out images of BUSI"


class Steps(Model):
    """How long a classifier is trained, and how."""

    steps: int = Field(ge=1)
    batch_size: int = Field(default=16, ge=2)
    learning_rate: float = Field(default=3e-4, gt=0)

    def of(self, network: str) -> Steps:
        """Return them for a network: ViT-16 at `TRANSFORMER_RATE`, the others as they are."""
        if network != "vit16":
            return self
        return self.model_copy(update={"learning_rate": TRANSFORMER_RATE})


def train_steps(
    name: str,
    images: Tensor,
    labels: Tensor,
    settings: Steps,
    seed: int,
    *,
    flips: bool,
    events: Events = SILENT,
) -> Classifier:
    """Train one classifier from random weights with class-weighted cross-entropy.

    Parameters
    ----------
    name : str
        One of `CLASSIFIERS`.
    images : Tensor
        (N, 1, S, S), in [0, 1].
    labels : Tensor
        (N,) int64, both classes present.
    settings : Steps
        Every image is seen equally often, give or take once.
    seed : int
        Of the weights, the order and the flips.
    flips : bool
        Half of the images are mirrored, anew each time; there is no other augmentation.
    events : Events
        Gets the progress.

    Returns
    -------
    Classifier
        In evaluation mode.
    """
    model = build_classifier(name, pretrained=False, seed=derive_seed(seed, "weights"))
    fit_steps(model.to(device()), images, labels, settings, seed, flips=flips, events=events)
    return model.eval()


def fit_steps(
    model: Classifier,
    images: Tensor,
    labels: Tensor,
    settings: Steps,
    seed: int,
    *,
    flips: bool,
    before_step: Callable[[], None] | None = None,
    part: tuple[int, int] = (0, 1),
    events: Events = SILENT,
) -> None:
    """Train a classifier in place, as `train_steps` does.

    Parameters
    ----------
    model : Classifier
        On its device.
    images, labels, settings, seed, flips, events
        As in `train_steps`.
    before_step : callable or None
        Called between the gradient and the step, for example FedProx's correction.
    part : tuple of int
        Number of this training, from 0, and how many there are: the cosine goes through all.
    """
    weights = class_weights(labels).to(device())
    items = settings.steps * settings.batch_size
    draws = torch.Generator().manual_seed(derive_seed(seed, "order"))
    passes = -(-items // len(labels))
    order = torch.cat([torch.randperm(len(labels), generator=draws) for _ in range(passes)])[:items]

    def loss(indices: Tensor) -> Tensor:
        chosen = order[indices]
        batch = images[chosen]
        if flips:
            mirrored = (torch.rand(len(chosen)) < 0.5).view(-1, 1, 1, 1)
            batch = torch.where(mirrored, batch.flip(-1), batch)
        return cross_entropy(model(batch.to(device())), labels[chosen].to(device()), weights)

    training = Training(
        1,
        settings.learning_rate,
        settings.batch_size,
        seed,
        first_epoch=part[0],
        last_epoch=part[1],
    )
    task = "train classifier"
    fit(model, items, loss, training, events=events, task=task, before_step=before_step)
