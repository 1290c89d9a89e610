"""Stage I of ADAptation (arXiv 2507.00474): the stack learns what source images look like."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Generator, Tensor

from sonofed_common.models.diffusion import DiffusionStack
from sonofed_common.runtime import SILENT, Events, derive_seed
from sonofed_common.training import Training, fit


def train_diffusion(
    stack: DiffusionStack,
    images: Tensor,
    *,
    epochs: int,
    learning_rate: float,
    batch_size: int,
    seed: int,
    checkpoint: Path | None = None,
    events: Events = SILENT,
) -> list[float]:
    """Train a stack in place; labels are not used.

    Parameters
    ----------
    stack : DiffusionStack
        ``tiny`` is trained whole, of ``sd15`` only the ControlNet.
    images : Tensor
        (N, 1, S, S) source images, in [0, 1].
    epochs, learning_rate, batch_size, seed
        As in `Training`. Half of the images are mirrored, anew in each epoch.
    checkpoint : Path or None
        As in `fit`.
    events : Events
        Gets progress as task ``"diffusion"``.

    Returns
    -------
    list of float
        Mean loss of each epoch.

    Raises
    ------
    SiteEmptyError, DivergenceError, ConfigurationError
        As in `fit`.
    """
    edges = stack.edges(images)
    generator = Generator()

    def renew(epoch: int) -> None:
        generator.manual_seed(derive_seed(seed, "noise", epoch))

    def loss_of_batch(indices: Tensor) -> Tensor:
        batch, hints = images[indices], edges[indices]
        mirrored = (torch.rand(len(indices), generator=generator) < 0.5).view(-1, 1, 1, 1)
        return stack.training_loss(
            torch.where(mirrored, batch.flip(-1), batch),
            torch.where(mirrored, hints.flip(-1), hints),
            generator,
        )

    losses = fit(
        # What is frozen need not be written into every checkpoint.
        stack if stack.kind == "tiny" else stack.controlnet,
        len(images),
        loss_of_batch,
        Training(epochs, learning_rate, batch_size, seed),
        checkpoint,
        events,
        "diffusion",
        before_epoch=renew,
    )
    stack.eval()
    return losses
