"""Scanners: the settings by which hospitals differ."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

Mark = Literal["text", "logo", "ruler", "calipers"]


@dataclass(frozen=True)
class Scanner:
    """One scanner with its probe and its preset.

    Attributes
    ----------
    name : str
        Stands in the device column of a data set.
    frequency_mhz : float
        Centre frequency.
    bandwidth : float
        Full width at half amplitude of the pulse's spectrum, relative to the frequency.
    focus_mm : float
        Depth of the lateral focus.
    f_number : float
        Focal depth over aperture: lateral resolution at the focus is wavelength x f-number.
    depth_mm : float
        Imaging depth.
    width_mm : float
        Width of the probe's face.
    geometry : {"linear", "convex"}
        Parallel beams (a rectangle) or diverging ones (a sector).
    tgc : float
        Attenuation that time-gain compensation assumes, dB / (cm MHz).
    gain_db : float
        Overall gain.
    gain_spread_db : float
        Standard deviation of the gain from image to image: operators turn the knob.
    dynamic_range_db : float
        Span of echoes between black and white.
    gamma : float
        Exponent of the grey map; below 1 lifts dark tissue.
    noise_db : float
        Electronic noise before amplification, dB relative to an unattenuated glandular echo.
    contact_loss : float
        Mean number of shadows cast in an image by air between probe and skin.
    marks : tuple of {"text", "logo", "ruler", "calipers"}
        What is burnt into the image.
    malignant_fraction : float
        Share of malignant patients at the hospital, in (0, 1).
    """

    name: str
    frequency_mhz: float = 10.0
    bandwidth: float = 0.6
    focus_mm: float = 18.0
    f_number: float = 2.0
    depth_mm: float = 38.0
    width_mm: float = 38.0
    geometry: Literal["linear", "convex"] = "linear"
    tgc: float = 0.6
    gain_db: float = 0.0
    gain_spread_db: float = 1.5
    dynamic_range_db: float = 60.0
    gamma: float = 1.0
    noise_db: float = -75.0
    contact_loss: float = 0.05
    marks: tuple[Mark, ...] = ()
    malignant_fraction: float = 0.4


SOURCE = Scanner("source", marks=("ruler",))
"""The scanner of the labelled source data."""

RIVERSIDE = Scanner(
    "riverside",
    frequency_mhz=9.0,
    bandwidth=0.45,
    f_number=2.2,
    depth_mm=50.0,
    width_mm=45.0,
    tgc=0.8,
    gain_db=-2.0,
    gain_spread_db=4.0,
    dynamic_range_db=62.0,
    gamma=0.75,
    noise_db=-50.0,
    contact_loss=1.2,
    marks=("text", "logo", "calipers"),
    malignant_fraction=0.35,
)
HILLVIEW = Scanner(
    "hillview",
    frequency_mhz=13.0,
    bandwidth=0.7,
    focus_mm=12.0,
    f_number=1.6,
    depth_mm=32.0,
    width_mm=38.0,
    tgc=0.72,
    gain_db=-4.0,
    dynamic_range_db=42.0,
    gamma=1.3,
    noise_db=-56.0,
    contact_loss=1.0,
    gain_spread_db=4.0,
    marks=("text", "ruler", "calipers"),
    malignant_fraction=0.5,
)
LAKESIDE = Scanner(
    "lakeside",
    frequency_mhz=7.5,
    bandwidth=0.5,
    focus_mm=25.0,
    f_number=2.4,
    depth_mm=36.0,
    width_mm=26.0,
    geometry="convex",
    tgc=0.75,
    gain_db=0.0,
    dynamic_range_db=46.0,
    noise_db=-48.0,
    contact_loss=1.0,
    gain_spread_db=4.0,
    marks=("logo", "ruler"),
    malignant_fraction=0.3,
)

SCANNERS: dict[str, Scanner] = {
    scanner.name: scanner for scanner in (SOURCE, RIVERSIDE, HILLVIEW, LAKESIDE)
}

_ABDOMINAL_SCALE = 3.0


def abdominal(scanner: Scanner) -> Scanner:
    """Give a scanner an abdominal probe: lower frequency, and all lengths grown as it falls.

    Notes
    -----
    Attenuation goes with frequency times depth and resolution with the wavelength, so the image
    keeps the look that the scanner has on the breast.
    """
    return replace(
        scanner,
        frequency_mhz=scanner.frequency_mhz / _ABDOMINAL_SCALE,
        focus_mm=scanner.focus_mm * _ABDOMINAL_SCALE,
        depth_mm=scanner.depth_mm * _ABDOMINAL_SCALE,
        width_mm=scanner.width_mm * _ABDOMINAL_SCALE,
    )
