"""The page of a selection table: README.md, table.csv, table.json and the budget curves."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Sequence
from pathlib import Path

from rich.table import Table

from sonofed_common.runtime import write_atomically
from sonofed_simulations.paired import Interval
from sonofed_simulations.report.figures import REST, SITE_COLOURS, SITE_MARKERS, SOFT, drawing
from sonofed_simulations.tables.pages import (
    contrast_text,
    interval_text,
    markdown,
    number_text,
)
from sonofed_simulations.tables.preset import PRESET, is_ours
from sonofed_simulations.tables.selection_findings import findings
from sonofed_simulations.tables.selection_replicates import METRICS
from sonofed_simulations.tables.selection_summary import RANDOM, Curve, Row, Summary
from sonofed_simulations.tables.settings import ALL_LABELS, BASELINE, CONTROLS, SelectionTable

HEADER = ("strategy", "splits", "labels", "accuracy (95%)", "AUROC (95%)", "worst site",
          "accuracy over Random (95%), p Holm", "AUROC over Random (95%), p Holm")  # fmt: skip
PUBLISHED = (
    ("20%", "0.8081", "+4.83 points"),
    ("30%", "", "+3.95 points"),
    ("50%", "", "+2.87 points"),
    ("80%", "0.9351", ""),
    ("all labels", "0.9435", ""),
)
"""ADAptation (arXiv 2507.00474), Table 2: budget, accuracy, gain over its second best."""
DRAWN = 6
"""Strategies of the figure that have a colour of their own."""


def summary_table(summary: Summary) -> Table:
    """Return the rows at the main budget, for a terminal."""
    table = Table(*HEADER)
    for row in _main_rows(summary):
        table.add_row(*_cells(row))
    return table


def write_page(summary: Summary, table: SelectionTable, out: Path) -> None:
    """Write the page beside the folder of the cells."""
    values = json.dumps(summary.model_dump(mode="json"), indent=1)
    write_atomically(out / "table.json", f"{values}\n".encode())
    write_atomically(out / "table.csv", _csv(summary.rows).encode())
    if any(curve.mode == "federated" for curve in summary.curves):
        write_atomically(out / "budget_curves.svg", _figure(summary))
    write_atomically(out / "README.md", ("\n".join(_page(summary, table)) + "\n").encode())


def _page(summary: Summary, table: SelectionTable) -> list[str]:
    share = f"{summary.main_budget:.0%}"
    lines = [
        "# Which images to label: selection strategies side by side",
        "",
        f"After Table 2 of ADAptation (arXiv 2507.00474). {summary.cells} of {summary.wanted} "
        "cells have run; a row counts with the splits that it has finished. Scenario "
        f"`{summary.scenario}`, {len(table.seeds)} seeds x {table.folds} patient-level folds; "
        f"{summary.machine.cpu}, {summary.machine.cores} cores, {summary.machine.device}; "
        f"{summary.seconds / 3600:.1f} hours of cells, one thread, without the features.",
        "",
        *findings(summary),
        "",
        "## How it was made",
        "",
        *_method(table),
        "",
        f"## {share} of the labels, federated",
        "",
        *markdown(HEADER, map(_cells, _main_rows(summary))),
        "",
        "Accuracy and AUROC are means over the sites' own values, seeds and folds, with intervals "
        "from 2,000 bootstrap samples of patients. Differences are in the same samples, on the "
        "splits that both have; p is two-sided, and Holm's correction is over the column.",
    ]
    if summary.best_rival is not None:
        best = [(r, r.over_best) for r in _main_rows(summary) if r.over_best]
        lines += [
            "",
            f"Against the best rival by mean accuracy, `{summary.best_rival}` (it was picked on "
            "these same images, which favours it):",
            "",
            *markdown(
                ("strategy", "accuracy (95%), p Holm", "AUROC (95%), p Holm"),
                ([r.strategy, *(contrast_text(c.get(m)) for m in METRICS)] for r, c in best),
            ),
        ]
    if summary.preset:
        lines += ["", "## Ours: two views, and the preset", "", *_preset(summary)]
    lines += ["", "## Tests, effects and what was chosen", "", *_details(summary)]
    lines += ["", "## AUROC by site", "", *_by_site(summary)]
    if any(curve.mode == "federated" for curve in summary.curves):
        lines += ["", "## Budgets", "", "![Budget curves](budget_curves.svg)", ""]
        lines += _curves(summary, table)
    lines += ["", "## What was published", "", *_published(summary)]
    return lines


def _method(table: SelectionTable) -> list[str]:
    training = table.training
    return [
        "- One source classifier, trained on the source's labelled images by "
        "`sonofed-coordinator source train`'s code. At each hospital its normalisation statistics "
        "are re-estimated on the pool's images; that is the start model.",
        f"- **Only the linear head is fine-tuned**, on features of the start model that are cached "
        f"for {table.views} views of each image (plain, and flipped and rotated). The paper "
        "fine-tunes five whole networks for 140 epochs: its numbers are of another experiment.",
        "- Selection is sequential: at each budget a strategy tops up what it has, seeing the head "
        "trained on the labels so far; then the head is trained anew from the source's head on all "
        f"labels: {training.rounds} rounds of federated averaging, {training.local_epochs} local "
        f"epochs each, Adam {training.learning_rate:g}, batch {training.batch_size}, the defaults "
        "of a study. Start, budget, steps, order and augmentation are the same for every strategy, "
        "but for the start of the rows with two views.",
        "- Federated: each site selects from its own pool and has its share of the budget; the "
        "dual score ranks all sites' images together. Pooled: one site that has all pools.",
        "- Nothing was chosen on target labels, but the preset's strategy, and that at other "
        "hospitals. What is adapted of each strategy stands in its docstring, in "
        "`simulations/sonofed_simulations/rivals`.",
    ]


def _preset(summary: Summary) -> list[str]:
    chosen = "; ".join(f"at {site} `{name}`" for site, name in summary.preset.items())
    return [
        "Rows `two-view-...` have another start than the rivals: beside the whole image a second "
        "network of the same kind sees the lesion, cut out around what a segmenter outlines. Both "
        "come from the source alone, from its labels and masks; at a hospital their statistics are "
        "re-estimated like the first one's. The head is on the features of both, and starts as the "
        "mean of the two heads' logits. So `two-view-random` is what the second view is worth, and "
        "the others over it what their strategy adds.",
        "",
        f"`{PRESET}` is put together of these rows, a hospital each: the strategy with the best "
        f"mean accuracy at the *other* hospitals at {summary.main_budget:.0%} of the labels: "
        f"{chosen}. No label of a hospital's test had a part in what stands for it.",
    ]


def _main_rows(summary: Summary) -> list[Row]:
    rows = [
        row
        for row in summary.rows
        if row.mode == "federated" and (row.budget == summary.main_budget or _control(row))
    ]
    return sorted(rows, key=lambda row: (not _control(row), -row.accuracy.value))


def _control(row: Row) -> bool:
    return row.strategy in CONTROLS


def _cells(row: Row) -> list[str]:
    return [
        f"{row.strategy} (ours)" if is_ours(row.strategy) else row.strategy,
        str(row.splits),
        f"{row.labels:.0f}",
        interval_text(row.accuracy),
        interval_text(row.auroc),
        f"{row.worst_site_auroc:.3f}",
        *(contrast_text(row.over_random.get(metric)) for metric in METRICS),
    ]


def _details(summary: Summary) -> list[str]:
    sites = list(summary.rows[0].sites) if summary.rows else []
    header = ("strategy", "balanced accuracy", "ECE", "d", "p permutation", "p DeLong",
              "malignant chosen", *(f"from {site}" for site in sites))  # fmt: skip
    rows = [
        [
            row.strategy,
            number_text(row.points["balanced_accuracy"], ".3f"),
            number_text(row.points["ece"], ".3f"),
            number_text(row.effect, "+.2f"),
            number_text(row.p_permutation, ".4f"),
            number_text(row.p_delong, ".3f"),
            number_text(row.malignant_share, ".0%"),
            *(number_text(row.site_share.get(site), ".0%") for site in sites),
        ]
        for row in _main_rows(summary)
    ]
    return [
        *markdown(header, rows),
        "",
        "d: Cohen's d of the splits' accuracy differences to Random. Permutation: signs of the "
        "patients' differences in correct images, all images alike. DeLong: the first seed's folds "
        "and sites together, against Random's first draw, images taken as independent. These p "
        "values are not corrected.",
    ]


def _by_site(summary: Summary) -> list[str]:
    sites = list(summary.rows[0].sites) if summary.rows else []
    rows = [[r.strategy, *(interval_text(r.sites[s]) for s in sites)] for r in _main_rows(summary)]
    return markdown(("strategy", *sites), rows)


def _curves(summary: Summary, table: SelectionTable) -> list[str]:
    header = ("strategy", "mode", "splits", *(f"accuracy at {b:.0%}" for b in table.budgets),
              "area", "area over Random (95%)", "labels saved (95%)")  # fmt: skip
    ordered = sorted(summary.curves, key=lambda curve: (curve.mode, -curve.area.value))
    rows = [
        [
            curve.strategy,
            curve.mode,
            str(curve.splits),
            *(f"{value.value:.3f}" for value in curve.accuracy.values()),
            f"{curve.area.value:.3f}",
            "" if curve.over_random is None else interval_text(curve.over_random, "+.3f"),
            "" if curve.saving is None else interval_text(curve.saving, "+.0%"),
        ]
        for curve in ordered
    ]
    return [
        *markdown(header, rows),
        "",
        "Area: mean accuracy over the budgets' range. Labels saved: share of the pools by which "
        "fewer labels than Random's reach the accuracy of all labels less one point.",
    ]


def _published(summary: Summary) -> list[str]:
    ours = {row.strategy: row.accuracy.value for row in _main_rows(summary)}
    best = max((s for s in ours if s not in CONTROLS), key=lambda s: ours[s], default=None)
    here = {
        f"{summary.main_budget:.0%}": f"{ours[best]:.4f} ({best})" if best else "",
        "all labels": number_text(ours.get(ALL_LABELS), ".4f"),
    }
    rows = [[*line, here.get(line[0], "")] for line in PUBLISHED]
    return [
        "The paper's accuracy is a mean over five fully fine-tuned classifiers, from BUSI to its "
        "other hospitals; ours is one classifier's head.",
        "",
        *markdown(
            ("labels", "ADAptation", "over its second best", "best mean accuracy here"), rows
        ),
        "",
        f"Without any label: {number_text(ours.get(BASELINE), '.4f')} here (normalisation "
        "re-estimated); the paper has no such row.",
    ]


def _figure(summary: Summary) -> bytes:
    curves = [curve for curve in summary.curves if curve.mode == "federated"]
    ordered = sorted(curves, key=lambda curve: -curve.area.value)
    coloured = [curve for curve in ordered if curve.strategy != RANDOM][:DRAWN]
    buffer = io.BytesIO()
    with drawing(7.2, 4.2) as figure:
        axes = figure.subplots()
        for curve in ordered:
            x, y = [float(b) * 100 for b in curve.accuracy], [v.value for v in _values(curve)]
            if curve.strategy == RANDOM:
                low, high = ([getattr(v, end) for v in _values(curve)] for end in ("low", "high"))
                axes.fill_between(x, low, high, color=REST, alpha=0.2, linewidth=0)
                axes.plot(x, y, "--", color=SOFT, label="random, with its 95% interval")
            elif curve in coloured:
                n = coloured.index(curve)
                axes.plot(x, y, color=SITE_COLOURS[n], marker=SITE_MARKERS[n], label=curve.strategy)
            else:
                axes.plot(x, y, color=REST, linewidth=0.7)
        for row in (row for row in summary.rows if row.strategy in (BASELINE, ALL_LABELS)):
            axes.axhline(row.accuracy.value, color=SOFT, linewidth=0.7, linestyle=":")
            axes.annotate(row.strategy, (1, row.accuracy.value), xycoords=("axes fraction", "data"),
                          ha="right", va="bottom", color=SOFT)  # fmt: skip
        axes.set(xlabel="labels, % of the pools", ylabel="accuracy, mean over sites")
        axes.grid(axis="y")
        axes.legend(loc="lower right", ncols=2)
        figure.savefig(buffer, format="svg", metadata={"Date": None})
    return buffer.getvalue()


def _values(curve: Curve) -> list[Interval]:
    return list(curve.accuracy.values())


def _csv(rows: Sequence[Row]) -> str:
    buffer = io.StringIO()
    writer = csv.writer(buffer, lineterminator="\n")
    numbers = [f"{metric}{end}" for metric in METRICS for end in ("", "_low", "_high")]
    gains = [
        f"{metric}_over_random{end}" for metric in METRICS for end in ("", "_low", "_high", "_holm")
    ]
    points = list(rows[0].points) if rows else []
    writer.writerow(
        ["strategy", "mode", "budget", "splits", "cells", "labels", *numbers, *points,
         "worst_site_auroc", "malignant_share", *gains]
    )  # fmt: skip
    for row in rows:
        values: list[object] = [row.strategy, row.mode, row.budget, row.splits, row.cells]
        values.append(round(row.labels, 1))
        for metric in METRICS:
            found: Interval = getattr(row, metric)
            values += [found.value, found.low, found.high]
        values += [*row.points.values(), row.worst_site_auroc, row.malignant_share]
        for metric in METRICS:
            gain = row.over_random.get(metric)
            values += [gain.value, gain.low, gain.high, gain.p_holm] if gain else [None] * 4
        writer.writerow([f"{v:.5f}" if isinstance(v, float) else v for v in values])
    return buffer.getvalue()
