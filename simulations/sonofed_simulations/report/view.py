"""Views: what a simulation, which owns all data, can show of a site. A deployment has none."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.floating]


@dataclass(frozen=True)
class SiteView:
    """One site's pool, image by image.

    Attributes
    ----------
    name : str
        The site's name in the results.
    images : ndarray of uint8, (N, S, S)
        The pool's images.
    reconstructions : ndarray of uint8, (N, S, S), or None
        The images redrawn in the source's style.
    features : ndarray, (N, F)
        Backbone features of the images.
    reconstruction_features : ndarray, (N, F), or None
        Backbone features of the reconstructions.
    selected : ndarray of bool, (N,)
        True where the image was chosen for labelling.
    labels : ndarray of int, (N,), or None
        0 benign, 1 malignant.

    Raises
    ------
    ValueError
        Arrays that do not tell of the same number of images.
    """

    name: str
    images: NDArray[np.uint8]
    reconstructions: NDArray[np.uint8] | None
    features: Floats
    reconstruction_features: Floats | None
    selected: NDArray[np.bool_]
    labels: NDArray[np.integer] | None

    def __post_init__(self) -> None:
        count = len(self.images)
        for name, value in vars(self).items():
            if name != "name" and value is not None and len(value) != count:
                raise ValueError(
                    f"the view of site '{self.name}' has {len(value)} rows of '{name}' for "
                    f"{count} images; give one row an image"
                )

    @property
    def chosen(self) -> NDArray[np.intp]:
        """Indices of the chosen images, the most uncertain first where that is known."""
        return self._ordered(self.selected)

    @property
    def left(self) -> NDArray[np.intp]:
        """Indices of the images not chosen, the surest first where that is known."""
        return self._ordered(~self.selected)[::-1]

    def _ordered(self, mask: NDArray[np.bool_]) -> NDArray[np.intp]:
        return np.flatnonzero(mask)


@dataclass(frozen=True)
class ScoredView(SiteView):
    """One site's pool with its dual score.

    Attributes
    ----------
    embeddings : ndarray, (N, d)
        Unit vectors of the hypersphere encoder.
    uncertainty : ndarray, (N,)
        Score u, radians; small is uncertain.
    representativeness : ndarray, (N,)
        Score r, radians; small is close to the source.
    """

    embeddings: Floats
    uncertainty: Floats
    representativeness: Floats

    def _ordered(self, mask: NDArray[np.bool_]) -> NDArray[np.intp]:
        indices = np.flatnonzero(mask)
        return indices[np.argsort(self.uncertainty[indices], kind="stable")]


@dataclass(frozen=True)
class SourceView:
    """The source's training images, as features.

    Attributes
    ----------
    features : ndarray, (M, F)
        Backbone features, from the backbone that gave the sites' features.
    embeddings : ndarray, (M, d), or None
        Unit vectors of the hypersphere encoder.
    """

    features: Floats
    embeddings: Floats | None = None


@dataclass(frozen=True)
class SegmentationView:
    """One site's test images with their masks, as a simulation can show them.

    Attributes
    ----------
    name : str
        The site's name in the results.
    images : ndarray of uint8, (n, S, S)
        All test images, or a subset that was not chosen by how well they went.
    truth, source, ours : ndarray of uint8, (n, S, S)
        Masks, 0 background: the expert's, the source weights' and the result's.
    confidence : ndarray, (n, S, S)
        How sure the result is, in [0, 1].
    weights : ndarray, (K, n, S, S)
        How far each branch was trusted, not negative.
    branches : tuple of str, K
        Names of the branches.
    dice_source, dice_ours : ndarray, (n,)
        Dice of each image; NaN where it is not defined.

    Raises
    ------
    ValueError
        Arrays that do not tell of the same images or branches.
    """

    name: str
    images: NDArray[np.uint8]
    truth: NDArray[np.uint8]
    source: NDArray[np.uint8]
    ours: NDArray[np.uint8]
    confidence: Floats
    weights: Floats
    branches: tuple[str, ...]
    dice_source: Floats
    dice_ours: Floats

    def __post_init__(self) -> None:
        shape = self.images.shape
        needed = {
            **dict.fromkeys(("truth", "source", "ours", "confidence"), shape),
            **dict.fromkeys(("dice_source", "dice_ours"), shape[:1]),
            "weights": (len(self.branches), *shape),
        }
        for name, wanted in needed.items():
            if (found := getattr(self, name).shape) != wanted:
                raise ValueError(
                    f"the view of site '{self.name}' has '{name}' of shape {found}, where its "
                    f"images and branches ask for {wanted}"
                )
