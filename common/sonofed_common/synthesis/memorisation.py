"""The memorisation gate: no synthetic image is released that shows a real patient's image again."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from sklearn.metrics import roc_auc_score
from torch import Tensor
from torch.nn.functional import avg_pool2d, interpolate, normalize, pad

from sonofed_common.contract.errors import ConfigurationError

SIDE = 64
WINDOW = 7
"""Side of the windows of SSIM and of the mean that is taken for shading, pixels."""
STRIDE = 3
QUANTILE = 0.05
MEMBERSHIP = 0.6
"""AUROC of the membership attack that a released set must not surely exceed."""
CERTAINTY = 1.645
"""Standard errors of a one-sided 95% bound."""
COPY = 0.9
"""Correlation of fine detail from which two images count as the same picture."""
COARSE = 4
"""Pixels of those compared that are one coarse pixel: noise in a copy and small shifts go in it."""


class RefusedError(ConfigurationError):
    """Of a synthetic set too little passed the gate, or all of it tells the training images."""


class MemorisationGate:
    """Admits synthetic images that are no nearer to a real one than patients are to each other.

    Parameters
    ----------
    images : Tensor
        (N, 1, S, S) images that the generator was trained on, in [0, 1].
    groups : sequence of str
        The patient, or group of duplicates, of each.

    Attributes
    ----------
    limit, coarse_limit : float
        The 5% quantile, over the real images, of the distance to the nearest one of another group:
        of `dissimilarity`, and of one minus the correlation of coarse pixels.
    nearest : list of float
        Distance of each admitted image to the nearest real one.
    duplicates : int
        Images that were refused for nearness to an admitted one alone.

    Raises
    ------
    RefusedError
        All images are of one group.

    Notes
    -----
    The distance is `dissimilarity`. An image is refused where its distance to the nearest real
    image, or to one that was admitted before, is below the limit, and where its fine detail
    correlates with either by `COPY` or more. It is refused, too, where its coarse pixels, shifted
    by one at most, are nearer to a real image's than the coarse limit: structure, which SSIM looks
    at, tells nothing about copies with noise. Real images of which one is a copy of the other in
    detail count as of one group: they would else pull the limits down to where copies pass. A
    threshold from the real images' own nearest distances is in the spirit of Carlini et al. 2023,
    "Extracting training data from diffusion models". Rotated and cropped copies are not sought: the
    generator sees neither.
    """

    def __init__(self, images: Tensor, groups: Sequence[str]) -> None:
        number = {group: n for n, group in enumerate(dict.fromkeys(groups))}
        of = torch.tensor([number[group] for group in groups])
        self._known = _Known.of(_shrunk(images))
        real = self._known.images
        self._details = _detail(real)
        alike = (of[:, None] == of) | (_likeness(real, self._details) >= COPY)
        if bool(alike.all()):
            raise RefusedError(
                "the memorisation gate needs training images of at least two patients; add images "
                "or do without synthetic images"
            )
        self._coarse = _shifted(real)
        self.limit = _nearest_others(_distances(real, self._known), alike)
        self.coarse_limit = _nearest_others(_coarse_distances(real, self._coarse), alike)
        self.nearest: list[float] = []
        self.duplicates = 0

    def admit(self, image: Tensor) -> bool:
        """Judge one image (1, S, S) in [0, 1]; an admitted one is remembered."""
        small = _shrunk(image[None])
        distances = _distances(small, self._known)[0]
        likeness = _likeness(small, self._details)[0]
        real = len(self._known.images) - len(self.nearest)
        # So that what is not a number does not fit.
        fits = (distances >= self.limit) & (likeness < COPY)
        fits[:real] &= _coarse_distances(small, self._coarse)[0] >= self.coarse_limit
        if not bool(fits.all()):
            self.duplicates += bool(fits[:real].all())
            return False
        self.nearest.append(float(distances[:real].min()))
        self._known = self._known.joined(_Known.of(small))
        self._details = torch.cat((self._details, _detail(small)))
        return True


def membership_auroc(training: Tensor, held_out: Tensor, synthetic: Tensor) -> float:
    """How well nearness to synthetic images tells training images from unseen ones.

    Parameters
    ----------
    training, held_out, synthetic : Tensor
        (N, 1, S, S), (M, 1, S, S) and (K, 1, S, S), in [0, 1], none empty.

    Returns
    -------
    float
        AUROC in [0, 1] of the membership inference attack of Hilprecht et al. 2019 (nearest
        synthetic image): 0.5 tells an attacker nothing.
    """
    both = torch.cat((training, held_out))
    nearness = -dissimilarity(both, synthetic).amin(1)
    member = torch.arange(len(both)) < len(training)
    return float(roc_auc_score(member.numpy(), nearness.numpy()))


def tells_members(auroc: float, members: int, others: int) -> bool:
    """Whether an attack's AUROC is above `MEMBERSHIP` by more than chance would have it.

    Parameters
    ----------
    auroc : float
        From `membership_auroc`.
    members, others : int
        Training images and unseen ones that it was measured on. The standard error is the one
        where both are alike, ``sqrt((n + m + 1) / 12 n m)``: a perfect score on few is no proof.
    """
    error = math.sqrt((members + others + 1) / (12 * members * others))
    return auroc - CERTAINTY * error > MEMBERSHIP


def dissimilarity(images: Tensor, others: Tensor) -> Tensor:
    """One minus the mean SSIM (Wang et al. 2004) with the nearer of both mirror images.

    Parameters
    ----------
    images, others : Tensor
        (N, 1, S, S) and (M, 1, S, S), in [0, 1]; they are compared at 64 px or less.

    Returns
    -------
    Tensor
        (N, M), in [0, 2]; 0 for equal images. Windows are uniform, 7 x 7, and 3 px apart.
    """
    return _distances(_shrunk(images), _Known.of(_shrunk(others)))


@dataclass(frozen=True)
class _Known:
    """Images with their local means and mean squares, which every comparison needs."""

    images: Tensor
    mean: Tensor
    square: Tensor

    @classmethod
    def of(cls, images: Tensor) -> _Known:
        return cls(images, _local_mean(images), _local_mean(images * images))

    def joined(self, other: _Known) -> _Known:
        return _Known(
            torch.cat((self.images, other.images)),
            torch.cat((self.mean, other.mean)),
            torch.cat((self.square, other.square)),
        )


def _distances(images: Tensor, known: _Known) -> Tensor:
    rows = []
    for image in images:
        similar = [_ssim(view, _local_mean(view), known) for view in (image, image.flip(-1))]
        rows.append(1 - torch.maximum(*similar))
    return torch.stack(rows) if rows else torch.empty(0, len(known.images))


def _ssim(image: Tensor, own: Tensor, known: _Known) -> Tensor:
    product = own * known.mean
    covariance = _local_mean(image * known.images) - product
    energy = own * own + known.mean * known.mean
    variances = _local_mean(image * image) + known.square - energy
    light, contrast = 0.01**2, 0.03**2
    quotient = (2 * product + light) * (2 * covariance + contrast)
    return (quotient / ((energy + light) * (variances + contrast))).mean((1, 2, 3))


def _detail(images: Tensor) -> Tensor:
    shading = avg_pool2d(images, WINDOW, 1, WINDOW // 2, count_include_pad=False)
    return normalize((images - shading).flatten(1), dim=1)


def _likeness(images: Tensor, details: Tensor) -> Tensor:
    """Correlation (N, M) of fine detail, of the nearer of both mirror images."""
    return torch.maximum(*(_detail(view) @ details.T for view in (images, images.flip(-1))))


def _coarse_distances(images: Tensor, shifted: Tensor) -> Tensor:
    """One minus the correlation (N, M) of coarse pixels, of the nearest mirror image and shift."""
    views = [_coarse(view) for view in (images, images.flip(-1))]
    return 1 - torch.stack([view @ other.T for view in views for other in shifted]).amax(0)


def _shifted(images: Tensor) -> Tensor:
    """Coarse pixels (25, N, P) of images, shifted by up to one in each direction, in halves."""
    padded, size = pad(images, (COARSE,) * 4, mode="replicate"), images.shape[-1]
    steps = range(0, 2 * COARSE + 1, COARSE // 2)
    places = [(y, x) for y in steps for x in steps]
    return torch.stack([_coarse(padded[..., y : y + size, x : x + size]) for y, x in places])


def _coarse(images: Tensor) -> Tensor:
    pixels = interpolate(images, max(1, images.shape[-1] // COARSE), mode="area").flatten(1)
    return normalize(pixels - pixels.mean(1, keepdim=True), dim=1)


def _nearest_others(distances: Tensor, alike: Tensor) -> float:
    nearest = distances.masked_fill(alike, torch.inf).amin(1)
    # An image that is a copy of all others has none.
    return float(nearest[nearest.isfinite()].quantile(QUANTILE))


def _shrunk(images: Tensor) -> Tensor:
    return interpolate(images, SIDE, mode="area") if images.shape[-1] > SIDE else images


def _local_mean(images: Tensor) -> Tensor:
    return avg_pool2d(images, WINDOW, STRIDE)
