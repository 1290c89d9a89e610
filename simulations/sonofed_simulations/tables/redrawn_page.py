"""What the pages of both tables of redrawn images say alike."""

from __future__ import annotations

from collections.abc import Sequence

from sonofed_simulations.paired import Interval
from sonofed_simulations.tables.pages import interval_text
from sonofed_simulations.tables.redrawn import BLUR, IMAGE_SIZE, IMAGES

WORK = (
    "ADAptation: Reconstruction-based Unsupervised Active Learning for Breast Ultrasound Diagnosis "
    "(arXiv 2507.00474)"
)

METHOD = (
    "Source BUSI (Cairo); hospitals BUS-BRA by scanner (Rio de Janeiro) and BrEaST (Poland), as in "
    "scenario `breast_three_countries`. Classifier and diffusion stack are trained once, on the "
    f"source alone, for the scenario's epochs, at {IMAGE_SIZE} px.",
    f"Up to {IMAGES} images a site, evenly spaced over its files: at the hospitals over all, at "
    "the source over the held-out patients. No label of a hospital is used, and nothing was "
    "chosen on these numbers.",
    "default: SDEdit to half of the schedule, ten steps of DPM-Solver++, no guidance, so that five "
    "steps run. as published: from pure noise, 50 steps of DDIM, guidance 9.",
    f"{BLUR}: a Gaussian filter of one pixel, as a control. It knows nothing of the source.",
)

ADAPTED = (
    "The work fine-tunes a ControlNet on Stable Diffusion 1.5 for 200 epochs, at 512 px. Ours is a "
    "small pixel-space diffusion (of blocks of cosines) trained from scratch in minutes: its "
    "reconstructions are far coarser, and the numbers tell of it, not of Stable Diffusion.",
    "The work's targets are UDIAT, BUS-BRA and an in-house set; ours BUS-BRA, by scanner, and "
    "BrEaST.",
    "BUSI has no patient ids: groups of near duplicates stand for patients.",
)


def progress(cells: int, wanted: int) -> str:
    """Warn of a page that is not whole."""
    if cells == wanted:
        return ""
    return f"**{cells} of {wanted} cells have run**, so this may change. "


def listed(found: Sequence[tuple[str, Interval]]) -> str:
    """Sites with their differences."""
    return ", ".join(f"{site} {interval_text(one, '+.3f')}" for site, one in found)
