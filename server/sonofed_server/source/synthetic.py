"""Labelled synthetic source images: real edges, invented echotexture, a memorisation gate."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Generator, Tensor
from torch.nn.functional import interpolate

from sonofed_common.contract.errors import ConfigurationError
from sonofed_common.contract.records import Records
from sonofed_common.contract.study import Reconstruction
from sonofed_common.data.images import load_images
from sonofed_common.models.sampling import reconstruct
from sonofed_common.models.stack import DiffusionStack
from sonofed_common.runtime import SILENT, Events, derive_seed
from sonofed_server.source.data import CLASSES, SourceSet
from sonofed_server.source.memorisation import MemorisationGate, membership_auroc
from sonofed_server.source.settings import SyntheticImages

TRIES = 5
QUANTILES = (0.05, 0.25, 0.5, 0.75, 0.95)


@dataclass(frozen=True)
class Wanted:
    """One synthetic image to be drawn: its class, its number in the class, and which try it is."""

    label: int
    number: int
    attempt: int


def synthesise(
    stack: DiffusionStack,
    source: SourceSet,
    settings: SyntheticImages,
    seed: int,
    events: Events = SILENT,
) -> tuple[Records, dict[str, Any]]:
    """Draw labelled images from the edges of training images, and keep those that pass the gate.

    Parameters
    ----------
    stack : DiffusionStack
        Trained on the source.
    source : SourceSet
        Edges and labels come from its pool; nothing is drawn from held-out images.
    settings : SyntheticImages
        How many, and the sampler.
    seed : int
        Each image has its own seeds, so that drawing anew after an interruption gives the same.
    events : Events
        Gets the progress.

    Returns
    -------
    records : Records
        ``images`` (N, S, S) uint8, S as in ``source``, and ``labels`` (N,) int64.
    facts : dict
        ``per_class``: images of each class; ``rejected``: images that the gate refused; ``limit``
        and ``nearest_real``: the gate's limit, and quantiles of the images' distances to the
        nearest real one; ``membership_auroc``: see `membership_auroc`.

    Raises
    ------
    ConfigurationError
        Of a class fewer than half of the wanted images passed the gate, each tried five times.
    DivergenceError
        The diffusion model gives values that are not finite.

    Notes
    -----
    Sampling starts from pure noise: only the edge map of a training image, mirrored at random,
    carries its class, and the echotexture is the model's own.
    """
    size = source.pool.images.shape[-1]
    edges_of = source.pool.images
    if stack.image_size != size:
        edges_of, _, _ = load_images(list(source.pool.samples), stack.image_size)
    sampling = Reconstruction(
        init="noise",
        sampler=settings.sampler,
        steps=settings.steps,
        guidance=settings.guidance,
    )
    gate = MemorisationGate(source.pool.images, [sample.group for sample in source.pool.samples])
    kept: list[Tensor] = []
    labels: list[int] = []
    rejected = 0
    wanted = [
        Wanted(label, n, 0) for n in range(settings.per_class) for label in range(len(CLASSES))
    ]
    total = len(wanted)
    while wanted:
        batch, wanted = wanted[: sampling.batch_size], wanted[sampling.batch_size :]
        for one, image in zip(
            batch,
            _draw(stack, edges_of, source.pool.labels, batch, sampling, size, seed),
            strict=True,
        ):
            if gate.admit(image):
                kept.append(image)
                labels.append(one.label)
                continue
            rejected += 1
            if one.attempt + 1 < TRIES:
                wanted.append(Wanted(one.label, one.number, one.attempt + 1))
        events.progress("synthetic images", total - len(wanted), total)
    counts = [labels.count(label) for label in range(len(CLASSES))]
    if 2 * min(counts) < settings.per_class:
        raise ConfigurationError(
            f"only {min(counts)} of {settings.per_class} synthetic images of a class pass the "
            "memorisation gate, the others are too near to a real image or to each other; train "
            "the diffusion model for fewer epochs or on more images, ask for fewer synthetic "
            "images, or leave the section 'synthetic' out"
        )
    released = torch.stack(kept)
    levels = torch.tensor(gate.nearest, dtype=torch.float64).quantile(
        torch.tensor(QUANTILES, dtype=torch.float64)
    )
    facts = {
        "per_class": dict(zip(CLASSES, counts, strict=True)),
        "rejected": rejected,
        "limit": gate.limit,
        "nearest_real": {
            f"q{q * 100:02.0f}": float(v) for q, v in zip(QUANTILES, levels, strict=True)
        },
        "membership_auroc": membership_auroc(source.pool.images, source.test.images, released),
    }
    pixels = (released[:, 0] * 255).round().to(torch.uint8).numpy()
    return Records({"images": pixels, "labels": np.array(labels, dtype=np.int64)}), facts


def _draw(
    stack: DiffusionStack,
    images: Tensor,
    labels: Tensor,
    batch: list[Wanted],
    sampling: Reconstruction,
    size: int,
    seed: int,
) -> Tensor:
    """Draw images (B, 1, S, S), already rounded to the 256 grey values that are released."""
    chosen, noise = [], []
    for one in batch:
        name = (seed, one.label, one.number, one.attempt)
        draws = Generator().manual_seed(derive_seed(*name, "edges"))
        members = (labels == one.label).nonzero().flatten()
        image = images[members[torch.randint(len(members), (), generator=draws)]]
        mirrored = bool(torch.randint(2, (), generator=draws))
        chosen.append(image.flip(-1) if mirrored else image)
        noise.append(derive_seed(*name, "noise"))
    drawn = reconstruct(stack, torch.stack(chosen), sampling, noise)
    if drawn.shape[-1] != size:
        drawn = interpolate(drawn, size, mode="area")
    return (drawn * 255).round() / 255
