"""The numbers of a table of outlines as files: table.json and table.csv."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Mapping, Sequence
from typing import Any

from sonofed_simulations.segmentation_summary import MaskSummaryRow, PlugIn
from sonofed_simulations.statistics import Contrast, Effect
from sonofed_simulations.tables.mask_effects import over_baseline, over_start

MEASURES = ("dice", "nsd", "hd95", "ece", "over_baseline")
EFFECTS = ("d", "hospitals_higher", "hospitals_paired")
HEADER = (
    "row",
    "seeds",
    "published",
    *(f"{measure}{end}" for measure in MEASURES for end in ("", "_low", "_high")),
    "p",
    "p_holm",
    *EFFECTS,
    "start",
    *(f"over_start{end}" for end in ("", "_low", "_high", "_p", "_p_holm")),
    *(f"over_start_{name}" for name in EFFECTS),
)


def json_of(rows: Sequence[MaskSummaryRow], gained: Sequence[PlugIn]) -> str:
    """Rows as the summary has them, with the effects of their differences.

    Parameters
    ----------
    rows : sequence of MaskSummaryRow
        Of the table.
    gained : sequence of PlugIn
        What methods add to rows of the table.
    """
    values = [_values(row, rows, gained) for row in rows]
    return f"{json.dumps(values, indent=1)}\n"


def csv_of(
    published: Mapping[str, str], rows: Sequence[MaskSummaryRow], gained: Sequence[PlugIn]
) -> str:
    """One line a row; for the parameters see `json_of`, and `MaskTable` for what was published."""
    buffer = io.StringIO()
    writer = csv.writer(buffer, lineterminator="\n")
    writer.writerow(HEADER)
    by_method = {gain.method: gain for gain in gained}
    for row in rows:
        line: list[object] = [row.name, len(row.seeds), published[row.name]]
        for found in (row.dice, row.nsd, row.hd95, row.ece):
            line += [found.value, found.low, found.high]
        line += _numbers(row.over_baseline, over_baseline(row))
        gain = by_method.get(row.name)
        line += [None if gain is None else gain.start]
        line += _numbers(gain, None if gain is None else over_start(gain, rows))
        writer.writerow([f"{v:.5f}" if isinstance(v, float) else v for v in line])
    return buffer.getvalue()


def _values(
    row: MaskSummaryRow, rows: Sequence[MaskSummaryRow], gained: Sequence[PlugIn]
) -> dict[str, Any]:
    starts = [gain for gain in gained if gain.method == row.name]
    return {
        **row.model_dump(mode="json"),
        "effect_over_baseline": _json(over_baseline(row)),
        "over_start": [
            {**gain.model_dump(mode="json"), "effect": _json(over_start(gain, rows))}
            for gain in starts
        ],
    }


def _json(effect: Effect | None) -> dict[str, Any] | None:
    return None if effect is None else effect.model_dump(mode="json")


def _numbers(gain: Contrast | None, effect: Effect | None) -> list[object]:
    found = [None] * 5 if gain is None else [gain.value, gain.low, gain.high, gain.p, gain.p_holm]
    return [*found, *([None] * 3 if effect is None else [effect.d, effect.higher, effect.pairs])]
