"""BUS-BRA: breast ultrasound images from Rio de Janeiro, four scanners, patients known.

Gomez-Flores et al., BUS-BRA: A breast ultrasound dataset for assessing computer-aided diagnosis
systems, Medical Physics 51(4):3110-3123, 2024.
"""

from __future__ import annotations

from pathlib import Path

from sonofed_common.data.readers.screening import CLASSES, screen, set_folder
from sonofed_common.data.readers.tabular import read_rows
from sonofed_common.data.sample import Reading, Sample, Skipped

TABLE = "bus_data.csv"


def read_busbra(root: Path) -> Reading:
    """Read BUS-BRA.

    Parameters
    ----------
    root : Path
        ``BUSBRA`` (bus_data.csv, Images, Masks) or its parent.

    Returns
    -------
    Reading
        The group is the patient (column Case), the device the scanner (column Device).

    Raises
    ------
    DataMissingError, SiteEmptyError, DataUnreadableError
        See `sonofed_common.data.readers.read`.
    """
    folder = set_folder(
        root,
        "BUSBRA",
        f"{TABLE} and Images/",
        lambda f: (f / TABLE).is_file() and (f / "Images").is_dir(),
    )
    samples: list[Sample] = []
    skipped: list[Skipped] = []
    for row in read_rows(folder / TABLE, ("ID", "Case", "Pathology", "Device")):
        name, label = row["ID"], CLASSES.get(row["Pathology"].lower())
        if label is None:
            skipped.append(Skipped(name, "the class is unknown"))
            continue
        samples.append(
            Sample(
                name,
                folder / "Images" / f"{name}.png",
                (folder / "Masks" / f"mask_{name.removeprefix('bus_')}.png",),
                label,
                row["Case"],
                row["Device"],
            )
        )
    return screen(samples, skipped)
