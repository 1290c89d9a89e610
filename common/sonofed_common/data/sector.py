"""The ultrasound sector of an image: where there is signal, not padding or black borders."""

from __future__ import annotations

import cv2
import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

SMOOTHING = 1 / 128
"""Standard deviation of the Gaussian that quiets speckle, as a share of the side."""
SIGNAL = 0.02
"""Least smoothed grey value of the sector: black borders carry compression noise below it."""
CLOSING = 1 / 16
"""Width of the gaps that are closed, as a share of the side."""
LEAST_PART = 0.1
"""Parts below this share of the largest are text and marks beside the sector; a larger one is a
piece of the sector that a deep shadow cuts off."""


def sectors(images: Tensor) -> Tensor:
    """Find the ultrasound sector of each image.

    Parameters
    ----------
    images : Tensor of float (N, 1, S, S)
        In [0, 1].

    Returns
    -------
    Tensor of bool (N, 1, S, S)
        True inside: the convex hull of the pixels with signal, so that shadows, which reach the
        lower border of the sector, stay inside. Of a curved array's sector the hull also holds the
        thin segment above the near field. A wholly black image has no sector: True everywhere.
    """
    found = torch.empty(images.shape, dtype=torch.bool)
    for position, image in enumerate(images[:, 0].float().cpu().numpy()):
        found[position, 0] = torch.from_numpy(_sector(image))
    return found.to(images.device)


def _sector(image: NDArray[np.float32]) -> NDArray[np.bool_]:
    side = max(image.shape)
    smooth = cv2.GaussianBlur(image, (0, 0), max(0.5, side * SMOOTHING))
    signal = (smooth > SIGNAL).astype(np.uint8)
    width = max(3, round(side * CLOSING))
    kernel = cv2.getStructuringElement(cv2.MORPH_ELLIPSE, (width, width))
    closed = cv2.morphologyEx(signal, cv2.MORPH_CLOSE, kernel)
    _, labels, statistics, _ = cv2.connectedComponentsWithStats(closed)
    areas = statistics[1:, cv2.CC_STAT_AREA]
    if not len(areas):
        return np.ones(image.shape, dtype=np.bool_)
    parts = 1 + np.flatnonzero(areas >= LEAST_PART * areas.max())
    points = cv2.findNonZero(np.isin(labels, parts).astype(np.uint8))
    hull = cv2.fillConvexPoly(np.zeros(image.shape, np.uint8), cv2.convexHull(points), 1)
    return np.asarray(hull, dtype=np.bool_)
