"""What all readers share: finding the set's folder, class names, and screening its files."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from pathlib import Path

from sonofed_common.contract.errors import DataMissingError, DataUnreadableError, SiteEmptyError
from sonofed_common.data.decoding import header_problem
from sonofed_common.data.duplicates import duplicate_groups
from sonofed_common.data.sample import Reading, Sample, Skipped

CLASSES = {"benign": 0, "malignant": 1, "normal": 2}


def set_folder(root: Path, name: str, required: str, holds: Callable[[Path], bool]) -> Path:
    """Find a set's folder.

    Parameters
    ----------
    root : Path
        The set's own folder or its parent.
    name : str
        The folder's official name.
    required : str
        What it must hold, in words.
    holds : callable
        Tells whether a folder holds that.

    Raises
    ------
    DataMissingError
        Neither folder holds it.
    """
    for folder in (root, root / name):
        if folder.is_dir() and holds(folder):
            return folder
    raise DataMissingError(
        f"the data folder does not hold {required}, nor does {name}/ in it; "
        f"unpack the official archive there or correct the path"
    )


def group_duplicates(reading: Reading) -> Reading:
    """Group the near-duplicates of a set that names no patients (see `duplicate_groups`)."""
    grouped, dropped = duplicate_groups(reading.samples)
    return screen(grouped, (*reading.skipped, *dropped))


def screen(samples: Iterable[Sample], skipped: Sequence[Skipped] = ()) -> Reading:
    """Check every file's header and leave out what cannot be read.

    Parameters
    ----------
    samples : iterable of Sample
        What the set lists.
    skipped : sequence of Skipped
        What the reader passed over already.

    Returns
    -------
    Reading
        A sample whose mask is missing or unreadable stays, without any mask, and is reported.

    Raises
    ------
    SiteEmptyError
        Nothing is listed, or no listed image is usable.
    DataUnreadableError
        Images are listed, and all are missing or unreadable.
    """
    usable: list[Sample] = []
    passed = list(skipped)
    unreadable = 0
    for sample in sorted(samples, key=lambda s: s.name):
        if problem := header_problem(sample.image):
            passed.append(Skipped(sample.name, problem))
            unreadable += 1
            continue
        # Part of the lesions would be a wrong annotation, so one bad mask costs them all.
        faults = [fault for path in sample.masks if (fault := header_problem(path))]
        if faults:
            passed.append(Skipped(sample.name, f"kept without its masks: {faults[0]}"))
            sample = replace(sample, masks=())
        usable.append(sample)
    if not usable and unreadable:
        raise DataUnreadableError(
            f"all {unreadable} listed images are missing or unreadable; copy the data set anew"
        )
    if not usable:
        raise SiteEmptyError(
            f"the data set holds no usable image ({len(passed)} entries were passed over); "
            "add images"
        )
    return Reading(tuple(usable), tuple(passed))
