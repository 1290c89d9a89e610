"""Canny edge maps: what the ControlNet keeps of an image."""

from __future__ import annotations

from collections.abc import Mapping

import cv2
import numpy as np
import torch
from torch import Tensor

from sonofed_common.contract.errors import ConfigurationError

CANNY: Mapping[str, float] = {"median_blur": 5, "lower": 1.0, "upper": 2.0, "floor": 40}
"""Kernel of the median blur in pixels (odd; in proportion above 128 px), thresholds on OpenCV's
Sobel gradient as multiples of the median grey value, and the least such median (of 255)."""


def canny(images: Tensor, settings: Mapping[str, float] = CANNY) -> Tensor:
    """Canny edges with thresholds from the image itself.

    Parameters
    ----------
    images : Tensor
        (B, 1, S, S), in [0, 1].
    settings : mapping
        As `CANNY`.

    Returns
    -------
    Tensor
        (B, 1, S, S) float32, 0 or 1, on the images' device.

    Raises
    ------
    ConfigurationError
        The settings lack a key of `CANNY`.

    Notes
    -----
    ADAptation (arXiv 2507.00474) publishes no thresholds. The blur comes first because speckle
    floods Canny; the median leaves out black pixels because padding is no tissue.
    """
    if missing := sorted(CANNY.keys() - settings.keys()):
        raise ConfigurationError(f"the Canny settings lack {', '.join(missing)}; add them")
    half = int(settings["median_blur"] * max(1.0, images.shape[-1] / 128)) // 2
    kernel = 2 * half + 1
    grey = (images[:, 0].detach().clamp(0, 1) * 255).round().to(torch.uint8).cpu().numpy()
    edges = np.empty_like(grey)
    for index, image in enumerate(grey):
        blurred = cv2.medianBlur(image, kernel)
        tissue = blurred[blurred > 0]
        median = max(float(np.median(tissue)) if tissue.size else 0.0, settings["floor"])
        edges[index] = cv2.Canny(blurred, settings["lower"] * median, settings["upper"] * median)
    return torch.from_numpy(edges > 0).float().unsqueeze(1).to(images.device)
