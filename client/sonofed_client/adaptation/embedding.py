"""Hypersphere contrastive learning: Stage III of ADAptation (arXiv 2507.00474).

A teacher, the moving average of the student, sees a target image; the student, through BYOL's
predictor (Grill et al., NeurIPS 2020), sees its reconstruction, and the angle between their points
on the hypersphere shrinks. Student and predictor travel between rounds; the teacher does not.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor, nn

from sonofed_common.contract.errors import CollapseError
from sonofed_common.contract.study import Embedding
from sonofed_common.data.augmentation import Augmentation
from sonofed_common.models.encoder import HypersphereEncoder, Predictor
from sonofed_common.runtime import SILENT, Events, derive_seed
from sonofed_common.training import Training, fit

SMALLEST_JUDGED = 8
"""With fewer images, likeness says nothing about collapse."""
LEAST_SPREAD = 0.05
LARGEST_COSINE = 0.99
COLLAPSE = ("spread", "cosine")


def angular_loss(
    teacher: Tensor,
    student: Tensor,
    margin: float = 4.0,
    pairs: Literal["matched", "all_pairs"] = "matched",
) -> Tensor:
    """Mean squared angle between teacher and student: ``mean (m theta)^2``.

    Parameters
    ----------
    teacher, student : Tensor (N, d)
        Unit vectors.
    margin : float
        m; it only scales the loss, which Adam hardly notices.
    pairs : str
        ``matched``: row i with row i. ``all_pairs``: every row with every row, which draws all
        points together and collapses; for ablation only.

    Returns
    -------
    Tensor ()
        With finite gradients at every angle, 0 and pi included.

    Notes
    -----
    ``theta = 2 atan2(|a - b|, |a + b|)`` (Kahan) in place of arccos, whose gradient is infinite
    where BYOL starts: at equal vectors.
    """
    dtype = torch.promote_types(teacher.dtype, torch.float32)
    a, b = teacher.to(dtype), student.to(dtype)
    if pairs == "all_pairs":
        a, b = a[:, None], b[None, :]
    theta = 2 * torch.atan2(_length(a - b), _length(a + b))
    return (margin * theta).square().mean()


def collapse_statistics(z: Tensor) -> dict[str, float]:
    """How far embeddings are from a constant.

    Parameters
    ----------
    z : Tensor (N, d)
        Unit vectors.

    Returns
    -------
    dict of str to float
        ``spread``: mean over dimensions of the standard deviation, times sqrt(d): 1 for a uniform
        sphere, 0 for a constant. ``cosine``: mean cosine of two different images, 0 and 1 there.
        With fewer than two images, 1 and 0.
    """
    count, dimension = z.shape
    if count < 2:
        return {"spread": 1.0, "cosine": 0.0}
    points = z.detach().double()
    spread = points.std(dim=0, correction=0).mean().item() * math.sqrt(dimension)
    total = points.sum(dim=0).square().sum().item() - points.square().sum().item()
    return {"spread": spread, "cosine": total / (count * (count - 1))}


def check_collapse(z: Tensor) -> dict[str, float]:
    """Return the `collapse_statistics`, or fail where they show a constant.

    Parameters
    ----------
    z : Tensor (N, d)
        Unit vectors.

    Raises
    ------
    CollapseError
        At least 8 images, and spread below 0.05 or mean cosine above 0.99: a pretrained network's
        images lie in a cone too, but a far wider one.
    """
    found = collapse_statistics(z)
    _judge(found, len(z))
    return found


def _judge(found: Mapping[str, float], count: int) -> None:
    if count >= SMALLEST_JUDGED and (
        found["spread"] < LEAST_SPREAD or found["cosine"] > LARGEST_COSINE
    ):
        raise CollapseError(
            f"the embedding collapsed: {count} images have a mean cosine of {found['cosine']:.4f} "
            f"and a spread of {found['spread']:.4f}; use matched pairs and a lower learning rate"
        )


def train_round(
    student: HypersphereEncoder,
    predictor: Predictor,
    images: Tensor,
    partners: Tensor | None,
    settings: Embedding,
    round: int,
    seed: int,
    events: Events = SILENT,
    checkpoint: Path | None = None,
) -> dict[str, float]:
    """Train student and predictor in place for one federated round.

    Parameters
    ----------
    student : HypersphereEncoder
        Its incoming weights are also the teacher's first ones in this round.
    predictor : Predictor
        Travels with the student.
    images : Tensor of float32 (N, V, S, S)
        Target images in [0, 1], seen by the teacher.
    partners : Tensor of float32 (N, V, S, S) or None
        Their reconstructions, seen by the student; None pairs two augmentations of each image.
    settings : Embedding
        The study's settings.
    round : int
        Number of this round, from 0; learning rate and teacher momentum follow one cosine over all.
    seed : int
        Seed of this site.
    events : Events
        Gets progress, and loss and collapse statistics of each epoch.
    checkpoint : Path or None
        Written after every epoch; where it exists the round goes on from it, on CPU bit for bit.
        It holds weights and statistics, no image's point.

    Returns
    -------
    dict of str to float
        ``images``, and of the last epoch ``loss``, ``spread`` and ``cosine`` of the student's
        points, ``predicted_spread`` and ``predicted_cosine`` of the predictor's. With a single
        image nothing is trained (normalisation needs two) and only ``images`` is returned.

    Raises
    ------
    SiteEmptyError
        There is no image.
    CollapseError
        Student or predictor maps all images to one point. Batch normalisation and the teacher can
        hold the student's points apart while the predictor alone has become constant.
    DivergenceError
        A loss or a weight is not finite.
    """
    if len(images) == 1:
        return {"images": 1.0}
    place = next(student.parameters()).device
    teacher = copy.deepcopy(student).requires_grad_(False)
    # Both sides normalise by their own batch, as in BYOL: running statistics mix the two styles.
    teacher.train()
    augment = Augmentation(seed)
    points: list[Tensor] = []
    predictions: list[Tensor] = []
    latest = _Statistics()

    def before_epoch(epoch: int) -> None:
        nonlocal augment
        augment = Augmentation(derive_seed(seed, "pairs", epoch))
        points.clear()
        predictions.clear()

    def loss_of_batch(indices: Tensor) -> Tensor:
        batch = images[indices]
        target, partner = (
            (augment(batch), augment(batch)) if partners is None else (batch, partners[indices])
        )
        with torch.no_grad():
            fixed = teacher(target.to(place))
        point = student(partner.to(place))
        predicted = predictor(point)
        points.append(point.detach())
        predictions.append(predicted.detach())
        return angular_loss(fixed, predicted, settings.margin, settings.loss)

    def after_step(done: int, total: int) -> None:
        momentum = teacher_momentum(settings.teacher_momentum, done / total)
        with torch.no_grad():
            for old, new in zip(teacher.parameters(), student.parameters(), strict=True):
                old.lerp_(new, 1 - momentum)
        if sum(map(len, points)) == len(images):
            latest.keep(torch.cat(points), torch.cat(predictions))
            epoch = done * settings.rounds * settings.local_epochs // total
            events.emit("embedding", epoch=epoch, **latest.named())

    trained = nn.ModuleList([student, predictor])
    losses = fit(
        nn.ModuleList([trained, teacher, latest]),
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
        "embedding",
        parameters=trained,
        before_epoch=before_epoch,
        after_step=after_step,
        saves_last=False,
    )
    found = latest.named()
    for prefix in ("predicted_", ""):
        _judge({key: found[prefix + key] for key in COLLAPSE}, len(images))
    return {"images": float(len(images)), "loss": losses[-1], **found}


class _Statistics(nn.Module):
    """Collapse statistics of the latest epoch; a module, so that a checkpoint holds them."""

    values: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("values", torch.zeros(2, len(COLLAPSE), dtype=torch.float64))

    def keep(self, points: Tensor, predictions: Tensor) -> None:
        for row, z in enumerate((points, predictions)):
            found = collapse_statistics(z)
            self.values[row] = torch.tensor([found[k] for k in COLLAPSE], dtype=torch.float64)

    def named(self) -> dict[str, float]:
        names = [*COLLAPSE, *(f"predicted_{key}" for key in COLLAPSE)]
        return dict(zip(names, self.values.flatten().tolist(), strict=True))


def teacher_momentum(start: float, share: float) -> float:
    """Return the teacher's momentum after a share of all steps: a cosine from ``start`` to 1."""
    return 1 - (1 - start) * (math.cos(math.pi * min(share, 1.0)) + 1) / 2


