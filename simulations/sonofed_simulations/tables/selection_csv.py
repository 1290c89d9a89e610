"""The rows of a selection table as CSV."""

from __future__ import annotations

import csv
import io
from collections.abc import Sequence

from sonofed_simulations.statistics import Interval
from sonofed_simulations.tables.selection_replicates import METRICS
from sonofed_simulations.tables.selection_rows import Row


def rows_as_csv(rows: Sequence[Row]) -> str:
    """Return one line a row, under a header."""
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
