"""The dual score of ADAptation (arXiv 2507.00474, Eq. 4): angles on the hypersphere."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

_LARGEST = 3.1415925
"""The largest float32 that does not exceed pi."""


def angles(z: Tensor, centroids: Tensor) -> Tensor:
    """Angle between every embedding and every centroid.

    Parameters
    ----------
    z : Tensor (N, d)
        Unit vectors.
    centroids : Tensor (k, d)
        Unit vectors.

    Returns
    -------
    Tensor of float32 (N, k)
        Radians in [0, pi].
    """
    return _round(_pairwise(z, centroids))


def uncertainty(
    z: Tensor, centroids: Tensor, kind: Literal["range", "margin", "min_pair"] = "margin"
) -> Tensor:
    """How undecided an image is between clusters; small is uncertain.

    Parameters
    ----------
    z : Tensor (N, d)
        Unit vectors.
    centroids : Tensor (k, d)
        At least two unit vectors.
    kind : str
        ``range``: largest minus smallest angle (the paper's text). ``margin``: second smallest
        minus smallest. ``min_pair``: smallest difference of any two angles (Eq. 4 to the letter).

    Returns
    -------
    Tensor of float32 (N,)
        Radians in [0, pi].
    """
    ordered = _pairwise(z, centroids).sort(dim=1).values
    if kind == "range":
        return _round(ordered[:, -1] - ordered[:, 0])
    if kind == "margin":
        return _round(ordered[:, 1] - ordered[:, 0])
    return _round((ordered[:, 1:] - ordered[:, :-1]).amin(dim=1))


def representativeness(z: Tensor, z_reconstruction: Tensor) -> Tensor:
    """Angle between an image's embedding and its reconstruction's.

    Parameters
    ----------
    z, z_reconstruction : Tensor (N, d)
        Unit vectors.

    Returns
    -------
    Tensor of float32 (N,)
        Radians in [0, pi]; small is source-like.
    """
    return _round(_angle(z.double(), z_reconstruction.double()))


def distance_to_centroids(z: Tensor, source_centroids: Tensor) -> Tensor:
    """Angle to the nearest source centroid: r where there is no reconstruction.

    Parameters
    ----------
    z : Tensor (N, d)
        Unit vectors.
    source_centroids : Tensor (k, d)
        Unit vectors that came with the bundle.

    Returns
    -------
    Tensor of float32 (N,)
        Radians in [0, pi]; small is source-like.
    """
    return _round(_pairwise(z, source_centroids).amin(dim=1))


def _pairwise(z: Tensor, centroids: Tensor) -> Tensor:
    # One centroid at a time: (N, k, d) in float64 would not fit for a large archive.
    columns = [_angle(z.double(), centroid.double().expand_as(z)) for centroid in centroids]
    return torch.stack(columns, dim=1)


def _angle(a: Tensor, b: Tensor) -> Tensor:
    """Angle by Kahan's formula: exact near 0 and pi, where arccos loses half the digits."""
    return 2 * torch.atan2((a - b).norm(dim=1), (a + b).norm(dim=1))


def _round(radians: Tensor) -> Tensor:
    return radians.float().clamp(0.0, _LARGEST)
