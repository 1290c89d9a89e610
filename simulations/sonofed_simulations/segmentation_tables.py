"""A segmentation comparison's summary as tables, for a terminal and for a page."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

from rich.table import Table

from sonofed_common.runtime import write_atomically
from sonofed_simulations.segmentation_summary import MaskSummary, MaskSummaryRow
from sonofed_simulations.statistics import Interval

HEADER = (
    "method",
    "seeds",
    "Dice (95%)",
    "worst site",
    "NSD",
    "HD95",
    "ECE",
    "over baseline (95%), p Holm",
    "of the way to supervised",
)

COVERED = (
    "Means over sites and seeds. Intervals cover the choice of patients, not of seeds: how far "
    "trainings differ by chance is not in them."
)


def mask_table(summary: MaskSummary) -> Table:
    """Return the summary for a terminal."""
    table = Table(*HEADER)
    for row in summary.rows:
        table.add_row(*_cells(row))
    return table


def write_mask_summary(summary: MaskSummary, out: Path) -> None:
    """Write ``comparison.json`` and ``comparison.md``."""
    text = json.dumps(summary.model_dump(mode="json"), indent=2)
    write_atomically(out / "comparison.json", f"{text}\n".encode())
    write_atomically(out / "comparison.md", ("\n".join(mask_page(summary)) + "\n").encode())


def mask_page(summary: MaskSummary) -> list[str]:
    """Return the summary as lines of Markdown."""
    sites = list(summary.rows[0].sites) if summary.rows else []
    return [
        *_markdown(HEADER, [_cells(row) for row in summary.rows]),
        "",
        COVERED,
        "",
        "Other measures (95%):",
        "",
        *_markdown(
            ("method", "NSD", "HD95", "ECE"),
            [
                [row.name, _text(row.nsd), _text(row.hd95, digits=1), _text(row.ece)]
                for row in summary.rows
            ],
        ),
        "",
        "Dice by site (95%):",
        "",
        *_markdown(
            ("method", *sites),
            [[row.name, *(_text(row.sites[site]) for site in sites)] for row in summary.rows],
        ),
        "",
        "NSD by site (95%):",
        "",
        *_markdown(
            ("method", *sites),
            [[row.name, *map(_text, row.sites_nsd.values())] for row in summary.rows],
        ),
        "",
        "HD95 by site, pixels (95%):",
        "",
        *_markdown(
            ("method", *sites),
            [
                [row.name, *(_text(found, digits=1) for found in row.sites_hd95.values())]
                for row in summary.rows
            ],
        ),
        "",
        "ECE by site (95%):",
        "",
        *_markdown(
            ("method", *sites),
            [[row.name, *map(_text, row.sites_ece.values())] for row in summary.rows],
        ),
        "",
        f"Dice over {summary.baseline} by site (95%, uncorrected):",
        "",
        *_markdown(
            ("method", *sites),
            [
                [row.name, *(_text(gained, "+") for gained in row.sites_over_baseline.values())]
                for row in summary.rows
                if row.sites_over_baseline
            ],
        ),
        "",
        "Images by site, a number a seed:",
        "",
        *_markdown(
            ("", *sites),
            [
                [what, *(", ".join(map(str, counts.get(site, ()))) for site in sites)]
                for what, counts in (
                    ("tested", summary.tested),
                    ("labelled for the supervised control", summary.trained),
                )
            ],
        ),
        "",
        "What the plug-in adds:",
        "",
        *_markdown(
            ("method", "over", "Dice gained (95%)", "p Holm"),
            [[p.method, p.start, _text(p, "+"), f"{p.p_holm:.3f}"] for p in summary.plug_in],
        ),
    ]


def _cells(row: MaskSummaryRow) -> list[str]:
    over = row.over_baseline
    way = row.way_to_supervised
    return [
        row.name,
        str(len(row.seeds)),
        _text(row.dice),
        f"{row.worst_site_dice:.3f}, {row.worst_site}",
        f"{row.nsd.value:.3f}",
        f"{row.hd95.value:.1f}",
        f"{row.ece.value:.3f}",
        "" if over is None else f"{_text(over, '+')}, {over.p_holm:.3f}",
        "" if way is None else f"{way.value:.0%} ({way.low:.0%} to {way.high:.0%})",
    ]


def _markdown(header: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    lines = [header, ["---"] * len(header), *rows]
    return [f"| {' | '.join(line)} |" for line in lines]


def _text(found: Interval, sign: str = "", digits: int = 3) -> str:
    value, low, high = (f"{v:{sign}.{digits}f}" for v in (found.value, found.low, found.high))
    return f"{value} ({low} to {high})"
