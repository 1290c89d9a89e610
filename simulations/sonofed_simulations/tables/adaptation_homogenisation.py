"""Similarity to the source before and after reconstruction (ADAptation, Table 1 and Figure 1)."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from rich.table import Table

from sonofed_simulations.report.clouds import density
from sonofed_simulations.report.figures import INK, drawing, site_colours
from sonofed_simulations.report.figures import SOURCE as SOURCE_COLOUR
from sonofed_simulations.statistics import (
    Contrast,
    Floats,
    Interval,
    PatientDraws,
    contrast,
    holm,
    is_told,
)
from sonofed_simulations.tables.article import Article, Row, write_article
from sonofed_simulations.tables.distances import overlap, wasserstein
from sonofed_simulations.tables.manifest import write_facts
from sonofed_simulations.tables.pages import contrast_text, markdown
from sonofed_simulations.tables.redrawn import BLUR, SOURCE, WAYS, Cells, Redrawing, make_redrawn
from sonofed_simulations.tables.redrawn_page import ADAPTED, WORK, listed, method, progress
from sonofed_simulations.tables.request import Made, Request

DISTANCES = {"Wasserstein-1": wasserstein, "overlap": overlap}
NEARER = {"Wasserstein-1": -1, "overlap": 1}
"""Sign of a change that means nearer to the source."""
FIGURE = "densities.svg"

Key = tuple[str, str, str]
"""Way, hospital and distance."""
Which = Literal["shared", "change"]
"""Of `Moved`."""


@dataclass(frozen=True)
class Moved:
    """How a hospital's distribution lies to the source's.

    Attributes
    ----------
    before, after : float
        Of its images, and of their reconstructions, to the source's held-out images.
    both : float
        Of its reconstructions to the reconstructions of the source's held-out images.
    change, shared : Contrast
        ``after`` and ``both``, each less ``before``, in the same bootstrap samples.
    """

    before: float
    after: float
    both: float
    change: Contrast
    shared: Contrast


def make(request: Request) -> Made:
    """Make the table; see `make_redrawn`.

    Raises
    ------
    ConfigurationError, DataMissingError
        See `Redrawing.prepare`.
    """
    return make_redrawn(request, _write)


def moves_of(cells: Cells) -> dict[Key, Moved]:
    """How reconstruction moves each hospital; p by Holm over the hospitals of a way and distance.

    A way of which the source's cells have not run is left out.
    """
    draws = PatientDraws((site, found[0].patients) for (_, site), found in cells.items())
    moves: dict[Key, Moved] = {}
    for way in WAYS:
        held = {c.seed: c for c in cells.get((way, SOURCE), ())}
        for name, measure in DISTANCES.items():
            found: dict[str, tuple[Floats, Floats, Floats]] = {}
            for (other, site), own in cells.items():
                pairs = [(c, held[c.seed]) for c in own if c.seed in held]
                if other != way or site == SOURCE or not pairs:
                    continue
                at = draws.weights(site, own[0].patients)
                source = draws.weights(SOURCE, pairs[0][1].patients)
                # What does not depend on the seed is the same in all of them.
                before = measure(pairs[0][0].before, at, pairs[0][1].before, source)
                after = [measure(c.after, at, s.before, source) for c, s in pairs]
                both = [measure(c.after, at, s.after, source) for c, s in pairs]
                found[site] = (before, np.mean(after, axis=0), np.mean(both, axis=0))
            changes = holm({site: contrast(after, b) for site, (b, after, _) in found.items()})
            shared = holm({site: contrast(both, b) for site, (b, _, both) in found.items()})
            for site, (before, moved, redrawn) in found.items():
                moves[way, site, name] = Moved(
                    float(before[0]),
                    float(moved[0]),
                    float(redrawn[0]),
                    changes[site],
                    shared[site],
                )
    return moves


def found_text(moves: Mapping[Key, Moved]) -> str:
    """Say whether reconstruction draws the hospitals to the source, way by way."""
    return (
        "The work reports that reconstruction homogenises three target domains with the source. "
        "Here, the change of each hospital's distance to the source's held-out images. Where both "
        f"are redrawn, so that the way itself is no difference: {_said(moves, 'shared')} Where the "
        f"hospital's images alone are redrawn: {_said(moves, 'change')}"
    )


def _said(moves: Mapping[Key, Moved], which: Which) -> str:
    said = []
    for way in WAYS:
        parts = []
        for name in DISTANCES:
            own = {s: getattr(m, which) for (w, s, n), m in moves.items() if (w, n) == (way, name)}
            if own:
                parts.append(f"{name}: {_verdict(own, name)}")
        said.append(f"**{way}**: {'; '.join(parts) or 'no hospital has run'}.")
    return f"{' '.join(said)} {_beside_blur(moves, which)}"


def _verdict(changes: Mapping[str, Contrast], name: str) -> str:
    parts = []
    for side, saying in (
        ("nearer", "the effect holds and is larger than its interval"),
        ("farther", "it is reversed, beyond its interval,"),
        ("open", "it is not told from 0"),
    ):
        own = [(site, change) for site, change in changes.items() if _side(change, name) == side]
        if own:
            parts.append(f"{saying} at {len(own)} of {len(changes)} ({listed(own)})")
    return ", ".join(parts)


def _side(change: Contrast, name: str) -> str:
    if not is_told(change):
        return "open"
    return "nearer" if change.value * NEARER[name] > 0 else "farther"


def _beside_blur(moves: Mapping[Key, Moved], which: Which) -> str:
    nearer = {key for key, m in moves.items() if _side(getattr(m, which), key[2]) == "nearer"}
    drawn = [key for key in nearer if key[0] != BLUR]
    shared = [key for key in drawn if (BLUR, *key[1:]) in nearer]
    if not drawn:
        return "Under diffusion no hospital comes nearer."
    return (
        f"Of the {len(drawn)} approaches under diffusion, {len(shared)} stand under the blur too, "
        "which knows nothing of the source."
    )


def _write(redrawing: Redrawing, request: Request) -> Made:
    cells = redrawing.finished()
    moves = moves_of(cells)
    count, wanted = sum(map(len, cells.values())), len(redrawing.wanted)
    order = [shown.site for shown in redrawing.shown]
    header, lines = _table(moves)
    article = Article(
        title="Whether reconstruction makes hospitals alike",
        work=f"Table 1 and Figure 1 of {WORK}",
        found=progress(count, wanted) + found_text(moves),
        sections={
            "Beside the published numbers": [
                "The text at hand prints no number of Table 1 (cross-domain similarity scores "
                "before and after reconstruction); Figure 1 is a picture.",
                "",
                *markdown(header, lines),
                "",
                "Similarity: cosine of an image's features to the mean feature of the source's "
                "training images, under the source's classifier with its own statistics. Before "
                "and after: distance of the hospital's similarities, and of its reconstructions', "
                "to those of the source's held-out images. Both redrawn: to the reconstructions "
                "of these; its change is to before, too. Wasserstein-1 falls and the overlap of "
                "the kernel densities (1: equal) rises where a hospital comes nearer. Means over "
                "seeds; changes with intervals from 2,000 bootstrap samples of both sites' "
                "patients, p two-sided, with Holm's correction over the hospitals. Distances have "
                "none: bootstrap samples lie farther apart than what they are drawn from.",
            ],
            **({"Densities": [f"![Densities]({FIGURE})"]} if moves else {}),
        },
        method=method(redrawing.settings, cells),
        adapted=(
            *ADAPTED,
            "What the similarity score of Table 1 is, the text does not say; the cosine to the "
            "source's mean feature is our reading.",
        ),
        rows=_rows(moves),
        figures={FIGURE: _figure(cells, order)} if moves else {},
    )
    write_article(article, request.out)
    counts = {"cells": count, "wanted": wanted}
    write_facts(request.out, {**redrawing.facts(), **counts}, redrawing.tested())
    table = Table(*header)
    for line in lines:
        table.add_row(*line)
    return Made(table, count, wanted)


def _table(moves: Mapping[Key, Moved]) -> tuple[tuple[str, ...], list[list[str]]]:
    header = ("redrawn", "hospital", "distance", "before", "after",
              "change (95%), p Holm", "both redrawn", "its change (95%), p Holm")  # fmt: skip
    lines = [
        [
            *key,
            f"{move.before:.3f}",
            f"{move.after:.3f}",
            contrast_text(move.change),
            f"{move.both:.3f}",
            contrast_text(move.shared),
        ]
        for key, move in moves.items()
    ]
    return header, lines


def _rows(moves: Mapping[Key, Moved]) -> list[Row]:
    rows: list[Row] = []
    for (way, site, name), move in moves.items():
        row: dict[str, str | float | int | None] = {
            "redrawn": way,
            "hospital": site,
            "distance": name,
            "before": move.before,
            "after": move.after,
            "both": move.both,
        }
        for part in ("change", "shared"):
            found: Interval = getattr(move, part)
            row |= {part: found.value, f"{part}_low": found.low, f"{part}_high": found.high}
        row |= {"p": move.change.p, "p_holm": move.change.p_holm}
        row |= {"shared_p": move.shared.p, "shared_p_holm": move.shared.p_holm}
        rows.append(row)
    return rows


def _figure(cells: Cells, order: Sequence[str]) -> bytes:
    """Densities of similarity: the originals, then each way's reconstructions of the first seed."""
    first = {key: found[0] for key, found in cells.items()}
    ways = [way for way in WAYS if (way, SOURCE) in first]
    panels = {
        "original images": {s: first[ways[0], s].before for s in order if (ways[0], s) in first}
    }
    for way in ways:
        panels[f"redrawn: {way}"] = {s: first[way, s].after for s in order if (way, s) in first}
    own = first[ways[0], SOURCE].before
    colours = {SOURCE: INK, **site_colours([site for site in order if site != SOURCE])}
    buffer = io.BytesIO()
    with drawing(8.6, 2.9) as figure:
        grid = figure.subplots(1, len(panels), squeeze=False, sharex=True)[0]
        for axes, (title, sites) in zip(grid, panels.items(), strict=True):
            density(axes, own, SOURCE_COLOUR, "source, held out: originals", filled=True)
            for site, values in sites.items():
                density(axes, values, colours[site], site)
            axes.set(yticks=[], ylim=(0, None), title=title)
        handles, labels = grid[-1].get_legend_handles_labels()
        figure.legend(handles, labels, loc="outside upper left", ncols=6)
        figure.supxlabel("cosine similarity to the mean source feature", fontsize=8.5)
        figure.savefig(buffer, format="svg", metadata={"Date": None})
    return buffer.getvalue()
