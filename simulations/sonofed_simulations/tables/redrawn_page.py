"""What the pages of both tables of redrawn images say alike."""

from __future__ import annotations

from collections.abc import Sequence

from rich.table import Table

from sonofed_simulations.statistics import Interval
from sonofed_simulations.tables.pages import interval_text
from sonofed_simulations.tables.redrawn import BLUR, Cells
from sonofed_simulations.tables.redrawn_settings import RedrawnSettings

WORK = (
    "ADAptation: Reconstruction-based Unsupervised Active Learning for Breast Ultrasound Diagnosis "
    "(arXiv 2507.00474)"
)

ADAPTED = (
    "The work fine-tunes a ControlNet on Stable Diffusion 1.5 for 200 epochs, at 512 px. Ours is a "
    "small pixel-space diffusion (of blocks of cosines) trained from scratch: its reconstructions "
    "are far coarser, and the numbers tell of it, not of Stable Diffusion.",
    "The work's targets are UDIAT, BUS-BRA and an in-house set; ours BUS-BRA, by scanner, and "
    "BrEaST.",
    "BUSI has no patient ids: groups of near duplicates stand for patients.",
)

EFFECTS = ("d", "higher", "its d", "its higher")
"""Columns that tell how large differences are beside their spread."""


def method(settings: RedrawnSettings, cells: Cells) -> tuple[str, ...]:
    """List items on the source, the images, the ways and the time."""
    hours = sum(cell.seconds for found in cells.values() for cell in found) / 3600
    return (
        "Source BUSI (Cairo); hospitals BUS-BRA by scanner (Rio de Janeiro) and BrEaST (Poland), "
        f"as in scenario `{settings.scenario}`. Classifier and diffusion stack are "
        f"{settings.words()}, on the source alone.",
        f"Up to {settings.images} images a site, evenly spaced over its files: at the hospitals "
        "over all, at the source over the held-out patients. No label of a hospital is used, and "
        "nothing was chosen on these numbers.",
        "default: SDEdit to half of the schedule, ten steps of DPM-Solver++, no guidance, so that "
        "five steps run. as published: from pure noise, 50 steps of DDIM, guidance 9.",
        f"{BLUR}: a Gaussian filter of one pixel, as a control. It knows nothing of the source.",
        f"The cells took {hours:.2f} hours of redrawing and measuring, on one thread.",
    )


def progress(cells: int, wanted: int) -> str:
    """Warn of a page that is not whole."""
    if cells == wanted:
        return ""
    return f"**{cells} of {wanted} cells have run**, so this may change. "


def listed(found: Sequence[tuple[str, Interval]]) -> str:
    """Sites with their differences."""
    return ", ".join(f"{site} {interval_text(one, '+.3f')}" for site, one in found)


def terminal_table(header: Sequence[str], lines: Sequence[Sequence[str]]) -> Table:
    """Return the page's table for a terminal, which is too narrow for the effects."""
    kept = [n for n, name in enumerate(header) if name not in EFFECTS]
    table = Table(*(header[n] for n in kept))
    for line in lines:
        table.add_row(*(line[n] for n in kept))
    return table
