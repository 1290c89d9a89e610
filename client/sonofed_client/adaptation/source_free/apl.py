"""Adaptive pseudo-labelling, APL (ICASSP 2022)."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Literal

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.functional import interpolate, one_hot

from sonofed_client.adaptation.source_free.self_training import (
    SelfTraining,
    divergence,
    supervision,
)
from sonofed_common.models.segmenter import Segmenter

Relevance = Literal["none", "count", "inverse"]
LEAST_SHARE = 1e-3
"""Smallest share of a class in a prior."""


class APL(SelfTraining):
    """Make the heads consistent and determined, and the encoder follow confident labels.

    Source: adaptive pseudo-labelling for source-free domain adaptive segmentation, ICASSP 2022.
    `inconsistency` (L_con) is minimised over the heads only, on maps that carry no gradient; the
    cross-entropy weighed by `certainty` (L_ssl) over the encoder only, through heads that carry
    none. Ours: labels averaged over an image and its mirror, the optional divergence of the heads
    beside L_con, and the class prior beside each of the two losses. With both losses switched off
    nothing is trained.
    """

    def trained(self, student: Segmenter) -> Iterable[nn.Parameter]:
        """Return what the losses that are switched on train."""
        if self.settings.consistency:
            yield from student.heads.parameters()
        if self.settings.self_training:
            yield from student.encoder.parameters()

    def judge(self, teacher: Segmenter, batch: Tensor) -> tuple[Tensor, Tensor]:
        """Return the classes of largest probability, with flips the mean of image and mirror."""
        p = teacher.probabilities(batch, mirrored=self.facts.flips)
        return p.argmax(dim=1), certainty(p)

    def weigh(self, labels: Tensor, confidence: Tensor) -> Tensor:
        """Return the certainty, or where so set its ratio to the class's mean, 1 at most."""
        if not self.settings.class_mean_confidence:
            return confidence
        return over_class_mean(labels, confidence, self.facts.classes)

    def loss(self, student: Segmenter, batch: Tensor, labels: Tensor, weights: Tensor) -> Tensor:
        """Return L_con over the heads plus L_ssl over the encoder."""
        maps: list[Tensor] = student.encoder(batch)
        size = batch.shape[-1]
        losses: list[Tensor] = []
        if self.settings.consistency:
            main, auxiliary = student.decode([m.detach() for m in maps], size)
            losses.append(
                inconsistency(main.softmax(1), auxiliary.softmax(1), self.settings.relevance)
            )
            if self.settings.disagreement:
                both = divergence(main, auxiliary) + divergence(auxiliary, main)
                losses.append(self.settings.disagreement * both.mean() / 2)
            losses.append(self._prior(main, auxiliary, labels))
        if self.settings.self_training:
            main, auxiliary = frozen_decode(student, maps, size)
            losses.append(supervision((main, auxiliary), labels, weights))
            losses.append(self._prior(main, auxiliary, labels))
        return torch.stack(losses).sum()

    def _prior(self, main: Tensor, auxiliary: Tensor, labels: Tensor) -> Tensor:
        if not self.settings.class_prior:
            return main.new_zeros(())
        shares = ((main.softmax(1) + auxiliary.softmax(1)) / 2).mean(dim=(2, 3))
        if self.settings.prior_shares == "source":
            shares = shares.mean(dim=0, keepdim=True)
            prior = shares.new_tensor(self.facts.class_ratio)[None]
        else:
            prior = one_hot(labels, self.facts.classes).float().mean(dim=(1, 2))
        return self.settings.class_prior * prior_divergence(shares, prior)


def inconsistency(main: Tensor, auxiliary: Tensor, relevance: Relevance = "none") -> Tensor:
    """Mean over images and pixels of L_con = sum over i != j of W_ij p_m^i p_a^j.

    Parameters
    ----------
    main, auxiliary : Tensor (B, C, S, S)
        Class probabilities p_m and p_a.
    relevance : str
        W of each image. ``none``: 1, so that L_con = 1 - <p_m, p_a>. Otherwise from n_ij, the
        number of pixels where the main head's class is i and the auxiliary's j: ``count``, the
        share n_ij / (H W); ``inverse``, 1 / (n_ij + 1) scaled to a mean of 1 over the C x C pairs,
        so that pairs of rare classes are not drowned by background. W carries no gradient.

    Returns
    -------
    Tensor ()
        In [0, 1] for ``none`` and ``count``.
    """
    if relevance == "none":
        return 1 - (main * auxiliary).sum(dim=1).mean()
    classes = main.shape[1]
    # Half precision would round products near 1, whose small distance from it is the loss.
    with torch.autocast(main.device.type, enabled=False):
        p, q = main.flatten(2).float(), auxiliary.flatten(2).float()
        joint = p @ q.transpose(1, 2) / p.shape[-1]
        pairs = p.argmax(dim=1) * classes + q.argmax(dim=1)
        counts = one_hot(pairs, classes**2).sum(dim=1).view(-1, classes, classes).float()
        if relevance == "count":
            weights = counts / p.shape[-1]
        else:
            inverse = 1 / (counts + 1)
            weights = inverse / inverse.mean(dim=(1, 2), keepdim=True)
        apart = 1 - torch.eye(classes, device=p.device)
        return (weights * apart * joint).sum(dim=(1, 2)).mean()


def certainty(probabilities: Tensor) -> Tensor:
    """Largest minus second largest class probability: (B, C, S, S) to (B, S, S) in [0, 1]."""
    top = probabilities.topk(2, dim=1).values
    return top[:, 0] - top[:, 1]


def over_class_mean(labels: Tensor, confidence: Tensor, classes: int) -> Tensor:
    """Divide each pixel's confidence by the mean of its class, at most 1.

    A pixel as sure as its class is on average weighs 1, a background pixel and one of a small
    lesion alike; less sure ones weigh in proportion.

    Parameters
    ----------
    labels, confidence : Tensor (N, S, S)
        Of all images; confidence in [0, 1].
    classes : int
        C.
    """
    weights = torch.zeros_like(confidence)
    for c in range(classes):
        own = labels == c
        if bool(own.any()):
            values = confidence[own]
            weights[own] = (values / values.mean().clamp_min(1e-6)).clamp_max(1)
    return weights


def prior_divergence(shares: Tensor, prior: Tensor) -> Tensor:
    """Mean KL(prior || shares) of expected class shares from predicted ones, both (B, C).

    In this direction it grows without bound as a class vanishes, which is how the heads collapse.
    A prior's share of zero counts as `LEAST_SHARE`: a class missed once must stay learnable.
    """
    expected = prior.clamp_min(LEAST_SHARE)
    expected = expected / expected.sum(dim=1, keepdim=True)
    gap = expected.log() - shares.clamp_min(1e-8).log()
    return (expected * gap).sum(dim=1).mean()


def frozen_decode(model: Segmenter, maps: Sequence[Tensor], size: int) -> tuple[Tensor, Tensor]:
    """Return the logits (B, C, S, S) of both heads, through which only the maps get a gradient."""
    main, auxiliary = (
        interpolate(
            functional_call(head, {n: p.detach() for n, p in head.named_parameters()}, (maps,)),
            (size, size),
            mode="bilinear",
        )
        for head in model.heads
    )
    return main, auxiliary
