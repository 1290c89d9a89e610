"""The lesion's own view: a square around what a segmenter outlines, cut out of a larger image."""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray
from scipy import ndimage
from torch import Tensor
from torch.nn.functional import affine_grid, grid_sample

MARGIN = 1.5
"""Side of the square, in longer sides of the lesion: what surrounds it tells of it, too."""
LEAST = 0.15
"""Smallest side of the square, as a share of the image's."""
BATCH = 64
ENLARGED = 2
"""Side of the image that it is cut from, in sides of what a network sees."""


def lesion_boxes(foreground: Tensor) -> Tensor:
    """Find a square around the largest lesion of each image.

    Parameters
    ----------
    foreground : Tensor (N, S, S)
        Probability of lesion, or a mask of 0 and 1.

    Returns
    -------
    Tensor of float32 (N, 3)
        Centre x, centre y and side, as shares of the image's side, from its upper left corner. The
        whole image where nothing exceeds one half.
    """
    boxes = [_box(image) for image in foreground.double().cpu().numpy()]
    return torch.tensor(boxes, dtype=torch.float32).reshape(-1, 3)


def cut_out(images: Tensor, boxes: Tensor, size: int) -> Tensor:
    """Cut squares out of images, and bring them to one size.

    Parameters
    ----------
    images : Tensor (N, 1, L, L)
        In [0, 1]; larger than what is wanted of them, see `ENLARGED`.
    boxes : Tensor (N, 3)
        From `lesion_boxes`, of the same images at any size.
    size : int
        S, pixels.

    Returns
    -------
    Tensor of float32 (N, 1, S, S)
        In [0, 1]; zeros beyond the image.
    """
    theta = torch.zeros(len(images), 2, 3)
    theta[:, 0, 0] = theta[:, 1, 1] = boxes[:, 2]
    theta[:, :, 2] = 2 * boxes[:, :2] - 1
    grid = affine_grid(theta, [len(images), 1, size, size], align_corners=False)
    cut = grid_sample(images.float(), grid, "bilinear", "zeros", align_corners=False)
    return cut.clamp_(0, 1)


def with_lesions(images: Tensor, larger: Tensor, boxes: Tensor) -> Tensor:
    """Put each image's lesion beside it.

    Parameters
    ----------
    images : Tensor (N, 1, S, S)
        In [0, 1].
    larger : Tensor (N, 1, L, L)
        What lesions are cut from: the same images.
    boxes : Tensor (N, 3)
        From `lesion_boxes`.

    Returns
    -------
    Tensor of float32 (N, 2, S, S)
        In [0, 1].
    """
    parts = torch.split(torch.arange(len(images)), BATCH)
    lesions = [cut_out(larger[n], boxes[n], images.shape[-1]) for n in parts]
    return torch.cat([images, torch.cat(lesions) if lesions else images], dim=1)


def _box(foreground: NDArray[np.float64]) -> tuple[float, float, float]:
    parts, count = ndimage.label(foreground > 0.5)
    if count == 0:
        return 0.5, 0.5, 1.0
    weights = ndimage.sum(foreground, parts, range(1, count + 1))
    rows, columns = np.nonzero(parts == 1 + int(np.argmax(weights)))
    side = len(foreground)
    (top, bottom), (left, right) = ((v.min(), v.max() + 1) for v in (rows, columns))
    longer = max(bottom - top, right - left) / side
    return (
        float(left + right) / 2 / side,
        float(top + bottom) / 2 / side,
        min(max(MARGIN * float(longer), LEAST), 1.0),
    )
