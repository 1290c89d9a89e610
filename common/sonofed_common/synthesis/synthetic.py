"""Labelled synthetic images, drawn by any class-wise generator, behind one gate."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from sonofed_common.contract.errors import DivergenceError
from sonofed_common.contract.names import CLASSES
from sonofed_common.contract.records import Records
from sonofed_common.runtime import SILENT, Events, derive_seed
from sonofed_common.synthesis.memorisation import (
    MEMBERSHIP,
    MemorisationGate,
    RefusedError,
    membership_auroc,
    tells_members,
)

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


@dataclass(frozen=True)
class Labelled:
    """Labelled images of patients.

    Attributes
    ----------
    images : Tensor
        (N, 1, S, S), in [0, 1].
    labels : Tensor
        (N,) int64, numbers of `CLASSES`.
    groups : sequence of str
        The patient, or group of duplicates, of each.
    """

    images: Tensor
    labels: Tensor
    groups: Sequence[str]


class Drawing(Protocol):
    """Draws images of a class; the gate is not its business."""

    def draw(self, batch: Sequence[Wanted]) -> Tensor:
        """Draw images (B, 1, S, S) in [0, 1], S as in the training images."""
        ...


def synthesise(
    drawing: Drawing,
    training: Labelled,
    held_out: Labelled,
    per_class: Sequence[int],
    seed: int,
    events: Events = SILENT,
    least: float = 0.5,
) -> tuple[Records, dict[str, Any]]:
    """Draw labelled images, and keep those that pass the gate.

    Parameters
    ----------
    drawing : Drawing
        Trained on ``training``.
    training : Labelled
        What the gate compares with.
    held_out : Labelled
        Of other patients: they serve to measure membership inference.
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
        ``images`` (N, S, S) uint8, S as in ``training``, and ``labels`` (N,) int64.
    facts : dict
        ``per_class``: images of each class; ``rejected``: images that the gate refused, of which
        ``duplicates`` were like another synthetic one and like no real one; ``limit`` and
        ``nearest_real``: the gate's limit, and quantiles of the images' distances to the nearest
        real one; ``membership_auroc``: see `membership_auroc`.

    Raises
    ------
    RefusedError
        All training images are of one patient; of a class fewer images than must passed the gate,
        each tried five times; or all together, or those of a class, tell training images from
        unseen ones, see `tells_members`.
    DivergenceError
        The generator gives values that are not finite.
    """
    gate = MemorisationGate(training.images, training.groups)
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
    drawn_of = torch.tensor(labels)
    for of_class in (None, *range(len(CLASSES))):
        _check_membership(training, held_out, released, drawn_of, of_class)
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
        "membership_auroc": membership_auroc(training.images, held_out.images, released),
    }
    pixels = (released[:, 0] * 255).round().to(torch.uint8).numpy()
    return Records({"images": pixels, "labels": np.array(labels, dtype=np.int64)}), facts


def _check_membership(
    training: Labelled, held_out: Labelled, released: Tensor, labels: Tensor, of_class: int | None
) -> None:
    """Refuse a set that tells its training images; of one class, each has a generator of its own.

    Over all of them a small class would go under.
    """
    members, others, drawn = training.images, held_out.images, released
    if of_class is not None:
        members, others = (p.images[p.labels == of_class] for p in (training, held_out))
        drawn = released[labels == of_class]
    if not (len(members) and len(others) and len(drawn)):
        return
    auroc = membership_auroc(members, others, drawn)
    if tells_members(auroc, len(members), len(others)):
        raise RefusedError(
            "the synthetic images tell which real images the generator was trained on (membership "
            f"AUROC {auroc:.2f}, where {MEMBERSHIP} is allowed); train it for fewer epochs or "
            "on more images, or do without synthetic images"
        )
