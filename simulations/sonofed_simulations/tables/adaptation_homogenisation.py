"""Similarity to the source before and after reconstruction (ADAptation, Table 1 and Figure 1)."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from typing import Literal

from sonofed_simulations.report.clouds import density
from sonofed_simulations.report.figures import INK, drawing, site_colours
from sonofed_simulations.report.figures import SOURCE as SOURCE_COLOUR
from sonofed_simulations.statistics import Contrast, Effect, Interval, is_told
from sonofed_simulations.tables.article import Article, Row, write_article
from sonofed_simulations.tables.manifest import write_facts
from sonofed_simulations.tables.pages import contrast_text, markdown
from sonofed_simulations.tables.redrawn import BLUR, SOURCE, WAYS, Cells, Redrawing, make_redrawn
from sonofed_simulations.tables.redrawn_moves import (
    DISTANCES,
    Key,
    Moved,
    mean_moves,
    measured_of,
    moves_of,
)
from sonofed_simulations.tables.redrawn_page import (
    ADAPTED,
    WORK,
    listed,
    method,
    progress,
    terminal_table,
)
from sonofed_simulations.tables.request import Made, Request

NEARER = {"Wasserstein-1": -1, "overlap": 1}
"""Sign of a change that means nearer to the source."""
FIGURE = "densities.svg"
HEADER = ("redrawn", "hospital", "distance", "before", "after",
          "change (95%), p Holm", "d", "higher",
          "both redrawn", "its change (95%), p Holm", "its d", "its higher")  # fmt: skip
MEAN = "mean over hospitals"

Which = Literal["shared", "change"]
"""Of `Moved`."""


def make(request: Request) -> Made:
    """Make the table; see `make_redrawn`.

    Raises
    ------
    ConfigurationError, DataMissingError
        See `Redrawing.prepare`.
    """
    return make_redrawn(request, _write)


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
    measured = measured_of(cells)
    moves, means = moves_of(measured), mean_moves(measured)
    count, wanted = sum(map(len, cells.values())), len(redrawing.wanted)
    order = [shown.site for shown in redrawing.shown]
    lines = _lines(moves, means)
    article = Article(
        title="Whether reconstruction makes hospitals alike",
        work=f"Table 1 and Figure 1 of {WORK}",
        found=progress(count, wanted) + found_text(moves),
        sections={
            "Beside the published numbers": [
                "The text at hand prints no number of Table 1 (cross-domain similarity scores "
                "before and after reconstruction); Figure 1 is a picture.",
                "",
                *markdown(HEADER, lines),
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
                "",
                "d: Cohen's d of paired changes, mean by standard deviation, from three pairs on; "
                "higher: pairs in which distance or overlap rises. A hospital's pairs are its "
                "seeds, which differ in the noise of the redrawing alone, under one training of "
                "the source: a large d says that the draws agree, not that the change is large. "
                f"The pairs of the {MEAN} are the hospitals, each a mean over seeds; it is not "
                "tested, and has no p. The blur takes no seed, and has pairs of hospitals alone.",
            ],
            **({"Densities": [f"![Densities]({FIGURE})"]} if moves else {}),
        },
        method=method(redrawing.settings, cells),
        adapted=(
            *ADAPTED,
            "What the similarity score of Table 1 is, the text does not say; the cosine to the "
            "source's mean feature is our reading.",
        ),
        rows=_rows(moves, means),
        figures={FIGURE: _figure(cells, order)} if moves else {},
    )
    write_article(article, request.out)
    counts = {"cells": count, "wanted": wanted}
    write_facts(request.out, {**redrawing.facts(), **counts}, redrawing.tested())
    return Made(terminal_table(HEADER, lines), count, wanted)


def _ordered(
    moves: Mapping[Key, Moved], means: Mapping[tuple[str, str], Moved]
) -> list[tuple[Key, Moved]]:
    """The hospitals of each way and distance, and then their mean where there are several."""
    found: list[tuple[Key, Moved]] = []
    for (way, name), mean in means.items():
        own = [(key, move) for key, move in moves.items() if (key[0], key[2]) == (way, name)]
        found += own
        if len(own) > 1:
            found.append(((way, MEAN, name), mean))
    return found


def _lines(moves: Mapping[Key, Moved], means: Mapping[tuple[str, str], Moved]) -> list[list[str]]:
    return [
        [
            *key,
            f"{move.before:.3f}",
            f"{move.after:.3f}",
            contrast_text(move.change),
            *_words(key, move.change_effect),
            f"{move.both:.3f}",
            contrast_text(move.shared),
            *_words(key, move.shared_effect),
        ]
        for key, move in _ordered(moves, means)
    ]


def _words(key: Key, effect: Effect) -> tuple[str, str]:
    return effect.words if _has_pairs(key) else ("", "")


def _has_pairs(key: Key) -> bool:
    """Whether a row has pairs: the blur takes no seed, and its hospitals have one cell each."""
    return key[0] != BLUR or key[1] == MEAN


def _rows(moves: Mapping[Key, Moved], means: Mapping[tuple[str, str], Moved]) -> list[Row]:
    rows: list[Row] = []
    for key, move in _ordered(moves, means):
        way, site, name = key
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
        # The mean is not one of the contrasts that are tested.
        for part, start in (("change", ""), ("shared", "shared_")):
            tested: Contrast | None = None if site == MEAN else getattr(move, part)
            row[f"{start}p"] = None if tested is None else tested.p
            row[f"{start}p_holm"] = None if tested is None else tested.p_holm
        row["pairs_of"] = "hospitals" if site == MEAN else "seeds"
        for part in ("change", "shared"):
            effect: Effect = getattr(move, f"{part}_effect")
            told = effect.model_dump() if _has_pairs(key) else {}
            row |= {f"{part}_{end}": told.get(end) for end in Effect.model_fields}
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
