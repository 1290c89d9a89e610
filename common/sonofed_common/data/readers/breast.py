"""BrEaST: breast ultrasound images from Poland, one patient a case.

Pawlowska et al., Curated benchmark dataset for ultrasound based breast lesion analysis,
Scientific Data 11:148, 2024.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any
from zipfile import BadZipFile

from sonofed_common.contract.errors import DataMissingError, DataUnreadableError
from sonofed_common.data.readers.screening import CLASSES, screen, set_folder
from sonofed_common.data.sample import Reading, Sample, Skipped

COLUMNS = ("CaseID", "Image_filename", "Mask_tumor_filename", "Classification")


def read_breast(root: Path) -> Reading:
    """Read BrEaST.

    Parameters
    ----------
    root : Path
        ``BrEaST`` (the workbook of clinical data and the folder of images and masks) or its parent.

    Returns
    -------
    Reading
        The group is the case; masks are those of the tumour, none for normal tissue.

    Raises
    ------
    DataMissingError, SiteEmptyError, DataUnreadableError
        See `sonofed_common.data.readers.read`.
    """
    folder = set_folder(
        root, "BrEaST", "the workbook (.xlsx) of clinical data", lambda f: bool(_workbooks(f))
    )
    images = next((p for p in sorted(folder.glob("*images_and_masks*")) if p.is_dir()), folder)
    samples: list[Sample] = []
    skipped: list[Skipped] = []
    for row in _rows(_workbooks(folder)[0]):
        case = row["CaseID"]
        label = CLASSES.get(row["Classification"].lower())
        for file in _names(row["Image_filename"]):
            name = Path(file).stem
            if label is None:
                skipped.append(Skipped(name, "the class is unknown"))
                continue
            masks = tuple(images / mask for mask in _names(row["Mask_tumor_filename"]))
            samples.append(Sample(name, images / file, masks, label, case))
    return screen(samples, skipped)


def _workbooks(folder: Path) -> list[Path]:
    # Spreadsheet programs leave lock files, named ~$..., beside an open workbook.
    return [path for path in sorted(folder.glob("*.xlsx")) if path.name[0] not in "~."]


def _names(cell: str) -> list[str]:
    return [name.strip() for name in cell.split("&") if name.strip()]


def _rows(path: Path) -> list[dict[str, str]]:
    # Only this set is published as a workbook.
    import openpyxl
    from openpyxl.utils.exceptions import InvalidFileException

    try:
        workbook = openpyxl.load_workbook(path, read_only=True, data_only=True)
    except (OSError, KeyError, ValueError, BadZipFile, InvalidFileException) as error:
        raise DataUnreadableError(
            "the workbook of clinical data cannot be read; copy it anew from the archive"
        ) from error
    try:
        for sheet in workbook.worksheets:
            lines = sheet.iter_rows(values_only=True)
            header = [_text(value) for value in next(lines, ())]
            if set(COLUMNS) <= set(header):
                found = [
                    dict(zip(header, (_text(value) for value in line), strict=False))
                    for line in lines
                ]
                return [{c: row.get(c, "") for c in COLUMNS} for row in found if any(row.values())]
    finally:
        workbook.close()
    raise DataMissingError(
        f"no sheet of the workbook has the columns {', '.join(COLUMNS)}; take the official workbook"
    )


def _text(value: Any) -> str:
    return "" if value is None else str(value).strip()
