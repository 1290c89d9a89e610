"""Labelled synthetic source images: drawn by any class-wise generator, behind one gate."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol

import numpy as np
import torch
from torch import Generator, Tensor
from torch.nn.functional import interpolate

from sonofed_common.contract.errors import DivergenceError
from sonofed_common.contract.records import Records
from sonofed_common.contract.study import Reconstruction
from sonofed_common.data.images import load_images
from sonofed_common.models.sampling import reconstruct
from sonofed_common.models.stack import DiffusionStack
from sonofed_common.runtime import SILENT, Events, derive_seed
from sonofed_server.source.data import CLASSES, Part, SourceSet
from sonofed_server.source.memorisation import (
    MEMBERSHIP,
    MemorisationGate,
    RefusedError,
    membership_auroc,
    tells_members,
)
from sonofed_server.source.settings import SyntheticImages

TRIES = 5
BATCH = 16
QUANTILES = (0.05, 0.25, 0.5, 0.75, 0.95)


@dataclass(frozen=True)
class Wanted:
    """One synthetic image to be drawn.

    Attributes
    ----------
    seed : int
        Of the whole set.
    label, number, attempt : int
        Its class, its number in the class, and which try it is.
    """

    seed: int
    label: int
    number: int
    attempt: int = 0

    def seed_of(self, draw: str) -> int:
        """Seed of one of its random draws: the same image is drawn whatever is drawn beside it."""
        return derive_seed(self.seed, self.label, self.number, self.attempt, draw)


class Drawing(Protocol):
    """Draws images of a class; the gate is not its business."""

    def draw(self, batch: Sequence[Wanted]) -> Tensor:
        """Draw images (B, 1, S, S) in [0, 1], S as in the training images."""
        ...


def synthesise(
    drawing: Drawing,
    source: SourceSet,
    per_class: Sequence[int],
    seed: int,
    events: Events = SILENT,
    least: float = 0.5,
) -> tuple[Records, dict[str, Any]]:
    """Draw labelled images, and keep those that pass the gate.

    Parameters
    ----------
    drawing : Drawing
        Trained on the source's pool.
    source : SourceSet
        The gate compares with its pool; its held-out images serve to measure membership inference.
    per_class : sequence of int
        Images wanted of each class; refused ones are drawn again.
    seed : int
        Each image has its own seeds, so that drawing anew after an interruption gives the same.
    events : Events
        Gets the progress.
    least : float
        Share of each class's images that must pass, in [0, 1]; one must in any case.

    Returns
    -------
    records : Records
        ``images`` (N, S, S) uint8, S as in ``source``, and ``labels`` (N,) int64.
    facts : dict
        ``per_class``: images of each class; ``rejected``: images that the gate refused, of which
        ``duplicates`` were like another synthetic one and like no real one; ``limit`` and
        ``nearest_real``: the gate's limit, and quantiles of the images' distances to the nearest
        real one; ``membership_auroc``: see `membership_auroc`.

    Raises
    ------
    RefusedError
        Of a class fewer images than must passed the gate, each tried five times; or all together
        tell training images from unseen ones, see `tells_members`.
    DivergenceError
        The generator gives values that are not finite.
    """
    gate = MemorisationGate(source.pool.images, [sample.group for sample in source.pool.samples])
    kept: list[Tensor] = []
    labels: list[int] = []
    rejected = 0
    wanted = [
        Wanted(seed, label, n)
        for n in range(max(per_class))
        for label, count in enumerate(per_class)
        if n < count
    ]
    total = len(wanted)
    while wanted:
        batch, wanted = wanted[:BATCH], wanted[BATCH:]
        # Judged as it is released, in 256 grey values.
        drawn = (drawing.draw(batch) * 255).round() / 255
        if not bool(drawn.isfinite().all()):
            raise DivergenceError(
                "the generator gives values that are not finite; train it again at a lower rate"
            )
        for one, image in zip(batch, drawn, strict=True):
            if gate.admit(image):
                kept.append(image)
                labels.append(one.label)
                continue
            rejected += 1
            if one.attempt + 1 < TRIES:
                wanted.append(replace(one, attempt=one.attempt + 1))
        events.progress("synthetic images", total - len(wanted), total)
    counts = [labels.count(label) for label in range(len(CLASSES))]
    for name, count, asked in zip(CLASSES, counts, per_class, strict=True):
        if asked and count < max(1, least * asked):
            raise RefusedError(
                f"only {count} of {asked} synthetic {name} images pass the memorisation gate, the "
                "others are too near to a real image or to each other; train the generator with "
                "other settings or on more images, ask for fewer synthetic images, or do without"
            )
    released = torch.stack(kept)
    training, held_out = source.pool.images, source.test.images
    membership = membership_auroc(training, held_out, released)
    if tells_members(membership, len(training), len(held_out)):
        raise RefusedError(
            "the synthetic images tell which real images the generator was trained on (membership "
            f"AUROC {membership:.2f}, where {MEMBERSHIP} is allowed); train it for fewer epochs or "
            "on more images, or do without synthetic images"
        )
    levels = torch.tensor(gate.nearest, dtype=torch.float64).quantile(
        torch.tensor(QUANTILES, dtype=torch.float64)
    )
    facts = {
        "per_class": dict(zip(CLASSES, counts, strict=True)),
        "rejected": rejected,
        "duplicates": gate.duplicates,
        "limit": gate.limit,
        "nearest_real": {
            f"q{q * 100:02.0f}": float(v) for q, v in zip(QUANTILES, levels, strict=True)
        },
        "membership_auroc": membership,
    }
    pixels = (released[:, 0] * 255).round().to(torch.uint8).numpy()
    return Records({"images": pixels, "labels": np.array(labels, dtype=np.int64)}), facts


class EdgeDrawing:
    """Draws by a diffusion stack: real edges, invented echotexture.

    Parameters
    ----------
    stack : DiffusionStack
        Trained on the source.
    pool : Part
        Edges and labels come from its images; nothing is drawn from held-out ones.
    settings : SyntheticImages
        The sampler.

    Notes
    -----
    Sampling starts from pure noise: only the edge map of a training image, mirrored at random,
    carries its class, and the echotexture is the model's own.
    """

    def __init__(self, stack: DiffusionStack, pool: Part, settings: SyntheticImages) -> None:
        self._stack, self._labels = stack, pool.labels
        self._size = pool.images.shape[-1]
        self._images = pool.images
        if stack.image_size != self._size:
            self._images, _, _ = load_images(list(pool.samples), stack.image_size)
        self._sampling = Reconstruction(
            init="noise",
            sampler=settings.sampler,
            steps=settings.steps,
            guidance=settings.guidance,
            batch_size=BATCH,
        )

    def draw(self, batch: Sequence[Wanted]) -> Tensor:
        """Draw images (B, 1, S, S) in [0, 1]."""
        chosen = []
        for one in batch:
            draws = Generator().manual_seed(one.seed_of("edges"))
            members = (self._labels == one.label).nonzero().flatten()
            image = self._images[members[torch.randint(len(members), (), generator=draws)]]
            mirrored = bool(torch.randint(2, (), generator=draws))
            chosen.append(image.flip(-1) if mirrored else image)
        noise = [one.seed_of("noise") for one in batch]
        drawn = reconstruct(self._stack, torch.stack(chosen), self._sampling, noise)
        if drawn.shape[-1] != self._size:
            drawn = interpolate(drawn, self._size, mode="area")
        return drawn
