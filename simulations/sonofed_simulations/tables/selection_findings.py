"""What a selection table says, in sentences that claim nothing inside an interval."""

from __future__ import annotations

from collections.abc import Sequence

from sonofed_simulations.rivals import STUDY_PRESET
from sonofed_simulations.statistics import Contrast, is_told
from sonofed_simulations.tables.preset import PRESET, is_ours
from sonofed_simulations.tables.selection_replicates import METRICS, NAMES
from sonofed_simulations.tables.selection_rows import Row
from sonofed_simulations.tables.selection_summary import Summary
from sonofed_simulations.tables.settings import ALL_LABELS, BASELINE, CONTROLS, RANDOM

MARGINS = {0.2: 0.0483, 0.3: 0.0395, 0.5: 0.0287}
"""ADAptation's accuracy over its second best (arXiv 2507.00474, Table 2), by budget."""
PRESETS = (STUDY_PRESET, PRESET)


def findings(summary: Summary) -> list[str]:
    """Return one list item a finding."""
    lines = []
    if summary.cells < summary.wanted:
        lines.append(
            f"- **This is {summary.cells / summary.wanted:.0%} of the table.** Strategies without "
            "a row have not run yet, and a row of few splits is of few test images: no order of "
            "its rows is a result."
        )
    rows = {
        row.strategy: row
        for row in summary.rows
        if row.mode == "federated"
        and (row.budget == summary.main_budget or row.strategy in CONTROLS)
    }
    strategies = [row for name, row in rows.items() if name not in (RANDOM, *CONTROLS)]
    for metric in METRICS:
        judged = [row for row in strategies if metric in row.over_random]
        if judged:
            lines.append(f"- {_over_random(judged, metric, summary.main_budget)}")
    ours = [row for row in strategies if is_ours(row.strategy) and row.over_best]
    if ours:
        lines.append(f"- {_over_best(ours, summary)}")
    margin = MARGINS.get(summary.main_budget)
    if margin is not None and any(row.strategy in PRESETS for row in ours):
        lines.append(f"- {_goal(ours, strategies, margin, summary)}")
    if {RANDOM, BASELINE, ALL_LABELS} <= rows.keys():
        texts = [
            f"{name} {rows[name].accuracy.value:.3f} and {rows[name].auroc.value:.3f}"
            for name in (BASELINE, RANDOM, ALL_LABELS)
        ]
        lines.append(f"- For scale, accuracy and AUROC: {', '.join(texts)}.")
    return lines


def _over_random(rows: Sequence[Row], metric: str, budget: float) -> str:
    better = [r for r in rows if _sure(r.over_random[metric]) > 0]
    worse = [r for r in rows if _sure(r.over_random[metric]) < 0]
    open_ones = len(rows) - len(better) - len(worse)
    subject = f"{NAMES[metric]} at {budget:.0%} of the labels, against Random after Holm"
    return (
        f"**{subject[0].upper()}{subject[1:]}**: better {_list(better, metric)}; worse "
        f"{_list(worse, metric)}; {open_ones} of {len(rows)} strategies cannot be told from it."
    )


def _over_best(rows: Sequence[Row], summary: Summary) -> str:
    above, below = (
        ", ".join(r.strategy for r in rows if _sure(r.over_best["accuracy"]) == sign) or "none"
        for sign in (1, -1)
    )
    return (
        f"Ours, and ADAptation's score, against the best rival, `{summary.best_rival}`, by "
        f"accuracy after Holm: above {above}; below {below}. Rows of two views start from two "
        "networks and predict from mirror images, too, which no rival does: what of their gain is "
        "the second network's is told on the project's attempts page."
    )


def _goal(ours: Sequence[Row], rows: Sequence[Row], margin: float, summary: Summary) -> str:
    told = "; ".join(_reached(row, margin) for row in ours if row.strategy in PRESETS)
    best = max(rows, key=lambda row: row.accuracy.value)
    return (
        f"The goal is ADAptation's own margin of {100 * margin:.2f} points of accuracy at "
        f"{summary.main_budget:.0%}, here over `{summary.best_rival}`, the best of all rivals and "
        "not of the paper's alone, and single intervals above zero against it and against Random: "
        f"{told}. The best mean is that of `{best.strategy}` ({best.accuracy.value:.3f})."
    )


def _reached(row: Row, margin: float) -> str:
    gain = row.over_best["accuracy"]
    reached = "reached" if gain.value >= margin else "missed"
    both = [found["accuracy"].low > 0 for found in (row.over_best, row.over_random) if found]
    above = {0: "neither interval", 1: "one interval", 2: "both intervals"}[sum(both)]
    return f"`{row.strategy}` {100 * gain.value:+.1f} ({reached}), {above} above zero"


def _sure(found: Contrast) -> int:
    """Sign of a difference; 0 where its interval holds 0 or the corrected p is too large."""
    if found.p_holm is None or not is_told(found):
        return 0
    return 1 if found.value > 0 else -1


def _list(rows: Sequence[Row], metric: str) -> str:
    ordered = sorted(rows, key=lambda r: -abs(r.over_random[metric].value))
    texts = [f"{r.strategy} ({r.over_random[metric].value:+.3f})" for r in ordered]
    return ", ".join(texts) or "none"
