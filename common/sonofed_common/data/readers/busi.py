"""BUSI: breast ultrasound images from Cairo (GE LOGIQ E9).

Al-Dhabyani et al., Dataset of breast ultrasound images, Data in Brief 28:104863, 2020.
"""

from __future__ import annotations

import re
from pathlib import Path

from sonofed_common.data.readers.screening import CLASSES, group_duplicates, screen, set_folder
from sonofed_common.data.sample import Reading, Sample, Skipped

DEVICE = "GE LOGIQ E9"
MASK = re.compile(r"(?P<image>.+)_mask(_\d+)?")


def read_busi(root: Path) -> Reading:
    """Read BUSI, near-duplicates grouped.

    Parameters
    ----------
    root : Path
        ``Dataset_BUSI_with_GT`` (folders benign, malignant and, if wanted, normal) or its parent.

    Returns
    -------
    Reading
        The set names no patients: a group is an image with its near-duplicates. Duplicates in
        different classes are passed over (see `duplicate_groups`).

    Raises
    ------
    DataMissingError, SiteEmptyError, DataUnreadableError
        See `sonofed_common.data.readers.read`.
    """
    folder = set_folder(
        root,
        "Dataset_BUSI_with_GT",
        "the folders benign and malignant",
        lambda f: (f / "benign").is_dir() and (f / "malignant").is_dir(),
    )
    samples: list[Sample] = []
    skipped: list[Skipped] = []
    for name, label in CLASSES.items():
        found, orphans = _read_class(folder / name, label)
        samples += found
        skipped += orphans
    return group_duplicates(screen(samples, skipped))


def _read_class(folder: Path, label: int) -> tuple[list[Sample], list[Skipped]]:
    images: dict[str, Path] = {}
    masks: dict[str, list[Path]] = {}
    for path in sorted(folder.glob("*.png")):
        if path.name.startswith("."):
            continue
        if match := MASK.fullmatch(path.stem):
            masks.setdefault(match["image"], []).append(path)
        else:
            images[path.stem] = path
    samples = [
        Sample(
            f"{folder.name}/{stem}",
            path,
            tuple(masks.get(stem, ())),
            label,
            f"{folder.name}/{stem}",
            DEVICE,
        )
        for stem, path in images.items()
    ]
    orphans = [
        Skipped(f"{folder.name}/{stem}", "a mask without an image")
        for stem in masks
        if stem not in images
    ]
    return samples, orphans
