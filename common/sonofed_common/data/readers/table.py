"""Any set that is described by a table: one image a line."""

from __future__ import annotations

from pathlib import Path

from sonofed_common.data.readers.screening import CLASSES, screen
from sonofed_common.data.readers.tabular import read_rows
from sonofed_common.data.sample import Reading, Sample, Skipped

LABELS = CLASSES | {str(number): number for number in CLASSES.values()}


def read_table(root: Path) -> Reading:
    """Read a set from a CSV file.

    Parameters
    ----------
    root : Path
        The CSV file, or a folder that holds ``table.csv``. Columns: image (required), mask,
        label (benign, malignant, normal or 0, 1, 2; empty where unknown), patient, device. Paths
        are relative to the CSV file. Without a patient an image is its own group.

    Raises
    ------
    DataMissingError, SiteEmptyError, DataUnreadableError
        See `sonofed_common.data.readers.read`.
    """
    path = root / "table.csv" if root.is_dir() else root
    samples: list[Sample] = []
    skipped: list[Skipped] = []
    names: set[str] = set()
    for number, row in enumerate(read_rows(path, ("image",)), start=2):
        name, text = row["image"], row.get("label", "").lower()
        if not name:
            skipped.append(Skipped(f"line {number}", "no image is named"))
        elif name in names:
            skipped.append(Skipped(name, "the image is listed twice"))
        elif text and text not in LABELS:
            skipped.append(Skipped(name, "the class is unknown"))
        else:
            names.add(name)
            mask = row.get("mask", "")
            samples.append(
                Sample(
                    name,
                    path.parent / name,
                    (path.parent / mask,) if mask else (),
                    LABELS.get(text),
                    row.get("patient", "") or name,
                    row.get("device", ""),
                )
            )
    return screen(samples, skipped)
