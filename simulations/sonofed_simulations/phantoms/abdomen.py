"""The flank: abdominal wall, liver or spleen, a kidney, bowel and spine."""

from __future__ import annotations

from typing import Literal

import numpy as np

from sonofed_simulations.phantoms.organ import Organ, draw_outline
from sonofed_simulations.phantoms.tissue import Floats, Texture, TissueMap, WavyLine

LIVER, RIGHT_KIDNEY, LEFT_KIDNEY, SPLEEN = 1, 2, 3, 4

# Echogenicity (dB relative to glandular tissue) and one-way attenuation (dB / (cm MHz)):
# magnitudes after Duck, Physical Properties of Tissues (1990), rounded.
_SKIN = 4.0, 0.9
_FAT = -9.0, 0.5
_MUSCLE = -5.0, 0.7
_FILLING = -3.0, 0.6
_SPINE = -18.0, 8.0
_CAPSULE_DB = 9.0
_ALONE = 0.25


class Flank:
    """What one patient shows on one side.

    Parameters
    ----------
    rng : numpy.random.Generator
        Draws organs, wall and textures.
    side : {"right", "left"}
        The right flank holds liver and right kidney, the left one spleen and left kidney. One
        view in four holds only one of the two.

    Notes
    -----
    Sides are mirrored, as in transverse views: the big organ lies outwards, the spine inwards.
    Echogenicities of the organs and of what fills the space between them overlap, so that it
    takes position, shape and neighbours to tell them apart.
    """

    def __init__(self, rng: np.random.Generator, side: Literal["right", "left"]) -> None:
        inwards = 1.0 if side == "right" else -1.0
        kidney = _kidney(rng, RIGHT_KIDNEY if side == "right" else LEFT_KIDNEY, inwards)
        large = _liver(rng) if side == "right" else _spleen(rng)
        alone = rng.random() < _ALONE
        chosen = int(rng.integers(2))
        self.organs: tuple[Organ, ...] = ((large, kidney)[chosen],) if alone else (large, kidney)
        skin, fat = rng.uniform(2, 3), rng.uniform(4, 12)
        self._skin = WavyLine(rng, skin, 0.2)
        self._muscle = WavyLine(rng, skin + fat, 0.8)
        self._cavity = WavyLine(rng, skin + fat + rng.uniform(5, 9), 1.0)
        self._spine = inwards * rng.uniform(42, 54), rng.uniform(70, 85)
        self._filling_db = _FILLING[0] + rng.normal(0, 2)
        self._bowel = Texture(rng, 9.0, 6.0)
        self._vessels = Texture(rng, 16.0, 11.0)
        self._grain = Texture(rng, 3.0, 2.0)

    def tissue(self, x: Floats, z: Floats) -> TissueMap:
        """Evaluate the tissue at positions of a beam grid.

        Parameters
        ----------
        x, z : ndarray of float32, shape (D, L)
            Lateral position (0 below the probe's centre) and depth below the skin, mm.
        """
        bowel, grain = self._bowel(x, z), self._grain(x, z)
        echo = (self._filling_db + 3.5 * bowel + grain).astype(np.float32)
        attenuation = np.full(x.shape, _FILLING[1], np.float32)
        classes = np.zeros(x.shape, np.uint8)
        for organ in self.organs:
            self._add(organ, x, z, grain, echo, attenuation, classes)
        self._add_spine(x, z, echo, attenuation, classes)

        muscle, cavity = self._muscle(x), self._cavity(x)
        wall = z < cavity
        fibres = 3 * np.sin(z * np.float32(2 * np.pi / 2.5) + bowel)
        np.copyto(echo, _MUSCLE[0] + fibres, where=wall, casting="same_kind")
        attenuation[wall] = _MUSCLE[1]
        fat = z < muscle
        np.copyto(echo, _FAT[0] + 2 * grain, where=fat, casting="same_kind")
        attenuation[fat] = _FAT[1]
        for boundary in (muscle, cavity):
            echo[np.abs(z - boundary) < 0.5] = _CAPSULE_DB
        skin = z < self._skin(x)
        echo[skin], attenuation[skin] = _SKIN
        classes[wall] = 0
        return TissueMap(echo, attenuation, classes)

    def _add(
        self,
        organ: Organ,
        x: Floats,
        z: Floats,
        grain: Floats,
        echo: Floats,
        attenuation: Floats,
        classes: np.ndarray[tuple[int, ...], np.dtype[np.uint8]],
    ) -> None:
        distance, angle = organ.polar(x, z)
        inside = distance < 1
        parenchyma = organ.echogenicity_db + 0.7 * grain
        if organ.number in (RIGHT_KIDNEY, LEFT_KIDNEY):
            pyramids = np.cos(9 * angle) * np.exp(-(((distance - 0.62) / np.float32(0.12)) ** 2))
            sinus = np.clip((np.float32(0.5) - distance) / np.float32(0.16), 0, 1)
            parenchyma = parenchyma - 3 * np.maximum(pyramids, 0) + 10 * sinus
        else:
            # A zero crossing of a smooth field is a curved tube: vessels, few in the spleen.
            calibre = np.float32(0.14 if organ.number == LIVER else 0.05)
            tubes = np.exp(-((self._vessels(x, z) / calibre) ** 2)) * (distance < 0.85)
            parenchyma = parenchyma - 11 * tubes
        np.copyto(echo, parenchyma, where=inside, casting="same_kind")
        attenuation[inside] = organ.attenuation
        # A capsule mirrors sound: it shines where it faces the probe and fades at its sides.
        facing = np.sin(angle + np.float32(organ.tilt)) ** 2
        rim = np.abs(distance - 1) * np.float32(organ.width_mm) < 0.7
        echo[rim] += np.float32(_CAPSULE_DB) * facing[rim]
        classes[inside] = organ.number

    def _add_spine(
        self,
        x: Floats,
        z: Floats,
        echo: Floats,
        attenuation: Floats,
        classes: np.ndarray[tuple[int, ...], np.dtype[np.uint8]],
    ) -> None:
        distance = np.hypot((x - self._spine[0]) / 14, (z - self._spine[1] - 12) / 12)
        bone = distance < 1
        echo[bone], attenuation[bone] = _SPINE
        echo[bone & (distance > 0.86)] = 12
        classes[bone] = 0


