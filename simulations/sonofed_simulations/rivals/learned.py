"""Strategies that train or fit a model of their own to choose."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from sklearn.mixture import GaussianMixture
from torch import Tensor, nn
from torch.nn.functional import binary_cross_entropy_with_logits, mse_loss

from sonofed_simulations.rivals.pool import Floats, Indices, PerSite, Pool, best

HIDDEN, LATENT = 64, 16
STEPS, BATCH, RATE = 150, 32, 1e-3
SMALLEST_CLASS = 4
"""Images that a mixture of two is fitted to at least."""


class _Encoder(nn.Module):
    def __init__(self, features: int) -> None:
        super().__init__()
        self.encode = nn.Sequential(nn.Linear(features, HIDDEN), nn.ReLU())
        self.mean, self.log_variance = nn.Linear(HIDDEN, LATENT), nn.Linear(HIDDEN, LATENT)
        self.decode = nn.Sequential(
            nn.Linear(LATENT, HIDDEN), nn.ReLU(), nn.Linear(HIDDEN, features)
        )

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Return a drawn latent (B, 16) and the loss of reconstruction and prior."""
        hidden = self.encode(x)
        mean, log_variance = self.mean(hidden), self.log_variance(hidden)
        z = mean + torch.randn_like(mean) * (log_variance / 2).exp()
        prior = 0.5 * (mean.square() + log_variance.exp() - 1 - log_variance).sum(1).mean()
        loss = mse_loss(self.decode(z), x) + prior / x.shape[1]
        return z, loss


@dataclass(frozen=True)
class Vaal(PerSite):
    """What a discriminator tells from labelled images (Sinha et al., ICCV 2019).

    Adapted: a small VAE and discriminator on standardised features of the start model, not on
    images; the first batch, with no labelled image to tell from, is a random one, as in the paper.
    """

    def select(self, pool: Pool, count: int, seed: int) -> Indices:
        """See `Strategy.select`."""
        if not len(pool.labelled):
            return np.random.default_rng(seed).permutation(pool.unlabelled)[:count]
        return best(pool, _strangeness(pool, seed), count, seed)


def _strangeness(pool: Pool, seed: int) -> Floats:
    """How sure the discriminator is that each image (N,) is not labelled."""
    spread = pool.embeddings.std(axis=0) + 1e-6
    x = torch.from_numpy((pool.embeddings - pool.embeddings.mean(axis=0)) / spread).float()
    known, unknown = torch.from_numpy(pool.labelled), torch.from_numpy(pool.unlabelled)
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        encoder = _Encoder(x.shape[1])
        judge = nn.Sequential(nn.Linear(LATENT, HIDDEN), nn.ReLU(), nn.Linear(HIDDEN, 1))
        learns = torch.optim.Adam(encoder.parameters(), RATE)
        judges = torch.optim.Adam(judge.parameters(), RATE)
        truth = torch.cat((torch.ones(BATCH), torch.zeros(BATCH)))
        for _ in range(STEPS):
            drawn = [part[torch.randint(len(part), (BATCH,))] for part in (known, unknown)]
            z, loss = encoder(x[torch.cat(drawn)])
            # The encoder passes all images off as labelled ones.
            fooled = binary_cross_entropy_with_logits(judge(z)[:, 0], torch.ones(2 * BATCH))
            learns.zero_grad()
            (loss + fooled).backward()
            learns.step()
            judged = binary_cross_entropy_with_logits(judge(z.detach())[:, 0], truth)
            judges.zero_grad()
            judged.backward()  # type: ignore[no-untyped-call]
            judges.step()
        with torch.no_grad():
            scores = judge(encoder.mean(encoder.encode(x)))[:, 0]
    return np.asarray(-scores.numpy())


@dataclass(frozen=True)
class LfOSA(PerSite):
    """Images that surely are of a known class (Ning et al., CVPR 2022).

    Adapted: the paper separates known from unknown classes, and its detector learns the unknown
    ones as one more class. A pool of lesions has none, so what applies is the rest: a mixture of
    two Gaussians over the largest logit in each predicted class, and the images of the component
    with the larger mean first. That asks for the images that the model is surest of.
    """

    def select(self, pool: Pool, count: int, seed: int) -> Indices:
        """See `Strategy.select`."""
        largest, predicted = pool.logits.max(axis=1), pool.logits.argmax(axis=1)
        known = np.zeros(len(largest))
        for label in np.unique(predicted):
            members = predicted == label
            if members.sum() < SMALLEST_CLASS or np.ptp(largest[members]) == 0:
                continue
            values = largest[members, None].astype(np.float64)
            mixture = GaussianMixture(2, random_state=seed % 2**32).fit(values)
            known[members] = mixture.predict_proba(values)[:, np.argmax(mixture.means_[:, 0])]
        return best(pool, known, count, seed)
