"""The page of a table of outlines: README.md, table.csv, table.json and the figure."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from sonofed_common.runtime import write_atomically
from sonofed_simulations.segmentation_summary import MaskSummary, MaskSummaryRow, PlugIn
from sonofed_simulations.statistics import Contrast, Effect, is_told
from sonofed_simulations.tables.forest import LEGEND, forest
from sonofed_simulations.tables.manifest import MADE_OF
from sonofed_simulations.tables.mask_effects import over_baseline, over_start
from sonofed_simulations.tables.mask_numbers import csv_of, json_of
from sonofed_simulations.tables.pages import contrast_text, interval_text, markdown

FIGURE = "differences.svg"


@dataclass(frozen=True)
class MaskClaim:
    """An effect on Dice that the work reports.

    Attributes
    ----------
    text : str
        One sentence with the published number, without the full stop.
    rows : tuple of str
        Rows that are to show it, each over the baseline, or over its start with ``plug_in``.
    least : float
        The smallest published effect, as a share; its sign is the effect's.
    plug_in : bool
        Whether the effect is over the row that the method started from.
    """

    text: str
    rows: tuple[str, ...]
    least: float
    plug_in: bool = False


@dataclass(frozen=True)
class MaskTable:
    """What one table shows of the comparison.

    Attributes
    ----------
    name : str
        As ``sonofed-lab table`` takes it.
    title, work : str
        Of the page, and what it is after.
    published : dict of str to str
        The rows in order, each with what the work printed for it.
    unit : str
        Of the published numbers.
    claims : tuple of MaskClaim
        What the page's paragraph judges.
    adapted : tuple of str
        List items: what differs from the work.
    """

    name: str
    title: str
    work: str
    published: Mapping[str, str]
    unit: str
    claims: tuple[MaskClaim, ...]
    adapted: tuple[str, ...]


def write_mask_page(
    table: MaskTable, summary: MaskSummary, trained: Sequence[str], out: Path
) -> None:
    """Write the page, its numbers and its figure.

    Parameters
    ----------
    table : MaskTable
        What to show.
    summary : MaskSummary
        Of a comparison that has its rows and no others.
    trained : sequence of str
        List items: image size and lengths, and what is kept of the studies.
    out : Path
        Folder of the page.
    """
    rows = [row for row in summary.rows if row.name in table.published]
    shown = table.published.keys()
    gained = [gain for gain in summary.plug_in if {gain.method, gain.start} <= shown]
    write_atomically(out / "table.json", json_of(rows, gained).encode())
    write_atomically(out / "table.csv", csv_of(table.published, rows, gained).encode())
    write_atomically(out / FIGURE, _figure(summary.baseline, rows))
    page = _page(table, summary, trained, rows, gained)
    write_atomically(out / "README.md", ("\n".join(page) + "\n").encode())


def _page(
    table: MaskTable,
    summary: MaskSummary,
    trained: Sequence[str],
    rows: Sequence[MaskSummaryRow],
    gained: Sequence[PlugIn],
) -> list[str]:
    machine = summary.machine
    header = ("row", "seeds", table.unit, "Dice (95%)", "worst site", "NSD", "HD95, pixels",
              f"Dice over {summary.baseline} (95%), p Holm", "d", "higher",
              "way to supervised")  # fmt: skip
    lines = [
        f"# {table.title}",
        "",
        f"After {table.work}.",
        "",
        " ".join(_judged(claim, summary) for claim in table.claims),
        "",
        "## Beside the published numbers",
        "",
        *markdown(header, [_cells(table, row) for row in rows]),
        "",
        "Means over sites and seeds, with intervals from 2,000 bootstrap samples of the test "
        "patients: they cover the choice of patients, not of seeds. Differences are in the same "
        "samples; p is two-sided, with Holm's correction over the rows of this table. Dice of an "
        "image whose two masks are both empty counts 1.",
        "",
        "d: Cohen's d of the hospitals' Dice differences, mean by standard deviation, from three "
        "hospitals on; higher: hospitals at which the row is the higher one. A hospital's "
        "difference is a mean over seeds, for the comparison's summary holds no seed by itself: d "
        "tells how alike hospitals gain, not how alike seeds do, and a small gain that is the same "
        "everywhere has a large d.",
        "",
        "## Dice by site",
        "",
        *markdown(
            ("row", *summary.tested),
            [[row.name, *(interval_text(row.sites[s]) for s in summary.tested)] for row in rows],
        ),
        "",
        "## Differences",
        "",
        f"![Differences]({FIGURE})",
        "",
        LEGEND,
    ]
    if gained:
        starts = ("method", "over its start", "Dice gained (95%), p Holm", "d", "higher")
        lines += ["", "## Over the model that a method started from", ""]
        lines += markdown(
            starts,
            [
                [gain.method, gain.start, contrast_text(gain), *_words(over_start(gain, rows))]
                for gain in gained
            ],
        )
    tests = ", ".join(f"{site} {'/'.join(map(str, n))}" for site, n in summary.tested.items())
    return [
        *lines,
        "",
        "## How it was made",
        "",
        f"- Rows of the comparison `{summary.name}`: every seed has a source training, a "
        "patient-level split and adaptations of its own. No target label is used but by the row "
        "supervised; nothing was chosen on the masks that are tested on.",
        *(f"- {item}" for item in trained),
        f"- Test images by site, a number a seed: {tests}.",
        f"- {machine.cpu}, {machine.cores} cores, {machine.device}. {MADE_OF}",
        "",
        "## What is adapted",
        "",
        *(f"- {item}" for item in table.adapted),
    ]


def _judged(claim: MaskClaim, summary: MaskSummary) -> str:
    found: dict[str, Contrast] = {}
    for row in summary.rows:
        if not claim.plug_in and row.name in claim.rows and row.over_baseline is not None:
            found[f"{row.name} over {summary.baseline}"] = row.over_baseline
    for gain in summary.plug_in:
        if claim.plug_in and gain.method in claim.rows:
            found[f"{gain.method} over {gain.start}"] = gain
    said = []
    for name, effect in found.items():
        near, far = sorted((effect.low, effect.high), key=lambda v: v / claim.least)
        if not is_told(effect):
            verdict = "is not told from 0"
        elif near / claim.least > 0:
            size = "as large as published" if near / claim.least >= 1 else "smaller than published"
            if far / claim.least >= 1 > near / claim.least:
                size = "as large as published or smaller"
            verdict = f"holds and is {size}"
        else:
            verdict = "is reversed"
        said.append(f"{name} {interval_text(effect, '+.3f')}: the effect {verdict}")
    return f"{claim.text}. Here: {'; '.join(said) or 'no such row has run'}."


def _cells(table: MaskTable, row: MaskSummaryRow) -> list[str]:
    way = row.way_to_supervised
    return [
        row.name,
        str(len(row.seeds)),
        table.published[row.name],
        interval_text(row.dice),
        f"{row.worst_site_dice:.3f}, {row.worst_site}",
        f"{row.nsd.value:.3f}",
        f"{row.hd95.value:.1f}",
        contrast_text(row.over_baseline),
        *_words(over_baseline(row)),
        "" if way is None else f"{way.value:.0%} ({way.low:.0%} to {way.high:.0%})",
    ]


def _figure(baseline: str, rows: Sequence[MaskSummaryRow]) -> bytes:
    compared = {row.name: row.over_baseline for row in rows if row.over_baseline is not None}
    panels = {f"Dice over {baseline}": list(compared.values())}
    return forest(list(compared), panels, 6.4)


def _words(effect: Effect | None) -> tuple[str, str]:
    return ("", "") if effect is None or not effect.pairs else effect.words
