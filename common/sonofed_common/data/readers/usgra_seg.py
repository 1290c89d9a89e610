"""usgra-seg: ultrasound of nerve and vessel from Germany (Mindray TE7), for segmentation."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from sonofed_common.data.decoding import read_grey
from sonofed_common.data.readers.screening import group_duplicates, screen, set_folder
from sonofed_common.data.sample import Reading, Sample

DEVICE = "Mindray TE7"

LIT = 8 / 255
BLACK = 16 / 255
DARK = 0.2
NARROW = 0.985


def read_usgra_seg(root: Path) -> Reading:
    """Read usgra-seg.

    Parameters
    ----------
    root : Path
        ``usgra-seg`` (images, masks and, if wanted, test/images, test/masks) or its parent.

    Returns
    -------
    Reading
        No labels; masks are palette images with nerve 1 and vessel 2; names of the test part begin
        with ``test/``. The set names no patients: a group is an image with its near-duplicates,
        some of which lie in both official parts. The device is ``Mindray TE7`` and the style of
        the group's first image (see `display_style`): near-duplicates never differ in style.

    Raises
    ------
    DataMissingError, SiteEmptyError, DataUnreadableError
        See `sonofed_common.data.readers.read`.
    """
    folder = set_folder(
        root,
        "usgra-seg",
        "the folders images and masks",
        lambda f: (f / "images").is_dir() and (f / "masks").is_dir(),
    )
    samples: list[Sample] = []
    for part, prefix in ((folder, ""), (folder / "test", "test/")):
        for image in sorted((part / "images").glob("*.png")):
            if not image.name.startswith("."):
                name = prefix + image.stem
                mask = part / "masks" / image.name
                samples.append(Sample(name, image, (mask,), None, name, DEVICE))
    return _with_styles(group_duplicates(screen(samples)))


def display_style(grey: NDArray[np.float32]) -> str:
    """Tell how the scanner was set, from the image alone.

    Parameters
    ----------
    grey : ndarray, shape (H, W)
        Grey values in [0, 1].

    Returns
    -------
    str
        ``bright`` where less than a fifth of the sector is black; else ``dark narrow`` where the
        sector leaves a margin at a side of the canvas, or ``dark wide`` where it fills it.

    Notes
    -----
    The black share tells gain and dynamic range. On the set of 244 images it has two modes, below
    0.1 and around 0.4, with a gap near 0.2, and exports of one frame on different canvases agree
    in it. Widths are at most 0.973 of the canvas, or all of it. On the canvas of most images width
    tells depth: of bright ones, whose lower edge is seen, a sector that fills it is at most 0.89 as
    high as wide, a narrower one at least 0.92; on the smallest canvas (9 of the dark images) all
    are narrow. The set's styles, by group: 127 bright, 72 dark narrow, 45 dark wide.
    """
    lit = grey > LIT
    rows, columns = np.nonzero(lit.mean(1) > 0.01)[0], np.nonzero(lit.mean(0) > 0.05)[0]
    if not rows.size or not columns.size:
        return "dark narrow"
    sector = grey[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1]
    if (sector < BLACK).mean() < DARK:
        return "bright"
    return "dark narrow" if sector.shape[1] < NARROW * grey.shape[1] else "dark wide"


def _with_styles(reading: Reading) -> Reading:
    # A group bears the name of its first image.
    firsts = (sample for sample in reading.samples if sample.name == sample.group)
    styles = {sample.name: display_style(read_grey(sample.image)) for sample in firsts}
    return replace(
        reading,
        samples=tuple(replace(s, device=f"{s.device} {styles[s.group]}") for s in reading.samples),
    )
