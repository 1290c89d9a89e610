"""The tables of a selection table's page, in Markdown and for a terminal."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from rich.table import Table

from sonofed_simulations.rivals import DUAL_SCORES
from sonofed_simulations.statistics import Contrast
from sonofed_simulations.tables.pages import contrast_text, interval_text, markdown, number_text
from sonofed_simulations.tables.preset import is_ours
from sonofed_simulations.tables.selection_replicates import METRICS
from sonofed_simulations.tables.selection_rows import AT_PREVALENCE, Row
from sonofed_simulations.tables.selection_summary import Summary
from sonofed_simulations.tables.settings import CONTROLS, SelectionTable

HEADER = ("strategy", "splits", "labels", "accuracy (95%)", "AUROC (95%)", "worst site",
          "accuracy over Random (95%), p Holm", "AUROC over Random (95%), p Holm")  # fmt: skip


def summary_table(summary: Summary) -> Table:
    """Return the rows at the main budget, for a terminal."""
    table = Table(*HEADER)
    for row in main_rows(summary):
        table.add_row(*_cells(row))
    return table


def main_table(summary: Summary) -> list[str]:
    """Return the rows at the main budget, federated."""
    return markdown(HEADER, map(_cells, main_rows(summary)))


def rival_table(summary: Summary) -> list[str]:
    """Return differences to the best rival."""
    return _differences({row.strategy: row.over_best for row in main_rows(summary)})


def two_view_table(summary: Summary) -> list[str]:
    """Return differences of the rows of two views to Random of two views."""
    return _differences({row.strategy: row.over_two_view_random for row in main_rows(summary)})


def _differences(found: Mapping[str, Mapping[str, Contrast]]) -> list[str]:
    rows = [
        [name, *(contrast_text(contrasts.get(metric)) for metric in METRICS)]
        for name, contrasts in found.items()
        if contrasts
    ]
    return markdown(("strategy", "accuracy (95%), p Holm", "AUROC (95%), p Holm"), rows)


def details_table(summary: Summary) -> list[str]:
    """Return other metrics, tests, effects, and of which images the labels are."""
    sites = list(summary.rows[0].sites) if summary.rows else []
    header = ("strategy", "balanced accuracy", "accuracy at prevalence", "ECE", "d",
              "p permutation", "p DeLong", "malignant chosen",
              *(f"from {site}" for site in sites))  # fmt: skip
    rows = [
        [
            row.strategy,
            number_text(row.points["balanced_accuracy"], ".3f"),
            number_text(row.points[AT_PREVALENCE], ".3f"),
            number_text(row.points["ece"], ".3f"),
            number_text(row.effect, "+.2f"),
            number_text(row.p_permutation, ".4f"),
            number_text(row.p_delong, ".3f"),
            number_text(row.malignant_share, ".0%"),
            *(number_text(row.site_share.get(site), ".0%") for site in sites),
        ]
        for row in main_rows(summary)
    ]
    return [
        *markdown(header, rows),
        "",
        "Accuracy at prevalence: of each site's test images as many of the likeliest are called "
        "malignant as there are, so that no threshold favours anybody. "
        "d: Cohen's d of the splits' accuracy differences to Random, of five splits or more. "
        "Permutation: signs of the patients' differences in correct images, all images alike. "
        "DeLong: the first seed's folds and sites together, against Random's first draw, images "
        "taken as independent. These p values are not corrected.",
    ]


def classifier_table(summary: Summary) -> list[str]:
    """Return the accuracy of each classifier, and its difference to Random."""
    held = {name: {r.strategy: r for r in _main(rows, summary)} for name, rows in
            summary.by_classifier.items()}  # fmt: skip
    strategies = [row.strategy for row in main_rows(summary)]
    lines = []
    for strategy in dict.fromkeys([*strategies, *(s for rows in held.values() for s in rows)]):
        found = [rows.get(strategy) for rows in held.values()]
        if any(found):
            lines.append([strategy, *("" if row is None else _one(row) for row in found)])
    return markdown(("strategy", *held), lines)


def _one(row: Row) -> str:
    text = interval_text(row.accuracy)
    gain = row.over_random.get("accuracy")
    return text if gain is None else f"{text}, {contrast_text(gain)}"


def site_table(summary: Summary) -> list[str]:
    """Return the AUROC at each site."""
    sites = list(summary.rows[0].sites) if summary.rows else []
    rows = [[r.strategy, *(interval_text(r.sites[s]) for s in sites)] for r in main_rows(summary)]
    return markdown(("strategy", *sites), rows)


def curve_table(summary: Summary, table: SelectionTable) -> list[str]:
    """Return the budget curves."""
    header = ("strategy", "mode", "splits", *(f"accuracy at {b:.0%}" for b in table.budgets),
              "area", "area over Random (95%)", "labels saved (95%)",
              "of two views' Random (95%)")  # fmt: skip
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
            "" if curve.two_view_saving is None else interval_text(curve.two_view_saving, "+.0%"),
        ]
        for curve in ordered
    ]
    return [
        *markdown(header, rows),
        "",
        "Area: mean accuracy over the budgets' range. Labels saved: share of the pools by which "
        "fewer labels than Random's reach the rivals' accuracy of all labels less one point, on "
        "curves from no label to all of them, each from its own start: one that starts above it "
        "saves all that Random needs. The last column is against Random of two views and their "
        "accuracy of all labels less one point.",
    ]


def main_rows(summary: Summary) -> list[Row]:
    """Return the federated rows at the main budget, controls first, by accuracy."""
    rows = _main(summary.rows, summary)
    return sorted(rows, key=lambda row: (not _control(row), -row.accuracy.value))


def _main(rows: Iterable[Row], summary: Summary) -> list[Row]:
    return [
        row
        for row in rows
        if row.mode == "federated" and (row.budget == summary.main_budget or _control(row))
    ]


def _control(row: Row) -> bool:
    return row.strategy in CONTROLS


def _named(strategy: str) -> str:
    if strategy in DUAL_SCORES:
        return f"{strategy} (ADAptation's score)"
    return f"{strategy} (ours)" if is_ours(strategy) else strategy


def _cells(row: Row) -> list[str]:
    return [
        _named(row.strategy),
        str(row.splits),
        f"{row.labels:.0f}",
        interval_text(row.accuracy),
        interval_text(row.auroc),
        f"{row.worst_site_auroc:.3f}",
        *(contrast_text(row.over_random.get(metric)) for metric in METRICS),
    ]
