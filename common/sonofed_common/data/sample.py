"""One image of a data set, and what a reader returns."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Sample:
    """One ultrasound image with what is known of it.

    Attributes
    ----------
    name : str
        Unique within the set; stays on site.
    image : Path
        Grey image file.
    masks : tuple of Path
        Lesion masks to be united; empty where there is none.
    label : int or None
        0 benign, 1 malignant, 2 normal; None where unknown.
    group : str
        Patient, or group of duplicates: never on both sides of a split.
    device : str
        Scanner, as the set names it; empty where unknown.
    """

    name: str
    image: Path
    masks: tuple[Path, ...]
    label: int | None
    group: str
    device: str = ""


@dataclass(frozen=True)
class Skipped:
    """A file that a reader passed over, and why."""

    name: str
    reason: str


@dataclass(frozen=True)
class Reading:
    """What a reader found.

    Attributes
    ----------
    samples : tuple of Sample
        Usable images, sorted by name.
    skipped : tuple of Skipped
        Files passed over.
    """

    samples: tuple[Sample, ...]
    skipped: tuple[Skipped, ...] = ()