def embed(encoder: HypersphereEncoder, images: Tensor, batch_size: int = 64) -> Tensor:
    """Map images to the hypersphere with the frozen encoder.

    Parameters
    ----------
    encoder : HypersphereEncoder
        Its mode (training or evaluation) is restored.
    images : Tensor of float32 (N, V, S, S)
        In [0, 1]; N may be 0.
    batch_size : int
        Images at a time.

    Returns
    -------
    Tensor of float32 (N, d)
        Unit vectors on CPU.
    """
    place = next(encoder.parameters()).device
    was_training = encoder.training
    encoder.eval()
    try:
        with torch.inference_mode():
            parts = [
                encoder(images[first : first + batch_size].to(place)).float().cpu()
                for first in range(0, len(images), batch_size)
            ]
    finally:
        encoder.train(was_training)
    return torch.cat(parts).clone() if len(images) else torch.empty(0, encoder.dimension)


def fedema_merge(
    local: Mapping[str, Tensor],
    incoming: Mapping[str, Tensor],
    scale: float | None = None,
    target: float = 0.7,
) -> tuple[dict[str, Tensor], float]:
    """Start a round from a mixture of the site's last student and the incoming global one.

    FedEMA (Zhuang, Wen and Zhang, ICLR 2022): ``mu = min(scale |g - l|, 1)`` and
    ``mu l + (1 - mu) g``: the further a site has diverged, the more of its own it keeps.

    Parameters
    ----------
    local, incoming : mapping of str to Tensor
        State dicts of the same model; what is not floating point is taken from ``incoming``.
    scale : float or None
        The paper's lambda; None, for a site's first merge, sets it so that mu is ``target``.
    target : float
        The paper's tau, in [0, 1].

    Returns
    -------
    merged : dict of str to Tensor
    scale : float
        To be kept on site and given again in later rounds.
    """
    floating = [name for name, value in incoming.items() if value.is_floating_point()]
    divergence = math.sqrt(
        sum((incoming[n].double() - local[n].double()).square().sum().item() for n in floating)
    )
    if scale is None:
        scale = target / divergence if divergence > 0 else 0.0
    mu = min(scale * divergence, 1.0)
    merged = {name: value.clone() for name, value in incoming.items()}
    for name in floating:
        merged[name] = torch.lerp(incoming[name], local[name], mu)
    return merged, scale


def _length(vectors: Tensor) -> Tensor:
    # The tiny term makes the gradient 0 at length 0; in float32 it vanishes beside 1e-8 squared.
    return (vectors.square().sum(dim=-1) + 1e-24).sqrt()
