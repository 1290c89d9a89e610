"""From tissue to echoes: attenuation, speckle, resolution, amplification, compression."""

from __future__ import annotations

import numpy as np
from scipy import fft

from sonofed_simulations.phantoms.scanner import Scanner
from sonofed_simulations.phantoms.tissue import Floats, TissueMap

_SOUND_MM_PER_US = 1.54
_HEADROOM_DB = 18.0
_FWHM = 2 * np.sqrt(2 * np.log(2))


def axial_sigma_mm(scanner: Scanner) -> float:
    """Standard deviation in depth of a Gaussian pulse's echo, mm.

    The spectrum's standard deviation is its full width at half amplitude over 2.355; its
    Fourier pair gives the pulse's length in time, and sound goes there and back.
    """
    spectrum = scanner.bandwidth * scanner.frequency_mhz / _FWHM
    return float(_SOUND_MM_PER_US / 2 / (2 * np.pi * spectrum))


def lateral_sigma_mm(scanner: Scanner, depth_mm: Floats) -> Floats:
    """Standard deviation across the beam at each depth, mm.

    Parameters
    ----------
    scanner : Scanner
        Gives wavelength, f-number and focus.
    depth_mm : ndarray of float32, shape (D,)
        Depths.

    Notes
    -----
    A Gaussian beam: full width at half maximum of wavelength x f-number at the focus, growing
    as a hyperbola with half the usual depth of field, 4 wavelength x f-number^2 (Szabo,
    Diagnostic Ultrasound Imaging, 2014).
    """
    wavelength = _SOUND_MM_PER_US / scanner.frequency_mhz
    waist = wavelength * scanner.f_number / _FWHM
    spread = (depth_mm - scanner.focus_mm) / (4 * wavelength * scanner.f_number**2)
    return np.asarray(waist * np.sqrt(1 + spread**2), dtype=np.float32)


def attenuation_db(tissue: TissueMap, scanner: Scanner, step_mm: float) -> Floats:
    """Two-way loss from the probe to each point, integrated along each beam, dB, shape (D, L)."""
    per_step = np.float32(2 * scanner.frequency_mhz * step_mm / 10)
    return np.asarray(np.cumsum(tissue.attenuation, axis=0) * per_step, dtype=np.float32)


def echoes(
    tissue: TissueMap,
    scanner: Scanner,
    spacing_mm: Floats,
    step_mm: float,
    rng: np.random.Generator,
) -> Floats:
    """Envelope of the received echoes before compensation, relative to glandular tissue.

    Parameters
    ----------
    tissue : TissueMap
        Tissue on the beam grid, shape (D, L).
    scanner : Scanner
        Gives frequency, resolution and noise.
    spacing_mm : ndarray of float32, shape (D,)
        Distance between neighbouring beams at each depth.
    step_mm : float
        Distance between depth samples.
    rng : numpy.random.Generator
        Draws scatterers and noise.

    Returns
    -------
    ndarray of float32, shape (D, L)
        Amplitude, not negative; fully developed speckle where tissue is even.

    Notes
    -----
    Scatterers are circular complex Gaussian, blurred by a separable Gaussian point-spread
    function whose lateral width follows depth row by row. Each blur keeps the echo's power.
    """
    depth, beams = tissue.attenuation.shape
    level_db = tissue.echogenicity_db - attenuation_db(tissue, scanner, step_mm)
    level_db -= _contact_db(scanner, spacing_mm[0] * np.arange(beams, dtype=np.float32), rng)
    field = _circular(rng, (depth, beams)) * np.float32(10) ** (level_db / np.float32(20))

    rows = max(8, int(np.ceil(4 * axial_sigma_mm(scanner) / step_mm)))
    padded = fft.next_fast_len(depth + rows)
    axial = _transfer(np.array([axial_sigma_mm(scanner) / step_mm]), padded)[0]
    field = fft.ifft(fft.fft(field, padded, axis=0) * axial[:, None], axis=0)[:depth]

    depths = np.arange(depth, dtype=np.float32) * np.float32(step_mm)
    lateral = _transfer(lateral_sigma_mm(scanner, depths) / spacing_mm, beams)
    field = fft.ifft(fft.fft(field, axis=1) * lateral, axis=1)

    noise = np.float32(10 ** (scanner.noise_db / 20)) * _circular(rng, (depth, beams))
    return np.asarray(np.abs(field + noise), dtype=np.float32)


def compress(envelope: Floats, scanner: Scanner, step_mm: float, gain_db: float) -> Floats:
    """Amplify with depth and map to grey by log compression and the grey map.

    Parameters
    ----------
    envelope : ndarray of float32, shape (D, L)
        Output of :func:`echoes`.
    scanner : Scanner
        Gives compensation, dynamic range and gamma.
    step_mm : float
        Distance between depth samples.
    gain_db : float
        Overall gain of this image.

    Returns
    -------
    ndarray of float32, shape (D, L)
        Grey in [0, 1].
    """
    depths = np.arange(envelope.shape[0], dtype=np.float32)[:, None] * np.float32(step_mm)
    compensation = 2 * scanner.tgc * scanner.frequency_mhz * depths / 10
    level = 20 * np.log10(np.maximum(envelope, 1e-9)) + compensation + gain_db
    grey = np.clip(1 + (level - _HEADROOM_DB) / scanner.dynamic_range_db, 0, 1)
    return np.asarray(grey**scanner.gamma, dtype=np.float32)


def _contact_db(scanner: Scanner, position_mm: Floats, rng: np.random.Generator) -> Floats:
    """Two-way loss of each beam where air lies between probe and skin, dB, shape (L,)."""
    loss = np.zeros_like(position_mm)
    for _ in range(rng.poisson(scanner.contact_loss)):
        centre = rng.uniform(position_mm[0], position_mm[-1])
        distance = np.abs(position_mm - centre) / rng.uniform(1.5, 4)
        loss += rng.uniform(6, 16) * np.exp(-(distance**4))
    return np.asarray(loss, dtype=np.float32)


def _circular(
    rng: np.random.Generator, shape: tuple[int, int]
) -> np.ndarray[tuple[int, ...], np.dtype[np.complex64]]:
    parts = rng.standard_normal((*shape, 2), dtype=np.float32)
    return parts.view(np.complex64)[..., 0] * np.float32(np.sqrt(0.5))


def _transfer(sigma: np.ndarray[tuple[int, ...], np.dtype[np.floating]], length: int) -> Floats:
    """Transfer functions of Gaussian blurs (``sigma`` in samples) that keep white noise's power."""
    frequency = fft.fftfreq(length)[None, :]
    gaussian = np.exp(-2 * (np.pi * sigma[:, None] * frequency) ** 2)
    return np.asarray(gaussian / np.sqrt((gaussian**2).mean(1, keepdims=True)), dtype=np.float32)
