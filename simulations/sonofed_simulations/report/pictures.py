"""Pictures of a simulation: chosen and other images, reconstructions beside originals."""

from __future__ import annotations

import base64
import io
from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image

from sonofed_common.models.edges import canny
from sonofed_simulations.report.view import SiteView

Pixels = NDArray[np.uint8]
TILE, GAP = 128, 6


def chosen(view: SiteView, count: int, columns: int) -> str | None:
    """Contact sheet of the chosen images, see `SiteView.chosen`; a PNG data URI."""
    return _sheet(view.images[view.chosen[:count]], columns)


def left(view: SiteView, count: int, columns: int) -> str | None:
    """Contact sheet of the images not chosen, see `SiteView.left`; a PNG data URI."""
    return _sheet(view.images[view.left[:count]], columns)


def reconstructions(view: SiteView, columns: int) -> str | None:
    """Originals, their edges and their reconstructions in three rows; a PNG data URI.

    Parameters
    ----------
    view : SiteView
        A site; without reconstructions there is no picture.
    columns : int
        Images side by side, spread evenly over the pool.
    """
    if view.reconstructions is None or not len(view.images):
        return None
    picks = np.unique(np.linspace(0, len(view.images) - 1, columns).round().astype(int))
    originals = view.images[picks]
    scaled = torch.from_numpy(originals).float().unsqueeze(1) / 255
    edges = (canny(scaled)[:, 0].numpy() * 255).astype(np.uint8)
    return _sheet(np.concatenate([originals, edges, view.reconstructions[picks]]), len(picks))


def _sheet(images: Pixels, columns: int) -> str | None:
    if not len(images):
        return None
    rows = -(-len(images) // columns)
    step = TILE + GAP
    sheet = Image.new("LA", (columns * step - GAP, rows * step - GAP), (255, 0))
    for index, image in enumerate(images):
        tile = Image.fromarray(image).resize((TILE, TILE), Image.Resampling.LANCZOS)
        sheet.paste(tile.convert("LA"), (index % columns * step, index // columns * step))
    buffer = io.BytesIO()
    sheet.save(buffer, format="PNG")
    return f"data:image/png;base64,{base64.b64encode(buffer.getvalue()).decode()}"


def tiles(sites: Sequence[SiteView]) -> tuple[int, int]:
    """Tiles and columns of a contact sheet: fewer rows where there are many sites."""
    columns = 4
    return (4 if len(sites) <= 4 else 2) * columns, columns
