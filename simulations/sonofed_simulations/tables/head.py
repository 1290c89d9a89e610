"""Fine-tuning of the linear head alone, on cached features: federated averaging in seconds."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, dropout

from sonofed_client.adaptation.finetuning import class_weights
from sonofed_common.contract.study import Finetuning
from sonofed_common.runtime import derive_seed
from sonofed_common.training import Training, fit

SETTINGS = {"rounds", "local_epochs", "learning_rate", "batch_size", "balanced"}
"""Of `Finetuning`: what `train_head` reads."""
Head = Mapping[str, Tensor]
"""State of the linear layer: ``weight`` (C, F) and ``bias`` (C,)."""


@dataclass(frozen=True)
class Labelled:
    """A site's labelled images.

    Attributes
    ----------
    site : str
        Its name.
    views : Tensor of float32 (K, n, F)
        Features of the images, one row of each augmentation.
    labels : Tensor of int64 (n,)
        Their classes.
    """

    site: str
    views: Tensor
    labels: Tensor


def train_head(
    start: Head, sites: Sequence[Labelled], settings: Finetuning, share_dropped: float, seed: int
) -> Head:
    """Train a head by federated averaging over sites, from the start weights.

    Parameters
    ----------
    start : mapping of str to Tensor
        State of the source's head.
    sites : sequence of Labelled
        Sites without a label are passed over; one site alone trains centrally.
    settings : Finetuning
        Rounds, local epochs, step size, batch and class balance of a study.
    share_dropped : float
        Dropout of the features before the head.
    seed : int
        Of the order, the augmentations and the dropout; the same for all strategies.
    """
    head = {name: tensor.clone() for name, tensor in start.items()}
    trained = [site for site in sites if len(site.labels)]
    total = sum(len(site.labels) for site in trained)
    for number in range(settings.rounds if trained else 0):
        heads = [_round(head, site, settings, share_dropped, number, seed) for site in trained]
        shares = [len(site.labels) / total for site in trained]
        head = {
            name: torch.stack([h[name] * w for h, w in zip(heads, shares, strict=True)]).sum(0)
            for name in head
        }
    return head


def _round(
    head: Head, site: Labelled, settings: Finetuning, share_dropped: float, number: int, seed: int
) -> Head:
    layer = _layer(head)
    weights = class_weights(site.labels) if settings.balanced else torch.ones(len(site.labels))
    own = derive_seed(seed, site.site, number)

    def loss_of_batch(indices: Tensor) -> Tensor:
        # From the global generator, which `fit` seeds before every epoch.
        view = torch.randint(len(site.views), (len(indices),))
        shown = dropout(site.views[view, indices], share_dropped)
        losses = cross_entropy(layer(shown), site.labels[indices], reduction="none")
        return (losses * weights[indices]).mean()

    training = Training(
        epochs=settings.local_epochs,
        learning_rate=settings.learning_rate,
        batch_size=settings.batch_size,
        seed=own,
        first_epoch=number * settings.local_epochs,
        last_epoch=settings.rounds * settings.local_epochs,
    )
    fit(layer, len(site.labels), loss_of_batch, training, task="fine-tuning of the head")
    return {name: tensor.detach() for name, tensor in layer.state_dict().items()}


def logits(head: Head, features: np.ndarray) -> np.ndarray:
    """Logits (N, C) of features (N, F)."""
    with torch.inference_mode():
        return np.asarray(_layer(head)(torch.from_numpy(features)).numpy())


def dropout_passes(
    head: Head, features: np.ndarray, share_dropped: float, passes: int, seed: int
) -> np.ndarray:
    """Class probabilities (T, N, C) under draws of dropout before the head.

    A draw is one of the weights: it drops the same features of all images, whichever site's.
    """
    layer, x = _layer(head), torch.from_numpy(features)
    with torch.random.fork_rng(), torch.inference_mode():
        torch.manual_seed(seed)
        kept = dropout(torch.ones(passes, x.shape[1]), share_dropped)
        drawn = [layer(x * mask).softmax(1) for mask in kept]
    return np.asarray(torch.stack(drawn).numpy())


def _layer(head: Head) -> nn.Linear:
    classes, features = head["weight"].shape
    # On the meta device no random weights are drawn, so nothing global is touched.
    layer = nn.Linear(features, classes, device="meta").to_empty(device="cpu")
    layer.load_state_dict(dict(head))
    return layer