def _liver(rng: np.random.Generator) -> Organ:
    return Organ(
        number=LIVER,
        x_mm=rng.uniform(-30, -14),
        z_mm=rng.uniform(38, 46),
        length_mm=rng.uniform(50, 64),
        width_mm=rng.uniform(25, 32),
        tilt=rng.normal(0.05, 0.1),
        bend=rng.uniform(-0.15, 0.1),
        taper=rng.uniform(0.2, 0.5),
        outline=draw_outline(rng, 0.06),
        echogenicity_db=rng.normal(-3, 1.5),
        attenuation=rng.uniform(0.5, 0.75),
    )


def _spleen(rng: np.random.Generator) -> Organ:
    return Organ(
        number=SPLEEN,
        x_mm=rng.uniform(8, 24),
        z_mm=rng.uniform(32, 40),
        length_mm=rng.uniform(30, 42),
        width_mm=rng.uniform(13, 19),
        tilt=rng.normal(0.1, 0.12),
        bend=rng.uniform(0.4, 0.9),
        taper=rng.uniform(-0.2, 0.2),
        outline=draw_outline(rng, 0.05, hilum=rng.uniform(0, 0.15)),
        echogenicity_db=rng.normal(-2.5, 1.5),
        attenuation=rng.uniform(0.4, 0.6),
    )


def _kidney(rng: np.random.Generator, number: int, inwards: float) -> Organ:
    return Organ(
        number=number,
        x_mm=inwards * rng.uniform(2, 16),
        z_mm=rng.uniform(62, 72),
        length_mm=rng.uniform(28, 36),
        width_mm=rng.uniform(14, 18),
        tilt=inwards * rng.normal(0.2, 0.12),
        bend=rng.uniform(0.05, 0.3),
        taper=rng.uniform(-0.1, 0.1),
        outline=draw_outline(rng, 0.04, hilum=rng.uniform(0.1, 0.3)),
        echogenicity_db=rng.normal(-6, 1.5),
        attenuation=rng.uniform(0.5, 0.8),
    )
