"""Patients of a simulated hospital: images, masks and labels."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

import numpy as np

from sonofed_common.contract.errors import ParameterError
from sonofed_common.runtime import derive_seed
from sonofed_simulations.phantoms.abdomen import Flank
from sonofed_simulations.phantoms.anatomy import Breast
from sonofed_simulations.phantoms.display import Bytes, Display, burn_marks
from sonofed_simulations.phantoms.physics import compress, echoes
from sonofed_simulations.phantoms.scanner import Scanner, abdominal

Anatomy = Literal["breast", "abdomen"]

_WANDER_MM: dict[Anatomy, float] = {"breast": 1.5, "abdomen": 4.0}


@dataclass(frozen=True)
class Phantom:
    """One simulated image.

    Attributes
    ----------
    image : ndarray of uint8, shape (S, S)
        B-mode image with burnt-in marks.
    mask : ndarray of uint8, shape (S, S)
        Breast: 255 inside the lesion, 0 elsewhere. Abdomen: 0 background, 1 liver, 2 right kidney,
        3 left kidney, 4 spleen.
    label : int or None
        Breast: 0 benign, 1 malignant.
    patient : str
        Patient's name; one or two images share it.
    """

    image: Bytes
    mask: Bytes
    label: int | None
    patient: str


def generate(
    scanner: Scanner,
    count: int,
    seed: int,
    image_size: int = 128,
    malignant_fraction: float | None = None,
    anatomy: Anatomy = "breast",
) -> Iterator[Phantom]:
    """Simulate a hospital's images, patient after patient.

    Parameters
    ----------
    scanner : Scanner
        The hospital's scanner; for the abdomen with an abdominal probe.
    count : int
        Images, at least 1.
    seed : int
        Same seed, same images; a longer run begins with the images of a shorter one.
    image_size : int
        Side of the square images, pixels, at least 32.
    malignant_fraction : float, optional
        Share of malignant patients, in [0, 1]; the scanner's own by default. The share of every
        run of consecutive patients is within one patient of it. Breast only.
    anatomy : {"breast", "abdomen"}
        What is imaged; right and left flanks alternate from patient to patient.

    Raises
    ------
    ParameterError
        A number is out of its range.
    """
    fraction = scanner.malignant_fraction if malignant_fraction is None else malignant_fraction
    _check(count, image_size, fraction)
    display = Display(abdominal(scanner) if anatomy == "abdomen" else scanner, image_size)
    phase = np.random.default_rng(derive_seed("phantom", seed, scanner.name)).random()
    made = number = 0
    while made < count:
        rng = np.random.default_rng(derive_seed("phantom", seed, scanner.name, number))
        label: int | None = None
        body: Breast | Flank
        if anatomy == "abdomen":
            body = Flank(rng, "left" if number % 2 else "right")
        else:
            before, after = number * fraction + phase, (number + 1) * fraction + phase
            label = int(np.floor(after) > np.floor(before))
            body = Breast(rng, malignant=bool(label))
        for _ in range(min(int(rng.integers(1, 3)), count - made)):
            image, classes = _view(body, display, _WANDER_MM[anatomy], rng)
            mask = classes if anatomy == "abdomen" else classes * np.uint8(255)
            yield Phantom(image, mask, label, f"{scanner.name}-{number:05d}")
            made += 1
        number += 1


def _view(
    body: Breast | Flank, display: Display, wander_mm: float, rng: np.random.Generator
) -> tuple[Bytes, Bytes]:
    x, z, spacing = display.positions()
    tissue = body.tissue(x + np.float32(rng.normal(0, wander_mm)), z)
    envelope = echoes(tissue, display.scanner, spacing, display.step_mm, rng)
    gain = float(rng.normal(display.scanner.gain_db, display.scanner.gain_spread_db))
    grey = display.show(compress(envelope, display.scanner, display.step_mm, gain))
    image = np.rint(grey * 255).astype(np.uint8)
    classes = np.zeros(image.shape, np.uint8)
    for number in range(1, int(tissue.classes.max()) + 1):
        classes[display.show((tissue.classes == number).astype(np.float32)) > 0.5] = number
    # Operators measure one thing at a time, and the liver last of all.
    measured = (classes == max(1, classes.max())).astype(np.uint8)
    burn_marks(image, measured, display, rng)
    return image, classes


def _check(count: int, image_size: int, fraction: float) -> None:
    if count < 1 or image_size < 32 or not 0 <= fraction <= 1:
        raise ParameterError(
            f"Phantoms need a count of at least 1, an image size of at least 32 and a malignant "
            f"fraction in [0, 1]; got {count}, {image_size} and {fraction}."
        )
