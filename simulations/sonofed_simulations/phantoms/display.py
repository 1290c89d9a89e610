"""From the beam grid to the screen: sampling, scan conversion and burnt-in marks."""

from __future__ import annotations

from dataclasses import dataclass

import cv2
import numpy as np
from numpy.typing import NDArray

from sonofed_simulations.phantoms.scanner import Scanner
from sonofed_simulations.phantoms.tissue import Floats

Bytes = NDArray[np.uint8]

_FIELD_OF_VIEW = np.deg2rad(44)


@dataclass(frozen=True)
class Display:
    """Geometry of one scanner's image.

    Parameters
    ----------
    scanner : Scanner
        Gives geometry, depth and width.
    image_size : int
        Side S of the square image, pixels; the field of view is fitted into it, aspect kept.

    Notes
    -----
    The beam grid has at least 320 x 160 samples, so that speckle is finer than the pixels
    of a small image and is averaged into them, as when a recorded image is made smaller.
    """

    scanner: Scanner
    image_size: int

    @property
    def shape(self) -> tuple[int, int]:
        """Depth samples and beams of the beam grid."""
        return max(320, 2 * self.image_size), max(160, self.image_size)

    @property
    def step_mm(self) -> float:
        """Distance between depth samples."""
        return self.scanner.depth_mm / self.shape[0]

    @property
    def _radius_mm(self) -> float:
        return self.scanner.width_mm / float(2 * np.sin(_FIELD_OF_VIEW / 2))

    @property
    def _sagitta_mm(self) -> float:
        return self._radius_mm * (1 - float(np.cos(_FIELD_OF_VIEW / 2)))

    @property
    def pixel_mm(self) -> float:
        """Side of a screen pixel."""
        height, width = self.scanner.depth_mm, self.scanner.width_mm
        if self.scanner.geometry == "convex":
            width = 2 * (self._radius_mm + height) * float(np.sin(_FIELD_OF_VIEW / 2))
            height += self._sagitta_mm
        return max(height, width) / self.image_size

    def positions(self) -> tuple[Floats, Floats, Floats]:
        """Lateral position (D, L) and depth (D, L) of the beam grid, and beam spacing (D,), mm."""
        depth, beams = self.shape
        along = (np.arange(depth, dtype=np.float32) + np.float32(0.5)) * np.float32(self.step_mm)
        across = (np.arange(beams, dtype=np.float32) + np.float32(0.5)) / beams - np.float32(0.5)
        if self.scanner.geometry == "linear":
            x, z = np.meshgrid(across * np.float32(self.scanner.width_mm), along)
            spacing = np.full(depth, self.scanner.width_mm / beams, np.float32)
        else:
            angle = across * np.float32(_FIELD_OF_VIEW)
            reach = along[:, None] + np.float32(self._radius_mm)
            x = reach * np.sin(angle)
            z = reach * np.cos(angle) - np.float32(self._radius_mm)
            spacing = reach[:, 0] * np.float32(_FIELD_OF_VIEW / beams)
        return np.ascontiguousarray(x), np.ascontiguousarray(z), spacing

    def show(self, grid: Floats) -> Floats:
        """Bring values on the beam grid to the screen; what no beam reaches is 0.

        Parameters
        ----------
        grid : ndarray of float32, shape (D, L)
            Grey in [0, 1], or a mask as 0.0 and 1.0.

        Returns
        -------
        ndarray of float32, shape (S, S)
        """
        if self.scanner.geometry == "convex":
            return self._sector(grid)
        size, pixel = self.image_size, self.pixel_mm
        width, height = round(self.scanner.width_mm / pixel), round(self.scanner.depth_mm / pixel)
        left = (size - width) // 2
        screen = np.zeros((size, size), np.float32)
        screen[:height, left : left + width] = cv2.resize(
            grid, (width, height), interpolation=cv2.INTER_AREA
        )
        return screen

    def _sector(self, grid: Floats) -> Floats:
        # Twice as fine as the screen, then averaged: the beam grid is finer than the pixels.
        size = 2 * self.image_size
        pixel = np.float32(self.pixel_mm / 2)
        positions = (np.arange(size, dtype=np.float32) + np.float32(0.5)) * pixel
        x = positions[None, :] - pixel * np.float32(self.image_size)
        z = positions[:, None] + np.float32(self._radius_mm - self._sagitta_mm)
        beams = self.shape[1]
        row = (np.hypot(x, z) - np.float32(self._radius_mm)) / np.float32(self.step_mm)
        column = (np.arctan2(x, z) / np.float32(_FIELD_OF_VIEW) + np.float32(0.5)) * beams
        fine = cv2.remap(
            grid, column - 0.5, row - 0.5, cv2.INTER_LINEAR, borderMode=cv2.BORDER_CONSTANT
        )
        screen = cv2.resize(fine, (self.image_size,) * 2, interpolation=cv2.INTER_AREA)
        return np.asarray(screen, dtype=np.float32)


def burn_marks(image: Bytes, mask: Bytes, display: Display, rng: np.random.Generator) -> None:
    """Draw the scanner's marks into an image, in place.

    Parameters
    ----------
    image, mask : ndarray of uint8, shape (S, S)
        The image, and the lesion that the calipers measure (not 0 inside).
    display : Display
        Gives the scanner's marks and the scale.
    rng : numpy.random.Generator
        Decides whether this image was measured: calipers stand in about half of the images.
    """
    size, scanner = display.image_size, display.scanner
    unit = max(1, size // 64)
    if "text" in scanner.marks:
        text = f"{scanner.frequency_mhz:.0f}MHz DR{scanner.dynamic_range_db:.0f}"
        scale = size / 400
        cv2.putText(image, text, (2 * unit, size - 2 * unit), cv2.FONT_HERSHEY_SIMPLEX, scale, 220)
    if "logo" in scanner.marks:
        cv2.rectangle(image, (unit, unit), (9 * unit, 4 * unit), 200, -1)
    if "ruler" in scanner.marks:
        for depth in np.arange(0, scanner.depth_mm, 10):
            row = min(size - 1, round(float(depth) / display.pixel_mm))
            cv2.line(image, (size - 2 * unit, row), (size - 1, row), 255, 1)
    if "calipers" in scanner.marks and rng.random() < 0.5 and mask.any():
        rows, columns = np.nonzero(mask)
        ends = [np.argmin(columns), np.argmax(columns), np.argmin(rows), np.argmax(rows)]
        for end in ends:
            centre = int(columns[end]), int(rows[end])
            cv2.drawMarker(image, centre, 255, cv2.MARKER_CROSS, max(3, 4 * unit), 1)
