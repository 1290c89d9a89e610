"""Pictures of masks: which images, contours, the map of confidence, the branch that was trusted."""

from __future__ import annotations

import base64
import colorsys
import io
from collections.abc import Sequence
from dataclasses import dataclass

import cv2
import numpy as np
from matplotlib import colormaps
from matplotlib.colors import to_hex
from numpy.typing import NDArray
from PIL import Image

from sonofed_simulations.report.view import Floats, SegmentationView

Pixels = NDArray[np.uint8]
TILE = 256
WHITE = (255, 255, 255)
BRANCH_COLOURS = ("#0b6aa8", "#c8501e", "#00856f", "#a23b83", "#8a6d00", "#4a56b0", "#2f7d32")
CONFIDENCE = colormaps["viridis"]
RULE = {"worst": 0.0, "lower quartile": 0.25, "median": 0.5, "best": 1.0}
"""Pictures by rank of our Dice, as a share of the way from the worst to the best image."""

COLUMNS = ("Image", "Expert", "Source only", "Result", "Confidence", "Trusted")


@dataclass(frozen=True)
class Case:
    """One image of the page, with its tiles as pairs of column and JPEG data URI."""

    label: str
    dice_source: float | None
    dice_ours: float
    tiles: list[tuple[str, str]]


def choose(dice: Floats) -> list[tuple[str, int]]:
    """Choose pictures by rank of Dice: worst, lower quartile, median and best.

    Parameters
    ----------
    dice : ndarray (n,)
        Of the result, by image; images without a finite Dice are never chosen.

    Returns
    -------
    list of (str, int)
        Place in the ranking and index of the image, no image twice; ties go to the earlier image.
    """
    known = np.flatnonzero(np.isfinite(dice))
    order = known[np.argsort(dice[known], kind="stable")]
    chosen: dict[int, str] = {}
    for label, share in RULE.items():
        if len(order):
            chosen.setdefault(int(order[round(share * (len(order) - 1))]), label)
    return [(label, index) for index, label in chosen.items()]


def cases(view: SegmentationView, classes: int) -> list[Case]:
    """Tiles of the chosen images of a site.

    Parameters
    ----------
    view : SegmentationView
        A site.
    classes : int
        Classes but the background, over all sites, so that a class has one colour on the page.
    """
    return [
        Case(
            label, _finite(view.dice_source[i]), float(view.dice_ours[i]), _tiles(view, i, classes)
        )
        for label, i in choose(view.dice_ours)
    ]


def foreground_classes(views: Sequence[SegmentationView]) -> int:
    """Largest class in any mask, at least 1."""
    masks = [mask for view in views for mask in (view.truth, view.source, view.ours)]
    return max([1, *(int(mask.max(initial=0)) for mask in masks)])


def class_colours(classes: int) -> list[str]:
    """Distinct colours of classes 1.., evenly spaced in hue, bright enough for dark images."""
    return [to_hex(colorsys.hsv_to_rgb(0.08 + i / classes, 0.85, 1.0)) for i in range(classes)]


def branch_colours(branches: Sequence[str]) -> list[tuple[str, str]]:
    """Colour and name of each branch, in a reader's words."""
    return [
        (BRANCH_COLOURS[i % len(BRANCH_COLOURS)], _branch_name(name))
        for i, name in enumerate(branches)
    ]


def confidence_gradient() -> str:
    """CSS colours of the map of confidence, from 0 to 1."""
    return ", ".join(to_hex(CONFIDENCE(share)) for share in np.linspace(0, 1, 6))


def _finite(value: float) -> float | None:
    return float(value) if np.isfinite(value) else None


def _branch_name(name: str) -> str:
    if name.startswith("target-"):
        return f"target-informed by {name.removeprefix('target-')}"
    return {"target": "target-informed"}.get(name, name)


def _tiles(view: SegmentationView, index: int, classes: int) -> list[tuple[str, str]]:
    image = cv2.resize(view.images[index], (TILE, TILE), interpolation=cv2.INTER_CUBIC)
    grey = np.repeat(image[:, :, None], 3, axis=2)
    truth, colours = view.truth[index], class_colours(classes)
    confidence = CONFIDENCE(np.clip(view.confidence[index], 0, 1))[:, :, :3]
    pictures = [
        grey,
        _contours(grey, truth, colours, 3),
        _contours(_contours(grey, truth, [], 2), view.source[index], colours, 3),
        _contours(_contours(grey, truth, [], 2), view.ours[index], colours, 3),
        _scaled(confidence),
        _scaled(_trusted(view, index)),
    ]
    shown = COLUMNS if len(view.branches) > 1 else COLUMNS[:-1]
    return [(name, _jpeg(picture)) for name, picture in zip(shown, pictures, strict=False)]


def _contours(picture: Pixels, mask: Pixels, colours: Sequence[str], width: int) -> Pixels:
    """Draw each class's outline in its colour, or in white where there are no colours."""
    drawn = picture.copy()
    for label in np.unique(mask[mask > 0]):
        # Scaling the mask linearly and cutting at one half gives outlines without stairs.
        area = cv2.resize((mask == label).astype(np.float32), (TILE, TILE)) >= 0.5
        outlines, _ = cv2.findContours(area.astype(np.uint8), cv2.RETR_LIST, cv2.CHAIN_APPROX_NONE)
        colour = _rgb(colours[label - 1]) if colours else WHITE
        cv2.drawContours(drawn, outlines, -1, colour, width, cv2.LINE_AA)
    return drawn


def _trusted(view: SegmentationView, index: int) -> Floats:
    weights = view.weights[:, index].astype(np.float64)
    shares = weights / np.maximum(weights.sum(axis=0), 1e-12)
    palette = np.array([_rgb(colour) for colour, _ in branch_colours(view.branches)]) / 255
    return np.tensordot(shares, palette, axes=(0, 0))


def _scaled(colours: Floats) -> Pixels:
    pixels: Pixels = (np.clip(colours, 0, 1) * 255).round().astype(np.uint8)
    scaled: Pixels = cv2.resize(pixels, (TILE, TILE), interpolation=cv2.INTER_NEAREST)
    return scaled


def _rgb(colour: str) -> tuple[int, int, int]:
    return int(colour[1:3], 16), int(colour[3:5], 16), int(colour[5:7], 16)


def _jpeg(picture: Pixels) -> str:
    buffer = io.BytesIO()
    # Subsampled colours would smear the outlines.
    Image.fromarray(picture).save(buffer, format="JPEG", quality=88, subsampling=0)
    return f"data:image/jpeg;base64,{base64.b64encode(buffer.getvalue()).decode()}"
