"""A site's part of a round under each aggregation strategy."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from torch import Tensor, nn

from sonofed_client.adaptation.drift import (
    Variate,
    next_variate,
    proximal,
    scaffold,
    trained,
    zeros,
)
from sonofed_client.adaptation.finetuning import finetune_round, mean_loss
from sonofed_common.contract.names import RECEIVED_LOSS, TRAINED_LOSS
from sonofed_common.contract.study import Aggregation, Finetuning
from sonofed_common.runtime import SILENT, Events


@dataclass(frozen=True)
class Update:
    """What a round brings beside the weights.

    Attributes
    ----------
    metrics : dict of str to float
        ``loss`` and, for feddg_ga, the losses before and after.
    variate : dict of str to Tensor
        For scaffold the site's next control variate, which stays there; else empty.
    change : dict of str to Tensor
        That less the one before, which leaves.
    """

    metrics: dict[str, float]
    variate: dict[str, Tensor]
    change: dict[str, Tensor]


def local_round(
    model: nn.Module,
    images: Tensor,
    labels: Tensor,
    settings: Finetuning,
    aggregation: Aggregation,
    round: int,
    seed: int,
    common: Variate | None = None,
    own: Variate | None = None,
    events: Events = SILENT,
    replay: tuple[Tensor, Tensor] | None = None,
    checkpoint: Path | None = None,
) -> Update:
    """Train a classifier in place for one round, as the study's aggregation asks of a site.

    Parameters
    ----------
    model, images, labels, settings, round, seed, events, replay, checkpoint
        As of `finetune_round`; there is one image at least.
    aggregation : Aggregation
        The study's.
    common, own : mapping of str to Tensor, optional
        The sites' mean control variate and this site's, for scaffold; default 0.

    Raises
    ------
    DivergenceError
        A loss or weight is not finite.
    """
    strategy, correct, variates = aggregation.strategy, None, None
    if strategy == "fedprox":
        correct = proximal(model, aggregation.proximal_weight)
    elif strategy == "scaffold":
        variates = common or zeros(model), own or zeros(model)
        correct = scaffold(model, *variates)
    start = trained(model) if variates else {}
    metrics: dict[str, float] = {}
    if strategy == "feddg_ga":
        metrics[RECEIVED_LOSS] = mean_loss(model, images, labels, settings.balanced)
    report = finetune_round(
        model, images, labels, settings, round, seed, events, replay, checkpoint, correct
    )
    metrics["loss"] = report["loss"]
    if strategy == "feddg_ga":
        metrics[TRAINED_LOSS] = mean_loss(model, images, labels, settings.balanced)
    if variates is None:
        return Update(metrics, {}, {})
    after = next_variate(*variates, start, trained(model), report["total_rate"])
    return Update(metrics, after, {name: after[name] - variates[1][name] for name in after})
