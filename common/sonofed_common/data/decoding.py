"""Decoding of image files: grey values, masks, and a cheap check of the header."""

from __future__ import annotations

import struct
import zlib
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image

UNREADABLE = (
    OSError,
    SyntaxError,
    ValueError,
    EOFError,
    struct.error,
    zlib.error,
    Image.DecompressionBombError,
)
"""What Pillow raises for missing, foreign, truncated and oversized files."""


def header_problem(path: Path) -> str | None:
    """Say what is wrong with an image file, judged by its header alone.

    Parameters
    ----------
    path : Path
        File that should be an image.

    Returns
    -------
    str or None
        A reason, or None where the header can be read.
    """
    if not path.is_file():
        return "the file is missing"
    try:
        with Image.open(path):
            return None
    except UNREADABLE:
        return "the file is not a readable image"


def read_grey(path: Path) -> NDArray[np.float32]:
    """Decode an image to grey values.

    Parameters
    ----------
    path : Path
        Image file; colours become luminance, 16-bit grey is scaled by its full range.

    Returns
    -------
    ndarray
        Shape (H, W), float32 in [0, 1].

    Raises
    ------
    One of `UNREADABLE`
        The file is missing, truncated or no image.
    """
    with Image.open(path) as image:
        if image.mode == "F":
            raise ValueError("floating-point images have no known range")
        if image.mode.startswith("I"):
            deep: NDArray[np.float32] = np.asarray(image, dtype=np.float32) / np.float32(65535)
            return np.clip(deep, 0, 1)
        grey: NDArray[np.float32] = np.asarray(image.convert("L"), dtype=np.float32)
        return grey / np.float32(255)


def read_mask(path: Path) -> NDArray[np.uint8]:
    """Decode a mask.

    Parameters
    ----------
    path : Path
        Mask file.

    Returns
    -------
    ndarray
        Shape (H, W), uint8. A palette image keeps its indices (0 background, then one number a
        class); any other is 1 where it reaches half of its largest value, else 0.

    Raises
    ------
    One of `UNREADABLE`
        The file is missing, truncated or no image.
    """
    with Image.open(path) as image:
        if image.mode == "P":
            return np.asarray(image, dtype=np.uint8)
        # Half of the maximum serves masks of 0/1, of 0/255, and the ringing of JPEG alike.
        values = np.asarray(image if image.mode.startswith("I") else image.convert("L"))
        inside: NDArray[np.bool_] = (values > 0) & (2.0 * values >= values.max())
        return inside.astype(np.uint8)
