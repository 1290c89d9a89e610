"""Breast lesions: shape, margin and acoustics, with overlap between the two classes."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from sonofed_simulations.phantoms.tissue import Floats

_ANGLES = np.linspace(-np.pi, np.pi, 361)


@dataclass(frozen=True)
class Lesion:
    """One lesion, drawn once for a patient and seen in each of the patient's views.

    Attributes
    ----------
    x_mm, z_mm : float
        Centre: lateral position and depth.
    radius_mm : float
        Radius of the disc of equal area.
    elongation : float
        Height over width; above 1 is taller than wide.
    tilt : float
        Rotation in radians.
    outline : ndarray of float64, shape (361,)
        Relative radius over angles from -pi to pi, mean near 1: lobulation and spicules.
    softness : float
        Width of the margin relative to the radius.
    echogenicity_db : float
        Echogenicity inside, dB relative to glandular tissue.
    heterogeneity_db : float
        Standard deviation of the echogenicity inside, dB.
    attenuation : float
        One-way attenuation inside, dB / (cm MHz); below the tissue's it gives posterior
        enhancement, above it a shadow.
    halo_db : float
        Echogenicity gained by the rim outside the margin, dB.
    """

    x_mm: float
    z_mm: float
    radius_mm: float
    elongation: float
    tilt: float
    outline: NDArray[np.float64]
    softness: float
    echogenicity_db: float
    heterogeneity_db: float
    attenuation: float
    halo_db: float

    def distance(self, x: Floats, z: Floats) -> Floats:
        """Distance from the centre over the outline's radius in that direction: 1 on the margin.

        Parameters
        ----------
        x, z : ndarray of float32
            Lateral position and depth, mm.
        """
        lateral, axial = x - np.float32(self.x_mm), z - np.float32(self.z_mm)
        cosine, sine = np.float32(np.cos(self.tilt)), np.float32(np.sin(self.tilt))
        stretch = np.float32(np.sqrt(self.elongation))
        across = (cosine * lateral + sine * axial) * stretch
        along = (cosine * axial - sine * lateral) / stretch
        outline = np.interp(np.arctan2(along, across), _ANGLES, self.outline)
        distance = np.hypot(across, along) / (self.radius_mm * outline)
        return np.asarray(distance, dtype=np.float32)


def draw_lesion(rng: np.random.Generator, malignant: bool) -> Lesion:
    """Draw a lesion; every feature is drawn apart, from distributions that overlap.

    Parameters
    ----------
    rng : numpy.random.Generator
        Source of every draw.
    malignant : bool
        Malignant lesions tend to be taller than wide, irregular or spiculated, indistinct,
        heterogeneous and attenuating; benign ones oval, smooth and enhancing.

    Notes
    -----
    Which features differ, and in which direction, follows the descriptors of the BI-RADS
    ultrasound lexicon (Mendelson et al. 2013). The size of each difference is ours.
    """

    def feature(benign: float, malignant_: float, spread: float, low: float, high: float) -> float:
        mean = malignant_ if malignant else benign
        return float(np.clip(rng.normal(mean, spread), low, high))

    irregularity = feature(0.03, 0.11, 0.05, 0.01, 0.26)
    spiculation = feature(-0.12, 0.22, 0.18, 0.0, 0.6)
    return Lesion(
        x_mm=float(rng.uniform(-7, 7)),
        z_mm=float(rng.uniform(14, 20)),
        radius_mm=feature(6.2, 6.8, 1.4, 3.8, 9.5),
        elongation=feature(0.64, 0.97, 0.2, 0.4, 1.6),
        tilt=float(rng.normal(0, 0.15)),
        outline=_outline(rng, irregularity, spiculation),
        softness=feature(0.05, 0.13, 0.05, 0.02, 0.3),
        echogenicity_db=feature(-15, -17, 3, -24, -8),
        heterogeneity_db=feature(1.0, 2.5, 0.8, 0.2, 5),
        attenuation=feature(0.35, 1.05, 0.4, 0.02, 2.2),
        halo_db=feature(-2, 4, 3, 0, 10),
    )


def _outline(
    rng: np.random.Generator, irregularity: float, spiculation: float
) -> NDArray[np.float64]:
    harmonics = np.arange(2, 8)
    weights = rng.normal(0, 1, (2, 6)) / np.sqrt(harmonics)
    angles = _ANGLES[:, None] * harmonics
    lobes = (weights[0] * np.cos(angles) + weights[1] * np.sin(angles)).sum(1)
    spikes = np.zeros_like(_ANGLES)
    for centre in rng.uniform(-np.pi, np.pi, int(rng.integers(5, 12))):
        gap = np.angle(np.exp(1j * (_ANGLES - centre)))
        spikes += rng.uniform(0.4, 1.2) * np.exp(-np.abs(gap) / 0.12)
    return np.asarray(np.clip(1 + irregularity * lobes + spiculation * spikes, 0.5, 2.0))
