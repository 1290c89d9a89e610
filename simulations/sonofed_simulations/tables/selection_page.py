"""The page of a selection table: README.md, table.csv, table.json and the budget curves."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

from sonofed_common.runtime import write_atomically
from sonofed_simulations.rivals import STUDY_PRESET, TWO_VIEW_RANDOM, UNMIRRORED
from sonofed_simulations.tables.manifest import MADE_OF
from sonofed_simulations.tables.pages import contrast_text, markdown, number_text
from sonofed_simulations.tables.preset import PRESET
from sonofed_simulations.tables.selection_csv import rows_as_csv
from sonofed_simulations.tables.selection_figure import budget_curves
from sonofed_simulations.tables.selection_findings import findings
from sonofed_simulations.tables.selection_sites import site_gain_table
from sonofed_simulations.tables.selection_summary import Summary
from sonofed_simulations.tables.selection_tables import (
    classifier_table,
    curve_table,
    details_table,
    main_rows,
    main_table,
    rival_table,
    site_table,
    two_view_table,
)
from sonofed_simulations.tables.settings import (
    ALL_LABELS,
    BASELINE,
    CONTROLS,
    TWO_VIEW_ALL_LABELS,
    TWO_VIEW_BASELINE,
    SelectionTable,
)

PUBLISHED = (
    ("20%", "0.8081", "+4.83 points"),
    ("30%", "", "+3.95 points"),
    ("50%", "", "+2.87 points"),
    ("80%", "0.9351", ""),
    ("all labels", "0.9435", ""),
)
"""ADAptation (arXiv 2507.00474), Table 2: budget, accuracy, gain over its second best."""


def write_page(summary: Summary, table: SelectionTable, out: Path) -> None:
    """Write the page beside the folder of the cells."""
    values = json.dumps(summary.model_dump(mode="json"), indent=1)
    write_atomically(out / "table.json", f"{values}\n".encode())
    write_atomically(out / "table.csv", rows_as_csv(summary.rows).encode())
    if any(curve.mode == "federated" for curve in summary.curves):
        write_atomically(out / "budget_curves.svg", budget_curves(summary))
    write_atomically(out / "README.md", ("\n".join(_page(summary, table)) + "\n").encode())


def _page(summary: Summary, table: SelectionTable) -> list[str]:
    share = f"{summary.main_budget:.0%}"
    lines = [
        f"# {table.title}",
        "",
        f"After Table 2 of ADAptation (arXiv 2507.00474). {summary.cells} of {summary.wanted} "
        "cells have run; a row counts with the splits that it has finished. Scenario "
        f"`{summary.scenario}`, {_seeds(table)} x {table.folds} patient-level folds; "
        f"{summary.machine.cpu}, {summary.machine.cores} cores, {summary.machine.device}; "
        f"{summary.seconds / 3600:.1f} hours of cells, one thread, without the source and the "
        f"features. {MADE_OF}",
        "",
        *findings(summary),
        "",
        "## How it was made",
        "",
        *_method(table),
        "",
        f"## {share} of the labels, federated",
        "",
        *main_table(summary),
        "",
        "Accuracy and AUROC are means over the sites' own values, seeds and folds, with intervals "
        "from 2,000 bootstrap samples of patients: they hold the chance of the test patients, not "
        "that of training and selection, and every row of a kind starts from one training of the "
        "source. Differences are in the same samples, on the splits that both have; p is "
        "two-sided, and Holm's correction is over the column. The least p that so many samples "
        "can show is .001, which Holm multiplies by the number of rows: who has that stands at a "
        "floor, and is not ranked by it.",
    ]
    if summary.best_rival is not None:
        lines += [
            "",
            f"Against `{summary.best_rival}`, the rival with the largest gain of accuracy over "
            "Random (it was picked on these same images, which favours it):",
            "",
            *rival_table(summary),
        ]
    if summary.preset:
        lines += ["", "## Ours: two views, and the preset", "", *_preset(summary)]
    if summary.at_sites:
        lines += ["", "## Ours at each hospital", "", *site_gain_table(summary.at_sites), ""]
        lines.append(
            f"At {share} of the labels, federated, with p after Holm over the lines of a column. "
            f"`{STUDY_PRESET}` is what the preset `{PRESET}` of a study does."
        )
    if summary.by_classifier:
        lines += ["", "## Accuracy by classifier", "", *classifier_table(summary), ""]
        lines.append(
            "With the difference to Random and its p after Holm, on what each has finished; the "
            "rows above are means of what all have."
        )
    lines += ["", "## Tests, effects and what was chosen", "", *details_table(summary)]
    lines += ["", "## AUROC by site", "", *site_table(summary)]
    if any(curve.mode == "federated" for curve in summary.curves):
        lines += ["", "## Budgets", "", "![Budget curves](budget_curves.svg)", ""]
        lines += [
            "Curves are of the splits that have every budget. The dotted controls start from the "
            "rivals' classifier and are of all splits.",
            "",
        ]
        lines += curve_table(summary, table)
    lines += ["", "## What was published", "", *_published(summary)]
    return lines


def _seeds(table: SelectionTable) -> str:
    return f"{len(table.seeds)} seed{'s' * (len(table.seeds) > 1)}"


def _method(table: SelectionTable) -> list[str]:
    training = table.training
    return [
        f"- {_source(table)} At each hospital normalisation statistics are re-estimated on the "
        "pool's images; that is the start model.",
        f"- **Only the linear head is fine-tuned**, on features of the start model that are cached "
        f"for {table.views} views of each image (plain, and flipped and rotated). The paper "
        "fine-tunes five whole networks for 140 epochs: its numbers are of another experiment.",
        "- Selection is sequential: at each budget a strategy tops up what it has, seeing the head "
        "trained on the labels so far; then the head is trained anew from the source's head on all "
        f"labels: {training.rounds} rounds of federated averaging, {training.local_epochs} local "
        f"epochs each, Adam {training.learning_rate:g}, batch {training.batch_size}, the defaults "
        "of a study. Start, budget, steps, order and augmentation are the same for every strategy, "
        "but for the rows with two views: their start is another, and they alone predict from "
        "mirror images, too.",
        f"- What is drawn at random is a mean of {table.draws} draws a split.",
        "- Federated: each site selects from its own pool and has its share of the budget; the "
        "dual score ranks all sites' images together. Pooled: one site that has all pools.",
        "- `dual-...` are ADAptation's score on these features, without its contrastive stage and "
        "reconstructions: no row is the whole method.",
        "- Accuracy is at P = .5 for everybody, which favours whoever's predictions lie around it; "
        "AUROC takes no threshold.",
        *([f"- {table.seen}"] if table.seen else []),
        *([f"- {table.duration}"] if table.duration else []),
        "- What is adapted of each strategy stands in its docstring, in "
        "`simulations/sonofed_simulations/rivals`.",
    ]


def _source(table: SelectionTable) -> str:
    trained = "trained on the source's labelled images by `sonofed-coordinator source train`'s code"
    kinds = [f"{len(table.classifiers)} of whole images ({', '.join(table.classifiers)}; a row is "
             "their mean)" if table.classifiers else "one of whole images"]  # fmt: skip
    kinds += ["one of two views"] if table.lesions is not None else []
    return f"Source classifiers, {trained}: {', '.join(kinds)}."


def _preset(summary: Summary) -> list[str]:
    chosen = "; ".join(f"at {site} `{name}`" for site, name in summary.preset.items())
    return [
        "Rows `two-view-...` start from the source's classifier of two views: beside the whole "
        "image a second network of the same kind sees the lesion, cut out around what a segmenter "
        "outlines. All three come from the source alone, from its labels and masks; at a hospital "
        "their statistics are re-estimated like the rivals'. The head is on the features of both, "
        "and starts as the mean of the two heads' logits; predictions are the mean of an image's "
        f"and its mirror image's. So `{UNMIRRORED}` over `random` is what the second view is "
        "worth: a second network, and a segmenter trained on the source's masks (and the draw of "
        "the weights: the network of whole images is trained from another seed than the rivals'). "
        f"It is on the same labels as `{TWO_VIEW_RANDOM}`: their difference is what the mirror "
        "image is worth, which was added after a look at one of the "
        "folds. The others over "
        f"`{TWO_VIEW_RANDOM}` are what their strategy adds:",
        "",
        *two_view_table(summary),
        "",
        f"`{PRESET}` is put together of these rows, a hospital each: the strategy with the best "
        f"mean accuracy at the sites of *other* data sets at {summary.main_budget:.0%} of the "
        f"labels: {chosen}. No label of a hospital's test had a part in the strategy that stands "
        "for it; scanners of one city do not choose for each other. Where strategies differ, it is "
        "no single federation: each hospital's predictions are of a head that learnt from what "
        "its strategy chose at all hospitals, and the labels counted are its own.",
    ]


def _published(summary: Summary) -> list[str]:
    values = {row.strategy: row.accuracy.value for row in main_rows(summary)}
    rows = [[*line, *_here(summary, line[0], values)] for line in PUBLISHED]
    header = (
        "labels", "ADAptation", "over its second best", "best mean accuracy here",
        f"{PRESET} over the best rival here (95%), p Holm", "splits",
    )  # fmt: skip
    return [
        "The paper's accuracy is a mean over five fully fine-tuned classifiers, from BUSI to its "
        "other hospitals; ours is of heads alone. The best rival is that of the budget.",
        "",
        *markdown(header, rows),
        "",
        f"Without any label: {_both(values, BASELINE, TWO_VIEW_BASELINE)} here (normalisation "
        "re-estimated); the paper has no such row.",
    ]


def _here(summary: Summary, labels: str, values: Mapping[str, float]) -> tuple[str, str, str]:
    """Best mean accuracy, the preset's gain over the best rival, and splits, at a budget."""
    rows = {
        row.strategy: row
        for row in summary.rows
        if row.mode == "federated" and f"{row.budget:.0%}" == labels
    }
    rows = {name: row for name, row in rows.items() if name not in CONTROLS}
    if not rows:
        text = _both(values, ALL_LABELS, TWO_VIEW_ALL_LABELS) if labels == "all labels" else ""
        return text, "", ""
    best = max(rows.values(), key=lambda row: row.accuracy.value)
    rival = summary.best_rivals.get(best.budget)
    gain = rows[PRESET].over_best.get("accuracy") if PRESET in rows else None
    told = f"{contrast_text(gain)}, over `{rival}`" if gain is not None else ""
    return f"{best.accuracy.value:.4f} ({best.strategy})", told, str(best.splits)


def _both(values: Mapping[str, float], one: str, two: str) -> str:
    """A control's value, and what it is with two views."""
    text = number_text(values.get(one), ".4f")
    return f"{text}; two views {values[two]:.4f}" if two in values else text
