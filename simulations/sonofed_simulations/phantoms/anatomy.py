"""The breast: skin, fat, gland, muscle and ribs, and the lesion among them."""

from __future__ import annotations

import numpy as np

from sonofed_simulations.phantoms.lesion import Lesion, draw_lesion
from sonofed_simulations.phantoms.tissue import Floats, Texture, TissueMap, WavyLine

# Echogenicity (dB relative to gland) and one-way attenuation (dB / (cm MHz)); magnitudes after
# Duck, Physical Properties of Tissues (1990), rounded.
_SKIN = 5.0, 0.9
_FAT = -11.0, 0.45
_GLAND = 0.0, 0.65
_MUSCLE = -8.0, 0.6
_RIB = -18.0, 8.0
_FASCIA_DB = 4.0


class Breast:
    """One patient's breast.

    Parameters
    ----------
    rng : numpy.random.Generator
        Draws layer depths, boundaries, textures, ribs and the lesion.
    malignant : bool
        Class of the lesion.
    """

    def __init__(self, rng: np.random.Generator, malignant: bool) -> None:
        self.lesion: Lesion = draw_lesion(rng, malignant)
        gland = rng.uniform(5, 10)
        retro = rng.uniform(23, 29)
        self._skin = WavyLine(rng, rng.uniform(1.2, 2.2), 0.15)
        self._gland = WavyLine(rng, gland, 1.0)
        self._retro = WavyLine(rng, retro, 1.2)
        self._muscle = WavyLine(rng, retro + rng.uniform(1, 3), 0.7)
        self._rib_depth = retro + rng.uniform(8, 12)
        self._rib_offset = rng.uniform(-12, 12)
        self._has_ribs = bool(rng.random() < 0.5)
        self._fibre_slope = rng.uniform(-0.15, 0.15)
        self._lobules = Texture(rng, 4.0, 1.8)
        self._septa = Texture(rng, 7.0, 3.0)
        self._grain = Texture(rng, 1.5, 0.9)

    def tissue(self, x: Floats, z: Floats) -> TissueMap:
        """Evaluate the tissue at positions of a beam grid.

        Parameters
        ----------
        x, z : ndarray of float32, shape (D, L)
            Lateral position (0 below the probe's centre) and depth below the skin, mm.
        """
        echo = np.empty(x.shape, np.float32)
        attenuation = np.empty(x.shape, np.float32)
        gland_top, retro, muscle = self._gland(x), self._retro(x), self._muscle(x)
        lobules = self._lobules(x, z)

        echo[:], attenuation[:] = _FAT
        # A zero crossing of a smooth field is a curved sheet: Cooper's ligaments between lobules.
        echo += np.float32(9) * np.exp(-((self._septa(x, z) / np.float32(0.12)) ** 2))

        gland = (z > gland_top) & (z < retro)
        parenchyma = _GLAND[0] + 2.2 * lobules - np.where(lobules < -1.0, 5, 0)
        np.copyto(echo, parenchyma, where=gland, casting="same_kind")
        attenuation[gland] = _GLAND[1]

        deep = z > muscle
        fibres = 4 * np.sin((z + self._fibre_slope * x) * np.float32(2 * np.pi / 1.7) + lobules)
        np.copyto(echo, _MUSCLE[0] + fibres, where=deep, casting="same_kind")
        attenuation[deep] = _MUSCLE[1]
        for boundary in (gland_top, retro, muscle):
            echo[np.abs(z - boundary) < 0.25] = _FASCIA_DB

        skin = z < self._skin(x)
        echo[skin], attenuation[skin] = _SKIN
        if self._has_ribs:
            self._add_ribs(x, z, echo, attenuation)
        lesion = self._add_lesion(x, z, echo, attenuation)
        return TissueMap(echo, attenuation, lesion.astype(np.uint8))

    def _add_ribs(self, x: Floats, z: Floats, echo: Floats, attenuation: Floats) -> None:
        lateral = (x - self._rib_offset + 15) % 30 - 15
        distance = np.hypot(lateral / 6.0, (z - self._rib_depth - 4) / 4.0)
        bone = distance < 1
        echo[bone], attenuation[bone] = _RIB
        echo[bone & (distance > 0.88) & (z < self._rib_depth + 3)] = 14

    def _add_lesion(
        self, x: Floats, z: Floats, echo: Floats, attenuation: Floats
    ) -> np.ndarray[tuple[int, ...], np.dtype[np.bool_]]:
        lesion = self.lesion
        distance = lesion.distance(x, z)
        inside = 1 / (1 + np.exp(np.clip((distance - 1) / np.float32(lesion.softness), -30, 30)))
        interior = lesion.echogenicity_db + lesion.heterogeneity_db * self._grain(x, z)
        echo += np.float32(lesion.halo_db) * np.exp(-(((distance - 1.2) / np.float32(0.15)) ** 2))
        echo += inside * (interior - echo)
        attenuation += inside * (np.float32(lesion.attenuation) - attenuation)
        return np.asarray(distance < 1)
