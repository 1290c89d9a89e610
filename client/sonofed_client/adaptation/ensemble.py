"""The ensemble on site: the branches' probabilities, and temperatures from their consensus."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from sonofed_client.adaptation.spacing import evenly_spaced
from sonofed_common.models.infusion import fit_temperature, lattice
from sonofed_common.models.segmenter import Segmenter

CONSENSUS_IMAGES = 64
_TINY = 1e-8


def branch_probabilities(
    models: Sequence[Segmenter], images: Tensor, batch_size: int = 16, mirrored: bool = False
) -> Iterator[Tensor]:
    """Compute the class probabilities of each branch, batch by batch.

    Parameters
    ----------
    models : sequence of Segmenter
        K branches, put in evaluation mode.
    images : Tensor (N, 1, S, S)
        In [0, 1].
    batch_size : int
        Images at once.
    mirrored : bool
        See `Segmenter.probabilities`.

    Yields
    ------
    Tensor (K, B, C, S, S)
        On CPU; the batches keep the order of the images.
    """
    device = next(models[0].parameters()).device
    for model in models:
        model.eval()
    for start in range(0, len(images), batch_size):
        batch = images[start : start + batch_size].to(device)
        with torch.inference_mode():
            stacked = torch.stack([model.probabilities(batch, mirrored) for model in models])
        yield stacked.cpu()


def consensus_log_temperatures(models: Sequence[Segmenter], images: Tensor) -> NDArray[np.float64]:
    """Calibrate branches without labels: each against what the mean of the others holds for true.

    Parameters
    ----------
    models : sequence of Segmenter
        K branches.
    images : Tensor (N, 1, S, S)
        A site's pool; at most 64 evenly spaced images serve.

    Returns
    -------
    ndarray of float64 (K,)
        Logarithm of the temperature that minimises the negative log-likelihood of a branch (see
        `fit_temperature`); 0 where there is no other branch, or no image.

    Notes
    -----
    Branches that make the same mistakes confirm each other in them, so temperatures come out lower
    than with true labels.
    """
    if len(models) == 1 or not len(images):
        return np.zeros(len(models))
    chosen = evenly_spaced(images, CONSENSUS_IMAGES)
    parts = [lattice(p) for p in branch_probabilities(models, chosen)]
    pixels = torch.cat(parts, dim=1).movedim(2, -1).flatten(1, 3)
    total = pixels.sum(dim=0)
    logs = pixels.clamp(min=_TINY).log()
    return np.array(
        [
            math.log(fit_temperature(log, (total - own).argmax(dim=1)))
            for log, own in zip(logs, pixels, strict=True)
        ]
    )
