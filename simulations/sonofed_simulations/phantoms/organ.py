"""The shape of an organ: a bent, tapered ellipse with lobes and a hilum."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from sonofed_simulations.phantoms.tissue import Floats

ANGLES = np.linspace(-np.pi, np.pi, 181)


@dataclass(frozen=True)
class Organ:
    """One organ of one patient.

    Attributes
    ----------
    number : int
        Class in the mask, at least 1.
    x_mm, z_mm : float
        Centre: lateral position and depth.
    length_mm, width_mm : float
        Half axes.
    tilt : float
        Rotation of the long axis in radians, positive to greater depth on the right.
    bend : float
        How far the ends of the long axis are bent to greater depth, in half widths.
    taper : float
        Relative loss of width towards the right end, in (-1, 1).
    outline : ndarray of float64, shape (181,)
        Relative radius over angles from -pi to pi.
    echogenicity_db : float
        Echogenicity of the parenchyma, dB relative to glandular tissue.
    attenuation : float
        One-way attenuation, dB / (cm MHz).
    """

    number: int
    x_mm: float
    z_mm: float
    length_mm: float
    width_mm: float
    tilt: float
    bend: float
    taper: float
    outline: NDArray[np.float64]
    echogenicity_db: float
    attenuation: float

    def polar(self, x: Floats, z: Floats) -> tuple[Floats, Floats]:
        """Relative distance from the centre, 1 on the surface, and the angle in the organ's frame.

        Parameters
        ----------
        x, z : ndarray of float32
            Lateral position and depth, mm.
        """
        lateral, axial = x - np.float32(self.x_mm), z - np.float32(self.z_mm)
        cosine, sine = np.float32(np.cos(self.tilt)), np.float32(np.sin(self.tilt))
        along = (cosine * lateral + sine * axial) / np.float32(self.length_mm)
        across = (cosine * axial - sine * lateral) / np.float32(self.width_mm)
        narrowed = 1 - np.float32(self.taper) * np.clip(along, -1, 1)
        across = (across - np.float32(self.bend) * along**2) / narrowed
        angle = np.arctan2(across, along)
        distance = np.hypot(along, across) / np.interp(angle, ANGLES, self.outline)
        return distance.astype(np.float32), angle


def draw_outline(rng: np.random.Generator, lobes: float, hilum: float = 0.0) -> NDArray[np.float64]:
    """Draw a smooth outline.

    Parameters
    ----------
    rng : numpy.random.Generator
        Draws amplitudes of the waves.
    lobes : float
        Standard deviation of the relative radius.
    hilum : float
        Depth of the notch in the deep side, relative to the radius.
    """
    waves = np.arange(2, 5)
    weights = rng.normal(0, lobes, (2, 3)) / waves
    angles = ANGLES[:, None] * waves
    undulation = (weights[0] * np.cos(angles) + weights[1] * np.sin(angles)).sum(1)
    notch = hilum * np.exp(-(((ANGLES - np.pi / 2) / 0.35) ** 2))
    return np.asarray(np.clip(1 + undulation - notch, 0.5, 1.5))
