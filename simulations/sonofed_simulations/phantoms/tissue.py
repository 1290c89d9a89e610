"""What every organ gives to the acoustics: maps of tissue on any grid of positions."""

from __future__ import annotations

from dataclasses import dataclass

import cv2
import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float32]


@dataclass(frozen=True)
class TissueMap:
    """Acoustic properties at the points of a beam grid.

    Attributes
    ----------
    echogenicity_db : ndarray of float32, shape (D, L)
        Mean backscattered amplitude, dB relative to glandular tissue.
    attenuation : ndarray of float32, shape (D, L)
        One-way attenuation, dB / (cm MHz).
    classes : ndarray of uint8, shape (D, L)
        0 outside, else the number of the lesion or organ that lies there.
    """

    echogenicity_db: Floats
    attenuation: Floats
    classes: NDArray[np.uint8]


class WavyLine:
    """A boundary between layers: depth in mm as a function of lateral position.

    Parameters
    ----------
    rng : numpy.random.Generator
        Draws wavelengths (15 to 80 mm) and phases.
    depth_mm, amplitude_mm : float
        Mean depth, and the standard deviation of the undulation.
    """

    def __init__(self, rng: np.random.Generator, depth_mm: float, amplitude_mm: float) -> None:
        self._x = np.linspace(-80, 80, 321, dtype=np.float32)
        waves = 2 * np.pi / rng.uniform(15, 80, 4)
        phases = rng.uniform(0, 2 * np.pi, 4)
        undulation = np.sin(self._x[:, None] * waves + phases).sum(1) / np.sqrt(2)
        self._depth = (depth_mm + amplitude_mm * undulation).astype(np.float32)

    def __call__(self, x: Floats) -> Floats:
        """Depth in mm of the boundary at lateral positions ``x`` in mm."""
        return np.asarray(np.interp(x, self._x, self._depth), dtype=np.float32)


class Texture:
    """A smooth random field of unit variance over the plane, periodic every 32 cells.

    Parameters
    ----------
    rng : numpy.random.Generator
        Draws the field.
    lateral_mm, axial_mm : float
        Correlation lengths.
    """

    def __init__(self, rng: np.random.Generator, lateral_mm: float, axial_mm: float) -> None:
        # 1.46 undoes the variance that bilinear interpolation loses, averaged over a cell.
        self._table = 1.46 * rng.standard_normal((32, 32)).astype(np.float32)
        self._scale = np.float32(1 / lateral_mm), np.float32(1 / axial_mm)

    def __call__(self, x: Floats, z: Floats) -> Floats:
        """Value of the field at positions ``x`` (lateral) and ``z`` (depth), both in mm."""
        return np.asarray(
            cv2.remap(
                self._table,
                x * self._scale[0] + 16,
                z * self._scale[1],
                cv2.INTER_LINEAR,
                borderMode=cv2.BORDER_WRAP,
            ),
            dtype=np.float32,
        )
