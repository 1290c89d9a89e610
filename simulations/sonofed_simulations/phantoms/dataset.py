"""A simulated hospital on disk: PNG files and one table."""

from __future__ import annotations

import csv
import io
import json
import tempfile
from collections.abc import Iterable
from dataclasses import asdict
from pathlib import Path

import cv2
from PIL import Image

from sonofed_common.contract.errors import ConfigurationError
from sonofed_common.runtime import SILENT, Events, write_atomically
from sonofed_simulations.phantoms.display import Bytes
from sonofed_simulations.phantoms.generator import Anatomy, Phantom, generate
from sonofed_simulations.phantoms.scanner import Scanner

# Raise it whenever the same parameters give other images, so that kept sets are made anew.
_VERSION = 1
_PARAMETERS = "phantoms.json"
_COLUMNS = ("image", "mask", "label", "patient", "device")
_PALETTE = (0, 0, 0, 220, 80, 60, 70, 200, 90, 60, 140, 230, 220, 180, 60)


def write_dataset(
    folder: Path,
    scanner: Scanner,
    count: int,
    seed: int,
    image_size: int = 128,
    malignant_fraction: float | None = None,
    anatomy: Anatomy = "breast",
    events: Events = SILENT,
) -> Path:
    """Write a simulated hospital as ``images/``, ``masks/`` and ``table.csv``.

    Parameters
    ----------
    folder : Path
        Where the set shall stand: it appears there whole or not at all. A set of the same
        parameters is kept as it is; one of other parameters is replaced.
    scanner : Scanner
        The hospital's scanner.
    count : int
        Images, at least 1.
    seed : int
        Same seed, same images.
    image_size : int
        Side of the square images, pixels, at least 32.
    malignant_fraction : float, optional
        Share of malignant patients, in [0, 1]; the scanner's own by default. Breast only.
    anatomy : {"breast", "abdomen"}
        What is imaged. The masks of the abdomen are palette images: 1 liver, 2 right kidney,
        3 left kidney, 4 spleen.
    events : Events
        Gets the progress, image by image.

    Returns
    -------
    Path
        ``folder``. Its table has the columns image, mask, label (0 benign, 1 malignant; empty for
        the abdomen), patient and device; paths are relative to ``folder``.

    Raises
    ------
    ParameterError
        A number is out of its range.
    ConfigurationError
        ``folder`` holds something else than a set that this function wrote.
    """
    parameters = json.dumps(
        {
            "version": _VERSION,
            "scanner": asdict(scanner),
            "count": count,
            "seed": seed,
            "image_size": image_size,
            "malignant_fraction": malignant_fraction,
            "anatomy": anatomy,
        },
        indent=2,
    )
    kept = folder / _PARAMETERS
    if kept.is_file() and kept.read_text(encoding="utf-8") == parameters:
        return folder
    if folder.exists() and not kept.is_file() and any(folder.iterdir()):
        raise ConfigurationError(
            f"The folder {folder} holds other files, and phantoms would replace them: "
            "name an empty or a new folder."
        )
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{folder.name}.", dir=folder.parent) as temporary:
        fresh = Path(temporary) / "fresh"
        phantoms = generate(scanner, count, seed, image_size, malignant_fraction, anatomy)
        tracked = events.track(phantoms, f"phantoms {folder.name}", count)
        _write(fresh, scanner.name, tracked, anatomy)
        write_atomically(fresh / _PARAMETERS, parameters.encode())
        if folder.exists():
            folder.rename(Path(temporary) / "replaced")
        fresh.rename(folder)
    return folder


def _write(folder: Path, device: str, phantoms: Iterable[Phantom], anatomy: Anatomy) -> None:
    for kind in ("images", "masks"):
        (folder / kind).mkdir(parents=True)
    table = io.StringIO(newline="")
    writer = csv.writer(table, lineterminator="\n")
    writer.writerow(_COLUMNS)
    for number, phantom in enumerate(phantoms):
        image, mask = f"images/{number:05d}.png", f"masks/{number:05d}.png"
        (folder / image).write_bytes(_png(phantom.image))
        (folder / mask).write_bytes(
            _palette_png(phantom.mask) if anatomy == "abdomen" else _png(phantom.mask)
        )
        writer.writerow((image, mask, phantom.label, phantom.patient, device))
    write_atomically(folder / "table.csv", table.getvalue().encode())


def _png(image: Bytes) -> bytes:
    return bytes(cv2.imencode(".png", image)[1])


def _palette_png(classes: Bytes) -> bytes:
    image = Image.fromarray(classes)
    image.putpalette(_PALETTE)
    file = io.BytesIO()
    image.save(file, "PNG")
    return file.getvalue()
