"""How well the source's diffusion redraws images of source and hospitals (ADAptation, Table 4)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from sonofed_simulations.statistics import Contrast, Effect, interval, is_told
from sonofed_simulations.tables.article import Article, Row, write_article
from sonofed_simulations.tables.forest import LEGEND, forest
from sonofed_simulations.tables.manifest import write_facts
from sonofed_simulations.tables.pages import contrast_text, interval_text, markdown
from sonofed_simulations.tables.redrawn import (
    BLUR,
    MEASURES,
    WAYS,
    Cells,
    Redrawing,
    make_redrawn,
)
from sonofed_simulations.tables.redrawn_drops import (
    Drops,
    Effects,
    Means,
    drops_of,
    effects_of,
    means_of,
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

NAMES = {"ssim": "SSIM", "psnr": "PSNR, dB", "feature_distance": "feature distance"}
WORSE = {"ssim": -1, "psnr": -1, "feature_distance": 1}
"""Sign of a difference that means a worse reconstruction."""
FIGURE = "differences.svg"
COLUMNS = {"value": "", "low": "_low", "high": "_high", "p": "_p", "p_holm": "_p_holm"}
"""Parts of a difference, and how the columns that hold them end."""


def make(request: Request) -> Made:
    """Make the table; see `make_redrawn`.

    Raises
    ------
    ConfigurationError, DataMissingError
        See `Redrawing.prepare`.
    """
    return make_redrawn(request, _write)


def found_text(drops: Drops) -> str:
    """Say whether quality drops on the hospitals, way by way."""
    said = []
    for way in WAYS:
        parts = []
        for measure in MEASURES:
            own = {s: c for (w, s, m), c in drops.items() if (w, m) == (way, measure)}
            if own:
                parts.append(f"{NAMES[measure]} {_verdict(own, measure)}")
        said.append(f"**{way}**: {'; '.join(parts) or 'no hospital has run'}.")
    return (
        "The work reports significantly lower reconstruction quality on the target domains than on "
        "the source (p < .001), and takes it for the mark of the domain gap. Here, against the "
        f"source's held-out images: {' '.join(said)} {_shared(drops)}"
    )


def _shared(drops: Drops) -> str:
    """Count the drops that a filter which knows nothing of the source shows too."""
    worse = {key for key, drop in drops.items() if _side(drop, key[2]) == "worse"}
    drawn = [key for key in worse if key[0] != BLUR]
    shared = [key for key in drawn if (BLUR, *key[1:]) in worse]
    return (
        f"Of the {len(drawn)} drops under diffusion, {len(shared)} stand under the blur too, at "
        "the same hospital and in the same measure: those need no domain bias of the diffusion "
        "model, for the blur has no domain."
    )


def _side(drop: Contrast, measure: str) -> str:
    """``worse``, ``better``, or ``level`` where the difference does not exceed its interval."""
    if not is_told(drop):
        return "level"
    return "worse" if drop.value * WORSE[measure] > 0 else "better"


def _verdict(found: Mapping[str, Contrast], measure: str) -> str:
    parts = []
    for side in ("worse", "better", "level"):
        own = [(site, drop) for site, drop in found.items() if _side(drop, measure) == side]
        if own:
            parts.append(f"is {side} at {len(own)} of {len(found)} ({listed(own)})")
    return ", ".join(parts)


def _write(redrawing: Redrawing, request: Request) -> Made:
    cells = redrawing.finished()
    means = means_of(cells)
    drops, effects = drops_of(means), effects_of(cells)
    order = [shown.site for shown in redrawing.shown]
    count, wanted = sum(map(len, cells.values())), len(redrawing.wanted)
    header, lines = _table(means, drops, effects, order, cells)
    shown = [(way, site, MEASURES[0]) for way, site in _keys(means, order)]
    compared = [key for key in shown if key in drops]
    article = Article(
        title="How well the source's diffusion redraws images",
        work=f"Table 4 of {WORK}",
        found=progress(count, wanted) + found_text(drops),
        sections={
            "Beside the published numbers": [
                "The text at hand prints no number of Table 4, only that quality on the target "
                "domains is significantly lower (p < .001), at 512 x 512 pixels.",
                "",
                *markdown(header, lines),
                "",
                "Means over images, of each image over seeds, with intervals from 2,000 bootstrap "
                "samples of the patients; the source's and a hospital's patients are drawn "
                "independently. p is two-sided, with Holm's correction over all hospitals and "
                "measures of one way. Feature distance: one minus the cosine of the source "
                "classifier's features of an image and of its reconstruction.",
                "",
                "d: Cohen's d of two groups, the hospital's images and the source's, difference "
                "of the means by the pooled standard deviation of images: a hospital's image has "
                "no counterpart at the source to be paired with. Seeds could be, but they differ "
                "in the noise of the redrawing alone; of them, higher tells in how many the "
                "hospital's mean is the higher one. The blur takes no seed.",
            ],
            **(
                {"Differences to the source": [f"![Differences]({FIGURE})", "", LEGEND]}
                if compared
                else {}
            ),
        },
        method=method(redrawing.settings, cells),
        adapted=ADAPTED,
        rows=_rows(means, drops, effects, order, cells),
        figures={
            FIGURE: forest(
                [f"{site}, {way}" for way, site, _ in compared],
                {
                    NAMES[measure]: [drops[way, site, measure] for way, site, _ in compared]
                    for measure in MEASURES
                },
                8.6,
            )
        }
        if compared
        else {},
    )
    write_article(article, request.out)
    counts = {"cells": count, "wanted": wanted}
    write_facts(request.out, {**redrawing.facts(), **counts}, redrawing.tested())
    return Made(terminal_table(header, lines), count, wanted)


def _keys(means: Means, order: Sequence[str]) -> list[tuple[str, str]]:
    return [(way, site) for way in WAYS for site in order if (way, site, MEASURES[0]) in means]


def _table(
    means: Means, drops: Drops, effects: Effects, order: Sequence[str], cells: Cells
) -> tuple[tuple[str, ...], list[list[str]]]:
    header = ["redrawn", "images of", "images", "seeds"]
    for measure in MEASURES:
        header += [f"{NAMES[measure]} (95%)", "over the source (95%), p Holm", "d", "higher"]
    lines = []
    for way, site in _keys(means, order):
        found = cells[way, site]
        line = [way, site, str(len(found[0].patients)), "" if way == BLUR else str(len(found))]
        for measure in MEASURES:
            form = ".1f" if measure == "psnr" else ".3f"
            line.append(interval_text(interval(means[way, site, measure]), form))
            line.append(contrast_text(drops.get((way, site, measure))))
            line += _words(way, effects.get((way, site, measure)))
        lines.append(line)
    return tuple(header), lines


def _words(way: str, effect: Effect | None) -> tuple[str, str]:
    if effect is None:
        return "", ""
    d, higher = effect.words
    return d, "" if way == BLUR else higher


def _rows(
    means: Means, drops: Drops, effects: Effects, order: Sequence[str], cells: Cells
) -> list[Row]:
    rows: list[Row] = []
    for way, site in _keys(means, order):
        for measure in MEASURES:
            key = (way, site, measure)
            value, drop, effect = interval(means[key]), drops.get(key), effects.get(key)
            rows.append(
                {
                    "redrawn": way,
                    "site": site,
                    "images": len(cells[way, site][0].patients),
                    "seeds": len(cells[way, site]),
                    "measure": measure,
                    **value.model_dump(),
                    **{
                        f"over_source{end}": None if drop is None else getattr(drop, name)
                        for name, end in COLUMNS.items()
                    },
                    "over_source_d": None if effect is None else effect.d,
                    "seeds_higher": None if effect is None or way == BLUR else effect.higher,
                }
            )
    return rows
